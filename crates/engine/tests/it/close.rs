//! The end: gracefully, at once, from anywhere and in any state.

use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;
use wasm_molt_engine::{
    CacheChoice, CallLimits, Error, ErrorCode, Host, Manager, ManagerOptions, ManagerState,
    OnDrainTimeout, ReloadOptions, Stop, Value, Work,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::{Script, TestHost};
use wasm_molt_testkit::inside::call_leased;
use wasm_molt_testkit::quiet::work;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number, trap};
use wasm_molt_testkit::wait::{Answer, PATIENCE, answer, eventually};

fn counter() -> Setup {
    Setup::new(&guests::counter())
}

fn at_door(door: &Door) -> Setup {
    Setup::new(&guests::importer()).script(Script::new().function("host", door.function()))
}

fn both(setup: impl Fn() -> Setup) -> [Rig; 2] {
    [setup().start(), setup().at_home().start()]
}

/// With and without a home, not started.
fn both_new(setup: impl Fn() -> Setup) -> [Rig; 2] {
    [setup().create(), setup().at_home().create()]
}

#[track_caller]
fn assert_over(rig: &Rig) {
    assert_eq!(rig.manager.state(), ManagerState::Closed);
    assert!(rig.manager.replica(0).is_none());
    assert_eq!(rig.stats().memory_bytes, 0);
}

/// A saving and restoring counter.
fn carrying() -> Setup {
    counter().script(
        Script::new()
            .save(|_, _| Ok(Some(wasm_molt_engine::HostRef::new(()))))
            .restore(|_, _, _| Ok(())),
    )
}

#[test]
fn close_waits_for_what_runs_and_for_what_waits() {
    let door = Door::new();
    for rig in both(|| at_door(&door)) {
        let old = rig.replica(0);
        let running = rig.call("run", &[Value::I32(1)]);
        door.arrived();
        let waiting: Vec<_> = (0..10)
            .map(|n| rig.call("twice", &[Value::I32(n)]))
            .collect();
        let closed = rig.close(None);
        assert_eq!(rig.manager.state(), ManagerState::Closing);
        assert_eq!(
            code(rig.call("twice", &[Value::I32(1)]).get()),
            ErrorCode::Closed
        );
        assert_eq!(code(rig.ask_lease().0.get()), ErrorCode::Closed);
        assert_eq!(
            code(rig.ask_reload(because("too late")).get()),
            ErrorCode::Closed
        );
        assert_eq!(code(rig.reload_now(because("too late"))), ErrorCode::Closed);
        assert!(closed.is_open());
        door.go();
        assert_eq!(number(running.get()), 1);
        for (n, call) in waiting.into_iter().enumerate() {
            assert_eq!(number(call.get()), 2 * n as i32);
        }
        closed.get().unwrap();
        assert!(old.is_released());
        assert_over(&rig);
    }
}

#[test]
fn every_caller_gets_the_same_completion() {
    let door = Door::new();
    for rig in both(|| at_door(&door)) {
        let running = rig.call("run", &[Value::I32(1)]);
        door.arrived();
        let closed: Vec<_> = (0..5).map(|_| rig.close(None)).collect();
        assert!(closed.iter().all(Answer::is_open));
        door.go();
        assert_eq!(number(running.get()), 1);
        closed.into_iter().for_each(|closed| closed.get().unwrap());
        rig.close(None).get().unwrap();
        rig.destroy().get().unwrap();
        rig.close(Some(Duration::ZERO)).get().unwrap();
        assert_over(&rig);
    }
}

