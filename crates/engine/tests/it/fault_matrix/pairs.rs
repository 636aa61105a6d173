//! Two things at a time: whatever is asked of a manager while something else is held in the middle, which then
//! goes on, fails, panics, traps, is cut or loses its home.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use wasm_molt_engine::{
    Backoff, Error, ErrorCode, Isolation, Lease, ManagerState, RecycleOptions, ReloadOptions,
    ReloadReport, ResetOptions, ResetReport, Result, Snapshot, Stop, Strategy, Value,
};
use wasm_molt_testkit::door::{Door, Pass};
use wasm_molt_testkit::faults::{Held, Point, Then};
use wasm_molt_testkit::guests;
use wasm_molt_testkit::meter::{self, Reading};
use wasm_molt_testkit::quiet::alone;
use wasm_molt_testkit::rig::{Ended, Rig, Setup, because, number};
use wasm_molt_testkit::wait::{Answer, answer, eventually};

use super::{GUEST, HostRef, Phase, REPLICAS, Traps, script};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Reload,
    Roll,
    Snapshot,
    Reset,
    Recycle,
    Lease,
    Close,
    Destroy,
    /// A reload to another build.
    Swap,
    Fork,
    /// Synchronous, as those that follow.
    ReloadNow,
    SnapshotNow,
    ResetNow,
}

/// Of these, three at a time.
const ACTIONS: [Action; 8] = [
    Action::Reload,
    Action::Roll,
    Action::Snapshot,
    Action::Reset,
    Action::Recycle,
    Action::Lease,
    Action::Close,
    Action::Destroy,
];

const ALL: [Action; 13] = [
    Action::Reload,
    Action::Roll,
    Action::Snapshot,
    Action::Reset,
    Action::Recycle,
    Action::Lease,
    Action::Close,
    Action::Destroy,
    Action::Swap,
    Action::Fork,
    Action::ReloadNow,
    Action::SnapshotNow,
    Action::ResetNow,
];

/// Calls that an instance runs where there is a policy.
const CALLS: u64 = 4;

impl Action {
    /// Where it can be held in the middle. In [`Phase::Drain`] a call is in flight, or a call of the lease.
    fn phases(self) -> &'static [Phase] {
        match self {
            Self::Reload => &[
                Phase::Imports,
                Phase::Initialize,
                Phase::Drain,
                Phase::Save,
                Phase::Restore,
            ],
            Self::Roll => &[Phase::Imports, Phase::Initialize, Phase::Drain],
            Self::Recycle => &[
                Phase::Imports,
                Phase::Initialize,
                Phase::Save,
                Phase::Restore,
            ],
            Self::Swap => &[Phase::Initialize, Phase::Drain, Phase::Restore],
            // No hook is asked: held before the gate is closed.
            Self::Snapshot => &[Phase::Drain, Phase::AtHome(0)],
            Self::Reset => &[Phase::Drain, Phase::Initialize],
            Self::Lease | Self::Close | Self::Fork => &[Phase::Drain],
            Self::ReloadNow => &[Phase::Initialize, Phase::Restore],
            Self::SnapshotNow => &[Phase::AtHome(0)],
            Self::ResetNow => &[Phase::Initialize],
            // It does not wait for anything that could be held.
            Self::Destroy => &[],
        }
    }

    fn is_sync(self) -> bool {
        matches!(self, Self::ReloadNow | Self::SnapshotNow | Self::ResetNow)
    }
}

/// What becomes of what is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The hook fails; the call in flight throws.
    Error,
    /// The hook panics, or the host function does.
    Panic,
    /// The guest traps in the hook.
    Trap,
    /// The call in flight is stopped by its signal.
    Abort,
    /// Another one is cut in the middle.
    Destroy,
    HomeGone,
}

const FAULTS: [Fault; 7] = [
    Fault::None,
    Fault::Error,
    Fault::Panic,
    Fault::Trap,
    Fault::Abort,
    Fault::Destroy,
    Fault::HomeGone,
];

