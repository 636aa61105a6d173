//! One instance, held over several calls.

use std::sync::{Arc, Mutex};

use wasm_molt_engine::{CallLimits, Error, ErrorCode, HostRef, Lease, Stop, Value};
use wasm_molt_testkit::door::{Door, Pass};
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::inside::call_leased;
use wasm_molt_testkit::rig::{Rig, Setup, code, number, trap};

fn at_door(door: &Door) -> Setup {
    Setup::new(&guests::importer()).script(Script::new().function("host", door.function()))
}

/// Calls an export of the leased instance on the lease's own thread.
#[track_caller]
fn enter(
    rig: &Rig,
    lease: &Arc<Lease>,
    name: &'static str,
) -> wasm_molt_engine::Result<Vec<Value>> {
    rig.enter(lease, move |inside| call_leased(&inside, name, Vec::new()))?
}

/// With and without a home thread.
fn both(setup: impl Fn() -> Setup) -> [Rig; 2] {
    [setup().start(), setup().at_home().start()]
}

#[test]
fn nobody_else_gets_in_between() {
    for rig in both(|| Setup::new(&guests::counter())) {
        let lease = rig.lease();
        let others: Vec<_> = (0..5).map(|_| rig.call("increment", &[])).collect();
        for n in 1..=10 {
            assert_eq!(number(rig.call_in(&lease, "increment", &[]).get()), n);
        }
        assert!(others.iter().all(|other| other.is_open()));
        let stats = rig.stats();
        assert_eq!((stats.gate.in_flight, stats.gate.queued), (1, 5));
        rig.release(&lease);
        for (n, other) in others.into_iter().enumerate() {
            assert_eq!(number(other.get()), 11 + n as i32);
        }
    }
}

#[test]
fn calls_of_a_lease_run_in_their_order() {
    let rig = Setup::new(&guests::counter()).start();
    let lease = rig.lease();
    let calls: Vec<_> = (0..100)
        .map(|_| rig.call_in(&lease, "increment", &[]))
        .collect();
    for (n, call) in calls.into_iter().enumerate() {
        assert_eq!(number(call.get()), n as i32 + 1);
    }
    rig.release(&lease);
}

#[test]
fn the_holder_enters_between_its_calls_and_not_during_them() {
    let door = Door::new();
    for rig in both(|| at_door(&door)) {
        let lease = rig.lease();
        assert!(enter(&rig, &lease, "spin_not_there").is_err());
        let call = rig.call_in(&lease, "run", &[Value::I32(4)]);
        door.arrived();
        assert_eq!(code(enter(&rig, &lease, "twice")), ErrorCode::Busy);
        door.go();
        assert_eq!(number(call.get()), 4);
        let entered = rig.enter(&lease, |inside| {
            call_leased(&inside, "twice", vec![Value::I32(4)])
        });
        assert!(matches!(
            entered.unwrap().unwrap().as_slice(),
            [Value::I32(8)]
        ));
        rig.release(&lease);
    }
}

#[test]
fn a_call_that_is_handed_over_from_inside_runs_when_the_holder_has_left() {
    let rig = Setup::new(&guests::counter()).start();
    let lease = rig.lease();
    let inside = lease.enter().unwrap();
    let deeper = lease.enter().unwrap();
    let call = rig.call_in(&lease, "increment", &[]);
    drop(inside);
    call_leased(&deeper, "increment", Vec::new()).unwrap();
    assert!(call.is_open());
    drop(deeper);
    assert_eq!(number(call.get()), 2);
    rig.release(&lease);
}

#[test]
fn what_was_handed_over_before_the_release_still_runs() {
    for rig in both(|| Setup::new(&guests::counter())) {
        let lease = rig.lease();
        let calls: Vec<_> = (0..50)
            .map(|_| rig.call_in(&lease, "increment", &[]))
            .collect();
        rig.release(&lease);
        rig.release(&lease);
        assert!(lease.is_released());
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(number(call.get()), n as i32 + 1);
        }
        assert_eq!(
            code(rig.call_in(&lease, "get", &[]).get()),
            ErrorCode::StaleHandle
        );
        assert_eq!(code(enter(&rig, &lease, "get")), ErrorCode::StaleHandle);
        assert_eq!(rig.number("get", &[]), 50);
    }
}

