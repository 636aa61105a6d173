//! The thread pool under every interleaving that loom can find.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test -p wasm-molt-lifecycle
//! --release --test threads_loom`.
//!
//! Threads and operations leave traces in the [`Bench`] that order nothing themselves; whoever is told
//! that they are gone must see them all. Lost wake-ups show as loom's deadlock.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::sync::mpsc::channel;
use loom::sync::{Arc, Mutex};
use loom::thread;
use wasm_molt_lifecycle::{
    PoolCounts, PoolState, RecycleFailure, Starter, ThreadPool, ThreadTicket,
};

/// A pool, the tickets of threads that only end when they are asked to, and what happened.
#[derive(Clone, Default)]
struct Bench {
    pool: ThreadPool,
    idle: Arc<Mutex<Vec<ThreadTicket>>>,
    /// Threads that have done their work, each the last thing before it ended.
    worked: Arc<AtomicUsize>,
    entered: Arc<AtomicUsize>,
    left: Arc<AtomicUsize>,
    asked: Arc<AtomicUsize>,
    starts: Arc<AtomicUsize>,
}

impl Bench {
    /// With one thread that runs until it is asked to end.
    fn running() -> Self {
        let bench = Self::default();
        let ticket = bench.pool.begin().unwrap();
        bench.run_idle(ticket);
        assert_eq!(bench.state(), PoolState::Running);
        bench
    }

    fn run_idle(&self, mut ticket: ThreadTicket) {
        // At once for whoever asks: it must reach every thread that has started.
        let mut idle = self.idle.lock().unwrap();
        ticket.started();
        idle.push(ticket);
    }

    fn state(&self) -> PoolState {
        self.pool.counts().state
    }

    fn work(&self, ticket: ThreadTicket) {
        self.worked.fetch_add(1, Relaxed);
        drop(ticket);
    }

    /// Inside an operation.
    fn operate(&self) {
        self.entered.fetch_add(1, Relaxed);
        assert_ne!(self.pool.counts().operations, 0);
        self.left.fetch_add(1, Relaxed);
    }

    fn stop(&self) {
        self.asked.fetch_add(1, Relaxed);
        let threads = self.pool.counts().threads;
        // Neither stale nor in between, for what entered has left.
        assert_eq!(self.entered.load(Relaxed), self.left.load(Relaxed));
        let idle = std::mem::take(&mut *self.idle.lock().unwrap());
        drop(idle);
        let counts = self.pool.counts();
        assert!(counts.threads <= threads, "nobody begins");
        assert!(
            matches!(counts.state, PoolState::Exiting | PoolState::Recycling),
            "nobody may begin, even if all have ended"
        );
    }

    /// Starts a thread that does not run yet when this returns.
    fn start(&self, starter: &Starter<'_>) -> Result<(), ()> {
        self.starts.fetch_add(1, Relaxed);
        let (bench, ticket) = (self.clone(), starter.begin());
        thread::spawn(move || bench.run_idle(ticket));
        Ok(())
    }

    fn exit(&self) {
        self.pool.exit(None, || self.stop()).unwrap();
    }

    fn recycle(&self) -> Result<(), RecycleFailure<()>> {
        self.pool
            .recycle(None, || self.stop(), |starter| self.start(starter))
    }

    fn asked(&self) -> usize {
        self.asked.load(Relaxed)
    }

    fn assert_none(&self) {
        assert_eq!(self.pool.counts(), PoolCounts::default());
        assert!(!self.pool.is_failed());
    }

    /// One thread runs; it ends here.
    fn assert_running(&self) {
        let expected = PoolCounts {
            state: PoolState::Running,
            threads: 1,
            started: 1,
            operations: 0,
        };
        assert_eq!(self.pool.counts(), expected);
        let ticket = self.idle.lock().unwrap().pop();
        drop(ticket);
        self.assert_none();
    }
}

#[test]
fn an_exit_sees_what_the_thread_that_it_asked_did() {
    loom::model(|| {
        let bench = Bench::default();
        let mut ticket = bench.pool.begin().unwrap();
        let (end, ended) = channel();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || {
                ticket.started();
                ended.recv().unwrap();
                bench.work(ticket);
            })
        };
        bench.pool.exit(None, || end.send(()).unwrap()).unwrap();
        assert_eq!(bench.worked.load(Relaxed), 1);
        bench.assert_none();
        worker.join().unwrap();
    });
}

