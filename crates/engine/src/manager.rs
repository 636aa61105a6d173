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

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use wasm_molt_lifecycle::{
    Admission, Gate, GateCounts, GateOptions, Generation, Home, Refusal, Refused, Ticket, WaitId,
    Waiter,
};

pub(crate) mod budget;
pub(crate) mod call;
mod crash;
mod end;
pub(crate) mod fork;
pub(crate) mod freed;
pub(crate) mod host;
pub(crate) mod invoke;
pub(crate) mod isolation;
pub(crate) mod lease;
mod lending;
pub(crate) mod options;
pub(crate) mod pause;
mod realm;
mod recycle;
mod reload;
mod repair;
pub(crate) mod serving;
pub(crate) mod snapshots;
mod start;
pub(crate) mod stats;
pub(crate) mod swap;
pub(crate) mod trace;

use crash::Crashes;
pub(crate) use lending::{HookScope, Hooks, impatient};
pub(crate) use recycle::{Due, Recycling};
pub use recycle::{Pressure, RecycleReport};
pub(crate) use start::Making;

pub(crate) use realm::Compiled;

use crate::error::{Done, Error, ErrorCode, Result};
use crate::instance::deadline::Deadline;
use crate::instance::interrupt::Stop;
use crate::instance::module::{Module, Source};
use crate::instance::pool::{Pool, no_thread, thread_name};
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::snapshot::{Origin, Snapshot};
use crate::manager::call::{CallControl, CallJob, CallLimits, Queue, Settle, Work};
use crate::manager::freed::Freed;
use crate::manager::host::Host;
use crate::manager::lease::Lease;
use crate::manager::options::{Isolation, ManagerOptions, RecycleStrategy};
use crate::manager::pause::{ResetOptions, ResetReport, SnapshotControl, Terms};
use crate::manager::serving::Serving;
use crate::manager::snapshots::Snapshots;
use crate::manager::stats::{CallCounts, Stats, Times};
use crate::manager::swap::{ReloadOptions, ReloadReport, ReloadStep};
use crate::scarcity;

/// Between two tries to have a thread that the system refuses.
const UNTIL_ANOTHER_TRY: Duration = Duration::from_millis(10);

/// What remains to be done once the control thread is free again.
type Answer = Box<dyn FnOnce() + Send>;

/// Where a manager is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ManagerState {
    /// The first generation is not there yet.
    Starting,
    /// Serving.
    Ready,
    /// A swap waits for what is in flight.
    Draining,
    /// A swap is under way.
    Reloading,
    /// `close()` or `destroy()` was called.
    Closing,
    /// Everything is released.
    Closed,
    /// Nothing can serve; a reload may help.
    Failed,
}

impl ManagerState {
    const ALL: [Self; 7] = [
        Self::Starting,
        Self::Ready,
        Self::Draining,
        Self::Reloading,
        Self::Closing,
        Self::Closed,
        Self::Failed,
    ];

    /// As callers see it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Reloading => "reloading",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Failed => "failed",
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A new generation serves.
    Reload(Arc<ReloadReport>),
    /// A reload has come one step further.
    Step(ReloadStep),
    /// A reload did not happen.
    ReloadFailed(Error),
    /// A guest trapped.
    Trap(Error),
    /// A threshold was crossed.
    Pressure(Pressure),
    /// The one outcome of a decision to recycle; `None`: something else has replaced the instance.
    Recycled {
        /// As in [`Pressure::decision`].
        decision: u64,
        /// What came of it.
        outcome: Result<Option<Arc<RecycleReport>>>,
    },
    /// After recycles memory did not come back. Once.
    MemoryKept(Freed),
    /// The manager is closed.
    Close,
}

/// Instances that were replaced.
#[derive(Debug)]
pub struct Replaced {
    /// They do not serve any more.
    pub old: Vec<Arc<Replica>>,
    /// They serve now; empty at the end of the manager's life.
    pub new: Vec<Arc<Replica>>,
    /// The generation of the new ones.
    pub generation: Generation,
}

/// Receives the instance that a lease got.
pub type LeaseDone = Done<Arc<Lease>>;

