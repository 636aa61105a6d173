//! Snapshot, reset and fork: what is done to instances while nobody is inside them, carried out by the
//! protocol of [`wasm_molt_lifecycle::pause`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use wasm_molt_lifecycle::{
    Generation, Home, InFlight, OnDrainTimeout, PauseFailure, PausePlan, Paused, SystemClock,
    pause::run as run_pause,
};

use crate::error::{Done, Error, Result};
use crate::instance::capture::unsupported;
use crate::instance::memory::MemoryUsage;
use crate::instance::module::Module;
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::snapshot::Snapshot;
use crate::manager::control::Op;
use crate::manager::lending::{HookScope, impatient};
use crate::manager::{Job, Manager, ManagerState, Shared};

/// What a reset is asked to do.
#[derive(Debug, Clone)]
pub struct ResetOptions {
    /// What to go back to; `None`: the newest snapshot.
    pub to: Option<Arc<Snapshot>>,
    /// Longest wait for what is in flight; `None`: for ever.
    pub drain_timeout: Option<Duration>,
    /// What happens then.
    pub on_drain_timeout: OnDrainTimeout,
}

impl Default for ResetOptions {
    fn default() -> Self {
        Self {
            to: None,
            drain_timeout: Some(crate::ReloadOptions::DEFAULT_DRAIN_TIMEOUT),
            on_drain_timeout: OnDrainTimeout::Abort,
        }
    }
}

/// What a reset did.
#[derive(Debug, Clone, Copy)]
pub struct ResetReport {
    /// What serves, as before.
    pub generation: Generation,
    /// Linear memory over all replicas, bytes.
    pub memory_bytes_before: usize,
    /// The same afterwards.
    pub memory_bytes_after: usize,
    /// Pages that had been written since, bytes.
    pub dirty_bytes: usize,
    /// The reset itself, once nobody was inside.
    pub took: Duration,
}

/// Lets whoever asked for a snapshot take that back, on any thread.
#[derive(Debug, Clone, Default)]
pub struct SnapshotControl(Arc<AtomicBool>);

impl SnapshotControl {
    /// Nobody wants it any more. What has been taken stays.
    pub fn cancel(&self, manager: &Manager) {
        self.0.store(true, Ordering::Release);
        manager.shared.gate.ask_again();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What is waited for, and how.
pub(crate) struct Terms<'a> {
    pub(crate) what: &'static str,
    pub(crate) plan: PausePlan,
    pub(crate) scope: HookScope,
    pub(crate) control: Option<&'a SnapshotControl>,
    /// Bytes of memory that a capture may have to look at: it takes long.
    pub(crate) most: usize,
}

impl Terms<'_> {
    /// As patient as a reload is by default.
    pub(crate) fn of(what: &'static str, scope: HookScope) -> Self {
        let ResetOptions {
            drain_timeout,
            on_drain_timeout,
            ..
        } = ResetOptions::default();
        Self {
            what,
            plan: PausePlan {
                drain_timeout,
                on_drain_timeout,
            },
            scope,
            control: None,
            most: usize::MAX,
        }
    }
}

/// Runs `act` while nobody is inside any instance that serves.
pub(crate) fn run<T>(
    shared: &Arc<Shared>,
    terms: &Terms<'_>,
    act: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let (replicas, before) = {
        let serving = shared.lock_serving();
        (serving.replicas.clone(), shared.state())
    };
    let mut result = None;
    let mut pause = Pause {
        shared,
        terms,
        replicas,
        before,
        act: Some(|| act().map(|done| result = Some(done))),
        is_homeless: false,
    };
    let outcome = run_pause(&mut pause, &SystemClock::default(), &terms.plan);
    let outcome = outcome.map_err(|failure| failed(shared, terms, failure));
    drop(pause);
    outcome.and_then(|_| result.ok_or_else(|| Error::internal("a pause without an act")))
}

fn failed(shared: &Shared, terms: &Terms<'_>, failure: PauseFailure<Error>) -> Error {
    match failure {
        PauseFailure::DrainTimeout(left) if terms.scope.is_sync => shared.in_flight(left.0),
        PauseFailure::DrainTimeout(left) => Error::DrainTimeout {
            what: format!("{} of {}", terms.what, shared.name()),
            in_flight: left.0,
            waited_ms: terms.plan.drain_timeout.unwrap_or_default().as_millis(),
        },
        PauseFailure::Act(error) => error,
        PauseFailure::Cancelled => shared.closed(),
    }
}

