//! Images: the contents of a memory at one moment, immutable, shared by all memories that lie on it.
//!
//! Two variants behind one face. [`linux`] keeps the bytes in files that memories map copy-on-write,
//! so that making one, or putting one back, costs what was written and not the size. [`portable`]
//! keeps and copies bytes. On Linux a memory may use either.

#[cfg(target_os = "linux")]
mod dirty;
#[cfg(target_os = "linux")]
mod linux;
mod portable;

use std::io;
use std::ops::Range;

use super::reservation::Reservation;

#[cfg(all(test, target_os = "linux"))]
pub(super) use dirty::{Strategy, runs};
#[cfg(target_os = "linux")]
pub(super) use linux::{Sheet, capture, resident};

/// Bytes that are copied at once: so few that no allocator needs a mapping of its own for them, for there
/// may be none left.
pub(super) const CHUNK: usize = 64 << 10;

/// Contents are told apart, and left out if they are zero, in units of this; a page of most hosts,
/// though nothing depends on that.
const UNIT: usize = 1 << 12;

/// How images are kept and memories follow them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ImageKind {
    /// Mapped copy-on-write; the same as [`Self::Copy`] where the system has no such thing for us.
    #[default]
    CopyOnWrite,
    /// Copied in and out.
    Copy,
}

/// What is known of the pages that a memory has written, when it is put back.
#[derive(Debug)]
pub(super) enum Written {
    /// Nothing.
    Unknown,
    /// Nothing; and if they are few, they may stay with the memory, overwritten.
    MayStay,
    /// They are among these, and the others equal the image.
    These(Vec<Range<usize>>),
}

/// The immutable contents of one memory.
#[derive(Debug)]
pub(crate) struct Image(Contents);

#[derive(Debug)]
enum Contents {
    #[cfg(target_os = "linux")]
    Mapped(linux::Mapped),
    Copied(portable::Copied),
}

impl Image {
    /// A copy of the first `len` bytes.
    pub(super) fn copied(at: &Reservation, len: usize) -> io::Result<Self> {
        Ok(Self(Contents::Copied(portable::Copied::of(at, len)?)))
    }

    /// Bytes of the memory it is of.
    pub(crate) fn byte_len(&self) -> usize {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Contents::Mapped(mapped) => mapped.len(),
            Contents::Copied(copied) => copied.len(),
        }
    }

    /// Bytes of pages that it holds; those of a base that it shares with other images count for each.
    pub(crate) fn resident_bytes(&self) -> usize {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Contents::Mapped(mapped) => mapped.resident_bytes(),
            Contents::Copied(copied) => copied.resident_bytes(),
        }
    }

    /// Whether memories map it, and not copy it.
    pub(super) fn is_mapped(&self) -> bool {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Contents::Mapped(_) => true,
            Contents::Copied(_) => false,
        }
    }

    /// Puts the contents into a fresh reservation.
    pub(super) fn place(&self, at: &Reservation) -> io::Result<()> {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Contents::Mapped(mapped) => mapped.map(at),
            Contents::Copied(copied) => copied.place(at),
        }
    }

    /// Makes contents and accessible size the image's again. `is_known`: nothing but this image
    /// lies below what was written. `keeps_size`: the accessible size stays if it is larger, and what is
    /// beyond the image becomes zeros; no page is out of reach meanwhile. Returns how many bytes differed
    /// if that came to light.
    pub(super) fn put_back(
        &self,
        at: &Reservation,
        is_known: bool,
        written: &Written,
        keeps_size: bool,
    ) -> io::Result<usize> {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Contents::Mapped(mapped) => mapped
                .put_back(at, is_known, written, keeps_size)
                .map(|()| 0),
            Contents::Copied(copied) => {
                let _ = (is_known, written);
                copied.put_back(at, keeps_size)
            }
        }
    }

    /// Whether it is a copy that equals the first `len` bytes, and no mapped image.
    pub(super) fn is_copy_of(&self, at: &Reservation, len: usize) -> bool {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Contents::Mapped(_) => false,
            Contents::Copied(copied) => copied.equals(at, len),
        }
    }

    /// Bytes of it, as long as they do not cross a page.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn read(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        match &self.0 {
            Contents::Mapped(mapped) => mapped.read(offset, out),
            Contents::Copied(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The files it is in.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn inodes(&self) -> Vec<u64> {
        match &self.0 {
            Contents::Mapped(mapped) => mapped.inodes(),
            Contents::Copied(_) => Vec::new(),
        }
    }

    /// The pages in which a memory that lies on it differs, about.
    #[cfg(target_os = "linux")]
    pub(super) fn differing(
        &self,
        at: &Reservation,
        dirty: &[Range<usize>],
    ) -> io::Result<Vec<Range<usize>>> {
        match &self.0 {
            Contents::Mapped(mapped) => mapped.differing(at, dirty),
            Contents::Copied(_) => Ok(dirty.to_vec()),
        }
    }

    /// The pages that were written by the memory that lies on it.
    #[cfg(target_os = "linux")]
    pub(super) fn dirty(&self, at: &Reservation) -> io::Result<Vec<Range<usize>>> {
        match &self.0 {
            Contents::Mapped(mapped) => mapped.dirty(at),
            Contents::Copied(_) => resident(at),
        }
    }
}

/// Bytes in these runs.
#[cfg(target_os = "linux")]
pub(super) fn total(runs: &[Range<usize>]) -> usize {
    runs.iter().map(ExactSizeIterator::len).sum()
}

/// The end of a reset: what is accessible beyond the image goes, or becomes zeros.
fn finish(at: &Reservation, extent: usize, keeps_size: bool) -> io::Result<()> {
    if !keeps_size {
        return at.uncommit(extent);
    }
    // Not discarded: below what was written there may lie a later image, which is larger.
    at.wipe_from(extent);
    Ok(())
}

/// Refuses a capture that is not to take long.
pub(super) fn admit(bytes: usize, most: usize) -> io::Result<()> {
    if bytes > most {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    Ok(())
}

/// The parts that are not zero, in order.
fn not_zero(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    for (i, unit) in bytes.chunks(UNIT).enumerate() {
        let start = i * UNIT;
        if is_zero(unit) {
            continue;
        }
        match parts.last_mut() {
            Some(last) if last.end == start => last.end += unit.len(),
            _ => parts.push(start..start + unit.len()),
        }
    }
    parts
}

/// Whether all of it is zero.
fn is_zero(bytes: &[u8]) -> bool {
    // In blocks, for the sake of vector instructions.
    bytes
        .chunks(256)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}
