//! The host's side of a linear memory.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use super::guest::Layout;
use super::home::{Home, Start, let_go};
use super::image::{Image, ImageKind, Written};
use super::reservation::{Pin, Reservation};
use super::{GRANULE, extent, round_up};

/// A multiple of the host's own page size, on all systems.
const PAGE: usize = GRANULE;
const MUCH_TO_DISCARD: usize = 1 << 20;
const BETWEEN_DISCARDS: Duration = Duration::from_millis(1);

/// Beyond that many dirty bytes a reset leaves the pages behind, to be given back when nobody waits.
const MUCH: usize = 16 << 20;

/// One linear memory as the host sees it, valid for longer than the instance.
///
/// The guest may run, and write, while the host reads: bytes are then as racy as the guest makes
/// them, never out of reach.
#[derive(Debug)]
pub struct MemoryRecord {
    base: AtomicPtr<u8>,
    len: AtomicUsize,
    peak: AtomicUsize,
    limit: AtomicUsize,
    capacity: AtomicUsize,
    released: AtomicBool,
    /// The host may have written to it since it was put on an image, or could through a view.
    is_touched: AtomicBool,
    /// A reset has left pages behind the end, which somebody may have written to.
    leaves: AtomicBool,
    /// Growth was refused since somebody asked.
    was_refused: AtomicBool,
    /// When little was last given back on the guest's behalf.
    discarded: Mutex<Option<Instant>>,
    layout: Layout,
    kind: ImageKind,
    /// Gone once released. Read under the lock by every copy; whatever changes what is mapped writes
    /// under it.
    home: RwLock<Option<Home>>,
}

/// So many address ranges may be held by buffers alone before memories stop leaving more behind where they
/// need not: a program that never comes to its event loop never gives one back, and the system has 65,530
/// mappings for everything.
const MOST_ABANDONED: usize = 4096;

static CHANGES: AtomicUsize = AtomicUsize::new(0);

/// Bytes of all linear memories of the process.
static TOTAL: AtomicUsize = AtomicUsize::new(0);

/// How many bytes of linear memory there are in the process.
pub(crate) fn memory_total() -> usize {
    TOTAL.load(Ordering::Relaxed)
}

/// Another number whenever a memory of the process has grown, moved or been reset. Who hears, by whatever
/// synchronises, of something that happened after the growth, also sees the number.
pub fn memory_changes() -> usize {
    CHANGES.load(Ordering::Acquire)
}

/// A moment's address and length of a memory, with what keeps the address valid.
#[derive(Debug, Clone)]
pub struct MemoryView {
    /// The first byte.
    pub base: *mut u8,
    /// How many bytes there were.
    pub byte_length: usize,
    /// Keeps the address range mapped: while this lives, `base..base + byte_length` can be accessed
    /// without a fault, until it is said to be [harmless](Pin::harmless).
    pub pin: Arc<Pin>,
}

/// What of a memory is held, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUsage {
    /// Pages that belong to this memory alone: what its guest has written since it lies on its
    /// image (and up to 32 pages that were put back since), or everything if it lies on none. The
    /// accessible size where the system does not tell.
    pub private_bytes: usize,
    /// Bytes of an image that it maps, together with others.
    pub shared_bytes: usize,
    /// Address space, guard pages included.
    pub reserved_bytes: usize,
}

impl std::ops::AddAssign for MemoryUsage {
    fn add_assign(&mut self, other: Self) {
        self.private_bytes += other.private_bytes;
        self.shared_bytes += other.shared_bytes;
        self.reserved_bytes += other.reserved_bytes;
    }
}

// SAFETY: an address and the reservation behind it; dereferencing it is the holder's unsafe act.
unsafe impl Send for MemoryView {}

/// A copy that would have left the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{byte_length} bytes at {ptr} are outside the linear memory of {memory_bytes} bytes")]
pub struct OutOfBounds {
    /// Where the copy would have begun.
    pub ptr: u64,
    /// How long it would have been.
    pub byte_length: usize,
    /// How long the memory is; 0 once it is released.
    pub memory_bytes: usize,
}

