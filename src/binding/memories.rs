//! Linear memories, and bytes read and written in them.

use std::rc::Rc;

use wasm_molt_engine::OutOfBounds;

use super::leases::{context, live_lease};
use super::{arg, handle};
use crate::env::EnvState;
use crate::js::{Js, JsResult, Val};
use crate::lease::LeaseSide;
use crate::memory::out_of_bounds;
use crate::side::{Handle, ReplicaSide};

/// Whose memory it is.
enum MemoryOf {
    Manager(Rc<Handle>),
    Lease(Rc<LeaseSide>),
    Instance(Rc<ReplicaSide>),
}

pub(super) fn manager_memory(js: Js, args: &[Val]) -> JsResult<Val> {
    js.external(MemoryOf::Manager(handle(js, args)?))
}

pub(super) fn lease_memory(js: Js, args: &[Val]) -> JsResult<Val> {
    js.external(MemoryOf::Lease(live_lease(js, args)?))
}

pub(super) fn context_memory(js: Js, args: &[Val]) -> JsResult<Val> {
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

pub(super) fn memory_byte_length(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = memory_side(js, args)?;
    js.number(side.replica.memory().map_or(0, |m| m.byte_len()) as f64)
}

pub(super) fn memory_buffer(js: Js, args: &[Val]) -> JsResult<Val> {
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

/// Where there is no memory.
fn beyond_nothing(ptr: u64, byte_length: usize) -> OutOfBounds {
    OutOfBounds {
        ptr,
        byte_length,
        memory_bytes: 0,
    }
}

/// Those bytes of the memory, which are there: asked before anything is allocated for them.
fn to_read(js: Js, args: &[Val]) -> JsResult<(Rc<ReplicaSide>, u64, usize)> {
    let side = memory_side(js, args)?;
    let (ptr, len) = range(js, args)?;
    let checked = match side.replica.memory() {
        Some(memory) => memory.check(ptr, len),
        None if len > 0 || ptr > 0 => Err(beyond_nothing(ptr, len)),
        None => Ok(()),
    };
    checked.map_err(|e| out_of_bounds(js, &e))?;
    Ok((side, ptr, len))
}

pub(super) fn memory_read(js: Js, args: &[Val]) -> JsResult<Val> {
    let (side, ptr, len) = to_read(js, args)?;
    js.new_uint8_array(len, |bytes| match side.replica.memory() {
        Some(memory) => memory.read(ptr, bytes).map_err(|e| out_of_bounds(js, &e)),
        None => Ok(()),
    })
}

pub(super) fn memory_read_string(js: Js, args: &[Val]) -> JsResult<Val> {
    let (side, ptr, len) = to_read(js, args)?;
    let bytes = match side.replica.memory() {
        Some(memory) => memory
            .read_vec(ptr, len)
            .map_err(|e| out_of_bounds(js, &e))?,
        None => Vec::new(),
    };
    js.string(&String::from_utf8_lossy(&bytes))
}

/// `(memory, ptr, bytes | string) => bytes written`
pub(super) fn memory_write(js: Js, args: &[Val]) -> JsResult<Val> {
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
    let written = match side.replica.memory() {
        Some(memory) => memory.write(ptr, &bytes),
        None => Err(beyond_nothing(ptr, bytes.len())),
    };
    written.map_err(|e| out_of_bounds(js, &e))?;
    js.number(bytes.len() as f64)
}
