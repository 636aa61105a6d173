//! The first generation, and how instances are made.

use std::sync::Arc;

use crossbeam_channel::bounded;
use wasm_molt_lifecycle::{FailedPhase, Generation};

use super::control::guarded;
use super::host::Replaced;
use super::lending::HookScope;
use super::{ManagerState, Shared};
use crate::error::{Error, Result};
use crate::instance::module::{Module, Source};
use crate::instance::pool::{Pool, parallelism};
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::snapshot::{Origin, Snapshot};
use crate::manager::freed::Freed;
use crate::manager::options::OnTrap;

/// The instances of a generation, and the snapshot that was taken of the first, if one was.
pub(crate) type Made = (Vec<Arc<Replica>>, Option<Arc<Snapshot>>);

/// What an instance is made from, and for.
pub(crate) struct Making<'a> {
    pub(crate) blueprint: &'a Blueprint,
    pub(crate) generation: Generation,
    /// What it begins with, instead of its start function and `initialize`.
    pub(crate) from: Option<Origin>,
    pub(crate) scope: HookScope,
}

impl Shared {
    pub(super) fn start(self: &Arc<Self>, source: &Source, is_sync: bool) -> Result<()> {
        let outcome = guarded(|| self.bring_up_first(source, is_sync));
        if outcome.is_err() {
            self.start_failed_early();
        }
        outcome
    }

    /// Begins as a copy: with the code of another manager, and the state that a snapshot has.
    pub(crate) fn start_from(
        self: &Arc<Self>,
        parent: &Blueprint,
        snapshot: &Arc<Snapshot>,
        is_sync: bool,
    ) -> Result<()> {
        let options = &self.options;
        let name = options.name.as_deref();
        let _ = self
            .name
            .set(name.unwrap_or(parent.module.name()).to_owned());
        let blueprint = self.blueprint_of(Arc::clone(&parent.module));
        self.lock_snapshots().set_own(Arc::clone(snapshot));
        let outcome = guarded(|| self.bring_up(blueprint, is_sync));
        if outcome.is_err() {
            self.start_failed_early();
        }
        outcome
    }

    /// It will never serve.
    pub(crate) fn start_failed_early(&self) {
        self.set_state(ManagerState::Failed);
        let _settling = self.settling();
        for job in self.gate.cut() {
            job.refuse(self.closed());
        }
    }

    pub(crate) fn blueprint_of(&self, module: Arc<Module>) -> Arc<Blueprint> {
        let options = &self.options;
        Arc::new(Blueprint {
            engine: module.engine.clone(),
            module,
            limits: options.limits.clone(),
            images: options.images,
            prepares_snapshots: self.prepares_snapshots(),
            is_realm: options.is_realm,
            policy: self.policy(),
            outlives_traps: options
                .recycle
                .as_ref()
                .is_some_and(|recycle| recycle.on_trap == OnTrap::Keep),
        })
    }

    pub(super) fn load(&self, pool: &Pool, source: &Source, name: Option<&str>) -> Result<Module> {
        pool.start()?;
        let engine = self.engine()?;
        Module::load(&engine, pool, source, name)
    }

    /// Loads another build of the module. The pool's threads may all be inside guests, so it is compiled
    /// on threads of its own.
    pub(crate) fn load_next(&self, source: &Source) -> Result<Module> {
        let pool = Pool::new(
            self.name(),
            parallelism(),
            self.options.limits.stack_bytes(),
        );
        let module = self.load(&pool, source, Some(self.name()));
        pool.end();
        module
    }

    pub(super) fn bring_up_first(self: &Arc<Self>, source: &Source, is_sync: bool) -> Result<()> {
        let options = &self.options;
        let pool = Arc::clone(&self.lock_serving().pool);
        let module = Arc::new(self.load(&pool, source, options.name.as_deref())?);
        let _ = self.name.set(module.name().to_owned());
        let blueprint = self.blueprint_of(module);
        if self.isolates_calls() {
            blueprint.check_captures()?;
        }
        self.bring_up(blueprint, is_sync)
    }

    pub(super) fn bring_up(
        self: &Arc<Self>,
        blueprint: Arc<Blueprint>,
        is_sync: bool,
    ) -> Result<()> {
        let generation = Generation::FIRST;
        let making = Making {
            blueprint: &blueprint,
            generation,
            from: self.origin(&blueprint.module),
            scope: self.hook_scope(is_sync),
        };
        let made = self.make_replicas(making, self.options.instances);
        let (replicas, captured) = match made {
            Ok(made) => made,
            Err((phase, cause)) => return Err(self.start_failed(phase, cause)),
        };
        if let Some(captured) = captured {
            self.lock_snapshots().set_own(captured);
        }
        if self.is_over() {
            let _ = self.discard(replicas, generation);
            return Err(self.closed());
        }
        let shared = Arc::clone(self);
        let made = replicas.clone();
        let (tell, told) = bounded(1);
        let at_home = self.host.at_home(Box::new(move |_| {
            let change = Replaced {
                old: Vec::new(),
                new: replicas.clone(),
                generation,
            };
            {
                let mut serving = shared.lock_serving();
                // The end takes what serves under this lock: what comes after it must not be published.
                if shared.is_over() {
                    return;
                }
                serving.blueprint = Some(blueprint);
                serving.replicas = replicas;
            }
            shared.begin_wear(&change.new);
            shared.host.replaced(&change);
            shared.set_state(ManagerState::Ready);
            shared.gate.open();
            let _ = tell.send(());
        }));
        if at_home.is_ok() && told.recv().is_ok() {
            return Ok(());
        }
        let _ = self.discard(made, generation);
        Err(self.closed())
    }

