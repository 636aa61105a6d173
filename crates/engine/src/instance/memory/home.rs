//! Where a memory is, and what lies under what its guest has written.

use std::io;
use std::sync::Arc;

use super::guest::Layout;
use super::image::{Image, ImageKind, Written};
use super::reservation::Reservation;
use super::{GRANULE, extent};

/// How a memory begins.
#[derive(Debug, Clone, Default)]
pub(super) struct Start {
    /// Its first contents and size; zeros and the declared minimum otherwise.
    pub(super) image: Option<Arc<Image>>,
    pub(super) kind: ImageKind,
    /// Whether a first capture is expected.
    #[cfg_attr(
        not(target_os = "linux"),
        expect(dead_code, reason = "a capture copies there in any case")
    )]
    pub(super) prepared: bool,
}

/// What the pages fall back to.
#[derive(Debug)]
pub(super) enum Ground {
    /// Zeros.
    Fresh,
    /// A file that the guest writes itself, to become an image without a copy.
    #[cfg(target_os = "linux")]
    Own(Arc<super::image::Sheet>),
    /// An image: mapped below what was written since or, if it is a copy, only the one that was
    /// captured or put back last.
    Image(Arc<Image>),
}

/// A memory's address range and what it is made of. All of it changes under the record's write lock
/// only.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) at: Arc<Reservation>,
    pub(super) ground: Ground,
    /// Bytes it can reach without moving.
    pub(super) capacity: usize,
}

impl Home {
    /// Somewhere new, with room for `capacity` bytes, of which `len` are in use.
    pub(super) fn new(
        layout: &Layout,
        capacity: usize,
        len: usize,
        start: &Start,
    ) -> io::Result<Self> {
        let total = capacity
            .checked_add(layout.guard)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let at = Reservation::new(layout.platform, total.max(GRANULE))?;
        let extent = extent(len)?;
        let ground = match &start.image {
            Some(image) => {
                image.place(&at)?;
                Ground::Image(Arc::clone(image))
            }
            None => Self::cold(&at, extent, start)?,
        };
        at.commit(extent)?;
        Ok(Self {
            at: Arc::new(at),
            ground,
            capacity,
        })
    }

    #[cfg(target_os = "linux")]
    fn cold(at: &Reservation, extent: usize, start: &Start) -> io::Result<Ground> {
        if start.prepared
            && start.kind == ImageKind::CopyOnWrite
            && at.is_mapping()
            // Without a file it is an ordinary memory, whose capture copies.
            && let Ok(sheet) = super::image::Sheet::new(extent)
        {
            sheet.map(at, 0, extent, true)?;
            at.claim(extent);
            return Ok(Ground::Own(Arc::new(sheet)));
        }
        Ok(Ground::Fresh)
    }

    #[cfg(not(target_os = "linux"))]
    fn cold(_at: &Reservation, _extent: usize, _start: &Start) -> io::Result<Ground> {
        Ok(Ground::Fresh)
    }

    /// Makes the first `len` bytes accessible, inside the capacity.
    pub(super) fn grow(&mut self, len: usize) -> io::Result<()> {
        let extent = extent(len)?;
        #[cfg(target_os = "linux")]
        if let Ground::Own(sheet) = &mut self.ground {
            let old = self.at.accessible_bytes();
            if extent > old {
                // Nobody else has it before it is an image.
                let sheet = Arc::get_mut(sheet).ok_or(io::ErrorKind::ResourceBusy)?;
                sheet.extend(extent)?;
                sheet.map(&self.at, old, extent - old, true)?;
                self.at.claim(extent);
            }
            return Ok(());
        }
        self.at.commit(extent)
    }

    /// The same contents somewhere larger.
    pub(super) fn moved(
        &self,
        layout: &Layout,
        kind: ImageKind,
        capacity: usize,
        old_len: usize,
        new_len: usize,
    ) -> io::Result<Self> {
        let mut start = Start {
            image: None,
            kind,
            prepared: false,
        };
        #[cfg(target_os = "linux")]
        match &self.ground {
            Ground::Image(image) if image.is_mapped() => {
                // The image's pages stay shared; only what was written is copied.
                start.image = Some(Arc::clone(image));
                let new = Self::new(layout, capacity, new_len, &start)?;
                for run in image.dirty(&self.at)? {
                    copy(&self.at, &new.at, run)?;
                }
                return Ok(new);
            }
            Ground::Own(_) => start.prepared = true,
            _ => {}
        }
        #[cfg(not(target_os = "linux"))]
        let _ = &mut start;
        let mut new = Self::new(layout, capacity, new_len, &start)?;
        copy(&self.at, &new.at, 0..old_len)?;
        if let Ground::Image(image) = &self.ground {
            new.ground = Ground::Image(Arc::clone(image));
        }
        Ok(new)
    }

