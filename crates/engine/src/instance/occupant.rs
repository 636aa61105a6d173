//! Who is inside a store. Where debug assertions are on (`npm run asan`) the contract of the replica's
//! unsafe entries is checked at each of them; elsewhere this is nothing.

#[cfg(debug_assertions)]
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
};

/// Belongs to one store.
#[derive(Debug, Default)]
pub(crate) struct Occupant {
    #[cfg(debug_assertions)]
    thread: Mutex<Option<ThreadId>>,
}

/// Somebody is inside until it is dropped.
#[must_use]
pub(crate) struct Occupied<'a> {
    #[cfg(debug_assertions)]
    left: Option<&'a Occupant>,
    #[cfg(not(debug_assertions))]
    left: std::marker::PhantomData<&'a Occupant>,
}

#[cfg(not(debug_assertions))]
impl Occupant {
    #[inline(always)]
    #[expect(clippy::unused_self, reason = "it is looked at where it is checked")]
    pub(crate) fn enter(&self) -> Occupied<'_> {
        let left = std::marker::PhantomData;
        Occupied { left }
    }

    #[inline(always)]
    pub(crate) fn enter_again(&self) -> Occupied<'_> {
        self.enter()
    }
}

#[cfg(debug_assertions)]
impl Occupant {
    fn thread(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This thread goes in, where nobody is.
    pub(crate) fn enter(&self) -> Occupied<'_> {
        let this = thread::current().id();
        let before = self.thread().replace(this);
        assert_eq!(before, None, "{this:?} enters a store that somebody is in");
        Occupied { left: Some(self) }
    }

    /// A host function of it runs on this thread, and goes in again.
    pub(crate) fn enter_again(&self) -> Occupied<'_> {
        let this = thread::current().id();
        assert_eq!(*self.thread(), Some(this), "{this:?} enters for another");
        Occupied { left: None }
    }
}

#[cfg(debug_assertions)]
impl Drop for Occupied<'_> {
    fn drop(&mut self) {
        if let Some(left) = self.left {
            *left.thread() = None;
        }
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::thread;

    use super::*;

    fn is_refused(enter: impl FnOnce()) -> bool {
        catch_unwind(AssertUnwindSafe(enter)).is_err()
    }

    #[test]
    fn who_enters_beside_somebody_is_told_and_who_enters_again_is_not() {
        let store = Occupant::default();
        assert!(is_refused(|| drop(store.enter_again())), "nobody is inside");
        let inside = store.enter();
        drop(store.enter_again());
        thread::scope(|scope| {
            let refused = scope.spawn(|| is_refused(|| drop(store.enter_again())));
            assert!(refused.join().unwrap(), "another thread's host call");
        });
        drop(inside);
        drop(store.enter());
        let _inside = store.enter();
        assert!(is_refused(|| drop(store.enter())), "without a host call");
    }
}
