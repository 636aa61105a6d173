//! A guest with state survives its reloads: nothing is lost, nothing is counted twice.
//!
//! Every call notes, through an import, on which instance it runs, and the hooks note what they
//! carry. Afterwards that history is played back over a model, which knows what each instance must
//! have held whenever its state was read.
//!
//! The seed of a run is printed; `WASM_MOLT_SEED=<number>` repeats it, as far as threads repeat.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use wasm_molt_engine::{
    CallControl, CallLimits, Error, ErrorCode, HostRef, Lease, OnDrainTimeout, ReloadOptions,
    ReloadReport, Result, Source, Stop, Strategy, Value, WaitId,
};
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::inside::call_leased;
use wasm_molt_testkit::rig::{Ended, Rig, Setup, because, number, values};
use wasm_molt_testkit::wait::Answer;

use crate::exactly_once::seed;

/// `add(tag) -> 3 * tag + 1` counts the call and sums up the tags.
const ADD: &str = r#"
    (func (export "add") (param i32) (result i32)
        (call $note (local.get 0))
        (i32.store (i32.const 16) (i32.add (i32.load (i32.const 16)) (i32.const 1)))
        (i64.store (i32.const 24)
            (i64.add (i64.load (i32.const 24)) (i64.extend_i32_u (local.get 0))))
        (i32.add (i32.mul (local.get 0) (i32.const 3)) (i32.const 1)))"#;
/// The same with other code.
const ADD_OTHERWISE: &str = r#"
    (func (export "add") (param i32) (result i32)
        (call $note (local.get 0))
        (i64.store (i32.const 24)
            (i64.add (i64.extend_i32_u (local.get 0)) (i64.load (i32.const 24))))
        (i32.store (i32.const 16) (i32.sub (i32.load (i32.const 16)) (i32.const -1)))
        (i32.sub (i32.shl (local.get 0) (i32.const 2)) (i32.sub (local.get 0) (i32.const 1))))"#;
const REST: &str = r#"
    (func (export "state") (result i32 i64)
        (i32.load (i32.const 16)) (i64.load (i32.const 24)))
    (func (export "put") (param i32 i64)
        (i32.store (i32.const 16) (local.get 0)) (i64.store (i32.const 24) (local.get 1)))
    (func (export "throw") (param i32) (result i32)
        (call $note (local.get 0)) (call $throw (local.get 0)) (local.get 0))
    (func (export "trap") (param i32) (result i32)
        (call $note (local.get 0)) (i64.store (i32.const 16) (i64.const -1)) unreachable)
    (func (export "spin") (param i32) (result i32)
        (call $note (local.get 0)) (loop $again (br $again)) unreachable)"#;

/// Two builds of one guest, with their functions at different positions.
fn builds() -> [Source; 2] {
    [[ADD, REST], [REST, ADD_OTHERWISE]].map(|[first, second]| {
        guests::source(&format!(
            r#"(module $ledger
            (import "env" "note" (func $note (param i32)))
            (import "env" "throw" (func $throw (param i32)))
            (memory (export "memory") 1)
            {first}{second})"#
        ))
    })
}

/// A count and a sum.
type State = (i32, i64);

#[derive(Debug, Clone, PartialEq)]
enum Entry {
    /// The call with that tag runs on that instance.
    Ran(i32, u64),
    Saved(u64, State),
    Restored(u64, State),
}

type Log = Arc<Mutex<Vec<Entry>>>;

fn state_of(values: &[Value]) -> State {
    match values {
        [Value::I32(count), Value::I64(sum)] => (*count, *sum),
        other => panic!("{other:?}"),
    }
}

fn read_state(lease: &Arc<Lease>) -> Result<State> {
    let inside = lease.enter()?;
    Ok(state_of(&call_leased(&inside, "state", Vec::new())?))
}

fn script(log: &Log) -> Script {
    let (notes, saves, restores) = (Arc::clone(log), Arc::clone(log), Arc::clone(log));
    Script::new()
        .function("note", move |call| {
            let Value::I32(tag) = call.args[0] else {
                panic!("{:?}", call.args)
            };
            notes
                .lock()
                .unwrap()
                .push(Entry::Ran(tag, call.replica.id()));
            Ok(())
        })
        .function("throw", |call| {
            Err(Error::Thrown(HostRef::new(call.args[0].clone())))
        })
        .save(move |lease, _| {
            let state = read_state(lease)?;
            let id = lease.replica().id();
            saves.lock().unwrap().push(Entry::Saved(id, state));
            Ok(Some(HostRef::new(state)))
        })
        .restore(move |lease, saved, _| {
            let state: State = *saved.downcast_ref().unwrap();
            let inside = lease.enter()?;
            let args = vec![Value::I32(state.0), Value::I64(state.1)];
            call_leased(&inside, "put", args)?;
            let id = lease.replica().id();
            restores.lock().unwrap().push(Entry::Restored(id, state));
            Ok(())
        })
}

