//! Instances are recycled: replaced or reset because a threshold says so, one at a time, while the others
//! serve.
//!
//! Whoever gives a replica back judges it first ([`Shared::judge`]); what comes of that is queued, and a
//! thread of its own carries it out: make a fresh instance, withdraw the slot, hand state over, publish.
//! A synchronous call that ends has it done on its own thread, if its hooks allow that.
//! Swaps and pauses come first: a recycle that still waits for its slot steps back for them.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use wasm_molt_lifecycle::{
    Backoff, Crossing, FailedPhase, Generation, Home, InFlight, Policy, Reason,
};

use super::start::Making;
use super::{
    Answer, Event, HookScope, Job, ManagerState, Op, PendingReload, Replaced, Shared, guarded,
};
use crate::budget;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorCode, Result};
use crate::memory::resident_bytes;
use crate::options::RecycleStrategy;
use crate::pause::ResetOptions;
use crate::pool::Pool;
use crate::replica::{Blueprint, Replica};
use crate::swap::{ReloadOptions, ReloadReport, Strategy};
use crate::wear::Reading;

/// Longest wait for whoever is inside.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where another replica is due as well, and may be free: some times the length of a call, within
/// these bounds. Whoever has it for longer holds a lease.
const PATIENCE_IN_A_QUEUE: (Duration, Duration) =
    (Duration::from_millis(20), Duration::from_secs(1));
const CALLS_OF_PATIENCE: u32 = 4;
/// Calls that predictions look ahead, at least.
const LEAST_AHEAD: u64 = 16;
/// Replacements in a row, without a call that completed, that make a crash loop.
const CRASH_LOOP: u32 = 100;
/// Replacements in a row that may fail with nothing left to serve.
const MOST_FAILED_REPAIRS: u32 = 5;
/// Less is lost in what other threads do meanwhile.
const LEAST_PROVABLE_BYTES: usize = 8 << 20;
/// What a recycle is taken to cost before there was one.
const COST_UNKNOWN: Duration = Duration::from_millis(5);

/// A threshold was crossed.
#[derive(Debug, Clone)]
pub struct Pressure {
    /// Which.
    pub reason: Reason,
    /// Whose instance.
    pub slot: usize,
    /// What served.
    pub generation: Generation,
    /// Its linear memory.
    pub memory_bytes: usize,
    /// The threshold, where it was one of memory.
    pub threshold_bytes: Option<u64>,
    /// Calls that it has run.
    pub calls: u64,
    /// The estimate for the next calls.
    pub growth_bytes_per_call: f64,
    /// Names the decision to recycle it; `None` if that is up to the application.
    pub decision: Option<u64>,
}

/// What a recycle did.
#[derive(Debug, Clone)]
pub struct RecycleReport {
    /// As of a reload. `generation` and `previous_generation` are the same for a reset.
    pub reload: ReloadReport,
    /// How it was done.
    pub strategy: RecycleStrategy,
    /// Whose instance.
    pub slot: usize,
    /// Calls that the old instance had run.
    pub calls: u64,
    /// How long it had lived.
    pub age: Duration,
    /// What became of its memory.
    pub freed: Freed,
}

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
    fn shed(shed: impl FnOnce(), replica: &Replica) -> Self {
        let expected_bytes = replica.memory_usage().private_bytes;
        shed();
        let left = replica.memory_usage().private_bytes;
        Self {
            expected_bytes,
            returned_bytes: resident_bytes().map(|_| expected_bytes.saturating_sub(left)),
        }
    }

    /// Runs `free`, which is to give back what is left: that is seen in the whole process only.
    fn and(self, free: impl FnOnce()) -> Self {
        let returned = self.returned_bytes.unwrap_or_default();
        let left = self.expected_bytes.saturating_sub(returned);
        let rest = Self::measure(left, free);
        let more = rest.returned_bytes.map(|more| more.min(left));
        Self {
            returned_bytes: more.map(|more| returned + more),
            ..self
        }
    }

    /// Whether it is plain that memory was kept: less than half came back of an amount that shows.
    fn is_kept(&self) -> bool {
        let Self {
            expected_bytes,
            returned_bytes,
        } = *self;
        expected_bytes >= LEAST_PROVABLE_BYTES
            && returned_bytes.is_some_and(|returned| returned < expected_bytes / 2)
    }
}

/// A decision, until it has its outcome.
#[derive(Debug)]
pub(crate) struct Due {
    id: u64,
    replica: Arc<Replica>,
    pressure: Pressure,
}

/// How a decision ends.
enum Outcome {
    Done(Box<RecycleReport>),
    /// The new instance serves since that roll; the report comes when the old one has been left.
    Rolled(Box<ReloadReport>, u64),
    /// Something else has replaced it.
    Superseded,
    /// Something else comes first.
    SteppedBack,
}

/// What a manager remembers of recycling.
#[derive(Default)]
pub(crate) struct Recycling {
    /// Swaps and pauses that wait for it.
    wanted: AtomicUsize,
    /// Decisions without an outcome.
    due: AtomicUsize,
    /// A hook has returned a promise: none of this on the home thread.
    has_async_hooks: AtomicBool,
    /// By slot.
    failures: Mutex<Vec<Failures>>,
    /// Calls that ran on an instance from the decision until it was replaced, the last time.
    calls_meanwhile: AtomicU64,
    /// Nanoseconds that a recycle takes, smoothed; 0: not known.
    cost_ns: AtomicU64,
    /// Recycles in a row after which memory did not come back.
    kept: AtomicU32,
    is_warned: AtomicBool,
    /// Traps in a row, with no call that completed.
    traps: AtomicU32,
    last_trap: Mutex<Option<Error>>,
    /// Replacements of trapped instances in a row that failed, when the next may be tried, and why.
    repairs: Mutex<(Failures, Option<Error>)>,
    /// It is given up until a reload, for that reason; and whether, for those who ask often.
    given_up: Mutex<Option<Error>>,
    is_given_up: AtomicBool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Failures {
    count: u32,
    not_before: Option<Instant>,
}

impl Failures {
    fn is_waiting(&self) -> bool {
        self.not_before.is_some_and(|until| Instant::now() < until)
    }
}

impl Recycling {
    pub(super) fn due(&self) -> usize {
        self.due.load(Ordering::Relaxed)
    }

