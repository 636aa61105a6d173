//! The poll page: how a running guest is stopped without asking it to check anything.
//!
//! Instrumented code (see `instrument`) stores to the first bytes of a memory of its own at every
//! safepoint. Taking access to that page away makes the next such store fault, at a place the
//! engine knows as a trap site, and the call unwinds like any other trap.
//!
//! The memory has the whole reservation that the engine is configured for, though one page of it is
//! used: wasmtime attributes a fault to the memory whose *configured* range holds the address, and
//! refuses (by an assertion) an address that two memories claim.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::region::Platform;
use super::reservation::Reservation;

/// Whether poll pages work here; where not, interruption needs epochs.
pub(crate) const HAS_POLL_PAGE: bool = cfg!(unix);

/// Bytes of the poll memory: one wasm page.
pub(super) const POLL_BYTES: usize = super::GRANULE;

/// The handle that stops one instance, from any thread. Clones are the same page.
#[derive(Debug, Clone)]
pub(crate) struct PollPage(Arc<Page>);

#[derive(Debug)]
struct Page {
    reservation: Reservation,
    /// Held across the change, so that the last of `revoke` and `grant` to return is also the one
    /// in effect.
    revoked: Mutex<bool>,
}

impl PollPage {
    pub(super) fn new(platform: Platform, reserved: usize) -> io::Result<Self> {
        if !platform.guards {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let reservation = Reservation::new(platform, reserved.max(POLL_BYTES))?;
        reservation.commit(POLL_BYTES)?;
        Ok(Self(Arc::new(Page {
            reservation,
            revoked: Mutex::new(false),
        })))
    }

    /// Stops the instance at its next safepoint, and at once when it is called again, until
    /// [`Self::grant`].
    pub(crate) fn revoke(&self) -> io::Result<()> {
        self.set(true)
    }

    /// Lets the instance run again.
    pub(crate) fn grant(&self) -> io::Result<()> {
        self.set(false)
    }

    /// Whether a fault at that address is a poll's.
    #[cfg(unix)]
    pub(crate) fn contains(&self, address: usize) -> bool {
        let base = self.0.reservation.base().addr();
        (base..base + POLL_BYTES).contains(&address)
    }

    /// Whether the page is taken away now.
    #[cfg(test)]
    pub(super) fn is_revoked(&self) -> bool {
        *self
            .0
            .revoked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, revoke: bool) -> io::Result<()> {
        let mut revoked = self
            .0
            .revoked
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *revoked != revoke {
            self.0.reservation.set_accessible(POLL_BYTES, !revoke)?;
            *revoked = revoke;
        }
        Ok(())
    }
}

/// The poll memory as wasmtime sees it.
#[derive(Debug)]
pub(super) struct PollMemory(pub(super) PollPage);

// SAFETY: one committed, zeroed wasm page inside a reservation of the configured size, which the
// page keeps mapped. Access to it can be taken away, which compiled code meets as a fault at a trap
// site; nothing else touches it, since the memory is not exported and only polls name it.
unsafe impl wasmtime::LinearMemory for PollMemory {
    fn byte_size(&self) -> usize {
        POLL_BYTES
    }

    fn byte_capacity(&self) -> usize {
        POLL_BYTES
    }

    fn grow_to(&mut self, _new_size: usize) -> wasmtime::Result<()> {
        Err(io::Error::from(io::ErrorKind::Unsupported).into())
    }

    fn as_ptr(&self) -> *mut u8 {
        self.0.0.reservation.base()
    }
}

/// Whether a trap came from a poll, and so from [`PollPage::revoke`], and not from an access of the
/// guest's own.
///
/// A guest's access can only fault beyond its memory's size, a poll only at address 0 of a memory
/// that is not empty. wasmtime keeps its `WasmFault` to itself, so this looks at the words it adds
/// to the error.
pub(crate) fn is_poll_fault(error: &wasmtime::Error) -> bool {
    matches!(
        error.downcast_ref::<wasmtime::Trap>(),
        Some(wasmtime::Trap::MemoryOutOfBounds)
    ) && error.chain().any(|cause| cause.to_string() == POLL_FAULT)
}

/// What wasmtime says about a fault at a poll.
const POLL_FAULT: &str = "memory fault at wasm address 0x0 in linear memory of size 0x10000";
