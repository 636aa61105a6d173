//! New calls go to the new generation at once, while the old one drains behind.

use std::sync::Arc;
use std::time::Duration;

use wasm_molt_engine::{
    Error, ErrorCode, Event, FailedPhase, HostRef, Lease, ManagerState, OnDrainTimeout,
    ReloadOptions, Strategy, Value,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::inside::call_leased;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number, trap};
use wasm_molt_testkit::wait::{Answer, eventually};

const PAGE: usize = 1 << 16;
const ABORT: OnDrainTimeout = OnDrainTimeout::Abort;
const INTERRUPT: OnDrainTimeout = OnDrainTimeout::Interrupt;

fn rolling(reason: &str) -> ReloadOptions {
    ReloadOptions {
        strategy: Strategy::Rolling,
        ..because(reason)
    }
}

fn within(ms: u64, on_drain_timeout: OnDrainTimeout, options: ReloadOptions) -> ReloadOptions {
    ReloadOptions {
        drain_timeout: Some(Duration::from_millis(ms)),
        on_drain_timeout,
        ..options
    }
}

/// Old and new calls need threads of their own.
fn spacious(setup: Setup, instances: usize) -> Setup {
    setup.options(|o| {
        o.instances = instances;
        o.threads = Some(2 * instances + 2);
    })
}

fn at_door(door: &Door, instances: usize) -> Setup {
    let script = Script::new().function("host", door.function());
    spacious(Setup::new(&guests::importer()).script(script), instances)
}

/// A door for the odd calls and one for the even ones: nobody gets through in another's place.
fn at_doors(doors: &[Door; 2], instances: usize) -> Setup {
    let [even, odd] = doors.each_ref().map(Door::function);
    let script = Script::new().function("host", move |call| match call.args[0] {
        Value::I32(tag) if tag % 2 == 0 => even(call),
        _ => odd(call),
    });
    spacious(Setup::new(&guests::importer()).script(script), instances)
}

fn counter(instances: usize) -> Setup {
    spacious(Setup::new(&guests::counter()), instances)
}

/// With and without a home thread.
fn both(setup: impl Fn() -> Setup) -> [Rig; 2] {
    [setup().start(), setup().at_home().start()]
}

fn roll(rig: &Rig) -> u64 {
    let report = rig.ask_reload(rolling("roll")).get().unwrap();
    assert_eq!(report.strategy, Strategy::Rolling);
    report.generation.get()
}

/// A call that has come to the door.
fn held(rig: &Rig, door: &Door, tag: i32) -> Answer<wasm_molt_testkit::rig::Ended> {
    let call = rig.call("run", &[Value::I32(tag)]);
    assert_eq!(door.arrived(), tag);
    call
}

fn drain_timeout<T: std::fmt::Debug>(ended: wasm_molt_engine::Result<T>) -> usize {
    match ended {
        Err(Error::DrainTimeout { in_flight, .. }) => in_flight,
        other => panic!("a drain timeout was expected, not {other:?}"),
    }
}

/// The lease is over for its holder.
fn is_stale(rig: &Rig, lease: &Arc<Lease>) -> bool {
    match rig.enter(lease, drop) {
        Ok(()) => false,
        Err(error) => error.code() == Some(ErrorCode::StaleHandle),
    }
}

#[test]
fn new_calls_run_on_the_new_generation_while_old_ones_run_on() {
    for instances in [1, 3] {
        let door = Door::new();
        for rig in both(|| at_door(&door, instances)) {
            let old = held(&rig, &door, 1);
            let replicas: Vec<_> = (0..instances).map(|slot| rig.replica(slot)).collect();
            let report = rig.ask_reload(rolling("roll")).get().unwrap();
            assert_eq!(
                (report.previous_generation.get(), report.generation.get()),
                (1, 2)
            );
            assert_eq!((report.drained, report.queued), (1, 0));
            assert_eq!(report.save + report.restore, Duration::ZERO);
            assert_eq!(
                (report.memory_bytes_before, report.memory_bytes_after),
                (instances * PAGE, instances * PAGE)
            );
            let stats = rig.stats();
            assert_eq!((stats.state, stats.generation), (ManagerState::Ready, 2));
            assert_eq!((stats.gate.in_flight, stats.gate.stragglers), (1, 1));

            let new = held(&rig, &door, 2);
            assert_eq!(rig.stats().gate.in_flight, 2);
            let kept = replicas.iter().filter(|r| !r.is_released()).count();
            assert_eq!(kept, 1, "only the one that is in use is kept");
            for slot in 0..instances {
                assert_eq!(rig.replica(slot).generation().get(), 2);
            }
            assert!(old.is_open() && new.is_open());
            door.go();
            door.go();
            assert_eq!((number(old.get()), number(new.get())), (1, 2));
            eventually("the old generation is gone", || {
                replicas.iter().all(|replica| replica.is_released())
            });
            let stats = rig.stats();
            assert_eq!(
                (stats.gate.in_flight, stats.memory_bytes),
                (0, instances * PAGE)
            );
            assert_eq!(stats.times.pause.count, 1);
        }
    }
}

