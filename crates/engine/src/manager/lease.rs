//! One instance, held over several calls.
//!
//! # Who may do what
//! The home thread enters a lease synchronously while no pool thread is inside ([`Lease::enter`]);
//! calls handed to the pool run one after the other, in order. Only the home thread hands calls over
//! and releases, so an idle lease stays idle until the home thread itself changes that: entering
//! needs no lock. The ticket goes back when the lease is released *and* nothing is inside any more.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Receiver;
use wasm_molt_lifecycle::Ticket;

use crate::error::{Error, ErrorCode, Result};
use crate::instance::interrupt::Stop;
use crate::instance::pool::Pool;
use crate::instance::replica::Replica;
use crate::manager::call::{CallJob, Queue, Seat};
use crate::manager::lending::HookScope;
use crate::manager::{Job, Shared};

const IDLE: u8 = 0;
const POOL_INSIDE: u8 = 1;
const RELEASED: u8 = 2;

/// An instance that its holder has for itself.
pub struct Lease {
    replica: Arc<Replica>,
    shared: Arc<Shared>,
    /// Serves a hook, under these terms.
    hook: Option<HookScope>,
    word: AtomicU8,
    /// How deep the home thread is inside. Home thread only.
    depth: AtomicU32,
    has_waiting: AtomicBool,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Default)]
struct State {
    ticket: Option<Ticket<Job>>,
    /// Runs its calls, and goes with the ticket; `None` for a hook's, which get threads of their own.
    pool: Option<Arc<Pool>>,
    is_released: bool,
    is_running: bool,
    next_id: u64,
    waiting: VecDeque<(u64, Box<CallJob>)>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease")
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

impl Lease {
    /// Held by whoever has the ticket.
    pub(crate) fn with_ticket(
        shared: &Arc<Shared>,
        replica: Arc<Replica>,
        pool: Arc<Pool>,
        ticket: Ticket<Job>,
    ) -> Arc<Self> {
        Self::new(shared, replica, Some((ticket, pool)), None)
    }

    /// Lent to a hook; nobody else can reach the instance.
    pub(crate) fn for_hook(
        shared: &Arc<Shared>,
        replica: Arc<Replica>,
        scope: &HookScope,
    ) -> Arc<Self> {
        Self::new(shared, replica, None, Some(scope.clone()))
    }

    fn new(
        shared: &Arc<Shared>,
        replica: Arc<Replica>,
        held: Option<(Ticket<Job>, Arc<Pool>)>,
        hook: Option<HookScope>,
    ) -> Arc<Self> {
        let (ticket, pool) = held.unzip();
        Arc::new(Self {
            replica,
            shared: Arc::clone(shared),
            hook,
            word: AtomicU8::new(IDLE),
            depth: AtomicU32::new(0),
            has_waiting: AtomicBool::new(false),
            state: Mutex::new(State {
                ticket,
                pool,
                ..State::default()
            }),
            freed: Condvar::new(),
        })
    }

    /// Disconnected once nobody waits any more for the hook that this lease was lent to; `None` for
    /// any other lease.
    pub fn cancelled(&self) -> Option<&Receiver<()>> {
        self.hook.as_ref().map(|hook| &hook.cancelled)
    }

    /// Whether that has happened.
    pub fn is_cancelled(&self) -> bool {
        self.hook.as_ref().is_some_and(HookScope::is_cancelled)
    }

    /// The instance. Entering it needs [`Lease::enter`].
    pub fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The lease has ended.
    pub fn is_released(&self) -> bool {
        self.word.load(Ordering::Acquire) == RELEASED
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The home thread goes inside; the instance is its own until the guard is dropped.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] after the release, [`ErrorCode::Busy`] while a pool thread is inside.
    #[inline]
    pub fn enter(self: &Arc<Self>) -> Result<LeaseInside> {
        let depth = self.depth.load(Ordering::Relaxed);
        match self.word.load(Ordering::Acquire) {
            IDLE => {}
            RELEASED => return Err(self.stale()),
            _ => return Err(self.busy()),
        }
        self.depth.store(depth + 1, Ordering::Relaxed);
        Ok(LeaseInside(Arc::clone(self)))
    }

    #[cold]
    fn busy(&self) -> Error {
        Error::new(
            ErrorCode::Busy,
            format!(
                "a pool thread is inside the leased instance of {}; await its call first",
                self.shared.name()
            ),
        )
    }

    /// The error of a lease whose instance did not survive a call.
    #[cold]
    pub fn poisoned(&self) -> Error {
        Error::new(
            ErrorCode::StaleHandle,
            format!(
                "the leased instance of {} has trapped and is replaced when the lease ends; \
                 release it and take a new one",
                self.shared.name()
            ),
        )
    }

    /// The error of a lease that has ended.
    #[cold]
    pub fn stale(&self) -> Error {
        Error::new(
            ErrorCode::StaleHandle,
            format!(
                "this lease on {} has ended; take a new one with use() or acquire()",
                self.shared.name()
            ),
        )
    }

