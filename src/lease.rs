//! The JS thread's side of a lease.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use wasm_molt_engine::{Error, Lease};

use crate::env::EnvState;
use crate::js::{JsResult, Val};
use crate::side::{ManagerSide, ReplicaSide};

/// What a `LeasedInstance` holds.
pub(crate) struct LeaseSide {
    pub(crate) lease: Arc<Lease>,
    pub(crate) side: Rc<ReplicaSide>,
    pub(crate) manager: Rc<ManagerSide>,
    pub(crate) env: Rc<EnvState>,
    /// What its hook has returned, which keeps it until that settles.
    followed: Cell<Option<u32>>,
}

impl LeaseSide {
    pub(crate) fn new(
        env: &Rc<EnvState>,
        manager: &Rc<ManagerSide>,
        lease: Arc<Lease>,
    ) -> Result<Rc<Self>, Error> {
        let id = lease.replica().id();
        let side = env.replicas.borrow().get(&id).map(Rc::clone);
        let Some(side) = side else {
            lease.release();
            return Err(lease.stale());
        };
        let lease = Rc::new(Self {
            lease,
            side,
            manager: Rc::clone(manager),
            env: Rc::clone(env),
            followed: Cell::default(),
        });
        let mut leases = manager.leases.borrow_mut();
        leases.retain(|weak| weak.strong_count() > 0);
        leases.push(Rc::downgrade(&lease));
        drop(leases);
        Ok(lease)
    }

    /// The `LeasedInstance` that JavaScript sees.
    pub(crate) fn object(self: &Rc<Self>) -> JsResult<Val> {
        let js = self.env.js();
        let handle = js.external(Rc::clone(self))?;
        js.call(self.env.helper(self.env.helpers.make_lease)?, &[handle])
    }

    /// It lives until that promise settles, or it expires.
    pub(crate) fn waits_for(&self, promise: u32) {
        self.followed.set(Some(promise));
    }

    /// The handle expires, views are detached, and the instance goes back once nothing is inside.
    pub(crate) fn expire(&self) {
        if let Some(promise) = self.followed.take() {
            self.env.unfollow(promise);
        }
        if self.lease.is_released() {
            return;
        }
        self.side.view.detach(self.env.js());
        self.lease.release();
    }
}

impl Drop for LeaseSide {
    fn drop(&mut self) {
        // Collected without a release: the safety net. (Views go with the next growth or swap.)
        self.lease.release();
    }
}
