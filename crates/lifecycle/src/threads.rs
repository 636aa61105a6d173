//! The life of a guest's thread pool: its threads come one by one and go together.
//!
//! Why this is hard: threads end on their own, whenever they like, while others want them gone; what
//! asks them to end, and what starts new ones, is foreign code, so it runs without the lock and may
//! panic; and whoever asks for the end must neither miss a thread nor ask one of the next life.
//!
//! * [`ThreadPool`]: the shared handle. It owns no thread, it counts them.
//! * [`ThreadTicket`], [`OperationTicket`], [`Starter`]: who may do what.
//! * [`PoolRefused`], [`PoolTimeout`], [`RecycleFailure`]: the answers.

use std::error::Error;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;
use std::time::Duration;

use crate::clock::{Clock, SystemClock};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock};

/// Where a thread pool is.
///
/// ```text
/// None ── begin ──→ Initializing ── all have started ──→ Running
///  ↑                     │                                │ ↑
///  │                     ├──────── recycle ────────────→ Recycling
///  │                     ↓                                │
///  └── none is left ─ Exiting ←── exit, or it failed ─────┘
/// ```
///
/// When none is left, any state but `Recycling` becomes `None`, `Exiting` only once `stop` has returned
/// and no operation is in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PoolState {
    /// There is no thread.
    #[default]
    None,
    /// Some have begun, and not all of them have started yet.
    Initializing,
    /// All have started once; more may begin.
    Running,
    /// All are to be replaced. Nobody else begins and nobody enters.
    Recycling,
    /// All are to end. Nobody begins and nobody enters.
    Exiting,
}

impl PoolState {
    /// Every state, in the order of the words in the public interface.
    pub const ALL: [Self; 5] = [
        Self::None,
        Self::Initializing,
        Self::Running,
        Self::Recycling,
        Self::Exiting,
    ];

    /// The word for it in the public interface.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Initializing => "initializing",
            Self::Running => "running",
            Self::Recycling => "recycling",
            Self::Exiting => "exiting",
        }
    }
}

impl fmt::Display for PoolState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Plain numbers at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolCounts {
    /// Where the pool is.
    pub state: PoolState,
    /// Threads that have begun and not ended.
    pub threads: usize,
    /// Of which: those that run guest code.
    pub started: usize,
    /// Operations in flight.
    pub operations: usize,
}

/// The pool lets nobody begin or enter in this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolRefused {
    /// [`PoolState::Recycling`] or [`PoolState::Exiting`].
    pub state: PoolState,
}

impl fmt::Display for PoolRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the thread pool is {}", self.state)
    }
}

impl Error for PoolRefused {}

/// What was left when the time was up, and where the pool is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolTimeout(pub PoolCounts);

impl fmt::Display for PoolTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PoolCounts {
            state,
            threads,
            operations,
            ..
        } = self.0;
        write!(
            f,
            "{threads} threads and {operations} operations left, the thread pool is {state}"
        )
    }
}

impl Error for PoolTimeout {}

/// Why a recycle came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecycleFailure<E> {
    /// The pool is exiting.
    Refused(PoolRefused),
    /// The time was up.
    Timeout(PoolTimeout),
    /// `start` failed.
    Start(E),
}

impl<E> fmt::Display for RecycleFailure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refused) => refused.fmt(f),
            Self::Timeout(timeout) => write!(f, "the recycle timed out: {timeout}"),
            Self::Start(_) => f.write_str("no new threads could be started"),
        }
    }
}

impl<E: Error + 'static> Error for RecycleFailure<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Refused(_) => None,
            Self::Timeout(timeout) => Some(timeout),
            Self::Start(cause) => Some(cause),
        }
    }
}

/// What is being done to the pool as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Nothing: who wants may begin or enter.
    Open,
    Exiting,
    /// The first half of a recycle.
    Stopping,
    /// The second half.
    Starting,
}

/// Whether the threads of an exiting pool have been asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    No,
    /// By a `stop` that has not returned: it could yet ask a thread that begins now.
    Asking,
    Yes,
}

/// Everything that is decided under the mutex. The pool's [`PoolState`] is read off it, so that the
/// two cannot disagree.
#[derive(Debug)]
struct State {
    mode: Mode,
    threads: usize,
    started: usize,
    operations: usize,
    /// Whether there was a moment in this life when all had started.
    has_run: bool,
    has_failed: bool,
    asked: Asked,
    /// Who waits in [`ThreadPool::exit`] for this life to end. With the last one that gives up
    /// before anybody was asked to end, the exit is off.
    exits: usize,
    /// Exits that are over, so that who joined one knows its end, even if there are threads again.
    exited: u64,
    /// Recycles that went well, likewise.
    recycled: u64,
    /// Threads that wait for a change. With none there is nobody to wake.
    waiting: usize,
}

impl State {
    fn state(&self) -> PoolState {
        match self.mode {
            Mode::Exiting => PoolState::Exiting,
            Mode::Stopping | Mode::Starting => PoolState::Recycling,
            Mode::Open if self.threads == 0 => PoolState::None,
            Mode::Open if self.has_run => PoolState::Running,
            Mode::Open => PoolState::Initializing,
        }
    }

    fn counts(&self) -> PoolCounts {
        PoolCounts {
            state: self.state(),
            threads: self.threads,
            started: self.started,
            operations: self.operations,
        }
    }

