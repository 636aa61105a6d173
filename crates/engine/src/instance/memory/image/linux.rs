//! Images in files without a name (memfd), which memories map copy-on-write.
//!
//! An image is one *sheet*, the base, and perhaps a *patch*: a second file with what is different at
//! the same offsets, and all of what lies beyond the base. So it never depends on more than two files,
//! and one that is no longer used keeps nothing. Files reach to the end of the last granule: no access
//! is beyond them.
//!
//! `unsafe` because contents are read from and written to linear memory, under the record's lock.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use once_cell::sync::OnceCell;
use rustix::fs::{MemfdFlags, SeekFrom, fstat, memfd_create, seek};

use super::super::home::Ground;
use super::super::region::Platform;
use super::super::reservation::Reservation;
use super::super::{GRANULE, extent};
use super::{CHUNK, Contents, Image, Written, admit, dirty, finish, not_zero, total};
use crate::scarcity;

/// The smallest page there is.
const PAGE: usize = 1 << 12;
/// So many pages of its own may stay with a memory that is put back: to overwrite them costs less
/// than to give them back, and to fault them in and copy them again.
const MAX_KEPT: usize = 32;

/// Up to so many runs of pages are discarded one by one: a walk over the whole range takes longer.
const MAX_DISCARDS: usize = 8;
/// A hole that is smaller is mapped together with what is around it.
const HOLE: usize = 256 << 10;
/// Parts of a file that are mapped one by one.
const MAX_PARTS: usize = 32;
/// Differences that are closer than this are one; each is a mapping of its own.
const GAP: usize = 16 << 12;
/// More differences than that become a new base.
const MAX_RUNS: usize = 32;
/// A patch that is larger than this part of its base becomes a new base.
const MAX_PART: usize = 4;

/// A file of pages.
#[derive(Debug)]
pub(in crate::instance::memory) struct Sheet {
    file: File,
    /// A multiple of the granule.
    len: usize,
    /// The parts that are mapped; found when that is first done.
    parts: OnceCell<Vec<Range<usize>>>,
}

