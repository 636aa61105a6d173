//! The swap: one generation replaces another, or nothing has happened.
//!
//! [`run`] is the exclusive strategy: new calls wait while the old generation drains. [`run_rolling`]
//! lets them go to the new generation at once, while the old one drains behind. They decide the order
//! of the steps, what follows a failure, and what is measured; [`Backend`] does the work.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use crate::clock::Clock;
use crate::gate::InFlight;
use crate::phase::{FailedPhase, Phase};

/// The work behind each step of a swap.
///
/// One run calls each step at most once, in the order of this trait, with three exceptions: `drain`
/// and `drain_stragglers` twice when they interrupt, `is_cancelled` between any two, and `done` after
/// each. Every run ends in exactly one of a returned `commit` or `roll`, and a `roll_back`. A step that panics counts as failed; the panic goes on to
/// the caller of [`run`] after the roll-back.
pub trait Backend {
    /// What a failed step reports, such as the user's own exception.
    type Cause;

    /// Rolling only: blocks until nobody is in flight on a generation before the one that serves, so
    /// that there are never more than two.
    ///
    /// # Errors
    ///
    /// After `timeout`, with how many still are.
    fn drain_stragglers(&mut self, timeout: Option<Duration>) -> Result<(), InFlight>;

    /// Builds and initializes the whole next generation while the old one serves.
    ///
    /// # Errors
    ///
    /// The phase, [`FailedPhase::Instantiate`] or [`FailedPhase::Initialize`], and the cause.
    fn instantiate(&mut self) -> Result<(), (FailedPhase, Self::Cause)>;

    /// Closes the gate. Returns how many are in flight at that moment.
    fn close_gate(&mut self) -> usize;

    /// Blocks until nothing is in flight.
    ///
    /// # Errors
    ///
    /// After `timeout`, with what still is.
    fn drain(&mut self, timeout: Option<Duration>) -> Result<(), InFlight>;

    /// Makes what is drained end soon; it is then drained again.
    fn interrupt(&mut self, which: Drained);

    /// Reads the state of the old generation.
    ///
    /// # Errors
    ///
    /// With the cause, as [`FailedPhase::Save`].
    fn save(&mut self) -> Result<(), Self::Cause>;

    /// Writes the saved state into the new generation; does nothing where nothing was saved.
    ///
    /// # Errors
    ///
    /// With the cause, as [`FailedPhase::Restore`].
    fn restore(&mut self) -> Result<(), Self::Cause>;

    /// Publishes the new generation. Cannot fail.
    fn commit(&mut self);

    /// Publishes the new generation in an open gate, and leaves what is in flight behind on the old
    /// one. Returns how many that is. Cannot fail.
    fn roll(&mut self) -> usize;

    /// Drops whatever there is of a new generation that is not published. Calls wait meanwhile, so
    /// leave slow releases to another thread.
    fn roll_back(&mut self);

    /// Opens the gate on the generation that serves now. Returns how many had waited.
    fn open_gate(&mut self) -> usize;

    /// Whether the run should give up before its next step.
    fn is_cancelled(&self) -> bool;

    /// A step went well, and took so long.
    fn done(&mut self, step: Step, took: Duration) {
        let _ = (step, took);
    }
}

/// Whom a drain waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Everybody in flight.
    InFlight,
    /// Those on a generation before the one that serves.
    Stragglers,
}

/// A step of a swap, for those who watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// The new generation is built and initialized.
    Instantiate,
    /// Nothing is in flight.
    Drain,
    /// The old generation's state is saved.
    Save,
    /// The new generation holds it.
    Restore,
    /// The new generation serves.
    Commit,
}

impl Step {
    /// The word for it in the public interface.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Instantiate => "instantiate",
            Self::Drain => "drain",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::Commit => "commit",
        }
    }
}

/// What is done about calls that do not end in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnDrainTimeout {
    /// Give up; the old generation serves on.
    #[default]
    Abort,
    /// Interrupt them, and wait once more.
    Interrupt,
}

/// How one swap is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Plan {
    /// Longest wait for what is in flight. `None`: for ever.
    pub drain_timeout: Option<Duration>,
    /// What follows when it is over.
    pub on_drain_timeout: OnDrainTimeout,
    /// Whether to leave the old generation unread, because its instance is poisoned.
    pub skip_save: bool,
}