    /// Hooks return promises: nothing of this on the home thread.
    pub(super) fn has_async_hooks(&self) {
        self.has_async_hooks.store(true, Ordering::Relaxed);
    }

    /// A call has completed: whatever traps, not everything does.
    #[inline]
    pub(crate) fn call_completed(&self) {
        if self.traps.load(Ordering::Relaxed) != 0 {
            self.traps.store(0, Ordering::Relaxed);
        }
    }

    /// A swap begins to wait; the recycle under way is to step back.
    pub(super) fn is_wanted(&self, delta: isize) {
        self.wanted
            .fetch_add(delta.cast_unsigned(), Ordering::AcqRel);
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
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn give_up(&self, error: &Error) {
        *self.lock_given_up() = Some(error.clone());
        self.is_given_up.store(true, Ordering::SeqCst);
    }

    fn lock_given_up(&self) -> MutexGuard<'_, Option<Error>> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ahead(&self) -> u64 {
        let meanwhile = self.calls_meanwhile.load(Ordering::Relaxed);
        LEAST_AHEAD.max(meanwhile.saturating_mul(2))
    }

    pub(crate) fn cost(&self) -> Duration {
        match self.cost_ns.load(Ordering::Relaxed) {
            0 => COST_UNKNOWN,
            ns => Duration::from_nanos(ns),
        }
    }

    fn took(&self, time: Duration) {
        let now = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
        let before = self.cost_ns.load(Ordering::Relaxed);
        let smoothed = if before == 0 {
            now
        } else {
            before / 4 * 3 + now / 4
        };
        self.cost_ns.store(smoothed.max(1), Ordering::Relaxed);
    }
}

impl Shared {
    pub(super) fn policy(&self) -> Policy {
        let recycle = self.options.recycle.as_ref();
        recycle.map_or(Policy::OBSERVED, crate::options::RecycleOptions::policy)
    }

    pub(crate) fn is_recycled(&self) -> bool {
        self.options.recycle.is_some()
    }

    /// These begin to serve. Before anybody can get them.
    pub(crate) fn begin_wear(self: &Arc<Self>, replicas: &[Arc<Replica>]) {
        for replica in replicas {
            self.begin_wear_of(replica);
        }
    }

    fn begin_wear_of(self: &Arc<Self>, replica: &Arc<Replica>) {
        let (shared, weak) = (Arc::downgrade(self), Arc::downgrade(replica));
        replica.wear().begin(replica.memory_bytes(), |age| {
            // Without a timer thread an idle instance gets older than it may.
            Deadline::after(age, move || judge_later(&shared, &weak)).ok()
        });
    }

    /// One more call has ended in a replica that the calling thread holds, and it is about to let go of it.
    #[inline]
    pub(crate) fn judge_now(self: &Arc<Self>, replica: &Arc<Replica>) {
        if let Some(due) = self.judge(replica) {
            self.enqueue(due);
        }
    }

    /// The same for what serves in that slot, by whoever has its ticket.
    pub(super) fn judge_slot(self: &Arc<Self>, slot: usize) {
        let Some(replica) = self.replica(slot) else {
            return;
        };
        self.judge_now(&replica);
        let wear = replica.wear();
        if wear.is_due() && !self.options.is_realm && wear.is_full(replica.memory_limit_bytes()) {
            // To wait for the fresh one is better than to trap, or to grow without bound.
            self.gate.withdraw(slot);
        }
    }

    /// Whether the replica is to be recycled, now that somebody leaves it. Tells of pressure.
    pub(crate) fn judge(self: &Arc<Self>, replica: &Arc<Replica>) -> Option<Due> {
        let bytes = replica.memory_bytes();
        let limit = replica.memory_limit_bytes();
        let ahead = self.recycling.ahead();
        let crossing = replica.wear().judge(bytes, limit, ahead);
        let mut own = crossing.and_then(|crossing| self.decide(replica, crossing));
        for (shared, due) in budget::enforce() {
            if Arc::ptr_eq(&due.replica, replica) {
                own = Some(due);
            } else {
                shared.enqueue(due);
            }
        }
        own
    }

    /// A threshold is crossed: tells of it, once. `Some`: it is to be recycled, and whoever gets this sees to it.
    pub(crate) fn decide(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        crossing: Crossing,
    ) -> Option<Due> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let wear = replica.wear();
        let is_policy = self.is_recycled();
        if self.is_over() || self.state() == ManagerState::Failed || replica.is_released() {
            return None;
        }
        if is_policy {
            if self.failures_of(replica.slot()).is_waiting() || !wear.becomes_due() {
                return None;
            }
        } else if !wear.tell_once(crossing.reason, budget::episode()) {
            return None;
        }
        let Reading {
            calls,
            growth_per_call,
            ..
        } = wear.read(self.recycling.ahead());
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let pressure = Pressure {
            reason: crossing.reason,
            slot: replica.slot(),
            generation: self.generation(),
            memory_bytes: replica.memory_bytes(),
            threshold_bytes: crossing.threshold,
            calls,
            growth_bytes_per_call: growth_per_call,
            decision: is_policy.then_some(id),
        };
        if is_policy {
            self.recycling.due.fetch_add(1, Ordering::Relaxed);
        }
        self.tell(Event::Pressure(pressure.clone()));
        is_policy.then(|| Due {
            id,
            replica: Arc::clone(replica),
            pressure,
        })
    }