#[derive(Debug, Clone, Copy)]
struct Cell {
    held: Action,
    phase: Phase,
    fault: Fault,
    /// What is asked for meanwhile.
    others: [Option<Action>; 2],
    has_home: bool,
    /// Calls begin with a snapshot, each of them.
    isolates: bool,
}

impl Cell {
    fn has(self, action: Action) -> bool {
        self.held == action || self.others.contains(&Some(action))
    }

    fn is_cut(self) -> bool {
        matches!(self.fault, Fault::Destroy | Fault::HomeGone) || self.has(Action::Destroy)
    }

    fn ends(self) -> bool {
        self.is_cut() || self.has(Action::Close)
    }

    fn resets(self) -> bool {
        self.has(Action::Reset) || self.has(Action::ResetNow)
    }

    fn can_happen(self) -> bool {
        let is_drain = self.phase == Phase::Drain;
        let is_step = matches!(self.phase, Phase::AtHome(_));
        let is_of_phase = match self.fault {
            Fault::Error => !is_step,
            Fault::Trap => !is_drain && !is_step,
            Fault::Abort => is_drain,
            Fault::HomeGone => self.has_home,
            _ => true,
        };
        // Where it is held is where everything else is asked for.
        let is_of_thread = !self.held.is_sync() || !self.has_home;
        is_of_phase && is_of_thread && (!self.isolates || self.can_isolate())
    }

    /// The variant is about calls in flight, and has no `reseed` to be held in.
    fn can_isolate(self) -> bool {
        let is_of_call = matches!(self.fault, Fault::None | Fault::Abort);
        let is_of_phase = matches!(self.phase, Phase::Drain | Phase::Imports);
        is_of_call && is_of_phase && !self.has_home && !self.held.is_sync()
    }

    /// With a snapshot instances begin from that, and what there is of `initialize` is `reseed`.
    fn point(self) -> Option<Point> {
        let has_snapshot = self.resets() && self.held != Action::Swap;
        match self.phase {
            Phase::Initialize if has_snapshot => Some(Point::Reseed),
            phase => phase.point(),
        }
    }
}

/// What was asked for, to be answered once.
enum Asked {
    Reload(Answer<Result<Arc<ReloadReport>>>),
    Snapshot(Answer<Result<Arc<Snapshot>>>),
    Reset(Answer<Result<ResetReport>>),
    /// By calls, which make an instance due.
    Recycle(Vec<Answer<Ended>>),
    Lease(Answer<Result<Arc<Lease>>>),
    Fork(Box<Rig>, Answer<Result<()>>),
    /// What cannot wait until it may be.
    AtOnce(Result<()>),
    End(Answer<Result<()>>),
}

fn rolling() -> ReloadOptions {
    ReloadOptions {
        strategy: Strategy::Rolling,
        skip_save: true,
        ..because("a roll")
    }
}

fn swapping() -> ReloadOptions {
    ReloadOptions {
        source: Some(guests::source(&GUEST.replace("$faulty", "$other"))),
        ..because("a swap")
    }
}

/// A copy to be.
fn child() -> Box<Rig> {
    let (door, traps) = (Door::new(), Arc::<Traps>::default());
    let setup = Setup::new(GUEST).script(script(&door, &traps));
    Box::new(setup.create())
}

fn ask(rig: &Rig, action: Action) -> Asked {
    match action {
        Action::Reload => Asked::Reload(rig.ask_reload(because("a reload"))),
        Action::Roll => Asked::Reload(rig.ask_reload(rolling())),
        Action::Snapshot => Asked::Snapshot(rig.ask_snapshot().0),
        Action::Reset => Asked::Reset(rig.ask_reset(ResetOptions::default())),
        Action::Recycle => {
            let calls = 0..CALLS * REPLICAS as u64;
            Asked::Recycle(calls.map(|_| rig.call("get", &[])).collect())
        }
        Action::Lease => Asked::Lease(rig.ask_lease().0),
        Action::Close => Asked::End(rig.close(None)),
        Action::Destroy => Asked::End(rig.destroy()),
        Action::Swap => Asked::Reload(rig.ask_reload(swapping())),
        Action::Fork => {
            let child = child();
            let forked = rig.ask_fork(&child);
            Asked::Fork(child, forked)
        }
        Action::ReloadNow => Asked::AtOnce(rig.reload_now(because("at once")).map(drop)),
        Action::SnapshotNow => Asked::AtOnce(rig.snapshot_now().map(drop)),
        Action::ResetNow => Asked::AtOnce(rig.reset_now(ResetOptions::default()).map(drop)),
    }
}

