//! The host's side of the engine: hooks, steps at home, events.
//!
//! On the JS thread everything runs directly and must be synchronous. On a control thread it is
//! posted to the JS thread and waited for; a hook may then return a promise.

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{RecvError, Sender, bounded, never, select};
use wasm_molt_engine::{
    Attendant, Error, ErrorCode, Event, HomeStep, Host, HostRef, ImportValue, InstanceHost, Lease,
    Module, Replaced, Replica, Result, Watch,
};

use crate::env::EnvState;
use crate::imports;
use crate::inbox::Inbox;
use crate::js::{JsResult, Kind, Pending, Val};
use crate::lease::LeaseSide;
use crate::realm::RealmSide;
use crate::report;
use crate::side::{Hooks, ManagerSide, ReplicaSide};

/// Any thread.
pub(crate) struct JsHost {
    inbox: Arc<Inbox>,
    manager: u64,
    /// The environment's address, to find its state on its own thread.
    env: usize,
    does_initialize: bool,
    saves_state: bool,
    reseeds: bool,
    watches_steps: Arc<AtomicBool>,
    watch: Option<Arc<Watch>>,
    /// Trap events that have not been delivered yet.
    traps_due: Arc<AtomicUsize>,
    /// The same for what policies do.
    recycles_due: Arc<AtomicUsize>,
    /// Decisions that nobody was told of, so that nobody is told of their outcome.
    untold: Mutex<HashSet<u64>>,
}

/// A synchronous loop of traps never comes by the inbox; beyond these its events are not kept.
const MOST_TRAPS_DUE: usize = 256;

/// The same for a synchronous loop that is recycled again and again.
const MOST_RECYCLES_DUE: usize = 3072;

/// What the JS thread does while it waits inside a guest.
struct Desk {
    inbox: Arc<Inbox>,
    env: usize,
}

impl Attendant for Desk {
    #[inline]
    fn is_wanted(&self) -> bool {
        self.inbox.is_urgent()
    }

    fn attend(&self) {
        if let Some(env) = EnvState::at(self.env) {
            env.attend();
        }
    }
}

/// Which hook of the user.
#[derive(Clone)]
enum Hook {
    Initialize,
    SaveState(usize),
    RestoreState(HostRef, usize),
    Reseed,
}

impl Hook {
    fn name(&self) -> &'static str {
        match self {
            Self::Initialize => "initialize",
            Self::SaveState(_) => "saveState",
            Self::RestoreState(..) => "restoreState",
            Self::Reseed => "reseed",
        }
    }
}

/// What a hook returned; `None` where there is none.
type HookResult = Result<Option<HostRef>>;

impl JsHost {
    pub(crate) fn new(
        env: &EnvState,
        manager: u64,
        hooks: &Hooks,
        watches_steps: &Arc<AtomicBool>,
    ) -> Self {
        Self {
            inbox: Arc::clone(&env.inbox),
            manager,
            env: env.js().raw() as usize,
            does_initialize: hooks.initialize.get().is_some(),
            saves_state: hooks.save_state.get().is_some(),
            reseeds: hooks.reseed.get().is_some(),
            watches_steps: Arc::clone(watches_steps),
            watch: env.watch.clone(),
            traps_due: Arc::default(),
            recycles_due: Arc::default(),
            untold: Mutex::default(),
        }
    }

    fn untold(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn here(&self) -> Result<(Rc<EnvState>, Rc<ManagerSide>)> {
        let env = EnvState::at(self.env).ok_or_else(no_environment)?;
        let side = env.managers.borrow().get(&self.manager).map(Rc::clone);
        let side = side.ok_or_else(no_environment)?;
        Ok((env, side))
    }

    /// Runs `f` on the JS thread and waits for it.
    fn on_js<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>) -> R + Send + 'static,
    ) -> Result<R> {
        if self.inbox.is_js_thread() {
            let (env, side) = self.here()?;
            return Ok(f(&env, &side));
        }
        let (tell, told) = bounded(1);
        let (manager, address) = (self.manager, self.env);
        let posted = self.inbox.post(Box::new(move |_| {
            let Some(env) = EnvState::at(address) else {
                return;
            };
            let side = env.managers.borrow().get(&manager).map(Rc::clone);
            if let Some(side) = side {
                let _ = tell.send(f(&env, &side));
            }
        }));
        posted.map_err(|_| no_environment())?;
        told.recv().map_err(|_| no_environment())
    }

    /// On the JS thread.
    fn in_realm(
        &self,
        replica: &Arc<Replica>,
        f: impl FnOnce(&Rc<EnvState>, &ReplicaSide, &RealmSide),
    ) {
        let Ok((env, _)) = self.here() else { return };
        let side = env.replicas.borrow().get(&replica.id()).map(Rc::clone);
        if let Some(side) = &side
            && let Some(realm) = &side.realm
        {
            env.js().scoped(|| f(&env, side, realm));
        }
    }

    fn hook(&self, lease: &Arc<Lease>, hook: Hook) -> HookResult {
        if self.inbox.is_js_thread() {
            let (env, side) = self.here()?;
            return env.js().scoped(|| run_sync(&env, &side, lease, &hook));
        }
        let (tell, told) = bounded(1);
        let leased = Arc::clone(lease);
        self.on_js(move |env, side| run_async(env, side, leased, &hook, tell))?;
        let forever = never();
        let cancelled = lease.cancelled().unwrap_or(&forever);
        let outcome = select! {
            recv(told) -> outcome => outcome,
            recv(cancelled) -> _ => Err(RecvError),
        };
        // A hook that has ended has ended its handle too. One that was given up has not, and nobody else
        // may touch the instance before that.
        outcome.unwrap_or_else(|RecvError| {
            let leased = Arc::clone(lease);
            let _ = self.on_js(move |_, side| {
                side.expire_leases(|s| s.replica.id() == leased.replica().id());
            });
            Err(no_environment())
        })
    }
}

