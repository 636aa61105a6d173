//! Making memories for wasmtime.
//!
//! A `MemoryCreator` is called without any context, so a thread-local [`MemoryPlan`] says what the
//! memories are that an instantiation is about to ask for. wasmtime asks for the *defined* memories
//! of the instance, in index order, before any guest code runs. Two things differ from what one
//! would expect:
//!
//! - The heap of the garbage collector comes through the same creator, and even before the
//!   memories. Its reservation is configured one granule larger, which is how it is told apart.
//! - `wasmtime::Memory::new` and `SharedMemory::new` do not use the creator at all: memories for
//!   import are made by [`new_memory`].

use std::cell::RefCell;
use std::sync::Arc;

use wasmtime::{AsContextMut, Config, Extern, Instance, MemoryType, Module, Store};

use super::guest::{GuestMemory, Layout};
use super::home::Start;
use super::image::{Image, ImageKind};
use super::poll::{PollMemory, PollPage};
use super::record::MemoryRecord;
use super::region::Platform;
use super::{GRANULE, round_up};

/// Address space for every index a 32-bit memory can have.
const FULL_RESERVATION: usize = 1 << 32;
/// Beyond it, for constant offsets; what wasmtime takes itself.
const FULL_GUARD: usize = 32 << 20;
/// Address space that a 64-bit memory gets, if its type allows that much, so that it seldom has to
/// move.
const WIDE_RESERVATION: usize = 16 << 30;

/// How errors begin that say that the system has refused one.
pub(crate) const NO_MEMORY: &str = "could not make a linear memory";
/// Where the system has not enough.
const REMEDY: &str = "if address space is what lacks (ulimit -v, many instances), lower engine.memoryReservationBytes";

/// How linear memories are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryOptions {
    /// Bytes of address space per memory. From 4 GiB on, 32-bit memories need no bounds checks.
    /// Below, code is slower and a memory that outgrows its reservation moves (a shared one cannot,
    /// and stops there).
    pub(crate) reservation_bytes: u64,
    /// Whether faults may be caught by signal handlers; explicit bounds checks otherwise.
    pub(crate) signals_based_traps: bool,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self {
            reservation_bytes: FULL_RESERVATION as u64,
            signals_based_traps: true,
        }
    }
}

/// Makes an engine use our memories. Call it last of what concerns memory or traps.
pub(crate) fn configure(config: &mut Config, options: &MemoryOptions) {
    configure_for(Platform::NATIVE, config, options);
}

pub(super) fn configure_for(platform: Platform, config: &mut Config, options: &MemoryOptions) {
    let reservation = if platform.guards {
        usize::try_from(options.reservation_bytes)
            .ok()
            .and_then(round_up)
            .unwrap_or(FULL_RESERVATION)
    } else {
        0
    };
    let guard = match (
        platform.guards && options.signals_based_traps,
        reservation >= FULL_RESERVATION,
    ) {
        (false, _) => 0,
        (true, true) => FULL_GUARD,
        (true, false) => GRANULE,
    };
    let gc_reservation = reservation.saturating_add(GRANULE);
    config
        .signals_based_traps(options.signals_based_traps)
        // Data segments are copied in; copy-on-write images are ours to make.
        .memory_init_cow(false)
        .memory_reservation(reservation as u64)
        .memory_guard_size(guard as u64)
        .memory_reservation_for_growth(0)
        .guard_before_linear_memory(false)
        // A 32-bit memory with a full reservation still never moves; a 64-bit one or a small
        // reservation has to.
        .memory_may_move(true)
        .gc_heap_reservation(gc_reservation as u64)
        .gc_heap_guard_size(guard as u64)
        .gc_heap_reservation_for_growth(0)
        .gc_heap_may_move(true)
        .with_host_memory(Arc::new(MemoryHost {
            platform,
            gc_reservation,
        }));
}

/// What the next instantiation on this thread will ask for.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryPlan {
    /// How many memories the guest itself defines.
    pub(crate) guests: usize,
    /// Whether a poll memory follows them.
    pub(crate) poll: bool,
    /// What the guest memories begin with, in order; empty for a cold start. wasmtime still copies
    /// active data segments over it, so the module must have none that matter.
    pub(crate) images: Vec<Arc<Image>>,
    /// How images are made of them.
    pub(crate) kind: ImageKind,
    /// Whether their first capture should cost no copy, at the price of slower first touches.
    pub(crate) prepared: bool,
}

/// What was made by a plan.
#[derive(Debug, Default)]
pub(crate) struct Created {
    /// The guest's own memories, in the order of their indices.
    pub(crate) guests: Vec<Arc<MemoryRecord>>,
    /// The poll page, if one was planned and made.
    pub(crate) poll: Option<PollPage>,
}

