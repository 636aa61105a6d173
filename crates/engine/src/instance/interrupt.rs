//! Stopping a guest that runs, from any thread.
//!
//! Two mechanisms behind one type. With the *poll page* the guest reads one page of its own at every
//! loop and at every recursion; taking the page away makes the next read fault. Where faults are not
//! signals (`signalsBasedTraps: false`) the engine's epoch checks are used: bumping the epoch makes
//! every instance of the engine look at its own flag, and only the one that is meant stops.
//!
//! The same page makes a guest look up without stopping it, where a `Watch` wants that.
//!
//! A run is numbered. A stop names the run it means, so one that comes too late never hits the next.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::error::{Error, ErrorCode};
use crate::instance::deadline::Deadline;
use crate::instance::memory::PollPage;
use crate::instance::value::HostRef;
use crate::instance::wait::Waits;
use crate::instance::watch::Watch;

/// Why a run was stopped.
#[derive(Debug, Clone)]
pub enum Stop {
    /// It took longer than this many milliseconds.
    Timeout(u64),
    /// Somebody needed it to end; the text says who.
    Interrupted(String),
    /// A signal was aborted, with this reason.
    Aborted(HostRef),
    /// Another thread of the guest has failed so.
    Failed(Box<Error>),
}

impl Stop {
    /// The error that the stopped call ends with.
    pub(crate) fn into_error(self, what: &str) -> Error {
        match self {
            Self::Timeout(ms) => Error::new(
                ErrorCode::Timeout,
                format!("{what} did not end within timeoutMs = {ms}"),
            ),
            Self::Interrupted(why) => Error::new(
                ErrorCode::Interrupted,
                format!("{what} was interrupted: {why}"),
            ),
            Self::Aborted(reason) => Error::Aborted(reason),
            Self::Failed(error) => *error,
        }
    }
}

/// Names one run of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunId(u64);

/// Hears of a stop.
type Listener = Box<dyn Fn() + Send>;

#[derive(Default)]
struct State {
    /// Who waits somewhere for the thread of a run, innermost last.
    listeners: Vec<Listener>,
    /// The run under way, 0 for none.
    current: u64,
    last: u64,
    stop: Option<Stop>,
    /// The stop holds for every run there may still be.
    is_for_good: bool,
    /// Stops every run that begins.
    halt: Option<Stop>,
    /// A guest that runs is to look up, and has not yet.
    is_called: bool,
    /// The store is gone: nothing is left to be stopped.
    is_released: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("current", &self.current)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

/// Somebody hears of a stop, until this is dropped: the last one first.
#[derive(Debug)]
pub struct Listening<'a>(&'a Interrupter);

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        let listener = self.0.lock().listeners.pop();
        drop(listener);
    }
}

/// Epoch mode: what a strike needs.
struct Epochs {
    /// Its epoch is bumped.
    engine: wasmtime::Engine,
    /// Read by the deadline callback.
    is_struck: AtomicBool,
    /// The timer thread bumps until the struck run has ended.
    is_repeating: AtomicBool,
}

impl std::fmt::Debug for Epochs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Epochs")
            .field("is_struck", &self.is_struck)
            .finish_non_exhaustive()
    }
}

impl Epochs {
    /// Between two bumps of the epoch for the same strike.
    const AGAIN: Duration = Duration::from_millis(1);

    fn strike(self: &Arc<Self>) {
        self.is_struck.store(true, Ordering::SeqCst);
        self.engine.increment_epoch();
        self.repeat();
    }

    /// One bump may be lost: between the deadline callback's look at the flag and the deadline that
    /// wasmtime sets afterwards, which counts from the epoch of that moment.
    fn repeat(self: &Arc<Self>) {
        if self.is_repeating.swap(true, Ordering::SeqCst) {
            return;
        }
        let weak = Arc::downgrade(self);
        let again = Deadline::after(Self::AGAIN, move || {
            let Some(epochs) = Weak::upgrade(&weak) else {
                return;
            };
            // In this order, so that a strike of this very moment starts its own repetition.
            epochs.is_repeating.store(false, Ordering::SeqCst);
            if epochs.is_struck.load(Ordering::SeqCst) {
                epochs.engine.increment_epoch();
                epochs.repeat();
            }
        });
        match again {
            Ok(deadline) => deadline.detach(),
            Err(_) => self.is_repeating.store(false, Ordering::SeqCst),
        }
    }
}

