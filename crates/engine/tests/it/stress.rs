//! A long life leaves nothing behind.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use wasm_molt_engine::{CallLimits, Manager, ReloadOptions, Strategy, Work};
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::meter::{self, Reading};
use wasm_molt_testkit::quiet::alone;
use wasm_molt_testkit::rig::{Rig, Setup, because, number, trap};
use wasm_molt_testkit::wait::{answer, eventually};

const MIB: usize = 1 << 20;

/// A counter of two replicas that carries its counts over.
fn counter() -> Setup {
    Setup::new(&guests::counter())
        .instances(2)
        .script(Script::carrying())
}

/// Reads the meter once the threads that are on their way out have gone.
fn settled(threads: Option<usize>) -> Option<Reading> {
    let mut reading = meter::read()?;
    if let Some(threads) = threads {
        eventually("threads end", || {
            meter::read().is_some_and(|now| {
                reading = now;
                now.threads <= threads
            })
        });
    }
    Some(reading)
}

#[track_caller]
fn assert_flat(what: &str, readings: &[Reading]) {
    println!("{what}: {readings:#?}");
    let [first, .., last] = readings else { return };
    assert!(
        last.threads <= first.threads,
        "{what}: threads {readings:#?}"
    );
    assert!(
        last.descriptors <= first.descriptors,
        "{what}: descriptors {readings:#?}"
    );
    assert!(
        last.mappings <= first.mappings + 10,
        "{what}: mappings {readings:#?}"
    );
    assert!(
        last.rss_bytes <= first.rss_bytes + 12 * MIB,
        "{what}: memory {readings:#?}"
    );
}

/// Calls as fast as answers come, until told to end; answers how many increments were answered.
fn traffic(manager: &Manager, function: usize, is_over: &AtomicBool) -> i64 {
    let mut done = 0;
    while !is_over.load(Ordering::Relaxed) {
        let calls: Vec<_> = (0..4)
            .map(|_| {
                let (settle, ended) = answer("increment");
                let work = Work::Call {
                    function,
                    args: Vec::new(),
                };
                manager.call(None, work, CallLimits::default(), Box::new(settle));
                ended
            })
            .collect();
        for call in calls {
            assert!(number(call.get()) > 0);
            done += 1;
        }
    }
    done
}

/// Counts in all replicas.
fn total(rig: &Rig) -> i64 {
    let leases = [rig.lease(), rig.lease()];
    let total = leases.iter().map(|lease| {
        let count = number(rig.call_in(lease, "get", &[]).get());
        rig.release(lease);
        i64::from(count)
    });
    total.sum()
}

#[test]
fn two_thousand_reloads_with_calls_in_flight_lose_nothing_and_keep_nothing() {
    const ROUNDS: usize = 4;
    const RELOADS: usize = 500;
    let _alone = alone();
    let rig = counter().start();
    let function = rig.function("increment");
    let mut readings = Vec::new();
    let answered = Mutex::new(0);
    let mut drained = 0;
    for _ in 0..ROUNDS {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let done = traffic(&rig.manager, function, &is_over);
                    *answered.lock().unwrap() += done;
                });
            }
            for _ in 0..RELOADS {
                drained += rig.reload("stress").drained;
            }
            is_over.store(true, Ordering::Relaxed);
        });
        readings.extend(settled(
            readings.first().map(|first: &Reading| first.threads),
        ));
    }
    let answered = *answered.lock().unwrap();
    assert_eq!(
        total(&rig),
        answered,
        "each answered increment is there, once"
    );
    assert!(drained > RELOADS, "calls were in flight: {drained}");
    assert!(answered > (ROUNDS * RELOADS) as i64, "{answered} calls");
    let stats = rig.stats();
    assert_eq!(stats.generation, (ROUNDS * RELOADS) as u64 + 1);
    println!(
        "{answered} calls, {drained} in flight at a reload; pause {:?}",
        stats.times.pause
    );
    assert_flat("reloads", &readings);
}

