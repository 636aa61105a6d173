//! What one instance has behind it, and whether that is enough.
//!
//! Whoever holds the replica notes its calls; everything else may be done by any thread.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use wasm_molt_lifecycle::{Crossing, Growth, Reason, Thresholds, Wear as Worn};

use crate::instance::deadline::Deadline;
use crate::instance::memory::memory_changes;

/// Of one instance, or of what it has been since it was last reset.
pub(crate) struct Wear {
    thresholds: Thresholds,
    calls: AtomicU64,
    /// With so many calls it is looked at.
    calls_due: u64,
    /// Memories of the process had changed so often when it was last looked at.
    seen: AtomicUsize,
    /// It is to be recycled, and has not been yet.
    is_due: AtomicBool,
    state: Mutex<State>,
}

struct State {
    born: Instant,
    baseline: u64,
    growth: Growth,
    /// What it had when it was last judged, and by how much it has grown when it last grew.
    bytes: u64,
    last_step: u64,
    told: Told,
    /// Runs out when it is too old.
    age: Option<Deadline>,
}

/// What somebody was told of already, and need not be told again.
#[derive(Default)]
struct Told {
    memory: bool,
    /// In which episode of the process having too much.
    budget: Option<usize>,
}

/// What is known of it at a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    pub(crate) calls: u64,
    pub(crate) age: Duration,
    pub(crate) growth_per_call: f64,
}

impl Wear {
    pub(crate) fn new(thresholds: Thresholds) -> Self {
        Self {
            thresholds,
            calls: AtomicU64::new(0),
            calls_due: thresholds.calls().unwrap_or(u64::MAX),
            seen: AtomicUsize::new(0),
            is_due: AtomicBool::new(false),
            state: Mutex::new(State {
                born: Instant::now(),
                baseline: 0,
                growth: Growth::default(),
                bytes: 0,
                last_step: 0,
                told: Told::default(),
                age: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It begins to serve with so many bytes, new or as good as new.
    ///
    /// * `too_old`: makes what runs out when it is too old.
    pub(crate) fn begin(&self, bytes: usize, too_old: impl FnOnce(Duration) -> Option<Deadline>) {
        self.calls.store(0, Ordering::Relaxed);
        self.seen.store(memory_changes(), Ordering::Relaxed);
        self.is_due.store(false, Ordering::Release);
        let age = self.thresholds.age().and_then(too_old);
        let mut state = self.lock();
        state.born = Instant::now();
        state.baseline = bytes as u64;
        state.growth = Growth::beginning_with(bytes as u64);
        (state.bytes, state.last_step) = (bytes as u64, 0);
        state.told = Told::default();
        let before = std::mem::replace(&mut state.age, age);
        drop(state);
        drop(before);
    }

    /// It serves no more: nobody need come for its age.
    pub(crate) fn end(&self) {
        let age = self.lock().age.take();
        drop(age);
    }

    /// One more call has ended; whether it is to be looked at. By the thread that holds the replica.
    #[inline]
    pub(crate) fn note_call(&self) -> bool {
        let calls = self.calls.load(Ordering::Relaxed) + 1;
        self.calls.store(calls, Ordering::Relaxed);
        self.wants_a_look_at(calls)
    }

    /// Whether anything has happened since it was last judged that may matter.
    #[inline]
    pub(crate) fn wants_a_look(&self) -> bool {
        self.wants_a_look_at(self.calls())
    }

    #[inline]
    fn wants_a_look_at(&self, calls: u64) -> bool {
        calls >= self.calls_due || memory_changes() != self.seen.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Which threshold is crossed.
    ///
    /// * `bytes`: of linear memory. `limit`: what it may have. `ahead`: see [`Worn::ahead`].
    pub(crate) fn judge(&self, bytes: usize, limit: u64, ahead: u64) -> Option<Crossing> {
        // First: what changes from here on is looked at next time.
        self.seen.store(memory_changes(), Ordering::Relaxed);
        let calls = self.calls();
        let bytes = bytes as u64;
        let mut state = self.lock();
        state.growth.note(calls, bytes);
        if bytes != state.bytes {
            state.last_step = bytes.saturating_sub(state.bytes);
            state.bytes = bytes;
        }
        let crossing = self.thresholds.judge(&Worn {
            calls,
            bytes,
            baseline: state.baseline,
            limit,
            growth: &state.growth,
            ahead,
        });
        if crossing.is_none() && state.told.memory {
            state.told.memory = false;
        }
        let is_old = || {
            let most = self.thresholds.age();
            most.is_some_and(|most| state.born.elapsed() >= most)
        };
        crossing.or_else(|| {
            is_old().then_some(Crossing {
                reason: Reason::Age,
                threshold: None,
            })
        })
    }

    /// Whether that is news to whoever decides by himself.
    pub(crate) fn tell_once(&self, reason: Reason, episode: usize) -> bool {
        let told = &mut self.lock().told;
        match reason {
            Reason::Budget => told.budget.replace(episode) != Some(episode),
            _ => !std::mem::replace(&mut told.memory, true),
        }
    }

    /// It is to be recycled from now on; `false` if it was already.
    pub(crate) fn becomes_due(&self) -> bool {
        !self.is_due.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn is_due(&self) -> bool {
        self.is_due.load(Ordering::Acquire)
    }

    /// It has not been recycled, and may become due again.
    pub(crate) fn was_spared(&self) {
        self.is_due.store(false, Ordering::Release);
    }

    /// Whether it had better run nothing more, now that a replacement is on its way: the next call may reach the
    /// limit, or it has gone as far beyond its threshold as that is from where it began.
    pub(crate) fn is_full(&self, limit: u64) -> bool {
        let state = self.lock();
        let next = state.bytes.saturating_add(state.last_step);
        let threshold = self.thresholds.memory(state.baseline, limit);
        let is_far = |most: u64| {
            most > state.baseline && state.bytes >= most.saturating_add(most - state.baseline)
        };
        state.last_step > 0 && next > limit || threshold.is_some_and(is_far)
    }

    pub(crate) fn baseline(&self) -> u64 {
        self.lock().baseline
    }

    /// The threshold for its memory, where there is one.
    pub(crate) fn memory_threshold(&self, limit: u64) -> Option<u64> {
        self.thresholds.memory(self.baseline(), limit)
    }

    pub(crate) fn read(&self, ahead: u64) -> Reading {
        let calls = self.calls();
        let state = self.lock();
        Reading {
            calls,
            age: state.born.elapsed(),
            growth_per_call: state.growth.per_call(calls, ahead),
        }
    }
}
