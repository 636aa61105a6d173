//! The functions that `index.js` is written over. Handles are externals; nothing here is public.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use napi::sys;
use wasm_molt_engine::{
    CallControl, CallLimits, Error, ErrorCode, Manager, Module, Outcome, ResetOptions, Settle,
    Snapshot, SnapshotControl, Stop, Strategy, Work,
};

use crate::convert::cannot_cross;
use crate::env::EnvState;
use crate::error::Place;
use crate::exports::{self, Target};
use crate::hooks::JsHost;
use crate::js::{Js, JsResult, Native, Pending, Val};
use crate::js_only::JsOnly;
use crate::lease::LeaseSide;
use crate::memory::out_of_bounds;
use crate::namespace;
use crate::options::{self, Refused};
use crate::report;
use crate::side::{Handle, ManagerSide, ReplicaSide};

/// Every function, by the name `index.js` uses.
pub(crate) const FUNCTIONS: &[(&str, Native)] = &[
    ("isSetUp", is_set_up),
    ("newScratch", new_scratch),
    ("setup", set_up),
    ("isBusy", is_busy),
    ("settleHost", settle_host),
    ("look", look),
    ("newManager", new_manager),
    ("start", start),
    ("startSync", start_sync),
    ("name", name),
    ("generation", generation),
    ("state", state),
    ("stats", stats),
    ("call", call),
    ("callSync", call_sync),
    ("invoke", invoke),
    ("exports", manager_exports),
    ("abort", abort),
    ("acquire", acquire),
    ("cancelAcquire", cancel_acquire),
    ("reload", reload),
    ("reloadSync", reload_sync),
    ("snapshot", snapshot),
    ("snapshotSync", snapshot_sync),
    ("cancelSnapshot", cancel_snapshot),
    ("snapshotAccept", snapshot_accept),
    ("snapshotFacts", snapshot_facts),
    ("snapshotResidentBytes", snapshot_resident_bytes),
    ("snapshotRelease", snapshot_release),
    ("reset", reset),
    ("resetSync", reset_sync),
    ("fork", fork),
    ("setMemoryBudget", set_memory_budget),
    ("watchSteps", watch_steps),
    ("wouldWait", would_wait),
    ("close", close),
    ("destroy", destroy),
    ("leaseGeneration", lease_generation),
    ("leaseExports", lease_exports),
    ("leaseCall", lease_call),
    ("leaseRelease", lease_release),
    ("contextGeneration", context_generation),
    ("contextExports", context_exports),
    ("managerMemory", manager_memory),
    ("leaseMemory", lease_memory),
    ("contextMemory", context_memory),
    ("memoryByteLength", memory_byte_length),
    ("memoryBuffer", memory_buffer),
    ("memoryRead", memory_read),
    ("memoryReadString", memory_read_string),
    ("memoryWrite", memory_write),
    ("leaseRealm", lease_realm),
    ("managerRealm", manager_realm),
    // Measured against by the benchmarks: an empty Node-API function.
    ("__noop", noop),
    // The tests': a panic of ours must become ERR_WASM_INTERNAL.
    ("__panic", panic_on_purpose),
    // The tests': text to bytes, for glue that wants bytes.
    ("__assemble", assemble),
];

fn noop(js: Js, _args: &[Val]) -> JsResult<Val> {
    Ok(js.undefined())
}

fn assemble(js: Js, args: &[Val]) -> JsResult<Val> {
    let text = js.get_string(arg(args, 0))?;
    let env = EnvState::of(js)?;
    let bytes = wasm_molt_engine::assemble_text(&text);
    js.uint8_array(&bytes.map_err(|e| env.throw(&e, &Place::default()))?)
}

#[expect(clippy::panic, reason = "that is what it is for")]
fn panic_on_purpose(_js: Js, _args: &[Val]) -> JsResult<Val> {
    panic!("on purpose")
}

pub(crate) fn arg(args: &[Val], index: usize) -> Val {
    args.get(index).copied().unwrap_or(std::ptr::null_mut())
}

/// Whether a copy of the package has this addon already.
fn is_set_up(js: Js, _: &[Val]) -> JsResult<Val> {
    js.boolean(EnvState::is_set_up(js))
}

fn is_busy(js: Js, _: &[Val]) -> JsResult<Val> {
    js.boolean(EnvState::of(js)?.is_busy())
}

/// `() => ArrayBuffer`
fn new_scratch(js: Js, _: &[Val]) -> JsResult<Val> {
    js.buffer(size_of::<exports::Scratch>())
}

