//! The gate under every interleaving that loom can find.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test -p wasm-molt-lifecycle
//! --release --test gate_loom`.
//!
//! The slot has a [`Replica`], which notices two holders at a time, and two in turn without a
//! happens-before between them. Lost wake-ups show as loom's deadlock, or as a waiter that has not
//! started in the end.
//!
//! Loom does not explore what another thread's access hides behind an earlier load of its own of
//! the same atomic (tokio-rs/loom#166, #392): so neither the gate nor these models load what they
//! are about to store.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use loom::sync::mpsc::channel;
use loom::sync::{Arc, Mutex};
use loom::thread;
use wasm_molt_lifecycle::{
    Admission, Away, Gate, GateOptions, Home, InFlight, Refusal, Ticket, WaitId, Waiter,
};

/// What belongs to one slot, as an engine's store does: for one user at a time, each of whom sees
/// what the one before did.
///
/// Relaxed throughout, so that it orders nothing itself.
/// The flag and the turn are changed by read-modify-writes, which always see the latest value; the
/// uses are not, and a user without a happens-before to the one before reads a stale value in some
/// execution.
#[derive(Default)]
struct Replica {
    is_in_use: AtomicBool,
    turn: AtomicUsize,
    uses: AtomicUsize,
}

impl Replica {
    fn use_it(&self) {
        assert!(!self.is_in_use.swap(true, Relaxed), "two users at a time");
        let turn = self.turn.fetch_add(1, Relaxed);
        assert_eq!(
            self.uses.load(Relaxed),
            turn,
            "what the user before did is not seen"
        );
        self.uses.store(turn + 1, Relaxed);
        self.is_in_use.swap(false, Relaxed);
    }

    fn uses(&self) -> usize {
        self.uses.load(Relaxed)
    }
}

/// A call that uses its replica as it starts, and ends at once or leaves its ticket in a hand.
struct Call {
    replica: Arc<Replica>,
    rolled: Arc<Replica>,
    starts: Arc<AtomicUsize>,
    hand: Option<Hand>,
}

type Hand = Arc<Mutex<Option<Ticket<Call>>>>;

impl Waiter for Call {
    fn start(self, ticket: Ticket<Self>) {
        assert_eq!(ticket.slot(), 0);
        match ticket.id().cohort {
            0 => self.replica.use_it(),
            _ => self.rolled.use_it(),
        }
        self.starts.fetch_add(1, Relaxed);
        if let Some(hand) = self.hand {
            *hand.lock().unwrap() = Some(ticket);
        }
    }
}

/// A gate with one slot, and the replica in it, before and after a roll.
#[derive(Clone)]
struct Bench {
    gate: Gate<Call>,
    replica: Arc<Replica>,
    rolled: Arc<Replica>,
    starts: Arc<AtomicUsize>,
}

impl Bench {
    fn new(home: bool) -> Self {
        let bench = Self {
            gate: Gate::new(GateOptions {
                slots: 1,
                max_queue: 2,
                home,
            }),
            replica: Arc::default(),
            rolled: Arc::default(),
            starts: Arc::default(),
        };
        bench.gate.open();
        bench
    }

    fn with_home() -> (Self, Home<Call>) {
        let bench = Self::new(true);
        let home = bench.gate.take_home().unwrap();
        (bench, home)
    }

    fn call(&self) -> Call {
        Call {
            replica: Arc::clone(&self.replica),
            rolled: Arc::clone(&self.rolled),
            starts: Arc::clone(&self.starts),
            hand: None,
        }
    }

    /// Has a call admitted that must start at once, and takes its ticket.
    fn hold(&self, admit: impl FnOnce(Call) -> Admission) -> Ticket<Call> {
        let hand = Hand::default();
        let call = Call {
            hand: Some(Arc::clone(&hand)),
            ..self.call()
        };
        assert_eq!(admit(call), Admission::Started);
        hand.lock().unwrap().take().unwrap()
    }

    fn held(&self) -> Ticket<Call> {
        self.hold(|call| self.gate.admit(call).unwrap())
    }

    fn queue(&self) -> WaitId {
        match self.gate.admit(self.call()).unwrap() {
            Admission::Queued(id) => id,
            Admission::Started => unreachable!("the slot is held"),
        }
    }

    /// A worker that uses the replica of the first cohort and gives the ticket back.
    fn work_on(&self, ticket: Ticket<Call>) -> thread::JoinHandle<()> {
        let replica = Arc::clone(&self.replica);
        thread::spawn(move || {
            replica.use_it();
            drop(ticket);
        })
    }