fn no_environment() -> Error {
    Error::new(
        ErrorCode::Closed,
        "the manager or its JavaScript environment is gone",
    )
}

impl InstanceHost for JsHost {
    fn imports(&self, replica: &Arc<Replica>, _module: &Module) -> Result<Vec<ImportValue>> {
        let replica = Arc::clone(replica);
        self.on_js(move |env, manager| env.js().scoped(|| bind(env, manager, replica)))?
    }

    fn watch(&self) -> Option<Arc<Watch>> {
        self.watch.clone()
    }

    fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        Some(Arc::new(Desk {
            inbox: Arc::clone(&self.inbox),
            env: self.env,
        }))
    }
}

impl Host for JsHost {
    fn initialize(&self, lease: &Arc<Lease>) -> Result<()> {
        // Each hook costs a turn of the event loop; one that is not there costs nothing.
        if !self.does_initialize {
            return Ok(());
        }
        self.hook(lease, Hook::Initialize).map(drop)
    }

    fn saves_state(&self) -> bool {
        self.saves_state
    }

    fn save_state(&self, lease: &Arc<Lease>, replica: usize) -> Result<Option<HostRef>> {
        self.hook(lease, Hook::SaveState(replica))
    }

    fn restore_state(&self, lease: &Arc<Lease>, state: &HostRef, replica: usize) -> Result<()> {
        self.hook(lease, Hook::RestoreState(state.clone(), replica))
            .map(drop)
    }

    fn at_home(&self, step: HomeStep) -> Result<()> {
        self.on_js(move |_, side| {
            // What is decided at home is decided with all that has happened there.
            side.flush_counts();
            step(Some(&side.home));
        })
    }

    fn replaced(&self, change: &Replaced) {
        if let Ok((env, side)) = self.here() {
            side.replaced(&env, change);
        }
    }

    fn rewound(&self, replicas: &[Arc<Replica>]) {
        if let Ok((env, _)) = self.here() {
            env.end_views(replicas);
        }
    }

    fn realm_capturing(&self, replica: &Arc<Replica>) -> Result<()> {
        if replica.guest_threads().threads == 0 {
            return Ok(());
        }
        let mut outcome = Ok(());
        self.in_realm(replica, |env, side, realm| {
            outcome = replica.exit_threads(|| realm.exit_threads(env, side));
        });
        outcome
    }

    fn realm_captured(&self, replica: &Arc<Replica>, snapshot: u64) {
        self.in_realm(replica, |env, _, realm| realm.captured(env, snapshot));
    }

    fn realm_shrinks(&self, replica: &Arc<Replica>, memories: &[u32]) {
        if memories.is_empty() {
            return;
        }
        self.in_realm(replica, |env, side, realm| {
            realm.end_views(env.js(), memories);
            // It may be of one of them.
            side.view.detach(env.js());
            env.scratch().next_epoch();
        });
    }

    fn realm_rewound(&self, replica: &Arc<Replica>, snapshot: u64) {
        self.in_realm(replica, |env, _, realm| realm.rewound(env, snapshot));
    }

    fn reseeds(&self) -> bool {
        self.reseeds
    }

    fn reseed(&self, lease: &Arc<Lease>) -> Result<()> {
        self.hook(lease, Hook::Reseed).map(drop)
    }

