//! The one place that chooses between std and its loom twin.
//!
//! Everything that threads share in this crate comes from here, so that loom sees it.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
};

/// How long a thread looks before it sleeps: a few times what somebody who is awake takes to answer, and no more than
/// going to sleep and being woken costs.
#[cfg(not(loom))]
pub(crate) const SPIN_FOR: Duration = Duration::from_micros(20);
/// To loom a look that finds nothing is one more interleaving of what it explores anyway.
#[cfg(loom)]
pub(crate) const SPIN_FOR: Duration = Duration::ZERO;

/// Between two looks, longer each time; in the end it lets others run.
pub(crate) fn spin(turn: u32) {
    const BUSY_TURNS: u32 = 6;
    if turn <= BUSY_TURNS {
        (0..1_u32 << turn).for_each(|_| std::hint::spin_loop());
    } else {
        std::thread::yield_now();
    }
}

/// Declares thread locals with constant values.
#[cfg(not(loom))]
macro_rules! thread_locals {
    ($($declarations:tt)+) => {
        std::thread_local! { $($declarations)+ }
    };
}

/// Loom runs its threads on one thread of the system, so they need loom's own thread locals, whose
/// macro knows no `const` blocks.
#[cfg(loom)]
macro_rules! thread_locals {
    ($(static $name:ident: $type:ty = const $value:block;)+) => {
        loom::thread_local! { $(static $name: $type = $value;)+ }
    };
}

pub(crate) use thread_locals;

use std::sync::PoisonError;
use std::time::Duration;

/// Locks `mutex`, poisoned or not.
///
/// No foreign code runs under a lock of this crate, so a poisoned one still guards a consistent
/// value; and a panic here would take down a process that is not ours.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
