//! What is put in for the sake of state must not be noticed by the guest: each module is run as it is
//! and spliced, and has to give the same results and the same traps.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use wasmparser::{Validator, WasmFeatures};
use wasmtime::{
    Config, Engine, Extern, ExternType, Func, Global, Instance, Memory, Module, Ref, Store, Table,
    Trap, Val, ValType,
};

use super::tests::{random, valid, wasm};
use super::*;

const OPTIONS: [InstrumentOptions; 3] = [
    InstrumentOptions {
        polls: false,
        inlining: false,
    },
    InstrumentOptions {
        polls: true,
        inlining: false,
    },
    InstrumentOptions {
        polls: true,
        inlining: true,
    },
];

fn spliced(bytes: &[u8], options: InstrumentOptions) -> Instrumented<'_> {
    let spliced = instrument(bytes, &options).unwrap();
    Validator::new_with_features(WasmFeatures::all())
        .validate_all(&spliced.bytes)
        .unwrap();
    spliced
}

fn map(wat: &str) -> StateMap {
    spliced(&wasm(wat), OPTIONS[0]).state
}

fn engine(inlining: bool) -> Engine {
    let mut config = Config::new();
    config
        .wasm_multi_memory(true)
        .wasm_memory64(true)
        .wasm_tail_call(true)
        .wasm_function_references(true)
        .wasm_gc(true)
        .wasm_exceptions(true);
    if inlining {
        config.compiler_inlining(wasmtime::Inlining::Yes);
    }
    Engine::new(&config).unwrap()
}

/// Each import of its type; functions write down that they were called.
fn imports(store: &mut Store<String>, module: &Module) -> Vec<Extern> {
    let mut externs = Vec::new();
    for import in module.imports() {
        let name = import.name().to_owned();
        externs.push(match import.ty() {
            ExternType::Func(ty) => Func::new(&mut *store, ty, move |mut caller, args, _| {
                write!(caller.data_mut(), "{name}{args:?} ").unwrap();
                Ok(())
            })
            .into(),
            ExternType::Memory(ty) => Memory::new(&mut *store, ty).unwrap().into(),
            ExternType::Table(ty) => {
                // Larger than it has to be.
                let size = (ty.minimum() + 1) as u32;
                let maximum = ty.maximum().map(|n| n as u32);
                let ty = wasmtime::TableType::new(ty.element().clone(), size, maximum);
                let null = Ref::null(ty.element().heap_type());
                Table::new(&mut *store, ty, null).unwrap().into()
            }
            ExternType::Global(ty) => {
                let value = match ty.content() {
                    ValType::I32 => Val::I32(20),
                    ValType::I64 => Val::I64(20),
                    other => panic!("{other}"),
                };
                Global::new(&mut *store, ty, value).unwrap().into()
            }
            ExternType::Tag(_) => panic!("a tag"),
        });
    }
    externs
}

fn outcome(error: &wasmtime::Error) -> String {
    match error.downcast_ref::<Trap>() {
        Some(trap) => format!("{trap:?}"),
        None => format!("{error:#}"),
    }
}

/// What a guest did.
struct Run {
    store: Store<String>,
    instance: Option<Instance>,
    outcomes: Vec<String>,
}

impl Run {
    fn global(&mut self, name: &str) -> Global {
        let instance = self.instance.unwrap();
        instance.get_global(&mut self.store, name).unwrap()
    }

    fn i32(&mut self, name: &str) -> i32 {
        let global = self.global(name);
        global.get(&mut self.store).unwrap_i32()
    }
}

/// Instantiates as the engine does. `spare`: elements that a reset has left beyond the size of every
/// table that can grow.
fn begin(engine: &Engine, bytes: &[u8], state: Option<&StateMap>, spare: u64) -> Run {
    let module = Module::new(engine, bytes).unwrap();
    let mut store = Store::new(engine, String::new());
    let externs = imports(&mut store, &module);
    let mut run = Run {
        instance: None,
        outcomes: Vec::new(),
        store,
    };
    let instance = match Instance::new(&mut run.store, &module, &externs) {
        Ok(instance) => instance,
        Err(error) => {
            run.outcomes.push(outcome(&error));
            return run;
        }
    };
    run.instance = Some(instance);
    let Some(state) = state else {
        return run;
    };
    for table in &state.tables {
        let real = instance.get_table(&mut run.store, &table.name).unwrap();
        let before = real.size(&run.store);
        let Some(size) = &table.size else {
            continue;
        };
        if table.imported {
            let size = run.global(size);
            let value = match size.ty(&run.store).content() {
                ValType::I64 => Val::I64(before as i64),
                _ => Val::I32(before as i32),
            };
            size.set(&mut run.store, value).unwrap();
        } else {
            assert_eq!(before, table.minimum);
        }
        let some = match instance.get_func(&mut run.store, "spare") {
            Some(spare) => Ref::Func(Some(spare)),
            None => Ref::null(real.ty(&run.store).element().heap_type()),
        };
        if real
            .ty(&run.store)
            .element()
            .matches(&wasmtime::RefType::FUNCREF)
        {
            real.grow(&mut run.store, spare, some).unwrap();
        }
    }
    for name in [&state.init, &state.start].into_iter().flatten() {
        let func = instance.get_func(&mut run.store, name).unwrap();
        if let Err(error) = func.call(&mut run.store, &[], &mut []) {
            run.outcomes.push(outcome(&error));
            run.instance = None;
            return run;
        }
    }
    run
}