    /// Nothing that failed has to be waited for.
    pub(crate) fn may_recycle(&self, replica: &Replica) -> bool {
        !self.failures_of(replica.slot()).is_waiting()
    }

    fn failures_of(&self, slot: usize) -> Failures {
        let failures = self.recycling.failures.lock();
        let failures = failures.unwrap_or_else(PoisonError::into_inner);
        failures.get(slot).copied().unwrap_or_default()
    }

    /// Sets what is known of a slot's failures, and returns how long it has to wait.
    fn note_outcome(&self, slot: usize, is_ok: bool) -> Option<Duration> {
        let backoff = self.options.recycle.as_ref()?.backoff;
        let failures = self.recycling.failures.lock();
        let mut failures = failures.unwrap_or_else(PoisonError::into_inner);
        if failures.len() <= slot {
            failures.resize(slot + 1, Failures::default());
        }
        let of = failures.get_mut(slot)?;
        if is_ok {
            *of = Failures::default();
            return None;
        }
        of.count = of.count.saturating_add(1);
        let wait = backoff.after(of.count);
        of.not_before = Instant::now().checked_add(wait);
        Some(wait)
    }

    /// Has a decision carried out as soon as it can be.
    pub(crate) fn enqueue(self: &Arc<Self>, due: Due) {
        if self.options.is_realm {
            if self.is_over() {
                self.recycle_ended(due, Ok(None));
            } else {
                self.push(Op::Recycle(due));
            }
            return;
        }
        self.lock_control().recycles.push_back(due);
        self.recycle_next();
    }

    /// Begins with the next decision, unless something else is at work.
    pub(super) fn recycle_next(self: &Arc<Self>) {
        if self.is_over() {
            self.forget_recycles();
            return;
        }
        let mut superseded = Vec::new();
        let next = {
            let mut control = self.lock_control();
            let is_kept_off = control.is_swapping
                || control.recycling.is_some()
                || control.is_repairing_home
                || self.recycling.wanted.load(Ordering::Acquire) > 0;
            if is_kept_off {
                return;
            }
            let mut next = None;
            while let Some(due) = control.recycles.pop_front() {
                let slot = due.replica.slot();
                if self.still_serves(&due.replica) && !control.repairing.contains(&slot) {
                    control.recycling = Some(slot);
                    control.repairing.push(slot);
                    next = Some(due);
                    break;
                }
                superseded.push(due);
            }
            next
        };
        for due in superseded {
            due.replica.wear().was_spared();
            self.spare(&due.replica);
            self.recycle_ended(due, Ok(None));
        }
        if let Some(due) = next {
            self.spawn("rec", move |shared| {
                let outcome = guarded(|| shared.recycle(&due, false));
                shared.finish_recycle(due, outcome);
            });
        }
    }

    fn serves(&self, replica: &Arc<Replica>) -> bool {
        let now = self.replica(replica.slot());
        now.is_some_and(|now| Arc::ptr_eq(&now, replica))
    }

    fn still_serves(&self, replica: &Arc<Replica>) -> bool {
        self.serves(replica) && !replica.must_be_replaced()
    }

    /// A synchronous call has just ended on the home thread, and nobody is inside: the same, here and now.
    pub(super) fn recycle_at_home(self: &Arc<Self>, due: Due) {
        let may = {
            let mut control = self.lock_control();
            let is_free = !control.is_running
                && control.repairing.is_empty()
                && !control.is_repairing_home
                && control.recycling.is_none();
            if is_free {
                control.recycling = Some(due.replica.slot());
                control.repairing.push(due.replica.slot());
            }
            is_free
        };
        if !may || self.recycling.has_async_hooks.load(Ordering::Relaxed) {
            if may {
                self.recycle_is_over(due.replica.slot(), false);
            }
            self.enqueue(due);
            return;
        }
        let outcome = guarded(|| self.recycle(&due, true));
        if let Err(error) = &outcome
            && is_for_the_event_loop(error)
        {
            // What can wait for hooks does it.
            self.recycling.has_async_hooks();
            self.recycle_is_over(due.replica.slot(), false);
            self.enqueue(due);
            return;
        }
        self.finish_recycle(due, outcome);
    }

    /// The control is free for others.
    ///
    /// * `has_more_to_say`: the end of the manager has to wait for that.
    fn recycle_is_over(self: &Arc<Self>, slot: usize, has_more_to_say: bool) {
        {
            let mut control = self.lock_control();
            control.recycling = None;
            control.repairing.retain(|s| *s != slot);
            control.seeing_off += usize::from(has_more_to_say);
        }
        self.control_changed.notify_all();
    }

    fn finish_recycle(self: &Arc<Self>, due: Due, outcome: Result<Outcome>) {
        let slot = due.replica.slot();
        // First, so that whoever hears of it finds the control free.
        self.recycle_is_over(slot, true);
        let _ = guarded(|| {
            self.tell_outcome(due, outcome);
            Ok(())
        });
        self.lock_control().seeing_off -= 1;
        self.control_changed.notify_all();
        if self.repairable(slot).is_some() {
            self.request_repair(slot);
        }
        for (shared, due) in budget::enforce() {
            shared.enqueue(due);
        }
        self.recycle_next();
    }

