//! Snapshots, resets and forks.

use std::rc::Rc;
use std::sync::Arc;

use wasm_molt_engine::{ResetOptions, Snapshot, SnapshotControl};

use super::{arg, refused, side, with_abort};
use crate::deferred::{Deferred, Done};
use crate::env::EnvState;
use crate::js::{Js, JsResult, Val};
use crate::options;
use crate::report;
use crate::side::ManagerSide;

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
pub(super) fn snapshot(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let (promise, done) = pausing(&env, &side, snapshot_object)?;
    let control = side.manager.snapshot(done);
    with_abort(js, promise, true, control)
}

/// `(handle) => Snapshot`
pub(super) fn snapshot_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let taken = side.manager.snapshot_now(Some(&side.home));
    let taken = taken.map_err(|e| env.throw(&e, &side.place()))?;
    snapshot_object(&env, &side, taken)
}

/// `cancelSnapshot(handle, control)`
pub(super) fn cancel_snapshot(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = side(js, args)?;
    // SAFETY: `index.js` passes the second half of what `snapshot` returned.
    let control = unsafe { js.external_ref::<SnapshotControl>(arg(args, 1)) }?;
    control.cancel(&side.manager);
    Ok(js.undefined())
}

/// `(handle) => void`: the snapshot that was asked for is wanted.
pub(super) fn snapshot_accept(js: Js, args: &[Val]) -> JsResult<Val> {
    side(js, args)?.manager.accept_snapshot();
    Ok(js.undefined())
}

/// `(snapshot) => [id, generation, memoryBytes]`: what does not change.
pub(super) fn snapshot_facts(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn snapshot_resident_bytes(js: Js, args: &[Val]) -> JsResult<Val> {
    // SAFETY: `index.js` passes what `makeSnapshot` was given.
    let it = unsafe { js.external_ref::<SnapshotSide>(arg(args, 0)) }?;
    js.number(it.snapshot.resident_bytes() as f64)
}

/// `(snapshot) => void`
pub(super) fn snapshot_release(js: Js, args: &[Val]) -> JsResult<Val> {
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
pub(super) fn reset(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let options = reset_options(&env, &side, args)?;
    let (promise, done) = pausing(&env, &side, |env, _, it| report::reset(env.js(), &it))?;
    side.manager.reset(options, done);
    Ok(promise)
}

/// `(handle, options, to?) => ResetReport`
pub(super) fn reset_sync(js: Js, args: &[Val]) -> JsResult<Val> {
    let env = EnvState::of(js)?;
    let side = side(js, args)?;
    let options = reset_options(&env, &side, args)?;
    let done = side.manager.reset_now(Some(&side.home), &options);
    let done = done.map_err(|e| env.throw(&e, &side.place()))?;
    report::reset(js, &done)
}

/// `(handle, child) => Promise<void> | undefined`: starts the child as a copy, here and now if it can be.
pub(super) fn fork(js: Js, args: &[Val]) -> JsResult<Val> {
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
