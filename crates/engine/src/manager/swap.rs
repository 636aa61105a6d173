//! The swap, carried out: the protocol of [`wasm_molt_lifecycle::swap`] over real instances.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use wasm_molt_lifecycle::{
    Backend, Drained, FailedPhase, Failure, Generation, InFlight, OnDrainTimeout, Plan, Step,
    SystemClock, Timings,
    swap::{run as run_exclusive, run_rolling},
};

use crate::error::{Error, ErrorCode, Result};
use crate::instance::module::Source;
use crate::instance::pool::Pool;
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::snapshot::Snapshot;
use crate::instance::value::HostRef;
use crate::manager::freed::Freed;
use crate::manager::host::{Event, Replaced};
use crate::manager::lending::{HookScope, impatient};
use crate::manager::start::Making;
use crate::manager::{ManagerState, Shared, trace};

/// What new calls do while the old generation is still in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// They wait until it has drained.
    #[default]
    Exclusive,
    /// They go to the new generation at once, while the old one drains behind.
    Rolling,
}

impl Strategy {
    /// The word for it in the public interface.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exclusive => "exclusive",
            Self::Rolling => "rolling",
        }
    }
}

/// What a reload is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadOptions {
    /// In the report and the statistics.
    pub reason: String,
    /// What new calls do.
    pub strategy: Strategy,
    /// Another build of the module; `None`: the one that serves.
    pub source: Option<Source>,
    /// Longest wait for what is in flight; `None`: for ever.
    pub drain_timeout: Option<Duration>,
    /// What happens then.
    pub on_drain_timeout: OnDrainTimeout,
    /// Leave state behind.
    pub skip_save: bool,
    /// Asked for by a policy: what becomes of the memory is measured.
    pub is_recycle: bool,
}

impl ReloadOptions {
    /// 30 seconds.
    pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
}

impl Default for ReloadOptions {
    fn default() -> Self {
        Self {
            reason: "manual".into(),
            strategy: Strategy::Exclusive,
            source: None,
            drain_timeout: Some(Self::DEFAULT_DRAIN_TIMEOUT),
            on_drain_timeout: OnDrainTimeout::Abort,
            skip_save: false,
            is_recycle: false,
        }
    }
}

/// A step of a reload that went well.
#[derive(Debug, Clone)]
pub struct ReloadStep {
    /// Which.
    pub step: Step,
    /// How long it took.
    pub took: Duration,
    /// What will serve, or does.
    pub generation: Generation,
    /// As in the report.
    pub reason: String,
    /// As in the report.
    pub strategy: Strategy,
}

/// What a reload did.
#[derive(Debug, Clone)]
pub struct ReloadReport {
    /// What serves now.
    pub generation: Generation,
    /// What served before.
    pub previous_generation: Generation,
    /// Why.
    pub reason: String,
    /// How.
    pub strategy: Strategy,
    /// In flight when the gate closed, or left behind.
    pub drained: usize,
    /// Waited at the gate.
    pub queued: usize,
    /// The gate was closed.
    pub pause: Duration,
    /// Of which: waiting for what was in flight.
    pub drain: Duration,
    /// Of which: reading state.
    pub save: Duration,
    /// Before it closed: making and initializing the new instances.
    pub instantiate: Duration,
    /// Of the pause: writing state.
    pub restore: Duration,
    /// Linear memory of the old instances, bytes.
    pub memory_bytes_before: usize,
    /// Linear memory of the new ones, bytes.
    pub memory_bytes_after: usize,
    /// A policy has asked for it.
    pub is_recycle: bool,
    /// What became of the old ones' memory, where that was measured.
    pub freed: Option<Freed>,
}

impl ReloadReport {
    /// One instance was replaced, or put back, while the others served. All times and sizes are 0.
    pub(crate) fn of_one(
        generation: Generation,
        previous_generation: Generation,
        reason: &str,
    ) -> Self {
        Self {
            generation,
            previous_generation,
            reason: reason.into(),
            strategy: Strategy::Exclusive,
            drained: 0,
            queued: 0,
            pause: Duration::ZERO,
            drain: Duration::ZERO,
            save: Duration::ZERO,
            instantiate: Duration::ZERO,
            restore: Duration::ZERO,
            memory_bytes_before: 0,
            memory_bytes_after: 0,
            is_recycle: false,
            freed: None,
        }
    }
}

