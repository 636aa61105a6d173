//! What the system refuses: at every step of everything that a manager does, once and for good.
//!
//! Our own requests for memory, files and threads are counted, and the first, the second, the third is refused,
//! until a whole story needs fewer than that. Whatever is refused ends in an error that says so, or in nothing
//! that anybody notices; afterwards the manager serves, and can be ended.
//!
//! A process of its own, for the count is the process's. Where Rust itself needs heap and gets none, it aborts;
//! that is not looked at here, nor can it be.
#![allow(
    clippy::pedantic,
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test may stop, and its helpers are read where they are used"
)]
#![cfg(unix)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use wasm_molt_engine::{
    Backoff, CacheChoice, CallLimits, Error, ErrorCode, FuncHandle, GuestThread, Isolation, Lease,
    ManagerState, Module, OnDrainTimeout, PoolCounts, RealmImport, RecycleOptions, RecycleStrategy,
    ReloadOptions, ResetOptions, Result, Strategy, ThreadCall, Value, Work, scarcity,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::folder::Folder;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::meter;
use wasm_molt_testkit::quiet::alone;
use wasm_molt_testkit::rig::{Rig, Setup, because, number};
use wasm_molt_testkit::wait::{Answer, answer, eventually};

/// A number in memory; memory that grows; a loop without an end; `held` asks the host.
const GUEST: &str = r#"(module $scarce
    (import "env" "host" (func $host (param i32) (result i32)))
    (memory (export "memory") 1 64)
    (func (export "held") (param i32) (result i32) (call $host (local.get 0)))
    (func (export "get") (result i32) (i32.load (i32.const 16)))
    (func (export "set") (param i32) (i32.store (i32.const 16) (local.get 0)))
    (func (export "dirty") (param i32)
        (i32.store (i32.const 16) (local.get 0)) (i32.store (i32.const 40000) (local.get 0)))
    (func (export "grow") (result i32) (memory.grow (i32.const 1)))
    (func (export "trap") unreachable)
    (func (export "spin") (loop $again (br $again))))"#;