fn set_up(js: Js, args: &[Val]) -> JsResult<Val> {
    EnvState::set_up(js, arg(args, 0))
}

fn settle_host(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let id = js.get_number(arg(args, 0)).unwrap_or_default() as u32;
    let value = arg(args, 2);
    let is_ok = js.get_bool(arg(args, 1)).unwrap_or(false);
    env.settle_host(id, if is_ok { Ok(value) } else { Err(value) });
    Ok(js.undefined())
}

/// `() => boolean`: whether to look again.
fn look(js: Js, _args: &[Val]) -> JsResult<Val> {
    js.boolean(EnvState::of(js)?.look())
}

fn refused(env: &EnvState, refused: Refused, place: &Place<'_>) -> Pending {
    match refused {
        Refused::Error(error) => env.throw(&error, place),
        Refused::Pending => Pending,
    }
}

fn handle(js: Js, args: &[Val]) -> JsResult<Rc<Handle>> {
    // SAFETY: `index.js` passes what `newManager` returned.
    unsafe { js.external_ref::<Rc<Handle>>(arg(args, 0)) }.map(Rc::clone)
}

fn side(js: Js, args: &[Val]) -> JsResult<Rc<ManagerSide>> {
    handle(js, args).map(|handle| Rc::clone(&handle.0))
}

// ---------------------------------------------------------------------- life

/// `(options, onEvent, isRealm, hasAsyncHooks) => handle`
fn new_manager(js: Js, args: &[Val]) -> JsResult<Val> {
    static NEXT_ID: AtomicU64 = AtomicU64::new(1);
    let env = EnvState::of(js)?;
    let place = Place::default();
    let (mut options, hooks) =
        options::manager(js, arg(args, 0)).map_err(|e| refused(&env, e, &place))?;
    options.is_realm = js.get_bool(arg(args, 2)).unwrap_or(false);
    hooks.on_event.set(Some(js.reference(arg(args, 1))?));
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let timeout_ms = options.limits.timeout_ms;
    let stack_floor = wasm_molt_engine::stack_floor(options.limits.stack_bytes());
    let watches_steps = Arc::default();
    let host = Arc::new(JsHost::new(&env, id, &hooks, &watches_steps));
    let (manager, home) = Manager::new(options, Arc::clone(&host) as _).map_err(|e| {
        hooks.release(js);
        env.throw(&e, &place)
    })?;
    let home = home.ok_or_else(|| env.throw(&Error::internal("no home"), &place))?;
    if js.get_bool(arg(args, 3)).unwrap_or(false) {
        manager.hooks_are_async();
    }
    let side = Rc::new(ManagerSide {
        id,
        manager,
        home,
        hooks,
        timeout_ms,
        stack_floor,
        current: RefCell::default(),
        stamp: Cell::new(0),
        stack: RefCell::default(),
        swapping: Cell::new(0),
        // A deadline takes the longer way, always.
        detours: Cell::new(u32::from(timeout_ms.is_some())),
        completed: Cell::new(0),
        leases: RefCell::default(),
        exports: RefCell::default(),
        watches_steps,
    });
    env.managers.borrow_mut().insert(id, Rc::clone(&side));
    js.external(Rc::new(Handle(side)))
}

/// `(handle, source) => Promise<void>`
fn start(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let source = options::source(js, arg(args, 1)).map_err(|e| refused(&env, e, &side.place()))?;
    let pending = Deferred::new(&env, &side)?;
    let promise = pending.promise;
    side.manager
        .start(source, pending.done(|env, _, ()| Ok(env.js().undefined())));
    Ok(promise)
}

/// `(handle, source) => void`
fn start_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let source = options::source(js, arg(args, 1)).map_err(|e| refused(&env, e, &side.place()))?;
    side.manager
        .start_now(&source)
        .map_err(|e| env.throw(&e, &side.place()))?;
    Ok(js.undefined())
}

fn name(js: Js, args: &[Val]) -> JsResult<Val> {
    js.string(side(js, args)?.manager.name())
}

fn generation(js: Js, args: &[Val]) -> JsResult<Val> {
    js.number(side(js, args)?.manager.generation().get() as f64)
}

fn state(js: Js, args: &[Val]) -> JsResult<Val> {
    js.string(side(js, args)?.manager.state().as_str())
}

fn stats(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = side(js, args)?;
    side.flush_counts();
    let pages = js.get_bool(arg(args, 1)).unwrap_or(false);
    let usage = pages.then(|| side.manager.memory_usage());
    report::stats(js, &side.manager.stats(Some(&side.home)), usage.as_ref())
}

