//! Isolation per call: each call begins with the newest snapshot's state, and leaves nothing behind.
//!
//! The instance is reset in place, on the thread that runs the call: before it where anybody has been
//! inside meanwhile (a lease, a synchronous call), and after it, so that its pages are given back at
//! once. A trap means nothing afterwards: the state is known again.

use std::sync::Arc;

use crate::error::{Error, ErrorCode, Result};
use crate::instance::replica::Replica;
use crate::instance::snapshot::Origin;
use crate::manager::Shared;

/// What an isolated call begins with.
pub(crate) struct Isolated(Origin);

impl Shared {
    /// What a call begins with, if calls are isolated.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] if the last snapshot was released: without one there is no isolation.
    pub(crate) fn isolation(&self) -> Result<Option<Isolated>> {
        if !self.isolates_calls() {
            return Ok(None);
        }
        let newest = self.lock_snapshots().origin();
        let gone = || {
            Error::new(
                ErrorCode::StaleHandle,
                format!(
                    "calls of {} are isolated, and its last snapshot was released; take one with snapshot()",
                    self.name()
                ),
            )
        };
        newest.map(Isolated).ok_or_else(gone).map(Some)
    }
}

impl Isolated {
    /// # Safety
    /// The calling thread holds the replica, and no call of it is on any stack.
    ///
    /// # Errors
    /// [`crate::ErrorCode::Internal`] where the system refuses; the instance is then poisoned.
    pub(crate) unsafe fn prepare(&self, replica: &Replica) -> Result<()> {
        if !Arc::ptr_eq(self.0.snapshot.module(), replica.module()) {
            return Err(Error::internal(
                "an isolated call and a snapshot of another build",
            ));
        }
        if replica.is_pristine(&self.0.snapshot) {
            return Ok(());
        }
        // SAFETY: contract of this function.
        unsafe { replica.reset(&self.0, false) }.map(drop)
    }

    /// # Safety
    /// The calling thread holds the replica, and no call of it is on any stack.
    pub(crate) unsafe fn clear(&self, replica: &Replica) {
        if replica.can_be_reset() {
            // Where it fails the instance is poisoned, and replaced before it serves again.
            // SAFETY: contract of this function.
            let _ = unsafe { replica.reset(&self.0, false) };
        }
    }
}
