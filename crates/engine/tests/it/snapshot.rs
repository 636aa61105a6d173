//! Snapshots, resets and forks against a plain model: every byte, every size, every global, every element.
//!
//! The seed of a run is printed; `WASM_MOLT_SEED=<number>` repeats it.

use std::collections::HashMap;
use std::sync::Arc;

use wasm_molt_engine::{
    Error, ErrorCode, HostRef, ImageKind, Isolation, OnDrainTimeout, ResetOptions, Snapshot, Value,
};
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::inside::call_leased;
use wasm_molt_testkit::meter::{Reading, read};
use wasm_molt_testkit::quiet::alone;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number, values};
use wasm_molt_testkit::wait::eventually;

use crate::exactly_once::seed;

/// Nothing changes where the system tells nothing.
fn now() -> Reading {
    read().unwrap_or(Reading {
        rss_bytes: 0,
        mappings: 0,
        threads: 0,
        descriptors: 0,
    })
}

const PAGE: usize = 65536;
const MOST_PAGES: usize = 24;
const MOST_ELEMENTS: usize = 40;

/// State of every kind behind small exports. `sum` is a hash over one memory, so that each byte counts.
fn holder() -> String {
    let hash = |memory: &str| {
        format!(
            r#"(local $at i32) (local $hash i64)
            (block $done (loop $next
                (br_if $done (i32.ge_u (local.get $at) (i32.mul (memory.size ${memory}) (i32.const 65536))))
                (local.set $hash (i64.add (i64.mul (local.get $hash) (i64.const 1099511628211))
                    (i64.load ${memory} (local.get $at))))
                (local.set $at (i32.add (local.get $at) (i32.const 8)))
                (br $next)))
            (local.get $hash)"#
        )
    };
    format!(
        r#"(module $holder
        (memory $a (export "memory") 1 {MOST_PAGES})
        (memory $b 2 {MOST_PAGES})
        (data (memory $a) (i32.const 1000) "at the start")
        (data $passive "passive")
        (global $i (mut i32) (i32.const 11))
        (global $l (mut i64) (i64.const 12))
        (global $start (mut i32) (i32.const 0))
        (table $refs 3 {MOST_ELEMENTS} externref)
        (table $funcs 3 {MOST_ELEMENTS} funcref)
        (elem (table $funcs) (i32.const 0) func $f0 $f1)
        (elem declare func $f2)
        (type $f (func (result i32)))
        (func $f0 (result i32) (i32.const 0))
        (func $f1 (result i32) (i32.const 1))
        (func $f2 (result i32) (i32.const 2))
        (func $begin (global.set $start (i32.add (global.get $start) (i32.const 1))))
        (start $begin)
        (func (export "store") (param i32 i32 i64)
            (if (local.get 0) (then (i64.store $b (local.get 1) (local.get 2)))
                (else (i64.store $a (local.get 1) (local.get 2)))))
        (func (export "grow") (param i32 i32) (result i32)
            (if (result i32) (local.get 0) (then (memory.grow $b (local.get 1)))
                (else (memory.grow $a (local.get 1)))))
        (func (export "fill") (param i32 i32 i32 i32)
            (if (local.get 0) (then (memory.fill $b (local.get 1) (local.get 3) (local.get 2)))
                (else (memory.fill $a (local.get 1) (local.get 3) (local.get 2)))))
        (func (export "init") (memory.init $a $passive (i32.const 2000) (i32.const 0) (i32.const 7)))
        (func (export "drop") (data.drop $passive))
        (func (export "globals") (param i32 i64)
            (global.set $i (local.get 0)) (global.set $l (local.get 1)))
        (func (export "ref") (param i32 externref) (table.set $refs (local.get 0) (local.get 1)))
        (func (export "growRefs") (param i32 externref) (result i32)
            (table.grow $refs (local.get 1) (local.get 0)))
        (func (export "func") (param i32 i32)
            (table.set $funcs (local.get 0)
                (if (result funcref) (local.get 1) (then (ref.func $f2)) (else (ref.null func)))))
        (func (export "growFuncs") (param i32) (result i32)
            (table.grow $funcs (ref.func $f2) (local.get 0)))
        (func (export "look") (result i32 i32 i32 i64 i32 i32 i32)
            (memory.size $a) (memory.size $b) (global.get $i) (global.get $l) (global.get $start)
            (table.size $refs) (table.size $funcs))
        (func (export "getRef") (param i32) (result externref) (table.get $refs (local.get 0)))
        (func (export "isNull") (param i32) (result i32) (ref.is_null (table.get $funcs (local.get 0))))
        (func (export "apply") (param i32) (result i32) (call_indirect $funcs (type $f) (local.get 0)))
        (func (export "sumA") (result i64) {})
        (func (export "sumB") (result i64) {})
        (func (export "peek") (param i32 i32) (result i64)
            (if (result i64) (local.get 0) (then (i64.load $b (local.get 1)))
                (else (i64.load $a (local.get 1))))))"#,
        hash("a"),
        hash("b"),
    )
}