/// What was asked for, and how it ended.
type Ends = Vec<(&'static str, Result<()>)>;

/// A manager, and the door at which its calls can be held.
struct World {
    rig: Rig,
    door: Door,
}

fn setup(has_home: bool) -> (Setup, Door) {
    let door = Door::new();
    let script = Script::carrying().function("host", door.function());
    let setup = Setup::new(GUEST)
        .script(script)
        .options(|o| o.has_home = has_home);
    (setup, door)
}

fn world(has_home: bool, change: impl FnOnce(Setup) -> Setup) -> World {
    let (setup, door) = setup(has_home);
    World {
        rig: change(setup).start(),
        door,
    }
}

/// The number of requests that are refused in a row: one that was bad luck, or all from there on.
const LENGTHS: [usize; 2] = [1, usize::MAX];

fn refused(first: usize, length: usize) -> Range<usize> {
    first..first.saturating_add(length)
}

/// Has one request after the other refused in `story`, which is given something fresh each time.
///
/// * `check`: what has to be true afterwards, when nothing is refused any more.
fn sweep<W>(name: &str, make: impl Fn() -> W, story: impl Fn(&W) -> Ends, check: impl Fn(W)) {
    for length in LENGTHS {
        let (mut errors, mut requests) = (0, 0);
        for first in 0.. {
            let world = make();
            scarcity::refuse(refused(first, length));
            let ends = story(&world);
            requests = scarcity::relent();
            for (what, end) in ends {
                if let Err(error) = end {
                    errors += 1;
                    let place = format!("{name}, {what}, request {first} of {requests}");
                    check_error(&place, &error);
                }
            }
            check(world);
            if requests <= first {
                break;
            }
            assert!(first < 2000, "{name}: no end of requests");
        }
        println!("{name}: {requests} requests, {errors} errors");
    }
}

/// It has a code and says what is missing; and it is no panic that somebody has caught.
fn check_error(place: &str, error: &Error) {
    let text = error.to_string();
    let code = error.code();
    let may = [
        ErrorCode::Internal,
        ErrorCode::Link,
        ErrorCode::ReloadFailed,
        ErrorCode::Interrupted,
        ErrorCode::InvalidArgument,
        ErrorCode::Trap,
        ErrorCode::Closed,
        ErrorCode::StaleHandle,
        ErrorCode::SnapshotUnsupported,
    ];
    assert!(
        code.is_some_and(|code| may.contains(&code)),
        "{place}: {text}"
    );
    assert!(
        !text.contains("a panic") && text.len() > 20,
        "{place}: {text}"
    );
}

fn unit<T>(result: Result<T>) -> Result<()> {
    result.map(drop)
}

/// It serves, from every slot; and then it is closed, with nothing left of it (`Rig` looks).
fn serves(world: World) {
    let World { rig, door } = world;
    door.open();
    // Whoever needs a slot that could not be repaired has that done.
    let slots = rig.manager.stats(None).gate.slots;
    let leases: Vec<_> = (0..slots).map(|_| rig.lease()).collect();
    leases.iter().for_each(|lease| rig.release(lease));
    eventually("every slot is in service", || {
        let stats = rig.manager.stats(None);
        let gate = stats.gate;
        (gate.in_flight, gate.queued, gate.retired) == (0, 0, 0)
            && stats.state == ManagerState::Ready
    });
    assert!(rig.call("set", &[Value::I32(7)]).get().is_ok());
    assert_eq!(number(rig.call("held", &[Value::I32(3)]).get()), 3);
    rig.reload("afterwards it can be");
    assert!(rig.close(None).get().is_ok());
    assert_eq!(rig.manager.stats(None).memory_bytes, 0);
}

fn both(test: impl Fn(bool)) {
    for has_home in [false, true] {
        test(has_home);
    }
}

#[test]
fn a_manager_that_cannot_be_made_is_failed_and_the_next_one_serves() {
    let _alone = alone();
    both(|has_home| {
        sweep(
            "start()",
            || setup(has_home).0.create(),
            |rig| vec![("start()", rig.start().get())],
            |rig| {
                let state = rig.manager.state();
                assert!(
                    matches!(state, ManagerState::Ready | ManagerState::Failed),
                    "{state:?}"
                );
                drop(rig);
            },
        );
        sweep(
            "start_now()",
            || setup(has_home).0.instances(2).create(),
            |rig| vec![("start_now()", rig.start_now())],
            drop,
        );
    });
    serves(world(false, |setup| setup));
}

#[test]
fn calls_are_answered_whatever_is_refused() {
    let _alone = alone();
    both(|has_home| {
        sweep(
            "calls",
            || world(has_home, |setup| setup.instances(2)),
            |World { rig, .. }| {
                vec![
                    ("a call", unit(rig.call("set", &[Value::I32(1)]).get())),
                    ("growth", unit(rig.call("grow", &[]).get())),
                    ("a timeout", expect_timeout(rig)),
                    ("after a timeout", unit(rig.call("get", &[]).get())),
                ]
            },
            serves,
        );
    });
}

/// The call has been stopped, or was refused for want of something.
fn expect_timeout(rig: &Rig) -> Result<()> {
    match rig.call_for(1, "spin", &[]).get() {
        Err(error) if error.code() == Some(ErrorCode::Timeout) => Ok(()),
        ended => unit(ended),
    }
}

fn strategies() -> [ReloadOptions; 3] {
    [
        because("exclusive"),
        ReloadOptions {
            strategy: Strategy::Rolling,
            skip_save: true,
            ..because("rolling")
        },
        ReloadOptions {
            source: Some(guests::source(&GUEST.replace("$scarce", "$other"))),
            ..because("another build")
        },
    ]
}

#[test]
fn a_reload_that_cannot_be_leaves_what_serves() {
    let _alone = alone();
    both(|has_home| {
        for options in strategies() {
            sweep(
                &options.reason,
                || world(has_home, |setup| setup.instances(2)),
                |World { rig, .. }| {
                    let before = rig.manager.generation();
                    let waiting = rig.call("get", &[]);
                    let reload = rig.ask_reload(options.clone()).get();
                    let after = rig.manager.generation();
                    assert_eq!(reload.is_ok(), after > before);
                    vec![("reload()", unit(reload)), ("a call", unit(waiting.get()))]
                },
                serves,
            );
        }
    });
}

#[test]
fn what_a_roll_leaves_behind_goes_even_without_a_thread_for_it() {
    let _alone = alone();
    both(|has_home| {
        sweep(
            "left behind",
            || {
                let world = world(has_home, |setup| setup);
                let lease = world.rig.lease();
                (world, lease)
            },
            |(World { rig, .. }, lease)| {
                let options = ReloadOptions {
                    strategy: Strategy::Rolling,
                    skip_save: true,
                    ..because("rolling")
                };
                let reload = unit(rig.ask_reload(options).get());
                let called = unit(rig.call_in(lease, "get", &[]).get());
                rig.release(lease);
                vec![("reload()", reload), ("a call in a lease", called)]
            },
            |(world, lease)| {
                let old = Arc::clone(lease.replica());
                drop(lease);
                let serves_it = |rig: &Rig| rig.replica(0).id() == old.id();
                eventually("the old instance goes", || {
                    old.is_released() || serves_it(&world.rig)
                });
                serves(world);
            },
        );
    });
}

#[test]
fn snapshots_resets_and_forks_that_cannot_be_leave_what_serves() {
    let _alone = alone();
    both(|has_home| {
        sweep(
            "snapshot() and reset()",
            || world(has_home, |setup| setup.instances(2)),
            |World { rig, .. }| {
                let dirty = unit(rig.call("dirty", &[Value::I32(5)]).get());
                let snapshot = unit(rig.ask_snapshot().0.get());
                let more = unit(rig.call("dirty", &[Value::I32(6)]).get());
                let grown = unit(rig.call("grow", &[]).get());
                // Without a snapshot there is nothing to reset to.
                let reset = match snapshot {
                    Ok(()) => unit(rig.ask_reset(ResetOptions::default()).get()),
                    Err(_) => Ok(()),
                };
                vec![
                    ("dirty", dirty),
                    ("snapshot()", snapshot),
                    ("dirty again", more),
                    ("growth", grown),
                    ("reset()", reset),
                ]
            },
            serves,
        );
        sweep(
            "fork()",
            || {
                let parent = world(has_home, |setup| setup);
                let child = world_to_be(has_home);
                (parent, child)
            },
            |(parent, child)| {
                let forked = parent.rig.fork_into(&child.rig);
                // The threads of a fork begin with its first call.
                let called = match forked {
                    Ok(()) => unit(child.rig.call("get", &[]).get()),
                    Err(_) => Ok(()),
                };
                vec![("fork()", forked), ("its first call", called)]
            },
            |(parent, child)| {
                if child.rig.manager.state() == ManagerState::Ready {
                    serves(child);
                }
                serves(parent);
            },
        );
    });
}

fn world_to_be(has_home: bool) -> World {
    let (setup, door) = setup(has_home);
    World {
        rig: setup.create(),
        door,
    }
}

#[test]
fn isolated_calls_are_answered_and_none_sees_what_another_has_left() {
    let _alone = alone();
    sweep(
        "isolated calls",
        || {
            world(false, |setup| {
                setup.options(|o| o.isolation = Isolation::PerCall)
            })
        },
        |World { rig, .. }| {
            let mut ends = Ends::new();
            for _ in 0..3 {
                ends.push(("dirty", unit(rig.call("dirty", &[Value::I32(5)]).get())));
                match rig.call("get", &[]).get() {
                    Ok(value) => assert_eq!(number(Ok(value)), 0, "left by another call"),
                    Err(error) => ends.push(("get", Err(error))),
                }
            }
            ends
        },
        serves,
    );
}

#[test]
fn a_recycle_that_cannot_be_leaves_what_serves() {
    let _alone = alone();
    both(|has_home| {
        for strategy in [
            RecycleStrategy::Exclusive,
            RecycleStrategy::Rolling,
            RecycleStrategy::Reset,
        ] {
            let recycle = RecycleOptions {
                calls: Some(2),
                strategy,
                jitter: 0.0,
                backoff: Backoff {
                    initial: Duration::from_millis(1),
                    max: Duration::from_millis(2),
                },
                ..RecycleOptions::default()
            };
            sweep(
                &format!("{strategy:?}"),
                || {
                    let door = Door::new();
                    let script = match strategy {
                        RecycleStrategy::Exclusive => Script::carrying(),
                        _ => Script::new(),
                    };
                    let setup = Setup::new(GUEST)
                        .script(script.function("host", door.function()))
                        .options(|o| {
                            o.has_home = has_home;
                            o.recycle = Some(recycle.clone());
                        });
                    let rig = setup.start();
                    if strategy == RecycleStrategy::Reset {
                        rig.snapshot();
                    }
                    World { rig, door }
                },
                |World { rig, .. }| {
                    let calls = (0..6).map(|_| ("a call", unit(rig.call("get", &[]).get())));
                    let ends = calls.collect();
                    // What a roll has left behind is seen off as soon as there is a thread for it: that is asked for
                    // again and again.
                    eventually(
                        "every decision has its outcome, or waits for a thread",
                        || rig.manager.stats(None).recycles_due == 0 || scarcity::requests() > 64,
                    );
                    ends
                },
                serves,
            );
        }
    });
}

#[test]
fn what_has_trapped_is_replaced_as_soon_as_it_can_be() {
    let _alone = alone();
    both(|has_home| {
        sweep(
            "a trap",
            || world(has_home, |setup| setup),
            |World { rig, .. }| {
                let trapped = unit(rig.call("trap", &[]).get());
                assert!(trapped.is_err());
                let calls = (0..3).map(|_| ("a call", unit(rig.call("get", &[]).get())));
                [("trap", trapped)].into_iter().chain(calls).collect()
            },
            serves,
        );
    });
}

#[test]
fn calls_of_hooks_are_answered_without_a_thread_for_them() {
    let _alone = alone();
    sweep(
        "hooks",
        || {
            let door = Door::new();
            // Through the manager, so that it needs a thread.
            let call = |lease: &Arc<Lease>, manager: &wasm_molt_engine::Manager| {
                let function = lease.replica().module().function_index("get")?;
                let (settle, ended) = answer("a call in a hook");
                let work = Work::Call {
                    function,
                    args: Vec::new(),
                };
                manager.call_in(lease, work, CallLimits::default(), Box::new(settle));
                ended.get().map(drop)
            };
            let manager = Arc::new(std::sync::OnceLock::<wasm_molt_engine::Manager>::new());
            let own = Arc::clone(&manager);
            let script = Script::new()
                .function("host", door.function())
                .initialize(move |lease| match own.get() {
                    Some(manager) => call(lease, manager),
                    None => Ok(()),
                });
            let rig = Setup::new(GUEST).script(script).start();
            manager.set(rig.manager.clone()).unwrap();
            World { rig, door }
        },
        |World { rig, .. }| vec![("reload()", unit(rig.ask_reload(because("hooks")).get()))],
        serves,
    );
}

#[test]
fn the_end_comes_with_everything_refused_and_something_in_flight() {
    let _alone = alone();
    both(|has_home| {
        for is_destroy in [false, true] {
            sweep(
                if is_destroy { "destroy()" } else { "close()" },
                || {
                    let world = world(has_home, |setup| setup.instances(2));
                    let lease = world.rig.lease();
                    let held = world.rig.call("held", &[Value::I32(1)]);
                    assert_eq!(world.door.arrived(), 1);
                    (world, lease, held)
                },
                |(World { rig, door }, lease, _)| {
                    let ended = if is_destroy {
                        rig.destroy()
                    } else {
                        let ended = rig.close(Some(Duration::from_secs(20)));
                        door.open();
                        rig.release(lease);
                        ended
                    };
                    vec![("the end", ended.get())]
                },
                |(World { rig, .. }, _, held)| {
                    drop(held.get());
                    // One that was refused can be asked for again.
                    assert!(rig.destroy().get().is_ok());
                    assert_eq!(rig.manager.state(), ManagerState::Closed);
                    assert_eq!(rig.manager.stats(None).memory_bytes, 0);
                },
            );
        }
    });
}

#[test]
fn a_fork_whose_threads_have_never_begun_can_be_ended_without_any() {
    let _alone = alone();
    both(|has_home| {
        let parent = world(has_home, |setup| setup);
        // There is a timer by now.
        assert_eq!(number(parent.rig.call_for(60_000, "get", &[]).get()), 0);
        let child = world_to_be(has_home);
        parent.rig.fork_into(&child.rig).unwrap();
        let lease = child.rig.lease();
        scarcity::refuse(0..usize::MAX);
        let ended = child.rig.destroy().get();
        scarcity::relent();
        assert!(ended.is_ok() && lease.is_released());
        assert_eq!(child.rig.manager.state(), ManagerState::Closed);
        serves(parent);
    });
}

#[test]
fn an_interrupting_reload_ends_what_runs_for_ever() {
    let _alone = alone();
    sweep(
        "interrupt",
        || {
            let world = world(false, |setup| setup);
            let spin = world.rig.call("spin", &[]);
            (world, spin)
        },
        |(World { rig, .. }, _)| {
            let options = ReloadOptions {
                drain_timeout: Some(Duration::ZERO),
                on_drain_timeout: OnDrainTimeout::Interrupt,
                ..because("interrupt")
            };
            vec![("reload()", unit(rig.ask_reload(options).get()))]
        },
        |(world, spin)| {
            if spin.is_open() {
                // The reload was refused, and it runs on.
                assert!(world.rig.destroy().get().is_ok());
                assert!(spin.get().is_err());
            } else {
                assert!(spin.get().is_err());
                serves(world);
            }
        },
    );
}

/// Glue makes memories, tables and instances one by one.
const GLUED: &str = r#"(module $glued
    (memory (export "memory") 1 8)
    (table (export "table") 2 8 funcref)
    (func (export "get") (result i32) (i32.load (i32.const 16)))
    (func (export "set") (param i32) (i32.store (i32.const 16) (local.get 0)))
    (func (export "grow") (result i32) (memory.grow (i32.const 1))))"#;

