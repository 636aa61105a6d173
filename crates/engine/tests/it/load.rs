//! From a source to a manager that serves, or to a clear refusal.

use std::fs;

use wasm_molt_engine::{
    CacheChoice, EngineOptions, Error, ErrorCode, FailedPhase, HostRef, ImportValue, Limits,
    ManagerOptions, ManagerState, Source, Value, Work,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::folder::Folder;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::{Script, function};
use wasm_molt_testkit::rig::{Setup, code, number, trap};
use wasm_molt_testkit::wait::answer;

fn bytes(wat: &str) -> Vec<u8> {
    match guests::source(wat) {
        Source::Bytes(bytes) => bytes,
        Source::File(_) => unreachable!(),
    }
}

const UNNAMED: &str = r#"(module (func (export "seven") (result i32) (i32.const 7)))"#;

#[test]
fn a_module_is_loaded_from_bytes_and_from_files_of_both_kinds() {
    let folder = Folder::new("sources");
    let sources = [
        Source::Bytes(bytes(UNNAMED)),
        folder.file("binary.wasm", &bytes(UNNAMED)),
        folder.file("text.wat", UNNAMED.as_bytes()),
        folder.file("binary.wat", &bytes(UNNAMED)),
    ];
    for source in sources {
        assert_eq!(Setup::of(source).start().number("seven", &[]), 7);
    }
}

#[test]
fn a_manager_has_the_name_it_was_given_or_its_modules_or_its_files() {
    let folder = Folder::new("names");
    let named = |source, name: Option<&str>| {
        let name = name.map(Into::into);
        Setup::of(source)
            .options(|o| o.name = name)
            .start()
            .manager
            .name()
            .to_owned()
    };
    let file = |wat: &str| folder.file("stem.wasm", &bytes(wat));
    assert_eq!(named(file(&guests::adder()), Some("given")), "given");
    assert_eq!(named(file(&guests::adder()), None), "adder");
    assert_eq!(named(file(UNNAMED), None), "stem");
    assert_eq!(named(Source::Bytes(bytes(UNNAMED)), None), "wasm");
}

#[test]
fn what_is_no_module_is_refused_with_what_it_is() {
    let folder = Folder::new("refused");
    let whole = bytes(&guests::counter());
    let component = b"\0asm\x0d\0\x01\0".to_vec();
    let cases: [(Source, ErrorCode, &str); 8] = [
        (
            Source::File(folder.path().join("no.wasm")),
            ErrorCode::InvalidArgument,
            "no.wasm",
        ),
        (Source::Bytes(Vec::new()), ErrorCode::Compile, "not"),
        (
            Source::Bytes(b"<!doctype html>".to_vec()),
            ErrorCode::Compile,
            "3c 21",
        ),
        (
            Source::Bytes(whole[..whole.len() / 2].to_vec()),
            ErrorCode::Compile,
            "",
        ),
        (Source::Bytes(component), ErrorCode::Compile, "component"),
        (
            folder.file("bad.wat", b"(module (func"),
            ErrorCode::Compile,
            "bad.wat",
        ),
        (
            folder.file("latin.wat", b"(module \xe9)"),
            ErrorCode::Compile,
            "UTF-8",
        ),
        (
            folder.file("typed.wat", b"(module (func (result i32)))"),
            ErrorCode::Compile,
            "",
        ),
    ];
    for (source, expected, word) in cases {
        let what = format!("{source:?}");
        let error = Setup::of(source).start_error();
        assert_eq!(error.code(), Some(expected), "{what}: {error}");
        assert!(
            error.to_string().contains(word),
            "{what}: '{word}' in: {error}"
        );
    }
}

#[test]
fn every_truncation_of_a_module_is_refused_and_none_does_harm() {
    let whole = bytes(&guests::trapper());
    // Cut inside a section; what is left of a whole one may be a module of its own.
    for length in (1..whole.len()).step_by(7) {
        let rig = Setup::of(Source::Bytes(whole[..length].to_vec())).create();
        if let Err(error) = rig.start().get() {
            assert_eq!(error.code(), Some(ErrorCode::Compile), "{length}: {error}");
        }
    }
}

#[test]
fn legacy_exceptions_are_refused_with_the_remedy() {
    // (module (tag) (func (try (do) (catch_all)))) in the encoding of 2020.
    let legacy = b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x0d\x03\x01\0\0\
                   \x0a\x08\x01\x06\0\x06\x40\x19\x0b\x0b";
    let error = Setup::of(Source::Bytes(legacy.to_vec())).start_error();
    assert_eq!(error.code(), Some(ErrorCode::Compile));
    assert!(error.to_string().contains("translate-to-exnref"), "{error}");
}

#[test]
fn a_feature_that_is_off_is_refused_by_its_options_name() {
    let simd = "(module (func (result v128) (v128.const i64x2 0 0)))";
    let relaxed = "(module (func (param v128 v128) (result v128)
        (i32x4.relaxed_trunc_f32x4_s (local.get 0)) drop
        (i8x16.relaxed_swizzle (local.get 0) (local.get 1))))";
    let threads = "(module (memory 1 1 shared))";
    let cases: [(&str, fn(&mut EngineOptions), &str); 4] = [
        (simd, |engine| engine.simd = false, "engine.simd"),
        (
            relaxed,
            |engine| engine.relaxed_simd = false,
            "engine.relaxedSimd",
        ),
        (relaxed, |engine| engine.simd = false, "engine.simd"),
        (threads, |engine| engine.threads = false, "engine.threads"),
    ];
    for (wat, change, word) in cases {
        drop(Setup::new(wat).options(|o| o.engine.threads = true).start());
        let error = Setup::new(wat)
            .options(|o| change(&mut o.engine))
            .start_error();
        assert_eq!(error.code(), Some(ErrorCode::Compile), "{error}");
        assert!(error.to_string().contains(word), "'{word}' in: {error}");
    }
}