#[test]
fn synchronous_calls_go_on_before_and_after_the_roll() {
    let door = Door::new();
    let rig = at_door(&door, 1).at_home().start();
    let two = || rig.call_sync("twice", &[Value::I32(1)]).map(|_| ());
    let building = rig.faults.hold(Point::Initialize, 0);
    let reload = rig.ask_reload(rolling("sync"));
    building.wait();
    two().unwrap();
    building.release();
    reload.get().unwrap();
    assert_eq!(rig.replica(0).generation().get(), 2);
    two().unwrap();

    // Slot 0 is not at home while a call of the old generation has it, and comes home with the roll.
    let old = held(&rig, &door, 1);
    assert_eq!(code(two()), ErrorCode::Busy);
    roll(&rig);
    two().unwrap();
    door.go();
    assert_eq!(number(old.get()), 1);
    two().unwrap();
}

#[test]
fn a_lease_stays_on_its_generation_until_it_is_released() {
    for rig in both(|| counter(1)) {
        let lease = rig.lease();
        let old = Arc::clone(lease.replica());
        for n in 1..4 {
            assert_eq!(number(rig.call_in(&lease, "increment", &[]).get()), n);
        }
        assert_eq!(roll(&rig), 2);
        assert_eq!(rig.number("increment", &[]), 1, "nothing is carried over");
        for n in 4..7 {
            assert_eq!(number(rig.call_in(&lease, "increment", &[]).get()), n);
        }
        let inside = rig.enter(&lease, |inside| {
            call_leased(&inside, "increment", Vec::new())
        });
        assert!(matches!(inside.unwrap().unwrap()[..], [Value::I32(7)]));
        assert_eq!(rig.number("increment", &[]), 2);
        assert_eq!(rig.stats().memory_bytes, 2 * PAGE);
        assert!(!old.is_released());
        rig.release(&lease);
        eventually("the leased instance is gone", || old.is_released());
        assert_eq!(rig.stats().memory_bytes, PAGE);
    }
}

#[test]
fn each_old_instance_goes_as_soon_as_nobody_is_in_it() {
    for rig in both(|| counter(4)) {
        let mut leases: Vec<_> = (0..3).map(|_| rig.lease()).collect();
        let old: Vec<_> = (0..4).map(|slot| rig.replica(slot)).collect();
        let released = || old.iter().filter(|replica| replica.is_released()).count();
        assert_eq!(roll(&rig), 2);
        assert_eq!((released(), rig.stats().memory_bytes), (1, 7 * PAGE));
        for gone in 2..5 {
            let lease = leases.remove(0);
            rig.release(&lease);
            eventually("one more is gone", || released() == gone);
            assert!(lease.replica().is_released(), "it was this one's");
            let stats = rig.stats();
            assert_eq!(stats.gate.stragglers, 4 - gone);
            assert_eq!(stats.memory_bytes, (8 - gone) * PAGE);
        }
        assert_eq!(rig.stats().memory_bytes_peak, 8 * PAGE);
    }
}

#[test]
fn those_who_waited_start_on_the_new_generation() {
    let door = Door::new();
    for rig in both(|| at_door(&door, 1)) {
        let old = held(&rig, &door, 1);
        let waiting: Vec<_> = (0..5)
            .map(|n| rig.call("twice", &[Value::I32(n)]))
            .collect();
        let lease = rig.ask_lease().0;
        assert_eq!(rig.stats().gate.queued, 6);
        assert_eq!(roll(&rig), 2);
        for (n, call) in waiting.into_iter().enumerate() {
            assert_eq!(number(call.get()), 2 * n as i32);
        }
        let lease = lease.get().unwrap();
        assert_eq!(lease.replica().generation().get(), 2);
        rig.release(&lease);
        assert!(old.is_open());
        door.go();
        assert_eq!(number(old.get()), 1);
    }
}