/// Calls a function of a realm, unless that realm has been replaced meanwhile.
fn call_made(rig: &Rig, func: FuncHandle, args: &[Value]) -> Result<Vec<Value>> {
    let args = args.to_vec();
    let called = rig.try_realm(move |realm| {
        if func.replica_id() == realm.replica().id() {
            realm.call(&func, &args)
        } else {
            Err(realm.replica().stale())
        }
    });
    called.and_then(|called| called)
}

/// A realm that could not be put back is replaced by whoever enters it.
fn can_be_entered(rig: &Rig) {
    eventually("the realm can be entered", || rig.try_realm(|_| ()).is_ok());
}

#[test]
fn what_cannot_be_made_in_a_realm_leaves_the_realm_as_it_was() {
    let _alone = alone();
    let make = |rig: &Rig| -> Ends {
        let module = match rig.manager.compile(guests::bytes(GLUED)) {
            Ok(module) => module,
            Err(error) => return vec![("compile()", Err(error))],
        };
        let (made, mut ends) = rig.realm(move |realm| {
            let memory = realm.memory(1, Some(8), false);
            let grown = memory.clone().and_then(|it| realm.grow_memory(it, 1));
            let made = realm.instantiate(&module, Vec::new());
            let called = match &made {
                Ok(made) => unit(realm.call(&made.func("set"), &[Value::I32(5)])),
                Err(_) => Ok(()),
            };
            let ends = vec![
                ("a memory", unit(memory)),
                ("its growth", unit(grown)),
                ("an instance", unit(made.clone())),
                ("a call", called),
            ];
            (made, ends)
        });
        let snapshot = rig.ask_snapshot().0.get();
        let can_be_reset = snapshot.is_ok();
        ends.push(("snapshot()", unit(snapshot)));
        let Ok(made) = made else { return ends };
        let grown = call_made(rig, made.func("grow"), &[]);
        ends.push(("growth by the guest", unit(grown)));
        let written = call_made(rig, made.func("set"), &[Value::I32(6)]);
        ends.push(("another call", unit(written)));
        if can_be_reset {
            let reset = rig.ask_reset(ResetOptions::default()).get();
            let found = call_made(rig, made.func("get"), &[]);
            if reset.is_ok() {
                assert!(matches!(found.as_deref(), Ok([Value::I32(5)])), "{found:?}");
            }
            ends.push(("reset()", unit(reset)));
        }
        ends
    };
    sweep(
        "a realm",
        || Setup::realm().start(),
        make,
        |rig| {
            can_be_entered(&rig);
            let ends = make(&rig);
            assert!(ends.iter().all(|(_, end)| end.is_ok()), "{ends:?}");
            assert!(
                rig.ask_reload(because("afterwards it can be"))
                    .get()
                    .is_ok()
            );
        },
    );
}