/// The same for what is to be held, and keeps its thread.
fn ask_held(rig: &Rig, action: Action) -> Asked {
    let manager = rig.manager.clone();
    match action {
        Action::ReloadNow => {
            let (done, reloaded) = answer("reload_now()");
            thread::spawn(move || done(manager.reload_now(None, &because("at once"))));
            Asked::Reload(reloaded)
        }
        Action::SnapshotNow => {
            let (done, taken) = answer("snapshot_now()");
            thread::spawn(move || done(manager.snapshot_now(None)));
            Asked::Snapshot(taken)
        }
        Action::ResetNow => {
            let (done, reset) = answer("reset_now()");
            thread::spawn(move || done(manager.reset_now(None, &ResetOptions::default())));
            Asked::Reset(reset)
        }
        action => ask(rig, action),
    }
}

impl Asked {
    /// Leases come first: others wait for them.
    fn is_lease(&self) -> bool {
        matches!(self, Self::Lease(_))
    }

    fn check(self, cell: Cell, rig: &Rig) {
        match self {
            Self::Reload(answer) => check(cell, "a reload", answer.get()),
            Self::Snapshot(answer) => check(cell, "a snapshot", answer.get()),
            Self::Reset(answer) => check(cell, "a reset", answer.get()),
            Self::Recycle(calls) => {
                for call in calls {
                    check(cell, "a call", call.get());
                }
            }
            Self::Lease(answer) => match answer.get() {
                Ok(lease) => {
                    check(
                        cell,
                        "a call in a lease",
                        rig.call_in(&lease, "get", &[]).get(),
                    );
                    rig.release(&lease);
                }
                refused => check(cell, "a lease", refused),
            },
            Self::Fork(child, answer) => match answer.get() {
                Ok(()) => assert_eq!(number(child.call("get", &[]).get()), 0, "{cell:?}"),
                refused => check(cell, "a fork", refused),
            },
            Self::AtOnce(outcome) => {
                let code = outcome.as_ref().err().and_then(Error::code);
                let is_refused = match code {
                    Some(ErrorCode::Reloading) => true,
                    Some(ErrorCode::Busy) => cell.held == Action::Lease,
                    Some(ErrorCode::Closed) => cell.ends(),
                    _ => false,
                };
                assert!(is_refused, "{cell:?}: {outcome:?}");
            }
            Self::End(answer) => match answer.get() {
                Ok(()) => {}
                // What has lost its home can only be destroyed.
                Err(error) => assert!(
                    cell.fault == Fault::HomeGone && error.code() == Some(ErrorCode::Closed),
                    "{cell:?}: {error}"
                ),
            },
        }
    }
}

/// It went well, or ended as it may with that fault.
fn check<T: std::fmt::Debug>(cell: Cell, what: &str, outcome: Result<T>) {
    let Err(error) = outcome else { return };
    let is_of_the_end = cell.ends()
        && matches!(
            error.code(),
            Some(ErrorCode::Closed | ErrorCode::Interrupted | ErrorCode::StaleHandle)
        );
    let is_of_the_fault = match cell.fault {
        Fault::None | Fault::Destroy | Fault::HomeGone => false,
        Fault::Error | Fault::Trap => {
            let is_of_reseed = cell.fault == Fault::Trap
                && matches!(cell.held, Action::Reset | Action::ResetNow)
                && error.code() == Some(ErrorCode::Trap);
            matches!(error, Error::Thrown(_))
                || error.code() == Some(ErrorCode::ReloadFailed)
                || is_of_reseed
        }
        Fault::Panic => matches!(
            error.code(),
            Some(ErrorCode::ReloadFailed | ErrorCode::Internal | ErrorCode::StaleHandle)
        ),
        // Its instance is given up: what waited for it in its lease is told so.
        Fault::Abort => {
            matches!(error, Error::Aborted(_)) || error.code() == Some(ErrorCode::StaleHandle)
        }
    };
    // A snapshot is of no use to the build after it, and there may have been a reload in between.
    let is_of_reset = cell.resets()
        && match error.code() {
            Some(ErrorCode::StaleHandle) => true,
            Some(ErrorCode::InvalidArgument) => cell.has(Action::Swap),
            _ => false,
        };
    // Held before the gate is closed, it finds calls inside when it comes to that.
    let is_too_late = matches!(
        (cell.held, cell.phase),
        (Action::ReloadNow, Phase::Initialize) | (Action::SnapshotNow, Phase::AtHome(_))
    ) && error.code() == Some(ErrorCode::Busy);
    assert!(
        is_of_the_end || is_of_the_fault || is_of_reset || is_too_late,
        "{cell:?}: {what} ended with {error}"
    );
}