    /// Contents and accessible size become the image's; with `keeps_size` a larger size stays. Returns how
    /// many bytes were found to differ from it where that is known anyway.
    pub(super) fn reset(
        &mut self,
        image: &Arc<Image>,
        written: &Written,
        keeps_size: bool,
    ) -> io::Result<usize> {
        let is_known = matches!(&self.ground, Ground::Image(ground) if Arc::ptr_eq(ground, image));
        if !image.is_mapped() && self.is_on_file() {
            self.at.wipe();
            self.ground = Ground::Fresh;
        }
        let differed = image.put_back(&self.at, is_known, written, keeps_size)?;
        self.ground = Ground::Image(Arc::clone(image));
        Ok(differed)
    }

    fn is_on_file(&self) -> bool {
        match &self.ground {
            Ground::Fresh => false,
            #[cfg(target_os = "linux")]
            Ground::Own(_) => true,
            Ground::Image(image) => image.is_mapped(),
        }
    }

    /// The contents of this moment as an image, on which the memory then lies.
    ///
    /// * `most`: bytes that it may have to look at; beyond, it is [`io::ErrorKind::WouldBlock`].
    pub(super) fn capture(
        &mut self,
        kind: ImageKind,
        len: usize,
        most: usize,
    ) -> io::Result<Arc<Image>> {
        #[cfg(target_os = "linux")]
        if kind == ImageKind::CopyOnWrite && self.at.is_mapping() {
            match super::image::capture(&mut self.ground, &self.at, len, most) {
                // A kernel without memfds, or one that keeps them from us.
                Err(error)
                    if !self.is_on_file()
                        && matches!(
                            error.kind(),
                            io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied
                        ) => {}
                result => {
                    result?;
                    if let Ground::Image(image) = &self.ground {
                        return Ok(Arc::clone(image));
                    }
                }
            }
        }
        let _ = kind;
        super::image::admit(len, most)?;
        if let Ground::Image(image) = &self.ground
            && image.is_copy_of(&self.at, len)
        {
            return Ok(Arc::clone(image));
        }
        let image = Arc::new(Image::copied(&self.at, len)?);
        if !self.is_on_file() {
            self.ground = Ground::Image(Arc::clone(&image));
        }
        Ok(image)
    }

    /// Gives whole pages back, which read as zeros from then on; tells whether that could be done.
    pub(super) fn give_back(&self, range: std::ops::Range<usize>) -> bool {
        #[cfg(target_os = "linux")]
        {
            // Below an image's end they would fall back to the image.
            let is_plain = match &self.ground {
                Ground::Fresh => true,
                Ground::Own(_) => false,
                Ground::Image(image) => !image.is_mapped() || range.start >= image.byte_len(),
            };
            is_plain && self.at.is_mapping() && self.at.discard(range.start, range.len()).is_ok()
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (range, self);
            false
        }
    }

    /// Bytes of pages that belong to this memory alone.
    pub(super) fn private_bytes(&self) -> usize {
        #[cfg(target_os = "linux")]
        {
            let known = match &self.ground {
                Ground::Own(sheet) => sheet.resident_bytes().ok(),
                _ if !self.at.is_mapping() => None,
                Ground::Image(image) => image
                    .dirty(&self.at)
                    .ok()
                    .map(|it| super::image::total(&it)),
                Ground::Fresh => super::image::resident(&self.at)
                    .ok()
                    .map(|it| super::image::total(&it)),
            };
            if let Some(known) = known {
                return known;
            }
        }
        self.at.accessible_bytes()
    }

    /// How much a reset to that image throws away, as far as that can be told without comparing, and
    /// where that is.
    pub(super) fn dirty(&self, image: &Arc<Image>) -> (usize, Written) {
        if !image.is_mapped() {
            return (0, Written::Unknown);
        }
        #[cfg(target_os = "linux")]
        if let Ground::Image(ground) = &self.ground
            && let Ok(own) = ground.dirty(&self.at)
            && let Ok(written) = ground.differing(&self.at, &own)
        {
            let bytes = super::image::total(&written);
            let known = if Arc::ptr_eq(ground, image) {
                Written::These(own)
            } else {
                Written::Unknown
            };
            return (bytes, known);
        }
        (self.private_bytes(), Written::Unknown)
    }

    /// Bytes of pages of the image that it maps.
    pub(super) fn shared_bytes(&self) -> usize {
        match &self.ground {
            Ground::Image(image) if image.is_mapped() => image.resident_bytes(),
            _ => 0,
        }
    }
}

/// Copies between two reservations, by way of a buffer that is small enough for the cache.
fn copy(from: &Reservation, to: &Reservation, range: std::ops::Range<usize>) -> io::Result<()> {
    let mut buffer = vec![0; super::image::CHUNK.min(range.len())];
    let mut offset = range.start;
    while offset < range.end {
        let len = buffer.len().min(range.end - offset);
        // SAFETY: `from` is locked by the record it belongs to, and nobody else has `to` yet.
        unsafe {
            from.copy_out(offset, &mut buffer[..len])?;
            to.copy_in(offset, &buffer[..len])?;
        }
        offset += len;
    }
    Ok(())
}

/// Gives the pages back now; the address range only if nobody holds a pin.
pub(super) fn let_go(home: Home) {
    // The record no longer hands out pins, so a count of one cannot rise again.
    if Arc::strong_count(&home.at) > 1 {
        home.at.abandon();
    }
}