    fn is_recycling(&self) -> bool {
        self.state() == PoolState::Recycling
    }

    /// Lets somebody begin or enter, or not.
    fn admit(&self) -> Result<(), PoolRefused> {
        match self.mode {
            Mode::Open => Ok(()),
            _ => Err(PoolRefused {
                state: self.state(),
            }),
        }
    }

    /// Draws the consequences of a change.
    fn settle(&mut self) {
        if self.threads > 0 {
            // While new ones are being begun, that some have started says nothing about all.
            self.has_run |= self.started == self.threads && self.mode != Mode::Starting;
            return;
        }
        self.has_run = false;
        self.has_failed = false;
        if self.mode == Mode::Exiting && self.operations == 0 && self.asked != Asked::Asking {
            self.mode = Mode::Open;
            self.asked = Asked::No;
            self.exits = 0;
            self.exited += 1;
        }
    }

    /// What is true between any two changes.
    fn is_consistent(&self) -> bool {
        let is_exiting = self.mode == Mode::Exiting;
        self.started <= self.threads
            && (is_exiting || self.asked == Asked::No)
            && (is_exiting || self.exits == 0)
            // Nobody enters, so who was asked to end was asked when nothing was in flight.
            && (self.operations == 0 || self.asked == Asked::No)
            && (self.operations == 0 || self.mode != Mode::Starting)
            // An exit that nobody waits for any more is off, or only threads are left of it.
            && (self.operations == 0 || !is_exiting || self.exits > 0)
    }
}

type Guard<'a> = MutexGuard<'a, State>;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when something changed while a thread waits for that.
    changed: Condvar,
}

/// Counts the threads of one guest, and brings them to an end together.
///
/// Clones are handles to the same pool; any thread may have one. Whoever starts a native thread for
/// the guest [begins](Self::begin) it before, and gives it the ticket. Whatever must not overlap with
/// the threads' end [enters](Self::enter) first: that is an *operation*.
///
/// [`exit`](Self::exit) and [`recycle`](Self::recycle) block. They must not be called by a thread that
/// the pool counts, inside an operation, or in a `stop` or `start`: it would wait for itself.
///
/// # Panics in `stop` and `start`
///
/// They go on to the caller. The pool is `Exiting` then, or `None` if no thread is left: nobody knows
/// how many have heard of their end, so it is for the next [`exit`](Self::exit) to ask them (again), or
/// for one that waits already.
///
/// # Example
///
/// ```
/// use wasm_molt_lifecycle::{PoolState, ThreadPool};
///
/// let pool = ThreadPool::new();
/// let (end, ended) = std::sync::mpsc::channel::<()>();
/// let mut ticket = pool.begin().unwrap();
/// let worker = std::thread::spawn(move || {
///     ticket.started();
///     let _ = ended.recv();
/// });
/// pool.exit(None, || drop(end)).unwrap();
/// assert_eq!(pool.counts().state, PoolState::None);
/// worker.join().unwrap();
/// ```
#[derive(Clone)]
pub struct ThreadPool {
    shared: Arc<Shared>,
}

impl Default for ThreadPool {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadPool")
            .field("counts", &self.counts())
            .finish()
    }
}

