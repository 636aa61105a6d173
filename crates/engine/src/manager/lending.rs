//! Instances that are lent, to hooks and to whoever holds a lease, and how they are taken away again.

use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use wasm_molt_lifecycle::Ticket;

use super::control::guarded;
use super::shared::destroyed;
use super::{Job, Shared};
use crate::error::Result;
use crate::instance::interrupt::Stop;
use crate::instance::pool::Pool;
use crate::instance::replica::Replica;
use crate::manager::lease::Lease;

/// How hooks run, and until when.
#[derive(Clone)]
pub(crate) struct HookScope {
    /// On the home thread: they must be synchronous.
    pub(crate) is_sync: bool,
    /// Disconnected as soon as nobody waits for them any more.
    pub(crate) cancelled: Receiver<()>,
}

impl HookScope {
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self.cancelled.try_recv(), Err(TryRecvError::Disconnected))
    }
}

/// Whether anybody still waits for hooks.
pub(crate) struct Hooks {
    /// Dropped when nobody waits any more for the hooks that run now; what has not been committed by then is
    /// rolled back. `None`: nor for those that would come, because the patience of a `close()` is over.
    alive: Option<Sender<()>>,
    cancelled: Receiver<()>,
    /// Operations do not begin any more. Repairs do: calls wait for them.
    are_given_up: bool,
}

impl Hooks {
    pub(super) fn new() -> Self {
        let (alive, cancelled) = bounded(0);
        Self {
            alive: Some(alive),
            cancelled,
            are_given_up: false,
        }
    }
}

/// Why a reload stops what it should have waited for.
pub(crate) fn impatient() -> Stop {
    let why = "a reload did not want to wait any longer (onDrainTimeout: 'interrupt')";
    Stop::Interrupted(why.into())
}

impl Shared {
    /// Lends an instance that nobody else can reach to a hook.
    pub(crate) fn with_lease<T>(
        self: &Arc<Self>,
        replica: &Arc<Replica>,
        scope: &HookScope,
        hook: impl FnOnce(&Arc<Lease>) -> Result<T>,
    ) -> Result<T> {
        let lease = Lease::for_hook(self, Arc::clone(replica), scope);
        *self.hook_lease() = Some(Arc::clone(&lease));
        // A panic must not leave the lease noted, which keeps the instance, and with it the manager.
        let outcome = guarded(|| hook(&lease));
        lease.release();
        if self.is_destroyed() {
            replica.interrupter().stop_for_good(destroyed());
        }
        if lease.is_cancelled() {
            lease.cut(&self.closing_stop());
        }
        // Whoever cancels from here on finds the lease, and cuts short what the hook has left behind.
        lease.wait_free();
        *self.hook_lease() = None;
        replica.interrupter().resume();
        outcome
    }

    pub(super) fn hook_lease(&self) -> MutexGuard<'_, Option<Arc<Lease>>> {
        self.hook_lease
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn closing_stop(&self) -> Stop {
        Stop::Interrupted(format!("{} is being closed", self.name()))
    }

    /// A lease that holds a ticket.
    pub(super) fn lease_with(
        self: &Arc<Self>,
        replica: Arc<Replica>,
        pool: Arc<Pool>,
        ticket: Ticket<Job>,
    ) -> Arc<Lease> {
        let lease = Lease::with_ticket(self, replica, pool, ticket);
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.retain(|lease| lease.strong_count() > 0);
        leases.push(Arc::downgrade(&lease));
        drop(leases);
        if self.is_destroyed() {
            // Those that were known have been ended already; nobody has this one yet.
            lease.release();
        }
        lease
    }

    /// Not to be dropped under the lock: the last handle of one gives its slot to a lease that waits,
    /// which is noted there.
    pub(super) fn known_leases(&self) -> Vec<Arc<Lease>> {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.iter().filter_map(Weak::upgrade).collect()
    }

