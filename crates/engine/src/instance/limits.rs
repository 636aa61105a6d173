//! Limits refuse: growth beyond them fails in the guest, as the specification says.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use wasmtime::ResourceLimiter;

use crate::error::{Error, Result};

/// What one instance, and one call, may use.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    /// Bytes of one linear memory, and of the heap of references. Default: what the module declares.
    pub memory_bytes: Option<u64>,
    /// Elements of one table. Default [`Limits::DEFAULT_TABLE_ELEMENTS`].
    pub table_elements: Option<u64>,
    /// Milliseconds a call may run. Default: none.
    pub timeout_ms: Option<u64>,
    /// Fuel units for one call.
    pub fuel: Option<u64>,
    /// Bytes of native stack a call may use. Default [`Limits::DEFAULT_STACK_BYTES`].
    pub stack: Option<usize>,
}

impl Limits {
    /// What the engines of browsers and of Node allow (WebAssembly JS API, implementation limits).
    pub const DEFAULT_TABLE_ELEMENTS: u64 = 10_000_000;
    /// 512 KiB, wasmtime's own default.
    pub const DEFAULT_STACK_BYTES: usize = 512 << 10;
    const STACK_BYTES_RANGE: std::ops::RangeInclusive<usize> = (64 << 10)..=(256 << 20);

    /// What holds: the limit that was given, or the default.
    pub fn stack_bytes(&self) -> usize {
        self.stack.unwrap_or(Self::DEFAULT_STACK_BYTES)
    }

    /// What one linear memory may reach.
    pub(crate) fn memory_cap(&self) -> usize {
        cap(self.memory_bytes)
    }

    /// Refuses a module that starts beyond the limit.
    pub(crate) fn check_memory(&self, name: &str, initial_bytes: u64) -> Result<()> {
        match self.memory_bytes {
            Some(most) if initial_bytes > most => Err(Error::invalid(format!(
                "{name}: the module starts with {initial_bytes} bytes of linear memory and \
                 limits.memoryBytes is {most}; raise it to at least {initial_bytes}"
            ))),
            _ => Ok(()),
        }
    }

    pub(crate) fn check(&self, fuel_is_on: bool) -> Result<()> {
        if self.fuel.is_some() && !fuel_is_on {
            return Err(Error::invalid(
                "limits.fuel needs engine.fuel: true; without it no fuel is counted",
            ));
        }
        let stack = self.stack_bytes();
        let range = Self::STACK_BYTES_RANGE;
        if !range.contains(&stack) {
            return Err(Error::invalid(format!(
                "limits.stackBytes is {stack}; it must lie between {} and {}",
                range.start(),
                range.end()
            )));
        }
        Ok(())
    }
}

fn cap(limit: Option<u64>) -> usize {
    limit.map_or(usize::MAX, |v| usize::try_from(v).unwrap_or(usize::MAX))
}

/// Asked by wasmtime before tables are made or grown.
#[derive(Debug)]
pub(crate) struct Limiter {
    pub(crate) table_elements: usize,
    /// What the heap of references may reach: structs, arrays, exceptions, and what host references cost.
    heap_bytes: usize,
    /// Set while the instance is being made: which limit refused, for a clear error.
    pub(crate) refused: Option<String>,
    /// How large a memory was whose growth was refused last; 0 for none.
    pub(crate) refused_growth_of: Arc<AtomicUsize>,
}

impl Limiter {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            table_elements: cap(Some(
                limits
                    .table_elements
                    .unwrap_or(Limits::DEFAULT_TABLE_ELEMENTS),
            )),
            heap_bytes: limits.memory_cap(),
            refused: None,
            refused_growth_of: Arc::default(),
        }
    }
}

/// The poll page is made as a memory of one page, and a heap may begin with as much.
const PAGE: usize = 65_536;

impl ResourceLimiter for Limiter {
    /// Linear memories have limits of their own (`MemoryRecord::set_limit_bytes`), which are no higher:
    /// wasmtime asks here for the heap of references as well, which has no other, and for the poll page;
    /// and not at all for shared memories.
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let fits = desired <= self.heap_bytes || (current == 0 && desired <= PAGE);
        if !fits {
            self.refused_growth_of.store(current, Ordering::Release);
        }
        Ok(fits)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let fits = desired <= self.table_elements;
        if !fits && current == 0 {
            self.refused = Some(format!(
                "the module starts with a table of {desired} elements and limits.tableElements is {}; \
                 raise it to at least {desired}",
                self.table_elements
            ));
        }
        Ok(fits)
    }

    fn instances(&self) -> usize {
        usize::MAX
    }

    fn tables(&self) -> usize {
        usize::MAX
    }

    fn memories(&self) -> usize {
        usize::MAX
    }
}
