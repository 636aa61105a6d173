//! The functions that `index.js` is written over. Handles are externals; nothing here is public.

use std::rc::Rc;

use crate::env::EnvState;
use crate::error::Place;
use crate::exports;
use crate::js::{Js, JsResult, Native, Pending, Val};
use crate::options::Refused;
use crate::side::{Handle, ManagerSide};

mod calls;
mod leases;
mod managers;
mod memories;
mod snapshots;

/// Every function, by the name `index.js` uses.
pub(crate) const FUNCTIONS: &[(&str, Native)] = &[
    ("isSetUp", is_set_up),
    ("newScratch", new_scratch),
    ("setup", set_up),
    ("isBusy", is_busy),
    ("settleHost", settle_host),
    ("look", look),
    ("newManager", managers::new_manager),
    ("start", managers::start),
    ("startSync", managers::start_sync),
    ("name", managers::name),
    ("generation", managers::generation),
    ("state", managers::state),
    ("stats", managers::stats),
    ("call", calls::call),
    ("callSync", calls::call_sync),
    ("invoke", calls::invoke),
    ("exports", leases::manager_exports),
    ("abort", calls::abort),
    ("acquire", leases::acquire),
    ("cancelAcquire", leases::cancel_acquire),
    ("reload", managers::reload),
    ("reloadSync", managers::reload_sync),
    ("snapshot", snapshots::snapshot),
    ("snapshotSync", snapshots::snapshot_sync),
    ("cancelSnapshot", snapshots::cancel_snapshot),
    ("snapshotAccept", snapshots::snapshot_accept),
    ("snapshotFacts", snapshots::snapshot_facts),
    ("snapshotResidentBytes", snapshots::snapshot_resident_bytes),
    ("snapshotRelease", snapshots::snapshot_release),
    ("reset", snapshots::reset),
    ("resetSync", snapshots::reset_sync),
    ("fork", snapshots::fork),
    ("setMemoryBudget", managers::set_memory_budget),
    ("watchSteps", managers::watch_steps),
    ("wouldWait", managers::would_wait),
    ("close", managers::close),
    ("destroy", managers::destroy),
    ("leaseGeneration", leases::lease_generation),
    ("leaseExports", leases::lease_exports),
    ("leaseCall", leases::lease_call),
    ("leaseRelease", leases::lease_release),
    ("contextGeneration", leases::context_generation),
    ("contextExports", leases::context_exports),
    ("managerMemory", memories::manager_memory),
    ("leaseMemory", memories::lease_memory),
    ("contextMemory", memories::context_memory),
    ("memoryByteLength", memories::memory_byte_length),
    ("memoryBuffer", memories::memory_buffer),
    ("memoryRead", memories::memory_read),
    ("memoryReadString", memories::memory_read_string),
    ("memoryWrite", memories::memory_write),
    ("leaseRealm", leases::lease_realm),
    ("managerRealm", leases::manager_realm),
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