/// `sleep` waits for ever; `rest` does until somebody runs `wake`, which goes on until it has woken one.
const THREADED: &str = r#"(module $threaded
    (import "env" "memory" (memory 1 8 shared))
    (func (export "sleep") (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1))))
    (func (export "rest") (drop (memory.atomic.wait32 (i32.const 8) (i32.const 0) (i64.const -1))))
    (func (export "wake")
        (drop (memory.grow (i32.const 1)))
        (loop $again
            (br_if $again (i32.eqz (memory.atomic.notify (i32.const 8) (i32.const 1)))))))"#;

/// Has a guest start threads, wait for one at home, recycle them, and lose one to a reset.
fn use_threads(rig: &Rig, module: &Arc<Module>) -> Ends {
    let module = Arc::clone(module);
    let made = rig.try_realm(move |realm| {
        let memory = realm.shared_memory(1, 8)?;
        realm.instantiate(&module, vec![RealmImport::Item(memory)])
    });
    let made = match made.and_then(|made| made) {
        Ok(made) => made,
        Err(error) => return vec![("an instance", Err(error))],
    };
    let snapshot = unit(rig.ask_snapshot().0.get());
    let can_be_reset = snapshot.is_ok();
    let mut ends = vec![("snapshot()", snapshot)];
    let sleeps = rig.spawn(made.func("sleep"));
    let wakes = rig.spawn(made.func("wake"));
    // With nobody to wake it, it would be a deadlock.
    if wakes.is_ok() {
        let rested = call_made(rig, made.func("rest"), &[]);
        ends.push(("a wait at home", unit(rested)));
    }
    let end = |spawned: Result<(GuestThread, Answer<Result<bool>>)>| {
        spawned.and_then(|(thread, ended)| {
            thread.terminate();
            unit(ended.get())
        })
    };
    ends.push(("a thread that wakes", end(wakes)));
    ends.push(("a thread that sleeps", end(sleeps)));
    let (thread, ended) = match rig.spawn(made.func("sleep")) {
        Ok(spawned) => spawned,
        Err(error) => {
            ends.push(("another thread", Err(error)));
            return ends;
        }
    };
    let sleep = made.func("sleep");
    let (recycled, next) = rig.home().at_desk(move |desk| {
        let calls = vec![ThreadCall {
            func: sleep,
            args: Vec::new(),
        }];
        let mut next = None;
        let ask = || {
            thread.terminate();
            Ok(())
        };
        let replica = desk.manager().replica(0).unwrap();
        let recycled = replica.recycle_threads(ask, || {
            next = Some(desk.spawn(calls)?);
            Ok(())
        });
        (recycled, next)
    });
    ends.push(("its end", unit(ended.get())));
    if recycled.is_err() {
        assert_eq!(rig.replica(0).guest_threads(), PoolCounts::default());
    }
    ends.push(("a recycle", recycled));
    if can_be_reset {
        let reset = unit(rig.ask_reset(ResetOptions::default()).get());
        ends.push(("reset()", reset));
    }
    if let Some(next) = next {
        ends.push(("a thread that was recycled", end(Ok(next))));
    }
    assert_eq!(rig.replica(0).guest_threads(), PoolCounts::default());
    ends
}