#[test]
fn an_exit_misses_no_thread_that_ends_by_itself() {
    loom::model(|| {
        let bench = Bench::running();
        let ticket = bench.pool.begin().unwrap();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || bench.work(ticket))
        };
        bench.exit();
        assert_eq!(bench.worked.load(Relaxed), 1);
        assert_eq!(bench.asked(), 1);
        bench.assert_none();
        worker.join().unwrap();
    });
}

#[test]
fn the_last_thread_and_the_last_operation_end_an_exit_in_any_order() {
    loom::model(|| {
        let bench = Bench::default();
        let ticket = bench.pool.begin().unwrap();
        let operation = bench.pool.enter().unwrap();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || bench.work(ticket))
        };
        let operator = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.operate();
                drop(operation);
            })
        };
        bench.exit();
        assert_eq!(bench.worked.load(Relaxed), 1);
        assert_eq!(bench.left.load(Relaxed), 1);
        bench.assert_none();
        worker.join().unwrap();
        operator.join().unwrap();
    });
}

#[test]
fn a_thread_that_starts_while_all_are_to_end_is_no_obstacle() {
    loom::model(|| {
        let bench = Bench::running();
        let mut ticket = bench.pool.begin().unwrap();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || {
                ticket.started();
                bench.work(ticket);
            })
        };
        bench.exit();
        assert_eq!(bench.worked.load(Relaxed), 1);
        bench.assert_none();
        worker.join().unwrap();
    });
}

#[test]
fn an_operation_is_over_before_an_exit_asks_or_refused() {
    loom::model(|| {
        let bench = Bench::running();
        let operator = {
            let bench = bench.clone();
            thread::spawn(move || match bench.pool.enter() {
                Ok(_operation) => bench.operate(),
                Err(refused) => assert_eq!(refused.state, PoolState::Exiting),
            })
        };
        bench.exit();
        operator.join().unwrap();
        assert_eq!(bench.asked(), 1);
        bench.assert_none();
    });
}

#[test]
fn an_operation_that_waits_for_an_exit_gets_its_turn() {
    loom::model(|| {
        let bench = Bench::running();
        let operators = [(); 2].map(|()| {
            let bench = bench.clone();
            thread::spawn(move || {
                let _operation = bench.pool.wait_enter(None).unwrap();
                bench.operate();
            })
        });
        bench.exit();
        for operator in operators {
            operator.join().unwrap();
        }
        assert_eq!(bench.left.load(Relaxed), 2);
        bench.assert_none();
    });
}

#[test]
fn two_exits_ask_once_and_both_return() {
    loom::model(|| {
        let bench = Bench::running();
        let ticket = bench.pool.begin().unwrap();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || bench.work(ticket))
        };
        let other = {
            let bench = bench.clone();
            thread::spawn(move || bench.exit())
        };
        bench.exit();
        assert_eq!(bench.worked.load(Relaxed), 1);
        bench.assert_none();
        other.join().unwrap();
        worker.join().unwrap();
        assert_eq!(bench.asked(), 1);
    });
}

#[test]
fn an_exit_asks_in_place_of_one_whose_stop_panics() {
    loom::model(|| {
        let bench = Bench::running();
        let exit = |bench: &Bench| {
            bench.pool.exit(None, || {
                if bench.starts.fetch_add(1, Relaxed) == 0 {
                    resume_unwind(Box::new("foreign"));
                }
                bench.stop();
            })
        };
        let other = {
            let bench = bench.clone();
            thread::spawn(move || catch_unwind(AssertUnwindSafe(|| exit(&bench))).is_err())
        };
        let is_first = catch_unwind(AssertUnwindSafe(|| exit(&bench))).is_err();
        assert_ne!(other.join().unwrap(), is_first, "one panics, one exits");
        assert_eq!(bench.asked(), 1);
        bench.assert_none();
    });
}

#[test]
fn who_begins_is_refused_or_waited_for_or_of_the_next_life() {
    loom::model(|| {
        let bench = Bench::running();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || match bench.pool.begin() {
                Ok(mut ticket) => {
                    ticket.started();
                    bench.work(ticket);
                    true
                }
                Err(refused) => {
                    assert_eq!(refused.state, PoolState::Exiting);
                    false
                }
            })
        };
        bench.exit();
        assert_eq!(bench.asked(), 1);
        let has_begun = worker.join().unwrap();
        assert_eq!(bench.worked.load(Relaxed), usize::from(has_begun));
        bench.assert_none();
    });
}

