//! Snapshots, resets and forks, also as random histories against a plain model ([`history`]).
//!
//! The seed of a run is printed; `WASM_MOLT_SEED=<number>` repeats it.

use std::collections::HashMap;
use std::sync::Arc;

use wasm_molt_engine::{
    Error, ErrorCode, HostRef, ImageKind, Isolation, OnDrainTimeout, ResetOptions, Snapshot, Value,
};
use wasm_molt_testkit::dice::Dice;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::history;
use wasm_molt_testkit::inside::call_leased;
use wasm_molt_testkit::meter::{Reading, read};
use wasm_molt_testkit::quiet::alone;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number};
use wasm_molt_testkit::wait::eventually;

use crate::exactly_once::seed;

/// Nothing changes where the system tells nothing.
fn now() -> Reading {
    read().unwrap_or(Reading {
        rss_bytes: 0,
        mappings: 0,
        threads: 0,
        descriptors: 0,
    })
}

fn random_history(kind: ImageKind, prepares: bool, steps: usize) {
    let seed = seed();
    println!("seed {seed} {kind:?} prepares {prepares}");
    history::play(
        kind,
        prepares,
        &mut Dice::seeded(seed),
        steps,
        &format!("seed {seed}"),
    );
}

#[test]
fn random_histories_agree_with_the_model_copy_on_write() {
    random_history(ImageKind::CopyOnWrite, false, 600);
}

#[test]
fn random_histories_agree_with_the_model_copy_on_write_prepared() {
    random_history(ImageKind::CopyOnWrite, true, 600);
}

#[test]
fn random_histories_agree_with_the_model_by_copies() {
    random_history(ImageKind::Copy, false, 600);
}

#[test]
fn forks_and_snapshots_give_everything_back() {
    let _alone = alone();
    let parent = Setup::new(&guests::grower("256 1024")).start();
    parent.call("touch", &[Value::I32(16 << 20)]).get().unwrap();
    let warm_up = |rounds: usize| {
        for _ in 0..rounds {
            let child = Setup::new(&guests::grower("256 1024")).create();
            parent.fork_into(&child).unwrap();
            child.call("touch", &[Value::I32(8 << 20)]).get().unwrap();
            let taken = child.snapshot();
            child.call("grow", &[Value::I32(100)]).get().unwrap();
            child.reset(None);
            child.manager.release_snapshot(&taken);
            child.reload("again");
        }
    };
    warm_up(5);
    let before = now();
    warm_up(100);
    let after = now();
    assert!(
        after.rss_bytes < before.rss_bytes + (8 << 20),
        "{before:?} {after:?}"
    );
    assert!(
        after.descriptors <= before.descriptors,
        "{before:?} {after:?}"
    );
    // The threads of a pool end a moment after it.
    eventually("threads and mappings are gone", || {
        let after = now();
        after.threads <= before.threads + 2 && after.mappings <= before.mappings + 8
    });
}

#[test]
fn a_snapshot_gives_its_pages_back_when_it_is_released() {
    let _alone = alone();
    let rig = Setup::new(&guests::grower("1024")).start();
    rig.call("touch", &[Value::I32(64 << 20)]).get().unwrap();
    let kept = rig.snapshot();
    // Every page is another one now: the first image is of use to nobody but its snapshot.
    let write_all = |rig: &Rig| rig.call("touch", &[Value::I32(64 << 20)]).get().unwrap();
    write_all(&rig);
    let newest = rig.snapshot();
    let before = now();
    rig.manager.release_snapshot(&kept);
    drop(kept);
    let after = now();
    assert_eq!(
        after.descriptors + 1,
        before.descriptors,
        "the file behind it is closed: {before:?} {after:?}"
    );
    rig.reset(Some(&newest));
}

fn isolated(wat: &str, instances: usize) -> Setup {
    Setup::new(wat).instances(instances).options(|options| {
        options.isolation = Isolation::PerCall;
        options.max_queue = 100_000;
    })
}

#[test]
fn isolated_calls_are_each_the_first_and_resets_keep_the_generation() {
    let rig = isolated(&guests::counter(), 3).start();
    let answers: Vec<_> = (0..1000).map(|_| rig.call("increment", &[])).collect();
    for answer in answers {
        assert_eq!(number(answer.get()), 1);
    }
    assert_eq!(code(rig.call("trap", &[]).get()), ErrorCode::Trap);
    assert_eq!(rig.number("get", &[]), 0);
    assert_eq!(rig.manager.generation().get(), 1);
    let stats = rig.stats();
    assert_eq!((stats.poisoned, stats.gate.retired), (0, 0));
    assert!(stats.reloads.is_empty());
}

