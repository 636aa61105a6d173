//! Memory discard: what guests import that give pages of theirs back to the system.
//!
//! `memory.discard` is a proposal (WebAssembly/memory-control); toolchains that want it today import a
//! function. Who gives none of their own gets this one.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result, TrapInfo};
use crate::instance::host::{HostCall, HostFunction};
use crate::instance::memory::MemoryRecord;
use crate::instance::module::{Import, ImportKind};
use crate::instance::value::{Value, ValueType};

/// What such a function is called, whatever the module that it is imported from.
const NAMES: [&str; 3] = [
    "__wbindgen_memory_discard",
    "memory_discard",
    "__memory_discard",
];

/// Whose bytes are meant, once the instance is there.
pub(crate) type DiscardCell = Arc<OnceLock<Arc<MemoryRecord>>>;

#[derive(Default)]
struct Discard(DiscardCell);

/// The same for the first memory of one instance.
pub(crate) fn discard_of() -> (Arc<dyn HostFunction>, DiscardCell) {
    let cell = DiscardCell::default();
    (Arc::new(Discard(Arc::clone(&cell))), cell)
}

/// `(address, byteLength)`: those bytes of the guest's memory become zeros, and whole pages among them go
/// back to the system.
pub fn memory_discard() -> Arc<dyn HostFunction> {
    Arc::new(Discard::default())
}

impl Import {
    /// Whether [`memory_discard`] can stand in for it.
    pub fn is_discard(&self) -> bool {
        let ImportKind::Function(signature) = &self.kind else {
            return false;
        };
        let is_known = NAMES.contains(&self.name.as_str());
        let takes = |ty| *signature.params == [ty, ty];
        let has_type = takes(ValueType::I32) || takes(ValueType::I64);
        is_known && has_type && signature.results.is_empty()
    }
}

impl HostFunction for Discard {
    fn call(&self, call: &mut HostCall<'_>) -> Result<()> {
        let number = |value: Option<&Value>| match value {
            Some(Value::I32(v)) => u64::from(v.cast_unsigned()),
            Some(Value::I64(v)) => v.cast_unsigned(),
            _ => u64::MAX,
        };
        let (address, len) = (number(call.args.first()), number(call.args.get(1)));
        let memory = self.0.get().or_else(|| call.replica.memory());
        let done = memory.map(|memory| memory.discard(address, len));
        match done {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::Trap {
                what: format!("{}: memory discard", call.replica.module().name()),
                info: Box::new(TrapInfo {
                    kind: "out-of-bounds-memory",
                    message: format!(
                        "{len} bytes at {address} are not all inside the linear memory"
                    ),
                    wasm_stack: String::new(),
                }),
            }),
        }
    }
}
