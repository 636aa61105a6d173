//! Random histories of a gate, step by step against a plain model.
//!
//! One thread plays all parts: the home thread, other threads and the holders of tickets. What
//! interleavings add is loom's affair.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use wasm_molt_lifecycle::{
    Admission, Away, Custody, Gate, GateCounts, GateOptions, Home, InFlight, Inside, Refusal,
    Ticket, TicketId, WaitId, Waiter,
};

type Number = usize;

struct Call {
    number: Number,
    started: Sender<(Number, Ticket<Call>)>,
}

impl Waiter for Call {
    fn start(self, ticket: Ticket<Self>) {
        self.started.send((self.number, ticket)).unwrap();
    }
}

/// Who does it, where that makes a difference.
#[derive(Debug, Clone, Copy)]
enum By {
    Anyone,
    Home,
}

#[derive(Debug, Clone)]
enum Op {
    Admit(By),
    Finish(Index),
    Retire(Index),
    /// A slot, whoever has it.
    RetireIdle(Index),
    /// A slot, with the ticket that is out; and takes it into custody if it is out of service.
    Withdraw(By, Index),
    /// One of the custodies.
    LetGo(Index),
    Reinstate(Index),
    Spare(Index),
    ReinstateAll,
    Cancel(Index),
    Open,
    Close(By),
    Roll(By),
    RollSlot(By, Index),
    Shut(By),
    Cut(By),
    Enter,
    Leave,
    LeaveRetired,
    ServeQueued,
}

fn by() -> impl Strategy<Value = By> {
    prop_oneof![Just(By::Anyone), Just(By::Home)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => by().prop_map(Op::Admit),
        10 => any::<Index>().prop_map(Op::Finish),
        2 => any::<Index>().prop_map(Op::Retire),
        1 => any::<Index>().prop_map(Op::RetireIdle),
        3 => (by(), any::<Index>()).prop_map(|(by, slot)| Op::Withdraw(by, slot)),
        2 => any::<Index>().prop_map(Op::LetGo),
        3 => any::<Index>().prop_map(Op::Reinstate),
        3 => any::<Index>().prop_map(Op::Spare),
        1 => Just(Op::ReinstateAll),
        3 => any::<Index>().prop_map(Op::Cancel),
        4 => Just(Op::Open),
        3 => by().prop_map(Op::Close),
        3 => by().prop_map(Op::Roll),
        3 => (by(), any::<Index>()).prop_map(|(by, slot)| Op::RollSlot(by, slot)),
        6 => Just(Op::Enter),
        5 => Just(Op::Leave),
        1 => Just(Op::LeaveRetired),
        2 => Just(Op::ServeQueued),
    ]
}

/// A history; some end with a shut or cut somewhere, which would make most of a longer one dull.
fn history() -> impl Strategy<Value = Vec<Op>> {
    let end = prop_oneof![
        2 => Just(None),
        1 => by().prop_map(|by| Some(Op::Shut(by))),
        1 => by().prop_map(|by| Some(Op::Cut(by))),
    ];
    let ops = |count| prop::collection::vec(op(), 0..count);
    (ops(60), end, ops(20)).prop_map(|(mut ops, end, more)| {
        ops.extend(end);
        ops.extend(more);
        ops
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Held,
    Retired,
    /// Slot 0 in the hands of the home thread, inside or not.
    Home,
}

/// What the gate should do, without any of how.
#[expect(
    clippy::struct_excessive_bools,
    reason = "plain facts are the point of a model"
)]
struct Model {
    slots: Vec<Slot>,
    /// How often it has rolled, all or one.
    cohort: u64,
    /// Of each slot.
    cohorts: Vec<u64>,
    /// Held, and out of service afterwards.
    is_withdrawing: Vec<bool>,
    /// Retired, and in the custody of that number.
    custodies: Vec<Option<usize>>,
    /// Left behind by a roll, in the order of slots and rolls.
    stragglers: Vec<TicketId>,
    queue: VecDeque<Number>,
    max_queue: usize,
    is_open: bool,
    is_shut: bool,
    has_home: bool,
    depth: usize,
    /// The home has to come by before slot 0 can be used otherwise.
    is_recalled: bool,
    /// The home gives slot 0 back when it leaves.
    is_on_record: bool,
    is_retiring: bool,
}

