//! The admission point in front of the slots.
//!
//! Why this is hard: slot 0 can be entered by one thread without a lock (see [`Home`]), while every
//! other thread admits, cancels, closes and drains under one; no waiter may be lost or started
//! twice, and none may run under the lock, because it may come back to the gate.
//!
//! * [`Gate`]: the shared handle.
//! * `State`: what the mutex guards; pure, in its own module.
//! * [`Waiter`], [`WaitId`]: who wants a slot, and its name in the queue.
//! * [`Admission`], [`Refused`], [`Refusal`]: the answers.
//! * [`Custody`]: a retired slot, and nobody else's.

use std::fmt;
use std::sync::PoisonError;
use std::time::Duration;

use crate::clock::{Clock, SystemClock};
use crate::home::Home;
use crate::start::start_all;
use crate::state::{Asker, Entry, Start, State};
use crate::sync::{Arc, AtomicU8, AtomicU64, Condvar, Mutex, Ordering, lock};
use crate::ticket::{Ticket, TicketId};

/// Something that wants a slot: a call, or a lease, which is a call that lasts.
pub trait Waiter: Send + Sized + 'static {
    /// Is called exactly once, when the waiter has got its slot; unless it was refused, cancelled
    /// or cut, or the last handle to the gate went while it was queued.
    ///
    /// Runs without the gate's lock, on whichever thread made it possible: the admitting one, the
    /// one that dropped the previous ticket, or the one that opened the gate. It should hand the
    /// work over rather than do it, for that thread has something else to do; and it may use the
    /// gate.
    ///
    /// Dropping the ticket in here starts the next waiter within this call, down to a small depth;
    /// deeper ones start when this one has returned. So it must not block until another waiter has
    /// run.
    ///
    /// # Panics
    ///
    /// It should not. If it does, its ticket is given back, the other waiters start, and the panic
    /// then goes on into the thread that is named above.
    fn start(self, ticket: Ticket<Self>);
}

/// How a gate is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateOptions {
    /// Number of slots, which is the number of replicas. At least 1; 0 counts as 1.
    pub slots: usize,
    /// How many waiters may queue. One that starts at once does not count. 0: nobody waits.
    pub max_queue: usize,
    /// Whether slot 0 may live [at home](Home).
    pub home: bool,
}

/// The name of a waiter in the queue. Never reused within a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaitId(u64);

/// How a waiter was let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// [`Waiter::start`] has been called.
    Started,
    /// It waits, and can be cancelled under this name.
    Queued(WaitId),
}

/// A waiter that was not let in, given back, with the reason.
pub struct Refused<W> {
    /// The waiter, never started.
    pub waiter: W,
    /// Why.
    pub refusal: Refusal,
}

impl<W> fmt::Debug for Refused<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused")
            .field("refusal", &self.refusal)
            .finish_non_exhaustive()
    }
}

/// Why a gate did not let a waiter in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// As many wait as may.
    QueueFull {
        /// The bound, as in [`GateOptions::max_queue`].
        max_queue: usize,
    },
    /// The gate admits nobody any more.
    Shut,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { max_queue } => {
                write!(
                    f,
                    "all slots are in use and {max_queue} waiters, the maximum, are queued"
                )
            }
            Self::Shut => f.write_str("the gate is shut"),
        }
    }
}

impl std::error::Error for Refusal {}

/// How many had not ended when the time was up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight(pub usize);

impl fmt::Display for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} still in flight", self.0)
    }
}

impl std::error::Error for InFlight {}

/// Plain numbers at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateCounts {
    /// Tickets that are out. [`Home::counts`] adds the home's own entry; [`Gate::counts`] sees that
    /// only once the gate has closed.
    pub in_flight: usize,
    /// Of which: tickets that were given out before the gate last rolled.
    pub stragglers: usize,
    /// Waiters that wait for a slot.
    pub queued: usize,
    /// All slots, retired ones too.
    pub slots: usize,
    /// Slots out of service.
    pub retired: usize,
    /// Whether slots are given out.
    pub is_open: bool,
    /// Whether nobody is admitted any more.
    pub is_shut: bool,
}

/// The value of the word while slot 0 is at home.
pub(crate) const AT_HOME: u8 = 1;
/// The value of the word while it is not.
pub(crate) const AWAY: u8 = 0;

/// The word that the home thread reads on its fast path.
///
/// Alone on its cache lines (two, because they are fetched in pairs): the mutex beside it is
/// written by every call on every thread, and would make the home's load miss each time.
#[repr(align(128))]
pub(crate) struct Word(pub(crate) AtomicU8);

pub(crate) struct Shared<W> {
    pub(crate) word: Word,
    state: Mutex<State<W>>,
    /// Signalled when something ended while a thread waits for that.
    ended: Condvar,
    next_id: AtomicU64,
}

