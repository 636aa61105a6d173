//! Counters, times and figures of one manager.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram as Hdr;
use wasm_molt_lifecycle::{GateCounts, Home};

use super::{Job, ManagerState, Shared};
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

/// Figures of one moment.
#[derive(Debug, Clone)]
pub struct ManagerStats {
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub state: ManagerState,
    /// What serves.
    pub generation: u64,
    /// Slots, and what they do.
    pub gate: GateCounts,
    /// Instances that wait to be replaced.
    pub poisoned: usize,
    /// Bytes of linear memory over all replicas.
    pub memory_bytes: usize,
    /// The most there was at any reading.
    pub memory_bytes_peak: usize,
    /// Calls by how they ended.
    pub calls: CallCounts,
    /// Reloads by reason.
    pub reloads: BTreeMap<String, u64>,
    /// Reloads that failed.
    pub reloads_failed: u64,
    /// Instances that are to be recycled, and have not been yet.
    pub recycles_due: usize,
    /// Resets that succeeded, those after isolated calls not among them.
    pub resets: u64,
    /// Snapshots that can be used.
    pub snapshots: usize,
    /// Distributions.
    pub times: Times,
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

impl Shared {
    pub(super) fn read_stats(&self, home: Option<&Home<Job>>) -> ManagerStats {
        let (generation, memory_bytes, poisoned) = {
            let serving = self.lock_serving();
            let bytes = serving.memory_bytes();
            let poisoned = serving.replicas.iter().filter(|r| r.is_poisoned()).count();
            (serving.generation, bytes, poisoned)
        };
        self.memory_bytes_peak
            .fetch_max(memory_bytes, Ordering::Relaxed);
        let (reloads, reloads_failed) = self.stats.reloads();
        ManagerStats {
            name: self.name().to_owned(),
            state: self.state(),
            generation: generation.get(),
            gate: home.map_or_else(|| self.gate.counts(), Home::counts),
            poisoned,
            memory_bytes,
            memory_bytes_peak: self.memory_bytes_peak.load(Ordering::Relaxed),
            calls: self.stats.calls(),
            reloads,
            reloads_failed,
            recycles_due: self.recycling.due(),
            resets: self.stats.resets(),
            snapshots: self.lock_snapshots().alive().len(),
            times: self.stats.times(),
        }
    }

    /// Linear memory of all that exists.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.lock_serving().memory_bytes()
    }

    /// Notes what is held just before memory is given back, so that the peak is true.
    pub(crate) fn note_peak(&self, memory_bytes: usize) {
        self.memory_bytes_peak
            .fetch_max(memory_bytes, Ordering::Relaxed);
    }
}