impl Model {
    fn new(options: GateOptions) -> Self {
        Self {
            slots: vec![Slot::Free; options.slots],
            cohort: 0,
            cohorts: vec![0; options.slots],
            is_withdrawing: vec![false; options.slots],
            custodies: vec![None; options.slots],
            stragglers: Vec::new(),
            queue: VecDeque::new(),
            max_queue: options.max_queue,
            is_open: false,
            is_shut: false,
            has_home: options.home,
            depth: 0,
            is_recalled: false,
            is_on_record: false,
            is_retiring: false,
        }
    }

    fn is_unseen(&self) -> bool {
        self.slots[0] == Slot::Home && !self.is_recalled && !self.is_on_record
    }

    fn counts(&self) -> GateCounts {
        let count = |is| self.slots.iter().filter(|slot| **slot == is).count();
        let is_home_seen = self.is_recalled || self.is_on_record;
        GateCounts {
            in_flight: count(Slot::Held) + usize::from(is_home_seen) + self.stragglers.len(),
            stragglers: self.stragglers.len(),
            queued: self.queue.len(),
            slots: self.slots.len(),
            retired: count(Slot::Retired),
            is_open: self.is_open,
            is_shut: self.is_shut,
        }
    }

    /// The home thread gives up slot 0: now, or when it leaves.
    fn leave_home(&mut self) {
        if self.slots[0] == Slot::Home {
            self.is_recalled = false;
            if self.depth > 0 {
                self.is_on_record = true;
            } else {
                self.free_home();
            }
        }
    }

    fn free_home(&mut self) {
        self.slots[0] = if self.is_retiring {
            Slot::Retired
        } else {
            Slot::Free
        };
        self.is_retiring = false;
    }

    fn meet_home(&mut self) {
        if self.is_recalled {
            self.leave_home();
        }
    }

    fn is_all_taken(&self) -> bool {
        self.is_open && !self.slots.contains(&Slot::Free)
    }

    fn leave(&mut self) {
        self.depth -= 1;
        if self.depth == 0 && (self.is_on_record || self.is_recalled) {
            self.free_home();
            (self.is_on_record, self.is_recalled) = (false, false);
        }
    }

    /// Who starts now, in this order, each on any free slot.
    fn starts(&self) -> usize {
        let free = self
            .slots
            .iter()
            .filter(|slot| **slot == Slot::Free)
            .count();
        if self.is_open {
            free.min(self.queue.len())
        } else {
            0
        }
    }

    /// A ticket goes; where it was left behind, its slot is somebody else's.
    fn give_back(&mut self, ticket: TicketId, to: Slot) {
        if ticket.cohort == self.cohorts[ticket.slot] {
            let is_withdrawing = std::mem::take(&mut self.is_withdrawing[ticket.slot]);
            self.slots[ticket.slot] = if is_withdrawing { Slot::Retired } else { to };
        } else {
            self.stragglers.retain(|straggler| *straggler != ticket);
        }
    }

    /// Whether that slot may change hands, if `by` asks.
    fn may_roll(&self, slot: usize, by: By) -> bool {
        match by {
            _ if slot > 0 => true,
            By::Home => self.depth == 0,
            By::Anyone => self.slots[0] != Slot::Home,
        }
    }

    fn roll(&mut self, slots: Range<usize>) {
        if slots.contains(&0) {
            self.meet_home();
        }
        self.cohort += 1;
        for slot in slots {
            let is = &mut self.slots[slot];
            if *is == Slot::Held {
                let cohort = self.cohorts[slot];
                self.stragglers.push(TicketId { cohort, slot });
            }
            if *is != Slot::Home {
                *is = Slot::Free;
            }
            self.cohorts[slot] = self.cohort;
            self.is_withdrawing[slot] = false;
        }
    }

    fn send_home(&mut self) {
        if self.has_home && self.is_open && !self.is_shut && self.slots[0] == Slot::Free {
            self.slots[0] = Slot::Home;
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Started,
    Refused,
    Cancelled,
    Cut,
}

/// The gate and its model side by side.
struct Bench<'a> {
    gate: &'a Gate<Call>,
    home: Option<&'a Home<Call>>,
    insides: Vec<Inside<'a, Call>>,
    tickets: Vec<Ticket<Call>>,
    custodies: Vec<(usize, Custody<Call>)>,
    model: Model,
    calls: Sender<(Number, Ticket<Call>)>,
    started: Receiver<(Number, Ticket<Call>)>,
    ids: BTreeMap<Number, WaitId>,
    fates: BTreeMap<Number, Fate>,
    admitted: usize,
    taken: usize,
}

impl Bench<'_> {
    fn ends(&mut self, number: Number, fate: Fate) {
        assert_eq!(
            self.fates.insert(number, fate),
            None,
            "call {number} has two fates"
        );
    }

