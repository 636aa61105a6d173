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

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use wasm_molt_lifecycle::{
    Admission, FailedPhase, Gate, GateCounts, GateOptions, Generation, Home, OnDrainTimeout,
    Refusal, Refused, Ticket, TicketId, WaitId, Waiter,
};

use crate::call::{CallControl, CallJob, CallLimits, Queue, Seat, Settle, Work};
use crate::deadline::Deadline;
use crate::engine::Engine;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Host;
use crate::interrupt::Stop;
use crate::invoke;
use crate::lease::Lease;
use crate::module::Module;
use crate::options::{ManagerOptions, Source};
use crate::pool::{Pool, thread_name};
use crate::replica::{Blueprint, Replica};
use crate::serving::Serving;
use crate::stats::{CallCounts, Stats, Times};
use crate::swap::{self, ReloadOptions, ReloadReport, ReloadStep, Strategy};

/// Receives the one answer of something asynchronous, on any thread.
pub type Done<T> = Box<dyn FnOnce(Result<T>) + Send>;

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
                    pool.spawn(move || job.run(&replica, Seat::Ticket(ticket)));
                    return;
                };
                control.park(job, ticket);
                pool.spawn(move || {
                    if let Some((job, ticket)) = control.unpark() {
                        job.run(&replica, Seat::Ticket(ticket));
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

enum Op {
    Start {
        source: Source,
        done: Done<()>,
    },
    Reload(PendingReload),
    Close {
        until: Option<Instant>,
        asked_at: Instant,
    },
    Destroy,
}

struct PendingReload {
    options: ReloadOptions,
    done: Vec<Done<Arc<ReloadReport>>>,
}

#[derive(Default)]
struct Control {
    /// An operation runs, on the control thread or at home.
    is_running: bool,
    /// That operation is a swap: repairs wait for it.
    is_swapping: bool,
    queue: VecDeque<Op>,
    /// The reload that runs: equal ones join it.
    current_reload: Option<(ReloadOptions, Vec<Done<Arc<ReloadReport>>>)>,
    /// Slots whose poisoned instance is being replaced in the background.
    repairing: Vec<usize>,
    /// Slot 0 is being replaced on the home thread.
    is_repairing_home: bool,
    /// Slots that wait for a swap to end.
    repairs_due: Vec<usize>,
    /// Threads that wait for an earlier generation to be left.
    seeing_off: usize,
    /// When a close has waited long enough for hooks.
    hooks_until: Option<Deadline>,
    closing: Vec<Done<()>>,
}

impl Control {
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
        queued
            .chain(current.map(|(options, done)| (&*options, done)))
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
    /// Becomes disconnected when nobody waits any more for the hooks that run now; what has not been
    /// committed by then is rolled back. Repairs that come later get hooks again: calls wait for them.
    hooks: Mutex<(Sender<()>, Receiver<()>)>,
    are_hooks_given_up: AtomicBool,
    settling: AtomicUsize,
    memory_bytes_peak: AtomicUsize,
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
    /// Distributions.
    pub times: Times,
}

impl Manager {
    /// A manager that has not started yet, and its home handle if the options ask for one.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for options that cannot be used.
    pub fn new(options: ManagerOptions, host: Arc<dyn Host>) -> Result<(Self, Option<Home<Job>>)> {
        check(&options)?;
        let name = options.name.clone().unwrap_or_else(|| "wasm".into());
        let parallelism = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options
            .threads
            .unwrap_or_else(|| options.instances.min(parallelism));
        let pool = Arc::new(Pool::new(&name, threads, options.limits.stack_bytes())?);
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
            hooks: Mutex::new(bounded(0)),
            are_hooks_given_up: AtomicBool::new(false),
            settling: AtomicUsize::new(0),
            memory_bytes_peak: AtomicUsize::new(0),
        });
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
    }

    /// A synchronous call failed: counts it and tells of traps.
    pub fn call_failed_at_home(&self, error: &Error) {
        self.shared.stats.failed_at_home(error);
        self.shared.tell_trap(error);
    }

    /// Slot 0 was retired by a synchronous call. Its instance is replaced by whoever needs it next:
    /// at once if somebody waits, else within the next call.
    pub fn retired_at_home(&self) {
        if self.shared.gate.counts().queued > 0 {
            self.shared.repair_retired();
        }
    }
}

fn check(options: &ManagerOptions) -> Result<()> {
    const MOST: usize = 4096;
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

    /// A ticket goes back; a poisoned instance does not serve on. Retired first, repaired then: a repair
    /// that came before the retirement would have its fresh instance retired.
    pub(crate) fn give_back(self: &Arc<Self>, ticket: Ticket<Job>, replica: &Replica) {
        let slot = ticket.slot();
        let serves = self
            .replica(slot)
            .is_some_and(|now| now.id() == replica.id());
        if serves && replica.is_poisoned() {
            ticket.retire();
            self.request_repair(slot);
        } else {
            drop(ticket);
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

    fn push(self: &Arc<Self>, op: Op) {
        let mut control = self.lock_control();
        control.queue.push_back(op);
        if control.is_running {
            return;
        }
        control.is_running = true;
        drop(control);
        self.spawn("ctl", Self::run_control);
    }

    pub(crate) fn spawn(
        self: &Arc<Self>,
        role: &str,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) {
        let shared = Arc::clone(self);
        let stack = self.options.limits.stack_bytes() + (2 << 20);
        let name = format!("{}-{role}", thread_name(self.name()));
        let body = Mutex::new(Some(body));
        let run = move || {
            let body = body.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(body) = body {
                body(&shared);
            }
        };
        // Where no thread can be had, the work is done late on the pool rather than never.
        let run = Arc::new(run);
        let on_thread = Arc::clone(&run);
        let started = std::thread::Builder::new()
            .name(name)
            .stack_size(stack)
            .spawn(move || on_thread());
        if started.is_err() {
            let pool = Arc::clone(&self.lock_serving().pool);
            pool.spawn(move || run());
        }
    }

    fn run_control(self: &Arc<Self>) {
        let mut answer: Option<Answer> = None;
        loop {
            let next = {
                let mut control = self.lock_control();
                let next = control.queue.pop_front();
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
            Op::Reload(pending) => self.run_reload(pending),
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

    // ------------------------------------------------------------------ start

    fn start(self: &Arc<Self>, source: &Source, is_sync: bool) -> Result<()> {
        let outcome = guarded(|| self.bring_up_first(source, is_sync));
        if outcome.is_err() {
            self.set_state(ManagerState::Failed);
            let _settling = self.settling();
            for job in self.gate.cut() {
                job.refuse(self.closed());
            }
        }
        outcome
    }

    fn load(&self, pool: &Pool, source: &Source, name: Option<&str>) -> Result<Module> {
        let options = &self.options;
        let engine = Engine::shared(
            &options.engine,
            options.limits.stack_bytes(),
            &options.cache,
        )?;
        Module::load(&engine, pool, source, name)
    }

    /// Loads another build of the module. The pool's threads may all be inside guests, so it is compiled
    /// on threads of its own.
    pub(crate) fn load_next(&self, source: &Source) -> Result<Module> {
        let parallelism = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Pool::new(self.name(), parallelism, self.options.limits.stack_bytes())?;
        let module = self.load(&pool, source, Some(self.name()));
        pool.end();
        module
    }

    fn bring_up_first(self: &Arc<Self>, source: &Source, is_sync: bool) -> Result<()> {
        let options = &self.options;
        let pool = Arc::clone(&self.lock_serving().pool);
        let module = Arc::new(self.load(&pool, source, options.name.as_deref())?);
        let _ = self.name.set(module.name().to_owned());
        let blueprint = Arc::new(Blueprint {
            engine: module.engine.clone(),
            module,
            limits: options.limits.clone(),
        });
        let mut replicas = Vec::with_capacity(options.instances);
        let generation = Generation::FIRST;
        let making = Making {
            blueprint: &blueprint,
            generation,
            scope: self.hook_scope(is_sync),
        };
        for slot in 0..options.instances {
            match self.make_replica(&making, slot) {
                Ok(replica) => replicas.push(replica),
                Err((phase, cause)) => {
                    let _ = self.discard(replicas, generation);
                    return Err(self.start_failed(phase, cause));
                }
            }
        }
        if self.is_over() {
            let _ = self.discard(replicas, generation);
            return Err(self.closed());
        }
        let shared = Arc::clone(self);
        let made = replicas.clone();
        let (tell, told) = bounded(1);
        let at_home = self.host.at_home(Box::new(move |_| {
            let change = Replaced {
                old: Vec::new(),
                new: replicas.clone(),
                generation,
            };
            {
                let mut serving = shared.lock_serving();
                // The end takes what serves under this lock: what comes after it must not be published.
                if shared.is_over() {
                    return;
                }
                serving.blueprint = Some(blueprint);
                serving.replicas = replicas;
            }
            shared.host.replaced(&change);
            shared.set_state(ManagerState::Ready);
            shared.gate.open();
            let _ = tell.send(());
        }));
        if at_home.is_ok() && told.recv().is_ok() {
            return Ok(());
        }
        let _ = self.discard(made, generation);
        Err(self.closed())
    }

    /// Failures that have a code of their own keep it; what host code threw becomes the cause.
    fn start_failed(&self, phase: FailedPhase, cause: Error) -> Error {
        match cause {
            Error::Thrown(_) => self.reload_failed("the start", phase, cause),
            other => other,
        }
    }

    pub(crate) fn reload_failed(&self, what: &str, phase: FailedPhase, cause: Error) -> Error {
        Error::ReloadFailed {
            what: format!("{what} of {}", self.name()),
            phase,
            cause: Box::new(cause),
        }
    }

    /// Makes and initializes one instance.
    pub(crate) fn make_replica(
        self: &Arc<Self>,
        making: &Making<'_>,
        slot: usize,
    ) -> Result<Arc<Replica>, (FailedPhase, Error)> {
        let Making {
            blueprint,
            generation,
            scope,
        } = making;
        let generation = *generation;
        let mut known = None;
        // A panic must not lose track of a half-made instance.
        let made = guarded(|| {
            blueprint.instantiate(&*self.host, slot, generation, |replica| {
                self.remember(replica);
                known = Some(Arc::clone(replica));
            })
        });
        let replica = match made {
            Ok(replica) => replica,
            Err(error) => {
                let _ = self.discard(known.into_iter().collect(), generation);
                return Err((FailedPhase::Instantiate, error));
            }
        };
        let initialized = self.with_lease(&replica, scope, |lease| self.host.initialize(lease));
        let initialized = initialized.and_then(|()| {
            // A hook that goes on after a trap leaves an instance that must not serve.
            replica.last_trap().map_or(Ok(()), Err)
        });
        if let Err(error) = initialized {
            let _ = self.discard(vec![replica], generation);
            return Err((FailedPhase::Initialize, error));
        }
        Ok(replica)
    }

    /// Lends an instance that nobody else can reach to a hook.
    pub(crate) fn with_lease<T>(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        scope: &HookScope,
        hook: impl FnOnce(&Arc<Lease>) -> Result<T>,
    ) -> Result<T> {
        let lease = Lease::for_hook(self, Arc::clone(replica), scope);
        *self.hook_lease() = Some(Arc::clone(&lease));
        let outcome = hook(&lease);
        lease.release();
        if self.is_destroyed() {
            replica.interrupter().stop_for_good(destroyed());
        }
        if lease.is_cancelled() {
            lease.cut(&self.closing_stop());
        }
        // Whoever cancels from here on finds the lease, and cuts short what the hook has left behind.
        lease.wait_free();
        *self.hook_lease() = None;
        replica.interrupter().resume();
        outcome
    }

    fn hook_lease(&self) -> MutexGuard<'_, Option<Arc<Lease>>> {
        self.hook_lease
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn closing_stop(&self) -> Stop {
        Stop::Interrupted(format!("{} is being closed", self.name()))
    }

    /// A lease that holds a ticket.
    fn lease_with(
        self: &Arc<Self>,
        replica: Arc<Replica>,
        pool: Arc<Pool>,
        ticket: Ticket<Job>,
    ) -> Arc<Lease> {
        let lease = Lease::with_ticket(self, replica, pool, ticket);
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.retain(|lease| lease.strong_count() > 0);
        leases.push(Arc::downgrade(&lease));
        drop(leases);
        if self.is_destroyed() {
            // Those that were known have been ended already; nobody has this one yet.
            lease.release();
        }
        lease
    }

    /// Not to be dropped under the lock: the last handle of one gives its slot to a lease that waits,
    /// which is noted there.
    fn known_leases(&self) -> Vec<Arc<Lease>> {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.iter().filter_map(Weak::upgrade).collect()
    }

    /// Leases with a ticket that hold one of these instances.
    fn leases_on(&self, replicas: &[Arc<Replica>]) -> Vec<Arc<Lease>> {
        let is_meant = |lease: &Arc<Lease>| {
            let id = lease.replica().id();
            replicas.iter().any(|replica| replica.id() == id)
        };
        let mut leases = self.known_leases();
        leases.retain(is_meant);
        leases
    }

    /// Stops what runs or is about to on these instances, until they [resume](Self::resume), and takes
    /// leases on them away from their holders.
    pub(crate) fn interrupt(self: &Arc<Self>, replicas: &[Arc<Replica>], why: &Stop) {
        // First of all: once what runs has been stopped, its instance is lost, and what waits behind it
        // would be refused for that.
        for lease in self.leases_on(replicas) {
            lease.refuse_waiting(why);
        }
        // All first: who is stopped frees a thread for a call that has another of these instances.
        for replica in replicas {
            replica.interrupter().forbid(why.clone());
        }
        for replica in replicas {
            replica.interrupter().halt(why.clone());
        }
        let leases = self.leases_on(replicas);
        if leases.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        let why = why.clone();
        // Without a home nobody is left who could hold one.
        let _ = self.host.at_home(Box::new(move |_| {
            for lease in leases {
                lease.refuse_waiting(&why);
                shared.host.revoked(&lease);
                lease.release();
            }
        }));
    }

    /// They may be entered again.
    pub(crate) fn resume(replicas: &[Arc<Replica>]) {
        for replica in replicas {
            replica.interrupter().resume();
        }
    }

    /// Releases instances that never served, or do not any more.
    pub(crate) fn discard(
        self: &Arc<Self>,
        replicas: Vec<Arc<Replica>>,
        generation: Generation,
    ) -> Result<()> {
        if replicas.is_empty() {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let old = replicas.clone();
        let told = self.host.at_home(Box::new(move |_| {
            shared.host.replaced(&Replaced {
                old,
                new: Vec::new(),
                generation,
            });
        }));
        for replica in replicas {
            // SAFETY: nobody serves on it any more: its handles expired just now, and the callers
            // hold it (never published, or drained).
            unsafe { replica.release() };
        }
        told
    }

    // ------------------------------------------------------------------ reload

    fn reload(self: &Arc<Self>, options: ReloadOptions, done: Done<Arc<ReloadReport>>) {
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

    fn check_reload(&self, options: &ReloadOptions) -> Result<()> {
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

    /// Returns the slots whose repair has waited for the swap to end.
    fn end_swap(control: &mut Control) -> Vec<usize> {
        control.is_swapping = false;
        std::mem::take(&mut control.repairs_due)
    }

    fn hook_scope(&self, is_sync: bool) -> HookScope {
        let hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        let cancelled = if self.is_destroyed() {
            // Disconnected, or about to be.
            self.cancel.1.clone()
        } else {
            hooks.1.clone()
        };
        HookScope { is_sync, cancelled }
    }

    fn run_reload(self: &Arc<Self>, pending: PendingReload) -> Answer {
        let PendingReload { options, done } = pending;
        if self.are_hooks_given_up.load(Ordering::Acquire) {
            let error = self.closed();
            return Box::new(move || {
                for done in done {
                    done(Err(error.clone()));
                }
            });
        }
        {
            let mut control = self.wait_repaired(self.lock_control());
            control.is_swapping = true;
            control.current_reload = Some((options.clone(), done));
        }
        let outcome = guarded(|| swap::run(self, &options, self.hook_scope(false)));
        let (done, due) = {
            let mut control = self.lock_control();
            let current = control.current_reload.take();
            let done = current.map(|(_, done)| done).unwrap_or_default();
            (done, Self::end_swap(&mut control))
        };
        self.swap_ended(&outcome);
        for slot in due {
            self.request_repair(slot);
        }
        Box::new(move || {
            for done in done {
                done(outcome.clone());
            }
        })
    }

    /// Hooks are not waited for any more, nor for what they have left running.
    fn give_hooks_up(&self) {
        self.are_hooks_given_up.store(true, Ordering::Release);
        *self.hooks.lock().unwrap_or_else(PoisonError::into_inner) = bounded(0);
        let lease = self.hook_lease().clone();
        if let Some(lease) = lease
            && lease.is_cancelled()
        {
            lease.cut(&self.closing_stop());
        }
        // A drain that is under way looks again.
        self.gate.shut();
    }

    /// Releases what a roll has left behind, now where nobody is inside, else as soon as they leave.
    pub(crate) fn see_off(self: &Arc<Self>, cohort: u64, options: &ReloadOptions) {
        if self.release_left(cohort).is_none() {
            return;
        }
        self.lock_control().seeing_off += 1;
        let mut patience = match options.on_drain_timeout {
            OnDrainTimeout::Interrupt => options.drain_timeout,
            OnDrainTimeout::Abort => None,
        };
        self.spawn("old", move |shared| {
            let _ = guarded(|| {
                loop {
                    let Some(stragglers) = shared.release_left(cohort) else {
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
        });
    }

    /// Releases what nobody is inside. Returns how many stragglers there are, if one is of that cohort.
    fn release_left(self: &Arc<Self>, cohort: u64) -> Option<usize> {
        // Read first: a straggler that leaves afterwards is seen off in the next round.
        let stragglers = self.gate.stragglers();
        let (gone, generation) = self.lock_serving().take_left(cohort, &stragglers);
        let _ = self.discard(gone, generation);
        let is_meant = |ticket: &TicketId| ticket.cohort == cohort;
        stragglers.iter().any(is_meant).then_some(stragglers.len())
    }

    fn swap_ended(self: &Arc<Self>, outcome: &Result<Arc<ReloadReport>>) {
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

    fn reload_now(
        self: &Arc<Self>,
        home: Option<&Home<Job>>,
        options: &ReloadOptions,
    ) -> Result<Arc<ReloadReport>> {
        self.check_reload(options)?;
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
        let outcome = guarded(|| swap::run(self, options, self.hook_scope(true)));
        let due = Self::end_swap(&mut self.lock_control());
        self.swap_ended(&outcome);
        for slot in due {
            self.request_repair(slot);
        }
        // Whatever was asked for in the meantime runs now, on a control thread.
        let mut control = self.lock_control();
        if control.queue.is_empty() {
            control.is_running = false;
            drop(control);
            self.control_changed.notify_all();
        } else {
            drop(control);
            self.spawn("ctl", Self::run_control);
        }
        outcome
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

    // ------------------------------------------------------------------ repair

    /// Has the poisoned instance of a slot replaced, in the background.
    pub(crate) fn request_repair(self: &Arc<Self>, slot: usize) {
        if self.is_over() && self.is_destroyed() {
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
                Ok(()) if shared.repairable(slot).is_some() => shared.request_repair(slot),
                Ok(()) => {}
            }
        });
    }

    /// Somebody waits: slots that a synchronous trap has left out of service are needed now.
    ///
    /// Only retired slots: a poisoned instance that somebody is still inside retires when they leave.
    fn repair_retired(self: &Arc<Self>) {
        for slot in self.gate.retired_slots() {
            self.request_repair(slot);
        }
    }

    /// On the home thread. A background repair of the same slot may be under way: it may need this very
    /// thread, so it is not waited for, and the first of the two wins.
    fn repair_now(self: &Arc<Self>) -> Result<()> {
        if self.is_over() {
            return Err(self.closed());
        }
        {
            let mut control = self.lock_control();
            if control.is_swapping || control.is_repairing_home {
                return Err(self.reloading());
            }
            control.is_repairing_home = true;
        }
        let outcome = guarded(|| self.repair(0, true));
        self.lock_control().is_repairing_home = false;
        self.control_changed.notify_all();
        outcome
    }

    /// Waits until no instance is being replaced.
    fn wait_repaired<'a>(&'a self, control: MutexGuard<'a, Control>) -> MutexGuard<'a, Control> {
        let is_busy = |c: &mut Control| !c.repairing.is_empty() || c.is_repairing_home;
        let waited = self.control_changed.wait_while(control, is_busy);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces one poisoned instance. Whoever commits first wins; the other one's work is dropped.
    fn repair(self: &Arc<Self>, slot: usize, is_sync: bool) -> Result<()> {
        let started = Instant::now();
        let Some(old) = self.repairable(slot) else {
            return Ok(());
        };
        let blueprint = self.blueprint()?;
        let before = self.generation();
        let making = Making {
            blueprint: &blueprint,
            generation: before.next(),
            scope: self.hook_scope(is_sync),
        };
        let fresh = self
            .make_replica(&making, slot)
            .map_err(|(phase, cause)| self.reload_failed("the replacement", phase, cause))?;
        let (tell, told) = bounded(1);
        let shared = Arc::clone(self);
        let made = Arc::clone(&fresh);
        let poisoned = Arc::clone(&old);
        let at_home = self.host.at_home(Box::new(move |_| {
            let _ = tell.send(shared.publish_repair(&poisoned, made));
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
        let report = Arc::new(ReloadReport {
            memory_bytes_before,
            memory_bytes_after: fresh.memory_bytes(),
            ..ReloadReport::of_repair(generation, before, started.elapsed())
        });
        self.set_state(ManagerState::Ready);
        self.swap_ended(&Ok(report));
        Ok(())
    }

    /// The instance of a slot, if it is poisoned and nobody is inside any more.
    fn repairable(&self, slot: usize) -> Option<Arc<Replica>> {
        let is_retired = self.gate.retired_slots().contains(&slot);
        self.replica(slot).filter(|r| is_retired && r.is_poisoned())
    }

    /// At home: puts a fresh instance into its slot, unless somebody else already has.
    fn publish_repair(&self, old: &Arc<Replica>, fresh: Arc<Replica>) -> Option<Generation> {
        let slot = old.slot();
        self.repairable(slot)?;
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
        self.stats.reloaded("trap");
        self.host.replaced(&change);
        self.gate.reinstate(slot);
        Some(change.generation)
    }

    /// Nothing serves in that slot. If nothing serves at all, nobody may wait for ever.
    fn repair_failed(self: &Arc<Self>, error: &Error) {
        self.swap_ended(&Err(error.clone()));
        let counts = self.gate.counts();
        if counts.retired < counts.slots {
            return;
        }
        self.set_state(ManagerState::Failed);
        let error = if self.is_destroyed() {
            self.closed()
        } else {
            error.clone()
        };
        let _settling = self.settling();
        for job in self.gate.take_waiting() {
            job.refuse(error.clone());
        }
    }

    fn generation(&self) -> Generation {
        self.lock_serving().generation
    }

    // ------------------------------------------------------------------ the end

    fn close(self: &Arc<Self>, drain_timeout: Option<Duration>, done: Done<()>) {
        if self.begin_closing(done) {
            self.gate.shut();
            if let Some(patience) = drain_timeout {
                let weak = Arc::downgrade(self);
                let give_up = move || {
                    if let Some(shared) = weak.upgrade() {
                        shared.give_hooks_up();
                    }
                };
                // Without a timer thread the close only waits longer.
                self.lock_control().hooks_until = Deadline::after(patience, give_up).ok();
            }
            let asked_at = Instant::now();
            let until = drain_timeout.and_then(|patience| asked_at.checked_add(patience));
            self.push(Op::Close { until, asked_at });
        }
    }

    /// Notes who waits for the end; tells whether that is the first one. One lock with the end itself
    /// (`finish_closing`), so that nobody comes just after it and waits for ever.
    fn begin_closing(&self, done: Done<()>) -> bool {
        let mut control = self.lock_control();
        if self.state() == ManagerState::Closed {
            drop(control);
            done(Ok(()));
            return false;
        }
        self.set_state(ManagerState::Closing);
        control.closing.push(done);
        control.closing.len() == 1
    }

    fn run_close(self: &Arc<Self>, until: Option<Instant>, asked_at: Instant) -> Result<()> {
        if self.state() == ManagerState::Closed {
            return Ok(());
        }
        let shared = Arc::clone(self);
        self.host.at_home(Box::new(move |home| {
            if let Some(home) = home {
                home.shut();
            }
            shared.repair_retired();
        }))?;
        self.gate
            .wait_idle(until.map(|until| until.saturating_duration_since(Instant::now())))
            .map_err(|in_flight| {
                self.give_hooks_up();
                Error::DrainTimeout {
                    what: format!("close() of {}", self.name()),
                    in_flight: in_flight.0,
                    waited_ms: asked_at.elapsed().as_millis(),
                }
            })?;
        self.wait_settled();
        self.release_all();
        Ok(())
    }

    fn destroy(self: &Arc<Self>, done: Done<()>) {
        let was_destroyed = self.is_destroyed.swap(true, Ordering::AcqRel);
        self.begin_closing(done);
        if was_destroyed || self.state() == ManagerState::Closed {
            return;
        }
        let settling = self.settling();
        // Before anybody is woken: a swap that gives up opens the gate, and nothing may start then.
        let waiting = self.gate.cut();
        drop(
            self.cancel
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        for job in waiting {
            job.refuse(self.closed());
        }
        drop(settling);
        self.give_hooks_up();
        self.stop_all(&destroyed());
        // Leases end now: the operation under way may be waiting for one.
        self.spawn("end", Self::expire_handles);
        self.push(Op::Destroy);
    }

    fn expire_handles(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        // Without a home there are no handles.
        let _ = self.host.at_home(Box::new(move |home| {
            if let Some(home) = home {
                home.shut();
            }
            let (old, generation) = {
                let serving = shared.lock_serving();
                (serving.all(), serving.generation)
            };
            let new = Vec::new();
            shared.host.replaced(&Replaced {
                old,
                new,
                generation,
            });
            // One that the host has not been told of yet would otherwise be held for ever.
            for lease in shared.known_leases() {
                lease.release();
            }
        }));
    }

    fn run_destroy(self: &Arc<Self>) {
        if self.state() == ManagerState::Closed {
            return;
        }
        self.expire_handles();
        // Nothing can be waited for longer than the guests need to reach their next poll.
        let _ = self.gate.wait_drained(None);
        self.wait_settled();
        self.release_all();
    }

    fn release_all(self: &Arc<Self>) {
        let control = self.wait_repaired(self.lock_control());
        let is_seeing_off = |c: &mut Control| c.seeing_off > 0;
        drop(self.control_changed.wait_while(control, is_seeing_off));
        let (replicas, generation, pool) = {
            let mut serving = self.lock_serving();
            let replicas = std::mem::take(&mut serving.replicas);
            (replicas, serving.generation, Arc::clone(&serving.pool))
        };
        // The home may be gone (its environment ends): releasing does not depend on it.
        let _ = self.discard(replicas, generation);
        pool.end();
    }

    fn finish_closing(self: &Arc<Self>, outcome: Result<()>, is_destroy: bool) -> Answer {
        let shared = Arc::clone(self);
        let (closing, is_closed) = {
            let mut control = self.lock_control();
            if outcome.is_ok() {
                self.set_state(ManagerState::Closed);
            }
            control.hooks_until = None;
            let is_closed = self.state() == ManagerState::Closed;
            // A close that gave up leaves everybody to the destroy that is waiting behind it.
            let is_last = is_closed || is_destroy || !self.is_destroyed();
            let closing = if is_last {
                std::mem::take(&mut control.closing)
            } else {
                Vec::new()
            };
            (closing, is_closed)
        };
        Box::new(move || {
            let is_end = is_closed && !closing.is_empty();
            if is_end {
                shared.tell(Event::Close);
            }
            for done in closing {
                done(outcome.clone());
            }
            if is_end {
                shared.host.released();
            }
        })
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

/// What an instance is made from, and for.
pub(crate) struct Making<'a> {
    pub(crate) blueprint: &'a Blueprint,
    pub(crate) generation: Generation,
    pub(crate) scope: HookScope,
}

/// How hooks run, and until when.
#[derive(Clone)]
pub(crate) struct HookScope {
    /// On the home thread: they must be synchronous.
    pub(crate) is_sync: bool,
    /// Disconnected as soon as nobody waits for them any more.
    pub(crate) cancelled: Receiver<()>,
}

impl HookScope {
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self.cancelled.try_recv(), Err(TryRecvError::Disconnected))
    }
}

/// Why a reload stops what it should have waited for.
pub(crate) fn impatient() -> Stop {
    let why = "a reload did not want to wait any longer (onDrainTimeout: 'interrupt')";
    Stop::Interrupted(why.into())
}

fn destroyed() -> Stop {
    Stop::Interrupted("the manager was destroyed".into())
}

/// A panic of ours must neither kill the thread nor lose the answer.
fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        Err(Error::internal(format_args!(
            "a panic: {}",
            crate::call::panic_text(&*panic)
        )))
    })
}