/// Is given the poll page as soon as it is made, before any guest code runs.
type OnPoll = Box<dyn FnOnce(PollPage)>;

/// A plan at work.
struct Active {
    guests: usize,
    poll: bool,
    images: std::vec::IntoIter<Arc<Image>>,
    kind: ImageKind,
    prepared: bool,
    on_poll: Option<OnPoll>,
    limit_bytes: usize,
    created: Created,
}

/// What a request turned out to be.
enum Next {
    Guest(Start, usize),
    Poll,
    Unplanned,
}

thread_local! {
    /// Innermost last: a host function of a start function may instantiate again.
    static PLANS: RefCell<Vec<Active>> = const { RefCell::new(Vec::new()) };
}

/// Takes the plan off the stack however `f` ends.
struct Scope;

impl Scope {
    fn enter(plan: MemoryPlan, limit_bytes: usize, on_poll: Option<OnPoll>) -> Self {
        let active = Active {
            guests: plan.guests,
            poll: plan.poll,
            images: plan.images.into_iter(),
            kind: plan.kind,
            prepared: plan.prepared,
            on_poll,
            limit_bytes,
            created: Created::default(),
        };
        PLANS.with_borrow_mut(|plans| plans.push(active));
        Self
    }

    fn leave(self) -> Created {
        std::mem::forget(self);
        PLANS
            .with_borrow_mut(Vec::pop)
            .map_or_else(Created::default, |active| active.created)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        PLANS.with_borrow_mut(Vec::pop);
    }
}

/// Runs `f`, an instantiation, and returns the memories that were made for it. Those of a failed
/// instantiation are released with the store, at the latest.
pub(crate) fn with_plan<R>(plan: MemoryPlan, f: impl FnOnce() -> R) -> (R, Created) {
    let scope = Scope::enter(plan, usize::MAX, None);
    let result = f();
    (result, scope.leave())
}

/// The same, with what must hold before any guest code can run: the limit of each guest memory, and
/// who is given the poll page.
pub(crate) fn with_plan_and_poll<R>(
    plan: MemoryPlan,
    limit_bytes: usize,
    on_poll: impl FnOnce(PollPage) + 'static,
    f: impl FnOnce() -> R,
) -> (R, Created) {
    let scope = Scope::enter(plan, limit_bytes, Some(Box::new(on_poll)));
    let result = f();
    (result, scope.leave())
}

/// Makes a memory (an `Extern::Memory` or `Extern::SharedMemory`) for a guest to import: one more
/// memory for the plan around it.
pub(crate) fn new_memory(
    mut store: impl AsContextMut,
    ty: &MemoryType,
) -> wasmtime::Result<Extern> {
    let mut memories = wasm_encoder::MemorySection::new();
    memories.memory(wasm_encoder::MemoryType {
        minimum: ty.minimum(),
        maximum: ty.maximum(),
        memory64: ty.is_64(),
        shared: ty.is_shared(),
        page_size_log2: (ty.page_size_log2() != 16).then(|| u32::from(ty.page_size_log2())),
    });
    let mut exports = wasm_encoder::ExportSection::new();
    exports.export(EXPORT, wasm_encoder::ExportKind::Memory, 0);
    let mut module = wasm_encoder::Module::new();
    module.section(&memories).section(&exports);

    let engine = store.as_context().engine().clone();
    let bytes = module.finish();
    let module = crate::instance::pool::apart(|| Module::new(&engine, &bytes))
        .map_err(|e| wasmtime::Error::msg(e.to_string()))??;
    let lost = || wasmtime::Error::msg("the memory's module lost its export");
    if ty.is_shared() {
        // It is nobody's, and each store that imports it has it once: wasmtime refuses, by an assertion, to
        // tell whose memory a fault is in where a store has the same memory in two places.
        let mut elsewhere = Store::new(&engine, ());
        let instance = Instance::new(&mut elsewhere, &module, &[])?;
        return instance.get_export(&mut elsewhere, EXPORT).ok_or_else(lost);
    }
    let instance = Instance::new(store.as_context_mut(), &module, &[])?;
    instance.get_export(store, EXPORT).ok_or_else(lost)
}

/// What [`new_memory`]'s module calls its memory.
const EXPORT: &str = "memory";

/// Makes the memories of one engine.
#[derive(Debug)]
struct MemoryHost {
    platform: Platform,
    /// Asked for by the garbage collector's heap, and by nothing else.
    gc_reservation: usize,
}

