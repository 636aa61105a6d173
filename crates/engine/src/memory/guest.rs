//! The memory that wasmtime works with.

use std::io;
use std::ptr;
use std::sync::Arc;

use super::record::MemoryRecord;
use super::region::Platform;
use super::reservation::Reservation;
use super::round_up;

/// How a memory may be laid out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) platform: Platform,
    /// Bytes at the start; what wasmtime asked for.
    pub(super) minimum: usize,
    /// Bytes it can reach without moving.
    pub(super) capacity: usize,
    /// Inaccessible bytes behind the capacity.
    pub(super) guard: usize,
    /// Bytes it may ever reach.
    pub(super) maximum: usize,
    /// Whether compiled code expects the base to change.
    pub(super) movable: bool,
}

/// A guest's linear memory, owned by a store.
#[derive(Debug)]
pub(super) struct GuestMemory {
    record: Arc<MemoryRecord>,
    layout: Layout,
    base: *mut u8,
    len: usize,
}

// SAFETY: the address is that of the reservation which `record` keeps mapped until this value is
// dropped.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; `&self` methods only read the fields.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    pub(super) fn new(layout: Layout) -> io::Result<Self> {
        let home = reserve(&layout, layout.capacity, layout.minimum)?;
        let base = home.base();
        let record = Arc::new(MemoryRecord::new(home, layout.minimum));
        Ok(Self {
            record,
            layout,
            base,
            len: layout.minimum,
        })
    }

    pub(super) fn record(&self) -> &Arc<MemoryRecord> {
        &self.record
    }

    fn grow(&mut self, new_size: usize) -> io::Result<()> {
        if new_size > self.record.limit_bytes() {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "the memory's limit is reached",
            ));
        }
        if new_size <= self.layout.capacity {
            let committed = round_up(new_size).ok_or(io::ErrorKind::OutOfMemory)?;
            let home = self.record.reservation().ok_or(io::ErrorKind::NotFound)?;
            home.commit(committed)?;
            self.record.resized(new_size);
        } else {
            self.relocate(new_size)?;
        }
        self.len = new_size;
        Ok(())
    }

    /// Grows beyond the reservation: a larger one, and the contents copied over.
    fn relocate(&mut self, new_size: usize) -> io::Result<()> {
        if !self.layout.movable || new_size > self.layout.maximum {
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                "the memory cannot grow beyond its reservation",
            ));
        }
        let least = round_up(new_size).ok_or(io::ErrorKind::OutOfMemory)?;
        // Half as much again, so that growing page by page does not copy at every step.
        let roomy = least
            .saturating_add((least / 2).next_multiple_of(super::GRANULE))
            .min(self.layout.maximum.max(least));
        let roomy = round_up(roomy).unwrap_or(least);
        let (home, capacity) = match reserve(&self.layout, roomy, new_size) {
            Ok(home) => (home, roomy),
            Err(_) => (reserve(&self.layout, least, new_size)?, least),
        };
        let base = home.base();
        let (from, len) = (self.base, self.len);
        let old = self.record.moved(home, new_size, |new| {
            // SAFETY: `len` bytes are committed in the old reservation, which `record` still holds,
            // and in the new, larger one. They are different mappings. The guest does not run: it
            // is the one that asked for growth.
            unsafe { ptr::copy_nonoverlapping(from.cast_const(), new.base(), len) };
        });
        let_go(old);
        self.base = base;
        self.layout.capacity = capacity;
        Ok(())
    }
}

/// A reservation of that capacity plus the guard, with the first `accessible` bytes committed.
fn reserve(layout: &Layout, capacity: usize, accessible: usize) -> io::Result<Arc<Reservation>> {
    let total = capacity
        .checked_add(layout.guard)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let home = Reservation::new(layout.platform, total.max(super::GRANULE))?;
    home.commit(round_up(accessible).ok_or(io::ErrorKind::OutOfMemory)?)?;
    Ok(Arc::new(home))
}

/// Gives the pages back now; the address range only if nobody holds a pin.
fn let_go(home: Option<Arc<Reservation>>) {
    if let Some(home) = home {
        // The record no longer hands out pins, so a count of one cannot rise again.
        if Arc::strong_count(&home) > 1 {
            home.wipe();
        }
    }
}

// SAFETY: the base is aligned to a host page; `byte_size` bytes from it are committed and the
// capacity and guard behind them reserved for this memory alone until it is dropped. New pages are
// zero: fresh, or wiped.
unsafe impl wasmtime::LinearMemory for GuestMemory {
    fn byte_size(&self) -> usize {
        self.len
    }

    fn byte_capacity(&self) -> usize {
        self.layout.capacity
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        Ok(self.grow(new_size)?)
    }

    fn as_ptr(&self) -> *mut u8 {
        self.base
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        let_go(self.record.release());
    }
}