    /// Hands a call to the pool; it runs after the ones handed over before. Home thread only.
    pub(crate) fn call(self: &Arc<Self>, job: Box<CallJob>) {
        if self.hook.as_ref().is_some_and(|hook| hook.is_sync) {
            let what = "call() of an instance needs an asynchronous hook; use its exports in a synchronous one";
            job.refuse(Error::new(ErrorCode::AsyncImport, what));
            return;
        }
        let mut state = self.lock();
        if state.is_released {
            drop(state);
            job.refuse(self.stale());
            return;
        }
        let max_queue = self.shared.options.max_queue;
        if state.waiting.len() >= max_queue {
            drop(state);
            job.refuse(self.shared.queue_full(max_queue));
            return;
        }
        state.next_id += 1;
        let id = state.next_id;
        if let Some(control) = &job.control {
            control.waits_in(Queue::Lease(Arc::downgrade(self), id));
        }
        let control = job.control.clone();
        state.waiting.push_back((id, job));
        self.has_waiting.store(true, Ordering::Relaxed);
        self.pump(state);
        // A stop that came before the call was in the queue has found nothing there.
        if let Some(control) = control {
            control.queued();
        }
    }

    /// Starts the next call, or gives the instance back, or leaves it idle.
    fn pump<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        // A call for which there is no thread makes room for the next one.
        while !self.pump_once(state) {
            state = self.lock();
            state.is_running = false;
        }
    }

    /// `false`: the call could not be started, and has been refused.
    fn pump_once<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) -> bool {
        if state.is_running || self.depth.load(Ordering::Relaxed) > 0 {
            return true;
        }
        if self.replica.is_poisoned() && !state.waiting.is_empty() {
            let _settling = self.shared.settling();
            let waiting = std::mem::take(&mut state.waiting);
            drop(state);
            for (_, job) in waiting {
                job.refuse(self.poisoned());
            }
            state = self.lock();
        }
        if let Some((_, job)) = state.waiting.pop_front() {
            state.is_running = true;
            if !state.is_released {
                self.word.store(POOL_INSIDE, Ordering::Release);
            }
            let pool = state.pool.clone();
            drop(state);
            let lease = Arc::clone(self);
            let run = move |started: Result<()>| match started {
                Ok(()) => {
                    let replica = Arc::clone(&lease.replica);
                    job.run(&replica, Seat::Lease(&lease));
                }
                Err(error) => {
                    let _settling = lease.shared.settling();
                    job.refuse(error);
                }
            };
            return match pool {
                Some(pool) => pool.spawn(run),
                // The pool may be taken by calls that wait for the very swap that waits for this hook.
                None => self.shared.spawn_or("hook", move |_, started| run(started)),
            };
        }
        self.has_waiting.store(false, Ordering::Relaxed);
        if !state.is_released {
            self.word.store(IDLE, Ordering::Release);
            return true;
        }
        let ticket = state.ticket.take();
        let pool = state.pool.take();
        drop(state);
        // A handle that JavaScript has not let go of must not keep the threads of a generation that is gone.
        drop(pool);
        self.freed.notify_all();
        if let Some(ticket) = ticket {
            let lost = self.shared.give_back(ticket, &self.replica);
            self.shared.repair_lost(lost);
        }
        true
    }

    /// A pool thread has left the guest.
    pub(crate) fn call_ended(self: &Arc<Self>) {
        let mut state = self.lock();
        state.is_running = false;
        self.pump(state);
    }

    /// Ends the lease. What was handed over already still runs. Idempotent; home thread only.
    pub fn release(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.is_released {
            return;
        }
        state.is_released = true;
        self.word.store(RELEASED, Ordering::Release);
        self.pump(state);
    }

    /// Refuses what was handed over and has not begun. Any thread.
    pub(crate) fn refuse_waiting(&self, why: &Stop) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        for (_, job) in waiting {
            let what = format!("{} (still waiting)", self.shared.name());
            job.refuse(why.clone().into_error(&what));
        }
    }

    /// Stops what runs, and refuses what waits, until the instance [resumes](Interrupter::resume). Any
    /// thread.
    ///
    /// [`Interrupter::resume`]: crate::instance::interrupt::Interrupter::resume
    pub(crate) fn cut(&self, why: &Stop) {
        self.replica.interrupter().halt(why.clone());
        self.refuse_waiting(why);
    }

    pub(crate) fn take_waiting(&self, id: u64) -> Option<Box<CallJob>> {
        let mut state = self.lock();
        let index = state
            .waiting
            .iter()
            .position(|(waiting, _)| *waiting == id)?;
        state.waiting.remove(index).map(|(_, job)| job)
    }

    /// Waits until a released lease has nothing inside any more.
    pub(crate) fn wait_free(&self) {
        let state = self.lock();
        let is_taken = |state: &mut State| {
            state.is_running || !state.waiting.is_empty() || self.depth.load(Ordering::Relaxed) > 0
        };
        drop(
            self.freed
                .wait_while(state, is_taken)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

/// The home thread is inside a leased instance.
#[derive(Debug)]
pub struct LeaseInside(Arc<Lease>);

impl LeaseInside {
    /// The instance.
    pub fn replica(&self) -> &Arc<Replica> {
        &self.0.replica
    }
}

impl Drop for LeaseInside {
    #[inline]
    fn drop(&mut self) {
        let lease = &self.0;
        let depth = lease.depth.load(Ordering::Relaxed) - 1;
        lease.depth.store(depth, Ordering::Relaxed);
        let has_more = lease.has_waiting.load(Ordering::Relaxed)
            || lease.word.load(Ordering::Relaxed) == RELEASED;
        if depth == 0 && has_more {
            lease.pump(lease.lock());
        }
    }
}