/// What an instance holds, plainly.
#[derive(Debug, Clone, PartialEq)]
struct Model {
    memories: [Vec<u8>; 2],
    is_dropped: bool,
    globals: (i32, i64),
    refs: Vec<Option<u32>>,
    funcs: Vec<Option<i32>>,
}

impl Model {
    fn new() -> Self {
        let mut first = vec![0; PAGE];
        first[1000..1012].copy_from_slice(b"at the start");
        Self {
            memories: [first, vec![0; 2 * PAGE]],
            is_dropped: false,
            globals: (11, 12),
            refs: vec![None; 3],
            funcs: vec![Some(0), Some(1), None],
        }
    }

    fn sum(&self, memory: usize) -> i64 {
        self.memories[memory].chunks_exact(8).fold(0, |hash, word| {
            let word = i64::from_le_bytes(word.try_into().unwrap());
            hash.wrapping_mul(1_099_511_628_211).wrapping_add(word)
        })
    }

    fn has_references(&self) -> bool {
        self.refs.iter().any(Option::is_some)
    }
}

/// A manager and what it must hold.
struct Pair {
    rig: Rig,
    model: Model,
    /// What it begins with where it has no snapshot of its own.
    origin: (Model, bool),
    /// Its functions have been changed since it was made cold.
    changed_funcs: bool,
    snapshots: Vec<(Arc<Snapshot>, Model, bool)>,
}

impl Pair {
    fn call(&self, name: &str, args: &[Value]) -> Vec<Value> {
        values(self.rig.call(name, args).get())
    }

    /// Its instance is a new one: it begins with the newest snapshot.
    fn begins_anew(&mut self) {
        let newest = self.snapshots.last();
        let newest = newest.map(|(_, model, changed)| (model.clone(), *changed));
        (self.model, self.changed_funcs) = newest.unwrap_or_else(|| self.origin.clone());
    }

    /// A trapped instance is replaced.
    fn recover(&mut self) {
        eventually("the trapped instance is replaced", || {
            let stats = self.rig.manager.stats(None);
            stats.gate.retired == 0 && stats.poisoned == 0
        });
        self.begins_anew();
    }

    fn traps(&self, name: &str, args: &[Value]) {
        let ended = self.rig.call(name, args).get();
        assert_eq!(code(ended), ErrorCode::Trap, "{name}");
    }

    fn check(&self, when: &str) {
        let model = &self.model;
        let look: Vec<i64> = self
            .call("look", &[])
            .iter()
            .map(|value| match value {
                Value::I32(v) => i64::from(*v),
                Value::I64(v) => *v,
                other => panic!("{other:?}"),
            })
            .collect();
        let pages = |memory: usize| (model.memories[memory].len() / PAGE) as i64;
        let expected = [
            pages(0),
            pages(1),
            i64::from(model.globals.0),
            model.globals.1,
            1,
            model.refs.len() as i64,
            model.funcs.len() as i64,
        ];
        assert_eq!(look, expected, "{when}");
        for (memory, name) in ["sumA", "sumB"].into_iter().enumerate() {
            match self.call(name, &[])[..] {
                [Value::I64(sum)] => assert_eq!(sum, model.sum(memory), "{when}: {name}"),
                ref other => panic!("{other:?}"),
            }
        }
        for (index, expected) in model.refs.iter().enumerate() {
            let seen = match &self.call("getRef", &[Value::I32(index as i32)])[..] {
                [Value::Extern(value)] => value
                    .as_ref()
                    .map(|value| *value.downcast_ref::<u32>().unwrap()),
                other => panic!("{other:?}"),
            };
            assert_eq!(seen, *expected, "{when}: reference {index}");
        }
        for (index, expected) in model.funcs.iter().enumerate() {
            let is_null = self.rig.number("isNull", &[index as i32]) == 1;
            assert_eq!(is_null, expected.is_none(), "{when}: function {index}");
            if let Some(expected) = expected {
                let said = self.rig.number("apply", &[index as i32]);
                assert_eq!(said, *expected, "{when}: function {index}");
            }
        }
    }
}