/// Runs one swap to its end, on this thread.
pub(crate) fn run(
    shared: &Arc<Shared>,
    options: &ReloadOptions,
    scope: HookScope,
) -> Result<Arc<ReloadReport>> {
    let span = trace::Span::reload(shared.name(), &options.reason, options.strategy.as_str());
    let outcome = run_traced(shared, options, scope);
    span.end(&outcome);
    outcome
}

fn run_traced(
    shared: &Arc<Shared>,
    options: &ReloadOptions,
    scope: HookScope,
) -> Result<Arc<ReloadReport>> {
    let blueprint = shared.blueprint()?;
    // Whatever happens in here, a panic included, the state is not left behind.
    let before = shared.state();
    let mut restore = RestoreState {
        shared,
        to: Some(before),
    };
    shared.set_state(ManagerState::Reloading);
    let (old, previous) = {
        let serving = shared.lock_serving();
        (serving.replicas.clone(), serving.generation)
    };
    let is_sync = scope.is_sync;
    let cancelled = scope.clone();
    let mut swap = Swap {
        shared,
        options,
        blueprint,
        scope,
        previous,
        states: Vec::new(),
        next: Vec::new(),
        captured: None,
        old,
        pool: None,
        memory_bytes_before: 0,
        is_homeless: false,
        closed_at: Arc::default(),
        published: Arc::default(),
    };
    let plan = Plan {
        drain_timeout: options.drain_timeout,
        on_drain_timeout: options.on_drain_timeout,
        skip_save: options.skip_save,
    };
    let clock = SystemClock::default();
    // With nothing in flight the two are the same, and a synchronous one must not leave this thread.
    let outcome = match options.strategy {
        Strategy::Rolling if !is_sync => run_rolling(&mut swap, &clock, &plan),
        _ => run_exclusive(&mut swap, &clock, &plan),
    };
    match outcome {
        // The environment went between the last step and this one: the old instances are still the
        // ones that are known, so they are not released.
        Ok(_) if swap.published.get().is_none() => {
            let next = std::mem::take(&mut swap.next);
            let _ = shared.discard(next, swap.previous.next());
            Err(shared.closed())
        }
        Ok(timings) => {
            restore.to = None;
            Ok(Arc::new(swap.finish(&timings)))
        }
        Err(failure) => Err(failed(shared, options, failure, &cancelled)),
    }
}

fn failed(
    shared: &Shared,
    options: &ReloadOptions,
    failure: Failure<Error>,
    scope: &HookScope,
) -> Error {
    match failure {
        Failure::DrainTimeout(in_flight) if scope.is_sync => shared.in_flight(in_flight.0),
        Failure::DrainTimeout(in_flight) => Error::DrainTimeout {
            what: format!("the reload of {}", shared.name()),
            in_flight: in_flight.0,
            waited_ms: options.drain_timeout.unwrap_or_default().as_millis(),
        },
        Failure::Cancelled => shared.closed(),
        Failure::Step { .. } if scope.is_cancelled() || shared.is_destroyed() => shared.closed(),
        Failure::Step {
            cause: cause @ Error::Incompatible { .. },
            ..
        } => cause,
        Failure::Step { phase, cause } => shared.reload_failed("the reload", phase, cause),
    }
}

/// Puts the manager's state back on the way out, unless the swap went through.
struct RestoreState<'a> {
    shared: &'a Shared,
    to: Option<ManagerState>,
}

impl Drop for RestoreState<'_> {
    fn drop(&mut self) {
        if let Some(state) = self.to {
            self.shared.set_state(state);
        }
    }
}

