//! Every step of a swap × every way in which it can fail: whatever happens, one generation serves
//! behind an open gate.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use wasm_molt_lifecycle::swap::{run, run_rolling};
use wasm_molt_lifecycle::{
    Admission, Backend, Clock, Drained, FailedPhase, Failure, Gate, Generation, InFlight,
    ManualClock, OnDrainTimeout, Plan, Ticket, Timings,
};

use common::{Busy, Call};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Instantiate,
    CloseGate,
    Drain,
    Interrupt,
    DrainAgain,
    Save,
    Restore,
    Commit,
    RollBack,
    OpenGate,
    Stragglers,
    StragglersAgain,
    Roll,
}

const STEPS: [Step; 13] = [
    Step::Instantiate,
    Step::CloseGate,
    Step::Drain,
    Step::Interrupt,
    Step::DrainAgain,
    Step::Save,
    Step::Restore,
    Step::Commit,
    Step::RollBack,
    Step::OpenGate,
    Step::Stragglers,
    Step::StragglersAgain,
    Step::Roll,
];

impl Step {
    /// How far the manual clock moves in this step: each sum names its steps.
    fn duration(self) -> Duration {
        Duration::from_millis(1 << self as u32)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error,
    /// Only a second generation's initialization, reported by the step Instantiate.
    InitializeError,
    PanicBefore,
    PanicAfter,
    Timeout,
    /// `destroy()` comes while the step runs.
    Cancel,
}

const FAULTS: [Fault; 6] = [
    Fault::Error,
    Fault::InitializeError,
    Fault::PanicBefore,
    Fault::PanicAfter,
    Fault::Timeout,
    Fault::Cancel,
];

/// A generation with a state, as an instance has one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Instance {
    generation: Generation,
    state: &'static str,
}

struct Fake<'a> {
    clock: &'a ManualClock,
    gate: Gate<Call>,
    serving: Instance,
    next: Option<Instance>,
    saved: Option<&'static str>,
    in_flight: Option<Ticket<Call>>,
    /// Left behind by an earlier roll.
    straggler: Option<Ticket<Call>>,
    /// Who was interrupted.
    interrupted: Option<Drained>,
    faults: Vec<(Step, Fault)>,
    steps: Vec<Step>,
    is_cancelled: Cell<bool>,
    calls: Sender<Ticket<Call>>,
    started: Receiver<Ticket<Call>>,
}

type Outcome = Result<Timings, Failure<&'static str>>;

impl<'a> Fake<'a> {
    /// Serves its first generation, with one call in flight.
    fn new(clock: &'a ManualClock, faults: &[(Step, Fault)]) -> Self {
        let Busy {
            gate,
            in_flight,
            calls,
            started,
        } = Busy::new();
        Self {
            clock,
            gate,
            serving: Instance {
                generation: Generation::FIRST,
                state: "precious",
            },
            next: None,
            saved: None,
            in_flight,
            straggler: None,
            interrupted: None,
            faults: faults.to_vec(),
            steps: Vec::new(),
            is_cancelled: Cell::new(false),
            calls,
            started,
        }
    }

    /// Has rolled before: one call in flight, and one left behind.
    fn rolled(clock: &'a ManualClock, faults: &[(Step, Fault)]) -> Self {
        let mut fake = Self::new(clock, faults);
        fake.gate.roll().unwrap();
        fake.straggler = fake.in_flight.take();
        fake.gate.admit(Call(fake.calls.clone())).unwrap();
        fake.in_flight = Some(fake.started.recv().unwrap());
        fake
    }

    fn has(&self, step: Step, fault: Fault) -> bool {
        self.faults.contains(&(step, fault))
    }

    fn begin(&mut self, step: Step) -> Result<(), &'static str> {
        self.steps.push(step);
        self.clock.advance(step.duration());
        if self.has(step, Fault::PanicBefore) {
            // Without the panic hook's noise.
            resume_unwind(Box::new("step"));
        }
        if self.has(step, Fault::Cancel) {
            self.is_cancelled.set(true);
        }
        if self.has(step, Fault::Error) {
            Err("no luck")
        } else {
            Ok(())
        }
    }

    fn end(&self, step: Step) {
        if self.has(step, Fault::PanicAfter) {
            resume_unwind(Box::new("step"));
        }
    }

    fn end_call(&mut self) {
        self.in_flight = None;
    }

    fn run(&mut self, plan: &Plan) -> std::thread::Result<Outcome> {
        let clock = self.clock;
        catch_unwind(AssertUnwindSafe(|| run(self, clock, plan)))
    }

    fn run_rolling(&mut self, plan: &Plan) -> std::thread::Result<Outcome> {
        let clock = self.clock;
        catch_unwind(AssertUnwindSafe(|| run_rolling(self, clock, plan)))
    }

    fn count(&self, step: Step) -> usize {
        self.steps.iter().filter(|taken| **taken == step).count()
    }
}