struct World {
    rig: Rig,
    door: Door,
    traps: Arc<Traps>,
}

fn world(cell: Cell) -> World {
    let (door, traps) = (Door::new(), Arc::<Traps>::default());
    let mut script = script(&door, &traps);
    if !cell.isolates {
        let traps = Arc::clone(&traps);
        script = script.reseed(move |lease| traps.strike(Traps::INITIALIZE, lease));
    }
    let setup = Setup::new(GUEST).script(script).options(|o| {
        o.instances = REPLICAS;
        o.threads = Some(2 * REPLICAS);
        o.has_home = cell.has_home;
        if cell.isolates {
            o.isolation = Isolation::PerCall;
        }
        o.recycle = cell.has(Action::Recycle).then(|| RecycleOptions {
            calls: Some(CALLS),
            jitter: 0.0,
            backoff: Backoff {
                initial: Duration::from_millis(1),
                max: Duration::from_millis(2),
            },
            ..RecycleOptions::default()
        });
    });
    let rig = setup.start();
    if cell.resets() {
        rig.snapshot();
    }
    World { rig, door, traps }
}

/// Asks for what is held, until it is there where it is to be held.
fn hold(cell: Cell, world: &World) -> (Option<Held>, Vec<Asked>) {
    let World { rig, door, traps } = world;
    let mut asked = Vec::new();
    let Some(point) = cell.point() else {
        if cell.held == Action::Roll {
            // A rolling reload drains what an earlier one has left behind.
            assert!(rig.ask_reload(rolling()).get().is_ok());
        }
        if cell.held != Action::Lease {
            asked.push(ask(rig, cell.held));
        }
        let state = || rig.manager.state();
        if !matches!(cell.held, Action::Roll | Action::Lease | Action::Close) {
            eventually("it drains", || state() == ManagerState::Draining);
        }
        return (None, asked);
    };
    let then = match cell.fault {
        Fault::Error => Then::Fail(Error::Thrown(HostRef::new("mine"))),
        Fault::Panic => Then::Panic,
        _ => Then::GoOn,
    };
    if cell.fault == Fault::Trap {
        traps.plan(cell.phase);
    }
    // Of the second replica, so that the first one's work has to be undone; a recycle is of one, and the first
    // one to run traps.
    let is_of_second = cell.held != Action::Recycle
        && cell.fault != Fault::Trap
        && !matches!(cell.phase, Phase::AtHome(_));
    let skip = usize::from(is_of_second);
    let held = rig.faults.hold_then(point, skip, then);
    asked.push(ask_held(rig, cell.held));
    // The hooks of the pause come only when nothing is in flight.
    held.wait();
    door.open();
    (Some(held), asked)
}

