//! A question from one thread to another, which may have the asking thread do something first.
//!
//! Why this is hard: only the asking thread may run its guest, so what the answer needs of that guest has to
//! be done by the very thread that waits for the answer; in there it may ask again. And the asking thread may
//! be stopped at any moment, several questions deep, while the answering one waits for it.
//!
//! * [`Asker`]: the asking thread's end. It hears replies and *calls*, and tells outcomes of calls.
//! * [`Answerer`]: the other end. It hears outcomes and *requests*, and tells replies and calls.
//! * [`Stopper`]: has the asking thread leave.
//!
//! They speak in turn: after a request the asker hears, after an outcome too; after a reply to a nested
//! request, or a call, the answerer does.

use std::collections::VecDeque;
use std::fmt;
use std::sync::PoisonError;
use std::time::Duration;

use crate::clock::{Clock, SystemClock};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, SPIN_FOR, lock, spin};

/// What is said in a conversation.
pub trait Words: 'static {
    /// A further question.
    type Request: Send;
    /// The answer to one.
    type Reply: Send;
    /// What the asker is to do before it gets its answer.
    type Call: Send;
    /// What came of that.
    type Outcome: Send;
}

/// What an asker hears.
#[derive(Debug, PartialEq, Eq)]
pub enum ForAsker<R, C> {
    /// The answer.
    Reply(R),
    /// Something is to be done first, and its outcome to be [told](Asker::tell).
    Call(C),
}

/// What an answerer hears.
#[derive(Debug, PartialEq, Eq)]
pub enum ForAnswerer<Q, O> {
    /// What came of the call that is waited for.
    Outcome(O),
    /// The asker wants something in the middle of it.
    Request(Q),
}

/// Why nothing was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// The other end is gone, or will not do what was asked of it: nothing will ever come.
    Gone,
    /// The asker was stopped.
    Stopped,
    /// Nothing has come in time.
    Late,
}

/// Nobody is there to hear it, and nobody will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unheard;

/// How deep a call is: the first is 1, one inside of it 2.
type Level = u32;

/// What lies there for an answerer: outcomes say of which call.
type Told<W> = ForAnswerer<<W as Words>::Request, (Level, <W as Words>::Outcome)>;
/// What an answerer hears.
type Heard<W> = ForAnswerer<<W as Words>::Request, <W as Words>::Outcome>;

struct State<W: Words> {
    /// One thing at a time, because they speak in turn.
    for_asker: Option<ForAsker<W::Reply, W::Call>>,
    /// More than one only when a stop has the asker leave several calls at once.
    for_answerer: VecDeque<Told<W>>,
    /// Calls that the asker is in.
    begun: Level,
    /// Calls whose outcome the answerer waits for.
    awaited: Level,
    is_stopped: bool,
    is_asker_gone: bool,
    is_answerer_gone: bool,
    /// Ends that sleep. With none there is nobody to wake, which would be a system call.
    sleepers: usize,
}

struct Shared<W: Words> {
    state: Mutex<State<W>>,
    /// One condition for both: only one of them waits at a time, except at the end.
    changed: Condvar,
}

impl<W: Words> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        lock(&self.state)
    }

    fn change<R>(&self, change: impl FnOnce(&mut State<W>) -> R) -> R {
        let mut state = self.lock();
        let changed = change(&mut state);
        let does_wake = state.sleepers > 0;
        drop(state);
        if does_wake {
            self.changed.notify_all();
        }
        changed
    }

    /// Waits until `look` finds something.
    fn wait<R>(
        &self,
        patience: Option<Duration>,
        mut look: impl FnMut(&mut State<W>) -> Option<Result<R, Silence>>,
    ) -> Result<R, Silence> {
        // The other one is often about to speak, and sleeping takes longer than what it does.
        let clock = SystemClock::default();
        let mut turn = 0;
        while clock.now() < SPIN_FOR {
            if let Some(found) = look(&mut self.lock()) {
                return found;
            }
            spin(turn);
            turn += 1;
        }
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return found;
            }
            state.sleepers += 1;
            state = match patience.map(|patience| patience.saturating_sub(clock.now())) {
                None => self.changed.wait(state),
                Some(Duration::ZERO) => {
                    state.sleepers -= 1;
                    return Err(Silence::Late);
                }
                Some(left) => self
                    .changed
                    .wait_timeout(state, left)
                    .map(|(state, _)| state)
                    .map_err(|poisoned| PoisonError::new(poisoned.into_inner().0)),
            }
            .unwrap_or_else(PoisonError::into_inner);
            state.sleepers -= 1;
        }
    }
}

