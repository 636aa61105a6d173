//! Realms: what the host makes in one store, and what a snapshot brings back of it.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use proptest::strategy::Strategy as _;
use proptest::test_runner::{Config, TestRunner};
use wasm_molt_engine::{
    Error, ErrorCode, Exception, ExportType, FuncHandle, HostRef, ImageKind, MemoryRecord, Module,
    RealmImport, ReloadOptions, ResetOptions, Result, Snapshot, Strategy, Value, ValueType,
};
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::{RealmStep, Script, host_function};
use wasm_molt_testkit::inside::{InRealm, Made};
use wasm_molt_testkit::meter;
use wasm_molt_testkit::quiet::alone;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, trap};
use wasm_molt_testkit::wait::{answer, eventually};

const PAGE: usize = 1 << 16;
const MIB: usize = 1 << 20;

/// What is in no module.
const NULL: Value = Value::Func(None);

fn rig() -> Rig {
    Setup::realm().start()
}

/// An instance of that text.
#[track_caller]
fn make(rig: &Rig, wat: &str, imports: Vec<RealmImport>) -> Made {
    try_make(rig, wat, imports).unwrap()
}

#[track_caller]
fn try_make(rig: &Rig, wat: &str, imports: Vec<RealmImport>) -> Result<Made> {
    let module = rig.compile(wat);
    rig.realm(move |realm| realm.instantiate(&module, imports))
}

fn item(id: u32) -> RealmImport {
    RealmImport::Item(id)
}

#[track_caller]
fn call(rig: &Rig, func: FuncHandle, args: &[Value]) -> Result<Vec<Value>> {
    let args = args.to_vec();
    rig.realm(move |realm| realm.call(&func, &args))
}

/// Calls for the one i32 that comes back.
#[track_caller]
fn number(rig: &Rig, made: &Made, name: &str, args: &[i32]) -> i32 {
    let args: Vec<_> = args.iter().copied().map(Value::I32).collect();
    match call(rig, made.func(name), &args).unwrap()[..] {
        [Value::I32(number)] => number,
        ref other => panic!("{name}: {other:?}"),
    }
}

#[track_caller]
fn run(rig: &Rig, made: &Made, name: &str, args: &[Value]) {
    assert!(call(rig, made.func(name), args).unwrap().is_empty());
}

fn text(it: &'static str) -> Value {
    Value::Extern(Some(HostRef::new(it)))
}

#[track_caller]
fn said(value: Option<Value>) -> Option<&'static str> {
    match value {
        Some(Value::Extern(held)) => held.map(|held| *held.downcast_ref().unwrap()),
        other => panic!("a value of the host was expected, not {other:?}"),
    }
}

#[track_caller]
fn func_of(value: Option<Value>) -> FuncHandle {
    match value {
        Some(Value::Func(Some(func))) => func,
        other => panic!("a function was expected, not {other:?}"),
    }
}

#[track_caller]
fn table_len(rig: &Rig, table: u32) -> u64 {
    rig.realm(move |realm| realm.table_len(table))
}

#[track_caller]
fn element(rig: &Rig, table: u32, index: u64) -> Option<Value> {
    rig.realm(move |realm| realm.element(table, index)).unwrap()
}

#[track_caller]
fn set_element(rig: &Rig, table: u32, index: u64, value: Value) -> bool {
    let set = rig.realm(move |realm| realm.set_element(table, index, value));
    set.unwrap()
}

#[track_caller]
fn grow_table(rig: &Rig, table: u32, delta: u64, value: Value) -> Option<u64> {
    let grown = rig.realm(move |realm| realm.grow_table(table, delta, value));
    grown.unwrap()
}

#[track_caller]
fn grow_memory(rig: &Rig, memory: u32, delta: u64) -> Option<u64> {
    let grown = rig.realm(move |realm| realm.grow_memory(memory, delta));
    grown.unwrap()
}

#[track_caller]
fn read_global(rig: &Rig, global: u32) -> Option<Value> {
    rig.realm(move |realm| realm.read_global(global)).unwrap()
}

#[track_caller]
fn write_global(rig: &Rig, global: u32, value: Value) {
    let written = rig.realm(move |realm| realm.write_global(global, value));
    written.unwrap();
}

#[track_caller]
fn new_memory(rig: &Rig, initial: u64, maximum: Option<u64>) -> u32 {
    let made = rig.realm(move |realm| realm.memory(initial, maximum, false));
    made.unwrap()
}

#[track_caller]
fn new_table(rig: &Rig, element: ValueType, sizes: (u64, Option<u64>), value: Value) -> u32 {
    let sizes = (sizes.0, sizes.1, false);
    let made = rig.realm(move |realm| realm.table(element, sizes, value));
    made.unwrap()
}

fn record(rig: &Rig, memory: u32) -> Arc<MemoryRecord> {
    rig.replica(0).realm_memory(memory).unwrap()
}

fn read(record: &MemoryRecord, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    record.read(at, &mut bytes).unwrap();
    bytes
}

#[track_caller]
fn assert_zeros(record: &MemoryRecord, from: usize) {
    let bytes = read(record, from as u64, record.byte_len() - from);
    let first = bytes.iter().position(|byte| *byte != 0);
    assert_eq!(first, None, "not zero at {from} and so many");
}

fn reset_to(snapshot: &Arc<Snapshot>) -> ResetOptions {
    ResetOptions {
        to: Some(Arc::clone(snapshot)),
        ..ResetOptions::default()
    }
}

// ---------------------------------------------------------------------- what instances share

/// Writes and reads what it imports.
const SHARER: &str = r#"(module
    (import "env" "memory" (memory 1))
    (import "env" "table" (table 2 funcref))
    (import "env" "global" (global $g (mut i32)))
    (func (export "store") (param i32 i32) (i32.store (local.get 0) (local.get 1)))
    (func (export "load") (param i32) (result i32) (i32.load (local.get 0)))
    (func (export "set") (param i32) (global.set $g (local.get 0)))
    (func (export "get") (result i32) (global.get $g))
    (func (export "put") (param i32 funcref) (table.set (local.get 0) (local.get 1)))
    (func (export "apply") (param i32) (result i32)
        (call_indirect (result i32) (local.get 0)))
    (func (export "answer") (result i32) (global.get $g)))"#;

#[test]
fn two_instances_share_what_the_host_has_made() {
    let rig = rig();
    let memory = new_memory(&rig, 1, Some(3));
    let table = new_table(&rig, ValueType::FuncRef, (2, None), NULL);
    let global = rig.realm(|realm| realm.global("i32", true, Some(Value::I32(7))));
    let global = global.unwrap();
    let imports = || vec![item(memory), item(table), item(global)];
    let a = make(&rig, SHARER, imports());
    let b = make(&rig, SHARER, imports());
    run(&rig, &a, "store", &[Value::I32(100), Value::I32(-5)]);
    assert_eq!(number(&rig, &b, "load", &[100]), -5);
    let record = record(&rig, memory);
    assert_eq!(read(&record, 100, 4), (-5_i32).to_le_bytes());
    record.write(104, &9_i32.to_le_bytes()).unwrap();
    assert_eq!(number(&rig, &a, "load", &[104]), 9);
    assert_eq!(number(&rig, &a, "get", &[]), 7);
    run(&rig, &b, "set", &[Value::I32(8)]);
    assert_eq!(number(&rig, &a, "get", &[]), 8);
    assert!(matches!(read_global(&rig, global), Some(Value::I32(8))));
    write_global(&rig, global, Value::I32(9));
    assert_eq!(number(&rig, &b, "answer", &[]), 9);
    // A function of one is called by the other, by way of the table.
    let answer = Value::Func(Some(a.func("answer")));
    run(&rig, &b, "put", &[Value::I32(1), answer]);
    assert_eq!(number(&rig, &a, "apply", &[1]), 9);
    assert_eq!(number(&rig, &b, "apply", &[1]), 9);
    assert_eq!(
        func_of(element(&rig, table, 1)).address(),
        a.func("answer").address()
    );
    assert!(matches!(element(&rig, table, 0), Some(Value::Func(None))));
    assert!(element(&rig, table, 2).is_none());
    assert_eq!(
        trap(call(&rig, b.func("apply"), &[Value::I32(0)])),
        "indirect-call-to-null"
    );
}

/// Emscripten's `addFunction`: a helper module makes a function of the guest out of one of the host.
#[test]
fn a_function_of_the_host_is_added_to_a_table_by_way_of_a_helper_module() {
    let rig = rig();
    let guest = make(
        &rig,
        r#"(module (table (export "table") 1 funcref)
            (func (export "apply") (param i32 i32) (result i32)
                (call_indirect (param i32) (result i32) (local.get 1) (local.get 0))))"#,
        Vec::new(),
    );
    let table = guest.item("table");
    let helper = r#"(module (import "e" "f" (func $f (param i32) (result i32)))
        (export "f" (func $f)))"#;
    let double = host_function(|call| {
        let [Value::I32(n)] = call.args[..] else {
            panic!("{:?}", call.args)
        };
        call.results[0] = Value::I32(2 * n);
        Ok(())
    });
    let added = make(&rig, helper, vec![RealmImport::Function(double)]).func("f");
    assert_eq!(grow_table(&rig, table, 1, NULL), Some(1));
    assert!(set_element(&rig, table, 1, Value::Func(Some(added))));
    assert_eq!(number(&rig, &guest, "apply", &[1, 21]), 42);
    let taken = func_of(element(&rig, table, 1));
    assert_eq!(taken.address(), added.address());
    // Taken out again it is callable as it was.
    let values = call(&rig, taken, &[Value::I32(4)]).unwrap();
    assert!(matches!(values[..], [Value::I32(8)]));
    // The same helper for another function is another one.
    let negate = host_function(|call| {
        let [Value::I32(n)] = call.args[..] else {
            panic!("{:?}", call.args)
        };
        call.results[0] = Value::I32(-n);
        Ok(())
    });
    let other = make(&rig, helper, vec![RealmImport::Function(negate)]).func("f");
    assert!(set_element(&rig, table, 0, Value::Func(Some(other))));
    assert_eq!(number(&rig, &guest, "apply", &[0, 21]), -21);
    assert_eq!(number(&rig, &guest, "apply", &[1, 21]), 42);
}

