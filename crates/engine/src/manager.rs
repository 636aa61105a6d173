//! The manager: replicas behind a gate, a pool, and one control thread at a time that changes them.
//!
//! # Threads
//! - *Any thread* may hand over calls and leases, and read figures.
//! - *Pool threads* run calls. They hold a ticket for as long as they are inside a guest, nothing else.
//! - *The control thread* exists while something is to be changed: start, reload, close, destroy. It
//!   may block on the host (hooks, steps at home) and on the drain; it holds no lock while it does.
//! - *The home thread* enters slot 0 synchronously. Slot 0 changes hands only there
//!   ([`wasm_molt_lifecycle::Home`]), so publishing and closing are steps that run at home.
//!
//! Lock order: `control` before `serving`; the gate's own lock and the statistics are leaves.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use wasm_molt_lifecycle::{Admission, Generation, Home, Refusal, Refused, WaitId};

pub(crate) mod budget;
pub(crate) mod call;
mod control;
mod crash;
mod end;
pub(crate) mod fork;
pub(crate) mod freed;
pub(crate) mod host;
pub(crate) mod invoke;
pub(crate) mod isolation;
mod job;
pub(crate) mod lease;
mod lending;
pub(crate) mod options;
pub(crate) mod pause;
mod realm;
pub(crate) mod recycle;
mod reload;
mod repair;
pub(crate) mod serving;
mod shared;
pub(crate) mod snapshots;
mod spawn;
mod start;
mod state;
pub(crate) mod stats;
pub(crate) mod swap;
pub(crate) mod trace;

pub use job::{Job, LeaseDone};
pub(crate) use shared::Shared;
pub use state::ManagerState;

use control::Op;
use job::LeaseJob;

use crate::error::{Done, Error, Result};
use crate::instance::module::{Module, Source};
use crate::instance::replica::Replica;
use crate::manager::call::{CallControl, CallJob, CallLimits, Queue, Settle, Work};
use crate::manager::host::Host;
use crate::manager::lease::Lease;
use crate::manager::options::ManagerOptions;
use crate::manager::stats::ManagerStats;
use crate::manager::swap::{ReloadOptions, ReloadReport};

/// A module and its instances, replaceable while in use.
#[derive(Clone)]
pub struct Manager {
    pub(crate) shared: Arc<Shared>,
}

impl fmt::Debug for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager")
            .field("name", &self.shared.name())
            .finish_non_exhaustive()
    }
}

impl Manager {
    /// A manager that has not started yet, and its home handle if the options ask for one.
    ///
    /// # Errors
    /// [`crate::ErrorCode::InvalidArgument`] for options that cannot be used.
    pub fn new(options: ManagerOptions, host: Arc<dyn Host>) -> Result<(Self, Option<Home<Job>>)> {
        let (shared, home) = Shared::new(options, host)?;
        budget::register(&shared);
        Ok((Self { shared }, home))
    }

    /// Loads the module and brings up the first generation on a control thread.
    pub fn start(&self, source: Source, done: Done<()>) {
        self.shared.push(Op::Start { source, done });
    }

    /// The same on this thread, which must be the home thread if there is one.
    ///
    /// # Errors
    /// As `start` would report.
    pub fn start_now(&self, source: &Source) -> Result<()> {
        self.shared.start(source, true)
    }

    /// As in errors and thread names.
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// Where it is in its life.
    pub fn state(&self) -> ManagerState {
        self.shared.state()
    }

    /// What serves now.
    pub fn generation(&self) -> Generation {
        self.shared.lock_serving().generation
    }

    /// The instance in a slot.
    pub fn replica(&self, slot: usize) -> Option<Arc<Replica>> {
        self.shared.replica(slot)
    }

    /// The module that serves; `None` before the start.
    pub fn module(&self) -> Option<Arc<Module>> {
        self.shared.module()
    }

    /// Disconnected once the manager is destroyed: for hosts that wait on somebody.
    pub fn destroyed(&self) -> &Receiver<()> {
        &self.shared.cancel.1
    }

    /// What the options said.
    pub fn options(&self) -> &ManagerOptions {
        &self.shared.options
    }

    /// Checks that `invoke` can use the function at this position.
    ///
    /// # Errors
    /// [`crate::ErrorCode::ExportNotFound`] or [`crate::ErrorCode::InvalidArgument`].
    pub fn check_invoke(&self, function: usize) -> Result<()> {
        let module = self.module().ok_or_else(|| self.shared.closed())?;
        invoke::check(&module, &self.shared.options.abi, function)
    }

    fn job(
        &self,
        work: Work,
        limits: CallLimits,
        settle: Settle,
    ) -> Result<Box<CallJob>, (Error, Settle)> {
        match CallControl::new(limits) {
            Ok(control) => Ok(Box::new(CallJob {
                work,
                settle,
                control,
                admitted_at: Instant::now(),
                shared: Arc::clone(&self.shared),
            })),
            Err(error) => Err((error, settle)),
        }
    }

    /// Hands a call to the pool. `settle` is called exactly once, also for a refusal.
    ///
    /// * `home`: the home handle, if this is the home thread.
    pub fn call(
        &self,
        home: Option<&Home<Job>>,
        work: Work,
        limits: CallLimits,
        settle: Settle,
    ) -> Option<Arc<CallControl>> {
        match self.job(work, limits, settle) {
            Ok(job) => {
                let control = job.control.clone();
                self.admit(home, Job::Call(job));
                control
            }
            Err((error, settle)) => {
                settle(Err(error));
                None
            }
        }
    }

