//! One call, from its admission to its one answer.
//!
//! A call is answered exactly once: whoever takes the [`CallJob`] out of a queue, or runs it, owns its
//! `settle`. A stop (timeout, signal) that comes while the job waits takes it out of the queue; one
//! that comes while it runs goes to the instance's interrupter; [`CallControl`] is the point where
//! the two are told apart ([`Stopping`]).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use wasm_molt_lifecycle::{Stoppable, Stopping, Ticket, WaitId};

use crate::error::{Error, Result, panic_text};
use crate::instance::deadline::Deadline;
use crate::instance::interrupt::{Interrupter, RunId, Stop};
use crate::instance::replica::Replica;
use crate::instance::value::Value;
use crate::manager::isolation::Isolated;
use crate::manager::lease::Lease;
use crate::manager::{Job, Shared, invoke, trace};

/// What is to be done.
#[derive(Debug)]
pub enum Work {
    /// Call the function at this position of the module's functions.
    Call {
        /// Position.
        function: usize,
        /// One value for each parameter.
        args: Vec<Value>,
    },
    /// Send a buffer through it.
    Invoke {
        /// Position.
        function: usize,
        /// What goes in.
        input: Vec<u8>,
    },
}

/// How a call ended well.
#[derive(Debug)]
pub enum Outcome {
    /// The results.
    Values(Vec<Value>),
    /// The buffer that came out.
    Bytes(Vec<u8>),
}

/// Receives the one answer, on a pool thread or on the thread that stopped the call.
pub type Settle = Box<dyn FnOnce(Result<Outcome>) + Send>;

/// A call on its way.
pub struct CallJob {
    pub(crate) work: Work,
    pub(crate) settle: Settle,
    pub(crate) control: Option<Arc<CallControl>>,
    pub(crate) admitted_at: Instant,
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for CallJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallJob")
            .field("work", &self.work)
            .finish_non_exhaustive()
    }
}

/// How a call may be stopped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallLimits {
    /// Milliseconds from the admission, waiting included.
    pub timeout_ms: Option<u64>,
    /// A signal may stop it.
    pub can_abort: bool,
}

/// Where a call waits.
#[derive(Clone)]
pub(crate) enum Queue {
    Gate(Weak<Shared>, WaitId),
    Lease(Weak<Lease>, u64),
}

/// A call, to [`Stopping`].
enum Stopped {}

impl Stoppable for Stopped {
    type Queue = Queue;
    type Run = (Arc<Interrupter>, RunId);
    type Stop = Stop;
    type Parked = (Box<CallJob>, Ticket<Job>);

    fn refuse_waiting(queue: Queue) -> bool {
        queue.refuse_stopped()
    }

    fn refuse_parked((job, ticket): Self::Parked) {
        let shared = Arc::clone(&job.shared);
        let settling = shared.settling();
        drop(ticket);
        job.refuse_stopped();
        drop(settling);
    }

    fn stop_run((interrupter, run): &Self::Run, stop: Stop) {
        interrupter.stop(*run, stop);
    }
}

/// Stops one call, wherever it is. Any thread.
pub struct CallControl {
    stopping: Stopping<Stopped>,
    deadline: Mutex<Option<Deadline>>,
}

impl std::fmt::Debug for CallControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CallControl")
    }
}

impl CallControl {
    /// A control, if there is anything that could stop the call.
    pub(crate) fn new(limits: CallLimits) -> Result<Option<Arc<Self>>> {
        if limits == CallLimits::default() {
            return Ok(None);
        }
        let control = Arc::new(Self {
            stopping: Stopping::default(),
            deadline: Mutex::new(None),
        });
        if let Some(ms) = limits.timeout_ms {
            let weak = Arc::downgrade(&control);
            let deadline = Deadline::after(Duration::from_millis(ms), move || {
                if let Some(control) = weak.upgrade() {
                    control.stop(Stop::Timeout(ms));
                }
            })?;
            *control
                .deadline
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        }
        Ok(Some(control))
    }

    pub(crate) fn waits_in(&self, queue: Queue) {
        self.stopping.waits_in(queue);
    }