    /// Another thread that has a call admitted.
    fn admit_elsewhere(&self) -> thread::JoinHandle<()> {
        let bench = self.clone();
        thread::spawn(move || {
            bench.gate.admit(bench.call()).unwrap();
        })
    }

    fn starts(&self) -> usize {
        self.starts.load(Relaxed)
    }

    /// Everything has ended, and nobody's use of the replica was lost.
    fn assert_at_rest(&self, uses: usize) {
        let counts = self.gate.counts();
        let left = (counts.in_flight, counts.stragglers, counts.queued);
        assert_eq!(left, (0, 0, 0));
        assert_eq!(self.replica.uses() + self.rolled.uses(), uses);
    }
}

/// A worker that has done nothing with its ticket.
fn give_back(ticket: Ticket<Call>) -> thread::JoinHandle<()> {
    thread::spawn(move || drop(ticket))
}

#[test]
fn drain_after_close_sees_what_the_last_ticket_did() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = bench.work_on(ticket);
        assert!(bench.gate.close() <= 1);
        bench.gate.wait_drained(None).unwrap();
        bench.assert_at_rest(2);
        worker.join().unwrap();
    });
}

#[test]
fn a_queued_waiter_runs_before_the_close_or_after_the_opening() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        bench.queue();
        let worker = give_back(ticket);
        bench.gate.close();
        bench.gate.wait_drained(None).unwrap();
        let started = bench.starts();
        assert_eq!(bench.replica.uses(), started);
        assert_eq!(bench.gate.counts().queued, 2 - started);
        bench.gate.open();
        assert_eq!(bench.starts(), 2);
        worker.join().unwrap();
        bench.assert_at_rest(2);
    });
}

#[test]
fn two_threads_may_drain_at_once() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        bench.queue();
        let idle = {
            let gate = bench.gate.clone();
            thread::spawn(move || gate.wait_idle(None).unwrap())
        };
        let drained = {
            let gate = bench.gate.clone();
            thread::spawn(move || gate.wait_drained(None).unwrap())
        };
        drop(ticket);
        idle.join().unwrap();
        drained.join().unwrap();
        bench.assert_at_rest(2);
    });
}

#[test]
fn no_wake_up_is_lost_between_admission_and_a_ticket_s_end() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = give_back(ticket);
        let other = bench.admit_elsewhere();
        bench.gate.admit(bench.call()).unwrap();
        worker.join().unwrap();
        other.join().unwrap();
        assert_eq!(bench.starts(), 3);
        bench.assert_at_rest(3);
    });
}

#[test]
fn no_wake_up_is_lost_between_admission_and_opening() {
    loom::model(|| {
        let bench = Bench::new(false);
        bench.gate.close();
        let opener = {
            let gate = bench.gate.clone();
            thread::spawn(move || gate.open())
        };
        bench.gate.admit(bench.call()).unwrap();
        opener.join().unwrap();
        assert_eq!(bench.starts(), 1);
        bench.assert_at_rest(1);
    });
}

#[test]
fn no_wake_up_is_lost_between_admission_and_reinstatement() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = {
            let gate = bench.gate.clone();
            thread::spawn(move || {
                ticket.retire();
                gate.reinstate(0);
            })
        };
        bench.gate.admit(bench.call()).unwrap();
        worker.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(2);
    });
}

#[test]
fn a_waiter_is_cancelled_or_started_never_both() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let id = bench.queue();
        let worker = give_back(ticket);
        let other = {
            let gate = bench.gate.clone();
            thread::spawn(move || usize::from(gate.cancel(id).is_some()))
        };
        let cancelled = usize::from(bench.gate.cancel(id).is_some()) + other.join().unwrap();
        worker.join().unwrap();
        assert_eq!(cancelled + bench.starts(), 2);
        bench.assert_at_rest(2 - cancelled);
    });
}

#[test]
fn a_waiter_is_refused_cut_or_started_exactly_once() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = give_back(ticket);
        let cutter = {
            let gate = bench.gate.clone();
            thread::spawn(move || gate.cut().len())
        };
        let refused = match bench.gate.admit(bench.call()) {
            Ok(_) => 0,
            Err(refused) => {
                assert_eq!(refused.refusal, Refusal::Shut);
                1
            }
        };
        let cut = cutter.join().unwrap();
        worker.join().unwrap();
        assert_eq!(bench.starts() + cut + refused, 2);
        bench.assert_at_rest(bench.starts());
    });
}