impl MemoryHost {
    fn poll_memory(&self, reserved: usize, guard: usize) -> Result<PollPage, String> {
        let total = reserved.saturating_add(guard);
        PollPage::new(self.platform, total).map_err(|error| {
            format!("{NO_MEMORY} for the poll page ({total} reserved): {error}; {REMEDY}")
        })
    }

    fn guest_memory(
        &self,
        ty: &MemoryType,
        minimum: usize,
        maximum: Option<usize>,
        reserved: usize,
        guard: usize,
        start: &Start,
    ) -> Result<GuestMemory, String> {
        let too_large =
            || format!("a linear memory of {minimum} bytes does not fit into the address space");
        let maximum = maximum.unwrap_or(usize::MAX);
        let first = start.image.as_ref().map_or(minimum, |i| i.byte_len());
        if first < minimum || first > maximum {
            return Err(format!(
                "the image has {first} bytes, the memory's type allows {minimum} to {maximum}"
            ));
        }
        let least = round_up(first).ok_or_else(too_large)?.max(reserved);
        let movable = !ty.is_shared();
        let wide = if !movable {
            // Its code may hold the reservation for its bound, so growth must end there; unless it
            // begins beyond it.
            if minimum <= reserved && reserved > 0 {
                least
            } else {
                round_up(maximum).unwrap_or(least)
            }
        } else if ty.is_64() && reserved >= FULL_RESERVATION {
            round_up(maximum.min(WIDE_RESERVATION)).unwrap_or(least)
        } else {
            least
        };
        let layout = Layout {
            platform: self.platform,
            minimum,
            capacity: wide.max(least),
            guard,
            maximum,
            movable,
        };
        GuestMemory::new(layout, start)
            .or_else(|error| {
                if layout.capacity == least {
                    return Err(error);
                }
                let layout = Layout {
                    capacity: least,
                    ..layout
                };
                GuestMemory::new(layout, start)
            })
            .map_err(|error| {
                format!("{NO_MEMORY} of {minimum} bytes ({reserved} reserved): {error}; {REMEDY}")
            })
    }

    /// What the innermost plan says about the next memory.
    fn next(&self, reserved: usize) -> Next {
        if reserved == self.gc_reservation {
            return Next::Unplanned;
        }
        PLANS.with_borrow_mut(|plans| match plans.last_mut() {
            Some(plan) if plan.guests > 0 => {
                plan.guests -= 1;
                let start = Start {
                    image: plan.images.next(),
                    kind: plan.kind,
                    prepared: plan.prepared,
                };
                Next::Guest(start, plan.limit_bytes)
            }
            Some(plan) if plan.poll => {
                plan.poll = false;
                Next::Poll
            }
            _ => Next::Unplanned,
        })
    }
}

/// Notes a memory in the innermost plan.
fn note(f: impl FnOnce(&mut Created)) {
    PLANS.with_borrow_mut(|plans| {
        if let Some(plan) = plans.last_mut() {
            f(&mut plan.created);
        }
    });
}

// SAFETY: the memories keep `LinearMemory`'s contract, are zero at the start, and have the
// reservation and guard that were asked for.
unsafe impl wasmtime::MemoryCreator for MemoryHost {
    fn new_memory(
        &self,
        ty: MemoryType,
        minimum: usize,
        maximum: Option<usize>,
        reserved_size_in_bytes: Option<usize>,
        guard_size_in_bytes: usize,
    ) -> Result<Box<dyn wasmtime::LinearMemory>, String> {
        let reserved = reserved_size_in_bytes.unwrap_or(0);
        match self.next(reserved) {
            Next::Guest(start, limit_bytes) => {
                if let Some(image) = &start.image
                    && image.byte_len() > limit_bytes
                {
                    return Err(format!(
                        "the image has {} bytes, the memory's limit is {limit_bytes}",
                        image.byte_len()
                    ));
                }
                let memory = self.guest_memory(
                    &ty,
                    minimum,
                    maximum,
                    reserved,
                    guard_size_in_bytes,
                    &start,
                )?;
                memory.record().set_limit_bytes(limit_bytes);
                note(|created| created.guests.push(Arc::clone(memory.record())));
                Ok(Box::new(memory))
            }
            Next::Poll => {
                let page = self.poll_memory(reserved, guard_size_in_bytes)?;
                let on_poll = PLANS.with_borrow_mut(|plans| plans.last_mut()?.on_poll.take());
                if let Some(on_poll) = on_poll {
                    on_poll(page.clone());
                }
                note(|created| created.poll = Some(page.clone()));
                Ok(Box::new(PollMemory(page)))
            }
            Next::Unplanned => Ok(Box::new(self.guest_memory(
                &ty,
                minimum,
                maximum,
                reserved,
                guard_size_in_bytes,
                &Start::default(),
            )?)),
        }
    }
}
