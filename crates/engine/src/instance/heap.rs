//! The native heap: what is free there goes back to the system.
//!
//! glibc keeps it in arenas, one for each of many threads, and what compiling or a manager's life has taken in one of
//! them is seldom wanted there again: a soak of ten minutes had 45 MB in use, and 350 MB of free memory, which grew for
//! as long as it ran.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::instance::deadline::Deadline;

/// From the first of several that ask for it.
const UNTIL_GIVEN_BACK: Duration = Duration::from_secs(3);
const HAS_ARENAS: bool = cfg!(all(target_os = "linux", target_env = "gnu"));

/// For whoever has just let go of much: gives back what is free, in a while, and once for all who ask until then.
pub(crate) fn give_back_soon() {
    static IS_DUE: AtomicBool = AtomicBool::new(false);
    if !HAS_ARENAS || IS_DUE.swap(true, Ordering::AcqRel) {
        return;
    }
    let later = || {
        IS_DUE.store(false, Ordering::Release);
        give_back();
    };
    match Deadline::after(UNTIL_GIVEN_BACK, later) {
        Ok(deadline) => deadline.detach(),
        Err(_) => later(),
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    // SAFETY: any thread may ask at any time; nothing in use moves.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators give back by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
const fn give_back() {}
