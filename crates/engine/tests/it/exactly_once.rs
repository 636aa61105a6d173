//! Random histories: whatever happens, each call is answered once and has run at most once, in an order
//! and on a generation that fit to when it was asked and answered.
//!
//! One thread makes up a history of calls, leases, stops, reloads, snapshots, resets, forks, recycles, failures
//! and an end, while pool, control and timer threads do what they do. There is no telling which of them comes
//! first, so the model does not say how each call ends: it says how it *may* end, given what was done to it,
//! and whether its code has then run.
//!
//! *When* is a number of steps: something that was answered before a step is over before whatever that step
//! begins. A call sees no generation that was replaced before it was asked, and none whose reload was asked
//! for only after its answer.
//!
//! The seed of a run is printed; `WASM_MOLT_SEED=<number>` repeats it, as far as threads repeat.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};
use wasm_molt_engine::{
    Backoff, CallControl, CallLimits, Error, ErrorCode, HostRef, Isolation, Lease, OnDrainTimeout,
    Outcome, RecycleOptions, RecycleStrategy, ReloadOptions, ReloadReport, ResetOptions,
    ResetReport, Snapshot, Source, Stop, Value, WaitId,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::rig::{Ended, Rig, Setup};
use wasm_molt_testkit::wait::Answer;

/// Every function first notes that it runs.
const LEDGER: &str = r#"(module $ledger
    (import "env" "note" (func $note (param i32)))
    (import "env" "hold" (func $hold (param i32) (result i32)))
    (import "env" "throw" (func $throw (param i32)))
    (import "env" "panic" (func $panic (param i32)))
    (memory (export "memory") 1)
    (func (export "plain") (param i32) (result i32) (call $note (local.get 0)) (local.get 0))
    (func (export "held") (param i32) (result i32)
        (call $note (local.get 0)) (call $hold (local.get 0)))
    (func (export "thrown") (param i32) (result i32)
        (call $note (local.get 0)) (call $throw (local.get 0)) (local.get 0))
    (func (export "panicked") (param i32) (result i32)
        (call $note (local.get 0)) (call $panic (local.get 0)) (local.get 0))
    (func (export "trapped") (param i32) (result i32) (call $note (local.get 0)) unreachable)
    (func (export "endless") (param i32) (result i32)
        (call $note (local.get 0)) (loop $again (br $again)) unreachable))"#;

/// The same with everything in another order, and more.
fn other_build() -> Source {
    let (head, functions) = LEDGER.split_once("    (func (export").unwrap();
    let functions = format!("    (func (export{}", functions.strip_suffix(')').unwrap());
    let mut functions: Vec<_> = functions.split("    (func (export").skip(1).collect();
    functions.reverse();
    let more = r#"    (func (export "more") (result i32) (i32.const 1))"#;
    let functions: String = functions
        .iter()
        .map(|function| format!("    (func (export{function}\n"))
        .collect();
    guests::source(&format!("{head}{more}\n{functions})"))
}

/// What a call does once it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Held,
    Thrown,
    Panicked,
    Trapped,
    Endless,
}

impl Kind {
    fn export(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Held => "held",
            Self::Thrown => "thrown",
            Self::Panicked => "panicked",
            Self::Trapped => "trapped",
            Self::Endless => "endless",
        }
    }
}

/// How it may be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    None,
    Signal,
    Timeout(u64),
}

#[derive(Debug, Clone)]
enum Op {
    Call(Kind, Bound),
    CallInLease(Index, Kind, Bound),
    CallSync(Kind),
    Abort(Index),
    LetThrough,
    Lease,
    CancelLease(Index),
    Release(Index),
    Reload {
        reason: u8,
        drain_ms: Option<u64>,
        interrupts: bool,
        skip_save: bool,
        is_rolling: bool,
        /// To the first build or to the other one.
        build: Option<bool>,
    },
    Snapshot,
    /// To the newest one.
    Reset {
        drain_ms: Option<u64>,
        interrupts: bool,
    },
    /// A copy, which runs one call of its own in the end.
    Fork,
    ReloadNow(u8),
    SnapshotNow,
    ResetNow,
    /// The next hook of that kind fails.
    Fail(Point),
    /// In the middle of it all.
    Close,
    Breathe(u8),
}

#[derive(Debug, Clone, Copy)]
struct World {
    instances: usize,
    threads: usize,
    max_queue: usize,
    home: bool,
    signals: bool,
    /// Calls until an instance is recycled.
    recycles: Option<u64>,
    /// By a roll, for which there is no state to hand over.
    recycle_rolls: bool,
    isolates: bool,
    ends_with_close: bool,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        8 => Just(Kind::Plain),
        4 => Just(Kind::Held),
        1 => Just(Kind::Thrown),
        1 => Just(Kind::Panicked),
        2 => Just(Kind::Trapped),
        2 => Just(Kind::Endless),
    ]
}

