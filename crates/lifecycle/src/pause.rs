//! The pause: nobody is inside any instance while something is done to them, and then they serve on.
//!
//! Snapshot, reset and fork are pauses; they start no generation. [`run`] decides the order (close the
//! gate, drain, act, open the gate), what follows a failure, and what is measured; [`Paused`] does the
//! work.

use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::clock::Clock;
use crate::gate::InFlight;
use crate::swap::{OnDrainTimeout, Undrained, drain};

/// The work behind each step of a pause.
///
/// One run calls each step at most once, in the order of this trait, with two exceptions: `drain` twice
/// when it interrupts, and `is_cancelled` between any two. Every run that has begun to close the gate
/// ends with `open_gate`; a step that panics counts as failed, and the panic goes on to the caller.
pub trait Paused {
    /// What a failed act reports.
    type Cause;

    /// Closes the gate. Returns how many are in flight at that moment.
    fn close_gate(&mut self) -> usize;

    /// Blocks until nothing is in flight.
    ///
    /// # Errors
    ///
    /// After `timeout`, with what still is.
    fn drain(&mut self, timeout: Option<Duration>) -> Result<(), InFlight>;

    /// Makes what is in flight end soon; it is then drained again.
    fn interrupt(&mut self);

    /// What the pause is for. Nobody is inside any instance.
    ///
    /// # Errors
    ///
    /// With the cause.
    fn act(&mut self) -> Result<(), Self::Cause>;

    /// Opens the gate. Returns how many had waited.
    fn open_gate(&mut self) -> usize;

    /// Whether the run should give up before its next step.
    fn is_cancelled(&self) -> bool;
}

/// How long a pause waits, and what then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PausePlan {
    /// Longest wait for what is in flight. `None`: for ever.
    pub drain_timeout: Option<Duration>,
    /// What follows when it is over.
    pub on_drain_timeout: OnDrainTimeout,
}

/// What a pause cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PauseTimings {
    /// In flight when the gate closed.
    pub drained: usize,
    /// Waited when it opened.
    pub queued: usize,
    /// From before the gate closed until after it opened.
    pub pause: Duration,
    /// Waiting for what was in flight.
    pub drain: Duration,
    /// What the pause was for.
    pub act: Duration,
}

/// Why a pause came to nothing. The gate is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseFailure<C> {
    /// What was in flight did not end in time; nothing was done.
    DrainTimeout(InFlight),
    /// The act failed.
    Act(C),
    /// [`Paused::is_cancelled`] said so; nothing was done.
    Cancelled,
}

impl<C> fmt::Display for PauseFailure<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DrainTimeout(in_flight) => write!(f, "the drain timed out: {in_flight}"),
            Self::Act(_) => f.write_str("what the pause was for failed"),
            Self::Cancelled => f.write_str("the pause was cancelled"),
        }
    }
}

impl<C: Error + 'static> Error for PauseFailure<C> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::DrainTimeout(in_flight) => Some(in_flight),
            Self::Act(cause) => Some(cause),
            Self::Cancelled => None,
        }
    }
}

/// Runs one pause. Blocks the calling thread throughout.
///
/// # Errors
///
/// With the first failure; the gate is open.
///
/// # Panics
///
/// Only if `paused` does, and then with the gate open.
pub fn run<P: Paused>(
    paused: &mut P,
    clock: &dyn Clock,
    plan: &PausePlan,
) -> Result<PauseTimings, PauseFailure<P::Cause>> {
    if paused.is_cancelled() {
        return Err(PauseFailure::Cancelled);
    }
    let closing = clock.now();
    let mut timings = PauseTimings::default();
    // Before the gate closes: a step that panics must not leave it so.
    let guard = Opening {
        paused,
        is_over: false,
    };
    timings.drained = guard.paused.close_gate();

    let started = clock.now();
    let drained = drain(
        &mut *guard.paused,
        (plan.drain_timeout, plan.on_drain_timeout),
        |paused, timeout| paused.drain(timeout),
        |paused| paused.interrupt(),
        |paused| paused.is_cancelled(),
    );
    drained.map_err(|why| match why {
        Undrained::Cancelled => PauseFailure::Cancelled,
        Undrained::InFlight(left) => PauseFailure::DrainTimeout(left),
    })?;
    timings.drain = clock.now().saturating_sub(started);
    if guard.paused.is_cancelled() {
        return Err(PauseFailure::Cancelled);
    }

    let started = clock.now();
    guard.paused.act().map_err(PauseFailure::Act)?;
    timings.act = clock.now().saturating_sub(started);

    timings.queued = guard.open();
    timings.pause = clock.now().saturating_sub(closing);
    Ok(timings)
}

/// Opens the gate on the way out, once.
struct Opening<'a, P: Paused> {
    paused: &'a mut P,
    is_over: bool,
}

impl<P: Paused> Opening<'_, P> {
    fn open(mut self) -> usize {
        // Before the call: it is not made twice, whatever happens in it.
        self.is_over = true;
        self.paused.open_gate()
    }
}

impl<P: Paused> Drop for Opening<'_, P> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        if std::thread::panicking() {
            // A second panic would abort the process; the first says what happened.
            let _ = catch_unwind(AssertUnwindSafe(|| self.paused.open_gate()));
        } else {
            self.paused.open_gate();
        }
    }
}