struct Pause<'a, F> {
    shared: &'a Arc<Shared>,
    terms: &'a Terms<'a>,
    replicas: Vec<Arc<Replica>>,
    /// The manager's state, to be put back.
    before: ManagerState,
    act: Option<F>,
    /// The home is gone: there is nobody to do it for.
    is_homeless: bool,
}

impl<F: FnOnce() -> Result<()>> Paused for Pause<'_, F> {
    type Cause = Error;

    fn close_gate(&mut self) -> usize {
        let in_flight = self.shared.close_gate(|| {});
        self.is_homeless = in_flight.is_none();
        in_flight.unwrap_or(0)
    }

    fn drain(&mut self, timeout: Option<Duration>) -> Result<(), InFlight> {
        let give_up = || self.is_cancelled();
        self.shared.drain(&self.terms.scope, timeout, give_up)?;
        Shared::resume(&self.replicas);
        Ok(())
    }

    fn interrupt(&mut self) {
        self.shared.interrupt(&self.replicas, &impatient());
    }

    fn act(&mut self) -> Result<(), Error> {
        self.act.take().map_or(Ok(()), |act| act())
    }

    fn open_gate(&mut self) -> usize {
        Shared::resume(&self.replicas);
        self.shared.set_state(self.before);
        let queued = self.shared.gate.counts().queued;
        self.shared.gate.open();
        queued
    }

    fn is_cancelled(&self) -> bool {
        self.is_homeless
            || self.terms.scope.is_cancelled()
            || self.shared.is_destroyed()
            || self
                .terms
                .control
                .is_some_and(SnapshotControl::is_cancelled)
    }
}

impl Manager {
    /// Captures slot 0 as soon as nobody is inside any instance. New instances, and resets, begin with it.
    /// The control takes it back while it waits.
    pub fn snapshot(&self, done: Done<Arc<Snapshot>>) -> SnapshotControl {
        let control = SnapshotControl::default();
        self.shared.push(Op::Snapshot {
            control: control.clone(),
            done,
        });
        control
    }

    /// The same on this thread, which must be the home thread if there is one.
    ///
    /// # Errors
    /// [`ErrorCode::Busy`] if anything is in flight, [`ErrorCode::Reloading`] during another change,
    /// [`ErrorCode::SnapshotUnsupported`] with the reason.
    pub fn snapshot_now(&self, home: Option<&Home<Job>>) -> Result<Arc<Snapshot>> {
        let shared = &self.shared;
        let taken = shared.now(home, |scope| {
            shared.take_snapshot(&Terms::of("the snapshot", scope))
        });
        shared.lock_snapshots().accept();
        taken
    }

    /// Puts every replica back to a snapshot, as soon as nobody is inside.
    pub fn reset(&self, options: ResetOptions, done: Done<ResetReport>) {
        if let Err(error) = self.shared.check_reset(&options) {
            done(Err(error));
            return;
        }
        self.shared.push(Op::Reset { options, done });
    }

    /// The same on this thread, which must be the home thread if there is one.
    ///
    /// # Errors
    /// As [`Self::snapshot_now`], and [`ErrorCode::InvalidArgument`] or [`ErrorCode::StaleHandle`] for a
    /// snapshot that cannot be used.
    pub fn reset_now(
        &self,
        home: Option<&Home<Job>>,
        options: &ResetOptions,
    ) -> Result<ResetReport> {
        let shared = &self.shared;
        shared.check_reset(options)?;
        shared.now(home, |scope| shared.reset(options, scope))
    }

    /// Whoever asked for a snapshot has got it. Until then the one before it is kept as well, for the case
    /// that this one is not wanted any more.
    pub fn accept_snapshot(&self) {
        self.shared.lock_snapshots().accept();
    }

    /// Lets go of a snapshot: its pages are given back as soon as no instance stands on them.
    pub fn release_snapshot(&self, snapshot: &Snapshot) {
        self.shared.lock_snapshots().release(snapshot);
        for replica in self.shared.lock_serving().all() {
            replica.forget(snapshot);
        }
    }

    /// What linear memory really takes, over all replicas. Walks page tables: up to some milliseconds for
    /// each GiB.
    pub fn memory_usage(&self) -> MemoryUsage {
        let replicas = self.shared.lock_serving().all();
        let mut sum = MemoryUsage::default();
        for replica in replicas {
            sum += replica.memory_usage();
        }
        sum
    }
}

impl Blueprint {
    /// Why the module cannot be captured, if so.
    pub(crate) fn check_captures(&self) -> Result<()> {
        let module = &self.module;
        match &module.state.unsupported {
            Some(why) => Err(unsupported(module.name(), why)),
            None => Ok(()),
        }
    }
}