impl MemoryRecord {
    pub(super) fn new(layout: Layout, start: &Start) -> io::Result<Self> {
        let len = match &start.image {
            Some(image) => image.byte_len(),
            None => layout.minimum,
        };
        let home = Home::new(&layout, layout.capacity, len, start)?;
        TOTAL.fetch_add(len, Ordering::Relaxed);
        Ok(Self {
            base: AtomicPtr::new(home.at.base()),
            len: AtomicUsize::new(len),
            peak: AtomicUsize::new(len),
            limit: AtomicUsize::new(usize::MAX),
            capacity: AtomicUsize::new(home.capacity),
            released: AtomicBool::new(false),
            is_touched: AtomicBool::new(false),
            leaves: AtomicBool::new(false),
            was_refused: AtomicBool::new(false),
            discarded: Mutex::default(),
            layout,
            kind: start.kind,
            home: RwLock::new(Some(home)),
        })
    }

    /// Where the memory begins, or began before it was released. Growth beyond the reservation and
    /// resets change it. Use [`Self::view`] where the memory could grow or go meanwhile.
    pub fn base(&self) -> *mut u8 {
        self.base.load(Ordering::Acquire)
    }

    /// Bytes the guest has now; 0 once released.
    pub fn byte_len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// The cell behind [`Self::byte_len`], for a reader that looks at it on every call.
    pub fn len_cell(&self) -> &AtomicUsize {
        &self.len
    }

    /// The most bytes the guest ever had.
    pub fn peak_bytes(&self) -> usize {
        self.peak.load(Ordering::Acquire)
    }

    /// Refuses growth beyond that many bytes from now on, as the specification lets `memory.grow`
    /// fail. Unlike a `ResourceLimiter` it holds for shared memories as well.
    pub fn set_limit_bytes(&self, bytes: usize) {
        self.limit.store(bytes, Ordering::Release);
    }

    /// What the guest may reach: by its limit, and by its type.
    pub(crate) fn most_bytes(&self) -> usize {
        self.limit_bytes().min(self.layout.maximum)
    }