impl Backend for Fake<'_> {
    type Cause = &'static str;

    fn drain_stragglers(&mut self, timeout: Option<Duration>) -> Result<(), InFlight> {
        let is_first = !self.steps.contains(&Step::Stragglers);
        let (step, least) = if is_first {
            (Step::Stragglers, Duration::ZERO)
        } else {
            (Step::StragglersAgain, Duration::from_secs(5))
        };
        self.begin(step).unwrap();
        if !self.has(step, Fault::Timeout) {
            self.straggler = None;
        }
        assert_eq!(timeout, Some(least));
        let drained = self.gate.wait_stragglers(1, Some(Duration::ZERO), || false);
        self.end(step);
        drained
    }

    fn instantiate(&mut self) -> Result<(), (FailedPhase, Self::Cause)> {
        self.begin(Step::Instantiate)
            .map_err(|cause| (FailedPhase::Instantiate, cause))?;
        assert!(
            self.gate.counts().is_open,
            "the old generation serves meanwhile"
        );
        self.next = Some(Instance {
            generation: self.serving.generation.next(),
            state: "",
        });
        if self.has(Step::Instantiate, Fault::InitializeError) {
            return Err((FailedPhase::Initialize, "no luck"));
        }
        self.end(Step::Instantiate);
        Ok(())
    }

    fn close_gate(&mut self) -> usize {
        self.begin(Step::CloseGate).unwrap();
        let in_flight = self.gate.close();
        // A call that comes during the swap.
        let admission = self.gate.admit(Call(self.calls.clone())).unwrap();
        assert!(matches!(admission, Admission::Queued(_)));
        self.end(Step::CloseGate);
        in_flight
    }

    fn drain(&mut self, timeout: Option<Duration>) -> Result<(), InFlight> {
        let is_first = !self.steps.contains(&Step::Drain);
        let step = if is_first {
            Step::Drain
        } else {
            Step::DrainAgain
        };
        self.begin(step).unwrap();
        if !self.has(step, Fault::Timeout) {
            self.end_call();
        }
        // What was interrupted gets some time to notice, however impatient the plan is.
        let least = if is_first {
            Duration::ZERO
        } else {
            Duration::from_secs(5)
        };
        assert_eq!(timeout, Some(least));
        let drained = self.gate.wait_drained(Some(Duration::ZERO));
        self.end(step);
        drained
    }

    fn interrupt(&mut self, whom: Drained) {
        self.begin(Step::Interrupt).unwrap();
        self.interrupted = Some(whom);
        self.end(Step::Interrupt);
    }

    fn save(&mut self) -> Result<(), Self::Cause> {
        self.begin(Step::Save)?;
        assert_eq!(self.gate.counts().in_flight, 0);
        self.saved = Some(self.serving.state);
        self.end(Step::Save);
        Ok(())
    }

    fn restore(&mut self) -> Result<(), Self::Cause> {
        self.begin(Step::Restore)?;
        if let (Some(next), Some(saved)) = (&mut self.next, self.saved) {
            next.state = saved;
        }
        self.end(Step::Restore);
        Ok(())
    }

    fn commit(&mut self) {
        self.begin(Step::Commit).unwrap();
        self.serving = self.next.take().unwrap();
        self.end(Step::Commit);
    }

    fn roll(&mut self) -> usize {
        self.begin(Step::Roll).unwrap();
        self.serving = self.next.take().unwrap();
        self.gate.roll().unwrap();
        self.end(Step::Roll);
        self.gate.counts().stragglers
    }

    fn roll_back(&mut self) {
        self.begin(Step::RollBack).unwrap();
        self.next = None;
        self.end(Step::RollBack);
    }

    fn open_gate(&mut self) -> usize {
        self.begin(Step::OpenGate).unwrap();
        let queued = self.gate.counts().queued;
        self.gate.open();
        self.end(Step::OpenGate);
        queued
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.get()
    }
}

fn plan(on_drain_timeout: OnDrainTimeout) -> Plan {
    Plan {
        drain_timeout: Some(Duration::ZERO),
        on_drain_timeout,
        skip_save: false,
    }
}

