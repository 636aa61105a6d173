//! Crash loops: what cannot be replaced, or traps whatever is called, is given up in the end instead of
//! burning the processor.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use wasm_molt_lifecycle::{Backoff, FailedPhase};

use super::Shared;
use crate::error::Error;
use crate::instance::deadline::Deadline;

/// Replacements in a row, without a call that completed, that make a crash loop.
const CRASH_LOOP: u32 = 100;
/// Replacements in a row that may fail with nothing left to serve.
const MOST_FAILED_REPAIRS: u32 = 5;

/// What a manager remembers of instances that trapped.
#[derive(Default)]
pub(crate) struct Crashes {
    /// Traps in a row, with no call that completed.
    traps: AtomicU32,
    last_trap: Mutex<Option<Error>>,
    /// Replacements of trapped instances in a row that failed, when the next may be tried, and why.
    repairs: Mutex<(Failures, Option<Error>)>,
    /// It is given up until a reload, for that reason; and whether, for those who ask often.
    given_up: Mutex<Option<Error>>,
    is_given_up: AtomicBool,
    /// Somebody comes when the wait is over.
    has_timer: AtomicBool,
}

/// How often something has failed in a row, and when it may be tried again.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Failures {
    pub(super) count: u32,
    pub(super) not_before: Option<Instant>,
}

impl Failures {
    pub(super) fn is_waiting(&self) -> bool {
        self.not_before.is_some_and(|until| Instant::now() < until)
    }
}

impl Crashes {
    /// A call has completed: whatever traps, not everything does.
    #[inline]
    pub(crate) fn call_completed(&self) {
        if self.traps.load(Ordering::Relaxed) != 0 {
            self.traps.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn given_up(&self) -> Option<Error> {
        if !self.is_given_up.load(Ordering::SeqCst) {
            return None;
        }
        self.lock_given_up().clone()
    }

    fn lock_repairs(&self) -> MutexGuard<'_, (Failures, Option<Error>)> {
        self.repairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One trapped instance more was replaced.
    pub(super) fn was_repaired(&self, trap: Option<Error>) {
        self.traps.fetch_add(1, Ordering::Relaxed);
        if let Some(trap) = trap {
            *self
                .last_trap
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(trap);
        }
        *self.lock_repairs() = (Failures::default(), None);
    }

    /// A replacement has failed. The first is tried again at once, later ones back off; with nothing left to
    /// serve some in a row are the end, and the error says so.
    pub(super) fn repair_failed(
        &self,
        error: &Error,
        backoff: Option<Backoff>,
        serves_nothing: bool,
    ) -> Error {
        let mut repairs = self.lock_repairs();
        let (failures, last) = &mut *repairs;
        failures.count = failures.count.saturating_add(1);
        let wait =
            (failures.count > 1).then(|| backoff.unwrap_or_default().after(failures.count - 1));
        failures.not_before = wait.and_then(|wait| Instant::now().checked_add(wait));
        let mut error = error.clone();
        if serves_nothing && backoff.is_some() && failures.count >= MOST_FAILED_REPAIRS {
            if let Error::ReloadFailed { what, .. } = &mut error {
                let count = failures.count;
                let _ = write!(
                    what,
                    " ({count} times in a row, and nothing serves; reload() tries again)"
                );
            }
            self.give_up(&error);
        }
        *last = Some(error.clone());
        error
    }

    /// The last failure, if the next replacement has to wait.
    pub(super) fn repair_waits(&self) -> Option<Error> {
        let repairs = self.lock_repairs();
        let (failures, last) = &*repairs;
        last.clone().filter(|_| failures.is_waiting())
    }

    /// A generation serves that somebody has asked for: what was before does not count.
    pub(crate) fn recovered(&self) {
        self.traps.store(0, Ordering::Relaxed);
        *self.lock_repairs() = (Failures::default(), None);
        self.is_given_up.store(false, Ordering::SeqCst);
        *self.lock_given_up() = None;
    }

    fn give_up(&self, error: &Error) {
        *self.lock_given_up() = Some(error.clone());
        self.is_given_up.store(true, Ordering::SeqCst);
    }

    fn lock_given_up(&self) -> MutexGuard<'_, Option<Error>> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Trapped instances are not replaced any more: it was tried often enough, or whatever is called traps.
    pub(super) fn gives_up_replacing(self: &Arc<Self>) -> bool {
        if let Some(error) = self.crashes.given_up() {
            // Somebody may have come to wait since.
            self.refuse_all(error);
            return true;
        }
        let traps = self.crashes.traps.load(Ordering::Relaxed);
        if !self.is_recycled() || traps < CRASH_LOOP {
            return false;
        }
        let last = self.crashes.last_trap.lock();
        let last = last.unwrap_or_else(PoisonError::into_inner).clone();
        let cause = last.unwrap_or_else(|| Error::internal("a trap that nobody knows"));
        let what = format!(
            "the replacement of {} ({traps} instances in a row trapped without a call that completed; \
             reload() tries again)",
            self.name()
        );
        let error = Error::ReloadFailed {
            what,
            phase: FailedPhase::Instantiate,
            cause: Box::new(cause),
        };
        self.crashes.give_up(&error);
        // Those that did not trap serve no more, either.
        for slot in 0..self.options.instances {
            self.gate.withdraw(slot);
        }
        self.swap_ended(&Err(error.clone()));
        self.refuse_all(error);
        true
    }

    /// Whether the next replacement has to wait; it comes by itself.
    pub(super) fn replaces_later(self: &Arc<Self>) -> bool {
        let until = {
            let repairs = self.crashes.lock_repairs();
            repairs.0.not_before.filter(|_| repairs.0.is_waiting())
        };
        let Some(until) = until else { return false };
        if self.crashes.has_timer.swap(true, Ordering::AcqRel) {
            // It comes for all of them.
            return true;
        }
        let weak = Arc::downgrade(self);
        let again = move || {
            if let Some(shared) = weak.upgrade() {
                shared.crashes.has_timer.store(false, Ordering::Release);
                shared.repair_retired();
            }
        };
        // Without a timer thread it does not wait.
        match Deadline::after(until.saturating_duration_since(Instant::now()), again) {
            Ok(deadline) => {
                deadline.detach();
                true
            }
            Err(_) => {
                self.crashes.has_timer.store(false, Ordering::Release);
                false
            }
        }
    }
}
