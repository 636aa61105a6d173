//! Instances are recycled: replaced or reset because a threshold says so, one at a time, while the others
//! serve.
//!
//! Whoever gives a replica back judges it first ([`Shared::judge`]); what comes of that is queued, and a
//! thread of its own carries it out: make a fresh instance, withdraw the slot, hand state over, publish.
//! A synchronous call that ends has it done on its own thread, if its hooks allow that.
//! Swaps and pauses come first: a recycle that still waits for its slot steps back for them.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use wasm_molt_lifecycle::{Backoff, Crossing, Generation, Policy, Reason};

use super::control::{Op, guarded};
use super::crash::Failures;
use super::host::Event;
use super::{ManagerState, Shared};
use crate::error::{Error, ErrorCode, Result};
use crate::instance::deadline::Deadline;
use crate::instance::replica::Replica;
use crate::instance::wear::Reading;
use crate::manager::budget;
use crate::manager::freed::Freed;
use crate::manager::options::RecycleStrategy;
use crate::manager::swap::ReloadReport;

mod ways;

/// How long glue that is due waits for a moment without scopes.
const PATIENCE_WITH_SCOPES: Duration = Duration::from_millis(20);
/// Calls that predictions look ahead, at least.
const LEAST_AHEAD: u64 = 16;
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

/// A decision, until it has its outcome.
#[derive(Debug)]
pub(crate) struct Due {
    id: u64,
    replica: Arc<Replica>,
    pressure: Pressure,
    /// How often it has not got its turn, with glue.
    attempts: u32,
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
}

impl Recycling {
    pub(super) fn due(&self) -> usize {
        self.due.load(Ordering::Relaxed)
    }

    /// Hooks return promises: nothing of this on the home thread.
    pub(super) fn has_async_hooks(&self) {
        self.has_async_hooks.store(true, Ordering::Relaxed);
    }

    /// A swap begins to wait; the recycle under way is to step back.
    pub(super) fn is_wanted(&self, delta: isize) {
        self.wanted
            .fetch_add(delta.cast_unsigned(), Ordering::AcqRel);
    }