    /// What [`Self::set_limit_bytes`] said last.
    pub fn limit_bytes(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    /// Whether growth was refused since this was last asked.
    pub(crate) fn take_refusal(&self) -> bool {
        self.was_refused.swap(false, Ordering::AcqRel)
    }

    /// Whether the store is gone and the pages are given back.
    pub fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    /// Keeps the address range mapped and what is accessible now readable. `None` once released.
    pub fn pin(&self) -> Option<Arc<Pin>> {
        let slot = self.read_home();
        Some(Arc::new(Pin::new(Arc::clone(&slot.as_ref()?.at))))
    }

    /// Address, length and pin that belong together. `None` once released.
    pub fn view(&self) -> Option<MemoryView> {
        let slot = self.read_home();
        let home = slot.as_ref()?;
        self.is_touched.store(true, Ordering::Release);
        Some(MemoryView {
            base: home.at.base(),
            byte_length: self.byte_len(),
            pin: Arc::new(Pin::new(Arc::clone(&home.at))),
        })
    }

    /// Whether only the guest can have written to it since it was last captured or reset: the host has
    /// not, and has no view.
    pub(crate) fn is_untouched(&self) -> bool {
        let has_readers = |home: &Home| home.at.has_readers();
        !self.is_touched.load(Ordering::Acquire)
            && !self.read_home().as_ref().is_some_and(has_readers)
    }

    /// Copies bytes out.
    pub fn read(&self, ptr: u64, out: &mut [u8]) -> Result<(), OutOfBounds> {
        let home = self.read_home();
        let from = self.locate(home.as_ref(), ptr, out.len())?;
        // SAFETY: `locate` found the range inside the committed part of a reservation, which the
        // lock keeps mapped. `out` is a Rust slice and so not guest memory. The guest may write
        // meanwhile; the bytes are then a mixture.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Whether those bytes are there.
    pub fn check(&self, ptr: u64, byte_length: usize) -> Result<(), OutOfBounds> {
        self.locate(self.read_home().as_ref(), ptr, byte_length)
            .map(drop)
    }

    /// As [`read`](Self::read), into a vector of its own, which is allocated only if the range is there.
    pub fn read_vec(&self, ptr: u64, byte_length: usize) -> Result<Vec<u8>, OutOfBounds> {
        let home = self.read_home();
        let from = self.locate(home.as_ref(), ptr, byte_length)?;
        let mut out = Vec::with_capacity(byte_length);
        // SAFETY: as in `read`; the vector has room for so many bytes, all of which are written.
        unsafe {
            ptr::copy_nonoverlapping(from.cast_const(), out.as_mut_ptr(), byte_length);
            out.set_len(byte_length);
        }
        Ok(out)
    }

    /// Copies bytes in.
    pub fn write(&self, ptr: u64, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let home = self.read_home();
        self.is_touched.store(true, Ordering::Release);
        let to = self.locate(home.as_ref(), ptr, bytes.len())?;
        // SAFETY: as in `read`, with the roles exchanged.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Those bytes become zeros, and whole pages among them go back to the system: as far as the memory
    /// lies on no image there, and not oftener than every millisecond for less than a mebibyte, because a
    /// guest in a loop would spend all its time in the kernel. Other bytes are overwritten.
    ///
    /// # Errors
    /// If they are not all inside; nothing has changed then.
    pub(crate) fn discard(&self, ptr: u64, byte_length: u64) -> Result<(), OutOfBounds> {
        let home = self.read_home();
        let len = usize::try_from(byte_length).unwrap_or(usize::MAX);
        let to = self.locate(home.as_ref(), ptr, len)?;
        self.is_touched.store(true, Ordering::Release);
        let start = ptr as usize;
        let whole = start.next_multiple_of(PAGE)..(start + len) / PAGE * PAGE;
        if let Some(home) = home.as_ref()
            && !whole.is_empty()
            && (whole.len() >= MUCH_TO_DISCARD || self.may_discard())
            && home.give_back(whole.clone())
        {
            // SAFETY: as in `write`; these are the ends of the very range.
            unsafe {
                ptr::write_bytes(to, 0, whole.start - start);
                ptr::write_bytes(to.add(whole.end - start), 0, start + len - whole.end);
            }
            return Ok(());
        }
        // SAFETY: as in `write`.
        unsafe { ptr::write_bytes(to, 0, len) };
        Ok(())
    }

    /// Whether it is long enough since the last time.
    fn may_discard(&self) -> bool {
        let mut last = self
            .discarded
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let may = last.is_none_or(|last| now.duration_since(last) >= BETWEEN_DISCARDS);
        if may {
            *last = Some(now);
        }
        may
    }

    /// The address of `ptr` if `byte_length` bytes follow it now.
    fn locate(
        &self,
        home: Option<&Home>,
        ptr: u64,
        byte_length: usize,
    ) -> Result<*mut u8, OutOfBounds> {
        let memory_bytes = self.byte_len();
        let error = OutOfBounds {
            ptr,
            byte_length,
            memory_bytes,
        };
        let home = &home.ok_or(error)?.at;
        let start = usize::try_from(ptr).map_err(|_| error)?;
        let end = start.checked_add(byte_length).ok_or(error)?;
        if end > memory_bytes.min(home.accessible_bytes()) {
            return Err(error);
        }
        Ok(home.base().wrapping_add(start))
    }

    /// Bytes it can reach without moving.
    pub(super) fn capacity(&self) -> usize {
        self.capacity.load(Ordering::Acquire)
    }

    /// Grows, on behalf of the guest, which does not run meanwhile.
    pub(super) fn grow(&self, new_len: usize) -> io::Result<()> {
        self.admit(new_len)?;
        let old = {
            let mut slot = self.write_home();
            let home = slot.as_mut().ok_or(io::ErrorKind::NotFound)?;
            if new_len <= home.capacity {
                let old_len = self.byte_len();
                if self.leaves.load(Ordering::Acquire) && new_len > old_len {
                    let left = home.at.accessible_bytes().min(new_len);
                    // SAFETY: those bytes are committed, and the lock keeps them mapped.
                    unsafe {
                        let from = home.at.base().add(old_len);
                        ptr::write_bytes(from, 0, left.saturating_sub(old_len));
                    }
                }
                home.grow(new_len)?;
                self.resized(new_len);
                None
            } else {
                let new = self.outgrown(home, new_len)?;
                Some(self.settle(home, new, new_len))
            }
        };
        if let Some(old) = old {
            let_go(old);
        }
        Ok(())
    }

    /// A larger place with the same contents.
    fn outgrown(&self, home: &Home, new_len: usize) -> io::Result<Home> {
        if !self.layout.movable || new_len > self.layout.maximum {
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                "the memory cannot grow beyond its reservation",
            ));
        }
        let least = extent(new_len)?;
        // Half as much again, so that growing page by page does not copy at every step.
        let roomy = least
            .saturating_add((least / 2).next_multiple_of(GRANULE))
            .min(self.layout.maximum.max(least));
        let roomy = round_up(roomy).unwrap_or(least);
        let moved =
            |capacity| home.moved(&self.layout, self.kind, capacity, self.byte_len(), new_len);
        moved(roomy).or_else(|_| moved(least))
    }

    /// The contents of this moment, which the memory itself then shares. The guest must not run. If
    /// it fails, the memory is as it was.
    ///
    /// * `most`: bytes that it may have to look at, since that takes long; beyond, nothing is done and
    ///   it is [`io::ErrorKind::WouldBlock`].
    /// * `allows_readers`: nobody writes through a view meanwhile, for that would be lost; else, if there
    ///   is one, it is likewise.
    pub(crate) fn capture_within(
        &self,
        most: usize,
        allows_readers: bool,
    ) -> io::Result<Arc<Image>> {
        let mut slot = self.write_home();
        let home = slot.as_mut().ok_or(io::ErrorKind::NotFound)?;
        if !allows_readers && home.at.has_readers() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let image = home.capture(self.kind, self.byte_len(), most)?;
        self.is_touched.store(false, Ordering::Release);
        Ok(image)
    }

    /// The same, however long it takes.
    #[cfg(test)]
    pub(crate) fn capture(&self) -> io::Result<Arc<Image>> {
        self.capture_within(usize::MAX, true)
    }

    /// Contents and size become the image's; returns the bytes that had been dirty. The guest must
    /// not run before `wasmtime::Memory::grow(store, 0)` has told its code of size and base.
    ///
    /// After an error the contents are not to be used, though nothing is out of reach.
    pub(crate) fn reset(&self, image: &Arc<Image>) -> io::Result<usize> {
        self.put_back(image, true)
    }

    /// The same without counting and as fast as can be, for a guest that is put back after each
    /// call: up to 32 pages of its own may stay with it, for it will want them again.
    pub(crate) fn reset_uncounted(&self, image: &Arc<Image>) -> io::Result<()> {
        self.put_back(image, false).map(drop)
    }

    /// Contents become the image's, in the very place where they are and with no page out of reach
    /// meanwhile, so that views stay attached; where the memory has grown since, it keeps its size, and
    /// what is beyond the image becomes zeros. Returns the bytes that had been dirty. The caller sees to
    /// it that nobody else looks.
    pub(crate) fn reset_in_place(&self, image: &Arc<Image>) -> io::Result<usize> {
        let mut slot = self.write_home();
        let home = slot.as_mut().ok_or(io::ErrorKind::NotFound)?;
        if extent(image.byte_len())? > home.capacity {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let (dirty, written) = home.dirty(image);
        let dirty = home.reset(image, &written, true)?.max(dirty);
        self.resized(self.byte_len().max(image.byte_len()));
        self.is_touched.store(false, Ordering::Release);
        Ok(dirty)
    }

    /// Nobody will use it any more, though its instance lives: it has no bytes from now on. Its pages go
    /// back; the address range stays.
    pub(crate) fn vacate(&self) {
        let mut slot = self.write_home();
        let Some(home) = slot.as_mut() else { return };
        if home.at.uncommit(0).is_err() {
            // Somebody may read through a pin: zeros.
            home.at.wipe();
        }
        self.resized(0);
        self.is_touched.store(true, Ordering::Release);
    }

    fn put_back(&self, image: &Arc<Image>, counts: bool) -> io::Result<usize> {
        let len = image.byte_len();
        self.admit(len)?;
        let extent = extent(len)?;
        let mut slot = self.write_home();
        let home = slot.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let (mut dirty, written) = if counts {
            home.dirty(image)
        } else {
            (0, Written::MayStay)
        };
        let must_move = extent > home.capacity || home.at.has_readers();
        // JavaScript cannot read through a pin that is harmless, but native code may still be at work on
        // the address that it was given (zlib, crypto): no page is taken from under it if that can be had.
        let takes_away = home.at.is_mapping() && home.at.accessible_bytes() > extent;
        let is_pinned = Arc::strong_count(&home.at) > 1;
        let may_abandon = Reservation::abandoned() < MOST_ABANDONED;
        let should_move = dirty > MUCH || takes_away && is_pinned && may_abandon;
        if must_move && !self.layout.movable && extent <= home.capacity {
            // Somebody may read through a view, which must find pages: what is beyond the image stays, as
            // zeros, though the guest has no claim to it any more.
            dirty = home.reset(image, &written, true)?.max(dirty);
            self.leaves.store(true, Ordering::Release);
            self.resized(len);
            self.is_touched.store(false, Ordering::Release);
            return Ok(dirty);
        }
        let old = if must_move || should_move && self.layout.movable {
            self.elsewhere(image, home.capacity.max(extent))
        } else {
            Err(io::ErrorKind::Other.into())
        };
        let old = match old {
            Ok(new) => Some(self.settle(home, new, len)),
            Err(error) if must_move => return Err(error),
            Err(_) => {
                dirty = home.reset(image, &written, false)?.max(dirty);
                self.resized(len);
                None
            }
        };
        self.is_touched.store(false, Ordering::Release);
        drop(slot);
        // Giving back much takes long, and whoever copies waits for the lock.
        if let Some(old) = old {
            let_go(old);
        }
        Ok(dirty)
    }

    /// Another place with the image's contents.
    fn elsewhere(&self, image: &Arc<Image>, capacity: usize) -> io::Result<Home> {
        if !self.layout.movable {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "a shared memory cannot shrink while a view of it may be read",
            ));
        }
        let start = Start {
            image: Some(Arc::clone(image)),
            kind: self.kind,
            prepared: false,
        };
        Home::new(&self.layout, capacity, image.byte_len(), &start)
    }

