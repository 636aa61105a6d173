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
    /// What a call of that instance begins with, if calls are isolated.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] if the last snapshot was released: without one there is no isolation.
    pub(crate) fn isolation(&self, replica: &Replica) -> Result<Option<Isolated>> {
        if !self.isolates_calls() {
            return Ok(None);
        }
        let newest = self.lock_snapshots().origin();
        let is_other = |newest: &Origin| !Arc::ptr_eq(newest.snapshot.module(), replica.module());
        let origin = if newest.as_ref().is_some_and(is_other) {
            // A roll to another build has overtaken the call.
            self.lock_serving().origin_of_left(replica)
        } else {
            newest
        };
        let gone = || {
            Error::new(
                ErrorCode::StaleHandle,
                format!(
                    "calls of {} are isolated, and its last snapshot was released; take one with snapshot()",
                    self.name()
                ),
            )
        };
        origin.map(Isolated).ok_or_else(gone).map(Some)
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