    /// Stops the call. The first stop wins; one after the end does nothing.
    pub fn stop(&self, stop: Stop) {
        self.stopping.stop(stop);
    }

    /// The call is in its queue now. A stop that came before takes it out again.
    pub(crate) fn queued(&self) {
        self.stopping.queued();
    }

    /// The job has its instance; a thread is to come for it with [`Self::unpark`].
    pub(crate) fn park(&self, job: Box<CallJob>, ticket: Ticket<Job>) {
        self.stopping.park((job, ticket));
    }

    /// `None` if a stop was faster.
    pub(crate) fn unpark(&self) -> Option<(Box<CallJob>, Ticket<Job>)> {
        self.stopping.unpark()
    }

    /// The call gets its instance. `Err`: it was stopped while it waited.
    fn start(&self, interrupter: &Arc<Interrupter>, run: RunId) -> Result<(), Stop> {
        self.stopping.start((Arc::clone(interrupter), run))
    }

    fn finish(&self) {
        self.stopping.finish();
        let deadline = self
            .deadline
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(deadline);
    }

    fn stopped(&self) -> Option<Stop> {
        self.stopping.stopped()
    }
}

impl Queue {
    /// Takes a stopped call out and answers it; `false`: it was not there.
    ///
    /// Settling begins before it leaves: the end must not find the queue empty and overtake the answer.
    fn refuse_stopped(self) -> bool {
        match self {
            Self::Gate(shared, id) => {
                let Some(shared) = shared.upgrade() else {
                    return false;
                };
                let _settling = shared.settling();
                match shared.gate.cancel(id) {
                    Some(Job::Call(job)) => job.refuse_stopped(),
                    Some(Job::Lease(_)) | None => return false,
                }
            }
            Self::Lease(lease, id) => {
                let Some(lease) = lease.upgrade() else {
                    return false;
                };
                let _settling = lease.shared().settling();
                match lease.take_waiting(id) {
                    Some(job) => job.refuse_stopped(),
                    None => return false,
                }
            }
        }
        true
    }
}

impl CallJob {
    fn what(&self) -> String {
        let (Work::Call { function, .. } | Work::Invoke { function, .. }) = &self.work;
        let name = self.shared.function_name(*function);
        format!("{}: '{name}'", self.shared.name())
    }

    /// Answers a call that was stopped before it ran.
    fn refuse_stopped(self) {
        let stop = self.control.as_ref().and_then(|c| c.stopped());
        let stop = stop.unwrap_or_else(|| Stop::Interrupted("it was cancelled".into()));
        let error = stop.into_error(&format!("{} (still waiting)", self.what()));
        self.refuse(error);
    }

    /// Answers a call that never ran.
    pub(crate) fn refuse(self, error: Error) {
        if let Some(control) = &self.control {
            control.finish();
        }
        self.shared.stats.rejected();
        (self.settle)(Err(error));
    }

    /// Runs on `replica`, to which the ticket belongs; or, where the pool could not start its threads, is answered
    /// with the reason.
    pub(crate) fn run_on_pool(self, started: Result<()>, replica: &Replica, ticket: Ticket<Job>) {
        match started {
            Ok(()) => self.run(replica, Seat::Ticket(ticket)),
            Err(error) => {
                let shared = Arc::clone(&self.shared);
                let settling = shared.settling();
                drop(ticket);
                self.refuse(error);
                drop(settling);
            }
        }
    }

