//! One generation replaces another, or nothing has happened.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use wasm_molt_engine::{
    Error, ErrorCode, Event, FailedPhase, HostRef, Lease, ManagerState, OnDrainTimeout,
    ReloadOptions, Strategy, Value,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::inside::ask;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number, trap, values};
use wasm_molt_testkit::wait::{answer, eventually};

fn counter() -> Setup {
    Setup::new(&guests::counter()).script(Script::carrying())
}

fn at_door(door: &Door) -> Setup {
    Setup::new(&guests::importer()).script(Script::new().function("host", door.function()))
}

/// With and without a home thread.
fn both(setup: impl Fn() -> Setup) -> [Rig; 2] {
    [setup().start(), setup().at_home().start()]
}

fn wait_closed_gate(rig: &Rig) {
    eventually("the gate is closed", || {
        !rig.manager.stats(None).gate.is_open
    });
}

#[test]
fn state_is_carried_and_nothing_else() {
    for rig in both(counter) {
        for generation in 1..20 {
            assert_eq!(rig.number("increment", &[]), generation);
            let old = rig.replica(0);
            let report = rig.reload("carry");
            let fresh = rig.replica(0);
            assert_ne!(old.id(), fresh.id());
            assert!(old.is_released() && !fresh.is_released());
            let generation = generation as u64;
            assert_eq!(report.previous_generation.get(), generation);
            assert_eq!(report.generation.get(), generation + 1);
            assert_eq!(fresh.generation(), report.generation);
            assert_eq!(rig.manager.generation(), report.generation);
        }
        let stats = rig.stats();
        assert_eq!(stats.reloads.get("carry"), Some(&19));
        assert_eq!((stats.reloads_failed, stats.times.pause.count), (0, 19));
        assert_eq!(rig.number("get", &[]), 19);
    }
}

#[test]
fn the_hooks_run_in_their_order_and_see_the_right_instance() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let note = |what: &'static str| {
        let log = Arc::clone(&log);
        move |lease: &Arc<Lease>, slot: usize| {
            assert_eq!(lease.replica().slot(), slot);
            log.lock()
                .unwrap()
                .push((what, slot, lease.replica().generation().get()));
        }
    };
    let (initialize, save, restore) = (note("initialize"), note("save"), note("restore"));
    let script = Script::new()
        .initialize(move |lease| {
            initialize(lease, lease.replica().slot());
            Ok(())
        })
        .save(move |lease, slot| {
            save(lease, slot);
            Ok((slot == 1).then(|| HostRef::new(slot)))
        })
        .restore(move |lease, state, slot| {
            assert_eq!(state.downcast_ref(), Some(&slot));
            restore(lease, slot);
            Ok(())
        });
    let rig = Setup::new(&guests::counter())
        .instances(2)
        .script(script)
        .start();
    assert_eq!(
        std::mem::take(&mut *log.lock().unwrap()),
        [("initialize", 0, 1), ("initialize", 1, 1)]
    );
    rig.reload("in order");
    let expected = [
        ("initialize", 0, 2),
        ("initialize", 1, 2),
        ("save", 0, 1),
        ("save", 1, 1),
        // Slot 0 had nothing to save, so there is nothing to restore.
        ("restore", 1, 2),
    ];
    assert_eq!(*log.lock().unwrap(), expected);
}

#[test]
fn the_report_says_what_there_was() {
    let door = Door::new();
    for rig in both(|| at_door(&door)) {
        rig.number("grow", &[9]);
        let running = rig.call("run", &[Value::I32(1)]);
        door.arrived();
        let reload = rig.ask_reload(because("told"));
        wait_closed_gate(&rig);
        assert_eq!(rig.manager.state(), ManagerState::Draining);
        let waiting: Vec<_> = (0..3)
            .map(|_| rig.call("twice", &[Value::I32(2)]))
            .collect();
        door.go();
        let report = reload.get().unwrap();
        assert_eq!(number(running.get()), 1);
        waiting
            .into_iter()
            .for_each(|call| assert_eq!(number(call.get()), 4));
        assert_eq!(
            (report.reason.as_str(), report.drained, report.queued),
            ("told", 1, 3)
        );
        let bytes = (report.memory_bytes_before, report.memory_bytes_after);
        assert_eq!(bytes, (10 << 16, 1 << 16));
        assert!(
            report.drain + report.save + report.restore <= report.pause,
            "{report:?}"
        );
        assert!(report.instantiate > Duration::ZERO);
        let told = rig
            .host
            .count(|event| matches!(event, Event::Reload(told) if Arc::ptr_eq(told, &report)));
        assert_eq!(told, 1, "listeners get the same report");
        assert_eq!(rig.manager.state(), ManagerState::Ready);
    }
}

