//! One call, from its admission to its one answer, and whoever stops it meanwhile.
//!
//! Why this is hard: a stop may come at any moment, before the call is in its queue even, and the answer is
//! given by exactly one: who runs the call, or who takes it away from where it waits.
//!
//! The call itself is one value that is owned: by its queue, by its [parking place](Stopping::park), or by the
//! thread that runs it. Whoever takes it out of one of these owns the answer. [`Stopping`] only says where it
//! is, so that a stop finds it.

use crate::sync::{Mutex, MutexGuard, lock};

/// What a call is made of, as far as stopping it goes.
pub trait Stoppable: 'static {
    /// Where it waits, by name.
    type Queue: Clone;
    /// It runs there.
    type Run;
    /// Why it is to stop.
    type Stop: Clone;
    /// The call with its instance, waiting for a thread.
    type Parked;

    /// Takes the call out of that queue and answers it; `false`: it was not there.
    fn refuse_waiting(queue: Self::Queue) -> bool;

    /// Answers the call, and gives back what it has.
    fn refuse_parked(parked: Self::Parked);

    /// Has the run end. Under the lock, so that the run cannot end and another one begin in between.
    fn stop_run(run: &Self::Run, stop: Self::Stop);
}

enum State<C: Stoppable> {
    Waiting(Option<C::Queue>),
    Running(C::Run),
    /// Before it ran; and where it was to wait, if that was known.
    Stopped(C::Stop, Option<C::Queue>),
    Done,
}

/// Where one call is.
pub struct Stopping<C: Stoppable> {
    state: Mutex<State<C>>,
    parked: Mutex<Option<C::Parked>>,
}

impl<C: Stoppable> std::fmt::Debug for Stopping<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stopping").finish_non_exhaustive()
    }
}

impl<C: Stoppable> Default for Stopping<C> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State::Waiting(None)),
            parked: Mutex::new(None),
        }
    }
}

impl<C: Stoppable> Stopping<C> {
    fn lock(&self) -> MutexGuard<'_, State<C>> {
        lock(&self.state)
    }

    /// Before the call goes into its queue.
    pub fn waits_in(&self, queue: C::Queue) {
        let mut state = self.lock();
        match &mut *state {
            State::Waiting(known @ None) | State::Stopped(_, known @ None) => *known = Some(queue),
            _ => {}
        }
    }

    /// The call is in its queue now. A stop that came before takes it out again.
    pub fn queued(&self) {
        let queue = match &*self.lock() {
            State::Stopped(_, queue) => queue.clone(),
            _ => None,
        };
        if let Some(queue) = queue {
            C::refuse_waiting(queue);
        }
    }

    /// The call has its instance; a thread is to come for it with [`unpark`](Self::unpark).
    pub fn park(&self, call: C::Parked) {
        *self.parked() = Some(call);
        // A stop that came just before has found nothing to refuse.
        if self.stopped().is_some() {
            self.refuse_parked();
        }
    }

    /// `None` if a stop was faster.
    pub fn unpark(&self) -> Option<C::Parked> {
        self.parked().take()
    }

    fn parked(&self) -> MutexGuard<'_, Option<C::Parked>> {
        lock(&self.parked)
    }

    fn refuse_parked(&self) {
        // Not under the lock: whoever answers may do anything.
        let parked = self.unpark();
        if let Some(parked) = parked {
            C::refuse_parked(parked);
        }
    }

    /// The call begins to run.
    ///
    /// # Errors
    ///
    /// If it was stopped while it waited: it must not run, and is to be answered with this.
    pub fn start(&self, run: C::Run) -> Result<(), C::Stop> {
        let mut state = self.lock();
        if let State::Stopped(stop, _) = &*state {
            return Err(stop.clone());
        }
        *state = State::Running(run);
        Ok(())
    }

    /// Stops the call, wherever it is. The first stop wins; one after the end does nothing. Any thread.
    pub fn stop(&self, stop: C::Stop) {
        let mut state = self.lock();
        match &*state {
            State::Waiting(queue) => {
                let queue = queue.clone();
                *state = State::Stopped(stop, queue.clone());
                drop(state);
                if !queue.is_some_and(C::refuse_waiting) {
                    self.refuse_parked();
                }
            }
            State::Running(run) => C::stop_run(run, stop),
            State::Stopped(..) | State::Done => {}
        }
    }

    /// The call has its answer, or is about to.
    pub fn finish(&self) {
        let before = std::mem::replace(&mut *self.lock(), State::Done);
        drop(before);
    }

    /// Why it was stopped before it ran, if so.
    pub fn stopped(&self) -> Option<C::Stop> {
        match &*self.lock() {
            State::Stopped(stop, _) => Some(stop.clone()),
            _ => None,
        }
    }
}
