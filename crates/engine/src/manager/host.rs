//! The program's side of a manager.

use std::sync::Arc;

use wasm_molt_lifecycle::{Generation, Home};

use crate::error::{Error, Result};
use crate::instance::host::InstanceHost;
use crate::instance::replica::Replica;
use crate::instance::value::HostRef;
use crate::manager::Job;
use crate::manager::freed::Freed;
use crate::manager::lease::Lease;
use crate::manager::recycle::{Pressure, RecycleReport};
use crate::manager::swap::{ReloadReport, ReloadStep};

/// A step that must run on the home thread.
pub type HomeStep = Box<dyn FnOnce(Option<&Home<Job>>) + Send>;

/// The host's side of a manager.
///
/// Hooks get a lease; where its [`Lease::cancelled`] is disconnected, nobody waits for the hook any more,
/// and it should be given up. Every method blocks until it is done. The same methods are called on the home thread (synchronous
/// paths) and on a control thread (asynchronous ones); the host knows which it is on.
pub trait Host: InstanceHost + Send + Sync + 'static {
    /// Prepares a fresh instance before it serves.
    ///
    /// # Errors
    /// Whatever the host's code threw.
    fn initialize(&self, lease: &Arc<Lease>) -> Result<()>;

    /// Whether there is a hook behind [`save_state`](Self::save_state). Any thread, at once.
    fn saves_state(&self) -> bool;

    /// Reads what must survive out of the old, quiescent instance. `None`: there is no such hook.
    ///
    /// # Errors
    /// Whatever the host's code threw.
    fn save_state(&self, lease: &Arc<Lease>, replica: usize) -> Result<Option<HostRef>>;

    /// Puts it into the new instance before it serves.
    ///
    /// # Errors
    /// Whatever the host's code threw.
    fn restore_state(&self, lease: &Arc<Lease>, state: &HostRef, replica: usize) -> Result<()>;

    /// Runs `step` on the home thread, with the home handle if there is one.
    ///
    /// # Errors
    /// [`crate::ErrorCode::Closed`] if the home is gone; then `step` has not run.
    fn at_home(&self, step: HomeStep) -> Result<()>;

    /// These instances were replaced; called from inside a step at home, before the gate opens.
    /// Views of the old ones must be detached and their handles expire now.
    fn replaced(&self, change: &Replaced);

    /// These instances have been given, or are about to be given, the state of a snapshot; called from
    /// inside a step at home. Views of their memories must be detached now; their handles stay.
    fn rewound(&self, replicas: &[Arc<Replica>]);

    /// A realm is about to be captured, and nobody is inside: its threads have to end in good order. Called
    /// on the home thread.
    ///
    /// # Errors
    /// Whatever kept them; it is not captured then.
    fn realm_capturing(&self, _replica: &Arc<Replica>) -> Result<()> {
        Ok(())
    }

    /// A realm was captured: what JavaScript makes from now on is newer than that snapshot. Called on the
    /// home thread.
    fn realm_captured(&self, _replica: &Arc<Replica>, _snapshot: u64) {}

    /// Views of these memories of a realm must be detached now, because pages go. Called on the home
    /// thread, before [`realm_rewound`](Self::realm_rewound).
    fn realm_shrinks(&self, _replica: &Arc<Replica>, _memories: &[u32]) {}

    /// A realm has the state of that snapshot again. Called on the home thread, before anything else
    /// runs there.
    fn realm_rewound(&self, _replica: &Arc<Replica>, _snapshot: u64) {}

    /// Whether there is a hook behind [`reseed`](Self::reseed). Any thread, at once.
    fn reseeds(&self) -> bool {
        false
    }

    /// Has an instance, which begins with a snapshot's state, draw other random numbers than its copies.
    ///
    /// # Errors
    /// Whatever the host's code threw.
    fn reseed(&self, _lease: &Arc<Lease>) -> Result<()> {
        Ok(())
    }

    /// The lease is taken away from its holder; called from inside a step at home. Views that were taken
    /// through it must be detached and its handle expire now.
    fn revoked(&self, lease: &Arc<Lease>);

    /// The manager is closed and every question is answered: nothing will be asked of this host again.
    fn released(&self);

    /// Something happened; called on any thread, must not block.
    fn event(&self, event: Event);
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A new generation serves.
    Reload(Arc<ReloadReport>),
    /// A reload has come one step further.
    Step(ReloadStep),
    /// A reload did not happen.
    ReloadFailed(Error),
    /// A guest trapped.
    Trap(Error),
    /// A threshold was crossed.
    Pressure(Pressure),
    /// The one outcome of a decision to recycle; `None`: something else has replaced the instance.
    Recycled {
        /// As in [`Pressure::decision`].
        decision: u64,
        /// What came of it.
        outcome: Result<Option<Arc<RecycleReport>>>,
    },
    /// After recycles memory did not come back. Once.
    MemoryKept(Freed),
    /// The manager is closed.
    Close,
}

/// Instances that were replaced.
#[derive(Debug)]
pub struct Replaced {
    /// They do not serve any more.
    pub old: Vec<Arc<Replica>>,
    /// They serve now; empty at the end of the manager's life.
    pub new: Vec<Arc<Replica>>,
    /// The generation of the new ones.
    pub generation: Generation,
}