#[test]
fn the_host_hears_of_each_instance_that_goes_and_comes() {
    let rig = counter().instances(2).start();
    let ids = || [rig.replica(0).id(), rig.replica(1).id()];
    let first = ids();
    rig.reload("change");
    let second = ids();
    let changes = rig.host.changes();
    assert_eq!((changes[0].old.len(), &changes[0].new[..]), (0, &first[..]));
    assert_eq!(
        (&changes[1].old[..], &changes[1].new[..]),
        (&first[..], &second[..])
    );
    assert_eq!(
        (changes[0].generation, changes[1].generation, changes.len()),
        (1, 2, 2)
    );
    rig.close(None).get().unwrap();
    let last = rig.host.changes().pop().unwrap();
    assert_eq!((&last.old[..], last.new.len()), (&second[..], 0));
}

/// The phase that an error in a hook is reported with.
const PHASES: [(Point, FailedPhase); 4] = [
    (Point::Imports, FailedPhase::Instantiate),
    (Point::Initialize, FailedPhase::Initialize),
    (Point::Save, FailedPhase::Save),
    (Point::Restore, FailedPhase::Restore),
];

#[test]
fn a_failure_in_any_phase_rolls_back_and_waiting_calls_run_on_the_old_generation() {
    for (point, phase) in PHASES {
        // In the first replica's hook, and in the second's.
        for (rig, skip) in both(|| counter().instances(2)).into_iter().zip([0, 1]) {
            let what = format!("{phase} of replica {skip}");
            let leases = [rig.lease(), rig.lease()];
            leases
                .iter()
                .for_each(|lease| drop(rig.call_in(lease, "increment", &[]).get()));
            leases.iter().for_each(|lease| rig.release(lease));
            let instances = || [rig.replica(0).id(), rig.replica(1).id()];
            let old = instances();

            let failing =
                rig.faults
                    .hold_then_fail(point, skip, Error::Thrown(HostRef::new("mine")));
            let reload = rig.ask_reload(because("fails"));
            failing.wait();
            let waiting: Vec<_> = (0..4).map(|_| rig.call("increment", &[])).collect();
            failing.release();
            let error = reload.get().unwrap_err();
            let Error::ReloadFailed {
                phase: failed,
                cause,
                ..
            } = &error
            else {
                panic!("{what}: {error:?}")
            };
            assert_eq!(*failed, phase, "{what}");
            let Error::Thrown(thrown) = &**cause else {
                panic!("{what}: {cause:?}")
            };
            assert_eq!(
                thrown.downcast_ref(),
                Some(&"mine"),
                "the very object is the cause"
            );

            let counts: Vec<_> = waiting.into_iter().map(|call| number(call.get())).collect();
            assert!(
                counts.iter().all(|count| *count > 1),
                "{what}: state is untouched: {counts:?}"
            );
            assert_eq!(instances(), old, "{what}: the old instances serve on");
            assert!(!rig.replica(0).is_released() && !rig.replica(1).is_released());
            let stats = rig.stats();
            assert_eq!(
                (stats.state, stats.generation),
                (ManagerState::Ready, 1),
                "{what}"
            );
            assert_eq!(stats.reloads_failed, 1, "{what}");
            assert_eq!(rig.host.count(|e| matches!(e, Event::ReloadFailed(_))), 1);
            assert_eq!(
                rig.reload("afterwards it can be").generation.get(),
                2,
                "{what}"
            );
        }
    }
}

#[test]
fn a_panic_in_any_phase_rolls_back_too() {
    for (point, _) in PHASES {
        for rig in both(counter) {
            rig.number("increment", &[]);
            rig.faults.panic(point, 0);
            let error = rig.ask_reload(because("panics")).get().unwrap_err();
            let cause = match &error {
                Error::ReloadFailed { cause, .. } => cause,
                other => other,
            };
            assert_eq!(
                cause.code(),
                Some(ErrorCode::Internal),
                "{point:?}: {error}"
            );
            assert!(error.to_string().contains("on purpose"), "{error}");
            assert_eq!(rig.manager.state(), ManagerState::Ready, "{point:?}");
            assert_eq!(rig.number("increment", &[]), 2, "{point:?}");
            assert_eq!(rig.reload("afterwards").generation.get(), 2, "{point:?}");
            assert_eq!(rig.number("get", &[]), 2);
        }
    }
}