impl Sheet {
    pub(in crate::instance::memory) fn new(len: usize) -> io::Result<Self> {
        scarcity::memory()?;
        let file = File::from(memfd_create("wasm-molt", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        Ok(Self {
            file,
            len,
            parts: OnceCell::new(),
        })
    }

    /// Makes it longer, by zeros.
    pub(in crate::instance::memory) fn extend(&mut self, len: usize) -> io::Result<()> {
        if len > self.len {
            self.file.set_len(len as u64)?;
            self.len = len;
        }
        Ok(())
    }

    /// Maps a part of it at the same offset.
    pub(in crate::instance::memory) fn map(
        &self,
        at: &Reservation,
        offset: usize,
        len: usize,
        shared: bool,
    ) -> io::Result<()> {
        at.map_file(offset, len, self.file.as_fd(), shared)
    }

    pub(in crate::instance::memory) fn resident_bytes(&self) -> io::Result<usize> {
        Ok(usize::try_from(fstat(&self.file)?.st_blocks).unwrap_or(0) * 512)
    }

    /// The parts that are to be mapped: all but large holes, which are better no part of the file: pages
    /// that are written there would be made in the file too, and stay.
    fn parts(&self) -> &[Range<usize>] {
        self.parts.get_or_init(|| coarse(self.data()))
    }

    /// Takes these parts of the memory over what it has.
    fn overwrite(&mut self, at: &Reservation, runs: &[Range<usize>]) -> io::Result<()> {
        self.take(at, runs, false)?;
        // Looking for holes takes long in a large file; where these are is known.
        if let Some(parts) = self.parts.take() {
            self.parts = OnceCell::with_value(coarse([parts, runs.to_vec()].concat()));
        }
        Ok(())
    }

    /// The parts that are not holes.
    fn data(&self) -> Vec<Range<usize>> {
        let (mut runs, mut offset) = (Vec::new(), 0);
        while let Ok(start) = seek(&self.file, SeekFrom::Data(offset)) {
            let Ok(end) = seek(&self.file, SeekFrom::Hole(start)) else {
                break;
            };
            runs.push(start as usize..end as usize);
            offset = end;
        }
        runs
    }

    /// Takes what is in memory there. With `skip_zeros` holes stay holes, which must have been there.
    fn take(&self, at: &Reservation, runs: &[Range<usize>], skip_zeros: bool) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        for run in runs {
            for offset in run.clone().step_by(CHUNK) {
                let piece = &mut buffer[..CHUNK.min(run.end - offset)];
                // SAFETY: the caller holds the record's lock.
                unsafe { at.copy_out(offset, piece) }?;
                if !skip_zeros {
                    self.write(offset, piece)?;
                    continue;
                }
                for part in not_zero(piece) {
                    self.write(offset + part.start, &piece[part])?;
                }
            }
        }
        Ok(())
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        scarcity::memory()?;
        self.file.write_all_at(bytes, offset as u64)
    }

    fn read(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < out.len() {
            let read = self
                .file
                .read_at(&mut out[done..], (offset + done) as u64)?;
            if read == 0 {
                out[done..].fill(0);
                break;
            }
            done += read;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Patch {
    sheet: Sheet,
    /// Where it replaces the base or was written beyond it, in order.
    runs: Vec<Range<usize>>,
}

/// An image that is mapped.
#[derive(Debug)]
pub(in crate::instance::memory) struct Mapped {
    len: usize,
    base: Arc<Sheet>,
    /// Always there if the base is shorter than the image.
    patch: Option<Patch>,
    /// The system once had no mapping left for a part of the patch, so that a memory has it among its
    /// own pages: what was written cannot be forgotten page by page.
    is_incomplete: AtomicBool,
    /// A mapping that nobody writes to, made when it is first read.
    window: OnceCell<Reservation>,
}

impl Mapped {
    fn new(len: usize, base: Arc<Sheet>, patch: Option<Patch>) -> Self {
        Self {
            len,
            base,
            patch,
            is_incomplete: AtomicBool::new(false),
            window: OnceCell::new(),
        }
    }

    /// One new file with these parts of the memory, the rest being zero.
    fn flat(at: &Reservation, len: usize, runs: &[Range<usize>]) -> io::Result<Self> {
        let sheet = Sheet::new(extent(len)?)?;
        sheet.take(at, runs, true)?;
        Ok(Self::new(len, Arc::new(sheet), None))
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn resident_bytes(&self) -> usize {
        let patch = self.patch.as_ref().map(|patch| &patch.sheet);
        [Some(&*self.base), patch]
            .into_iter()
            .flatten()
            .filter_map(|sheet| sheet.resident_bytes().ok())
            .sum()
    }

    #[cfg(test)]
    pub(super) fn inodes(&self) -> Vec<u64> {
        let patch = self.patch.as_ref().map(|patch| &patch.sheet);
        [Some(&*self.base), patch]
            .into_iter()
            .flatten()
            .filter_map(|sheet| Some(fstat(&sheet.file).ok()?.st_ino))
            .collect()
    }

    /// Lays it over the memory, whatever is there. If it fails, then before anything has changed.
    pub(super) fn map(&self, at: &Reservation) -> io::Result<()> {
        let extent = extent(self.len)?;
        at.renew(extent)?;
        for part in self.base.parts() {
            self.lay(&self.base, at, part.start..part.end.min(extent))?;
        }
        if let Some(patch) = &self.patch {
            for run in &patch.runs {
                self.lay(&patch.sheet, at, run.start..run.end.min(extent))?;
            }
        }
        Ok(())
    }

    fn lay(&self, sheet: &Sheet, at: &Reservation, part: Range<usize>) -> io::Result<()> {
        if part.is_empty() || sheet.map(at, part.start, part.len(), false).is_ok() {
            return Ok(());
        }
        // Too many mappings in the process: the bytes, then, among the memory's own pages.
        self.is_incomplete.store(true, Ordering::Release);
        let mut page = [0; PAGE];
        for offset in part.clone().step_by(PAGE) {
            let piece = &mut page[..PAGE.min(part.end - offset)];
            sheet.read(offset, piece)?;
            // SAFETY: the caller holds the record's lock, or is alone with the reservation.
            unsafe { at.copy_in(offset, piece) }?;
        }
        Ok(())
    }

    /// * `keeps_size`: what is accessible beyond the image stays so, as zeros.
    pub(super) fn put_back(
        &self,
        at: &Reservation,
        is_known: bool,
        written: &Written,
        keeps_size: bool,
    ) -> io::Result<()> {
        let extent = extent(self.len)?;
        let finish = || finish(at, extent, keeps_size);
        let is_whole = is_known && at.accessible_bytes() >= extent;
        if is_whole
            && let Written::These(runs) = written
            && runs.len() <= MAX_DISCARDS
            && !self.is_incomplete.load(Ordering::Acquire)
        {
            let inside = runs.iter().map(|run| run.start..run.end.min(extent));
            let mut inside = inside.filter(|run| run.start < run.end);
            if inside.all(|run| at.discard(run.start, run.len()).is_ok()) {
                return finish();
            }
        }
        if is_whole
            && matches!(written, Written::MayStay)
            && let Some(runs) = dirty::few(at, extent, MAX_KEPT)
            && let Ok(window) = self.window(extent)
        {
            overwrite(at, window, &runs)?;
            return finish();
        }
        // Pages that are locked into memory cannot be discarded, but replaced.
        if !is_known
            || self.is_incomplete.load(Ordering::Acquire)
            || at.accessible_bytes() < extent
            || at.discard(0, extent).is_err()
        {
            self.map(at)?;
        }
        finish()
    }

    fn window(&self, extent: usize) -> io::Result<&Reservation> {
        self.window.get_or_try_init(|| {
            let window = Reservation::new(Platform::NATIVE, extent.max(GRANULE))?;
            self.map(&window)?;
            Ok(window)
        })
    }

    pub(super) fn dirty(&self, at: &Reservation) -> io::Result<Vec<Range<usize>>> {
        dirty::runs(dirty::strategy(), at, |offset, out| self.read(offset, out))
    }

    /// Those among `dirty` that differ. Only where pages may have been overwritten is there a
    /// difference.
    pub(super) fn differing(
        &self,
        at: &Reservation,
        runs: &[Range<usize>],
    ) -> io::Result<Vec<Range<usize>>> {
        let Some(window) = self.window.get() else {
            return Ok(runs.to_vec());
        };
        let mut written = Vec::new();
        let (mut is, mut was) = ([0; PAGE], [0; PAGE]);
        for run in runs {
            // What lies beyond is new.
            if run.len() > MAX_KEPT * PAGE || run.end > window.accessible_bytes() {
                written.push(run.clone());
                continue;
            }
            let mut same = true;
            for offset in run.clone().step_by(PAGE) {
                // SAFETY: as in `overwrite`.
                unsafe {
                    at.copy_out(offset, &mut is)?;
                    window.copy_out(offset, &mut was)?;
                }
                same &= is == was;
            }
            if !same {
                written.push(run.clone());
            }
        }
        Ok(written)
    }

    /// Reads contents that do not cross a page.
    pub(super) fn read(&self, offset: usize, out: &mut [u8]) -> io::Result<()> {
        if let Some(patch) = &self.patch {
            let after = patch.runs.partition_point(|run| run.start <= offset);
            if offset >= self.base.len || after > 0 && offset < patch.runs[after - 1].end {
                return patch.sheet.read(offset, out);
            }
        }
        self.base.read(offset, out)
    }
}

/// Writes over these pages what they are in the window.
fn overwrite(at: &Reservation, window: &Reservation, runs: &[Range<usize>]) -> io::Result<()> {
    let mut page = [0; PAGE];
    for run in runs {
        for offset in run.clone().step_by(PAGE) {
            // SAFETY: the caller holds the record's lock, and what a window maps stays mapped.
            unsafe {
                window.copy_out(offset, &mut page)?;
                at.copy_in(offset, &page)?;
            }
        }
    }
    Ok(())
}

/// The pages of a memory on no image that are there.
pub(in crate::instance::memory) fn resident(at: &Reservation) -> io::Result<Vec<Range<usize>>> {
    dirty::runs(dirty::strategy(), at, |_, out| {
        out.fill(0);
        Ok(())
    })
}

/// Makes the memory's contents an image and its ground. If it fails, the memory is as it was.
///
/// * `most`: bytes that it may have to look at; beyond, it is [`io::ErrorKind::WouldBlock`].
pub(in crate::instance::memory) fn capture(
    ground: &mut Ground,
    at: &Reservation,
    len: usize,
    most: usize,
) -> io::Result<()> {
    match ground {
        Ground::Image(image) if image.is_mapped() => return recapture(image, at, len, most),
        _ => {}
    }
    let mapped = match ground {
        Ground::Own(sheet) => {
            admit(len, most)?;
            Mapped::new(len, Arc::clone(sheet), None)
        }
        _ => {
            let runs = resident(at)?;
            admit(total(&runs), most)?;
            Mapped::flat(at, len, &runs)?
        }
    };
    mapped.map(at)?;
    *ground = Ground::Image(Arc::new(Image(Contents::Mapped(mapped))));
    Ok(())
}

/// The same for a memory that lies on an image already: the image of now differs from it little.
fn recapture(ground: &mut Arc<Image>, at: &Reservation, len: usize, most: usize) -> io::Result<()> {
    let Contents::Mapped(old) = &ground.0 else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dirty = old.differing(at, &old.dirty(at)?)?;
    if dirty.is_empty() && old.len == len {
        return Ok(());
    }
    admit(total(&dirty), most)?;
    let extent = extent(len)?;
    if let Some(Image(Contents::Mapped(own))) = Arc::get_mut(ground)
        && own.rewrite(at, len, extent, &dirty)?
    {
        return own.map(at);
    }
    let Contents::Mapped(old) = &ground.0 else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let new = old.successor(at, len, extent, dirty)?;
    if let Err(error) = new.map(at) {
        // What the old one had in its patch may lie among the memory's own pages now.
        old.is_incomplete.store(true, Ordering::Release);
        return Err(error);
    }
    *ground = Arc::new(Image(Contents::Mapped(new)));
    Ok(())
}

impl Mapped {
    /// Nobody else has this image: its own files take what is new, if they are its own. What is
    /// overwritten in them the memory has among its private pages.
    fn rewrite(
        &mut self,
        at: &Reservation,
        len: usize,
        extent: usize,
        dirty: &[Range<usize>],
    ) -> io::Result<bool> {
        self.window.take();
        match &mut self.patch {
            None => {
                let Some(base) = Arc::get_mut(&mut self.base) else {
                    return Ok(false);
                };
                base.extend(extent)?;
                base.overwrite(at, dirty)?;
            }
            Some(patch) => {
                let Some(runs) = patched(&self.base, &patch.runs, dirty) else {
                    return Ok(false);
                };
                patch.sheet.extend(extent)?;
                patch.sheet.take(at, &runs, false)?;
                patch.runs = runs;
            }
        }
        self.len = len;
        Ok(true)
    }

    /// The image of a memory that lies on this one and has written `dirty`.
    fn successor(
        &self,
        at: &Reservation,
        len: usize,
        extent: usize,
        mut dirty: Vec<Range<usize>>,
    ) -> io::Result<Self> {
        let old = self.patch.as_ref().map_or(&[][..], |patch| &patch.runs);
        if let Some(runs) = patched(&self.base, old, &dirty) {
            let sheet = Sheet::new(extent)?;
            sheet.take(at, &runs, true)?;
            let patch = Patch { sheet, runs };
            return Ok(Self::new(len, Arc::clone(&self.base), Some(patch)));
        }
        dirty.extend_from_slice(old);
        dirty.extend(
            self.base
                .data()
                .into_iter()
                .map(|run| run.start..run.end.min(extent)),
        );
        Self::flat(at, len, &joined(dirty, 0))
    }
}

/// The runs of a patch that has these as well; `None` if that is better a new base.
fn patched(
    base: &Sheet,
    old: &[Range<usize>],
    dirty: &[Range<usize>],
) -> Option<Vec<Range<usize>>> {
    let mut runs = joined([old, dirty].concat(), GAP);
    for gap in [4 * GAP, 16 * GAP] {
        if runs.len() > MAX_RUNS {
            runs = joined(runs, gap);
        }
    }
    (runs.len() <= MAX_RUNS && total(&runs) <= base.len / MAX_PART).then_some(runs)
}

/// So few parts that each can be a mapping of its own.
fn coarse(mut parts: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut gap = HOLE;
    loop {
        parts = joined(parts, gap);
        if parts.len() <= MAX_PARTS {
            return parts;
        }
        gap *= 4;
    }
}

/// In order, and as one if no more than `gap` lies between.
fn joined(mut runs: Vec<Range<usize>>, gap: usize) -> Vec<Range<usize>> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut out: Vec<Range<usize>> = Vec::with_capacity(runs.len());
    for run in runs {
        match out.last_mut() {
            Some(last) if run.start <= last.end.saturating_add(gap) => {
                last.end = last.end.max(run.end);
            }
            _ if run.is_empty() => {}
            _ => out.push(run),
        }
    }
    out
}
