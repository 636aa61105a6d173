//! What trapped is replaced, and whoever waited for it is served.

use wasm_molt_engine::{Error, ErrorCode, Event, FailedPhase, HostRef, ManagerState, Value};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::inside::call_again;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number, trap};
use wasm_molt_testkit::wait::eventually;

fn counter() -> Setup {
    Setup::new(&guests::counter())
}

fn both(setup: impl Fn() -> Setup) -> [Rig; 2] {
    [setup().start(), setup().at_home().start()]
}

fn thrown() -> Error {
    Error::Thrown(HostRef::new("mine"))
}

fn wait_failed(rig: &Rig) {
    eventually("the manager has failed", || {
        rig.manager.state() == ManagerState::Failed
    });
}

/// Traps in such a way that the repair fails, and nobody waits for it.
fn fail(rig: &Rig) {
    rig.faults.fail(Point::Imports, 0, thrown());
    assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
    wait_failed(rig);
}

#[test]
fn calls_that_waited_behind_a_trap_run_in_order_on_the_replacement() {
    for rig in both(counter) {
        rig.number("increment", &[]);
        let lease = rig.lease();
        let mut calls = vec![rig.call("trap", &[])];
        calls.extend((0..50).map(|_| rig.call("increment", &[])));
        rig.release(&lease);
        let mut calls = calls.into_iter();
        assert_eq!(trap(calls.next().unwrap().get()), "unreachable");
        for (n, call) in calls.enumerate() {
            assert_eq!(
                number(call.get()),
                n as i32 + 1,
                "nothing is left of the old instance"
            );
        }
        let stats = rig.stats();
        assert_eq!(
            (stats.generation, stats.poisoned, stats.gate.retired),
            (2, 0, 0)
        );
        assert_eq!(stats.state, ManagerState::Ready);
    }
}

#[test]
fn the_repair_is_told_as_a_reload_with_its_own_reason() {
    let rig = Setup::new(&guests::grower("1")).start();
    let old = rig.replica(0);
    rig.number("grow", &[4]);
    assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
    rig.host
        .wait_for("reload", 1, |event| matches!(event, Event::Reload(_)));
    let events = rig.host.events();
    let [Event::Trap(_), Event::Reload(report)] = events.as_slice() else {
        panic!("{events:?}")
    };
    assert_eq!(report.reason, "trap");
    assert_eq!(
        (report.previous_generation.get(), report.generation.get()),
        (1, 2)
    );
    assert_eq!(
        (report.memory_bytes_before, report.memory_bytes_after),
        (5 << 16, 1 << 16)
    );
    assert!(old.is_released());
    let change = rig.host.changes().pop().unwrap();
    assert_eq!(
        (change.old, change.new),
        (vec![old.id()], vec![rig.replica(0).id()])
    );
}

#[test]
fn a_trap_every_time_and_an_answer_every_time() {
    for rig in both(counter) {
        for n in 0..200 {
            let calls = [
                rig.call("increment", &[]),
                rig.call("trap", &[]),
                rig.call("increment", &[]),
            ];
            let [one, trapped, other] = calls.map(|call| call.get());
            assert_eq!((number(one) > 0, trap(trapped)), (true, "unreachable"));
            assert_eq!(number(other), 1, "round {n}");
        }
        rig.wait_generation(201);
    }
}

#[test]
fn traps_on_the_pool_and_at_home_in_any_order() {
    let rig = counter().at_home().start();
    for _ in 0..200 {
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
        assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
        assert_eq!(rig.number("increment", &[]), 1);
        assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
        let sync = rig.call_sync("increment", &[]).unwrap();
        assert!(matches!(sync.as_slice(), [Value::I32(1)]));
    }
    assert_eq!(rig.stats().calls.trapped, 200 * 6);
}

#[test]
fn others_that_wait_are_served_after_a_trap_at_home() {
    let rig = counter().at_home().start();
    for _ in 0..50 {
        // Queued from elsewhere, where slot 0 cannot be had; then the home traps in it.
        let (settle, waiting) = wasm_molt_testkit::wait::answer("a call from another thread");
        let work = wasm_molt_engine::Work::Call {
            function: rig.function("increment"),
            args: Vec::new(),
        };
        let limits = wasm_molt_engine::CallLimits::default();
        rig.manager.call(None, work, limits, Box::new(settle));
        assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
        assert_eq!(number(waiting.get()), 1);
    }
}

