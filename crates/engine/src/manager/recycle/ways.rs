//! The ways in which an instance is recycled, carried out.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use wasm_molt_lifecycle::{Custody, FailedPhase, Generation, Home, Reason};

use super::{Due, Outcome, RecycleReport};
use crate::error::{Error, Result};
use crate::instance::pool::Pool;
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::wear::Reading;
use crate::manager::control::{Answer, PendingReload, guarded};
use crate::manager::freed::Freed;
use crate::manager::host::Replaced;
use crate::manager::lending::HookScope;
use crate::manager::options::RecycleStrategy;
use crate::manager::pause::ResetOptions;
use crate::manager::start::Making;
use crate::manager::swap::{ReloadOptions, ReloadReport, Strategy};
use crate::manager::{Job, Shared, budget};

/// Longest wait for whoever is inside.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where another replica is due as well, and may be free: some times the length of a call, within
/// these bounds. Whoever has it for longer holds a lease.
const PATIENCE_IN_A_QUEUE: (Duration, Duration) =
    (Duration::from_millis(20), Duration::from_secs(1));
const CALLS_OF_PATIENCE: u32 = 4;

impl Shared {
    pub(super) fn recycle(self: &Arc<Self>, due: &Due, is_sync: bool) -> Result<Outcome> {
        let scope = self.hook_scope(is_sync);
        match self.strategy() {
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
        self.recycling.must_step_back() || self.is_over()
    }

    fn patience_in_a_queue(&self) -> Duration {
        let (least, most) = PATIENCE_IN_A_QUEUE;
        (self.stats.mean_run() * CALLS_OF_PATIENCE).clamp(least, most)
    }

    /// Takes the slot out of service, as soon as nobody is inside; while its custody lasts, nobody else puts it
    /// back. `Ok(None)`: something else comes first.
    fn withdraw(self: &Arc<Self>, slot: usize, scope: &HookScope) -> Result<Option<Custody<Job>>> {
        // Kept: whoever wanted its turn may not want it any more when the wait has ended.
        let steps_back = Cell::new(false);
        let give_up = || {
            steps_back.set(steps_back.get() || self.must_step_back());
            steps_back.get() || scope.is_cancelled()
        };
        let started = Instant::now();
        loop {
            // Each time anew: whoever ended something else may have put it back into service.
            self.withdraw_slot(slot)?;
            let patience = if scope.is_sync {
                Duration::ZERO
            } else {
                self.patience_in_a_queue()
            };
            let custody = self.gate.wait_retired(slot, Some(patience), give_up);
            if let Ok(custody) = custody {
                return Ok(Some(custody));
            }
            let waited = started.elapsed();
            let is_crowded = self.recycling.due() > 1;
            if give_up() || scope.is_sync || is_crowded || waited >= PATIENCE {
                self.spare(slot);
                // On the home thread nobody is inside: it is in the custody of another recycle.
                let is_late = steps_back.get() || scope.is_sync;
                if is_late && !self.is_over() {
                    return Ok(None);
                }
                return Err(Error::DrainTimeout {
                    what: format!("the recycling of {}", self.name()),
                    in_flight: 1,
                    waited_ms: waited.as_millis(),
                });
            }
        }
    }

    fn withdraw_slot(self: &Arc<Self>, slot: usize) -> Result<()> {
        if slot == 0 {
            let shared = Arc::clone(self);
            self.host.at_home(Box::new(move |home| match home {
                Some(home) => home.withdraw(slot),
                None => shared.gate.withdraw(slot),
            }))?;
        } else {
            self.gate.withdraw(slot);
        }
        Ok(())
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
            self.spare(slot);
        };
        let withdrawn_at = Instant::now();
        let custody = match guarded(|| self.withdraw(slot, scope)) {
            Ok(Some(custody)) => custody,
            Ok(None) => {
                undo();
                return Ok(Outcome::SteppedBack);
            }
            Err(error) => {
                undo();
                return Err(error);
            }
        };
        let drain = withdrawn_at.elapsed();
        if !self.serves(old) {
            drop(custody);
            undo();
            return Ok(Outcome::Superseded);
        }
        // From here on nobody is inside, and nobody gets in.
        let reading = old.wear().read(self.recycling.ahead());
        let handed_over = guarded(|| self.hand_over(old, &fresh, scope));
        let (save, restore) = match handed_over {
            Ok(times) => times,
            Err(error) => {
                drop(custody);
                undo();
                return Err(error);
            }
        };
        let before = self.generation();
        let memory_bytes_before = old.memory_bytes();
        // Before anybody calls it.
        let memory_bytes_after = fresh.memory_bytes();
        self.note_peak(self.memory_bytes() + memory_bytes_after);
        let leaving = budget::leaving(old);
        // Not what serves now: by then it may have trapped, and been replaced itself.
        let published_at = Arc::new(OnceLock::new());
        let published = guarded(|| {
            self.publish_recycled(due, &fresh, &blueprint, &published_at);
            Ok(())
        });
        // Ended by the publication, if there was one.
        drop(custody);
        let Some(published_at) = published_at.get() else {
            undo();
            return published.map(|()| Outcome::Superseded);
        };
        let pause = *published_at - withdrawn_at;
        if old.is_poisoned() {
            // Whoever was waited for has trapped: that counts as a replacement for it.
            self.crashes.was_repaired(old.last_trap());
        }
        let generation = fresh.generation();
        // SAFETY: the slot was withdrawn and empty, and at the publication every handle on the instance expired
        // and the slot went to the fresh one.
        let shed = Freed::shed(|| unsafe { old.shed() }, old);
        // SAFETY: as above.
        let freed = shed.and(|| unsafe { old.release() });
        drop(leaving);
        Ok(Outcome::Done(Box::new(RecycleReport {
            reload: ReloadReport {
                pause,
                drain,
                save,
                instantiate,
                restore,
                memory_bytes_before,
                memory_bytes_after,
                is_recycle: true,
                ..ReloadReport::of_one(generation, before, due.pressure.reason.as_str())
            },
            strategy: RecycleStrategy::Exclusive,
            slot,
            calls: reading.calls,
            age: reading.age,
            freed,
        })))
    }

