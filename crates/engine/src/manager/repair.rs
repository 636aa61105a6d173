//! Poisoned instances are replaced one by one, while the others serve.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::bounded;
use wasm_molt_lifecycle::Generation;

use super::control::{Control, guarded};
use super::host::Replaced;
use super::start::Making;
use super::{ManagerState, Shared};
use crate::error::{Error, Result};
use crate::instance::replica::Replica;
use crate::instance::snapshot::Snapshot;
use crate::manager::swap::ReloadReport;

impl Shared {
    /// Has the poisoned instance of a slot replaced, in the background.
    pub(crate) fn request_repair(self: &Arc<Self>, slot: usize) {
        if self.is_over() && self.is_destroyed() {
            return;
        }
        if self.gives_up_replacing() || self.replaces_later() {
            return;
        }
        let mut control = self.lock_control();
        if control.repairing.contains(&slot) {
            return;
        }
        if control.is_swapping {
            if !control.repairs_due.contains(&slot) {
                control.repairs_due.push(slot);
            }
            return;
        }
        control.repairing.push(slot);
        drop(control);
        self.spawn("fix", move |shared| {
            let outcome = guarded(|| shared.repair(slot, false));
            {
                let mut control = shared.lock_control();
                control.repairing.retain(|s| *s != slot);
            }
            shared.control_changed.notify_all();
            match outcome {
                Err(error) => shared.repair_failed(&error),
                // The fresh instance may have trapped already, while this repair still counted as going on.
                Ok(()) => shared.repair_what_needs_it([slot]),
            }
            shared.recycle_next();
        });
    }

    /// Instances that hooks, or a reset that failed, have left poisoned do not serve. Nobody is inside them.
    pub(crate) fn retire_poisoned(self: &Arc<Self>, replicas: &[Arc<Replica>]) {
        let retired = self.gate.retired_slots();
        let is_lost = |r: &&Arc<Replica>| r.must_be_replaced() && !retired.contains(&r.slot());
        for replica in replicas.iter().filter(is_lost) {
            self.gate.retire(replica.slot());
            self.request_repair(replica.slot());
        }
    }

    /// Somebody waits: slots that a synchronous trap has left out of service are needed now.
    ///
    /// Only retired slots: a poisoned instance that somebody is still inside retires when they leave.
    pub(super) fn repair_retired(self: &Arc<Self>) {
        // Others wait for a recycle.
        self.repair_what_needs_it(self.gate.retired_slots());
    }

    /// Has those replaced that nobody has put in order meanwhile. What needs no replacement must not look as if it had
    /// one: a synchronous operation that follows would be refused.
    pub(super) fn repair_what_needs_it(self: &Arc<Self>, slots: impl IntoIterator<Item = usize>) {
        for slot in slots {
            if self.repairable(slot).is_some() {
                self.request_repair(slot);
            }
        }
    }

    /// On the home thread. A background repair of the same slot may be under way: it may need this very
    /// thread, so it is not waited for, and the first of the two wins.
    pub(super) fn repair_now(self: &Arc<Self>) -> Result<()> {
        if self.is_over() {
            return Err(self.closed());
        }
        if self.gives_up_replacing() {
            return Err(self.crashes.given_up().unwrap_or_else(|| self.closed()));
        }
        if let Some(error) = self.crashes.repair_waits() {
            return Err(error);
        }
        {
            let mut control = self.lock_control();
            // A recycle's hook may be inside the instance, on another thread.
            let is_recycling = control.recycling == Some(0);
            if control.is_swapping || control.is_repairing_home || is_recycling {
                return Err(self.reloading());
            }
            control.is_repairing_home = true;
        }
        let outcome = guarded(|| self.repair(0, true));
        self.lock_control().is_repairing_home = false;
        self.control_changed.notify_all();
        if let Err(error) = &outcome {
            let is_only = self.options.instances == 1;
            let _ = self.crashes.repair_failed(error, self.backoff(), is_only);
        }
        self.recycle_next();
        outcome
    }