#[test]
fn what_is_passed_on_keeps_its_identity() {
    let rig = rig();
    let first = make(
        &rig,
        r#"(module
            (memory (export "memory") 1) (memory 1) (export "again" (memory 0))
            (table (export "table") 1 funcref) (export "table2" (table 0))
            (table $changed (export "changed") 1 externref)
            (global (export "const") i64 (i64.const 5)) (export "const2" (global 0))
            (global $var (export "var") (mut i32) (i32.const 6))
            (tag (export "tag") (param i32))
            (func (export "f") (result i32) (global.get $var))
            (func (export "touch") (table.set $changed (i32.const 0) (ref.null extern))))"#,
        Vec::new(),
    );
    for (name, same) in [
        ("memory", "again"),
        ("table", "table2"),
        ("const", "const2"),
    ] {
        assert_eq!(first.item(name), first.item(same), "{name}");
    }
    let second = make(
        &rig,
        r#"(module
            (import "a" "tag" (tag $tag (param i32)))
            (import "a" "memory" (memory $m 1))
            (import "a" "table" (table $t 1 funcref))
            (import "a" "changed" (table $c 1 externref))
            (import "a" "const" (global $const i64))
            (import "a" "var" (global $var (mut i32)))
            (import "a" "f" (func $f (result i32)))
            (export "memory" (memory $m)) (export "table" (table $t)) (export "changed" (table $c))
            (export "const" (global $const)) (export "var" (global $var)) (export "tag" (tag $tag))
            (export "f" (func $f))
            (memory (export "own") 1)
            (func (export "refer") (result funcref) (ref.func $f))
            (func (export "put") (table.set $t (i32.const 0) (ref.func $f))))"#,
        ["tag", "memory", "table", "changed", "const", "var"]
            .iter()
            .map(|name| item(first.item(name)))
            .chain([RealmImport::Guest(first.func("f"))])
            .collect(),
    );
    for name in ["tag", "memory", "table", "changed", "const", "var"] {
        assert_eq!(first.item(name), second.item(name), "{name}");
    }
    assert_ne!(second.item("own"), second.item("memory"));
    let original = |func| rig.replica(0).realm_original(func).address();
    let f = first.func("f");
    assert_eq!(original(f), f.address());
    assert_eq!(original(second.func("f")), f.address());
    let referred = call(&rig, second.func("refer"), &[]).unwrap();
    assert_eq!(original(func_of(referred.into_iter().next())), f.address());
    run(&rig, &second, "put", &[]);
    let put = func_of(element(&rig, first.item("table"), 0));
    assert_eq!(original(put), f.address());
    // Twice removed it is still the same.
    let third = make(
        &rig,
        r#"(module (import "b" "f" (func $f (result i32))) (export "f" (func $f)))"#,
        vec![RealmImport::Guest(second.func("f"))],
    );
    assert_eq!(original(third.func("f")), f.address());
    assert_eq!(number(&rig, &third, "f", &[]), 6);
    assert_eq!(rig.replica(0).realm_function_index(&f), Some(0));
}

#[test]
fn types_are_shown_with_the_sizes_of_now() {
    let rig = rig();
    let memory = new_memory(&rig, 1, Some(5));
    assert_eq!(grow_memory(&rig, memory, 2), Some(1));
    let of_memory = rig.replica(0).realm_memory_type(memory).unwrap();
    let expected = ExportType::Memory {
        minimum: 3,
        maximum: Some(5),
        shared: false,
        is_64: false,
    };
    assert_eq!(of_memory, expected);
    let table = new_table(&rig, ValueType::ExternRef, (1, Some(9)), text("a"));
    assert_eq!(grow_table(&rig, table, 3, text("b")), Some(1));
    let of_table = rig.realm(move |realm| realm.table_type(table)).unwrap();
    let expected = ExportType::Table {
        element: "externref",
        minimum: 4,
        maximum: Some(9),
        is_64: false,
    };
    assert_eq!(of_table, expected);
    let global = rig.realm(|realm| realm.global("v128", true, None)).unwrap();
    let (ty, shown) = rig.replica(0).realm_global_type(global).unwrap();
    assert_eq!(ty, ValueType::Opaque);
    let expected = ExportType::Global {
        ty: "v128",
        mutable: true,
    };
    assert_eq!(shown, expected);
    assert!(read_global(&rig, global).is_none(), "it cannot cross");
    let tag = rig.realm(|realm| realm.tag(&["i32", "externref"])).unwrap();
    let (params, shown) = rig.realm(move |realm| realm.tag_type(tag)).unwrap();
    assert_eq!(params, [ValueType::I32, ValueType::ExternRef]);
    assert_eq!(shown, ExportType::Tag(vec!["i32", "externref"]));
}

// ---------------------------------------------------------------------- making instances

#[test]
fn start_functions_run_and_may_trap_and_the_realm_goes_on() {
    let rig = rig();
    let memory = new_memory(&rig, 1, None);
    let good = r#"(module (import "e" "m" (memory 1)) (data (i32.const 8) "data")
        (func $start (i32.store (i32.const 0) (i32.const 77))) (start $start))"#;
    make(&rig, good, vec![item(memory)]);
    let record = record(&rig, memory);
    assert_eq!(read(&record, 0, 4), 77_i32.to_le_bytes());
    assert_eq!(read(&record, 8, 4), b"data");
    let bad = r#"(module (import "e" "m" (memory 1)) (data (i32.const 16) "more")
        (func $start (i32.store (i32.const 0) (i32.const 78)) unreachable) (start $start))"#;
    assert_eq!(trap(try_make(&rig, bad, vec![item(memory)])), "unreachable");
    // What it did until then is done.
    assert_eq!(read(&record, 0, 4), 78_i32.to_le_bytes());
    assert_eq!(read(&record, 16, 4), b"more");
    let beyond = r#"(module (import "e" "m" (memory 1)) (data (i32.const 24) "x")
        (data (i32.const 65536) "y") (func $start unreachable) (start $start))"#;
    let ended = try_make(&rig, beyond, vec![item(memory)]);
    assert_eq!(trap(ended), "out-of-bounds-memory");
    assert_eq!(read(&record, 24, 1), b"x");
    let elements = r#"(module (table 1 funcref) (elem (i32.const 1) func $f) (func $f))"#;
    assert_eq!(
        trap(try_make(&rig, elements, Vec::new())),
        "out-of-bounds-table"
    );
    assert_eq!(rig.stats().poisoned, 0);
    let adder = make(&rig, &guests::adder(), Vec::new());
    assert_eq!(number(&rig, &adder, "add", &[1, 2]), 3);
}

#[test]
fn a_trap_leaves_the_realm_as_it_is() {
    let rig = rig();
    let counter = make(&rig, &guests::counter(), Vec::new());
    assert_eq!(number(&rig, &counter, "increment", &[]), 1);
    assert_eq!(trap(call(&rig, counter.func("trap"), &[])), "unreachable");
    assert_eq!(number(&rig, &counter, "get", &[]), -1);
    assert!(!rig.replica(0).is_poisoned());
    assert_eq!(rig.manager.generation().get(), 1);
}

/// A start function may be the first to throw.
#[test]
fn a_start_function_that_throws_says_what() {
    let rig = rig();
    let tag = rig.realm(|realm| realm.tag(&["i32"])).unwrap();
    let wat = r#"(module (import "e" "t" (tag $t (param i32)))
        (func $start (throw $t (i32.const 5))) (start $start))"#;
    for _ in 0..2 {
        match try_make(&rig, wat, vec![item(tag)]) {
            Err(Error::Exception(thrown)) => {
                assert_eq!(thrown.tag, tag);
                assert!(matches!(thrown.payload[..], [Value::I32(5)]));
            }
            other => panic!("{other:?}"),
        }
    }
    let adder = make(&rig, &guests::adder(), Vec::new());
    assert_eq!(number(&rig, &adder, "add", &[1, 2]), 3);
}

