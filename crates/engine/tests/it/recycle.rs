//! Instances that are recycled: every phase × every way in which it can go wrong; decisions and their
//! outcomes; what nobody may notice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::Duration;

use wasm_molt_engine::{
    Backoff, Error, ErrorCode, Event, HostRef, ManagerState, MemoryThreshold, Reason,
    RecycleOptions, RecycleStrategy, Result, Strategy, Value,
};
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::rig::{Rig, Setup, because, code, number, trap};
use wasm_molt_testkit::wait::eventually;

const PAGE: u64 = 65_536;
const REPLICAS: usize = 2;
/// Calls that an instance runs.
const CALLS: u64 = 4;

fn exact() -> RecycleOptions {
    RecycleOptions {
        jitter: 0.0,
        backoff: Backoff {
            initial: Duration::from_millis(1),
            max: Duration::from_millis(4),
        },
        ..RecycleOptions::default()
    }
}

fn counter(recycle: RecycleOptions) -> Setup {
    Setup::new(&guests::counter()).options(|o| o.recycle = Some(recycle))
}

/// The decisions, and what came of each: `None` where something else did it.
fn outcomes(rig: &Rig) -> BTreeMap<u64, Option<Result<bool>>> {
    let mut decisions = BTreeMap::new();
    for event in rig.host.events() {
        match event {
            Event::Pressure(pressure) => {
                let id = pressure.decision.unwrap();
                assert!(decisions.insert(id, None).is_none(), "decided once");
            }
            Event::Recycled { decision, outcome } => {
                let outcome = outcome.map(|report| report.is_some());
                let before = decisions.insert(decision, Some(outcome));
                assert!(
                    matches!(before, Some(None)),
                    "one outcome, after the decision"
                );
            }
            _ => {}
        }
    }
    decisions
}

fn wait_settled(rig: &Rig) {
    eventually("every decision has its outcome", || {
        rig.stats().recycles_due == 0 && outcomes(rig).values().all(Option::is_some)
    });
}

fn recycled(rig: &Rig) -> usize {
    let is_done = |event: &Event| {
        matches!(
            event,
            Event::Recycled {
                outcome: Ok(Some(_)),
                ..
            }
        )
    };
    rig.host.count(is_done)
}

fn wait_recycled(rig: &Rig, count: usize) {
    rig.host.wait_for("recycle", count, |event| {
        matches!(
            event,
            Event::Recycled {
                outcome: Ok(Some(_)),
                ..
            }
        )
    });
}

// ---------------------------------------------------------------- the matrix

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error,
    Panic,
    /// The manager is asked to end in there.
    Close,
    Destroy,
    /// A reload is asked for while it is held there.
    Reload,
    /// The old instance is called meanwhile, and traps.
    Trap,
}

#[derive(Debug, Clone, Copy)]
struct Cell {
    point: Point,
    /// Which step at home.
    skip: usize,
    fault: Fault,
    strategy: RecycleStrategy,
    has_home: bool,
}

impl Cell {
    fn can_happen(self) -> bool {
        let is_hook = matches!(
            self.point,
            Point::Imports | Point::Initialize | Point::Save | Point::Restore
        );
        let hands_over = matches!(self.point, Point::Save | Point::Restore);
        let is_of_strategy = match self.strategy {
            RecycleStrategy::Exclusive => true,
            // Nothing is saved; there is one step at home, the roll.
            RecycleStrategy::Rolling => !hands_over && self.skip == 0,
            // Nothing is made, nothing is saved.
            RecycleStrategy::Reset => self.point == Point::AtHome,
        };
        let is_of_fault = match self.fault {
            // What is held is the hook; a step at home is held on the very thread that is needed.
            Fault::Reload => is_hook,
            Fault::Trap => matches!(self.point, Point::Imports | Point::Initialize),
            _ => true,
        };
        is_of_strategy && is_of_fault
    }
}