/// What a swap cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// Calls that were in flight when the gate closed.
    pub drained: usize,
    /// Calls that had waited when it opened.
    pub queued: usize,
    /// From before the gate closed until after it opened.
    pub pause: Duration,
    /// Waiting for what was in flight, including the wait after an interruption.
    pub drain: Duration,
    /// Saving. Zero if skipped.
    pub save: Duration,
    /// Building the new generation, while the old one served.
    pub instantiate: Duration,
    /// Restoring.
    pub restore: Duration,
}

/// Why a swap did not happen. The old generation serves on, behind an open gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure<C> {
    /// What was in flight did not end in time.
    DrainTimeout(InFlight),
    /// A step failed.
    Step {
        /// Which.
        phase: FailedPhase,
        /// What it reported.
        cause: C,
    },
    /// [`Backend::is_cancelled`] said so.
    Cancelled,
}

impl<C> Failure<C> {
    /// The step that failed; `None` if none did.
    pub fn phase(&self) -> Option<FailedPhase> {
        match self {
            Self::DrainTimeout(_) => Some(FailedPhase::Drain),
            Self::Step { phase, .. } => Some(*phase),
            Self::Cancelled => None,
        }
    }
}

impl<C> fmt::Display for Failure<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DrainTimeout(in_flight) => write!(f, "the drain timed out: {in_flight}"),
            Self::Step { phase, .. } => write!(f, "the swap failed in phase '{phase}'"),
            Self::Cancelled => f.write_str("the swap was cancelled"),
        }
    }
}

impl<C: Error + 'static> Error for Failure<C> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::DrainTimeout(in_flight) => Some(in_flight),
            Self::Step { cause, .. } => Some(cause),
            Self::Cancelled => None,
        }
    }
}

/// Runs one exclusive swap: instantiate, close the gate, drain, save, restore, commit, open the
/// gate.
///
/// Blocks the calling thread throughout.
///
/// # Errors
///
/// With the first failure. The new generation is rolled back, the gate is open, the old generation
/// serves.
///
/// # Panics
///
/// Only if the backend does, and then with the same guarantees.
pub fn run<B: Backend>(
    backend: &mut B,
    clock: &dyn Clock,
    plan: &Plan,
) -> Result<Timings, Failure<B::Cause>> {
    let mut swap = Swap::new(backend);
    let mut timings = Timings {
        instantiate: swap.instantiate(clock)?,
        ..Timings::default()
    };

    swap.check_cancelled()?;
    let closing = clock.now();
    // Before the call: if it panics, the gate may be closed.
    swap.advance();
    timings.drained = swap.backend.close_gate();

    let started = clock.now();
    swap.drain(plan, Drained::InFlight)?;
    timings.drain = swap.done(Step::Drain, clock, started);
    swap.advance();

    if !plan.skip_save {
        swap.check_cancelled()?;
        let started = clock.now();
        swap.backend
            .save()
            .map_err(step_failed(FailedPhase::Save))?;
        timings.save = swap.done(Step::Save, clock, started);
    }
    swap.advance();

    swap.check_cancelled()?;
    let started = clock.now();
    swap.backend
        .restore()
        .map_err(step_failed(FailedPhase::Restore))?;
    timings.restore = swap.done(Step::Restore, clock, started);
    swap.advance();

    swap.check_cancelled()?;
    let started = clock.now();
    swap.backend.commit();
    swap.advance();
    swap.done(Step::Commit, clock, started);

    timings.queued = swap.open_gate();
    timings.pause = clock.now().saturating_sub(closing);
    Ok(timings)
}

/// Runs one rolling swap: drain who is left of an earlier one, instantiate, roll the gate.
///
/// State is not carried over: the old generation still works while the new one begins.
///
/// Blocks the calling thread throughout, but not until the old generation has drained.
///
/// # Errors
///
/// With the first failure. The new generation is rolled back, the old generation serves.
///
/// # Panics
///
/// Only if the backend does, and then with the same guarantees.
pub fn run_rolling<B: Backend>(
    backend: &mut B,
    clock: &dyn Clock,
    plan: &Plan,
) -> Result<Timings, Failure<B::Cause>> {
    let mut swap = Swap::new(backend);
    let mut timings = Timings::default();

    let started = clock.now();
    swap.drain(plan, Drained::Stragglers)?;
    timings.drain = swap.done(Step::Drain, clock, started);

    timings.instantiate = swap.instantiate(clock)?;

    swap.check_cancelled()?;
    let rolling = clock.now();
    timings.drained = swap.backend.roll();
    // The gate was never closed, so there is nothing to open.
    swap.is_over = true;
    timings.pause = swap.done(Step::Commit, clock, rolling);
    Ok(timings)
}

