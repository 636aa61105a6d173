//! One timer thread for the process: runs a closure when a deadline passes, unless it was dropped.
//!
//! The thread starts with the first deadline and sleeps until the earliest one.
//! Closures run on that thread and must be short: they flip a page or send a message.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;

use crate::error::Result;
use crate::instance::pool::no_thread;
use crate::scarcity;

type Action = Box<dyn FnOnce() + Send>;
type Key = (Instant, u64);

struct Timers {
    pending: Mutex<Pending>,
    changed: Condvar,
    /// Set once its thread runs.
    thread: OnceCell<()>,
}

struct Pending {
    next_id: u64,
    actions: BTreeMap<Key, Action>,
}

static TIMERS: Timers = Timers {
    pending: Mutex::new(Pending {
        next_id: 0,
        actions: BTreeMap::new(),
    }),
    changed: Condvar::new(),
    thread: OnceCell::new(),
};

/// A deadline that is being waited for. Dropping it cancels it.
#[must_use = "dropping a deadline cancels it"]
#[derive(Debug)]
pub(crate) struct Deadline(Key);

impl Deadline {
    /// Runs `action` on the timer thread after `delay`.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] if the timer thread cannot be started.
    pub(crate) fn after(delay: Duration, action: impl FnOnce() + Send + 'static) -> Result<Self> {
        TIMERS.start()?;
        // A delay that no clock can hold is no deadline at all: a century will do.
        let at = Instant::now()
            .checked_add(delay)
            .unwrap_or_else(|| Instant::now() + Duration::from_hours(24 * 365 * 100));
        let mut pending = TIMERS.lock();
        pending.next_id += 1;
        let key = (at, pending.next_id);
        let is_earliest = pending
            .actions
            .first_key_value()
            .is_none_or(|(first, _)| key < *first);
        pending.actions.insert(key, Box::new(action));
        drop(pending);
        if is_earliest {
            TIMERS.changed.notify_one();
        }
        Ok(Self(key))
    }

    /// Whether there can be any: the timer thread runs.
    pub(crate) fn is_available() -> bool {
        TIMERS.start().is_ok()
    }

    /// Nothing cancels it any more.
    pub(crate) fn detach(self) {
        std::mem::forget(self);
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        let action = TIMERS.lock().actions.remove(&self.0);
        drop(action);
    }
}

impl Timers {
    fn start(&'static self) -> Result<()> {
        let started = self.thread.get_or_try_init(|| {
            let builder = std::thread::Builder::new().name("molt-timer".into());
            scarcity::thread(builder, || self.run()).map(drop)
        });
        started
            .map(drop)
            .map_err(|error| no_thread("the timer thread", &error))
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut pending = self.lock();
        loop {
            let Some((&(at, id), _)) = pending.actions.first_key_value() else {
                pending = self
                    .changed
                    .wait(pending)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let wait = at.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                pending = self
                    .changed
                    .wait_timeout(pending, wait)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
                continue;
            }
            if let Some(action) = pending.actions.remove(&(at, id)) {
                drop(pending);
                // A panic in one action must not silence the others.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
                pending = self.lock();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{RecvTimeoutError, unbounded};

    #[test]
    fn deadlines_fire_in_order_and_dropped_ones_do_not() {
        let (tx, rx) = unbounded();
        let send = |n: u32| {
            let tx = tx.clone();
            move || tx.send(n).unwrap()
        };
        let late = Deadline::after(Duration::from_millis(60), send(3)).unwrap();
        let dropped = Deadline::after(Duration::from_millis(30), send(2)).unwrap();
        let early = Deadline::after(Duration::from_millis(10), send(1)).unwrap();
        drop(dropped);
        assert_eq!(rx.recv_timeout(Duration::from_secs(10)), Ok(1));
        assert_eq!(rx.recv_timeout(Duration::from_secs(10)), Ok(3));
        drop((early, late, tx));
        assert_eq!(
            rx.recv_timeout(Duration::from_secs(10)),
            Err(RecvTimeoutError::Disconnected)
        );
    }

    #[test]
    fn a_panicking_action_leaves_the_others_alone() {
        let (tx, rx) = unbounded();
        let bad = Deadline::after(Duration::from_millis(1), || panic!("on purpose")).unwrap();
        let good =
            Deadline::after(Duration::from_millis(20), move || tx.send(()).unwrap()).unwrap();
        assert_eq!(rx.recv_timeout(Duration::from_secs(10)), Ok(()));
        drop((bad, good));
    }
}
