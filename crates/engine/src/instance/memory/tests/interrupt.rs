//! Stopping guests that would never end, through instrumentation and the poll page.
#![cfg(unix)]

use std::time::{Duration, Instant};
use std::{panic, thread};

use wasmtime::{Extern, Inlining, MemoryType};

use super::super::{PollPage, configure, is_poll_fault, new_memory};
use super::*;
use crate::instance::instrument::{InstrumentOptions, instrument};

const FULL: MemoryOptions = MemoryOptions {
    reservation_bytes: 1 << 32,
    signals_based_traps: true,
};

fn interruptible(engine: &Engine, wat: &str) -> Guest {
    interruptible_with(engine, wat, &[])
}

fn interruptible_with(engine: &Engine, wat: &str, imports: &[Extern]) -> Guest {
    let wasm = wat::parse_str(wat).unwrap();
    let spliced = instrument(
        &wasm,
        &InstrumentOptions {
            polls: true,
            inlining: true,
        },
    )
    .unwrap();
    assert!(spliced.has_poll_memory);
    Guest::with_bytes(engine, &spliced.bytes, true, imports)
}

/// Takes the page away after a while.
fn stop_soon(poll: &PollPage, after: Duration) -> thread::JoinHandle<Instant> {
    let poll = poll.clone();
    thread::spawn(move || {
        thread::sleep(after);
        let at = Instant::now();
        poll.revoke().unwrap();
        at
    })
}

/// Calls `run`, which never ends, and stops it; returns how long that took.
fn stops(guest: &mut Guest) -> Duration {
    let poll = guest.created.poll.clone().unwrap();
    let stopper = stop_soon(&poll, Duration::from_millis(5));
    let error = guest.call::<(), ()>("run", ()).unwrap_err();
    let ended = Instant::now();
    assert!(
        is_out_of_bounds(&error) && is_poll_fault(&error),
        "{error:?}"
    );
    let latency = ended - stopper.join().unwrap();
    assert!(poll.is_revoked());
    poll.grant().unwrap();
    assert!(!poll.is_revoked());
    latency
}

/// Runs a test that would hang if a guest were not stopped: then it fails instead.
fn in_time(test: impl FnOnce() + Send + 'static) {
    let (done, ended) = crossbeam_channel::bounded(1);
    let runner = thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match ended.recv_timeout(Duration::from_secs(100)) {
        Err(crossbeam_channel::RecvTimeoutError::Timeout) => panic!("a guest was not stopped"),
        _ => runner
            .join()
            .unwrap_or_else(|cause| panic::resume_unwind(cause)),
    }
}

const FAN: &str = "calls that fan out";

