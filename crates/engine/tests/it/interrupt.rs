//! Stopping what runs, what waits, and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use wasm_molt_engine::{
    CallLimits, Error, ErrorCode, HostRef, OnDrainTimeout, Outcome, ReloadOptions, Stop, Value,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::inside::call_again;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number, trap};
use wasm_molt_testkit::wait::eventually;

/// Both ways of stopping: the poll page, and epochs where faults are not signals.
fn both(setup: impl Fn() -> Setup) -> [Setup; 2] {
    [
        setup(),
        setup().options(|o| o.engine.signals_based_traps = false),
    ]
}

fn at_door(door: &Door) -> Setup {
    Setup::new(&guests::importer()).script(Script::new().function("host", door.function()))
}

/// Every way of never ending.
const ENDLESS: [(&str, &[Value]); 4] = [
    ("spin", &[]),
    ("bare", &[]),
    ("copy", &[]),
    ("fib", &[Value::I32(1000)]),
];

fn aborted() -> Stop {
    Stop::Aborted(HostRef::new("reason"))
}

#[track_caller]
fn assert_aborted(ended: wasm_molt_engine::Result<Outcome>) {
    let Err(Error::Aborted(reason)) = &ended else {
        panic!("{ended:?}")
    };
    assert_eq!(
        reason.downcast_ref(),
        Some(&"reason"),
        "the very reason comes back"
    );
}

#[test]
fn a_timeout_stops_whatever_runs_and_the_instance_is_replaced() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.start();
        for (count, (name, args)) in ENDLESS.into_iter().enumerate() {
            // On a busy machine one may time out before it has got its thread.
            loop {
                let error = rig.call_for(10, name, args).get().unwrap_err();
                assert_eq!(error.code(), Some(ErrorCode::Timeout), "{name}: {error}");
                assert!(error.to_string().contains("timeoutMs = 10"), "{error}");
                if !error.to_string().contains("still waiting") {
                    break;
                }
            }
            assert_eq!(rig.number("well", &[]), 7);
            assert_eq!(rig.stats().generation, count as u64 + 2);
        }
        assert_eq!(rig.stats().calls.interrupted, 4);
        assert_eq!(rig.stats().calls.trapped, 0, "a stop is no trap");
    }
}

#[test]
fn a_signal_stops_whatever_runs_with_its_reason() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.start();
        for (name, args) in ENDLESS {
            let (call, control) = rig.call_abortable(name, args);
            wasm_molt_testkit::wait::eventually("the call runs", || {
                rig.stats().times.wait.count
                    > rig.stats().calls.completed + rig.stats().calls.interrupted
            });
            control.stop(aborted());
            control.stop(Stop::Interrupted("too late: the first stop wins".into()));
            assert_aborted(call.get());
            assert_eq!(rig.number("well", &[]), 7);
        }
    }
}

#[test]
fn the_limit_of_all_calls_holds_for_each() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.options(|o| o.limits.timeout_ms = Some(10)).start();
        for (name, args) in ENDLESS {
            assert_eq!(
                code(rig.call(name, args).get()),
                ErrorCode::Timeout,
                "{name}"
            );
        }
        assert_eq!(rig.number_in_time("well", &[]), 7);
    }
}

#[test]
fn the_shorter_of_two_timeouts_counts() {
    let rig = Setup::new(&guests::spinner())
        .options(|o| o.limits.timeout_ms = Some(5))
        .start();
    let error = rig.call_for(20_000, "spin", &[]).get().unwrap_err();
    assert!(error.to_string().contains("timeoutMs = 5"), "{error}");
    let rig = Setup::new(&guests::spinner())
        .options(|o| o.limits.timeout_ms = Some(20_000))
        .start();
    let error = rig.call_for(5, "spin", &[]).get().unwrap_err();
    assert!(error.to_string().contains("timeoutMs = 5"), "{error}");
}

#[test]
fn a_synchronous_call_has_the_limit_too() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup
            .at_home()
            .options(|o| o.limits.timeout_ms = Some(10))
            .start();
        for (name, args) in ENDLESS {
            assert_eq!(
                code(rig.call_sync(name, args)),
                ErrorCode::Timeout,
                "{name}"
            );
            // A busy machine may take that long for a call that ends as well.
            let well = loop {
                match rig.call_sync("well", &[]) {
                    Err(error) if error.code() == Some(ErrorCode::Timeout) => {}
                    ended => break ended.unwrap(),
                }
            };
            assert!(matches!(well.as_slice(), [Value::I32(7)]), "{name}");
        }
    }
}

