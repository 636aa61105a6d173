//! Address ranges that stay mapped for as long as anybody refers to them.

use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::region::{Platform, Region};

/// The address range of one linear memory, shared by the guest and by every view of it.
///
/// Holding one keeps the range mapped. Its accessible part shrinks only when nobody
/// [reads](Self::has_readers). After the guest's memory was released the pages are gone and the
/// range reads as zeros.
#[derive(Debug)]
pub(super) struct Reservation {
    region: Box<dyn Region>,
    /// How much of it is accessible, in bytes.
    committed: AtomicUsize,
    /// Pins through which somebody may still read.
    readers: AtomicUsize,
    /// Only pins hold it.
    is_abandoned: AtomicBool,
}

/// How many ranges only pins hold.
static ABANDONED: AtomicUsize = AtomicUsize::new(0);

impl Reservation {
    pub(super) fn new(platform: Platform, len: usize) -> io::Result<Self> {
        let region = (platform.reserve)(len)?;
        Ok(Self {
            region,
            committed: AtomicUsize::new(0),
            readers: AtomicUsize::new(0),
            is_abandoned: AtomicBool::new(false),
        })
    }

    /// The first byte of the range.
    pub(super) fn base(&self) -> *mut u8 {
        self.region.base()
    }

    /// Bytes of address space held, guard pages included.
    pub(super) fn reserved_bytes(&self) -> usize {
        self.region.len()
    }

    /// Bytes from the start that may be read and written without a fault.
    pub(super) fn accessible_bytes(&self) -> usize {
        self.committed.load(Ordering::Acquire)
    }

    /// Whether pages can be taken away and replaced by those of files.
    pub(super) fn is_mapping(&self) -> bool {
        self.region.is_mapping()
    }

    /// Whether somebody may read through a pin. Under the record's write lock nobody can begin to.
    pub(super) fn has_readers(&self) -> bool {
        self.readers.load(Ordering::Acquire) > 0
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

    /// Takes away what is accessible beyond the first `len` bytes. Where that would trap, nobody may
    /// be reading.
    pub(super) fn uncommit(&self, len: usize) -> io::Result<()> {
        let old = self.accessible_bytes();
        if len < old {
            if self.is_mapping() && self.has_readers() {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            self.region.decommit(len, old - len)?;
            self.committed.store(len, Ordering::Release);
        }
        Ok(())
    }

    /// Replaces `offset..offset + len`, of what is accessible or borders on it, by the same range of
    /// a file.
    #[cfg(target_os = "linux")]
    pub(super) fn map_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        shared: bool,
    ) -> io::Result<()> {
        self.region.map_file(offset, len, file, shared)
    }

    /// Makes the first `len` bytes accessible, and zeros. If it fails, nothing has changed.
    #[cfg(target_os = "linux")]
    pub(super) fn renew(&self, len: usize) -> io::Result<()> {
        if self.accessible_bytes() == 0 {
            return self.commit(len);
        }
        self.region.renew(len)?;
        self.claim(len);
        Ok(())
    }

    /// Says that the first `len` bytes have become accessible by mapping files over them.
    #[cfg(target_os = "linux")]
    pub(super) fn claim(&self, len: usize) {
        self.committed.fetch_max(len, Ordering::AcqRel);
    }

    /// Forgets what was written to `offset..offset + len`, whole pages: they fall back to files, or to
    /// zeros.
    #[cfg(target_os = "linux")]
    pub(super) fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        self.region.discard(offset, len)
    }

    /// Gives all pages back; what was accessible stays so and reads as zeros.
    pub(super) fn wipe(&self) {
        self.wipe_from(0);
    }

    /// The same for what comes after the first `len` bytes, a multiple of [`super::GRANULE`].
    pub(super) fn wipe_from(&self, len: usize) {
        if let Some(beyond) = self.accessible_bytes().checked_sub(len) {
            self.region.wipe(len, beyond);
        }
    }

    /// The memory has gone, or moved away, and only pins are left: gives its pages back, and the address
    /// space that no pin is about.
    pub(super) fn abandon(&self) {
        self.wipe();
        self.region.trim(self.accessible_bytes());
        if !self.is_abandoned.swap(true, Ordering::AcqRel) {
            ABANDONED.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// How many ranges of the process only pins hold. Each is a mapping; they go when JavaScript collects
    /// its buffers.
    pub(super) fn abandoned() -> usize {
        ABANDONED.load(Ordering::Acquire)
    }

    /// Takes away, or gives back, access to the first `len` bytes. For poll pages only.
    pub(super) fn set_accessible(&self, len: usize, accessible: bool) -> io::Result<()> {
        self.region.set_accessible(len, accessible)
    }

    /// Copies accessible bytes out.
    ///
    /// # Safety
    /// The caller holds the lock (or is the only owner) that keeps the range accessible.
    pub(super) unsafe fn copy_out(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        let from = self.locate(offset, out.len())?;
        // SAFETY: `locate` found the range accessible, and so it stays by contract. `out` is a Rust
        // slice and so not guest memory.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Safety
    /// As for [`Self::copy_out`].
    pub(super) unsafe fn copy_in(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let to = self.locate(offset, bytes.len())?;
        // SAFETY: as in `copy_out`, with the roles exchanged.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    fn locate(&self, offset: usize, len: usize) -> io::Result<*mut u8> {
        match offset.checked_add(len) {
            Some(end) if end <= self.accessible_bytes() => Ok(self.base().wrapping_add(offset)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.is_abandoned.load(Ordering::Acquire) {
            ABANDONED.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Keeps the address range of a memory mapped, and readable as far as it was accessible: it counts
/// as a reader until it is dropped or said to be [harmless](Self::harmless).
#[derive(Debug)]
pub struct Pin {
    home: Arc<Reservation>,
    reads: AtomicBool,
}

impl Pin {
    /// Call it under the record's lock.
    pub(super) fn new(home: Arc<Reservation>) -> Self {
        home.readers.fetch_add(1, Ordering::AcqRel);
        Self {
            home,
            reads: AtomicBool::new(true),
        }
    }

    /// Says that nobody can read or write through this pin any more, so that a memory that shrinks
    /// may take its pages away. The range stays mapped, not accessible.
    pub fn harmless(&self) {
        if self.reads.swap(false, Ordering::AcqRel) {
            self.home.readers.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The first byte of the range.
    pub fn base(&self) -> *mut u8 {
        self.home.base()
    }

    /// Bytes of address space held, guard pages included.
    pub fn reserved_bytes(&self) -> usize {
        self.home.reserved_bytes()
    }

    /// Bytes from the start that may be read and written without a fault.
    pub fn accessible_bytes(&self) -> usize {
        self.home.accessible_bytes()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.harmless();
    }
}