#[test]
fn a_new_instance_that_traps_as_it_starts_rolls_back() {
    let is_bad = Arc::new(AtomicUsize::new(0));
    let bad = Arc::clone(&is_bad);
    let script = Script::new()
        .function("host", move |_| match bad.load(Ordering::SeqCst) {
            0 => Ok(()),
            _ => Err(Error::Thrown(HostRef::new("start"))),
        })
        .function("reactor", |_| Ok(()));
    let rig = Setup::new(&guests::starter()).script(script).start();
    is_bad.store(1, Ordering::SeqCst);
    let error = rig.ask_reload(because("bad start")).get().unwrap_err();
    let Error::ReloadFailed { phase, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(phase, FailedPhase::Instantiate);
    assert_eq!((rig.number("fine", &[]), rig.stats().generation), (7, 1));
    is_bad.store(0, Ordering::SeqCst);
    assert_eq!(rig.reload("good start").generation.get(), 2);
}

#[test]
fn a_trap_in_initialize_that_the_hook_hides_is_found() {
    let script = Script::new().initialize(|lease| {
        if lease.replica().generation().get() > 1 {
            assert_eq!(trap(ask(lease, "trap", Vec::new())), "unreachable");
        }
        Ok(())
    });
    let rig = Setup::new(&guests::counter()).script(script).start();
    let error = rig.ask_reload(because("hidden trap")).get().unwrap_err();
    let Error::ReloadFailed { phase, cause, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(
        (phase, cause.code()),
        (FailedPhase::Initialize, Some(ErrorCode::Trap))
    );
    assert_eq!(rig.number("increment", &[]), 1);
}

#[test]
fn a_trap_in_save_state_costs_the_old_instance_but_no_call() {
    let script = Script::new().save(|lease, _| ask(lease, "trap", Vec::new()).map(|_| None));
    let rig = Setup::new(&guests::counter()).script(script).start();
    rig.number("increment", &[]);
    let hold = rig.faults.hold(Point::Save, 0);
    let reload = rig.ask_reload(because("save traps"));
    hold.wait();
    let waiting: Vec<_> = (0..3).map(|_| rig.call("increment", &[])).collect();
    hold.release();
    let Err(Error::ReloadFailed { phase, .. }) = reload.get() else {
        panic!()
    };
    assert_eq!(phase, FailedPhase::Save);
    for (n, call) in waiting.into_iter().enumerate() {
        assert_eq!(number(call.get()), n as i32 + 1, "in a fresh instance");
    }
    rig.wait_generation(2);
    let skip = ReloadOptions {
        skip_save: true,
        ..because("leave it behind")
    };
    assert_eq!(rig.ask_reload(skip).get().unwrap().generation.get(), 3);
}

#[test]
fn a_trap_in_restore_state_rolls_back() {
    let script = Script::new()
        .save(|_, _| Ok(Some(HostRef::new(()))))
        .restore(|lease, _, _| ask(lease, "trap", Vec::new()).map(drop));
    let rig = Setup::new(&guests::counter()).script(script).start();
    rig.number("increment", &[]);
    let Err(Error::ReloadFailed { phase, .. }) = rig.ask_reload(because("restore traps")).get()
    else {
        panic!()
    };
    assert_eq!(phase, FailedPhase::Restore);
    assert_eq!(
        (rig.number("increment", &[]), rig.stats().generation),
        (2, 1)
    );
}

#[test]
fn a_trap_in_restore_state_that_the_hook_hides_is_found() {
    let script = Script::new()
        .save(|_, _| Ok(Some(HostRef::new(()))))
        .restore(|lease, _, _| {
            drop(ask(lease, "trap", Vec::new()));
            Ok(())
        });
    let rig = Setup::new(&guests::counter()).script(script).start();
    rig.number("increment", &[]);
    let ended = rig.ask_reload(because("hidden trap")).get();
    // Whatever the reload says: what serves now is not the instance that trapped.
    assert!(
        !rig.replica(0).is_poisoned(),
        "a poisoned instance serves after {ended:?}"
    );
    assert!(rig.number("increment", &[]) > 0);
}

#[test]
fn skip_save_leaves_state_behind() {
    for rig in both(counter) {
        rig.number("increment", &[]);
        rig.faults.fail(
            Point::Save,
            0,
            Error::invalid("saveState must not be asked"),
        );
        rig.faults.fail(
            Point::Restore,
            0,
            Error::invalid("restoreState must not be asked"),
        );
        let options = ReloadOptions {
            skip_save: true,
            ..because("skip")
        };
        assert_eq!(rig.ask_reload(options).get().unwrap().generation.get(), 2);
        assert_eq!(rig.faults.left(), 2);
        assert_eq!(rig.number("get", &[]), 0);
    }
}

#[test]
fn a_reload_that_is_asked_for_when_the_new_generation_serves_is_another_one() {
    for strategy in [Strategy::Exclusive, Strategy::Rolling] {
        let rig = Setup::new(&guests::counter()).start();
        let options = ReloadOptions {
            strategy,
            ..because("the same")
        };
        let held = rig.faults.hold(Point::Replaced, 0);
        let first = rig.ask_reload(options.clone());
        held.wait();
        let second = rig.ask_reload(options);
        held.release();
        let generations = [first, second].map(|it| it.get().unwrap().generation.get());
        assert_eq!(generations, [2, 3]);
    }
}

#[test]
fn equal_reloads_join_and_others_follow() {
    for rig in both(counter) {
        let hold = rig.faults.hold(Point::Save, 0);
        let first = rig.ask_reload(because("a"));
        hold.wait();
        let joined = [rig.ask_reload(because("a")), rig.ask_reload(because("a"))];
        let followers = [rig.ask_reload(because("b")), rig.ask_reload(because("b"))];
        let other = rig.ask_reload(ReloadOptions {
            skip_save: true,
            ..because("a")
        });
        hold.release();
        let report = first.get().unwrap();
        for same in joined {
            assert!(Arc::ptr_eq(&same.get().unwrap(), &report));
        }
        let [one, two] = followers.map(|reload| reload.get().unwrap());
        assert!(Arc::ptr_eq(&one, &two));
        assert_eq!((report.generation.get(), one.generation.get()), (2, 3));
        assert_eq!(other.get().unwrap().generation.get(), 4);
        assert_eq!(rig.stats().generation, 4);
    }
}

#[test]
fn those_who_joined_share_the_failure() {
    let rig = counter().start();
    let hold = rig.faults.hold(Point::Save, 0);
    let first = rig.ask_reload(because("a"));
    hold.wait();
    let joined = rig.ask_reload(because("a"));
    rig.faults
        .fail(Point::Restore, 0, Error::Thrown(HostRef::new("no")));
    hold.release();
    assert_eq!(code(first.get()), ErrorCode::ReloadFailed);
    assert_eq!(code(joined.get()), ErrorCode::ReloadFailed);
    assert_eq!(rig.stats().reloads_failed, 1);
}

#[test]
fn a_drain_that_takes_too_long_is_given_up() {
    let door = Door::new();
    for rig in both(|| at_door(&door)) {
        let held = rig.call("run", &[Value::I32(1)]);
        door.arrived();
        let lease_waits = rig.ask_lease().0;
        for timeout in [Duration::ZERO, Duration::from_millis(10)] {
            let options = ReloadOptions {
                drain_timeout: Some(timeout),
                ..because("hurry")
            };
            let error = rig.ask_reload(options).get().unwrap_err();
            let Error::DrainTimeout { in_flight, .. } = &error else {
                panic!("{error:?}")
            };
            assert_eq!((*in_flight, rig.manager.state()), (1, ManagerState::Ready));
        }
        assert!(held.is_open(), "the old generation serves on");
        door.go();
        assert_eq!(number(held.get()), 1);
        rig.release(&lease_waits.get().unwrap());
        let stats = rig.stats();
        assert_eq!((stats.generation, stats.reloads_failed), (1, 2));
        let options = ReloadOptions {
            drain_timeout: Some(Duration::ZERO),
            ..because("idle")
        };
        assert_eq!(rig.ask_reload(options).get().unwrap().generation.get(), 2);
    }
}

#[test]
fn a_drain_may_interrupt_what_does_not_end() {
    for signals in [true, false] {
        let setup = || {
            let setup = Setup::new(&guests::spinner()).instances(2);
            setup.options(|o| o.engine.signals_based_traps = signals)
        };
        for rig in both(setup) {
            let spinning = [rig.call("spin", &[]), rig.call("fib", &[Value::I32(1000)])];
            eventually("both run", || rig.stats().times.wait.count == 2);
            let waiting = rig.call("well", &[]);
            let options = ReloadOptions {
                drain_timeout: Some(Duration::from_millis(10)),
                on_drain_timeout: OnDrainTimeout::Interrupt,
                ..because("interrupt")
            };
            let report = rig.ask_reload(options).get().unwrap();
            assert_eq!(report.drained, 2);
            for call in spinning {
                assert_eq!(code(call.get()), ErrorCode::Interrupted);
            }
            assert_eq!(number(waiting.get()), 7);
            let stats = rig.stats();
            assert_eq!(
                (stats.generation, stats.poisoned),
                (2, 0),
                "replaced once, not twice"
            );
        }
    }
}

#[test]
fn an_interrupt_that_does_not_help_gives_up() {
    let door = Door::deaf();
    let rig = at_door(&door).start();
    let held = rig.call("run", &[Value::I32(1)]);
    door.arrived();
    let options = ReloadOptions {
        drain_timeout: Some(Duration::from_millis(5)),
        on_drain_timeout: OnDrainTimeout::Interrupt,
        ..because("deaf")
    };
    let Err(Error::DrainTimeout { in_flight, .. }) = rig.ask_reload(options).get() else {
        panic!()
    };
    assert_eq!(in_flight, 1);
    door.open();
    // It was told to stop; whether it noticed is its own affair. It is answered, and all is well after.
    drop(held.get());
    assert_eq!(rig.number("twice", &[2]), 4);
}

#[test]
fn an_instance_that_traps_during_the_drain_is_not_asked_to_save() {
    let door = Door::new();
    let saved = Arc::new(Mutex::new(Vec::new()));
    for home in [false, true] {
        let setup = Setup::new(&guests::importer()).instances(2).script(
            Script::new().function("host", door.function()).save({
                let log = Arc::clone(&saved);
                move |lease, slot| {
                    assert!(!lease.replica().is_poisoned());
                    log.lock().unwrap().push(slot);
                    Ok(None)
                }
            }),
        );
        let rig = if home {
            setup.at_home().start()
        } else {
            setup.start()
        };
        let lease = rig.lease();
        let slot = lease.replica().slot();
        let reload = rig.ask_reload(because("poisoned"));
        wait_closed_gate(&rig);
        assert_eq!(trap(rig.call_in(&lease, "trap", &[]).get()), "unreachable");
        rig.release(&lease);
        assert_eq!(reload.get().unwrap().generation.get(), 2);
        assert_eq!(std::mem::take(&mut *saved.lock().unwrap()), [1 - slot]);
        assert_eq!(rig.number("twice", &[1]), 2);
        let stats = rig.stats();
        assert_eq!(
            (stats.generation, stats.poisoned, stats.gate.retired),
            (2, 0, 0)
        );
    }
}

#[test]
fn every_waiting_call_runs_in_order_on_the_new_generation() {
    let rig = counter().start();
    let hold = rig.faults.hold(Point::Restore, 0);
    let reload = rig.ask_reload(because("many wait"));
    hold.wait();
    let calls: Vec<_> = (0..500).map(|_| rig.call("increment", &[])).collect();
    hold.release();
    assert_eq!(reload.get().unwrap().queued, 500);
    for (n, call) in calls.into_iter().enumerate() {
        assert_eq!(number(call.get()), n as i32 + 1);
    }
}

#[test]
fn answers_of_drained_calls_come_before_the_reloads_own() {
    let rig = counter().start();
    for n in 0..200 {
        let order = Arc::new(Mutex::new(Vec::new()));
        let note = |what: &'static str| {
            let order = Arc::clone(&order);
            move || order.lock().unwrap().push(what)
        };
        let (called, reloaded) = (note("call"), note("reload"));
        let (settle, call) = answer("increment");
        let work = wasm_molt_engine::Work::Call {
            function: rig.function("increment"),
            args: Vec::new(),
        };
        let settle = move |ended| {
            called();
            settle(ended);
        };
        let limits = wasm_molt_engine::CallLimits::default();
        rig.manager.call(None, work, limits, Box::new(settle));
        let (done, reload) = answer("reload");
        let done = move |ended| {
            reloaded();
            done(ended);
        };
        rig.manager.reload(because("order"), Box::new(done));
        assert_eq!(number(call.get()), n + 1);
        reload.get().unwrap();
        assert_eq!(*order.lock().unwrap(), ["call", "reload"]);
    }
}

#[test]
fn a_reload_on_the_calling_thread_wants_nothing_in_flight() {
    for rig in both(counter) {
        rig.number("increment", &[]);
        let lease = rig.lease();
        let refused = rig.reload_now(because("now"));
        assert_eq!(code(refused), ErrorCode::Busy);
        rig.release(&lease);
        for generation in 2..10 {
            let report = rig.reload_now(because("now")).unwrap();
            assert_eq!(report.generation.get(), generation);
        }
        let hold = rig.faults.hold(Point::Initialize, 0);
        let reload = rig.ask_reload(because("under way"));
        hold.wait();
        assert_eq!(code(rig.reload_now(because("now"))), ErrorCode::Reloading);
        hold.release();
        reload.get().unwrap();
        rig.reload_now(because("right after the answer")).unwrap();
        assert_eq!(rig.number("get", &[]), 1);
    }
}

#[test]
fn a_reload_on_the_calling_thread_rolls_back_as_well() {
    for (point, phase) in PHASES {
        for rig in both(counter) {
            rig.number("increment", &[]);
            rig.faults.fail(point, 0, Error::Thrown(HostRef::new("no")));
            let Err(Error::ReloadFailed { phase: failed, .. }) = rig.reload_now(because("now"))
            else {
                panic!("{phase}")
            };
            assert_eq!((failed, rig.manager.state()), (phase, ManagerState::Ready));
            assert_eq!(rig.number("increment", &[]), 2);
            rig.reload_now(because("again")).unwrap();
        }
    }
}

#[test]
fn what_is_asked_for_during_a_reload_on_the_calling_thread_runs_after_it() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    for home in [false, true] {
        let setup = counter();
        let rig = if home {
            setup.at_home().start()
        } else {
            setup.start()
        };
        let hold = rig.faults.hold(Point::Save, 0);
        let (manager, log) = (rig.manager.clone(), Arc::clone(&asked));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                hold.wait();
                let (done, reload) = answer("a reload from elsewhere");
                manager.reload(because("queued"), Box::new(done));
                log.lock().unwrap().push(reload);
                hold.release();
            });
            rig.reload_now(because("now")).unwrap();
        });
        let queued = asked.lock().unwrap().pop().unwrap();
        assert_eq!(queued.get().unwrap().generation.get(), 3);
    }
}