#[test]
fn link_errors_name_the_import() {
    let rig = rig();
    let memory = new_memory(&rig, 1, None);
    let table = new_table(&rig, ValueType::ExternRef, (1, None), Value::Extern(None));
    let constant = rig.realm(|realm| realm.global("i32", false, Some(Value::I32(1))));
    let constant = constant.unwrap();
    let tag = rig.realm(|realm| realm.tag(&["i32"])).unwrap();
    let func = make(&rig, &guests::adder(), Vec::new()).func("add");
    let nobody = 1000;
    let given = [
        (r#"(memory 1)"#, item(nobody)),
        (r#"(memory 2)"#, item(memory)),
        (r#"(memory 1 1)"#, item(memory)),
        (r#"(memory i64 1)"#, item(memory)),
        (r#"(memory 1)"#, RealmImport::Guest(func)),
        (r#"(table 1 funcref)"#, item(table)),
        (r#"(table 2 externref)"#, item(table)),
        (r#"(table 1 funcref)"#, item(nobody)),
        (r#"(global (mut i32))"#, item(constant)),
        (r#"(global i64)"#, item(constant)),
        (r#"(global i32)"#, item(nobody)),
        (r#"(tag)"#, item(tag)),
        (r#"(tag (param i32))"#, item(nobody)),
        (r#"(func)"#, item(memory)),
        (r#"(func (param i32))"#, RealmImport::Guest(func)),
    ];
    for (kind, import) in given {
        let wat = format!(r#"(module (import "mod" "thing" {kind}))"#);
        let what = format!("{kind} given {import:?}");
        let error = try_make(&rig, &wat, vec![import]).unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::Link), "{what}: {error}");
        let message = error.to_string();
        let names_it = message.contains("mod") && message.contains("thing");
        assert!(names_it, "{what}: {message}");
    }
    let adder = make(&rig, &guests::adder(), Vec::new());
    assert_eq!(number(&rig, &adder, "add", &[1, 2]), 3);
}

#[test]
fn what_belongs_to_another_realm_or_engine_is_refused() {
    let (rig, other) = (rig(), rig());
    let foreign = make(&other, &guests::adder(), Vec::new()).func("add");
    let wat = r#"(module (import "e" "f" (func (param i32 i32) (result i32))))"#;
    let ended = try_make(&rig, wat, vec![RealmImport::Guest(foreign)]);
    assert_eq!(code(ended), ErrorCode::Link);
    let table = new_table(&rig, ValueType::FuncRef, (1, None), NULL);
    let set = rig.realm(move |realm| realm.set_element(table, 0, Value::Func(Some(foreign))));
    assert_eq!(code(set), ErrorCode::StaleHandle);
    let slow = Setup::realm().options(|o| o.engine.interruptible = false);
    let slow = slow.start();
    let module = rig.compile(&guests::adder());
    let ended = slow.realm(move |realm| realm.instantiate(&module, Vec::new()));
    assert_eq!(code(ended), ErrorCode::Link);
}

#[test]
fn limits_hold_for_what_the_host_makes() {
    let setup = Setup::realm().options(|o| {
        o.limits.memory_bytes = Some(4 * PAGE as u64);
        o.limits.table_elements = Some(10);
    });
    let rig = setup.start();
    let refused = |ended: Result<u32>, number: &str| {
        let error = ended.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::InvalidArgument), "{error}");
        assert!(error.to_string().contains(number), "'{number}' in: {error}");
    };
    refused(rig.realm(|realm| realm.memory(5, None, false)), "327680");
    let table = |count| {
        move |realm: &InRealm<'_>| {
            realm.table(
                ValueType::ExternRef,
                (count, None, false),
                Value::Extern(None),
            )
        }
    };
    refused(rig.realm(table(11)), "11");
    let memory = new_memory(&rig, 4, None);
    assert_eq!(grow_memory(&rig, memory, 1), None);
    assert_eq!(record(&rig, memory).byte_len(), 4 * PAGE);
    let table = rig.realm(table(10)).unwrap();
    assert_eq!(grow_table(&rig, table, 1, Value::Extern(None)), None);
    assert_eq!(table_len(&rig, table), 10);
    // And for what instances bring, and do.
    for (wat, number) in [
        ("(module (memory 5))", "327680"),
        ("(module (table 11 funcref))", "11"),
    ] {
        refused(try_make(&rig, wat, Vec::new()).map(|_| 0), number);
    }
    let grower = make(
        &rig,
        r#"(module (memory 1) (table 1 externref)
            (func (export "memory") (param i32) (result i32) (memory.grow (local.get 0)))
            (func (export "table") (param i32) (result i32)
                (table.grow (ref.null extern) (local.get 0))))"#,
        Vec::new(),
    );
    assert_eq!(number(&rig, &grower, "memory", &[4]), -1);
    assert_eq!(number(&rig, &grower, "memory", &[3]), 1);
    assert_eq!(number(&rig, &grower, "table", &[10]), -1);
    assert_eq!(number(&rig, &grower, "table", &[9]), 1);
    // What was refused long ago is not what a later error is about.
    make(
        &rig,
        r#"(module (table 0 externref) (func $start
            (drop (table.grow (ref.null extern) (i32.const 1000)))) (start $start))"#,
        Vec::new(),
    );
    let error = rig.realm(|realm| {
        realm.table(
            ValueType::ExternRef,
            (2, Some(1), false),
            Value::Extern(None),
        )
    });
    let error = error.unwrap_err().to_string();
    assert!(!error.contains("1000"), "{error}");
}

#[test]
fn sizes_that_cannot_be_had_are_refused() {
    let rig = rig();
    let memory =
        |initial, maximum, is_64| rig.realm(move |realm| realm.memory(initial, maximum, is_64));
    for (initial, maximum, is_64) in [
        (2, Some(1), false),
        (65537, None, false),
        (1 << 47, None, true),
        (u64::MAX, None, true),
    ] {
        let refused = code(memory(initial, maximum, is_64));
        assert_eq!(refused, ErrorCode::InvalidArgument, "{initial} {maximum:?}");
    }
    let table = |initial, maximum, is_64| {
        let sizes = (initial, maximum, is_64);
        rig.realm(move |realm| realm.table(ValueType::FuncRef, sizes, NULL))
    };
    for (initial, maximum, is_64) in [
        (2, Some(1), false),
        (1 << 32, None, false),
        (10_000_001, None, false),
        (10_000_001, None, true),
    ] {
        let refused = code(table(initial, maximum, is_64));
        assert_eq!(refused, ErrorCode::InvalidArgument, "{initial} {maximum:?}");
    }
    let wide = table(1, None, true).unwrap();
    assert_eq!(grow_table(&rig, wide, 2, NULL), Some(1));
    assert_eq!(grow_table(&rig, wide, u64::MAX, NULL), None);
    assert_eq!(table_len(&rig, wide), 3);
    let mistaken = rig.realm(|realm| {
        let i64_for_i32 = realm.global("i32", true, Some(Value::I64(1)));
        let nothing = realm.global("i33", true, None);
        let number = realm.table(ValueType::FuncRef, (1, None, false), Value::I32(1));
        let wrong = realm.table(ValueType::FuncRef, (1, None, false), text("x"));
        (code(i64_for_i32), code(nothing), code(number), code(wrong))
    });
    let invalid = ErrorCode::InvalidArgument;
    assert_eq!(mistaken, (invalid, invalid, invalid, invalid));
    let constant = rig.realm(|realm| realm.global("i32", false, Some(Value::I32(1))));
    let constant = constant.unwrap();
    let written = rig.realm(move |realm| realm.write_global(constant, Value::I32(2)));
    assert_eq!(code(written), invalid);
}

#[test]
fn memories_grow_by_host_and_by_guest() {
    let rig = rig();
    let memory = new_memory(&rig, 1, Some(6));
    let guest = make(
        &rig,
        r#"(module (import "e" "m" (memory 1))
            (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
            (func (export "size") (result i32) (memory.size))
            (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0))))"#,
        vec![item(memory)],
    );
    assert_eq!(grow_memory(&rig, memory, 1), Some(1));
    assert_eq!(number(&rig, &guest, "size", &[]), 2);
    assert_eq!(number(&rig, &guest, "grow", &[2]), 2);
    assert_eq!(grow_memory(&rig, memory, 0), Some(4));
    assert_eq!(grow_memory(&rig, memory, 3), None);
    assert_eq!(number(&rig, &guest, "grow", &[3]), -1);
    assert_eq!(grow_memory(&rig, memory, 2), Some(4));
    assert_eq!(number(&rig, &guest, "peek", &[6 * PAGE as i32 - 1]), 0);
    let beyond = call(&rig, guest.func("peek"), &[Value::I32(6 * PAGE as i32)]);
    assert_eq!(trap(beyond), "out-of-bounds-memory");
    let wide = rig.realm(|realm| realm.memory(1, Some(3), true)).unwrap();
    assert_eq!(grow_memory(&rig, wide, 2), Some(1));
    assert_eq!(grow_memory(&rig, wide, 1), None);
    // From within a call, by glue that the guest asks for it.
    let grows = host_function(move |call| {
        let grown = InRealm::again(call).grow_memory(memory, 0)?;
        call.results[0] = Value::I32(grown.unwrap() as i32);
        Ok(())
    });
    let asks = make(
        &rig,
        r#"(module (import "e" "grow" (func $grow (result i32))) (export "f" (func $grow))
            (func (export "ask") (result i32) (call $grow)))"#,
        vec![RealmImport::Function(grows)],
    );
    assert_eq!(number(&rig, &asks, "ask", &[]), 6);
}

/// As glue does that loads a side module, or adds a function, when its guest asks for it.
#[test]
fn instances_are_made_in_the_middle_of_a_call() {
    let rig = rig();
    let table = new_table(&rig, ValueType::FuncRef, (1, None), NULL);
    let side = rig.compile(
        r#"(module (import "e" "t" (table $t 1 funcref)) (memory 1) (data (i32.const 3) "\09")
            (global $n (mut i32) (i32.const 0))
            (elem (i32.const 0) func $f)
            (func $f (result i32) (i32.add (global.get $n) (i32.load8_u (i32.const 3))))
            (func $start (loop $l (global.set $n (i32.add (global.get $n) (i32.const 1)))
                (br_if $l (i32.lt_u (global.get $n) (i32.const 100)))))
            (start $start))"#,
    );
    let loads = host_function(move |call| {
        let realm = InRealm::again(call);
        assert_eq!(realm.grow_table(table, 1, NULL)?, Some(1));
        let memory = realm.memory(1, None, false)?;
        assert_eq!(realm.grow_memory(memory, 1)?, Some(1));
        realm.instantiate(&side, vec![item(table)]).map(drop)
    });
    let main = make(
        &rig,
        r#"(module (import "e" "t" (table $t 1 funcref)) (import "e" "load" (func $load))
            (func (export "run") (result i32) (call $load)
                (table.set $t (i32.const 1) (table.get $t (i32.const 0)))
                (i32.add (table.size $t) (call_indirect (result i32) (i32.const 1)))))"#,
        vec![item(table), RealmImport::Function(loads)],
    );
    assert_eq!(number(&rig, &main, "run", &[]), 2 + 100 + 9);
}

// ---------------------------------------------------------------------- tables

/// wasm-bindgen's slab of references: the table grows by the guest's own instruction.
const SLAB: &str = r#"(module
    (table $t (export "table") 2 externref)
    (func (export "grow") (param externref i32) (result i32)
        (table.grow $t (local.get 0) (local.get 1)))
    (func (export "size") (result i32) (table.size $t))
    (func (export "set") (param i32 externref) (table.set $t (local.get 0) (local.get 1)))
    (func (export "get") (param i32) (result externref) (table.get $t (local.get 0))))"#;

#[track_caller]
fn guest_grow(rig: &Rig, slab: &Made, value: Value, delta: i32) -> i32 {
    match call(rig, slab.func("grow"), &[value, Value::I32(delta)]).unwrap()[..] {
        [Value::I32(len)] => len,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_table_that_its_guest_grows_is_as_long_as_the_snapshot_and_grows_from_there() {
    let rig = rig();
    let slab = make(&rig, SLAB, Vec::new());
    let table = slab.item("table");
    assert_eq!(guest_grow(&rig, &slab, text("before"), 3), 2);
    assert_eq!(grow_table(&rig, table, 2, text("host")), Some(5));
    assert_eq!(number(&rig, &slab, "size", &[]), 7);
    let taken = rig.snapshot();
    for round in 0..3 {
        // Some of it by the guest, some by the host, beyond what was ever there only at first.
        assert_eq!(
            guest_grow(&rig, &slab, text("after"), 128),
            7,
            "round {round}"
        );
        assert_eq!(grow_table(&rig, table, 3, text("later")), Some(135));
        assert_eq!(guest_grow(&rig, &slab, text("last"), 1), 138);
        assert_eq!(number(&rig, &slab, "size", &[]), 139);
        assert_eq!(table_len(&rig, table), 139);
        let at = |index| said(element(&rig, table, index));
        assert_eq!(at(2), Some("before"));
        assert_eq!(at(7), Some("after"));
        assert_eq!(at(134), Some("after"));
        assert_eq!(at(135), Some("later"));
        assert_eq!(at(138), Some("last"));
        assert!(set_element(&rig, table, 3, text("written")));
        run(&rig, &slab, "set", &[Value::I32(0), text("written")]);
        rig.reset((round == 1).then_some(&taken));
        assert_eq!(number(&rig, &slab, "size", &[]), 7, "round {round}");
        assert_eq!(table_len(&rig, table), 7);
        assert!(element(&rig, table, 7).is_none());
        assert!(!set_element(&rig, table, 7, text("nowhere")));
        let beyond = call(&rig, slab.func("get"), &[Value::I32(7)]);
        assert_eq!(trap(beyond), "out-of-bounds-table");
        let beyond = call(
            &rig,
            slab.func("set"),
            &[Value::I32(7), Value::Extern(None)],
        );
        assert_eq!(trap(beyond), "out-of-bounds-table");
        assert_eq!(said(element(&rig, table, 0)), None);
        assert_eq!(said(element(&rig, table, 3)), Some("before"));
        assert_eq!(said(element(&rig, table, 6)), Some("host"));
    }
    // What grows by nothing shows the size.
    assert_eq!(guest_grow(&rig, &slab, Value::Extern(None), 0), 7);
    assert_eq!(grow_table(&rig, table, 0, Value::Extern(None)), Some(7));
    // An instance that comes later sees the size of now.
    let later = make(
        &rig,
        r#"(module (import "e" "t" (table $t 1 externref))
            (func (export "grow") (param externref i32) (result i32)
                (table.grow $t (local.get 0) (local.get 1)))
            (func (export "size") (result i32) (table.size $t)))"#,
        vec![item(table)],
    );
    assert_eq!(number(&rig, &later, "size", &[]), 7);
    // The host's growth is seen by all.
    assert_eq!(grow_table(&rig, table, 1, text("x")), Some(7));
    assert_eq!(number(&rig, &later, "size", &[]), 8);
    assert_eq!(number(&rig, &slab, "size", &[]), 8);
}

#[test]
fn a_table_grows_to_its_maximum_and_no_further_after_a_reset() {
    let rig = rig();
    let wat = SLAB.replace(r#""table") 2"#, r#""table") 2 10"#);
    let slab = make(&rig, &wat, Vec::new());
    let table = slab.item("table");
    rig.snapshot();
    for _ in 0..3 {
        assert_eq!(guest_grow(&rig, &slab, text("a"), 9), -1);
        assert_eq!(grow_table(&rig, table, 9, text("a")), None);
        assert_eq!(guest_grow(&rig, &slab, text("a"), 4), 2);
        assert_eq!(grow_table(&rig, table, 4, text("b")), Some(6));
        assert_eq!(guest_grow(&rig, &slab, text("a"), 1), -1);
        assert_eq!(grow_table(&rig, table, 1, text("b")), None);
        assert_eq!(table_len(&rig, table), 10);
        rig.reset(None);
    }
}

/// Such glue keeps account in JavaScript of what it has put where.
#[test]
fn a_table_that_only_the_host_grows_keeps_its_size_and_what_is_beyond() {
    let rig = rig();
    let guest = make(
        &rig,
        r#"(module (table $t (export "table") 2 externref)
            (func (export "size") (result i32) (table.size $t))
            (func (export "set") (param i32 externref) (table.set $t (local.get 0) (local.get 1))))"#,
        Vec::new(),
    );
    let table = guest.item("table");
    assert!(set_element(&rig, table, 1, text("kept")));
    rig.snapshot();
    assert_eq!(grow_table(&rig, table, 2, text("added")), Some(2));
    for _ in 0..2 {
        assert!(set_element(&rig, table, 0, text("lost")));
        run(&rig, &guest, "set", &[Value::I32(1), text("lost")]);
        rig.reset(None);
        assert_eq!(table_len(&rig, table), 4);
        assert_eq!(number(&rig, &guest, "size", &[]), 4);
        let all: Vec<_> = (0..4).map(|i| said(element(&rig, table, i))).collect();
        assert_eq!(all, [None, Some("kept"), Some("added"), Some("added")]);
    }
    assert_eq!(grow_table(&rig, table, 1, text("more")), Some(4));
    // A snapshot of now has it all.
    rig.snapshot();
    assert!(set_element(&rig, table, 4, text("lost")));
    rig.reset(None);
    assert_eq!(said(element(&rig, table, 4)), Some("more"));
}

/// Side modules of dynamic linking bring their functions so.
#[test]
fn what_a_new_instance_puts_into_a_table_is_taken_out_again() {
    let rig = rig();
    let table = new_table(&rig, ValueType::FuncRef, (3, None), NULL);
    let puts = |at: usize, end: &str| {
        format!(
            r#"(module (import "e" "t" (table 3 funcref)) (elem (i32.const {at}) func $f)
                (func $f) {end})"#
        )
    };
    make(&rig, &puts(0, ""), vec![item(table)]);
    let first = func_of(element(&rig, table, 0)).address();
    rig.snapshot();
    for end in [
        "",
        "(func $start unreachable) (start $start)",
        "(elem (i32.const 3) func $f)",
    ] {
        for at in [0, 1] {
            let made = try_make(&rig, &puts(at, end), vec![item(table)]);
            assert_eq!(made.is_ok(), end.is_empty());
            let put = func_of(element(&rig, table, at as u64)).address();
            assert_ne!(put, first, "{end}");
        }
        rig.reset(None);
        assert_eq!(
            func_of(element(&rig, table, 0)).address(),
            first,
            "after {end:?}"
        );
        let gone = element(&rig, table, 1);
        assert!(
            matches!(gone, Some(Value::Func(None))),
            "after {end:?}: {gone:?}"
        );
    }
}

// ---------------------------------------------------------------------- snapshots

/// A mutable global of every type, a segment that can be dropped, and a table of each kind.
const HOLDER: &str = r#"(module
    (memory (export "memory") 1) (data $passive "passive")
    (global $a (export "i32") (mut i32) (i32.const 1))
    (global $b (export "i64") (mut i64) (i64.const 2))
    (global $c (export "f32") (mut f32) (f32.const 3))
    (global $d (export "f64") (mut f64) (f64.const 4))
    (global $v (mut v128) (v128.const i64x2 5 6))
    (global $e (export "extern") (mut externref) (ref.null extern))
    (global $f (export "func") (mut funcref) (ref.func $one))
    (global $hidden (mut i32) (i32.const 7))
    (table $funcs (export "funcs") 2 funcref)
    (table $externs (export "externs") 2 externref)
    (func $one (export "one") (result i32) (i32.const 1))
    (func $two (export "two") (result i32) (i32.const 2))
    (func (export "change") (param externref)
        (global.set $a (i32.const 11)) (global.set $b (i64.const 12))
        (global.set $c (f32.const 13)) (global.set $d (f64.const 14))
        (global.set $v (v128.const i64x2 15 16)) (global.set $e (local.get 0))
        (global.set $f (ref.func $two)) (global.set $hidden (i32.const 17))
        (table.set $funcs (i32.const 1) (ref.func $two))
        (table.set $externs (i32.const 1) (local.get 0))
        (i32.store (i32.const 5000) (i32.const 18)))
    (func (export "drop") (data.drop $passive))
    (func (export "init") (memory.init $passive (i32.const 0) (i32.const 0) (i32.const 7)))
    (func (export "hidden") (result i64)
        (i64.add (i64.extend_i32_s (global.get $hidden))
            (i64.add (i64x2.extract_lane 0 (global.get $v)) (i64x2.extract_lane 1 (global.get $v))))))"#;

#[track_caller]
fn check_holder(rig: &Rig, holder: &Made, changed: Option<&'static str>) {
    let is_changed = changed.is_some();
    let global = |name| read_global(rig, holder.item(name));
    let pick = |before: i64, after: i64| if is_changed { after } else { before };
    assert!(matches!(global("i32"), Some(Value::I32(v)) if i64::from(v) == pick(1, 11)));
    assert!(matches!(global("i64"), Some(Value::I64(v)) if v == pick(2, 12)));
    assert!(matches!(global("f32"), Some(Value::F32(v)) if v as i64 == pick(3, 13)));
    assert!(matches!(global("f64"), Some(Value::F64(v)) if v as i64 == pick(4, 14)));
    assert_eq!(said(global("extern")), changed);
    let func = if is_changed { "two" } else { "one" };
    let func = holder.func(func).address();
    assert_eq!(func_of(global("func")).address(), func);
    let hidden = call(rig, holder.func("hidden"), &[]).unwrap();
    let sum = pick(7 + 5 + 6, 17 + 15 + 16);
    assert!(
        matches!(hidden[..], [Value::I64(v)] if v == sum),
        "{hidden:?}"
    );
    let in_table = element(rig, holder.item("funcs"), 1);
    match in_table {
        Some(Value::Func(None)) => assert!(!is_changed),
        other => assert_eq!(func_of(other).address(), holder.func("two").address()),
    }
    assert_eq!(said(element(rig, holder.item("externs"), 1)), changed);
    let record = record(rig, holder.item("memory"));
    let stored = i32::from_le_bytes(read(&record, 5000, 4).try_into().unwrap());
    assert_eq!(i64::from(stored), pick(0, 18));
}

#[test]
fn a_reset_puts_back_whatever_can_change() {
    for kind in [ImageKind::CopyOnWrite, ImageKind::Copy] {
        for prepares in [false, true] {
            let setup = Setup::realm().options(|options| {
                options.images = kind;
                options.prepares_snapshots = Some(prepares);
            });
            let rig = setup.start();
            let holder = make(&rig, HOLDER, Vec::new());
            check_holder(&rig, &holder, None);
            let pristine = rig.snapshot();
            run(&rig, &holder, "change", &[text("first")]);
            run(&rig, &holder, "init", &[]);
            run(&rig, &holder, "drop", &[]);
            check_holder(&rig, &holder, Some("first"));
            let changed = rig.snapshot_now().unwrap();
            let dropped = |rig: &Rig| {
                let ended = call(rig, holder.func("init"), &[]);
                assert_eq!(trap(ended), "out-of-bounds-memory");
            };
            for _ in 0..2 {
                rig.reset(Some(&pristine));
                check_holder(&rig, &holder, None);
                run(&rig, &holder, "init", &[]);
                run(&rig, &holder, "change", &[text("other")]);
                rig.reset_now(reset_to(&changed)).unwrap();
                check_holder(&rig, &holder, Some("first"));
                dropped(&rig);
                assert_eq!(read(&record(&rig, 0), 0, 7), b"passive");
            }
            // The newest is the one that was taken last.
            run(&rig, &holder, "change", &[text("third")]);
            rig.reset(None);
            check_holder(&rig, &holder, Some("first"));
            dropped(&rig);
        }
    }
}

#[test]
fn the_host_is_told_of_captures_and_resets_in_order() {
    let rig = rig();
    let holder = make(&rig, HOLDER, Vec::new());
    let first = rig.snapshot();
    let second = rig.snapshot_now().unwrap();
    run(&rig, &holder, "change", &[text("x")]);
    rig.reset(Some(&first));
    rig.reset_now(ResetOptions::default()).unwrap();
    let expected = [
        RealmStep::Captured(first.id()),
        RealmStep::Captured(second.id()),
        RealmStep::Shrinks(Vec::new()),
        RealmStep::Rewound(first.id()),
        RealmStep::Shrinks(Vec::new()),
        RealmStep::Rewound(second.id()),
    ];
    assert_eq!(rig.host.realm_steps(), expected);
    check_holder(&rig, &holder, None);
}

#[test]
fn what_is_inside_keeps_snapshots_and_resets_out() {
    let rig = rig();
    let manager = rig.manager.clone();
    let tried: Arc<Mutex<Vec<ErrorCode>>> = Arc::default();
    let tries = Arc::clone(&tried);
    rig.snapshot();
    let ended = rig.home().at_desk(move |desk| {
        desk.realm(|_| {
            let snapshot = manager.snapshot_now(Some(desk.home()));
            let reset = manager.reset_now(Some(desk.home()), &ResetOptions::default());
            tries.lock().unwrap().extend([code(snapshot), code(reset)]);
        })
    });
    ended.unwrap();
    assert_eq!(*tried.lock().unwrap(), [ErrorCode::Busy, ErrorCode::Busy]);
    rig.reset(None);
}

const GROWER: &str = r#"(module (memory (export "memory") 1 100)
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "size") (result i32) (memory.size))
    (func (export "fill") (param i32)
        (memory.fill (i32.const 0) (local.get 0) (i32.mul (memory.size) (i32.const 65536))))
    (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0))))"#;