fn setup(kind: ImageKind, prepares: bool) -> Setup {
    Setup::new(&holder()).options(move |options| {
        options.images = kind;
        options.prepares_snapshots = Some(prepares);
        // Address space for many managers at a time.
        options.engine.memory_reservation_bytes = 64 << 20;
    })
}

/// The numbers of a history.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }
}

fn random_history(kind: ImageKind, prepares: bool, steps: usize) {
    let seed = seed();
    println!("seed {seed} {kind:?} prepares {prepares}");
    let mut dice = Dice(seed);
    let start = || setup(kind, prepares).start();
    let mut pairs = vec![Pair {
        rig: start(),
        model: Model::new(),
        origin: (Model::new(), false),
        changed_funcs: false,
        snapshots: Vec::new(),
    }];
    for step in 0..steps {
        let which = dice.roll(pairs.len());
        let action = dice.roll(22);
        let when = format!("seed {seed}, {kind:?}, step {step}, action {action} on {which}");
        let count = pairs.len();
        let pair = &mut pairs[which];
        let memory = dice.roll(2);
        match action {
            0..=5 => {
                let word = dice.roll(pair.model.memories[memory].len() / 8) * 8;
                let value = dice.roll(usize::MAX) as i64;
                pair.call(
                    "store",
                    &[
                        Value::I32(memory as i32),
                        Value::I32(word as i32),
                        Value::I64(value),
                    ],
                );
                pair.model.memories[memory][word..word + 8].copy_from_slice(&value.to_le_bytes());
            }
            6 => {
                let pages = dice.roll(5);
                let size = pair.model.memories[memory].len() / PAGE;
                let fits = size + pages <= MOST_PAGES;
                let said = pair.rig.number("grow", &[memory as i32, pages as i32]);
                assert_eq!(said, if fits { size as i32 } else { -1 }, "{when}");
                if fits {
                    pair.model.memories[memory].resize((size + pages) * PAGE, 0);
                }
            }
            7 => {
                let len = dice.roll(3 * PAGE).min(pair.model.memories[memory].len());
                let at = dice.roll(pair.model.memories[memory].len() - len + 1);
                let byte = dice.roll(256) as u8;
                let args = [memory as i32, at as i32, len as i32, i32::from(byte)];
                pair.call("fill", &args.map(Value::I32));
                pair.model.memories[memory][at..at + len].fill(byte);
            }
            8 => {
                pair.model.globals = (dice.roll(1 << 31) as i32, dice.roll(usize::MAX) as i64);
                let (i, l) = pair.model.globals;
                pair.call("globals", &[Value::I32(i), Value::I64(l)]);
            }
            9 => {
                let index = dice.roll(pair.model.refs.len());
                let value = (dice.roll(3) > 0).then(|| dice.roll(1000) as u32);
                let given = Value::Extern(value.map(HostRef::new));
                pair.call("ref", &[Value::I32(index as i32), given]);
                pair.model.refs[index] = value;
            }
            10 => {
                let count = dice.roll(4);
                let size = pair.model.refs.len();
                let fits = size + count <= MOST_ELEMENTS;
                let given = [
                    Value::I32(count as i32),
                    Value::Extern(Some(HostRef::new(7_u32))),
                ];
                let said = number(pair.rig.call("growRefs", &given).get());
                assert_eq!(said, if fits { size as i32 } else { -1 }, "{when}");
                if fits {
                    pair.model.refs.resize(size + count, Some(7));
                }
            }
            11 => {
                let index = dice.roll(pair.model.funcs.len());
                let is_set = dice.roll(2);
                pair.call(
                    "func",
                    &[Value::I32(index as i32), Value::I32(is_set as i32)],
                );
                pair.model.funcs[index] = (is_set == 1).then_some(2);
                pair.changed_funcs = true;
            }
            12 => {
                let count = dice.roll(3);
                let size = pair.model.funcs.len();
                let fits = size + count <= MOST_ELEMENTS;
                let said = pair.rig.number("growFuncs", &[count as i32]);
                assert_eq!(said, if fits { size as i32 } else { -1 }, "{when}");
                if fits {
                    pair.model.funcs.resize(size + count, Some(2));
                }
                pair.changed_funcs = true;
            }
            13 if pair.model.is_dropped => {
                pair.traps("init", &[]);
                pair.recover();
            }
            13 => {
                pair.call("init", &[]);
                pair.model.memories[0][2000..2007].copy_from_slice(b"passive");
                if dice.roll(3) == 0 {
                    pair.call("drop", &[]);
                    pair.model.is_dropped = true;
                }
            }
            14 | 15 => {
                let taken = pair.rig.snapshot();
                assert_eq!(
                    taken.memory_bytes(),
                    pair.model.memories.iter().map(Vec::len).sum::<usize>()
                );
                pair.snapshots
                    .push((taken, pair.model.clone(), pair.changed_funcs));
                if pair.snapshots.len() > 4 {
                    let gone = dice.roll(4);
                    let (gone, ..) = pair.snapshots.remove(gone);
                    if dice.roll(2) == 0 {
                        pair.rig.manager.release_snapshot(&gone);
                    }
                }
            }
            16 | 17 if !pair.snapshots.is_empty() => {
                let to = dice.roll(pair.snapshots.len());
                let (to, model, changed) = pair.snapshots[to].clone();
                let report = pair.rig.reset(Some(&to));
                assert_eq!(report.memory_bytes_after, to.memory_bytes(), "{when}");
                (pair.model, pair.changed_funcs) = (model, changed);
            }
            18 => {
                pair.rig.reload("history");
                pair.begins_anew();
            }
            19 if count < 8 => {
                let child = setup(kind, prepares).create();
                let outcome = pair.rig.fork_into(&child);
                let changed = pair.changed_funcs && pair.model.funcs.iter().any(Option::is_some);
                if pair.model.has_references() || changed {
                    assert_eq!(code(outcome), ErrorCode::SnapshotUnsupported, "{when}");
                } else {
                    outcome.unwrap();
                    let model = pair.model.clone();
                    let changed_funcs = pair.changed_funcs;
                    pairs.push(Pair {
                        rig: child,
                        origin: (model.clone(), changed_funcs),
                        model,
                        changed_funcs,
                        snapshots: Vec::new(),
                    });
                    pairs.last().unwrap().check(&when);
                }
            }
            20 if count > 1 => drop(pairs.swap_remove(which)),
            21 => {
                // Beyond the end nothing is left of what was there once.
                let end = pair.model.memories[memory].len();
                if end < MOST_PAGES * PAGE {
                    let at = [memory as i32, end as i32].map(Value::I32);
                    pair.traps("peek", &at);
                    pair.recover();
                }
            }
            _ => {}
        }
        if step % 5 == 0 || matches!(action, 14..=19) {
            for pair in &pairs {
                pair.check(&when);
            }
        }
    }
    for pair in &pairs {
        pair.check("at the end");
    }
}