#[test]
fn guests_look_up_and_go_on_until_their_thread_must_end() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let asked = Arc::new(AtomicUsize::new(0));
        let is_ending = Arc::new(AtomicBool::new(false));
        let rig = {
            let (asked, is_ending) = (Arc::clone(&asked), Arc::clone(&is_ending));
            let ending = move || {
                asked.fetch_add(1, Ordering::SeqCst);
                is_ending.load(Ordering::SeqCst)
            };
            setup.at_home().script(Script::new().ending(ending)).start()
        };
        for (name, args) in ENDLESS {
            // A pool thread and the home thread, in turn.
            for at_home in [false, true] {
                asked.store(0, Ordering::SeqCst);
                is_ending.store(false, Ordering::SeqCst);
                let ended = thread::scope(|scope| {
                    scope.spawn(|| {
                        eventually("it looks up, and goes on", || {
                            asked.load(Ordering::SeqCst) >= 3
                        });
                        is_ending.store(true, Ordering::SeqCst);
                    });
                    if at_home {
                        rig.call_sync(name, args).map(drop)
                    } else {
                        rig.call(name, args).get().map(drop)
                    }
                });
                let error = ended.unwrap_err();
                assert_eq!(error.code(), Some(ErrorCode::Interrupted), "{name}");
                assert!(error.to_string().contains("thread is ending"), "{error}");
                is_ending.store(false, Ordering::SeqCst);
                assert_eq!(rig.number("well", &[]), 7);
            }
        }
        assert_eq!(rig.stats().calls.trapped, 0, "looking up is no trap");
    }
}

#[test]
fn start_functions_have_the_limit_too() {
    let endless = [
        "(module (memory 1) (func $s (loop br 0)) (start $s))",
        "(module (func $s (loop br 0)) (start $s))",
        r#"(module (func (export "_initialize") (loop br 0)))"#,
    ];
    for wat in endless {
        for setup in both(|| Setup::new(wat)) {
            let error = setup
                .options(|o| o.limits.timeout_ms = Some(20))
                .start_error();
            assert_eq!(error.code(), Some(ErrorCode::Timeout), "{wat}: {error}");
        }
    }
}

#[test]
fn a_call_that_waits_too_long_never_runs() {
    let door = Door::new();
    let rig = at_door(&door).start();
    let held = rig.call("run", &[Value::I32(1)]);
    door.arrived();
    let late = rig.call_for(5, "run", &[Value::I32(2)]);
    assert_eq!(code(late.get()), ErrorCode::Timeout);
    door.open();
    assert_eq!(number(held.get()), 1);
    assert_eq!(rig.number("run", &[3]), 3);
    assert_eq!(door.arrived(), 3, "2 never came");
    assert_eq!(
        rig.stats().generation,
        1,
        "nobody was replaced for a call that never ran"
    );
}

#[test]
fn a_call_with_no_time_at_all_is_answered_while_others_run() {
    let door = Door::new();
    let rig = at_door(&door).start();
    let held = rig.call("run", &[Value::I32(1)]);
    door.arrived();
    // The timer may be faster than the admission.
    let calls: Vec<_> = (0..500)
        .map(|_| rig.call_for(0, "run", &[Value::I32(2)]))
        .collect();
    for call in calls {
        assert_eq!(code(call.get()), ErrorCode::Timeout);
    }
    assert!(held.is_open());
    door.open();
    assert_eq!(number(held.get()), 1);
    assert!(door.is_quiet(), "none of them ran");
}

#[test]
fn a_call_that_waits_at_a_closed_gate_times_out_too() {
    let rig = Setup::new(&guests::adder()).start();
    let hold = rig
        .faults
        .hold(wasm_molt_testkit::faults::Point::Restore, 0);
    let hold_save = rig.faults.hold(wasm_molt_testkit::faults::Point::Save, 0);
    let reload = rig.ask_reload(wasm_molt_testkit::rig::because("held"));
    hold_save.wait();
    let late = rig.call_for(5, "add", &[Value::I32(1), Value::I32(1)]);
    assert_eq!(code(late.get()), ErrorCode::Timeout);
    hold_save.release();
    drop(hold);
    reload.get().unwrap();
}

