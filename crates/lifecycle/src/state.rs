//! The gate's state: everything that is decided under its mutex, and nothing else.
//!
//! No threads, no blocking and no foreign code in here; [`gate`](crate::gate) adds those. Every
//! method leaves the invariants true:
//!
//! 1. Open and somebody queued: no slot is `Free`. (A slot that came free has been handed on.)
//! 2. Slot 0 is `AtHome`, `Recalled` or `Inside` only while the home lives.
//! 3. Open, not shut and the home lives: slot 0 is not `Free`. (It went home.)
//! 4. `held` counts the slots that are `Held`, `Recalled` or `Inside`, `retired` the retired.
//! 5. `free` holds exactly the `Free` slots other than slot 0.
//! 6. The home is retiring only while slot 0 is `Recalled` or `Inside`; open and `Recalled`: only
//!    while it is retiring.
//! 7. Stragglers are of earlier cohorts than their slot's present one, and each is there once.
//! 8. Only a slot that is `Held` is withdrawing.
//! 9. Only a slot that is `Retired` is in somebody's custody.

use std::collections::VecDeque;
use std::ops::Range;

use crate::gate::{GateCounts, GateOptions, Refusal, Refused, WaitId};
use crate::ticket::TicketId;

/// What a slot is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Nobody has it, and anybody may.
    Free,
    /// A ticket has it.
    Held,
    /// Slot 0 only: the home thread owns it and may be inside or not. Only that thread knows.
    AtHome,
    /// Slot 0 only: taken from home by another thread. Whether the home is inside will be known
    /// when its thread next comes by.
    Recalled,
    /// Slot 0 only: the home thread is inside, and takes the slow path when it leaves.
    Inside,
    /// Out of service until it is reinstated.
    Retired,
}

impl Slot {
    const fn is_in_flight(self) -> bool {
        matches!(self, Self::Held | Self::Recalled | Self::Inside)
    }
}

/// There is at most one home handle in the life of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HomeLife {
    /// It can be taken.
    Offered,
    /// A thread has it.
    Living,
    /// Likewise, and slot 0 leaves service as soon as that thread is known not to be inside.
    Retiring,
    /// It is gone, or never was.
    Over,
}

/// Whether the home thread is inside slot 0, as told by that thread itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HomeIs {
    Inside,
    Outside,
}

/// Who asks for admission, which decides whether slot 0 may be taken from home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    /// Some thread: what is at home stays there.
    Anyone,
    /// The home thread: it may give up its slot, now or when it leaves it.
    Home(HomeIs),
}

/// A waiter and the ticket that it gets.
pub(crate) type Start<W> = (W, TicketId);

/// What became of a waiter that was let in.
pub(crate) enum Entry<W> {
    Start(Start<W>),
    Queued,
}

pub(crate) struct State<W> {
    slots: Vec<Slot>,
    /// A stack, so that the slot used last, whose memory is warm, is used next.
    free: Vec<usize>,
    queue: VecDeque<(WaitId, W)>,
    max_queue: usize,
    held: usize,
    retired: usize,
    /// Goes up with each roll, of all slots or of one.
    cohort: u64,
    /// By slot: that of the roll which it had last. A ticket is of the cohort in which it was given out.
    cohorts: Vec<u64>,
    /// By slot: it leaves service with the ticket that is out.
    withdrawing: Vec<bool>,
    /// By slot: the number of the custody in which it is.
    custodies: Vec<Option<u64>>,
    /// Goes up with each custody.
    last_custody: u64,
    /// Tickets of earlier cohorts that are still out, oldest first.
    stragglers: Vec<TicketId>,
    is_open: bool,
    is_shut: bool,
    home: HomeLife,
    /// What the home's word says. Kept here rather than read back from the word: a load that is not
    /// needed would hide interleavings from loom (tokio-rs/loom#166).
    does_word_say_at_home: bool,
    /// Threads that wait for the gate to drain. With none there is nobody to wake.
    pub(crate) drainers: usize,
}

