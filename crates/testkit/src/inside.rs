//! Entering an instance, by each of the three rights to do so.
//!
//! The engine's own entry points are unsafe because it cannot see who holds an instance. Here the
//! right is a value that the caller must show.

use wasm_molt_engine::{FuncHandle, HostCall, Inside, Job, LeaseInside, Replica, Result, Value};

/// Calls an export from within a host function of the same instance.
pub fn call_again(call: &HostCall<'_>, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
    // SAFETY: a `HostCall` exists only while its host function runs, on the thread that holds the
    // instance; no test takes one elsewhere.
    unsafe { call_export(call.replica, name, args) }
}

/// Calls a function that came as a value, from within a host function of the same instance.
pub fn call_handle(call: &HostCall<'_>, func: &FuncHandle, args: Vec<Value>) -> Result<Vec<Value>> {
    assert_eq!(
        func.replica_id(),
        call.replica.id(),
        "a function of another instance"
    );
    // SAFETY: as above; the function is this instance's, as was just checked.
    unsafe { call.replica.call(func, args) }
}

/// Calls an export of a leased instance on the lease's own thread.
pub fn call_leased(inside: &LeaseInside, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
    // SAFETY: the guard is the proof that its thread has the instance for itself.
    unsafe { call_export(inside.replica(), name, args) }
}

/// # Safety
/// The calling thread holds the replica.
unsafe fn call_export(replica: &Replica, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
    let index = replica.module().function_index(name)?;
    let func = replica.function(index).ok_or_else(|| replica.stale())?;
    // SAFETY: contract of this function; the function is the replica's own.
    unsafe { replica.call(&func, args) }
}

/// Calls an export of the instance in slot 0 on the home thread.
pub(crate) fn call_at_home(
    _inside: &Inside<'_, Job>,
    replica: &Replica,
    name: &str,
    args: Vec<Value>,
) -> Result<Vec<Value>> {
    assert_eq!(replica.slot(), 0, "only slot 0 has a home");
    // SAFETY: the guard is the proof that this thread is inside slot 0, and its only caller shows the
    // instance that it found there after it had entered.
    unsafe { call_export(replica, name, args) }
}
