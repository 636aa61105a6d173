//! Whether memory goes back to the system where it should.

use crate::instance::memory::resident_bytes;
use crate::instance::replica::Replica;

/// Less is lost in what other threads do meanwhile.
const LEAST_PROVABLE_BYTES: usize = 8 << 20;

/// Memory that should have gone back to the system, and how much did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Pages of its own, bytes.
    pub expected_bytes: usize,
    /// By how much less the process holds; `None` where the system does not say.
    pub returned_bytes: Option<usize>,
}

impl Freed {
    /// Runs `free`, and looks at the process before and afterwards.
    pub(crate) fn measure(expected_bytes: usize, free: impl FnOnce()) -> Self {
        let before = resident_bytes();
        free();
        let after = resident_bytes();
        Self {
            expected_bytes,
            returned_bytes: before
                .zip(after)
                .map(|(before, after)| before.saturating_sub(after)),
        }
    }

    /// Has an instance give its pages back, and asks the system what of them is still there.
    pub(crate) fn shed(shed: impl FnOnce(), replica: &Replica) -> Self {
        let expected_bytes = replica.memory_usage().private_bytes;
        shed();
        let left = replica.memory_usage().private_bytes;
        Self {
            expected_bytes,
            returned_bytes: resident_bytes().map(|_| expected_bytes.saturating_sub(left)),
        }
    }

    /// Runs `free`, which is to give back what is left: that is seen in the whole process only.
    pub(crate) fn and(self, free: impl FnOnce()) -> Self {
        let returned = self.returned_bytes.unwrap_or_default();
        let left = self.expected_bytes.saturating_sub(returned);
        let rest = Self::measure(left, free);
        let more = rest.returned_bytes.map(|more| more.min(left));
        Self {
            returned_bytes: more.map(|more| returned + more),
            ..self
        }
    }

    /// Whether there was enough of it to tell.
    pub(crate) fn is_provable(&self) -> bool {
        self.expected_bytes >= LEAST_PROVABLE_BYTES
    }

    /// Whether it is plain that memory was kept: less than half came back of an amount that shows.
    pub(crate) fn is_kept(&self) -> bool {
        let half = self.expected_bytes / 2;
        self.is_provable() && self.returned_bytes.is_some_and(|returned| returned < half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_kept_where_less_than_half_of_much_came_back() {
        let freed = |expected_bytes, returned_bytes| Freed {
            expected_bytes,
            returned_bytes,
        };
        assert!(freed(100 << 20, Some(49 << 20)).is_kept());
        assert!(freed(8 << 20, Some(0)).is_kept());
        assert!(!freed(100 << 20, Some(50 << 20)).is_kept());
        // Little, or a system that does not say.
        assert!(!freed((8 << 20) - 1, Some(0)).is_kept());
        assert!(!freed(100 << 20, None).is_kept());
    }

    /// The whole process is looked at, so that it must have no other tests in it: this one runs itself anew.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_freed_is_seen() {
        const ALONE: &str = "WASM_MOLT_TEST_ALONE";
        if std::env::var_os(ALONE).is_some() {
            let mut pages = vec![1_u8; 64 << 20];
            pages[..].fill(2);
            // Otherwise the compiler sees that nobody reads them, and there are none.
            std::hint::black_box(&mut pages);
            let freed = Freed::measure(pages.len(), || drop(pages));
            assert!(!freed.is_kept(), "{freed:?}");
            return;
        }
        let (_, module) = module_path!().split_once("::").unwrap();
        let name = format!("{module}::what_is_freed_is_seen");
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
    }
}