/// Both ends of a new conversation. The first request travels by other ways, with the answerer.
pub fn conversation<W: Words>() -> (Asker<W>, Answerer<W>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            for_asker: None,
            for_answerer: VecDeque::new(),
            begun: 0,
            awaited: 0,
            is_stopped: false,
            is_asker_gone: false,
            is_answerer_gone: false,
            sleepers: 0,
        }),
        changed: Condvar::new(),
    });
    let asker = Asker(Arc::new(AskerEnd(Arc::clone(&shared))));
    (asker, Answerer(shared))
}

struct AskerEnd<W: Words>(Arc<Shared<W>>);

impl<W: Words> Drop for AskerEnd<W> {
    fn drop(&mut self) {
        let unheard = self.0.change(|state| {
            state.is_asker_gone = true;
            state.for_asker.take()
        });
        drop(unheard);
    }
}

/// The end of the thread that asks. It is gone with its last clone.
pub struct Asker<W: Words>(Arc<AskerEnd<W>>);

impl<W: Words> Clone for Asker<W> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<W: Words> fmt::Debug for Asker<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asker").finish_non_exhaustive()
    }
}

impl<W: Words> Asker<W> {
    fn shared(&self) -> &Shared<W> {
        &self.0.0
    }

    /// Asks something inside a call that is being done: the answerer hears it where it waits for that call's
    /// outcome.
    ///
    /// # Errors
    ///
    /// If nobody will answer: the answerer is gone, or this thread was stopped.
    pub fn ask(&self, request: W::Request) -> Result<(), Unheard> {
        self.shared().change(|state| {
            if state.is_answerer_gone || state.is_stopped {
                return Err(Unheard);
            }
            state.for_answerer.push_back(ForAnswerer::Request(request));
            Ok(())
        })
    }

    /// Waits for the answer, or for something to be done first. A stop comes before everything else.
    ///
    /// # Errors
    ///
    /// [`Silence::Stopped`] from the stop on, for ever.
    pub fn hear(&self, patience: Option<Duration>) -> Result<ForAsker<W::Reply, W::Call>, Silence> {
        self.shared().wait(patience, |state| {
            if state.is_stopped {
                return Some(Err(Silence::Stopped));
            }
            if let Some(heard) = state.for_asker.take() {
                state.begun += Level::from(matches!(heard, ForAsker::Call(_)));
                return Some(Ok(heard));
            }
            state.is_answerer_gone.then_some(Err(Silence::Gone))
        })
    }

    /// Tells what came of the innermost call. Also of one that a stop has ended.
    ///
    /// # Errors
    ///
    /// If the answerer is gone.
    pub fn tell(&self, outcome: W::Outcome) -> Result<(), Unheard> {
        let mut outcome = Some(outcome);
        let told = self.shared().change(|state| {
            let level = state.begun;
            state.begun = state.begun.saturating_sub(1);
            if state.is_answerer_gone {
                return Err(Unheard);
            }
            // Else nobody waits for it any more.
            if level <= state.awaited
                && let Some(outcome) = outcome.take()
            {
                let outcome = ForAnswerer::Outcome((level, outcome));
                state.for_answerer.push_back(outcome);
            }
            Ok(())
        });
        drop(outcome);
        told
    }

    /// What has this thread leave.
    pub fn stopper(&self) -> Stopper<W> {
        Stopper(Arc::clone(&self.0.0))
    }
}

/// Stops the asker, from any thread. Keeps neither end.
pub struct Stopper<W: Words>(Arc<Shared<W>>);

impl<W: Words> fmt::Debug for Stopper<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopper").finish_non_exhaustive()
    }
}

impl<W: Words> Stopper<W> {
    /// From now on the asker hears nothing else, at any level, and nobody is heard by it: neither replies nor
    /// calls that it has not begun with.
    pub fn stop(&self) {
        let unheard = self.0.change(|state| {
            state.is_stopped = true;
            // Nobody waits for the answers any more; outcomes the answerer does wait for.
            let told = std::mem::take(&mut state.for_answerer);
            let is_request = |told: &ForAnswerer<_, _>| matches!(told, ForAnswerer::Request(_));
            let (requests, outcomes): (VecDeque<_>, _) = told.into_iter().partition(is_request);
            state.for_answerer = outcomes;
            (state.for_asker.take(), requests)
        });
        drop(unheard);
    }
}