/// Stops the runs of one instance.
#[derive(Debug)]
pub struct Interrupter {
    state: Mutex<State>,
    /// One for each instance in the store that has polls: nearly always one.
    polls: Mutex<Vec<PollPage>>,
    epochs: Option<Arc<Epochs>>,
    /// Where the guest's thread waits, if it does.
    waits: Arc<Waits>,
    cancel: (Sender<()>, Receiver<()>),
}

impl Interrupter {
    pub(crate) fn new(epochs: Option<wasmtime::Engine>) -> Self {
        Self {
            state: Mutex::default(),
            polls: Mutex::default(),
            epochs: epochs.map(|engine| {
                Arc::new(Epochs {
                    engine,
                    is_struck: AtomicBool::new(false),
                    is_repeating: AtomicBool::new(false),
                })
            }),
            waits: Arc::default(),
            cancel: bounded(1),
        }
    }

    /// The poll page of an instance, as soon as it exists: its start function may run for ever.
    pub(crate) fn add_poll(&self, page: PollPage) {
        self.polls().push(page);
        // A stop that came before the page was there takes it away now.
        let state = self.lock();
        if state.stop.is_some() {
            self.strike(&state);
        } else if state.is_called {
            self.interrupt();
        }
    }

    /// A leaf lock, held for a few system calls at most. A guest at a poll does not hold it.
    fn polls(&self) -> MutexGuard<'_, Vec<PollPage>> {
        self.polls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets guests pass their polls; tells whether that is so.
    fn grant(&self) -> bool {
        let all = self.polls();
        all.iter()
            .fold(true, |all, poll| all & poll.grant().is_ok())
    }