impl ThreadPool {
    /// A pool without threads.
    pub fn new() -> Self {
        let state = State {
            mode: Mode::Open,
            threads: 0,
            started: 0,
            operations: 0,
            has_run: false,
            has_failed: false,
            asked: Asked::No,
            exits: 0,
            exited: 0,
            recycled: 0,
            waiting: 0,
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                changed: Condvar::new(),
            }),
        }
    }

    /// Counts a thread that is about to be started.
    ///
    /// # Errors
    ///
    /// While the pool is exiting or recycling; the recycler has a [`Starter`] for that.
    pub fn begin(&self) -> Result<ThreadTicket, PoolRefused> {
        let mut state = lock(&self.shared.state);
        state.admit()?;
        Ok(self.begin_in(&mut state))
    }

    fn begin_in(&self, state: &mut State) -> ThreadTicket {
        // Nobody waits for a thread to begin.
        state.threads += 1;
        ThreadTicket {
            pool: self.clone(),
            has_started: false,
        }
    }

    /// Begins an operation, which an exit or recycle waits for.
    ///
    /// # Errors
    ///
    /// While the pool is exiting or recycling.
    pub fn enter(&self) -> Result<OperationTicket, PoolRefused> {
        self.enter_in(lock(&self.shared.state))
    }

    /// Begins an operation like [`enter`](Self::enter), as soon as the pool allows it. Must not be called
    /// by a thread that has begun and not [started](ThreadTicket::started): a recycle waits for that.
    ///
    /// # Errors
    ///
    /// After `timeout`, if the pool is exiting or recycling then. `None` waits for ever.
    pub fn wait_enter(&self, timeout: Option<Duration>) -> Result<OperationTicket, PoolRefused> {
        let state = lock(&self.shared.state);
        let is_open = |state: &State| state.mode == Mode::Open;
        let (state, _) = self.wait_until(state, &Deadline::new(timeout), is_open);
        self.enter_in(state)
    }

    fn enter_in(&self, mut state: Guard<'_>) -> Result<OperationTicket, PoolRefused> {
        state.admit()?;
        state.operations += 1;
        Ok(OperationTicket { pool: self.clone() })
    }

    /// Ends all threads: keeps others from beginning or entering, waits for the operations in flight,
    /// has `stop` ask the threads to end, and waits until they have. The pool is `None` then.
    ///
    /// `stop` runs without the lock, at most once, and not if no thread is left to ask. Exits at the
    /// same time join: all return when the pool is at its end, and only one `stop` runs. A recycle that
    /// is under way goes first.
    ///
    /// # Errors
    ///
    /// After `timeout`; `None` waits for ever, and zero still asks if nothing is in flight. With
    /// operations in flight nobody was asked, and the pool goes on as before, unless another exit waits.
    /// Otherwise it stays `Exiting` until the last thread ends, and further exits only wait for that.
    ///
    /// # Panics
    ///
    /// Only if `stop` does.
    pub fn exit(&self, timeout: Option<Duration>, stop: impl FnOnce()) -> Result<(), PoolTimeout> {
        let deadline = Deadline::new(timeout);
        let state = lock(&self.shared.state);
        let is_free = |state: &State| !state.is_recycling();
        let (mut state, is_free) = self.wait_until(state, &deadline, is_free);
        if !is_free {
            return Err(PoolTimeout(state.counts()));
        }
        let joined = state.exited;
        state.mode = Mode::Exiting;
        state.exits += 1;
        self.settle(&mut state);

        let has_exited = |state: &State| state.exited != joined;
        let is_due =
            |state: &State| !has_exited(state) && state.operations == 0 && state.asked == Asked::No;
        let is_next = |state: &State| has_exited(state) || is_due(state);
        let (mut state, _) = self.wait_until(state, &deadline, is_next);
        if is_due(&state) {
            state.asked = Asked::Asking;
            let outcome;
            (state, outcome) = self.unlocked(state, stop);
            if let Err(panic) = outcome {
                state.exits -= 1;
                self.leave_to_exit(&mut state, Asked::No);
                drop(state);
                resume_unwind(panic);
            }
            state.asked = Asked::Yes;
            self.settle(&mut state);
        }
        let (mut state, has_exited) = self.wait_until(state, &deadline, has_exited);
        if has_exited {
            return Ok(());
        }
        state.exits -= 1;
        if state.operations > 0 && state.exits == 0 {
            state.mode = Mode::Open;
        }
        self.settle(&mut state);
        Err(PoolTimeout(state.counts()))
    }

    /// Replaces all threads: ends them as [`exit`](Self::exit) does, and has `start` begin others, while
    /// operations that arrive [wait](Self::wait_enter) or are [refused](Self::enter). Returns when all
    /// of these have started; the pool is `Running` then, or `None` if there are none.
    ///
    /// `stop` and `start` run without the lock, each at most once; `stop` not if no thread is left to
    /// ask. Without threads there is nothing to replace, and neither runs. Recycles at the same time
    /// join the first; if that comes to nothing, the next tries what is left of it.
    ///
    /// # Errors
    ///
    /// * [`Refused`](RecycleFailure::Refused): the pool is exiting.
    /// * [`Timeout`](RecycleFailure::Timeout): with operations in flight, the pool goes on as before.
    ///   With threads that were asked to end, it is `Exiting` until they have. With new threads that
    ///   have not started, it is `Initializing`.
    /// * [`Start`](RecycleFailure::Start): the pool is `None`, or `Exiting` if `start` left threads
    ///   behind, which nobody has asked to end.
    ///
    /// # Panics
    ///
    /// Only if `stop` or `start` does.
    pub fn recycle<E>(
        &self,
        timeout: Option<Duration>,
        stop: impl FnOnce(),
        start: impl FnOnce(&Starter<'_>) -> Result<(), E>,
    ) -> Result<(), RecycleFailure<E>> {
        let deadline = Deadline::new(timeout);
        let timed_out = |state: &State| RecycleFailure::Timeout(PoolTimeout(state.counts()));
        let mut state = lock(&self.shared.state);
        loop {
            match state.state() {
                PoolState::None => return Ok(()),
                PoolState::Initializing | PoolState::Running => break,
                PoolState::Recycling => {}
                PoolState::Exiting => return state.admit().map_err(RecycleFailure::Refused),
            }
            let joined = state.recycled;
            let is_over = |state: &State| state.recycled != joined || !state.is_recycling();
            let is_next;
            (state, is_next) = self.wait_until(state, &deadline, is_over);
            if state.recycled != joined {
                return Ok(());
            }
            if !is_next {
                return Err(timed_out(&state));
            }
        }

        state.mode = Mode::Stopping;
        let (mut state, is_idle) = self.wait_until(state, &deadline, |state| state.operations == 0);
        if !is_idle {
            state.mode = Mode::Open;
            self.settle(&mut state);
            return Err(timed_out(&state));
        }
        if state.threads > 0 {
            let outcome;
            (state, outcome) = self.unlocked(state, stop);
            if let Err(panic) = outcome {
                self.leave_to_exit(&mut state, Asked::No);
                drop(state);
                resume_unwind(panic);
            }
        }
        let (mut state, is_empty) = self.wait_until(state, &deadline, |state| state.threads == 0);
        if !is_empty {
            self.leave_to_exit(&mut state, Asked::Yes);
            return Err(timed_out(&state));
        }

        state.mode = Mode::Starting;
        let starter = Starter {
            pool: self,
            stays_here: PhantomData,
        };
        let (mut state, outcome) = self.unlocked(state, || start(&starter));
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(cause)) => {
                self.leave_to_exit(&mut state, Asked::No);
                return Err(RecycleFailure::Start(cause));
            }
            Err(panic) => {
                self.leave_to_exit(&mut state, Asked::No);
                drop(state);
                resume_unwind(panic);
            }
        }
        let have_all_started = |state: &State| state.started == state.threads;
        let (mut state, have_all_started) = self.wait_until(state, &deadline, have_all_started);
        state.mode = Mode::Open;
        state.recycled += u64::from(have_all_started);
        self.settle(&mut state);
        if have_all_started {
            Ok(())
        } else {
            Err(timed_out(&state))
        }
    }

    /// Whether a thread has [failed](ThreadTicket::fail) since there was none.
    pub fn is_failed(&self) -> bool {
        lock(&self.shared.state).has_failed
    }

    /// The counts at this moment.
    pub fn counts(&self) -> PoolCounts {
        lock(&self.shared.state).counts()
    }

    /// Draws the consequences of a change, and wakes those who wait for one.
    fn settle(&self, state: &mut State) {
        state.settle();
        debug_assert!(state.is_consistent(), "the pool broke its invariants");
        if state.waiting > 0 {
            self.shared.changed.notify_all();
        }
    }

    /// What was being done to the pool has come to nothing halfway: all threads are to end.
    fn leave_to_exit(&self, state: &mut State, asked: Asked) {
        state.mode = Mode::Exiting;
        state.asked = asked;
        self.settle(state);
    }

    /// Runs foreign code without the lock.
    fn unlocked<'a, R>(
        &'a self,
        state: Guard<'a>,
        run: impl FnOnce() -> R,
    ) -> (Guard<'a>, std::thread::Result<R>) {
        drop(state);
        let outcome = catch_unwind(AssertUnwindSafe(run));
        (lock(&self.shared.state), outcome)
    }

    /// Blocks until `is_over`, and says whether it is.
    fn wait_until<'a>(
        &'a self,
        mut state: Guard<'a>,
        deadline: &Deadline,
        is_over: impl Fn(&State) -> bool,
    ) -> (Guard<'a>, bool) {
        let changed = &self.shared.changed;
        while !is_over(&state) {
            let left = deadline.left();
            if left == Some(Duration::ZERO) {
                return (state, false);
            }
            state.waiting += 1;
            state = match left {
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    changed
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
            state.waiting -= 1;
        }
        (state, true)
    }
}