#[test]
fn a_shut_gate_still_runs_what_was_admitted() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = give_back(ticket);
        let shutter = {
            let gate = bench.gate.clone();
            thread::spawn(move || {
                gate.shut();
                gate.wait_idle(None).unwrap();
                assert_eq!(gate.counts().in_flight, 0);
            })
        };
        let admitted = usize::from(bench.gate.admit(bench.call()).is_ok());
        worker.join().unwrap();
        shutter.join().unwrap();
        assert_eq!(bench.starts(), 1 + admitted);
        bench.assert_at_rest(1 + admitted);
    });
}

#[test]
fn home_enters_after_a_ticket_and_is_drained_after_a_close() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let ticket = bench.hold(|call| home.admit(call).unwrap());
        let worker = bench.work_on(ticket);
        let mut uses = 2;
        if let Some(inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
            drop(inside);
        } else {
            assert_eq!(home.refusal(), Away::Busy);
        }
        home.close();
        bench.gate.wait_drained(None).unwrap();
        bench.assert_at_rest(uses);
        assert!(home.enter().is_none());
        worker.join().unwrap();
    });
}

#[test]
fn another_thread_drains_while_home_closes_and_leaves() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let inside = home.enter().unwrap();
        assert_eq!(home.close(), 1);
        let swapper = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.gate.wait_drained(None).unwrap();
                bench.replica.use_it();
                bench.gate.open();
            })
        };
        bench.replica.use_it();
        let nested = home.enter().unwrap();
        bench.replica.use_it();
        drop(nested);
        drop(inside);
        let mut uses = 3;
        if let Some(_inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
        }
        swapper.join().unwrap();
        assert!(home.enter().is_some());
        bench.assert_at_rest(uses);
    });
}

#[test]
fn leaving_home_hands_the_slot_to_who_waits() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let inside = home.enter().unwrap();
        let id = bench.gate.reserve_id();
        home.admit_as(id, bench.call()).unwrap();
        let other = {
            let gate = bench.gate.clone();
            thread::spawn(move || usize::from(gate.cancel(id).is_some()))
        };
        bench.replica.use_it();
        drop(inside);
        let cancelled = other.join().unwrap();
        assert_eq!(bench.starts() + cancelled, 1);
        assert!(home.enter().is_some());
        bench.assert_at_rest(2 - cancelled);
    });
}

#[test]
fn home_comes_by_for_what_others_have_queued() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let admitter = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.gate.admit(bench.call()).unwrap();
            })
        };
        if let Some(inside) = home.enter() {
            home.serve_queued();
            bench.replica.use_it();
            drop(inside);
        }
        admitter.join().unwrap();
        home.serve_queued();
        assert_eq!(bench.starts(), 1);
        bench.assert_at_rest(2);
    });
}

#[test]
fn a_close_from_another_thread_waits_for_home_to_come_by() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let (closed, is_closed) = channel();
        let swapper = {
            let bench = bench.clone();
            thread::spawn(move || {
                assert_eq!(bench.gate.close(), 1);
                closed.send(()).unwrap();
                bench.gate.wait_drained(None).unwrap();
                bench.replica.use_it();
                bench.gate.open();
            })
        };
        let mut uses = 1;
        for _ in 0..2 {
            if let Some(_inside) = home.enter() {
                bench.replica.use_it();
                uses += 1;
            }
        }
        is_closed.recv().unwrap();
        home.counts();
        swapper.join().unwrap();
        assert!(home.enter().is_some());
        bench.assert_at_rest(uses);
    });
}

#[test]
fn a_closing_and_an_opening_thread_leave_home_usable() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let closer = {
            let gate = bench.gate.clone();
            thread::spawn(move || {
                gate.close();
                gate.open();
            })
        };
        let inside = home.enter();
        let uses = usize::from(inside.is_some());
        if inside.is_some() {
            bench.replica.use_it();
        }
        // From inside, where that worked out.
        let admitted = home.admit(bench.call());
        drop(inside);
        closer.join().unwrap();
        assert!(admitted.is_ok());
        assert_eq!(bench.starts(), 1);
        assert!(home.enter().is_some());
        bench.assert_at_rest(uses + 1);
    });
}