    /// Runs on `replica`, which the calling thread holds through `seat`; gives the seat back, then answers.
    pub(crate) fn run(self, replica: &Replica, seat: Seat<'_>) {
        let shared = Arc::clone(&self.shared);
        let started = Instant::now();
        shared.stats.waited(started - self.admitted_at);
        let Self {
            work,
            settle,
            control,
            ..
        } = self;
        let interrupter = replica.interrupter();
        let run = interrupter.begin();
        let started_by = match &control {
            Some(control) => control.start(interrupter, run),
            None => Ok(()),
        };
        // Halted before it began: the instance stays as it is.
        let may_run = started_by.and_then(|()| interrupter.halted().map_or(Ok(()), Err));
        if let Err(stop) = may_run {
            if let Some(control) = &control {
                control.finish();
            }
            interrupter.end(run);
            let settling = shared.settling();
            let lost = seat.give_back(&shared, replica);
            shared.stats.rejected();
            settle(Err(
                stop.into_error(&format!("{} (still waiting)", shared.name()))
            ));
            drop(settling);
            shared.repair_lost(lost);
            return;
        }
        let (Work::Call { function, .. } | Work::Invoke { function, .. }) = &work;
        let function = *function;
        let isolation = match &seat {
            Seat::Ticket(_) => shared.isolation(replica),
            Seat::Lease(_) => Ok(None),
        };
        let span = trace::Span::call(shared.name(), || shared.function_name(function));
        let (isolation, outcome) = match isolation {
            Ok(isolation) => {
                let outcome = run_guarded(&shared, replica, run, work, isolation.as_ref());
                (isolation, outcome)
            }
            Err(error) => (None, Err(error)),
        };
        span.end(&outcome);
        if let Some(control) = &control {
            control.finish();
        }
        interrupter.end(run);
        let ran = started.elapsed();
        if let Some(isolation) = &isolation {
            // SAFETY: this thread still holds the ticket, and the call is off the stack.
            unsafe { isolation.clear(replica) };
        }
        shared.stats.ran(ran, &outcome);
        let _ = replica.note_call();
        match &outcome {
            Ok(_) => shared.crashes.call_completed(),
            Err(error) => shared.tell_trap(error),
        }
        // The seat goes back before the answer: whoever gets the answer finds the instance free.
        // `settling` keeps a swap, or the end, from overtaking the answer.
        let settling = shared.settling();
        let lost = seat.give_back(&shared, replica);
        settle(outcome);
        drop(settling);
        // After the answer, which is still of the generation before.
        shared.repair_lost(lost);
    }
}

/// What a running call holds.
pub(crate) enum Seat<'a> {
    Ticket(Ticket<Job>),
    Lease(&'a Arc<Lease>),
}

impl Seat<'_> {
    /// Returns the slot that has to be repaired, if so.
    fn give_back(self, shared: &Arc<Shared>, replica: &Replica) -> Option<usize> {
        match self {
            Seat::Ticket(ticket) => shared.give_back(ticket, replica),
            Seat::Lease(lease) => {
                lease.call_ended();
                None
            }
        }
    }
}

/// Runs the guest; neither a panic nor a missing deadline may lose the answer.
fn run_guarded(
    shared: &Arc<Shared>,
    replica: &Replica,
    run: RunId,
    work: Work,
    isolation: Option<&Isolated>,
) -> Result<Outcome> {
    if let Some(isolation) = isolation {
        // SAFETY: the caller of `CallJob::run` holds the replica, and nothing of it is on the stack.
        unsafe { isolation.prepare(replica) }?;
    }
    let deadline = shared
        .options
        .limits
        .timeout_ms
        .map(|ms| {
            let interrupter = Arc::clone(replica.interrupter());
            Deadline::after(Duration::from_millis(ms), move || {
                interrupter.stop(run, Stop::Timeout(ms));
            })
        })
        .transpose()?;
    let reseed = isolation.and(shared.options.reseed.as_deref());
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        if let Some(export) = reseed {
            // SAFETY: the caller of `CallJob::run` holds the replica.
            unsafe { replica.reseed(export) }?;
        }
        run_guest(shared, replica, work)
    }));
    drop(deadline);
    outcome.unwrap_or_else(|panic| {
        replica.poison();
        Err(Error::internal(format_args!(
            "a panic: {}",
            panic_text(&*panic)
        )))
    })
}

fn run_guest(shared: &Shared, replica: &Replica, work: Work) -> Result<Outcome> {
    match work {
        Work::Call { function, args } => {
            // SAFETY: the caller of `CallJob::run` holds the replica.
            unsafe { replica.call_export(function, args) }.map(Outcome::Values)
        }
        Work::Invoke { function, input } => {
            let missing = || replica.missing(function);
            let func = replica.function(function).ok_or_else(missing)?;
            // SAFETY: the caller of `CallJob::run` holds the replica; the function is its own.
            unsafe { invoke::run(replica, &shared.options.abi, &func, function, &input) }
                .map(Outcome::Bytes)
        }
    }
}