#[test]
fn a_slot_that_could_not_be_repaired_is_back_with_the_roll() {
    for rig in both(|| counter(1)) {
        rig.faults.fail(Point::Imports, 0, Error::invalid("no"));
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        eventually("the repair has failed", || {
            rig.manager.state() == ManagerState::Failed
        });
        assert_eq!(roll(&rig), 2);
        assert_eq!(rig.number("increment", &[]), 1);
        let stats = rig.stats();
        assert_eq!((stats.gate.retired, stats.poisoned), (0, 0));
    }
}

#[test]
fn a_trap_on_the_old_generation_costs_the_new_one_nothing() {
    for rig in both(|| counter(1)) {
        let lease = rig.lease();
        let old = Arc::clone(lease.replica());
        roll(&rig);
        assert_eq!(rig.number("increment", &[]), 1);
        assert_eq!(trap(rig.call_in(&lease, "trap", &[]).get()), "unreachable");
        rig.release(&lease);
        eventually("it is gone", || old.is_released());
        assert_eq!(rig.number("increment", &[]), 2);
        let stats = rig.stats();
        assert_eq!((stats.generation, stats.gate.retired), (2, 0));
        assert_eq!(
            stats.reloads.get("trap"),
            None,
            "there was nothing to repair"
        );
    }
}

#[test]
fn there_are_never_more_than_two_generations() {
    let doors = [Door::new(), Door::new()];
    let [even, odd] = &doors;
    for rig in both(|| at_doors(&doors, 1)) {
        let first = held(&rig, odd, 1);
        assert_eq!(roll(&rig), 2);
        let second = held(&rig, even, 2);
        // Nothing is built until the first generation is left.
        rig.faults
            .fail(Point::Imports, 0, Error::invalid("too early"));
        for _ in 0..2 {
            let given_up = rig.ask_reload(within(0, ABORT, rolling("third"))).get();
            assert_eq!(drain_timeout(given_up), 1, "the second call does not count");
        }
        assert_eq!(rig.faults.left(), 1);
        let built = rig.ask_reload(rolling("third"));
        odd.go();
        assert_eq!(number(first.get()), 1);
        assert_eq!(
            code(built.get()),
            ErrorCode::ReloadFailed,
            "it was built now"
        );
        let stats = rig.stats();
        assert_eq!((stats.state, stats.generation), (ManagerState::Ready, 2));
        assert_eq!(stats.gate.stragglers, 0);

        assert_eq!(roll(&rig), 3);
        assert!(second.is_open());
        even.go();
        assert_eq!(number(second.get()), 2);
        assert_eq!(rig.number("twice", &[2]), 4);
    }
}

#[test]
fn a_second_roll_may_interrupt_the_first_generation_and_nobody_else() {
    let door = Door::new();
    for signals in [true, false] {
        let setup = || at_door(&door, 2).options(|o| o.engine.signals_based_traps = signals);
        for rig in both(setup) {
            let lease = rig.lease();
            let spinning = rig.call("spin", &[]);
            roll(&rig);
            let new_lease = rig.lease();
            let second = held(&rig, &door, 2);
            // Afterwards the second generation has no more than the same patience.
            let building = rig.faults.hold(Point::Initialize, 0);
            let reload = rig.ask_reload(within(5, INTERRUPT, rolling("impatient")));
            building.wait();
            assert_eq!(code(spinning.get()), ErrorCode::Interrupted);
            assert!(is_stale(&rig, &lease));
            assert!(!is_stale(&rig, &new_lease));
            let in_lease = rig.call_in(&new_lease, "twice", &[Value::I32(3)]);
            assert_eq!(number(in_lease.get()), 6);
            assert!(second.is_open());
            door.go();
            assert_eq!(number(second.get()), 2);
            rig.release(&new_lease);
            building.release();
            let report = reload.get().unwrap();
            assert_eq!((report.generation.get(), report.drained), (3, 0));
            assert!(report.drain >= Duration::from_millis(5));
            rig.release(&lease);
        }
    }
}