#[test]
fn engine_options_can_be_combined_as_one_likes() {
    for bits in 0..32 {
        let on = |bit: u32| bits & (1 << bit) != 0;
        let setup = Setup::new(&guests::counter()).options(|o| {
            o.engine.interruptible = on(0);
            o.engine.signals_based_traps = on(1);
            o.engine.fuel = on(2);
            o.engine.simd = on(3);
            o.engine.memory_reservation_bytes = if on(4) { 4 << 30 } else { 0 };
        });
        let rig = setup.start();
        assert_eq!(rig.number("increment", &[]), 1);
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        assert_eq!(rig.number("get", &[]), 0);
    }
}

#[test]
fn options_that_cannot_be_used_are_refused_with_their_range() {
    let cases: [(fn(&mut ManagerOptions), &str); 7] = [
        (|o| o.instances = 0, "instances"),
        (|o| o.instances = 4097, "instances"),
        (|o| o.threads = Some(0), "threads"),
        (|o| o.threads = Some(4097), "threads"),
        (|o| o.limits.fuel = Some(1), "engine.fuel"),
        (|o| o.limits.stack = Some(1000), "stackBytes"),
        (|o| o.limits.stack = Some(1 << 30), "stackBytes"),
    ];
    for (change, word) in cases {
        let error = Setup::new(UNNAMED)
            .options(change)
            .try_create()
            .unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::InvalidArgument));
        assert!(error.to_string().contains(word), "'{word}' in: {error}");
    }
}

#[test]
fn the_stack_limit_is_as_deep_as_it_says() {
    let deep = r#"(module
        (global $depth (mut i32) (i32.const 0))
        (func $down (export "down") (result i32)
            (global.set $depth (i32.add (global.get $depth) (i32.const 1)))
            (i32.add (i32.const 1) (call $down)))
        (func (export "depth") (result i32) (global.get $depth)))"#;
    let depth = |stack| {
        let setup = Setup::new(deep).options(|o| o.limits.stack = Some(stack));
        let rig = setup.start();
        // In a lease, because the instance is replaced when it goes back.
        let lease = rig.lease();
        let depth = rig
            .enter(&lease, |inside| {
                let call = |name| wasm_molt_testkit::inside::call_leased(&inside, name, Vec::new());
                assert_eq!(trap(call("down")), "stack-overflow");
                call("depth").unwrap()
            })
            .unwrap();
        rig.release(&lease);
        match depth.as_slice() {
            [Value::I32(depth)] => *depth,
            other => panic!("{other:?}"),
        }
    };
    let [small, default, large] = [64 << 10, Limits::DEFAULT_STACK_BYTES, 1 << 20].map(depth);
    assert!(
        small * 4 < default && default < large,
        "{small}, {default}, {large}"
    );
}

