//! Proof that somebody has a slot.

use std::fmt;

use crate::gate::{Gate, Waiter};

/// A slot of a [`Gate`], held. Nobody else has that slot until the ticket is dropped.
///
/// Goes to any thread. Dropping it takes the gate's lock, gives the slot to the next waiter and
/// [starts](Waiter::start) that one on the dropping thread; so drop it where nothing is locked.
///
/// What its holder did to the replica happens before whatever the next holder does, and before
/// [`Gate::wait_drained`] returns: the gate's mutex orders them.
#[must_use = "dropping the ticket gives the slot back at once"]
pub struct Ticket<W: Waiter> {
    gate: Gate<W>,
    id: TicketId,
    is_retired: bool,
}

/// Names a ticket that is out: no other has this name at the time. It also names the replica that the
/// ticket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TicketId {
    /// The roll ([of all](Gate::roll), or [of its slot](Gate::roll_slot)) that its slot had had last when the
    /// ticket was given out, counted over the gate.
    pub cohort: u64,
    /// Less than [`GateOptions::slots`](crate::GateOptions::slots).
    pub slot: usize,
}

impl<W: Waiter> Ticket<W> {
    /// Only for a slot that the gate's state has just marked as held.
    pub(crate) fn new(gate: Gate<W>, id: TicketId) -> Self {
        Self {
            gate,
            id,
            is_retired: false,
        }
    }

    /// The number of the slot, less than [`GateOptions::slots`](crate::GateOptions::slots).
    pub fn slot(&self) -> usize {
        self.id.slot
    }

    /// Its name.
    pub fn id(&self) -> TicketId {
        self.id
    }

    /// Takes the slot out of service: its instance is not to be called again.
    ///
    /// The call is no longer in flight, and waiters are not started on the slot, until
    /// [`Gate::reinstate`] or [`Gate::reinstate_all`]. Of a straggler nothing is left to retire.
    pub fn retire(mut self) {
        self.is_retired = true;
    }
}

impl<W: Waiter> Drop for Ticket<W> {
    fn drop(&mut self) {
        self.gate.end(self.id, self.is_retired);
    }
}

impl<W: Waiter> fmt::Debug for Ticket<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
