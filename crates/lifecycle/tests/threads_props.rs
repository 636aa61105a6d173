//! Random histories of a thread pool, step by step against a plain model.
//!
//! One thread plays all parts: guest threads, operations, and whoever ends them without patience. What
//! interleavings add is loom's affair.
#![cfg(not(loom))]

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use wasm_molt_lifecycle::{
    OperationTicket, PoolCounts, PoolRefused, PoolState, PoolTimeout, RecycleFailure, Starter,
    ThreadPool, ThreadTicket,
};

const NOW: Option<Duration> = Some(Duration::ZERO);

/// What a single thread does, or somebody who is about to start one.
#[derive(Debug, Clone)]
enum Act {
    Begin,
    Started(Index),
    End(Index),
    Fail(Index),
}

/// How foreign code returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Return {
    Well,
    Error,
    Panic,
}

/// What foreign code does before it returns.
#[derive(Debug, Clone)]
struct Script {
    acts: Vec<Act>,
    /// Whether it ends with the end of all threads.
    ends_all: bool,
    returns: Return,
}

#[derive(Debug, Clone)]
enum Op {
    Act(Act),
    Enter,
    WaitEnter,
    Leave(Index),
    Exit(Script),
    Recycle(Script, Script),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Begin),
        3 => any::<Index>().prop_map(Act::Started),
        2 => any::<Index>().prop_map(Act::End),
        1 => any::<Index>().prop_map(Act::Fail),
    ]
}