fn bound() -> impl Strategy<Value = Bound> {
    prop_oneof![
        4 => Just(Bound::None),
        2 => Just(Bound::Signal),
        2 => (0..3u64).prop_map(Bound::Timeout),
    ]
}

/// A call that never ends by itself can always be stopped.
fn call() -> impl Strategy<Value = (Kind, Bound)> {
    (kind(), bound()).prop_map(|(kind, bound)| match (kind, bound) {
        (Kind::Endless, Bound::None) => (kind, Bound::Signal),
        other => other,
    })
}

fn op() -> impl Strategy<Value = Op> {
    let reload = (
        0..2u8,
        prop::option::of(0..5u64),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop::option::weighted(0.2, any::<bool>()),
    );
    prop_oneof![
        20 => call().prop_map(|(kind, bound)| Op::Call(kind, bound)),
        8 => (any::<Index>(), call()).prop_map(|(i, (kind, bound))| Op::CallInLease(i, kind, bound)),
        3 => prop_oneof![Just(Kind::Plain), Just(Kind::Trapped), Just(Kind::Thrown)]
            .prop_map(Op::CallSync),
        6 => any::<Index>().prop_map(Op::Abort),
        8 => Just(Op::LetThrough),
        4 => Just(Op::Lease),
        1 => any::<Index>().prop_map(Op::CancelLease),
        4 => any::<Index>().prop_map(Op::Release),
        5 => reload.prop_map(|(reason, drain_ms, interrupts, skip_save, is_rolling, build)| {
            Op::Reload { reason, drain_ms, interrupts, skip_save, is_rolling, build }
        }),
        2 => Just(Op::Snapshot),
        2 => (prop::option::of(0..5u64), any::<bool>())
            .prop_map(|(drain_ms, interrupts)| Op::Reset { drain_ms, interrupts }),
        1 => Just(Op::Fork),
        2 => (0..2u8).prop_map(Op::ReloadNow),
        1 => Just(Op::SnapshotNow),
        3 => Just(Op::ResetNow),
        1 => prop_oneof![
            Just(Point::Imports),
            Just(Point::Initialize),
            Just(Point::Save),
            Just(Point::Restore)
        ]
        .prop_map(Op::Fail),
        5 => (0..32u8).prop_map(Op::Breathe),
    ]
}

fn world() -> impl Strategy<Value = World> {
    let queues = prop_oneof![Just(0usize), Just(2), Just(1024)];
    (
        1..4usize,
        1..4usize,
        queues,
        any::<bool>(),
        any::<bool>(),
        prop::option::weighted(0.3, 2..6u64),
        any::<bool>(),
        prop::bool::weighted(0.2),
        any::<bool>(),
    )
        .prop_map(
            |(
                instances,
                threads,
                max_queue,
                home,
                signals,
                recycles,
                recycle_rolls,
                isolates,
                ends_with_close,
            )| World {
                instances,
                threads,
                max_queue,
                home,
                signals,
                recycles,
                recycle_rolls: recycle_rolls && recycles.is_some(),
                isolates,
                ends_with_close,
            },
        )
}

/// How often each end was seen, so that the test can tell whether it tests anything.
type Tally = Mutex<BTreeMap<String, usize>>;

fn count(tally: &Tally, what: &str, end: &str) {
    *tally
        .lock()
        .unwrap()
        .entry(format!("{what}: {end}"))
        .or_default() += 1;
}

/// The end of something, in a word.
fn word<T>(ended: &wasm_molt_engine::Result<T>) -> String {
    match ended {
        Ok(_) => "done".into(),
        Err(Error::Thrown(_)) => "thrown".into(),
        Err(Error::Aborted(_)) => "aborted".into(),
        Err(error) => error.code().map_or("?", ErrorCode::as_str).into(),
    }
}

/// What was done to one call.
struct Call {
    tag: i32,
    kind: Kind,
    bound: Bound,
    /// What had been put in place by then.
    least_generation: u64,
    /// The last step before which there was no answer.
    asked: usize,
    answered: Option<usize>,
    answer: Answer<Ended>,
    ended: Option<Ended>,
    control: Option<Arc<CallControl>>,
    is_aborted: bool,
    lease: Option<u64>,
}

/// A call was inside an instance.
#[derive(Clone, Copy)]
struct Note {
    tag: i32,
    generation: u64,
}