fn run(cell: Cell) {
    let is_exclusive = cell.strategy == RecycleStrategy::Exclusive;
    let script = if is_exclusive {
        Script::carrying()
    } else {
        Script::new()
    };
    let rig = counter(RecycleOptions {
        calls: Some(CALLS),
        strategy: cell.strategy,
        ..exact()
    })
    .script(script)
    .options(|o| {
        o.instances = REPLICAS;
        o.threads = Some(REPLICAS);
        o.has_home = cell.has_home;
    })
    .start();
    if cell.strategy == RecycleStrategy::Reset {
        rig.snapshot();
    }
    let mut answered = 0;
    let mut hold = None;
    let mut ended = None;
    match cell.fault {
        Fault::Error => {
            let error = if cell.point == Point::AtHome {
                Error::new(ErrorCode::Closed, "the home is gone")
            } else {
                Error::Thrown(HostRef::new("mine"))
            };
            rig.faults.fail(cell.point, cell.skip, error);
        }
        Fault::Panic => rig.faults.panic(cell.point, cell.skip),
        Fault::Close => ended = Some(rig.faults.close(cell.point, cell.skip)),
        Fault::Destroy => ended = Some(rig.faults.destroy(cell.point, cell.skip)),
        Fault::Reload | Fault::Trap => hold = Some(rig.faults.hold(cell.point, cell.skip)),
    }
    let is_end = ended.is_some();
    let mut increment = |rig: &Rig| match rig.call("increment", &[]).get() {
        Ok(_) => {
            answered += 1;
            true
        }
        Err(error) => {
            let code = error.code();
            let is_of_the_end = matches!(code, Some(ErrorCode::Closed | ErrorCode::Interrupted));
            assert!(is_end && is_of_the_end, "{cell:?}: {error}");
            false
        }
    };
    let mut traps = 0;
    for _ in 0..1_000_000 {
        if !increment(&rig) {
            break;
        }
        if hold.is_none() && rig.faults.left() == 0 && recycled(&rig) > 5 {
            break;
        }
        if hold.as_ref().is_some_and(|held| held.is_reached()) {
            let held = hold.take().unwrap();
            if cell.fault == Fault::Reload {
                let reload = rig.ask_reload(wasm_molt_engine::ReloadOptions {
                    skip_save: !is_exclusive,
                    strategy: if is_exclusive {
                        Strategy::Exclusive
                    } else {
                        Strategy::Rolling
                    },
                    ..because("mine")
                });
                held.release();
                assert!(reload.get().is_ok(), "{cell:?}");
            } else {
                assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
                traps += 1;
                held.release();
            }
        }
    }
    assert!(hold.is_none(), "{cell:?}: nobody came by");
    if let Some(ended) = ended {
        assert!(ended.get().is_ok(), "{cell:?}");
        assert_eq!(rig.manager.state(), ManagerState::Closed);
        eventually("every decision has its outcome", || {
            outcomes(&rig).values().all(Option::is_some)
        });
        return;
    }
    wait_settled(&rig);
    assert_eq!(rig.faults.left(), 0, "{cell:?}: the fault did not strike");
    let failed = outcomes(&rig)
        .values()
        .filter(|outcome| matches!(outcome, Some(Err(_))))
        .count();
    match cell.fault {
        Fault::Error | Fault::Panic => assert!(failed <= 1, "{cell:?}: {failed} failed"),
        _ => assert_eq!(failed, 0, "{cell:?}"),
    }
    assert!(recycled(&rig) > 5, "{cell:?}: it went on");
    eventually(&format!("{cell:?}: all serve"), || {
        let stats = rig.stats();
        (stats.state, stats.poisoned, stats.gate.retired) == (ManagerState::Ready, 0, 0)
    });
    if is_exclusive && traps == 0 {
        let leases: Vec<_> = (0..REPLICAS).map(|_| rig.lease()).collect();
        let counts = leases.iter().map(|lease| {
            let count = number(rig.call_in(lease, "get", &[]).get());
            rig.release(lease);
            count
        });
        assert_eq!(counts.sum::<i32>(), answered, "{cell:?}: state was carried");
    }
}