    fn revoked(&self, lease: &Arc<Lease>) {
        if let Ok((_, side)) = self.here() {
            side.expire_leases(|s| s.replica.id() == lease.replica().id());
        }
    }

    fn released(&self) {
        // Posted behind every answer, so nothing looks the manager up any more.
        let (manager, address) = (self.manager, self.env);
        let _ = self.inbox.post(Box::new(move |env| {
            debug_assert_eq!(env.js().raw() as usize, address);
            let side = env.managers.borrow().get(&manager).map(Rc::clone);
            if let Some(side) = side {
                side.forget(env);
            }
        }));
    }

    fn event(&self, event: Event) {
        let (manager, address) = (self.manager, self.env);
        if matches!(event, Event::Step(_)) && !self.watches_steps.load(Ordering::Relaxed) {
            return;
        }
        let bound = match &event {
            Event::Trap(_) => Some((&self.traps_due, MOST_TRAPS_DUE)),
            Event::Pressure(_) | Event::Recycled { .. } => {
                Some((&self.recycles_due, MOST_RECYCLES_DUE))
            }
            Event::Reload(report) if report.is_recycle => {
                Some((&self.recycles_due, MOST_RECYCLES_DUE))
            }
            _ => None,
        };
        if let Event::Recycled { decision, .. } = &event
            && self.untold().remove(decision)
        {
            return;
        }
        let counter = bound.map(|(counter, _)| Arc::clone(counter));
        if let Some((counter, most)) = bound
            // An outcome is told wherever its decision was.
            && counter.fetch_add(1, Ordering::Relaxed) >= most
            && !matches!(event, Event::Recycled { .. })
        {
            counter.fetch_sub(1, Ordering::Relaxed);
            if let Event::Pressure(pressure) = &event
                && let Some(decision) = pressure.decision
            {
                self.untold().insert(decision);
            }
            return;
        }
        // No environment, no listeners.
        let _ = self.inbox.post(Box::new(move |_| {
            if let Some(counter) = counter {
                counter.fetch_sub(1, Ordering::Relaxed);
            }
            let Some(env) = EnvState::at(address) else {
                return;
            };
            let side = env.managers.borrow().get(&manager).map(Rc::clone);
            if let Some(side) = side {
                emit(&env, &side, &event);
            }
        }));
    }
}

/// Collects the imports of one new instance.
fn bind(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    replica: Arc<Replica>,
) -> Result<Vec<ImportValue>> {
    let js = env.js();
    let module = Arc::clone(replica.module());
    let side = ReplicaSide::new(replica, manager);
    env.replicas
        .borrow_mut()
        .insert(side.replica.id(), Rc::clone(&side));
    let object = imports_object(env, manager, &side).map_err(|Pending| env.take_thrown())?;
    if let Some(object) = object
        && js.is_promise(object).unwrap_or(false)
    {
        return Err(Error::new(
            ErrorCode::AsyncImport,
            "the imports function returned a promise; return the imports object itself",
        ));
    }
    imports::collect(env, manager, &side, &module, object)
}

fn imports_object(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    side: &Rc<ReplicaSide>,
) -> JsResult<Option<Val>> {
    let js = env.js();
    let Some(reference) = manager.hooks.imports.get() else {
        return Ok(None);
    };
    let given = env.helper(reference)?;
    let object = if manager.hooks.imports_is_function {
        let context = js.external(Rc::clone(side))?;
        let context = js.call(env.helper(env.helpers.make_context)?, &[context])?;
        js.call(given, &[context])?
    } else {
        given
    };
    Ok(matches!(js.kind(object)?, Kind::Object | Kind::Function).then_some(object))
}

/// Calls a hook; `None` where the user gave none.
fn call_hook(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    lease: &Rc<LeaseSide>,
    hook: &Hook,
) -> JsResult<Option<Val>> {
    let js = env.js();
    let reference = match hook {
        Hook::Initialize => manager.hooks.initialize.get(),
        Hook::SaveState(_) => manager.hooks.save_state.get(),
        Hook::RestoreState(..) => manager.hooks.restore_state.get(),
        Hook::Reseed => manager.hooks.reseed.get(),
    };
    let Some(reference) = reference else {
        return Ok(None);
    };
    let function = env.helper(reference)?;
    let instance = lease.object()?;
    let returned = match hook {
        Hook::Initialize | Hook::Reseed => js.call(function, &[instance])?,
        Hook::SaveState(replica) => js.call(function, &[instance, js.number(*replica as f64)?])?,
        Hook::RestoreState(state, replica) => {
            let state = env.kept(state)?;
            js.call(function, &[instance, state, js.number(*replica as f64)?])?
        }
    };
    Ok(Some(returned))
}