#[test]
fn a_release_in_mid_call_gives_the_instance_back_after_the_call() {
    let door = Door::new();
    for rig in both(|| at_door(&door)) {
        let lease = rig.lease();
        let call = rig.call_in(&lease, "run", &[Value::I32(1)]);
        door.arrived();
        let next = rig.call("run", &[Value::I32(2)]);
        rig.release(&lease);
        assert_eq!(rig.stats().gate.in_flight, 1, "the call is still inside");
        assert!(door.is_quiet());
        door.go();
        assert_eq!(number(call.get()), 1);
        assert_eq!(door.arrived(), 2);
        door.go();
        assert_eq!(number(next.get()), 2);
    }
}

#[test]
fn a_release_while_the_holder_is_inside_waits_for_it_to_leave() {
    let rig = Setup::new(&guests::counter()).start();
    let lease = rig.lease();
    let inside = lease.enter().unwrap();
    rig.release(&lease);
    call_leased(&inside, "increment", Vec::new()).unwrap();
    assert_eq!(rig.stats().gate.in_flight, 1);
    assert_eq!(code(lease.enter()), ErrorCode::StaleHandle);
    drop(inside);
    assert_eq!(rig.stats().gate.in_flight, 0);
    assert_eq!(rig.number("get", &[]), 1);
}

#[test]
fn a_lease_that_is_dropped_gives_its_instance_back() {
    for rig in both(|| Setup::new(&guests::counter())) {
        let lease = rig.lease();
        let next = rig.call("increment", &[]);
        assert!(next.is_open());
        drop(lease);
        assert_eq!(number(next.get()), 1);
    }
}

#[test]
fn a_lease_that_waits_can_be_taken_out() {
    for rig in both(|| Setup::new(&guests::counter())) {
        let held = rig.lease();
        let (waiting, id) = rig.ask_lease();
        let (behind, _) = rig.ask_lease();
        rig.manager
            .cancel_lease(id, Error::Aborted(HostRef::new("reason")));
        let Err(Error::Aborted(reason)) = waiting.get() else {
            panic!()
        };
        assert_eq!(reason.downcast_ref(), Some(&"reason"));
        rig.manager
            .cancel_lease(id, Error::invalid("there is nothing any more"));
        rig.release(&held);
        rig.release(&behind.get().unwrap());
    }
}

#[test]
fn a_lease_may_be_given_back_in_the_very_answer() {
    let rig = Setup::new(&guests::adder()).start();
    let held = rig.lease();
    let log = Arc::new(Mutex::new(Vec::new()));
    for n in 0..100 {
        let log = Arc::clone(&log);
        let done = move |lease: wasm_molt_engine::Result<Arc<Lease>>| {
            log.lock().unwrap().push(n);
            lease.unwrap().release();
        };
        rig.manager.lease(None, Box::new(done));
    }
    let last = rig.ask_lease().0;
    rig.release(&held);
    rig.release(&last.get().unwrap());
    assert_eq!(*log.lock().unwrap(), (0..100).collect::<Vec<_>>());
}

#[test]
fn after_a_trap_nothing_runs_in_the_leased_instance_any_more() {
    for rig in both(|| Setup::new(&guests::counter())) {
        let lease = rig.lease();
        let trapping = rig.call_in(&lease, "trap", &[]);
        let behind = rig.call_in(&lease, "get", &[]);
        assert_eq!(trap(trapping.get()), "unreachable");
        assert_eq!(code(behind.get()), ErrorCode::StaleHandle);
        assert_eq!(
            code(rig.call_in(&lease, "get", &[]).get()),
            ErrorCode::StaleHandle
        );
        let waiting = rig.call("get", &[]);
        assert_eq!(
            rig.stats().generation,
            1,
            "it is replaced when the lease ends"
        );
        assert!(!lease.replica().is_released());
        rig.release(&lease);
        assert_eq!(number(waiting.get()), 0);
        assert_eq!(rig.stats().generation, 2);
    }
}

#[test]
fn a_trap_of_the_holder_itself_costs_the_instance_too() {
    for rig in both(|| Setup::new(&guests::counter())) {
        let lease = rig.lease();
        assert_eq!(trap(enter(&rig, &lease, "trap")), "unreachable");
        assert_eq!(
            code(rig.call_in(&lease, "get", &[]).get()),
            ErrorCode::StaleHandle
        );
        rig.release(&lease);
        assert_eq!(rig.number("get", &[]), 0);
        assert_eq!(rig.stats().generation, 2);
    }
}