/// `(handle, options) => Promise<ReloadReport>`
fn reload(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let options = options::reload(js, arg(args, 1)).map_err(|e| refused(&env, e, &side.place()))?;
    let pending = Deferred::new(&env, &side)?;
    let promise = pending.promise;
    let report =
        |env: &Rc<EnvState>, _: &Rc<ManagerSide>, report: Arc<_>| report::reload(env.js(), &report);
    // While a rolling swap prepares, the instance at home serves as ever; and glue, which knows nothing of
    // swaps, is refused only while the gate is closed.
    let done = if options.strategy == Strategy::Rolling || side.manager.is_realm() {
        pending.done(report)
    } else {
        side.swap_begins();
        pending.done_always(ManagerSide::swap_ends, report)
    };
    side.manager.reload(options, done);
    Ok(promise)
}

fn reload_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let options = options::reload(js, arg(args, 1)).map_err(|e| refused(&env, e, &side.place()))?;
    let report = side
        .manager
        .reload_now(Some(&side.home), &options)
        .map_err(|e| env.throw(&e, &side.place()))?;
    report::reload(js, &report)
}

// ---------------------------------------------------------------------- snapshots

/// What a `Snapshot` holds.
struct SnapshotSide {
    snapshot: Arc<Snapshot>,
    manager: Rc<ManagerSide>,
}

fn snapshot_object(env: &Rc<EnvState>, side: &Rc<ManagerSide>, it: Arc<Snapshot>) -> JsResult<Val> {
    let js = env.js();
    let handle = js.external(SnapshotSide {
        snapshot: it,
        manager: Rc::clone(side),
    })?;
    js.call(env.helper(env.helpers.make_snapshot)?, &[handle])
}

/// The promise of something for which instances pause, and what settles it. From here until then
/// synchronous calls are refused.
fn pausing<T: Send + 'static>(
    env: &Rc<EnvState>,
    side: &Rc<ManagerSide>,
    convert: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>, T) -> JsResult<Val> + Send + 'static,
) -> JsResult<(Val, Done<T>)> {
    let pending = Deferred::new(env, side)?;
    let promise = pending.promise;
    side.swap_begins();
    Ok((
        promise,
        pending.done_always(ManagerSide::swap_ends, convert),
    ))
}

/// `(handle) => [Promise<Snapshot>, control]`
fn snapshot(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let (promise, done) = pausing(&env, &side, snapshot_object)?;
    let control = side.manager.snapshot(done);
    with_abort(js, promise, true, control)
}

/// `(handle) => Snapshot`
fn snapshot_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let taken = side.manager.snapshot_now(Some(&side.home));
    let taken = taken.map_err(|e| env.throw(&e, &side.place()))?;
    snapshot_object(&env, &side, taken)
}

/// `cancelSnapshot(handle, control)`
fn cancel_snapshot(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = side(js, args)?;
    // SAFETY: `index.js` passes the second half of what `snapshot` returned.
    let control = unsafe { js.external_ref::<SnapshotControl>(arg(args, 1)) }?;
    control.cancel(&side.manager);
    Ok(js.undefined())
}

/// `(handle) => void`: the snapshot that was asked for is wanted.
fn snapshot_accept(js: Js, args: &[Val]) -> JsResult<Val> {
    side(js, args)?.manager.accept_snapshot();
    Ok(js.undefined())
}

/// `(snapshot) => [id, generation, memoryBytes]`: what does not change.
fn snapshot_facts(js: Js, args: &[Val]) -> JsResult<Val> {
    // SAFETY: `index.js` passes what `makeSnapshot` was given.
    let it = &unsafe { js.external_ref::<SnapshotSide>(arg(args, 0)) }?.snapshot;
    let facts = js.array(3)?;
    let numbers = [it.id(), it.generation().get(), it.memory_bytes() as u64];
    for (index, number) in (0..).zip(numbers) {
        js.set_element(facts, index, js.number(number as f64)?)?;
    }
    Ok(facts)
}

/// `(snapshot) => number`
fn snapshot_resident_bytes(js: Js, args: &[Val]) -> JsResult<Val> {
    // SAFETY: `index.js` passes what `makeSnapshot` was given.
    let it = unsafe { js.external_ref::<SnapshotSide>(arg(args, 0)) }?;
    js.number(it.snapshot.resident_bytes() as f64)
}

