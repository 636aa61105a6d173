//! Calls that the pool runs.

use std::rc::Rc;
use std::sync::Arc;

use wasm_molt_engine::{
    CallControl, CallLimits, Error, ErrorCode, Module, Outcome, Settle, Stop, Work,
};

use super::{arg, handle, refused, side, with_abort};
use crate::convert::cannot_cross;
use crate::deferred::Deferred;
use crate::env::EnvState;
use crate::exports;
use crate::js::{Js, JsResult, Val};
use crate::options;
use crate::side::ManagerSide;

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

pub(super) fn values_out(
    env: &Rc<EnvState>,
    side: &Rc<ManagerSide>,
    outcome: Outcome,
) -> JsResult<Val> {
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

/// `(handle, name, args, timeoutMs, canAbort) => Promise | [Promise, control]`
pub(super) fn call(js: Js, args: &[Val]) -> JsResult<Val> {
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

pub(super) fn call_work(
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
pub(super) fn call_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let handle = handle(js, args)?;
    let module = serving(&env, &handle.0)?;
    let index = function_index(&env, &handle.0, &module, arg(args, 1))?;
    exports::call_sync(&env, &handle, index, arg(args, 2))
}

/// `(handle, name, input, timeoutMs, canAbort) => Promise | [Promise, control]`
pub(super) fn invoke(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn abort(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    // SAFETY: `index.js` passes the second half of what `with_abort` returned.
    let control = unsafe { js.external_ref::<Option<Arc<CallControl>>>(arg(args, 0)) }?;
    if let Some(control) = control {
        control.stop(Stop::Aborted(env.keep(arg(args, 1))?));
    }
    Ok(js.undefined())
}