fn memory_setups() -> impl Iterator<Item = (String, Setup)> {
    let kinds = [ImageKind::CopyOnWrite, ImageKind::Copy];
    let all = kinds
        .into_iter()
        .flat_map(|kind| [false, true].map(|it| (kind, it)));
    all.map(|(kind, prepares)| {
        let setup = Setup::realm().options(|options| {
            options.images = kind;
            options.prepares_snapshots = Some(prepares);
        });
        (format!("{kind:?}, prepares {prepares}"), setup)
    })
}

#[test]
fn memory_that_only_the_host_grows_keeps_its_size_and_its_place() {
    for (what, setup) in memory_setups() {
        let rig = setup.start();
        let guest = make(&rig, GROWER, Vec::new());
        let memory = guest.item("memory");
        let record = record(&rig, memory);
        run(&rig, &guest, "fill", &[Value::I32(1)]);
        rig.snapshot();
        let base = record.base();
        let view = record.view().unwrap();
        for round in 0..3 {
            let grown = grow_memory(&rig, memory, 2);
            assert_eq!(grown, Some(1 + 2 * round), "{what}");
            run(&rig, &guest, "fill", &[Value::I32(2)]);
            let report = rig.reset(None);
            let len = (3 + 2 * round as usize) * PAGE;
            assert_eq!(report.memory_bytes_after, len, "{what}");
            assert_eq!(record.byte_len(), len, "{what}");
            assert_eq!(number(&rig, &guest, "size", &[]) as usize, len / PAGE);
            assert_eq!(record.base(), base, "{what}");
            assert_eq!(read(&record, 0, PAGE), vec![1; PAGE], "{what}");
            assert_zeros(&record, PAGE);
            assert_eq!(number(&rig, &guest, "peek", &[len as i32 - 1]), 0);
            let beyond = call(&rig, guest.func("peek"), &[Value::I32(len as i32)]);
            assert_eq!(trap(beyond), "out-of-bounds-memory", "{what}");
        }
        let shrinks = |step: &RealmStep| matches!(step, RealmStep::Shrinks(ids) if !ids.is_empty());
        assert!(!rig.host.realm_steps().iter().any(shrinks), "{what}");
        drop(view);
    }
}