/// A reload that was asked for.
struct Reload {
    what: &'static str,
    /// Before that step there was none.
    asked: usize,
    answer: Answer<wasm_molt_engine::Result<Arc<ReloadReport>>>,
    ended: Option<wasm_molt_engine::Result<Arc<ReloadReport>>>,
}

/// A copy that was asked for, and what runs in it.
struct Fork {
    child: Rig,
    notes: Notes,
    answer: Answer<wasm_molt_engine::Result<()>>,
}

type Notes = Arc<Mutex<Vec<Note>>>;

/// What the ledger imports.
fn script(door: &Door, notes: &Notes) -> Script {
    let log = Arc::clone(notes);
    Script::new()
        .function("note", move |call| {
            let Value::I32(tag) = call.args[0] else {
                panic!("{:?}", call.args)
            };
            let generation = call.replica.generation().get();
            log.lock().unwrap().push(Note { tag, generation });
            Ok(())
        })
        .function("hold", door.function())
        .function("throw", |call| {
            Err(Error::Thrown(HostRef::new(call.args[0].clone())))
        })
        .function("panic", |_| panic!("on purpose, in a host function"))
}

struct History {
    world: World,
    rig: Rig,
    door: Door,
    steps: usize,
    /// The newest generation that a reload has reported.
    reported: u64,
    notes: Notes,
    calls: Vec<Call>,
    /// Synchronous calls, with their outcome.
    sync: Vec<(i32, Kind, wasm_molt_engine::Result<Vec<Value>>)>,
    asked_leases: Vec<(Answer<wasm_molt_engine::Result<Arc<Lease>>>, WaitId)>,
    leases: Vec<Arc<Lease>>,
    reloads: Vec<Reload>,
    snapshots: Vec<Answer<wasm_molt_engine::Result<Arc<Snapshot>>>>,
    resets: Vec<Answer<wasm_molt_engine::Result<ResetReport>>>,
    forks: Vec<Fork>,
    /// What did not wait, and how it ended.
    at_once: Vec<(&'static str, String)>,
    closed: Option<Answer<wasm_molt_engine::Result<()>>>,
    builds: [Source; 2],
    has_rolled: bool,
    next_tag: i32,
    may_interrupt: bool,
    may_fail: bool,
}

impl History {
    fn begin(world: World) -> Self {
        let (door, notes) = (Door::new(), Notes::default());
        let mut script = script(&door, &notes);
        if !world.recycle_rolls {
            script = script
                .save(|_, _| Ok(Some(HostRef::new(()))))
                .restore(|_, _, _| Ok(()));
        }
        let setup = Setup::new(LEDGER).script(script).options(|o| {
            o.instances = world.instances;
            o.threads = Some(world.threads);
            o.max_queue = world.max_queue;
            o.engine.signals_based_traps = world.signals;
            if world.isolates {
                o.isolation = Isolation::PerCall;
            }
            o.recycle = world.recycles.map(|calls| RecycleOptions {
                calls: Some(calls),
                strategy: if world.recycle_rolls {
                    RecycleStrategy::Rolling
                } else {
                    RecycleStrategy::Exclusive
                },
                backoff: Backoff {
                    initial: Duration::from_millis(1),
                    max: Duration::from_millis(4),
                },
                ..RecycleOptions::default()
            });
        });
        let rig = if world.home {
            setup.at_home().start()
        } else {
            setup.start()
        };
        Self {
            world,
            rig,
            door,
            steps: 0,
            reported: 1,
            notes,
            calls: Vec::new(),
            sync: Vec::new(),
            asked_leases: Vec::new(),
            leases: Vec::new(),
            reloads: Vec::new(),
            snapshots: Vec::new(),
            resets: Vec::new(),
            forks: Vec::new(),
            at_once: Vec::new(),
            closed: None,
            builds: [guests::source(LEDGER), other_build()],
            has_rolled: world.recycle_rolls,
            next_tag: 0,
            may_interrupt: false,
            may_fail: false,
        }
    }

    fn tag(&mut self) -> i32 {
        self.next_tag += 1;
        self.next_tag
    }

    fn call(&mut self, lease: Option<&Arc<Lease>>, kind: Kind, bound: Bound) {
        let tag = self.tag();
        let limits = match bound {
            Bound::None => CallLimits::default(),
            Bound::Signal => CallLimits {
                timeout_ms: None,
                can_abort: true,
            },
            Bound::Timeout(ms) => CallLimits {
                timeout_ms: Some(ms),
                can_abort: false,
            },
        };
        let args = [Value::I32(tag)];
        let (ended, control) = match lease {
            Some(lease) => self.rig.call_in_with(lease, kind.export(), &args, limits),
            None => self.rig.call_with(kind.export(), &args, limits),
        };
        let lease = lease.map(|lease| lease.replica().id());
        self.calls.push(Call {
            tag,
            kind,
            bound,
            least_generation: self.reported,
            asked: self.steps,
            answered: None,
            answer: ended,
            ended: None,
            control,
            is_aborted: false,
            lease,
        });
    }