#[test]
fn random_histories_agree_with_the_model_copy_on_write() {
    random_history(ImageKind::CopyOnWrite, false, 600);
}

#[test]
fn random_histories_agree_with_the_model_copy_on_write_prepared() {
    random_history(ImageKind::CopyOnWrite, true, 600);
}

#[test]
fn random_histories_agree_with_the_model_by_copies() {
    random_history(ImageKind::Copy, false, 600);
}

#[test]
fn forks_and_snapshots_give_everything_back() {
    let _alone = alone();
    let parent = Setup::new(&guests::grower("256 1024")).start();
    parent.call("touch", &[Value::I32(16 << 20)]).get().unwrap();
    let warm_up = |rounds: usize| {
        for _ in 0..rounds {
            let child = Setup::new(&guests::grower("256 1024")).create();
            parent.fork_into(&child).unwrap();
            child.call("touch", &[Value::I32(8 << 20)]).get().unwrap();
            let taken = child.snapshot();
            child.call("grow", &[Value::I32(100)]).get().unwrap();
            child.reset(None);
            child.manager.release_snapshot(&taken);
            child.reload("again");
        }
    };
    warm_up(5);
    let before = now();
    warm_up(100);
    let after = now();
    assert!(
        after.rss_bytes < before.rss_bytes + (8 << 20),
        "{before:?} {after:?}"
    );
    assert!(
        after.descriptors <= before.descriptors,
        "{before:?} {after:?}"
    );
    // The threads of a pool end a moment after it.
    eventually("threads and mappings are gone", || {
        let after = now();
        after.threads <= before.threads + 2 && after.mappings <= before.mappings + 8
    });
}

