//! Linear memories that this crate owns, instead of wasmtime.
//!
//! Owning them is what lets a released instance give its pages back at once while a view that
//! somebody kept still cannot crash the process, and what makes snapshots, resets and shrinking possible.
//!
//! - [`Pin`]: keeps the address range of a memory (a `Reservation`) mapped, and readable.
//! - [`GuestMemory`]: what wasmtime sees (`wasmtime::LinearMemory`); dropped with the store.
//! - [`MemoryRecord`]: what the host sees; outlives the store and then answers "released".
//! - [`MemoryHost`]: makes memories for wasmtime. It is told by a [`MemoryPlan`] which ones are
//!   coming.
//! - [`Image`]: the contents of a moment; a memory can be made from it, and be put back to it.
//! - [`PollPage`]: the page that instrumented code touches at every safepoint; taking it away stops
//!   the code.

mod any;
mod guest;
mod home;
mod host;
mod image;
mod poll;
mod record;
mod region;
mod reservation;
#[cfg_attr(target_os = "linux", path = "memory/resident_linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "memory/resident_portable.rs")]
mod resident;
#[cfg(any(not(unix), test))]
mod sys_portable;
#[cfg(unix)]
mod sys_unix;

#[cfg(test)]
mod tests;

pub(crate) use any::AnyMemory;
pub(crate) use host::{
    MemoryOptions, MemoryPlan, NO_MEMORY, configure, new_memory, with_plan, with_plan_and_poll,
};
pub(crate) use image::Image;
pub use image::ImageKind;
pub(crate) use poll::{HAS_POLL_PAGE, PollPage, is_poll_fault};
pub(crate) use record::memory_total;
pub use record::{MemoryRecord, MemoryUsage, MemoryView, OutOfBounds, memory_changes};
pub use reservation::Pin;
pub(crate) use resident::resident_bytes;

/// Everything is rounded up to this: a wasm page, and a multiple of every host page size in use.
const GRANULE: usize = 1 << 16;

/// Rounds up to whole [`GRANULE`]s; `None` if that overflows.
fn round_up(bytes: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(GRANULE)
}

/// The same, where such a size is to be held.
fn extent(bytes: usize) -> std::io::Result<usize> {
    Ok(round_up(bytes).ok_or(std::io::ErrorKind::OutOfMemory)?)
}