#[test]
fn threads_that_cannot_be_had_leave_a_realm_that_can_be_rescued() {
    let _alone = alone();
    let make = || {
        let rig = Setup::realm().options(|o| o.engine.threads = true).start();
        let module = rig.compile(THREADED);
        (rig, module)
    };
    let check = |(rig, module): (Rig, Arc<Module>)| {
        // Whichever of its threads was refused what, a reset or a reload brings everything back.
        if let Err(error) = rig.ask_reset(ResetOptions::default()).get() {
            assert_eq!(error.code(), Some(ErrorCode::InvalidArgument), "{error}");
            rig.reload("without a snapshot");
        }
        can_be_entered(&rig);
        let ends = use_threads(&rig, &module);
        assert!(ends.iter().all(|(_, end)| end.is_ok()), "{ends:?}");
        rig.reload("afterwards it can be");
        let replica = Arc::downgrade(&rig.replica(0));
        assert!(rig.close(None).get().is_ok());
        assert_eq!(rig.manager.stats(None).memory_bytes, 0);
        drop(rig);
        eventually("nobody has it any more", || replica.strong_count() == 0);
    };
    check(make());
    let before = meter::read();
    sweep(
        "threads",
        make,
        |(rig, module)| use_threads(rig, module),
        check,
    );
    let (Some(before), Some(after)) = (before, meter::read()) else {
        return;
    };
    println!("{before:?}, then {after:?}");
    eventually("no thread is left", || {
        meter::read().map(|now| now.threads) <= Some(before.threads)
    });
    assert!(
        after.descriptors <= before.descriptors && after.mappings <= before.mappings + 16,
        "{before:?}, then {after:?}"
    );
}