    /// The slot goes back into service, whatever serves there now, unless that has trapped: who repairs it gives
    /// the slot back; so does whoever has it in custody.
    pub(in crate::manager) fn spare(&self, slot: usize) {
        let serves = self
            .replica(slot)
            .is_some_and(|now| !now.must_be_replaced());
        if serves && self.crashes.given_up().is_none() {
            self.gate.spare(slot);
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

    /// A fresh instance takes the place of the old one, if that is still there. At home where it is slot 0; in
    /// another slot nobody can have a handle on the old one by now, so the home hears of it without being waited
    /// for by whoever wants the slot.
    fn publish_recycled(
        self: &Arc<Self>,
        due: &Due,
        fresh: &Arc<Replica>,
        blueprint: &Arc<Blueprint>,
        published_at: &Arc<OnceLock<Instant>>,
    ) {
        let shared = Arc::clone(self);
        let (old, made) = (Arc::clone(&due.replica), Arc::clone(fresh));
        let reason = due.pressure.reason;
        let module = Arc::clone(&blueprint.module);
        let published_at = Arc::clone(published_at);
        let slot = old.slot();
        let publish = move |tell: &mut dyn FnMut(Replaced)| {
            let is_same = shared
                .module()
                .is_some_and(|now| Arc::ptr_eq(&now, &module));
            if is_same && shared.crashes.given_up().is_none() {
                let published = shared.publish_one(&old, made, None, reason.as_str(), tell);
                if published.is_some() {
                    let _ = published_at.set(Instant::now());
                }
            }
        };
        let shared = Arc::clone(self);
        if slot == 0 {
            let (tell, told) = bounded(1);
            let at_home = self.host.at_home(Box::new(move |_| {
                publish(&mut |change| shared.host.replaced(&change));
                let _ = tell.send(());
            }));
            if at_home.is_ok() {
                let _ = told.recv();
            }
            return;
        }
        let mut changed = None;
        publish(&mut |change| changed = Some(change));
        let Some(change) = changed.map(Arc::new) else {
            return;
        };
        // The old one is not released before the home has heard of it, if it still is one.
        let tell = || {
            let (tell, told) = bounded(1);
            let (shared, change) = (Arc::clone(&shared), Arc::clone(&change));
            self.host.at_home(Box::new(move |_| {
                shared.host.replaced(&change);
                let _ = tell.send(());
            }))?;
            told.recv().map_err(|_| self.closed())
        };
        if guarded(tell).is_err() {
            let _ = guarded(tell);
        }
    }

    fn recycle_by_reset(self: &Arc<Self>, due: &Due, scope: &HookScope) -> Result<Outcome> {
        let (replica, slot) = (&due.replica, due.replica.slot());
        let withdrawn_at = Instant::now();
        let custody = match guarded(|| self.withdraw(slot, scope)) {
            Ok(Some(custody)) => custody,
            Ok(None) => return Ok(Outcome::SteppedBack),
            Err(error) => {
                self.spare(slot);
                return Err(error);
            }
        };
        let drain = withdrawn_at.elapsed();
        // Somebody else may have reset it meanwhile; and one that has trapped is replaced, as any that has.
        if !self.still_serves(replica) || !replica.wear().is_due() {
            return Ok(Outcome::Superseded);
        }
        let reading = replica.wear().read(self.recycling.ahead());
        let before = replica.memory_bytes();
        let outcome = guarded(|| self.reset_one(replica, scope));
        let done = match outcome {
            Ok(freed) => freed,
            Err(error) => {
                drop(custody);
                self.spare(slot);
                return Err(error);
            }
        };
        let after = replica.memory_bytes();
        self.begin_wear_of(replica);
        self.stats.reloaded(due.pressure.reason.as_str());
        self.stats.was_reset();
        drop(custody);
        self.spare(slot);
        let generation = self.generation();
        Ok(Outcome::Done(Box::new(RecycleReport {
            reload: ReloadReport {
                pause: withdrawn_at.elapsed(),
                drain,
                memory_bytes_before: before,
                memory_bytes_after: after,
                is_recycle: true,
                ..ReloadReport::of_one(generation, generation, due.pressure.reason.as_str())
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
        outcome.map_err(|cause| self.recycling_failed(FailedPhase::Restore, cause))?;
        freed.expected_bytes = expected.saturating_sub(replica.memory_usage().private_bytes);
        let reseeded = self.reseed(replica, scope);
        if !scope.is_sync {
            let shared = Arc::clone(self);
            // Without a home nobody has handles.
            let _ = self
                .host
                .at_home(Box::new(move |_| shared.host.rewound(&replicas)));
        }
        if let Err(cause) = reseeded {
            // What it had is gone, and it shares its random numbers with its copies: it is replaced.
            let error = self.recycling_failed(FailedPhase::Initialize, cause);
            replica.poison_with(&error);
            return Err(error);
        }
        Ok(freed)
    }

    fn recycle_by_roll(self: &Arc<Self>, due: &Due, scope: &HookScope) -> Result<Outcome> {
        let slot = due.replica.slot();
        let started = Instant::now();
        let steps_back = Cell::new(false);
        let give_up = || {
            steps_back.set(steps_back.get() || self.must_step_back());
            steps_back.get() || scope.is_cancelled()
        };
        // Never more than two instances for one place.
        let patience = self.patience_in_a_queue();
        if let Err(in_flight) = self.gate.wait_straggler(slot, Some(patience), give_up) {
            if steps_back.get() && !self.is_over() {
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
            strategy: Strategy::Rolling,
            drained,
            pause: rolled_at.elapsed(),
            drain,
            instantiate,
            memory_bytes_before,
            memory_bytes_after,
            is_recycle: true,
            ..ReloadReport::of_one(
                generation,
                previous_generation,
                due.pressure.reason.as_str(),
            )
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
            let is_given_up = self.is_over() || self.crashes.given_up().is_some();
            if !serves || !serving.blueprint.as_ref().is_some_and(is_build) || is_given_up {
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
    pub(super) fn see_recycled_off(self: &Arc<Self>, due: Due, reload: ReloadReport, roll: u64) {
        let slot = due.replica.slot();
        let leaving = budget::leaving(&due.replica);
        let finish = move |shared: &Arc<Self>| {
            let _ = shared.gate.wait_straggler(slot, None, || false);
            let mut freed = Freed::default();
            for (replica, generation) in shared.take_left(roll) {
                let is_meant = Arc::ptr_eq(&replica, &due.replica);
                let of_one = shared.discard_one(&replica, generation);
                if is_meant {
                    freed = of_one.unwrap_or_default();
                }
            }
            drop(leaving);
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
        let see_off = move |shared: &Arc<Self>| {
            let _ = guarded(|| {
                finish(shared);
                Ok(())
            });
            shared.lock_control().seeing_off -= 1;
            shared.control_changed.notify_all();
        };
        self.spawn_patiently("old", Box::new(see_off));
    }

    // ------------------------------------------------------------------ realms

    /// The one replica of a realm is recycled by a reload or a reset of the manager, which waits for scopes.
    pub(in crate::manager) fn recycle_realm(self: &Arc<Self>, due: Due) -> Answer {
        let shared = Arc::clone(self);
        if !self.still_serves(&due.replica) {
            return Box::new(move || shared.recycle_ended(due, Ok(None)));
        }
        let reading = due.replica.wear().read(self.recycling.ahead());
        let strategy = self.strategy();
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
            drain_timeout: Some(patience(due.attempts)),
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
        self.lock_control().begin_reload(&mut PendingReload {
            options: options.clone(),
            done: vec![done],
        });
        self.run_reload(&options)
    }

    fn reset_realm(self: &Arc<Self>, due: &Due, reading: Reading) -> Result<Box<RecycleReport>> {
        let expected = due.replica.memory_usage().private_bytes;
        let mut outcome = None;
        let mut freed = Freed::measure(expected, || {
            let options = ResetOptions {
                drain_timeout: Some(patience(due.attempts)),
                ..ResetOptions::default()
            };
            outcome = Some(self.paused(|scope| self.reset(&options, scope)));
        });
        let done = outcome.unwrap_or_else(|| Err(Error::internal("a reset without an end")))?;
        let left = due.replica.memory_usage().private_bytes;
        freed.expected_bytes = expected.saturating_sub(left);
        self.stats.reloaded(due.pressure.reason.as_str());
        Ok(Box::new(RecycleReport {
            reload: ReloadReport {
                pause: done.took,
                memory_bytes_before: done.memory_bytes_before,
                memory_bytes_after: done.memory_bytes_after,
                is_recycle: true,
                ..ReloadReport::of_one(
                    done.generation,
                    done.generation,
                    due.pressure.reason.as_str(),
                )
            },
            strategy: RecycleStrategy::Reset,
            slot: 0,
            calls: reading.calls,
            age: reading.age,
            freed,
        }))
    }

    pub(in crate::manager) fn realm_recycled(
        self: &Arc<Self>,
        due: Due,
        outcome: Result<Box<RecycleReport>>,
    ) {
        match outcome {
            Ok(report) => {
                self.recycled(&due, &report);
                self.recycle_ended(due, Ok(Some(report)));
            }
            // Somebody was faster, and has a scope.
            Err(Error::DrainTimeout { .. }) if !self.is_over() => {
                let attempts = due.attempts.saturating_add(1);
                self.enqueue(Due { attempts, ..due });
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

/// How long glue keeps new scopes waiting: longer each time that the open ones did not end in time.
fn patience(attempts: u32) -> Duration {
    let (least, most) = PATIENCE_IN_A_QUEUE;
    least.saturating_mul(1 << attempts.min(6)).min(most)
}