impl<W> State<W> {
    pub(crate) fn new(options: &GateOptions) -> Self {
        let slots = options.slots.max(1);
        Self {
            slots: vec![Slot::Free; slots],
            free: (1..slots).rev().collect(),
            queue: VecDeque::new(),
            max_queue: options.max_queue,
            held: 0,
            retired: 0,
            cohort: 0,
            cohorts: vec![0; slots],
            withdrawing: vec![false; slots],
            custodies: vec![None; slots],
            last_custody: 0,
            stragglers: Vec::new(),
            is_open: false,
            is_shut: false,
            home: if options.home {
                HomeLife::Offered
            } else {
                HomeLife::Over
            },
            does_word_say_at_home: false,
            drainers: 0,
        }
    }

    /// Whether slot 0 is at home now, if the home's word says otherwise; from then on it does not.
    ///
    /// Most decisions do not concern it, and a store that changes nothing would cost the home
    /// thread its cache line.
    pub(crate) fn take_news_for_home(&mut self) -> Option<bool> {
        let is_at_home = self.is_at_home();
        let said = std::mem::replace(&mut self.does_word_say_at_home, is_at_home);
        (said != is_at_home).then_some(is_at_home)
    }

    pub(crate) fn is_at_home(&self) -> bool {
        self.home_slot() == Slot::AtHome
    }

    pub(crate) fn home_slot(&self) -> Slot {
        self.slots.first().copied().unwrap_or(Slot::Retired)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.is_open
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.is_shut
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.held + self.stragglers.len()
    }

    pub(crate) fn cohort(&self) -> u64 {
        self.cohort
    }

    /// Whether the ticket was given out before its slot last rolled.
    pub(crate) fn is_straggler(&self, id: TicketId) -> bool {
        self.cohorts.get(id.slot) != Some(&id.cohort)
    }

    fn is_retired(&self, slot: usize) -> bool {
        self.slots.get(slot) == Some(&Slot::Retired)
    }

    /// Takes a retired slot into custody, unless it is in one already.
    pub(crate) fn take_custody(&mut self, slot: usize) -> Option<u64> {
        let is_retired = self.is_retired(slot);
        let place = self.custodies.get_mut(slot)?;
        if !is_retired || place.is_some() {
            return None;
        }
        self.last_custody += 1;
        *place = Some(self.last_custody);
        *place
    }

    /// Tells whether that was still its custody.
    pub(crate) fn end_custody(&mut self, slot: usize, custody: u64) -> bool {
        let place = self.custodies.get_mut(slot);
        place.is_some_and(|place| place.take_if(|number| *number == custody).is_some())
    }

    fn is_in_custody(&self, slot: usize) -> bool {
        matches!(self.custodies.get(slot), Some(Some(_)))
    }

    pub(crate) fn retired(&self) -> usize {
        self.retired
    }

    pub(crate) fn stragglers(&self) -> &[TicketId] {
        &self.stragglers
    }

    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn counts(&self) -> GateCounts {
        GateCounts {
            in_flight: self.in_flight(),
            stragglers: self.stragglers.len(),
            queued: self.queue.len(),
            slots: self.slots.len(),
            retired: self.retired,
            is_open: self.is_open,
            is_shut: self.is_shut,
        }
    }

    /// Lets a waiter in: onto a slot if nobody waits before it, else into the queue.
    pub(crate) fn admit(
        &mut self,
        id: WaitId,
        waiter: W,
        asker: Asker,
    ) -> Result<Entry<W>, Refused<W>> {
        if self.is_shut {
            return Err(Refused {
                waiter,
                refusal: Refusal::Shut,
            });
        }
        if self.is_open
            && self.queue.is_empty()
            && let Some(slot) = self.claim(asker)
        {
            return Ok(Entry::Start((waiter, self.ticket(slot))));
        }
        if self.queue.len() >= self.max_queue {
            let refusal = Refusal::QueueFull {
                max_queue: self.max_queue,
            };
            return Err(Refused { waiter, refusal });
        }
        self.queue.push_back((id, waiter));
        if asker == Asker::Home(HomeIs::Inside) && self.is_at_home() {
            // Makes the home thread come by when it leaves, and hand its slot on.
            self.set(0, Slot::Inside);
        }
        Ok(Entry::Queued)
    }

