//! Another build takes the place of the one that serves.

use std::sync::Arc;
use std::time::Duration;

use wasm_molt_engine::{
    CallLimits, Error, ErrorCode, FailedPhase, HostRef, ReloadOptions, Source, Strategy, Value,
    Work,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests::{self, Returns, allocator};
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::rig::{Rig, Setup, because, bytes, code, number, trap};
use wasm_molt_testkit::wait::{answer, eventually};

/// `version() -> i32`, a counter, and whatever else.
fn build(version: i32, more: &str) -> String {
    format!(
        r#"(module $build
        (memory (export "memory") 1)
        {more}
        (func (export "version") (result i32) (i32.const {version}))
        (func (export "increment") (result i32)
            (i32.store (i32.const 16) (i32.add (i32.load (i32.const 16)) (i32.const 1)))
            (i32.load (i32.const 16)))
        (func (export "get") (result i32) (i32.load (i32.const 16)))
        (func (export "set") (param i32) (i32.store (i32.const 16) (local.get 0)))
        (func (export "trap") unreachable))"#
    )
}

fn to(source: Source) -> ReloadOptions {
    ReloadOptions {
        source: Some(source),
        ..because("swap")
    }
}

fn to_build(version: i32, more: &str) -> ReloadOptions {
    to(guests::source(&build(version, more)))
}

fn first(more: &str) -> Setup {
    Setup::new(&build(1, more)).script(Script::carrying())
}

fn both(setup: impl Fn() -> Setup) -> [Rig; 2] {
    [setup().start(), setup().at_home().start()]
}

fn swap(rig: &Rig, options: ReloadOptions) -> u64 {
    rig.ask_reload(options).get().unwrap().generation.get()
}

fn version(rig: &Rig) -> i32 {
    rig.number("version", &[])
}

/// The text of an incompatibility.
fn incompatible(error: &Error) -> (&str, Option<&Error>) {
    match error {
        Error::Incompatible { message, cause } => (message, cause.as_deref()),
        other => panic!("an incompatible build was expected, not {other:?}"),
    }
}

/// Nothing was touched: the hooks of the new generation were not reached.
fn assert_refused(rig: &Rig, options: ReloadOptions) -> Error {
    let ids: Vec<_> = (0..rig.manager.options().instances)
        .map(|slot| rig.replica(slot).id())
        .collect();
    let generation = rig.manager.generation();
    rig.faults
        .fail(Point::Imports, 0, Error::invalid("imports were asked for"));
    let error = rig.ask_reload(options.clone()).get().unwrap_err();
    let at_once = rig.reload_now(options).unwrap_err();
    assert_eq!(error.code(), at_once.code());
    assert_eq!(rig.faults.left(), 1, "nothing was made");
    for (slot, id) in ids.iter().enumerate() {
        assert_eq!(rig.replica(slot).id(), *id);
    }
    assert_eq!(rig.manager.generation(), generation);
    // The fault is used up here, so that it does not strike later.
    assert_eq!(
        code(rig.ask_reload(because("the fault")).get()),
        ErrorCode::ReloadFailed
    );
    error
}

#[test]
fn state_goes_over_to_the_other_build_and_later_reloads_stay_there() {
    for rig in both(|| first("").instances(2)) {
        assert_eq!(version(&rig), 1);
        rig.number("increment", &[]);
        assert_eq!(swap(&rig, to_build(2, "")), 2);
        for slot in 0..2 {
            assert_eq!(rig.replica(slot).generation().get(), 2);
        }
        assert_eq!(version(&rig), 2);
        let leases = [rig.lease(), rig.lease()];
        let counts = leases
            .each_ref()
            .map(|l| number(rig.call_in(l, "get", &[]).get()));
        assert_eq!(counts.iter().sum::<i32>(), 1);
        leases.iter().for_each(|lease| rig.release(lease));
        rig.reload("stays");
        assert_eq!(version(&rig), 2);
        rig.reload_now(because("stays")).unwrap();
        assert_eq!(version(&rig), 2);

        assert_eq!(swap(&rig, to_build(1, "")), 5);
        assert_eq!(version(&rig), 1, "and back");
    }
}

