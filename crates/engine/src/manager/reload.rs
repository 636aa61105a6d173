//! Operations that change what serves: queued, joined, run one at a time; and what a roll leaves behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use wasm_molt_lifecycle::{Generation, Home, InFlight, OnDrainTimeout};

use super::control::{Answer, Control, Op, PendingReload, guarded};
use super::host::Event;
use super::lending::{HookScope, impatient};
use super::{Job, ManagerState, Shared};
use crate::error::{Done, Error, ErrorCode, Result};
use crate::instance::replica::Replica;
use crate::manager::swap::{self, ReloadOptions, ReloadReport, Strategy};

impl Shared {
    pub(super) fn reload(self: &Arc<Self>, options: ReloadOptions, done: Done<Arc<ReloadReport>>) {
        if let Err(error) = self.check_reload(&options) {
            done(Err(error));
            return;
        }
        let mut control = self.lock_control();
        if let Some(waiting) = control.equal_reload(&options) {
            waiting.push(done);
            return;
        }
        drop(control);
        self.push(Op::Reload(PendingReload {
            options,
            done: vec![done],
        }));
    }

    pub(super) fn check_reload(&self, options: &ReloadOptions) -> Result<()> {
        if self.is_over() {
            return Err(self.closed());
        }
        let is_rolling = options.strategy == Strategy::Rolling;
        if is_rolling && !options.skip_save && self.host.saves_state() {
            return Err(Error::invalid(format!(
                "options.strategy is 'rolling', and {} has a saveState hook: two generations that serve \
                 at the same time cannot hand state over; use 'exclusive', or skipSave: true to leave \
                 the state behind",
                self.name()
            )));
        }
        Ok(())
    }

    /// A generation is about to serve: nobody joins the reload that has made it any more.
    pub(crate) fn commits(&self) {
        if let Some(current) = &mut self.lock_control().current_reload {
            current.is_committed = true;
        }
    }

    /// Repairs need not wait any more: those that have waited begin.
    fn end_swap(self: &Arc<Self>) {
        let due = Self::end_swapping(&mut self.lock_control());
        self.repair_what_needs_it(due);
        self.recycle_next();
    }

    /// Returns the slots whose repair has waited for the swap to end.
    fn end_swapping(control: &mut Control) -> Vec<usize> {
        control.is_swapping = false;
        std::mem::take(&mut control.repairs_due)
    }

    /// Runs the one that [has begun](Control::begin_reload).
    pub(super) fn run_reload(self: &Arc<Self>, options: &ReloadOptions) -> Answer {
        self.wait_repaired(self.lock_control()).is_swapping = true;
        let scope = self.scope_of_operation();
        let has_begun = scope.is_ok();
        let outcome = scope.and_then(|scope| guarded(|| swap::run(self, options, scope)));
        let (done, due) = {
            let mut control = self.lock_control();
            let current = control.current_reload.take();
            let done = current.map(|current| current.done).unwrap_or_default();
            (done, Self::end_swapping(&mut control))
        };
        // One that a policy wants, and that has not got its turn, is no failure: it comes again.
        let is_put_off = options.is_recycle && matches!(outcome, Err(Error::DrainTimeout { .. }));
        if has_begun && !is_put_off {
            self.swap_ended(&outcome);
        }
        self.repair_what_needs_it(due);
        self.recycle_next();
        Box::new(move || {
            for done in done {
                done(outcome.clone());
            }
        })
    }