/// Admits calls and leases to the slots, in arrival order, and keeps them out while a swap is at
/// work.
///
/// Clones are handles to the same gate; any thread may have one. A gate begins closed: nothing is
/// instantiated yet. **Closed** lets waiters queue, **shut** refuses them, for ever; the two are
/// independent, and a gate that is shut but open still starts those that wait (a graceful close).
///
/// # Who may do what
///
/// Every method may be called on any thread, with or without a home, but some know less than their
/// counterparts on [`Home`], because only the home thread can tell whether it is inside slot 0.
/// What they do to slot 0 while it is at home:
///
/// * [`admit`](Self::admit) leaves it there. Where no other slot is in service, the waiter queues
///   until the home thread comes by.
/// * [`close`](Self::close) and [`retire`](Self::retire) take it for in flight until the home
///   thread comes by.
/// * [`shut`](Self::shut) and [`cut`](Self::cut) leave it there. It is for the home's owner not to
///   enter any more.
///
/// The home thread *comes by* with any method of [`Home`] that takes the lock, which is all but
/// `enter`, `depth` and `gate`; and when it leaves slot 0 after something else has asked it to come
/// by on leaving.
///
/// # Memory ordering
///
/// All decisions are made under one mutex, which also orders what successive holders of a slot do
/// to its replica. The home's word is the only atomic that carries a decision; it is written under
/// the mutex, with `Release`.
///
/// # Example
///
/// ```
/// use std::sync::mpsc::{Sender, channel};
/// use wasm_molt_lifecycle::{Admission, Gate, GateOptions, InFlight, Ticket, Waiter};
///
/// /// A call that hands its ticket to a worker.
/// struct Call(Sender<Ticket<Call>>);
///
/// impl Waiter for Call {
///     fn start(self, ticket: Ticket<Self>) {
///         let Self(worker) = self;
///         let _ = worker.send(ticket);
///     }
/// }
///
/// let (worker, tickets) = channel();
/// let gate = Gate::new(GateOptions { slots: 1, max_queue: 8, home: false });
/// gate.open();
/// assert_eq!(gate.admit(Call(worker.clone())).unwrap(), Admission::Started);
/// let ticket = tickets.recv().unwrap();
///
/// // A swap: what is in flight ends, what comes meanwhile waits.
/// assert_eq!(gate.close(), 1);
/// assert!(matches!(gate.admit(Call(worker)), Ok(Admission::Queued(_))));
/// assert_eq!(gate.wait_drained(Some(std::time::Duration::ZERO)), Err(InFlight(1)));
/// drop(ticket);
/// gate.wait_drained(None).unwrap();
/// gate.open();
/// assert_eq!(tickets.recv().unwrap().slot(), 0);
/// ```
pub struct Gate<W: Waiter> {
    pub(crate) shared: Arc<Shared<W>>,
}

impl<W: Waiter> Clone for Gate<W> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<W: Waiter> fmt::Debug for Gate<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("counts", &self.counts())
            .finish()
    }
}

impl<W: Waiter> Gate<W> {
    /// A closed gate with all its slots free.
    pub fn new(options: GateOptions) -> Self {
        Self {
            shared: Arc::new(Shared {
                word: Word(AtomicU8::new(AWAY)),
                state: Mutex::new(State::new(&options)),
                ended: Condvar::new(),
                next_id: AtomicU64::new(1),
            }),
        }
    }

    /// The home of slot 0, for the calling thread. `None` if the gate was built without, or it has
    /// been taken.
    ///
    /// Until it is taken, and after it was dropped, slot 0 is a slot like any other.
    pub fn take_home(&self) -> Option<Home<W>> {
        self.locked(State::take_home)
            .then(|| Home::new(self.clone()))
    }

