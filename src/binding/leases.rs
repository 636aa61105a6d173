//! Leases, and the contexts of imports: an instance by itself.

use std::rc::Rc;

use wasm_molt_engine::{Error, WaitId};

use super::calls::{call_work, values_out};
use super::{arg, handle, side, with_abort};
use crate::deferred::Deferred;
use crate::env::EnvState;
use crate::exports::{self, Target};
use crate::js::{Js, JsResult, Val};
use crate::lease::LeaseSide;
use crate::namespace;
use crate::side::ReplicaSide;

/// `(handle) => [Promise<LeasedInstance>, cancel]`
pub(super) fn acquire(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn cancel_acquire(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    // SAFETY: `index.js` passes the second half of what `acquire` returned.
    let id = unsafe { js.external_ref::<WaitId>(arg(args, 1)) }?;
    side.manager
        .cancel_lease(*id, Error::Aborted(env.keep(arg(args, 2))?));
    Ok(js.undefined())
}

fn lease(js: Js, args: &[Val]) -> JsResult<Rc<LeaseSide>> {
    // SAFETY: `index.js` passes what `makeLease` was given.
    unsafe { js.external_ref::<Rc<LeaseSide>>(arg(args, 0)) }.map(Rc::clone)
}

/// The lease, if it has not ended.
pub(super) fn live_lease(js: Js, args: &[Val]) -> JsResult<Rc<LeaseSide>> {
    let lease = lease(js, args)?;
    if lease.lease.is_released() {
        return Err(lease
            .env
            .throw(&lease.lease.stale(), &lease.manager.place()));
    }
    Ok(lease)
}

pub(super) fn lease_generation(js: Js, args: &[Val]) -> JsResult<Val> {
    js.number(lease(js, args)?.side.replica.generation().get() as f64)
}

pub(super) fn lease_exports(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn lease_call(js: Js, args: &[Val]) -> JsResult<Val> {
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

pub(super) fn lease_release(js: Js, args: &[Val]) -> JsResult<Val> {
    lease(js, args)?.expire();
    Ok(js.undefined())
}

/// `(lease) => realm`
pub(super) fn lease_realm(js: Js, args: &[Val]) -> JsResult<Val> {
    let lease = lease(js, args)?;
    namespace::handle(&lease.env, &lease.manager, &lease.side)
}

/// `(handle) => realm`: the one that serves.
pub(super) fn manager_realm(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let current = side.current().map_err(|e| env.throw(&e, &side.place()))?;
    namespace::handle(&env, &side, &current)
}

pub(super) fn context(js: Js, args: &[Val]) -> JsResult<Rc<ReplicaSide>> {
    // SAFETY: `index.js` passes what `makeContext` was given.
    unsafe { js.external_ref::<Rc<ReplicaSide>>(arg(args, 0)) }.map(Rc::clone)
}

pub(super) fn context_generation(js: Js, args: &[Val]) -> JsResult<Val> {
    js.number(context(js, args)?.replica.generation().get() as f64)
}

pub(super) fn context_exports(js: Js, args: &[Val]) -> JsResult<Val> {
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

pub(super) fn manager_exports(js: Js, args: &[Val]) -> JsResult<Val> {
    let handle = handle(js, args)?;
    let env = EnvState::of(js)?;
    exports::live_exports(&env, &handle.0, &handle)
}