#[test]
fn a_stack_beyond_wasmtimes_own_default_bound_can_be_had() {
    let setup = Setup::new(&guests::trapper()).options(|o| o.limits.stack = Some(16 << 20));
    let rig = setup.start();
    assert_eq!(trap(rig.call("deep", &[]).get()), "stack-overflow");
    assert_eq!(rig.number("fine", &[]), 7);
}

#[test]
fn a_data_segment_that_does_not_fit_is_told_without_code_that_nobody_wrote() {
    for fuel in [false, true] {
        let setup = Setup::new(r#"(module (memory 1) (data (i32.const 65536) "x"))"#);
        let error = setup.options(|o| o.engine.fuel = fuel).start_error();
        let Error::Trap { what, info } = &error else {
            panic!("{error:?}")
        };
        assert!(what.ends_with("the start function"), "{what}");
        assert_eq!((info.kind, &*info.wasm_stack), ("out-of-bounds-memory", ""));
    }
}

#[test]
fn an_imported_table_is_as_large_as_it_was_made() {
    let wat = r#"(module (import "env" "t" (table $t 1 9 funcref))
        (func (export "size") (result i32) table.size $t)
        (func (export "grow") (param i32) (result i32) (table.grow $t (ref.null func) (local.get 0)))
        (func $start (drop (table.grow $t (ref.null func) (i32.const 1))))
        (start $start))"#;
    let table = ImportValue::Table {
        initial: 3,
        maximum: Some(9),
    };
    let rig = Setup::new(wat)
        .script(Script::new().import("env", "t", table))
        .start();
    assert_eq!(rig.number("size", &[]), 4);
    assert_eq!(rig.number("grow", &[5]), 4);
    assert_eq!(rig.number("grow", &[1]), -1);
    assert_eq!(rig.number("size", &[]), 9);
}

#[test]
fn an_import_that_is_missing_or_of_another_kind_is_named() {
    let wat = r#"(module
        (import "env" "f" (func (param i32)))
        (import "env" "g" (global i32))
        (import "env" "m" (memory 1 2))
        (import "env" "t" (table 1 funcref)))"#;
    let given = || {
        Script::new()
            .function("f", |_| Ok(()))
            .import("env", "g", ImportValue::Global(Value::I32(1)))
            .import(
                "env",
                "m",
                ImportValue::Memory {
                    initial: 1,
                    maximum: Some(2),
                },
            )
            .import(
                "env",
                "t",
                ImportValue::Table {
                    initial: 1,
                    maximum: None,
                },
            )
    };
    drop(Setup::new(wat).script(given()).start());

    let wrong: [(&str, ImportValue); 8] = [
        ("f", ImportValue::Global(Value::I32(1))),
        ("g", ImportValue::Global(Value::I64(1))),
        ("g", function(|_| Ok(()))),
        (
            "m",
            ImportValue::Memory {
                initial: 0,
                maximum: Some(2),
            },
        ),
        (
            "m",
            ImportValue::Memory {
                initial: 1,
                maximum: None,
            },
        ),
        (
            "m",
            ImportValue::Memory {
                initial: 1,
                maximum: Some(3),
            },
        ),
        (
            "t",
            ImportValue::Table {
                initial: 0,
                maximum: None,
            },
        ),
        (
            "t",
            ImportValue::Memory {
                initial: 1,
                maximum: None,
            },
        ),
    ];
    for (name, value) in wrong {
        let what = format!("{name}: {value:?}");
        let script = Script::new().import("env", name, value);
        let rest = ["f", "g", "m", "t"].into_iter().filter(|n| *n != name);
        let script = rest.fold(script, |script, name| match name {
            "f" => script.function("f", |_| Ok(())),
            "g" => script.import("env", "g", ImportValue::Global(Value::I32(1))),
            "m" => script.import(
                "env",
                "m",
                ImportValue::Memory {
                    initial: 1,
                    maximum: Some(2),
                },
            ),
            _ => script.import(
                "env",
                "t",
                ImportValue::Table {
                    initial: 1,
                    maximum: None,
                },
            ),
        });
        let error = Setup::new(wat).script(script).start_error();
        assert_eq!(error.code(), Some(ErrorCode::Link), "{what}: {error}");
        assert!(
            error.to_string().contains(&format!("'{name}'")),
            "{what}: {error}"
        );
    }
}

