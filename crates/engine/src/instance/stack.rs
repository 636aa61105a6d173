//! How much native stack a thread has left.
//!
//! wasmtime counts a guest's stack from the place of the call and trusts that it is there. On a pool
//! thread it is, by construction. On the JS thread V8 may have used nearly all of it (a worker's stack
//! is 4 MiB), and running over its end would kill the process: so it is asked first.

use crate::error::{Error, TrapInfo};

/// Host frames on top of the guest's own: a host call back into JavaScript, signal handling.
const RESERVE_BYTES: usize = 160 << 10;

/// The lowest address at which a call with `stack_bytes` may still begin on the calling thread;
/// 0 (no limit) where the thread's stack is not known.
pub fn stack_floor(stack_bytes: usize) -> usize {
    stacker::remaining_stack().map_or(0, |left| {
        let end = here().saturating_sub(left);
        end.saturating_add(stack_bytes)
            .saturating_add(RESERVE_BYTES)
    })
}

/// Whether the calling thread is still above `floor`.
#[inline]
pub fn has_stack(floor: usize) -> bool {
    here() >= floor
}

#[inline]
fn here() -> usize {
    let mark = 0u8;
    std::ptr::from_ref(std::hint::black_box(&mark)) as usize
}

/// The error of a call that was not even begun.
#[cold]
pub fn out_of_stack(what: &str, stack_bytes: usize) -> Error {
    Error::Trap {
        what: what.into(),
        info: Box::new(TrapInfo {
            kind: "stack-overflow",
            message: format!(
                "fewer than limits.stackBytes = {stack_bytes} bytes of native stack are left on this \
                 thread; the guest was not entered"
            ),
            wasm_stack: String::new(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_what_it_was_given_and_no_more() {
        let small = std::thread::Builder::new().stack_size(1 << 20);
        small
            .spawn(|| {
                assert!(has_stack(stack_floor(256 << 10)));
                assert!(!has_stack(stack_floor(2 << 20)));
            })
            .unwrap()
            .join()
            .unwrap();
    }
}