#[test]
fn a_repair_stays_on_the_new_build() {
    for rig in both(|| first("")) {
        swap(&rig, to_build(2, ""));
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        rig.wait_generation(3);
        assert_eq!(version(&rig), 2);
    }
    let rig = first("").at_home().start();
    swap(&rig, to_build(2, ""));
    assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
    let version = rig.call_sync("version", &[]).unwrap();
    assert!(matches!(version[..], [Value::I32(2)]));
}

#[test]
fn on_the_calling_thread_too() {
    for rig in both(|| first("")) {
        rig.number("increment", &[]);
        let report = rig.reload_now(to_build(2, "")).unwrap();
        assert_eq!(report.generation.get(), 2);
        assert_eq!((version(&rig), rig.number("get", &[])), (2, 1));
    }
}

#[test]
fn a_rolling_swap_leaves_the_old_build_to_those_inside() {
    for rig in both(|| {
        let setup = Setup::new(&build(1, ""));
        setup.options(|o| o.threads = Some(2))
    }) {
        let lease = rig.lease();
        let options = ReloadOptions {
            strategy: Strategy::Rolling,
            ..to_build(2, r#"(func (export "late") (result i32) (i32.const 9))"#)
        };
        assert_eq!(swap(&rig, options), 2);
        assert_eq!(version(&rig), 2);
        assert_eq!(number(rig.call_in(&lease, "version", &[]).get()), 1);
        assert_eq!(rig.number("late", &[]), 9);
        assert_eq!(
            code(rig.call_in(&lease, "late", &[]).get()),
            ErrorCode::ExportNotFound,
            "the instance of the lease has no such function"
        );
        assert_eq!(number(rig.call_in(&lease, "version", &[]).get()), 1);
        rig.release(&lease);
        assert_eq!(version(&rig), 2);
    }
}

const ABC: &str = r#"
    (func (export "a") (result i32) (i32.const 10))
    (func (export "b") (result i32) (i32.const 20))
    (func (export "c") (result i32) (i32.const 30))"#;
/// Another order, without `b`.
const CDA: &str = r#"
    (func (export "c") (result i32) (i32.const 31))
    (func (export "d") (result i32) (i32.const 41))
    (func (export "a") (result i32) (i32.const 11))"#;

fn call_at(rig: &Rig, function: usize) -> wasm_molt_testkit::rig::Ended {
    let (settle, ended) = answer("a call by position");
    let work = Work::Call {
        function,
        args: Vec::new(),
    };
    let limits = CallLimits::default();
    rig.manager.call(None, work, limits, Box::new(settle));
    ended.get()
}

#[test]
fn positions_hold_for_every_build() {
    let rig = first(ABC).start();
    let position = |name: &str| {
        let module = rig.manager.module().unwrap();
        let mut functions = module.functions().iter();
        functions.position(|f| f.is_offered && f.name == name)
    };
    let before = ["a", "b", "c"].map(|name| position(name).unwrap());
    for round in 0..20 {
        swap(&rig, to_build(2, CDA));
        let [a, b, c] = before;
        assert_eq!(position("a"), Some(a));
        assert_eq!(position("b"), None);
        assert_eq!(position("c"), Some(c));
        assert_eq!(
            [a, c, position("d").unwrap()].map(|at| number(call_at(&rig, at))),
            [11, 31, 41]
        );
        let gone = call_at(&rig, b).unwrap_err();
        assert_eq!(gone.code(), Some(ErrorCode::ExportNotFound));
        assert!(gone.to_string().contains("'b'"), "{gone}");
        let module = rig.manager.module().unwrap();
        assert_eq!(
            code(module.function_index("b").map(drop)),
            ErrorCode::ExportNotFound
        );

        swap(&rig, to_build(1, ABC));
        let after = ["a", "b", "c"].map(|name| position(name).unwrap());
        assert_eq!(after, before, "b has its place again");
        assert_eq!(before.map(|at| number(call_at(&rig, at))), [10, 20, 30]);
        let places = rig.manager.module().unwrap().functions().len();
        assert_eq!(places, 5 + 3 + 1, "round {round} takes no more places");
    }
}

#[test]
fn one_name_with_two_types_has_two_places() {
    let wide = r#"(func (export "f") (param i64) (result i64) (local.get 0))"#;
    let narrow = r#"(func (export "f") (param i32) (result i32) (local.get 0))"#;
    let rig = first(wide).start();
    let functions = |rig: &Rig| {
        let module = rig.manager.module().unwrap();
        let f = module.functions().iter().filter(|f| f.name == "f");
        f.map(|f| f.is_offered).collect::<Vec<_>>()
    };
    for _ in 0..3 {
        swap(&rig, to_build(2, narrow));
        assert_eq!(functions(&rig), [false, true]);
        swap(&rig, to_build(1, wide));
        assert_eq!(functions(&rig), [true, false]);
    }
    // Once it is called, its type has to stay.
    drop(rig.call("f", &[Value::I64(1)]).get());
    let error = assert_refused(&rig, to_build(2, narrow));
    let (message, _) = incompatible(&error);
    assert!(
        message.contains("'f'") && message.contains("i32"),
        "{message}"
    );
}

#[test]
fn everything_in_use_that_is_missing_is_named() {
    for rig in both(|| first(ABC)) {
        for name in ["a", "b", "c", "version"] {
            rig.function(name);
        }
        let other = r#"(module
            (func (export "a") (param f64) (result i32) (i32.const 1))
            (func (export "c") (result i32) (i32.const 1)))"#;
        let error = assert_refused(&rig, to(guests::source(other)));
        assert_eq!(error.code(), Some(ErrorCode::IncompatibleModule));
        let (message, cause) = incompatible(&error);
        for missing in ["'a'", "f64", "'b'", "'version'", "memory"] {
            assert!(message.contains(missing), "{missing}: {message}");
        }
        for present in ["'c'", "'trap'"] {
            assert!(!message.contains(present), "{present}: {message}");
        }
        assert!(cause.is_none());
        assert_eq!(version(&rig), 1);
    }
}