/// What must be true after any run whatsoever.
fn assert_one_generation_serves(fake: &mut Fake<'_>, outcome: &std::thread::Result<Outcome>) {
    let context = format!("{:?}: {:?}", fake.faults, fake.steps);
    for step in STEPS {
        assert!(fake.count(step) <= 1, "{context}: {step:?} at most once");
    }
    assert!(fake.next.is_none(), "{context}: one generation is left");
    let is_new = fake.serving.generation == Generation::FIRST.next();
    let is_rolling = fake.steps.contains(&Step::Roll);
    let did_commit = (fake.steps.contains(&Step::Commit) || is_rolling) && is_new;
    assert_eq!(
        is_new, did_commit,
        "{context}: only a commit or a roll changes the generation"
    );
    // A roll carries nothing over.
    let state = if is_rolling && is_new { "" } else { "precious" };
    assert_eq!(
        fake.serving.state, state,
        "{context}: nothing was lost or altered"
    );
    if matches!(outcome, Ok(Ok(_))) {
        assert!(is_new && !fake.steps.contains(&Step::RollBack), "{context}");
    } else if !is_new {
        assert_eq!(fake.count(Step::RollBack), 1, "{context}: rolled back");
    }
    let was_closed = fake.steps.contains(&Step::CloseGate);
    assert_eq!(
        fake.count(Step::OpenGate),
        usize::from(was_closed),
        "{context}: opened again"
    );

    assert!(fake.gate.counts().is_open, "{context}: the gate is open");
    fake.end_call();
    fake.straggler = None;
    // The call that came meanwhile, if one did, and one that comes now.
    let has_waited = usize::from(fake.steps.contains(&Step::Drain));
    fake.gate.admit(Call(fake.calls.clone())).unwrap();
    let ran = (0..)
        .map_while(|_| fake.started.try_recv().ok())
        .map(drop)
        .count();
    assert!(ran > has_waited, "{context}: waiting calls run");
    let counts = fake.gate.counts();
    assert_eq!(
        (counts.in_flight, counts.queued),
        (0, 0),
        "{context}: no call is left"
    );
}

#[test]
fn a_swap_without_faults_commits() {
    let clock = ManualClock::default();
    let mut fake = Fake::new(&clock, &[]);
    let outcome = fake.run(&plan(OnDrainTimeout::Abort));
    assert_one_generation_serves(&mut fake, &outcome);
    assert_eq!(
        fake.steps,
        [
            Step::Instantiate,
            Step::CloseGate,
            Step::Drain,
            Step::Save,
            Step::Restore,
            Step::Commit,
            Step::OpenGate
        ]
    );
    let paused = [
        Step::CloseGate,
        Step::Drain,
        Step::Save,
        Step::Restore,
        Step::Commit,
        Step::OpenGate,
    ];
    let expected = Timings {
        drained: 1,
        queued: 1,
        pause: paused.map(Step::duration).iter().sum(),
        drain: Step::Drain.duration(),
        save: Step::Save.duration(),
        instantiate: Step::Instantiate.duration(),
        restore: Step::Restore.duration(),
    };
    assert_eq!(outcome.unwrap(), Ok(expected));
    assert_eq!(clock.now(), expected.instantiate + expected.pause);
}

#[test]
fn a_skipped_save_leaves_the_old_generation_unread() {
    let clock = ManualClock::default();
    let mut fake = Fake::new(&clock, &[(Step::Save, Fault::Error)]);
    let plan = Plan {
        skip_save: true,
        ..plan(OnDrainTimeout::Abort)
    };
    let timings = fake.run(&plan).unwrap().unwrap();
    assert_eq!(timings.save, Duration::ZERO);
    assert!(!fake.steps.contains(&Step::Save));
    assert_eq!(
        fake.serving,
        Instance {
            generation: Generation::FIRST.next(),
            state: ""
        }
    );
}

#[test]
fn an_interrupted_drain_is_waited_for_again() {
    let clock = ManualClock::default();
    let mut fake = Fake::new(&clock, &[(Step::Drain, Fault::Timeout)]);
    let outcome = fake.run(&plan(OnDrainTimeout::Interrupt));
    assert_one_generation_serves(&mut fake, &outcome);
    let timings = outcome.unwrap().unwrap();
    let drain = [Step::Drain, Step::Interrupt, Step::DrainAgain];
    assert_eq!(timings.drain, drain.map(Step::duration).iter().sum());
}