    /// What has been answered meanwhile was so before whatever comes now.
    fn take_answers(&mut self) {
        self.take_leases();
        let open = self.calls.iter_mut().filter(|call| call.ended.is_none());
        for call in open {
            call.ended = call.answer.try_get();
            call.answered = call.ended.is_some().then_some(self.steps);
        }
        for reload in self.reloads.iter_mut().filter(|it| it.ended.is_none()) {
            reload.ended = reload.answer.try_get();
            if let Some(Ok(report)) = &reload.ended {
                self.reported = self.reported.max(report.generation.get());
            }
        }
    }

    fn may_be_closed(&self) -> bool {
        self.closed.is_some() || !self.world.ends_with_close
    }

    /// Leases that have been granted meanwhile.
    fn take_leases(&mut self) {
        let asked = std::mem::take(&mut self.asked_leases);
        for (answer, id) in asked {
            match answer.try_get() {
                Some(Ok(lease)) => self.leases.push(lease),
                Some(Err(error)) => self.check_lease_refused(&error),
                None => self.asked_leases.push((answer, id)),
            }
        }
    }

    fn check_lease_refused(&self, error: &Error) {
        match error.code() {
            // What `cancel_lease` said.
            None => {}
            Some(ErrorCode::QueueFull) => assert!(self.world.max_queue < 1024, "{error}"),
            Some(ErrorCode::ReloadFailed) => assert!(self.may_fail, "{error}"),
            Some(ErrorCode::Closed) => assert!(self.may_be_closed(), "{error}"),
            Some(_) => panic!("a lease was refused with {error}"),
        }
    }

    fn abort(call: &mut Call) {
        if let (Some(control), Bound::Signal) = (&call.control, call.bound) {
            call.is_aborted = true;
            control.stop(Stop::Aborted(HostRef::new(call.tag)));
        }
    }

    fn fork(&mut self) {
        let notes = Notes::default();
        let setup = Setup::new(LEDGER).script(script(&self.door, &notes));
        let child = setup
            .options(|o| o.engine.signals_based_traps = self.world.signals)
            .create();
        let answer = self.rig.ask_fork(&child);
        self.forks.push(Fork {
            child,
            notes,
            answer,
        });
    }

    /// What does not wait is refused where it would have to.
    fn check_at_once<T>(&self, what: &str, ended: &wasm_molt_engine::Result<T>) {
        let Err(error) = ended else { return };
        match error.code() {
            Some(ErrorCode::Busy | ErrorCode::Reloading) => {}
            Some(ErrorCode::ReloadFailed) => assert!(self.may_fail, "{error}"),
            // It is before the end.
            Some(ErrorCode::Closed) => assert!(self.closed.is_some(), "{error}"),
            Some(ErrorCode::StaleHandle | ErrorCode::InvalidArgument) => {
                assert_eq!(what, "reset now", "{error}");
            }
            _ => panic!("{what} ended with {error}"),
        }
    }