/// What waits at the gate.
pub enum Job {
    /// A call.
    Call(Box<CallJob>),
    /// Somebody who wants an instance for a while.
    Lease(LeaseJob),
}

/// A lease that waits.
pub struct LeaseJob {
    shared: Arc<Shared>,
    done: LeaseDone,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Call(_) => "Call",
            Self::Lease(_) => "Lease",
        })
    }
}

impl fmt::Debug for LeaseJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseJob")
    }
}

impl Waiter for Job {
    fn start(self, ticket: Ticket<Self>) {
        match self {
            Self::Call(job) => {
                let shared = Arc::clone(&job.shared);
                let place = shared.lock_serving().place_of(ticket.id());
                let Some((replica, pool)) = place else {
                    ticket.retire();
                    job.refuse(Error::internal("a slot without an instance"));
                    return;
                };
                // With a control the job stays within reach of a stop until a thread takes it.
                let Some(control) = job.control.clone() else {
                    pool.spawn(move |started| job.run_on_pool(started, &replica, ticket));
                    return;
                };
                control.park(job, ticket);
                pool.spawn(move |started| {
                    if let Some((job, ticket)) = control.unpark() {
                        job.run_on_pool(started, &replica, ticket);
                    }
                });
            }
            Self::Lease(LeaseJob { shared, done }) => {
                let place = shared.lock_serving().place_of(ticket.id());
                let Some((replica, pool)) = place else {
                    ticket.retire();
                    done(Err(Error::internal("a slot without an instance")));
                    return;
                };
                done(Ok(shared.lease_with(replica, pool, ticket)));
            }
        }
    }
}

impl Job {
    /// Answers without having run.
    pub(crate) fn refuse(self, error: Error) {
        match self {
            Self::Call(job) => job.refuse(error),
            Self::Lease(job) => (job.done)(Err(error)),
        }
    }
}

pub(crate) enum Op {
    Start {
        source: Source,
        done: Done<()>,
    },
    /// The copy that a fork begins with has been taken.
    StartFrom {
        blueprint: Arc<Blueprint>,
        snapshot: Arc<Snapshot>,
        done: Done<()>,
    },
    Reload(PendingReload),
    /// Of a realm.
    Recycle(Due),
    Snapshot {
        control: SnapshotControl,
        done: Done<Arc<Snapshot>>,
    },
    Reset {
        options: ResetOptions,
        done: Done<ResetReport>,
    },
    Fork {
        child: Arc<Shared>,
        done: Done<()>,
    },
    Close {
        until: Option<Instant>,
        asked_at: Instant,
    },
    Destroy,
}

pub(crate) struct PendingReload {
    options: ReloadOptions,
    done: Vec<Done<Arc<ReloadReport>>>,
}

/// A reload that runs.
struct CurrentReload {
    options: ReloadOptions,
    done: Vec<Done<Arc<ReloadReport>>>,
    /// What it has made serves: whoever asks from now on may have called that already, and wants another one.
    is_committed: bool,
}

/// What a thread of a manager is started for.
type Body = Box<dyn FnOnce(&Arc<Shared>) + Send>;

#[derive(Default)]
struct Control {
    /// An operation runs, on the control thread or at home.
    is_running: bool,
    /// That operation is a swap: repairs wait for it.
    is_swapping: bool,
    queue: VecDeque<Op>,
    /// The reload that runs: equal ones join it.
    current_reload: Option<CurrentReload>,
    /// Slots whose poisoned instance is being replaced in the background.
    repairing: Vec<usize>,
    /// Slot 0 is being replaced on the home thread.
    is_repairing_home: bool,
    /// Slots that wait for a swap to end.
    repairs_due: Vec<usize>,
    /// What is to be recycled, in the order of the decisions.
    recycles: VecDeque<Due>,
    /// The slot of the one that is being carried out; it is in `repairing` as well.
    recycling: Option<usize>,
    /// Threads that wait for an earlier generation to be left.
    seeing_off: usize,
    /// When a close has waited long enough for hooks.
    hooks_until: Option<Deadline>,
    closing: Vec<Done<()>>,
}