#[test]
fn a_signal_while_it_waits_answers_at_once() {
    let door = Door::new();
    let rig = at_door(&door).start();
    let held = rig.call("run", &[Value::I32(1)]);
    door.arrived();
    let (waiting, control) = rig.call_abortable("run", &[Value::I32(2)]);
    control.stop(aborted());
    assert_aborted(waiting.get());
    control.stop(aborted());
    door.open();
    assert_eq!(number(held.get()), 1);
    control.stop(aborted());
    assert_eq!(rig.number("run", &[3]), 3);
    assert_eq!(rig.stats().generation, 1);
}

#[test]
fn a_host_call_that_waits_hears_of_the_stop() {
    let door = Door::new();
    let rig = at_door(&door).start();
    let (held, control) = rig.call_abortable("run", &[Value::I32(1)]);
    door.arrived();
    control.stop(aborted());
    assert_aborted(held.get());
    // On a busy machine one may time out before it has got there.
    loop {
        let timed = rig.call_for(10, "run", &[Value::I32(2)]);
        assert_eq!(code(timed.get()), ErrorCode::Timeout);
        if !door.is_quiet() {
            break;
        }
    }
    assert_eq!(door.arrived(), 2);
    door.open();
    assert_eq!(rig.number("run", &[3]), 3);
}

#[test]
fn a_stop_during_a_deaf_host_call_takes_effect_after_it() {
    for setup in both(|| Setup::new(&guests::importer())) {
        let door = Door::deaf();
        let rig = setup
            .script(Script::new().function("host", door.function()))
            .start();
        let (held, control) = rig.call_abortable("after", &[Value::I32(1)]);
        door.arrived();
        control.stop(aborted());
        assert!(held.is_open(), "the host does not listen");
        door.open();
        assert_aborted(held.get());
        assert_eq!(rig.number("twice", &[2]), 4);
    }
}

#[test]
fn a_stop_in_a_nested_call_unwinds_everything() {
    for setup in both(|| Setup::new(&guests::importer())) {
        let script = Script::new().function("host", |call| {
            call_again(call, "spin", Vec::new()).map(drop)
        });
        let rig = setup.script(script).start();
        assert_eq!(
            code(rig.call_for(10, "run", &[Value::I32(1)]).get()),
            ErrorCode::Timeout
        );
        assert_eq!(rig.number("twice", &[2]), 4);
    }
}

#[test]
fn a_host_that_swallows_the_stop_does_not_get_to_go_on_for_ever() {
    for setup in both(|| Setup::new(&guests::importer())) {
        let script = Script::new().function("host", |call| {
            drop(call_again(call, "spin", Vec::new()));
            Ok(())
        });
        let rig = setup.script(script).start();
        let ended = rig.call_for(10, "after", &[Value::I32(1)]).get();
        assert_eq!(code(ended), ErrorCode::Timeout);
    }
}

#[test]
fn neighbours_run_on() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.instances(2).start();
        let (one, stop_one) = rig.call_abortable("spin", &[]);
        let (other, stop_other) = rig.call_abortable("fib", &[Value::I32(1000)]);
        wasm_molt_testkit::wait::eventually("both run", || rig.stats().times.wait.count == 2);
        stop_one.stop(aborted());
        assert_aborted(one.get());
        for _ in 0..50 {
            assert_eq!(rig.number("well", &[]), 7);
            assert_eq!(code(rig.call_for(1, "spin", &[]).get()), ErrorCode::Timeout);
        }
        assert!(other.is_open(), "it was not meant");
        stop_other.stop(aborted());
        assert_aborted(other.get());
    }
}