    /// Waits until no instance is being replaced.
    pub(super) fn wait_repaired<'a>(
        &'a self,
        control: MutexGuard<'a, Control>,
    ) -> MutexGuard<'a, Control> {
        let is_busy = |c: &mut Control| !c.repairing.is_empty() || c.is_repairing_home;
        // A recycle that waits for its slot steps back.
        self.recycling.is_wanted(1);
        self.gate.ask_again();
        let waited = self.control_changed.wait_while(control, is_busy);
        self.recycling.is_wanted(-1);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces one poisoned instance. Whoever commits first wins; the other one's work is dropped.
    pub(super) fn repair(self: &Arc<Self>, slot: usize, is_sync: bool) -> Result<()> {
        let started = Instant::now();
        let Some(old) = self.repairable(slot) else {
            return Ok(());
        };
        let blueprint = self.blueprint()?;
        let before = self.generation();
        let making = Making {
            blueprint: &blueprint,
            generation: before.next(),
            from: self.origin(&blueprint.module),
            scope: self.hook_scope(is_sync),
        };
        let fresh = self
            .make_replica(&making, slot)
            .map_err(|(phase, cause)| self.reload_failed("the replacement", phase, cause))?;
        let (tell, told) = bounded(1);
        let shared = Arc::clone(self);
        let made = Arc::clone(&fresh);
        let poisoned = Arc::clone(&old);
        let captured = self.capture_next_realm(&fresh, &blueprint);
        let at_home = self.host.at_home(Box::new(move |_| {
            let _ = tell.send(shared.publish_repair(&poisoned, made, captured));
        }));
        let generation = at_home.ok().and_then(|()| told.recv().ok()).flatten();
        let Some(generation) = generation else {
            return self.discard(vec![fresh], before);
        };
        let memory_bytes_before = old.memory_bytes();
        let others = self.memory_bytes().saturating_sub(fresh.memory_bytes());
        self.note_peak(memory_bytes_before + others);
        // SAFETY: the poisoned instance was retired by whoever held it, and its handles expired when
        // the fresh one was published.
        unsafe { old.release() };
        let took = started.elapsed();
        let report = Arc::new(ReloadReport {
            pause: took,
            instantiate: took,
            memory_bytes_before,
            memory_bytes_after: fresh.memory_bytes(),
            ..ReloadReport::of_one(generation, before, "trap")
        });
        self.set_state(ManagerState::Ready);
        if self.crashes.given_up().is_some() {
            // Another one was the last straw meanwhile.
            self.set_state(ManagerState::Failed);
        }
        self.swap_ended(&Ok(report));
        Ok(())
    }

    /// The instance of a slot, if it is poisoned and nobody is inside any more.
    pub(super) fn repairable(&self, slot: usize) -> Option<Arc<Replica>> {
        let is_retired = self.gate.retired_slots().contains(&slot);
        self.replica(slot).filter(|r| is_retired && r.is_poisoned())
    }

    /// At home: puts a fresh instance into its slot, unless somebody else already has.
    pub(super) fn publish_repair(
        self: &Arc<Self>,
        old: &Arc<Replica>,
        fresh: Arc<Replica>,
        captured: Option<Arc<Snapshot>>,
    ) -> Option<Generation> {
        self.repairable(old.slot())?;
        if self.crashes.given_up().is_some() {
            return None;
        }
        let tell = |change| self.host.replaced(&change);
        let published = self.publish_one(old, fresh, captured, "trap", tell)?;
        self.crashes.was_repaired(old.last_trap());
        Some(published)
    }

    /// A fresh instance takes the place of that one, if that is still there; at home for slot 0.
    ///
    /// * `tell`: has the host told, before anybody gets the slot.
    pub(super) fn publish_one(
        self: &Arc<Self>,
        old: &Arc<Replica>,
        fresh: Arc<Replica>,
        captured: Option<Arc<Snapshot>>,
        reason: &str,
        tell: impl FnOnce(Replaced),
    ) -> Option<Generation> {
        let slot = old.slot();
        let change = {
            let mut serving = self.lock_serving();
            let place = serving
                .replicas
                .get_mut(slot)
                .filter(|r| Arc::ptr_eq(r, old))?;
            *place = Arc::clone(&fresh);
            serving.generation = serving.generation.next();
            fresh.number(serving.generation);
            Replaced {
                old: vec![Arc::clone(old)],
                new: vec![fresh],
                generation: serving.generation,
            }
        };
        if self.options.is_realm {
            self.adopt(old.module(), captured);
        }
        self.begin_wear(&change.new);
        self.stats.reloaded(reason);
        let generation = change.generation;
        // A panic of the host's must not leave the gate behind what serves.
        let _ = guarded(|| {
            tell(change);
            Ok(())
        });
        self.gate.reinstate(slot);
        Some(generation)
    }

    /// Nothing serves in that slot. If nothing serves at all, nobody may wait for ever.
    pub(super) fn repair_failed(self: &Arc<Self>, error: &Error) {
        self.swap_ended(&Err(error.clone()));
        let counts = self.gate.counts();
        let is_recycling = {
            let control = self.lock_control();
            control.recycling.is_some() || !control.recycles.is_empty()
        };
        let serves_nothing = counts.retired >= counts.slots && !is_recycling;
        let error = self
            .crashes
            .repair_failed(error, self.backoff(), serves_nothing);
        if serves_nothing {
            self.refuse_all(error);
        } else if counts.queued > 0 {
            // Whoever came while it was tried has been told that somebody is at it already.
            self.repair_retired();
        }
    }

    /// Nothing serves, and nobody may wait for ever.
    pub(super) fn refuse_all(self: &Arc<Self>, error: Error) {
        self.set_state(ManagerState::Failed);
        let error = if self.is_destroyed() {
            self.closed()
        } else {
            error
        };
        let _settling = self.settling();
        for job in self.gate.take_waiting() {
            job.refuse(error.clone());
        }
    }

    pub(super) fn generation(&self) -> Generation {
        self.lock_serving().generation
    }
}