#[test]
fn a_call_of_a_lease_can_be_stopped_while_it_waits_and_while_it_runs() {
    let door = Door::new();
    let rig = at_door(&door).start();
    let lease = rig.lease();
    let abortable = CallLimits {
        timeout_ms: None,
        can_abort: true,
    };
    let (running, stop_running) = rig.call_in_with(&lease, "run", &[Value::I32(1)], abortable);
    let (waiting, stop_waiting) = rig.call_in_with(&lease, "run", &[Value::I32(2)], abortable);
    let short = CallLimits {
        timeout_ms: Some(1),
        can_abort: false,
    };
    let (late, _) = rig.call_in_with(&lease, "run", &[Value::I32(3)], short);
    assert_eq!(door.arrived(), 1);
    assert_eq!(
        code(late.get()),
        ErrorCode::Timeout,
        "though the one in front still runs"
    );
    stop_waiting
        .unwrap()
        .stop(Stop::Aborted(HostRef::new("waiting")));
    assert!(matches!(waiting.get(), Err(Error::Aborted(_))));
    assert!(running.is_open());
    stop_running
        .unwrap()
        .stop(Stop::Aborted(HostRef::new("running")));
    assert!(matches!(running.get(), Err(Error::Aborted(_))));
    assert!(door.is_quiet(), "neither of the two ever ran");
    rig.release(&lease);
    door.open();
    assert_eq!(rig.number("run", &[4]), 4);
}

#[test]
fn the_queue_of_a_lease_is_bounded() {
    let door = Door::new();
    let rig = at_door(&door).options(|o| o.max_queue = 2).start();
    let lease = rig.lease();
    let running = rig.call_in(&lease, "run", &[Value::I32(0)]);
    door.arrived();
    let waiting = [1, 2].map(|n| rig.call_in(&lease, "run", &[Value::I32(n)]));
    assert_eq!(
        code(rig.call_in(&lease, "run", &[Value::I32(3)]).get()),
        ErrorCode::QueueFull
    );
    door.open();
    assert_eq!(number(running.get()), 0);
    for (n, call) in waiting.into_iter().enumerate() {
        assert_eq!(number(call.get()), n as i32 + 1);
    }
    rig.release(&lease);
}

#[test]
fn a_lease_survives_calls_that_end_badly_but_in_order() {
    let door = Door::new();
    let rig = at_door(&door).start();
    let lease = rig.lease();
    let call = rig.call_in(&lease, "run", &[Value::I32(1)]);
    door.let_through(Pass::Throw(HostRef::new("thrown")));
    assert!(matches!(call.get(), Err(Error::Thrown(_))));
    door.open();
    assert_eq!(
        number(rig.call_in(&lease, "run", &[Value::I32(2)]).get()),
        2
    );
    rig.release(&lease);
    assert_eq!(rig.stats().generation, 1);
}

#[test]
fn what_a_hook_was_lent_expires_with_the_hook() {
    let kept = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&kept);
    let script = Script::new().initialize(move |lease| {
        let inside = lease.enter()?;
        call_leased(&inside, "increment", Vec::new())?;
        *keep.lock().unwrap() = Some(Arc::clone(lease));
        Ok(())
    });
    let rig = Setup::new(&guests::counter()).script(script).start();
    let lease = kept.lock().unwrap().take().unwrap();
    assert!(lease.is_released());
    assert_eq!(code(enter(&rig, &lease, "get")), ErrorCode::StaleHandle);
    assert_eq!(
        code(rig.call_in(&lease, "get", &[]).get()),
        ErrorCode::StaleHandle
    );
    assert_eq!(rig.number("get", &[]), 1);
}

#[test]
fn a_reload_waits_for_the_lease() {
    for rig in both(|| Setup::new(&guests::counter())) {
        let lease = rig.lease();
        drop(rig.call_in(&lease, "increment", &[]).get());
        let reload = rig.ask_reload(wasm_molt_testkit::rig::because("while leased"));
        wasm_molt_testkit::wait::eventually("the gate is closed", || {
            !rig.manager.stats(None).gate.is_open
        });
        assert_eq!(
            number(rig.call_in(&lease, "increment", &[]).get()),
            2,
            "it goes on meanwhile"
        );
        assert!(reload.is_open());
        rig.release(&lease);
        assert_eq!(reload.get().unwrap().drained, 1);
        assert_eq!(rig.number("get", &[]), 0);
    }
}