/// `(snapshot) => void`
fn snapshot_release(js: Js, args: &[Val]) -> JsResult<Val> {
    // SAFETY: `index.js` passes what `makeSnapshot` was given.
    let it = unsafe { js.external_ref::<SnapshotSide>(arg(args, 0)) }?;
    it.manager.manager.release_snapshot(&it.snapshot);
    // Values of JavaScript that it held are let go of now.
    EnvState::of(js)?.sweep();
    Ok(js.undefined())
}

/// `ResetOptions`; `to` comes by itself, as the handle that a `Snapshot` holds.
fn reset_options(env: &EnvState, side: &ManagerSide, args: &[Val]) -> JsResult<ResetOptions> {
    let js = env.js();
    let mut options =
        options::reset(js, arg(args, 1)).map_err(|e| refused(env, e, &side.place()))?;
    let to = arg(args, 2);
    if js.kind(to)? == crate::js::Kind::External {
        // SAFETY: `index.js` passes what `makeSnapshot` was given.
        let it = unsafe { js.external_ref::<SnapshotSide>(to) }?;
        options.to = Some(Arc::clone(&it.snapshot));
    }
    Ok(options)
}

/// `(handle, options, to?) => Promise<ResetReport>`
fn reset(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let options = reset_options(&env, &side, args)?;
    let (promise, done) = pausing(&env, &side, |env, _, it| report::reset(env.js(), &it))?;
    side.manager.reset(options, done);
    Ok(promise)
}

/// `(handle, options, to?) => ResetReport`
fn reset_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let options = reset_options(&env, &side, args)?;
    let done = side.manager.reset_now(Some(&side.home), &options);
    let done = done.map_err(|e| env.throw(&e, &side.place()))?;
    report::reset(js, &done)
}

/// `(handle, child) => Promise<void> | undefined`: starts the child as a copy, here and now if it can be.
fn fork(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let child = self::side(js, args.get(1..).unwrap_or_default())?;
    if let Some(forked) = side.manager.fork_now(&side.home, &child.manager) {
        forked.map_err(|e| env.throw(&e, &side.place()))?;
        return Ok(js.undefined());
    }
    let (promise, done) = pausing(&env, &side, |env, _, ()| Ok(env.js().undefined()))?;
    side.manager.fork(&child.manager, done);
    Ok(promise)
}

/// `(bytes | null) => void`
fn set_memory_budget(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let bytes =
        options::budget(js, arg(args, 0)).map_err(|e| refused(&env, e, &Place::default()))?;
    wasm_molt_engine::set_memory_budget(bytes);
    Ok(js.undefined())
}

/// `(handle, watch) => void`: whether steps of reloads are told.
fn watch_steps(js: Js, args: &[Val]) -> JsResult<Val> {
    let does_watch = js.get_bool(arg(args, 1)).unwrap_or(false);
    side(js, args)?
        .watches_steps
        .store(does_watch, Ordering::Relaxed);
    Ok(js.undefined())
}

/// `(handle) => boolean`: whether a call made now would have to wait.
fn would_wait(js: Js, args: &[Val]) -> JsResult<Val> {
    let counts = side(js, args)?.home.counts();
    let taken = counts.in_flight - counts.stragglers + counts.retired;
    js.boolean(!counts.is_open || counts.queued > 0 || taken >= counts.slots)
}

/// `(handle, drainTimeoutMs?, isInHook) => Promise<void>`
fn close(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let timeout = options::milliseconds(js, "drainTimeoutMs", arg(args, 1), 0)
        .map_err(|e| refused(&env, e, &side.place()))?;
    let pending = Deferred::new(&env, &side)?;
    let promise = pending.promise;
    let timeout = timeout.map(Duration::from_millis);
    side.home.shut();
    side.manager.close(timeout, pending.done(ended));
    if js.get_bool(arg(args, 2)).unwrap_or(false) {
        side.manager.give_hooks_up();
    }
    Ok(promise)
}

/// `(handle) => Promise<void>`
fn destroy(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let pending = Deferred::new(&env, &side)?;
    let promise = pending.promise;
    side.home.shut();
    side.manager.destroy(pending.done(ended));
    Ok(promise)
}

fn ended(env: &Rc<EnvState>, _side: &Rc<ManagerSide>, (): ()) -> JsResult<Val> {
    Ok(env.js().undefined())
}

// ---------------------------------------------------------------------- promises

/// A promise that another thread will answer. While it is open the process stays alive.
pub(crate) struct Deferred {
    inside: JsOnly<Inside>,
    pub(crate) promise: Val,
}

/// Used on the JS thread, once.
pub(crate) struct Inside {
    env: Rc<EnvState>,
    side: Rc<ManagerSide>,
    deferred: sys::napi_deferred,
}