/// The end of the thread that answers. Dropped, it says that no answer will come.
pub struct Answerer<W: Words>(Arc<Shared<W>>);

impl<W: Words> fmt::Debug for Answerer<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answerer").finish_non_exhaustive()
    }
}

impl<W: Words> Answerer<W> {
    fn say(&self, what: ForAsker<W::Reply, W::Call>) -> Result<(), Unheard> {
        self.0.change(|state| {
            if state.is_asker_gone || state.is_stopped {
                return Err(Unheard);
            }
            state.awaited += Level::from(matches!(what, ForAsker::Call(_)));
            state.for_asker = Some(what);
            Ok(())
        })
    }

    /// Answers what was asked last.
    ///
    /// # Errors
    ///
    /// If nobody listens any more.
    pub fn reply(&self, reply: W::Reply) -> Result<(), Unheard> {
        self.say(ForAsker::Reply(reply))
    }

    /// Has the asker do something first. What comes of it is to be [heard](Self::hear).
    ///
    /// # Errors
    ///
    /// If nobody listens any more; then nothing is to be heard either.
    pub fn call(&self, call: W::Call) -> Result<(), Unheard> {
        self.say(ForAsker::Call(call))
    }

    /// Waits for the outcome of the innermost call, or for a request in the middle of it, which is to be
    /// [replied](Self::reply) to before anything else is heard.
    ///
    /// # Errors
    ///
    /// [`Silence::Gone`] if there will be no outcome: it is not waited for any more. After
    /// [`Silence::Late`] it is, until that is [given up](Self::give_up).
    pub fn hear(
        &self,
        patience: Option<Duration>,
    ) -> Result<ForAnswerer<W::Request, W::Outcome>, Silence> {
        self.0.wait(patience, |state| {
            let heard = state.look_for_answerer();
            // The call is off the table with its outcome, or without one.
            if matches!(
                heard,
                Some(Ok(ForAnswerer::Outcome(_)) | Err(Silence::Gone))
            ) {
                state.awaited = state.awaited.saturating_sub(1);
            }
            heard
        })
    }
}

impl<W: Words> Answerer<W> {
    /// The outcome of the innermost call is not waited for any more: its asker was stopped, or is about to be.
    pub fn give_up(&self) {
        let unheard = self.0.change(|state| {
            state.awaited = state.awaited.saturating_sub(1);
            let awaited = state.awaited;
            let is_wanted = |told: &ForAnswerer<_, (Level, _)>| match told {
                ForAnswerer::Outcome((level, _)) => *level <= awaited,
                ForAnswerer::Request(_) => false,
            };
            let told = std::mem::take(&mut state.for_answerer);
            let (wanted, unheard): (VecDeque<_>, VecDeque<_>) =
                told.into_iter().partition(is_wanted);
            state.for_answerer = wanted;
            unheard
        });
        drop(unheard);
    }
}

impl<W: Words> State<W> {
    fn look_for_answerer(&mut self) -> Option<Result<Heard<W>, Silence>> {
        let is_of_outer = |told: &ForAnswerer<_, (Level, _)>| match told {
            ForAnswerer::Outcome((level, _)) => *level < self.awaited,
            ForAnswerer::Request(_) => false,
        };
        if self.for_answerer.front().is_some_and(is_of_outer) {
            // A stop came before the call that is waited for had begun.
            return Some(Err(Silence::Gone));
        }
        if let Some(told) = self.for_answerer.pop_front() {
            return Some(Ok(match told {
                ForAnswerer::Request(request) => ForAnswerer::Request(request),
                ForAnswerer::Outcome((_, outcome)) => ForAnswerer::Outcome(outcome),
            }));
        }
        self.is_asker_gone.then_some(Err(Silence::Gone))
    }
}