    /// Takes a waiter out of the queue.
    pub(crate) fn cancel(&mut self, id: WaitId) -> Option<W> {
        // Identities are mostly handed out and admitted in the same order; when they were not, look
        // at each.
        let position = match self
            .queue
            .binary_search_by_key(&id, |(waiting, _)| *waiting)
        {
            Ok(position) => position,
            Err(_) => self.queue.iter().position(|(waiting, _)| *waiting == id)?,
        };
        self.queue.remove(position).map(|(_, waiter)| waiter)
    }

    /// Opens the gate. Returns who may start now, in arrival order.
    pub(crate) fn open(&mut self) -> Vec<Start<W>> {
        self.is_open = true;
        if self.home != HomeLife::Retiring {
            self.stay_home();
        }
        let starts = self.serve(Asker::Anyone);
        self.send_home();
        starts
    }

    /// Closes the gate from any thread. Returns how many are in flight.
    pub(crate) fn close(&mut self) -> usize {
        self.is_open = false;
        if self.is_at_home() {
            self.set(0, Slot::Recalled);
        }
        self.in_flight()
    }

    /// Closes the gate from the home thread, which can say whether it is inside. Returns how many
    /// are in flight.
    pub(crate) fn close_from_home(&mut self, home: HomeIs) -> usize {
        self.is_open = false;
        self.leave_home(home);
        self.in_flight()
    }

    /// Gives every slot a new user-to-be: tickets that are out become stragglers, and all slots are
    /// in service. Returns who may start now; `None` if slot 0 is, or may be, in use by the home.
    pub(crate) fn roll(&mut self, asker: Asker) -> Option<Vec<Start<W>>> {
        self.roll_slots(0..self.slots.len(), asker)
    }

    /// The same for one slot.
    pub(crate) fn roll_slot(&mut self, slot: usize, asker: Asker) -> Option<Vec<Start<W>>> {
        self.roll_slots(slot..slot + 1, asker)
    }

    fn roll_slots(&mut self, slots: Range<usize>, asker: Asker) -> Option<Vec<Start<W>>> {
        if slots.contains(&0) {
            match (self.home_slot(), asker) {
                (_, Asker::Home(HomeIs::Inside))
                | (Slot::AtHome | Slot::Recalled | Slot::Inside, Asker::Anyone) => return None,
                (_, Asker::Home(home)) => self.meet_home(home),
                (_, Asker::Anyone) => {}
            }
        }
        self.cohort += 1;
        for slot in slots {
            match self.slots.get(slot) {
                Some(Slot::Held) => {
                    self.stragglers.push(self.ticket(slot));
                    self.set(slot, Slot::Free);
                }
                Some(Slot::Retired) => self.set(slot, Slot::Free),
                _ => {}
            }
            if let Some(cohort) = self.cohorts.get_mut(slot) {
                *cohort = self.cohort;
            }
        }
        Some(self.settle())
    }

    /// A ticket of an earlier cohort is gone; its slot has long been somebody else's.
    pub(crate) fn straggler_gone(&mut self, gone: TicketId) {
        self.stragglers.retain(|straggler| *straggler != gone);
    }

    pub(crate) fn shut(&mut self) {
        self.is_shut = true;
    }

    /// Shuts the gate from the home thread: slot 0 does not go home again, but serves who still
    /// waits.
    pub(crate) fn shut_from_home(&mut self, home: HomeIs) -> Vec<Start<W>> {
        self.is_shut = true;
        self.leave_home(home);
        self.serve(Asker::Anyone)
    }

