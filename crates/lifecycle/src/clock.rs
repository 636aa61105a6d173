//! Time, as the protocol sees it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A monotonic clock. Only differences between two readings mean anything.
pub trait Clock: Send + Sync {
    /// The time since an arbitrary start. Never less than an earlier reading.
    fn now(&self) -> Duration;
}

/// The system's monotonic clock, counted from the creation of this value.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

/// A clock that stands still until a test moves it. Any thread may do so.
///
/// Holds whole nanoseconds in 64 bits: 584 years, then it stays at its end.
#[derive(Debug, Default)]
pub struct ManualClock {
    nanos: AtomicU64,
}

impl ManualClock {
    /// Sets the time. Going back is refused: the clock stays where it is.
    pub fn set(&self, now: Duration) {
        self.nanos.fetch_max(whole_nanos(now), Ordering::SeqCst);
    }

    /// Moves the time forward.
    pub fn advance(&self, by: Duration) {
        let by = whole_nanos(by);
        let mut now = self.nanos.load(Ordering::SeqCst);
        while let Err(moved) = self.nanos.compare_exchange(
            now,
            now.saturating_add(by),
            Ordering::SeqCst,
            Ordering::SeqCst,
        ) {
            now = moved;
        }
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::SeqCst))
    }
}

fn whole_nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn manual_clock_moves_only_forward() {
        let clock = ManualClock::default();
        assert_eq!(clock.now(), Duration::ZERO);
        clock.advance(Duration::from_millis(5));
        clock.set(Duration::from_millis(3));
        assert_eq!(clock.now(), Duration::from_millis(5));
        clock.set(Duration::from_millis(8));
        clock.advance(Duration::MAX);
        assert_eq!(clock.now(), Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn system_clock_is_monotonic() {
        let clock = SystemClock::default();
        let earlier = clock.now();
        assert!(clock.now() >= earlier);
    }
}
