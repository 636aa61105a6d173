//! What all of a manager's threads share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crossbeam_channel::{Receiver, Sender, bounded};
use wasm_molt_lifecycle::{Gate, GateOptions, Home, Ticket};

use super::control::Control;
use super::crash::Crashes;
use super::lending::Hooks;
use super::realm::Compiled;
use super::{Job, ManagerState, budget};
use crate::error::{Error, ErrorCode, Result};
use crate::instance::interrupt::Stop;
use crate::instance::module::Module;
use crate::instance::pool::{Pool, parallelism};
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::snapshot::Origin;
use crate::manager::host::{Event, Host};
use crate::manager::lease::Lease;
use crate::manager::options::{Isolation, ManagerOptions};
use crate::manager::recycle::Recycling;
use crate::manager::serving::Serving;
use crate::manager::snapshots::Snapshots;
use crate::manager::stats::Stats;

pub(crate) struct Shared {
    /// Unique in the process, and larger than that of any earlier manager.
    id: u64,
    pub(super) name: OnceLock<String>,
    pub(crate) options: ManagerOptions,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) gate: Gate<Job>,
    pub(crate) stats: Stats,
    pub(crate) serving: Mutex<Serving>,
    /// Every instance that may still be running, so that `destroy` finds it.
    pub(super) known: Mutex<Vec<Weak<Replica>>>,
    /// Leases with a ticket, so that a reload can end them.
    pub(super) leases: Mutex<Vec<Weak<Lease>>>,
    /// What the hook of the swap under way was lent.
    pub(super) hook_lease: Mutex<Option<Arc<Lease>>>,
    pub(super) control: Mutex<Control>,
    pub(super) control_changed: Condvar,
    pub(super) state: AtomicU8,
    pub(super) is_destroyed: AtomicBool,
    /// Becomes disconnected when the manager is destroyed: wakes everything that waits for the host.
    pub(super) cancel: (Mutex<Option<Sender<()>>>, Receiver<()>),
    pub(super) hooks: Mutex<Hooks>,
    pub(super) settling: AtomicUsize,
    pub(super) memory_bytes_peak: AtomicUsize,
    pub(super) snapshots: Mutex<Snapshots>,
    /// Somebody has wanted a snapshot, and will want one of the next build.
    pub(super) has_captured: AtomicBool,
    pub(super) compiled: Compiled,
    pub(crate) recycling: Recycling,
    pub(crate) crashes: Crashes,
}

