//! The swap protocol of wasm-molt, pure: who may use which slot when, and in which order one
//! generation replaces another.
//!
//! Nothing here knows an engine, Node or the operating system, so every rule can be tested in
//! milliseconds and the gate can be explored by loom, interleaving by interleaving.
//!
//! ## Terminology
//!
//! * **Slot**: the place of one replica (a store and its instance). Numbered from 0. One user at a
//!   time.
//! * [`Gate`]: the admission point in front of the slots. Open, closed (waiters queue) or shut
//!   (waiters are refused).
//! * [`Waiter`]: something that wants a slot: a call or a lease.
//! * [`Ticket`]: proof that its holder has a slot. Dropped, it gives the slot back, whatever way
//!   the call ended.
//! * [`Home`]: the fast path: slot 0 lives on one thread, which [enters](Home::enter) it without a
//!   lock.
//! * **Cohort**: the tickets given out between two [rolls](Gate::roll) of the gate; a **straggler** is a
//!   ticket of an earlier cohort.
//! * **In flight** / **queued**: has a slot / waits for one.
//! * **Drain**: after the gate has closed, wait until nothing is in flight.
//! * **Retired** slot: out of service because its instance may not be called again, until it is
//!   reinstated.
//! * [`Generation`]: everything built by one successful load or swap. Numbered, never reused.
//! * [`swap`]: the protocol. Exclusive: instantiate, close the gate, drain, save, restore, commit (or
//!   roll back), open the gate. Rolling: instantiate, roll the gate.
//! * [`pause`]: close the gate, drain, do something to the instances (snapshot, reset, fork), open the
//!   gate.
//! * [`Policy`]: when an instance is **recycled**, which is replaced or reset without being asked, and why
//!   ([`Reason`]); a [`Crossing`] is what it has done to deserve that.
//! * **Withdrawn** slot: it is to be retired as soon as nobody has it.
//! * [`Custody`] of a retired slot: somebody may be inside its replica, and nobody else puts it back.
//! * [`Inbox`]: what other threads have for one thread, its **owner**, which one wake-up has it empty whole.
//! * [`conversation`]: a question to another thread, which may have the asker do something first.
//! * [`Stopping`]: where one call is, so that a stop finds it.
//! * [`ThreadPool`]: the threads that a guest has started itself, counted. They **begin** one by one,
//!   have **started** when they run guest code, and **exit** or are **recycled** together, while no
//!   **operation** is in flight.

#![forbid(unsafe_code)]

mod clock;
mod conversation;
mod gate;
mod generation;
mod growth;
mod home;
mod inbox;
pub mod pause;
mod phase;
mod policy;
mod start;
mod state;
mod stopping;
pub mod swap;
mod sync;
#[cfg(test)]
#[cfg(not(loom))]
mod testing;
mod threads;
mod ticket;

pub use clock::{Clock, ManualClock, SystemClock};
pub use conversation::{
    Answerer, Asker, ForAnswerer, ForAsker, Silence, Stopper, Unheard, Words, conversation,
};
pub use gate::{
    Admission, Custody, Gate, GateCounts, GateOptions, InFlight, Refusal, Refused, WaitId, Waiter,
};
pub use generation::Generation;
pub use growth::Growth;
pub use home::{Away, Home, Inside};
pub use inbox::{Inbox, Wake};
pub use pause::{PauseFailure, PausePlan, PauseTimings, Paused};
pub use phase::{FailedPhase, Phase};
pub use policy::{
    Backoff, Candidate, Crossing, MemoryThreshold, Policy, Reason, Thresholds, Wear, choose,
};
pub use stopping::{Stoppable, Stopping};
pub use swap::{Backend, Drained, Failure, OnDrainTimeout, Plan, Step, Timings};
pub use threads::{
    OperationTicket, PoolCounts, PoolRefused, PoolState, PoolTimeout, RecycleFailure, Starter,
    ThreadPool, ThreadTicket,
};
pub use ticket::{Ticket, TicketId};