#[test]
fn a_host_that_gives_too_few_imports_is_told() {
    let script = Script::new().imports(|_, _| Ok(Vec::new()));
    let error = Setup::new(&guests::importer()).script(script).start_error();
    assert_eq!(error.code(), Some(ErrorCode::Link), "{error}");
}

#[test]
fn the_start_function_and_initialize_run_once_for_each_instance() {
    let door = Door::new();
    door.open();
    let script = Script::new()
        .function("host", door.function())
        .function("reactor", door.function());
    let rig = Setup::new(&guests::starter())
        .instances(2)
        .script(script)
        .start();
    for _ in 0..4 {
        door.arrived();
    }
    assert!(door.is_quiet());
    assert_eq!(rig.number("fine", &[]), 7);
}

#[test]
fn a_start_that_throws_traps_or_fails_says_how() {
    fn starter(host: &'static str) -> Setup {
        let thrown = || Err(Error::Thrown(HostRef::new("mine")));
        let ok = || Ok(());
        let script = Script::new()
            .function(
                "host",
                move |_| if host == "start" { thrown() } else { ok() },
            )
            .function(
                "reactor",
                move |_| if host == "reactor" { thrown() } else { ok() },
            );
        Setup::new(&guests::starter()).script(script)
    }
    for host in ["start", "reactor"] {
        let error = starter(host).start_error();
        let Error::ReloadFailed { phase, cause, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*phase, FailedPhase::Instantiate);
        let Error::Thrown(thrown) = &**cause else {
            panic!("{cause:?}")
        };
        assert_eq!(thrown.downcast_ref(), Some(&"mine"));
    }
    let trapping = [
        "(module (func $s unreachable) (start $s))",
        r#"(module (func (export "_initialize") unreachable))"#,
        r#"(module (memory 1) (data (i32.const 65536) "x"))"#,
    ];
    for wat in trapping {
        let error = Setup::new(wat).start_error();
        assert_eq!(error.code(), Some(ErrorCode::Trap), "{wat}: {error}");
    }
}

#[test]
fn an_initialize_with_parameters_is_an_export_like_any_other() {
    let wat = r#"(module (func (export "_initialize") (param i32) (result i32) (local.get 0)))"#;
    assert_eq!(Setup::new(wat).start().number("_initialize", &[5]), 5);
}

#[test]
fn calls_and_leases_that_came_before_the_start_run_after_it() {
    let rig = Setup::new(&guests::adder()).create();
    assert_eq!(rig.manager.state(), ManagerState::Starting);
    assert!(rig.manager.module().is_none());
    let (settle, early) = answer("a call before the start");
    let args = vec![Value::I32(1), Value::I32(2)];
    let work = Work::Call { function: 0, args };
    rig.manager.call(
        None,
        work,
        wasm_molt_engine::CallLimits::default(),
        Box::new(settle),
    );
    let (lease, _) = rig.ask_lease();
    assert!(early.is_open() && lease.is_open());
    rig.start().get().unwrap();
    assert_eq!(number(early.get()), 3);
    rig.release(&lease.get().unwrap());
    assert_eq!(rig.manager.state(), ManagerState::Ready);
    assert_eq!(rig.manager.generation().get(), 1);
}