#[test]
fn a_cut_from_another_thread_loses_nobody_at_home() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let cutter = {
            let gate = bench.gate.clone();
            thread::spawn(move || gate.cut().len())
        };
        let inside = home.enter().unwrap();
        let refused = usize::from(home.admit(bench.call()).is_err());
        bench.replica.use_it();
        drop(inside);
        let cut = cutter.join().unwrap();
        assert_eq!(bench.starts() + cut + refused, 1);
        bench.assert_at_rest(1 + bench.starts());
    });
}

#[test]
fn dropping_the_home_leaves_its_slot_to_the_others() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let ticket = bench.hold(|call| home.admit(call).unwrap());
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || {
                drop(ticket);
                bench.gate.admit(bench.call()).unwrap();
            })
        };
        let mut uses = 3;
        if let Some(_inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
        }
        home.admit(bench.call()).unwrap();
        drop(home);
        worker.join().unwrap();
        assert_eq!(bench.starts(), 3);
        bench.assert_at_rest(uses);
    });
}

#[test]
fn a_waiter_meets_a_ticket_s_end_and_home_s_entry() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let ticket = bench.hold(|call| home.admit(call).unwrap());
        let worker = give_back(ticket);
        let other = bench.admit_elsewhere();
        let mut uses = 2;
        if let Some(_inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
        }
        worker.join().unwrap();
        other.join().unwrap();
        home.serve_queued();
        assert_eq!(bench.starts(), 2);
        assert!(home.enter().is_some());
        bench.assert_at_rest(uses);
    });
}

#[test]
fn a_whole_swap_with_a_ticket_out_and_home_calling() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let ticket = bench.hold(|call| home.admit(call).unwrap());
        let worker = {
            let replica = Arc::clone(&bench.replica);
            thread::spawn(move || {
                replica.use_it();
                ticket.retire();
            })
        };
        assert!(home.enter().is_none());
        home.close();
        let swapper = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.gate.wait_drained(None).unwrap();
                bench.replica.use_it();
                bench.gate.reinstate_all();
                bench.gate.open();
            })
        };
        let mut uses = 4;
        if let Some(_inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
        }
        home.admit(bench.call()).unwrap();
        worker.join().unwrap();
        swapper.join().unwrap();
        assert_eq!(bench.starts(), 2);
        assert!(home.enter().is_some());
        bench.assert_at_rest(uses);
    });
}

#[test]
fn a_retirement_from_another_thread_waits_for_home() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let other = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.gate.retire(0);
                let is_retired = bench.gate.counts().retired == 1;
                if is_retired {
                    bench.replica.use_it();
                    bench.gate.reinstate(0);
                }
                usize::from(is_retired)
            })
        };
        let mut uses = 0;
        if let Some(_inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
        }
        home.admit(bench.call()).unwrap();
        let repaired = other.join().unwrap();
        home.counts();
        bench.gate.reinstate(0);
        assert_eq!(bench.starts(), 1);
        assert!(home.enter().is_some());
        bench.assert_at_rest(uses + repaired + 1);
    });
}

#[test]
fn a_roll_parts_its_ticket_from_who_comes_next() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = bench.work_on(ticket);
        let other = bench.admit_elsewhere();
        assert_eq!(bench.gate.roll(), Some(1));
        worker.join().unwrap();
        other.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(3);
    });
}

#[test]
fn who_waited_starts_with_the_roll_or_with_the_ticket_s_end() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let id = bench.queue();
        let worker = bench.work_on(ticket);
        let canceller = {
            let gate = bench.gate.clone();
            thread::spawn(move || usize::from(gate.cancel(id).is_some()))
        };
        assert_eq!(bench.gate.roll(), Some(1));
        let cancelled = canceller.join().unwrap();
        worker.join().unwrap();
        assert_eq!(bench.starts() + cancelled, 2);
        bench.assert_at_rest(3 - cancelled);
    });
}

#[test]
fn waiting_for_stragglers_sees_what_the_last_of_them_did() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.replica.use_it();
                drop(ticket);
                // On whichever generation serves; a straggler it never is.
                bench.gate.admit(bench.call()).unwrap();
            })
        };
        assert_eq!(bench.gate.roll(), Some(1));
        bench.gate.wait_stragglers(1, None, || false).unwrap();
        bench.replica.use_it();
        worker.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(4);
    });
}