/// One timeout for all that a call waits for.
struct Deadline {
    clock: SystemClock,
    timeout: Option<Duration>,
}

impl Deadline {
    fn new(timeout: Option<Duration>) -> Self {
        Self {
            clock: SystemClock::default(),
            timeout,
        }
    }

    /// `None`: for ever.
    fn left(&self) -> Option<Duration> {
        let timeout = self.timeout?;
        Some(timeout.saturating_sub(self.clock.now()))
    }
}

/// A thread of a [`ThreadPool`], from before it is started until it has ended.
///
/// Goes to the thread, which drops it as the last thing that concerns the guest; or is dropped where it
/// could not be started. What the thread did happens before the exit or recycle goes on: the pool's
/// mutex orders them.
#[must_use = "dropping the ticket means that the thread has ended"]
pub struct ThreadTicket {
    pool: ThreadPool,
    has_started: bool,
}

impl ThreadTicket {
    /// The thread runs, and is about to run guest code. Counts once.
    pub fn started(&mut self) {
        if !std::mem::replace(&mut self.has_started, true) {
            let mut state = lock(&self.pool.shared.state);
            state.started += 1;
            self.pool.settle(&mut state);
        }
    }

    /// The thread ends by a trap: the pool [has failed](ThreadPool::is_failed) until it has no threads.
    /// So nobody sees that of its last one; whoever needs the trap itself keeps it elsewhere.
    pub fn fail(self) {
        lock(&self.pool.shared.state).has_failed = true;
    }
}

impl Drop for ThreadTicket {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.shared.state);
        state.threads -= 1;
        state.started -= usize::from(self.has_started);
        self.pool.settle(&mut state);
    }
}

impl fmt::Debug for ThreadTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadTicket")
            .field("has_started", &self.has_started)
            .finish_non_exhaustive()
    }
}

/// An operation in flight: no thread is asked to end until the ticket is dropped.
#[must_use = "dropping the ticket ends the operation"]
pub struct OperationTicket {
    pool: ThreadPool,
}

impl Drop for OperationTicket {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.shared.state);
        state.operations -= 1;
        if state.operations == 0 {
            self.pool.settle(&mut state);
        }
    }
}

impl fmt::Debug for OperationTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OperationTicket").finish_non_exhaustive()
    }
}

/// The right to begin threads while the pool recycles, for `start` and on its thread only.
#[derive(Debug)]
pub struct Starter<'a> {
    pool: &'a ThreadPool,
    stays_here: PhantomData<*const ()>,
}

