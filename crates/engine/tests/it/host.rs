//! What the guest calls: the way out, the way back in, and hosts that misbehave.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use wasm_molt_engine::{Error, ErrorCode, HostRef, ImportValue, ManagerState, Value, ValueType};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::{Script, function};
use wasm_molt_testkit::inside::{call_again, call_handle};
use wasm_molt_testkit::rig::{Setup, code, number, trap, values};

fn i32_of(value: &Value) -> i32 {
    match value {
        Value::I32(value) => *value,
        other => panic!("an i32 was expected, not {other:?}"),
    }
}

/// An importer whose `env.host(n)` is this.
fn hosted(
    host: impl Fn(&mut wasm_molt_engine::HostCall<'_>) -> wasm_molt_engine::Result<()>
    + Send
    + Sync
    + 'static,
) -> Setup {
    Setup::new(&guests::importer()).script(Script::new().function("host", host))
}

#[test]
fn a_host_function_gets_its_arguments_and_gives_its_results() {
    let wat = r#"(module
        (import "env" "all" (func $all (param i32 i64 f32 f64) (result f64 f32 i64 i32)))
        (func (export "all") (param i32 i64 f32 f64) (result f64 f32 i64 i32)
            (call $all (local.get 0) (local.get 1) (local.get 2) (local.get 3))))"#;
    let script = Script::new().function("all", |call| {
        assert_eq!(
            &*call.signature.params,
            [
                ValueType::I32,
                ValueType::I64,
                ValueType::F32,
                ValueType::F64
            ]
        );
        let results = call.results.iter().map(Value::ty).collect::<Vec<_>>();
        assert_eq!(
            results,
            [
                ValueType::F64,
                ValueType::F32,
                ValueType::I64,
                ValueType::I32
            ]
        );
        for (place, value) in call.results.iter_mut().zip(call.args.iter().rev()) {
            *place = value.clone();
        }
        Ok(())
    });
    let rig = Setup::new(wat).script(script).start();
    let args = [
        Value::I32(-1),
        Value::I64(i64::MIN),
        Value::F32(-0.0),
        Value::F64(0.1),
    ];
    let back = values(rig.call("all", &args).get());
    let [Value::F64(d), Value::F32(c), Value::I64(b), Value::I32(a)] = back.as_slice() else {
        panic!("{back:?}")
    };
    assert_eq!(
        (*a, *b, c.to_bits(), *d),
        (-1, i64::MIN, (-0.0f32).to_bits(), 0.1)
    );
}

#[test]
fn references_cross_to_the_host_and_back() {
    let script = Script::new()
        .function("extern", |call| {
            let Value::Extern(Some(value)) = &call.args[0] else {
                panic!("{:?}", call.args)
            };
            assert_eq!(value.downcast_ref(), Some(&"sent"));
            call.results[0] = Value::Extern(Some(HostRef::new("answered")));
            Ok(())
        })
        .function("func", |call| {
            let Value::Func(Some(func)) = call.args[0].clone() else {
                panic!("{:?}", call.args)
            };
            let called = call_handle(call, &func, Vec::new())?;
            assert_eq!(i32_of(&called[0]), 2);
            let index = call.replica.module().function_index("one")?;
            let module = call.replica.module().id();
            call.results[0] = Value::Export { module, index };
            Ok(())
        });
    let rig = Setup::new(&guests::references()).script(script).start();
    let sent = Value::Extern(Some(HostRef::new("sent")));
    let back = values(rig.call("ask", &[sent]).get());
    let Value::Extern(Some(answered)) = &back[0] else {
        panic!("{back:?}")
    };
    assert_eq!(answered.downcast_ref(), Some(&"answered"));
    let two = values(rig.call("pick", &[Value::I32(1)]).get()).remove(0);
    let one = values(rig.call("pass", &[two]).get()).remove(0);
    let Value::Func(Some(one)) = one else {
        panic!("{one:?}")
    };
    let export = rig.replica(0).function(rig.function("one")).unwrap();
    assert_eq!(one.address(), export.address());
}