#[test]
fn a_snapshot_gives_its_pages_back_when_it_is_released() {
    let _alone = alone();
    let rig = Setup::new(&guests::grower("1024")).start();
    rig.call("touch", &[Value::I32(64 << 20)]).get().unwrap();
    let kept = rig.snapshot();
    // Every page is another one now: the first image is of use to nobody but its snapshot.
    let write_all = |rig: &Rig| rig.call("touch", &[Value::I32(64 << 20)]).get().unwrap();
    write_all(&rig);
    let newest = rig.snapshot();
    let before = now();
    rig.manager.release_snapshot(&kept);
    drop(kept);
    let after = now();
    assert_eq!(
        after.descriptors + 1,
        before.descriptors,
        "the file behind it is closed: {before:?} {after:?}"
    );
    rig.reset(Some(&newest));
}

fn isolated(wat: &str, instances: usize) -> Setup {
    Setup::new(wat).instances(instances).options(|options| {
        options.isolation = Isolation::PerCall;
        options.max_queue = 100_000;
    })
}

#[test]
fn isolated_calls_are_each_the_first_and_resets_keep_the_generation() {
    let rig = isolated(&guests::counter(), 3).start();
    let answers: Vec<_> = (0..1000).map(|_| rig.call("increment", &[])).collect();
    for answer in answers {
        assert_eq!(number(answer.get()), 1);
    }
    assert_eq!(code(rig.call("trap", &[]).get()), ErrorCode::Trap);
    assert_eq!(rig.number("get", &[]), 0);
    assert_eq!(rig.manager.generation().get(), 1);
    let stats = rig.stats();
    assert_eq!((stats.poisoned, stats.gate.retired), (0, 0));
    assert!(stats.reloads.is_empty());
}

#[test]
fn isolated_calls_fall_back_to_their_first_snapshot() {
    let rig = isolated(&guests::counter(), 1).start();
    let lease = rig.lease();
    let set = |inside| call_leased(&inside, "set", vec![Value::I32(10)]).map(drop);
    rig.enter(&lease, set).unwrap().unwrap();
    rig.release(&lease);
    let taken = rig.snapshot();
    assert_eq!(rig.number("increment", &[]), 11);
    rig.manager.release_snapshot(&taken);
    drop(taken);
    assert_eq!(rig.number("increment", &[]), 1);
}

#[test]
fn one_that_is_not_wanted_any_more_leaves_the_one_before() {
    let rig = Setup::new(&guests::counter()).start();
    rig.number("increment", &[]);
    // Nobody keeps a handle on it.
    drop(rig.snapshot());
    rig.number("increment", &[]);
    let unwanted = rig.snapshot();
    rig.manager.release_snapshot(&unwanted);
    rig.number("increment", &[]);
    rig.reset(None);
    assert_eq!(rig.number("get", &[]), 1);
    // One that was got takes the place of the one before.
    let wanted = rig.snapshot();
    rig.manager.accept_snapshot();
    rig.manager.release_snapshot(&wanted);
    let refused = rig.ask_reset(ResetOptions::default()).get();
    assert_eq!(code(refused), ErrorCode::InvalidArgument);
}