/// A value to try, small or at the edge.
fn some_value(ty: &ValType, random: &mut impl FnMut(usize) -> usize) -> Val {
    let numbers = [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        65_530,
        65_535,
        65_536,
        -1,
        -2,
        i64::MIN,
    ];
    // Mostly what fits.
    let among = if random(4) == 0 { numbers.len() } else { 6 };
    let number = numbers[random(among)];
    match ty {
        ValType::I32 => Val::I32(number as i32),
        ValType::I64 => Val::I64(number),
        other => panic!("{other}"),
    }
}

/// Calls exports with all sorts of arguments. After each, `probe`, if there is one.
fn go_on(run: &mut Run, names: &[String], calls: usize) {
    let Some(instance) = run.instance else {
        return;
    };
    let mut state = 7_u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..calls {
        if names.is_empty() {
            break;
        }
        let name = &names[random(names.len())];
        let func = instance.get_func(&mut run.store, name).unwrap();
        let ty = func.ty(&run.store);
        let args: Vec<Val> = ty.params().map(|ty| some_value(&ty, &mut random)).collect();
        let mut results: Vec<Val> = ty.results().map(|_| Val::I32(0)).collect();
        let what = match func.call(&mut run.store, &args, &mut results) {
            Ok(()) => format!("{results:?}"),
            Err(error) => outcome(&error),
        };
        run.outcomes.push(format!("{name}{args:?}: {what}"));
    }
    let log = std::mem::take(run.store.data_mut());
    run.outcomes.push(log);
}

/// Runs a module as it is and spliced, and gives what both did.
fn same_in_both(wat: &str, calls: usize) -> Vec<String> {
    let bytes = wasm(wat);
    let mut plain = begin(&engine(false), &bytes, None, 0);
    let names: Vec<String> = Module::new(&engine(false), &bytes)
        .unwrap()
        .exports()
        .filter(|export| matches!(export.ty(), ExternType::Func(_)) && export.name() != "spare")
        .map(|export| export.name().to_owned())
        .collect();
    go_on(&mut plain, &names, calls);
    for options in OPTIONS {
        for spare in [0, 2] {
            let spliced = spliced(&bytes, options);
            let engine = engine(spliced.inlining);
            let mut run = begin(&engine, &spliced.bytes, Some(&spliced.state), spare);
            go_on(&mut run, &names, calls);
            assert_eq!(plain.outcomes.len(), run.outcomes.len(), "{wat}");
            for (at, (a, b)) in plain.outcomes.iter().zip(&run.outcomes).enumerate() {
                assert_eq!(a, b, "{options:?}, spare {spare}, call {at}: {wat}");
            }
        }
    }
    plain.outcomes
}

/// As [`same_in_both`], and each of these was among what happened.
fn same_with(wat: &str, calls: usize, expected: &[&str]) {
    let outcomes = same_in_both(wat, calls);
    for expected in expected {
        assert!(
            outcomes.iter().any(|outcome| outcome.contains(expected)),
            "{expected}: {wat}"
        );
    }
}

/// Everything that can be done to tables; `I` is the index type, `T` the limits of the first.
const TABLES: &str = r#"(module IMPORT
    (type $v (func (result i32)))
    DEFINED (table $u 4 funcref) (table $x 1 externref)
    (func $a (result i32) i32.const 10)
    (func $b (result i32) i32.const 11)
    (func $c (param i32) (result i32) i32.const 12)
    (func (export "spare") (result i32) i32.const 13)
    (elem (table $t) (offset (I.const 1)) func $a $b)
    (elem (table $u) (i32.const 0) func $b $c)
    (elem $e func $b $a $c $b $a)
    (func (export "size") (result I) table.size $t)
    (func (export "grow") (param I) (result I) (table.grow $t (ref.func $b) (local.get 0)))
    (func (export "grow little") (param I) (result I)
        (table.grow $t (ref.func $a) (I.and (local.get 0) (I.const 1))))
    (func (export "get") (param I) (result i32) (ref.is_null (table.get $t (local.get 0))))
    (func (export "set") (param I) (table.set $t (local.get 0) (ref.func $c)))
    (func (export "fill") (param I I) (table.fill $t (local.get 0) (ref.func $a) (local.get 1)))
    (func (export "null") (param I I) (table.fill $t (local.get 0) (ref.null func) (local.get 1)))
    (func (export "init") (param I i32 i32)
        (table.init $t $e (local.get 0) (local.get 1) (local.get 2)))
    (func (export "copy") (param I I I) (table.copy $t $t (local.get 0) (local.get 1) (local.get 2)))
    (func (export "to u") (param i32 I i32) (table.copy $u $t (local.get 0) (local.get 1) (local.get 2)))
    (func (export "from u") (param I i32 i32) (table.copy $t $u (local.get 0) (local.get 1) (local.get 2)))
    (func (export "in u") (param i32) (result i32) (call_indirect $u (type $v) (local.get 0)))
    (func (export "call") (param I) (result i32) (call_indirect $t (type $v) (local.get 0)))
    (func (export "call again") (param I) (result i32) (call_indirect $t (type $v) (local.get 0)))
    (func (export "tail") (param I) (result i32) (return_call_indirect $t (type $v) (local.get 0)))
    (func (export "refs") (param i32) (result i32)
        (drop (table.grow $x (ref.null extern) (i32.and (local.get 0) (i32.const 1))))
        (table.set $x (local.get 0) (ref.null extern))
        (table.size $x))
    (func (export "in a loop") (param i32) (result i32) (local i32)
        loop
            (local.set 1 (i32.add (local.get 1) (call_indirect $t (type $v) (I.const 1))))
            (local.tee 0 (i32.sub (i32.and (local.get 0) (i32.const 7)) (i32.const 1)))
            (br_if 0 (i32.gt_s (i32.const 0)))
        end
        local.get 1))"#;