struct Swap<'a> {
    shared: &'a Arc<Shared>,
    options: &'a ReloadOptions,
    blueprint: Arc<Blueprint>,
    scope: HookScope,
    previous: Generation,
    states: Vec<Option<HostRef>>,
    next: Vec<Arc<Replica>>,
    /// Isolation per call: what the calls of the next generation begin with, if that is new.
    captured: Option<Arc<Snapshot>>,
    old: Vec<Arc<Replica>>,
    /// Rolling: the threads of the next generation.
    pool: Option<Arc<Pool>>,
    memory_bytes_before: usize,
    /// The home is gone: there is nobody to publish to.
    is_homeless: bool,
    /// Set at home, when the gate closes.
    closed_at: Arc<OnceLock<Instant>>,
    /// Set at home, by the commit.
    published: Arc<OnceLock<Published>>,
}

/// What the commit has done, noted at home: the control thread hears of it late where the cores are
/// taken, when callers have long been served.
struct Published {
    /// Rolling: the number of the roll, and how many are still inside what it has left behind.
    left_behind: Option<(u64, usize)>,
    /// Exclusive: who waited when the gate opened.
    queued: usize,
    /// How long nobody was admitted.
    pause: Duration,
}

impl Swap<'_> {
    /// After the commit: the old instances go, and with them their memory.
    fn finish(self, timings: &Timings) -> ReloadReport {
        let mut freed = None;
        match self.published.get() {
            Some(Published {
                left_behind: Some((roll, _)),
                ..
            }) => self.shared.see_off(*roll, self.options),
            _ => {
                let release = || {
                    for replica in &self.old {
                        // SAFETY: the gate was drained, so nobody was inside; at the commit every handle
                        // on it expired and its slot went to a new instance.
                        unsafe { replica.release() };
                    }
                };
                if self.options.is_recycle {
                    let pages = self.old.iter().map(|old| old.memory_usage().private_bytes);
                    freed = Some(Freed::measure(pages.sum(), release));
                } else {
                    release();
                }
            }
        }
        let published = self.published.get();
        ReloadReport {
            generation: self.previous.next(),
            previous_generation: self.previous,
            reason: self.options.reason.clone(),
            strategy: self.options.strategy,
            drained: timings.drained,
            queued: timings.queued,
            pause: published.map_or(timings.pause, |published| published.pause),
            drain: timings.drain,
            save: timings.save,
            instantiate: timings.instantiate,
            restore: timings.restore,
            memory_bytes_before: self.memory_bytes_before,
            memory_bytes_after: self.next.iter().map(|r| r.memory_bytes()).sum(),
            is_recycle: self.options.is_recycle,
            freed,
        }
    }

    /// Another build, if one was asked for: loaded, and compared with the one that serves.
    fn next_blueprint(&self) -> Result<Arc<Blueprint>> {
        let Some(source) = &self.options.source else {
            return Ok(Arc::clone(&self.blueprint));
        };
        let mut module = self.shared.load_next(source)?;
        module.succeed(&self.blueprint.module)?;
        Ok(self.shared.blueprint_of(Arc::new(module)))
    }

    fn make_next(&mut self) -> Result<(), (FailedPhase, Error)> {
        let making = Making {
            blueprint: &self.blueprint,
            generation: self.previous.next(),
            from: self.shared.origin(&self.blueprint.module),
            scope: self.scope.clone(),
        };
        (self.next, self.captured) = self.shared.make_replicas(making, self.old.len())?;
        if self.options.strategy == Strategy::Rolling {
            self.capture_realm();
        }
        Ok(())
    }

    fn capture_realm(&mut self) {
        if let Some(first) = self.next.first()
            && let Some(captured) = self.shared.capture_next_realm(first, &self.blueprint)
        {
            self.captured = Some(captured);
        }
    }

    fn change(&self, old: Vec<Arc<Replica>>) -> Replaced {
        Replaced {
            old,
            new: self.next.clone(),
            generation: self.previous.next(),
        }
    }

    fn note_memory(&mut self) {
        self.memory_bytes_before = self.old.iter().map(|r| r.memory_bytes()).sum();
        let all =
            self.shared.memory_bytes() + self.next.iter().map(|r| r.memory_bytes()).sum::<usize>();
        self.shared.note_peak(all);
    }
}