#[test]
fn a_stop_just_after_another_instances_stop_is_obeyed() {
    // Epochs: the other's stop has this one look at its flag, and its own could fall between that
    // look and the next deadline, and was lost for ever.
    let door = Door::deaf();
    let epochs = |setup: Setup| {
        setup
            .options(|o| o.engine.signals_based_traps = false)
            .start()
    };
    // The same guest, so that they share the engine and its epoch.
    let rig = epochs(at_door(&door));
    let other = epochs(at_door(&door));
    for round in 0..1500 {
        let (inside, stop_inside) = other.call_abortable("run", &[Value::I32(1)]);
        let (spinning, stop_spinning) = rig.call_abortable("spin", &[]);
        door.arrived();
        wasm_molt_testkit::wait::eventually("it spins", || {
            rig.stats().times.wait.count == round + 1
        });
        stop_inside.stop(aborted());
        // Each round meets another moment of the reaction.
        for _ in 0..round % 50 {
            std::hint::spin_loop();
        }
        stop_spinning.stop(aborted());
        assert_aborted(spinning.get());
        door.go();
        let _ = inside.get();
    }
}

#[test]
fn other_managers_of_the_same_engine_run_on() {
    for index in 0..2 {
        let setup = || {
            both(|| Setup::new(&guests::spinner()))
                .into_iter()
                .nth(index)
                .unwrap()
        };
        let (rig, other) = (setup().start(), setup().start());
        let (running, stop) = other.call_abortable("spin", &[]);
        for _ in 0..20 {
            assert_eq!(code(rig.call_for(1, "spin", &[]).get()), ErrorCode::Timeout);
        }
        drop(rig);
        assert!(running.is_open());
        stop.stop(aborted());
        assert_aborted(running.get());
    }
}

#[test]
fn a_stop_that_comes_too_late_never_hits_the_next_call() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.start();
        let mut outcomes = [0, 0];
        for _ in 0..2000 {
            let (call, control) = rig.call_abortable("well", &[]);
            control.stop(aborted());
            match call.get() {
                Err(Error::Aborted(_)) => outcomes[0] += 1,
                ended => {
                    assert_eq!(number(ended), 7);
                    outcomes[1] += 1;
                }
            }
            assert_eq!(rig.number("well", &[]), 7, "after {outcomes:?}");
        }
        assert_eq!(rig.stats().calls.trapped, 0);
    }
}

#[test]
fn a_deadline_that_passes_as_the_call_ends_does_no_harm() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.start();
        for _ in 0..300 {
            match rig.call_for(1, "fib", &[Value::I32(20)]).get() {
                Err(error) => assert_eq!(error.code(), Some(ErrorCode::Timeout)),
                ended => assert_eq!(number(ended), 6765),
            }
            assert_eq!(rig.number("well", &[]), 7);
        }
    }
}

#[test]
fn a_thousand_stops_in_a_row() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.options(|o| o.limits.timeout_ms = Some(1)).start();
        for n in 0..500 {
            let (name, args) = ENDLESS[n % ENDLESS.len()];
            assert_eq!(
                code(rig.call(name, args).get()),
                ErrorCode::Timeout,
                "{name}"
            );
        }
        rig.wait_generation(501);
        assert_eq!(rig.stats().calls.interrupted, 500);
    }
}

#[test]
fn a_stop_takes_effect_soon() {
    for setup in both(|| Setup::new(&guests::spinner())) {
        let rig = setup.start();
        let mut times = Vec::new();
        for _ in 0..20 {
            let before = rig.stats().times.wait.count;
            let (call, control) = rig.call_abortable("spin", &[]);
            wasm_molt_testkit::wait::eventually("the call runs", || {
                rig.stats().times.wait.count > before
            });
            let asked = Instant::now();
            control.stop(aborted());
            assert_aborted(call.get());
            times.push(asked.elapsed());
        }
        times.sort_unstable();
        // Measured: 0.1 to 0.2 ms. The bound is for loaded machines.
        assert!(
            times[times.len() / 2] < Duration::from_millis(50),
            "{times:?}"
        );
    }
}