#[test]
fn what_a_roll_leaves_behind_is_interrupted_when_its_time_is_up() {
    for signals in [true, false] {
        let setup = || {
            let setup = spacious(Setup::new(&guests::spinner()), 3);
            setup.options(|o| o.engine.signals_based_traps = signals)
        };
        for rig in both(setup) {
            let idle = rig.lease();
            let busy = rig.lease();
            let queued: Vec<_> = (0..3).map(|_| rig.call_in(&busy, "spin", &[])).collect();
            let spinning = rig.call("fib", &[Value::I32(1000)]);
            let options = within(5, INTERRUPT, rolling("impatient"));
            assert_eq!(rig.ask_reload(options).get().unwrap().drained, 3);
            assert_eq!(rig.number("well", &[]), 7);
            for call in queued {
                assert_eq!(code(call.get()), ErrorCode::Interrupted);
            }
            assert_eq!(code(spinning.get()), ErrorCode::Interrupted);
            eventually("the old generation is gone", || {
                [&idle, &busy].iter().all(|l| l.replica().is_released())
            });
            assert!(is_stale(&rig, &idle) && is_stale(&rig, &busy));
            let stats = rig.stats();
            assert_eq!((stats.gate.in_flight, stats.generation), (0, 2));
        }
    }
}

#[test]
fn what_a_roll_leaves_behind_runs_on_if_nobody_wants_it_interrupted() {
    let door = Door::new();
    for rig in both(|| at_door(&door, 2)) {
        let old = held(&rig, &door, 1);
        let lease = rig.lease();
        let report = rig.ask_reload(within(0, ABORT, rolling("patient"))).get();
        assert_eq!(report.unwrap().drained, 2);
        assert_eq!(rig.number("twice", &[1]), 2);
        assert_eq!(
            number(rig.call_in(&lease, "twice", &[Value::I32(2)]).get()),
            4
        );
        door.go();
        assert_eq!(number(old.get()), 1);
        rig.release(&lease);
    }
}

#[test]
fn an_exclusive_reload_drains_both_generations() {
    let door = Door::new();
    for rig in both(|| at_door(&door, 1)) {
        let first = held(&rig, &door, 1);
        roll(&rig);
        let second = held(&rig, &door, 2);
        let given_up = rig.ask_reload(within(0, ABORT, because("exclusive"))).get();
        assert_eq!(drain_timeout(given_up), 2);
        assert!(first.is_open() && second.is_open());
        let reload = rig.ask_reload(because("exclusive"));
        eventually("the gate is closed", || {
            !rig.manager.stats(None).gate.is_open
        });
        let waiting = rig.call("twice", &[Value::I32(4)]);
        door.go();
        door.go();
        assert_eq!(reload.get().unwrap().generation.get(), 3);
        assert_eq!((number(first.get()), number(second.get())), (1, 2));
        assert_eq!(number(waiting.get()), 8);
    }
}

#[test]
fn an_impatient_exclusive_reload_interrupts_both_generations() {
    for rig in both(|| spacious(Setup::new(&guests::spinner()), 1)) {
        let first = rig.call("spin", &[]);
        roll(&rig);
        let second = rig.call("spin", &[]);
        let options = within(5, INTERRUPT, because("exclusive"));
        let report = rig.ask_reload(options).get().unwrap();
        assert_eq!((report.generation.get(), report.drained), (3, 2));
        for call in [first, second] {
            assert_eq!(code(call.get()), ErrorCode::Interrupted);
        }
        assert_eq!(rig.number("well", &[]), 7);
    }
}

#[test]
fn equal_rolls_join_and_an_exclusive_one_follows() {
    for rig in both(|| counter(1)) {
        let building = rig.faults.hold(Point::Initialize, 0);
        let first = rig.ask_reload(rolling("a"));
        building.wait();
        let same = rig.ask_reload(rolling("a"));
        let exclusive = rig.ask_reload(because("a"));
        building.release();
        let report = first.get().unwrap();
        assert!(Arc::ptr_eq(&same.get().unwrap(), &report));
        let exclusive = exclusive.get().unwrap();
        assert_eq!(
            (exclusive.generation.get(), exclusive.strategy),
            (3, Strategy::Exclusive)
        );
    }
}