#[test]
fn a_host_function_may_call_back_fifty_deep() {
    let deepest = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&deepest);
    let rig = hosted(move |call| {
        let n = i32_of(&call.args[0]);
        assert!(call.replica.is_in_host_call());
        seen.fetch_max(n as usize, Ordering::SeqCst);
        let inner = if n < 50 {
            call_again(call, "again", vec![Value::I32(n + 1)])?
        } else {
            Vec::new()
        };
        let inner = inner.first().map_or(0, i32_of);
        let twice = call_again(call, "twice", vec![Value::I32(n)])?;
        call.results[0] = Value::I32(inner + i32_of(&twice[0]));
        Ok(())
    })
    .options(|o| o.limits.stack = Some(1 << 20))
    .start();
    assert_eq!(rig.number("run", &[1]), 50 * 51);
    assert_eq!(deepest.load(Ordering::SeqCst), 50);
    assert!(!rig.replica(0).is_in_host_call());
    assert_eq!(rig.stats().generation, 1);
}

#[test]
fn an_endless_recursion_through_the_host_ends_in_a_trap() {
    let setup = hosted(|call| {
        let n = i32_of(&call.args[0]);
        call.results = call_again(call, "again", vec![Value::I32(n + 1)])?
            .into_iter()
            .collect();
        Ok(())
    });
    let rig = setup.start();
    assert_eq!(
        trap(rig.call("run", &[Value::I32(0)]).get()),
        "stack-overflow"
    );
    assert_eq!(rig.number("twice", &[2]), 4);
}

#[test]
fn what_a_host_function_throws_comes_back_as_the_same_object() {
    let mine = Arc::new(7);
    let thrown = HostRef::new(Arc::clone(&mine));
    let rig = hosted(move |_| Err(Error::Thrown(thrown.clone()))).start();
    for _ in 0..3 {
        let Err(Error::Thrown(back)) = rig.call("run", &[Value::I32(1)]).get() else {
            panic!()
        };
        assert!(Arc::ptr_eq(back.downcast_ref::<Arc<i32>>().unwrap(), &mine));
    }
    let stats = rig.stats();
    assert_eq!(
        (stats.calls.failed, stats.generation),
        (3, 1),
        "the instance serves on"
    );
}

#[test]
fn an_error_with_a_code_keeps_it() {
    let rig = hosted(|_| Err(Error::new(ErrorCode::AsyncImport, "a promise"))).start();
    let error = rig.call("run", &[Value::I32(1)]).get().unwrap_err();
    assert_eq!(
        (error.code(), error.to_string()),
        (Some(ErrorCode::AsyncImport), "a promise".into())
    );
    assert!(!rig.replica(0).is_poisoned());
}

#[test]
fn a_nested_call_that_failed_may_be_caught_by_the_host() {
    let rig = hosted(|call| {
        let n = i32_of(&call.args[0]);
        if n == 0 {
            return Err(Error::Thrown(HostRef::new("inner")));
        }
        let inner = call_again(call, "again", vec![Value::I32(0)]);
        let Err(Error::Thrown(thrown)) = inner else {
            panic!("{inner:?}")
        };
        assert_eq!(thrown.downcast_ref(), Some(&"inner"));
        call.results[0] = Value::I32(9);
        Ok(())
    })
    .start();
    assert_eq!((rig.number("run", &[1]), rig.stats().generation), (9, 1));
}

#[test]
fn a_nested_trap_that_the_host_caught_still_costs_the_instance() {
    let rig = hosted(|call| {
        assert_eq!(trap(call_again(call, "trap", Vec::new())), "unreachable");
        assert!(call.replica.is_poisoned());
        call.results[0] = Value::I32(9);
        Ok(())
    })
    .start();
    let first = rig.replica(0).id();
    assert_eq!(rig.number("run", &[1]), 9, "the call itself went well");
    assert_eq!(rig.number("twice", &[2]), 4);
    assert_ne!(rig.replica(0).id(), first, "but the instance was replaced");
    assert_eq!(rig.stats().generation, 2);
}

