//! What waits at the gate: a call, or somebody who wants an instance for a while.

use std::fmt;
use std::sync::Arc;

use wasm_molt_lifecycle::{Ticket, Waiter};

use super::Shared;
use crate::error::{Done, Error};
use crate::manager::call::CallJob;
use crate::manager::lease::Lease;

/// Receives the instance that a lease got.
pub type LeaseDone = Done<Arc<Lease>>;

/// What waits at the gate.
pub enum Job {
    /// A call.
    Call(Box<CallJob>),
    /// Somebody who wants an instance for a while.
    Lease(LeaseJob),
}

/// A lease that waits.
pub struct LeaseJob {
    pub(super) shared: Arc<Shared>,
    pub(super) done: LeaseDone,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Call(_) => "Call",
            Self::Lease(_) => "Lease",
        })
    }
}

impl fmt::Debug for LeaseJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseJob")
    }
}

impl Waiter for Job {
    fn start(self, ticket: Ticket<Self>) {
        match self {
            Self::Call(job) => {
                let shared = Arc::clone(&job.shared);
                let place = shared.lock_serving().place_of(ticket.id());
                let Some((replica, pool)) = place else {
                    ticket.retire();
                    job.refuse(Error::internal("a slot without an instance"));
                    return;
                };
                // With a control the job stays within reach of a stop until a thread takes it.
                let Some(control) = job.control.clone() else {
                    pool.spawn(move |started| job.run_on_pool(started, &replica, ticket));
                    return;
                };
                control.park(job, ticket);
                pool.spawn(move |started| {
                    if let Some((job, ticket)) = control.unpark() {
                        job.run_on_pool(started, &replica, ticket);
                    }
                });
            }
            Self::Lease(LeaseJob { shared, done }) => {
                let place = shared.lock_serving().place_of(ticket.id());
                let Some((replica, pool)) = place else {
                    ticket.retire();
                    done(Err(Error::internal("a slot without an instance")));
                    return;
                };
                done(Ok(shared.lease_with(replica, pool, ticket)));
            }
        }
    }
}

impl Job {
    /// Answers without having run.
    pub(crate) fn refuse(self, error: Error) {
        match self {
            Self::Call(job) => job.refuse(error),
            Self::Lease(job) => (job.done)(Err(error)),
        }
    }
}