    fn tell_outcome(self: &Arc<Self>, due: Due, outcome: Result<Outcome>) {
        match outcome {
            Ok(Outcome::Done(report)) => {
                self.recycled(&due, &report);
                if report.strategy != RecycleStrategy::Reset {
                    self.swap_ended(&Ok(Arc::new(report.reload.clone())));
                }
                self.recycle_ended(due, Ok(Some(report)));
            }
            Ok(Outcome::Rolled(reload, roll)) => {
                self.swap_ended(&Ok(Arc::new((*reload).clone())));
                self.see_recycled_off(due, *reload, roll);
            }
            Ok(Outcome::Superseded) => {
                self.spare(&due.replica);
                if self.still_serves(&due.replica) && !self.is_over() {
                    // The home did not answer; if it is not gone, there is another time.
                    self.try_again(due.replica.slot());
                    due.replica.wear().was_spared();
                }
                self.recycle_ended(due, Ok(None));
            }
            Ok(Outcome::SteppedBack) => {
                // Whoever it has stepped back for lets it begin again.
                self.lock_control().recycles.push_back(due);
            }
            Err(error) => self.recycle_failed(due, error),
        }
    }

    fn recycle_failed(self: &Arc<Self>, due: Due, error: Error) {
        let slot = due.replica.slot();
        // The wait first: whoever judges it from here on must not decide once more at once.
        self.try_again(slot);
        due.replica.wear().was_spared();
        self.spare(&due.replica);
        if self.is_over() {
            self.recycle_ended(due, Ok(None));
            return;
        }
        self.swap_ended(&Err(error.clone()));
        self.recycle_ended(due, Err(error));
    }

    /// A recycle of that slot has failed, or has not helped: the next one has to wait, and comes by itself.
    fn try_again(self: &Arc<Self>, slot: usize) {
        let Some(wait) = self.note_outcome(slot, false) else {
            return;
        };
        let weak = Arc::downgrade(self);
        let again = move || {
            let shared = weak.upgrade();
            if let Some((shared, replica)) =
                shared.and_then(|s| Some((Arc::clone(&s), s.replica(slot)?)))
            {
                shared.judge_now(&replica);
            }
        };
        // Without a timer thread the next call has it judged.
        if let Ok(deadline) = Deadline::after(wait, again) {
            deadline.detach();
        }
    }

    /// It was done: what is to be learnt from that.
    fn recycled(self: &Arc<Self>, due: &Due, report: &RecycleReport) {
        let meanwhile = report.calls.saturating_sub(due.pressure.calls);
        self.recycling
            .calls_meanwhile
            .store(meanwhile, Ordering::Relaxed);
        self.recycling
            .took(report.reload.instantiate + report.reload.pause);
        self.look_at(report.freed);
        let slot = report.slot;
        let is_memory = matches!(due.pressure.reason, Reason::Memory | Reason::Predicted);
        let after = report.reload.memory_bytes_after as u64;
        let still_over = is_memory
            && self.replica(slot).is_some_and(|now| {
                let threshold = now.wear().memory_threshold(now.memory_limit_bytes());
                threshold.is_some_and(|most| after >= most)
            });
        if still_over {
            // A fresh instance has too much itself: doing it again at once would help nobody.
            self.try_again(slot);
        } else {
            self.note_outcome(slot, true);
        }
    }

    /// Warns once, if memory has stayed twice in a row: one look may have been at somebody else's memory.
    fn look_at(&self, freed: Freed) {
        let Recycling {
            kept, is_warned, ..
        } = &self.recycling;
        if !freed.is_kept() {
            if freed.expected_bytes >= LEAST_PROVABLE_BYTES {
                kept.store(0, Ordering::Relaxed);
            }
            return;
        }
        if kept.fetch_add(1, Ordering::Relaxed) >= 1 && !is_warned.swap(true, Ordering::Relaxed) {
            self.tell(Event::MemoryKept(freed));
        }
    }

    /// The one outcome of a decision.
    fn recycle_ended(&self, due: Due, outcome: Result<Option<Box<RecycleReport>>>) {
        self.recycling.due.fetch_sub(1, Ordering::Relaxed);
        self.tell(Event::Recycled {
            decision: due.id,
            outcome: outcome.map(|report| report.map(Arc::from)),
        });
    }

    /// Trapped instances are not replaced any more: it was tried often enough, or whatever is called traps.
    pub(super) fn gives_up_replacing(self: &Arc<Self>) -> bool {
        if let Some(error) = self.recycling.given_up() {
            // Somebody may have come to wait since.
            self.refuse_all(error);
            return true;
        }
        let traps = self.recycling.traps.load(Ordering::Relaxed);
        if !self.is_recycled() || traps < CRASH_LOOP {
            return false;
        }
        let last = self.recycling.last_trap.lock();
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
        self.recycling.give_up(&error);
        // Those that did not trap serve no more, either.
        for slot in 0..self.options.instances {
            self.gate.withdraw(slot);
        }
        self.swap_ended(&Err(error.clone()));
        self.refuse_all(error);
        true
    }

    /// Whether the next replacement has to wait; it comes by itself.
    pub(super) fn replaces_later(self: &Arc<Self>, slot: usize) -> bool {
        let until = {
            let repairs = self.recycling.lock_repairs();
            repairs.0.not_before.filter(|_| repairs.0.is_waiting())
        };
        let Some(until) = until else { return false };
        let weak = Arc::downgrade(self);
        let again = move || {
            if let Some(shared) = weak.upgrade() {
                shared.request_repair(slot);
            }
        };
        // Without a timer thread it does not wait.
        match Deadline::after(until.saturating_duration_since(Instant::now()), again) {
            Ok(deadline) => {
                deadline.detach();
                true
            }
            Err(_) => false,
        }
    }

