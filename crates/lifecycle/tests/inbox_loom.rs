//! Answers on their way to the thread that settles them, under every interleaving that loom can find.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test -p wasm-molt-lifecycle
//! --release --test inbox_loom`.
//!
//! An owner that is not woken for an item that it has not taken shows as loom's deadlock.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use wasm_molt_lifecycle::{Inbox, Wake};

/// An event loop that sleeps until it is woken.
#[derive(Clone, Default)]
struct EventLoop(Arc<Inner>);

#[derive(Default)]
struct Inner {
    is_woken: Mutex<bool>,
    changed: Condvar,
    is_over: AtomicBool,
    wakes: AtomicUsize,
}

impl Wake for EventLoop {
    fn wake(&self) {
        assert!(!self.0.is_over.load(Relaxed), "woken after its end");
        self.0.wakes.fetch_add(1, Relaxed);
        *self.0.is_woken.lock().unwrap() = true;
        self.0.changed.notify_one();
    }
}

impl EventLoop {
    fn sleep(&self) {
        let mut is_woken = self.0.is_woken.lock().unwrap();
        while !*is_woken {
            is_woken = self.0.changed.wait(is_woken).unwrap();
        }
        *is_woken = false;
    }
}

type Bench = (EventLoop, Arc<Inbox<usize, EventLoop>>);

fn bench() -> Bench {
    let events = EventLoop::default();
    (events.clone(), Arc::new(Inbox::new(events)))
}

fn post(
    inbox: &Arc<Inbox<usize, EventLoop>>,
    items: std::ops::Range<usize>,
) -> thread::JoinHandle<usize> {
    let inbox = Arc::clone(inbox);
    thread::spawn(move || items.filter(|item| inbox.post(*item).is_err()).count())
}

/// As the owner does it once it was woken.
fn drain(inbox: &Inbox<usize, EventLoop>) -> std::collections::VecDeque<usize> {
    inbox.let_wake();
    inbox.take()
}

#[test]
fn every_answer_is_settled_once_and_in_its_thread_s_order_without_a_lost_wake_up() {
    loom::model(|| {
        let (events, inbox) = bench();
        let posters = [post(&inbox, 0..2), post(&inbox, 2..4)];
        let mut settled = Vec::new();
        while settled.len() < 4 {
            events.sleep();
            settled.extend(drain(&inbox));
        }
        for poster in posters {
            assert_eq!(poster.join().unwrap(), 0);
        }
        assert!(drain(&inbox).is_empty());
        let place = |item| settled.iter().position(|it| *it == item).unwrap();
        assert!(place(0) < place(1) && place(2) < place(3));
        assert!(events.0.wakes.load(Relaxed) <= 4);
    });
}

#[test]
fn what_is_urgent_wakes_as_well_and_is_counted_before_it_is_looked_for() {
    loom::model(|| {
        let (events, inbox) = bench();
        let poster = {
            let inbox = Arc::clone(&inbox);
            thread::spawn(move || {
                inbox.post_urgent(0).unwrap();
                inbox.post(1).unwrap();
            })
        };
        let (mut urgent, mut others) = (0, 0);
        while urgent + others < 2 {
            events.sleep();
            others += drain(&inbox).len();
            for _ in 0..inbox.urgent() {
                assert_eq!(inbox.take_urgent(), Some(0), "counted, and not there");
                urgent += 1;
            }
        }
        poster.join().unwrap();
        assert_eq!((urgent, others, inbox.urgent()), (1, 1, 0));
    });
}

#[test]
fn an_end_in_the_middle_leaves_each_answer_settled_or_left_over_or_given_back() {
    loom::model(|| {
        let (events, inbox) = bench();
        let posters = [post(&inbox, 0..2), post(&inbox, 2..3)];
        let settled = drain(&inbox).len();
        let left = inbox.close().len();
        events.0.is_over.store(true, Relaxed);
        let given_back: usize = posters.map(|it| it.join().unwrap()).iter().sum();
        assert_eq!(settled + left + given_back, 3);
        assert!(drain(&inbox).is_empty() && inbox.close().is_empty());
    });
}

#[test]
fn what_is_to_be_dropped_at_home_gets_there_until_the_very_end() {
    loom::model(|| {
        let (_events, inbox) = bench();
        let burier = {
            let inbox = Arc::clone(&inbox);
            thread::spawn(move || (0..2).filter(|item| inbox.bury(*item).is_err()).count())
        };
        let mut at_home = drain(&inbox).len();
        at_home += inbox.close().len();
        at_home += inbox.take_graves().len();
        assert_eq!(at_home + burier.join().unwrap(), 2);
        assert!(inbox.take_graves().is_empty());
    });
}
