//! The swap, carried out: the protocol of [`wasm_molt_lifecycle::swap`] over real instances.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use wasm_molt_lifecycle::{
    Backend, FailedPhase, Failure, Generation, Home, InFlight, OnDrainTimeout, Plan, SystemClock,
    Timings, swap::run as run_protocol,
};

use crate::error::{Error, Result};
use crate::interrupt::Stop;
use crate::manager::{ManagerState, Replaced, Shared};
use crate::replica::{Blueprint, Replica};
use crate::value::HostRef;

/// What a reload is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadOptions {
    /// In the report and the statistics.
    pub reason: String,
    /// Longest wait for what is in flight; `None`: for ever.
    pub drain_timeout: Option<Duration>,
    /// What happens then.
    pub on_drain_timeout: OnDrainTimeout,
    /// Leave state behind.
    pub skip_save: bool,
}

impl ReloadOptions {
    /// 30 seconds.
    pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
}

impl Default for ReloadOptions {
    fn default() -> Self {
        Self {
            reason: "manual".into(),
            drain_timeout: Some(Self::DEFAULT_DRAIN_TIMEOUT),
            on_drain_timeout: OnDrainTimeout::Abort,
            skip_save: false,
        }
    }
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
    /// In flight when the gate closed.
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
}

impl ReloadReport {
    /// One poisoned instance was replaced while the others served.
    pub(crate) fn of_repair(
        generation: Generation,
        previous_generation: Generation,
        took: Duration,
    ) -> Self {
        Self {
            generation,
            previous_generation,
            reason: "trap".into(),
            drained: 0,
            queued: 0,
            pause: took,
            drain: Duration::ZERO,
            save: Duration::ZERO,
            instantiate: took,
            restore: Duration::ZERO,
            memory_bytes_before: 0,
            memory_bytes_after: 0,
        }
    }
}

/// Runs one exclusive swap to its end, on this thread.
///
/// * `is_sync`: this is the home thread and hooks must be synchronous.
pub(crate) fn run(
    shared: &Arc<Shared>,
    options: &ReloadOptions,
    is_sync: bool,
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
    let mut swap = Swap {
        shared,
        blueprint,
        is_sync,
        skip_save: options.skip_save,
        reason: options.reason.clone(),
        previous,
        states: Vec::new(),
        next: Vec::new(),
        old,
        memory_bytes_before: 0,
        is_homeless: false,
        is_published: Arc::default(),
    };
    let plan = Plan {
        drain_timeout: options.drain_timeout,
        on_drain_timeout: options.on_drain_timeout,
        skip_save: options.skip_save,
    };
    let outcome = run_protocol(&mut swap, &SystemClock::default(), &plan);
    match outcome {
        // The environment went between the last step and this one: the old instances are still the
        // ones that are known, so they are not released.
        Ok(_) if !swap.is_published.load(Ordering::Acquire) => {
            let next = std::mem::take(&mut swap.next);
            let _ = shared.discard(next, swap.previous.next());
            Err(shared.closed())
        }
        Ok(timings) => {
            restore.to = None;
            Ok(Arc::new(swap.finish(options, &timings)))
        }
        Err(failure) => Err(failed(shared, options, failure, is_sync)),
    }
}

fn failed(
    shared: &Shared,
    options: &ReloadOptions,
    failure: Failure<Error>,
    is_sync: bool,
) -> Error {
    match failure {
        Failure::DrainTimeout(in_flight) if is_sync => shared.in_flight(in_flight.0),
        Failure::DrainTimeout(in_flight) => Error::DrainTimeout {
            what: format!("the reload of {}", shared.name()),
            in_flight: in_flight.0,
            waited_ms: options.drain_timeout.unwrap_or_default().as_millis(),
        },
        Failure::Cancelled => shared.closed(),
        Failure::Step { .. } if shared.is_destroyed() => shared.closed(),
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
    blueprint: Arc<Blueprint>,
    is_sync: bool,
    skip_save: bool,
    reason: String,
    previous: Generation,
    states: Vec<Option<HostRef>>,
    next: Vec<Arc<Replica>>,
    old: Vec<Arc<Replica>>,
    memory_bytes_before: usize,
    /// The home is gone: there is nobody to publish to.
    is_homeless: bool,
    /// The commit has run at home.
    is_published: Arc<AtomicBool>,
}

impl Swap<'_> {
    /// After the commit: the old instances go, and with them their memory.
    fn finish(self, options: &ReloadOptions, timings: &Timings) -> ReloadReport {
        for replica in &self.old {
            // SAFETY: the gate was drained, so nobody was inside; at the commit every handle on it
            // expired and its slot went to a new instance.
            unsafe { replica.release() };
        }
        ReloadReport {
            generation: self.previous.next(),
            previous_generation: self.previous,
            reason: options.reason.clone(),
            drained: timings.drained,
            queued: timings.queued,
            pause: timings.pause,
            drain: timings.drain,
            save: timings.save,
            instantiate: timings.instantiate,
            restore: timings.restore,
            memory_bytes_before: self.memory_bytes_before,
            memory_bytes_after: self.next.iter().map(|r| r.memory_bytes()).sum(),
        }
    }
}

