//! From wasmtime's one error type to the different ends of a call.

use std::fmt::Write as _;

use wasmtime::{ThrownException, Trap, WasmBacktrace};

use crate::error::{Error, ErrorCode, TrapInfo, UNCAUGHT_EXCEPTION};
use crate::instance::interrupt::Stop;
use crate::instance::memory::is_poll_fault;

/// The heap of references, or the guest's own allocator, has no room.
pub(crate) const ALLOCATION_FAILED: &str = "allocation-failed";

/// Sorts out why a run of the guest failed.
///
/// * `stop`: the stop that was asked of this run, if any: its fault looks like a trap.
pub(crate) fn triage(
    error: wasmtime::Error,
    what: &str,
    stop: Option<Stop>,
    fuel: Option<u64>,
) -> Error {
    let error = match error.downcast::<Error>() {
        Ok(ours) => return ours,
        Err(other) => other,
    };
    let trap = error.downcast_ref::<Trap>().copied();
    if let Some(stop) = stop
        && (trap == Some(Trap::Interrupt) || is_poll_fault(&error))
    {
        return stop.into_error(what);
    }
    if trap == Some(Trap::OutOfFuel) {
        let fuel = fuel.unwrap_or_default();
        return Error::new(
            ErrorCode::OutOfFuel,
            format!("{what} used up limits.fuel = {fuel}; the instance is replaced"),
        );
    }
    let wasm_stack = error
        .downcast_ref::<WasmBacktrace>()
        .map(frames)
        .unwrap_or_default();
    let (kind, message) = match trap {
        Some(trap) => (kind_of(trap), trap.to_string()),
        None if error.is::<ThrownException>() => (
            UNCAUGHT_EXCEPTION,
            "the guest threw an exception that nobody caught".into(),
        ),
        None if error.is::<wasmtime::GcHeapOutOfMemory<()>>() => (
            ALLOCATION_FAILED,
            "the heap of references is full; limits.memoryBytes bounds it".into(),
        ),
        None => return Error::internal(format_args!("{what}: {error:#}")),
    };
    Error::Trap {
        what: what.into(),
        info: Box::new(TrapInfo {
            kind,
            message,
            wasm_stack,
        }),
    }
}

fn kind_of(trap: Trap) -> &'static str {
    match trap {
        Trap::StackOverflow => "stack-overflow",
        Trap::MemoryOutOfBounds => "out-of-bounds-memory",
        Trap::HeapMisaligned => "unaligned-atomic",
        Trap::TableOutOfBounds => "out-of-bounds-table",
        Trap::IndirectCallToNull => "indirect-call-to-null",
        Trap::BadSignature => "indirect-call-type-mismatch",
        Trap::IntegerOverflow => "integer-overflow",
        Trap::IntegerDivisionByZero => "integer-divide-by-zero",
        Trap::BadConversionToInteger => "invalid-conversion-to-integer",
        Trap::UnreachableCodeReached => "unreachable",
        Trap::Interrupt => "interrupt",
        Trap::AtomicWaitNonSharedMemory => "atomic-wait-on-unshared-memory",
        Trap::NullReference => "null-reference",
        Trap::ArrayOutOfBounds => "out-of-bounds-array",
        Trap::AllocationTooLarge => "allocation-too-large",
        Trap::CastFailure => "cast-failure",
        _ => "other",
    }
}

fn frames(backtrace: &WasmBacktrace) -> String {
    let mut text = String::new();
    for frame in backtrace.frames() {
        let module = frame.module().name().unwrap_or("wasm");
        let name = frame
            .func_name()
            .map_or_else(|| format!("function[{}]", frame.func_index()), demangle);
        let offset = frame.module_offset().unwrap_or_default();
        let _ = writeln!(
            text,
            "    at {name} ({module}:wasm-function[{}]:0x{offset:x})",
            frame.func_index()
        );
    }
    text
}

/// wasmtime demangles only when it prints; frames are wanted one by one.
fn demangle(name: &str) -> String {
    rustc_demangle::try_demangle(name)
        .map(|demangled| format!("{demangled:#}"))
        .ok()
        .or_else(|| cpp_demangle::Symbol::new(name).ok()?.demangle().ok())
        .unwrap_or_else(|| name.to_owned())
}