#[test]
fn what_nobody_has_used_may_go() {
    for rig in both(|| Setup::new(&build(1, ABC))) {
        let other = r#"(module (memory (export "mem") 3)
            (func (export "version") (result i32) (i32.const 2)))"#;
        version(&rig);
        assert_eq!(swap(&rig, to(guests::source(other))), 2);
        assert_eq!(version(&rig), 2);
        assert_eq!(rig.stats().memory_bytes, 3 << 16, "any memory will do");
    }
}

#[test]
fn a_use_is_remembered_over_builds_that_keep_it() {
    let rig = first(ABC).start();
    rig.number("b", &[]);
    swap(&rig, to_build(2, ABC));
    swap(&rig, to_build(3, ABC));
    let error = assert_refused(&rig, to_build(4, CDA));
    assert!(incompatible(&error).0.contains("'b'"));
    assert_eq!((version(&rig), rig.number("b", &[])), (3, 20));
}

#[test]
fn what_invoke_needs_is_in_use() {
    let script = || Script::new().function("host", |_| Ok(()));
    for returns in [Returns::MultiValue, Returns::PackedI64, Returns::OutPointer] {
        let text = allocator(returns);
        let setup = Setup::new(&text).script(script()).options(|o| {
            o.abi.returns = match returns {
                Returns::MultiValue => wasm_molt_engine::BufferReturns::MultiValue,
                Returns::PackedI64 => wasm_molt_engine::BufferReturns::PackedI64,
                Returns::OutPointer => wasm_molt_engine::BufferReturns::OutPointer,
            };
        });
        let rig = setup.start();
        assert_eq!(bytes(rig.invoke("process", b"abc").get()), b"bcd");
        for helper in ["allocate", "deallocate", "process"] {
            let other = text.replace(
                &format!("(export \"{helper}\")"),
                &format!("(export \"no_{helper}\")"),
            );
            let error = assert_refused(&rig, to(guests::source(&other)));
            let (message, _) = incompatible(&error);
            assert!(message.contains(&format!("'{helper}'")), "{message}");
        }
        // What else the guest offers has not been used.
        let other = text.replace("(export \"wild\")", "(export \"tame\")");
        assert_eq!(swap(&rig, to(guests::source(&other))), 2);
        assert_eq!(bytes(rig.invoke("process", b"abc").get()), b"bcd");
    }
}