#[test]
fn two_generations_at_once_cannot_hand_state_over() {
    let script = || Script::new().save(|_, _| Ok(Some(HostRef::new(()))));
    for rig in both(|| counter(1).script(script())) {
        let refused = rig.ask_reload(rolling("with state")).get();
        assert_eq!(code(refused), ErrorCode::InvalidArgument);
        assert_eq!(
            code(rig.reload_now(rolling("with state"))),
            ErrorCode::InvalidArgument
        );
        assert_eq!(rig.stats().generation, 1);
        let options = ReloadOptions {
            skip_save: true,
            ..rolling("without")
        };
        assert_eq!(rig.ask_reload(options).get().unwrap().generation.get(), 2);
    }
}

#[test]
fn on_the_calling_thread_nothing_may_be_in_flight() {
    for rig in both(|| counter(1)) {
        let lease = rig.lease();
        assert_eq!(code(rig.reload_now(rolling("now"))), ErrorCode::Busy);
        rig.release(&lease);
        let report = rig.reload_now(rolling("now")).unwrap();
        assert_eq!(report.generation.get(), 2);
        // What is left behind is in flight too.
        let lease = rig.lease();
        roll(&rig);
        assert_eq!(code(rig.reload_now(rolling("now"))), ErrorCode::Busy);
        rig.release(&lease);
        eventually("nothing is in flight", || {
            rig.manager.stats(None).gate.in_flight == 0
        });
        assert_eq!(rig.reload_now(rolling("now")).unwrap().generation.get(), 4);
    }
}

#[test]
fn a_failure_before_the_roll_has_changed_nothing() {
    let points = [
        (Point::Imports, FailedPhase::Instantiate),
        (Point::Initialize, FailedPhase::Initialize),
    ];
    for (point, phase) in points {
        for does_panic in [false, true] {
            for (skip, rig) in both(|| counter(2)).into_iter().enumerate() {
                let lease = rig.lease();
                let ids = [rig.replica(0).id(), rig.replica(1).id()];
                assert_eq!(rig.number("increment", &[]), 1);
                if does_panic {
                    rig.faults.panic(point, skip);
                } else {
                    rig.faults
                        .fail(point, skip, Error::Thrown(HostRef::new("mine")));
                }
                let error = rig.ask_reload(rolling("fails")).get().unwrap_err();
                match &error {
                    Error::ReloadFailed { phase: failed, .. } => assert_eq!(*failed, phase),
                    other if does_panic => {
                        assert_eq!(other.code(), Some(ErrorCode::Internal), "{point:?}");
                    }
                    other => panic!("{point:?}: {other:?}"),
                }
                assert_eq!([rig.replica(0).id(), rig.replica(1).id()], ids);
                let stats = rig.stats();
                assert_eq!((stats.state, stats.generation), (ManagerState::Ready, 1));
                assert_eq!((stats.gate.stragglers, stats.memory_bytes), (0, 2 * PAGE));
                assert_eq!(rig.number("increment", &[]), 2);
                assert!(!is_stale(&rig, &lease));
                rig.release(&lease);
                assert_eq!(roll(&rig), 2);
            }
        }
    }
}

#[test]
fn close_waits_for_both_generations() {
    let door = Door::new();
    for rig in both(|| at_door(&door, 1)) {
        let first = held(&rig, &door, 1);
        roll(&rig);
        let second = held(&rig, &door, 2);
        let given_up = rig.close(Some(Duration::ZERO)).get();
        assert_eq!(drain_timeout(given_up), 2);
        let closed = rig.close(None);
        assert!(first.is_open() && second.is_open());
        door.go();
        door.go();
        closed.get().unwrap();
        assert_eq!((number(first.get()), number(second.get())), (1, 2));
        assert_eq!(rig.stats().memory_bytes, 0);
    }
}

#[test]
fn destroy_stops_both_generations() {
    for rig in both(|| spacious(Setup::new(&guests::spinner()), 2)) {
        let lease = rig.lease();
        let old = Arc::clone(lease.replica());
        let first = rig.call("spin", &[]);
        roll(&rig);
        let second = rig.call("spin", &[]);
        rig.destroy().get().unwrap();
        for call in [first, second] {
            assert_eq!(code(call.get()), ErrorCode::Interrupted);
        }
        assert!(lease.is_released() && old.is_released());
        assert_eq!(rig.stats().memory_bytes, 0);
    }
}