#[test]
fn the_others_serve_while_one_is_replaced() {
    let rig = counter().instances(3).start();
    let held = rig.faults.hold(Point::Imports, 0);
    assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
    held.wait();
    for _ in 0..100 {
        assert!(rig.number("increment", &[]) > 0);
    }
    let stats = rig.stats();
    assert_eq!(
        (stats.gate.retired, stats.poisoned, stats.generation),
        (1, 1, 1)
    );
    held.release();
    rig.wait_generation(2);
    eventually("all are back in service", || rig.stats().gate.retired == 0);
}

#[test]
fn all_may_trap_at_once() {
    for rig in both(|| counter().instances(3)) {
        for round in 1..50 {
            let calls: Vec<_> = (0..6).map(|_| rig.call("trap", &[])).collect();
            let behind: Vec<_> = (0..3).map(|_| rig.call("increment", &[])).collect();
            calls
                .into_iter()
                .for_each(|call| assert_eq!(trap(call.get()), "unreachable"));
            behind
                .into_iter()
                .for_each(|call| assert!(number(call.get()) > 0));
            rig.wait_generation(round * 6 + 1);
        }
    }
}

#[test]
fn each_replacement_has_a_generation_of_its_own() {
    let rig = counter().instances(2).start();
    let held = [
        rig.faults.hold(Point::Initialize, 0),
        rig.faults.hold(Point::Initialize, 0),
    ];
    let calls = [rig.call("trap", &[]), rig.call("trap", &[])];
    calls
        .into_iter()
        .for_each(|call| assert_eq!(trap(call.get()), "unreachable"));
    // Both are under way before either is done.
    held.iter().for_each(wasm_molt_testkit::faults::Held::wait);
    drop(held);
    rig.wait_generation(3);
    let mut generations = [0, 1].map(|slot| rig.replica(slot).generation().get());
    generations.sort_unstable();
    assert_eq!(generations, [2, 3]);
}

#[test]
fn a_repair_that_fails_is_tried_again_by_the_next_call() {
    for point in [Point::Imports, Point::Initialize] {
        for rig in both(counter) {
            rig.faults.fail(point, 0, thrown());
            assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
            wait_failed(&rig);
            rig.host.wait_for("failure", 1, |event| {
                matches!(event, Event::ReloadFailed(_))
            });
            let stats = rig.stats();
            assert_eq!(
                (stats.reloads_failed, stats.generation, stats.gate.retired),
                (1, 1, 1)
            );
            assert_eq!(rig.number("increment", &[]), 1);
            eventually("it is ready again", || {
                rig.manager.state() == ManagerState::Ready
            });
            assert_eq!(rig.stats().generation, 2);
        }
    }
}

#[test]
fn a_repair_that_fails_tells_those_who_waited_for_it() {
    for (point, phase) in [
        (Point::Imports, FailedPhase::Instantiate),
        (Point::Initialize, FailedPhase::Initialize),
    ] {
        for rig in both(counter) {
            let failing = rig.faults.hold_then_fail(point, 0, thrown());
            let trapped = rig.call("trap", &[]);
            assert_eq!(trap(trapped.get()), "unreachable");
            failing.wait();
            let waiting: Vec<_> = (0..3).map(|_| rig.call("increment", &[])).collect();
            let lease = rig.ask_lease().0;
            failing.release();
            for call in waiting {
                let error = call.get().unwrap_err();
                let Error::ReloadFailed {
                    phase: failed,
                    cause,
                    ..
                } = &error
                else {
                    panic!("{error:?}")
                };
                assert_eq!(*failed, phase);
                let Error::Thrown(thrown) = &**cause else {
                    panic!("{cause:?}")
                };
                assert_eq!(thrown.downcast_ref(), Some(&"mine"));
            }
            assert_eq!(code(lease.get()), ErrorCode::ReloadFailed);
            wait_failed(&rig);
            assert_eq!(rig.number("increment", &[]), 1);
        }
    }
}

#[test]
fn a_repair_that_panics_is_a_repair_that_fails() {
    for point in [Point::Imports, Point::Initialize] {
        for rig in both(counter) {
            rig.faults.panic(point, 0);
            assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
            wait_failed(&rig);
            assert_eq!(rig.number("increment", &[]), 1);
        }
    }
}