fn run(cell: Cell) {
    println!("{cell:?}");
    let mut world = world(cell);
    let in_flight = (cell.phase == Phase::Drain).then(|| {
        let args = [Value::I32(7)];
        let lease = (cell.held == Action::Lease).then(|| world.rig.lease());
        let (call, control) = match &lease {
            Some(lease) => {
                let limits = wasm_molt_engine::CallLimits {
                    timeout_ms: None,
                    can_abort: true,
                };
                let (call, control) = world.rig.call_in_with(lease, "held", &args, limits);
                (call, control.unwrap())
            }
            None => world.rig.call_abortable("held", &args),
        };
        assert_eq!(world.door.arrived(), 7);
        (lease, call, control)
    });
    let (held, mut asked) = hold(cell, &world);
    asked.extend(
        cell.others
            .iter()
            .flatten()
            .map(|action| ask(&world.rig, *action)),
    );
    let waiting: Vec<_> = (0..2).map(|_| world.rig.call("get", &[])).collect();
    match cell.fault {
        Fault::Destroy => asked.push(Asked::End(world.rig.destroy())),
        Fault::HomeGone => world.rig.end_home(),
        _ => {}
    }
    if let Some(held) = held {
        held.release();
    }
    if let Some((lease, call, control)) = in_flight {
        match cell.fault {
            Fault::Error => world.door.let_through(Pass::Throw(HostRef::new("mine"))),
            Fault::Panic => world.door.let_through(Pass::Panic),
            Fault::Abort => control.stop(Stop::Aborted(HostRef::new("signal"))),
            _ => world.door.go(),
        }
        check(cell, "the call in flight", call.get());
        world.door.open();
        if let Some(lease) = lease {
            world.rig.release(&lease);
        }
    }
    if cell.fault == Fault::HomeGone {
        asked.push(Asked::End(world.rig.destroy()));
    }
    let (leases, others): (Vec<_>, Vec<_>) = asked.into_iter().partition(Asked::is_lease);
    for one in leases.into_iter().chain(others) {
        one.check(cell, &world.rig);
    }
    for call in waiting {
        check(cell, "a call that waited", call.get());
    }
    check_rest(cell, &world.rig);
}

/// Nothing is held, nothing waits, the numbers are right, and it serves or is closed.
fn check_rest(cell: Cell, rig: &Rig) {
    if cell.ends() {
        assert_eq!(rig.manager.state(), ManagerState::Closed, "{cell:?}");
        let stats = rig.manager.stats(None);
        let gate = stats.gate;
        assert_eq!((gate.in_flight, gate.queued), (0, 0), "{cell:?}");
        assert_eq!(stats.memory_bytes, 0, "{cell:?}");
        return;
    }
    eventually(
        &format!("{cell:?}: all serve, and nobody is left behind"),
        || {
            let stats = rig.manager.stats(None);
            let gate = stats.gate;
            let left = (
                gate.in_flight,
                gate.queued,
                gate.retired,
                stats.recycles_due,
            );
            left == (0, 0, 0, 0)
                && stats.state == ManagerState::Ready
                && stats.poisoned == 0
                && stats.memory_bytes == REPLICAS << 16
        },
    );
    assert_eq!(rig.faults.left(), 0, "{cell:?}: the fault did not strike");
    // Before the figures: a recycle that has failed is tried again whenever its time has come.
    let generations: Vec<_> = (0..REPLICAS)
        .map(|slot| rig.replica(slot).generation().get())
        .collect();
    let stats = rig.stats();
    assert!(
        generations.iter().all(|one| *one <= stats.generation),
        "{cell:?}: {generations:?}, {stats:?}"
    );
    let replaced: u64 = stats.reloads.values().sum();
    assert_eq!(
        stats.generation,
        replaced + 1,
        "{cell:?}: {:?}",
        stats.reloads
    );
    let c = stats.calls;
    let counted = c.completed + c.failed + c.trapped + c.interrupted + c.rejected;
    assert!(counted > 0, "{cell:?}");
    for slot in 0..REPLICAS {
        let replica = rig.replica(slot);
        assert!(
            !replica.is_released() || rig.replica(slot).id() != replica.id(),
            "{cell:?}, slot {slot}"
        );
    }
    assert_eq!(
        number(rig.call("held", &[Value::I32(3)]).get()),
        3,
        "{cell:?}"
    );
    rig.reload("afterwards it can be");
}

