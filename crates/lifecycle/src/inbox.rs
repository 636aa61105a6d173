//! What other threads have for one thread, and how that one is woken for it.
//!
//! Why this is hard: a wake-up costs more than what it is for, so there is one for many items; and none may
//! come after the owner's end, while an item that is in time for the owner must not be left lying.

use std::collections::VecDeque;
use std::fmt;
use std::sync::PoisonError;

use crate::sync::{AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering, lock};

/// How the owner of an [`Inbox`] is woken.
pub trait Wake: Send + 'static {
    /// Has the owner come by soon. Any thread, under a lock that the owner takes only to
    /// [close](Inbox::close) the inbox; after that, never again.
    fn wake(&self);
}

struct Queue<T> {
    items: VecDeque<T>,
    urgent: VecDeque<T>,
    graves: Vec<T>,
    is_open: bool,
    is_gone: bool,
}

/// A queue with one owner, who empties it whole each time it is woken.
///
/// An item is [taken](Self::take) by the owner, handed to it as [left over](Self::close), or given back
/// to who brought it: exactly one of these.
pub struct Inbox<T, W> {
    queue: Mutex<Queue<T>>,
    /// None once the owner is going away. A lock of its own, which the owner does not take to empty the queue:
    /// else whoever wakes it would still hold what it needs first.
    wake: Mutex<Option<W>>,
    is_woken: AtomicBool,
    urgent: AtomicUsize,
}

impl<T, W> fmt::Debug for Inbox<T, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}

impl<T, W: Wake> Inbox<T, W> {
    /// An open one.
    pub fn new(wake: W) -> Self {
        Self {
            queue: Mutex::new(Queue {
                items: VecDeque::new(),
                urgent: VecDeque::new(),
                graves: Vec::new(),
                is_open: true,
                is_gone: false,
            }),
            wake: Mutex::new(Some(wake)),
            is_woken: AtomicBool::new(false),
            urgent: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        lock(&self.queue)
    }

    /// Gives `item` to the owner, behind all that was posted before.
    ///
    /// # Errors
    ///
    /// Gives it back if the inbox is closed.
    pub fn post(&self, item: T) -> Result<(), T> {
        let mut queue = self.lock();
        if !queue.is_open {
            return Err(item);
        }
        queue.items.push_back(item);
        drop(queue);
        self.wake();
        Ok(())
    }

    /// The same for what the owner may do [by itself](Self::take_urgent), before everything else.
    ///
    /// # Errors
    ///
    /// Gives it back if the inbox is closed.
    pub fn post_urgent(&self, item: T) -> Result<(), T> {
        let mut queue = self.lock();
        if !queue.is_open {
            return Err(item);
        }
        queue.urgent.push_back(item);
        self.urgent.fetch_add(1, Ordering::Release);
        drop(queue);
        self.wake();
        Ok(())
    }

    /// How much of that there is.
    #[inline]
    pub fn urgent(&self) -> usize {
        self.urgent.load(Ordering::Acquire)
    }

    /// The first of it. The owner.
    pub fn take_urgent(&self) -> Option<T> {
        let item = self.lock().urgent.pop_front()?;
        self.urgent.fetch_sub(1, Ordering::Release);
        Some(item)
    }

    /// Gives the owner something that it only has to drop: also once the inbox is closed, until the owner has
    /// [taken the last of it](Self::take_graves).
    ///
    /// # Errors
    ///
    /// Gives it back after that.
    pub fn bury(&self, item: T) -> Result<(), T> {
        let Err(item) = self.post(item) else {
            return Ok(());
        };
        let mut queue = self.lock();
        if queue.is_gone {
            return Err(item);
        }
        queue.graves.push(item);
        Ok(())
    }

    /// The last of what was to be dropped; from here on nothing is taken any more. The owner.
    #[must_use = "it is to be dropped by the owner, and nowhere else"]
    pub fn take_graves(&self) -> Vec<T> {
        let mut queue = self.lock();
        queue.is_gone = true;
        std::mem::take(&mut queue.graves)
    }

    fn wake(&self) {
        if self.is_woken.swap(true, Ordering::AcqRel) {
            return;
        }
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = &*wake {
            wake.wake();
        }
    }

    /// What is posted from here on wakes again. The owner, before it [takes](Self::take): else what comes in between
    /// would lie there until something else came.
    pub fn let_wake(&self) {
        // Not by a store, whose place among the swaps of others loom does not know.
        self.is_woken.swap(false, Ordering::AcqRel);
    }

    /// Everything that is queued now, but for what is urgent. The owner.
    #[must_use = "whoever posted it waits for it to be done"]
    pub fn take(&self) -> VecDeque<T> {
        std::mem::take(&mut self.lock().items)
    }

    /// Nothing is accepted from here on, and nobody wakes the owner any more. Returns what was queued, to be
    /// dropped. The owner.
    #[must_use = "it is to be dropped by the owner, and nowhere else"]
    pub fn close(&self) -> VecDeque<T> {
        *lock(&self.wake) = None;
        let mut queue = self.lock();
        queue.is_open = false;
        let mut left = std::mem::take(&mut queue.items);
        left.append(&mut queue.urgent);
        self.urgent.store(0, Ordering::Release);
        left
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Clone, Default)]
    struct Bell(Arc<AtomicUsize>);

    impl Wake for Bell {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Bell {
        fn rung(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn many_items_cost_one_wake_up() {
        let bell = Bell::default();
        let inbox = Inbox::new(bell.clone());
        for item in 0..100 {
            inbox.post(item).unwrap();
        }
        assert_eq!(bell.rung(), 1);
        inbox.let_wake();
        assert!(inbox.take().into_iter().eq(0..100), "in their order");
        inbox.post(0).unwrap();
        assert_eq!(bell.rung(), 2);
    }

    #[test]
    fn what_is_urgent_is_taken_by_itself() {
        let inbox = Inbox::new(Bell::default());
        inbox.post("later").unwrap();
        inbox.post_urgent("now").unwrap();
        assert_eq!((inbox.urgent(), inbox.take_urgent()), (1, Some("now")));
        assert_eq!((inbox.urgent(), inbox.take_urgent()), (0, None));
        assert_eq!(inbox.take(), ["later"]);
    }

    #[test]
    fn a_closed_inbox_gives_back_and_takes_graves_to_the_last() {
        let bell = Bell::default();
        let inbox = Inbox::new(bell.clone());
        inbox.post(1).unwrap();
        inbox.post_urgent(2).unwrap();
        assert_eq!(inbox.close(), [1, 2]);
        assert_eq!((inbox.post(3), inbox.post_urgent(4)), (Err(3), Err(4)));
        assert_eq!((inbox.urgent(), bell.rung()), (0, 1));
        inbox.bury(5).unwrap();
        assert_eq!(inbox.take_graves(), [5]);
        assert_eq!(inbox.bury(6), Err(6));
    }
}