impl Backend for Swap<'_> {
    type Cause = Error;

    fn instantiate(&mut self) -> Result<(), (FailedPhase, Error)> {
        for slot in 0..self.old.len() {
            let replica = self.shared.make_replica(
                &self.blueprint,
                slot,
                self.previous.next(),
                self.is_sync,
            )?;
            self.next.push(replica);
        }
        Ok(())
    }

    fn close_gate(&mut self) -> usize {
        let in_flight = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&in_flight);
        let shared = Arc::clone(self.shared);
        // If the home is gone there is nobody to call, and the next step finds the swap cancelled.
        let told = self.shared.host.at_home(Box::new(move |home| {
            let n = home.map_or_else(|| shared.gate.close(), Home::close);
            shared.set_state(ManagerState::Draining);
            count.store(n, Ordering::Release);
        }));
        self.is_homeless = told.is_err();
        in_flight.load(Ordering::Acquire)
    }

    fn drain(&mut self, timeout: Option<Duration>) -> Result<(), InFlight> {
        // Nobody may be waited for on the home thread: what is in flight may need that very thread.
        let timeout = if self.is_sync {
            Some(Duration::ZERO)
        } else {
            timeout
        };
        self.shared.gate.wait_drained(timeout)?;
        self.shared.wait_settled();
        self.shared.set_state(ManagerState::Reloading);
        self.memory_bytes_before = self.old.iter().map(|r| r.memory_bytes()).sum();
        self.shared.note_peak(self.memory_bytes_before);
        Ok(())
    }

    fn interrupt_in_flight(&mut self) {
        for replica in &self.old {
            let why = "a reload did not want to wait any longer (onDrainTimeout: 'interrupt')";
            replica
                .interrupter()
                .stop_current(Stop::Interrupted(why.into()));
        }
    }

    fn save(&mut self) -> Result<(), Error> {
        if self.skip_save {
            return Ok(());
        }
        for (slot, replica) in self.old.iter().enumerate() {
            // A poisoned guest's memory means nothing any more: it is not asked.
            let state = if replica.is_poisoned() {
                None
            } else {
                self.shared.with_lease(replica, self.is_sync, |lease| {
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
            self.shared.with_lease(replica, self.is_sync, |lease| {
                self.shared.host.restore_state(lease, state, slot)
            })?;
            // A hook that goes on after a trap leaves an instance that must not serve.
            if let Some(trap) = replica.last_trap() {
                return Err(trap);
            }
        }
        Ok(())
    }

    fn commit(&mut self) {
        let shared = Arc::clone(self.shared);
        let generation = self.previous.next();
        let change = Replaced {
            old: self.old.clone(),
            new: self.next.clone(),
            generation,
        };
        let reason = self.reason.clone();
        let is_published = Arc::clone(&self.is_published);
        let publish = move || {
            is_published.store(true, Ordering::Release);
            {
                let mut serving = shared.lock_serving();
                serving.generation = generation;
                serving.replicas.clone_from(&change.new);
            }
            shared.stats.reloaded(&reason);
            shared.set_state(ManagerState::Ready);
            shared.host.replaced(&change);
            shared.gate.reinstate_all();
        };
        // If the home is gone nothing is published, and `run` sees that.
        let _ = self.shared.host.at_home(Box::new(move |_| publish()));
    }

    fn roll_back(&mut self) {
        let next = std::mem::take(&mut self.next);
        let _ = self.shared.discard(next, self.previous.next());
        // A hook may have trapped the old guest while it saved: it must not serve like that.
        let retired = self.shared.gate.retired_slots();
        let trapped = |r: &&Arc<Replica>| r.is_poisoned() && !retired.contains(&r.slot());
        for replica in self.old.iter().filter(trapped) {
            self.shared.gate.retire(replica.slot());
            self.shared.request_repair(replica.slot());
        }
    }

    fn open_gate(&mut self) -> usize {
        let queued = self.shared.gate.counts().queued;
        self.shared.gate.open();
        queued
    }

    fn is_cancelled(&self) -> bool {
        self.is_homeless || self.shared.is_destroyed()
    }
}
