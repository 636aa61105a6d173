//! Calls on the pool: values in and out, and every end that a call can come to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use wasm_molt_engine::{
    Error, ErrorCode, Event, FuncHandle, HostRef, ManagerState, Value, ValueType, Work,
};
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::rig::{Rig, Setup, code, number, trap, values};

/// One value through one identity function.
#[track_caller]
fn echo(rig: &Rig, name: &str, value: Value) -> Value {
    let mut values = values(rig.call(name, &[value]).get());
    assert_eq!(values.len(), 1);
    values.remove(0)
}

#[test]
fn numbers_cross_bit_by_bit() {
    let rig = Setup::new(&guests::echo()).start();
    for v in [0, 1, -1, i32::MIN, i32::MAX] {
        assert!(matches!(echo(&rig, "i32", Value::I32(v)), Value::I32(w) if w == v));
    }
    for v in [0, -1, i64::MIN, i64::MAX, 1 << 53, (1 << 53) + 1] {
        assert!(matches!(echo(&rig, "i64", Value::I64(v)), Value::I64(w) if w == v));
    }
    let bits32 = [
        0,
        0x8000_0000,
        0x7f80_0000,
        0x7fc0_0000,
        0x7fa0_0001,
        1,
        0x3f80_0000,
    ];
    for bits in bits32 {
        let Value::F32(v) = echo(&rig, "f32", Value::F32(f32::from_bits(bits))) else {
            panic!()
        };
        assert_eq!(v.to_bits(), bits);
    }
    let bits64 = [
        0,
        1 << 63,
        0x7ff0 << 48,
        0x7ff8 << 48,
        (0x7ff4 << 48) | 1,
        1,
    ];
    for bits in bits64 {
        let Value::F64(v) = echo(&rig, "f64", Value::F64(f64::from_bits(bits))) else {
            panic!()
        };
        assert_eq!(v.to_bits(), bits);
    }
}

#[test]
fn no_value_and_several_values_come_back_as_they_are() {
    let rig = Setup::new(&guests::echo()).start();
    assert!(values(rig.call("nothing", &[]).get()).is_empty());
    let swapped = values(rig.call("swap", &[Value::I32(3), Value::F64(0.5)]).get());
    assert!(matches!(swapped.as_slice(), [Value::F64(f), Value::I32(3)] if *f == 0.5));
}

fn references() -> Setup {
    let script = Script::new()
        .function("extern", |call| {
            call.results[0] = call.args[0].clone();
            Ok(())
        })
        .function("func", |call| {
            call.results[0] = call.args[0].clone();
            Ok(())
        });
    Setup::new(&guests::references()).script(script)
}

#[test]
fn an_externref_is_the_very_value_that_went_in() {
    let rig = references().start();
    let value = Arc::new(AtomicUsize::new(7));
    let inside = Value::Extern(Some(HostRef::new(Arc::clone(&value))));
    let is_it = |value: &Value, original: &Arc<AtomicUsize>| match value {
        Value::Extern(Some(held)) => held
            .downcast_ref::<Arc<AtomicUsize>>()
            .is_some_and(|v| Arc::ptr_eq(v, original)),
        _ => false,
    };
    assert!(
        is_it(&echo(&rig, "ask", inside.clone()), &value),
        "through guest, host and guest"
    );
    values(rig.call("keep", &[inside]).get());
    let kept = values(rig.call("kept", &[]).get());
    assert!(is_it(&kept[0], &value), "kept in a table between calls");
    assert!(matches!(
        echo(&rig, "ask", Value::Extern(None)),
        Value::Extern(None)
    ));
}

/// Counts how often it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn externrefs_that_the_guest_let_go_of_are_let_go_of() {
    const CALLS: usize = 20_000;
    let rig = references().start();
    let dropped = Arc::new(AtomicUsize::new(0));
    for _ in 0..CALLS {
        let value = Value::Extern(Some(HostRef::new(Counted(Arc::clone(&dropped)))));
        drop(echo(&rig, "ask", value));
    }
    let held = CALLS - dropped.load(Ordering::SeqCst);
    assert!(held <= 10_000, "{held} of {CALLS} are still held");
    let kept = Value::Extern(Some(HostRef::new(Counted(Arc::clone(&dropped)))));
    values(rig.call("keep", &[kept]).get());
    drop(rig);
    assert_eq!(
        dropped.load(Ordering::SeqCst),
        CALLS + 1,
        "the store took the rest with it"
    );
}

fn handle(value: &Value) -> FuncHandle {
    match value {
        Value::Func(Some(handle)) => *handle,
        other => panic!("a function was expected, not {other:?}"),
    }
}