    /// Leases with a ticket that hold one of these instances.
    pub(super) fn leases_on(&self, replicas: &[Arc<Replica>]) -> Vec<Arc<Lease>> {
        let is_meant = |lease: &Arc<Lease>| {
            let id = lease.replica().id();
            replicas.iter().any(|replica| replica.id() == id)
        };
        let mut leases = self.known_leases();
        leases.retain(is_meant);
        leases
    }

    /// Stops what runs or is about to on these instances, until they [resume](Self::resume), and takes
    /// leases on them away from their holders.
    pub(crate) fn interrupt(self: &Arc<Self>, replicas: &[Arc<Replica>], why: &Stop) {
        // First of all: once what runs has been stopped, its instance is lost, and what waits behind it
        // would be refused for that.
        for lease in self.leases_on(replicas) {
            lease.refuse_waiting(why);
        }
        // All first: who is stopped frees a thread for a call that has another of these instances.
        for replica in replicas {
            replica.interrupter().forbid(why.clone());
        }
        for replica in replicas {
            replica.interrupter().halt(why.clone());
        }
        let leases = self.leases_on(replicas);
        if leases.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        let why = why.clone();
        // Without a home nobody is left who could hold one.
        let _ = self.host.at_home(Box::new(move |_| {
            for lease in leases {
                lease.refuse_waiting(&why);
                shared.host.revoked(&lease);
                lease.release();
            }
        }));
    }

    /// They may be entered again.
    pub(crate) fn resume(replicas: &[Arc<Replica>]) {
        for replica in replicas {
            replica.interrupter().resume();
        }
    }

    fn lock_hooks(&self) -> MutexGuard<'_, Hooks> {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hook_scope(&self, is_sync: bool) -> HookScope {
        self.scope_of(&self.lock_hooks(), is_sync)
    }

    fn scope_of(&self, hooks: &Hooks, is_sync: bool) -> HookScope {
        let cancelled = if self.is_destroyed() {
            // Disconnected, or about to be.
            self.cancel.1.clone()
        } else {
            hooks.cancelled.clone()
        };
        HookScope { is_sync, cancelled }
    }

    /// For an operation of the control thread, which does not begin once hooks are given up. To be asked for after
    /// whatever it waits for: a scope is cancelled with the hooks that run then, or not at all.
    pub(super) fn scope_of_operation(&self) -> Result<HookScope> {
        let hooks = self.lock_hooks();
        if hooks.are_given_up {
            return Err(self.closed());
        }
        Ok(self.scope_of(&hooks, false))
    }

    /// The hooks that run now are not waited for any more, nor what they have left running.
    pub(super) fn give_hooks_up(&self) {
        let mut hooks = self.lock_hooks();
        if hooks.alive.is_some() {
            *hooks = Hooks::new();
        }
        hooks.are_given_up = true;
        drop(hooks);
        self.hooks_are_given_up();
    }

    /// Neither are those that come, until the `close()` whose patience it was is answered.
    pub(super) fn lose_patience(&self) {
        {
            let control = self.lock_control();
            // The timer of one that has just been answered.
            if control.closing.is_empty() {
                return;
            }
            let mut hooks = self.lock_hooks();
            hooks.alive = None;
            hooks.are_given_up = true;
        }
        self.hooks_are_given_up();
    }

    /// That was answered, and has left calls behind that may need an instance. With the control locked.
    pub(super) fn regain_patience(&self) {
        let mut hooks = self.lock_hooks();
        if hooks.alive.is_none() {
            *hooks = Hooks {
                are_given_up: true,
                ..Hooks::new()
            };
        }
    }

    fn hooks_are_given_up(&self) {
        let lease = self.hook_lease().clone();
        if let Some(lease) = lease
            && lease.is_cancelled()
        {
            lease.cut(&self.closing_stop());
        }
        // A drain that is under way looks again.
        self.gate.shut();
    }
}