#[test]
fn a_drain_after_a_roll_waits_for_both_generations() {
    loom::model(|| {
        let bench = Bench::new(false);
        let old = bench.held();
        assert_eq!(bench.gate.roll(), Some(1));
        let new = bench.held();
        let worker = {
            let replica = Arc::clone(&bench.replica);
            thread::spawn(move || {
                replica.use_it();
                drop(old);
            })
        };
        let other = {
            let rolled = Arc::clone(&bench.rolled);
            thread::spawn(move || {
                rolled.use_it();
                drop(new);
            })
        };
        bench.gate.close();
        bench.gate.wait_drained(None).unwrap();
        bench.replica.use_it();
        bench.rolled.use_it();
        worker.join().unwrap();
        other.join().unwrap();
        bench.assert_at_rest(6);
    });
}

#[test]
fn a_close_from_another_thread_meets_a_roll() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        bench.queue();
        let worker = bench.work_on(ticket);
        let closer = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.gate.close();
                bench.gate.wait_drained(None).unwrap();
                // Nobody is inside any generation.
                bench.replica.use_it();
                bench.rolled.use_it();
                bench.gate.open();
            })
        };
        assert_eq!(bench.gate.roll(), Some(1));
        worker.join().unwrap();
        closer.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(5);
    });
}

#[test]
fn home_rolls_while_a_ticket_ends() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let ticket = bench.hold(|call| home.admit(call).unwrap());
        let worker = bench.work_on(ticket);
        let other = bench.admit_elsewhere();
        let mut uses = 3;
        if let Some(_inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
            assert_eq!(home.roll(), None);
        }
        assert_eq!(home.roll(), Some(1));
        if let Some(_inside) = home.enter() {
            bench.rolled.use_it();
            uses += 1;
        }
        worker.join().unwrap();
        other.join().unwrap();
        home.serve_queued();
        assert_eq!(bench.starts(), 2);
        assert!(home.enter().is_some());
        bench.assert_at_rest(uses);
    });
}

#[test]
fn another_thread_rolls_only_what_is_not_at_home() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let ticket = bench.hold(|call| home.admit(call).unwrap());
        let worker = give_back(ticket);
        let roller = {
            let gate = bench.gate.clone();
            thread::spawn(move || gate.roll().is_some())
        };
        drop(home.enter());
        worker.join().unwrap();
        let has_rolled = roller.join().unwrap();
        let ticket = bench.hold(|call| home.admit(call).unwrap());
        assert_eq!(ticket.id().cohort, u64::from(has_rolled));
        drop(ticket);
        assert!(home.enter().is_some());
        bench.assert_at_rest(2);
    });
}

#[test]
fn a_home_that_goes_meets_a_roll() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let roller = {
            let bench = bench.clone();
            thread::spawn(move || {
                // Before the home is gone there is nothing to be had here.
                let has_rolled = bench.gate.roll().is_some();
                bench.gate.admit(bench.call()).unwrap();
                has_rolled
            })
        };
        let mut uses = 1;
        if let Some(_inside) = home.enter() {
            bench.replica.use_it();
            uses += 1;
        }
        drop(home);
        let has_rolled = roller.join().unwrap();
        assert_eq!(bench.rolled.uses(), usize::from(has_rolled));
        bench.assert_at_rest(uses);
    });
}

#[test]
fn who_gives_up_is_asked_again_after_a_shut() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let is_given_up = Arc::new(AtomicBool::new(false));
        let drainer = {
            let (gate, is_given_up) = (bench.gate.clone(), Arc::clone(&is_given_up));
            thread::spawn(move || gate.wait_drained_unless(None, || is_given_up.load(Relaxed)))
        };
        assert_eq!(bench.gate.roll(), Some(1));
        is_given_up.store(true, Relaxed);
        bench.gate.shut();
        assert_eq!(drainer.join().unwrap(), Err(InFlight(1)));
        drop(ticket);
        bench.assert_at_rest(1);
    });
}

#[test]
fn who_gives_stragglers_up_is_asked_again_after_a_shut() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        assert_eq!(bench.gate.roll(), Some(1));
        let is_given_up = Arc::new(AtomicBool::new(false));
        let drainer = {
            let (gate, is_given_up) = (bench.gate.clone(), Arc::clone(&is_given_up));
            thread::spawn(move || gate.wait_stragglers(1, None, || is_given_up.load(Relaxed)))
        };
        let worker = give_back(ticket);
        is_given_up.store(true, Relaxed);
        drop(bench.gate.cut());
        match drainer.join().unwrap() {
            Ok(()) => assert!(bench.gate.stragglers().is_empty()),
            Err(left) => assert_eq!(left, InFlight(1)),
        }
        worker.join().unwrap();
        bench.assert_at_rest(1);
    });
}