    /// A generation serves that somebody has asked for: what was before does not count.
    fn recovered(&self) {
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn must_step_back(&self) -> bool {
        self.wanted.load(Ordering::Acquire) > 0
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
    /// A generation serves that somebody has asked for: what was before does not count.
    pub(crate) fn recovered(&self) {
        self.recycling.recovered();
        self.crashes.recovered();
    }

    pub(super) fn policy(&self) -> Policy {
        let recycle = self.options.recycle.as_ref();
        recycle.map_or(
            Policy::OBSERVED,
            crate::manager::options::RecycleOptions::policy,
        )
    }

    /// How long what failed waits; `None` without a policy.
    pub(super) fn backoff(&self) -> Option<Backoff> {
        Some(self.options.recycle.as_ref()?.backoff)
    }

    fn strategy(&self) -> Option<RecycleStrategy> {
        Some(self.options.recycle.as_ref()?.strategy)
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

    /// The same for what serves in that slot, by whoever has its ticket. Tells whether it had better run nothing
    /// more: to wait for the fresh one is better than to trap, or to grow without bound.
    pub(super) fn judge_slot(self: &Arc<Self>, left: &Replica) -> bool {
        let now = self.replica(left.slot());
        let Some(replica) = now.filter(|now| now.id() == left.id()) else {
            return false;
        };
        self.judge_now(&replica);
        let wear = replica.wear();
        let may_wait = !self.options.is_realm && !self.is_over();
        may_wait && wear.is_due() && wear.is_full(replica.memory_limit_bytes())
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
            attempts: 0,
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
        let backoff = self.backoff()?;
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
            self.spawn_or("rec", move |shared, started| {
                if let Err(error) = started {
                    shared.realm_recycled(due, Err(error));
                    return;
                }
                // Nobody asked for it, so it rather comes when there is no scope; but under load there always is one.
                let over = || shared.is_over();
                let is_full = due.replica.wear().is_full(due.replica.memory_limit_bytes());
                let patience = if is_full {
                    Duration::ZERO
                } else {
                    PATIENCE_WITH_SCOPES
                };
                let _ = shared.gate.wait_drained_unless(Some(patience), over);
                if over() {
                    shared.recycle_ended(due, Ok(None));
                } else {
                    shared.push(Op::Recycle(due));
                }
            });
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
                || self.recycling.must_step_back();
            if is_kept_off {
                return;
            }
            let mut next = None;
            while let Some(due) = control.recycles.pop_front() {
                let slot = due.replica.slot();
                // Not if somebody has reset it meanwhile.
                let is_due = due.replica.wear().is_due();
                if is_due && self.still_serves(&due.replica) && !control.repairing.contains(&slot) {
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
            self.supersede(due);
        }
        if let Some(due) = next {
            self.spawn_or("rec", move |shared, started| {
                let has_thread = started.is_ok();
                let outcome = started.and_then(|()| guarded(|| shared.recycle(&due, false)));
                shared.let_off(&due, &outcome);
                {
                    let mut control = shared.lock_control();
                    control.recycling = None;
                    control.repairing.retain(|s| *s != due.replica.slot());
                    control.seeing_off += 1;
                }
                shared.conclude(due, outcome);
                // Else the others would end as this one: they come with the next decision.
                if has_thread {
                    shared.recycle_next();
                }
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

    /// The replica at home is full while its decision waits for its turn, or for this very thread, which may not
    /// come by for long: it is carried out here. What waits in the background then finds it replaced.
    pub(super) fn overtake(self: &Arc<Self>, replica: &Arc<Replica>) -> Option<Due> {
        let wear = replica.wear();
        let has_async_hooks = self.recycling.has_async_hooks.load(Ordering::Relaxed);
        if has_async_hooks || self.options.is_realm || !wear.is_due() {
            return None;
        }
        let limit = replica.memory_limit_bytes();
        if !wear.is_full(limit) {
            return None;
        }
        let is_meant = |due: &Due| Arc::ptr_eq(&due.replica, replica);
        let mut control = self.lock_control();
        if let Some(place) = control.recycles.iter().position(is_meant) {
            return control.recycles.remove(place);
        }
        if control.recycling != Some(replica.slot()) {
            return None;
        }
        drop(control);
        wear.was_spared();
        let crossing = wear.judge(replica.memory_bytes(), limit, self.recycling.ahead())?;
        self.decide(replica, crossing)
    }

    /// A synchronous call has just ended on the home thread, and nobody is inside: the same, here and now.
    pub(super) fn recycle_at_home(self: &Arc<Self>, due: Due) {
        let may = {
            let mut control = self.lock_control();
            // Beside one of another replica, which may need this very thread.
            let is_free = !control.is_running
                && !control.is_swapping
                && !control.is_repairing_home
                && (!control.repairing.contains(&0) || control.recycling == Some(0))
                && !self.recycling.has_async_hooks.load(Ordering::Relaxed);
            control.is_repairing_home |= is_free;
            is_free
        };
        if !may {
            self.enqueue(due);
            return;
        }
        let outcome = guarded(|| self.recycle(&due, true));
        let is_later = matches!(&outcome, Err(error) if is_for_the_event_loop(error));
        if !is_later {
            self.let_off(&due, &outcome);
        }
        {
            let mut control = self.lock_control();
            control.is_repairing_home = false;
            control.seeing_off += 1;
        }
        match outcome {
            Err(_) if is_later => {
                // What can wait for hooks does it.
                self.recycling.has_async_hooks();
                self.enqueue(due);
                self.stop_seeing_off();
            }
            outcome => self.finish_recycle(due, outcome),
        }
    }

    fn stop_seeing_off(&self) {
        self.lock_control().seeing_off -= 1;
        self.control_changed.notify_all();
    }

    /// The control is free for others, and the end of the manager waits until the outcome is told.
    fn finish_recycle(self: &Arc<Self>, due: Due, outcome: Result<Outcome>) {
        self.conclude(due, outcome);
        self.recycle_next();
    }

    fn conclude(self: &Arc<Self>, due: Due, outcome: Result<Outcome>) {
        let slot = due.replica.slot();
        self.control_changed.notify_all();
        let _ = guarded(|| {
            self.tell_outcome(due, outcome);
            Ok(())
        });
        self.stop_seeing_off();
        if self.repairable(slot).is_some() {
            self.request_repair(slot);
        }
        for (shared, due) in budget::enforce() {
            shared.enqueue(due);
        }
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
            Ok(Outcome::Superseded) => self.recycle_ended(due, Ok(None)),
            Ok(Outcome::SteppedBack) => {
                // Whoever it has stepped back for lets it begin again.
                self.lock_control().recycles.push_back(due);
            }
            Err(error) => self.recycle_failed(due, error),
        }
    }

    /// The decision ends without a fresh instance: what serves there serves on. While nobody else may begin
    /// anything with that slot.
    fn let_off(self: &Arc<Self>, due: &Due, outcome: &Result<Outcome>) {
        let slot = due.replica.slot();
        let has_failed = match outcome {
            Err(_) => true,
            // The home did not answer; if it is not gone, there is another time.
            Ok(Outcome::Superseded) => {
                due.replica.wear().is_due() && self.still_serves(&due.replica)
            }
            Ok(_) => return,
        };
        if has_failed {
            // The wait first: whoever judges it from here on must not decide once more at once.
            self.try_again(slot);
        }
        // In this order: who leaves the instance between the two finds that it is not due.
        due.replica.wear().was_spared();
        self.spare(slot);
    }

    fn recycle_failed(self: &Arc<Self>, due: Due, error: Error) {
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
            if freed.is_provable() {
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
            self.supersede(due);
        }
    }

    /// A decision that nobody has begun with, and nobody need.
    fn supersede(&self, due: Due) {
        due.replica.wear().was_spared();
        self.spare(due.replica.slot());
        self.recycle_ended(due, Ok(None));
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