const REPLICAS: usize = 4;

fn rig(log: &Log, threads: usize) -> Rig {
    let [build, _] = builds();
    let setup = Setup::of(build).script(script(log)).options(|o| {
        o.instances = REPLICAS;
        o.threads = Some(threads);
        o.max_queue = 4096;
    });
    setup.start()
}

/// The states of the instances that serve, by instance.
fn final_states(rig: &Rig) -> Vec<(u64, State)> {
    let leases: Vec<_> = (0..REPLICAS).map(|_| rig.lease()).collect();
    let read = |lease: &Arc<Lease>| {
        let state = values(rig.call_in(lease, "state", &[]).get());
        (lease.replica().id(), state_of(&state))
    };
    let states = leases.iter().map(read).collect();
    leases.iter().for_each(|lease| rig.release(lease));
    states
}

#[test]
fn two_hundred_reloads_under_a_hundred_thousand_calls() {
    const RELOADS: i32 = 200;
    const BATCH: i32 = 500;
    let log = Log::default();
    let rig = rig(&log, REPLICAS);
    let [first, second] = builds();
    let mut reloads = Vec::new();
    let mut calls = Vec::new();
    for n in 0..RELOADS {
        for tag in n * BATCH..(n + 1) * BATCH {
            calls.push((tag, rig.call("add", &[Value::I32(tag)])));
            if tag == n * BATCH + BATCH / 2 {
                // Some to another build and back.
                let source = match n % 20 {
                    5 => Some(second.clone()),
                    15 => Some(first.clone()),
                    _ => None,
                };
                reloads.push(rig.ask_reload(ReloadOptions {
                    source,
                    ..because(&format!("under load {n}"))
                }));
            }
        }
        // One batch is always on its way.
        if calls.len() >= 2 * BATCH as usize {
            for (tag, call) in calls.drain(..BATCH as usize) {
                assert_eq!(number(call.get()), 3 * tag + 1);
            }
        }
    }
    for (tag, call) in calls {
        assert_eq!(number(call.get()), 3 * tag + 1);
    }
    let reports: Vec<_> = reloads.into_iter().map(|r| r.get().unwrap()).collect();
    let all = RELOADS * BATCH;
    assert_eq!(rig.stats().generation, RELOADS as u64 + 1);
    let met: usize = reports.iter().map(|r| r.drained + r.queued).sum();
    assert!(met > RELOADS as usize, "the reloads met {met} calls");

    let states = final_states(&rig);
    let count: i32 = states.iter().map(|(_, (count, _))| count).sum();
    let sum: i64 = states.iter().map(|(_, (_, sum))| sum).sum();
    assert_eq!(
        (count, sum),
        (all, i64::from(all) * i64::from(all - 1) / 2),
        "each call has left its mark, once"
    );
    let log = log.lock().unwrap();
    let mut model = Model::default();
    model.play(&log, |_| true);
    model.check_final(&states);

    // In arrival order: whoever runs, of those before it only such are missing as have an instance.
    let ran = log.iter().filter_map(|entry| match entry {
        Entry::Ran(tag, _) => Some(*tag),
        _ => None,
    });
    let mut has_run = vec![false; all as usize];
    let mut next = 0;
    for tag in ran {
        assert!(!std::mem::replace(&mut has_run[tag as usize], true));
        while has_run.get(next) == Some(&true) {
            next += 1;
        }
        let before = has_run.get(next..tag as usize).unwrap_or_default();
        let overtaken = before.iter().filter(|has_run| !**has_run).count();
        assert!(overtaken < REPLICAS, "{tag} has overtaken {overtaken}");
    }
    assert_eq!(next, all as usize);
}

/// What each instance holds.
#[derive(Default)]
struct Model {
    held: HashMap<u64, State>,
    ran: HashMap<i32, usize>,
}

impl Model {
    /// * `did_add`: whether the call with that tag has added it.
    fn play(&mut self, log: &[Entry], did_add: impl Fn(i32) -> bool) {
        for entry in log {
            match *entry {
                Entry::Ran(tag, id) => {
                    *self.ran.entry(tag).or_default() += 1;
                    if did_add(tag) {
                        let (count, sum) = self.held.entry(id).or_default();
                        *count += 1;
                        *sum += i64::from(tag);
                    }
                }
                Entry::Saved(id, state) => {
                    let held = self.held.get(&id).copied().unwrap_or_default();
                    assert_eq!(state, held, "instance {id} was read");
                }
                Entry::Restored(id, state) => {
                    let before = self.held.insert(id, state);
                    assert_eq!(before, None, "instance {id} was used before it was ready");
                }
            }
        }
    }