#[test]
fn memory_that_its_guest_grows_shrinks() {
    for (what, setup) in memory_setups() {
        let rig = setup.start();
        let guest = make(&rig, GROWER, Vec::new());
        let memory = guest.item("memory");
        let other = new_memory(&rig, 1, None);
        let record = record(&rig, memory);
        run(&rig, &guest, "fill", &[Value::I32(1)]);
        let taken = rig.snapshot();
        assert_eq!(grow_memory(&rig, other, 1), Some(1));
        for round in 0..3 {
            assert_eq!(number(&rig, &guest, "grow", &[3]), 1, "{what}");
            // Also where the host takes part.
            assert_eq!(grow_memory(&rig, memory, round), Some(4), "{what}");
            run(&rig, &guest, "fill", &[Value::I32(2)]);
            rig.reset(None);
            assert_eq!(record.byte_len(), PAGE, "{what}");
            assert_eq!(number(&rig, &guest, "size", &[]), 1, "{what}");
            assert_eq!(read(&record, 0, PAGE), vec![1; PAGE], "{what}");
            let beyond = call(&rig, guest.func("peek"), &[Value::I32(PAGE as i32)]);
            assert_eq!(trap(beyond), "out-of-bounds-memory", "{what}");
            let steps = rig.host.realm_steps();
            let expected = [
                RealmStep::Shrinks(vec![memory]),
                RealmStep::Rewound(taken.id()),
            ];
            assert_eq!(steps[steps.len() - 2..], expected, "{what}");
        }
        assert_eq!(number(&rig, &guest, "grow", &[1]), 1, "{what}");
        assert_zeros(&record, PAGE);
    }
}

#[test]
fn memory_that_nobody_grows_keeps_its_place_however_much_is_written() {
    for (what, setup) in memory_setups() {
        let rig = setup.start();
        // Beyond what an ordinary reset would put back where it is.
        let memory = new_memory(&rig, 400, None);
        let record = record(&rig, memory);
        record.write(123, b"before").unwrap();
        rig.snapshot();
        let view = record.view().unwrap();
        for bytes in [1, 400 * PAGE] {
            record.write(0, &vec![9; bytes]).unwrap();
            rig.reset(None);
            assert_eq!(record.base(), view.base, "{what}");
            assert_eq!(record.byte_len(), 400 * PAGE);
            assert_eq!(read(&record, 123, 6), b"before", "{what}");
            assert_eq!(read(&record, 0, 123), vec![0; 123], "{what}");
            assert_zeros(&record, 129);
        }
    }
}

/// A later snapshot has more in it than the earlier one, to which the same memory goes back.
#[test]
fn going_back_and_forth_between_snapshots_of_two_sizes_shows_each_as_it_was() {
    for grows_by_itself in [false, true] {
        for (what, setup) in memory_setups() {
            let what = format!("{what}, grows by itself {grows_by_itself}");
            let rig = setup.start();
            let guest = make(&rig, GROWER, Vec::new());
            let memory = guest.item("memory");
            let record = record(&rig, memory);
            run(&rig, &guest, "fill", &[Value::I32(1)]);
            let small = rig.snapshot();
            if grows_by_itself {
                assert_eq!(number(&rig, &guest, "grow", &[4]), 1);
            } else {
                assert_eq!(grow_memory(&rig, memory, 4), Some(1));
            }
            run(&rig, &guest, "fill", &[Value::I32(2)]);
            let large = rig.snapshot();
            for round in 0..2 {
                run(&rig, &guest, "fill", &[Value::I32(3)]);
                rig.reset(Some(&small));
                let len = if grows_by_itself { PAGE } else { 5 * PAGE };
                assert_eq!(record.byte_len(), len, "{what}, {round}");
                assert_eq!(read(&record, 0, PAGE), vec![1; PAGE], "{what}, {round}");
                assert_zeros(&record, PAGE);
                if round == 0 {
                    record.write(PAGE as u64 - 1, &[7]).unwrap();
                    // Once more, now that it stands on this one.
                    rig.reset(Some(&small));
                    assert_eq!(read(&record, 0, PAGE), vec![1; PAGE], "{what}");
                    assert_zeros(&record, PAGE);
                }
                rig.reset(Some(&large));
                assert_eq!(record.byte_len(), 5 * PAGE, "{what}, {round}");
                assert_eq!(
                    read(&record, 0, 5 * PAGE),
                    vec![2; 5 * PAGE],
                    "{what}, {round}"
                );
                assert_eq!(number(&rig, &guest, "size", &[]), 5);
                assert_eq!(number(&rig, &guest, "peek", &[5 * PAGE as i32 - 1]), 2);
            }
        }
    }
}

#[test]
fn a_memory_without_pages_is_captured_and_put_back() {
    for (what, setup) in memory_setups() {
        let rig = setup.start();
        let memory = new_memory(&rig, 0, Some(4));
        rig.snapshot();
        rig.reset(None);
        let record = record(&rig, memory);
        assert_eq!(record.byte_len(), 0, "{what}");
        assert_eq!(grow_memory(&rig, memory, 2), Some(0), "{what}");
        record.write(0, &[1; 2 * PAGE]).unwrap();
        rig.reset(None);
        assert_eq!(record.byte_len(), 2 * PAGE, "{what}");
        assert_zeros(&record, 0);
        let guest = make(&rig, &GROWER.replace("1 100", "0 100"), Vec::new());
        rig.snapshot();
        assert_eq!(number(&rig, &guest, "grow", &[1]), 0, "{what}");
        rig.reset(None);
        assert_eq!(number(&rig, &guest, "size", &[]), 0, "{what}");
    }
}

