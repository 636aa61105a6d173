//! Native threads of a guest.
//!
//! A realm's guest may have threads beside the home thread: each runs some of its exports, one after the
//! other, in a *twin*: a store and an instance of its own over the same shared memories. How many there
//! are, and whether more may begin, the [`ThreadPool`] knows.
//!
//! # When one fails
//! Whatever the others share with it is in an unknown state then, locks included: the realm is poisoned,
//! what runs in it is stopped, and a reset or a reload brings everything back.
//!
//! # Who may hold what
//! A guest thread holds its twin, and no lock while it is inside. The list of the running is a leaf.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use wasm_molt_lifecycle::{PoolCounts, RecycleFailure, Starter, ThreadPool, ThreadTicket};

use crate::error::{Done, Error, ErrorCode, Result};
use crate::instance::deadline::Deadline;
use crate::instance::interrupt::{Interrupter, Stop};
use crate::instance::pool::no_thread;
use crate::instance::realm::{RealmExport, Sketch, Twin};
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::value::{FuncHandle, Value};
use crate::instance::wait::Sleeper;

/// For the names of threads.
static NUMBER: AtomicU64 = AtomicU64::new(0);

/// How long threads that were told to end may take: they do at their next poll.
const LONGEST_END: Duration = Duration::from_secs(5);

/// Room beside the guest's own stack, for host frames.
const HOST_STACK_BYTES: usize = 1 << 20;

/// One call that a guest thread makes.
#[derive(Debug)]
pub struct ThreadCall {
    /// An exported function of the realm.
    pub func: FuncHandle,
    /// What it is given.
    pub args: Vec<Value>,
}

/// A native thread of a guest.
#[derive(Debug, Clone)]
pub struct GuestThread {
    // And not the twin: JavaScript lets go of a thread long after it has ended.
    interrupter: Arc<Interrupter>,
}

impl GuestThread {
    /// Has it end at its next poll or wait, whatever it is doing. Any thread; at once.
    pub fn terminate(&self) {
        let why = "its thread was terminated";
        let stop = Stop::Interrupted(why.into());
        self.interrupter.stop_for_good(stop);
    }
}

/// The threads of one realm.
#[derive(Debug)]
pub(crate) struct Threads {
    pool: ThreadPool,
    running: Mutex<Vec<Running>>,
    /// Wakes the home thread where it waits inside the guest.
    doorbell: (Sender<()>, Receiver<()>),
    /// Those that have nothing to do.
    sleepers: Mutex<Vec<Sleeper>>,
}

impl Default for Threads {
    fn default() -> Self {
        Self {
            pool: ThreadPool::default(),
            running: Mutex::default(),
            doorbell: bounded(1),
            sleepers: Mutex::default(),
        }
    }
}

#[derive(Debug)]
struct Running {
    thread: GuestThread,
    handle: Option<JoinHandle<()>>,
}

impl Threads {
    fn lock(&self) -> MutexGuard<'_, Vec<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pool.counts().threads == 0
    }

    /// Rings for the home thread.
    pub(crate) fn doorbell(&self) -> &Receiver<()> {
        &self.doorbell.1
    }

    /// The numbers of the waits in which all of them are, if nobody does anything else; empty if there is
    /// nobody.
    pub(crate) fn asleep(&self) -> Option<Vec<u64>> {
        if self.is_empty() {
            return Some(Vec::new());
        }
        let running = self.lock();
        let is_over = |it: &&Running| it.handle.as_ref().is_some_and(JoinHandle::is_finished);
        let running = running.iter().filter(|it| !is_over(it));
        running
            .map(|it| it.thread.interrupter.waits().endless())
            .collect()
    }

    pub(crate) fn sleeper(&self) -> Option<Sleeper> {
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        sleepers.pop()
    }

    pub(crate) fn give_back(&self, sleeper: Sleeper) {
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        sleepers.push(sleeper);
    }

    /// Has all of them end; does not wait.
    pub(crate) fn stop(&self) {
        let threads: Vec<_> = self.lock().iter().map(|it| it.thread.clone()).collect();
        for thread in threads {
            thread.terminate();
        }
    }

    /// Waits for the last steps of those that have ended as far as the guest is concerned: its thread, with
    /// its stack, is gone then.
    fn join(&self) {
        let ended: Vec<_> = self.lock().drain(..).collect();
        for running in ended {
            // It never panics.
            let _ = running.handle.map(JoinHandle::join);
        }
    }

    /// Those that have ended are not waited for later.
    fn sweep(&self) {
        let is_over = |it: &Running| it.handle.as_ref().is_some_and(JoinHandle::is_finished);
        self.lock().retain(|it| !is_over(it));
    }
}