impl Control {
    /// In one step with taking it out of the queue: there is no moment in which an equal one could not join it.
    fn begin_reload(&mut self, pending: &mut PendingReload) {
        self.current_reload = Some(CurrentReload {
            options: pending.options.clone(),
            done: std::mem::take(&mut pending.done),
            is_committed: false,
        });
    }

    /// A reload that does just the same and has not ended: whoever asks for it once more is answered
    /// with it. One that leads to another build is not passed over, for it would have the last word.
    fn equal_reload(
        &mut self,
        options: &ReloadOptions,
    ) -> Option<&mut Vec<Done<Arc<ReloadReport>>>> {
        let queued = self.queue.iter_mut().rev().filter_map(|op| match op {
            Op::Reload(pending) => Some((&pending.options, &mut pending.done)),
            _ => None,
        });
        let current = self.current_reload.as_mut();
        let current = current.filter(|current| !current.is_committed);
        queued
            .chain(current.map(|current| (&current.options, &mut current.done)))
            .take_while(|(other, _)| other.source == options.source)
            .filter(|(other, _)| *other == options)
            .map(|(_, done)| done)
            .last()
    }
}

pub(crate) struct Shared {
    name: OnceLock<String>,
    pub(crate) options: ManagerOptions,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) gate: Gate<Job>,
    pub(crate) stats: Stats,
    pub(crate) serving: Mutex<Serving>,
    /// Every instance that may still be running, so that `destroy` finds it.
    known: Mutex<Vec<Weak<Replica>>>,
    /// Leases with a ticket, so that a reload can end them.
    leases: Mutex<Vec<Weak<Lease>>>,
    /// What the hook of the swap under way was lent.
    hook_lease: Mutex<Option<Arc<Lease>>>,
    control: Mutex<Control>,
    control_changed: Condvar,
    state: AtomicU8,
    is_destroyed: AtomicBool,
    /// Becomes disconnected when the manager is destroyed: wakes everything that waits for the host.
    cancel: (Mutex<Option<Sender<()>>>, Receiver<()>),
    hooks: Mutex<Hooks>,
    settling: AtomicUsize,
    memory_bytes_peak: AtomicUsize,
    snapshots: Mutex<Snapshots>,
    /// Somebody has wanted a snapshot, and will want one of the next build.
    has_captured: AtomicBool,
    compiled: Compiled,
    pub(crate) recycling: Recycling,
    pub(crate) crashes: Crashes,
}

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