/// It is nobody's any more, but for memories nothing is taken away from it.
#[test]
fn what_was_made_after_the_snapshot_is_left_alone() {
    for (what, setup) in memory_setups() {
        let rig = setup.start();
        let early = make(&rig, HOLDER, Vec::new());
        let before = rig.snapshot();
        let late = make(&rig, HOLDER, Vec::new());
        run(&rig, &early, "change", &[text("early")]);
        run(&rig, &late, "change", &[text("late")]);
        let after = rig.snapshot();
        let memory = late.item("memory");
        for round in 0..2 {
            rig.reset(Some(&before));
            check_holder(&rig, &early, None);
            // Its globals and tables.
            let kept = read_global(&rig, late.item("extern"));
            assert_eq!(said(kept), Some("late"), "{what}, {round}");
            let kept = element(&rig, late.item("externs"), 1);
            assert_eq!(said(kept), Some("late"), "{what}, {round}");
            assert_eq!(number(&rig, &late, "two", &[]), 2);
            // Pages go back, views end.
            assert_eq!(record(&rig, memory).byte_len(), 0, "{what}, {round}");
            let steps = rig.host.realm_steps();
            let shrunk = &steps[steps.len() - 2];
            assert_eq!(*shrunk, RealmStep::Shrinks(vec![memory]), "{what}, {round}");
            let ended = call(&rig, late.func("init"), &[]);
            assert_eq!(trap(ended), "out-of-bounds-memory", "{what}, {round}");
            // Once more there is nothing to take.
            rig.reset(Some(&before));
            let steps = rig.host.realm_steps();
            let shrunk = &steps[steps.len() - 2];
            assert_eq!(*shrunk, RealmStep::Shrinks(Vec::new()), "{what}, {round}");
            // A snapshot of now can be had.
            if round == 1 {
                rig.reset(Some(&rig.snapshot()));
                assert_eq!(record(&rig, memory).byte_len(), 0, "{what}");
            }
            // What has it in it brings it back.
            rig.reset(Some(&after));
            check_holder(&rig, &early, Some("early"));
            check_holder(&rig, &late, Some("late"));
        }
    }
}

#[test]
fn what_cannot_be_captured_is_said_and_changes_nothing() {
    let rig = rig();
    let holder = make(&rig, HOLDER, Vec::new());
    let before = rig.snapshot();
    run(&rig, &holder, "change", &[text("x")]);
    let collected =
        r#"(module $keeper (type $s (struct)) (global (mut (ref null $s)) (ref.null $s)))"#;
    make(&rig, collected, Vec::new());
    for error in [
        rig.ask_snapshot().0.get().unwrap_err(),
        rig.snapshot_now().unwrap_err(),
    ] {
        assert_eq!(
            error.code(),
            Some(ErrorCode::SnapshotUnsupported),
            "{error}"
        );
        assert!(error.to_string().contains("keeper"), "{error}");
    }
    check_holder(&rig, &holder, Some("x"));
    // What was captured before that can still be put back.
    rig.reset(Some(&before));
    check_holder(&rig, &holder, None);
}

/// With a base module that has a memory by itself.
#[test]
fn the_memories_of_the_realms_own_module_are_not_taken_for_the_hosts() {
    let mut setup = Setup::of(guests::source(&guests::grower("8"))).at_home();
    setup = setup.options(|options| options.is_realm = true);
    let rig = setup.start();
    let guest = make(&rig, GROWER, Vec::new());
    let taken = rig.snapshot();
    assert_eq!(number(&rig, &guest, "grow", &[3]), 1);
    rig.reset(None);
    let expected = [
        RealmStep::Shrinks(vec![guest.item("memory")]),
        RealmStep::Rewound(taken.id()),
    ];
    assert_eq!(rig.host.realm_steps()[1..], expected);
    assert_eq!(number(&rig, &guest, "size", &[]), 1);
}

// ---------------------------------------------------------------------- reloads

/// Glue that counts its loads; makes an instance on each.
fn glue(module: &Arc<Mutex<Option<Arc<Module>>>>, made: &Arc<Mutex<Vec<Made>>>) -> Script {
    let (module, made) = (Arc::clone(module), Arc::clone(made));
    Script::new().initialize(move |lease| {
        let Some(module) = module.lock().unwrap().clone() else {
            return Ok(());
        };
        let inside = lease.enter()?;
        let instance = InRealm::leased(&inside).instantiate(&module, Vec::new())?;
        made.lock().unwrap().push(instance);
        Ok(())
    })
}

#[test]
fn a_snapshot_ends_with_its_generation_and_the_next_one_has_its_own() {
    for how in ["asynchronous", "synchronous", "rolling"] {
        let (module, made) = (Arc::default(), Arc::<Mutex<Vec<Made>>>::default());
        let rig = Setup::realm().script(glue(&module, &made)).start();
        *module.lock().unwrap() = Some(rig.compile(HOLDER));
        let reload = |reason| {
            let mut options = because(reason);
            if how == "rolling" {
                options.strategy = Strategy::Rolling;
            }
            match how {
                "synchronous" => drop(rig.reload_now(options).unwrap()),
                _ => drop(rig.ask_reload(options).get().unwrap()),
            }
        };
        reload("nobody has a snapshot");
        let none = rig.ask_reset(ResetOptions::default()).get();
        assert_eq!(code(none), ErrorCode::InvalidArgument);
        let first = made.lock().unwrap()[0].clone();
        run(&rig, &first, "change", &[text("x")]);
        let taken = rig.snapshot();
        let old = rig.replica(0);
        reload("the snapshot goes");
        assert!(taken.is_released());
        for ended in [
            rig.ask_reset(reset_to(&taken)).get(),
            rig.reset_now(reset_to(&taken)),
        ] {
            assert_eq!(code(ended), ErrorCode::StaleHandle);
        }
        assert!(old.is_released());
        let second = made.lock().unwrap()[1].clone();
        check_holder(&rig, &second, None);
        run(&rig, &second, "change", &[text("y")]);
        check_holder(&rig, &second, Some("y"));
        rig.reset(None);
        check_holder(&rig, &second, None);
        // And again in the one after that, which nobody has asked for a snapshot.
        reload("once more");
        let third = made.lock().unwrap()[2].clone();
        run(&rig, &third, "change", &[text("z")]);
        rig.reset_now(ResetOptions::default()).unwrap();
        check_holder(&rig, &third, None);
        // Handles of the old one are no use.
        let dead = second.item("memory");
        assert!(
            record(&rig, dead).byte_len() > 0,
            "the number means the new one's"
        );
        let stale = old.realm_memory(first.item("memory")).unwrap();
        assert!(stale.is_released());
    }
}

/// After a fault of ours nobody knows what the realm is worth: it is made anew.
#[test]
fn a_realm_that_is_lost_takes_its_snapshots_along() {
    for has_snapshot in [true, false] {
        let (module, made) = (Arc::default(), Arc::<Mutex<Vec<Made>>>::default());
        let rig = Setup::realm().script(glue(&module, &made)).start();
        *module.lock().unwrap() = Some(rig.compile(HOLDER));
        let fails = || {
            let fault = host_function(|_| Err(Error::internal("on purpose")));
            let wat = r#"(module (import "e" "f" (func $f)) (func (export "f") (call $f)))"#;
            let made = make(&rig, wat, vec![RealmImport::Function(fault)]);
            assert_eq!(code(call(&rig, made.func("f"), &[])), ErrorCode::Internal);
        };
        let taken = has_snapshot.then(|| rig.snapshot());
        fails();
        // Whoever comes next finds another one.
        assert_eq!(new_memory(&rig, 1, None), 1);
        let holder = made.lock().unwrap()[0].clone();
        run(&rig, &holder, "change", &[text("x")]);
        let reset = rig.ask_reset(ResetOptions::default()).get();
        match taken {
            Some(taken) => {
                reset.unwrap();
                check_holder(&rig, &holder, None);
                let old = rig.ask_reset(reset_to(&taken)).get();
                assert_eq!(code(old), ErrorCode::StaleHandle);
            }
            None => assert_eq!(code(reset), ErrorCode::InvalidArgument),
        }
        assert!(!rig.replica(0).is_poisoned());
        assert_eq!(number(&rig, &holder, "two", &[]), 2);
    }
}

/// The old one serves on, with all that is of it.
#[test]
fn a_reload_that_fails_leaves_the_snapshots_of_the_realm_that_serves() {
    let (fails, inside) = {
        let fails = Arc::new(Mutex::new(false));
        (Arc::clone(&fails), fails)
    };
    let script = Script::new().initialize(move |_| match *inside.lock().unwrap() {
        true => Err(Error::Thrown(HostRef::new("no"))),
        false => Ok(()),
    });
    let rig = Setup::realm().script(script).start();
    let holder = make(&rig, HOLDER, Vec::new());
    let taken = rig.snapshot();
    run(&rig, &holder, "change", &[text("x")]);
    *fails.lock().unwrap() = true;
    for strategy in [Strategy::Exclusive, Strategy::Rolling] {
        let options = ReloadOptions {
            strategy,
            ..because("fails")
        };
        let reload = rig.ask_reload(options).get();
        assert_eq!(code(reload), ErrorCode::ReloadFailed);
        check_holder(&rig, &holder, Some("x"));
    }
    rig.reset(Some(&taken));
    check_holder(&rig, &holder, None);
}

#[test]
fn a_fork_is_refused() {
    let rig = rig();
    rig.snapshot();
    let child = Setup::realm().create();
    let error = rig.fork_into(&child).unwrap_err();
    assert_eq!(
        error.code(),
        Some(ErrorCode::SnapshotUnsupported),
        "{error}"
    );
    make(&rig, HOLDER, Vec::new());
}