#[test]
fn a_funcref_goes_out_and_comes_back_with_its_identity() {
    let rig = references().start();
    let pick = |index| values(rig.call("pick", &[Value::I32(index)]).get()).remove(0);
    let (one, two) = (pick(0), pick(1));
    assert!(matches!(pick(2), Value::Func(None)));
    assert_eq!(handle(&one).address(), handle(&pick(0)).address());
    assert_ne!(handle(&one).address(), handle(&two).address());
    assert_eq!(handle(&one).replica_id(), rig.replica(0).id());
    for func in [&one, &two] {
        let signature = rig.replica(0).signature(&handle(func)).unwrap();
        assert_eq!(&*signature.results, [ValueType::I32]);
        assert_eq!(
            handle(&echo(&rig, "pass", func.clone())).address(),
            handle(func).address()
        );
    }
    for (index, func) in [&one, &two].into_iter().enumerate() {
        values(
            rig.call("set", &[Value::I32(index as i32), func.clone()])
                .get(),
        );
    }
    assert_eq!(
        (rig.number("apply", &[0]), rig.number("apply", &[1])),
        (1, 2)
    );
    let module = rig.manager.module().unwrap().id();
    let export = Value::Export {
        module,
        index: rig.function("one"),
    };
    values(rig.call("set", &[Value::I32(2), export]).get());
    assert_eq!(rig.number("apply", &[2]), 1);
}

#[test]
fn a_funcref_of_another_instance_is_refused_and_does_no_harm() {
    let (rig, other) = (references().start(), references().start());
    let module = other.manager.module().unwrap().id();
    let foreign = [
        values(other.call("pick", &[Value::I32(0)]).get()).remove(0),
        Value::Export {
            module,
            index: other.function("one"),
        },
    ];
    for foreign in foreign {
        let refused = rig.call("set", &[Value::I32(0), foreign]).get();
        assert_eq!(code(refused), ErrorCode::StaleHandle);
    }

    let own = values(rig.call("pick", &[Value::I32(0)]).get()).remove(0);
    rig.reload("a new instance");
    let refused = rig.call("set", &[Value::I32(0), own]).get();
    assert_eq!(code(refused), ErrorCode::StaleHandle);
    assert_eq!(rig.stats().generation, 2, "nobody was replaced for it");
}

#[test]
fn arguments_that_do_not_fit_are_refused_and_do_no_harm() {
    let rig = Setup::new(&guests::echo()).start();
    let wrong: [(&str, &[Value]); 7] = [
        ("i32", &[]),
        ("i32", &[Value::I32(1), Value::I32(2)]),
        ("i32", &[Value::I64(1)]),
        ("f64", &[Value::F32(1.0)]),
        ("extern", &[Value::I32(1)]),
        ("func", &[Value::Extern(None)]),
        ("vector", &[Value::I32(1)]),
    ];
    for (name, args) in wrong {
        let error = rig.call(name, args).get().unwrap_err();
        assert_eq!(
            error.code(),
            Some(ErrorCode::InvalidArgument),
            "{name}{args:?}: {error}"
        );
        assert!(!rig.replica(0).is_poisoned());
    }
    assert_eq!(rig.stats().generation, 1, "nobody was replaced for it");
}

#[test]
fn a_function_whose_result_cannot_cross_is_refused_before_it_runs() {
    let rig = Setup::new(
        r#"(module
        (global $ran (mut i32) (i32.const 0))
        (func (export "vector") (result v128)
            (global.set $ran (i32.const 1)) (v128.const i64x2 1 2))
        (func (export "ran") (result i32) (global.get $ran)))"#,
    )
    .start();
    let error = rig.call("vector", &[]).get().unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidArgument), "{error}");
    assert_eq!(rig.number("ran", &[]), 0);
    assert_eq!(rig.stats().generation, 1, "nobody was replaced for it");
}

#[test]
fn a_function_that_is_not_there_is_answered_too() {
    let rig = Setup::new(&guests::adder()).start();
    let work = Work::Call {
        function: 99,
        args: Vec::new(),
    };
    let (ended, _) = rig.work("no function", work, wasm_molt_engine::CallLimits::default());
    assert_eq!(code(ended.get()), ErrorCode::ExportNotFound);
    assert_eq!(rig.number("add", &[1, 1]), 2);
}

#[test]
fn each_trap_has_its_kind_and_the_instance_is_replaced() {
    let rig = Setup::new(&guests::trapper()).start();
    for (index, (name, kind)) in guests::TRAPS.iter().enumerate() {
        let error = rig.call(name, &[]).get().unwrap_err();
        let Error::Trap { what, info } = &error else {
            panic!("{name}: {error:?}")
        };
        assert_eq!(info.kind, *kind, "{name}");
        assert!(
            what.contains(&format!("'{name}'")) && what.contains("trapper"),
            "{what}"
        );
        assert!(
            info.wasm_stack.contains("trapper:wasm-function"),
            "{}",
            info.wasm_stack
        );
        assert_eq!(rig.number("fine", &[]), 7);
        assert_eq!(rig.stats().generation, index as u64 + 2);
    }
    let traps = guests::TRAPS.len();
    rig.host
        .wait_for("trap", traps, |event| matches!(event, Event::Trap(_)));
    let stats = rig.stats();
    assert_eq!(stats.calls.trapped, traps as u64);
    assert_eq!(stats.reloads.get("trap"), Some(&(traps as u64)));
    assert_eq!((stats.state, stats.poisoned), (ManagerState::Ready, 0));
}