#[test]
fn a_failure_ends_with_the_life_in_which_it_happened() {
    loom::model(|| {
        let bench = Bench::running();
        let ticket = bench.pool.begin().unwrap();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || {
                bench.worked.fetch_add(1, Relaxed);
                ticket.fail();
            })
        };
        bench.exit();
        assert_eq!(bench.worked.load(Relaxed), 1);
        bench.assert_none();
        worker.join().unwrap();
    });
}

#[test]
fn an_operation_is_over_before_a_recycle_asks_or_refused() {
    loom::model(|| {
        let bench = Bench::running();
        let operator = {
            let bench = bench.clone();
            thread::spawn(move || match bench.pool.enter() {
                Ok(_operation) => bench.operate(),
                Err(refused) => assert_eq!(refused.state, PoolState::Recycling),
            })
        };
        bench.recycle().unwrap();
        operator.join().unwrap();
        assert_eq!((bench.asked(), bench.starts.load(Relaxed)), (1, 1));
        bench.assert_running();
    });
}

#[test]
fn an_operation_waits_for_a_recycle_and_finds_threads() {
    loom::model(|| {
        let bench = Bench::running();
        let operator = {
            let bench = bench.clone();
            thread::spawn(move || {
                let _operation = bench.pool.wait_enter(None).unwrap();
                bench.operate();
                let counts = bench.pool.counts();
                assert_eq!((counts.threads, counts.started), (1, 1));
            })
        };
        bench.recycle().unwrap();
        operator.join().unwrap();
        bench.assert_running();
    });
}

#[test]
fn a_recycle_sees_what_the_old_threads_did_before_it_starts_others() {
    loom::model(|| {
        let bench = Bench::running();
        let ticket = bench.pool.begin().unwrap();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || bench.work(ticket))
        };
        let start = |starter: &Starter<'_>| {
            assert_eq!(bench.worked.load(Relaxed), 1);
            assert_eq!(bench.pool.counts().threads, 0);
            bench.start(starter)
        };
        bench.pool.recycle(None, || bench.stop(), start).unwrap();
        bench.assert_running();
        worker.join().unwrap();
    });
}

#[test]
fn nobody_but_the_recycler_begins_while_it_recycles() {
    loom::model(|| {
        let bench = Bench::running();
        let worker = {
            let bench = bench.clone();
            thread::spawn(move || match bench.pool.begin() {
                Ok(ticket) => bench.work(ticket),
                Err(refused) => assert_eq!(refused.state, PoolState::Recycling),
            })
        };
        bench.recycle().unwrap();
        worker.join().unwrap();
        bench.assert_running();
    });
}

#[test]
fn a_recycle_whose_new_threads_start_and_end_at_once_is_over() {
    loom::model(|| {
        let bench = Bench::running();
        let start = |starter: &Starter<'_>| {
            for does_start in [true, false] {
                let (bench, mut ticket) = (bench.clone(), starter.begin());
                thread::spawn(move || {
                    if does_start {
                        ticket.started();
                    }
                    bench.work(ticket);
                });
            }
            Ok::<_, ()>(())
        };
        bench.pool.recycle(None, || bench.stop(), start).unwrap();
        bench.exit();
        assert_eq!(bench.worked.load(Relaxed), 2);
        bench.assert_none();
    });
}

#[test]
fn two_recycles_join_or_follow_each_other() {
    loom::model(|| {
        let bench = Bench::running();
        let other = {
            let bench = bench.clone();
            thread::spawn(move || bench.recycle().unwrap())
        };
        bench.recycle().unwrap();
        other.join().unwrap();
        let starts = bench.starts.load(Relaxed);
        assert!((1..=2).contains(&starts));
        assert_eq!(bench.asked(), starts);
        bench.assert_running();
    });
}

#[test]
fn a_recycle_and_an_exit_leave_nothing() {
    loom::model(|| {
        let bench = Bench::running();
        let recycler = {
            let bench = bench.clone();
            thread::spawn(move || match bench.recycle() {
                // Before the exit, or after it, when there is nothing to recycle.
                Ok(()) => {}
                Err(RecycleFailure::Refused(refused)) => {
                    assert_eq!(refused.state, PoolState::Exiting);
                }
                Err(failure) => unreachable!("{failure}"),
            })
        };
        bench.exit();
        bench.assert_none();
        recycler.join().unwrap();
        assert_eq!(bench.asked(), 1 + bench.starts.load(Relaxed));
    });
}