    /// What of the memory is held, and by whom.
    pub fn usage(&self) -> MemoryUsage {
        self.read_home()
            .as_ref()
            .map_or_else(MemoryUsage::default, |home| MemoryUsage {
                private_bytes: home.private_bytes(),
                shared_bytes: home.shared_bytes(),
                reserved_bytes: home.at.reserved_bytes(),
            })
    }

    /// A look at what it is made of.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn look<R>(&self, f: impl FnOnce(&Home) -> R) -> Option<R> {
        self.read_home().as_ref().map(f)
    }

    /// Nobody will use it any more: its pages go back, some at a time, and whoever else wants the core has it
    /// in between.
    pub(crate) fn shed(&self) {
        const AT_A_TIME: usize = 512 << 10;
        let home = self.read_home();
        let Some(home) = home.as_ref() else { return };
        let len = self.byte_len();
        for start in (0..len).step_by(AT_A_TIME) {
            let end = len.min(start + AT_A_TIME);
            if !home.give_back(start..end) {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// Refuses sizes beyond the limit and the type's maximum.
    fn admit(&self, len: usize) -> io::Result<()> {
        if len > self.limit_bytes().min(self.layout.maximum) {
            self.was_refused.store(true, Ordering::Release);
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "the memory's limit is reached",
            ));
        }
        Ok(())
    }

    /// Publishes a new size in the same place.
    fn resized(&self, len: usize) {
        self.count(len);
        CHANGES.fetch_add(1, Ordering::Release);
        self.peak.fetch_max(len, Ordering::AcqRel);
    }

    fn count(&self, len: usize) {
        let before = self.len.swap(len, Ordering::AcqRel);
        // Wraps where it shrinks, and so does the sum.
        TOTAL.fetch_add(len.wrapping_sub(before), Ordering::Relaxed);
    }

    /// Publishes a new place and size, under the lock. Returns the old place.
    fn settle(&self, home: &mut Home, new: Home, len: usize) -> Home {
        self.base.store(new.at.base(), Ordering::Release);
        self.capacity.store(new.capacity, Ordering::Release);
        let old = std::mem::replace(home, new);
        self.resized(len);
        old
    }

    /// Marks the memory as gone and hands out its place. From here on every copy is out of bounds.
    pub(super) fn release(&self) -> Option<Home> {
        let mut slot = self.write_home();
        self.released.store(true, Ordering::Release);
        self.count(0);
        slot.take()
    }

    fn read_home(&self) -> RwLockReadGuard<'_, Option<Home>> {
        self.home.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_home(&self) -> RwLockWriteGuard<'_, Option<Home>> {
        self.home.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MemoryRecord {
    fn drop(&mut self) {
        // One that was never released.
        self.count(0);
    }
}