#[test]
fn tables_that_grow_behave_as_before() {
    for index in ["i32", "i64"] {
        for limits in ["3 8", "3", "3 3"] {
            let is_64 = if index == "i64" { "i64" } else { "" };
            let types: &[(&str, String)] = &[
                ("", format!("(table $t {is_64} {limits} funcref)")),
                (
                    r#"(import "h" "t" (table $t LIMITS funcref))"#,
                    String::new(),
                ),
            ];
            for (import, defined) in types {
                if !import.is_empty() && (is_64 == "i64" || limits == "3 3") {
                    continue;
                }
                let wat = TABLES
                    .replace("IMPORT", &import.replace("LIMITS", limits))
                    .replace("DEFINED", defined)
                    .replace("(I.", &format!("({index}."))
                    .replace(" I", &format!(" {index}"));
                let expected = ["TableOutOfBounds", "IndirectCallToNull", "BadSignature"];
                if limits == "3" {
                    // Without a bound it must not be grown at random.
                    let wat = wat.replace(r#"(export "grow")"#, "");
                    same_with(&wat, 3_000, &expected);
                } else {
                    same_with(&wat, 3_000, &expected);
                }
            }
        }
    }
}

#[test]
fn a_table_that_was_reset_grows_as_if_it_were_small() {
    let bytes = wasm(
        r#"(module (table $t 1 10 funcref)
            (func $f (export "f") (param i32) (result i32) (table.grow $t (ref.func $f) (local.get 0)))
            (func (export "size") (result i32) table.size $t)
            (func (export "get") (param i32) (result i32) (ref.is_null (table.get $t (local.get 0)))))"#,
    );
    let spliced = spliced(&bytes, OPTIONS[1]);
    let table = &spliced.state.tables[0];
    let size = table.size.clone().unwrap();
    let mut run = begin(&engine(false), &spliced.bytes, Some(&spliced.state), 0);
    let instance = run.instance.unwrap();
    let grow = instance
        .get_typed_func::<i32, i32>(&mut run.store, "f")
        .unwrap();
    let get = instance
        .get_typed_func::<i32, i32>(&mut run.store, "get")
        .unwrap();
    assert_eq!(run.i32(&table.dirty), 0);
    for _ in 0..3 {
        assert_eq!(grow.call(&mut run.store, 4).unwrap(), 1);
        assert_eq!(grow.call(&mut run.store, 6).unwrap(), -1);
        assert_eq!(grow.call(&mut run.store, 5).unwrap(), 5);
        assert_eq!(grow.call(&mut run.store, 0).unwrap(), 10);
        assert_eq!(get.call(&mut run.store, 9).unwrap(), 0);
        assert_eq!(run.i32(&table.dirty), 1);
        let size = run.global(&size);
        size.set(&mut run.store, Val::I32(1)).unwrap();
        let dirty = run.global(&table.dirty);
        dirty.set(&mut run.store, Val::I32(0)).unwrap();
        let beyond = get.call(&mut run.store, 1).unwrap_err();
        assert_eq!(outcome(&beyond), "TableOutOfBounds");
    }
    let real = instance.get_table(&mut run.store, &table.name).unwrap();
    assert_eq!(real.size(&run.store), 10);
}