#[test]
fn a_repair_that_fails_again_and_again_recovers_in_the_end() {
    for rig in both(counter) {
        fail(&rig);
        // Each waits longer for its turn than the one before.
        for _ in 0..5 {
            rig.faults.fail(Point::Imports, 0, thrown());
            assert_eq!(
                code(rig.call("increment", &[]).get()),
                ErrorCode::ReloadFailed
            );
        }
        assert_eq!(rig.number("increment", &[]), 1);
        assert_eq!(rig.stats().reloads_failed, 6);
    }
}

#[test]
fn one_slot_that_cannot_be_repaired_leaves_the_others_in_service() {
    let door = Door::new();
    let script = Script::new().function("host", door.function());
    let rig = Setup::new(&guests::importer())
        .instances(2)
        .script(script)
        .start();
    rig.faults.fail(Point::Imports, 0, thrown());
    assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
    rig.host.wait_for("failure", 1, |event| {
        matches!(event, Event::ReloadFailed(_))
    });
    assert_eq!(
        rig.manager.state(),
        ManagerState::Ready,
        "the other one serves"
    );
    for _ in 0..10 {
        assert_eq!(rig.number("twice", &[2]), 4);
    }
    assert_eq!(rig.stats().gate.retired, 1);
    // As soon as somebody has to wait, it is tried again.
    let calls = [
        rig.call("run", &[Value::I32(1)]),
        rig.call("run", &[Value::I32(2)]),
    ];
    assert_eq!(
        door.arrived() + door.arrived(),
        3,
        "both are inside at once"
    );
    door.open();
    calls.into_iter().for_each(|call| drop(call.get().unwrap()));
    assert_eq!(rig.stats().gate.retired, 0);
}

#[test]
fn whoever_comes_while_a_repair_fails_is_served_by_the_next() {
    let setup = || counter().instances(2);
    for rig in both(setup) {
        let failing = rig.faults.hold_then_fail(Point::Initialize, 0, thrown());
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        failing.wait();
        // The other one stays taken: nobody else is going to ask for the slot.
        let lease = rig.lease();
        let waiting = rig.call("increment", &[]);
        failing.release();
        assert_eq!(number(waiting.get()), 1);
        assert_eq!(rig.stats().reloads_failed, 1);
        rig.release(&lease);
    }
}

#[test]
fn a_reload_that_waits_for_a_repair_can_be_joined() {
    for rig in both(counter) {
        let hold = rig.faults.hold(Point::Initialize, 0);
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        hold.wait();
        let reloads: Vec<_> = (0..3).map(|_| rig.ask_reload(because("one"))).collect();
        hold.release();
        for reload in reloads {
            assert_eq!(reload.get().unwrap().generation.get(), 3);
        }
        assert_eq!(rig.stats().generation, 3);
    }
}

#[test]
fn a_reload_cures_a_manager_that_failed() {
    for rig in both(counter) {
        fail(&rig);
        assert_eq!(rig.reload("cure").generation.get(), 2);
        assert_eq!(
            (rig.manager.state(), rig.number("increment", &[])),
            (ManagerState::Ready, 1)
        );
        fail(&rig);
        let report = rig.reload_now(because("cure on this thread")).unwrap();
        assert_eq!(report.generation.get(), 3);
        assert_eq!(
            (rig.manager.state(), rig.number("increment", &[])),
            (ManagerState::Ready, 1)
        );
    }
}

#[test]
fn a_reload_that_fails_does_not_make_a_failed_manager_ready() {
    for rig in both(counter) {
        fail(&rig);
        rig.faults.fail(Point::Imports, 0, thrown());
        assert_eq!(
            code(rig.ask_reload(because("no cure")).get()),
            ErrorCode::ReloadFailed
        );
        assert_eq!(rig.manager.state(), ManagerState::Failed, "nothing serves");
        rig.reload("cure");
        assert_eq!(rig.number("increment", &[]), 1);
    }
}

/// A host function that has a nested call trap, hides that, and then waits at the door.
fn hiding(door: &Door) -> Script {
    let meet = door.function();
    Script::new().function("host", move |call| {
        if matches!(call.args[0], Value::I32(0)) {
            assert_eq!(trap(call_again(call, "trap", Vec::new())), "unreachable");
        }
        meet(call)
    })
}

