//! The host's side of a linear memory.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::reservation::Reservation;

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
    released: AtomicBool,
    /// Gone once released. Written under the lock by growth that moves and by release; read under
    /// it by every copy.
    home: RwLock<Option<Arc<Reservation>>>,
}

static CHANGES: AtomicUsize = AtomicUsize::new(0);

/// Another number whenever a memory of the process has grown or moved. Who hears, by whatever
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
    /// without a fault.
    pub pin: Arc<Reservation>,
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
    pub(super) fn new(home: Arc<Reservation>, len: usize) -> Self {
        Self {
            base: AtomicPtr::new(home.base()),
            len: AtomicUsize::new(len),
            peak: AtomicUsize::new(len),
            limit: AtomicUsize::new(usize::MAX),
            released: AtomicBool::new(false),
            home: RwLock::new(Some(home)),
        }
    }

    /// Where the memory begins, or began before it was released. Only growth beyond the reservation
    /// changes it. Use [`Self::view`] where the memory could grow or go meanwhile.
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

    /// What [`Self::set_limit_bytes`] said last.
    pub fn limit_bytes(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    /// Whether the store is gone and the pages are given back.
    pub fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    /// The pin: keeps the address range mapped. `None` once released.
    pub fn reservation(&self) -> Option<Arc<Reservation>> {
        self.read_home().clone()
    }

    /// Address, length and pin that belong together. `None` once released.
    pub fn view(&self) -> Option<MemoryView> {
        let home = self.read_home();
        let pin = Arc::clone(home.as_ref()?);
        Some(MemoryView {
            base: pin.base(),
            byte_length: self.byte_len(),
            pin,
        })
    }

    /// Copies bytes out.
    pub fn read(&self, ptr: u64, out: &mut [u8]) -> Result<(), OutOfBounds> {
        let home = self.read_home();
        let from = self.locate(home.as_deref(), ptr, out.len())?;
        // SAFETY: `locate` found the range inside the committed part of a reservation, which the
        // lock keeps mapped. `out` is a Rust slice and so not guest memory. The guest may write
        // meanwhile; the bytes are then a mixture.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, ptr: u64, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let home = self.read_home();
        let to = self.locate(home.as_deref(), ptr, bytes.len())?;
        // SAFETY: as in `read`, with the roles exchanged.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// The address of `ptr` if `byte_length` bytes follow it now.
    fn locate(
        &self,
        home: Option<&Reservation>,
        ptr: u64,
        byte_length: usize,
    ) -> Result<*mut u8, OutOfBounds> {
        let memory_bytes = self.byte_len();
        let error = OutOfBounds {
            ptr,
            byte_length,
            memory_bytes,
        };
        let home = home.ok_or(error)?;
        let start = usize::try_from(ptr).map_err(|_| error)?;
        let end = start.checked_add(byte_length).ok_or(error)?;
        if end > memory_bytes.min(home.accessible_bytes()) {
            return Err(error);
        }
        Ok(home.base().wrapping_add(start))
    }

    /// Publishes a new size in the same place.
    pub(super) fn resized(&self, len: usize) {
        self.len.store(len, Ordering::Release);
        CHANGES.fetch_add(1, Ordering::Release);
        self.peak.fetch_max(len, Ordering::AcqRel);
    }

    /// Puts the memory into another reservation; `fill` copies the contents while nobody else can
    /// read or write them. Returns the old reservation.
    pub(super) fn moved(
        &self,
        home: Arc<Reservation>,
        len: usize,
        fill: impl FnOnce(&Reservation),
    ) -> Option<Arc<Reservation>> {
        let mut slot = self.write_home();
        fill(&home);
        self.base.store(home.base(), Ordering::Release);
        let old = slot.replace(home);
        self.resized(len);
        old
    }

    /// Marks the memory as gone and hands out its reservation. From here on every copy is out of
    /// bounds.
    pub(super) fn release(&self) -> Option<Arc<Reservation>> {
        let mut slot = self.write_home();
        self.released.store(true, Ordering::Release);
        self.len.store(0, Ordering::Release);
        slot.take()
    }

    fn read_home(&self) -> RwLockReadGuard<'_, Option<Arc<Reservation>>> {
        self.home.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_home(&self) -> RwLockWriteGuard<'_, Option<Arc<Reservation>>> {
        self.home.write().unwrap_or_else(PoisonError::into_inner)
    }
}
