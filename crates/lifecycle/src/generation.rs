//! The number of a generation.

use std::fmt;

/// The number of everything that one successful load or swap built. Counts from 1 and is never
/// reused.
// Invariant: never 0, so that 0 can mean "none yet" on the other side of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(u64);

impl Generation {
    /// The generation that the first load builds.
    pub const FIRST: Self = Self(1);

    /// The generation of that number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        // One swap each nanosecond would take 584 years to get to the end.
        Self(self.0.saturating_add(1))
    }

    /// The plain number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn counts_from_one() {
        assert_eq!(Generation::FIRST.get(), 1);
        assert_eq!(Generation::FIRST.next().get(), 2);
        assert!(Generation::FIRST < Generation::FIRST.next());
        assert_eq!(format!("{:>3}", Generation::FIRST), "  1");
    }
}