impl<W: Words> Drop for Answerer<W> {
    fn drop(&mut self) {
        let unheard = self.0.change(|state| {
            state.is_answerer_gone = true;
            std::mem::take(&mut state.for_answerer)
        });
        drop(unheard);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    struct Numbers;

    impl Words for Numbers {
        type Request = u32;
        type Reply = u32;
        type Call = u32;
        type Outcome = u32;
    }

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn they_speak_in_turn_at_any_depth() {
        let (asker, answerer) = conversation::<Numbers>();
        assert_eq!(asker.hear(NOW), Err(Silence::Late));
        answerer.call(1).unwrap();
        assert_eq!(answerer.hear(NOW), Err(Silence::Late));
        assert_eq!(asker.hear(None), Ok(ForAsker::Call(1)));
        asker.ask(2).unwrap();
        assert_eq!(answerer.hear(None), Ok(ForAnswerer::Request(2)));
        answerer.call(3).unwrap();
        assert_eq!(asker.hear(None), Ok(ForAsker::Call(3)));
        asker.tell(4).unwrap();
        assert_eq!(answerer.hear(None), Ok(ForAnswerer::Outcome(4)));
        answerer.reply(5).unwrap();
        assert_eq!(asker.hear(None), Ok(ForAsker::Reply(5)));
        asker.tell(6).unwrap();
        assert_eq!(answerer.hear(None), Ok(ForAnswerer::Outcome(6)));
        answerer.reply(7).unwrap();
        assert_eq!(asker.hear(None), Ok(ForAsker::Reply(7)));
    }

    #[test]
    fn a_stop_takes_back_what_was_not_heard_and_ends_every_level() {
        let (asker, answerer) = conversation::<Numbers>();
        answerer.call(1).unwrap();
        assert_eq!(asker.hear(None), Ok(ForAsker::Call(1)));
        asker.ask(2).unwrap();
        assert_eq!(answerer.hear(None), Ok(ForAnswerer::Request(2)));
        // Said, and never begun with.
        answerer.call(3).unwrap();
        asker.stopper().stop();
        assert_eq!(asker.hear(None), Err(Silence::Stopped));
        asker.tell(4).unwrap();
        assert_eq!(asker.hear(None), Err(Silence::Stopped));
        assert_eq!(answerer.hear(None), Err(Silence::Gone), "of call 3");
        assert_eq!(answerer.reply(5), Err(Unheard));
        assert_eq!(
            answerer.hear(None),
            Ok(ForAnswerer::Outcome(4)),
            "of call 1"
        );
        assert_eq!(answerer.call(6), Err(Unheard));
        assert_eq!(asker.ask(7), Err(Unheard));
    }

    #[test]
    fn an_outcome_that_was_given_up_is_not_taken_for_another() {
        for is_told_before in [false, true] {
            let (asker, answerer) = conversation::<Numbers>();
            answerer.call(1).unwrap();
            assert_eq!(asker.hear(None), Ok(ForAsker::Call(1)));
            asker.ask(2).unwrap();
            assert_eq!(answerer.hear(None), Ok(ForAnswerer::Request(2)));
            answerer.call(3).unwrap();
            assert_eq!(asker.hear(None), Ok(ForAsker::Call(3)));
            if is_told_before {
                asker.tell(4).unwrap();
            }
            answerer.give_up();
            if !is_told_before {
                asker.tell(4).unwrap();
            }
            assert_eq!(answerer.hear(NOW), Err(Silence::Late));
            asker.tell(5).unwrap();
            assert_eq!(answerer.hear(None), Ok(ForAnswerer::Outcome(5)));
        }
    }

    #[test]
    fn an_end_that_is_gone_is_not_waited_for() {
        let (asker, answerer) = conversation::<Numbers>();
        answerer.call(1).unwrap();
        let other = asker.clone();
        drop(asker);
        assert_eq!(answerer.hear(NOW), Err(Silence::Late));
        drop(other);
        assert_eq!(answerer.hear(None), Err(Silence::Gone));
        assert_eq!(answerer.reply(2), Err(Unheard));

        let (asker, answerer) = conversation::<Numbers>();
        answerer.reply(1).unwrap();
        drop(answerer);
        assert_eq!(
            asker.hear(None),
            Ok(ForAsker::Reply(1)),
            "it was said before"
        );
        assert_eq!(asker.hear(None), Err(Silence::Gone));
        assert_eq!((asker.ask(2), asker.tell(3)), (Err(Unheard), Err(Unheard)));
    }
}