thread_local! {
    /// While this thread starts the second half of a recycling.
    static STARTER: Cell<*const Starter<'static>> = const { Cell::new(std::ptr::null()) };
}

/// Lets what runs inside begin threads although the pool is recycling.
struct Starting(*const Starter<'static>);

impl Starting {
    fn with<R>(starter: &Starter<'_>, f: impl FnOnce() -> R) -> R {
        let starter = std::ptr::from_ref(starter).cast();
        let _before = Self(STARTER.replace(starter));
        f()
    }

    fn begin() -> Option<ThreadTicket> {
        // SAFETY: not null only while `with` is on this thread's stack, which borrows it.
        let starter = unsafe { STARTER.get().as_ref() };
        starter.map(Starter::begin)
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        STARTER.set(self.0);
    }
}

/// What a thread is given to do.
struct Job {
    twin: Arc<Replica>,
    sketch: Sketch,
    /// By their places among the exports.
    calls: Vec<(usize, Vec<Value>)>,
}

impl Job {
    fn run(self, ticket: &mut ThreadTicket) -> Result<()> {
        let twin = &*self.twin;
        // SAFETY: nobody else enters a twin.
        let exports = unsafe { self.sketch.make(twin) }?;
        ticket.started();
        for (position, args) in self.calls {
            let Some(RealmExport::Function(func)) = exports.get(position) else {
                return Err(Error::internal("a twin has other exports"));
            };
            let args = args.into_iter().map(|arg| twin.own_value(arg));
            let args = args.collect::<Result<Vec<_>>>()?;
            // SAFETY: as above.
            unsafe { twin.call(func, args) }?;
        }
        Ok(())
    }
}

impl Replica {
    /// What is there of native threads.
    pub fn guest_threads(&self) -> PoolCounts {
        self.threads().pool.counts()
    }

    /// Whether it runs on a native thread of its own, beside a home.
    pub fn is_twin(&self) -> bool {
        self.twin().get().is_some()
    }

    /// Has the home thread look whether it is [wanted](crate::Attendant::is_wanted), if it waits inside its
    /// guest or comes to do so.
    pub fn ring_for_home(&self) {
        let home = self.twin().get().and_then(|twin| twin.home.upgrade());
        if let Some(home) = home {
            // One ring is enough.
            let _ = home.threads().doorbell.0.try_send(());
        }
    }

    /// This store's function for one of the realm whose twin it is.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for one that only the realm has.
    pub fn own_function(&self, func: FuncHandle) -> Result<FuncHandle> {
        if func.replica_id() == self.id() {
            return Ok(func);
        }
        let own = self.twin().get().and_then(|twin| twin.function(&func));
        own.ok_or_else(|| {
            Error::invalid(
                "an import that answers another thread of the guest can call what its instance exports, and \
                 nothing else",
            )
        })
    }

    /// The realm's number of a table, as this twin has it.
    ///
    /// # Errors
    /// As [`Self::own_function`].
    pub fn own_table(&self, id: u32) -> Result<u32> {
        self.translate(id, |twin| twin.table(id))
    }

    /// The realm's number of a global, as this twin has it.
    ///
    /// # Errors
    /// As [`Self::own_function`].
    pub fn own_global(&self, id: u32) -> Result<u32> {
        self.translate(id, |twin| twin.global(id))
    }

    fn translate(
        &self,
        id: u32,
        find: impl Fn(&crate::instance::realm::Twin) -> Option<u32>,
    ) -> Result<u32> {
        match self.twin().get() {
            None => Ok(id),
            Some(twin) => find(twin).ok_or_else(|| {
                Error::invalid("the instance on the other thread has no such table or global")
            }),
        }
    }

    /// The same for a value, if it is a function.
    ///
    /// # Errors
    /// As [`Self::own_function`].
    pub fn own_value(&self, value: Value) -> Result<Value> {
        match (value, self.twin().get()) {
            (Value::Func(Some(func)), Some(_)) => Ok(Value::Func(Some(self.own_function(func)?))),
            (value, _) => Ok(value),
        }
    }

    /// Ends whatever runs inside, for good, after that time, unless what this returns is dropped before.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] if there is no timer.
    pub fn end_after(&self, timeout_ms: u64) -> Result<impl Sized + use<>> {
        let interrupter = Arc::clone(self.interrupter());
        Deadline::after(Duration::from_millis(timeout_ms), move || {
            interrupter.stop_for_good(Stop::Timeout(timeout_ms));
        })
    }

    /// What a twin's function is called in the realm.
    pub fn home_value(&self, value: Value) -> Value {
        match (&value, self.twin().get()) {
            (Value::Func(Some(func)), Some(twin)) => Value::Func(twin.home_function(func)),
            _ => value,
        }
    }

    /// Starts a native thread with an instance of its own of the module whose exports are to be called.
    ///
    /// * `done`: whether the thread ended by itself or was ended, or how it failed, when it has let go of
    ///   everything. Called on it.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] and [`ErrorCode::Link`] for what cannot run on another thread,
    /// [`ErrorCode::Busy`] while the threads are being ended, [`ErrorCode::Internal`] if the system refuses
    /// one. Nothing has begun then.
    pub(crate) unsafe fn spawn(
        self: &Arc<Self>,
        blueprint: &Blueprint,
        calls: Vec<ThreadCall>,
        done: Done<bool>,
    ) -> Result<GuestThread> {
        let first = calls
            .first()
            .ok_or_else(|| Error::invalid("a thread needs at least one function to call"))?;
        // SAFETY: contract of this function.
        let sketch = unsafe { self.sketch(&first.func) }?;
        let mut places = Vec::with_capacity(calls.len());
        for call in calls {
            let position = sketch.position(&call.func).ok_or_else(|| {
                Error::invalid(
                    "the functions that a thread calls must all be exports of one instance",
                )
            })?;
            places.push((position, call.args));
        }
        let threads = Arc::clone(self.threads());
        threads.sweep();
        let ticket = Starting::begin().map_or_else(|| threads.pool.begin(), Ok);
        let mut ticket = ticket.map_err(|refused| self.no_thread(&refused))?;
        let twin = blueprint.make_twin((self.slot(), self.generation()))?;
        let name = self.module().name().to_owned();
        let home = Arc::downgrade(self);
        let _ = twin.twin().set(Twin::new(Weak::clone(&home)));
        let job = Job {
            twin: Arc::clone(&twin),
            sketch,
            calls: places,
        };
        let own = Arc::clone(&twin);
        let run = move || {
            let outcome = catch_unwind(AssertUnwindSafe(|| job.run(&mut ticket)));
            let outcome = outcome.unwrap_or_else(|panic| {
                let text = crate::error::panic_text(&*panic);
                Err(Error::internal(format_args!("a panic: {text}")))
            });
            // Time that is up is a failure like any other.
            let stop = own.interrupter().pending();
            let was_stopped = matches!(stop, Some(Stop::Interrupted(_) | Stop::Failed(_)));
            let failure = outcome.as_ref().err().filter(|_| !was_stopped);
            if let Some(error) = failure
                && let Some(home) = home.upgrade()
            {
                home.thread_failed(error);
            }
            // SAFETY: this thread alone has ever been inside.
            unsafe { own.release() };
            drop(own);
            if failure.is_some() {
                ticket.fail();
            } else {
                drop(ticket);
            }
            let outcome = if was_stopped {
                Ok(false)
            } else {
                outcome.map(|()| true)
            };
            // A host that panics must not take the process with it.
            let _ = catch_unwind(AssertUnwindSafe(|| done(outcome)));
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed) % 1000;
        let builder = Builder::new()
            .name(format!(
                "{}-g{number}",
                crate::instance::pool::thread_name(&name)
            ))
            .stack_size(blueprint.limits.stack_bytes() + HOST_STACK_BYTES);
        // Listed before it runs, so that whoever stops all finds it.
        let mut running = threads.lock();
        let handle = crate::scarcity::thread(builder, run)
            .map_err(|error| no_thread(&format!("a thread for {name}"), &error))?;
        let thread = GuestThread {
            interrupter: Arc::clone(twin.interrupter()),
        };
        running.push(Running {
            thread: thread.clone(),
            handle: Some(handle),
        });
        drop(running);
        Ok(thread)
    }

    /// A thread of its guest has broken off in the middle of something.
    fn thread_failed(&self, error: &Error) {
        self.poison_with(error);
        let stop = Stop::Failed(Box::new(error.clone()));
        self.interrupter().stop_for_good(stop);
        self.threads().stop();
    }

    /// Has `ask` ask the threads to end in good order, and waits until they have. Home thread, with nobody
    /// inside.
    ///
    /// # Errors
    /// Whatever `ask` failed with, and [`ErrorCode::Busy`] if they do not end; those that are left run on.
    pub fn exit_threads(&self, ask: impl FnOnce() -> Result<()>) -> Result<()> {
        let threads = self.threads();
        ask()?;
        let left = || self.attend_until(|counts| counts.threads == 0);
        let ended = threads.pool.exit(Some(LONGEST_END), left);
        ended.map_err(|left| self.do_not_end(&left))?;
        threads.join();
        Ok(())
    }

    /// The same, and has `start` start others. Whoever else starts threads meanwhile is refused.
    ///
    /// # Errors
    /// As [`Self::exit_threads`], and whatever `start` failed with; there is none then.
    pub fn recycle_threads(
        &self,
        ask: impl FnOnce() -> Result<()>,
        start: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let threads = self.threads();
        let had_any = !threads.is_empty();
        ask()?;
        let start = RefCell::new(Some(start));
        let start = || start.take().map_or(Ok(()), |start| start());
        let recycled = threads.pool.recycle(
            Some(LONGEST_END),
            || self.attend_until(|counts| counts.threads == 0),
            |starter| {
                threads.join();
                Starting::with(starter, start)?;
                self.attend_until(|counts| counts.started == counts.threads);
                Ok(())
            },
        );
        let recycled = recycled.map_err(|failure| match failure {
            RecycleFailure::Start(error) => error,
            RecycleFailure::Timeout(left) => self.do_not_end(&left),
            RecycleFailure::Refused(refused) => self.no_thread(&refused),
        });
        // They may have ended before the pool looked.
        let recycled = recycled.and_then(|()| if had_any { start() } else { Ok(()) });
        if recycled.is_err() {
            // Those that were begun are not left to themselves.
            self.end_threads()?;
        }
        recycled
    }

    /// Threads that end or begin may need the home thread for that.
    fn attend_until(&self, is_it: impl Fn(&PoolCounts) -> bool) {
        let until = Instant::now() + LONGEST_END;
        while !is_it(&self.guest_threads()) && Instant::now() < until {
            if let Some(attendant) = self.attendant()
                && attendant.is_wanted()
            {
                attendant.attend();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    fn do_not_end(&self, left: &impl fmt::Display) -> Error {
        Error::new(
            ErrorCode::Busy,
            format!(
                "threads of {} do not end: {left}; a reload or reset ends them by force",
                self.module().name()
            ),
        )
    }

    fn no_thread(&self, refused: &impl fmt::Display) -> Error {
        Error::new(
            ErrorCode::Busy,
            format!("{}: {refused}", self.module().name()),
        )
    }

    /// Ends all threads of the guest, and waits for that.
    ///
    /// # Errors
    /// [`ErrorCode::Busy`] if some do not: they are in the host, or cannot be interrupted.
    pub(crate) fn end_threads(&self) -> Result<()> {
        let threads = self.threads();
        // Those that were asked in good order, and did not end, are not asked again by the pool.
        threads.stop();
        let ended = threads.pool.exit(Some(LONGEST_END), || threads.stop());
        ended.map_err(|left| self.do_not_end(&left))?;
        threads.join();
        Ok(())
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").finish_non_exhaustive()
    }
}