#[test]
fn a_withdrawn_slot_is_nobody_s_once_its_ticket_is_gone() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = bench.work_on(ticket);
        let other = bench.admit_elsewhere();
        bench.gate.withdraw(0);
        let custody = bench.gate.wait_retired(0, None, || false).unwrap();
        bench.replica.use_it();
        drop(custody);
        bench.gate.spare(0);
        worker.join().unwrap();
        other.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(4);
    });
}

#[test]
fn a_withdrawal_that_is_taken_back_loses_nobody() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        bench.queue();
        let worker = bench.work_on(ticket);
        bench.gate.withdraw(0);
        let gone = bench.gate.wait_retired(0, None, || true);
        if gone.is_ok() {
            bench.replica.use_it();
        }
        let is_gone = gone.is_ok();
        drop(gone);
        bench.gate.spare(0);
        worker.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(3 + usize::from(is_gone));
    });
}

#[test]
fn a_withdrawal_from_home_waits_for_nobody_outside() {
    loom::model(|| {
        let (bench, home) = Bench::with_home();
        let other = bench.admit_elsewhere();
        home.withdraw(0);
        let custody = bench.gate.wait_retired(0, None, || false).unwrap();
        bench.replica.use_it();
        drop(custody);
        bench.gate.spare(0);
        other.join().unwrap();
        home.serve_queued();
        assert_eq!(bench.starts(), 1);
        assert!(home.enter().is_some());
        bench.assert_at_rest(2);
    });
}

#[test]
fn a_slot_that_whoever_leaves_it_spares_has_one_user_at_a_time() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.replica.use_it();
                // The instance had better run nothing more; and then it turns out that nobody will come for it.
                ticket.retire();
                bench.gate.spare(0);
            })
        };
        let other = bench.admit_elsewhere();
        bench.gate.withdraw(0);
        let custody = bench.gate.wait_retired(0, None, || true);
        let is_taken = custody.is_ok();
        if is_taken {
            bench.replica.use_it();
        }
        drop(custody);
        bench.gate.spare(0);
        worker.join().unwrap();
        other.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(3 + usize::from(is_taken));
    });
}

#[test]
fn a_retired_slot_is_taken_by_one_of_two_and_then_by_the_other() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        bench.gate.withdraw(0);
        let take = |bench: Bench| {
            move || {
                let custody = bench.gate.wait_retired(0, None, || false).unwrap();
                bench.replica.use_it();
                drop(custody);
            }
        };
        let others = [
            thread::spawn(take(bench.clone())),
            thread::spawn(take(bench.clone())),
        ];
        ticket.retire();
        for other in others {
            other.join().unwrap();
        }
        bench.gate.spare(0);
        assert_eq!(bench.gate.counts().retired, 0);
        bench.assert_at_rest(3);
    });
}

#[test]
fn a_roll_ends_a_custody_and_not_the_one_after_it() {
    loom::model(|| {
        let bench = Bench::new(false);
        bench.gate.withdraw(0);
        let first = bench.gate.wait_retired(0, None, || false).unwrap();
        let roller = {
            let bench = bench.clone();
            thread::spawn(move || {
                assert_eq!(bench.gate.roll(), Some(1));
                bench.gate.withdraw(0);
                let custody = bench.gate.wait_retired(0, None, || false).unwrap();
                bench.rolled.use_it();
                drop(custody);
                bench.gate.spare(0);
            })
        };
        let other = bench.admit_elsewhere();
        bench.replica.use_it();
        drop(first);
        roller.join().unwrap();
        other.join().unwrap();
        assert_eq!(bench.starts(), 1);
        bench.assert_at_rest(3);
    });
}

#[test]
fn one_slot_rolls_while_its_ticket_ends() {
    loom::model(|| {
        let bench = Bench::new(false);
        let ticket = bench.held();
        let worker = bench.work_on(ticket);
        let other = bench.admit_elsewhere();
        assert_eq!(bench.gate.roll_slot(0), Some(1));
        bench.gate.wait_stragglers(1, None, || false).unwrap();
        bench.replica.use_it();
        worker.join().unwrap();
        other.join().unwrap();
        assert_eq!(bench.starts(), 2);
        bench.assert_at_rest(4);
    });
}
