//! What an operating system has to offer for a linear memory.

use std::fmt::Debug;
use std::io;

/// An exclusively owned range of address space, given back on drop.
///
/// # Safety
///
/// `base()..base() + len()` belongs to the region alone and stays mapped, at the same address,
/// until it is dropped. Pages below the highest `commit` read as zero until they are written.
pub(super) unsafe trait Region: Send + Sync + Debug {
    /// The first byte, aligned to [`super::GRANULE`] or to a page of the host, whichever is
    /// smaller.
    fn base(&self) -> *mut u8;

    /// The length of the range in bytes.
    fn len(&self) -> usize;

    /// Makes `offset..offset + len` readable and writable. Multiples of [`super::GRANULE`], inside
    /// the region.
    fn commit(&self, offset: usize, len: usize) -> io::Result<()>;

    /// Gives the pages of the first `len` bytes back; from then on they read as zero and writes go
    /// nowhere that matters. Must not fail in a way that leaves a committed byte inaccessible.
    fn wipe(&self, len: usize);

    /// Takes access to the first `len` bytes away, or gives it back.
    fn set_accessible(&self, len: usize, accessible: bool) -> io::Result<()>;
}

/// The way to reserve address space on one kind of system.
#[derive(Clone, Copy, Debug)]
pub(super) struct Platform {
    /// Whether an access to uncommitted address space faults, so that guard pages and poll pages
    /// work.
    pub(super) guards: bool,
    /// Reserves a range of that many bytes; none of them accessible if `guards`.
    pub(super) reserve: fn(usize) -> io::Result<Box<dyn Region>>,
}

impl Platform {
    /// The platform we run on.
    pub(super) const NATIVE: Self = {
        #[cfg(unix)]
        {
            super::sys_unix::PLATFORM
        }
        #[cfg(not(unix))]
        {
            super::sys_portable::PLATFORM
        }
    };
}