#[test]
fn a_fork_that_cannot_be_done_at_once_forgets_nothing_of_the_tables() {
    let wat = r#"(module (memory (export "memory") 100) (table $t 1 externref)
        (func (export "keep") (param externref) (table.set $t (i32.const 0) (local.get 0)))
        (func (export "kept") (result externref) (table.get $t (i32.const 0)))
        (func (export "dirty") (param i32)
            (memory.fill (i32.const 0) (i32.const 1) (local.get 0))))"#;
    let rig = Setup::new(wat).at_home().start();
    let held = Value::Extern(Some(HostRef::new(7_u32)));
    rig.call_sync("keep", &[held]).unwrap();
    for dirty in [0, 5_000_000] {
        rig.call_sync("dirty", &[Value::I32(dirty)]).unwrap();
        let child = Setup::new(wat).create();
        assert_eq!(
            code(rig.fork_into(&child)),
            ErrorCode::SnapshotUnsupported,
            "{dirty}"
        );
    }
    rig.snapshot();
    for reload in [false, true] {
        rig.call_sync("keep", &[Value::Extern(None)]).unwrap();
        if reload {
            rig.reload("again");
        } else {
            rig.reset(None);
        }
        let kept = rig.call_sync("kept", &[]).unwrap();
        assert!(matches!(&kept[..], [Value::Extern(Some(_))]), "{kept:?}");
    }
}

#[test]
fn snapshots_that_are_released_while_instances_begin_with_them() {
    let rig = Setup::new(&guests::counter()).start();
    for _ in 0..200 {
        let taken = rig.snapshot();
        let reloaded = rig.ask_reload(because("released meanwhile"));
        rig.manager.release_snapshot(&taken);
        reloaded.get().unwrap();
    }
}

#[test]
fn a_million_bytes_of_state_follow_a_warm_reload_under_load() {
    let rig = Setup::new(&guests::counter()).instances(2).start();
    let lease = rig.lease();
    rig.enter(&lease, |inside| {
        call_leased(&inside, "set", vec![Value::I32(1000)]).unwrap();
    })
    .unwrap();
    let slot = lease.replica().slot();
    rig.release(&lease);
    let expected = if slot == 0 { 1000 } else { 0 };
    rig.snapshot();
    for round in 0..50 {
        let calls: Vec<_> = (0..20).map(|_| rig.call("get", &[])).collect();
        rig.reload("warm");
        if round > 0 {
            for call in calls {
                assert_eq!(number(call.get()), expected);
            }
        }
        assert_eq!(rig.number("get", &[]), expected);
    }
}

/// Every hook × every way to begin with a snapshot: a failure leaves the manager serving.
#[test]
fn hooks_that_fail_while_instances_begin_with_a_snapshot() {
    for point in [Point::Imports, Point::Reseed] {
        for is_panic in [false, true] {
            let rig = Setup::new(&guests::counter()).instances(2).start();
            let plan = |rig: &Rig| {
                if is_panic {
                    rig.faults.panic(point, 0);
                } else {
                    let error = Error::Thrown(HostRef::new("on purpose"));
                    rig.faults.fail(point, 0, error);
                }
            };
            rig.snapshot();
            plan(&rig);
            let failed = rig.ask_reload(because("fails")).get();
            assert!(failed.is_err(), "{point:?} {is_panic}");
            assert_eq!(rig.faults.left(), 0);
            rig.reload("goes well");
            if point == Point::Reseed {
                plan(&rig);
                let failed = rig.ask_reset(ResetOptions::default()).get();
                assert!(failed.is_err(), "{point:?} {is_panic}");
                assert_eq!(rig.faults.left(), 0);
            }
            rig.reset(None);
            let child = Setup::new(&guests::counter()).create();
            if is_panic {
                child.faults.panic(point, 0);
            } else {
                child
                    .faults
                    .fail(point, 0, Error::Thrown(HostRef::new("on purpose")));
            }
            assert!(rig.fork_into(&child).is_err(), "{point:?} {is_panic}");
            assert_eq!(
                child.manager.state(),
                wasm_molt_engine::ManagerState::Failed
            );
            drop(child);
            let child = Setup::new(&guests::counter()).create();
            rig.fork_into(&child).unwrap();
            assert_eq!(child.number("increment", &[]), 1);
            assert_eq!(rig.number("increment", &[]), 1);
        }
    }
}

