//! Every step of a pause × every way in which it can fail: the gate is open afterwards, nothing is done
//! while somebody is inside, and who waited runs.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use wasm_molt_lifecycle::pause::run;
use wasm_molt_lifecycle::{
    Admission, Clock, Gate, InFlight, ManualClock, OnDrainTimeout, PauseFailure, PausePlan,
    PauseTimings, Paused, Ticket,
};

use common::{Busy, Call};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    CloseGate,
    Drain,
    Interrupt,
    DrainAgain,
    Act,
    OpenGate,
}

const STEPS: [Step; 6] = [
    Step::CloseGate,
    Step::Drain,
    Step::Interrupt,
    Step::DrainAgain,
    Step::Act,
    Step::OpenGate,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error,
    PanicBefore,
    PanicAfter,
    /// `destroy()` comes while the step runs.
    Cancel,
}

const FAULTS: [Fault; 4] = [
    Fault::Error,
    Fault::PanicBefore,
    Fault::PanicAfter,
    Fault::Cancel,
];

struct Fake<'a> {
    clock: &'a ManualClock,
    gate: Gate<Call>,
    in_flight: Option<Ticket<Call>>,
    fault: Option<(Step, Fault)>,
    /// The call ends only when it is interrupted.
    is_stubborn: bool,
    steps: Vec<Step>,
    acted: usize,
    is_cancelled: Cell<bool>,
    calls: Sender<Ticket<Call>>,
    started: Receiver<Ticket<Call>>,
}

impl<'a> Fake<'a> {
    /// Serves, with one call in flight.
    fn new(clock: &'a ManualClock, is_stubborn: bool, fault: Option<(Step, Fault)>) -> Self {
        let Busy {
            gate,
            in_flight,
            calls,
            started,
        } = Busy::new();
        Self {
            clock,
            gate,
            in_flight,
            fault,
            is_stubborn,
            steps: Vec::new(),
            acted: 0,
            is_cancelled: Cell::new(false),
            calls,
            started,
        }
    }

    /// Whether the step fails.
    fn step<R>(&mut self, step: Step, body: impl FnOnce(&mut Self) -> R) -> (R, bool) {
        self.steps.push(step);
        let fault = self.fault.filter(|(at, _)| *at == step).map(|(_, f)| f);
        assert!(
            fault != Some(Fault::PanicBefore),
            "on purpose before {step:?}"
        );
        self.clock.advance(Duration::from_millis(1 << step as u32));
        let result = body(self);
        if fault == Some(Fault::Cancel) {
            self.is_cancelled.set(true);
        }
        assert!(
            fault != Some(Fault::PanicAfter),
            "on purpose after {step:?}"
        );
        (result, fault == Some(Fault::Error))
    }

    fn drain_as(&mut self, step: Step, ends: bool) -> Result<(), InFlight> {
        let (left, fails) = self.step(step, |fake| {
            if ends {
                fake.in_flight = None;
            }
            fake.gate.counts().in_flight
        });
        if left > 0 || fails {
            return Err(InFlight(left.max(1)));
        }
        Ok(())
    }
}

impl Paused for Fake<'_> {
    type Cause = &'static str;

    fn close_gate(&mut self) -> usize {
        let (count, _) = self.step(Step::CloseGate, |fake| {
            let count = fake.gate.close();
            // Somebody comes meanwhile, and waits.
            let admitted = fake.gate.admit(Call(fake.calls.clone()));
            assert!(matches!(admitted, Ok(Admission::Queued(_))));
            count
        });
        count
    }

    fn drain(&mut self, _timeout: Option<Duration>) -> Result<(), InFlight> {
        if self.steps.contains(&Step::Drain) {
            self.drain_as(Step::DrainAgain, true)
        } else {
            let ends = !self.is_stubborn;
            self.drain_as(Step::Drain, ends)
        }
    }

    fn interrupt(&mut self) {
        self.step(Step::Interrupt, |_| ());
    }

    fn act(&mut self) -> Result<(), &'static str> {
        assert!(self.in_flight.is_none(), "somebody is inside");
        let (counts, fails) = self.step(Step::Act, |fake| fake.gate.counts());
        assert!(!counts.is_open && counts.in_flight == 0);
        self.acted += 1;
        if fails { Err("the act") } else { Ok(()) }
    }

    fn open_gate(&mut self) -> usize {
        self.step(Step::OpenGate, |fake| {
            let queued = fake.gate.counts().queued;
            fake.gate.open();
            queued
        })
        .0
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.get()
    }
}

const PLAN: PausePlan = PausePlan {
    drain_timeout: Some(Duration::from_millis(10)),
    on_drain_timeout: OnDrainTimeout::Interrupt,
};