#[test]
fn the_same_bytes_are_compiled_once_for_a_manager() {
    let rig = rig();
    let module = rig.compile(HOLDER);
    assert!(Arc::ptr_eq(&module, &rig.compile(HOLDER)));
    rig.reload("they stay");
    assert!(Arc::ptr_eq(&module, &rig.compile(HOLDER)));
    let (done, later) = answer("compile()");
    rig.manager
        .compile_later(guests::bytes(HOLDER), Box::new(done));
    assert!(Arc::ptr_eq(&module, &later.get().unwrap()));
    let other = Setup::realm().start();
    assert!(
        !Arc::ptr_eq(&module, &other.compile(HOLDER)),
        "another manager's"
    );
    // The oldest go.
    for n in 0..64 {
        rig.compile(&format!("(module (func (export \"f{n}\")))"));
    }
    assert!(!Arc::ptr_eq(&module, &rig.compile(HOLDER)));
    let broken = rig.manager.compile(b"\0asm\x01\0\0\0\x01".to_vec());
    assert_eq!(code(broken), ErrorCode::Compile);
    assert!(rig.manager.validates(&guests::bytes(HOLDER)).unwrap());
    assert!(!rig.manager.validates(b"\0asm\x01\0\0\0\x01").unwrap());
    rig.destroy().get().unwrap();
    let late = rig.manager.compile(guests::bytes(HOLDER));
    assert!(!late.is_ok_and(|late| Arc::ptr_eq(&module, &late)));
}

// ---------------------------------------------------------------------- interruption

const LOOPER: &str = r#"(module (memory (export "memory") 1)
    (func (export "spin") (loop $l (br $l)))
    (func (export "number") (result i32) (i32.const 5)))"#;

#[test]
fn a_loop_in_any_instance_is_interrupted_and_the_realm_works_afterwards() {
    for signals in [true, false] {
        let setup = Setup::realm().options(|options| {
            options.limits.timeout_ms = Some(300);
            options.engine.signals_based_traps = signals;
        });
        let rig = setup.start();
        let made: Vec<_> = (0..3).map(|_| make(&rig, LOOPER, Vec::new())).collect();
        for which in [1, 2, 0, 1] {
            let ended = call(&rig, made[which].func("spin"), &[]);
            assert_eq!(code(ended), ErrorCode::Timeout, "{which}");
            for each in &made {
                assert_eq!(number(&rig, each, "number", &[]), 5);
            }
        }
        let starts = r#"(module (func $spin (loop $l (br $l))) (start $spin))"#;
        let ended = try_make(&rig, starts, Vec::new());
        assert_eq!(code(ended), ErrorCode::Timeout);
        assert_eq!(number(&rig, &made[0], "number", &[]), 5);
        assert!(!rig.replica(0).is_poisoned());
        assert_eq!(rig.manager.generation().get(), 1);
    }
}

#[test]
fn a_start_function_has_fuel_of_its_own() {
    let setup = Setup::realm().options(|options| {
        options.engine.fuel = true;
        options.limits.fuel = Some(10_000);
    });
    let rig = setup.start();
    let burner = make(
        &rig,
        r#"(module (func (export "burn") (loop $l (br $l))))"#,
        Vec::new(),
    );
    let ended = call(&rig, burner.func("burn"), &[]);
    assert_eq!(code(ended), ErrorCode::OutOfFuel);
    make(
        &rig,
        r#"(module (func $start (drop (i32.const 1))) (start $start))"#,
        Vec::new(),
    );
    let burns = r#"(module (func $burn (loop $l (br $l))) (start $burn))"#;
    assert_eq!(
        code(try_make(&rig, burns, Vec::new())),
        ErrorCode::OutOfFuel
    );
}

// ---------------------------------------------------------------------- exceptions

/// Calls what the host gave, and catches, passes on, or lets pass.
const CATCHER: &str = r#"(module
    (import "e" "tag" (tag $t (param i32 externref)))
    (import "e" "numbers" (func $numbers (param i32)))
    (import "e" "refs" (func $refs (param externref)))
    (export "tag" (tag $t))
    (tag $own (param f64)) 
    (func (export "catch") (result i32 externref)
        (block $h (result i32 externref)
            (try_table (catch $t $h) (call $numbers (i32.const 1)))
            (i32.const -1) (ref.null extern)))
    (func (export "catch_refs") (result i32 externref)
        (block $h (result i32 externref)
            (try_table (catch $t $h) (call $refs (ref.null extern)))
            (i32.const -1) (ref.null extern)))
    (func (export "catch_all") (result i32)
        (block $h (try_table (catch_all $h) (call $numbers (i32.const 1))) (return (i32.const 0)))
        (i32.const 1))
    (func (export "pass") (call $numbers (i32.const 1)))
    (func (export "pass_refs") (call $refs (ref.null extern)))
    (func (export "rethrow")
        (local $e exnref)
        (block $h (result exnref)
            (try_table (catch_all_ref $h) (call $numbers (i32.const 1))) (return))
        (local.set $e) (throw_ref (local.get $e)))
    (func (export "anew")
        (block $h (result i32 externref)
            (try_table (catch $t $h) (call $numbers (i32.const 1))) (return))
        (throw $t))
    (func (export "throw") (param i32 externref) (throw $t (local.get 0) (local.get 1)))
    (func (export "throw_own") (throw $own (f64.const 2.5))))"#;

struct Thrower {
    rig: Rig,
    made: Made,
    tag: u32,
    object: HostRef,
}

/// A realm whose host throws at each call.
fn thrower() -> Thrower {
    let rig = rig();
    let tag = rig.realm(|realm| realm.tag(&["i32", "externref"])).unwrap();
    let object = HostRef::new("the object");
    let throws = || {
        let object = object.clone();
        RealmImport::Function(host_function(move |_| {
            Err(Error::Exception(Box::new(Exception {
                tag,
                payload: vec![Value::I32(3), text("payload")],
                object: Some(object.clone()),
            })))
        }))
    };
    let made = make(&rig, CATCHER, vec![item(tag), throws(), throws()]);
    assert_eq!(made.item("tag"), tag);
    Thrower {
        rig,
        made,
        tag,
        object,
    }
}

#[track_caller]
fn exception(ended: Result<Vec<Value>>) -> Exception {
    match ended {
        Err(Error::Exception(thrown)) => *thrown,
        other => panic!("an exception was expected, not {other:?}"),
    }
}

#[test]
fn a_guest_catches_what_the_host_throws() {
    let it = thrower();
    for name in ["catch", "catch_refs"] {
        let caught = call(&it.rig, it.made.func(name), &[]).unwrap();
        assert!(matches!(caught[0], Value::I32(3)), "{name}: {caught:?}");
        assert_eq!(said(Some(caught[1].clone())), Some("payload"), "{name}");
    }
    assert_eq!(number(&it.rig, &it.made, "catch_all", &[]), 1);
    assert!(it.rig.replica(0).can_catch());
}

#[test]
fn what_a_guest_lets_pass_is_the_very_object() {
    let it = thrower();
    for name in ["pass", "pass_refs", "rethrow"] {
        for _ in 0..3 {
            let thrown = exception(call(&it.rig, it.made.func(name), &[]));
            assert_eq!(thrown.tag, it.tag, "{name}");
            assert!(matches!(thrown.payload[0], Value::I32(3)), "{name}");
            assert!(thrown.object.unwrap().is(&it.object), "{name}");
        }
    }
    // One of the guest's own that looks the same is another.
    let thrown = exception(call(&it.rig, it.made.func("anew"), &[]));
    assert_eq!(thrown.tag, it.tag);
    assert_eq!(said(Some(thrown.payload[1].clone())), Some("payload"));
    assert!(thrown.object.is_none());
}

#[test]
fn the_host_gets_the_tag_and_the_payload_of_what_a_guest_throws() {
    let it = thrower();
    let args = [Value::I32(8), text("guest")];
    let thrown = exception(call(&it.rig, it.made.func("throw"), &args));
    assert_eq!(thrown.tag, it.tag);
    assert!(matches!(thrown.payload[0], Value::I32(8)));
    assert_eq!(said(Some(thrown.payload[1].clone())), Some("guest"));
    assert!(thrown.object.is_none());
    // A tag that nobody has seen gets a number, and keeps it.
    let own = exception(call(&it.rig, it.made.func("throw_own"), &[]));
    assert_ne!(own.tag, it.tag);
    assert!(matches!(own.payload[..], [Value::F64(v)] if v == 2.5));
    let tag = own.tag;
    let (params, _) = it.rig.realm(move |realm| realm.tag_type(tag)).unwrap();
    assert_eq!(params, [ValueType::F64]);
    let again = exception(call(&it.rig, it.made.func("throw_own"), &[]));
    assert_eq!(again.tag, own.tag);
    assert!(!it.rig.replica(0).is_poisoned());
    // After a reset as before.
    it.rig.snapshot();
    it.rig.reset(None);
    let again = exception(call(&it.rig, it.made.func("throw_own"), &[]));
    assert_eq!(again.tag, own.tag);
}

#[test]
fn an_exception_passes_through_host_and_guest_and_host() {
    let rig = rig();
    let tag = rig.realm(|realm| realm.tag(&["i32"])).unwrap();
    let inner = r#"(module (import "e" "t" (tag $t (param i32)))
        (func (export "f") (param i32) (throw $t (local.get 0))))"#;
    let inner = make(&rig, inner, vec![item(tag)]).func("f");
    let between = host_function(move |call| {
        let args = [call.args[0].clone()];
        InRealm::again(call).call(&inner, &args).map(drop)
    });
    let outer = r#"(module (import "e" "t" (tag $t (param i32)))
        (import "e" "f" (func $f (param i32)))
        (func (export "catch") (param i32) (result i32)
            (block $h (result i32)
                (try_table (catch $t $h) (call $f (local.get 0))) (i32.const -1)))
        (func (export "pass") (param i32) (call $f (local.get 0))))"#;
    let outer = make(&rig, outer, vec![item(tag), RealmImport::Function(between)]);
    assert_eq!(number(&rig, &outer, "catch", &[31]), 31);
    let thrown = exception(call(&rig, outer.func("pass"), &[Value::I32(32)]));
    assert_eq!(thrown.tag, tag);
    assert!(matches!(thrown.payload[..], [Value::I32(32)]));
}

#[test]
fn errors_that_are_no_exceptions_pass_through_guests() {
    let rig = rig();
    let object = HostRef::new(1);
    let thrown = object.clone();
    let throws = host_function(move |_| Err(Error::Thrown(thrown.clone())));
    let wat = r#"(module (import "e" "f" (func $f))
        (func (export "f") (block $h (try_table (catch_all $h) (call $f)))))"#;
    let made = make(&rig, wat, vec![RealmImport::Function(throws)]);
    match call(&rig, made.func("f"), &[]) {
        Err(Error::Thrown(it)) => assert!(it.is(&object)),
        other => panic!("{other:?}"),
    }
}