impl Backend for Swap<'_> {
    type Cause = Error;

    fn drain_stragglers(&mut self, timeout: Option<Duration>) -> Result<(), InFlight> {
        let scope = &self.scope;
        let gate = &self.shared.gate;
        gate.wait_stragglers(1, timeout, || scope.is_cancelled())
    }

    fn instantiate(&mut self) -> Result<(), (FailedPhase, Error)> {
        self.blueprint = self
            .next_blueprint()
            .map_err(|error| (FailedPhase::Instantiate, error))?;
        if self.options.strategy == Strategy::Rolling && !self.scope.is_sync {
            let pool = Arc::clone(&self.shared.lock_serving().pool);
            let pool = pool.another();
            let pool = pool.map_err(|error| (FailedPhase::Instantiate, error))?;
            self.pool = Some(Arc::new(pool));
        }
        self.make_next().map_err(|(phase, error)| {
            // And not that the system has refused it something.
            let is_link = matches!(error, Error::Plain { code: ErrorCode::Link, .. });
            let does_not_fit = self.options.source.is_some() && is_link;
            if does_not_fit {
                (phase, Error::Incompatible {
                    message: format!(
                        "the other build of {} needs something else than the imports that are given",
                        self.shared.name()
                    ),
                    cause: Some(Box::new(error)),
                })
            } else {
                (phase, error)
            }
        })
    }

    fn close_gate(&mut self) -> usize {
        let closed_at = Arc::clone(&self.closed_at);
        let in_flight = self.shared.close_gate(move || {
            let _ = closed_at.set(Instant::now());
        });
        // If the home is gone there is nobody to call, and the next step finds the swap cancelled.
        self.is_homeless = in_flight.is_none();
        in_flight.unwrap_or(0)
    }

    fn drain(&mut self, timeout: Option<Duration>) -> Result<(), InFlight> {
        let (shared, scope) = (self.shared, &self.scope);
        shared.drain(scope, timeout, || scope.is_cancelled())?;
        Shared::resume(&self.old);
        shared.set_state(ManagerState::Reloading);
        self.note_memory();
        Ok(())
    }

    fn interrupt(&mut self, which: Drained) {
        let replicas = {
            let serving = self.shared.lock_serving();
            match which {
                Drained::InFlight => serving.all(),
                Drained::Stragglers => serving.left(),
            }
        };
        self.shared.interrupt(&replicas, &impatient());
    }

    fn save(&mut self) -> Result<(), Error> {
        if !self.shared.host.saves_state() {
            return Ok(());
        }
        for (slot, replica) in self.old.iter().enumerate() {
            // A poisoned guest's memory means nothing any more: it is not asked.
            let state = if replica.is_poisoned() {
                None
            } else {
                self.shared.with_lease(replica, &self.scope, |lease| {
                    self.shared.host.save_state(lease, slot)
                })?
            };
            self.states.push(state);
        }
        Ok(())
    }

    fn restore(&mut self) -> Result<(), Error> {
        for (slot, (replica, state)) in self.next.iter().zip(&self.states).enumerate() {
            let Some(state) = state else { continue };
            self.shared.with_lease(replica, &self.scope, |lease| {
                self.shared.host.restore_state(lease, state, slot)
            })?;
            // A hook that goes on after a trap leaves an instance that must not serve.
            if let Some(trap) = replica.last_trap() {
                return Err(trap);
            }
        }
        // Isolated calls begin with a snapshot: what was just restored has to be in it.
        if self.shared.isolates_calls()
            && self.states.iter().any(Option::is_some)
            && let Some(first) = self.next.first()
        {
            self.captured = Some(self.shared.capture_of(first, &self.blueprint)?);
        }
        self.capture_realm();
        Ok(())
    }

    fn commit(&mut self) {
        let shared = Arc::clone(self.shared);
        let blueprint = Arc::clone(&self.blueprint);
        let change = self.change(self.old.clone());
        let reason = self.options.reason.clone();
        let closed_at = Arc::clone(&self.closed_at);
        let published = Arc::clone(&self.published);
        let captured = self.captured.take();
        // If the home is gone nothing is published, and `run` sees that.
        let _ = self.shared.host.at_home(Box::new(move |_| {
            {
                let mut serving = shared.lock_serving();
                serving.generation = change.generation;
                serving.blueprint = Some(Arc::clone(&blueprint));
                serving.replicas.clone_from(&change.new);
            }
            shared.adopt(&blueprint.module, captured);
            shared.begin_wear(&change.new);
            shared.recovered();
            shared.stats.reloaded(&reason);
            shared.commits();
            shared.set_state(ManagerState::Ready);
            for old in &change.old {
                // Before what they import is nobody's any more.
                old.threads().stop();
            }
            shared.host.replaced(&change);
            shared.gate.reinstate_all();
            let queued = shared.gate.counts().queued;
            // Here, and not one hand-over between threads later.
            shared.gate.open();
            let pause = closed_at.get().map_or(Duration::ZERO, Instant::elapsed);
            let _ = published.set(Published {
                left_behind: None,
                queued,
                pause,
            });
        }));
    }

    fn roll(&mut self) -> usize {
        self.note_memory();
        let shared = Arc::clone(self.shared);
        let blueprint = Arc::clone(&self.blueprint);
        let change = self.change(Vec::new());
        let reason = self.options.reason.clone();
        let published = Arc::clone(&self.published);
        let pool = self.pool.take();
        let captured = self.captured.take();
        let _ = self.shared.host.at_home(Box::new(move |home| {
            // Steps do not run at home while it is inside; if one did, it must not swap what is in use.
            if home.is_some_and(|home| home.depth() > 0) {
                return;
            }
            let started = Instant::now();
            // Calls that have their instance, and no thread yet, begin after this.
            let isolates = shared.isolates_calls();
            let origin = isolates.then(|| shared.lock_snapshots().origin()).flatten();
            let roll = {
                let mut serving = shared.lock_serving();
                serving.blueprint = Some(Arc::clone(&blueprint));
                let pool = pool.unwrap_or_else(|| Arc::clone(&serving.pool));
                serving.roll(change.generation, &change.new, pool, origin.as_ref())
            };
            shared.adopt(&blueprint.module, captured);
            shared.begin_wear(&change.new);
            shared.recovered();
            shared.stats.reloaded(&reason);
            shared.commits();
            shared.set_state(ManagerState::Ready);
            // A panic of the host's must not leave the gate behind what serves.
            let told = catch_unwind(AssertUnwindSafe(|| shared.host.replaced(&change)));
            drop(told);
            // Only now can anybody get a slot of the new generation.
            match home {
                Some(home) => home.roll(),
                None => shared.gate.roll(),
            };
            let left = shared.gate.counts().stragglers;
            let _ = published.set(Published {
                left_behind: Some((roll, left)),
                queued: 0,
                pause: started.elapsed(),
            });
        }));
        let published = self.published.get();
        let left = published.and_then(|published| published.left_behind);
        left.map_or(0, |(_, stragglers)| stragglers)
    }

    fn roll_back(&mut self) {
        let next = std::mem::take(&mut self.next);
        let _ = self.shared.discard(next, self.previous.next());
        Shared::resume(&self.old);
        // A hook may have trapped the old guest while it saved: it must not serve like that.
        self.shared.retire_poisoned(&self.old);
    }

    fn open_gate(&mut self) -> usize {
        if let Some(published) = self.published.get() {
            return published.queued;
        }
        let queued = self.shared.gate.counts().queued;
        self.shared.gate.open();
        queued
    }

    fn is_cancelled(&self) -> bool {
        self.is_homeless || self.scope.is_cancelled() || self.shared.is_destroyed()
    }

    fn done(&mut self, step: Step, took: Duration) {
        trace::step(step.as_str(), took);
        self.shared.tell(Event::Step(ReloadStep {
            step,
            took,
            generation: self.previous.next(),
            reason: self.options.reason.clone(),
            strategy: self.options.strategy,
        }));
    }
}