    pub(crate) fn retired_slots(&self) -> Vec<usize> {
        let is_retired = |(slot, is): (usize, &Slot)| (*is == Slot::Retired).then_some(slot);
        self.slots
            .iter()
            .enumerate()
            .filter_map(is_retired)
            .collect()
    }

    /// Empties the queue, oldest first.
    pub(crate) fn take_queue(&mut self) -> Vec<W> {
        std::mem::take(&mut self.queue)
            .into_iter()
            .map(|(_, waiter)| waiter)
            .collect()
    }

    /// Takes back a slot whose ticket is gone. Returns who has it next.
    pub(crate) fn give_back(&mut self, slot: usize) -> Option<Start<W>> {
        if self.withdrawing.get(slot) == Some(&true) {
            self.set(slot, Slot::Retired);
            return None;
        }
        if self.is_open
            && let Some((_, waiter)) = self.queue.pop_front()
        {
            self.set(slot, Slot::Held);
            return Some((waiter, self.ticket(slot)));
        }
        self.set(slot, Slot::Free);
        self.send_home();
        None
    }

    /// Takes a slot out of service with its ticket.
    pub(crate) fn retire_held(&mut self, slot: usize) {
        self.set(slot, Slot::Retired);
    }

    /// Takes a slot out of service that no ticket has; at home, as soon as nobody is inside.
    pub(crate) fn retire(&mut self, slot: usize) {
        match self.slots.get(slot) {
            Some(Slot::Free) => {
                if let Some(place) = self.free.iter().position(|free| *free == slot) {
                    // To the top, where `set` takes it from.
                    let slot = self.free.remove(place);
                    self.free.push(slot);
                }
                self.set(slot, Slot::Retired);
            }
            Some(Slot::AtHome) => {
                self.home = HomeLife::Retiring;
                self.set(slot, Slot::Recalled);
            }
            Some(Slot::Recalled | Slot::Inside) => self.home = HomeLife::Retiring,
            Some(Slot::Held | Slot::Retired) | None => {}
        }
    }

    /// Takes a slot out of service as soon as nobody has it: now, or with the ticket that is out.
    pub(crate) fn withdraw(&mut self, slot: usize) {
        match (self.slots.get(slot), self.withdrawing.get_mut(slot)) {
            (Some(Slot::Held), Some(is_withdrawing)) => *is_withdrawing = true,
            _ => self.retire(slot),
        }
    }

    /// Takes slot 0 out of service once the home thread, which is inside, has left it.
    pub(crate) fn retire_inside(&mut self) {
        self.leave_home(HomeIs::Inside);
        self.home = HomeLife::Retiring;
    }

    /// Puts a retired slot back into service, or takes back that it will retire; any other stays as
    /// it is. Returns who may start now.
    pub(crate) fn reinstate(&mut self, slot: usize) -> Vec<Start<W>> {
        if let Some(is_withdrawing) = self.withdrawing.get_mut(slot) {
            *is_withdrawing = false;
        }
        self.free_retired(slot);
        self.settle()
    }

    /// The same, but for a slot that is in somebody's custody.
    pub(crate) fn spare(&mut self, slot: usize) -> Vec<Start<W>> {
        if self.is_in_custody(slot) {
            return Vec::new();
        }
        self.reinstate(slot)
    }

    /// Puts every retired slot back into service. Returns who may start now.
    pub(crate) fn reinstate_all(&mut self) -> Vec<Start<W>> {
        for slot in 0..self.slots.len() {
            self.free_retired(slot);
        }
        self.settle()
    }

    /// Gives the home to whoever asks first. Slot 0 goes there at once if it is free in an open
    /// gate.
    pub(crate) fn take_home(&mut self) -> bool {
        if self.home != HomeLife::Offered {
            return false;
        }
        self.home = HomeLife::Living;
        self.send_home();
        true
    }