    fn step(&mut self, op: &Op) {
        self.steps += 1;
        self.take_answers();
        match op {
            Op::Call(kind, bound) => self.call(None, *kind, *bound),
            Op::CallInLease(index, kind, bound) => {
                if !self.leases.is_empty() {
                    let lease = Arc::clone(index.get(&self.leases));
                    self.call(Some(&lease), *kind, *bound);
                }
            }
            Op::CallSync(kind) => {
                if self.world.home {
                    let tag = self.tag();
                    let outcome = self.rig.call_sync(kind.export(), &[Value::I32(tag)]);
                    self.sync.push((tag, *kind, outcome));
                }
            }
            Op::Abort(index) => {
                if !self.calls.is_empty() {
                    let index = index.index(self.calls.len());
                    Self::abort(&mut self.calls[index]);
                }
            }
            Op::LetThrough => self.door.go(),
            Op::Lease => {
                let asked = self.rig.ask_lease();
                self.asked_leases.push(asked);
            }
            Op::CancelLease(index) => {
                if !self.asked_leases.is_empty() {
                    let (_, id) = index.get(&self.asked_leases);
                    let error = Error::Aborted(HostRef::new("cancelled"));
                    self.rig.manager.cancel_lease(*id, error);
                }
            }
            Op::Release(index) => {
                if !self.leases.is_empty() {
                    let lease = self.leases.swap_remove(index.index(self.leases.len()));
                    self.rig.release(&lease);
                }
            }
            Op::Reload {
                reason,
                drain_ms,
                interrupts,
                skip_save,
                is_rolling,
                build,
            } => {
                self.may_interrupt |= interrupts;
                self.has_rolled |= is_rolling;
                let what = match (is_rolling, build) {
                    (_, Some(_)) => "swap",
                    (true, None) => "roll",
                    (false, None) => "reload",
                };
                let reload = self.rig.ask_reload(ReloadOptions {
                    reason: format!("reason {reason}"),
                    drain_timeout: drain_ms.map(Duration::from_millis),
                    on_drain_timeout: if *interrupts {
                        OnDrainTimeout::Interrupt
                    } else {
                        OnDrainTimeout::Abort
                    },
                    skip_save: *skip_save || *is_rolling,
                    strategy: if *is_rolling {
                        wasm_molt_engine::Strategy::Rolling
                    } else {
                        wasm_molt_engine::Strategy::Exclusive
                    },
                    source: build.map(|other| self.builds[usize::from(other)].clone()),
                    is_recycle: false,
                });
                self.reloads.push(Reload {
                    what,
                    asked: self.steps,
                    answer: reload,
                    ended: None,
                });
            }
            Op::Snapshot => self.snapshots.push(self.rig.ask_snapshot().0),
            Op::Reset {
                drain_ms,
                interrupts,
            } => {
                self.may_interrupt |= interrupts;
                let reset = self.rig.ask_reset(ResetOptions {
                    drain_timeout: drain_ms.map(Duration::from_millis),
                    on_drain_timeout: if *interrupts {
                        OnDrainTimeout::Interrupt
                    } else {
                        OnDrainTimeout::Abort
                    },
                    ..ResetOptions::default()
                });
                self.resets.push(reset);
            }
            Op::Fork => self.fork(),
            Op::ReloadNow(reason) => {
                let options = ReloadOptions {
                    reason: format!("reason {reason}"),
                    ..ReloadOptions::default()
                };
                let ended = self.rig.reload_now(options);
                self.check_at_once("reload now", &ended);
                if let Ok(report) = &ended {
                    self.reported = self.reported.max(report.generation.get());
                }
                let (_, none) = wasm_molt_testkit::wait::answer("taken");
                self.reloads.push(Reload {
                    what: "reload now",
                    asked: self.steps,
                    answer: none,
                    ended: Some(ended),
                });
            }
            Op::SnapshotNow => {
                let ended = self.rig.snapshot_now();
                self.check_at_once("snapshot now", &ended);
                self.at_once.push(("snapshot now", word(&ended)));
            }
            Op::ResetNow => {
                let ended = self.rig.reset_now(ResetOptions::default());
                self.check_at_once("reset now", &ended);
                self.at_once.push(("reset now", word(&ended)));
            }
            Op::Close => {
                if self.closed.is_none() {
                    self.closed = Some(self.rig.close(None));
                }
            }
            // What is asked for is a hook as well.
            Op::Fail(Point::Save | Point::Restore) if self.world.recycle_rolls => {}
            Op::Fail(point) => {
                self.may_fail = true;
                self.rig
                    .faults
                    .fail(*point, 0, Error::Thrown(HostRef::new("a hook")));
            }
            Op::Breathe(times) => (0..*times).for_each(|_| thread::yield_now()),
        }
    }

    /// Ends it and checks everything.
    fn end(mut self, tally: &Tally) {
        if self.world.ends_with_close {
            self.end_gracefully();
        } else {
            self.rig.destroy().get().unwrap();
        }
        assert_eq!(
            self.rig.manager.state(),
            wasm_molt_engine::ManagerState::Closed
        );
        if let Some(closed) = self.closed.take() {
            assert!(closed.get().is_ok(), "close() in the middle of it all");
            self.closed = Some(self.rig.close(None));
        }
        for (answer, _) in std::mem::take(&mut self.asked_leases) {
            match answer.get() {
                Ok(lease) => assert!(lease.enter().is_err(), "a lease after the end"),
                Err(error) => self.check_lease_refused(&error),
            }
        }
        self.check_reloads(tally);
        self.check_pauses(tally);
        self.check_forks(tally);
        for call in &mut self.calls {
            if call.ended.is_none() {
                let (_, none) = wasm_molt_testkit::wait::answer("taken");
                call.ended = Some(std::mem::replace(&mut call.answer, none).get());
            }
        }
        let notes = std::mem::take(&mut *self.notes.lock().unwrap());
        let mut ran: HashMap<i32, usize> = HashMap::new();
        notes
            .iter()
            .for_each(|note| *ran.entry(note.tag).or_default() += 1);
        self.check_order(&notes);
        self.check_intervals(&notes);
        let answered = (self.calls.len() + self.sync_that_ran()) as u64;
        for call in std::mem::take(&mut self.calls) {
            let times = ran.get(&call.tag).copied().unwrap_or_default();
            self.check_call(call, times, tally);
        }
        for (tag, kind, outcome) in std::mem::take(&mut self.sync) {
            count(tally, "at home", &word(&outcome));
            check_sync(kind, &outcome, ran.get(&tag).copied().unwrap_or_default());
        }
        // Only now: a call that was stopped while it waited is counted just before it is answered.
        let stats = self.rig.stats();
        if stats.reloads.contains_key("calls") {
            let what = if self.world.recycle_rolls {
                "recycle by a roll"
            } else {
                "recycle"
            };
            count(tally, what, "done");
        }
        let c = stats.calls;
        let counted = c.completed + c.failed + c.trapped + c.interrupted + c.rejected;
        assert_eq!(counted, answered, "{c:?}");
        let replaced: u64 = stats.reloads.values().sum();
        assert_eq!(stats.generation, replaced + 1, "{:?}", stats.reloads);
    }

