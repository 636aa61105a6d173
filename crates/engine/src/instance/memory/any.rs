//! A linear memory as wasmtime hands it out: of one store, or shared between several.

use wasmtime::{AsContext, AsContextMut, Extern, Memory, MemoryType, SharedMemory};

/// Either kind.
#[derive(Debug, Clone)]
pub(crate) enum AnyMemory {
    /// Of one store.
    Own(Memory),
    /// Of nobody: each store that imports it has the same one.
    Shared(SharedMemory),
}

impl AnyMemory {
    pub(crate) fn of(found: Extern) -> Option<Self> {
        match found {
            Extern::Memory(memory) => Some(Self::Own(memory)),
            Extern::SharedMemory(memory) => Some(Self::Shared(memory)),
            _ => None,
        }
    }

    pub(crate) fn shared(&self) -> Option<&SharedMemory> {
        match self {
            Self::Own(_) => None,
            Self::Shared(memory) => Some(memory),
        }
    }

    pub(crate) fn ty(&self, context: impl AsContext) -> MemoryType {
        match self {
            Self::Own(memory) => memory.ty(context),
            Self::Shared(memory) => memory.ty(),
        }
    }

    /// Grows it by pages, on behalf of the guest; by none, compiled code hears of size and address anew.
    pub(crate) fn grow(&self, context: impl AsContextMut, delta: u64) -> wasmtime::Result<u64> {
        match self {
            Self::Own(memory) => memory.grow(context, delta),
            Self::Shared(memory) => memory.grow(delta),
        }
    }
}

impl From<AnyMemory> for Extern {
    fn from(memory: AnyMemory) -> Self {
        match memory {
            AnyMemory::Own(memory) => memory.into(),
            AnyMemory::Shared(memory) => memory.into(),
        }
    }
}