#[test]
fn an_import_that_nobody_gives_is_an_incompatibility() {
    for strategy in [Strategy::Exclusive, Strategy::Rolling] {
        for rig in both(|| Setup::new(&build(1, "")).instances(2)) {
            let needy = r#"(module (import "env" "absent" (func)) (memory (export "memory") 1))"#;
            let options = ReloadOptions {
                strategy,
                ..to(guests::source(needy))
            };
            let error = rig.ask_reload(options).get().unwrap_err();
            let (message, cause) = incompatible(&error);
            assert_eq!(cause.unwrap().code(), Some(ErrorCode::Link), "{message}");
            assert_eq!(error.code(), Some(ErrorCode::IncompatibleModule));
            let stats = rig.stats();
            assert_eq!((stats.generation, stats.memory_bytes), (1, 2 << 16));
            assert_eq!((version(&rig), stats.reloads_failed), (1, 1));
        }
    }
}

#[test]
fn a_build_that_cannot_be_had_is_a_failed_reload() {
    let bad = [
        (
            Source::File("/nonexistent/build.wasm".into()),
            ErrorCode::InvalidArgument,
        ),
        (Source::Bytes(b"no module".to_vec()), ErrorCode::Compile),
        (Source::Bytes(Vec::new()), ErrorCode::Compile),
        (
            Source::Bytes(b"\0asm\x01\0\0\0\x0a\x05".to_vec()),
            ErrorCode::Compile,
        ),
    ];
    for (source, expected) in bad {
        for rig in both(|| first("")) {
            let error = assert_refused(&rig, to(source.clone()));
            let Error::ReloadFailed { phase, cause, .. } = &error else {
                panic!("{source:?}: {error:?}")
            };
            assert_eq!(*phase, FailedPhase::Instantiate);
            assert_eq!(cause.code(), Some(expected), "{source:?}");
            assert_eq!(version(&rig), 1);
        }
    }
}

#[test]
fn a_build_whose_start_traps_is_not_taken() {
    let start = "(func $start unreachable) (start $start)";
    for rig in both(|| first("")) {
        rig.number("increment", &[]);
        let error = rig.ask_reload(to_build(2, start)).get().unwrap_err();
        let Error::ReloadFailed { phase, cause, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*phase, FailedPhase::Instantiate);
        assert_eq!(cause.code(), Some(ErrorCode::Trap));
        assert_eq!((version(&rig), rig.number("get", &[])), (1, 1));
    }
}

#[test]
fn a_failure_in_any_hook_keeps_the_old_build() {
    for point in Point::HOOKS {
        for does_panic in [false, true] {
            for rig in both(|| first(ABC)) {
                rig.number("increment", &[]);
                if does_panic {
                    rig.faults.panic(point, 0);
                } else {
                    rig.faults.fail(point, 0, Error::Thrown(HostRef::new("no")));
                }
                let error = rig.ask_reload(to_build(2, CDA)).get().unwrap_err();
                let expected = [ErrorCode::ReloadFailed, ErrorCode::Internal];
                assert!(expected[..1 + usize::from(does_panic)].contains(&error.code().unwrap()));
                assert_eq!(version(&rig), 1, "{point:?}");
                rig.reload("still the old build");
                assert_eq!((version(&rig), rig.number("get", &[])), (1, 1));
                assert_eq!(rig.number("b", &[]), 20);
                assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
                rig.wait_generation(3);
                assert_eq!(version(&rig), 1);
            }
        }
    }
}

