//! Counters and times of one manager.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram as Hdr;

use crate::error::{Error, ErrorCode, Result};
use crate::manager::call::Outcome;

/// Calls by how they ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallCounts {
    /// Returned.
    pub completed: u64,
    /// Ended with an exception of the host or a mistake in the arguments.
    pub failed: u64,
    /// Trapped.
    pub trapped: u64,
    /// Were stopped while they ran: timeout, signal, fuel, `destroy()`.
    pub interrupted: u64,
    /// Never ran.
    pub rejected: u64,
}

/// A distribution of times, in milliseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Histogram {
    /// How many.
    pub count: u64,
    /// Shortest.
    pub min: f64,
    /// Average.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Longest.
    pub max: f64,
}

/// Recorded times.
#[derive(Debug, Clone, Default)]
pub struct Times {
    /// In the guest, calls on pool threads.
    pub run: Histogram,
    /// From admission to start.
    pub wait: Histogram,
    /// The gate was closed.
    pub pause: Histogram,
}

/// One hour, in the histograms' unit; longer times count as this.
const LONGEST_NS: u64 = 3_600_000_000_000;

struct Inner {
    calls: CallCounts,
    reloads: BTreeMap<String, u64>,
    reloads_failed: u64,
    resets: u64,
    run: Hdr<u64>,
    wait: Hdr<u64>,
    pause: Hdr<u64>,
}

/// Any thread.
pub(crate) struct Stats(Mutex<Inner>);

impl Stats {
    pub(crate) fn new() -> Result<Self> {
        // They grow with what they record: a thousand forks have three thousand of them.
        let histogram = || -> Result<Hdr<u64>> {
            let mut small = Hdr::new_with_bounds(100, 200, 2).map_err(Error::internal)?;
            small.auto(true);
            Ok(small)
        };
        Ok(Self(Mutex::new(Inner {
            calls: CallCounts::default(),
            reloads: BTreeMap::new(),
            reloads_failed: 0,
            resets: 0,
            run: histogram()?,
            wait: histogram()?,
            pause: histogram()?,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn was_reset(&self) {
        self.lock().resets += 1;
    }

    /// How long a call on a pool thread takes.
    pub(crate) fn mean_run(&self) -> Duration {
        Duration::from_nanos(self.lock().run.mean() as u64)
    }

    pub(crate) fn resets(&self) -> u64 {
        self.lock().resets
    }

    pub(crate) fn rejected(&self) {
        self.lock().calls.rejected += 1;
    }

    pub(crate) fn waited(&self, time: Duration) {
        record(&mut self.lock().wait, time);
    }

    pub(crate) fn ran(&self, time: Duration, outcome: &Result<Outcome>) {
        let mut inner = self.lock();
        record(&mut inner.run, time);
        inner.calls.count(outcome.as_ref().err());
    }

    /// Synchronous calls: the fast path counts on its own and hands the sums over.
    pub(crate) fn ran_at_home(&self, completed: u64) {
        self.lock().calls.completed += completed;
    }

    pub(crate) fn failed_at_home(&self, error: &Error) {
        self.lock().calls.count(Some(error));
    }

    /// A generation, or one instance, was replaced. Counted before the new one serves.
    pub(crate) fn reloaded(&self, reason: &str) {
        let mut inner = self.lock();
        // Reasons are the caller's own words: a bound keeps the table from growing for ever.
        let is_new = !inner.reloads.contains_key(reason);
        let key = if is_new && inner.reloads.len() >= MAX_REASONS {
            "other"
        } else {
            reason
        };
        *inner.reloads.entry(key.to_owned()).or_default() += 1;
    }

    pub(crate) fn paused(&self, pause: Duration) {
        record(&mut self.lock().pause, pause);
    }

    pub(crate) fn reload_failed(&self) {
        self.lock().reloads_failed += 1;
    }

    pub(crate) fn calls(&self) -> CallCounts {
        self.lock().calls
    }

    pub(crate) fn reloads(&self) -> (BTreeMap<String, u64>, u64) {
        let inner = self.lock();
        (inner.reloads.clone(), inner.reloads_failed)
    }

    pub(crate) fn times(&self) -> Times {
        let inner = self.lock();
        Times {
            run: read(&inner.run),
            wait: read(&inner.wait),
            pause: read(&inner.pause),
        }
    }
}

/// Distinct reload reasons that are counted apart; further ones count as `other`.
const MAX_REASONS: usize = 64;

impl CallCounts {
    fn count(&mut self, error: Option<&Error>) {
        let counter = match error {
            None => &mut self.completed,
            Some(Error::Trap { .. }) => &mut self.trapped,
            Some(
                Error::Aborted(_)
                | Error::Plain {
                    code: ErrorCode::Timeout | ErrorCode::Interrupted | ErrorCode::OutOfFuel,
                    ..
                },
            ) => &mut self.interrupted,
            Some(_) => &mut self.failed,
        };
        *counter += 1;
    }
}

fn record(histogram: &mut Hdr<u64>, time: Duration) {
    let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(LONGEST_NS);
    // It resizes itself for whatever is not too long, so there is nothing to fail.
    let _ = histogram.record(nanoseconds.min(LONGEST_NS));
}

fn read(histogram: &Hdr<u64>) -> Histogram {
    let ms = |ns: u64| ns as f64 / 1e6;
    if histogram.is_empty() {
        return Histogram::default();
    }
    Histogram {
        count: histogram.len(),
        min: ms(histogram.min()),
        mean: histogram.mean() / 1e6,
        p50: ms(histogram.value_at_quantile(0.5)),
        p90: ms(histogram.value_at_quantile(0.9)),
        p99: ms(histogram.value_at_quantile(0.99)),
        p999: ms(histogram.value_at_quantile(0.999)),
        max: ms(histogram.max()),
    }
}