    /// A name for a waiter, ahead of its admission, so that whoever wants to cancel it knows it in
    /// time.
    pub fn reserve_id(&self) -> WaitId {
        // Only uniqueness matters.
        WaitId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Lets a waiter in: [starts](Waiter::start) it at once if a slot is free and nobody waits
    /// before it, else queues it.
    ///
    /// # Errors
    ///
    /// Gives the waiter back if the queue is full or the gate is shut.
    pub fn admit(&self, waiter: W) -> Result<Admission, Refused<W>> {
        self.admit_as(self.reserve_id(), waiter)
    }

    /// Like [`admit`](Self::admit), under a name from [`reserve_id`](Self::reserve_id), which is
    /// used once.
    ///
    /// A [`cancel`](Self::cancel) that came before this finds nothing: look at the call's own flag
    /// afterwards.
    ///
    /// # Errors
    ///
    /// Gives the waiter back if the queue is full or the gate is shut.
    pub fn admit_as(&self, id: WaitId, waiter: W) -> Result<Admission, Refused<W>> {
        match self.locked(|state| state.admit(id, waiter, Asker::Anyone))? {
            Entry::Start(start) => {
                self.start(Some(start));
                Ok(Admission::Started)
            }
            Entry::Queued => Ok(Admission::Queued(id)),
        }
    }

    /// Takes a waiter out of the queue. `None` if it has started, was taken out before, or is not
    /// here yet.
    ///
    /// # Cost
    ///
    /// O(log queued) to find it, O(queued) if names were reserved in another order than admitted;
    /// then moves the shorter side of the queue.
    pub fn cancel(&self, id: WaitId) -> Option<W> {
        self.locked(|state| state.cancel(id))
    }

    /// Opens the gate: starts as many waiters, in arrival order, as slots are free; slot 0 goes
    /// home if nobody waits.
    ///
    /// Does nothing to an open gate. A gate that is shut opens too, for those that wait already.
    pub fn open(&self) {
        let starts = self.locked(State::open);
        self.start(starts);
    }

    /// Closes the gate: no slot is given out until it opens again, and waiters queue. Returns how
    /// many are in flight now.
    ///
    /// If slot 0 is at home it is recalled, and counts as in flight until the home thread comes by;
    /// that thread itself calls [`Home::close`], which knows better.
    pub fn close(&self) -> usize {
        self.locked(State::close)
    }

    /// Hands every slot on to what replaces its replica, without waiting: tickets that are out become
    /// [stragglers](Self::stragglers) and stay in flight, and each slot, a retired one too, is free
    /// for the next waiter under a new [cohort](TicketId::cohort), which is returned.
    ///
    /// `None`, and nothing has happened, while slot 0 is at home: that is for
    /// [`Home::roll`](crate::Home::roll) to do.
    pub fn roll(&self) -> Option<u64> {
        self.roll_as(Asker::Anyone)
    }

    /// [Rolls](Self::roll) one slot alone: its ticket, if one is out, becomes a straggler, and the slot is
    /// free for the next waiter under the cohort that is returned.
    ///
    /// `None`, and nothing has happened, for slot 0 while it is at home: that is for
    /// [`Home::roll_slot`](crate::Home::roll_slot) to do.
    pub fn roll_slot(&self, slot: usize) -> Option<u64> {
        self.roll_slot_as(slot, Asker::Anyone)
    }

    pub(crate) fn roll_slot_as(&self, slot: usize, asker: Asker) -> Option<u64> {
        let roll = |state: &mut State<W>| Some((state.roll_slot(slot, asker)?, state.cohort()));
        let (starts, cohort) = self.locked(roll)?;
        self.start(starts);
        Some(cohort)
    }

    pub(crate) fn roll_as(&self, asker: Asker) -> Option<u64> {
        let (starts, cohort) = self.locked(|state| Some((state.roll(asker)?, state.cohort())))?;
        self.start(starts);
        Some(cohort)
    }

    /// Tickets that are still out from before the gate last rolled.
    pub fn stragglers(&self) -> Vec<TicketId> {
        self.locked(|state| state.stragglers().to_vec())
    }

    /// Blocks until fewer than `fewer_than` stragglers are left, or `give_up` says so when it is
    /// asked: at once, and whenever something ends or the gate is shut.
    ///
    /// # Errors
    ///
    /// After `timeout`, and if it gave up, with how many are left. `None` waits for ever.
    pub fn wait_stragglers(
        &self,
        fewer_than: usize,
        timeout: Option<Duration>,
        give_up: impl Fn() -> bool,
    ) -> Result<(), InFlight> {
        let too_many = |state: &mut State<W>| {
            let left = state.stragglers().len();
            if left < fewer_than { 0 } else { left }
        };
        self.wait_for_none(timeout, too_many, give_up)
    }

    /// The same for the stragglers of one slot, until there is none.
    ///
    /// # Errors
    ///
    /// After `timeout`, and if it gave up, with how many are left.
    pub fn wait_straggler(
        &self,
        slot: usize,
        timeout: Option<Duration>,
        give_up: impl Fn() -> bool,
    ) -> Result<(), InFlight> {
        let left = |state: &mut State<W>| {
            let of_slot = |straggler: &&TicketId| straggler.slot == slot;
            state.stragglers().iter().filter(of_slot).count()
        };
        self.wait_for_none(timeout, left, give_up)
    }

    /// Takes every waiter out of the queue, in arrival order; the gate goes on admitting.
    #[must_use = "the waiters have to be told"]
    pub fn take_waiting(&self) -> Vec<W> {
        self.locked(State::take_queue)
    }

    /// The slots that are out of service now: nobody is inside them.
    pub fn retired_slots(&self) -> Vec<usize> {
        self.locked(|state| state.retired_slots())
    }

    /// Takes a slot out of service that no ticket has: a hook left its instance in an unknown
    /// state.
    ///
    /// A slot at home retires when its thread next comes by or leaves it, and is in flight until
    /// then. Does nothing to a slot that a ticket has, whose holder [decides](Ticket::retire).
    pub fn retire(&self, slot: usize) {
        self.locked(|state| state.retire(slot));
    }

    /// Takes a slot out of service as soon as nobody has it: at once, or with the ticket that is out; at
    /// home, as [`retire`](Self::retire) does. Whoever waits is served by the others.
    ///
    /// [`spare`](Self::spare) and [`reinstate`](Self::reinstate) take that back; so does a [roll](Self::roll).
    pub fn withdraw(&self, slot: usize) {
        self.locked(|state| state.withdraw(slot));
    }

    /// Blocks until the slot is out of service, so that nobody is inside it, and takes it into
    /// [custody](Custody); or until `give_up` says so when it is asked: at once, and whenever something ends or
    /// the gate is shut or [asked again](Self::ask_again).
    ///
    /// # Errors
    ///
    /// After `timeout`, and if it gave up. The slot stays [withdrawn](Self::withdraw).
    pub fn wait_retired(
        &self,
        slot: usize,
        timeout: Option<Duration>,
        give_up: impl Fn() -> bool,
    ) -> Result<Custody<W>, InFlight> {
        let mut taken = None;
        let is_in_use = |state: &mut State<W>| {
            taken = state.take_custody(slot);
            usize::from(taken.is_none())
        };
        self.wait_for_none(timeout, is_in_use, give_up)?;
        let gate = self.clone();
        // Nobody waits any more without having taken it.
        let number = taken.unwrap_or_default();
        Ok(Custody { gate, slot, number })
    }

    /// Refuses every further admission, for ever. What already waits still runs when slots come
    /// free.
    pub fn shut(&self) {
        self.locked(State::shut);
        self.ask_again();
    }

    /// [Shuts](Self::shut) the gate and takes every waiter out of the queue, in arrival order.
    #[must_use = "the waiters have to be told"]
    pub fn cut(&self) -> Vec<W> {
        let cut = self.locked(|state| {
            state.shut();
            state.take_queue()
        });
        self.ask_again();
        cut
    }

    /// Has those who wait for the gate look again whether they want to give up. Also for a gate that
    /// was shut before: its owner may have had more to say since.
    pub fn ask_again(&self) {
        // Under the lock, so that nobody is between looking and waiting.
        let does_wake = self.locked(|state| state.drainers > 0);
        if does_wake {
            self.shared.ended.notify_all();
        }
    }

    /// Blocks until nothing is in flight: no ticket is out, and the home is not inside slot 0.
    ///
    /// In an open gate the home comes and goes unseen, and further waiters start; so close or shut
    /// it first, from home if there is one. Must not be called by a thread that holds a ticket or
    /// is inside.
    ///
    /// # Errors
    ///
    /// After `timeout`, with what is still in flight. `None` waits for ever, zero does not wait.
    pub fn wait_drained(&self, timeout: Option<Duration>) -> Result<(), InFlight> {
        self.wait_drained_unless(timeout, || false)
    }

    /// Blocks like [`wait_drained`](Self::wait_drained), unless `give_up` says so when it is asked: at
    /// once, and whenever something ends or the gate is shut.
    ///
    /// # Errors
    ///
    /// After `timeout`, and if it gave up, with what is still in flight.
    pub fn wait_drained_unless(
        &self,
        timeout: Option<Duration>,
        give_up: impl Fn() -> bool,
    ) -> Result<(), InFlight> {
        self.wait_for_none(timeout, |state| state.in_flight(), give_up)
    }

    /// Blocks like [`wait_drained`](Self::wait_drained), and until the queue is empty too.
    ///
    /// # Errors
    ///
    /// After `timeout`, with what is still in flight or queued.
    pub fn wait_idle(&self, timeout: Option<Duration>) -> Result<(), InFlight> {
        let remaining = |state: &mut State<W>| state.in_flight() + state.queued();
        self.wait_for_none(timeout, remaining, || false)
    }

    /// Puts a retired slot back into service, which starts the next waiter on it if the gate is
    /// open. Ends its [custody](Custody): whoever calls this knows that a fresh replica is there.
    ///
    /// Takes back that slot 0 retires when the home leaves it. Does nothing to any other slot that
    /// is not retired, or does not exist.
    pub fn reinstate(&self, slot: usize) {
        let starts = self.locked(|state| state.reinstate(slot));
        self.start(starts);
    }

    /// [Reinstates](Self::reinstate) a slot whose replica is the one that was there before, so that it does
    /// nothing while somebody may be inside of that: the slot is in [custody](Custody).
    pub fn spare(&self, slot: usize) {
        let starts = self.locked(|state| state.spare(slot));
        self.start(starts);
    }

    /// Puts every retired slot back into service: after a committed swap all replicas are fresh.
    pub fn reinstate_all(&self) {
        let starts = self.locked(State::reinstate_all);
        self.start(starts);
    }

    /// The counts at this moment. An entry of the home into slot 0 of an open gate is not seen from
    /// here.
    pub fn counts(&self) -> GateCounts {
        self.locked(|state| state.counts())
    }

    /// A ticket is gone.
    pub(crate) fn end(&self, id: TicketId, is_retired: bool) {
        let next = self.locked(|state| {
            if state.is_straggler(id) {
                state.straggler_gone(id);
                None
            } else if is_retired {
                state.retire_held(id.slot);
                None
            } else {
                state.give_back(id.slot)
            }
        });
        self.start(next);
    }

    /// Makes a decision under the lock, and tells those who depend on it: the home's word and the
    /// threads that wait.
    pub(crate) fn locked<R>(&self, decide: impl FnOnce(&mut State<W>) -> R) -> R {
        let mut state = lock(&self.shared.state);
        let stragglers = state.stragglers().len();
        let retired = state.retired();
        let decision = decide(&mut state);
        debug_assert!(state.is_consistent(), "the gate broke its invariants");
        if let Some(is_at_home) = state.take_news_for_home() {
            let word = if is_at_home { AT_HOME } else { AWAY };
            self.shared.word.0.store(word, Ordering::Release);
        }
        let is_one_gone = state.stragglers().len() < stragglers;
        let is_one_retired = state.retired() > retired;
        let does_wake =
            state.drainers > 0 && (is_one_gone || is_one_retired || state.in_flight() == 0);
        drop(state);
        if does_wake {
            self.shared.ended.notify_all();
        }
        decision
    }

    /// Starts waiters that the state has just given slots to. The lock must not be held.
    pub(crate) fn start(&self, starts: impl IntoIterator<Item = Start<W>>) {
        let give = |(waiter, id)| (waiter, Ticket::new(self.clone(), id));
        start_all(starts.into_iter().map(give));
    }

    fn wait_for_none(
        &self,
        timeout: Option<Duration>,
        mut remaining: impl FnMut(&mut State<W>) -> usize,
        give_up: impl Fn() -> bool,
    ) -> Result<(), InFlight> {
        let clock = SystemClock::default();
        let mut state = lock(&self.shared.state);
        state.drainers += 1;
        let outcome = loop {
            let count = remaining(&mut state);
            if count == 0 {
                break Ok(());
            }
            if give_up() {
                break Err(InFlight(count));
            }
            let ended = &self.shared.ended;
            state = match timeout.map(|timeout| timeout.saturating_sub(clock.now())) {
                None => ended.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break Err(InFlight(count)),
                Some(left) => {
                    ended
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        };
        state.drainers -= 1;
        outcome
    }
}

/// A retired slot in somebody's hands, who may be inside its replica: [sparing](Gate::spare) it does nothing.
///
/// Ends when the slot leaves retirement ([`Gate::reinstate`], [`Gate::reinstate_all`], a roll), for then
/// another replica is there; or with this, and the slot stays retired.
#[must_use = "dropping it ends the custody"]
pub struct Custody<W: Waiter> {
    gate: Gate<W>,
    slot: usize,
    number: u64,
}

impl<W: Waiter> Custody<W> {
    /// The number of the slot.
    pub fn slot(&self) -> usize {
        self.slot
    }
}

impl<W: Waiter> Drop for Custody<W> {
    fn drop(&mut self) {
        let end =
            |state: &mut State<W>| state.end_custody(self.slot, self.number) && state.drainers > 0;
        if self.gate.locked(end) {
            // It may be what somebody waits for.
            self.gate.shared.ended.notify_all();
        }
    }
}

impl<W: Waiter> fmt::Debug for Custody<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Custody")
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;
    use crate::testing::Bench;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn a_new_gate_is_closed_and_starts_its_queue_in_arrival_order_when_it_opens() {
        let bench = Bench::closed(GateOptions {
            slots: 2,
            max_queue: 8,
            home: false,
        });
        for number in 0..3 {
            bench.queue(number);
        }
        assert!(!bench.gate.counts().is_open);
        bench.gate.open();
        let first = bench.next(0);
        let second = bench.next(1);
        assert_ne!(first.slot(), second.slot());
        bench.assert_quiet();
        let slot = second.slot();
        drop(second);
        assert_eq!(
            bench.next(2).slot(),
            slot,
            "the freed slot goes to the next"
        );
    }

    #[test]
    fn no_slots_means_one() {
        let bench = Bench::closed(GateOptions {
            slots: 0,
            max_queue: 0,
            home: false,
        });
        bench.gate.open();
        assert_eq!(bench.hold(0).slot(), 0);
        assert_eq!(bench.gate.counts().slots, 1);
    }

    #[test]
    fn only_those_that_wait_count_towards_the_queue_s_bound() {
        let bench = Bench::closed(GateOptions {
            slots: 1,
            max_queue: 1,
            home: false,
        });
        bench.gate.open();
        let ticket = bench.hold(0);
        bench.queue(1);
        let refused = bench.admit(2).unwrap_err();
        assert_eq!(refused.refusal, Refusal::QueueFull { max_queue: 1 });
        assert_eq!(refused.waiter.number, 2);
        assert_eq!(
            refused.refusal.to_string(),
            "all slots are in use and 1 waiters, the maximum, are queued"
        );
        drop(ticket);
        let _ticket = bench.next(1);
        bench.queue(3);
    }

    #[test]
    fn a_retired_slot_stays_out_until_it_is_reinstated() {
        let bench = Bench::open(2);
        let (first, second) = (bench.hold(0), bench.hold(1));
        bench.queue(2);
        let slot = first.slot();
        first.retire();
        bench.assert_quiet();
        assert_eq!(
            bench.gate.counts(),
            GateCounts {
                in_flight: 1,
                stragglers: 0,
                queued: 1,
                slots: 2,
                retired: 1,
                is_open: true,
                is_shut: false
            }
        );
        bench.gate.close();
        bench.gate.open();
        bench.assert_quiet();
        bench.gate.reinstate(7);
        bench.gate.reinstate(second.slot());
        bench.assert_quiet();
        bench.gate.reinstate(slot);
        assert_eq!(bench.next(2).slot(), slot);
        drop(second);
    }

    #[test]
    fn all_slots_are_reinstated_at_once() {
        let bench = Bench::open(3);
        for ticket in [bench.hold(0), bench.hold(1), bench.hold(2)] {
            ticket.retire();
        }
        bench.gate.close();
        bench.queue(3);
        bench.queue(4);
        bench.gate.reinstate_all();
        bench.assert_quiet();
        bench.gate.open();
        let _tickets = (bench.next(3), bench.next(4));
        assert_eq!(bench.gate.counts().retired, 0);
    }

    #[test]
    fn any_slot_that_no_ticket_has_can_be_retired() {
        let bench = Bench::open(4);
        let held = bench.hold(0);
        for slot in 0..9 {
            bench.gate.retire(slot);
            bench.gate.retire(slot);
        }
        assert_eq!(bench.gate.counts().retired, 3);
        bench.queue(1);
        let slot = held.slot();
        drop(held);
        assert_eq!(bench.next(1).slot(), slot, "its holder did not retire it");
        bench.gate.reinstate_all();
        let _tickets = [bench.hold(2), bench.hold(3), bench.hold(4), bench.hold(5)];
        bench.assert_quiet();
    }

    #[test]
    fn a_gate_whose_queue_was_taken_goes_on_admitting() {
        let bench = Bench::open(1);
        bench.hold(0).retire();
        bench.queue(1);
        bench.queue(2);
        let taken: Vec<_> = bench
            .gate
            .take_waiting()
            .iter()
            .map(|call| call.number)
            .collect();
        assert_eq!(taken, [1, 2]);
        bench.queue(3);
        bench.gate.reinstate(0);
        drop(bench.next(3));
    }

    #[test]
    fn a_waiter_is_cancelled_once_and_only_while_it_waits() {
        let bench = Bench::open(1);
        let ticket = bench.hold(0);
        // Admitted in another order than reserved.
        let late = bench.gate.reserve_id();
        let ids = [bench.queue(1), bench.queue(2)];
        bench.gate.admit_as(late, bench.call(3)).unwrap();
        assert_eq!(bench.gate.cancel(late).unwrap().number, 3);
        assert!(bench.gate.cancel(late).is_none());
        assert_eq!(bench.gate.cancel(ids[0]).unwrap().number, 1);
        drop(ticket);
        let _ticket = bench.next(2);
        assert!(bench.gate.cancel(ids[1]).is_none(), "it has started");
        assert!(
            bench.gate.cancel(bench.gate.reserve_id()).is_none(),
            "it never came"
        );
    }

    #[test]
    fn a_shut_gate_refuses_but_runs_what_waits() {
        let bench = Bench::open(1);
        let ticket = bench.hold(0);
        bench.queue(1);
        bench.gate.shut();
        assert_eq!(bench.admit(2).unwrap_err().refusal, Refusal::Shut);
        assert_eq!(bench.gate.wait_idle(NOW), Err(InFlight(2)));
        drop(ticket);
        drop(bench.next(1));
        assert_eq!(bench.gate.wait_idle(NOW), Ok(()));
        bench.gate.close();
        bench.gate.open();
        assert_eq!(bench.admit(3).unwrap_err().refusal, Refusal::Shut);
    }

    #[test]
    fn a_cut_gives_the_waiters_back_in_arrival_order() {
        let bench = Bench::open(1);
        let ticket = bench.hold(0);
        bench.queue(1);
        bench.queue(2);
        let cut: Vec<_> = bench.gate.cut().iter().map(|call| call.number).collect();
        assert_eq!(cut, [1, 2]);
        assert!(bench.gate.cut().is_empty());
        drop(ticket);
        bench.assert_quiet();
        assert_eq!(bench.gate.wait_idle(NOW), Ok(()));
    }

    #[test]
    fn a_drain_ends_with_the_last_ticket_wherever_that_is_dropped() {
        let bench = Bench::open(2);
        let tickets = [bench.hold(0), bench.hold(1)];
        assert_eq!(bench.gate.close(), 2);
        assert_eq!(bench.gate.wait_drained(NOW), Err(InFlight(2)));
        let timeout = Some(Duration::from_millis(1));
        assert_eq!(bench.gate.wait_drained(timeout), Err(InFlight(2)));
        let worker = thread::spawn(move || drop(tickets));
        bench.gate.wait_drained(None).unwrap();
        bench.gate.wait_drained(Some(Duration::MAX)).unwrap();
        worker.join().unwrap();
    }

    #[test]
    fn idle_means_that_nobody_waits_either() {
        let bench = Bench::open(1);
        bench.gate.close();
        let id = bench.queue(0);
        assert_eq!(bench.gate.wait_drained(NOW), Ok(()));
        assert_eq!(bench.gate.wait_idle(NOW), Err(InFlight(1)));
        let idle = {
            let gate = bench.gate.clone();
            thread::spawn(move || gate.wait_idle(None))
        };
        drop(bench.gate.cancel(id));
        idle.join().unwrap().unwrap();
    }

    #[test]
    fn a_ticket_is_given_back_by_a_call_that_panics() {
        let bench = Bench::open(1);
        let ticket = bench.hold(0);
        bench.queue(1);
        let outcome = catch_unwind(AssertUnwindSafe(move || {
            let _ticket = ticket;
            std::panic::resume_unwind(Box::new("trap"));
        }));
        assert!(outcome.is_err());
        drop(bench.next(1));
        assert_eq!(bench.gate.counts().in_flight, 0);
    }

    /// Ends as it starts; one of them by a panic.
    struct Brief {
        starts: Arc<AtomicUsize>,
        does_panic: bool,
    }

    impl Waiter for Brief {
        fn start(self, ticket: Ticket<Self>) {
            self.starts.fetch_add(1, Ordering::Relaxed);
            if self.does_panic {
                std::panic::resume_unwind(Box::new("start"));
            }
            drop(ticket);
        }
    }

    fn queue_brief(gate: &Gate<Brief>, count: usize, panics: &[usize]) -> Arc<AtomicUsize> {
        let starts = Arc::<AtomicUsize>::default();
        for index in 0..count {
            let does_panic = panics.contains(&index);
            gate.admit(Brief {
                starts: Arc::clone(&starts),
                does_panic,
            })
            .unwrap();
        }
        starts
    }

    #[test]
    fn a_queue_of_any_length_starts_on_a_small_stack() {
        const QUEUED: usize = 100_000;
        let worker = thread::Builder::new().stack_size(128 * 1024).spawn(|| {
            let gate = Gate::new(GateOptions {
                slots: 1,
                max_queue: QUEUED,
                home: false,
            });
            let starts = queue_brief(&gate, QUEUED, &[]);
            gate.open();
            assert_eq!(starts.load(Ordering::Relaxed), QUEUED);
            assert_eq!(gate.counts().in_flight, 0);
        });
        worker.unwrap().join().unwrap();
    }

    #[test]
    fn a_waiter_that_panics_keeps_no_other_from_starting() {
        // At the top, nested, and so deep that it was deferred.
        for panics in [&[0][..], &[3], &[50], &[0, 3, 50, 99]] {
            for slots in [1, 4] {
                let gate = Gate::new(GateOptions {
                    slots,
                    max_queue: 100,
                    home: false,
                });
                let starts = queue_brief(&gate, 100, panics);
                let outcome = catch_unwind(AssertUnwindSafe(|| gate.open()));
                let payload = outcome.unwrap_err().downcast::<&str>().unwrap();
                assert_eq!(*payload, "start");
                assert_eq!(starts.load(Ordering::Relaxed), 100);
                assert_eq!(gate.counts().in_flight, 0);
            }
        }
    }

    #[test]
    fn a_panic_of_a_waiter_does_not_meet_another_on_its_way() {
        let gate = Gate::new(GateOptions {
            slots: 1,
            max_queue: 8,
            home: false,
        });
        let starts = queue_brief(&gate, 2, &[0, 1]);
        // The second starts while the first unwinds.
        assert!(catch_unwind(AssertUnwindSafe(|| gate.open())).is_err());
        assert_eq!(starts.load(Ordering::Relaxed), 2);
        assert_eq!(gate.counts().in_flight, 0);
    }

    /// Comes back to the gate as it starts.
    struct Reentrant(Gate<Reentrant>, u32);

    impl Waiter for Reentrant {
        fn start(self, ticket: Ticket<Self>) {
            let Self(gate, left) = self;
            if left > 0 {
                let again = Self(gate.clone(), left - 1);
                assert!(matches!(gate.admit(again).unwrap(), Admission::Queued(_)));
            }
            assert_eq!(gate.counts().in_flight, 1);
            drop(ticket);
        }
    }

    #[test]
    fn a_waiter_may_use_the_gate_as_it_starts() {
        let gate = Gate::new(GateOptions {
            slots: 1,
            max_queue: 1,
            home: false,
        });
        gate.open();
        gate.admit(Reentrant(gate.clone(), 40)).unwrap();
        assert_eq!(gate.wait_idle(NOW), Ok(()));
    }

    fn slots(tickets: &[TicketId]) -> Vec<(u64, usize)> {
        tickets.iter().map(|id| (id.cohort, id.slot)).collect()
    }

    #[test]
    fn a_roll_leaves_tickets_behind_and_hands_every_slot_on() {
        let bench = Bench::open(2);
        let old = [bench.hold(0), bench.hold(1)];
        for number in 2..5 {
            bench.queue(number);
        }
        assert_eq!(bench.gate.roll(), Some(1));
        let new = [bench.next(2), bench.next(3)];
        bench.assert_quiet();
        assert_ne!(new[0].slot(), new[1].slot());
        assert!(new.iter().all(|ticket| ticket.id().cohort == 1));
        assert_eq!(slots(&bench.gate.stragglers()), [(0, 0), (0, 1)]);
        let counts = bench.gate.counts();
        assert_eq!((counts.in_flight, counts.stragglers), (4, 2));

        let [first, second] = old;
        let left = second.id();
        drop(first);
        bench.assert_quiet();
        assert_eq!(
            bench.gate.stragglers(),
            [left],
            "a straggler's slot is not its own"
        );
        drop(new);
        drop(bench.next(4));
        drop(second);
        let counts = bench.gate.counts();
        assert_eq!((counts.in_flight, counts.stragglers), (0, 0));
    }

    #[test]
    fn a_roll_puts_retired_slots_back_into_service() {
        let bench = Bench::open(3);
        let (held, retired) = (bench.hold(0), bench.hold(1));
        retired.retire();
        bench.gate.retire(0);
        bench.queue(2);
        bench.queue(3);
        bench.queue(4);
        assert_eq!(bench.gate.counts().retired, 2);
        assert_eq!(bench.gate.roll(), Some(1));
        drop([bench.next(2), bench.next(3), bench.next(4)]);
        assert_eq!(bench.gate.counts().retired, 0);
        drop(held);
    }

    #[test]
    fn a_straggler_has_nothing_to_retire() {
        let bench = Bench::open(1);
        let old = bench.hold(0);
        bench.gate.roll().unwrap();
        let new = bench.hold(1);
        bench.queue(2);
        old.retire();
        assert_eq!(bench.gate.counts().retired, 0);
        bench.assert_quiet();
        drop(new);
        drop(bench.next(2));
    }

    #[test]
    fn a_closed_gate_rolls_and_a_drain_waits_for_those_left_behind() {
        let bench = Bench::open(1);
        let first = bench.hold(0);
        assert_eq!(bench.gate.roll(), Some(1));
        let second = bench.hold(1);
        assert_eq!(bench.gate.close(), 2);
        bench.queue(2);
        assert_eq!(bench.gate.roll(), Some(2));
        bench.assert_quiet();
        assert_eq!(slots(&bench.gate.stragglers()), [(0, 0), (1, 0)]);
        assert_eq!(bench.gate.wait_drained(NOW), Err(InFlight(2)));
        drop(second);
        assert_eq!(slots(&bench.gate.stragglers()), [(0, 0)]);
        let worker = thread::spawn(move || drop(first));
        bench.gate.wait_drained(None).unwrap();
        worker.join().unwrap();
        bench.gate.open();
        assert_eq!(bench.next(2).id().cohort, 2);
    }

    #[test]
    fn a_shut_gate_rolls_for_those_who_wait() {
        let bench = Bench::open(1);
        let old = bench.hold(0);
        bench.queue(1);
        bench.gate.shut();
        assert_eq!(bench.gate.roll(), Some(1));
        drop(bench.next(1));
        assert_eq!(bench.gate.wait_idle(NOW), Err(InFlight(1)));
        drop(old);
        assert_eq!(bench.gate.wait_idle(NOW), Ok(()));
    }

    #[test]
    fn stragglers_are_waited_for_down_to_a_number() {
        let bench = Bench::open(2);
        let (first, second) = (bench.hold(0), bench.hold(1));
        let wait = |fewer_than| bench.gate.wait_stragglers(fewer_than, NOW, || false);
        assert_eq!(
            wait(1),
            Ok(()),
            "what is in flight on this generation does not count"
        );
        bench.gate.roll().unwrap();
        let new = bench.hold(2);
        assert_eq!((wait(3), wait(2)), (Ok(()), Err(InFlight(2))));
        let timeout = Some(Duration::from_millis(1));
        assert_eq!(
            bench.gate.wait_stragglers(1, timeout, || false),
            Err(InFlight(2))
        );
        drop(first);
        assert_eq!((wait(2), wait(1)), (Ok(()), Err(InFlight(1))));
        let worker = thread::spawn(move || drop(second));
        bench.gate.wait_stragglers(1, None, || false).unwrap();
        worker.join().unwrap();
        drop(new);
    }

    /// Until a thread waits for `gate`: it has asked once whether to give up.
    fn wait_for_a_drainer(gate: &Gate<crate::testing::Call>) {
        while lock(&gate.shared.state).drainers == 0 {
            thread::yield_now();
        }
    }

    #[test]
    fn who_drains_is_asked_again_when_the_gate_is_shut_or_cut() {
        type Wait = fn(&Gate<crate::testing::Call>, &AtomicUsize) -> Result<(), InFlight>;
        let waits: [Wait; 2] = [
            |gate, given_up| gate.wait_drained_unless(None, || given_up.load(Ordering::SeqCst) > 0),
            |gate, given_up| gate.wait_stragglers(1, None, || given_up.load(Ordering::SeqCst) > 0),
        ];
        let ends: [fn(&Gate<crate::testing::Call>); 3] = [
            |gate| gate.shut(),
            // Its owner may have had more to say since it was shut.
            |gate| {
                gate.shut();
                gate.shut();
            },
            |gate| assert!(gate.cut().is_empty()),
        ];
        for wait in waits {
            for end in ends {
                let bench = Bench::open(1);
                let ticket = bench.hold(0);
                bench.gate.roll().unwrap();
                let given_up = Arc::<AtomicUsize>::default();
                let drainer = {
                    let (gate, given_up) = (bench.gate.clone(), Arc::clone(&given_up));
                    thread::spawn(move || wait(&gate, &given_up))
                };
                wait_for_a_drainer(&bench.gate);
                given_up.store(1, Ordering::SeqCst);
                end(&bench.gate);
                assert_eq!(drainer.join().unwrap(), Err(InFlight(1)));
                drop(ticket);
            }
        }
    }

    #[test]
    fn who_gives_up_at_once_still_hears_that_nothing_is_left() {
        let bench = Bench::open(1);
        assert_eq!(bench.gate.wait_drained_unless(None, || true), Ok(()));
        assert_eq!(bench.gate.wait_stragglers(1, None, || true), Ok(()));
        let ticket = bench.hold(0);
        let gave_up = Err(InFlight(1));
        assert_eq!(bench.gate.wait_drained_unless(None, || true), gave_up);
        bench.gate.roll().unwrap();
        assert_eq!(bench.gate.wait_stragglers(1, None, || true), gave_up);
        drop(ticket);
    }

    #[test]
    fn what_crosses_threads_may_do_so() {
        fn is_shared<T: Send + Sync>() {}
        fn is_sent<T: Send>() {}
        is_shared::<Gate<crate::testing::Call>>();
        is_sent::<Ticket<crate::testing::Call>>();
    }
}