fn step_failed<C>(phase: FailedPhase) -> impl FnOnce(C) -> Failure<C> {
    move |cause| Failure::Step { phase, cause }
}

/// What was interrupted gets at least this long to notice, however short the caller's own patience.
const INTERRUPTED_DRAIN: Duration = Duration::from_secs(5);

/// Why a drain came to nothing.
pub(crate) enum Undrained {
    Cancelled,
    InFlight(InFlight),
}

/// Waits until nothing is in flight, and interrupts what does not end in time if that is wanted.
pub(crate) fn drain<T>(
    of: &mut T,
    (timeout, on_timeout): (Option<Duration>, OnDrainTimeout),
    wait: impl Fn(&mut T, Option<Duration>) -> Result<(), InFlight>,
    interrupt: impl FnOnce(&mut T),
    is_cancelled: impl Fn(&T) -> bool,
) -> Result<(), Undrained> {
    let mut drained = wait(of, timeout);
    if drained.is_err() && on_timeout == OnDrainTimeout::Interrupt {
        if is_cancelled(of) {
            return Err(Undrained::Cancelled);
        }
        interrupt(of);
        drained = wait(of, timeout.map(|timeout| timeout.max(INTERRUPTED_DRAIN)));
    }
    drained.map_err(|left| {
        // Whoever cancelled wants to hear of that, rather than of the calls that it did not wait for.
        if is_cancelled(of) {
            Undrained::Cancelled
        } else {
            Undrained::InFlight(left)
        }
    })
}

/// A swap under way. Dropped before it is over, by an error or a panic, it is undone.
struct Swap<'a, B: Backend> {
    backend: &'a mut B,
    phase: Phase,
    is_over: bool,
}

impl<'a, B: Backend> Swap<'a, B> {
    fn new(backend: &'a mut B) -> Self {
        Self {
            backend,
            phase: Phase::Serving,
            is_over: false,
        }
    }

    fn advance(&mut self) {
        self.phase = self.phase.advance();
    }

    fn check_cancelled(&self) -> Result<(), Failure<B::Cause>> {
        if self.backend.is_cancelled() {
            Err(Failure::Cancelled)
        } else {
            Ok(())
        }
    }

    fn done(&mut self, step: Step, clock: &dyn Clock, started: Duration) -> Duration {
        let took = clock.now().saturating_sub(started);
        self.backend.done(step, took);
        took
    }

    fn instantiate(&mut self, clock: &dyn Clock) -> Result<Duration, Failure<B::Cause>> {
        self.check_cancelled()?;
        let started = clock.now();
        self.backend
            .instantiate()
            .map_err(|(phase, cause)| Failure::Step { phase, cause })?;
        self.advance();
        Ok(self.done(Step::Instantiate, clock, started))
    }

    fn drain(&mut self, plan: &Plan, whom: Drained) -> Result<(), Failure<B::Cause>> {
        self.check_cancelled()?;
        let drained = drain(
            &mut *self.backend,
            (plan.drain_timeout, plan.on_drain_timeout),
            |backend, timeout| match whom {
                Drained::InFlight => backend.drain(timeout),
                Drained::Stragglers => backend.drain_stragglers(timeout),
            },
            |backend| backend.interrupt(whom),
            |backend| backend.is_cancelled(),
        );
        drained.map_err(|why| match why {
            Undrained::Cancelled => Failure::Cancelled,
            Undrained::InFlight(left) => Failure::DrainTimeout(left),
        })
    }

    fn open_gate(mut self) -> usize {
        // Before the call: it is not made twice, whatever happens in it.
        self.is_over = true;
        self.backend.open_gate()
    }
}

impl<B: Backend> Drop for Swap<'_, B> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut panic = None;
        if !self.phase.is_committed() {
            keep(&mut panic, || self.backend.roll_back());
        }
        if self.phase.is_gated() {
            keep(&mut panic, || {
                self.backend.open_gate();
            });
        }
        // A second panic while the first unwinds would abort the process; the first says what
        // happened.
        if let Some(payload) = panic
            && !std::thread::panicking()
        {
            resume_unwind(payload);
        }
    }
}

/// Runs one step of the undoing, whatever became of the others, and keeps the first panic.
fn keep(panic: &mut Option<Box<dyn Any + Send>>, step: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(step)) {
        panic.get_or_insert(payload);
    }
}