#[test]
fn an_instance_is_not_replaced_while_a_call_is_inside() {
    for round in 0..30 {
        let door = Door::new();
        let rig = Setup::new(&guests::importer())
            .instances(2)
            .script(hiding(&door))
            .start();
        let inside = rig.call("run", &[Value::I32(0)]);
        door.arrived();
        // The other slot is out of service, and its repair takes its time.
        let repair = rig.faults.hold(Point::Imports, 0);
        // Nobody else is to be replaced: reached only if somebody is.
        let forbidden = rig.faults.hold(Point::Imports, 0);
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        repair.wait();
        let waiting = rig.call("twice", &[Value::I32(3)]);
        repair.release();
        assert_eq!(number(waiting.get()), 6);
        let is_replaced = forbidden.is_reached();
        // Out first: with the instance gone beneath it, the call could do anything.
        door.open();
        assert_eq!(number(inside.get()), 0);
        forbidden.release();
        assert!(!is_replaced, "round {round}: replaced with a call inside");
        assert_eq!(rig.number("twice", &[2]), 4);
        eventually("all are back in service", || {
            let stats = rig.stats();
            if stats.gate.retired > 0 {
                drop(rig.call("twice", &[Value::I32(1)]).get());
            }
            stats.gate.retired == 0 && stats.poisoned == 0
        });
    }
}

#[test]
fn an_instance_is_not_replaced_while_it_is_leased() {
    for _ in 0..30 {
        let rig = counter().instances(2).start();
        let lease = rig.lease();
        assert_eq!(trap(rig.call_in(&lease, "trap", &[]).get()), "unreachable");
        let repair = rig.faults.hold(Point::Imports, 0);
        let forbidden = rig.faults.hold(Point::Imports, 0);
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        repair.wait();
        let waiting = rig.call("increment", &[]);
        repair.release();
        assert_eq!(number(waiting.get()), 1);
        let is_replaced = forbidden.is_reached();
        rig.release(&lease);
        forbidden.release();
        assert!(!is_replaced, "replaced while somebody holds it");
        rig.wait_generation(3);
        eventually("all are back in service", || rig.stats().gate.retired == 0);
    }
}

#[test]
fn a_trap_while_the_next_generation_is_made_is_repaired_by_it() {
    for rig in both(counter) {
        let hold = rig.faults.hold(Point::Initialize, 0);
        let reload = rig.ask_reload(because("under way"));
        hold.wait();
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        let waiting = rig.call("increment", &[]);
        hold.release();
        assert_eq!(reload.get().unwrap().generation.get(), 2);
        assert_eq!(number(waiting.get()), 1);
        let stats = rig.stats();
        assert_eq!(
            (stats.generation, stats.gate.retired, stats.poisoned),
            (2, 0, 0)
        );
    }
}

#[test]
fn a_trap_while_a_reload_fails_is_repaired_after_it() {
    for rig in both(counter) {
        let hold = rig.faults.hold_then_fail(Point::Initialize, 0, thrown());
        let reload = rig.ask_reload(because("fails"));
        hold.wait();
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        let waiting = rig.call("increment", &[]);
        hold.release();
        assert_eq!(code(reload.get()), ErrorCode::ReloadFailed);
        assert_eq!(number(waiting.get()), 1);
        rig.wait_generation(2);
    }
}

#[test]
fn a_reload_waits_for_the_repair_that_is_under_way() {
    for rig in both(counter) {
        let hold = rig.faults.hold(Point::Initialize, 0);
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        hold.wait();
        let reload = rig.ask_reload(because("after the repair"));
        assert_eq!(code(rig.reload_now(because("now"))), ErrorCode::Reloading);
        assert!(reload.is_open());
        hold.release();
        let report = reload.get().unwrap();
        assert_eq!(
            (report.previous_generation.get(), report.generation.get()),
            (2, 3)
        );
        assert_eq!(rig.number("increment", &[]), 1);
    }
}

#[test]
fn a_trap_at_home_during_a_reload_does_not_get_two_replacements() {
    let rig = counter().at_home().start();
    let hold = rig.faults.hold(Point::Initialize, 0);
    let reload = rig.ask_reload(because("under way"));
    hold.wait();
    assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
    // The home would repair it by itself, which must wait for the reload.
    assert_eq!(code(rig.call_sync("increment", &[])), ErrorCode::Reloading);
    hold.release();
    reload.get().unwrap();
    assert_eq!(rig.number("increment", &[]), 1);
    assert_eq!(rig.stats().generation, 2);
}