#[test]
fn every_phase_and_every_fault() {
    let points = [
        (Point::Imports, 0),
        (Point::Initialize, 0),
        (Point::Save, 0),
        (Point::Restore, 0),
        (Point::AtHome, 0),
        (Point::AtHome, 1),
    ];
    let faults = [
        Fault::Error,
        Fault::Panic,
        Fault::Close,
        Fault::Destroy,
        Fault::Reload,
        Fault::Trap,
    ];
    let strategies = [
        RecycleStrategy::Exclusive,
        RecycleStrategy::Rolling,
        RecycleStrategy::Reset,
    ];
    let mut cells = 0;
    for (point, skip) in points {
        for fault in faults {
            for strategy in strategies {
                for has_home in [false, true] {
                    let cell = Cell {
                        point,
                        skip,
                        fault,
                        strategy,
                        has_home,
                    };
                    if cell.can_happen() {
                        run(cell);
                        cells += 1;
                    }
                }
            }
        }
    }
    assert!(cells > 60, "{cells}");
}

// ---------------------------------------------------------------- single stories

#[test]
fn memory_is_judged_where_a_replica_is_left_whoever_had_it() {
    for has_home in [false, true] {
        let recycle = RecycleOptions {
            memory: Some(MemoryThreshold::Bytes(10 * PAGE)),
            ..exact()
        };
        let setup = Setup::new(&guests::grower("1 1000")).options(|o| {
            o.recycle = Some(recycle);
            o.has_home = has_home;
        });
        let rig = setup.start();
        rig.number("grow", &[20]);
        wait_recycled(&rig, 1);
        let lease = rig.lease();
        assert_eq!(
            number(rig.call_in(&lease, "grow", &[Value::I32(20)]).get()),
            1
        );
        assert_eq!(recycled(&rig), 1, "it is held");
        rig.release(&lease);
        wait_recycled(&rig, 2);
        assert_eq!(rig.number("size", &[]), 1);
        let reasons: Vec<_> = rig.stats().reloads.into_iter().collect();
        assert_eq!(reasons, [("memory".to_owned(), 2)]);
    }
}

#[test]
fn a_budget_is_kept_by_who_has_the_most() {
    let setup = |recycle: Option<RecycleOptions>| {
        Setup::new(&guests::grower("1 10000")).options(|o| o.recycle = recycle)
    };
    let large = setup(Some(exact())).start();
    let small = setup(Some(exact())).start();
    let none = setup(None).start();
    large.number("grow", &[5000]);
    small.number("grow", &[50]);
    none.number("grow", &[100]);
    // Other tests of this process have memories as well; none of them has a policy and as much.
    wasm_molt_engine::set_memory_budget(Some(4000 * PAGE));
    wait_recycled(&large, 1);
    wasm_molt_engine::set_memory_budget(None);
    let reasons = large.stats().reloads;
    assert_eq!(reasons.get("budget"), Some(&1));
    wait_settled(&small);
    let told = |rig: &Rig| {
        rig.host.count(
            |event| matches!(event, Event::Pressure(pressure) if pressure.reason == Reason::Budget),
        )
    };
    assert_eq!(told(&none), 1);
    assert_eq!(none.stats().generation, 1);
}

#[test]
fn a_replica_that_is_held_does_not_keep_the_others_from_being_recycled() {
    let recycle = RecycleOptions {
        calls: Some(CALLS),
        ..exact()
    };
    let rig = counter(recycle).instances(REPLICAS).start();
    let lease = rig.lease();
    for _ in 0..2 * CALLS {
        assert!(rig.call_in(&lease, "increment", &[]).get().is_ok());
    }
    let slot = lease.replica().slot();
    rig.release(&lease);
    // Due, and held again at once.
    let held = loop {
        let lease = rig.lease();
        if lease.replica().slot() == slot {
            break lease;
        }
        rig.release(&lease);
        if recycled(&rig) > 0 {
            break rig.lease();
        }
    };
    while recycled(&rig) < 3 {
        rig.number("increment", &[]);
    }
    rig.release(&held);
    wait_settled(&rig);
}