#[test]
fn a_home_that_goes_ends_what_waits_for_it() {
    for action in 0..3 {
        let mut rig = Setup::new(&guests::counter()).at_home().start();
        rig.snapshot();
        rig.end_home();
        match action {
            0 => assert_eq!(code(rig.ask_snapshot().0.get()), ErrorCode::Closed),
            1 => {
                let ended = rig.ask_reset(ResetOptions::default()).get();
                assert_eq!(code(ended), ErrorCode::Closed);
            }
            _ => {
                let child = Setup::new(&guests::counter()).create();
                let (done, forked) = wasm_molt_testkit::wait::answer("fork()");
                rig.manager.fork(&child.manager, Box::new(done));
                let forked: Result<(), Error> = forked.get();
                assert_eq!(code(forked), ErrorCode::Closed);
            }
        }
    }
}

#[test]
fn at_home_everything_is_done_on_that_very_thread() {
    let rig = Setup::new(&guests::counter()).at_home().start();
    rig.call_sync("set", &[Value::I32(5)]).unwrap();
    rig.snapshot_now().unwrap();
    rig.call_sync("set", &[Value::I32(6)]).unwrap();
    let report = rig.reset_now(ResetOptions::default()).unwrap();
    assert!(report.dirty_bytes > 0);
    let values = rig.call_sync("get", &[]).unwrap();
    assert!(matches!(values[..], [Value::I32(5)]));
    let id = rig.replica(0).id();
    assert_eq!(rig.host.rewound(), [id]);
    let child = Setup::new(&guests::counter()).create();
    rig.fork_into(&child).unwrap();
    assert_eq!(child.number("get", &[]), 5);
    let lease = rig.lease();
    assert_eq!(
        code(rig.reset_now(ResetOptions::default())),
        ErrorCode::Busy
    );
    assert_eq!(code(rig.snapshot_now()), ErrorCode::Busy);
    rig.release(&lease);
}

#[test]
fn resets_that_interrupt_put_back_what_they_stop() {
    let rig = Setup::new(&guests::spinner()).start();
    rig.snapshot();
    let spinning = rig.call("spin", &[]);
    eventually("it spins", || rig.manager.stats(None).gate.in_flight == 1);
    let options = ResetOptions {
        drain_timeout: Some(std::time::Duration::ZERO),
        on_drain_timeout: OnDrainTimeout::Interrupt,
        ..ResetOptions::default()
    };
    rig.ask_reset(options).get().unwrap();
    assert_eq!(code(spinning.get()), ErrorCode::Interrupted);
    assert_eq!(rig.number("well", &[]), 7);
    assert_eq!(rig.manager.generation().get(), 1);
}

#[test]
fn a_thousand_snapshots_and_resets_keep_nothing() {
    let _alone = alone();
    let rig = Setup::new(&guests::grower("16 256")).start();
    let round = |rounds: usize| {
        let mut kept: HashMap<usize, Arc<Snapshot>> = HashMap::new();
        for round in 0..rounds {
            rig.call("touch", &[Value::I32(1 << 20)]).get().unwrap();
            rig.call("grow", &[Value::I32(2)]).get().unwrap();
            kept.insert(round % 3, rig.snapshot());
            if round % 4 == 3 {
                rig.reset(kept.get(&(round % 3)));
            }
            if round % 50 == 49 {
                rig.reload("now and then");
            }
            if rig.replica(0).memory_bytes() > 12 << 20 {
                rig.reset(Some(&rig.snapshot()));
                break;
            }
        }
    };
    for _ in 0..20 {
        round(20);
    }
    let before = now();
    for _ in 0..50 {
        round(20);
    }
    let after = now();
    assert!(
        after.rss_bytes < before.rss_bytes + (8 << 20),
        "{before:?} {after:?}"
    );
    assert!(
        after.descriptors <= before.descriptors + 2,
        "{before:?} {after:?}"
    );
    assert!(
        after.mappings <= before.mappings + 16,
        "{before:?} {after:?}"
    );
}
