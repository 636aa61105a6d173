//! Reservations as plain zeroed allocations, for systems without a variant of their own.
//!
//! No guard pages, so the engine compiles explicit bounds checks, and no poll pages, so it
//! interrupts by epochs.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::ptr::{self, NonNull};

use super::region::{Platform, Region};
use crate::scarcity;

pub(super) const PLATFORM: Platform = Platform {
    guards: false,
    reserve,
};

/// A page of most hosts; nothing here depends on more.
const ALIGN: usize = 1 << 12;

/// A zeroed allocation.
#[derive(Debug)]
struct Allocation {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the allocation is owned by this value and reached through raw pointers only.
unsafe impl Send for Allocation {}
// SAFETY: as above; `&self` methods hand out the address or overwrite bytes, which callers accept
// as racy.
unsafe impl Sync for Allocation {}

fn reserve(len: usize) -> io::Result<Box<dyn Region>> {
    scarcity::memory()?;
    let layout = Layout::from_size_align(len.max(ALIGN), ALIGN)
        .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    // SAFETY: the layout's size is not zero.
    let base = unsafe { alloc_zeroed(layout) };
    let base = NonNull::new(base).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    Ok(Box::new(Allocation { base, layout }))
}

// SAFETY: the allocator returned the block for us alone and only `drop` frees it; it begins as
// zeros.
unsafe impl Region for Allocation {
    fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn len(&self) -> usize {
        self.layout.size()
    }

    fn commit(&self, offset: usize, len: usize) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.layout.size() => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn decommit(&self, offset: usize, len: usize) -> io::Result<()> {
        self.commit(offset, len)?;
        // SAFETY: `commit` found the range inside the block, which is ours.
        unsafe { ptr::write_bytes(self.base.as_ptr().add(offset), 0, len) };
        Ok(())
    }

    fn is_mapping(&self) -> bool {
        false
    }

    fn wipe(&self, offset: usize, len: usize) {
        if self.commit(offset, len).is_ok() {
            // SAFETY: `commit` found the range inside the block, which is ours.
            unsafe { ptr::write_bytes(self.base.as_ptr().add(offset), 0, len) };
        }
    }

    fn set_accessible(&self, _len: usize, _accessible: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody can reach it any more.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}
