//! Every phase of a reload × every way in which it can go wrong: one whole generation serves
//! afterwards, or the manager is closed; every call is answered once; state is untouched or carried.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use wasm_molt_engine::{
    Error, ErrorCode, HostRef, Lease, ManagerState, OnDrainTimeout, ReloadOptions, ReloadReport,
    Result, Stop, Strategy, Value,
};
use wasm_molt_testkit::door::Door;
use wasm_molt_testkit::faults::Point;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::inside::ask;
use wasm_molt_testkit::rig::{Ended, Rig, Setup, because, number};
use wasm_molt_testkit::wait::{Answer, eventually};

mod pairs;

/// A number in memory; `held` asks the host; the start function traps if the host says so.
const GUEST: &str = r#"(module $faulty
    (import "env" "host" (func $host (param i32) (result i32)))
    (import "env" "is_bad" (func $is_bad (result i32)))
    (memory (export "memory") 1)
    (func $start (if (call $is_bad) (then unreachable)))
    (start $start)
    (func (export "held") (param i32) (result i32) (call $host (local.get 0)))
    (func (export "get") (result i32) (i32.load (i32.const 16)))
    (func (export "set") (param i32) (i32.store (i32.const 16) (local.get 0)))
    (func (export "trap") unreachable))"#;

const REPLICAS: usize = 2;
/// What each replica holds: this and its slot.
const STATE: i32 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Imports,
    Initialize,
    Drain,
    Save,
    Restore,
    /// The step at home of that number: closing the gate and the commit, or the roll.
    AtHome(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error,
    Trap,
    Panic,
    TimeoutAbort,
    TimeoutInterrupt,
    /// The call in flight is aborted by its signal.
    CallAborted,
    CloseInside,
    CloseOutside,
    DestroyInside,
    DestroyOutside,
    HomeGone,
}

const PHASES: [Phase; 7] = [
    Phase::Imports,
    Phase::Initialize,
    Phase::Drain,
    Phase::Save,
    Phase::Restore,
    Phase::AtHome(0),
    Phase::AtHome(1),
];

const FAULTS: [Fault; 11] = [
    Fault::Error,
    Fault::Trap,
    Fault::Panic,
    Fault::TimeoutAbort,
    Fault::TimeoutInterrupt,
    Fault::CallAborted,
    Fault::CloseInside,
    Fault::CloseOutside,
    Fault::DestroyInside,
    Fault::DestroyOutside,
    Fault::HomeGone,
];

impl Phase {
    fn point(self) -> Option<Point> {
        match self {
            Self::Imports => Some(Point::Imports),
            Self::Initialize => Some(Point::Initialize),
            Self::Save => Some(Point::Save),
            Self::Restore => Some(Point::Restore),
            Self::AtHome(_) => Some(Point::AtHome),
            Self::Drain => None,
        }
    }