    /// The home thread comes by: what another thread recalled is now known to be in use or not.
    pub(crate) fn meet_home(&mut self, home: HomeIs) {
        if self.home_slot() == Slot::Recalled {
            self.leave_home(home);
        }
    }

    /// The home thread comes by while waiters may be queued that no other thread can start. Returns
    /// who may start now.
    pub(crate) fn serve_from_home(&mut self, home: HomeIs) -> Vec<Start<W>> {
        self.meet_home(home);
        let starts = self.serve(Asker::Home(home));
        if home == HomeIs::Inside && !self.queue.is_empty() && self.is_open && self.is_at_home() {
            self.set(0, Slot::Inside);
        }
        starts
    }

    /// The home thread left slot 0 and found that it is not at home any more. Returns who has it
    /// next.
    pub(crate) fn leave_inside(&mut self) -> Option<Start<W>> {
        // `AtHome` if it was recalled, and sent home again between the look at the word and the
        // lock.
        debug_assert!(matches!(
            self.home_slot(),
            Slot::Inside | Slot::Recalled | Slot::AtHome
        ));
        if self.take_retiring() {
            self.set(0, Slot::Retired);
            return None;
        }
        self.give_back(0)
    }

    /// The home is gone: slot 0 is a slot like any other. Returns who may start now.
    pub(crate) fn drop_home(&mut self, home: HomeIs) -> Vec<Start<W>> {
        let was_retiring = self.take_retiring();
        self.home = HomeLife::Over;
        if matches!(
            self.home_slot(),
            Slot::AtHome | Slot::Recalled | Slot::Inside
        ) {
            // Inside without a home: its guard was leaked, and nobody can say in what state the
            // instance is.
            let is_retired = was_retiring || home == HomeIs::Inside;
            self.set(
                0,
                if is_retired {
                    Slot::Retired
                } else {
                    Slot::Free
                },
            );
        }
        self.serve(Asker::Anyone)
    }

    /// Starts who waits on what is free, and sends slot 0 home if nobody wanted it.
    fn settle(&mut self) -> Vec<Start<W>> {
        let starts = self.serve(Asker::Anyone);
        self.send_home();
        starts
    }

    fn serve(&mut self, asker: Asker) -> Vec<Start<W>> {
        let mut starts = Vec::new();
        while self.is_open
            && !self.queue.is_empty()
            && let Some(slot) = self.claim(asker)
        {
            let id = self.ticket(slot);
            starts.extend(self.queue.pop_front().map(|(_, waiter)| (waiter, id)));
        }
        starts
    }

    /// The ticket for a slot, of its present cohort.
    fn ticket(&self, slot: usize) -> TicketId {
        let cohort = self.cohorts.get(slot).copied().unwrap_or_default();
        TicketId { cohort, slot }
    }

    /// Takes a free slot. Slot 0 comes last, so that it stays at home as long as it can.
    fn claim(&mut self, asker: Asker) -> Option<usize> {
        let slot = match (self.free.last(), self.home_slot(), asker) {
            (Some(&slot), _, _) => slot,
            (None, Slot::Free, _) | (None, Slot::AtHome, Asker::Home(HomeIs::Outside)) => 0,
            _ => return None,
        };
        self.set(slot, Slot::Held);
        Some(slot)
    }

    fn send_home(&mut self) {
        if self.home == HomeLife::Living
            && self.is_open
            && !self.is_shut
            && self.queue.is_empty()
            && self.home_slot() == Slot::Free
        {
            self.set(0, Slot::AtHome);
        }
    }

    /// The home thread says whether it is inside, and slot 0 is at home no more.
    fn leave_home(&mut self, home: HomeIs) {
        if matches!(self.home_slot(), Slot::AtHome | Slot::Recalled) {
            let to = match home {
                HomeIs::Inside => Slot::Inside,
                HomeIs::Outside if self.take_retiring() => Slot::Retired,
                HomeIs::Outside => Slot::Free,
            };
            self.set(0, to);
        }
    }