    /// Everybody who should have started has, in arrival order and on a slot of their own, and
    /// nobody else.
    fn settle(&mut self) {
        let model = &mut self.model;
        for (slot, custody) in model.slots.iter().zip(&mut model.custodies) {
            if *slot != Slot::Retired {
                *custody = None;
            }
        }
        let mut started = Vec::new();
        for _ in 0..model.starts() {
            let (number, ticket) = self.started.try_recv().unwrap();
            assert_eq!(Some(number), model.queue.pop_front(), "arrival order");
            let is_other_free = model.slots[1..].contains(&Slot::Free);
            let slot = &mut model.slots[ticket.slot()];
            assert_eq!(*slot, Slot::Free, "one holder per slot and cohort");
            assert_eq!(ticket.id().cohort, model.cohorts[ticket.slot()]);
            *slot = Slot::Held;
            assert!(ticket.slot() > 0 || !is_other_free, "slot 0 comes last");
            self.tickets.push(ticket);
            started.push(number);
        }
        assert!(self.started.try_recv().is_err(), "nobody else starts");
        self.model.send_home();
        for number in started {
            self.ends(number, Fate::Started);
        }
        assert_eq!(self.gate.counts(), self.model.counts());
        let stragglers = &self.model.stragglers;
        assert_eq!(self.gate.stragglers(), *stragglers);
        let now = Some(Duration::ZERO);
        let waited = match stragglers.len() {
            0 => Ok(()),
            left => Err(InFlight(left)),
        };
        assert_eq!(self.gate.wait_stragglers(1, now, || false), waited);
    }

    fn admit(&mut self, by: By) {
        let number = self.admitted;
        self.admitted += 1;
        let id = self.gate.reserve_id();
        let call = Call {
            number,
            started: self.calls.clone(),
        };
        let (result, is_home) = match (by, self.home) {
            (By::Home, Some(home)) => (home.admit_as(id, call), true),
            _ => (self.gate.admit_as(id, call), false),
        };

        let model = &mut self.model;
        if is_home {
            model.meet_home();
            if model.is_all_taken() && !model.queue.is_empty() && model.is_unseen() {
                model.leave_home();
            }
        }
        // Those that were queued come first, and make room.
        let room = model.max_queue + model.starts();
        let wants_home = is_home && model.is_all_taken() && model.is_unseen();
        let may_start = model.queue.is_empty()
            && model.is_open
            && (!model.is_all_taken() || wants_home && model.depth == 0);
        if model.is_shut {
            assert_eq!(result.unwrap_err().refusal, Refusal::Shut);
            self.ends(number, Fate::Refused);
        } else if may_start {
            assert_eq!(result.unwrap(), Admission::Started);
            if model.is_all_taken() {
                model.leave_home();
            }
            model.queue.push_back(number);
        } else if model.queue.len() < room {
            assert_eq!(result.unwrap(), Admission::Queued(id));
            model.queue.push_back(number);
            if wants_home {
                model.leave_home();
            }
            self.ids.insert(number, id);
        } else {
            let refused = result.unwrap_err();
            assert_eq!(
                refused.refusal,
                Refusal::QueueFull {
                    max_queue: model.max_queue
                }
            );
            assert_eq!(refused.waiter.number, number);
            self.ends(number, Fate::Refused);
        }
    }

    fn finish(&mut self, index: Index, to: Slot) {
        if self.tickets.is_empty() {
            return;
        }
        let ticket = self.tickets.swap_remove(index.index(self.tickets.len()));
        self.model.give_back(ticket.id(), to);
        if to == Slot::Retired {
            ticket.retire();
        } else {
            drop(ticket);
        }
    }

    fn retire_idle(&mut self, slot: usize) {
        self.gate.retire(slot);
        let model = &mut self.model;
        match model.slots[slot] {
            Slot::Free => model.slots[slot] = Slot::Retired,
            Slot::Home => {
                model.is_recalled |= model.is_unseen();
                model.is_retiring = true;
            }
            Slot::Held | Slot::Retired => {}
        }
    }