#[test]
fn a_repair_at_home_that_fails_is_told_to_the_caller() {
    let rig = counter().at_home().start();
    assert_eq!(trap(rig.call_sync("trap", &[])), "unreachable");
    rig.faults.fail(Point::Initialize, 0, thrown());
    assert_eq!(
        code(rig.call_sync("increment", &[])),
        ErrorCode::ReloadFailed
    );
    let back = rig.call_sync("increment", &[]).unwrap();
    assert!(matches!(back.as_slice(), [Value::I32(1)]));
    assert_eq!(
        (rig.stats().generation, rig.manager.state()),
        (2, ManagerState::Ready)
    );
}

#[test]
fn a_repair_at_home_and_one_in_the_background_do_not_both_happen() {
    for _ in 0..30 {
        let rig = counter().at_home().start();
        let hold = rig.faults.hold(Point::Initialize, 0);
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        hold.wait();
        // The background one is held; the home makes its own and commits first.
        let back = rig.call_sync("increment", &[]).unwrap();
        assert!(matches!(back.as_slice(), [Value::I32(1)]));
        hold.release();
        assert_eq!(
            rig.number("increment", &[]),
            2,
            "the second replacement is dropped"
        );
        assert_eq!(rig.stats().generation, 2);
    }
}

#[test]
fn close_waits_for_the_repair_and_for_those_who_wait_for_it() {
    for rig in both(counter) {
        let hold = rig.faults.hold(Point::Initialize, 0);
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        hold.wait();
        let waiting = [rig.call("increment", &[]), rig.call("increment", &[])];
        let closed = rig.close(None);
        hold.release();
        let [one, two] = waiting.map(|call| number(call.get()));
        assert_eq!((one, two), (1, 2));
        closed.get().unwrap();
    }
}

#[test]
fn close_ends_though_the_repair_fails() {
    for rig in both(counter) {
        let hold = rig.faults.hold_then_fail(Point::Initialize, 0, thrown());
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        hold.wait();
        let waiting = rig.call("increment", &[]);
        let closed = rig.close(None);
        hold.release();
        assert_eq!(code(waiting.get()), ErrorCode::ReloadFailed);
        closed.get().unwrap();
    }
}

#[test]
fn every_way_of_dying_is_repaired() {
    let setup = || {
        Setup::new(&guests::importer())
            .script(Script::new().function("host", |_| panic!("on purpose, in a host function")))
    };
    for rig in both(setup) {
        assert_eq!(
            code(rig.call("run", &[Value::I32(1)]).get()),
            ErrorCode::Internal
        );
        assert_eq!(code(rig.call_for(5, "spin", &[]).get()), ErrorCode::Timeout);
        let (spinning, stop) = rig.call_abortable("spin", &[]);
        stop.stop(wasm_molt_engine::Stop::Aborted(HostRef::new("reason")));
        assert!(matches!(spinning.get(), Err(Error::Aborted(_))));
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        assert_eq!(rig.number("twice", &[1]), 2);
    }
}

#[test]
fn who_is_told_first_that_nobody_serves_may_ask_at_once() {
    // The answer of a call that found the manager failed asks the next question itself.
    for rig in both(counter) {
        fail(&rig);
        rig.faults.fail(Point::Imports, 0, thrown());
        let (done, second) = wasm_molt_testkit::wait::answer("the second call");
        let (manager, function) = (rig.manager.clone(), rig.function("increment"));
        let settle = move |first: wasm_molt_engine::Result<wasm_molt_engine::Outcome>| {
            assert_eq!(code(first), ErrorCode::ReloadFailed);
            let work = wasm_molt_engine::Work::Call {
                function,
                args: Vec::new(),
            };
            manager.call(
                None,
                work,
                wasm_molt_engine::CallLimits::default(),
                Box::new(done),
            );
        };
        let work = wasm_molt_engine::Work::Call {
            function,
            args: Vec::new(),
        };
        let limits = wasm_molt_engine::CallLimits::default();
        rig.manager.call(None, work, limits, Box::new(settle));
        assert_eq!(number(second.get()), 1);
    }
}