#[test]
fn synchronous_hooks_are_not_lent_the_pool() {
    let refused = Arc::new(Mutex::new(None));
    let log = Arc::clone(&refused);
    // The manager is needed in the hook, so it is handed in when it exists.
    let handed: Arc<Mutex<Option<wasm_molt_engine::Manager>>> = Arc::default();
    let inside = Arc::clone(&handed);
    let script = Script::new().initialize(move |lease| {
        let Some(manager) = inside.lock().unwrap().clone() else {
            return Ok(());
        };
        let (settle, ended) = answer("a call in a synchronous hook");
        let work = wasm_molt_engine::Work::Call {
            function: 0,
            args: Vec::new(),
        };
        let limits = wasm_molt_engine::CallLimits::default();
        manager.call_in(lease, work, limits, Box::new(settle));
        *log.lock().unwrap() = Some(ended.get());
        Ok(())
    });
    let rig = Setup::new(&guests::counter()).script(script).start();
    *handed.lock().unwrap() = Some(rig.manager.clone());
    rig.reload_now(because("synchronous")).unwrap();
    assert_eq!(
        code(refused.lock().unwrap().take().unwrap()),
        ErrorCode::AsyncImport
    );
    rig.reload("asynchronous");
    assert_eq!(number(refused.lock().unwrap().take().unwrap()), 1);
    handed.lock().unwrap().take();
}