#[test]
fn a_failed_step_is_named() {
    let failed = |faults: &[(Step, Fault)], on_drain_timeout| {
        let clock = ManualClock::default();
        let mut fake = Fake::new(&clock, faults);
        let outcome = fake.run(&plan(on_drain_timeout));
        assert_one_generation_serves(&mut fake, &outcome);
        outcome.unwrap().unwrap_err()
    };
    let step = |phase| Failure::Step {
        phase,
        cause: "no luck",
    };
    let abort = OnDrainTimeout::Abort;
    assert_eq!(
        failed(&[(Step::Instantiate, Fault::Error)], abort),
        step(FailedPhase::Instantiate)
    );
    assert_eq!(
        failed(&[(Step::Instantiate, Fault::InitializeError)], abort),
        step(FailedPhase::Initialize)
    );
    assert_eq!(
        failed(&[(Step::Save, Fault::Error)], abort),
        step(FailedPhase::Save)
    );
    assert_eq!(
        failed(&[(Step::Restore, Fault::Error)], abort),
        step(FailedPhase::Restore)
    );
    assert_eq!(
        failed(&[(Step::Drain, Fault::Timeout)], abort),
        Failure::DrainTimeout(InFlight(1))
    );
    let never_ends = [
        (Step::Drain, Fault::Timeout),
        (Step::DrainAgain, Fault::Timeout),
    ];
    let failure = failed(&never_ends, OnDrainTimeout::Interrupt);
    assert_eq!(failure, Failure::DrainTimeout(InFlight(1)));
    assert_eq!(failure.phase(), Some(FailedPhase::Drain));
}

#[test]
fn a_cancelled_swap_gives_up_before_its_next_step() {
    for (index, step) in [
        Step::Instantiate,
        Step::CloseGate,
        Step::Drain,
        Step::Save,
        Step::Restore,
    ]
    .into_iter()
    .enumerate()
    {
        let clock = ManualClock::default();
        let mut fake = Fake::new(&clock, &[(step, Fault::Cancel)]);
        let outcome = fake.run(&plan(OnDrainTimeout::Abort));
        assert_one_generation_serves(&mut fake, &outcome);
        assert_eq!(outcome.unwrap(), Err(Failure::Cancelled), "{step:?}");
        let undone = if step == Step::Instantiate { 1 } else { 2 };
        assert_eq!(
            fake.steps.len(),
            index + 1 + undone,
            "{step:?}: {:?}",
            fake.steps
        );
    }
}

#[test]
fn a_swap_cancelled_before_it_began_builds_nothing() {
    let clock = ManualClock::default();
    let mut fake = Fake::new(&clock, &[]);
    fake.is_cancelled.set(true);
    let outcome = fake.run(&plan(OnDrainTimeout::Abort));
    assert_one_generation_serves(&mut fake, &outcome);
    assert_eq!(outcome.unwrap(), Err(Failure::Cancelled));
    assert!(!fake.steps.contains(&Step::Instantiate));
}

#[test]
fn whoever_cancels_hears_of_that_and_not_of_the_time_out() {
    for on_drain_timeout in [OnDrainTimeout::Abort, OnDrainTimeout::Interrupt] {
        let clock = ManualClock::default();
        let faults = [(Step::Drain, Fault::Timeout), (Step::Drain, Fault::Cancel)];
        let mut fake = Fake::new(&clock, &faults);
        let outcome = fake.run(&plan(on_drain_timeout));
        assert_one_generation_serves(&mut fake, &outcome);
        assert_eq!(outcome.unwrap(), Err(Failure::Cancelled));
        assert!(!fake.steps.contains(&Step::Interrupt));
    }
}

/// Whether the combination means anything: only some steps can report an error, only draining times
/// out.
fn can_happen(step: Step, fault: Fault) -> bool {
    match fault {
        Fault::Error => matches!(step, Step::Instantiate | Step::Save | Step::Restore),
        Fault::InitializeError => step == Step::Instantiate,
        Fault::Timeout => matches!(
            step,
            Step::Drain | Step::DrainAgain | Step::Stragglers | Step::StragglersAgain
        ),
        // A gate that could not be opened is all that a swap cannot make good.
        Fault::PanicBefore => step != Step::OpenGate && step != Step::RollBack,
        Fault::PanicAfter | Fault::Cancel => true,
    }
}