impl Starter<'_> {
    /// Counts a thread that is about to be started. Never refused: nothing else happens to a pool that
    /// recycles.
    pub fn begin(&self) -> ThreadTicket {
        self.pool.begin_in(&mut lock(&self.pool.shared.state))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    type Outcome = Result<(), RecycleFailure<&'static str>>;

    fn running(threads: usize) -> (ThreadPool, Vec<ThreadTicket>) {
        let pool = ThreadPool::new();
        let mut tickets: Vec<_> = (0..threads).map(|_| pool.begin().unwrap()).collect();
        tickets.iter_mut().for_each(ThreadTicket::started);
        (pool, tickets)
    }

    /// A pool in that state, for as long as the check takes.
    fn with_pool_in(state: PoolState, check: impl FnOnce(&ThreadPool)) {
        let (pool, tickets) = running(usize::from(state != PoolState::None));
        match state {
            PoolState::None | PoolState::Running => check(&pool),
            PoolState::Initializing => {
                drop(tickets);
                let _ticket = pool.begin().unwrap();
                check(&pool);
            }
            PoolState::Recycling => {
                let stop = || {
                    check(&pool);
                    drop(tickets);
                };
                pool.recycle(None, stop, |_| Ok::<_, ()>(())).unwrap();
            }
            PoolState::Exiting => pool
                .exit(None, || {
                    check(&pool);
                    drop(tickets);
                })
                .unwrap(),
        }
        assert_eq!(pool.counts().operations, 0);
    }

    fn counts(state: PoolState, threads: usize, started: usize, operations: usize) -> PoolCounts {
        PoolCounts {
            state,
            threads,
            started,
            operations,
        }
    }

    fn unreached() {
        unreachable!("nobody is to be asked");
    }

    fn unreached_start(_: &Starter<'_>) -> Result<(), &'static str> {
        unreachable!("nobody is to be started")
    }

    /// Until so many threads wait for the pool.
    fn wait_for_waiting(pool: &ThreadPool, waiting: usize) {
        while lock(&pool.shared.state).waiting < waiting {
            thread::yield_now();
        }
    }

    #[test]
    fn states_have_the_public_words() {
        assert_eq!(
            PoolState::ALL.map(PoolState::as_str),
            ["none", "initializing", "running", "recycling", "exiting"]
        );
        assert_eq!(PoolState::default().to_string(), "none");
    }

    #[test]
    fn failures_say_what_they_are() {
        let refused = PoolRefused {
            state: PoolState::Exiting,
        };
        let timeout = PoolTimeout(counts(PoolState::Running, 2, 2, 1));
        let rows: [(&dyn Error, &str); 5] = [
            (&refused, "the thread pool is exiting"),
            (
                &timeout,
                "2 threads and 1 operations left, the thread pool is running",
            ),
            (
                &RecycleFailure::<PoolRefused>::Refused(refused),
                "the thread pool is exiting",
            ),
            (
                &RecycleFailure::<PoolRefused>::Timeout(timeout),
                "the recycle timed out: 2 threads and 1 operations left, the thread pool is running",
            ),
            (
                &RecycleFailure::Start(refused),
                "no new threads could be started",
            ),
        ];
        for (failure, words) in rows {
            assert_eq!(failure.to_string(), words);
        }
        assert!(RecycleFailure::Start(refused).source().is_some());
    }

    #[test]
    fn each_state_lets_in_whom_it_should() {
        for state in PoolState::ALL {
            let is_open = !matches!(state, PoolState::Exiting | PoolState::Recycling);
            with_pool_in(state, |pool| {
                assert_eq!(pool.counts().state, state);
                let refused = (!is_open).then_some(PoolRefused { state });
                assert_eq!(pool.enter().err(), refused, "{state}");
                assert_eq!(pool.wait_enter(NOW).err(), refused, "{state}");
                let soon = Some(Duration::from_millis(1));
                assert_eq!(pool.wait_enter(soon).err(), refused, "{state}");
                assert_eq!(pool.begin().err(), refused, "{state}");
            });
        }
    }

    #[test]
    fn a_pool_runs_when_all_that_have_begun_have_started() {
        let pool = ThreadPool::new();
        let mut first = pool.begin().unwrap();
        let mut second = pool.begin().unwrap();
        first.started();
        first.started();
        assert_eq!(pool.counts(), counts(PoolState::Initializing, 2, 1, 0));
        second.started();
        assert_eq!(pool.counts(), counts(PoolState::Running, 2, 2, 0));
        let late = pool.begin().unwrap();
        assert_eq!(pool.counts(), counts(PoolState::Running, 3, 2, 0));
        drop(first);
        drop(second);
        assert_eq!(pool.counts(), counts(PoolState::Running, 1, 0, 0));
        drop(late);
        assert_eq!(pool.counts(), PoolCounts::default());
        let _next = pool.begin().unwrap();
        assert_eq!(pool.counts(), counts(PoolState::Initializing, 1, 0, 0));
    }

    #[test]
    fn who_could_not_be_started_is_not_waited_for() {
        let pool = ThreadPool::new();
        let mut first = pool.begin().unwrap();
        let second = pool.begin().unwrap();
        first.started();
        drop(second);
        assert_eq!(pool.counts(), counts(PoolState::Running, 1, 1, 0));
    }

    #[test]
    fn a_failure_is_remembered_as_long_as_there_are_threads() {
        let (pool, mut tickets) = running(2);
        tickets.pop().unwrap().fail();
        assert!(pool.is_failed());
        assert_eq!(pool.counts(), counts(PoolState::Running, 1, 1, 0));
        drop(pool.enter().unwrap());
        tickets.push(pool.begin().unwrap());
        assert!(pool.is_failed());
        drop(tickets);
        assert!(!pool.is_failed());
        pool.begin().unwrap().fail();
        assert!(!pool.is_failed(), "it was the last one");
    }

    #[test]
    fn a_recycle_forgets_that_the_old_threads_failed() {
        let (pool, mut tickets) = running(2);
        tickets.pop().unwrap().fail();
        let outcome: Outcome = pool.recycle(
            NOW,
            || drop(tickets),
            |starter| {
                assert!(!pool.is_failed());
                starter.begin().fail();
                Ok(())
            },
        );
        assert_eq!((outcome, pool.is_failed()), (Ok(()), false));
    }

    #[test]
    fn an_exit_of_a_pool_without_threads_waits_for_operations_only() {
        let pool = ThreadPool::new();
        pool.exit(NOW, unreached).unwrap();
        let operation = pool.enter().unwrap();
        let left = PoolTimeout(counts(PoolState::None, 0, 0, 1));
        assert_eq!(pool.exit(NOW, unreached), Err(left));
        thread::scope(|scope| {
            let exit = scope.spawn(|| pool.exit(None, unreached));
            wait_for_waiting(&pool, 1);
            assert_eq!(pool.counts().state, PoolState::Exiting);
            assert!(pool.begin().is_err());
            drop(operation);
            exit.join().unwrap().unwrap();
        });
        assert_eq!(pool.counts(), PoolCounts::default());
    }

    #[test]
    fn an_exit_that_nobody_was_asked_for_is_off_when_the_last_one_gives_up() {
        let (pool, tickets) = running(1);
        let operation = pool.enter().unwrap();
        let left = |state| Err(PoolTimeout(counts(state, 1, 1, 1)));
        assert_eq!(pool.exit(NOW, unreached), left(PoolState::Running));
        thread::scope(|scope| {
            let exit = scope.spawn(|| pool.exit(None, || drop(tickets)));
            wait_for_waiting(&pool, 1);
            assert_eq!(pool.exit(NOW, unreached), left(PoolState::Exiting));
            drop(operation);
            exit.join().unwrap().unwrap();
        });
        assert_eq!(pool.counts(), PoolCounts::default());
    }

    #[test]
    fn an_exit_whose_threads_take_their_time_goes_on_without_it() {
        let (pool, tickets) = running(2);
        let asked = Cell::new(0);
        let stop = || asked.set(asked.get() + 1);
        let left = PoolTimeout(counts(PoolState::Exiting, 2, 2, 0));
        let soon = Some(Duration::from_millis(1));
        assert_eq!(pool.exit(soon, stop), Err(left));
        assert_eq!(pool.exit(NOW, stop), Err(left));
        let outcome: Outcome = pool.recycle(NOW, unreached, unreached_start);
        let refused = PoolRefused {
            state: PoolState::Exiting,
        };
        assert_eq!(outcome, Err(RecycleFailure::Refused(refused)));
        thread::scope(|scope| {
            let operation = scope.spawn(|| pool.wait_enter(None).map(drop));
            wait_for_waiting(&pool, 1);
            drop(tickets);
            operation.join().unwrap().unwrap();
        });
        assert_eq!(asked.get(), 1);
        assert_eq!(pool.counts(), PoolCounts::default());
    }

    #[test]
    fn threads_that_end_by_themselves_are_not_asked() {
        type End = fn(&ThreadPool);
        let exit: End = |pool| pool.exit(None, unreached).unwrap();
        let recycle: End = |pool| {
            let outcome: Outcome = pool.recycle(None, unreached, |_| Ok(()));
            outcome.unwrap();
        };
        for (end, state) in [(exit, PoolState::Exiting), (recycle, PoolState::Recycling)] {
            let (pool, tickets) = running(1);
            let operation = pool.enter().unwrap();
            thread::scope(|scope| {
                scope.spawn(|| end(&pool));
                wait_for_waiting(&pool, 1);
                drop(tickets);
                assert_eq!(pool.counts(), counts(state, 0, 0, 1));
                drop(operation);
            });
            assert_eq!(pool.counts(), PoolCounts::default());
        }
    }

    #[test]
    fn who_waits_to_enter_hears_of_an_end_that_is_off() {
        const SOON: Option<Duration> = Some(Duration::from_millis(20));
        type End = fn(&ThreadPool);
        let exit: End = |pool| assert!(pool.exit(SOON, unreached).is_err());
        let recycle: End = |pool| assert!(pool.recycle(SOON, unreached, unreached_start).is_err());
        for end in [exit, recycle] {
            let (pool, _tickets) = running(1);
            let _operation = pool.enter().unwrap();
            thread::scope(|scope| {
                let end = scope.spawn(|| end(&pool));
                // It may be off by now; then there is nothing to wait for.
                while pool.counts().state == PoolState::Running && !end.is_finished() {
                    thread::yield_now();
                }
                drop(pool.wait_enter(None).unwrap());
            });
            assert_eq!(pool.counts(), counts(PoolState::Running, 1, 1, 1));
        }
    }

    #[test]
    fn nobody_begins_before_stop_has_returned() {
        let (pool, tickets) = running(1);
        pool.exit(NOW, || {
            drop(tickets);
            assert_eq!(pool.counts(), counts(PoolState::Exiting, 0, 0, 0));
            assert!(pool.begin().is_err());
        })
        .unwrap();
        drop(pool.begin().unwrap());
    }

    #[test]
    fn exits_at_the_same_time_ask_once_and_return_together() {
        let (pool, tickets) = running(2);
        let (end, ended) = channel::<()>();
        let end = std::sync::Mutex::new(Some(end));
        let asked = AtomicUsize::new(0);
        let operation = pool.enter().unwrap();
        thread::scope(|scope| {
            let exit = || {
                pool.exit(None, || {
                    asked.fetch_add(1, Ordering::Relaxed);
                    drop(end.lock().unwrap().take());
                })
            };
            let exits = [scope.spawn(exit), scope.spawn(exit), scope.spawn(exit)];
            scope.spawn(move || {
                let _ = ended.recv();
                drop(tickets);
            });
            wait_for_waiting(&pool, 3);
            drop(operation);
            for exit in exits {
                exit.join().unwrap().unwrap();
            }
        });
        assert_eq!(asked.into_inner(), 1);
        assert_eq!(pool.counts(), PoolCounts::default());
    }

    #[test]
    fn a_recycle_replaces_all_threads() {
        let (pool, tickets) = running(2);
        let new = RefCell::new(Vec::new());
        let outcome: Outcome = pool.recycle(
            NOW,
            || drop(tickets),
            |starter| {
                assert_eq!(pool.counts(), counts(PoolState::Recycling, 0, 0, 0));
                assert!(pool.begin().is_err());
                for _ in 0..3 {
                    let mut ticket = starter.begin();
                    ticket.started();
                    assert_eq!(pool.counts().state, PoolState::Recycling);
                    new.borrow_mut().push(ticket);
                }
                Ok(())
            },
        );
        assert_eq!(outcome, Ok(()));
        assert_eq!(pool.counts(), counts(PoolState::Running, 3, 3, 0));
    }

    #[test]
    fn operations_that_come_while_a_pool_recycles_wait_for_its_new_threads() {
        let (pool, tickets) = running(1);
        let operation = pool.enter().unwrap();
        thread::scope(|scope| {
            let recycle = scope.spawn(|| {
                let outcome: Outcome = pool.recycle(
                    None,
                    || drop(tickets),
                    |starter| {
                        let mut ticket = starter.begin();
                        scope.spawn(move || {
                            ticket.started();
                            drop(ticket.pool.wait_enter(None).unwrap());
                        });
                        Ok(())
                    },
                );
                outcome
            });
            wait_for_waiting(&pool, 1);
            let late = scope.spawn(|| pool.wait_enter(None).map(drop));
            wait_for_waiting(&pool, 2);
            drop(operation);
            recycle.join().unwrap().unwrap();
            late.join().unwrap().unwrap();
        });
        assert_eq!(pool.counts(), PoolCounts::default());
    }

    #[test]
    fn a_recycle_that_comes_to_nothing_says_where_it_leaves_the_pool() {
        type Start = fn(&Starter<'_>, &mut Vec<ThreadTicket>) -> Result<(), &'static str>;
        type Expected = fn(PoolCounts) -> Outcome;
        let nothing: Start = |_, _| Ok(());
        let one: Start = |starter, tickets| {
            tickets.push(starter.begin());
            Ok(())
        };
        let fails: Start = |_, _| Err("no luck");
        let fails_late: Start = |starter, tickets| {
            tickets.push(starter.begin());
            Err("no luck")
        };
        let well: Expected = |_| Ok(());
        let timeout: Expected = |left| Err(RecycleFailure::Timeout(PoolTimeout(left)));
        let failed: Expected = |_| Err(RecycleFailure::Start("no luck"));
        let none = PoolCounts::default();
        let rows = [
            // Operations, whether the threads end, what starts, and where that leads.
            (1, true, one, timeout, counts(PoolState::Running, 2, 2, 1)),
            (0, false, one, timeout, counts(PoolState::Exiting, 2, 2, 0)),
            (
                0,
                true,
                one,
                timeout,
                counts(PoolState::Initializing, 1, 0, 0),
            ),
            (0, true, nothing, well, none),
            (0, true, fails, failed, none),
            (
                0,
                true,
                fails_late,
                failed,
                counts(PoolState::Exiting, 1, 0, 0),
            ),
        ];
        for (operations, do_end, start, expected, left) in rows {
            let (pool, tickets) = running(2);
            let tickets = RefCell::new(tickets);
            let _operations: Vec<_> = (0..operations).map(|_| pool.enter().unwrap()).collect();
            let stop = || {
                if do_end {
                    tickets.borrow_mut().clear();
                }
            };
            let start = |starter: &Starter<'_>| start(starter, &mut tickets.borrow_mut());
            assert_eq!(pool.recycle(NOW, stop, start), expected(left));
            assert_eq!(pool.counts(), left);
        }
    }

    #[test]
    fn a_recycle_of_nothing_does_nothing() {
        let pool = ThreadPool::new();
        let _operation = pool.enter().unwrap();
        let outcome: Outcome = pool.recycle(NOW, unreached, unreached_start);
        assert_eq!(outcome, Ok(()));
    }

    #[test]
    fn a_recycle_joins_another_and_tries_itself_if_that_came_to_nothing() {
        for does_fail in [false, true] {
            let (pool, tickets) = running(1);
            let tickets = std::sync::Mutex::new(tickets);
            let starts = AtomicUsize::new(0);
            thread::scope(|scope| {
                let first: Outcome = pool.recycle(
                    if does_fail { NOW } else { None },
                    || {
                        let second = || -> Outcome {
                            pool.recycle(
                                None,
                                || tickets.lock().unwrap().clear(),
                                |starter| {
                                    starts.fetch_add(1, Ordering::Relaxed);
                                    drop(starter.begin());
                                    Ok(())
                                },
                            )
                        };
                        scope.spawn(move || second().unwrap());
                        wait_for_waiting(&pool, 1);
                        tickets.lock().unwrap().clear();
                    },
                    |starter| {
                        starts.fetch_add(1, Ordering::Relaxed);
                        tickets.lock().unwrap().push(starter.begin());
                        if !does_fail {
                            tickets.lock().unwrap()[0].started();
                        }
                        Ok(())
                    },
                );
                assert_eq!(first.is_err(), does_fail);
            });
            assert_eq!(starts.into_inner(), 1 + usize::from(does_fail));
        }
    }

    #[test]
    fn an_exit_lets_a_recycle_go_first() {
        let (pool, tickets) = running(1);
        let tickets = std::sync::Mutex::new(tickets);
        let clear = || tickets.lock().unwrap().clear();
        thread::scope(|scope| {
            let start = |starter: &Starter<'_>| {
                let left = PoolTimeout(counts(PoolState::Recycling, 0, 0, 0));
                assert_eq!(pool.exit(NOW, unreached), Err(left));
                scope.spawn(|| pool.exit(None, clear).unwrap());
                wait_for_waiting(&pool, 1);
                let mut ticket = starter.begin();
                ticket.started();
                tickets.lock().unwrap().push(ticket);
                Ok::<_, ()>(())
            };
            pool.recycle(None, clear, start).unwrap();
        });
        assert_eq!(pool.counts(), PoolCounts::default());
    }

    /// What the panic says, and where it leaves the pool.
    fn panic_of<R>(pool: &ThreadPool, run: impl FnOnce() -> R) -> (&'static str, PoolCounts) {
        let Err(panic) = catch_unwind(AssertUnwindSafe(run)) else {
            unreachable!("it panics");
        };
        (*panic.downcast::<&str>().unwrap(), pool.counts())
    }

    fn panics<R>() -> R {
        resume_unwind(Box::new("foreign"))
    }

    #[test]
    fn a_panic_leaves_the_pool_to_an_exit() {
        // By who panics, and whether all threads have ended by then.
        for is_left in [true, false] {
            type Run = fn(&ThreadPool, &RefCell<Vec<ThreadTicket>>, bool);
            let exit: Run = |pool, tickets, is_left| {
                let stop = || {
                    tickets.borrow_mut().truncate(usize::from(is_left));
                    panics::<()>();
                };
                let _ = pool.exit(NOW, stop);
            };
            let recycle_stop: Run = |pool, tickets, is_left| {
                let stop = || {
                    tickets.borrow_mut().truncate(usize::from(is_left));
                    panics::<()>();
                };
                let _: Outcome = pool.recycle(NOW, stop, unreached_start);
            };
            let recycle_start: Run = |pool, tickets, is_left| {
                let start = |starter: &Starter<'_>| -> Result<(), ()> {
                    if is_left {
                        let mut ticket = starter.begin();
                        ticket.started();
                        tickets.borrow_mut().push(ticket);
                    }
                    panics()
                };
                let stop = || drop(tickets.take());
                let _ = pool.recycle(NOW, stop, start);
            };
            for run in [exit, recycle_stop, recycle_start] {
                let (pool, tickets) = running(2);
                let tickets = RefCell::new(tickets);
                let left = if is_left {
                    counts(PoolState::Exiting, 1, 1, 0)
                } else {
                    PoolCounts::default()
                };
                let panicked = panic_of(&pool, || run(&pool, &tickets, is_left));
                assert_eq!(panicked, ("foreign", left));
                pool.exit(NOW, || tickets.borrow_mut().clear()).unwrap();
                assert!(tickets.borrow().is_empty());
                drop(pool.begin().unwrap());
            }
        }
    }

    #[test]
    fn an_exit_that_joined_one_that_panics_asks_in_its_place() {
        let (pool, tickets) = running(1);
        thread::scope(|scope| {
            let (panicked, left) = panic_of(&pool, || {
                pool.exit(None, || {
                    scope.spawn(|| pool.exit(None, || drop(tickets)).unwrap());
                    wait_for_waiting(&pool, 1);
                    panics::<()>();
                })
            });
            assert_eq!(panicked, "foreign");
            assert_ne!(left.state, PoolState::Running);
        });
        assert_eq!(pool.counts(), PoolCounts::default());
    }

    #[test]
    fn what_crosses_threads_may_do_so() {
        fn is_shared<T: Send + Sync + 'static>() {}
        is_shared::<ThreadPool>();
        is_shared::<ThreadTicket>();
        is_shared::<OperationTicket>();
    }
}