    /// Synchronous calls that got inside: only those are counted.
    fn sync_that_ran(&self) -> usize {
        let is_counted = |outcome: &wasm_molt_engine::Result<Vec<Value>>| match outcome {
            Ok(_) | Err(Error::Thrown(_) | Error::Trap { .. }) => true,
            Err(_) => false,
        };
        self.sync
            .iter()
            .filter(|(_, _, outcome)| is_counted(outcome))
            .count()
    }

    /// Everything is let go, so that everything ends by itself, and then close() has nothing to cut.
    fn end_gracefully(&mut self) {
        self.door.open();
        self.calls.iter_mut().for_each(Self::abort);
        for lease in std::mem::take(&mut self.leases) {
            self.rig.release(&lease);
        }
        for (answer, _) in std::mem::take(&mut self.asked_leases) {
            match answer.get() {
                Ok(lease) => self.rig.release(&lease),
                Err(error) => self.check_lease_refused(&error),
            }
        }
        self.rig.close(None).get().unwrap();
    }

    fn check_reloads(&mut self, tally: &Tally) {
        let may_be_closed = self.may_be_closed();
        let last = self.rig.manager.generation().get();
        let mut generations = Vec::new();
        for reload in &mut self.reloads {
            if reload.ended.is_none() {
                let (_, none) = wasm_molt_testkit::wait::answer("taken");
                reload.ended = Some(std::mem::replace(&mut reload.answer, none).get());
            }
            let Some(ended) = &reload.ended else { continue };
            count(tally, reload.what, &word(ended));
            match ended {
                Ok(report) => generations.push(report.generation.get()),
                Err(error) => match error.code() {
                    Some(ErrorCode::DrainTimeout) => {}
                    Some(ErrorCode::Busy | ErrorCode::Reloading) => {
                        assert_eq!(reload.what, "reload now", "{error}");
                    }
                    Some(ErrorCode::ReloadFailed) => assert!(self.may_fail, "{error}"),
                    Some(ErrorCode::Closed) => assert!(may_be_closed, "{error}"),
                    _ => panic!("a reload ended with {error}"),
                },
            }
        }
        let is_theirs = |generation: &u64| (2..=last).contains(generation);
        assert!(generations.iter().all(is_theirs), "{generations:?}, {last}");
        // Who joins gets the report of another one; otherwise they come in the order in which they were asked for.
        let mut own: Vec<u64> = Vec::new();
        for generation in generations {
            if !own.contains(&generation) {
                own.push(generation);
            }
        }
        assert!(own.is_sorted(), "{own:?}");
    }

    fn check_pauses(&mut self, tally: &Tally) {
        for snapshot in std::mem::take(&mut self.snapshots) {
            let ended = snapshot.get();
            count(tally, "snapshot", &word(&ended));
            self.check_pause(ended.err());
        }
        for reset in std::mem::take(&mut self.resets) {
            let ended = reset.get();
            count(tally, "reset", &word(&ended));
            self.check_pause(ended.err());
        }
        for (what, ended) in std::mem::take(&mut self.at_once) {
            count(tally, what, &ended);
        }
    }