#[test]
fn isolated_calls_fall_back_to_their_first_snapshot() {
    let rig = isolated(&guests::counter(), 1).start();
    let lease = rig.lease();
    let set = |inside| call_leased(&inside, "set", vec![Value::I32(10)]).map(drop);
    rig.enter(&lease, set).unwrap().unwrap();
    rig.release(&lease);
    let taken = rig.snapshot();
    assert_eq!(rig.number("increment", &[]), 11);
    rig.manager.release_snapshot(&taken);
    drop(taken);
    assert_eq!(rig.number("increment", &[]), 1);
}

#[test]
fn one_that_is_not_wanted_any_more_leaves_the_one_before() {
    let rig = Setup::new(&guests::counter()).start();
    rig.number("increment", &[]);
    // Nobody keeps a handle on it.
    drop(rig.snapshot());
    rig.number("increment", &[]);
    let unwanted = rig.snapshot();
    rig.manager.release_snapshot(&unwanted);
    rig.number("increment", &[]);
    rig.reset(None);
    assert_eq!(rig.number("get", &[]), 1);
    // One that was got takes the place of the one before.
    let wanted = rig.snapshot();
    rig.manager.accept_snapshot();
    rig.manager.release_snapshot(&wanted);
    let refused = rig.ask_reset(ResetOptions::default()).get();
    assert_eq!(code(refused), ErrorCode::InvalidArgument);
}

#[test]
fn a_fork_that_cannot_be_done_at_once_forgets_nothing_of_the_tables() {
    let wat = r#"(module (memory (export "memory") 100) (table $t 1 externref)
        (func (export "keep") (param externref) (table.set $t (i32.const 0) (local.get 0)))
        (func (export "kept") (result externref) (table.get $t (i32.const 0)))
        (func (export "dirty") (param i32)
            (memory.fill (i32.const 0) (i32.const 1) (local.get 0))))"#;
    let rig = Setup::new(wat).at_home().start();
    let held = Value::Extern(Some(HostRef::new(7_u32)));
    rig.call_sync("keep", &[held]).unwrap();
    for dirty in [0, 5_000_000] {
        rig.call_sync("dirty", &[Value::I32(dirty)]).unwrap();
        let child = Setup::new(wat).create();
        assert_eq!(
            code(rig.fork_into(&child)),
            ErrorCode::SnapshotUnsupported,
            "{dirty}"
        );
    }
    rig.snapshot();
    for reload in [false, true] {
        rig.call_sync("keep", &[Value::Extern(None)]).unwrap();
        if reload {
            rig.reload("again");
        } else {
            rig.reset(None);
        }
        let kept = rig.call_sync("kept", &[]).unwrap();
        assert!(matches!(&kept[..], [Value::Extern(Some(_))]), "{kept:?}");
    }
}

#[test]
fn snapshots_that_are_released_while_instances_begin_with_them() {
    let rig = Setup::new(&guests::counter()).start();
    for _ in 0..200 {
        let taken = rig.snapshot();
        let reloaded = rig.ask_reload(because("released meanwhile"));
        rig.manager.release_snapshot(&taken);
        reloaded.get().unwrap();
    }
}

#[test]
fn a_million_bytes_of_state_follow_a_warm_reload_under_load() {
    let rig = Setup::new(&guests::counter()).instances(2).start();
    let lease = rig.lease();
    rig.enter(&lease, |inside| {
        call_leased(&inside, "set", vec![Value::I32(1000)]).unwrap();
    })
    .unwrap();
    let slot = lease.replica().slot();
    rig.release(&lease);
    let expected = if slot == 0 { 1000 } else { 0 };
    rig.snapshot();
    for round in 0..50 {
        let calls: Vec<_> = (0..20).map(|_| rig.call("get", &[])).collect();
        rig.reload("warm");
        if round > 0 {
            for call in calls {
                assert_eq!(number(call.get()), expected);
            }
        }
        assert_eq!(rig.number("get", &[]), expected);
    }
}

/// Every hook × every way to begin with a snapshot: a failure leaves the manager serving.
#[test]
fn hooks_that_fail_while_instances_begin_with_a_snapshot() {
    for point in [Point::Imports, Point::Reseed] {
        for is_panic in [false, true] {
            let rig = Setup::new(&guests::counter()).instances(2).start();
            let plan = |rig: &Rig| {
                if is_panic {
                    rig.faults.panic(point, 0);
                } else {
                    let error = Error::Thrown(HostRef::new("on purpose"));
                    rig.faults.fail(point, 0, error);
                }
            };
            rig.snapshot();
            plan(&rig);
            let failed = rig.ask_reload(because("fails")).get();
            assert!(failed.is_err(), "{point:?} {is_panic}");
            assert_eq!(rig.faults.left(), 0);
            rig.reload("goes well");
            if point == Point::Reseed {
                plan(&rig);
                let failed = rig.ask_reset(ResetOptions::default()).get();
                assert!(failed.is_err(), "{point:?} {is_panic}");
                assert_eq!(rig.faults.left(), 0);
            }
            rig.reset(None);
            let child = Setup::new(&guests::counter()).create();
            if is_panic {
                child.faults.panic(point, 0);
            } else {
                child
                    .faults
                    .fail(point, 0, Error::Thrown(HostRef::new("on purpose")));
            }
            assert!(rig.fork_into(&child).is_err(), "{point:?} {is_panic}");
            assert_eq!(
                child.manager.state(),
                wasm_molt_engine::ManagerState::Failed
            );
            drop(child);
            let child = Setup::new(&guests::counter()).create();
            rig.fork_into(&child).unwrap();
            assert_eq!(child.number("increment", &[]), 1);
            assert_eq!(rig.number("increment", &[]), 1);
        }
    }
}