pub(crate) type Done<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

impl Deferred {
    pub(crate) fn new(env: &Rc<EnvState>, side: &Rc<ManagerSide>) -> JsResult<Self> {
        let (deferred, promise) = env.js().promise()?;
        env.begin();
        let inside = Inside {
            env: Rc::clone(env),
            side: Rc::clone(side),
            deferred,
        };
        Ok(Self {
            inside: JsOnly::new(&env.inbox, inside),
            promise,
        })
    }

    pub(crate) fn done<T: Send + 'static>(
        self,
        convert: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>, T) -> JsResult<Val> + Send + 'static,
    ) -> Done<T> {
        self.done_always(|_| {}, convert)
    }

    /// * `always`: runs on the JS thread before the promise settles, whichever way.
    fn done_always<T: Send + 'static>(
        self,
        always: impl FnOnce(&ManagerSide) + Send + 'static,
        convert: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>, T) -> JsResult<Val> + Send + 'static,
    ) -> Done<T> {
        let inside = self.inside;
        Box::new(move |outcome| {
            let inbox = Arc::clone(inside.inbox());
            // Without an environment there is nobody to answer.
            let _ = inbox.post(Box::new(move |_| {
                if let Some(inside) = inside.get() {
                    always(&inside.side);
                    inside.settle(outcome, convert);
                }
            }));
        })
    }
}

impl Inside {
    fn settle<T>(
        &self,
        outcome: Result<T, Error>,
        convert: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>, T) -> JsResult<Val>,
    ) {
        let Self {
            env,
            side,
            deferred,
        } = self;
        let js = env.js();
        env.end();
        let settled = match outcome {
            Ok(value) => convert(env, side, value).map_err(|Pending| js.take_exception()),
            Err(error) => Err(env
                .error_value(&error, &side.place())
                .unwrap_or_else(|Pending| js.take_exception())),
        };
        match settled {
            Ok(value) => js.resolve(*deferred, value),
            Err(error) => js.reject(*deferred, error),
        }
    }
}

// ---------------------------------------------------------------------- calls

/// The module that serves.
fn serving(env: &EnvState, side: &ManagerSide) -> JsResult<Arc<Module>> {
    side.manager.module().ok_or_else(|| {
        let error = Error::new(
            ErrorCode::Closed,
            format!(
                "{} is {}",
                side.manager.name(),
                side.manager.state().as_str()
            ),
        );
        env.throw(&error, &side.place())
    })
}

fn function_index(
    env: &EnvState,
    side: &ManagerSide,
    module: &Module,
    name: Val,
) -> JsResult<usize> {
    let js = env.js();
    if js.kind(name)? != crate::js::Kind::String {
        let error = Error::invalid("the name of the export must be a string");
        return Err(env.throw(&error, &side.place()));
    }
    let index = js.with_string(name, |name| module.function_index(name))?;
    index.map_err(|e| env.throw(&e, &side.place()))
}

/// What a call may be stopped by: `(…, timeoutMs, canAbort)`.
fn call_limits(
    env: &EnvState,
    side: &ManagerSide,
    args: &[Val],
    at: usize,
) -> JsResult<CallLimits> {
    let js = env.js();
    let timeout_ms = options::milliseconds(js, "timeoutMs", arg(args, at), 1)
        .map_err(|e| refused(env, e, &side.place()))?;
    let can_abort = js.get_bool(arg(args, at + 1)).unwrap_or(false);
    Ok(CallLimits {
        timeout_ms,
        can_abort,
    })
}

fn bytes_out(env: &Rc<EnvState>, _side: &Rc<ManagerSide>, outcome: Outcome) -> JsResult<Val> {
    match outcome {
        Outcome::Bytes(bytes) => env.js().uint8_array(&bytes),
        Outcome::Values(_) => Ok(env.js().undefined()),
    }
}

fn values_out(env: &Rc<EnvState>, side: &Rc<ManagerSide>, outcome: Outcome) -> JsResult<Val> {
    let Outcome::Values(values) = outcome else {
        return Ok(env.js().undefined());
    };
    let owner = values.iter().find_map(|value| match value {
        wasm_molt_engine::Value::Func(Some(handle)) => env
            .replicas
            .borrow()
            .get(&handle.replica_id())
            .map(Rc::clone),
        _ => None,
    });
    // The guest may have grown its memory meanwhile.
    if let Some(current) = &*side.current.borrow() {
        current.before_js(env.js());
    }
    env.results(&values, owner.as_ref())
}

