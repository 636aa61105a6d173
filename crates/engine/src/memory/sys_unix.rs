//! Reservations by `mmap`: address space first, pages when they are committed.

use std::ffi::c_void;
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::region::{Platform, Region};

pub(super) const PLATFORM: Platform = Platform {
    guards: true,
    reserve,
};

/// A private anonymous mapping.
#[derive(Debug)]
struct Mapping {
    base: *mut c_void,
    len: usize,
    /// What is left of it.
    kept: AtomicUsize,
}

// SAFETY: the mapping is plain address space, owned by this value; its methods are system calls
// that any thread may make.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&self` methods change only protection and contents of pages, which the kernel
// serialises.
unsafe impl Sync for Mapping {}

/// Swap space is not set aside for address space that may never be used.
fn flags() -> MapFlags {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        MapFlags::PRIVATE | MapFlags::NORESERVE
    }
    #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
    {
        MapFlags::PRIVATE
    }
}

fn reserve(len: usize) -> io::Result<Box<dyn Region>> {
    // SAFETY: a new anonymous mapping at an address of the kernel's choosing touches no memory of
    // ours.
    let base = unsafe { mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), flags()) }?;
    Ok(Box::new(Mapping {
        base,
        len,
        kept: AtomicUsize::new(len),
    }))
}

impl Mapping {
    /// The address `offset` bytes in; the end of what is left of the mapping at most.
    fn at(&self, offset: usize, len: usize) -> io::Result<*mut c_void> {
        match offset.checked_add(len) {
            Some(end) if end <= self.kept.load(Ordering::Acquire) => {
                Ok(self.base.wrapping_byte_add(offset))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn protect(&self, offset: usize, len: usize, flags: MprotectFlags) -> io::Result<()> {
        let start = self.at(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the range lies inside a mapping that is ours alone. Rust never holds references
        // into it; the raw accesses that host code makes stay below the committed size, and taking
        // access away is only done to poll pages.
        unsafe { mprotect(start, len, flags) }?;
        Ok(())
    }
}

// SAFETY: `mmap` returned the range for us alone and only `drop` unmaps it; anonymous pages begin
// as zeros.
unsafe impl Region for Mapping {
    fn base(&self) -> *mut u8 {
        self.base.cast()
    }

    fn len(&self) -> usize {
        self.len
    }

    fn commit(&self, offset: usize, len: usize) -> io::Result<()> {
        self.protect(offset, len, MprotectFlags::READ | MprotectFlags::WRITE)
    }

    fn decommit(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.at(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        // A fresh mapping, so that the range joins the rest of the reservation again.
        // SAFETY: MAP_FIXED replaces pages of our own mapping only, and whoever could still access
        // them was asked about first (`Reservation::uncommit`).
        unsafe { mmap_anonymous(start, len, ProtFlags::empty(), flags() | MapFlags::FIXED) }?;
        Ok(())
    }

    fn is_mapping(&self) -> bool {
        true
    }

    #[cfg(target_os = "linux")]
    fn map_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        shared: bool,
    ) -> io::Result<()> {
        let start = self.at(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let kind = if shared {
            MapFlags::SHARED
        } else {
            MapFlags::PRIVATE
        };
        // SAFETY: MAP_FIXED replaces pages of our own mapping only; accesses that run meanwhile see
        // the old pages or the new ones, both readable and writable.
        unsafe {
            rustix::mm::mmap(
                start,
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                kind | MapFlags::NORESERVE | MapFlags::FIXED,
                file,
                offset as u64,
            )
        }?;
        Ok(())
    }

    #[cfg(target_os = "linux")]
    fn renew(&self, len: usize) -> io::Result<()> {
        let start = self.at(0, len)?;
        if len == 0 {
            return Ok(());
        }
        let flags = flags() | MapFlags::FIXED;
        // SAFETY: as for `map_file`.
        unsafe { mmap_anonymous(start, len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        Ok(())
    }

    #[cfg(target_os = "linux")]
    fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.at(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the pages are our own, nothing in Rust refers to them, and what they fall back to
        // is the file below, or zeros.
        unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxDontNeed) }?;
        Ok(())
    }

    fn wipe(&self, offset: usize, len: usize) {
        let Ok(start) = self.at(offset, len) else {
            return;
        };
        if len == 0 {
            return;
        }
        // A fresh mapping and not madvise: it reads as zeros whatever was mapped there, on every
        // Unix. SAFETY: MAP_FIXED replaces pages of our own mapping only; a concurrent raw reader
        // sees old bytes or zeros.
        let fresh = unsafe {
            mmap_anonymous(
                start,
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags() | MapFlags::FIXED,
            )
        };
        if fresh.is_err() {
            // Out of mappings: zero in place, which costs time and keeps the pages until the pin
            // goes. SAFETY: the caller names committed bytes of this mapping, which are writable.
            unsafe { ptr::write_bytes(start.cast::<u8>(), 0, len) };
        }
    }

    fn trim(&self, len: usize) {
        let kept = self.kept.load(Ordering::Acquire);
        if let Ok(tail) = self.at(len, 0)
            && len > 0
            && len < kept
            // SAFETY: the tail is ours, was never accessible to anybody who is left, and by contract nobody
            // asks for it any more.
            && unsafe { munmap(tail, kept - len) }.is_ok()
        {
            self.kept.store(len, Ordering::Release);
        }
    }

    fn set_accessible(&self, len: usize, accessible: bool) -> io::Result<()> {
        let flags = if accessible {
            MprotectFlags::READ | MprotectFlags::WRITE
        } else {
            MprotectFlags::empty()
        };
        self.protect(0, len, flags)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and nobody can reach it any more.
        // Nothing useful can be done if it fails; the range then stays reserved.
        let _ = unsafe { munmap(self.base, self.kept.load(Ordering::Acquire)) };
    }
}
