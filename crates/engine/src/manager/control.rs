//! The control thread: one operation after the other changes the manager, and each is answered once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Shared;
use super::spawn::UNTIL_ANOTHER_TRY;
use crate::error::{Done, Error, Result};
use crate::instance::deadline::Deadline;
use crate::instance::module::Source;
use crate::instance::replica::Blueprint;
use crate::instance::snapshot::Snapshot;
use crate::manager::pause::{ResetOptions, ResetReport, SnapshotControl, Terms};
use crate::manager::recycle::Due;
use crate::manager::swap::{ReloadOptions, ReloadReport};

/// What remains to be done once the control thread is free again.
pub(super) type Answer = Box<dyn FnOnce() + Send>;

pub(crate) enum Op {
    Start {
        source: Source,
        done: Done<()>,
    },
    /// The copy that a fork begins with has been taken.
    StartFrom {
        blueprint: Arc<Blueprint>,
        snapshot: Arc<Snapshot>,
        done: Done<()>,
    },
    Reload(PendingReload),
    /// Of a realm.
    Recycle(Due),
    Snapshot {
        control: SnapshotControl,
        done: Done<Arc<Snapshot>>,
    },
    Reset {
        options: ResetOptions,
        done: Done<ResetReport>,
    },
    Fork {
        child: Arc<Shared>,
        done: Done<()>,
    },
    Close {
        until: Option<Instant>,
        asked_at: Instant,
    },
    Destroy,
}

pub(crate) struct PendingReload {
    pub(super) options: ReloadOptions,
    pub(super) done: Vec<Done<Arc<ReloadReport>>>,
}

/// A reload that runs.
pub(super) struct CurrentReload {
    pub(super) options: ReloadOptions,
    pub(super) done: Vec<Done<Arc<ReloadReport>>>,
    /// What it has made serves: whoever asks from now on may have called that already, and wants another one.
    pub(super) is_committed: bool,
}

#[derive(Default)]
pub(super) struct Control {
    /// An operation runs, on the control thread or at home.
    pub(super) is_running: bool,
    /// That operation is a swap: repairs wait for it.
    pub(super) is_swapping: bool,
    pub(super) queue: VecDeque<Op>,
    /// The reload that runs: equal ones join it.
    pub(super) current_reload: Option<CurrentReload>,
    /// Slots whose poisoned instance is being replaced in the background.
    pub(super) repairing: Vec<usize>,
    /// Slot 0 is being replaced on the home thread.
    pub(super) is_repairing_home: bool,
    /// Slots that wait for a swap to end.
    pub(super) repairs_due: Vec<usize>,
    /// What is to be recycled, in the order of the decisions.
    pub(super) recycles: VecDeque<Due>,
    /// The slot of the one that is being carried out; it is in `repairing` as well.
    pub(super) recycling: Option<usize>,
    /// Threads that wait for an earlier generation to be left.
    pub(super) seeing_off: usize,
    /// When a close has waited long enough for hooks.
    pub(super) hooks_until: Option<Deadline>,
    pub(super) closing: Vec<Done<()>>,
}

impl Control {
    /// In one step with taking it out of the queue: there is no moment in which an equal one could not join it.
    pub(super) fn begin_reload(&mut self, pending: &mut PendingReload) {
        self.current_reload = Some(CurrentReload {
            options: pending.options.clone(),
            done: std::mem::take(&mut pending.done),
            is_committed: false,
        });
    }

    /// A reload that does just the same and has not ended: whoever asks for it once more is answered
    /// with it. One that leads to another build is not passed over, for it would have the last word.
    pub(super) fn equal_reload(
        &mut self,
        options: &ReloadOptions,
    ) -> Option<&mut Vec<Done<Arc<ReloadReport>>>> {
        let queued = self.queue.iter_mut().rev().filter_map(|op| match op {
            Op::Reload(pending) => Some((&pending.options, &mut pending.done)),
            _ => None,
        });
        let current = self.current_reload.as_mut();
        let current = current.filter(|current| !current.is_committed);
        queued
            .chain(current.map(|current| (&current.options, &mut current.done)))
            .take_while(|(other, _)| other.source == options.source)
            .filter(|(other, _)| *other == options)
            .map(|(_, done)| done)
            .last()
    }
}

impl Shared {
    pub(crate) fn push(self: &Arc<Self>, op: Op) {
        let mut control = self.lock_control();
        control.queue.push_back(op);
        if control.is_running {
            return;
        }
        control.is_running = true;
        drop(control);
        self.start_control();
    }

    /// Somebody has just said that the control runs.
    pub(super) fn start_control(self: &Arc<Self>) {
        self.try_control(true);
    }

    /// * `may_run_here`: this is not the timer thread, which others wait for.
    fn try_control(self: &Arc<Self>, may_run_here: bool) {
        self.spawn_or("ctl", move |shared, started| match started {
            Ok(()) => shared.run_control(),
            Err(error) => shared.without_control(&error, may_run_here),
        });
    }