#[test]
fn a_guests_own_fault_is_not_taken_for_a_stop() {
    let wat = r#"(module (memory 1)
        (func (export "wild") (param i32) (result i32) (i32.load (local.get 0)))
        (func (export "far") (result i32) (i32.load offset=4294901760 (i32.const 0)))
        (func (export "well") (result i32) (i32.const 7)))"#;
    for setup in both(|| Setup::new(wat)) {
        let rig = setup.start();
        for _ in 0..20 {
            let ended = rig.call_for(60_000, "wild", &[Value::I32(-5)]).get();
            assert_eq!(trap(ended), "out-of-bounds-memory");
            let ended = rig.call_for(60_000, "far", &[]).get();
            assert_eq!(trap(ended), "out-of-bounds-memory");
            assert_eq!(rig.number("well", &[]), 7);
        }
    }
}

#[test]
fn fuel_runs_out() {
    let setup = Setup::new(&guests::spinner()).options(|o| {
        o.engine.fuel = true;
        o.limits.fuel = Some(10_000);
    });
    let rig = setup.start();
    for (name, args) in [ENDLESS[0], ENDLESS[1], ENDLESS[3]] {
        let error = rig.call(name, args).get().unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::OutOfFuel), "{name}: {error}");
        assert!(error.to_string().contains("10000"), "{error}");
        assert_eq!(rig.number("well", &[]), 7, "each call has a full tank");
    }
    assert_eq!(rig.stats().calls.interrupted, 3);
}

#[test]
fn nested_calls_burn_the_fuel_of_the_outer_one() {
    let nested = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&nested);
    let script = Script::new().function("host", move |call| {
        count.fetch_add(1, Ordering::SeqCst);
        call_again(call, "again", vec![Value::I32(1)]).map(drop)
    });
    let setup = Setup::new(&guests::importer()).script(script).options(|o| {
        o.engine.fuel = true;
        o.limits.fuel = Some(100);
        o.limits.stack = Some(1 << 20);
    });
    let rig = setup.start();
    assert_eq!(
        code(rig.call("run", &[Value::I32(1)]).get()),
        ErrorCode::OutOfFuel
    );
    assert!(
        (2..100).contains(&nested.load(Ordering::SeqCst)),
        "{nested:?} nested calls"
    );
}

#[test]
fn fuel_that_is_counted_but_not_limited_does_not_run_out() {
    let rig = Setup::new(&guests::spinner())
        .options(|o| o.engine.fuel = true)
        .start();
    assert_eq!(rig.number("fib", &[20]), 6765);
    assert_eq!(
        code(rig.call_for(10, "spin", &[]).get()),
        ErrorCode::Timeout
    );
}

#[test]
fn start_functions_burn_fuel_too() {
    let setup = Setup::new("(module (func $s (loop br 0)) (start $s))").options(|o| {
        o.engine.fuel = true;
        o.limits.fuel = Some(1000);
    });
    assert_eq!(
        code(Err::<(), _>(setup.start_error())),
        ErrorCode::OutOfFuel
    );
}

#[test]
fn what_is_not_interruptible_ends_by_itself() {
    let door = Door::deaf();
    let setup = at_door(&door).options(|o| o.engine.interruptible = false);
    let rig = setup.start();
    let (held, stop_held) = rig.call_abortable("run", &[Value::I32(1)]);
    door.arrived();
    stop_held.stop(aborted());
    // Whoever waits behind it can still be stopped: nothing runs there.
    assert_eq!(
        code(rig.call_for(5, "run", &[Value::I32(2)]).get()),
        ErrorCode::Timeout
    );
    assert!(held.is_open(), "it was stopped, and it runs on");
    door.open();
    assert_eq!(number(held.get()), 1, "and ends as it would have");
    assert_eq!(rig.number("twice", &[3]), 6);
    assert_eq!(rig.stats().generation, 1);
}

#[test]
fn a_host_that_listens_can_be_stopped_even_where_code_cannot() {
    let door = Door::new();
    let rig = at_door(&door)
        .options(|o| o.engine.interruptible = false)
        .start();
    assert_eq!(
        code(rig.call_for(5, "run", &[Value::I32(1)]).get()),
        ErrorCode::Timeout
    );
}

#[test]
fn nobody_is_stopped_who_does_not_run() {
    let rig = Setup::new(&guests::spinner()).start();
    let interrupter = Arc::clone(rig.replica(0).interrupter());
    assert!(!interrupter.stop_current(aborted()));
    assert_eq!(rig.number("well", &[]), 7);
    let (call, _control) = rig.call_abortable("spin", &[]);
    wasm_molt_testkit::wait::eventually("the call runs", || interrupter.stop_current(aborted()));
    assert_aborted(call.get());
    assert!(!interrupter.stop_current(aborted()));
    assert_eq!(rig.number("well", &[]), 7);
}