/// The promise, or where a signal may stop the call: `[promise, abort]`.
fn with_abort<T: 'static>(js: Js, promise: Val, can_abort: bool, control: T) -> JsResult<Val> {
    if !can_abort {
        return Ok(promise);
    }
    let pair = js.array(2)?;
    js.set_element(pair, 0, promise)?;
    js.set_element(pair, 1, js.external(control)?)?;
    Ok(pair)
}

/// `(handle, name, args, timeoutMs, canAbort) => Promise | [Promise, control]`
fn call(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let module = serving(&env, &side)?;
    let (work, limits) = call_work(&env, &side, &module, args, 1)?;
    let pending = Deferred::new(&env, &side)?;
    let promise = pending.promise;
    let settle: Settle = pending.done(values_out);
    let control = side.manager.call(Some(&side.home), work, limits, settle);
    env.expect_answer();
    with_abort(js, promise, limits.can_abort, control)
}

fn call_work(
    env: &EnvState,
    side: &ManagerSide,
    module: &Module,
    args: &[Val],
    at: usize,
) -> JsResult<(Work, CallLimits)> {
    let function = function_index(env, side, module, arg(args, at))?;
    let limits = call_limits(env, side, args, at + 2)?;
    let Some(export) = module.functions().get(function) else {
        return Err(env.throw(&Error::internal("no function"), &side.place()));
    };
    if !export.signature.can_cross() {
        return Err(cannot_cross(env.js()));
    }
    let args = env.arguments(arg(args, at + 1), &export.signature)?;
    Ok((Work::Call { function, args }, limits))
}

/// `(handle, name, args) => value`
fn call_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let handle = handle(js, args)?;
    let module = serving(&env, &handle.0)?;
    let index = function_index(&env, &handle.0, &module, arg(args, 1))?;
    exports::call_sync(&env, &handle, index, arg(args, 2))
}

/// `(handle, name, input, timeoutMs, canAbort) => Promise | [Promise, control]`
fn invoke(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let module = serving(&env, &side)?;
    let function = function_index(&env, &side, &module, arg(args, 1))?;
    let limits = call_limits(&env, &side, args, 3)?;
    side.manager
        .check_invoke(function)
        .map_err(|e| env.throw(&e, &side.place()))?;
    let Some(bytes) = js.bytes(arg(args, 2))? else {
        let error = Error::invalid("the input of invoke must be a Uint8Array");
        return Err(env.throw(&error, &side.place()));
    };
    // SAFETY: no JavaScript has run since the bytes were taken. They are copied here because
    // JavaScript could detach the buffer at any later time.
    let input = unsafe { bytes.to_vec() };
    let pending = Deferred::new(&env, &side)?;
    let promise = pending.promise;
    let work = Work::Invoke { function, input };
    let control = side
        .manager
        .call(Some(&side.home), work, limits, pending.done(bytes_out));
    env.expect_answer();
    with_abort(js, promise, limits.can_abort, control)
}

/// `abort(control, reason)`
fn abort(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    // SAFETY: `index.js` passes the second half of what `with_abort` returned.
    let control = unsafe { js.external_ref::<Option<Arc<CallControl>>>(arg(args, 0)) }?;
    if let Some(control) = control {
        control.stop(Stop::Aborted(env.keep(arg(args, 1))?));
    }
    Ok(js.undefined())
}

// ---------------------------------------------------------------------- leases

/// `(handle) => [Promise<LeasedInstance>, cancel]`
fn acquire(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let pending = Deferred::new(&env, &side)?;
    let promise = pending.promise;
    let done = pending.done(|env, side, lease| match LeaseSide::new(env, side, lease) {
        Ok(lease) => lease.object(),
        Err(error) => Err(env.throw(&error, &side.place())),
    });
    let id = side.manager.lease(Some(&side.home), done);
    let pair = js.array(2)?;
    js.set_element(pair, 0, promise)?;
    js.set_element(pair, 1, js.external(id)?)?;
    Ok(pair)
}

/// `cancelAcquire(handle, id, reason)`
fn cancel_acquire(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    // SAFETY: `index.js` passes the second half of what `acquire` returned.
    let id = unsafe { js.external_ref::<wasm_molt_engine::WaitId>(arg(args, 1)) }?;
    side.manager
        .cancel_lease(*id, Error::Aborted(env.keep(arg(args, 2))?));
    Ok(js.undefined())
}