// ---------------------------------------------------------------------- what is held

#[test]
fn a_realm_that_goes_gives_everything_back() {
    let _alone = alone();
    let fill = || {
        let rig = rig();
        let guest = make(&rig, GROWER, Vec::new());
        let memory = new_memory(&rig, 512, None);
        let record = record(&rig, memory);
        record.write(0, &vec![1; record.byte_len()]).unwrap();
        assert_eq!(number(&rig, &guest, "grow", &[63]), 1);
        run(&rig, &guest, "fill", &[Value::I32(1)]);
        let held = Arc::new(());
        let value = Value::Extern(Some(HostRef::new(Arc::clone(&held))));
        let table = new_table(&rig, ValueType::ExternRef, (1, None), value);
        let peak = meter::read();
        rig.snapshot();
        run(&rig, &guest, "fill", &[Value::I32(2)]);
        assert!(set_element(&rig, table, 0, Value::Extern(None)));
        // Whoever holds the instance, as JavaScript does for a while, does not hold what was in it.
        let replica = rig.replica(0);
        drop(rig);
        assert_eq!(
            Arc::strong_count(&held),
            1,
            "a value of the host is still held"
        );
        drop(replica);
        (peak, record)
    };
    fill();
    let Some(before) = meter::read() else { return };
    let mut records = Vec::new();
    for _ in 0..10 {
        let (peak, record) = fill();
        let peak = peak.unwrap().rss_bytes;
        assert!(
            peak > before.rss_bytes + 24 * MIB,
            "{before:?}, then {peak}"
        );
        assert!(record.is_released());
        records.push(record);
    }
    let after = meter::read().unwrap();
    let rss = before.rss_bytes + 16 * MIB;
    assert!(after.rss_bytes < rss, "{before:?}, then {after:?}");
    let mappings = before.mappings + 8;
    assert!(after.mappings <= mappings, "{before:?}, then {after:?}");
    // The last ones may still be on their way out.
    eventually("their threads end", || {
        meter::read().unwrap().threads <= before.threads
    });
    assert!(
        after.descriptors <= before.descriptors,
        "{before:?}, then {after:?}"
    );
}

#[test]
fn a_reload_gives_the_memory_of_the_realm_back() {
    let _alone = alone();
    let rig = rig();
    let fill = |rig: &Rig| {
        let memory = new_memory(rig, 512, None);
        let record = record(rig, memory);
        record.write(0, &vec![1; record.byte_len()]).unwrap();
        rig.reload("full");
        record
    };
    fill(&rig);
    let Some(before) = meter::read() else { return };
    for _ in 0..10 {
        assert!(fill(&rig).is_released());
    }
    let after = meter::read().unwrap();
    let rss = before.rss_bytes + 16 * MIB;
    assert!(after.rss_bytes < rss, "{before:?}, then {after:?}");
    assert!(
        after.mappings <= before.mappings + 8,
        "{before:?}, then {after:?}"
    );
}

// ---------------------------------------------------------------------- against a model

#[derive(Debug, Clone, Copy)]
enum Step {
    HostGrow(u64, u32),
    GuestGrow(i32, u32),
    HostSet(usize, u32),
    GuestSet(usize, u32),
    /// A new instance puts a function, or sets an element, by its start function.
    NewInstance(usize, u32),
    Snapshot,
    /// To the one so many before the newest.
    Reset(usize),
}

fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    let value = 0..1000_u32;
    let step = prop_oneof![
        2 => (0..4_u64, value.clone()).prop_map(|(n, v)| Step::HostGrow(n, v)),
        3 => (0..5_i32, value.clone()).prop_map(|(n, v)| Step::GuestGrow(n, v)),
        3 => (0..24_usize, value.clone()).prop_map(|(i, v)| Step::HostSet(i, v)),
        3 => (0..24_usize, value.clone()).prop_map(|(i, v)| Step::GuestSet(i, v)),
        1 => (0..24_usize, value).prop_map(|(i, v)| Step::NewInstance(i, v)),
        2 => Just(Step::Snapshot),
        4 => (0..3_usize).prop_map(Step::Reset),
    ];
    prop::collection::vec(step, 1..40)
}

const MOST: usize = 20;

/// Elements that stand for themselves: numbers, some of which are null.
fn model_value(number: u32) -> Option<u32> {
    (!number.is_multiple_of(5)).then_some(number)
}

fn given(value: Option<u32>) -> Value {
    Value::Extern(value.map(HostRef::new))
}

/// A table and what it must hold.
struct Watched {
    rig: Rig,
    guest: Made,
    setter: Arc<Module>,
    table: u32,
    /// Its guest has an instruction by which it grows: so it shrinks.
    is_grown_by_guest: bool,
    model: Vec<Option<u32>>,
    snapshots: Vec<(Arc<Snapshot>, Vec<Option<u32>>)>,
}

impl Watched {
    fn new(is_grown_by_guest: bool) -> Self {
        let rig = rig();
        let grow = match is_grown_by_guest {
            true => "(table.grow $t (local.get 0) (local.get 1))",
            false => "(i32.const -1)",
        };
        let wat = format!(
            r#"(module (table $t (export "table") 2 {MOST} externref)
                (func (export "grow") (param externref i32) (result i32) {grow})
                (func (export "size") (result i32) (table.size $t))
                (func (export "set") (param i32 externref) (table.set $t (local.get 0) (local.get 1)))
                (func (export "get") (param i32) (result externref) (table.get $t (local.get 0))))"#
        );
        let guest = make(&rig, &wat, Vec::new());
        let setter = rig.compile(
            r#"(module (import "e" "t" (table $t 2 externref)) (import "e" "at" (global $at i32))
                (import "e" "value" (global $value externref))
                (func $start (table.set $t (global.get $at) (global.get $value))) (start $start))"#,
        );
        Self {
            table: guest.item("table"),
            rig,
            guest,
            setter,
            is_grown_by_guest,
            model: vec![None; 2],
            snapshots: Vec::new(),
        }
    }

    fn grown(&mut self, by: usize, value: Option<u32>) -> Option<usize> {
        let len = self.model.len();
        if len + by > MOST {
            return None;
        }
        self.model.resize(len + by, value);
        Some(len)
    }

    fn take(&mut self, step: Step) {
        let table = self.table;
        match step {
            Step::HostGrow(by, value) => {
                let value = model_value(value);
                let expected = self.grown(by as usize, value).map(|len| len as u64);
                assert_eq!(grow_table(&self.rig, table, by, given(value)), expected);
            }
            Step::GuestGrow(by, value) if self.is_grown_by_guest => {
                let value = model_value(value);
                let expected = self.grown(by as usize, value).map_or(-1, |len| len as i32);
                assert_eq!(
                    guest_grow(&self.rig, &self.guest, given(value), by),
                    expected
                );
            }
            Step::GuestGrow(..) => {}
            Step::HostSet(at, value) => {
                let value = model_value(value);
                let fits = set_element(&self.rig, table, at as u64, given(value));
                assert_eq!(fits, at < self.model.len());
                self.set(at, value);
            }
            Step::GuestSet(at, value) => {
                let value = model_value(value);
                let args = [Value::I32(at as i32), given(value)];
                let ended = call(&self.rig, self.guest.func("set"), &args);
                assert_eq!(ended.is_ok(), at < self.model.len(), "{ended:?}");
                self.set(at, value);
            }
            Step::NewInstance(at, value) if at < self.model.len() => {
                let value = model_value(value);
                let setter = Arc::clone(&self.setter);
                let made = self.rig.realm(move |realm| {
                    let at = realm.global("i32", false, Some(Value::I32(at as i32)))?;
                    let value = realm.global("externref", false, Some(given(value)))?;
                    realm.instantiate(&setter, vec![item(table), item(at), item(value)])
                });
                made.unwrap();
                self.set(at, value);
            }
            Step::NewInstance(..) => {}
            Step::Snapshot => {
                let taken = self.rig.snapshot_now().unwrap();
                self.snapshots.push((taken, self.model.clone()));
            }
            Step::Reset(back) => {
                let Some(index) = self.snapshots.len().checked_sub(back + 1) else {
                    return;
                };
                let (taken, model) = &self.snapshots[index];
                self.rig.reset_now(reset_to(taken)).unwrap();
                let before = std::mem::replace(&mut self.model, model.clone());
                if !self.is_grown_by_guest && before.len() > model.len() {
                    self.model.extend_from_slice(&before[model.len()..]);
                }
            }
        }
    }

    fn set(&mut self, at: usize, value: Option<u32>) {
        if let Some(element) = self.model.get_mut(at) {
            *element = value;
        }
    }

    fn check(&self) {
        let (table, get) = (self.table, self.guest.func("get"));
        let read = |value: Option<Value>| match value {
            Some(Value::Extern(held)) => held.map(|held| *held.downcast_ref::<u32>().unwrap()),
            other => panic!("{other:?}"),
        };
        let len = self.model.len() as u64;
        let (by_host, by_guest) = self.rig.realm(move |realm| {
            assert_eq!(realm.table_len(table), len);
            let by_host: Vec<_> = (0..len).map(|i| realm.element(table, i).unwrap()).collect();
            assert!(realm.element(table, len).unwrap().is_none());
            let at = |i| realm.call(&get, &[Value::I32(i)]);
            let by_guest: Vec<_> = (0..len as i32).map(|i| at(i).unwrap().pop()).collect();
            assert_eq!(trap(at(len as i32)), "out-of-bounds-table");
            (by_host, by_guest)
        });
        assert_eq!(
            by_host.into_iter().map(read).collect::<Vec<_>>(),
            self.model
        );
        assert_eq!(
            by_guest.into_iter().map(read).collect::<Vec<_>>(),
            self.model
        );
        assert_eq!(number(&self.rig, &self.guest, "size", &[]) as u64, len);
    }
}

#[test]
fn tables_are_as_a_model_says_whoever_grows_them() {
    let config = Config {
        cases: 96,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    let outcome = runner.run(&(any::<bool>(), steps()), |(is_grown_by_guest, steps)| {
        let mut watched = Watched::new(is_grown_by_guest);
        for step in steps {
            watched.take(step);
            watched.check();
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