    fn check_final(&self, states: &[(u64, State)]) {
        for (id, state) in states {
            let held = self.held.get(id).copied().unwrap_or_default();
            assert_eq!(*state, held, "instance {id} in the end");
        }
    }
}

/// xorshift64*: enough to make up a history, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }
}

struct Call {
    tag: i32,
    name: &'static str,
    ended: Answer<Ended>,
    control: Option<Arc<CallControl>>,
    in_lease: bool,
}

/// A history of everything that may happen, made up by dice.
struct Mixture {
    rig: Rig,
    dice: Dice,
    builds: [Source; 2],
    calls: Vec<Call>,
    leases: Vec<Arc<Lease>>,
    asked: Vec<(Answer<Result<Arc<Lease>>>, WaitId)>,
    reloads: Vec<Answer<Result<Arc<ReloadReport>>>>,
    tags: i32,
    ended: HashMap<i32, bool>,
    tally: HashMap<String, usize>,
}

impl Mixture {
    fn call(&mut self) {
        self.tags += 1;
        let tag = self.tags;
        let (name, limits) = match self.dice.roll(40) {
            0 => ("trap", CallLimits::default()),
            1 | 2 => ("throw", CallLimits::default()),
            3 => {
                let timeout_ms = Some(self.dice.roll(2));
                (
                    "spin",
                    CallLimits {
                        timeout_ms,
                        can_abort: false,
                    },
                )
            }
            4 => (
                "spin",
                CallLimits {
                    timeout_ms: None,
                    can_abort: true,
                },
            ),
            5 | 6 => (
                "add",
                CallLimits {
                    timeout_ms: None,
                    can_abort: true,
                },
            ),
            7 => (
                "add",
                CallLimits {
                    timeout_ms: Some(1),
                    can_abort: false,
                },
            ),
            _ => ("add", CallLimits::default()),
        };
        let args = [Value::I32(tag)];
        let in_lease = !self.leases.is_empty() && self.dice.roll(4) == 0;
        let (ended, control) = if in_lease {
            let at = self.dice.roll(self.leases.len() as u64) as usize;
            let lease = &self.leases[at];
            self.rig.call_in_with(lease, name, &args, limits)
        } else {
            self.rig.call_with(name, &args, limits)
        };
        let control = control.filter(|_| limits.can_abort);
        self.calls.push(Call {
            tag,
            name,
            ended,
            control,
            in_lease,
        });
    }

    fn take_leases(&mut self) {
        for (answer, id) in std::mem::take(&mut self.asked) {
            match answer.try_get() {
                Some(Ok(lease)) => self.leases.push(lease),
                // A repair that failed with everything out of service.
                Some(Err(error)) => assert_eq!(error.code(), Some(ErrorCode::ReloadFailed)),
                None => self.asked.push((answer, id)),
            }
        }
    }

    fn abort_one(&mut self) {
        let controls: Vec<_> = self
            .calls
            .iter()
            .filter_map(|c| c.control.clone())
            .collect();
        if !controls.is_empty() {
            let at = self.dice.roll(controls.len() as u64) as usize;
            controls[at].stop(Stop::Aborted(HostRef::new(())));
        }
    }

    fn reload(&mut self, n: u64) {
        let is_rolling = self.dice.roll(3) == 0;
        let source = match self.dice.roll(8) {
            n @ (0 | 1) => Some(self.builds[n as usize].clone()),
            _ => None,
        };
        if self.dice.roll(4) == 0 {
            let point = Point::HOOKS[self.dice.roll(4) as usize];
            let skip = self.dice.roll(REPLICAS as u64) as usize;
            let error = Error::Thrown(HostRef::new("a hook"));
            self.rig.faults.fail(point, skip, error);
        }
        let options = ReloadOptions {
            strategy: if is_rolling {
                Strategy::Rolling
            } else {
                Strategy::Exclusive
            },
            source,
            drain_timeout: Some(Duration::from_millis(self.dice.roll(20))),
            on_drain_timeout: if self.dice.roll(2) == 0 {
                OnDrainTimeout::Interrupt
            } else {
                OnDrainTimeout::Abort
            },
            skip_save: is_rolling,
            ..because(&format!("mixed {n}"))
        };
        self.reloads.push(self.rig.ask_reload(options));
    }