fn lease(js: Js, args: &[Val]) -> JsResult<Rc<LeaseSide>> {
    // SAFETY: `index.js` passes what `makeLease` was given.
    unsafe { js.external_ref::<Rc<LeaseSide>>(arg(args, 0)) }.map(Rc::clone)
}

/// The lease, if it has not ended.
fn live_lease(js: Js, args: &[Val]) -> JsResult<Rc<LeaseSide>> {
    let lease = lease(js, args)?;
    if lease.lease.is_released() {
        return Err(lease
            .env
            .throw(&lease.lease.stale(), &lease.manager.place()));
    }
    Ok(lease)
}

fn lease_generation(js: Js, args: &[Val]) -> JsResult<Val> {
    js.number(lease(js, args)?.side.replica.generation().get() as f64)
}

fn lease_exports(js: Js, args: &[Val]) -> JsResult<Val> {
    let lease = live_lease(js, args)?;
    let target = Target::Lease(Rc::clone(&lease));
    exports::exports_of(
        &lease.env,
        &lease.manager,
        lease.side.replica.module(),
        &target,
    )
}

/// `(lease, name, args, timeoutMs, canAbort) => Promise | [Promise, control]`
fn lease_call(js: Js, args: &[Val]) -> JsResult<Val> {
    let lease = live_lease(js, args)?;
    let (env, side) = (&lease.env, &lease.manager);
    let (work, limits) = call_work(env, side, lease.side.replica.module(), args, 1)?;
    let pending = Deferred::new(env, side)?;
    let promise = pending.promise;
    let control = side
        .manager
        .call_in(&lease.lease, work, limits, pending.done(values_out));
    env.expect_answer();
    with_abort(js, promise, limits.can_abort, control)
}

fn lease_release(js: Js, args: &[Val]) -> JsResult<Val> {
    lease(js, args)?.expire();
    Ok(js.undefined())
}

/// `(lease) => realm`
fn lease_realm(js: Js, args: &[Val]) -> JsResult<Val> {
    let lease = lease(js, args)?;
    namespace::handle(&lease.env, &lease.manager, &lease.side)
}

/// `(handle) => realm`: the one that serves.
fn manager_realm(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let current = side.current().map_err(|e| env.throw(&e, &side.place()))?;
    namespace::handle(&env, &side, &current)
}

// ---------------------------------------------------------------------- contexts of imports

fn context(js: Js, args: &[Val]) -> JsResult<Rc<ReplicaSide>> {
    // SAFETY: `index.js` passes what `makeContext` was given.
    unsafe { js.external_ref::<Rc<ReplicaSide>>(arg(args, 0)) }.map(Rc::clone)
}

fn context_generation(js: Js, args: &[Val]) -> JsResult<Val> {
    js.number(context(js, args)?.replica.generation().get() as f64)
}

fn context_exports(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = context(js, args)?;
    let env = EnvState::of(js)?;
    let Some(manager) = side.manager.upgrade() else {
        return js.object();
    };
    exports::exports_of(
        &env,
        &manager,
        side.replica.module(),
        &Target::Instance(Rc::clone(&side)),
    )
}

fn manager_exports(js: Js, args: &[Val]) -> JsResult<Val> {
    let handle = handle(js, args)?;
    let env = EnvState::of(js)?;
    exports::live_exports(&env, &handle.0, &handle)
}

// ---------------------------------------------------------------------- memory

/// Whose memory it is.
enum MemoryOf {
    Manager(Rc<Handle>),
    Lease(Rc<LeaseSide>),
    Instance(Rc<ReplicaSide>),
}

fn manager_memory(js: Js, args: &[Val]) -> JsResult<Val> {
    js.external(MemoryOf::Manager(handle(js, args)?))
}

fn lease_memory(js: Js, args: &[Val]) -> JsResult<Val> {
    js.external(MemoryOf::Lease(live_lease(js, args)?))
}

fn context_memory(js: Js, args: &[Val]) -> JsResult<Val> {
    js.external(MemoryOf::Instance(context(js, args)?))
}