fn script(ends_all: f64) -> impl Strategy<Value = Script> {
    let returns = prop_oneof![
        6 => Just(Return::Well),
        1 => Just(Return::Error),
        1 => Just(Return::Panic),
    ];
    let acts = prop::collection::vec(act(), 0..6);
    (acts, prop::bool::weighted(ends_all), returns).prop_map(|(acts, ends_all, returns)| Script {
        acts,
        ends_all,
        returns,
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => act().prop_map(Op::Act),
        3 => Just(Op::Enter),
        1 => Just(Op::WaitEnter),
        5 => any::<Index>().prop_map(Op::Leave),
        2 => script(0.6).prop_map(Op::Exit),
        3 => (script(0.8), script(0.1)).prop_map(|(stop, start)| Op::Recycle(stop, start)),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    Begun,
    Started,
}

/// What the pool should do, without any of how.
#[derive(Debug, Default)]
struct Model {
    state: PoolState,
    /// As the tickets of the bench.
    threads: Vec<Thread>,
    operations: usize,
    is_failed: bool,
    /// Exiting, and somebody's `stop` has returned well.
    is_asked: bool,
    /// Foreign code runs; what it does has no consequences for the state until it returns.
    is_outside: bool,
}

impl Model {
    fn started(&self) -> usize {
        self.threads
            .iter()
            .filter(|thread| **thread == Thread::Started)
            .count()
    }

    fn have_all_started(&self) -> bool {
        self.started() == self.threads.len()
    }

    fn counts(&self) -> PoolCounts {
        PoolCounts {
            state: self.state,
            threads: self.threads.len(),
            started: self.started(),
            operations: self.operations,
        }
    }

    fn refusal(&self) -> Option<PoolRefused> {
        let is_refused = matches!(self.state, PoolState::Recycling | PoolState::Exiting);
        is_refused.then_some(PoolRefused { state: self.state })
    }

    /// After each act.
    fn settle(&mut self) {
        if self.threads.is_empty() {
            self.is_failed = false;
            if !self.is_outside {
                self.state = PoolState::None;
                self.is_asked = false;
            }
        } else if self.state == PoolState::None {
            self.state = PoolState::Initializing;
        }
        if self.state == PoolState::Initializing && self.have_all_started() {
            self.state = PoolState::Running;
        }
    }

    fn leave_to_exit(&mut self, is_asked: bool) {
        (self.state, self.is_asked) = (PoolState::Exiting, is_asked);
        self.settle();
    }
}

/// The pool and its model side by side; behind a cell, because foreign code plays with them too.
#[derive(Default)]
struct Bench {
    pool: ThreadPool,
    tickets: RefCell<Vec<ThreadTicket>>,
    operations: RefCell<Vec<OperationTicket>>,
    model: RefCell<Model>,
}

impl Bench {
    fn check(&self) {
        let model = self.model.borrow();
        assert_eq!(self.pool.counts(), model.counts());
        assert_eq!(self.pool.is_failed(), model.is_failed);
        let refused = self.pool.enter().err();
        assert_eq!(refused, model.refusal());
    }

    /// The place of some thread, if there is one.
    fn place(&self, index: Index) -> Option<usize> {
        let threads = self.tickets.borrow().len();
        (threads > 0).then(|| index.index(threads))
    }

    /// Takes a ticket off, with its like in the model.
    fn take(&self, place: usize) -> ThreadTicket {
        self.model.borrow_mut().threads.swap_remove(place);
        self.tickets.borrow_mut().swap_remove(place)
    }

    fn act(&self, act: &Act, starter: Option<&Starter<'_>>) {
        match act {
            Act::Begin => {
                let begun = self.pool.begin();
                let refused = self.model.borrow().refusal();
                assert_eq!(begun.as_ref().err().copied(), refused);
                let ticket = starter.map(Starter::begin).or(begun.ok());
                if let Some(ticket) = ticket {
                    self.model.borrow_mut().threads.push(Thread::Begun);
                    self.tickets.borrow_mut().push(ticket);
                }
            }
            Act::Started(index) => {
                if let Some(place) = self.place(*index) {
                    self.tickets.borrow_mut()[place].started();
                    self.model.borrow_mut().threads[place] = Thread::Started;
                }
            }
            Act::End(index) => {
                if let Some(place) = self.place(*index) {
                    drop(self.take(place));
                }
            }
            Act::Fail(index) => {
                if let Some(place) = self.place(*index) {
                    self.take(place).fail();
                    self.model.borrow_mut().is_failed = true;
                }
            }
        }
        self.model.borrow_mut().settle();
        self.check();
    }

    /// Foreign code, while the pool is in that state.
    fn play(&self, script: &Script, state: PoolState, starter: Option<&Starter<'_>>) {
        {
            let mut model = self.model.borrow_mut();
            (model.state, model.is_outside) = (state, true);
        }
        self.check();
        for act in &script.acts {
            self.act(act, starter);
        }
        if script.ends_all {
            self.end_all();
        }
        self.model.borrow_mut().is_outside = false;
        if script.returns == Return::Panic {
            resume_unwind(Box::new("foreign"));
        }
    }

    fn end_all(&self) {
        while !self.tickets.borrow().is_empty() {
            drop(self.take(0));
            self.model.borrow_mut().settle();
            self.check();
        }
    }

    fn exit(&self, stop: &Script) {
        let mut asked = 0;
        let is_due = {
            let model = self.model.borrow();
            model.operations == 0 && !model.threads.is_empty() && !model.is_asked
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            self.pool.exit(NOW, || {
                asked += 1;
                self.play(stop, PoolState::Exiting, None);
            })
        }));
        assert_eq!(asked, usize::from(is_due));
        let mut model = self.model.borrow_mut();
        let does_panic = is_due && stop.returns == Return::Panic;
        if is_due {
            model.leave_to_exit(!does_panic);
        }
        assert_eq!(outcome.is_err(), does_panic);
        if let Ok(outcome) = outcome {
            let is_over = model.threads.is_empty() && model.operations == 0;
            let left = PoolTimeout(model.counts());
            assert_eq!(outcome, if is_over { Ok(()) } else { Err(left) });
        }
    }

    fn recycle(&self, stop: &Script, start: &Script) {
        let (mut asked, mut starts) = (0, 0);
        let state = self.model.borrow().state;
        let is_due = matches!(state, PoolState::Initializing | PoolState::Running)
            && self.model.borrow().operations == 0;
        let mut is_stopped = false;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            self.pool.recycle(
                NOW,
                || {
                    asked += 1;
                    self.play(stop, PoolState::Recycling, None);
                    is_stopped = self.tickets.borrow().is_empty();
                },
                |starter| {
                    starts += 1;
                    self.play(start, PoolState::Recycling, Some(starter));
                    match start.returns {
                        Return::Error => Err("no luck"),
                        _ => Ok(()),
                    }
                },
            )
        }));
        assert_eq!(asked, usize::from(is_due));
        assert_eq!(starts, usize::from(is_stopped));
        let last = if is_stopped { start } else { stop };
        assert_eq!(outcome.is_err(), is_due && last.returns == Return::Panic);

        let mut model = self.model.borrow_mut();
        let timeout = |model: &Model| Err(RecycleFailure::Timeout(PoolTimeout(model.counts())));
        let expected = if !is_due {
            match state {
                PoolState::None => Ok(()),
                PoolState::Exiting => Err(RecycleFailure::Refused(PoolRefused { state })),
                _ => timeout(&model),
            }
        } else if outcome.is_err() {
            model.leave_to_exit(false);
            Ok(())
        } else if !is_stopped {
            model.leave_to_exit(true);
            timeout(&model)
        } else if start.returns == Return::Error {
            model.leave_to_exit(false);
            Err(RecycleFailure::Start("no luck"))
        } else {
            model.state = PoolState::Initializing;
            let have_all_started = model.have_all_started();
            model.settle();
            if have_all_started {
                Ok(())
            } else {
                timeout(&model)
            }
        };
        if let Ok(outcome) = outcome {
            assert_eq!(outcome, expected);
        }
    }

    fn step(&self, op: &Op) {
        match op {
            Op::Act(act) => self.act(act, None),
            Op::Enter | Op::WaitEnter => {
                let entered = match op {
                    Op::Enter => self.pool.enter(),
                    _ => self.pool.wait_enter(NOW),
                };
                let mut model = self.model.borrow_mut();
                assert_eq!(entered.as_ref().err().copied(), model.refusal());
                model.operations += usize::from(entered.is_ok());
                self.operations.borrow_mut().extend(entered);
            }
            Op::Leave(index) => {
                let mut operations = self.operations.borrow_mut();
                if !operations.is_empty() {
                    let place = index.index(operations.len());
                    drop(operations.swap_remove(place));
                    self.model.borrow_mut().operations -= 1;
                }
            }
            Op::Exit(stop) => self.exit(stop),
            Op::Recycle(stop, start) => self.recycle(stop, start),
        }
        self.check();
    }

    /// Whatever has happened, an exit ends it.
    fn run_down(&self) {
        self.operations.borrow_mut().clear();
        self.model.borrow_mut().operations = 0;
        self.check();
        let is_asked = self.model.borrow().is_asked;
        let outcome = self.pool.exit(NOW, || self.tickets.borrow_mut().clear());
        assert_eq!(outcome.is_err(), is_asked, "nobody is asked twice");
        self.tickets.borrow_mut().clear();
        assert_eq!(self.pool.counts(), PoolCounts::default());
        assert!(!self.pool.is_failed());
    }
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
    fn a_pool_does_what_its_model_does(history in prop::collection::vec(op(), 0..80)) {
        let bench = Bench::default();
        for op in &history {
            bench.step(op);
        }
        bench.run_down();
    }
}
