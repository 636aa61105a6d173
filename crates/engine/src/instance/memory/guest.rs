//! The memory that wasmtime works with.

use std::io;
use std::sync::Arc;

use super::home::{Start, let_go};
use super::record::MemoryRecord;
use super::region::Platform;

/// How a memory may be laid out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) platform: Platform,
    /// Bytes at the start, unless an image says otherwise; what wasmtime asked for.
    pub(super) minimum: usize,
    /// Bytes it can reach at first without moving.
    pub(super) capacity: usize,
    /// Inaccessible bytes behind the capacity.
    pub(super) guard: usize,
    /// Bytes it may ever reach.
    pub(super) maximum: usize,
    /// Whether the base may change, by growth or by a reset.
    pub(super) movable: bool,
}

/// A guest's linear memory, owned by a store. What it answers is the record's, which a reset changes
/// behind wasmtime's back.
#[derive(Debug)]
pub(super) struct GuestMemory {
    record: Arc<MemoryRecord>,
}

impl GuestMemory {
    pub(super) fn new(layout: Layout, start: &Start) -> io::Result<Self> {
        let record = Arc::new(MemoryRecord::new(layout, start)?);
        Ok(Self { record })
    }

    pub(super) fn record(&self) -> &Arc<MemoryRecord> {
        &self.record
    }
}

// SAFETY: the base is aligned to a host page; `byte_size` bytes from it are committed and the
// capacity and guard behind them reserved for this memory alone until it is dropped. New pages are
// zero: fresh, or wiped. Only growth and resets change base and size; after a reset nothing runs
// before wasmtime was made to ask again (`MemoryRecord::reset`).
unsafe impl wasmtime::LinearMemory for GuestMemory {
    fn byte_size(&self) -> usize {
        self.record.byte_len()
    }

    fn byte_capacity(&self) -> usize {
        self.record.capacity()
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        Ok(self.record.grow(new_size)?)
    }

    fn as_ptr(&self) -> *mut u8 {
        self.record.base()
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        if let Some(home) = self.record.release() {
            let_go(home);
        }
    }
}
