//! A manager: begun, asked, reloaded and ended.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wasm_molt_engine::{Error, Manager, Strategy};

use super::{arg, refused, side};
use crate::deferred::Deferred;
use crate::env::EnvState;
use crate::error::Place;
use crate::hooks::JsHost;
use crate::js::{Js, JsResult, Val};
use crate::options;
use crate::report;
use crate::side::{Handle, ManagerSide};

/// `(options, onEvent, isRealm, hasAsyncHooks) => handle`
pub(super) fn new_manager(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn start(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn start_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let source = options::source(js, arg(args, 1)).map_err(|e| refused(&env, e, &side.place()))?;
    side.manager
        .start_now(&source)
        .map_err(|e| env.throw(&e, &side.place()))?;
    Ok(js.undefined())
}

pub(super) fn name(js: Js, args: &[Val]) -> JsResult<Val> {
    js.string(side(js, args)?.manager.name())
}

pub(super) fn generation(js: Js, args: &[Val]) -> JsResult<Val> {
    js.number(side(js, args)?.manager.generation().get() as f64)
}

pub(super) fn state(js: Js, args: &[Val]) -> JsResult<Val> {
    js.string(side(js, args)?.manager.state().as_str())
}

pub(super) fn stats(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = side(js, args)?;
    side.flush_counts();
    let pages = js.get_bool(arg(args, 1)).unwrap_or(false);
    let usage = pages.then(|| side.manager.memory_usage());
    report::stats(js, &side.manager.stats(Some(&side.home)), usage.as_ref())
}

/// `(handle, options) => Promise<ReloadReport>`
pub(super) fn reload(js: Js, args: &[Val]) -> JsResult<Val> {
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

pub(super) fn reload_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let options = options::reload(js, arg(args, 1)).map_err(|e| refused(&env, e, &side.place()))?;
    let report = side
        .manager
        .reload_now(Some(&side.home), &options)
        .map_err(|e| env.throw(&e, &side.place()))?;
    report::reload(js, &report)
}

/// `(bytes | null) => void`
pub(super) fn set_memory_budget(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let bytes =
        options::budget(js, arg(args, 0)).map_err(|e| refused(&env, e, &Place::default()))?;
    wasm_molt_engine::set_memory_budget(bytes);
    Ok(js.undefined())
}

/// `(handle, watch) => void`: whether steps of reloads are told.
pub(super) fn watch_steps(js: Js, args: &[Val]) -> JsResult<Val> {
    let does_watch = js.get_bool(arg(args, 1)).unwrap_or(false);
    side(js, args)?
        .watches_steps
        .store(does_watch, Ordering::Relaxed);
    Ok(js.undefined())
}

/// `(handle) => boolean`: whether a call made now would have to wait.
pub(super) fn would_wait(js: Js, args: &[Val]) -> JsResult<Val> {
    let counts = side(js, args)?.home.counts();
    let taken = counts.in_flight - counts.stragglers + counts.retired;
    js.boolean(!counts.is_open || counts.queued > 0 || taken >= counts.slots)
}

/// `(handle, drainTimeoutMs?, isInHook) => Promise<void>`
pub(super) fn close(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn destroy(js: Js, args: &[Val]) -> JsResult<Val> {
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
