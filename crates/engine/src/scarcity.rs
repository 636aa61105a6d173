//! What the system may refuse: memory, files, threads.
//!
//! Our own requests come by here first, so that a test can have any one of them refused. Nothing in a shipped
//! build calls [`refuse`], so there is nothing left of this there but a look that is always answered no.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{Builder, JoinHandle};

static IS_WATCHED: AtomicBool = AtomicBool::new(false);
static REQUESTS: AtomicUsize = AtomicUsize::new(0);
static FIRST: AtomicUsize = AtomicUsize::new(0);
static AFTER_LAST: AtomicUsize = AtomicUsize::new(0);

/// From now on requests are counted, from 0 on, and those of these numbers are refused.
pub fn refuse(numbers: std::ops::Range<usize>) {
    FIRST.store(numbers.start, Ordering::SeqCst);
    AFTER_LAST.store(numbers.end, Ordering::SeqCst);
    REQUESTS.store(0, Ordering::SeqCst);
    IS_WATCHED.store(true, Ordering::SeqCst);
}

/// Nothing is refused any more. Returns how many requests there were.
pub fn relent() -> usize {
    IS_WATCHED.store(false, Ordering::SeqCst);
    requests()
}

/// How many requests there have been since.
pub fn requests() -> usize {
    REQUESTS.load(Ordering::SeqCst)
}

fn is_refused() -> bool {
    if !IS_WATCHED.load(Ordering::SeqCst) {
        return false;
    }
    let number = REQUESTS.fetch_add(1, Ordering::SeqCst);
    (FIRST.load(Ordering::SeqCst)..AFTER_LAST.load(Ordering::SeqCst)).contains(&number)
}

/// Asks for memory, or for pages of a file.
pub(crate) fn memory() -> io::Result<()> {
    if is_refused() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    Ok(())
}

/// Starts a thread.
pub(crate) fn thread<T: Send + 'static>(
    builder: Builder,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    if is_refused() {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    builder.spawn(run)
}