    /// The second replica's hook, so that the first one's work has to be undone.
    fn skip(self) -> usize {
        match self {
            Self::AtHome(step) => step,
            _ => 1,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Cell {
    phase: Phase,
    fault: Fault,
    strategy: Strategy,
    has_home: bool,
}

impl Cell {
    /// Whether the combination means anything.
    fn can_happen(self) -> bool {
        let is_rolling = self.strategy == Strategy::Rolling;
        let is_of_strategy = match self.phase {
            Phase::Save | Phase::Restore => !is_rolling,
            // What follows the roll is the release of what was left behind.
            Phase::AtHome(1) => !is_rolling,
            _ => true,
        };
        let is_hook = matches!(
            self.phase,
            Phase::Imports | Phase::Initialize | Phase::Save | Phase::Restore
        );
        let is_of_phase = match self.fault {
            Fault::Error | Fault::Panic => self.phase != Phase::Drain,
            Fault::Trap => is_hook,
            Fault::TimeoutAbort | Fault::TimeoutInterrupt => self.phase == Phase::Drain,
            Fault::CallAborted => true,
            Fault::CloseInside | Fault::DestroyInside => self.phase != Phase::Drain,
            // A step at home is held on the very thread that the end needs.
            Fault::CloseOutside | Fault::DestroyOutside => is_hook || self.phase == Phase::Drain,
            Fault::HomeGone => self.has_home && (is_hook || self.phase == Phase::Drain),
        };
        is_of_strategy && is_of_phase
    }

    fn options(self) -> ReloadOptions {
        let is_rolling = self.strategy == Strategy::Rolling;
        let is_impatient = matches!(self.fault, Fault::TimeoutAbort | Fault::TimeoutInterrupt);
        ReloadOptions {
            strategy: self.strategy,
            skip_save: is_rolling,
            drain_timeout: is_impatient.then(|| Duration::from_millis(2)),
            on_drain_timeout: if self.fault == Fault::TimeoutInterrupt {
                OnDrainTimeout::Interrupt
            } else {
                OnDrainTimeout::Abort
            },
            ..because("a fault")
        }
    }

    fn is_end(self) -> bool {
        matches!(
            self.fault,
            Fault::CloseInside | Fault::CloseOutside | Fault::DestroyInside | Fault::DestroyOutside
        )
    }

    fn is_destroy(self) -> bool {
        matches!(self.fault, Fault::DestroyInside | Fault::DestroyOutside)
    }
}

/// Which hook traps the guest; each does so once.
#[derive(Default)]
struct Traps(AtomicU8);

impl Traps {
    const START: u8 = 1;
    const INITIALIZE: u8 = 2;
    const SAVE: u8 = 3;
    const RESTORE: u8 = 4;

    fn plan(&self, phase: Phase) {
        let which = match phase {
            Phase::Imports => Self::START,
            Phase::Initialize => Self::INITIALIZE,
            Phase::Save => Self::SAVE,
            Phase::Restore => Self::RESTORE,
            Phase::Drain | Phase::AtHome(_) => 0,
        };
        self.0.store(which, Ordering::SeqCst);
    }

    fn strikes(&self, which: u8) -> bool {
        let strike = self
            .0
            .compare_exchange(which, 0, Ordering::SeqCst, Ordering::SeqCst);
        strike.is_ok()
    }

    fn strike(&self, which: u8, lease: &Arc<Lease>) -> Result<()> {
        if self.strikes(which) {
            ask(lease, "trap", Vec::new()).map(drop)
        } else {
            Ok(())
        }
    }
}

fn script(door: &Door, traps: &Arc<Traps>) -> Script {
    let [start, initialize, save, restore] = [(); 4].map(|()| Arc::clone(traps));
    Script::new()
        .function("host", door.function())
        .function("is_bad", move |call| {
            call.results[0] = Value::I32(start.strikes(Traps::START).into());
            Ok(())
        })
        .initialize(move |lease| initialize.strike(Traps::INITIALIZE, lease))
        .save(move |lease, _| {
            save.strike(Traps::SAVE, lease)?;
            let state = ask(lease, "get", Vec::new())?.remove(0);
            Ok(Some(HostRef::new(state)))
        })
        .restore(move |lease, state, _| {
            restore.strike(Traps::RESTORE, lease)?;
            let state: &Value = state.downcast_ref().unwrap();
            ask(lease, "set", vec![state.clone()]).map(drop)
        })
}

/// What the replicas hold, by slot.
fn states(rig: &Rig) -> [i32; REPLICAS] {
    let leases: Vec<_> = (0..REPLICAS).map(|_| rig.lease()).collect();
    let mut states = [0; REPLICAS];
    for lease in &leases {
        let state = number(rig.call_in(lease, "get", &[]).get());
        states[lease.replica().slot()] = state;
        rig.release(lease);
    }
    states
}

fn run(cell: Cell) {
    let (door, traps) = (Door::new(), Arc::<Traps>::default());
    let setup = Setup::new(GUEST)
        .script(script(&door, &traps))
        .options(|o| {
            o.instances = REPLICAS;
            o.threads = Some(2 * REPLICAS);
            o.has_home = cell.has_home;
        });
    let mut rig = setup.start();
    let leases: Vec<_> = (0..REPLICAS).map(|_| rig.lease()).collect();
    for lease in &leases {
        let state = Value::I32(STATE + lease.replica().slot() as i32);
        assert!(rig.call_in(lease, "set", &[state]).get().is_ok());
        rig.release(lease);
    }
    let Cell { phase, fault, .. } = cell;
    let (held, control) = rig.call_abortable("held", &[Value::I32(7)]);
    assert_eq!(door.arrived(), 7);
    if cell.strategy == Strategy::Rolling && phase == Phase::Drain {
        // A rolling reload drains what an earlier one has left behind.
        rig.ask_reload(ReloadOptions {
            skip_save: true,
            strategy: Strategy::Rolling,
            ..because("before")
        })
        .get()
        .unwrap();
    }
    let before = rig.manager.generation().get();

    let point = phase.point();
    // An instance whose call was aborted has nothing to save, so there may be one such hook only.
    let skip = if fault == Fault::CallAborted {
        0
    } else {
        phase.skip()
    };
    let mut ended = None;
    let mut hold = None;
    match (fault, point) {
        (Fault::Error, Some(point)) => {
            let error = if point == Point::AtHome {
                Error::new(ErrorCode::Closed, "the home is gone")
            } else {
                Error::Thrown(HostRef::new("mine"))
            };
            rig.faults.fail(point, skip, error);
        }
        (Fault::Panic, Some(point)) => rig.faults.panic(point, skip),
        (Fault::Trap, _) => traps.plan(phase),
        (Fault::CloseInside, Some(point)) => ended = Some(rig.faults.close(point, skip)),
        (Fault::DestroyInside, Some(point)) => ended = Some(rig.faults.destroy(point, skip)),
        (_, Some(point)) if point != Point::AtHome => hold = Some(rig.faults.hold(point, skip)),
        _ => {}
    }

    let reload = rig.ask_reload(cell.options());
    let waiting: Vec<_> = (0..4).map(|_| rig.call("get", &[])).collect();
    if let Some(hold) = &hold {
        // The hooks of the pause come only when what is in flight has ended.
        if matches!(phase, Phase::Save | Phase::Restore) && fault != Fault::CallAborted {
            door.go();
        }
        if fault == Fault::CallAborted {
            control.stop(Stop::Aborted(HostRef::new("signal")));
        }
        hold.wait();
    } else if phase == Phase::Drain {
        eventually("it drains", || {
            let state = rig.manager.state();
            state == ManagerState::Draining || state == ManagerState::Reloading || !reload.is_open()
        });
    }
    match fault {
        Fault::CloseOutside => ended = Some(rig.close(None)),
        Fault::DestroyOutside => ended = Some(rig.destroy()),
        Fault::HomeGone => rig.end_home(),
        Fault::CallAborted => control.stop(Stop::Aborted(HostRef::new("signal"))),
        _ => {}
    }
    if let Some(hold) = hold {
        hold.release();
    }
    // What was left to run for as long as it was wanted ends now.
    let reload = if fault == Fault::TimeoutAbort || fault == Fault::TimeoutInterrupt {
        let reload = reload.get();
        door.open();
        reload
    } else {
        if fault != Fault::DestroyOutside {
            door.open();
        }
        reload.get()
    };
    let home_gone = fault == Fault::HomeGone;
    if home_gone {
        assert!(rig.destroy().get().is_ok());
    }
    if let Some(ended) = ended {
        ended.get().unwrap();
    }
    check_reload(cell, before, &reload);
    check_calls(cell, held, waiting);
    if cell.is_end() || home_gone {
        assert_eq!(rig.manager.state(), ManagerState::Closed);
        assert_eq!(rig.manager.stats(None).memory_bytes, 0);
        let late = rig.manager.stats(None).gate;
        assert_eq!((late.in_flight, late.queued), (0, 0));
        return;
    }
    check_serves(cell, before, reload.is_ok(), &rig);
}

fn check_reload(cell: Cell, before: u64, reload: &Result<Arc<ReloadReport>>) {
    let code = match reload {
        Ok(report) => {
            // The instance of the aborted call may have been replaced first.
            let repaired = u64::from(cell.fault == Fault::CallAborted);
            assert!((before + 1..=before + 1 + repaired).contains(&report.generation.get()));
            None
        }
        Err(error) => Some(error.code().unwrap()),
    };
    let may: &[Option<ErrorCode>] = match cell.fault {
        Fault::Error if matches!(cell.phase, Phase::AtHome(_)) => &[Some(ErrorCode::Closed)],
        Fault::Error | Fault::Trap => &[Some(ErrorCode::ReloadFailed)],
        Fault::Panic => &[Some(ErrorCode::ReloadFailed), Some(ErrorCode::Internal)],
        Fault::TimeoutAbort => &[Some(ErrorCode::DrainTimeout)],
        Fault::TimeoutInterrupt | Fault::CallAborted => &[None],
        // Asked for before the end, so it is waited for.
        Fault::CloseInside | Fault::CloseOutside => &[None],
        Fault::DestroyInside | Fault::DestroyOutside => &[None, Some(ErrorCode::Closed)],
        Fault::HomeGone => &[Some(ErrorCode::Closed)],
    };
    assert!(may.contains(&code), "{code:?} is none of {may:?}");
}

/// Each call has one answer, and it is one that it may have.
fn check_calls(cell: Cell, held: Answer<Ended>, waiting: Vec<Answer<Ended>>) {
    let is_cut = cell.is_destroy() || cell.fault == Fault::HomeGone;
    match held.get() {
        Ok(value) => assert_eq!(number(Ok(value)), 7),
        Err(Error::Aborted(_)) => assert_eq!(cell.fault, Fault::CallAborted),
        Err(error) => {
            let may = is_cut || cell.fault == Fault::TimeoutInterrupt;
            assert!(
                may && error.code() == Some(ErrorCode::Interrupted),
                "{error}"
            );
        }
    }
    for call in waiting {
        match call.get() {
            Ok(value) => {
                let value = number(Ok(value));
                // A fresh instance knows nothing: after a roll, or where the old one was lost.
                assert!(
                    [0, STATE, STATE + 1].contains(&value),
                    "{value} was never held"
                );
            }
            Err(error) => match error.code() {
                // It came after the close that a hook asked for.
                Some(ErrorCode::Closed) if cell.fault == Fault::CloseInside => {}
                Some(ErrorCode::Interrupted | ErrorCode::Closed) if is_cut => {}
                // It was let in before the gate closed, and had no thread yet.
                Some(ErrorCode::Interrupted) if cell.fault == Fault::TimeoutInterrupt => {}
                _ => panic!("{error}"),
            },
        }
    }
}

fn check_serves(cell: Cell, before: u64, has_reloaded: bool, rig: &Rig) {
    eventually(
        "nothing is left to repair, and nobody is left behind",
        || {
            let stats = rig.manager.stats(None);
            stats.gate.retired == 0
                && stats.poisoned == 0
                && stats.gate.in_flight == 0
                && stats.memory_bytes == REPLICAS << 16
        },
    );
    let states = states(rig);
    let stats = rig.stats();
    assert_eq!(stats.state, ManagerState::Ready);
    let gate = stats.gate;
    assert_eq!((gate.queued, gate.stragglers, gate.slots), (0, 0, REPLICAS));
    let repaired = stats.reloads.get("trap").copied().unwrap_or_default();
    assert_eq!(
        stats.generation,
        before + u64::from(has_reloaded) + repaired
    );
    for slot in 0..REPLICAS {
        let replica = rig.replica(slot);
        assert!(!replica.is_released() && !replica.is_poisoned());
        assert!(replica.generation().get() <= stats.generation);
    }
    // The old state untouched or carried over; a roll begins afresh, and a trapped instance has lost it.
    let has_rolled = before > 1 || cell.strategy == Strategy::Rolling && has_reloaded;
    for (slot, state) in states.iter().enumerate() {
        let kept = STATE + slot as i32;
        if has_rolled {
            assert_eq!(*state, 0);
        } else if *state != kept {
            assert!(repaired > 0 || has_reloaded && has_lost(cell), "{states:?}");
            assert_eq!(*state, 0);
        }
    }
    let lost = states.iter().filter(|state| **state == 0).count();
    assert!(has_rolled || lost <= 1, "{states:?}");
    assert_eq!(
        rig.reload("afterwards it can be").generation.get(),
        stats.generation + 1
    );
    assert_eq!(
        number(rig.call("held", &[Value::I32(3)]).get()),
        3,
        "it serves"
    );
}

/// The reload went through and replaced an instance that was stopped, whose state is not asked for.
fn has_lost(cell: Cell) -> bool {
    matches!(cell.fault, Fault::TimeoutInterrupt | Fault::CallAborted)
}

#[test]
fn one_generation_serves_after_any_fault_in_any_phase() {
    let mut cells = 0;
    for strategy in [Strategy::Exclusive, Strategy::Rolling] {
        for has_home in [false, true] {
            for phase in PHASES {
                for fault in FAULTS {
                    let cell = Cell {
                        phase,
                        fault,
                        strategy,
                        has_home,
                    };
                    if cell.can_happen() {
                        println!("{cell:?}");
                        run(cell);
                        cells += 1;
                    }
                }
            }
        }
    }
    assert!(cells > 150, "{cells} cells");
}