    /// A copy answers for itself, once, whatever has become of its parent.
    fn check_forks(&mut self, tally: &Tally) {
        for fork in std::mem::take(&mut self.forks) {
            let ended = fork.answer.get();
            count(tally, "fork", &word(&ended));
            if ended.is_ok() {
                assert_eq!(fork.child.number("plain", &[1]), 1);
            }
            let notes = std::mem::take(&mut *fork.notes.lock().unwrap());
            let ran: Vec<_> = notes.iter().map(|it| (it.tag, it.generation)).collect();
            let must_have_run: &[_] = if ended.is_ok() { &[(1, 1)] } else { &[] };
            assert_eq!(ran, must_have_run);
            self.check_pause(ended.err());
        }
    }

    fn check_pause(&self, error: Option<Error>) {
        let Some(error) = error else { return };
        match error.code() {
            // Asked for and not begun: an end waits for reloads only.
            Some(ErrorCode::Closed) => {}
            // The snapshot is of a build that does not serve any more, or not taken yet.
            Some(ErrorCode::DrainTimeout | ErrorCode::StaleHandle | ErrorCode::InvalidArgument) => {
            }
            Some(ErrorCode::ReloadFailed) => assert!(self.may_fail, "{error}"),
            _ => panic!("a pause ended with {error}"),
        }
    }

    /// One instance runs its calls in the order in which they came, unless two generations run at
    /// once; so does one lease, whatever the generations do.
    fn check_order(&self, notes: &[Note]) {
        let is_sync = |note: &&Note| self.sync.iter().any(|(sync, _, _)| *sync == note.tag);
        let mut orders: HashMap<Option<u64>, Vec<i32>> = HashMap::new();
        for note in notes.iter().filter(|note| !is_sync(note)) {
            let call = self.calls.iter().find(|call| call.tag == note.tag).unwrap();
            orders.entry(call.lease).or_default().push(note.tag);
        }
        for (lease, order) in orders {
            if lease.is_some() || self.world.instances == 1 && !self.has_rolled {
                assert!(order.is_sorted(), "{lease:?}: {order:?}");
            }
        }
    }

    /// What does not overlap is seen in its order: calls among themselves, and calls and reloads.
    fn check_intervals(&self, notes: &[Note]) {
        for (place, note) in notes.iter().enumerate() {
            let Some(call) = self.calls.iter().find(|call| call.tag == note.tag) else {
                continue;
            };
            let Note { tag, generation } = *note;
            // A lease keeps the instance that it has.
            assert!(
                call.lease.is_some() || generation >= call.least_generation,
                "call {tag} ran on {generation}, which {} had replaced before it was asked",
                call.least_generation
            );
            for later in &notes[place + 1..] {
                let later = self.calls.iter().find(|call| call.tag == later.tag);
                let is_before = |later: &Call| later.answered.is_some_and(|at| at <= call.asked);
                assert!(
                    !later.is_some_and(is_before),
                    "call {tag} ran before one that was answered before it was asked"
                );
            }
            for reload in &self.reloads {
                if let Some(Ok(report)) = &reload.ended
                    && call.answered.is_some_and(|at| at <= reload.asked)
                {
                    let made = report.generation.get();
                    assert!(
                        generation < made,
                        "call {tag} ran on {made}, which came after it"
                    );
                }
            }
        }
    }