/// The instance whose memory is meant, now.
fn memory_side(js: Js, args: &[Val]) -> JsResult<Rc<ReplicaSide>> {
    // SAFETY: `index.js` passes what one of the three functions above returned.
    let of = unsafe { js.external_ref::<MemoryOf>(arg(args, 0)) }?;
    let (side, error) = match of {
        MemoryOf::Manager(handle) => {
            let manager = &handle.0;
            // Inside a host call "the instance" is the one that called.
            let calling = manager.stack.borrow().last().map(Rc::clone);
            match calling.map_or_else(|| manager.current(), Ok) {
                Ok(side) => return Ok(side),
                Err(error) => {
                    let env = EnvState::of(js)?;
                    return Err(env.throw(&error, &manager.place()));
                }
            }
        }
        MemoryOf::Lease(lease) if lease.lease.is_released() => (&lease.side, lease.lease.stale()),
        MemoryOf::Lease(lease) => return Ok(Rc::clone(&lease.side)),
        MemoryOf::Instance(side) if side.is_expired.get() => (side, side.replica.stale()),
        MemoryOf::Instance(side) => return Ok(Rc::clone(side)),
    };
    let env = EnvState::of(js)?;
    let manager = side.manager.upgrade();
    let place = manager.as_ref().map(|m| m.place()).unwrap_or_default();
    Err(env.throw(&error, &place))
}

fn memory_byte_length(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = memory_side(js, args)?;
    js.number(side.replica.memory().map_or(0, |m| m.byte_len()) as f64)
}

fn memory_buffer(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = memory_side(js, args)?;
    match side.replica.memory() {
        Some(memory) => side.view.buffer(js, memory),
        None => js.buffer(0),
    }
}

/// `(ptr, length)`, as whole numbers; a negative pointer is a 32-bit one that JavaScript reads signed.
fn range(js: Js, args: &[Val]) -> JsResult<(u64, usize)> {
    let whole = |value: Val, name: &str| -> JsResult<f64> {
        match js.get_number(value) {
            Some(v) if v.fract() == 0.0 && v.abs() <= 9_007_199_254_740_991.0 => Ok(v),
            Some(v) => {
                Err(js.throw_range_error(&format!("{name} must be a whole number, and is {v}")))
            }
            None => Err(js.throw_type_error(&format!("{name} must be a number"))),
        }
    };
    let ptr = whole(arg(args, 1), "ptr")?;
    let len = whole(arg(args, 2), "byteLength")?;
    let ptr = if ptr < 0.0 {
        f64::from((ptr as i64) as i32 as u32)
    } else {
        ptr
    };
    if len < 0.0 {
        return Err(js.throw_range_error(&format!("byteLength must not be negative, and is {len}")));
    }
    Ok((ptr as u64, len as usize))
}

fn read(js: Js, args: &[Val]) -> JsResult<Vec<u8>> {
    let side = memory_side(js, args)?;
    let (ptr, len) = range(js, args)?;
    let available = side.replica.memory().map_or(0, |m| m.byte_len());
    let error = wasm_molt_engine::OutOfBounds {
        ptr,
        byte_length: len,
        memory_bytes: available,
    };
    // Asked before allocating: a wrong length must not become a huge buffer of ours.
    if len > available {
        return Err(out_of_bounds(js, &error));
    }
    let mut bytes = vec![0; len];
    match side.replica.memory() {
        Some(memory) => memory
            .read(ptr, &mut bytes)
            .map_err(|e| out_of_bounds(js, &e))?,
        None if len > 0 || ptr > 0 => return Err(out_of_bounds(js, &error)),
        None => {}
    }
    Ok(bytes)
}

fn memory_read(js: Js, args: &[Val]) -> JsResult<Val> {
    js.uint8_array(&read(js, args)?)
}

fn memory_read_string(js: Js, args: &[Val]) -> JsResult<Val> {
    js.string(&String::from_utf8_lossy(&read(js, args)?))
}

/// `(memory, ptr, bytes | string) => bytes written`
fn memory_write(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = memory_side(js, args)?;
    let value = arg(args, 2);
    let bytes = match js.kind(value)? {
        crate::js::Kind::String => js.get_string(value)?.into_bytes(),
        _ => match js.bytes(value)? {
            // SAFETY: no JavaScript has run since the bytes were taken.
            Some(bytes) => unsafe { bytes.to_vec() },
            None => return Err(js.throw_type_error("bytes must be a Uint8Array or a string")),
        },
    };
    let zero = js.int32(0)?;
    let (ptr, _) = range(js, &[arg(args, 0), arg(args, 1), zero])?;
    let memory_bytes = side.replica.memory().map_or(0, |m| m.byte_len());
    match side.replica.memory() {
        Some(memory) => memory
            .write(ptr, &bytes)
            .map_err(|e| out_of_bounds(js, &e))?,
        None => {
            let error = wasm_molt_engine::OutOfBounds {
                ptr,
                byte_length: bytes.len(),
                memory_bytes,
            };
            return Err(out_of_bounds(js, &error));
        }
    }
    js.number(bytes.len() as f64)
}