type Outcome = Result<PauseTimings, PauseFailure<&'static str>>;

fn run_fake(fake: &mut Fake<'_>, plan: &PausePlan) -> std::thread::Result<Outcome> {
    let clock: &dyn Clock = fake.clock;
    catch_unwind(AssertUnwindSafe(|| run(fake, clock, plan)))
}

#[test]
fn a_pause_measures_its_steps_and_lets_who_waited_run() {
    let clock = ManualClock::default();
    let mut fake = Fake::new(&clock, true, None);
    let timings = match run_fake(&mut fake, &PLAN) {
        Ok(outcome) => outcome.unwrap(),
        Err(panic) => resume_unwind(panic),
    };
    assert_eq!(fake.steps, STEPS);
    let ms = |step: Step| Duration::from_millis(1 << step as u32);
    assert_eq!((timings.drained, timings.queued), (1, 1));
    assert_eq!(
        timings.drain,
        ms(Step::Drain) + ms(Step::Interrupt) + ms(Step::DrainAgain)
    );
    assert_eq!(timings.act, ms(Step::Act));
    assert_eq!(timings.pause, STEPS.iter().map(|step| ms(*step)).sum());
    assert!(fake.started.try_recv().is_ok());
}

#[test]
fn whatever_fails_the_gate_opens_and_who_waited_runs() {
    for step in STEPS {
        for fault in FAULTS {
            for is_stubborn in [false, true] {
                let clock = ManualClock::default();
                let mut fake = Fake::new(&clock, is_stubborn, Some((step, fault)));
                let outcome = run_fake(&mut fake, &PLAN);
                let row = format!("{step:?} {fault:?} {is_stubborn}: {outcome:?}");
                let is_met = fake.steps.contains(&step);
                if !is_met {
                    assert!(matches!(outcome, Ok(Ok(_))), "{row}");
                }
                let opened = fake.steps.iter().filter(|s| **s == Step::OpenGate).count();
                assert_eq!(opened, 1, "{row}");
                // A gate that cannot be opened is beyond us; every other failure opens it.
                if !(step == Step::OpenGate && fault == Fault::PanicBefore) {
                    assert!(fake.gate.counts().is_open, "{row}");
                    fake.in_flight = None;
                    let mut who = fake.started.try_iter();
                    let is_in_flight = who.next().is_some();
                    assert!(is_in_flight || step == Step::CloseGate, "{row}");
                }
                let expects_act = !is_met
                    || match (step, fault) {
                        (Step::Act, Fault::PanicBefore) => false,
                        (Step::Act | Step::OpenGate, _) => true,
                        (Step::Drain, Fault::Error) => true,
                        (Step::DrainAgain, _) | (_, Fault::PanicBefore | Fault::PanicAfter) => {
                            false
                        }
                        (_, Fault::Cancel) => false,
                        (_, Fault::Error) => true,
                    };
                let has_acted = fake.acted > 0
                    || fake.steps.contains(&Step::Act)
                        && step == Step::Act
                        && fault == Fault::PanicAfter;
                assert_eq!(has_acted, expects_act, "{row}");
                match (fault, &outcome) {
                    (Fault::PanicBefore | Fault::PanicAfter, outcome) if is_met => {
                        assert!(outcome.is_err(), "{row}");
                    }
                    (Fault::Error, Ok(Err(failure))) => {
                        assert!(
                            matches!(
                                failure,
                                PauseFailure::Act("the act") | PauseFailure::DrainTimeout(_)
                            ),
                            "{row}"
                        );
                    }
                    (Fault::Cancel, Ok(Err(failure))) => {
                        assert_eq!(*failure, PauseFailure::Cancelled, "{row}");
                    }
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn a_pause_that_may_not_interrupt_gives_up_and_does_nothing() {
    let clock = ManualClock::default();
    let mut fake = Fake::new(&clock, true, None);
    let plan = PausePlan {
        on_drain_timeout: OnDrainTimeout::Abort,
        ..PLAN
    };
    let outcome = run_fake(&mut fake, &plan);
    assert!(matches!(
        outcome,
        Ok(Err(PauseFailure::DrainTimeout(InFlight(1))))
    ));
    assert_eq!(fake.acted, 0);
    assert!(fake.gate.counts().is_open);
}

#[test]
fn a_pause_that_was_cancelled_before_it_began_touches_nothing() {
    let clock = ManualClock::default();
    let mut fake = Fake::new(&clock, false, None);
    fake.is_cancelled.set(true);
    let outcome = run_fake(&mut fake, &PLAN);
    assert!(matches!(outcome, Ok(Err(PauseFailure::Cancelled))));
    assert!(fake.steps.is_empty());
}