    fn withdraw(&mut self, by: By, slot: usize) {
        let is_home = if let (By::Home, Some(home)) = (by, self.home) {
            home.withdraw(slot);
            true
        } else {
            self.gate.withdraw(slot);
            false
        };
        let model = &mut self.model;
        match model.slots[slot] {
            Slot::Free => model.slots[slot] = Slot::Retired,
            Slot::Held => model.is_withdrawing[slot] = true,
            Slot::Home => {
                model.is_recalled |= model.is_unseen();
                model.is_retiring = true;
            }
            Slot::Retired => {}
        }
        if is_home {
            model.meet_home();
        }
        let model = &mut self.model;
        let is_free = model.slots[slot] == Slot::Retired && model.custodies[slot].is_none();
        let taken = self.gate.wait_retired(slot, Some(Duration::ZERO), || false);
        assert_eq!(taken.is_ok(), is_free);
        if let Ok(custody) = taken {
            assert_eq!(custody.slot(), slot);
            self.taken += 1;
            model.custodies[slot] = Some(self.taken);
            self.custodies.push((self.taken, custody));
        }
    }

    fn let_go(&mut self, index: Index) {
        if self.custodies.is_empty() {
            return;
        }
        let (number, custody) = self
            .custodies
            .swap_remove(index.index(self.custodies.len()));
        self.model.custodies[custody.slot()].take_if(|of| *of == number);
    }

    fn spare(&mut self, slot: usize) {
        self.gate.spare(slot);
        if self.model.custodies[slot].is_none() {
            self.model.is_withdrawing[slot] = false;
            self.reinstate(slot);
        }
    }

    fn reinstate(&mut self, slot: usize) {
        let model = &mut self.model;
        match model.slots[slot] {
            Slot::Retired => model.slots[slot] = Slot::Free,
            Slot::Home => {
                model.is_retiring = false;
                model.is_recalled &= !model.is_open;
            }
            Slot::Free | Slot::Held => {}
        }
    }

    fn take_back(&mut self, slot: usize) {
        self.gate.reinstate(slot);
        self.model.is_withdrawing[slot] = false;
        self.reinstate(slot);
    }

    /// Any call that was ever queued: one that waits is cancelled, any other is not found.
    fn cancel(&mut self, index: Index) {
        if self.ids.is_empty() {
            return;
        }
        let (number, id) = self.ids.iter().nth(index.index(self.ids.len())).unwrap();
        let (number, id) = (*number, *id);
        let waiting = self
            .model
            .queue
            .iter()
            .position(|waiting| *waiting == number);
        let cancelled = self.gate.cancel(id).map(|call| call.number);
        assert_eq!(cancelled, waiting.map(|_| number));
        if let Some(position) = waiting {
            self.model.queue.remove(position);
            self.ends(number, Fate::Cancelled);
        }
    }

    fn close(&mut self, by: By) {
        self.model.is_open = false;
        let in_flight = if let (By::Home, Some(home)) = (by, self.home) {
            self.model.leave_home();
            home.close()
        } else {
            if self.model.is_unseen() {
                self.model.is_recalled = true;
            }
            self.gate.close()
        };
        assert_eq!(in_flight, self.model.counts().in_flight);
    }

    fn roll(&mut self, by: By) {
        let (rolled, by) = match (by, self.home) {
            (By::Home, Some(home)) => (home.roll(), By::Home),
            _ => (self.gate.roll(), By::Anyone),
        };
        self.rolled(rolled, by, 0..self.model.slots.len());
    }

    fn roll_slot(&mut self, by: By, slot: usize) {
        let (rolled, by) = match (by, self.home) {
            (By::Home, Some(home)) => (home.roll_slot(slot), By::Home),
            _ => (self.gate.roll_slot(slot), By::Anyone),
        };
        self.rolled(rolled, by, slot..slot + 1);
    }

    fn rolled(&mut self, rolled: Option<u64>, by: By, slots: Range<usize>) {
        if self.model.may_roll(slots.start, by) {
            self.model.roll(slots);
            assert_eq!(rolled, Some(self.model.cohort));
        } else {
            assert_eq!(rolled, None);
        }
    }

    fn shut(&mut self, by: By) {
        self.model.is_shut = true;
        if let (By::Home, Some(home)) = (by, self.home) {
            self.model.leave_home();
            home.shut();
        } else {
            self.gate.shut();
        }
    }

    fn cut(&mut self, by: By) {
        self.model.is_shut = true;
        let cut = if let (By::Home, Some(home)) = (by, self.home) {
            self.model.leave_home();
            home.cut()
        } else {
            self.gate.cut()
        };
        let cut: Vec<_> = cut.iter().map(|call| call.number).collect();
        let waiting: Vec<_> = self.model.queue.drain(..).collect();
        assert_eq!(cut, waiting);
        for number in cut {
            self.ends(number, Fate::Cut);
        }
    }

    fn open(&mut self) {
        self.gate.open();
        self.model.is_open = true;
        self.model.is_recalled &= self.model.is_retiring;
    }