#[test]
fn what_changes_a_table_makes_it_dirty() {
    for (code, index) in [
        ("(table.set 0 (i32.const 0) (ref.null func))", Some(0)),
        (
            "(table.fill 1 (i32.const 0) (ref.null func) (i32.const 1))",
            Some(1),
        ),
        (
            "(table.copy 0 1 (i32.const 0) (i32.const 0) (i32.const 1))",
            Some(0),
        ),
        (
            "(table.copy 2 1 (i32.const 0) (i32.const 0) (i32.const 1))",
            Some(2),
        ),
        (
            "(table.copy 0 2 (i32.const 0) (i32.const 0) (i32.const 1))",
            Some(0),
        ),
        (
            "(table.init 2 0 (i32.const 0) (i32.const 0) (i32.const 1))",
            Some(2),
        ),
        (
            "(drop (table.grow 2 (ref.null func) (i32.const 1)))",
            Some(2),
        ),
        // These change nothing.
        ("(drop (table.grow 0 (ref.null func) (i32.const 1)))", None),
        ("(drop (table.get 0 (i32.const 0)))", None),
        ("(drop (table.size 0))", None),
        ("(call_indirect (i32.const 0))", None),
    ] {
        // The third one may grow, and does so if asked by something else.
        for other in ["", "(drop (table.grow 2 (ref.null func) (i32.const 0)))"] {
            let bytes = wasm(&format!(
                r#"(module (table 2 2 funcref) (table 2 2 funcref) (table 2 funcref) (elem func 0)
                    (func) (elem (i32.const 0) 0)
                    (func (export "f") {code}) (func {other}))"#
            ));
            let spliced = spliced(&bytes, OPTIONS[1]);
            let tables = &spliced.state.tables;
            let names: BTreeSet<_> = tables.iter().map(|t| t.name.as_str()).collect();
            let mut expected: BTreeSet<_> = index.iter().map(|i| format!("\0molt0:t{i}")).collect();
            if !other.is_empty() {
                expected.insert("\0molt0:t2".into());
            }
            assert!(names.iter().eq(&expected), "{code}");
            let mut run = begin(&engine(false), &spliced.bytes, Some(&spliced.state), 0);
            for table in tables {
                assert_eq!(run.i32(&table.dirty), 0, "{code}");
            }
            let func = run.instance.unwrap().get_func(&mut run.store, "f").unwrap();
            func.call(&mut run.store, &[], &mut []).unwrap();
            for table in tables {
                let is_meant = index.is_some_and(|i| table.name == format!("\0molt0:t{i}"));
                assert_eq!(run.i32(&table.dirty), i32::from(is_meant), "{code}");
            }
        }
    }
}

#[test]
fn data_segments_behave_as_before() {
    let wat = r#"(module
        (import "h" "g" (global $g i32)) (import "h" "m" (memory $m 1 2))
        (memory $n i64 1 2)
        (global $o i32 (i32.const 65534))
        (data $a (i32.const 1) "hello") (data $p "passive")
        (data $z (global.get $o) "zz")
        (data $n1 (memory $n) (offset (i64.mul (i64.const 3) (i64.const 1))) "sixty")
        (data $sum (offset (i32.sub (i32.add (global.get $g) (i32.const 1)) (i32.const 21))) "abc")
        (data $none (i32.const 65536) "") (data $kept "kept")
        (func (export "a") (param i32 i32 i32)
            (memory.init $a (local.get 0) (local.get 1) (local.get 2)))
        (func (export "p") (param i32 i32 i32)
            (memory.init $p (local.get 0) (local.get 1) (local.get 2)))
        (func (export "p in n") (param i64 i32 i32)
            (memory.init $n $p (local.get 0) (local.get 1) (local.get 2)))
        (func (export "a in n") (param i64 i32 i32)
            (memory.init $n $a (local.get 0) (local.get 1) (local.get 2)))
        (func (export "kept") (param i32 i32 i32)
            (memory.init $kept (local.get 0) (local.get 1) (local.get 2)))
        (func (export "drop a") data.drop $a)
        MORE
        (func (export "read") (param i32) (result i32) (i32.load8_u (local.get 0)))
        (func (export "read all") (result i64) (i64.load (i32.const 0)))
        (func (export "read n") (result i64) (i64.load $n (i64.const 0))))"#;
    let drop_p = r#"(func (export "drop p") (param i32) (if (i32.eq (local.get 0) (i32.const -1)) (then data.drop $p)))"#;
    for more in ["", drop_p] {
        same_with(&wat.replace("MORE", more), 3_000, &["MemoryOutOfBounds"]);
    }
}

#[test]
fn many_segments_are_copied_in_order() {
    // Each begins with the last byte of the one before it.
    let segments = (0..2500).fold(String::new(), |wat, n| {
        wat + &format!(
            r#"(data (i32.const {n}) "\{:02x}\{:02x}")"#,
            n % 256,
            (n + 1) % 256
        )
    });
    let check = r#"(func (export "at") (result i32) (i32.load (i32.const 2497)))"#;
    for last in ["65535", "65536"] {
        let last = format!(r#"(data (i32.const {last}) "x")"#);
        let wat = format!("(module (memory 1) {check} {segments} {last})");
        let expected = if last.contains("65536") {
            "MemoryOutOfBounds"
        } else {
            "[I32(-993803583)]"
        };
        same_with(&wat, 1, &[expected]);
    }
}

#[test]
fn dropped_segments_are_remembered_in_globals() {
    let bytes = wasm(
        r#"(module (memory 1) (data $p "passive") (data $q "other") (global (mut i64) (i64.const 4))
            (func (export "f") data.drop $p)
            (func (export "g") (memory.init $q (i32.const 0) (i32.const 0) (i32.const 5)))
            (func (export "h") (memory.init $p (i32.const 0) (i32.const 0) (i32.const 1))))"#,
    );
    let spliced = spliced(&bytes, OPTIONS[1]);
    let globals = &spliced.state.globals;
    assert_eq!(globals, &["\0molt0:g0", "\0molt0:x0"]);
    let mut run = begin(&engine(false), &spliced.bytes, Some(&spliced.state), 0);
    let instance = run.instance.unwrap();
    let call = |run: &mut Run, name| {
        let func = instance.get_func(&mut run.store, name).unwrap();
        func.call(&mut run.store, &[], &mut []).is_ok()
    };
    for _ in 0..2 {
        assert_eq!(run.i32("\0molt0:x0"), 0);
        assert!(call(&mut run, "h") && call(&mut run, "f") && call(&mut run, "g"));
        assert_eq!(run.i32("\0molt0:x0"), 1);
        assert!(!call(&mut run, "h"));
        let global = run.global("\0molt0:x0");
        global.set(&mut run.store, Val::I32(0)).unwrap();
    }
}