/// Modules whose `run` never ends (in a lifetime) and whose `answer` gives 42.
#[expect(clippy::too_many_lines, reason = "a list")]
fn endless() -> Vec<(&'static str, String)> {
    let module = |body: &str| {
        format!(r#"(module {body} (func (export "answer") (result i32) i32.const 42))"#)
    };
    let run = |body: &str| module(&format!(r#"(memory 1) (func (export "run") {body})"#));
    // Calls that fan out without recursion: 2^64 of them.
    let fan = (0..64).fold(String::new(), |wat, i| {
        let next = i + 1;
        wat + &format!("(func $f{i} call $f{next} call $f{next})")
    });
    vec![
        ("an empty loop", run("loop br 0 end")),
        (
            "nested empty loops",
            run("loop loop loop br 0 end br 0 end br 0 end"),
        ),
        (
            "an inner loop behind another",
            run("(local i32) loop (br_if 0 (local.tee 0 (i32.const 0))) end loop br 0 end"),
        ),
        (
            "an inner loop that only loads",
            run("(local i32) loop (local.set 0 (i32.load (i32.const 8))) \
                 loop (br_if 0 (i32.eqz (i32.load (i32.const 8)))) end br 0 end"),
        ),
        (
            "a loop that branches back from many places",
            run(
                "(local i32) loop (local.set 0 (i32.xor (local.get 0) (i32.const 1))) \
                 (if (local.get 0) (then br 1) (else br 1)) end",
            ),
        ),
        (
            "a loop that repeats on a condition",
            run("loop (br_if 0 (i32.eqz (i32.load (i32.const 8)))) end"),
        ),
        (
            "a loop that repeats from within another",
            run("(local i32) loop (local.set 0 (i32.const 0)) loop \
                 (if (i32.gt_u (local.get 0) (i32.const 3)) (then br 2)) \
                 (local.set 0 (i32.add (local.get 0) (i32.const 1))) br 0 end end"),
        ),
        (
            "a loop with two conditions",
            run(
                "loop (br_if 0 (i32.load (i32.const 8))) (br_if 0 (i32.eqz (i32.load (i32.const 8)))) end",
            ),
        ),
        (
            "recursion in loops that do not repeat",
            module(
                r#"(func $a (param i32) (if (local.get 0) (then
                        loop (call $a (i32.sub (local.get 0) (i32.const 1)))
                             (call $a (i32.sub (local.get 0) (i32.const 1)))
                             (br_if 0 (i32.const 0)) end)))
                (func (export "run") (call $a (i32.const 70)))"#,
            ),
        ),
        (
            "a callee's loop, again and again",
            module(
                r#"(func $a (local i32) loop
                        (br_if 0 (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1))) (i32.const 9))) end)
                (func (export "run") loop call $a call $a call $a br 0 end)"#,
            ),
        ),
        (
            "a loop that counts in memory",
            run(
                "loop (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1))) br 0 end",
            ),
        ),
        (
            "bulk operations only",
            run(
                "loop (memory.fill (i32.const 0) (i32.const 1) (i32.const 65536)) \
                 (memory.copy (i32.const 0) (i32.const 9) (i32.const 60000)) br 0 end",
            ),
        ),
        (
            "a loop of growth",
            run("loop (drop (memory.grow (i32.const 0))) br 0 end"),
        ),
        (
            "a loop with parameters",
            run("i32.const 1 loop (param i32) br 0 end"),
        ),
        (
            "no memory",
            module(r#"(func (export "run") loop br 0 end)"#),
        ),
        (
            "a memory64",
            module(
                r#"(memory i64 1) (func (export "run") loop (i64.store (i64.const 0) (i64.const 1)) br 0 end)"#,
            ),
        ),
        (
            "several memories",
            module(
                r#"(memory 1) (memory 2 2) (memory i64 1)
                (func (export "run") loop (i32.store 1 (i32.const 0) (i32.load 0 (i32.const 0))) br 0 end)"#,
            ),
        ),
        (
            "a shared memory",
            module(
                r#"(memory 1 2 shared) (func (export "run") loop (i32.store (i32.const 0) (i32.const 1)) br 0 end)"#,
            ),
        ),
        (
            "all 65536 pages at the start",
            module(
                r#"(memory 65536) (func (export "run") loop (i32.store (i32.const -4) (i32.const 1)) br 0 end)"#,
            ),
        ),
        (
            "recursion",
            module(
                r#"(func $fib (param i32) (result i32)
                    (if (result i32) (i32.lt_s (local.get 0) (i32.const 2)) (then (local.get 0))
                    (else (i32.add (call $fib (i32.sub (local.get 0) (i32.const 1)))
                                   (call $fib (i32.sub (local.get 0) (i32.const 2)))))))
                (func (export "run") (drop (call $fib (i32.const 60))))"#,
            ),
        ),
        (
            "mutual recursion",
            module(
                r#"(func $a (param i32) (if (local.get 0) (then
                        (call $b (i32.sub (local.get 0) (i32.const 1))) (call $b (i32.sub (local.get 0) (i32.const 1))))))
                (func $b (param i32) (if (local.get 0) (then
                        (call $a (i32.sub (local.get 0) (i32.const 1))) (call $a (i32.sub (local.get 0) (i32.const 1))))))
                (func (export "run") (call $a (i32.const 70)))"#,
            ),
        ),
        (
            "recursion through a table",
            module(
                r#"(table funcref (elem $a)) (type $t (func (param i32)))
                (func $a (type $t) (if (local.get 0) (then
                    (call_indirect (type $t) (i32.sub (local.get 0) (i32.const 1)) (i32.const 0))
                    (call_indirect (type $t) (i32.sub (local.get 0) (i32.const 1)) (i32.const 0)))))
                (func (export "run") (call $a (i32.const 70)))"#,
            ),
        ),
        (
            "recursion through references",
            module(
                r#"(type $t (func (param i32))) (elem declare func $a)
                (func $a (type $t) (if (local.get 0) (then
                    (call_ref $t (i32.sub (local.get 0) (i32.const 1)) (ref.func $a))
                    (call_ref $t (i32.sub (local.get 0) (i32.const 1)) (ref.func $a)))))
                (func (export "run") (call $a (i32.const 70)))"#,
            ),
        ),
        (
            "tail calls",
            module(
                r#"(func $a return_call $b) (func $b return_call $a) (func (export "run") call $a)"#,
            ),
        ),
        (
            "tail calls through a table",
            module(
                r#"(table funcref (elem $a)) (func $a (return_call_indirect (i32.const 0)))
                (func (export "run") call $a)"#,
            ),
        ),
        (
            FAN,
            module(&format!(
                r#"{fan} (func $f64) (func (export "run") call $f0)"#
            )),
        ),
        (
            "a loop in the start of many callees",
            module(
                r#"(func $a (param i32) loop (br_if 0 (local.get 0)) end)
                (func (export "run") (call $a (i32.const 0)) (call $a (i32.const 0)) (call $a (i32.const 1)))"#,
            ),
        ),
    ]
}

