//! `close()` and `destroy()`.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::control::{Answer, Control, Op};
use super::host::{Event, Replaced};
use super::shared::destroyed;
use super::{ManagerState, Shared};
use crate::error::{Done, Error, Result};
use crate::instance::deadline::Deadline;
use crate::instance::heap;

impl Shared {
    pub(super) fn close(self: &Arc<Self>, drain_timeout: Option<Duration>, done: Done<()>) {
        if self.begin_closing(done) {
            self.gate.shut();
            if let Some(patience) = drain_timeout {
                let weak = Arc::downgrade(self);
                let give_up = move || {
                    if let Some(shared) = weak.upgrade() {
                        shared.lose_patience();
                    }
                };
                // Without a timer thread the close only waits longer.
                self.lock_control().hooks_until = Deadline::after(patience, give_up).ok();
            }
            let asked_at = Instant::now();
            let until = drain_timeout.and_then(|patience| asked_at.checked_add(patience));
            self.push(Op::Close { until, asked_at });
        }
    }

    /// Notes who waits for the end; tells whether that is the first one. One lock with the end itself
    /// (`finish_closing`), so that nobody comes just after it and waits for ever.
    pub(super) fn begin_closing(&self, done: Done<()>) -> bool {
        let mut control = self.lock_control();
        if self.state() == ManagerState::Closed {
            drop(control);
            done(Ok(()));
            return false;
        }
        self.set_state(ManagerState::Closing);
        control.closing.push(done);
        control.closing.len() == 1
    }

    pub(super) fn run_close(
        self: &Arc<Self>,
        until: Option<Instant>,
        asked_at: Instant,
    ) -> Result<()> {
        if self.state() == ManagerState::Closed {
            return Ok(());
        }
        let shared = Arc::clone(self);
        self.host.at_home(Box::new(move |home| {
            if let Some(home) = home {
                home.shut();
            }
            shared.repair_retired();
        }))?;
        self.gate
            .wait_idle(until.map(|until| until.saturating_duration_since(Instant::now())))
            .map_err(|in_flight| {
                self.lose_patience();
                Error::DrainTimeout {
                    what: format!("close() of {}", self.name()),
                    in_flight: in_flight.0,
                    waited_ms: asked_at.elapsed().as_millis(),
                }
            })?;
        self.wait_settled();
        self.release_all();
        Ok(())
    }

    pub(super) fn destroy(self: &Arc<Self>, done: Done<()>) {
        let was_destroyed = self.is_destroyed.swap(true, Ordering::AcqRel);
        self.begin_closing(done);
        if was_destroyed || self.state() == ManagerState::Closed {
            return;
        }
        let settling = self.settling();
        // Before anybody is woken: a swap that gives up opens the gate, and nothing may start then.
        let waiting = self.gate.cut();
        drop(
            self.cancel
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        for job in waiting {
            job.refuse(self.closed());
        }
        drop(settling);
        self.lose_patience();
        self.stop_all(&destroyed());
        // Leases end now: the operation under way may be waiting for one.
        self.spawn("end", Self::expire_handles);
        self.push(Op::Destroy);
    }

    pub(super) fn expire_handles(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        // Without a home there are no handles.
        let _ = self.host.at_home(Box::new(move |home| {
            if let Some(home) = home {
                home.shut();
            }
            let (old, generation) = {
                let serving = shared.lock_serving();
                (serving.all(), serving.generation)
            };
            let new = Vec::new();
            shared.host.replaced(&Replaced {
                old,
                new,
                generation,
            });
            // One that the host has not been told of yet would otherwise be held for ever.
            for lease in shared.known_leases() {
                lease.release();
            }
        }));
    }

    pub(super) fn run_destroy(self: &Arc<Self>) {
        if self.state() == ManagerState::Closed {
            return;
        }
        self.expire_handles();
        // Nothing can be waited for longer than the guests need to reach their next poll.
        let _ = self.gate.wait_drained(None);
        self.wait_settled();
        self.release_all();
    }

    pub(super) fn release_all(self: &Arc<Self>) {
        let control = self.wait_repaired(self.lock_control());
        let is_seeing_off = |c: &mut Control| c.seeing_off > 0;
        drop(self.control_changed.wait_while(control, is_seeing_off));
        self.forget_recycles();
        let (replicas, generation, pool) = {
            let mut serving = self.lock_serving();
            let replicas = std::mem::take(&mut serving.replicas);
            (replicas, serving.generation, Arc::clone(&serving.pool))
        };
        self.lock_snapshots().release_all();
        self.compiled.clear();
        // The home may be gone (its environment ends): releasing does not depend on it.
        let _ = self.discard(replicas, generation);
        pool.end();
        heap::give_back_soon();
    }

    pub(super) fn finish_closing(
        self: &Arc<Self>,
        outcome: Result<()>,
        is_destroy: bool,
    ) -> Answer {
        let shared = Arc::clone(self);
        let (closing, is_closed) = {
            let mut control = self.lock_control();
            if outcome.is_ok() {
                self.set_state(ManagerState::Closed);
            }
            control.hooks_until = None;
            if outcome.is_err() {
                self.regain_patience();
            }
            let is_closed = self.state() == ManagerState::Closed;
            // A close that gave up leaves everybody to the destroy that is waiting behind it.
            let is_last = is_closed || is_destroy || !self.is_destroyed();
            let closing = if is_last {
                std::mem::take(&mut control.closing)
            } else {
                Vec::new()
            };
            (closing, is_closed)
        };
        Box::new(move || {
            let is_end = is_closed && !closing.is_empty();
            if is_end {
                shared.tell(Event::Close);
            }
            for done in closing {
                done(outcome.clone());
            }
            if is_end {
                shared.host.released();
            }
        })
    }
}