impl Manager {
    /// A manager that has not started yet, and its home handle if the options ask for one.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for options that cannot be used.
    pub fn new(options: ManagerOptions, host: Arc<dyn Host>) -> Result<(Self, Option<Home<Job>>)> {
        check(&options, &*host)?;
        let name = options.name.clone().unwrap_or_else(|| "wasm".into());
        let threads = options
            .threads
            // All that a realm's do is to compile.
            .unwrap_or_else(|| {
                if options.is_realm {
                    parallelism()
                } else {
                    options.instances.min(parallelism())
                }
            });
        let pool = Arc::new(Pool::new(&name, threads, options.limits.stack_bytes()));
        let gate = Gate::new(GateOptions {
            slots: options.instances,
            max_queue: options.max_queue,
            home: options.has_home,
        });
        let home = gate.take_home();
        let (alive, cancelled) = bounded(0);
        let shared = Arc::new(Shared {
            name: OnceLock::new(),
            options,
            host,
            gate,
            stats: Stats::new()?,
            serving: Mutex::new(Serving::new(pool)),
            known: Mutex::default(),
            leases: Mutex::default(),
            hook_lease: Mutex::default(),
            control: Mutex::default(),
            control_changed: Condvar::new(),
            state: AtomicU8::new(ManagerState::Starting as u8),
            is_destroyed: AtomicBool::new(false),
            cancel: (Mutex::new(Some(alive)), cancelled),
            hooks: Mutex::new(Hooks::new()),
            settling: AtomicUsize::new(0),
            memory_bytes_peak: AtomicUsize::new(0),
            snapshots: Mutex::default(),
            has_captured: AtomicBool::new(false),
            compiled: Compiled::default(),
            recycling: Recycling::default(),
            crashes: Crashes::default(),
        });
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
    /// [`ErrorCode::ExportNotFound`] or [`ErrorCode::InvalidArgument`].
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
    /// [`ErrorCode::Busy`] if anything is in flight, [`ErrorCode::Reloading`] during another change.
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

/// Asked for once: the system reads files for it, which takes as long as a fork.
fn parallelism() -> usize {
    static PARALLELISM: OnceLock<usize> = OnceLock::new();
    let ask = || std::thread::available_parallelism().map_or(1, usize::from);
    *PARALLELISM.get_or_init(ask)
}

fn check(options: &ManagerOptions, host: &dyn Host) -> Result<()> {
    const MOST: usize = 4096;
    if let Some(recycle) = &options.recycle {
        recycle.check()?;
        if recycle.strategy == RecycleStrategy::Rolling && host.saves_state() {
            return Err(Error::invalid(
                "options.recycle.strategy is 'rolling', and there is a saveState hook: two instances that serve \
                 at the same time cannot hand state over; use 'exclusive'",
            ));
        }
    }
    if options.instances == 0 || options.instances > MOST {
        return Err(Error::invalid(format!(
            "instances is {}; it must lie between 1 and {MOST}",
            options.instances
        )));
    }
    if let Some(threads) = options.threads
        && (threads == 0 || threads > MOST)
    {
        return Err(Error::invalid(format!(
            "threads is {threads}; it must lie between 1 and {MOST}"
        )));
    }
    if options.isolation == Isolation::PerCall && host.reseeds() {
        return Err(Error::invalid(
            "options.reseed must be the name of an export with isolation 'per-call': a function would cost \
             each call a turn of the event loop",
        ));
    }
    options.limits.check(options.engine.fuel)
}

impl Shared {
    pub(crate) fn name(&self) -> &str {
        self.name.get().map_or_else(
            || self.options.name.as_deref().unwrap_or("wasm"),
            String::as_str,
        )
    }

    fn lock_control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_serving(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_snapshots(&self) -> MutexGuard<'_, Snapshots> {
        self.snapshots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What new instances of that build begin with.
    pub(crate) fn origin(&self, module: &Arc<Module>) -> Option<Origin> {
        if self.options.is_realm {
            // JavaScript makes it, and begins anew.
            return None;
        }
        let newest = self.lock_snapshots().origin();
        newest.filter(|newest| Arc::ptr_eq(newest.snapshot.module(), module))
    }

    /// A snapshot was taken.
    pub(crate) fn note_capture(&self) {
        self.has_captured.store(true, Ordering::Relaxed);
    }

    /// Whether cold memory is laid out for a capture without copying.
    pub(crate) fn prepares_snapshots(&self) -> bool {
        let likely = || self.isolates_calls() || self.has_captured.load(Ordering::Relaxed);
        self.options.prepares_snapshots.unwrap_or_else(likely)
    }

    pub(crate) fn isolates_calls(&self) -> bool {
        self.options.isolation == Isolation::PerCall
    }

    pub(crate) fn replica(&self, slot: usize) -> Option<Arc<Replica>> {
        self.lock_serving().replicas.get(slot).cloned()
    }

    pub(crate) fn blueprint(&self) -> Result<Arc<Blueprint>> {
        self.lock_serving()
            .blueprint
            .clone()
            .ok_or_else(|| self.closed())
    }

    fn module(&self) -> Option<Arc<Module>> {
        Some(Arc::clone(&self.lock_serving().blueprint.as_ref()?.module))
    }

    pub(crate) fn function_name(&self, index: usize) -> String {
        self.module()
            .and_then(|m| m.functions().get(index).map(|f| f.name.clone()))
            .unwrap_or_else(|| format!("function {index}"))
    }

    pub(crate) fn state(&self) -> ManagerState {
        let index = usize::from(self.state.load(Ordering::Acquire));
        ManagerState::ALL
            .get(index)
            .copied()
            .unwrap_or(ManagerState::Failed)
    }

    /// Once closing, only the end itself may change the state.
    pub(crate) fn set_state(&self, state: ManagerState) {
        let may = match self.state() {
            ManagerState::Closed => false,
            ManagerState::Closing => state == ManagerState::Closed,
            _ => true,
        };
        if may {
            self.state.store(state as u8, Ordering::Release);
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state(), ManagerState::Closing | ManagerState::Closed)
    }

    pub(crate) fn is_destroyed(&self) -> bool {
        self.is_destroyed.load(Ordering::Acquire)
    }

    pub(crate) fn closed(&self) -> Error {
        Error::new(
            ErrorCode::Closed,
            format!(
                "{} is {}; create a new manager",
                self.name(),
                self.state().as_str()
            ),
        )
    }

    pub(crate) fn queue_full(&self, max_queue: usize) -> Error {
        Error::new(
            ErrorCode::QueueFull,
            format!(
                "{} has maxQueue = {max_queue} calls waiting already; wait for some, or raise maxQueue",
                self.name()
            ),
        )
    }

    pub(crate) fn remember(&self, replica: &Arc<Replica>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|r| r.strong_count() > 0);
        known.push(Arc::downgrade(replica));
        drop(known);
        // A destroy that came before the replica was known must still stop it.
        if self.is_destroyed() {
            replica.interrupter().stop_for_good(destroyed());
        }
    }

    pub(crate) fn stop_all(&self, stop: &Stop) {
        let known = self
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for replica in known.iter().filter_map(Weak::upgrade) {
            replica.interrupter().stop_for_good(stop.clone());
        }
    }

    /// A ticket goes back; a poisoned instance does not serve on. Returns its slot, for
    /// [`repair_lost`](Self::repair_lost): retired first, repaired then, because a repair that came before the
    /// retirement would have its fresh instance retired.
    pub(crate) fn give_back(
        self: &Arc<Self>,
        ticket: Ticket<Job>,
        replica: &Replica,
    ) -> Option<usize> {
        let slot = ticket.slot();
        let serves = self
            .replica(slot)
            .is_some_and(|now| now.id() == replica.id());
        if serves && replica.must_be_replaced() {
            ticket.retire();
            return Some(slot);
        }
        if serves && replica.wear().wants_a_look() && self.judge_slot(replica) {
            // With the ticket, which knows whether the slot has rolled meanwhile.
            ticket.retire();
            if !replica.wear().is_due() || self.is_over() {
                // Its decision has just ended, without knowing of this.
                self.spare(slot);
            }
            return None;
        }
        drop(ticket);
        None
    }

    /// Has what a ticket left poisoned replaced.
    pub(crate) fn repair_lost(self: &Arc<Self>, slot: Option<usize>) {
        if let Some(slot) = slot {
            self.request_repair(slot);
        }
    }

    /// Tells the host. What it does with that is not our affair, not even if it panics.
    pub(crate) fn tell(&self, event: Event) {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.host.event(event)));
    }