/// A hook that calls its instance on the pool and waits for it, as an asynchronous hook in JS does.
#[test]
fn a_hook_on_the_pool_does_not_wait_behind_the_calls_in_flight() {
    let door = Door::new();
    let handed: Arc<Mutex<Option<wasm_molt_engine::Manager>>> = Arc::default();
    let inside = Arc::clone(&handed);
    let script = Script::new()
        .function("host", door.function())
        .initialize(move |lease| {
            let Some(manager) = inside.lock().unwrap().clone() else {
                return Ok(());
            };
            let (settle, ended) = answer("a call in an asynchronous hook");
            let function = lease.replica().module().function_index("twice")?;
            let work = wasm_molt_engine::Work::Call {
                function,
                args: vec![Value::I32(1)],
            };
            let limits = wasm_molt_engine::CallLimits::default();
            manager.call_in(lease, work, limits, Box::new(settle));
            ended.get().map(drop)
        });
    let rig = Setup::new(&guests::importer()).script(script).start();
    *handed.lock().unwrap() = Some(rig.manager.clone());
    let held = rig.call("run", &[Value::I32(1)]);
    door.arrived();
    let options = ReloadOptions {
        drain_timeout: Some(Duration::from_millis(5)),
        on_drain_timeout: OnDrainTimeout::Interrupt,
        ..because("while the only pool thread is taken")
    };
    let reload = rig.ask_reload(options);
    let report = reload.get();
    assert!(report.is_ok(), "{report:?}");
    assert_eq!(code(held.get()), ErrorCode::Interrupted);
    handed.lock().unwrap().take();
}

