//! Replicas in parallel, in order, and never more waiting than was allowed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use wasm_molt_engine::{CallLimits, ErrorCode, Value, Work};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::rig::{Setup, code, number};
use wasm_molt_testkit::wait::answer;

fn at_door(door: &Door) -> Setup {
    Setup::new(&guests::importer()).script(Script::new().function("host", door.function()))
}

#[test]
fn as_many_calls_run_at_once_as_there_are_replicas() {
    for instances in [1, 2, 5] {
        let door = Door::new();
        let rig = at_door(&door).instances(instances).start();
        let calls: Vec<_> = (0..20).map(|n| rig.call("run", &[Value::I32(n)])).collect();
        // All of these are inside at the same time: nobody has been let through.
        for _ in 0..instances {
            door.arrived();
        }
        let counts = rig.stats().gate;
        assert_eq!(
            (counts.in_flight, counts.queued),
            (instances, 20 - instances)
        );
        assert!(door.is_quiet());
        door.open();
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(number(call.get()), n as i32);
        }
    }
}

#[test]
fn fewer_threads_than_replicas_run_fewer_calls() {
    let door = Door::new();
    let rig = at_door(&door)
        .instances(4)
        .options(|o| o.threads = Some(2))
        .start();
    let calls: Vec<_> = (0..4).map(|n| rig.call("run", &[Value::I32(n)])).collect();
    assert_eq!((door.arrived() < 4, door.arrived() < 4), (true, true));
    assert!(door.is_quiet());
    for left in (0..2).rev() {
        door.go();
        door.arrived();
        assert!(door.is_quiet(), "{left} more");
    }
    door.open();
    for (n, call) in calls.into_iter().enumerate() {
        assert_eq!(number(call.get()), n as i32);
    }
}

/// Calls that note in which order they ran.
fn in_order() -> (Setup, Door, Arc<Mutex<Vec<i32>>>) {
    let (door, order) = (Door::new(), Arc::new(Mutex::new(Vec::new())));
    let (meet, log) = (door.function(), Arc::clone(&order));
    let script = Script::new().function("host", move |call| {
        let Value::I32(n) = call.args[0] else {
            panic!("{:?}", call.args)
        };
        log.lock().unwrap().push(n);
        if n == 0 { meet(call) } else { Ok(()) }
    });
    (Setup::new(&guests::importer()).script(script), door, order)
}

#[test]
fn calls_run_in_the_order_in_which_they_came() {
    let (setup, door, order) = in_order();
    let rig = setup.start();
    let mut calls = vec![rig.call("run", &[Value::I32(0)])];
    door.arrived();
    calls.extend((1..200).map(|n| rig.call("run", &[Value::I32(n)])));
    door.go();
    calls.into_iter().for_each(|call| drop(call.get().unwrap()));
    assert_eq!(*order.lock().unwrap(), (0..200).collect::<Vec<_>>());
}

#[test]
fn the_order_of_the_others_survives_one_that_goes_away() {
    let (setup, door, order) = in_order();
    let rig = setup.start();
    let first = rig.call("run", &[Value::I32(0)]);
    door.arrived();
    let calls: Vec<_> = (1..100)
        .map(|n| (n, rig.call_abortable("run", &[Value::I32(n)])))
        .collect();
    let mut kept = Vec::new();
    for (n, (call, control)) in calls {
        if n % 3 == 0 {
            control.stop(wasm_molt_engine::Stop::Interrupted("not any more".into()));
            assert_eq!(code(call.get()), ErrorCode::Interrupted);
        } else {
            kept.push((n, call));
        }
    }
    assert_eq!(rig.stats().gate.queued, kept.len());
    door.go();
    drop(first.get().unwrap());
    let expected: Vec<_> = kept.iter().map(|(n, _)| *n).collect();
    kept.into_iter()
        .for_each(|(_, call)| drop(call.get().unwrap()));
    assert_eq!(order.lock().unwrap().split_off(1), expected);
}

#[test]
fn one_more_than_may_wait_is_refused() {
    for max_queue in [0, 1, 5] {
        let door = Door::new();
        let rig = at_door(&door).options(|o| o.max_queue = max_queue).start();
        let running = rig.call("run", &[Value::I32(0)]);
        door.arrived();
        let waiting: Vec<_> = (0..max_queue)
            .map(|_| rig.call("run", &[Value::I32(1)]))
            .collect();
        for _ in 0..3 {
            let error = rig.call("run", &[Value::I32(2)]).get().unwrap_err();
            assert_eq!(error.code(), Some(ErrorCode::QueueFull));
            assert!(
                error
                    .to_string()
                    .contains(&format!("maxQueue = {max_queue}")),
                "{error}"
            );
            let (lease, _) = rig.ask_lease();
            assert_eq!(
                code(lease.get()),
                ErrorCode::QueueFull,
                "leases wait in the same queue"
            );
        }
        door.open();
        assert_eq!(number(running.get()), 0);
        waiting
            .into_iter()
            .for_each(|call| assert_eq!(number(call.get()), 1));
        assert_eq!(rig.number("run", &[3]), 3);
        assert_eq!(rig.stats().calls.rejected, 3);
    }
}