impl Shared {
    fn check_reset(&self, options: &ResetOptions) -> Result<()> {
        if self.is_over() {
            return Err(self.closed());
        }
        let blueprint = self.blueprint()?;
        let snapshots = self.lock_snapshots();
        let chosen = snapshots.choose(options.to.as_ref(), (&blueprint.module, self.id()));
        chosen.map(drop)
    }

    /// Captures slot 0. From here on new instances, and resets, begin with it.
    pub(crate) fn take_snapshot(self: &Arc<Self>, terms: &Terms<'_>) -> Result<Arc<Snapshot>> {
        let snapshot = self.capture(terms)?;
        self.lock_snapshots().push(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    /// Captures slot 0, for whoever asks.
    pub(crate) fn capture(self: &Arc<Self>, terms: &Terms<'_>) -> Result<Arc<Snapshot>> {
        let blueprint = self.blueprint()?;
        blueprint.check_captures()?;
        loop {
            // A trapped instance is worth nothing; what takes its place is captured.
            self.repair_home(&terms.scope)?;
            let capture = || {
                let replica = self.replica(0).ok_or_else(|| self.closed())?;
                if replica.awaits_rescue() {
                    return Err(replica.broken());
                }
                if replica.is_poisoned() {
                    // Whoever was drained has left it so.
                    return Ok(None);
                }
                self.capture_somewhere(&replica, &blueprint, terms)
                    .map(Some)
            };
            if let Some(snapshot) = run(self, terms, capture)? {
                return Ok(snapshot);
            }
        }
    }

    /// Nobody is inside the instance, and nobody may enter it meanwhile.
    pub(crate) fn capture_of(
        &self,
        replica: &Arc<Replica>,
        blueprint: &Blueprint,
    ) -> Result<Arc<Snapshot>> {
        self.capture_within(replica, blueprint, (usize::MAX, true))
    }

    /// Where the host has views, on its own thread, because what it wrote through them meanwhile would be
    /// lost; else wherever this is.
    fn capture_somewhere(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        blueprint: &Arc<Blueprint>,
        terms: &Terms<'_>,
    ) -> Result<Arc<Snapshot>> {
        let is_at_home = terms.scope.is_sync;
        if !self.options.is_realm || is_at_home {
            let captured = self.capture_within(replica, blueprint, (terms.most, is_at_home));
            match captured {
                Err(error) if error.is_busy() && !is_at_home => {}
                other => return other,
            }
        }
        self.capture_at_home(replica, blueprint)
    }

    /// The same, on the home thread.
    pub(crate) fn capture_at_home(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        blueprint: &Arc<Blueprint>,
    ) -> Result<Arc<Snapshot>> {
        let (shared, replica) = (Arc::clone(self), Arc::clone(replica));
        let blueprint = Arc::clone(blueprint);
        self.at_home(move || shared.capture_within(&replica, &blueprint, (usize::MAX, true)))
    }

    /// Whoever resets a realm wants to go on doing so in the next one, and its snapshots end with it.
    pub(crate) fn capture_next_realm(
        self: &Arc<Self>,
        next: &Arc<Replica>,
        blueprint: &Arc<Blueprint>,
    ) -> Option<Arc<Snapshot>> {
        if !self.options.is_realm || self.lock_snapshots().newest().is_none() {
            return None;
        }
        // Where it cannot be captured any more, a reset says so.
        self.capture_at_home(next, blueprint).ok()
    }

    /// Runs `f` on the home thread and waits for what comes of it.
    fn at_home<T: Send + Sync + 'static>(
        &self,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = bounded(1);
        self.host.at_home(Box::new(move |_| {
            let _ = tell.send(f());
        }))?;
        told.recv().unwrap_or_else(|_| Err(self.closed()))
    }

    fn capture_within(
        &self,
        replica: &Arc<Replica>,
        blueprint: &Blueprint,
        bounds: (usize, bool),
    ) -> Result<Arc<Snapshot>> {
        let id = Snapshot::next_id();
        if self.options.is_realm {
            self.host.realm_capturing(replica)?;
        }
        // SAFETY: the gate is closed and drained, or the instance is not published yet: nobody is inside,
        // and nobody else may enter.
        let captured = unsafe { replica.capture(id, bounds) }?;
        let module = Arc::clone(&blueprint.module);
        self.note_capture();
        if self.options.is_realm {
            self.host.realm_captured(replica, id);
        }
        let owner = (id, self.id());
        Ok(Snapshot::new(owner, replica.generation(), module, captured))
    }

    /// Puts every replica back.
    pub(crate) fn reset(
        self: &Arc<Self>,
        options: &ResetOptions,
        scope: HookScope,
    ) -> Result<ResetReport> {
        let plan = PausePlan {
            drain_timeout: options.drain_timeout,
            on_drain_timeout: options.on_drain_timeout,
        };
        let terms = Terms {
            plan,
            ..Terms::of("the reset", scope)
        };
        let is_at_home = terms.scope.is_sync;
        run(self, &terms, || {
            if !self.options.is_realm || is_at_home {
                return self.reset_all(options, &terms.scope, is_at_home);
            }
            // What JavaScript sees of a realm changes between two of its steps, not during one.
            let (shared, options) = (Arc::clone(self), options.clone());
            let scope = terms.scope.clone();
            self.at_home(move || shared.reset_all(&options, &scope, true))
        })
    }

    fn reset_all(
        self: &Arc<Self>,
        options: &ResetOptions,
        scope: &HookScope,
        is_at_home: bool,
    ) -> Result<ResetReport> {
        let blueprint = self.blueprint()?;
        let origin = self
            .lock_snapshots()
            .choose(options.to.as_ref(), (&blueprint.module, self.id()))?;
        let (replicas, generation) = {
            let serving = self.lock_serving();
            (serving.replicas.clone(), serving.generation)
        };
        let memory_bytes = || replicas.iter().map(|r| r.memory_bytes()).sum::<usize>();
        let memory_bytes_before = memory_bytes();
        self.note_peak(self.memory_bytes());
        if self.options.is_realm {
            for replica in &replicas {
                let shrinks = replica.realm_shrinks(replica.realm_images(&origin.captured));
                self.host.realm_shrinks(replica, &shrinks);
            }
        } else if is_at_home {
            // With nobody looking at them, pages can be given back where they are.
            self.host.rewound(&replicas);
        }
        let started = Instant::now();
        let mut dirty_bytes = 0;
        let mut outcome = Ok(());
        for replica in &replicas {
            if !replica.can_be_reset() {
                continue;
            }
            // SAFETY: the gate is closed and drained: nobody is inside, and nobody else may enter.
            match unsafe { replica.reset(&origin, true) } {
                Ok(bytes) => {
                    dirty_bytes += bytes;
                    if replica.is_realm() {
                        self.host.realm_rewound(replica, origin.snapshot.id());
                    }
                }
                Err(error) => outcome = Err(error),
            }
        }
        for replica in replicas.iter().filter(|replica| !replica.is_poisoned()) {
            outcome = outcome.and_then(|()| self.reseed(replica, scope));
        }
        let took = started.elapsed();
        self.mend_slots(&replicas);
        if !is_at_home {
            let (shared, replicas) = (Arc::clone(self), replicas.clone());
            // Without a home nobody has handles.
            let _ = self
                .host
                .at_home(Box::new(move |_| shared.host.rewound(&replicas)));
        }
        outcome?;
        self.begin_wear(&replicas);
        self.stats.was_reset();
        Ok(ResetReport {
            generation,
            memory_bytes_before,
            memory_bytes_after: memory_bytes(),
            dirty_bytes,
            took,
        })
    }

    /// Slots whose instances are worth something again serve, those whose are not any more do not.
    fn mend_slots(self: &Arc<Self>, replicas: &[Arc<Replica>]) {
        self.retire_poisoned(replicas);
        let retired = self.gate.retired_slots();
        let serves_again = |r: &&Arc<Replica>| !r.is_poisoned() && retired.contains(&r.slot());
        for replica in replicas.iter().filter(serves_again) {
            self.gate.spare(replica.slot());
        }
    }

    /// A generation of this build serves: snapshots of another one cannot be used any more.
    pub(crate) fn adopt(&self, module: &Arc<Module>, captured: Option<Arc<Snapshot>>) {
        let mut snapshots = self.lock_snapshots();
        if self.options.is_realm {
            // What JavaScript has made is in the realm that has gone.
            snapshots.release_all();
        }
        let is_other = |newest: &Arc<Snapshot>| !Arc::ptr_eq(newest.module(), module);
        if snapshots.newest().is_some_and(is_other) {
            snapshots.clear();
        }
        if let Some(captured) = captured {
            snapshots.set_own(captured);
        }
    }

    /// What copies share, and should not: random numbers of the guest. Runs wherever an instance begins
    /// with a snapshot's state.
    pub(crate) fn reseed(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        scope: &HookScope,
    ) -> Result<()> {
        match &self.options.reseed {
            // SAFETY: nobody else can reach the instance: it is not published yet, or the gate is closed
            // and drained.
            Some(export) => unsafe { replica.reseed(export) },
            None if self.host.reseeds() => {
                self.with_lease(replica, scope, |lease| self.host.reseed(lease))
            }
            None => Ok(()),
        }
    }
}