    fn free_retired(&mut self, slot: usize) {
        if self.slots.get(slot) == Some(&Slot::Retired) {
            self.set(slot, Slot::Free);
        }
        if slot == 0 && self.take_retiring() && self.is_open {
            self.stay_home();
        }
    }

    /// Whether slot 0 was to leave service with the home thread; from then on it is not.
    fn take_retiring(&mut self) -> bool {
        let is_retiring = self.home == HomeLife::Retiring;
        if is_retiring {
            self.home = HomeLife::Living;
        }
        is_retiring
    }

    /// The home thread has not come by since its slot was recalled, so it need never know.
    fn stay_home(&mut self) {
        if self.home_slot() == Slot::Recalled {
            self.set(0, Slot::AtHome);
        }
    }

    /// The only place that changes a slot, and with it everything that is counted.
    fn set(&mut self, slot: usize, to: Slot) {
        let Some(place) = self.slots.get_mut(slot) else {
            return;
        };
        let from = std::mem::replace(place, to);
        self.held -= usize::from(from.is_in_flight());
        self.held += usize::from(to.is_in_flight());
        self.retired -= usize::from(from == Slot::Retired);
        self.retired += usize::from(to == Slot::Retired);
        if to != Slot::Held
            && let Some(is_withdrawing) = self.withdrawing.get_mut(slot)
        {
            *is_withdrawing = false;
        }
        if to != Slot::Retired
            && let Some(custody) = self.custodies.get_mut(slot)
        {
            *custody = None;
        }
        if slot == 0 || from == to {
            return;
        }
        if from == Slot::Free {
            // Only `claim` takes a free slot, and it takes the top of the stack.
            let top = self.free.pop();
            debug_assert_eq!(top, Some(slot), "a free slot was taken out of turn");
        }
        if to == Slot::Free {
            self.free.push(slot);
        }
    }

    /// Whether the invariants of this module hold.
    pub(crate) fn is_consistent(&self) -> bool {
        let count = |is: fn(Slot) -> bool| self.slots.iter().filter(|slot| is(**slot)).count();
        let home = self.home_slot();
        let is_somebody_idle =
            self.is_open && !self.queue.is_empty() && (home == Slot::Free || !self.free.is_empty());
        let does_home_live = matches!(self.home, HomeLife::Living | HomeLife::Retiring);
        let is_home_empty = self.is_open && !self.is_shut && does_home_live && home == Slot::Free;
        let is_at_no_home =
            !does_home_live && matches!(home, Slot::AtHome | Slot::Recalled | Slot::Inside);
        let is_retirement_lost =
            self.home == HomeLife::Retiring && !matches!(home, Slot::Recalled | Slot::Inside);
        let is_recall_lost =
            self.is_open && home == Slot::Recalled && self.home != HomeLife::Retiring;
        let mut free = self.free.clone();
        free.sort_unstable();
        let expected = (1..self.slots.len()).filter(|slot| self.slots[*slot] == Slot::Free);
        !is_somebody_idle
            && !is_home_empty
            && !is_at_no_home
            && !is_retirement_lost
            && !is_recall_lost
            && self.held == count(Slot::is_in_flight)
            && self
                .stragglers
                .iter()
                .all(|s| s.cohort < self.cohorts[s.slot])
            && self.cohorts.iter().all(|cohort| *cohort <= self.cohort)
            && (self.slots.iter().zip(&self.withdrawing))
                .all(|(slot, is)| !is || *slot == Slot::Held)
            && (self.slots.iter().zip(&self.custodies))
                .all(|(slot, custody)| custody.is_none() || *slot == Slot::Retired)
            && self.retired == count(|slot| slot == Slot::Retired)
            && self.queue.len() <= self.max_queue
            && free.iter().copied().eq(expected)
    }
}
