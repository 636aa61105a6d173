//! Histories of snapshots, resets, forks and reloads against a plain model: every byte, every size, every global,
//! every element. Tests play them by seeds, the fuzzer by bytes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use wasm_molt_engine::{ErrorCode, HostRef, ImageKind, Snapshot, Value};

use crate::dice::Dice;
use crate::rig::{Rig, Setup, code, number, values};
use crate::wait::eventually;

const PAGE: usize = 65536;
const MOST_PAGES: usize = 24;
const MOST_ELEMENTS: usize = 40;

/// State of every kind behind small exports. `sum` is a hash over one memory, so that each byte counts.
#[must_use]
pub fn holder() -> String {
    let hash = |memory: &str| {
        format!(
            r"(local $at i32) (local $hash i64)
            (block $done (loop $next
                (br_if $done (i32.ge_u (local.get $at) (i32.mul (memory.size ${memory}) (i32.const 65536))))
                (local.set $hash (i64.add (i64.mul (local.get $hash) (i64.const 1099511628211))
                    (i64.load ${memory} (local.get $at))))
                (local.set $at (i32.add (local.get $at) (i32.const 8)))
                (br $next)))
            (local.get $hash)"
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

/// A manager of [the guest](holder).
#[must_use]
pub fn setup(kind: ImageKind, prepares: bool) -> Setup {
    Setup::new(&holder()).options(move |options| {
        options.images = kind;
        options.prepares_snapshots = Some(prepares);
        // Address space for many managers at a time.
        options.engine.memory_reservation_bytes = 64 << 20;
    })
}

/// Plays a history of at most so many steps, as the dice fall, and compares with the model.
///
/// * `label`: where the dice come from, for the message.
pub fn play(kind: ImageKind, prepares: bool, dice: &mut Dice<'_>, steps: usize, label: &str) {
    let start = || setup(kind, prepares).start();
    let mut pairs = vec![Pair {
        rig: start(),
        model: Model::new(),
        origin: (Model::new(), false),
        changed_funcs: false,
        snapshots: Vec::new(),
    }];
    for step in 0..steps {
        if dice.is_over() {
            break;
        }
        let which = dice.roll(pairs.len());
        let action = dice.roll(22);
        let when = format!("{label}, {kind:?}, step {step}, action {action} on {which}");
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