    /// Failures that have a code of their own keep it; what host code threw becomes the cause.
    pub(super) fn start_failed(&self, phase: FailedPhase, cause: Error) -> Error {
        match cause {
            Error::Thrown(_) => self.reload_failed("the start", phase, cause),
            other => other,
        }
    }

    pub(crate) fn reload_failed(&self, what: &str, phase: FailedPhase, cause: Error) -> Error {
        Error::ReloadFailed {
            what: format!("{what} of {}", self.name()),
            phase,
            cause: Box::new(cause),
        }
    }

    /// Makes the instances of a generation; none is left if one fails. With isolation per call there has
    /// to be a snapshot: where there is none, the first instance gives it, and the others begin with it.
    pub(crate) fn make_replicas(
        self: &Arc<Self>,
        mut making: Making<'_>,
        count: usize,
    ) -> Result<Made, (FailedPhase, Error)> {
        let mut replicas = Vec::with_capacity(count);
        let mut taken = None;
        for slot in 0..count {
            let made = self.make_replica(&making, slot);
            let captured = made.and_then(|replica| {
                replicas.push(Arc::clone(&replica));
                let wants = self.isolates_calls() && making.from.is_none();
                let capture = || self.capture_of(&replica, making.blueprint);
                wants
                    .then(capture)
                    .transpose()
                    .map_err(|error| (FailedPhase::Initialize, error))
            });
            match captured {
                Ok(None) => {}
                Ok(Some(snapshot)) => {
                    making.from = Origin::of(&snapshot);
                    taken = Some(snapshot);
                }
                Err(failed) => {
                    let _ = self.discard(replicas, making.generation);
                    return Err(failed);
                }
            }
        }
        Ok((replicas, taken))
    }

    /// Makes and initializes one instance.
    pub(crate) fn make_replica(
        self: &Arc<Self>,
        making: &Making<'_>,
        slot: usize,
    ) -> Result<Arc<Replica>, (FailedPhase, Error)> {
        let Making {
            blueprint,
            generation,
            from,
            scope,
        } = making;
        let generation = *generation;
        let mut known = None;
        // A panic must not lose track of a half-made instance.
        let made = guarded(|| {
            let from = from.as_ref();
            blueprint.instantiate(&*self.host, (slot, generation), from, |replica| {
                self.remember(replica);
                known = Some(Arc::clone(replica));
            })
        });
        let replica = match made {
            Ok(replica) => replica,
            Err(error) => {
                let _ = self.discard(known.into_iter().collect(), generation);
                return Err((FailedPhase::Instantiate, error));
            }
        };
        let initialized = match from {
            // What the hook does is in the snapshot already.
            Some(_) => self.reseed(&replica, scope),
            None => self.with_lease(&replica, scope, |lease| self.host.initialize(lease)),
        };
        let initialized = initialized.and_then(|()| {
            // A hook that goes on after a trap leaves an instance that must not serve.
            replica.last_trap().map_or(Ok(()), Err)
        });
        if let Err(error) = initialized {
            let _ = self.discard(vec![replica], generation);
            return Err((FailedPhase::Initialize, error));
        }
        Ok(replica)
    }

    /// The same for one that has served, and nobody is inside, with a look at what the system gets back. `None`
    /// without a home.
    pub(super) fn discard_one(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        generation: Generation,
    ) -> Option<Freed> {
        let shared = Arc::clone(self);
        let old = vec![Arc::clone(replica)];
        // First of all: whoever has a view of it must not see its pages go.
        let told = self.host.at_home(Box::new(move |_| {
            shared.host.replaced(&Replaced {
                old,
                new: Vec::new(),
                generation,
            });
        }));
        // SAFETY: nobody serves on it any more: its handles expired just now, and whoever was inside has left.
        let shed = Freed::shed(|| unsafe { replica.shed() }, replica);
        // SAFETY: as above.
        let freed = shed.and(|| unsafe { replica.release() });
        told.is_ok().then_some(freed)
    }

    /// Releases instances that never served, or do not any more.
    pub(crate) fn discard(
        self: &Arc<Self>,
        replicas: Vec<Arc<Replica>>,
        generation: Generation,
    ) -> Result<()> {
        if replicas.is_empty() {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let old = replicas.clone();
        let told = self.host.at_home(Box::new(move |_| {
            shared.host.replaced(&Replaced {
                old,
                new: Vec::new(),
                generation,
            });
        }));
        for replica in replicas {
            // SAFETY: nobody serves on it any more: its handles expired just now, and the callers
            // hold it (never published, or drained).
            unsafe { replica.release() };
        }
        told
    }
}