#[test]
fn calls_that_wait_across_the_swap_run_in_the_new_build() {
    for rig in both(|| first("")) {
        rig.number("increment", &[]);
        let restoring = rig.faults.hold(Point::Restore, 0);
        let reload = rig.ask_reload(to_build(2, ""));
        restoring.wait();
        let versions: Vec<_> = (0..50).map(|_| rig.call("version", &[])).collect();
        let counts: Vec<_> = (0..50).map(|_| rig.call("increment", &[])).collect();
        restoring.release();
        assert_eq!(reload.get().unwrap().queued, 100);
        for call in versions {
            assert_eq!(number(call.get()), 2);
        }
        for (n, call) in counts.into_iter().enumerate() {
            assert_eq!(number(call.get()), n as i32 + 2);
        }
    }
}

#[test]
fn a_function_first_used_during_the_swap_is_refused_by_the_new_build() {
    for rig in both(|| first(ABC)) {
        let restoring = rig.faults.hold(Point::Restore, 0);
        let reload = rig.ask_reload(to_build(2, CDA));
        restoring.wait();
        // Too late to be asked for: the builds have been compared.
        let gone = rig.call("b", &[]);
        let kept = rig.call("a", &[]);
        restoring.release();
        reload.get().unwrap();
        assert_eq!(code(gone.get()), ErrorCode::ExportNotFound);
        assert_eq!(number(kept.get()), 11);
        assert_eq!(version(&rig), 2);
        assert_eq!(rig.stats().poisoned, 0);
    }
}

#[test]
fn equal_swaps_join_but_not_past_another_build() {
    for rig in both(|| first("")) {
        let building = rig.faults.hold(Point::Initialize, 0);
        let one = rig.ask_reload(to_build(2, ""));
        building.wait();
        let same = rig.ask_reload(to_build(2, ""));
        let other = rig.ask_reload(to_build(3, ""));
        let again = rig.ask_reload(to_build(2, ""));
        let plain = rig.ask_reload(because("plain"));
        building.release();
        let report = one.get().unwrap();
        assert!(Arc::ptr_eq(&report, &same.get().unwrap()));
        let after = [other, again, plain].map(|reload| reload.get().unwrap().generation.get());
        assert_eq!(after, [3, 4, 5]);
        assert_eq!(version(&rig), 2, "the last word was the second build");
    }
}

#[test]
fn a_swap_while_every_thread_is_inside_a_guest() {
    let door = Door::new();
    let script = Script::new().function("host", door.function());
    let rig = Setup::new(&guests::importer()).script(script).start();
    let held = rig.call("run", &[Value::I32(1)]);
    door.arrived();
    let reload = rig.ask_reload(to(guests::source(&guests::importer())));
    // It is compiled all the same, and waits only for its drain.
    eventually("the gate is closed", || {
        !rig.manager.stats(None).gate.is_open
    });
    door.go();
    assert_eq!(number(held.get()), 1);
    assert!(reload.get().unwrap().drain > Duration::ZERO);
}

#[test]
fn a_destroy_during_the_swap_leaves_nothing() {
    for point in Point::HOOKS {
        for rig in both(|| first("")) {
            let hold = rig.faults.hold(point, 0);
            let reload = rig.ask_reload(to_build(2, ""));
            hold.wait();
            let destroyed = rig.destroy();
            assert_eq!(code(reload.get()), ErrorCode::Closed);
            destroyed.get().unwrap();
            assert_eq!(rig.manager.generation().get(), 1);
        }
    }
}