    /// The system refuses the control thread: what was asked for is refused, except the end.
    fn without_control(self: &Arc<Self>, error: &Error, may_run_here: bool) {
        let (refused, is_end_left, is_waiting) = {
            let mut control = self.lock_control();
            let ops = std::mem::take(&mut control.queue);
            let is_end = |op: &Op| matches!(op, Op::Destroy);
            let (ends, refused): (VecDeque<_>, VecDeque<_>) = ops.into_iter().partition(is_end);
            control.queue = ends;
            control.is_running = !control.queue.is_empty();
            // For others, who may want a thread of the pool themselves.
            let is_waiting = control.seeing_off > 0
                || !control.repairing.is_empty()
                || control.is_repairing_home;
            (refused, control.is_running, is_waiting)
        };
        for op in refused {
            let _ = guarded(|| {
                self.refuse_op(op, error);
                Ok(())
            });
        }
        self.control_changed.notify_all();
        if !is_end_left {
            return;
        }
        if !is_waiting {
            // Everything was stopped before, so threads of the pool come free.
            let (pool, shared) = (Arc::clone(&self.lock_serving().pool), Arc::clone(self));
            let Err(run) = pool.spawn_if_running(move || shared.run_control()) else {
                return;
            };
            // Leases have ended by now, but this very thread may be inside.
            if may_run_here && self.gate.wait_drained(Some(Duration::ZERO)).is_ok() {
                run();
                return;
            }
        }
        self.lock_control().is_running = false;
        // Else whoever leaves goes on.
        if Deadline::is_available() {
            let shared = Arc::clone(self);
            let again = move || shared.go_on(false);
            if let Ok(again) = Deadline::after(UNTIL_ANOTHER_TRY, again) {
                again.detach();
            }
        }
    }

    /// An end that found neither a thread nor an empty gate.
    pub(super) fn go_on(self: &Arc<Self>, may_run_here: bool) {
        let mut control = self.lock_control();
        if control.is_running || control.queue.is_empty() {
            return;
        }
        control.is_running = true;
        drop(control);
        self.try_control(may_run_here);
    }

    fn refuse_op(self: &Arc<Self>, op: Op, error: &Error) {
        let error = error.clone();
        match op {
            Op::Start { done, .. } | Op::StartFrom { done, .. } => {
                self.start_failed_early();
                done(Err(error));
            }
            Op::Reload(PendingReload { done, .. }) => {
                let outcome = Err(error);
                self.swap_ended(&outcome);
                for done in done {
                    done(outcome.clone());
                }
            }
            Op::Recycle(due) => self.realm_recycled(due, Err(error)),
            Op::Snapshot { done, .. } => done(Err(error)),
            Op::Reset { done, .. } => done(Err(error)),
            Op::Fork { child, done } => {
                child.start_failed_early();
                done(Err(error));
            }
            Op::Close { .. } => self.finish_closing(Err(error), false)(),
            // It is not refused.
            Op::Destroy => {}
        }
    }

    fn run_control(self: &Arc<Self>) {
        let mut answer: Option<Answer> = None;
        loop {
            let next = {
                let mut control = self.lock_control();
                let mut next = control.queue.pop_front();
                if let Some(Op::Reload(pending)) = &mut next {
                    control.begin_reload(pending);
                }
                control.is_running = next.is_some();
                next
            };
            // Answered only now: whoever gets the answer finds the control idle.
            if let Some(answer) = answer.take() {
                let _ = guarded(|| {
                    answer();
                    Ok(())
                });
            }
            let Some(op) = next else {
                self.control_changed.notify_all();
                return;
            };
            answer = Some(self.run_op(op));
        }
    }

    fn run_op(self: &Arc<Self>, op: Op) -> Answer {
        match op {
            Op::Start { source, done } => {
                let outcome = guarded(|| self.start(&source, false));
                Box::new(move || done(outcome))
            }
            Op::StartFrom {
                blueprint,
                snapshot,
                done,
            } => {
                let outcome = guarded(|| self.start_from(&blueprint, &snapshot, false));
                Box::new(move || done(outcome))
            }
            Op::Reload(pending) => self.run_reload(&pending.options),
            Op::Recycle(due) => self.recycle_realm(due),
            Op::Snapshot { control, done } => {
                let outcome = self.paused(|scope| {
                    self.take_snapshot(&Terms {
                        control: Some(&control),
                        ..Terms::of("the snapshot", scope)
                    })
                });
                Box::new(move || done(outcome))
            }
            Op::Reset { options, done } => {
                let outcome = self.paused(|scope| self.reset(&options, scope));
                Box::new(move || done(outcome))
            }
            Op::Fork { child, done } => {
                match self.paused(|scope| self.copy(&Terms::of("the fork", scope))) {
                    Ok((blueprint, snapshot)) => Box::new(move || {
                        child.push(Op::StartFrom {
                            blueprint,
                            snapshot,
                            done,
                        });
                    }),
                    Err(error) => Box::new(move || {
                        child.start_failed_early();
                        done(Err(error));
                    }),
                }
            }
            Op::Close { until, asked_at } => {
                let outcome = guarded(|| self.run_close(until, asked_at));
                self.finish_closing(outcome, false)
            }
            Op::Destroy => {
                let outcome = guarded(|| {
                    self.run_destroy();
                    Ok(())
                });
                self.finish_closing(outcome, true)
            }
        }
    }
}

/// A panic of ours must neither kill the thread nor lose the answer.
pub(super) fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        Err(Error::internal(format_args!(
            "a panic: {}",
            crate::error::panic_text(&*panic)
        )))
    })
}