#[test]
fn a_panic_of_a_host_function_is_an_internal_error_and_costs_the_instance() {
    let door = Door::new();
    let meet = door.function();
    let script = Script::new().function("host", move |call| {
        assert!(
            i32_of(&call.args[0]) < 100,
            "on purpose, in a host function"
        );
        meet(call)
    });
    let rig = Setup::new(&guests::importer())
        .instances(2)
        .script(script)
        .start();
    let neighbour = rig.call("run", &[Value::I32(1)]);
    assert_eq!(door.arrived(), 1);
    for n in 0..10 {
        let error = rig.call("run", &[Value::I32(100)]).get().unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::Internal));
        assert!(error.to_string().contains("on purpose"), "{error}");
        rig.wait_generation(n + 2);
    }
    assert!(neighbour.is_open(), "the neighbour heard nothing of it");
    door.go();
    assert_eq!(number(neighbour.get()), 1);
}

#[test]
fn a_panic_deep_in_nested_calls_unwinds_them_all() {
    let rig = hosted(|call| {
        let n = i32_of(&call.args[0]);
        assert!(n < 5, "on purpose, five deep");
        drop(call_again(call, "again", vec![Value::I32(n + 1)])?);
        Ok(())
    })
    .start();
    assert_eq!(
        code(rig.call("run", &[Value::I32(0)]).get()),
        ErrorCode::Internal
    );
    assert_eq!(rig.number("twice", &[4]), 8);
    assert_eq!(rig.stats().generation, 2);
}

#[test]
fn results_that_do_not_fit_are_refused() {
    type Change = fn(&mut wasm_molt_engine::HostCall<'_>);
    let wrong: [(&str, Change); 4] = [
        ("none", |call| call.results.clear()),
        ("too many", |call| call.results.push(Value::I32(2))),
        ("an i64", |call| call.results[0] = Value::I64(1 << 40)),
        ("a reference", |call| call.results[0] = Value::Extern(None)),
    ];
    for (what, change) in wrong {
        let rig = hosted(move |call| {
            change(call);
            Ok(())
        })
        .start();
        let ended = rig.call("run", &[Value::I32(77)]).get();
        assert!(
            ended.is_err(),
            "{what} instead of an i32 was taken: {ended:?}"
        );
    }
}

#[test]
fn each_instance_has_imports_of_its_own() {
    let made = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&made);
    let script = Script::new().imports(move |replica, module| {
        assert_eq!(module.imports().len(), 1);
        let (id, slot) = (replica.id(), replica.slot());
        log.lock().unwrap().push((slot, replica.generation().get()));
        Ok(vec![function(move |call| {
            assert_eq!(call.replica.id(), id, "a call of another instance");
            call.results[0] = Value::I32(slot as i32);
            Ok(())
        })])
    });
    let rig = Setup::new(&guests::importer())
        .instances(3)
        .script(script)
        .start();
    assert_eq!(*made.lock().unwrap(), [(0, 1), (1, 1), (2, 1)]);
    for _ in 0..30 {
        assert!((0..3).contains(&rig.number("run", &[1])));
    }
    rig.reload("again");
    assert_eq!(made.lock().unwrap().split_off(3), [(0, 2), (1, 2), (2, 2)]);
    assert!((0..3).contains(&rig.number("run", &[1])));
}