    /// The manager ends: what was decided does not happen any more.
    pub(super) fn forget_recycles(&self) {
        let due = {
            let mut control = self.lock_control();
            let mut due: Vec<_> = control.recycles.drain(..).collect();
            for op in std::mem::take(&mut control.queue) {
                match op {
                    Op::Recycle(of_realm) => due.push(of_realm),
                    other => control.queue.push_back(other),
                }
            }
            due
        };
        for due in due {
            self.spare(&due.replica);
            self.recycle_ended(due, Ok(None));
        }
    }

    // ------------------------------------------------------------------ carrying it out

    fn recycle(self: &Arc<Self>, due: &Due, is_sync: bool) -> Result<Outcome> {
        let scope = self.hook_scope(is_sync);
        match self
            .options
            .recycle
            .as_ref()
            .map(|recycle| recycle.strategy)
        {
            Some(RecycleStrategy::Reset) if self.may_reset(&due.replica) => {
                self.recycle_by_reset(due, &scope)
            }
            Some(RecycleStrategy::Rolling) if !is_sync => self.recycle_by_roll(due, &scope),
            _ => self.recycle_by_swap(due, &scope),
        }
    }

    /// A reset cannot be undone, so there must be no state that `restoreState` may fail to put back.
    fn may_reset(&self, replica: &Replica) -> bool {
        let newest = self.lock_snapshots().origin();
        let fits =
            newest.is_some_and(|newest| Arc::ptr_eq(newest.snapshot.module(), replica.module()));
        fits && !self.host.saves_state() && !replica.is_poisoned()
    }

    fn must_step_back(&self) -> bool {
        self.recycling.wanted.load(Ordering::Acquire) > 0 || self.is_over()
    }

    fn patience_in_a_queue(&self) -> Duration {
        let (least, most) = PATIENCE_IN_A_QUEUE;
        (self.stats.mean_run() * CALLS_OF_PATIENCE).clamp(least, most)
    }

    /// Takes the slot out of service, as soon as nobody is inside. `Ok(false)`: something else comes first.
    fn withdraw(self: &Arc<Self>, slot: usize, scope: &HookScope) -> Result<bool> {
        if slot == 0 {
            let shared = Arc::clone(self);
            self.host.at_home(Box::new(move |home| match home {
                Some(home) => home.withdraw(slot),
                None => shared.gate.withdraw(slot),
            }))?;
        } else {
            self.gate.withdraw(slot);
        }
        let give_up = || self.must_step_back() || scope.is_cancelled();
        let started = Instant::now();
        loop {
            let patience = if scope.is_sync {
                Duration::ZERO
            } else {
                self.patience_in_a_queue()
            };
            let Err(InFlight(_)) = self.gate.wait_retired(slot, Some(patience), give_up) else {
                return Ok(true);
            };
            let waited = started.elapsed();
            let is_crowded = self.recycling.due() > 1;
            if give_up() || scope.is_sync || is_crowded || waited >= PATIENCE {
                self.gate.reinstate(slot);
                if self.must_step_back() && !self.is_over() {
                    return Ok(false);
                }
                return Err(Error::DrainTimeout {
                    what: format!("the recycling of {}", self.name()),
                    in_flight: 1,
                    waited_ms: waited.as_millis(),
                });
            }
        }
    }

    fn make_fresh(
        self: &Arc<Self>,
        due: &Due,
        scope: &HookScope,
    ) -> Result<(Arc<Replica>, Arc<Blueprint>, Duration)> {
        let started = Instant::now();
        let blueprint = self.blueprint()?;
        let making = Making {
            blueprint: &blueprint,
            generation: self.generation().next(),
            from: self.origin(&blueprint.module),
            scope: scope.clone(),
        };
        let fresh = self
            .make_replica(&making, due.replica.slot())
            .map_err(|(phase, cause)| self.recycling_failed(phase, cause))?;
        Ok((fresh, blueprint, started.elapsed()))
    }

    fn recycling_failed(&self, phase: FailedPhase, cause: Error) -> Error {
        self.reload_failed("the recycling", phase, cause)
    }

    fn recycle_by_swap(self: &Arc<Self>, due: &Due, scope: &HookScope) -> Result<Outcome> {
        let (old, slot) = (&due.replica, due.replica.slot());
        let (fresh, blueprint, instantiate) = self.make_fresh(due, scope)?;
        // Whatever goes wrong, a panic included: nothing is left of the fresh one, and the old one serves on.
        let undo = || {
            let discard = || self.discard(vec![Arc::clone(&fresh)], fresh.generation());
            let _ = guarded(discard);
            self.spare(old);
        };
        let withdrawn_at = Instant::now();
        match guarded(|| self.withdraw(slot, scope)) {
            Ok(true) => {}
            Ok(false) => {
                undo();
                return Ok(Outcome::SteppedBack);
            }
            Err(error) => {
                undo();
                return Err(error);
            }
        }
        let drain = withdrawn_at.elapsed();
        // From here on nobody is inside, and nobody gets in.
        let reading = old.wear().read(self.recycling.ahead());
        let handed_over = guarded(|| self.hand_over(old, &fresh, scope));
        let (save, restore) = match handed_over {
            Ok(times) => times,
            Err(error) => {
                undo();
                return Err(error);
            }
        };
        let before = self.generation();
        let memory_bytes_before = old.memory_bytes();
        // Before anybody calls it.
        let memory_bytes_after = fresh.memory_bytes();
        self.note_peak(self.memory_bytes() + memory_bytes_after);
        let published = guarded(|| {
            self.publish_recycled(due, &fresh, &blueprint);
            Ok(())
        });
        if !self.serves(&fresh) {
            undo();
            return published.map(|()| Outcome::Superseded);
        }
        let pause = withdrawn_at.elapsed();
        let generation = fresh.generation();
        // SAFETY: the slot was withdrawn and empty, and at the publication every handle on the instance expired
        // and the slot went to the fresh one.
        let shed = Freed::shed(|| unsafe { old.shed() }, old);
        // SAFETY: as above.
        let freed = shed.and(|| unsafe { old.release() });
        Ok(Outcome::Done(Box::new(RecycleReport {
            reload: ReloadReport {
                generation,
                previous_generation: before,
                reason: due.pressure.reason.as_str().into(),
                strategy: Strategy::Exclusive,
                drained: 0,
                queued: 0,
                pause,
                drain,
                save,
                instantiate,
                restore,
                memory_bytes_before,
                memory_bytes_after,
                freed: None,
            },
            strategy: RecycleStrategy::Exclusive,
            slot,
            calls: reading.calls,
            age: reading.age,
            freed,
        })))
    }