#[test]
fn a_home_that_goes_ends_what_waits_for_it() {
    for action in 0..3 {
        let mut rig = Setup::new(&guests::counter()).at_home().start();
        rig.snapshot();
        rig.end_home();
        match action {
            0 => assert_eq!(code(rig.ask_snapshot().0.get()), ErrorCode::Closed),
            1 => {
                let ended = rig.ask_reset(ResetOptions::default()).get();
                assert_eq!(code(ended), ErrorCode::Closed);
            }
            _ => {
                let child = Setup::new(&guests::counter()).create();
                let (done, forked) = wasm_molt_testkit::wait::answer("fork()");
                rig.manager.fork(&child.manager, Box::new(done));
                let forked: Result<(), Error> = forked.get();
                assert_eq!(code(forked), ErrorCode::Closed);
            }
        }
    }
}

#[test]
fn at_home_everything_is_done_on_that_very_thread() {
    let rig = Setup::new(&guests::counter()).at_home().start();
    rig.call_sync("set", &[Value::I32(5)]).unwrap();
    rig.snapshot_now().unwrap();
    rig.call_sync("set", &[Value::I32(6)]).unwrap();
    let report = rig.reset_now(ResetOptions::default()).unwrap();
    assert!(report.dirty_bytes > 0);
    let values = rig.call_sync("get", &[]).unwrap();
    assert!(matches!(values[..], [Value::I32(5)]));
    let id = rig.replica(0).id();
    assert_eq!(rig.host.rewound(), [id]);
    let child = Setup::new(&guests::counter()).create();
    rig.fork_into(&child).unwrap();
    assert_eq!(child.number("get", &[]), 5);
    let lease = rig.lease();
    assert_eq!(
        code(rig.reset_now(ResetOptions::default())),
        ErrorCode::Busy
    );
    assert_eq!(code(rig.snapshot_now()), ErrorCode::Busy);
    rig.release(&lease);
}

#[test]
fn resets_that_interrupt_put_back_what_they_stop() {
    let rig = Setup::new(&guests::spinner()).start();
    rig.snapshot();
    let spinning = rig.call("spin", &[]);
    eventually("it spins", || rig.manager.stats(None).gate.in_flight == 1);
    let options = ResetOptions {
        drain_timeout: Some(std::time::Duration::ZERO),
        on_drain_timeout: OnDrainTimeout::Interrupt,
        ..ResetOptions::default()
    };
    rig.ask_reset(options).get().unwrap();
    assert_eq!(code(spinning.get()), ErrorCode::Interrupted);
    assert_eq!(rig.number("well", &[]), 7);
    assert_eq!(rig.manager.generation().get(), 1);
}

#[test]
fn a_thousand_snapshots_and_resets_keep_nothing() {
    let _alone = alone();
    let rig = Setup::new(&guests::grower("16 256")).start();
    let round = |rounds: usize| {
        let mut kept: HashMap<usize, Arc<Snapshot>> = HashMap::new();
        for round in 0..rounds {
            rig.call("touch", &[Value::I32(1 << 20)]).get().unwrap();
            rig.call("grow", &[Value::I32(2)]).get().unwrap();
            kept.insert(round % 3, rig.snapshot());
            if round % 4 == 3 {
                rig.reset(kept.get(&(round % 3)));
            }
            if round % 50 == 49 {
                rig.reload("now and then");
            }
            if rig.replica(0).memory_bytes() > 12 << 20 {
                rig.reset(Some(&rig.snapshot()));
                break;
            }
        }
    };
    for _ in 0..20 {
        round(20);
    }
    let before = now();
    for _ in 0..50 {
        round(20);
    }
    let after = now();
    assert!(
        after.rss_bytes < before.rss_bytes + (8 << 20),
        "{before:?} {after:?}"
    );
    assert!(
        after.descriptors <= before.descriptors + 2,
        "{before:?} {after:?}"
    );
    assert!(
        after.mappings <= before.mappings + 16,
        "{before:?} {after:?}"
    );
}