    fn enter(&mut self) {
        let Some(home) = self.home else { return };
        let inside = home.enter();
        let model = &mut self.model;
        assert_eq!(inside.is_some(), model.depth > 0 || model.is_unseen());
        if inside.is_some() {
            model.depth += 1;
            self.insides.extend(inside);
            return;
        }
        model.meet_home();
        let expected = match model.slots[0] {
            _ if model.is_shut => Away::Shut,
            _ if !model.is_open => Away::Closed,
            Slot::Retired => Away::Retired,
            _ => Away::Busy,
        };
        assert_eq!(home.refusal(), expected);
    }

    fn leave(&mut self, is_retired: bool) {
        let Some(inside) = self.insides.pop() else {
            return;
        };
        if is_retired {
            inside.retire();
            self.model.leave_home();
            self.model.is_retiring = true;
        } else {
            drop(inside);
        }
        self.model.leave();
    }

    fn serve_queued(&mut self) {
        let Some(home) = self.home else { return };
        home.serve_queued();
        self.model.meet_home();
        let waits = self.model.queue.len() > self.model.starts();
        if self.model.is_open && waits && self.model.is_unseen() {
            self.model.leave_home();
        }
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Admit(by) => self.admit(*by),
            Op::Finish(index) => self.finish(*index, Slot::Free),
            Op::Retire(index) => self.finish(*index, Slot::Retired),
            Op::RetireIdle(index) => self.retire_idle(index.index(self.model.slots.len())),
            Op::Reinstate(index) => {
                let slot = index.index(self.model.slots.len());
                self.take_back(slot);
            }
            Op::LetGo(index) => self.let_go(*index),
            Op::Spare(index) => self.spare(index.index(self.model.slots.len())),
            Op::Withdraw(by, index) => {
                let slot = index.index(self.model.slots.len());
                self.withdraw(*by, slot);
            }
            Op::ReinstateAll => {
                self.gate.reinstate_all();
                (0..self.model.slots.len()).for_each(|slot| self.reinstate(slot));
            }
            Op::Cancel(index) => self.cancel(*index),
            Op::Open => self.open(),
            Op::Close(by) => self.close(*by),
            Op::Roll(by) => self.roll(*by),
            Op::RollSlot(by, index) => self.roll_slot(*by, index.index(self.model.slots.len())),
            Op::Shut(by) => self.shut(*by),
            Op::Cut(by) => self.cut(*by),
            Op::Enter => self.enter(),
            Op::Leave => self.leave(false),
            Op::LeaveRetired => self.leave(true),
            Op::ServeQueued => self.serve_queued(),
        }
        self.settle();
        if let Some(home) = self.home {
            assert_eq!(home.depth() as usize, self.model.depth);
        }
    }

    /// Lets everything run down.
    fn run_down(&mut self) {
        while !self.insides.is_empty() {
            self.step(&Op::Leave);
        }
        for slot in 0..self.model.slots.len() {
            self.take_back(slot);
            self.settle();
        }
        self.step(&Op::Open);
        self.step(&Op::ServeQueued);
        while let Some(ticket) = self.tickets.pop() {
            self.model.give_back(ticket.id(), Slot::Free);
            drop(ticket);
            self.settle();
        }
        self.gate.close();
        if let Some(home) = self.home {
            assert_eq!(home.counts().in_flight, 0);
        }
        self.gate.wait_idle(Some(Duration::ZERO)).unwrap();
        assert_eq!(self.fates.len(), self.admitted, "every call has its fate");
    }
}

fn run(options: GateOptions, history: &[Op]) {
    let gate = Gate::new(options);
    let home = gate.take_home();
    let (calls, started) = channel();
    let mut bench = Bench {
        gate: &gate,
        home: home.as_ref(),
        insides: Vec::new(),
        tickets: Vec::new(),
        custodies: Vec::new(),
        model: Model::new(options),
        calls,
        started,
        ids: BTreeMap::new(),
        fates: BTreeMap::new(),
        admitted: 0,
        taken: 0,
    };
    bench.step(&Op::Open);
    for op in history {
        bench.step(op);
    }
    bench.run_down();
}

fn config() -> ProptestConfig {
    // Long histories are cheap; a failing one is printed, and belongs into a unit test.
    ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_gate_does_what_its_model_does(
        slots in 1_usize..4,
        max_queue in 0_usize..6,
        home in any::<bool>(),
        history in history(),
    ) {
        run(GateOptions { slots, max_queue, home }, &history);
    }
}