fn run_sync(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    lease: &Arc<Lease>,
    hook: &Hook,
) -> HookResult {
    let lease = LeaseSide::new(env, manager, Arc::clone(lease))?;
    // Taken before the lease ends: nothing can be detached while an exception is pending.
    let returned = call_hook(env, manager, &lease, hook).map_err(|Pending| env.take_thrown());
    lease.side.is_saved.set(matches!(hook, Hook::SaveState(_)));
    lease.expire();
    let Some(value) = returned? else {
        return Ok(None);
    };
    let is_thenable = env.js().is_thenable(value);
    if is_thenable.map_err(|Pending| env.take_thrown())? {
        env.ignore(value);
        return Err(Error::new(
            ErrorCode::AsyncImport,
            format!(
                "{} returned a promise, and this is a synchronous operation; make the hook \
                 synchronous, or use the asynchronous operation",
                hook.name()
            ),
        ));
    }
    env.keep(value)
        .map(Some)
        .map_err(|Pending| env.take_thrown())
}

fn run_async(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    lease: Arc<Lease>,
    hook: &Hook,
    tell: Sender<HookResult>,
) {
    let lease = match LeaseSide::new(env, manager, lease) {
        Ok(lease) => lease,
        Err(error) => {
            let _ = tell.send(Err(error));
            return;
        }
    };
    // The handle ends before the answer is given: whoever gets it may touch the instance.
    let saves = matches!(hook, Hook::SaveState(_));
    let end = move |lease: &LeaseSide, outcome: HookResult, tell: &Sender<HookResult>| {
        lease.side.is_saved.set(saves);
        lease.expire();
        let _ = tell.send(outcome);
    };
    let outcome = match call_hook(env, manager, &lease, hook) {
        Ok(Some(value)) => value,
        Ok(None) => return end(&lease, Ok(None), &tell),
        Err(Pending) => return end(&lease, Err(env.take_thrown()), &tell),
    };
    let is_thenable = env.js().is_thenable(outcome);
    if !matches!(is_thenable, Ok(true)) {
        let kept = is_thenable
            .and_then(|_| env.keep(outcome))
            .map(Some)
            .map_err(|Pending| env.take_thrown());
        return end(&lease, kept, &tell);
    }
    let pending = (Rc::clone(&lease), tell.clone());
    let then = move |env: &EnvState, outcome: std::result::Result<Val, Val>| {
        // The lease lives until the promise settles: a collected handle would end it.
        let (lease, tell) = pending;
        let outcome = match outcome {
            Ok(value) => env
                .keep(value)
                .map(Some)
                .map_err(|Pending| env.take_thrown()),
            Err(reason) => Err(env.thrown(reason)),
        };
        end(&lease, outcome, &tell);
    };
    match env.follow(outcome, Box::new(then)) {
        Ok(id) => lease.waits_for(id),
        Err(Pending) => end(&lease, Err(env.take_thrown()), &tell),
    }
}

fn emit(env: &Rc<EnvState>, side: &Rc<ManagerSide>, event: &Event) {
    let js = env.js();
    let Some(listener) = side.hooks.on_event.get() else {
        return;
    };
    let send = || -> JsResult<()> {
        let (kind, payload) = match event {
            Event::Reload(report) => ("reload", report::reload(js, report)?),
            Event::ReloadFailed(error) => ("reload:failed", env.error_value(error, &side.place())?),
            Event::Trap(error) => ("trap", env.error_value(error, &side.place())?),
            Event::Step(step) => ("step", report::step(js, side.manager.name(), step)?),
            Event::Pressure(pressure) => ("pressure", report::pressure(js, pressure)?),
            Event::Recycled { outcome, .. } => match outcome {
                Ok(Some(report)) => ("recycle", report::recycle(js, report)?),
                Ok(None) => ("recycle:superseded", js.undefined()),
                Err(error) => ("recycle:failed", env.error_value(error, &side.place())?),
            },
            Event::MemoryKept(freed) => ("memory:kept", report::freed(js, freed)?),
            Event::Close => ("close", js.undefined()),
        };
        // Which decision it is, so that what follows it can be told from others.
        let decision = match event {
            Event::Pressure(pressure) => pressure.decision,
            Event::Recycled { decision, .. } => Some(*decision),
            _ => None,
        };
        let decision = match decision {
            Some(id) => js.number(id as f64)?,
            None => js.undefined(),
        };
        js.call(
            env.helper(listener)?,
            &[js.string(kind)?, payload, decision],
        )?;
        Ok(())
    };
    // A listener that throws is the user's affair: it is reported as an uncaught exception.
    let _ = send();
}