#[test]
fn the_queue_is_bounded_before_the_start_too() {
    let rig = at_door(&Door::new()).options(|o| o.max_queue = 2).create();
    let ask = || {
        let (settle, ended) = answer("a call before the start");
        let work = Work::Call {
            function: 0,
            args: vec![Value::I32(1)],
        };
        rig.manager
            .call(None, work, CallLimits::default(), Box::new(settle));
        ended
    };
    let waiting = [ask(), ask()];
    assert_eq!(code(ask().get()), ErrorCode::QueueFull);
    drop(rig.destroy().get());
    waiting
        .into_iter()
        .for_each(|call| assert_eq!(code(call.get()), ErrorCode::Closed));
}

#[test]
fn many_threads_may_call_at_once() {
    const THREADS: i32 = 8;
    const CALLS: i32 = 250;
    let rig = Setup::new(&guests::counter()).start();
    let function = rig.function("increment");
    let seen = Mutex::new(Vec::new());
    let together = Barrier::new(THREADS as usize);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                together.wait();
                let calls: Vec<_> = (0..CALLS)
                    .map(|_| {
                        let (settle, ended) = answer("increment");
                        let work = Work::Call {
                            function,
                            args: Vec::new(),
                        };
                        let settle = Box::new(settle);
                        rig.manager.call(None, work, CallLimits::default(), settle);
                        // Not more than the queue takes.
                        number(ended.get())
                    })
                    .collect();
                assert!(calls.is_sorted(), "one thread's calls run in its order");
                seen.lock().unwrap().extend(calls);
            });
        }
    });
    let mut seen = seen.into_inner().unwrap();
    seen.sort_unstable();
    assert_eq!(
        seen,
        (1..=THREADS * CALLS).collect::<Vec<_>>(),
        "each ran once, one after the other"
    );
}

#[test]
fn replicas_share_nothing() {
    let rig = Setup::new(&guests::counter()).instances(3).start();
    let leases = [rig.lease(), rig.lease(), rig.lease()];
    for (index, lease) in leases.iter().enumerate() {
        for _ in 0..=index {
            drop(rig.call_in(lease, "increment", &[]).get());
        }
    }
    for (index, lease) in leases.iter().enumerate() {
        assert_eq!(
            number(rig.call_in(lease, "get", &[]).get()),
            index as i32 + 1
        );
        rig.release(lease);
    }
    let mut slots = leases.map(|lease| lease.replica().slot());
    slots.sort_unstable();
    assert_eq!(slots, [0, 1, 2]);
}

#[test]
fn calls_that_end_on_a_pool_thread_leave_it_to_the_next() {
    // One thread, two replicas, and calls that ask for each other's ends: no thread is kept.
    let rig = Setup::new(&guests::adder())
        .instances(2)
        .options(|o| o.threads = Some(1))
        .start();
    let done = Arc::new(AtomicUsize::new(0));
    let calls: Vec<_> = (0..500)
        .map(|n| {
            let done = Arc::clone(&done);
            let (settle, ended) = answer("add");
            let settle = move |outcome| {
                done.fetch_add(1, Ordering::SeqCst);
                settle(outcome);
            };
            let work = Work::Call {
                function: 0,
                args: vec![Value::I32(n), Value::I32(n)],
            };
            rig.manager
                .call(None, work, CallLimits::default(), Box::new(settle));
            ended
        })
        .collect();
    for (n, call) in calls.into_iter().enumerate() {
        assert_eq!(number(call.get()), 2 * n as i32);
    }
    assert_eq!(done.load(Ordering::SeqCst), 500);
}

#[cfg(target_os = "linux")]
#[test]
fn threads_have_the_managers_name_and_end_with_it() {
    let count = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names
            .filter(|name| name.starts_with("molt-nametest"))
            .count()
    };
    let setup = Setup::new(&guests::adder()).instances(3);
    let rig = setup
        .options(|o| o.name = Some("nametest of a long kind".into()))
        .start();
    // A thread gives itself its name, once it runs.
    wasm_molt_testkit::wait::eventually("all three have their names", || count() == 3);
    rig.close(None).get().unwrap();
    wasm_molt_testkit::wait::eventually("the pool's threads end", || count() == 0);
}