#[test]
fn a_close_that_takes_too_long_can_be_repeated_or_forced() {
    let door = Door::new();
    for (force, rig) in both(|| at_door(&door)).into_iter().enumerate() {
        let held = rig.call("run", &[Value::I32(1)]);
        door.arrived();
        for timeout in [Duration::ZERO, Duration::from_millis(5)] {
            let error = rig.close(Some(timeout)).get().unwrap_err();
            let Error::DrainTimeout { in_flight, .. } = error else {
                panic!("{error:?}")
            };
            assert_eq!(in_flight, 1);
            assert_eq!(rig.manager.state(), ManagerState::Closing);
        }
        assert_eq!(
            code(rig.call("twice", &[Value::I32(1)]).get()),
            ErrorCode::Closed
        );
        if force == 0 {
            rig.destroy().get().unwrap();
            assert_eq!(code(held.get()), ErrorCode::Interrupted);
        } else {
            door.go();
            assert_eq!(number(held.get()), 1);
            rig.close(None).get().unwrap();
        }
        assert_over(&rig);
    }
}

#[test]
fn destroy_stops_what_runs_and_refuses_what_waits() {
    for signals in [true, false] {
        let setup = || {
            let setup = Setup::new(&guests::spinner()).instances(2);
            setup.options(|o| o.engine.signals_based_traps = signals)
        };
        for rig in both(setup) {
            let running = [rig.call("spin", &[]), rig.call("fib", &[Value::I32(1000)])];
            eventually("both run", || rig.stats().times.wait.count == 2);
            let waiting: Vec<_> = (0..5).map(|_| rig.call("well", &[])).collect();
            let lease = rig.ask_lease().0;
            let destroyed = [rig.destroy(), rig.destroy()];
            let closed = rig.close(None);
            running
                .into_iter()
                .for_each(|call| assert_eq!(code(call.get()), ErrorCode::Interrupted));
            waiting
                .into_iter()
                .for_each(|call| assert_eq!(code(call.get()), ErrorCode::Closed));
            assert_eq!(code(lease.get()), ErrorCode::Closed);
            destroyed
                .into_iter()
                .for_each(|destroyed| destroyed.get().unwrap());
            closed.get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn destroy_ends_host_calls_that_listen_and_waits_for_those_that_do_not() {
    for (door, is_deaf) in [(Door::new(), false), (Door::deaf(), true)] {
        for rig in both(|| at_door(&door)) {
            let held = rig.call("run", &[Value::I32(1)]);
            door.arrived();
            let destroyed = rig.destroy();
            if is_deaf {
                assert!(destroyed.is_open(), "a thread is inside");
                assert!(!rig.replica(0).is_released());
                door.go();
                // Nothing was polled after the host call, so the call may even end well.
                drop(held.get());
            } else {
                assert_eq!(code(held.get()), ErrorCode::Interrupted);
            }
            destroyed.get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn destroy_ends_the_leases() {
    for rig in both(|| counter().instances(2)) {
        let leases = [rig.lease(), rig.lease()];
        drop(rig.call_in(&leases[0], "increment", &[]).get());
        rig.destroy().get().unwrap();
        for lease in leases {
            assert!(lease.is_released());
            assert_eq!(code(lease.enter()), ErrorCode::StaleHandle);
        }
        assert_over(&rig);
    }
}

#[test]
fn destroy_stops_every_call_of_a_lease() {
    for rig in both(|| Setup::new(&guests::spinner())) {
        let lease = rig.lease();
        let calls: Vec<_> = (0..3).map(|_| rig.call_in(&lease, "spin", &[])).collect();
        rig.destroy().get().unwrap();
        for call in calls {
            let code = code(call.get());
            assert!(
                matches!(code, ErrorCode::Interrupted | ErrorCode::StaleHandle),
                "{code}"
            );
        }
        assert_over(&rig);
    }
}

#[test]
fn a_call_that_ends_just_before_its_stop_lets_nothing_run_behind_it() {
    // The host call is deaf and the guest returns without another poll: the stop is never noticed.
    let door = Door::deaf();
    for rig in both(|| at_door(&door)) {
        let lease = rig.lease();
        let first = rig.call_in(&lease, "run", &[Value::I32(1)]);
        let behind = rig.call_in(&lease, "spin", &[]);
        door.arrived();
        let destroyed = rig.destroy();
        door.go();
        drop(first.get());
        assert!(behind.get().is_err(), "an endless loop behind it");
        destroyed.get().unwrap();
        assert_over(&rig);
    }
}

#[test]
fn destroy_does_not_wait_for_a_close_that_waits_for_a_lease() {
    for rig in both(counter) {
        let lease = rig.lease();
        let closed = rig.close(None);
        let destroyed = rig.destroy();
        destroyed.get().unwrap();
        closed.get().unwrap();
        assert!(lease.is_released());
        assert_over(&rig);
    }
}

#[test]
fn destroy_does_not_wait_for_a_reload_that_waits_for_a_lease() {
    for rig in both(counter) {
        let lease = rig.lease();
        let options = ReloadOptions {
            drain_timeout: None,
            ..because("waits for a lease")
        };
        let reload = rig.ask_reload(options);
        eventually("the gate is closed", || {
            !rig.manager.stats(None).gate.is_open
        });
        let waiting = rig.call("increment", &[]);
        let destroyed = rig.destroy();
        assert_eq!(code(waiting.get()), ErrorCode::Closed);
        destroyed.get().unwrap();
        assert_eq!(code(reload.get()), ErrorCode::Closed);
        assert!(lease.is_released());
        assert_over(&rig);
    }
}

#[test]
fn destroy_does_not_wait_for_a_reload_that_waits_for_a_call() {
    let door = Door::new();
    for rig in both(|| at_door(&door)) {
        let held = rig.call("run", &[Value::I32(1)]);
        door.arrived();
        let options = ReloadOptions {
            drain_timeout: None,
            on_drain_timeout: OnDrainTimeout::Abort,
            ..because("waits for a call")
        };
        let reload = rig.ask_reload(options);
        eventually("the gate is closed", || {
            !rig.manager.stats(None).gate.is_open
        });
        rig.destroy().get().unwrap();
        assert_eq!(code(held.get()), ErrorCode::Interrupted);
        assert_eq!(code(reload.get()), ErrorCode::Closed);
        assert_over(&rig);
    }
}

#[test]
fn destroy_from_outside_during_each_hook_of_the_start() {
    for point in [Point::Imports, Point::Initialize] {
        for rig in both_new(carrying) {
            let hold = rig.faults.hold(point, 0);
            let started = rig.start();
            hold.wait();
            let destroyed = rig.destroy();
            // The host notices by itself that the manager is destroyed.
            assert_eq!(code(started.get()), ErrorCode::Closed, "{point:?}");
            destroyed.get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn destroy_from_outside_during_each_hook_of_a_reload() {
    for point in Point::HOOKS {
        for rig in both(carrying) {
            let hold = rig.faults.hold(point, 0);
            let reload = rig.ask_reload(because("held"));
            hold.wait();
            let waiting = rig.manager.stats(None).gate.is_open;
            let call = (!waiting).then(|| rig.call("increment", &[]));
            let destroyed = rig.destroy();
            assert_eq!(code(reload.get()), ErrorCode::Closed, "{point:?}");
            if let Some(call) = call {
                assert_eq!(code(call.get()), ErrorCode::Closed, "{point:?}");
            }
            destroyed.get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn destroy_from_outside_during_a_repair() {
    for point in [Point::Imports, Point::Initialize] {
        for rig in both(counter) {
            let hold = rig.faults.hold(point, 0);
            assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
            hold.wait();
            let waiting = rig.call("increment", &[]);
            let destroyed = rig.destroy();
            assert_eq!(code(waiting.get()), ErrorCode::Closed, "{point:?}");
            destroyed.get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn destroy_from_inside_a_hook_of_the_start_ends_it() {
    for point in [Point::Imports, Point::Initialize] {
        for is_sync in [false, true] {
            for rig in both_new(carrying) {
                let destroyed = rig.faults.destroy(point, 0);
                let started = if is_sync {
                    rig.start_now()
                } else {
                    rig.start().get()
                };
                assert_eq!(code(started), ErrorCode::Closed, "{point:?}");
                destroyed.get().unwrap();
                assert_over(&rig);
            }
        }
    }
}

#[test]
fn destroy_from_inside_each_hook_of_a_reload() {
    let points = [Point::AtHome, Point::Replaced, Point::Event];
    for point in Point::HOOKS.into_iter().chain(points) {
        for is_sync in [false, true] {
            for rig in both(carrying) {
                let destroyed = rig.faults.destroy(point, 0);
                let reload = if is_sync {
                    rig.reload_now(because("destroys")).map(drop)
                } else {
                    rig.ask_reload(because("destroys")).get().map(drop)
                };
                if let Err(error) = reload {
                    assert_eq!(error.code(), Some(ErrorCode::Closed), "{point:?}: {error}");
                }
                destroyed.get().unwrap();
                assert_eq!(code(rig.call("get", &[]).get()), ErrorCode::Closed);
                assert_over(&rig);
            }
        }
    }
}

#[test]
fn close_from_inside_each_hook_waits_for_what_is_under_way() {
    let points = [Point::AtHome, Point::Replaced, Point::Event];
    for point in Point::HOOKS.into_iter().chain(points) {
        for is_sync in [false, true] {
            for rig in both(carrying) {
                let closed = rig.faults.close(point, 0);
                let reload = if is_sync {
                    rig.reload_now(because("closes")).map(drop)
                } else {
                    rig.ask_reload(because("closes")).get().map(drop)
                };
                assert!(reload.is_ok(), "{point:?}: {reload:?}");
                closed.get().unwrap();
                assert_over(&rig);
            }
        }
    }
}

#[test]
fn close_from_inside_a_hook_of_the_start_ends_it() {
    for point in [Point::Imports, Point::Initialize] {
        for is_sync in [false, true] {
            for rig in both_new(carrying) {
                let closed = rig.faults.close(point, 0);
                let started = if is_sync {
                    rig.start_now()
                } else {
                    rig.start().get()
                };
                assert_eq!(code(started), ErrorCode::Closed);
                closed.get().unwrap();
                assert_over(&rig);
            }
        }
    }
}

#[test]
fn the_end_from_inside_a_host_function() {
    for is_close in [false, true] {
        for home in [false, true] {
            let handed: Arc<Mutex<Option<Manager>>> = Arc::default();
            let answers = Arc::new(Mutex::new(Vec::new()));
            let (inside, log) = (Arc::clone(&handed), Arc::clone(&answers));
            let script = Script::new().function("host", move |_| {
                if let Some(manager) = inside.lock().unwrap().take() {
                    let (done, ended) = answer("the end from inside a host function");
                    if is_close {
                        manager.close(None, Box::new(done));
                    } else {
                        manager.destroy(Box::new(done));
                    }
                    log.lock().unwrap().push(ended);
                }
                Ok(())
            });
            let setup = Setup::new(&guests::importer()).script(script);
            let rig = if home {
                setup.at_home().start()
            } else {
                setup.start()
            };
            *handed.lock().unwrap() = Some(rig.manager.clone());
            if home {
                drop(rig.call_sync("run", &[Value::I32(1)]));
            } else {
                drop(rig.call("run", &[Value::I32(1)]).get());
            }
            answers.lock().unwrap().pop().unwrap().get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn the_end_from_inside_an_answer() {
    for is_close in [false, true] {
        for rig in both(counter) {
            let (done, ended) = answer("the end from inside an answer");
            let manager = rig.manager.clone();
            let settle = move |_| {
                if is_close {
                    manager.close(None, Box::new(done));
                } else {
                    manager.destroy(Box::new(done));
                }
            };
            let work = Work::Call {
                function: rig.function("increment"),
                args: Vec::new(),
            };
            if rig.manager.options().has_home {
                rig.home().at_desk(move |desk| {
                    let limits = CallLimits::default();
                    desk.manager()
                        .call(Some(desk.home()), work, limits, Box::new(settle));
                });
            } else {
                rig.manager
                    .call(None, work, CallLimits::default(), Box::new(settle));
            }
            ended.get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn the_end_from_inside_the_answer_of_a_reload() {
    let rig = counter().start();
    let (done, ended) = answer("destroy() in the answer of a reload");
    let manager = rig.manager.clone();
    rig.manager.reload(
        because("last"),
        Box::new(move |_| manager.destroy(Box::new(done))),
    );
    ended.get().unwrap();
    assert_over(&rig);
}

#[test]
fn what_never_started_ends_too() {
    for is_close in [false, true] {
        for rig in both_new(counter) {
            let early = {
                let (settle, early) = answer("a call before the start");
                let work = Work::Call {
                    function: 0,
                    args: Vec::new(),
                };
                rig.manager
                    .call(None, work, CallLimits::default(), Box::new(settle));
                early
            };
            if is_close {
                // Nothing will ever serve it, so nothing is waited for.
                assert!(early.is_open());
                drop(rig.close(Some(Duration::from_millis(5))).get());
            }
            rig.destroy().get().unwrap();
            assert_eq!(code(early.get()), ErrorCode::Closed);
            assert_over(&rig);
        }
        for rig in both_new(|| Setup::of(wasm_molt_engine::Source::Bytes(Vec::new()))) {
            assert_eq!(code(rig.start().get()), ErrorCode::Compile);
            let ended = if is_close {
                rig.close(None)
            } else {
                rig.destroy()
            };
            ended.get().unwrap();
            assert_over(&rig);
        }
    }
}

#[test]
fn a_manager_that_failed_can_be_closed() {
    for rig in both(counter) {
        rig.faults.fail(Point::Imports, 0, Error::invalid("no"));
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        eventually("the manager has failed", || {
            rig.manager.state() == ManagerState::Failed
        });
        rig.close(None).get().unwrap();
        assert_over(&rig);
    }
}

#[test]
fn many_ends_at_once_are_all_answered() {
    const THREADS: usize = 4;
    for round in 0..300 {
        let rig = counter().start();
        let busy = rig.call("increment", &[]);
        let together = Barrier::new(THREADS);
        let manager = &rig.manager;
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let together = &together;
                scope.spawn(move || {
                    together.wait();
                    // Some come while it ends, some just after.
                    for n in 0..20 {
                        let (done, ended) =
                            answer(format!("end {n} of thread {thread}, round {round}"));
                        if (thread + n) % 2 == 0 {
                            manager.destroy(Box::new(done));
                        } else {
                            manager.close(None, Box::new(done));
                        }
                        ended.get().unwrap();
                        assert_eq!(manager.state(), ManagerState::Closed);
                    }
                });
            }
        });
        drop(busy.get());
        assert_over(&rig);
    }
}

#[test]
fn calls_that_race_with_the_end_are_all_answered() {
    const THREADS: usize = 3;
    for round in 0..200 {
        let rig = counter().instances(2).start();
        let function = rig.function("increment");
        let together = Barrier::new(THREADS + 1);
        let manager = &rig.manager;
        thread::scope(|scope| {
            let callers: Vec<_> = (0..THREADS)
                .map(|_| {
                    let together = &together;
                    scope.spawn(move || {
                        together.wait();
                        let mut answers = Vec::new();
                        for n in 0..40 {
                            let (settle, ended) = answer(format!("call {n}"));
                            let work = Work::Call {
                                function,
                                args: Vec::new(),
                            };
                            manager.call(None, work, CallLimits::default(), Box::new(settle));
                            answers.push(ended);
                        }
                        answers
                    })
                })
                .collect();
            together.wait();
            let ended = if round % 2 == 0 {
                rig.destroy()
            } else {
                rig.close(None)
            };
            ended.get().unwrap();
            for caller in callers {
                for call in caller.join().unwrap() {
                    if let Err(error) = call.get() {
                        let code = error.code().unwrap();
                        let is_expected = matches!(code, ErrorCode::Closed)
                            || (round % 2 == 0 && matches!(code, ErrorCode::Interrupted));
                        assert!(is_expected, "{error}");
                    }
                }
            }
        });
        assert_over(&rig);
    }
}

/// Where a call waits when it is stopped.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Waits {
    Gate,
    Lease,
    Thread,
}

#[test]
fn the_end_is_told_after_the_answers_of_stopped_calls() {
    for waits in [Waits::Gate, Waits::Lease, Waits::Thread] {
        let door = Door::new();
        let threads = if waits == Waits::Thread { 2 } else { 1 };
        let rig = at_door(&door)
            .instances(threads)
            .options(|o| o.threads = Some(1))
            .start();
        let lease = (waits == Waits::Lease).then(|| rig.lease());
        let inside = match &lease {
            Some(lease) => rig.call_in(lease, "run", &[Value::I32(1)]),
            None => rig.call("run", &[Value::I32(1)]),
        };
        door.arrived();
        let (tell, closed) = bounded(1);
        let (answer, answered) = answer("the stopped call");
        let settle = {
            let (door, lease, closed) = (door.clone(), lease.clone(), closed.clone());
            move |outcome| {
                // Nothing else is in flight from here on, and this call has no answer yet.
                door.open();
                if let Some(lease) = lease {
                    lease.release();
                }
                let is_overtaken = closed.recv_timeout(Duration::from_millis(50)).is_ok();
                answer((outcome, is_overtaken));
            }
        };
        let limits = CallLimits {
            timeout_ms: None,
            can_abort: true,
        };
        let work = Work::Call {
            function: rig.function("run"),
            args: vec![Value::I32(2)],
        };
        let control = match &lease {
            Some(lease) => rig.manager.call_in(lease, work, limits, Box::new(settle)),
            None => rig.manager.call(None, work, limits, Box::new(settle)),
        };
        let done = move |outcome| drop(tell.send(outcome));
        rig.manager.close(None, Box::new(done));
        control
            .expect("it can be aborted")
            .stop(Stop::Interrupted("not any more".into()));
        let (outcome, is_overtaken) = answered.get();
        assert_eq!(code(outcome), ErrorCode::Interrupted, "{waits:?}");
        assert!(!is_overtaken, "{waits:?}: closed before its last answer");
        closed.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(number(inside.get()), 1);
    }
}

#[test]
fn a_hook_that_gives_up_lets_nothing_run_after_destroy() {
    for _ in 0..100 {
        for rig in both(carrying) {
            let hold = rig.faults.hold(Point::Save, 0);
            let reload = rig.ask_reload(because("held"));
            hold.wait();
            let waiting: Vec<_> = (0..4).map(|_| rig.call("increment", &[])).collect();
            let destroyed = rig.destroy();
            for call in waiting {
                assert_eq!(code(call.get()), ErrorCode::Closed);
            }
            assert_eq!(code(reload.get()), ErrorCode::Closed);
            destroyed.get().unwrap();
        }
    }
}

#[test]
fn reloads_and_leases_that_race_with_the_end_are_all_answered() {
    for round in 0..100 {
        let rig = counter().instances(2).start();
        let reloads: Vec<_> = (0..3)
            .map(|n| rig.ask_reload(because(&format!("r{n}"))))
            .collect();
        let leases: Vec<_> = (0..4).map(|_| rig.ask_lease().0).collect();
        let trapping = rig.call("trap", &[]);
        if round % 3 == 0 {
            drop(reloads);
            rig.destroy().get().unwrap();
        } else {
            rig.destroy().get().unwrap();
            for reload in reloads {
                if let Err(error) = reload.get() {
                    assert_eq!(error.code(), Some(ErrorCode::Closed), "{error}");
                }
            }
        }
        for lease in leases {
            match lease.get() {
                Ok(lease) => assert_eq!(code(lease.enter()), ErrorCode::StaleHandle),
                Err(error) => assert_eq!(error.code(), Some(ErrorCode::Closed)),
            }
        }
        assert!(trapping.get().is_err());
        assert_over(&rig);
    }
}

#[test]
fn a_home_that_goes_away_leaves_a_manager_that_can_be_destroyed() {
    let mut rig = counter().at_home().start();
    let lease = rig.lease();
    rig.release(&lease);
    rig.end_home();
    drop(rig.ask_reload(because("without a home")).get());
    drop(rig.close(Some(Duration::from_millis(5))).get());
    rig.destroy().get().unwrap();
    assert_over(&rig);
}

#[test]
fn a_reload_without_its_home_does_not_claim_to_have_happened() {
    let mut rig = counter().at_home().start();
    rig.end_home();
    let reload = rig.ask_reload(because("without a home")).get();
    assert!(reload.is_err(), "{reload:?}");
    assert_eq!(rig.manager.generation().get(), 1);
}

#[test]
fn a_home_that_goes_away_with_calls_in_flight() {
    let door = Door::new();
    let mut rig = at_door(&door).at_home().start();
    let held = rig.call("run", &[Value::I32(1)]);
    door.arrived();
    let waiting = rig.call("run", &[Value::I32(2)]);
    rig.end_home();
    rig.destroy().get().unwrap();
    assert_eq!(code(held.get()), ErrorCode::Interrupted);
    assert_eq!(code(waiting.get()), ErrorCode::Closed);
    assert_over(&rig);
}

#[test]
fn the_host_is_let_go_once() {
    for rig in both(counter) {
        let ends = [rig.close(None), rig.destroy(), rig.close(None)];
        ends.into_iter().for_each(|end| end.get().unwrap());
        eventually("the host is let go", || rig.host.released_count() > 0);
        // Whatever is still on its way would follow the next answer.
        rig.destroy().get().unwrap();
        assert_eq!(rig.host.released_count(), 1);
    }
}

#[test]
fn a_manager_that_is_forgotten_is_released() {
    let _working = work();
    let host = Arc::new(TestHost::new(Script::new(), None));
    let options = ManagerOptions {
        name: Some("forgot".into()),
        cache: CacheChoice::Off,
        ..ManagerOptions::default()
    };
    let (manager, home) =
        Manager::new(options, Arc::<TestHost>::clone(&host) as Arc<dyn Host>).unwrap();
    assert!(home.is_none());
    manager
        .start_now(&guests::source(&guests::counter()))
        .unwrap();
    let replica = Arc::downgrade(&manager.replica(0).unwrap());
    let memory = Arc::clone(manager.replica(0).unwrap().memory().unwrap());
    let (settle, ended) = answer("increment");
    let function = manager
        .module()
        .unwrap()
        .function_index("increment")
        .unwrap();
    let work = Work::Call {
        function,
        args: Vec::new(),
    };
    manager.call(None, work, CallLimits::default(), Box::new(settle));
    drop(manager);
    assert_eq!(number(ended.get()), 1, "a call in flight keeps it alive");
    eventually("the instance is gone", || replica.strong_count() == 0);
    // The count is down before what it counted has been dropped.
    eventually("its memory is too", || memory.is_released());
    eventually("the host is let go of", || Arc::strong_count(&host) == 1);
}

#[test]
fn a_lease_that_outlives_its_manager_is_harmless() {
    let rig = counter().start();
    let lease = rig.lease();
    let inside = lease.enter().unwrap();
    let destroyed = rig.destroy();
    // The holder is inside: nothing is taken away beneath it.
    eventually("the lease is over", || lease.is_released());
    call_leased(&inside, "increment", Vec::new()).unwrap();
    assert!(destroyed.is_open() && !lease.replica().is_released());
    drop(inside);
    destroyed.get().unwrap();
    drop(rig);
    assert_eq!(code(lease.enter()), ErrorCode::StaleHandle);
    lease.release();
    assert!(lease.replica().memory().unwrap().is_released());
}