    /// The old instance serves on, unless a hook has left it in an unknown state.
    fn spare(&self, old: &Arc<Replica>) {
        if self.still_serves(old) && self.recycling.given_up().is_none() {
            self.gate.reinstate(old.slot());
        }
    }

    fn hand_over(
        self: &Arc<Self>,
        old: &Arc<Replica>,
        fresh: &Arc<Replica>,
        scope: &HookScope,
    ) -> Result<(Duration, Duration)> {
        // What isolated calls begin with is in the snapshot; a trapped guest's memory means nothing.
        if !self.host.saves_state() || self.isolates_calls() || old.is_poisoned() {
            return Ok((Duration::ZERO, Duration::ZERO));
        }
        let slot = old.slot();
        let started = Instant::now();
        let state = self
            .with_lease(old, scope, |lease| self.host.save_state(lease, slot))
            .map_err(|cause| self.recycling_failed(FailedPhase::Save, cause))?;
        let save = started.elapsed();
        let Some(state) = state else {
            return Ok((save, Duration::ZERO));
        };
        let restored = self.with_lease(fresh, scope, |lease| {
            self.host.restore_state(lease, &state, slot)
        });
        // A hook that goes on after a trap leaves an instance that must not serve.
        let restored = restored.and_then(|()| fresh.last_trap().map_or(Ok(()), Err));
        restored.map_err(|cause| self.recycling_failed(FailedPhase::Restore, cause))?;
        Ok((save, started.elapsed().saturating_sub(save)))
    }

    /// At home: a fresh instance takes the place of the old one, if that is still there.
    fn publish_recycled(
        self: &Arc<Self>,
        due: &Due,
        fresh: &Arc<Replica>,
        blueprint: &Arc<Blueprint>,
    ) {
        let (tell, told) = bounded(1);
        let shared = Arc::clone(self);
        let (old, made) = (Arc::clone(&due.replica), Arc::clone(fresh));
        let reason = due.pressure.reason;
        let module = Arc::clone(&blueprint.module);
        let published = self.host.at_home(Box::new(move |_| {
            let is_same = shared
                .module()
                .is_some_and(|now| Arc::ptr_eq(&now, &module));
            if is_same && shared.recycling.given_up().is_none() {
                shared.publish_one(&old, made, None, reason.as_str());
            }
            let _ = tell.send(());
        }));
        if published.is_ok() {
            let _ = told.recv();
        }
    }

    fn recycle_by_reset(self: &Arc<Self>, due: &Due, scope: &HookScope) -> Result<Outcome> {
        let (replica, slot) = (&due.replica, due.replica.slot());
        let withdrawn_at = Instant::now();
        match guarded(|| self.withdraw(slot, scope)) {
            Ok(true) => {}
            Ok(false) => return Ok(Outcome::SteppedBack),
            Err(error) => {
                self.spare(replica);
                return Err(error);
            }
        }
        let drain = withdrawn_at.elapsed();
        let reading = replica.wear().read(self.recycling.ahead());
        let before = replica.memory_bytes();
        let outcome = guarded(|| self.reset_one(replica, scope));
        let done = match outcome {
            Ok(freed) => freed,
            Err(error) => {
                self.spare(replica);
                return Err(error);
            }
        };
        let after = replica.memory_bytes();
        self.begin_wear_of(replica);
        self.stats.reloaded(due.pressure.reason.as_str());
        self.stats.was_reset();
        self.gate.reinstate(slot);
        let generation = self.generation();
        Ok(Outcome::Done(Box::new(RecycleReport {
            reload: ReloadReport {
                generation,
                previous_generation: generation,
                reason: due.pressure.reason.as_str().into(),
                strategy: Strategy::Exclusive,
                drained: 0,
                queued: 0,
                pause: withdrawn_at.elapsed(),
                drain,
                save: Duration::ZERO,
                instantiate: Duration::ZERO,
                restore: Duration::ZERO,
                memory_bytes_before: before,
                memory_bytes_after: after,
                freed: None,
            },
            strategy: RecycleStrategy::Reset,
            slot,
            calls: reading.calls,
            age: reading.age,
            freed: done,
        })))
    }