    /// Tells listeners of a trap; other failures are the caller's affair alone.
    pub(crate) fn tell_trap(&self, error: &Error) {
        if matches!(error, Error::Trap { .. }) {
            self.tell(Event::Trap(error.clone()));
        }
    }

    /// A call is out of flight and its answer is not yet on its way, until the guard is dropped.
    pub(crate) fn settling(&self) -> Settling<'_> {
        self.settling.fetch_add(1, Ordering::SeqCst);
        Settling(&self.settling)
    }

    /// Answers of calls that are out of flight are on their way: they come before the swap's own.
    pub(crate) fn wait_settled(&self) {
        while self.settling.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }

    // ------------------------------------------------------------------ the control thread

    pub(crate) fn push(self: &Arc<Self>, op: Op) {
        let mut control = self.lock_control();
        control.queue.push_back(op);
        if control.is_running {
            return;
        }
        control.is_running = true;
        drop(control);
        self.start_control();
    }

    /// Somebody has just said that the control runs.
    fn start_control(self: &Arc<Self>) {
        self.try_control(true);
    }

    /// * `may_run_here`: this is not the timer thread, which others wait for.
    fn try_control(self: &Arc<Self>, may_run_here: bool) {
        self.spawn_or("ctl", move |shared, started| match started {
            Ok(()) => shared.run_control(),
            Err(error) => shared.without_control(&error, may_run_here),
        });
    }

    /// The system refuses the control thread: what was asked for is refused, except the end.
    fn without_control(self: &Arc<Self>, error: &Error, may_run_here: bool) {
        let (refused, is_end_left, is_waiting) = {
            let mut control = self.lock_control();
            let ops = std::mem::take(&mut control.queue);
            let is_end = |op: &Op| matches!(op, Op::Destroy);
            let (ends, refused): (VecDeque<_>, VecDeque<_>) = ops.into_iter().partition(is_end);
            control.queue = ends;
            control.is_running = !control.queue.is_empty();
            // For others, who may want a thread of the pool themselves.
            let is_waiting = control.seeing_off > 0
                || !control.repairing.is_empty()
                || control.is_repairing_home;
            (refused, control.is_running, is_waiting)
        };
        for op in refused {
            let _ = guarded(|| {
                self.refuse_op(op, error);
                Ok(())
            });
        }
        self.control_changed.notify_all();
        if !is_end_left {
            return;
        }
        if !is_waiting {
            // Everything was stopped before, so threads of the pool come free.
            let (pool, shared) = (Arc::clone(&self.lock_serving().pool), Arc::clone(self));
            let Err(run) = pool.spawn_if_running(move || shared.run_control()) else {
                return;
            };
            // Leases have ended by now, but this very thread may be inside.
            if may_run_here && self.gate.wait_drained(Some(Duration::ZERO)).is_ok() {
                run();
                return;
            }
        }
        self.lock_control().is_running = false;
        // Else whoever leaves goes on.
        if Deadline::is_available() {
            let shared = Arc::clone(self);
            let again = move || shared.go_on(false);
            if let Ok(again) = Deadline::after(UNTIL_ANOTHER_TRY, again) {
                again.detach();
            }
        }
    }

    /// An end that found neither a thread nor an empty gate.
    fn go_on(self: &Arc<Self>, may_run_here: bool) {
        let mut control = self.lock_control();
        if control.is_running || control.queue.is_empty() {
            return;
        }
        control.is_running = true;
        drop(control);
        self.try_control(may_run_here);
    }

    fn refuse_op(self: &Arc<Self>, op: Op, error: &Error) {
        let error = error.clone();
        match op {
            Op::Start { done, .. } | Op::StartFrom { done, .. } => {
                self.start_failed_early();
                done(Err(error));
            }
            Op::Reload(PendingReload { done, .. }) => {
                let outcome = Err(error);
                self.swap_ended(&outcome);
                for done in done {
                    done(outcome.clone());
                }
            }
            Op::Recycle(due) => self.realm_recycled(due, Err(error)),
            Op::Snapshot { done, .. } => done(Err(error)),
            Op::Reset { done, .. } => done(Err(error)),
            Op::Fork { child, done } => {
                child.start_failed_early();
                done(Err(error));
            }
            Op::Close { .. } => self.finish_closing(Err(error), false)(),
            // It is not refused.
            Op::Destroy => {}
        }
    }

    /// Runs `body` on a thread of its own; where the system refuses one, it hears of that here and now.
    pub(crate) fn spawn_or(
        self: &Arc<Self>,
        role: &str,
        body: impl FnOnce(&Arc<Self>, Result<()>) + Send + 'static,
    ) -> bool {
        let stack = self.options.limits.stack_bytes() + (2 << 20);
        let name = format!("{}-{role}", thread_name(self.name()));
        let builder = std::thread::Builder::new()
            .name(name.clone())
            .stack_size(stack);
        // Within reach: what cannot be started is dropped.
        let body = Arc::new(Mutex::new(Some(body)));
        let take =
            |body: &Mutex<Option<_>>| body.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (shared, on_thread) = (Arc::clone(self), Arc::clone(&body));
        let run = move || {
            let body = on_thread
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(body) = body {
                body(&shared, Ok(()));
            }
        };
        let Err(error) = scarcity::thread(builder, run) else {
            return true;
        };
        if let Some(body) = take(&body) {
            body(self, Err(no_thread(&format!("the thread {name}"), &error)));
        }
        false
    }

    /// The same for what is done all the same where no thread can be had: late on the pool, or here.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        role: &str,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) {
        self.spawn_or(role, |shared, started| {
            if started.is_ok() {
                body(shared);
                return;
            }
            let (pool, own) = (Arc::clone(&shared.lock_serving().pool), Arc::clone(shared));
            if let Err(run) = pool.spawn_if_running(move || body(&own)) {
                run();
            }
        });
    }

    /// The same for what may take as long as somebody else's call: later, where that can be waited for. At the end
    /// everything has been stopped, and it takes no longer than that.
    fn spawn_patiently(self: &Arc<Self>, role: &'static str, body: Body) {
        self.spawn_or(role, move |shared, started| {
            if started.is_ok() {
                body(shared);
            } else if !shared.is_destroyed() && Deadline::is_available() {
                let own = Arc::clone(shared);
                let again = move || own.spawn_patiently(role, body);
                if let Ok(again) = Deadline::after(UNTIL_ANOTHER_TRY, again) {
                    again.detach();
                }
            } else {
                shared.spawn(role, body);
            }
        });
    }

    fn run_control(self: &Arc<Self>) {
        let mut answer: Option<Answer> = None;
        loop {
            let next = {
                let mut control = self.lock_control();
                let mut next = control.queue.pop_front();
                if let Some(Op::Reload(pending)) = &mut next {
                    control.begin_reload(pending);
                }
                control.is_running = next.is_some();
                next
            };
            // Answered only now: whoever gets the answer finds the control idle.
            if let Some(answer) = answer.take() {
                let _ = guarded(|| {
                    answer();
                    Ok(())
                });
            }
            let Some(op) = next else {
                self.control_changed.notify_all();
                return;
            };
            answer = Some(self.run_op(op));
        }
    }

    fn run_op(self: &Arc<Self>, op: Op) -> Answer {
        match op {
            Op::Start { source, done } => {
                let outcome = guarded(|| self.start(&source, false));
                Box::new(move || done(outcome))
            }
            Op::StartFrom {
                blueprint,
                snapshot,
                done,
            } => {
                let outcome = guarded(|| self.start_from(&blueprint, &snapshot, false));
                Box::new(move || done(outcome))
            }
            Op::Reload(pending) => self.run_reload(&pending.options),
            Op::Recycle(due) => self.recycle_realm(due),
            Op::Snapshot { control, done } => {
                let outcome = self.paused(|scope| {
                    self.take_snapshot(&Terms {
                        control: Some(&control),
                        ..Terms::of("the snapshot", scope)
                    })
                });
                Box::new(move || done(outcome))
            }
            Op::Reset { options, done } => {
                let outcome = self.paused(|scope| self.reset(&options, scope));
                Box::new(move || done(outcome))
            }
            Op::Fork { child, done } => {
                match self.paused(|scope| self.copy(&Terms::of("the fork", scope))) {
                    Ok((blueprint, snapshot)) => Box::new(move || {
                        child.push(Op::StartFrom {
                            blueprint,
                            snapshot,
                            done,
                        });
                    }),
                    Err(error) => Box::new(move || {
                        child.start_failed_early();
                        done(Err(error));
                    }),
                }
            }
            Op::Close { until, asked_at } => {
                let outcome = guarded(|| self.run_close(until, asked_at));
                self.finish_closing(outcome, false)
            }
            Op::Destroy => {
                let outcome = guarded(|| {
                    self.run_destroy();
                    Ok(())
                });
                self.finish_closing(outcome, true)
            }
        }
    }

    // ------------------------------------------------------------------ figures

    fn read_stats(&self, home: Option<&Home<Job>>) -> ManagerStats {
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

/// See [`Shared::settling`].
pub(crate) struct Settling<'a>(&'a AtomicUsize);

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn destroyed() -> Stop {
    Stop::Interrupted("the manager was destroyed".into())
}

/// A panic of ours must neither kill the thread nor lose the answer.
fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        Err(Error::internal(format_args!(
            "a panic: {}",
            crate::error::panic_text(&*panic)
        )))
    })
}