#[test]
fn instantiation_ends_as_before() {
    for (wat, expected) in [
        ("(module)", None),
        (r#"(module (memory 1) (data (i32.const 65535) "x"))"#, None),
        (
            r#"(module (memory 1) (data (i32.const 65536) "x"))"#,
            Some("MemoryOutOfBounds"),
        ),
        (r#"(module (memory 1) (data (i32.const 65536) ""))"#, None),
        (
            r#"(module (memory 1) (data (i32.const 65537) ""))"#,
            Some("MemoryOutOfBounds"),
        ),
        (
            r#"(module (memory 0) (data (i32.const -1) "x"))"#,
            Some("MemoryOutOfBounds"),
        ),
        (
            r#"(module (memory i64 1) (data (i64.const 0x100000000) "x"))"#,
            Some("MemoryOutOfBounds"),
        ),
        (
            r#"(module (memory 1) (memory 0) (data (memory 1) (i32.const 0) "x"))"#,
            Some("MemoryOutOfBounds"),
        ),
        // Elements come before data, data before the start.
        (
            r#"(module (memory 1) (table 1 funcref) (func) (elem (i32.const 1) 0) (data (i32.const 65536) "x"))"#,
            Some("TableOutOfBounds"),
        ),
        (
            r#"(module (memory 1) (data (i32.const 65536) "x") (func unreachable) (start 0))"#,
            Some("MemoryOutOfBounds"),
        ),
        (
            r#"(module (memory 1) (data (i32.const 7) "\05") (start 0)
                (func (if (i32.ne (i32.load8_u (i32.const 7)) (i32.const 5)) (then unreachable))))"#,
            None,
        ),
        (
            "(module (func unreachable) (start 0))",
            Some("UnreachableCodeReached"),
        ),
        (
            r#"(module (import "h" "f" (func)) (start 0))"#,
            Some("f[] "),
        ),
        (
            r#"(module (import "h" "f" (func)) (func call 0 call 0) (start 1) (export "g" (func 1)))"#,
            Some("f[] f[] "),
        ),
        (
            r#"(module (import "h" "f" (func (param i32))) (memory 1) (start 1)
                (data (i32.const 0) "\07") (data (i32.const 0) "\08") (data (i32.const 1) "\01")
                (func (call 0 (i32.load16_u (i32.const 0)))))"#,
            Some("f[I32(264)] "),
        ),
    ] {
        let outcomes = same_in_both(wat, 0);
        match expected {
            Some(expected) => assert_eq!(outcomes, [expected], "{wat}"),
            None => assert!(outcomes.iter().all(String::is_empty), "{wat}: {outcomes:?}"),
        }
    }
}

#[test]
fn missing_sections_are_made_in_the_right_place() {
    for rest in [
        "",
        "(type (func))",
        r#"(import "h" "f" (func))"#,
        "(func)",
        "(func loop end)",
        "(table 1 funcref)",
        "(tag)",
        "(global i32 (i32.const 0))",
        "(global (mut i32) (i32.const 0))",
        "(func) (start 0)",
        r#"(func (export "x"))"#,
        "(table 1 funcref) (func) (elem (i32.const 0) 0)",
        r#"(@custom "first" (before first) "x") (@custom "last" (after last) "x")"#,
        r#"(@custom "data" (before data) "x") (@custom "code" (before code) "x") (func data.drop 0)"#,
        "(func (memory.init 0 (i32.const 0) (i32.const 0) (i32.const 0)))",
        "(table 1 funcref) (func (drop (table.grow (ref.null func) (i32.const 0))))",
        "(table 1 funcref) (func (drop (table.get (i32.const 0))) (table.set (i32.const 0) (ref.null func)))",
    ] {
        for memory in [
            r#"(memory 1) (data (i32.const 0) "x")"#,
            r#"(memory 1) (data "x")"#,
            r#"(memory 1) (data "x") (data (i32.const 0) "")"#,
        ] {
            same_in_both(&format!("(module {rest} {memory})"), 0);
        }
        if !rest.contains("data") && !rest.contains("memory") {
            same_in_both(&format!("(module {rest} (memory 1))"), 0);
            same_in_both(&format!("(module {rest})"), 0);
        }
    }
}