    fn revoke(&self) {
        for poll in self.polls().iter() {
            let _ = poll.revoke();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run begins; `end` must follow.
    pub(crate) fn begin(&self) -> RunId {
        let mut state = self.lock();
        state.last += 1;
        state.current = state.last;
        if let Some(stop) = state.halt.clone()
            && state.stop.is_none()
        {
            state.stop = Some(stop);
            self.strike(&state);
        }
        RunId(state.last)
    }

    /// The run is over; tells whether, and why, it was stopped. Afterwards the instance can run again.
    pub(crate) fn end(&self, run: RunId) -> Option<Stop> {
        let mut state = self.lock();
        if state.current != run.0 {
            return None;
        }
        state.current = 0;
        if state.is_for_good {
            return state.stop.clone();
        }
        let stop = state.stop.take()?;
        self.let_go(&mut state);
        Some(stop)
    }

    /// What was taken away for a stop is given back.
    fn let_go(&self, state: &mut State) {
        state.is_called = false;
        if let Some(epochs) = &self.epochs {
            epochs.is_struck.store(false, Ordering::SeqCst);
        }
        // Failing to map a page back leaves an instance that stops at once: it is poisoned anyway.
        self.grant();
        self.waits.resume();
        while self.cancel.1.try_recv().is_ok() {}
    }

    /// What was stopped for good may run once more: its memory is as it was at some better time. Nobody
    /// is inside.
    pub(crate) fn revive(&self) {
        let mut state = self.lock();
        if !state.is_for_good || state.is_released {
            return;
        }
        state.is_for_good = false;
        state.stop = None;
        self.let_go(&mut state);
    }

    pub(crate) fn waits(&self) -> &Arc<Waits> {
        &self.waits
    }

    /// Its thread must end: it has asked, where it waits.
    pub(crate) fn end_with_thread(&self) {
        self.stop_for_good(Stop::Interrupted("its thread is ending".into()));
    }

    /// Stops `run` if it is still under way. The first stop wins. Any thread.
    pub(crate) fn stop(&self, run: RunId, stop: Stop) -> bool {
        let mut state = self.lock();
        if state.current != run.0 || state.stop.is_some() {
            return false;
        }
        state.stop = Some(stop);
        self.strike(&state);
        true
    }

    /// Stops the run that is under way, if there is one. Any thread.
    pub fn stop_current(&self, stop: Stop) -> bool {
        let current = RunId(self.lock().current);
        current.0 != 0 && self.stop(current, stop)
    }

    /// Refuses each run that begins before [`resume`](Self::resume). Any thread.
    pub(crate) fn forbid(&self, stop: Stop) {
        self.lock().halt = Some(stop);
    }

    /// Likewise, and stops the run that is under way. Any thread.
    pub(crate) fn halt(&self, stop: Stop) {
        let mut state = self.lock();
        state.halt = Some(stop.clone());
        if state.current != 0 && state.stop.is_none() {
            state.stop = Some(stop);
            self.strike(&state);
        }
    }

    /// Why no run may begin, if that is so.
    pub(crate) fn halted(&self) -> Option<Stop> {
        self.lock().halt.clone()
    }

    /// Runs may begin again.
    pub(crate) fn resume(&self) {
        self.lock().halt = None;
    }

    /// Stops whatever runs now, even a run that was never announced. Any thread.
    ///
    /// For instances that will not serve again.
    pub(crate) fn stop_for_good(&self, stop: Stop) {
        let mut state = self.lock();
        state.is_for_good = true;
        if state.stop.is_none() {
            state.stop = Some(stop);
        }
        if !state.is_released {
            self.strike(&state);
        }
    }

    /// With the lock held, so that `end` cannot slip in between.
    fn strike(&self, state: &State) {
        self.revoke();
        if let Some(epochs) = &self.epochs {
            epochs.strike();
        }
        self.waits.stop();
        state.listeners.iter().for_each(|tell| tell());
        let _ = self.cancel.0.try_send(());
    }

    /// Has `tell` called when a run is stopped, at once if it already is. For what the thread of a run waits
    /// at, several at a time only one inside the other.
    ///
    /// * `tell`: any thread; short, and without a way back here.
    pub fn listen(&self, tell: impl Fn() + Send + 'static) -> Listening<'_> {
        let mut state = self.lock();
        if state.stop.is_some() {
            tell();
        }
        state.listeners.push(Box::new(tell));
        Listening(self)
    }

    /// The guest comes by at its next poll.
    fn interrupt(&self) {
        self.revoke();
        if let Some(epochs) = &self.epochs {
            epochs.engine.increment_epoch();
        }
    }

    /// Has the guest look up at its next poll; tells whether it has done so since the last time.
    pub(crate) fn have_look_up(&self) -> bool {
        let mut state = self.lock();
        if state.is_called || state.stop.is_some() {
            return false;
        }
        state.is_called = true;
        self.interrupt();
        true
    }

    /// The guest has come by, on its own thread, inside the signal handler or the epoch callback;
    /// tells whether it may go on. A guest at a poll holds no lock, so this may take some.
    pub(crate) fn looks_up(&self, watch: &Arc<Watch>) -> bool {
        let mut state = self.lock();
        if state.stop.is_some() {
            return false;
        }
        state.is_called = false;
        let is_granted = self.grant();
        drop(state);
        if is_granted && !watch.ask() {
            return true;
        }
        self.end_with_thread();
        false
    }

    /// Whether a fault at that address is one of this instance's polls.
    #[cfg(unix)]
    pub(crate) fn has_poll_at(&self, address: usize) -> bool {
        self.polls().iter().any(|poll| poll.contains(address))
    }

    /// Epoch mode: whether this very instance is meant.
    pub(crate) fn is_struck(&self) -> bool {
        self.epochs
            .as_ref()
            .is_some_and(|epochs| epochs.is_struck.load(Ordering::SeqCst))
    }

    /// The store is gone: nothing is left to be stopped.
    pub(crate) fn released(&self) {
        self.lock().is_released = true;
        // Whoever holds the handle of a guest that is gone does not hold its pages.
        self.polls().clear();
        if let Some(epochs) = &self.epochs {
            epochs.is_struck.store(false, Ordering::SeqCst);
        }
    }

    /// Whether the present run was stopped.
    pub fn is_stopped(&self) -> bool {
        self.lock().stop.is_some()
    }

    /// Why the present run was stopped, if it was.
    pub(crate) fn pending(&self) -> Option<Stop> {
        self.lock().stop.clone()
    }

    /// Becomes ready when the present run is stopped: for host functions that wait for something.
    pub fn cancelled(&self) -> &Receiver<()> {
        &self.cancel.1
    }
}