    /// Closes the gate, at home. Returns how many are in flight; `None` if the home is gone.
    ///
    /// * `closing`: runs there first.
    pub(crate) fn close_gate(
        self: &Arc<Self>,
        closing: impl FnOnce() + Send + 'static,
    ) -> Option<usize> {
        let in_flight = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&in_flight);
        let shared = Arc::clone(self);
        let told = self.host.at_home(Box::new(move |home| {
            closing();
            let n = home.map_or_else(|| shared.gate.close(), Home::close);
            shared.set_state(ManagerState::Draining);
            count.store(n, Ordering::Release);
        }));
        told.is_ok().then(|| in_flight.load(Ordering::Acquire))
    }

    /// Waits until nothing is in flight and all of it is answered.
    pub(crate) fn drain(
        &self,
        scope: &HookScope,
        timeout: Option<Duration>,
        give_up: impl Fn() -> bool,
    ) -> Result<(), InFlight> {
        // Nobody may be waited for on the home thread: what is in flight may need that very thread.
        let timeout = if scope.is_sync {
            Some(Duration::ZERO)
        } else {
            timeout
        };
        self.gate.wait_drained_unless(timeout, give_up)?;
        self.wait_settled();
        Ok(())
    }

    /// Releases what a roll has left behind, now where nobody is inside, else as soon as they leave.
    pub(crate) fn see_off(self: &Arc<Self>, roll: u64, options: &ReloadOptions) {
        if self.release_left(roll).is_none() {
            return;
        }
        self.lock_control().seeing_off += 1;
        let mut patience = match options.on_drain_timeout {
            OnDrainTimeout::Interrupt => options.drain_timeout,
            OnDrainTimeout::Abort => None,
        };
        let see_off = move |shared: &Arc<Self>| {
            let _ = guarded(|| {
                loop {
                    let Some(stragglers) = shared.release_left(roll) else {
                        return Ok(());
                    };
                    let started = Instant::now();
                    let waited = shared.gate.wait_stragglers(stragglers, patience, || false);
                    patience = patience.map(|left| left.saturating_sub(started.elapsed()));
                    if waited.is_err() {
                        patience = None;
                        let left = shared.lock_serving().left();
                        shared.interrupt(&left, &impatient());
                    }
                }
            });
            shared.lock_control().seeing_off -= 1;
            shared.control_changed.notify_all();
        };
        self.spawn_patiently("old", Box::new(see_off));
    }

    /// Releases what a roll, or an earlier one, has left behind and nobody is inside. Returns how many
    /// stragglers there are; `None` if none of them is in its way.
    pub(super) fn release_left(self: &Arc<Self>, roll: u64) -> Option<usize> {
        // Read first: a straggler that leaves afterwards is seen off in the next round.
        let stragglers = self.gate.stragglers();
        let (gone, is_any_left) = self.lock_serving().take_left(roll, &stragglers);
        for (replica, generation) in gone {
            let _ = self.discard(vec![replica], generation);
        }
        is_any_left.then_some(stragglers.len())
    }

    /// What a roll, or an earlier one, has left behind and nobody is inside: whoever gets it releases it.
    pub(super) fn take_left(&self, roll: u64) -> Vec<(Arc<Replica>, Generation)> {
        let stragglers = self.gate.stragglers();
        self.lock_serving().take_left(roll, &stragglers).0
    }

    pub(super) fn swap_ended(self: &Arc<Self>, outcome: &Result<Arc<ReloadReport>>) {
        match outcome {
            Ok(report) => {
                self.stats.paused(report.pause);
                self.tell(Event::Reload(Arc::clone(report)));
            }
            Err(error) => {
                self.stats.reload_failed();
                self.tell(Event::ReloadFailed(error.clone()));
            }
        }
    }

    pub(super) fn reload_now(
        self: &Arc<Self>,
        home: Option<&Home<Job>>,
        options: &ReloadOptions,
    ) -> Result<Arc<ReloadReport>> {
        self.check_reload(options)?;
        self.now(home, |scope| {
            let outcome = guarded(|| swap::run(self, options, scope));
            self.swap_ended(&outcome);
            outcome
        })
    }

    /// Runs an operation on this thread, the home thread if there is one, where nothing may be in flight.
    pub(crate) fn now<T>(
        self: &Arc<Self>,
        home: Option<&Home<Job>>,
        body: impl FnOnce(HookScope) -> Result<T>,
    ) -> Result<T> {
        if self.is_over() {
            return Err(self.closed());
        }
        let in_flight = home
            .map_or_else(|| self.gate.counts(), Home::counts)
            .in_flight;
        {
            let mut control = self.lock_control();
            if control.is_running || !control.repairing.is_empty() || control.is_repairing_home {
                return Err(self.reloading());
            }
            if in_flight > 0 {
                return Err(self.in_flight(in_flight));
            }
            control.is_running = true;
            control.is_swapping = true;
        }
        let outcome = guarded(|| body(self.hook_scope(true)));
        self.end_swap();
        // Whatever was asked for in the meantime runs now, on a control thread.
        let mut control = self.lock_control();
        if control.queue.is_empty() {
            control.is_running = false;
            drop(control);
            self.control_changed.notify_all();
        } else {
            drop(control);
            self.start_control();
        }
        outcome
    }

    /// Runs an operation on instances on the control thread, with repairs kept away.
    pub(super) fn paused<T>(
        self: &Arc<Self>,
        body: impl FnOnce(HookScope) -> Result<T>,
    ) -> Result<T> {
        if self.is_over() {
            return Err(self.closed());
        }
        self.wait_repaired(self.lock_control()).is_swapping = true;
        let outcome = guarded(|| body(self.scope_of_operation()?));
        self.end_swap();
        outcome
    }

    /// Has the trapped instance of slot 0 replaced, if that is what is there. During an operation only.
    pub(crate) fn repair_home(self: &Arc<Self>, scope: &HookScope) -> Result<()> {
        self.repair(0, scope.is_sync)
    }

    pub(crate) fn in_flight(&self, in_flight: usize) -> Error {
        Error::new(
            ErrorCode::Busy,
            format!(
                "{} has {in_flight} calls or leases in flight; await them, or use reload()",
                self.name()
            ),
        )
    }

    pub(crate) fn reloading(&self) -> Error {
        Error::new(
            ErrorCode::Reloading,
            format!(
                "a swap of {} is under way; use call(), which waits its turn",
                self.name()
            ),
        )
    }
}