    /// The same inside a lease.
    pub fn call_in(
        &self,
        lease: &Arc<Lease>,
        work: Work,
        limits: CallLimits,
        settle: Settle,
    ) -> Option<Arc<CallControl>> {
        match self.job(work, limits, settle) {
            Ok(job) => {
                let control = job.control.clone();
                lease.call(job);
                control
            }
            Err((error, settle)) => {
                settle(Err(error));
                None
            }
        }
    }

    /// Asks for an instance. The answer may come at once, on this thread.
    pub fn lease(&self, home: Option<&Home<Job>>, done: LeaseDone) -> WaitId {
        self.admit(
            home,
            Job::Lease(LeaseJob {
                shared: Arc::clone(&self.shared),
                done,
            }),
        )
    }

    /// Takes a lease that still waits out of the queue and answers it with `error`.
    pub fn cancel_lease(&self, id: WaitId, error: Error) {
        let _settling = self.shared.settling();
        if let Some(job) = self.shared.gate.cancel(id) {
            job.refuse(error);
        }
    }

    fn admit(&self, home: Option<&Home<Job>>, job: Job) -> WaitId {
        let shared = &self.shared;
        let id = shared.gate.reserve_id();
        if let Some(error) = shared.crashes.given_up() {
            let _settling = shared.settling();
            job.refuse(error);
            return id;
        }
        if let Job::Call(call) = &job
            && let Some(control) = &call.control
        {
            control.waits_in(Queue::Gate(Arc::downgrade(shared), id));
        }
        let control = match &job {
            Job::Call(call) => call.control.clone(),
            Job::Lease(_) => None,
        };
        let admitted = match home {
            Some(home) => home.admit_as(id, job),
            None => shared.gate.admit_as(id, job),
        };
        match admitted {
            Ok(Admission::Started) => {}
            Ok(Admission::Queued(_)) => {
                shared.repair_retired();
                if let Some(error) = shared.crashes.given_up() {
                    // It was given up in between, and nobody would come for what waits.
                    shared.refuse_all(error);
                }
                // A stop that came before the call was in the queue has found nothing there.
                if let Some(control) = control {
                    control.queued();
                }
            }
            Err(Refused { waiter, refusal }) => waiter.refuse(match refusal {
                Refusal::QueueFull { max_queue } => shared.queue_full(max_queue),
                Refusal::Shut => shared.closed(),
            }),
        }
        id
    }

    /// Replaces every instance, keeping state through the host's hooks.
    ///
    /// A reload that equals one under way joins it; another one runs after it.
    pub fn reload(&self, options: ReloadOptions, done: Done<Arc<ReloadReport>>) {
        self.shared.reload(options, done);
    }

    /// The same on this thread, which must be the home thread if there is one.
    ///
    /// # Errors
    /// [`crate::ErrorCode::Busy`] if anything is in flight, [`crate::ErrorCode::Reloading`] during another change.
    pub fn reload_now(
        &self,
        home: Option<&Home<Job>>,
        options: &ReloadOptions,
    ) -> Result<Arc<ReloadReport>> {
        self.shared.reload_now(home, options)
    }

    /// Replaces the poisoned instance of slot 0 on this thread, which must be the home thread.
    ///
    /// # Errors
    /// Why it could not be replaced.
    pub fn repair_now(&self) -> Result<()> {
        self.shared.repair_now()
    }

    /// Stops admitting, waits for what was admitted, releases. Idempotent.
    pub fn close(&self, drain_timeout: Option<Duration>, done: Done<()>) {
        self.shared.close(drain_timeout, done);
    }

    /// Nobody waits for hooks any more, and what has not been committed is rolled back: for a hook that
    /// is itself about to wait for the manager's end.
    pub fn give_hooks_up(&self) {
        self.shared.give_hooks_up();
    }

    /// Stops what runs, refuses what waits, releases. Idempotent.
    pub fn destroy(&self, done: Done<()>) {
        self.shared.destroy(done);
    }

    /// Figures of this moment.
    pub fn stats(&self, home: Option<&Home<Job>>) -> ManagerStats {
        self.shared.read_stats(home)
    }

    /// Counts synchronous calls that ended well.
    pub fn count_completed(&self, calls: u64) {
        self.shared.stats.ran_at_home(calls);
        if calls > 0 {
            self.shared.crashes.call_completed();
        }
    }

    /// Hooks are known to return promises, so that nothing tries them where they would have to be synchronous.
    pub fn hooks_are_async(&self) {
        self.shared.recycling.has_async_hooks();
    }

    /// A synchronous call has ended on the home thread, in that instance, and asks for a judgement
    /// ([`Replica::note_call`]); nobody is inside slot 0. It may be recycled in here.
    pub fn judge_at_home(&self, home: &Home<Job>, replica: &Arc<Replica>) {
        let shared = &self.shared;
        let due = shared.judge(replica);
        if let Some(due) = due.or_else(|| shared.overtake(replica)) {
            // Leaving may have handed the slot to a call that has waited for it.
            if shared.options.is_realm || home.enter().is_none() {
                shared.enqueue(due);
            } else {
                shared.recycle_at_home(due);
            }
        }
    }

    /// A synchronous call failed: counts it and tells of traps.
    pub fn call_failed_at_home(&self, error: &Error) {
        self.shared.stats.failed_at_home(error);
        self.shared.tell_trap(error);
        if self.shared.is_destroyed() {
            self.shared.go_on(true);
        }
    }

    /// Slot 0 was retired by a synchronous call. Its instance is replaced by whoever needs it next:
    /// at once if somebody waits, else within the next call.
    pub fn retired_at_home(&self) {
        if self.shared.gate.counts().queued > 0 {
            self.shared.repair_retired();
        }
    }
}