fn cells(others: impl Fn(Action, Fault) -> Vec<[Option<Action>; 2]>) -> Vec<Cell> {
    let mut cells = Vec::new();
    for held in ALL {
        for phase in held.phases() {
            for fault in FAULTS {
                for others in others(held, fault) {
                    for (has_home, isolates) in [(false, false), (true, false), (false, true)] {
                        cells.push(Cell {
                            held,
                            phase: *phase,
                            fault,
                            others,
                            has_home,
                            isolates,
                        });
                    }
                }
            }
        }
    }
    cells.retain(|cell| cell.can_happen());
    cells
}

fn pairs() -> Vec<Cell> {
    cells(|_, fault| {
        // What is refused at once does not hear of what fails later.
        let is_early = matches!(fault, Fault::None | Fault::Destroy);
        let others = ALL.into_iter().filter(|other| is_early || !other.is_sync());
        others.map(|other| [Some(other), None]).collect()
    })
}

#[test]
fn whatever_is_asked_for_in_the_middle_of_something_that_fails_is_answered() {
    let pairs = pairs();
    assert!(pairs.len() > 2000, "{} cells", pairs.len());
    pairs.into_iter().for_each(run);
}

#[test]
fn two_things_asked_for_in_the_middle_of_a_third_are_answered() {
    let mut triples = cells(|held, fault| {
        if fault != Fault::None || !ACTIONS.contains(&held) {
            return Vec::new();
        }
        let of_first = |first| ACTIONS.map(move |second| [Some(first), Some(second)]);
        ACTIONS.into_iter().flat_map(of_first).collect()
    });
    triples.retain(|cell| !cell.isolates);
    assert!(triples.len() > 1000, "{} cells", triples.len());
    triples.into_iter().for_each(run);
}

/// Its instance is of the build before when it comes to run.
#[test]
fn an_isolated_call_that_a_roll_to_another_build_overtakes_begins_with_the_snapshot_of_its_own() {
    let (door, traps) = (Door::new(), Arc::<Traps>::default());
    let script = script(&door, &traps);
    let setup = Setup::new(GUEST).script(script).options(|o| {
        o.instances = REPLICAS;
        o.threads = Some(1);
        o.isolation = Isolation::PerCall;
    });
    let rig = setup.start();
    // What a lease leaves behind is not in the snapshot.
    let leases: Vec<_> = (0..REPLICAS).map(|_| rig.lease()).collect();
    for lease in &leases {
        let set = rig.call_in(lease, "set", &[Value::I32(9)]);
        assert!(set.get().is_ok());
    }
    leases.iter().for_each(|lease| rig.release(lease));
    let held = rig.call("held", &[Value::I32(7)]);
    assert_eq!(door.arrived(), 7);
    // It has an instance, and no thread yet.
    let overtaken = rig.call("get", &[]);
    let roll = ReloadOptions {
        strategy: Strategy::Rolling,
        skip_save: true,
        ..swapping()
    };
    assert!(rig.ask_reload(roll).get().is_ok());
    door.go();
    assert_eq!(number(held.get()), 7);
    assert_eq!(number(overtaken.get()), 0);
    assert_eq!(number(rig.call("get", &[]).get()), 0);
}

#[test]
fn nothing_is_left_of_those_that_were_ended_in_the_middle() {
    let _alone = alone();
    let ended: Vec<_> = pairs()
        .into_iter()
        .filter(|cell| cell.ends())
        .step_by(11)
        .collect();
    let rounds = (0..6).filter_map(|_| {
        ended.iter().copied().for_each(run);
        let mut reading = meter::read()?;
        eventually("threads end", || {
            let now = meter::read().unwrap();
            let is_steady = now.threads == reading.threads;
            reading = now;
            is_steady
        });
        Some(reading)
    });
    let readings: Vec<Reading> = rounds.collect();
    // The allocator's arenas and stacks that are kept come with the first rounds.
    let [_, _, first, .., last] = readings.as_slice() else {
        return;
    };
    println!("{readings:#?}");
    // One that has done its work may still be on its way out.
    let least = readings.iter().map(|reading| reading.threads).min();
    eventually("no thread is left", || {
        meter::read().map(|now| now.threads) <= least
    });
    assert!(last.descriptors <= first.descriptors, "{readings:#?}");
    assert!(last.mappings <= first.mappings + 16, "{readings:#?}");
}
