//! What an operating system has to offer for a linear memory.

use std::fmt::Debug;
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::BorrowedFd;

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

    /// Gives `offset..offset + len` back: it reads as zero when it is committed again, and traps
    /// until then if the region is a mapping. Multiples of [`super::GRANULE`].
    fn decommit(&self, offset: usize, len: usize) -> io::Result<()>;

    /// Whether it consists of pages of its own, which can be taken away and replaced.
    fn is_mapping(&self) -> bool;

    /// Replaces `offset..offset + len` by the same range of a file, readable and writable; writes
    /// reach the file only if `shared`.
    #[cfg(target_os = "linux")]
    fn map_file(
        &self,
        _offset: usize,
        _len: usize,
        _file: BorrowedFd<'_>,
        _shared: bool,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Puts fresh zero pages in the place of the first `len` bytes. If it fails, nothing has changed.
    #[cfg(target_os = "linux")]
    fn renew(&self, _len: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Forgets what was written to `offset..offset + len`, whole pages: they fall back to files, or to
    /// zeros.
    #[cfg(target_os = "linux")]
    fn discard(&self, _offset: usize, _len: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Gives the pages of `offset..offset + len` back; from then on they read as zero. Must not fail in
    /// a way that leaves a committed byte inaccessible.
    fn wipe(&self, offset: usize, len: usize);

    /// Gives the address space behind the first `len` bytes back. Nobody asks for it any more.
    fn trim(&self, _len: usize) {}

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
