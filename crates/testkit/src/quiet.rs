//! Tests that measure the process run alone in it.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a measuring test waits for all the others: they have their own patience.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Default)]
struct Present {
    /// Threads that are at work.
    working: usize,
    /// Somebody measures, or waits to: nobody else begins.
    is_quiet: bool,
}

static PRESENT: Mutex<Present> = Mutex::new(Present {
    working: 0,
    is_quiet: false,
});
static CHANGED: Condvar = Condvar::new();

thread_local! {
    /// How often this thread is at work; it need not wait for itself.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

fn lock() -> MutexGuard<'static, Present> {
    PRESENT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_while(condition: impl FnMut(&mut Present) -> bool) -> MutexGuard<'static, Present> {
    CHANGED
        .wait_timeout_while(lock(), PATIENCE, condition)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

/// This thread works; nobody measures meanwhile.
#[derive(Debug)]
pub struct Working(PhantomData<*const ()>);

/// Waits until nobody measures.
pub fn work() -> Working {
    if DEPTH.get() == 0 {
        wait_while(|present| present.is_quiet).working += 1;
    }
    DEPTH.set(DEPTH.get() + 1);
    Working(PhantomData)
}

impl Drop for Working {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        if DEPTH.get() == 0 {
            lock().working -= 1;
            CHANGED.notify_all();
        }
    }
}

/// This thread measures; nobody else works meanwhile.
#[derive(Debug)]
pub struct Alone(PhantomData<*const ()>);

/// Waits until nobody else works, and keeps it so. Not for a thread that is [at work](work) itself.
pub fn alone() -> Alone {
    assert_eq!(DEPTH.get(), 0, "this thread itself makes noise");
    wait_while(|present| present.is_quiet).is_quiet = true;
    let present = wait_while(|present| present.working > 0);
    assert_eq!(
        present.working, 0,
        "the other tests did not end within {PATIENCE:?}"
    );
    drop(present);
    // Its own work does not wait for itself.
    DEPTH.set(1);
    Alone(PhantomData)
}

impl Drop for Alone {
    fn drop(&mut self) {
        DEPTH.set(0);
        lock().is_quiet = false;
        CHANGED.notify_all();
    }
}