    /// Nobody is inside, and nobody gets in.
    fn reset_one(self: &Arc<Self>, replica: &Arc<Replica>, scope: &HookScope) -> Result<Freed> {
        let blueprint = self.blueprint()?;
        let origin = self
            .lock_snapshots()
            .choose(None, (&blueprint.module, self.id()))?;
        let replicas = [Arc::clone(replica)];
        self.note_peak(self.memory_bytes());
        if scope.is_sync {
            // With nobody looking at them, pages can be given back where they are.
            self.host.rewound(&replicas);
        }
        let mut outcome = Ok(0);
        let expected = replica.memory_usage().private_bytes;
        let mut freed = Freed::measure(expected, || {
            // SAFETY: the slot was withdrawn: nobody is inside, and nobody else may enter.
            outcome = unsafe { replica.reset(&origin, true) };
        });
        outcome?;
        freed.expected_bytes = expected.saturating_sub(replica.memory_usage().private_bytes);
        self.reseed(replica, scope)?;
        if !scope.is_sync {
            let shared = Arc::clone(self);
            // Without a home nobody has handles.
            let _ = self
                .host
                .at_home(Box::new(move |_| shared.host.rewound(&replicas)));
        }
        Ok(freed)
    }

    fn recycle_by_roll(self: &Arc<Self>, due: &Due, scope: &HookScope) -> Result<Outcome> {
        let slot = due.replica.slot();
        let started = Instant::now();
        let give_up = || self.must_step_back() || scope.is_cancelled();
        // Never more than two instances for one place.
        let patience = self.patience_in_a_queue();
        if let Err(in_flight) = self.gate.wait_straggler(slot, Some(patience), give_up) {
            if self.must_step_back() && !self.is_over() {
                return Ok(Outcome::SteppedBack);
            }
            return Err(Error::DrainTimeout {
                what: format!("the recycling of {}", self.name()),
                in_flight: in_flight.0,
                waited_ms: started.elapsed().as_millis(),
            });
        }
        let drain = started.elapsed();
        let (fresh, blueprint, instantiate) = self.make_fresh(due, scope)?;
        let pool = Arc::clone(&self.lock_serving().pool).another();
        let pool = match pool {
            Ok(pool) => Arc::new(pool),
            Err(error) => {
                let _ = self.discard(vec![Arc::clone(&fresh)], fresh.generation());
                return Err(self.recycling_failed(FailedPhase::Instantiate, error));
            }
        };
        let memory_bytes_before = due.replica.memory_bytes();
        let memory_bytes_after = fresh.memory_bytes();
        self.note_peak(self.memory_bytes() + memory_bytes_after);
        let previous_generation = self.generation();
        let rolled_at = Instant::now();
        let rolled = guarded(|| Ok(self.roll_one(due, &fresh, &blueprint, pool)));
        let Ok(Some((roll, generation, drained))) = rolled else {
            if !self.serves(&fresh) {
                let _ = guarded(|| self.discard(vec![Arc::clone(&fresh)], fresh.generation()));
            }
            return rolled.map(|_| Outcome::Superseded);
        };
        let report = ReloadReport {
            generation,
            previous_generation,
            reason: due.pressure.reason.as_str().into(),
            strategy: Strategy::Rolling,
            drained,
            queued: 0,
            pause: rolled_at.elapsed(),
            drain,
            save: Duration::ZERO,
            instantiate,
            restore: Duration::ZERO,
            memory_bytes_before,
            memory_bytes_after,
            freed: None,
        };
        Ok(Outcome::Rolled(Box::new(report), roll))
    }

    /// At home: new calls go to the fresh instance. Returns the number of the roll, the generation, and how
    /// many were left behind.
    fn roll_one(
        self: &Arc<Self>,
        due: &Due,
        fresh: &Arc<Replica>,
        blueprint: &Arc<Blueprint>,
        pool: Arc<Pool>,
    ) -> Option<(u64, Generation, usize)> {
        let (tell, told) = bounded(1);
        let shared = Arc::clone(self);
        let (old, made) = (Arc::clone(&due.replica), Arc::clone(fresh));
        let reason = due.pressure.reason;
        let blueprint = Arc::clone(blueprint);
        let rolled = self.host.at_home(Box::new(move |home| {
            let _ = tell.send(shared.roll_here(home, (&old, made), (&blueprint, pool), reason));
        }));
        rolled.ok().and_then(|()| told.recv().ok()).flatten()
    }

    fn roll_here(
        self: &Arc<Self>,
        home: Option<&Home<Job>>,
        (old, fresh): (&Arc<Replica>, Arc<Replica>),
        (blueprint, pool): (&Arc<Blueprint>, Arc<Pool>),
        reason: Reason,
    ) -> Option<(u64, Generation, usize)> {
        let slot = old.slot();
        // Steps do not run at home while it is inside; if one did, it must not swap what is in use.
        if slot == 0 && home.is_some_and(|home| home.depth() > 0) {
            return None;
        }
        let roll = {
            let mut serving = self.lock_serving();
            let is_same = |now: &Arc<Replica>| Arc::ptr_eq(now, old);
            let serves = serving.replicas.get(slot).is_some_and(is_same);
            let is_build = |now: &Arc<Blueprint>| Arc::ptr_eq(&now.module, &blueprint.module);
            if !serves || !serving.blueprint.as_ref().is_some_and(is_build) || self.is_over() {
                return None;
            }
            fresh.number(serving.generation.next());
            serving.roll_slot(&fresh, pool)
        };
        let generation = fresh.generation();
        self.begin_wear_of(&fresh);
        self.stats.reloaded(reason.as_str());
        let change = Replaced {
            old: Vec::new(),
            new: vec![fresh],
            generation,
        };
        // A panic of the host's must not leave the gate behind what serves.
        let _ = guarded(|| {
            self.host.replaced(&change);
            Ok(())
        });
        match home {
            Some(home) => home.roll_slot(slot),
            None => self.gate.roll_slot(slot),
        };
        let left = self.gate.stragglers();
        let left = left.iter().filter(|ticket| ticket.slot == slot).count();
        Some((roll, generation, left))
    }