#[test]
fn a_reload_asked_for_inside_a_hook_joins_or_follows() {
    let handed: Arc<Mutex<Option<wasm_molt_engine::Manager>>> = Arc::default();
    let answers = Arc::new(Mutex::new(Vec::new()));
    let (inside, log) = (Arc::clone(&handed), Arc::clone(&answers));
    let script = Script::new().initialize(move |_| {
        if let Some(manager) = inside.lock().unwrap().take() {
            for reason in ["same", "other"] {
                let (done, reload) = answer(format!("a reload inside a hook: {reason}"));
                manager.reload(because(reason), Box::new(done));
                log.lock().unwrap().push(reload);
            }
        }
        Ok(())
    });
    let rig = Setup::new(&guests::counter()).script(script).start();
    *handed.lock().unwrap() = Some(rig.manager.clone());
    let report = rig.reload("same");
    let [same, other] = <[_; 2]>::try_from(std::mem::take(&mut *answers.lock().unwrap())).unwrap();
    assert!(Arc::ptr_eq(&same.get().unwrap(), &report));
    assert_eq!(other.get().unwrap().generation.get(), 3);
}

#[test]
fn a_reload_without_anything_to_carry_keeps_nothing() {
    let rig = Setup::new(&guests::counter()).start();
    rig.number("increment", &[]);
    rig.reload("plain");
    assert_eq!(rig.number("get", &[]), 0);
}