#[test]
fn rolling_leaves_a_lease_where_it_is_and_releases_what_it_left() {
    for has_home in [false, true] {
        let recycle = RecycleOptions {
            calls: Some(CALLS),
            strategy: RecycleStrategy::Rolling,
            ..exact()
        };
        let rig = counter(recycle)
            .options(|o| {
                o.has_home = has_home;
                o.threads = Some(1);
            })
            .start();
        let hold = rig.faults.hold(Point::Imports, 0);
        for _ in 0..CALLS {
            rig.number("increment", &[]);
        }
        hold.wait();
        let lease = rig.lease();
        let old = lease.replica().id();
        hold.release();
        rig.host
            .wait_for("reload", 1, |event| matches!(event, Event::Reload(_)));
        assert_eq!(recycled(&rig), 0, "the old one is still in use");
        assert_eq!(rig.number("increment", &[]), 1, "of the fresh one");
        let kept = number(rig.call_in(&lease, "increment", &[]).get());
        assert_eq!(kept, CALLS as i32 + 1, "of the old one");
        assert_eq!(rig.stats().gate.stragglers, 1);
        rig.release(&lease);
        wait_recycled(&rig, 1);
        let is_released = rig
            .host
            .changes()
            .iter()
            .any(|change| change.old.contains(&old));
        assert!(is_released);
        wait_settled(&rig);
    }
}

#[test]
fn a_recycle_that_waits_steps_back_for_a_reload_and_is_superseded() {
    let recycle = RecycleOptions {
        calls: Some(CALLS),
        ..exact()
    };
    let rig = counter(recycle).start();
    let hold = rig.faults.hold(Point::Imports, 0);
    for _ in 0..CALLS {
        rig.number("increment", &[]);
    }
    hold.wait();
    let lease = rig.lease();
    hold.release();
    // It waits for the lease now, or will; the reload comes first.
    let reload = rig.ask_reload(because("mine"));
    rig.release(&lease);
    assert!(reload.get().is_ok());
    wait_settled(&rig);
    assert_eq!(rig.stats().reloads.get("mine"), Some(&1));
    assert_eq!(rig.stats().reloads_failed, 0);
}

#[test]
fn synchronous_calls_recycle_on_the_home_thread() {
    let inits = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&inits);
    let last = Arc::new(AtomicI32::new(0));
    let script = Script::carrying().initialize(move |_| {
        seen.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let recycle = RecycleOptions {
        calls: Some(CALLS),
        ..exact()
    };
    let rig = counter(recycle).script(script).at_home().start();
    for call in 1..=100 {
        let values = rig.call_sync("increment", &[]).unwrap();
        assert!(matches!(values.as_slice(), [Value::I32(n)] if *n == call));
        last.store(call, Ordering::SeqCst);
    }
    // The hook's own call counts as one of the fresh instance's: none, because it begins to count when it serves.
    wait_settled(&rig);
    assert_eq!(inits.load(Ordering::SeqCst), 1 + recycled(&rig));
    assert!(recycled(&rig) >= 20, "{}", recycled(&rig));
}

#[test]
fn without_a_policy_nobody_acts() {
    let rig = Setup::new(&guests::grower("1 100")).start();
    rig.number("grow", &[90]);
    rig.number("size", &[]);
    let pressure = rig.host.events();
    let [Event::Pressure(pressure)] = pressure.as_slice() else {
        panic!("{pressure:?}")
    };
    assert_eq!(pressure.reason, Reason::Memory);
    assert_eq!(pressure.decision, None);
    assert_eq!(pressure.threshold_bytes, Some(75 * PAGE));
    assert_eq!(rig.stats().generation, 1);
}

#[test]
fn wrong_policies_are_refused() {
    let wrong = [
        RecycleOptions {
            memory: Some(MemoryThreshold::Bytes(0)),
            ..exact()
        },
        RecycleOptions {
            memory: Some(MemoryThreshold::Share(1.5)),
            ..exact()
        },
        RecycleOptions {
            memory: Some(MemoryThreshold::Share(f64::NAN)),
            ..exact()
        },
        RecycleOptions {
            jitter: -0.1,
            ..exact()
        },
        RecycleOptions {
            jitter: f64::NAN,
            ..exact()
        },
    ];
    for recycle in wrong {
        let made = counter(recycle).try_create();
        assert_eq!(code(made.map(drop)), ErrorCode::InvalidArgument);
    }
    let rolling = RecycleOptions {
        strategy: RecycleStrategy::Rolling,
        ..exact()
    };
    let made = counter(rolling).script(Script::carrying()).try_create();
    assert_eq!(code(made.map(drop)), ErrorCode::InvalidArgument);
}