    /// The old instance goes as soon as nobody is inside, and then there is something to report.
    fn see_recycled_off(self: &Arc<Self>, due: Due, reload: ReloadReport, roll: u64) {
        let slot = due.replica.slot();
        let finish = move |shared: &Arc<Self>| {
            let _ = shared.gate.wait_straggler(slot, None, || false);
            // SAFETY: it does not serve any more, and whoever was inside has left.
            let shed = Freed::shed(|| unsafe { due.replica.shed() }, &due.replica);
            let freed = shed.and(|| {
                let _ = shared.release_left(roll);
            });
            let reading = due.replica.wear().read(shared.recycling.ahead());
            let report = Box::new(RecycleReport {
                reload,
                strategy: RecycleStrategy::Rolling,
                slot,
                calls: reading.calls,
                age: reading.age,
                freed,
            });
            shared.recycled(&due, &report);
            shared.recycle_ended(due, Ok(Some(report)));
        };
        if self
            .gate
            .wait_straggler(slot, Some(Duration::ZERO), || false)
            .is_ok()
        {
            finish(self);
            return;
        }
        self.lock_control().seeing_off += 1;
        self.spawn("old", move |shared| {
            let _ = guarded(|| {
                finish(shared);
                Ok(())
            });
            shared.lock_control().seeing_off -= 1;
            shared.control_changed.notify_all();
        });
    }

    // ------------------------------------------------------------------ realms

    /// The one replica of a realm is recycled by a reload or a reset of the manager, which waits for scopes.
    pub(super) fn recycle_realm(self: &Arc<Self>, due: Due) -> Answer {
        let shared = Arc::clone(self);
        if !self.still_serves(&due.replica) {
            return Box::new(move || shared.recycle_ended(due, Ok(None)));
        }
        let reading = due.replica.wear().read(self.recycling.ahead());
        let strategy = self
            .options
            .recycle
            .as_ref()
            .map(|recycle| recycle.strategy);
        if strategy == Some(RecycleStrategy::Reset) && self.may_reset(&due.replica) {
            let outcome = self.reset_realm(&due, reading);
            return Box::new(move || shared.realm_recycled(due, outcome));
        }
        let strategy = match strategy {
            Some(RecycleStrategy::Rolling) => (Strategy::Rolling, RecycleStrategy::Rolling),
            _ => (Strategy::Exclusive, RecycleStrategy::Exclusive),
        };
        let options = ReloadOptions {
            reason: due.pressure.reason.as_str().into(),
            strategy: strategy.0,
            is_recycle: true,
            ..ReloadOptions::default()
        };
        let done = Box::new(move |outcome: Result<Arc<ReloadReport>>| {
            let report = outcome.map(|reload| {
                Box::new(RecycleReport {
                    freed: reload.freed.unwrap_or_default(),
                    reload: (*reload).clone(),
                    strategy: strategy.1,
                    slot: 0,
                    calls: reading.calls,
                    age: reading.age,
                })
            });
            shared.realm_recycled(due, report);
        });
        self.run_reload(PendingReload {
            options,
            done: vec![done],
        })
    }

    fn reset_realm(self: &Arc<Self>, due: &Due, reading: Reading) -> Result<Box<RecycleReport>> {
        let expected = due.replica.memory_usage().private_bytes;
        let mut outcome = None;
        let mut freed = Freed::measure(expected, || {
            outcome = Some(self.paused(|scope| self.reset(&ResetOptions::default(), scope)));
        });
        let done = outcome.unwrap_or_else(|| Err(Error::internal("a reset without an end")))?;
        let left = due.replica.memory_usage().private_bytes;
        freed.expected_bytes = expected.saturating_sub(left);
        self.stats.reloaded(due.pressure.reason.as_str());
        Ok(Box::new(RecycleReport {
            reload: ReloadReport {
                generation: done.generation,
                previous_generation: done.generation,
                reason: due.pressure.reason.as_str().into(),
                strategy: Strategy::Exclusive,
                drained: 0,
                queued: 0,
                pause: done.took,
                drain: Duration::ZERO,
                save: Duration::ZERO,
                instantiate: Duration::ZERO,
                restore: Duration::ZERO,
                memory_bytes_before: done.memory_bytes_before,
                memory_bytes_after: done.memory_bytes_after,
                freed: None,
            },
            strategy: RecycleStrategy::Reset,
            slot: 0,
            calls: reading.calls,
            age: reading.age,
            freed,
        }))
    }

    fn realm_recycled(self: &Arc<Self>, due: Due, outcome: Result<Box<RecycleReport>>) {
        match outcome {
            Ok(report) => {
                self.recycled(&due, &report);
                self.recycle_ended(due, Ok(Some(report)));
            }
            Err(error) => {
                self.try_again(due.replica.slot());
                due.replica.wear().was_spared();
                if self.is_over() {
                    self.recycle_ended(due, Ok(None));
                    return;
                }
                self.recycle_ended(due, Err(error));
            }
        }
    }
}

/// A timer has run out: looks whether the replica still serves, and is too old or too large.
fn judge_later(shared: &Weak<Shared>, replica: &Weak<Replica>) {
    if let Some((shared, replica)) = shared.upgrade().zip(replica.upgrade())
        && shared.still_serves(&replica)
    {
        shared.judge_now(&replica);
    }
}

/// A hook has returned a promise where nobody could wait for it.
fn is_for_the_event_loop(error: &Error) -> bool {
    matches!(error, Error::ReloadFailed { cause, .. } if cause.code() == Some(ErrorCode::AsyncImport))
}
