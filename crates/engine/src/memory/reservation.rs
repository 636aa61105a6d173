//! Address ranges that stay mapped for as long as anybody refers to them.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::region::{Platform, Region};

/// The address range of one linear memory, shared by the guest and by every view of it.
///
/// Holding one keeps the range mapped: reading and writing what was once accessible can then never
/// fault. After the guest's memory was released the pages are gone and the range reads as zeros.
#[derive(Debug)]
pub struct Reservation {
    region: Box<dyn Region>,
    /// How much of it was ever accessible, in bytes.
    committed: AtomicUsize,
}

impl Reservation {
    pub(super) fn new(platform: Platform, len: usize) -> io::Result<Self> {
        let region = (platform.reserve)(len)?;
        Ok(Self {
            region,
            committed: AtomicUsize::new(0),
        })
    }

    /// The first byte of the range.
    pub fn base(&self) -> *mut u8 {
        self.region.base()
    }

    /// Bytes of address space held, guard pages included.
    pub fn reserved_bytes(&self) -> usize {
        self.region.len()
    }

    /// Bytes from the start that may be read and written without a fault.
    pub fn accessible_bytes(&self) -> usize {
        self.committed.load(Ordering::Acquire)
    }

    /// Makes the first `len` bytes accessible. Never takes access away.
    pub(super) fn commit(&self, len: usize) -> io::Result<()> {
        let old = self.accessible_bytes();
        if len > old {
            self.region.commit(old, len - old)?;
            self.committed.store(len, Ordering::Release);
        }
        Ok(())
    }

    /// Gives all pages back; what was accessible stays so and reads as zeros.
    pub(super) fn wipe(&self) {
        self.region.wipe(self.accessible_bytes());
    }

    /// Takes away, or gives back, access to the first `len` bytes. For poll pages only.
    pub(super) fn set_accessible(&self, len: usize, accessible: bool) -> io::Result<()> {
        self.region.set_accessible(len, accessible)
    }
}