#[test]
fn a_host_function_sees_the_memory_that_the_guest_has_just_grown() {
    let rig = hosted(|call| {
        let memory = call.replica.memory().unwrap();
        assert_eq!(memory.byte_len(), 1 << 16);
        assert_eq!(
            i32_of(&call_again(call, "grow", vec![Value::I32(3)])?[0]),
            1
        );
        assert_eq!(memory.byte_len(), 4 << 16);
        memory.write((4 << 16) - 4, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        memory.read((4 << 16) - 4, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        Ok(())
    })
    .start();
    rig.number("run", &[0]);
    assert_eq!(rig.stats().memory_bytes, 4 << 16);
}

#[test]
fn imported_globals_tables_and_memories_are_the_guests_own() {
    let wat = r#"(module
        (import "env" "base" (global $base i32))
        (import "env" "count" (global $count (mut i64)))
        (import "env" "object" (global $object externref))
        (import "env" "memory" (memory 1 10))
        (import "env" "table" (table $table 2 10 externref))
        (func (export "base") (result i32) (global.get $base))
        (func (export "count") (result i64)
            (global.set $count (i64.add (global.get $count) (i64.const 1))) (global.get $count))
        (func (export "object") (result externref) (global.get $object))
        (func (export "size") (result i32) (memory.size))
        (func (export "poke") (param i32) (i32.store (i32.const 0) (local.get 0)))
        (func (export "peek") (result i32) (i32.load (i32.const 0)))
        (func (export "slots") (result i32) (table.size $table)))"#;
    let script = Script::new()
        .import("env", "base", ImportValue::Global(Value::I32(42)))
        .import("env", "count", ImportValue::Global(Value::I64(10)))
        .import(
            "env",
            "object",
            ImportValue::Global(Value::Extern(Some(HostRef::new("given")))),
        )
        .import(
            "env",
            "memory",
            ImportValue::Memory {
                initial: 2,
                maximum: Some(5),
            },
        )
        .import(
            "env",
            "table",
            ImportValue::Table {
                initial: 3,
                maximum: Some(4),
            },
        );
    let rig = Setup::new(wat).instances(2).script(script).start();
    assert_eq!(
        rig.stats().memory_bytes,
        2 * (2 << 16),
        "imported memories count"
    );
    let leases = [rig.lease(), rig.lease()];
    for (index, lease) in leases.iter().enumerate() {
        let number = |name: &str| number(rig.call_in(lease, name, &[]).get());
        assert_eq!(
            (number("base"), number("size"), number("slots")),
            (42, 2, 3)
        );
        let count = values(rig.call_in(lease, "count", &[]).get());
        assert!(matches!(count.as_slice(), [Value::I64(11)]), "{count:?}");
        let object = values(rig.call_in(lease, "object", &[]).get());
        let [Value::Extern(Some(object))] = object.as_slice() else {
            panic!("{object:?}")
        };
        assert_eq!(object.downcast_ref(), Some(&"given"));
        values(
            rig.call_in(lease, "poke", &[Value::I32(index as i32 + 1)])
                .get(),
        );
    }
    for (index, lease) in leases.iter().enumerate() {
        assert_eq!(
            number(rig.call_in(lease, "peek", &[]).get()),
            index as i32 + 1
        );
        let mut bytes = [0; 4];
        lease
            .replica()
            .memory()
            .unwrap()
            .read(0, &mut bytes)
            .unwrap();
        assert_eq!(
            i32::from_le_bytes(bytes),
            index as i32 + 1,
            "it is the memory that is shown"
        );
        rig.release(lease);
    }
}

#[test]
fn a_host_call_that_is_under_way_is_no_reason_to_stop_the_manager_from_answering() {
    let door = Door::new();
    let rig = hosted(door.function()).start();
    let held = rig.call("run", &[Value::I32(5)]);
    assert_eq!(door.arrived(), 5);
    let stats = rig.stats();
    assert_eq!(
        (stats.gate.in_flight, stats.state),
        (1, ManagerState::Ready)
    );
    assert!(rig.replica(0).is_in_host_call());
    door.go();
    assert_eq!(number(held.get()), 5);
}