#[test]
fn calls_that_waited_for_a_start_that_failed_are_refused() {
    let rig = Setup::of(Source::Bytes(b"nothing".to_vec())).create();
    let (settle, early) = answer("a call before the start");
    let work = Work::Call {
        function: 0,
        args: Vec::new(),
    };
    rig.manager.call(
        None,
        work,
        wasm_molt_engine::CallLimits::default(),
        Box::new(settle),
    );
    let (lease, _) = rig.ask_lease();
    assert_eq!(code(rig.start().get()), ErrorCode::Compile);
    assert_eq!(code(early.get()), ErrorCode::Closed);
    assert_eq!(code(lease.get()), ErrorCode::Closed);
    assert_eq!(rig.manager.state(), ManagerState::Failed);
}

#[test]
fn a_reload_of_what_never_started_is_refused_and_changes_nothing() {
    let rig = Setup::of(Source::Bytes(b"nothing".to_vec())).create();
    assert_eq!(code(rig.start().get()), ErrorCode::Compile);
    let reload = rig.ask_reload(wasm_molt_testkit::rig::because("nothing"));
    assert_eq!(code(reload.get()), ErrorCode::Closed);
    assert_eq!(rig.manager.state(), ManagerState::Failed);
}

#[test]
fn a_panic_of_the_host_fails_the_start_and_what_waited_for_it() {
    use wasm_molt_testkit::faults::Point;
    for point in [Point::Imports, Point::Initialize] {
        let rig = Setup::new(&guests::adder()).create();
        rig.faults.panic(point, 0);
        let (settle, early) = answer(format!("a call before a start with a panic in {point:?}"));
        let work = Work::Call {
            function: 0,
            args: vec![Value::I32(1), Value::I32(2)],
        };
        rig.manager.call(
            None,
            work,
            wasm_molt_engine::CallLimits::default(),
            Box::new(settle),
        );
        assert_eq!(code(rig.start().get()), ErrorCode::Internal);
        assert_eq!(code(early.get()), ErrorCode::Closed);
        assert_eq!(rig.manager.state(), ManagerState::Failed);
    }
}

#[test]
fn compiled_code_is_kept_in_the_folder_that_was_named() {
    let folder = Folder::new("cache");
    let cache = CacheChoice::Folder(folder.path().into());
    for _ in 0..2 {
        let setup = Setup::new(&guests::grower("1 7")).options(|o| o.cache = cache.clone());
        assert_eq!(setup.start().number("size", &[]), 1);
    }
    assert!(
        fs::read_dir(folder.path()).unwrap().next().is_some(),
        "nothing was kept"
    );
}

#[test]
fn a_cache_folder_that_cannot_be_is_refused() {
    let folder = Folder::new("nocache");
    let Source::File(file) = folder.file("file", b"") else {
        unreachable!()
    };
    let error = Setup::new(UNNAMED)
        .options(|o| o.cache = CacheChoice::Folder(file))
        .start_error();
    assert_eq!(error.code(), Some(ErrorCode::InvalidArgument), "{error}");
    assert!(error.to_string().contains("cache"), "{error}");
}

#[test]
fn a_manager_starts_on_the_calling_thread_and_at_home_too() {
    let rig = Setup::new(&guests::adder()).create();
    rig.start_now().unwrap();
    assert_eq!(rig.number("add", &[2, 3]), 5);

    let rig = Setup::new(&guests::adder()).at_home().create();
    rig.start_now().unwrap();
    assert_eq!(rig.number("add", &[2, 3]), 5);
    let sum = rig
        .call_sync("add", &[Value::I32(2), Value::I32(4)])
        .unwrap();
    assert!(matches!(sum.as_slice(), [Value::I32(6)]));

    let rig = Setup::new(UNNAMED).at_home().create();
    rig.faults.fail(
        wasm_molt_testkit::faults::Point::Imports,
        0,
        Error::Thrown(HostRef::new(1)),
    );
    assert_eq!(code(rig.start_now()), ErrorCode::ReloadFailed);
    assert_eq!(rig.manager.state(), ManagerState::Failed);
    assert_eq!(code(rig.call_sync("seven", &[])), ErrorCode::Closed);
}