    /// Waits for everything; nothing that was asked for keeps anything else from ending.
    fn settle(&mut self) {
        self.take_leases();
        for (_, id) in &self.asked {
            let error = Error::new(ErrorCode::ReloadFailed, "not wanted any more");
            self.rig.manager.cancel_lease(*id, error);
        }
        for (answer, _) in std::mem::take(&mut self.asked) {
            if let Ok(lease) = answer.get() {
                self.leases.push(lease);
            }
        }
        // Each of them has its patience, and meets what runs and what is leased.
        for reload in std::mem::take(&mut self.reloads) {
            let word = match reload.get() {
                Ok(report) => report.strategy.as_str(),
                Err(error) => match error.code() {
                    Some(code @ (ErrorCode::DrainTimeout | ErrorCode::ReloadFailed)) => {
                        code.as_str()
                    }
                    _ => panic!("a reload ended with {error}"),
                },
            };
            self.count("a reload", word);
        }
        for call in &self.calls {
            if let Some(control) = &call.control {
                control.stop(Stop::Aborted(HostRef::new(())));
            }
        }
        for lease in std::mem::take(&mut self.leases) {
            self.rig.release(&lease);
        }
        for call in std::mem::take(&mut self.calls) {
            self.check(call);
        }
    }

    fn count(&mut self, what: &str, word: &str) {
        *self.tally.entry(format!("{what}: {word}")).or_default() += 1;
    }

    fn check(&mut self, call: Call) {
        let Call {
            tag,
            name,
            ended,
            in_lease,
            control,
        } = call;
        let ended = ended.get();
        let what = format!("call {tag}, {name}: {ended:?}");
        let word = match &ended {
            Ok(_) => {
                assert_eq!(name, "add", "{what}");
                "done"
            }
            Err(Error::Thrown(_)) => {
                assert_eq!(name, "throw", "{what}");
                "thrown"
            }
            Err(Error::Aborted(_)) => {
                assert!(control.is_some(), "{what}");
                "aborted"
            }
            Err(error) => {
                let code = error.code().unwrap();
                let may = match code {
                    ErrorCode::Trap => name == "trap",
                    ErrorCode::StaleHandle => in_lease,
                    ErrorCode::Timeout
                    | ErrorCode::Interrupted
                    | ErrorCode::ReloadFailed
                    | ErrorCode::QueueFull => true,
                    _ => false,
                };
                assert!(may, "{what}");
                code.as_str()
            }
        };
        if ended.is_ok() {
            assert_eq!(number(ended), 3 * tag + 1);
            self.ended.insert(tag, true);
        } else {
            self.ended.insert(tag, false);
        }
        self.count("a call", word);
    }
}

#[test]
fn state_survives_whatever_is_mixed_in() {
    let seed = seed();
    println!("WASM_MOLT_SEED={seed}");
    let log = Log::default();
    let mut mixture = Mixture {
        rig: rig(&log, REPLICAS + 2),
        dice: Dice(seed | 1),
        builds: builds(),
        calls: Vec::new(),
        leases: Vec::new(),
        asked: Vec::new(),
        reloads: Vec::new(),
        tags: 0,
        ended: HashMap::new(),
        tally: HashMap::new(),
    };
    for n in 0..400 {
        for _ in 0..mixture.dice.roll(60) {
            mixture.call();
            if mixture.dice.roll(30) == 0 {
                mixture.abort_one();
            }
        }
        mixture.take_leases();
        if mixture.dice.roll(3) == 0 && mixture.leases.len() + mixture.asked.len() < 2 {
            let asked = mixture.rig.ask_lease();
            mixture.asked.push(asked);
        }
        if mixture.dice.roll(4) == 0 && !mixture.leases.is_empty() {
            let lease = mixture.leases.swap_remove(0);
            mixture.rig.release(&lease);
        }
        mixture.reload(n);
        if n % 4 == 3 {
            mixture.settle();
        }
    }
    mixture.settle();
    let Mixture {
        rig,
        ended,
        tags,
        tally,
        ..
    } = mixture;
    // What fails from here on would be the faults that no reload has met.
    while rig.faults.left() > 0 {
        let _ = rig.ask_reload(because("the last faults")).get();
    }
    rig.reload("the last one");
    println!("{tally:#?}");
    let states = final_states(&rig);
    let log = log.lock().unwrap();
    let mut model = Model::default();
    model.play(&log, |tag| ended.get(&tag) == Some(&true));
    model.check_final(&states);
    assert_eq!(ended.len(), tags as usize, "every call was answered");
    for (tag, did_add) in &ended {
        let times = model.ran.get(tag).copied().unwrap_or_default();
        assert!(times <= 1, "call {tag} ran {times} times");
        assert!(
            !did_add || times == 1,
            "call {tag} was answered and has not run"
        );
    }
    for word in [
        "done",
        "thrown",
        "aborted",
        "ERR_WASM_TRAP",
        "ERR_WASM_TIMEOUT",
    ] {
        assert!(
            tally.contains_key(&format!("a call: {word}")),
            "no call: {word}"
        );
    }
    for word in [
        "exclusive",
        "rolling",
        "ERR_WASM_RELOAD_FAILED",
        "ERR_WASM_DRAIN_TIMEOUT",
    ] {
        assert!(
            tally.contains_key(&format!("a reload: {word}")),
            "no reload: {word}"
        );
    }
}