impl Shared {
    /// Before the start, and the home handle if the options ask for one.
    pub(super) fn new(
        options: ManagerOptions,
        host: Arc<dyn Host>,
    ) -> Result<(Arc<Self>, Option<Home<Job>>)> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        options.check(&*host)?;
        let name = options.name.clone().unwrap_or_else(|| "wasm".into());
        let threads = options
            .threads
            // All that a realm's do is to compile.
            .unwrap_or_else(|| {
                if options.is_realm {
                    parallelism()
                } else {
                    options.instances.min(parallelism())
                }
            });
        let pool = Arc::new(Pool::new(&name, threads, options.limits.stack_bytes()));
        let gate = Gate::new(GateOptions {
            slots: options.instances,
            max_queue: options.max_queue,
            home: options.has_home,
        });
        let home = gate.take_home();
        let (alive, cancelled) = bounded(0);
        let shared = Arc::new(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            name: OnceLock::new(),
            options,
            host,
            gate,
            stats: Stats::new()?,
            serving: Mutex::new(Serving::new(pool)),
            known: Mutex::default(),
            leases: Mutex::default(),
            hook_lease: Mutex::default(),
            control: Mutex::default(),
            control_changed: Condvar::new(),
            state: AtomicU8::new(ManagerState::Starting as u8),
            is_destroyed: AtomicBool::new(false),
            cancel: (Mutex::new(Some(alive)), cancelled),
            hooks: Mutex::new(Hooks::new()),
            settling: AtomicUsize::new(0),
            memory_bytes_peak: AtomicUsize::new(0),
            snapshots: Mutex::default(),
            has_captured: AtomicBool::new(false),
            compiled: Compiled::default(),
            recycling: Recycling::default(),
            crashes: Crashes::default(),
        });
        Ok((shared, home))
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn name(&self) -> &str {
        self.name.get().map_or_else(
            || self.options.name.as_deref().unwrap_or("wasm"),
            String::as_str,
        )
    }

    pub(super) fn lock_control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_serving(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_snapshots(&self) -> MutexGuard<'_, Snapshots> {
        self.snapshots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What new instances of that build begin with.
    pub(crate) fn origin(&self, module: &Arc<Module>) -> Option<Origin> {
        if self.options.is_realm {
            // JavaScript makes it, and begins anew.
            return None;
        }
        let newest = self.lock_snapshots().origin();
        newest.filter(|newest| Arc::ptr_eq(newest.snapshot.module(), module))
    }

    /// A snapshot was taken.
    pub(crate) fn note_capture(&self) {
        self.has_captured.store(true, Ordering::Relaxed);
    }

    /// Whether cold memory is laid out for a capture without copying.
    pub(crate) fn prepares_snapshots(&self) -> bool {
        let likely = || self.isolates_calls() || self.has_captured.load(Ordering::Relaxed);
        self.options.prepares_snapshots.unwrap_or_else(likely)
    }

    pub(crate) fn isolates_calls(&self) -> bool {
        self.options.isolation == Isolation::PerCall
    }

    pub(crate) fn replica(&self, slot: usize) -> Option<Arc<Replica>> {
        self.lock_serving().replicas.get(slot).cloned()
    }

    pub(crate) fn blueprint(&self) -> Result<Arc<Blueprint>> {
        self.lock_serving()
            .blueprint
            .clone()
            .ok_or_else(|| self.closed())
    }

    pub(super) fn module(&self) -> Option<Arc<Module>> {
        Some(Arc::clone(&self.lock_serving().blueprint.as_ref()?.module))
    }

    pub(crate) fn function_name(&self, index: usize) -> String {
        self.module()
            .and_then(|m| m.functions().get(index).map(|f| f.name.clone()))
            .unwrap_or_else(|| format!("function {index}"))
    }

    pub(crate) fn state(&self) -> ManagerState {
        let index = usize::from(self.state.load(Ordering::Acquire));
        ManagerState::ALL
            .get(index)
            .copied()
            .unwrap_or(ManagerState::Failed)
    }

    /// Once closing, only the end itself may change the state.
    pub(crate) fn set_state(&self, state: ManagerState) {
        let may = match self.state() {
            ManagerState::Closed => false,
            ManagerState::Closing => state == ManagerState::Closed,
            _ => true,
        };
        if may {
            self.state.store(state as u8, Ordering::Release);
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state(), ManagerState::Closing | ManagerState::Closed)
    }

    pub(crate) fn is_destroyed(&self) -> bool {
        self.is_destroyed.load(Ordering::Acquire)
    }

    pub(crate) fn closed(&self) -> Error {
        Error::new(
            ErrorCode::Closed,
            format!(
                "{} is {}; create a new manager",
                self.name(),
                self.state().as_str()
            ),
        )
    }

    pub(crate) fn queue_full(&self, max_queue: usize) -> Error {
        Error::new(
            ErrorCode::QueueFull,
            format!(
                "{} has maxQueue = {max_queue} calls waiting already; wait for some, or raise maxQueue",
                self.name()
            ),
        )
    }

    pub(crate) fn remember(&self, replica: &Arc<Replica>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|r| r.strong_count() > 0);
        known.push(Arc::downgrade(replica));
        drop(known);
        // A destroy that came before the replica was known must still stop it.
        if self.is_destroyed() {
            replica.interrupter().stop_for_good(destroyed());
        }
    }

    pub(crate) fn stop_all(&self, stop: &Stop) {
        let known = self
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for replica in known.iter().filter_map(Weak::upgrade) {
            replica.interrupter().stop_for_good(stop.clone());
        }
    }

    /// A ticket goes back; a poisoned instance does not serve on. Returns its slot, for
    /// [`repair_lost`](Self::repair_lost): retired first, repaired then, because a repair that came before the
    /// retirement would have its fresh instance retired.
    pub(crate) fn give_back(
        self: &Arc<Self>,
        ticket: Ticket<Job>,
        replica: &Replica,
    ) -> Option<usize> {
        let slot = ticket.slot();
        let serves = self
            .replica(slot)
            .is_some_and(|now| now.id() == replica.id());
        if serves && replica.must_be_replaced() {
            ticket.retire();
            return Some(slot);
        }
        if serves && replica.wear().wants_a_look() && self.judge_slot(replica) {
            // With the ticket, which knows whether the slot has rolled meanwhile.
            ticket.retire();
            if !replica.wear().is_due() || self.is_over() {
                // Its decision has just ended, without knowing of this.
                self.spare(slot);
            }
            return None;
        }
        drop(ticket);
        None
    }

    /// Has what a ticket left poisoned replaced.
    pub(crate) fn repair_lost(self: &Arc<Self>, slot: Option<usize>) {
        if let Some(slot) = slot {
            self.request_repair(slot);
        }
    }

    /// Tells the host. What it does with that is not our affair, not even if it panics.
    pub(crate) fn tell(&self, event: Event) {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.host.event(event)));
    }

    /// Tells listeners of a trap; other failures are the caller's affair alone.
    pub(crate) fn tell_trap(&self, error: &Error) {
        if matches!(error, Error::Trap { .. }) {
            self.tell(Event::Trap(error.clone()));
        }
    }

    /// A call is out of flight and its answer is not yet on its way, until the guard is dropped.
    pub(crate) fn settling(&self) -> Settling<'_> {
        self.settling.fetch_add(1, Ordering::SeqCst);
        Settling(&self.settling)
    }

    /// Answers of calls that are out of flight are on their way: they come before the swap's own.
    pub(crate) fn wait_settled(&self) {
        while self.settling.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        budget::forget(self);
    }
}

/// See [`Shared::settling`].
pub(crate) struct Settling<'a>(&'a AtomicUsize);

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(super) fn destroyed() -> Stop {
    Stop::Interrupted("the manager was destroyed".into())
}