#[test]
fn one_generation_serves_after_any_two_faults() {
    let singles: Vec<_> = STEPS
        .into_iter()
        .flat_map(|step| FAULTS.map(|fault| (step, fault)))
        .filter(|(step, fault)| can_happen(*step, *fault))
        .collect();
    for on_drain_timeout in [OnDrainTimeout::Abort, OnDrainTimeout::Interrupt] {
        for first in &singles {
            for second in &singles {
                let clock = ManualClock::default();
                let mut fake = Fake::new(&clock, &[*first, *second]);
                let outcome = fake.run(&plan(on_drain_timeout));
                assert_one_generation_serves(&mut fake, &outcome);
            }
        }
    }
}

#[test]
fn a_roll_without_faults_closes_no_gate() {
    let clock = ManualClock::default();
    let mut fake = Fake::rolled(&clock, &[]);
    let outcome = fake.run_rolling(&plan(OnDrainTimeout::Abort));
    assert_eq!(
        fake.steps,
        [Step::Stragglers, Step::Instantiate, Step::Roll]
    );
    assert!(
        fake.in_flight.is_some(),
        "what runs on the old one is left to run"
    );
    assert_eq!(fake.gate.counts().stragglers, 1);
    assert_one_generation_serves(&mut fake, &outcome);
    let expected = Timings {
        drained: 1,
        pause: Step::Roll.duration(),
        drain: Step::Stragglers.duration(),
        instantiate: Step::Instantiate.duration(),
        ..Timings::default()
    };
    assert_eq!(outcome.unwrap(), Ok(expected));
    assert_eq!(
        clock.now(),
        expected.drain + expected.instantiate + expected.pause
    );
}

#[test]
fn stragglers_are_interrupted_and_waited_for_again() {
    let clock = ManualClock::default();
    let mut fake = Fake::rolled(&clock, &[(Step::Stragglers, Fault::Timeout)]);
    let outcome = fake.run_rolling(&plan(OnDrainTimeout::Interrupt));
    assert_eq!(fake.interrupted, Some(Drained::Stragglers));
    assert_one_generation_serves(&mut fake, &outcome);
    let timings = outcome.unwrap().unwrap();
    let drain = [Step::Stragglers, Step::Interrupt, Step::StragglersAgain];
    assert_eq!(timings.drain, drain.map(Step::duration).iter().sum());
}

#[test]
fn a_roll_that_fails_names_its_step_and_builds_no_third_generation() {
    let failed = |faults: &[(Step, Fault)], on_drain_timeout| {
        let clock = ManualClock::default();
        let mut fake = Fake::rolled(&clock, faults);
        let outcome = fake.run_rolling(&plan(on_drain_timeout));
        assert!(fake.in_flight.is_some(), "what runs is left to run");
        let did_build = fake.steps.contains(&Step::Instantiate);
        assert_one_generation_serves(&mut fake, &outcome);
        (outcome.unwrap().unwrap_err(), did_build)
    };
    let step = |phase| Failure::Step {
        phase,
        cause: "no luck",
    };
    let abort = OnDrainTimeout::Abort;
    assert_eq!(
        failed(&[(Step::Instantiate, Fault::Error)], abort),
        (step(FailedPhase::Instantiate), true)
    );
    assert_eq!(
        failed(&[(Step::Instantiate, Fault::InitializeError)], abort),
        (step(FailedPhase::Initialize), true)
    );
    let timed_out = Failure::DrainTimeout(InFlight(1));
    assert_eq!(
        failed(&[(Step::Stragglers, Fault::Timeout)], abort),
        (timed_out, false)
    );
    let never_end = [
        (Step::Stragglers, Fault::Timeout),
        (Step::StragglersAgain, Fault::Timeout),
    ];
    assert_eq!(
        failed(&never_end, OnDrainTimeout::Interrupt),
        (timed_out, false)
    );
}

#[test]
fn a_cancelled_roll_gives_up_before_its_next_step() {
    for (index, step) in [Step::Stragglers, Step::Instantiate]
        .into_iter()
        .enumerate()
    {
        let clock = ManualClock::default();
        let mut fake = Fake::rolled(&clock, &[(step, Fault::Cancel)]);
        let outcome = fake.run_rolling(&plan(OnDrainTimeout::Abort));
        assert_one_generation_serves(&mut fake, &outcome);
        assert_eq!(outcome.unwrap(), Err(Failure::Cancelled), "{step:?}");
        let undone = 1;
        assert_eq!(fake.steps.len(), index + 1 + undone, "{:?}", fake.steps);
    }
    // After the roll there is nothing to give up.
    let clock = ManualClock::default();
    let mut fake = Fake::rolled(&clock, &[(Step::Roll, Fault::Cancel)]);
    let outcome = fake.run_rolling(&plan(OnDrainTimeout::Abort));
    assert_one_generation_serves(&mut fake, &outcome);
    assert!(outcome.unwrap().is_ok());
}