#[test]
fn a_guest_exception_that_nobody_caught_leaves_the_instance_in_service() {
    let rig = Setup::new(&guests::thrower()).start();
    assert_eq!(trap(rig.call("throw", &[]).get()), "uncaught-exception");
    assert_eq!(rig.number("caught", &[]), 5);
    assert_eq!((rig.number("fine", &[]), rig.stats().generation), (7, 1));
}

#[test]
fn the_frames_of_a_trap_have_their_names_innermost_first() {
    let wat = r#"(module $frames
        (func $_ZN4core3fmt5write17h0123456789abcdefE unreachable)
        (func $middle (call $_ZN4core3fmt5write17h0123456789abcdefE))
        (func (export "outer") (call $middle)))"#;
    let rig = Setup::new(wat).start();
    let error = rig.call("outer", &[]).get().unwrap_err();
    let Error::Trap { info, .. } = error else {
        panic!("{error:?}")
    };
    let lines: Vec<_> = info.wasm_stack.lines().collect();
    assert_eq!(lines.len(), 3, "{}", info.wasm_stack);
    assert!(lines[0].contains("core::fmt::write"), "{}", lines[0]);
    assert!(lines[1].contains("middle"), "{}", lines[1]);
}

#[test]
fn the_figures_add_up_to_what_was_asked() {
    let script = Script::new().function("host", |call| match call.args[0] {
        Value::I32(0) => Err(Error::Thrown(HostRef::new("thrown"))),
        _ => Ok(()),
    });
    let rig = Setup::new(&guests::importer())
        .options(|o| o.max_queue = 0)
        .script(script)
        .start();
    for _ in 0..3 {
        rig.number("twice", &[1]);
    }
    assert!(matches!(
        rig.call("run", &[Value::I32(0)]).get(),
        Err(Error::Thrown(_))
    ));
    assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
    // No queue: whoever comes while the instance is replaced is refused.
    rig.wait_generation(2);
    assert_eq!(
        code(rig.call_for(20, "spin", &[]).get()),
        ErrorCode::Timeout
    );
    rig.wait_generation(3);
    let lease = rig.lease();
    assert_eq!(
        code(rig.call("twice", &[Value::I32(1)]).get()),
        ErrorCode::QueueFull
    );
    rig.release(&lease);
    let stats = rig.stats();
    let calls = stats.calls;
    let counted = [
        calls.completed,
        calls.failed,
        calls.trapped,
        calls.interrupted,
        calls.rejected,
    ];
    assert_eq!(counted, [3, 1, 1, 1, 1]);
    assert_eq!((stats.times.run.count, stats.times.wait.count), (6, 6));
    let run = stats.times.run;
    assert!(
        run.max >= 20.0,
        "the call that timed out ran for 20 ms: {run:?}"
    );
    assert!(
        run.min <= run.p50 && run.p50 <= run.p90 && run.p90 <= run.p999,
        "{run:?}"
    );
}

#[test]
fn the_answer_comes_when_the_instance_is_free_again() {
    let rig = Setup::new(&guests::adder())
        .options(|o| o.max_queue = 0)
        .start();
    // Without a queue the next call is refused unless the slot is back before the answer.
    for n in 0..2000 {
        assert_eq!(
            number(rig.call("add", &[Value::I32(n), Value::I32(1)]).get()),
            n + 1
        );
    }
}

#[test]
fn an_answer_that_panics_harms_nobody_else() {
    let rig = Setup::new(&guests::adder()).start();
    let work = Work::Call {
        function: 0,
        args: vec![Value::I32(1), Value::I32(1)],
    };
    let settle = Box::new(|_| panic!("on purpose, in a settle"));
    rig.manager
        .call(None, work, wasm_molt_engine::CallLimits::default(), settle);
    assert_eq!(rig.number("add", &[1, 2]), 3);
    assert_eq!(rig.reload("after a panic in an answer").generation.get(), 2);
}

#[test]
fn a_listener_that_panics_loses_no_answer() {
    use wasm_molt_testkit::faults::Point;
    let rig = Setup::new(&guests::trapper()).start();
    rig.faults.panic(Point::Event, 0);
    assert_eq!(trap(rig.call("unreachable", &[]).get()), "unreachable");
    assert_eq!(rig.number("fine", &[]), 7);
    rig.faults.panic(Point::Event, 0);
    rig.reload("told to a listener that panics");
    assert_eq!(rig.number("fine", &[]), 7);
}