    /// Whether the answer is one of those that this call may have, and fits to whether it ran.
    fn check_call(&self, call: Call, times: usize, tally: &Tally) {
        let Call {
            tag,
            kind,
            bound,
            ended,
            is_aborted,
            lease,
            ..
        } = call;
        assert!(times <= 1, "call {tag} ran {times} times");
        let ended = ended.unwrap();
        let place = match lease {
            Some(_) => "in a lease",
            None if self.world.isolates => "isolated",
            None => "call",
        };
        count(tally, place, &word(&ended));
        let what = || format!("call {tag}, {kind:?}, {bound:?}, ran {times} times: {ended:?}");
        let must_have_run = match &ended {
            Ok(Outcome::Values(values)) => {
                assert!(matches!(kind, Kind::Plain | Kind::Held), "{}", what());
                assert!(
                    matches!(values.as_slice(), [Value::I32(v)] if *v == tag),
                    "{}",
                    what()
                );
                Some(true)
            }
            Ok(Outcome::Bytes(_)) => panic!("{}", what()),
            Err(Error::Trap { .. }) => {
                assert_eq!(kind, Kind::Trapped, "{}", what());
                Some(true)
            }
            Err(Error::Thrown(thrown)) => {
                let thrown = thrown.downcast_ref::<Value>();
                assert!(
                    matches!(thrown, Some(Value::I32(v)) if *v == tag),
                    "{}",
                    what()
                );
                Some(true)
            }
            Err(Error::Aborted(reason)) => {
                assert!(is_aborted, "{}", what());
                assert_eq!(reason.downcast_ref(), Some(&tag), "{}", what());
                None
            }
            Err(error) => match error.code() {
                Some(ErrorCode::Internal) => {
                    assert_eq!(kind, Kind::Panicked, "{}", what());
                    Some(true)
                }
                Some(ErrorCode::Timeout) => {
                    assert!(matches!(bound, Bound::Timeout(_)), "{}", what());
                    None
                }
                Some(ErrorCode::Interrupted) => {
                    assert!(self.may_interrupt || self.may_be_closed(), "{}", what());
                    None
                }
                Some(ErrorCode::QueueFull) => {
                    assert!(self.world.max_queue < 1024, "{}", what());
                    Some(false)
                }
                Some(ErrorCode::StaleHandle) => {
                    assert!(lease.is_some(), "{}", what());
                    Some(false)
                }
                Some(ErrorCode::ReloadFailed) => {
                    assert!(self.may_fail, "{}", what());
                    Some(false)
                }
                Some(ErrorCode::Closed) => {
                    assert!(self.may_be_closed(), "{}", what());
                    Some(false)
                }
                _ => panic!("{}", what()),
            },
        };
        if let Some(must_have_run) = must_have_run {
            assert_eq!(times == 1, must_have_run, "{}", what());
        }
    }
}

fn check_sync(kind: Kind, outcome: &wasm_molt_engine::Result<Vec<Value>>, times: usize) {
    let (is_expected, must_have_run) = match outcome {
        Ok(_) => (kind == Kind::Plain, true),
        Err(Error::Trap { .. }) => (kind == Kind::Trapped, true),
        Err(Error::Thrown(_)) => (kind == Kind::Thrown, true),
        Err(error) => {
            let code = error.code();
            let refusals = [
                ErrorCode::Busy,
                ErrorCode::Reloading,
                ErrorCode::ReloadFailed,
                ErrorCode::Closed,
            ];
            (code.is_some_and(|code| refusals.contains(&code)), false)
        }
    };
    assert!(
        is_expected && times == usize::from(must_have_run),
        "{kind:?}, {times}: {outcome:?}"
    );
}

/// What a run must have come across to be worth anything.
const ENDS: [&str; 27] = [
    "call: done",
    "call: thrown",
    "call: aborted",
    "call: ERR_WASM_TRAP",
    "call: ERR_WASM_TIMEOUT",
    "call: ERR_WASM_INTERRUPTED",
    "call: ERR_WASM_QUEUE_FULL",
    "call: ERR_WASM_CLOSED",
    "in a lease: done",
    "in a lease: ERR_WASM_STALE_HANDLE",
    "at home: done",
    "reload: done",
    "reload: ERR_WASM_DRAIN_TIMEOUT",
    "roll: done",
    "swap: done",
    "in a lease: ERR_WASM_INTERRUPTED",
    "snapshot: done",
    "reset: done",
    "recycle: done",
    "recycle by a roll: done",
    "isolated: done",
    "isolated: ERR_WASM_TRAP",
    "isolated: ERR_WASM_TIMEOUT",
    "fork: done",
    "reload now: done",
    "snapshot now: done",
    "reset now: done",
];

pub(crate) fn seed() -> u64 {
    let given = std::env::var("WASM_MOLT_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    })
}

#[test]
fn every_call_is_answered_once_and_has_run_at_most_once() {
    let seed = seed();
    println!("WASM_MOLT_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = ProptestConfig {
        cases: 400,
        failure_persistence: None,
        // A history that hangs takes its patience each time.
        max_shrink_time: 60_000,
        ..ProptestConfig::default()
    };
    let tally = Tally::default();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let ops = |count| prop::collection::vec(op(), count);
    let close = prop::option::weighted(0.2, Just(Op::Close));
    let histories = (world(), ops(1..80), close, ops(0..10));
    let histories = histories.prop_map(|(world, mut ops, close, more)| {
        ops.extend(close);
        ops.extend(more);
        (world, ops)
    });
    let outcome = TestRunner::new_with_rng(config, rng).run(&histories, |(world, ops)| {
        let mut history = History::begin(world);
        ops.iter().for_each(|op| history.step(op));
        history.end(&tally);
        Ok(())
    });
    match outcome {
        Ok(()) => {
            let tally = tally.into_inner().unwrap();
            println!("{tally:#?}");
            for end in ENDS {
                assert!(tally.contains_key(end), "'{end}' never came up: {tally:#?}");
            }
        }
        Err(TestError::Fail(reason, history)) => {
            panic!("WASM_MOLT_SEED={seed}\n{reason}\n{history:#?}")
        }
        Err(error) => panic!("WASM_MOLT_SEED={seed}\n{error}"),
    }
}