#[test]
fn the_end_comes_while_a_roll_waits_for_the_first_generation() {
    let door = Door::new();
    for does_destroy in [true, false] {
        for rig in both(|| at_door(&door, 1)) {
            let first = held(&rig, &door, 1);
            roll(&rig);
            let reload = rig.ask_reload(rolling("waits"));
            eventually("it has begun", || {
                rig.manager.state() == ManagerState::Reloading
            });
            if does_destroy {
                let destroyed = rig.destroy();
                assert_eq!(code(reload.get()), ErrorCode::Closed);
                destroyed.get().unwrap();
                assert_eq!(code(first.get()), ErrorCode::Interrupted);
            } else {
                // Asked for before the end, so it is waited for.
                let closed = rig.close(None);
                assert!(reload.is_open());
                door.go();
                assert_eq!(number(first.get()), 1);
                assert_eq!(reload.get().unwrap().generation.get(), 3);
                closed.get().unwrap();
            }
        }
    }
}

#[test]
fn a_close_with_a_bound_gives_up_a_roll_that_waits() {
    let door = Door::new();
    for rig in both(|| at_door(&door, 1)) {
        let first = held(&rig, &door, 1);
        roll(&rig);
        let reload = rig.ask_reload(rolling("waits"));
        eventually("it has begun", || {
            rig.manager.state() == ManagerState::Reloading
        });
        let closed = rig.close(Some(Duration::from_millis(5)));
        assert_eq!(code(reload.get()), ErrorCode::Closed);
        assert_eq!(drain_timeout(closed.get()), 1);
        door.go();
        assert_eq!(number(first.get()), 1);
        rig.close(None).get().unwrap();
    }
}

#[test]
fn a_home_that_goes_during_the_roll_leaves_the_old_generation() {
    let mut rig = counter(1).at_home().start();
    let lease = rig.lease();
    let building = rig.faults.hold(Point::Initialize, 0);
    let reload = rig.ask_reload(rolling("homeless"));
    building.wait();
    rig.end_home();
    building.release();
    assert_eq!(code(reload.get()), ErrorCode::Closed);
    assert_eq!(rig.manager.generation().get(), 1);
    assert!(!rig.replica(0).is_released());
    drop(lease);
    rig.destroy().get().unwrap();
}

#[test]
fn a_home_that_goes_after_the_roll_leaves_both_to_the_end() {
    let doors = [Door::new(), Door::new()];
    let [even, odd] = &doors;
    let mut rig = at_doors(&doors, 1).at_home().start();
    let old = held(&rig, odd, 1);
    let replica = rig.replica(0);
    roll(&rig);
    let new = held(&rig, even, 2);
    rig.end_home();
    odd.go();
    assert_eq!(number(old.get()), 1);
    eventually("the old one is released all the same", || {
        replica.is_released()
    });
    rig.destroy().get().unwrap();
    assert_eq!(code(new.get()), ErrorCode::Interrupted);
}

#[test]
fn every_step_is_told_once_and_in_order() {
    for rig in both(|| counter(1)) {
        let steps = |rig: &Rig| {
            let told = rig
                .host
                .events()
                .into_iter()
                .filter_map(|event| match event {
                    Event::Step(step) => Some((step.step.as_str(), step.generation.get())),
                    _ => None,
                });
            told.collect::<Vec<_>>()
        };
        roll(&rig);
        let rolled = [("drain", 2), ("instantiate", 2), ("commit", 2)];
        assert_eq!(steps(&rig), rolled);
        rig.reload("exclusive");
        let exclusive = [
            ("instantiate", 3),
            ("drain", 3),
            ("save", 3),
            ("restore", 3),
            ("commit", 3),
        ];
        assert_eq!(steps(&rig)[3..], exclusive);
    }
}

#[test]
fn rolls_and_exclusive_reloads_alternate_under_load() {
    for rig in both(|| counter(2)) {
        for n in 1..60 {
            let lease = rig.lease();
            let calls: Vec<_> = (0..4).map(|_| rig.call("increment", &[])).collect();
            let reload = if n % 3 == 0 {
                rig.ask_reload(because("exclusive"))
            } else {
                rig.ask_reload(rolling("roll"))
            };
            let in_lease = rig.call_in(&lease, "increment", &[]);
            rig.release(&lease);
            assert!(number(in_lease.get()) > 0);
            for call in calls {
                assert!(number(call.get()) > 0);
            }
            assert_eq!(reload.get().unwrap().generation.get(), n + 1);
        }
        eventually("one generation is left", || {
            rig.manager.stats(None).memory_bytes == 2 * PAGE
        });
    }
}