/// There is one timer thread in a process, so this needs one that has none yet.
#[test]
fn a_timer_thread_that_cannot_be_had_is_told_to_who_wants_it() {
    const NAME: &str = "a_timer_thread_that_cannot_be_had_is_told_to_who_wants_it";
    let make = |folder: &std::path::Path| {
        let cache = CacheChoice::Folder(folder.into());
        world(false, |setup| setup.options(|o| o.cache = cache))
    };
    let Some(folder) = std::env::var_os("WASM_MOLT_ALONE") else {
        // Whoever compiles uses the timer.
        let folder = Folder::new("compiled");
        drop(make(folder.path()));
        let itself = std::env::current_exe().unwrap();
        let child = std::process::Command::new(itself)
            .args(["--exact", NAME, "--nocapture"])
            .env("WASM_MOLT_ALONE", folder.path())
            .output();
        let child = child.unwrap();
        assert!(child.status.success(), "{child:?}");
        return;
    };
    let World { rig, door } = make(folder.as_ref());
    scarcity::refuse(0..usize::MAX);
    let ended = rig.call_for(60_000, "get", &[]).get();
    assert!(scarcity::relent() > 0, "nothing was asked for");
    let error = ended.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Internal));
    assert!(error.to_string().contains("timer thread"), "{error}");
    assert_eq!(number(rig.call_for(60_000, "get", &[]).get()), 0);
    serves(World { rig, door });
}