#[test]
fn whatever_never_ends_can_be_stopped() {
    in_time(|| {
        for options in [FULL, SMALL] {
            for inlining in [Inlining::No, Inlining::Yes] {
                let mut config = Config::new();
                config.shared_memory(true).compiler_inlining(inlining);
                configure(&mut config, &options);
                let engine = Engine::new(&config).unwrap();
                for (what, wat) in endless() {
                    let wasm = wat::parse_str(&wat).unwrap();
                    let both = InstrumentOptions {
                        polls: true,
                        inlining: true,
                    };
                    let allowed = what != FAN || instrument(&wasm, &both).unwrap().inlining;
                    if !allowed && inlining == Inlining::Yes {
                        // The compiler would unfold it until memory ends.
                        continue;
                    }
                    let mut guest = interruptible(&engine, &wat);
                    for _ in 0..3 {
                        let latency = stops(&mut guest);
                        assert!(
                            latency < Duration::from_secs(1),
                            "{what} ({inlining:?}) took {latency:?}"
                        );
                        assert_eq!(guest.call::<(), i32>("answer", ()).unwrap(), 42, "{what}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_loop_over_imported_memories_stops() {
    in_time(|| {
        let engine = engine(Platform::NATIVE, &FULL);
        for (ty, declared) in [
            (MemoryType::new(1, None), "1"),
            (MemoryType::new(1, Some(2)), "1 2"),
            (MemoryType::shared(1, 2), "1 2 shared"),
            (MemoryType::new64(1, None), "i64 1"),
        ] {
            let index = if ty.is_64() { "i64" } else { "i32" };
            let wat = format!(
                r#"(module (import "m" "m" (memory {declared})) (memory $own 1)
                    (func (export "run") loop ({index}.store ({index}.const 0) ({index}.const 5)) br 0 end))"#
            );
            let wasm = wat::parse_str(&wat).unwrap();
            let spliced = instrument(
                &wasm,
                &InstrumentOptions {
                    polls: true,
                    inlining: true,
                },
            )
            .unwrap();
            let mut store = Store::new(&engine, ());
            let (memory, imported) = with_plan(
                MemoryPlan {
                    guests: 1,
                    ..MemoryPlan::default()
                },
                || new_memory(&mut store, &ty).unwrap(),
            );
            let module = Module::new(&engine, &spliced.bytes).unwrap();
            let plan = MemoryPlan {
                guests: spliced.defined_memories(),
                poll: spliced.has_poll_memory,
                ..MemoryPlan::default()
            };
            let (instance, created) = with_plan(plan, || {
                Instance::new(&mut store, &module, &[memory]).unwrap()
            });
            let mut guest = Guest {
                store,
                instance,
                created,
            };
            stops(&mut guest);
            let mut byte = [0];
            imported.guests[0].read(0, &mut byte).unwrap();
            assert_eq!(byte, [5]);
        }
    });
}

#[test]
fn a_thousand_stops_in_a_row() {
    in_time(|| {
        let engine = engine(Platform::NATIVE, &FULL);
        let mut guest = interruptible(
            &engine,
            r#"(module (memory 1)
                (func (export "run") loop (i32.store (i32.const 0) (i32.const 1)) br 0 end)
                (func (export "sum") (param i32) (result i32) (local i32)
                    loop
                        (local.set 1 (i32.add (local.get 1) (local.get 0)))
                        (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1))))
                    end
                    (local.get 1)))"#,
        );
        let poll = guest.created.poll.clone().unwrap();
        for i in 0..1000 {
            let stopper = stop_soon(&poll, Duration::from_micros(i % 200));
            let error = guest.call::<(), ()>("run", ()).unwrap_err();
            assert!(is_poll_fault(&error));
            stopper.join().unwrap();
            poll.grant().unwrap();
            assert_eq!(guest.call::<_, i32>("sum", 1000).unwrap(), 500_500);
        }
    });
}

#[test]
fn a_call_of_a_revoked_instance_stops_at_once() {
    in_time(|| {
        let engine = engine(Platform::NATIVE, &FULL);
        let mut guest = interruptible(&engine, r#"(module (func (export "run") loop br 0 end))"#);
        let poll = guest.created.poll.clone().unwrap();
        poll.revoke().unwrap();
        poll.revoke().unwrap();
        assert!(is_poll_fault(&guest.call::<(), ()>("run", ()).unwrap_err()));
        drop(guest);
        // The handle may outlive the store.
        poll.grant().unwrap();
        poll.revoke().unwrap();
    });
}

#[test]
fn a_guests_own_faults_are_told_apart() {
    in_time(|| {
        let engine = engine(Platform::NATIVE, &FULL);
        let mut guest = interruptible(
            &engine,
            r#"(module (memory 0) (memory 1)
                (func (export "run") loop br 0 end)
                (func (export "empty") (result i32) (i32.load 0 (i32.const 0)))
                (func (export "beyond") (result i32) (i32.load 1 (i32.const 65536)))
                (func (export "far") (result i32) (i32.load 1 offset=0xffff0000 (i32.const 0)))
                (func (export "fill") (memory.fill 1 (i32.const 1) (i32.const 0) (i32.const 65536))))"#,
        );
        let errors = [
            guest.call::<(), i32>("empty", ()).unwrap_err(),
            guest.call::<(), i32>("beyond", ()).unwrap_err(),
            guest.call::<(), i32>("far", ()).unwrap_err(),
            guest.call::<(), ()>("fill", ()).unwrap_err(),
        ];
        for error in errors {
            assert!(
                is_out_of_bounds(&error) && !is_poll_fault(&error),
                "{error:?}"
            );
        }
        stops(&mut guest);
    });
}

#[test]
fn other_instances_of_the_module_run_on() {
    in_time(|| {
        let engine = engine(Platform::NATIVE, &FULL);
        let wat = r#"(module (memory 1)
            (func (export "run") loop br 0 end)
            (func (export "count") (param i64) (result i64) (local i64)
                loop
                    (local.set 1 (i64.add (local.get 1) (i64.const 1)))
                    (br_if 0 (i64.lt_u (local.get 1) (local.get 0)))
                end
                local.get 1))"#;
        let mut stopped = interruptible(&engine, wat);
        let mut other = interruptible(&engine, wat);
        let counting =
            thread::spawn(move || other.call::<_, i64>("count", 200_000_000_i64).unwrap());
        for _ in 0..5 {
            stops(&mut stopped);
        }
        assert_eq!(counting.join().unwrap(), 200_000_000);
    });
}

#[test]
fn two_instances_in_one_store_are_stopped_each_by_its_own_page() {
    in_time(|| {
        let engine = engine(Platform::NATIVE, &FULL);
        let wat = r#"(module (memory 1) (func (export "run") loop br 0 end) (func (export "oob") (result i32) (i32.load (i32.const -1))))"#;
        let wasm = wat::parse_str(wat).unwrap();
        let spliced = instrument(
            &wasm,
            &InstrumentOptions {
                polls: true,
                inlining: true,
            },
        )
        .unwrap();
        let mut guest = Guest::with_bytes(&engine, &spliced.bytes, true, &[]);
        let module = Module::new(&engine, &spliced.bytes).unwrap();
        let (second, created) = with_plan(
            MemoryPlan {
                guests: 1,
                poll: true,
                ..MemoryPlan::default()
            },
            || Instance::new(&mut guest.store, &module, &[]).unwrap(),
        );
        stops(&mut guest);
        guest.instance = second;
        guest.created = created;
        stops(&mut guest);
        assert!(is_out_of_bounds(
            &guest.call::<(), i32>("oob", ()).unwrap_err()
        ));
    });
}

#[test]
fn imports_and_exports_stay_as_they_were() {
    in_time(|| {
        let engine = engine(Platform::NATIVE, &FULL);
        let wasm = wat::parse_str(
            r#"(module $a_name (import "a" "b" (func)) (import "a" "m" (memory 1)) (import "a" "g" (global i32))
                (memory (export "two") 2) (table (export "t") 1 funcref)
                (func (export "f") (param i64) (result f32) loop br 0 end unreachable)
                (global (export "g") i32 (i32.const 1)))"#,
        )
        .unwrap();
        let spliced = instrument(
            &wasm,
            &InstrumentOptions {
                polls: true,
                inlining: true,
            },
        )
        .unwrap();
        let (before, after) = (
            Module::new(&engine, &wasm).unwrap(),
            Module::new(&engine, &spliced.bytes).unwrap(),
        );
        assert_eq!(after.name(), Some("a_name"));
        let describe = |m: &Module| {
            let imports: Vec<_> = m
                .imports()
                .map(|i| format!("{} {} {:?}", i.module(), i.name(), i.ty()))
                .collect();
            let hidden = spliced.state.prefix.as_str();
            let exports: Vec<_> = m
                .exports()
                .filter(|e| !e.name().starts_with(hidden))
                .map(|e| format!("{} {:?}", e.name(), e.ty()))
                .collect();
            (imports, exports)
        };
        assert_eq!(describe(&before), describe(&after));
    });
}