#[test]
fn ten_thousand_reloads_of_both_kinds_keep_nothing() {
    const ROUNDS: usize = 5;
    const RELOADS: usize = 2000;
    let _alone = alone();
    // A call of the old generation must not keep the new one from its thread.
    let rig = Setup::new(&guests::counter())
        .options(|o| (o.instances, o.threads) = (2, Some(4)))
        .start();
    let mut readings = Vec::new();
    let mut left_behind = 0;
    for _ in 0..ROUNDS {
        for n in 0..RELOADS {
            let (lease, call) = (rig.lease(), rig.call("increment", &[]));
            if n % 2 == 0 {
                let report = rig.ask_reload(rolling()).get().unwrap();
                left_behind += report.drained;
                assert!(number(rig.call_in(&lease, "increment", &[]).get()) > 0);
                rig.release(&lease);
            } else {
                rig.release(&lease);
                rig.reload("exclusive");
            }
            assert!(number(call.get()) > 0);
        }
        rig.reload("a full stop");
        eventually("one generation is left", || {
            rig.manager.stats(None).memory_bytes == 2 << 16
        });
        rig.host.forget();
        readings.extend(settled(
            readings.first().map(|first: &Reading| first.threads),
        ));
    }
    let stats = rig.stats();
    assert_eq!(stats.generation, (ROUNDS * (RELOADS + 1)) as u64 + 1);
    assert!(
        left_behind >= ROUNDS * RELOADS / 2,
        "{left_behind} left behind"
    );
    assert_eq!((stats.gate.stragglers, stats.gate.retired), (0, 0));
    assert_flat("reloads of both kinds", &readings);
}

fn rolling() -> ReloadOptions {
    ReloadOptions {
        strategy: Strategy::Rolling,
        ..because("rolling")
    }
}

#[test]
fn reloads_at_home_with_synchronous_calls_in_between_keep_nothing() {
    const ROUNDS: usize = 4;
    const RELOADS: usize = 100;
    let _alone = alone();
    let rig = counter().at_home().start();
    let mut readings = Vec::new();
    let mut answered = 0;
    for round in 0..ROUNDS {
        for n in 0..RELOADS {
            let calls = [rig.call("increment", &[]), rig.call("increment", &[])];
            let reload = rig.ask_reload(because("stress"));
            answered += i64::from(rig.call_sync("increment", &[]).is_ok());
            reload.get().unwrap();
            for call in calls {
                assert!(number(call.get()) > 0);
                answered += 1;
            }
            answered += i64::from(rig.call_sync("increment", &[]).is_ok());
            if (round + n) % 2 == 0 {
                rig.reload_now(because("stress at home")).unwrap();
            }
        }
        readings.extend(settled(
            readings.first().map(|first: &Reading| first.threads),
        ));
    }
    assert_eq!(total(&rig), answered);
    assert_flat("reloads at home", &readings);
}

#[test]
fn a_thousand_traps_and_stops_keep_nothing() {
    let _alone = alone();
    let spinner = Setup::new(&guests::spinner()).start();
    let rig = Setup::new(&guests::grower("16")).start();
    let mut readings = Vec::new();
    for _ in 0..4 {
        for _ in 0..250 {
            assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
            assert!(spinner.call_for(0, "spin", &[]).get().is_err());
        }
        assert_eq!(
            (rig.number("size", &[]), spinner.number("well", &[])),
            (16, 7)
        );
        readings.extend(settled(
            readings.first().map(|first: &Reading| first.threads),
        ));
    }
    assert_flat("traps", &readings);
}

#[test]
fn hundreds_of_managers_keep_nothing() {
    let _alone = alone();
    let mut readings = Vec::new();
    for _ in 0..4 {
        for n in 0..50 {
            let rig = if n % 2 == 0 {
                counter().start()
            } else {
                counter().at_home().start()
            };
            let lease = rig.lease();
            drop(rig.call_in(&lease, "increment", &[]).get());
            if n % 3 == 0 {
                rig.release(&lease);
                rig.close(None).get().unwrap();
            }
        }
        readings.extend(settled(
            readings.first().map(|first: &Reading| first.threads),
        ));
    }
    assert_flat("managers", &readings);
}
