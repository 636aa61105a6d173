//! Memories of a realm, for the host.

use std::sync::Arc;

use wasmtime::{MemoryTypeBuilder, StoreContextMut};

use super::{GrownBy, NO_THREADS, unknown};
use crate::error::{Error, ErrorCode, Result};
use crate::instance::memory::{AnyMemory, MemoryRecord, new_memory, with_plan};
use crate::instance::module::ExportType;
use crate::instance::replica::{Guest, Replica};

impl Replica {
    /// A new memory, with sizes in pages. Answers its number.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for sizes that cannot be had.
    pub unsafe fn realm_memory_new(
        &self,
        initial: u64,
        maximum: Option<u64>,
        (is_shared, is_64): (bool, bool),
    ) -> Result<u32> {
        let make = |context: &mut StoreContextMut<'_, Guest>| {
            if is_shared && !self.module().engine.options.threads {
                return Err(Error::new(ErrorCode::Link, NO_THREADS));
            }
            let mut realm = self.realm()?;
            let limits = realm.limits.clone();
            limits.check_memory("a memory", initial.saturating_mul(1 << 16))?;
            let refused = |error: wasmtime::Error| {
                Error::invalid(format!(
                    "a memory of {initial} pages cannot be made: {error:#}"
                ))
            };
            let ty = MemoryTypeBuilder::default()
                .memory64(is_64)
                .shared(is_shared)
                .min(initial)
                .max(maximum)
                .build()
                .map_err(refused)?;
            let made = with_plan(realm.plan(1, false), || new_memory(&mut *context, &ty));
            let memory = AnyMemory::of(made.0.map_err(refused)?);
            let record = made.1.guests.into_iter().next();
            let (Some(memory), Some(record)) = (memory, record) else {
                return Err(Error::internal("a memory that was not made"));
            };
            record.set_limit_bytes(limits.memory_cap());
            Ok(realm.add_memory(memory, record, &*context))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(make) }
    }

    /// Grows a memory by pages; answers how many it had, `None` if that is refused.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released.
    pub unsafe fn realm_memory_grow(&self, id: u32, delta: u64) -> Result<Option<u64>> {
        let grow = |context: &mut StoreContextMut<'_, Guest>| {
            let mut realm = self.realm()?;
            let memory = realm.memories.get_mut(id as usize);
            let memory = memory.ok_or_else(|| unknown("memory", id))?;
            memory.look();
            let grown = memory.memory.grow(&mut *context, delta).ok();
            if grown.is_some() && delta > 0 {
                if memory.grown_by == GrownBy::Nobody {
                    memory.grown_by = GrownBy::Host;
                }
                memory.len_seen = memory.record.byte_len();
            }
            Ok(grown)
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(grow) }
    }

    /// What the host knows of a memory. Any thread.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] for a number that means nothing.
    pub fn realm_memory(&self, id: u32) -> Result<Arc<MemoryRecord>> {
        let realm = self.realm()?;
        let memory = realm.memories.get(id as usize).map(|it| &it.record);
        let memory = memory.or_else(|| realm.gone.get(id as usize));
        Ok(Arc::clone(memory.ok_or_else(|| unknown("memory", id))?))
    }

    /// The type of a memory; its minimum is the size of now. Any thread.
    ///
    /// # Errors
    /// As [`Self::realm_memory`].
    pub fn realm_memory_type(&self, id: u32) -> Result<ExportType> {
        let realm = self.realm()?;
        let memory = realm.memories.get(id as usize);
        let memory = memory.ok_or_else(|| unknown("memory", id))?;
        Ok(ExportType::Memory {
            minimum: memory.record.byte_len() as u64 >> 16,
            maximum: memory.maximum,
            shared: memory.memory.shared().is_some(),
            is_64: memory.is_64,
        })
    }

    /// Whether other threads may have that memory. Any thread.
    pub fn realm_memory_is_shared(&self, id: u32) -> bool {
        self.realm().is_ok_and(|realm| {
            let memory = realm.memories.get(id as usize);
            memory.is_some_and(|it| it.memory.shared().is_some())
        })
    }

    /// How many memories there are. Any thread.
    pub fn realm_memories(&self) -> usize {
        self.realm().map_or(0, |realm| realm.memories.len())
    }
}