#[test]
fn reasons_are_counted_apart_up_to_a_bound() {
    let rig = Setup::new(&guests::adder()).start();
    for n in 0..80 {
        rig.reload(&format!("reason {n}"));
    }
    let reloads = rig.stats().reloads;
    assert_eq!(reloads.values().sum::<u64>(), 80);
    assert!(reloads.len() <= 65, "{} reasons", reloads.len());
    assert!(reloads.contains_key("other"));
}

#[test]
fn a_manager_reloads_in_whatever_state_its_callers_leave_it() {
    // Calls of every kind of end right before and during a hundred reloads.
    let script = Script::new().function("host", |call| {
        let Value::I32(n) = call.args[0] else {
            panic!("{:?}", call.args)
        };
        if n % 2 == 0 {
            Err(Error::Thrown(HostRef::new(n)))
        } else {
            Ok(())
        }
    });
    let rig = Setup::new(&guests::importer())
        .instances(2)
        .script(script)
        .start();
    for n in 0..100 {
        let calls = [
            rig.call("run", &[Value::I32(n)]),
            rig.call("trap", &[]),
            rig.call("twice", &[Value::I32(n)]),
            rig.call_for(1, "spin", &[]),
        ];
        rig.reload("in between");
        let [run, trapped, twice, spun] = calls.map(|call| call.get());
        assert_eq!(run.is_err(), n % 2 == 0);
        assert_eq!(trap(trapped), "unreachable");
        assert_eq!(number(twice), 2 * n);
        assert_eq!(code(spun), ErrorCode::Timeout);
    }
    let stats = rig.stats();
    assert_eq!(stats.reloads.get("in between"), Some(&100));
    drop(values(rig.call("twice", &[Value::I32(1)]).get()));
}