#[test]
fn many_threads_may_stop_the_same_call() {
    let rig: Rig = Setup::new(&guests::spinner()).start();
    for _ in 0..50 {
        let (call, control) = rig.call_abortable("spin", &[]);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| control.stop(aborted()));
            }
        });
        assert_aborted(call.get());
        assert_eq!(rig.number("well", &[]), 7);
    }
}

#[test]
fn limits_that_nobody_set_cost_nothing_and_stop_nothing() {
    let rig = Setup::new(&guests::adder()).start();
    let args = [Value::I32(1), Value::I32(2)];
    let (call, control) = rig.call_with("add", &args, CallLimits::default());
    assert!(control.is_none());
    assert_eq!(number(call.get()), 3);
    // Longer than any clock can hold.
    assert_eq!(number(rig.call_for(u64::MAX, "add", &args).get()), 3);
}

/// What a reload that does not want to wait any longer does to those in flight.
fn impatient() -> ReloadOptions {
    ReloadOptions {
        drain_timeout: Some(Duration::from_millis(5)),
        on_drain_timeout: OnDrainTimeout::Interrupt,
        ..because("impatient")
    }
}

#[test]
fn an_interrupt_reaches_those_that_have_an_instance_and_no_thread_yet() {
    for has_control in [false, true] {
        for has_home in [false, true] {
            let setup = || {
                Setup::new(&guests::spinner()).options(|o| {
                    (o.instances, o.threads, o.has_home) = (2, Some(1), has_home);
                })
            };
            for setup in both(setup) {
                let rig = setup.start();
                let endless = || match has_control {
                    true => rig.call_abortable("spin", &[]).0,
                    false => rig.call("bare", &[]),
                };
                let calls = [endless(), endless()];
                let report = rig.ask_reload(impatient()).get().unwrap();
                assert_eq!((report.generation.get(), report.drained), (2, 2));
                for call in calls {
                    assert_eq!(code(call.get()), ErrorCode::Interrupted);
                }
                assert_eq!(rig.number("well", &[]), 7);
                assert_eq!(rig.stats().gate.retired, 0);
            }
        }
    }
}

#[test]
fn an_interrupt_takes_leases_away_and_refuses_what_waits_in_them() {
    for setup in both(|| Setup::new(&guests::spinner()).instances(2)) {
        let rig = setup.start();
        let (idle, busy) = (rig.lease(), rig.lease());
        let running = rig.call_in(&busy, "spin", &[]);
        let queued: Vec<_> = (0..3).map(|_| rig.call_in(&busy, "well", &[])).collect();
        let waiting = rig.call("well", &[]);
        let asked = rig.ask_lease().0;
        let report = rig.ask_reload(impatient()).get().unwrap();
        assert_eq!((report.drained, report.queued), (2, 2));
        assert_eq!(code(running.get()), ErrorCode::Interrupted);
        for call in queued {
            assert_eq!(code(call.get()), ErrorCode::Interrupted);
        }
        for lease in [&idle, &busy] {
            assert_eq!(code(rig.enter(lease, drop)), ErrorCode::StaleHandle);
            let late = rig.call_in(lease, "well", &[]).get();
            assert_eq!(code(late), ErrorCode::StaleHandle);
            assert!(lease.replica().is_released());
            // Whoever held it may still say so.
            rig.release(lease);
        }
        // Those who waited at the gate were not in flight.
        assert_eq!(number(waiting.get()), 7);
        rig.release(&asked.get().unwrap());
    }
}

#[test]
fn an_interrupt_ends_waits_for_the_host() {
    let door = Door::new();
    for setup in both(|| at_door(&door)) {
        let rig = setup.start();
        let held = rig.call("run", &[Value::I32(1)]);
        door.arrived();
        assert_eq!(rig.ask_reload(impatient()).get().unwrap().drained, 1);
        assert_eq!(code(held.get()), ErrorCode::Interrupted);
        assert_eq!(rig.number("twice", &[4]), 8);
    }
}