#[test]
fn hidden_names_are_nobody_elses() {
    for (names, prefix) in [
        (&[][..], "\0molt0:"),
        (&["molt0:m0", "\\00molt"], "\0molt0:"),
        (&["\\00molt0:m0"], "\0molt1:"),
        (
            &["\\00molt0:", "\\00molt1:x", "\\00molt3:", "\\00molt00002:"],
            "\0molt4:",
        ),
        (
            &["\\00molt99999999999999999999999:", "\\00molt:"],
            "\0molt0:",
        ),
    ] {
        let exports = names.iter().fold(String::new(), |wat, name| {
            wat + &format!(r#"(export "{name}" (memory 0))"#)
        });
        let wat = format!("(module (memory 1) (global (mut f32) (f32.const 0)) {exports})");
        let map = map(&wat);
        assert_eq!(map.prefix, prefix);
        assert_eq!(map.memories, [format!("{prefix}m0")]);
        assert_eq!(map.globals, [format!("{prefix}g0")]);
        same_in_both(&wat, 0);
    }
}

#[test]
fn everything_that_is_state_has_a_name() {
    let map = map(r#"(module
        (import "h" "m" (memory 1)) (import "h" "t" (table 2 9 funcref))
        (import "h" "g" (global (mut i32))) (import "h" "c" (global i32)) (import "h" "f" (func))
        (memory i64 2) (table i64 3 externref) (table 4 funcref)
        (global (mut v128) (v128.const i64x2 0 0)) (global i64 (i64.const 1)) (global (mut funcref) (ref.func 1))
        (func) (func $start) (func $unused) (func (export "x")) (elem declare func 0)
        (start $start) (data (i32.const 0) "x")
        (func (drop (table.grow 0 (ref.null func) (i32.const 1))) (table.set 1 (i64.const 0) (ref.null extern))
            (drop (table.get 2 (i32.const 0)))))"#);
    let name = |short: &str| format!("\0molt0:{short}");
    let expected = StateMap {
        prefix: name(""),
        memories: ["m0", "m1"].map(name).into(),
        globals: ["g0", "g2", "g4", "s0"].map(name).into(),
        tables: vec![
            state::StateTable {
                name: name("t0"),
                dirty: name("d0"),
                size: Some(name("s0")),
                imported: true,
                minimum: 2,
            },
            state::StateTable {
                name: name("t1"),
                dirty: name("d1"),
                size: None,
                imported: false,
                minimum: 3,
            },
        ],
        functions: [0, 1, 4].map(|i| (i, name(&format!("f{i}")))).into(),
        imported_functions: vec![(0, name("i0"))],
        start: Some(name("start")),
        init: Some(name("init")),
        waits: [None, None],
        unsupported: None,
    };
    assert_eq!(map, expected);
}

#[test]
fn functions_are_named_only_where_something_keeps_them() {
    for (rest, count) in [
        ("", 0),
        ("(global (mut funcref) (ref.null func))", 3),
        ("(global funcref (ref.null func))", 0),
        ("(global (mut externref) (ref.null extern))", 0),
        ("(global (mut (ref null 0)) (ref.null 0))", 3),
        (
            "(table 1 externref) (func (table.set 1 (i32.const 0) (ref.null extern)))",
            0,
        ),
        ("(func (table.set 0 (i32.const 0) (ref.null func)))", 3),
    ] {
        let wat = format!(
            r#"(module (type (func)) (table 2 2 funcref) (func) (func) (func (export "x")) (func) (elem (i32.const 0) 0 1) {rest})"#
        );
        assert_eq!(map(&wat).functions.len(), count, "{rest}");
    }
}

#[test]
fn waits_on_shared_memories_ask_the_host() {
    let narrow = "(drop (memory.atomic.wait32 offset=4 (i32.const 0) (i32.const 0) (i64.const 0)))";
    let wide = "(drop (memory.atomic.wait64 (i32.const 0) (i64.const 0) (i64.const 0)))";
    let far = "(drop (memory.atomic.wait32 1 offset=0xffffffffffff (i64.const 0) (i32.const 0) (i64.const 0)))";
    for (memory, code, expected) in [
        ("(memory 1 1 shared)", "", [false, false]),
        ("(memory 1 1)", narrow, [false, false]),
        ("(memory 1 1 shared)", narrow, [true, false]),
        ("(memory 1 1 shared)", wide, [false, true]),
        (
            "(memory 1 1 shared) (memory i64 1 1 shared)",
            far,
            [true, false],
        ),
    ] {
        let wat = format!("(module {memory} (func {code}))");
        assert_eq!(
            map(&wat).waits.each_ref().map(Option::is_some),
            expected,
            "{wat}"
        );
    }
}

#[test]
fn what_cannot_be_captured_is_said() {
    for (rest, expected) in [
        ("", None),
        ("(memory 1)", None),
        ("(memory 1 1 shared)", None),
        (
            "(global anyref (ref.null any))",
            Some("it keeps garbage-collected objects in global 0 (type anyref)"),
        ),
        (
            "(type (struct)) (global (mut (ref null 0)) (ref.null 0))",
            Some("garbage-collected objects in global 0"),
        ),
        (
            "(type (func)) (global (mut (ref null 0)) (ref.null 0))",
            None,
        ),
        (
            "(func) (elem declare func 0) (global (mut (ref func)) (ref.func 0))",
            Some("its global 0 is never null (type (ref func))"),
        ),
        (
            "(func) (elem declare func 0) (global (ref func) (ref.func 0))",
            None,
        ),
        ("(global (mut externref) (ref.null extern))", None),
        (
            "(global exnref (ref.null exn))",
            Some("it keeps exceptions in global 0 (type exnref)"),
        ),
        (
            "(table 1 i31ref)",
            Some("it keeps garbage-collected objects in table 0 (type i31ref)"),
        ),
        ("(func $f) (table 1 (ref func) (ref.func $f))", None),
        (
            "(func $f (table.set 0 (i32.const 0) (ref.func $f))) (table 1 (ref func) (ref.func $f))",
            Some("its table 0 is never null"),
        ),
        (
            "(func) (elem $e func 0) (func elem.drop $e)",
            Some("it drops element segments (elem.drop)"),
        ),
        (r#"(memory 1) (data $d "x") (func data.drop $d)"#, None),
        (
            r#"(memory 1) (data $d "x") (type $a (array i8))
                (func data.drop $d (drop (array.new_data $a $d (i32.const 0) (i32.const 1))))"#,
            Some("it makes arrays of data segment 0, which it also drops"),
        ),
        (
            r#"(memory 1) (data $d "x") (type $a (array i8))
                (func (drop (array.new_data $a $d (i32.const 0) (i32.const 1))))"#,
            None,
        ),
        (
            "(func (drop (extern.convert_any (ref.null any))))",
            Some("extern.convert_any"),
        ),
    ] {
        let wat = format!("(module {rest})");
        let found = map(&wat).unsupported;
        match expected {
            None => assert_eq!(found, None, "{rest}"),
            Some(part) => assert!(
                found.as_ref().is_some_and(|f| f.contains(part)),
                "{rest}: {found:?}"
            ),
        }
    }
}

#[test]
fn what_cannot_be_captured_runs_as_before() {
    same_with(
        r#"(module (type $a (array (mut i8))) (memory 1) (data $x (i32.const 0) "active") (data $p "passive")
            (table $t 1 6 anyref) (global $g (mut (ref $a)) (array.new $a (i32.const 1) (i32.const 9)))
            (func (export "new x") (param i32 i32) (result i32)
                (array.len (array.new_data $a $x (local.get 0) (local.get 1))))
            (func (export "init x") (param i32 i32 i32)
                (array.init_data $a $x (global.get $g) (local.get 0) (local.get 1) (local.get 2)))
            (func (export "new p") (param i32 i32) (result i32)
                (array.len (array.new_data $a $p (local.get 0) (local.get 1))))
            (func (export "drop p") (param i32) (if (i32.eq (local.get 0) (i32.const -2)) (then data.drop $p data.drop $x)))
            (func (export "init p") (param i32 i32 i32)
                (memory.init $p (local.get 0) (local.get 1) (local.get 2)))
            (func (export "grow") (param i32) (result i32) (table.grow $t (ref.i31 (i32.const 1)) (local.get 0)))
            (func (export "get") (param i32) (result i32) (ref.is_null (table.get $t (local.get 0)))))"#,
        1_000,
        &["MemoryOutOfBounds", "TableOutOfBounds", "ArrayOutOfBounds"],
    );
}

#[test]
fn no_part_of_a_module_can_name_what_was_put_in() {
    // All of this makes types, functions, globals and data segments.
    const REST: &str = r#"(memory 1) (data $a (i32.const 0) "x") (data $p "y") (table $t 1 funcref)
        (type $f (func)) (func $used (type $f) data.drop $p
            (memory.init $a (i32.const 0) (i32.const 0) (i32.const 0))
            (drop (table.grow $t (ref.null func) (i32.const 0)))) (global $g i32 (i32.const 0))"#;
    for (more, what) in [
        ("(func call N)", "function"),
        ("(func return_call N)", "function"),
        ("(func loop call N end)", "function"),
        ("(func (drop (ref.null func)) call N)", "function"),
        ("(elem func N)", "function"),
        ("(elem funcref (ref.func N))", "function"),
        (r#"(export "x" (func N))"#, "function"),
        ("(start N)", "function"),
        ("(func (drop (ref.func N)))", "function"),
        ("(func (drop (global.get N)))", "global"),
        ("(func (global.set N (i32.const 1)))", "global"),
        (
            "(func (drop (ref.null func)) (global.set N (i32.const 1)))",
            "global",
        ),
        (r#"(export "x" (global N))"#, "global"),
        (r#"(data (global.get N) "")"#, "global"),
        ("(elem (global.get N) func)", "global"),
        ("(func data.drop N)", "data segment"),
        (
            "(func (memory.init N (i32.const 0) (i32.const 0) (i32.const 0)))",
            "data segment",
        ),
        ("(func (type N))", "type"),
        ("(func block (type N) end)", "type"),
        ("(func (call_indirect (type N) (i32.const 0)))", "type"),
        ("(func (local (ref null N)))", "type"),
        ("(func (drop (ref.null N)))", "type"),
        (
            "(func (drop (block (result (ref null N)) unreachable)))",
            "type",
        ),
        ("(global (ref null N) (ref.null N))", "type"),
        ("(table 1 (ref null N))", "type"),
        (r#"(import "h" "g" (global (ref null N)))"#, "type"),
        (r#"(import "h" "f" (func (type N)))"#, "type"),
        ("(tag (type N))", "type"),
        ("(elem (ref null N))", "type"),
    ] {
        let mut refused = 0;
        for n in 1..40 {
            let bytes = wat::parse_str(format!(
                "(module {} {REST})",
                more.replace('N', &n.to_string())
            ));
            let Ok(bytes) = bytes else {
                continue;
            };
            match instrument(&bytes, &OPTIONS[1]) {
                Ok(spliced) => assert_eq!(valid(&bytes), valid(&spliced.bytes), "{more} {n}"),
                Err(InstrumentError::Malformed { message, .. }) => {
                    assert!(!valid(&bytes), "{more} {n}");
                    refused += usize::from(message == format!("unknown {what} {n}"));
                }
                Err(other) => panic!("{more} {n}: {other}"),
            }
        }
        assert!(refused > 30, "{more}: {refused}");
    }
    for (module, message) in [
        (
            "(func (param i32)) (start 0)",
            "invalid start function type",
        ),
        (
            "(func (drop (ref.func 1))) (func) (start 1)",
            "undeclared function reference",
        ),
        (
            r#"(memory 1) (global $m (mut i32) (i32.const 0)) (data (global.get $m) "x")"#,
            "constant expression required",
        ),
        (
            r#"(memory 1) (data (i32.load (i32.const 0)) "x")"#,
            "constant expression required",
        ),
    ] {
        let bytes = wasm(&format!("(module {module})"));
        assert!(!valid(&bytes), "{module}");
        let error = instrument(&bytes, &OPTIONS[1]).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains(message), "{module}: {error}");
    }
}

#[test]
fn damaged_modules_do_not_become_valid() {
    let wats = [
        r#"(module (import "a" "f" (func)) (memory 1) (table 2 9 funcref) (global i32 (i32.const 0)) (global (mut i32) (i32.const 0))
            (export "x" (func 1)) (export "g" (global 1)) (start 0) (elem (i32.const 0) 1 2) (elem $e funcref (ref.func 1))
            (data (i32.const 1) "hello") (data "passive") (data (i32.add (global.get 0) (i32.const 1)) "again")
            (func (param i32 i32 i32) (memory.init 1 (local.get 0) (local.get 1) (local.get 2)) data.drop 1
                (memory.init 0 (local.get 0) (local.get 1) (local.get 2)) (drop (table.grow (ref.func 1) (local.get 0)))
                (table.init $e (local.get 0) (local.get 1) (local.get 2)))
            (func (call_indirect (i32.const 0)) (global.set 1 (table.size)) block (result i32) global.get 0 end drop))"#,
        r#"(module (func) (start 0) (memory i64 1) (data (i64.const 1) "x"))"#,
        r#"(module (memory 1) (data (i32.const 1) "x") (data (i32.const 1) "y"))"#,
    ];
    let originals = wats.map(wasm);
    let mut random = random(3);
    let mut accepted = 0;
    for round in 0..100_000 {
        let mut bytes = originals[if round % 4 > 0 { 0 } else { 1 + random() % 2 }].clone();
        for _ in 0..=random() % 3 {
            let at = 8 + random() % (bytes.len() - 8);
            match random() % 4 {
                0 => bytes[at] = random() as u8,
                1 => bytes[at] = bytes[at].wrapping_add(1 + (random() % 3) as u8),
                2 => {
                    bytes.remove(at);
                }
                _ => bytes.insert(at, random() as u8),
            }
        }
        match instrument(&bytes, &OPTIONS[round % 2]) {
            Ok(spliced) => {
                accepted += 1;
                assert_eq!(valid(&bytes), valid(&spliced.bytes), "{bytes:x?}");
            }
            Err(InstrumentError::LegacyExceptions { .. } | InstrumentError::NoRoom { .. }) => {}
            Err(error) => assert!(!valid(&bytes), "{error} {bytes:x?}"),
        }
    }
    assert!(accepted > 1000, "{accepted}");
}

#[test]
fn helpers_are_reckoned_with_where_code_is_inlined() {
    // Every other function calls the next one.
    let functions = (0..2000).fold(String::new(), |wat, n| {
            let calls = format!("(drop (call {} (i32.const 1)))", n + 1).repeat(2);
            let calls = if n % 2 == 0 { calls } else { String::new() };
            wat + &format!(
                "(func (param i32) (result i32) (if (local.get 0) (then (return (table.size $t)))) {calls}
                    (i32.add (ref.is_null (table.get $t (i32.const 1)))
                        (call_indirect $t (param i32) (result i32) (i32.const 1) (i32.const 0))))"
            )
        });
    let wat = format!(
        r#"(module (table $t 2 9 funcref) (elem (i32.const 0) 5) {functions}
            (export "run" (func 380)) (export "short" (func 395))
            (func (export "grow") (param i32) (result i32) (table.grow $t (ref.null func) (local.get 0)))
            (func (export "set") (param i32) (table.set $t (local.get 0) (ref.func 5))))"#
    );
    assert!(
        spliced(&wasm(&wat), OPTIONS[2]).inlining,
        "the test is pointless"
    );
    same_in_both(&wat, 200);
}