#[test]
fn who_cancels_a_roll_hears_of_that_and_not_of_the_time_out() {
    for on_drain_timeout in [OnDrainTimeout::Abort, OnDrainTimeout::Interrupt] {
        let clock = ManualClock::default();
        let faults = [
            (Step::Stragglers, Fault::Timeout),
            (Step::Stragglers, Fault::Cancel),
        ];
        let mut fake = Fake::rolled(&clock, &faults);
        let outcome = fake.run_rolling(&plan(on_drain_timeout));
        assert_one_generation_serves(&mut fake, &outcome);
        assert_eq!(outcome.unwrap(), Err(Failure::Cancelled));
        assert_eq!(fake.interrupted, None);
    }
}

#[test]
fn one_generation_serves_after_any_two_faults_of_a_roll() {
    let singles: Vec<_> = STEPS
        .into_iter()
        .flat_map(|step| FAULTS.map(|fault| (step, fault)))
        .filter(|(step, fault)| can_happen(*step, *fault))
        .collect();
    for on_drain_timeout in [OnDrainTimeout::Abort, OnDrainTimeout::Interrupt] {
        for first in &singles {
            for second in &singles {
                let clock = ManualClock::default();
                let mut fake = Fake::rolled(&clock, &[*first, *second]);
                let outcome = fake.run_rolling(&plan(on_drain_timeout));
                for step in [Step::CloseGate, Step::Drain, Step::Save, Step::Restore] {
                    assert_eq!(fake.count(step), 0, "{step:?} is not of a roll");
                }
                assert!(fake.in_flight.is_some(), "what runs is left to run");
                assert_one_generation_serves(&mut fake, &outcome);
            }
        }
    }
}

#[test]
fn a_panic_in_a_roll_goes_on_to_the_caller() {
    for step in [
        Step::Stragglers,
        Step::Interrupt,
        Step::StragglersAgain,
        Step::Instantiate,
        Step::Roll,
        Step::RollBack,
    ] {
        let clock = ManualClock::default();
        let mut faults = vec![(step, Fault::PanicAfter)];
        match step {
            Step::Interrupt | Step::StragglersAgain => {
                faults.push((Step::Stragglers, Fault::Timeout));
            }
            Step::RollBack => faults.push((Step::Instantiate, Fault::Error)),
            _ => {}
        }
        let mut fake = Fake::rolled(&clock, &faults);
        let outcome = fake.run_rolling(&plan(OnDrainTimeout::Interrupt));
        assert_one_generation_serves(&mut fake, &outcome);
        let panic = outcome.unwrap_err().downcast::<&str>().unwrap();
        assert_eq!(*panic, "step", "{step:?}");
    }
}

#[test]
fn a_panic_goes_on_to_the_caller() {
    let rolling = [Step::Stragglers, Step::StragglersAgain, Step::Roll];
    for step in STEPS.into_iter().filter(|step| !rolling.contains(step)) {
        let clock = ManualClock::default();
        // Timeouts and an error where the step is only reached that way.
        let mut faults = vec![(step, Fault::PanicAfter)];
        match step {
            Step::Interrupt | Step::DrainAgain => faults.push((Step::Drain, Fault::Timeout)),
            Step::RollBack => faults.push((Step::Save, Fault::Error)),
            _ => {}
        }
        let mut fake = Fake::new(&clock, &faults);
        let outcome = fake.run(&plan(OnDrainTimeout::Interrupt));
        assert_one_generation_serves(&mut fake, &outcome);
        assert_eq!(
            *outcome.unwrap_err().downcast::<&str>().unwrap(),
            "step",
            "{step:?}"
        );
    }
}

#[test]
fn a_second_panic_while_undoing_does_not_abort() {
    let clock = ManualClock::default();
    let faults = [
        (Step::Save, Fault::PanicBefore),
        (Step::RollBack, Fault::PanicBefore),
    ];
    let mut fake = Fake::new(&clock, &faults);
    let outcome = fake.run(&plan(OnDrainTimeout::Abort));
    assert!(outcome.is_err());
    assert!(fake.gate.counts().is_open);
    assert_eq!(fake.count(Step::OpenGate), 1);
}
