//! What other threads have for the JS thread.
//!
//! Completions, host calls and steps at home are closures in one queue. The JS thread empties it on
//! each wake-up, so many completions cost one wake-up. After the environment is gone nothing is
//! accepted any more, and what was queued is dropped: whoever waits for an answer sees its channel close.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use crate::env::EnvState;
use crate::wake::Wake;

/// Runs on the JS thread, inside a handle scope.
pub(crate) type Task = Box<dyn FnOnce(&EnvState) + Send>;

struct Queue {
    tasks: VecDeque<Task>,
    /// What threads of guests want, also while the JS thread waits for them.
    urgent: VecDeque<Task>,
    /// JavaScript values on their way to be dropped while the environment goes.
    graves: Vec<Task>,
    is_open: bool,
    is_gone: bool,
}

/// One per environment. Any thread.
pub(crate) struct Inbox {
    queue: Mutex<Queue>,
    /// None once the environment is going away. A lock of its own, which the JS thread does not take
    /// to empty the queue: else whoever wakes it would still hold what it needs first.
    wake: Mutex<Option<Wake>>,
    is_woken: AtomicBool,
    urgent_count: AtomicUsize,
    thread: ThreadId,
    /// Slab indices whose last holder is gone.
    released: Mutex<Vec<u32>>,
    released_count: AtomicUsize,
}

/// Released things that are left until the JS thread comes by anyway.
const RELEASED_BEFORE_WAKE: usize = 1024;

impl Inbox {
    pub(crate) fn new(wake: Wake) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(Queue {
                tasks: VecDeque::new(),
                urgent: VecDeque::new(),
                graves: Vec::new(),
                is_open: true,
                is_gone: false,
            }),
            wake: Mutex::new(Some(wake)),
            is_woken: AtomicBool::new(false),
            urgent_count: AtomicUsize::new(0),
            thread: this_thread(),
            released: Mutex::default(),
            released_count: AtomicUsize::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the environment's own thread.
    #[inline]
    pub(crate) fn is_js_thread(&self) -> bool {
        self.thread == this_thread()
    }

    /// Gives `task` to the JS thread; gives it back if there is no environment any more.
    pub(crate) fn post(&self, task: Task) -> Result<(), Task> {
        let mut queue = self.lock();
        if !queue.is_open {
            return Err(task);
        }
        queue.tasks.push_back(task);
        drop(queue);
        self.wake();
        Ok(())
    }

    /// The same for what the JS thread does even inside a guest that waits.
    pub(crate) fn post_urgent(&self, task: Task) -> Result<(), Task> {
        let mut queue = self.lock();
        if !queue.is_open {
            return Err(task);
        }
        queue.urgent.push_back(task);
        self.urgent_count.fetch_add(1, Ordering::Release);
        drop(queue);
        self.wake();
        Ok(())
    }

    /// Whether there is something of that kind.
    #[inline]
    pub(crate) fn is_urgent(&self) -> bool {
        self.urgent_count.load(Ordering::Acquire) > 0
    }

    /// How much of it there is.
    pub(crate) fn urgent_count(&self) -> usize {
        self.urgent_count.load(Ordering::Acquire)
    }

    /// The first of it. JS thread.
    pub(crate) fn take_urgent(&self) -> Option<Task> {
        let task = self.lock().urgent.pop_front()?;
        self.urgent_count.fetch_sub(1, Ordering::Release);
        Some(task)
    }

    /// Gives `task`, which only drops something, to the JS thread, also while the environment goes.
    pub(crate) fn bury(&self, task: Task) {
        let Err(task) = self.post(task) else { return };
        let mut queue = self.lock();
        if queue.is_gone {
            drop(queue);
            // Nobody is left who may drop it: its references went with the environment.
            std::mem::forget(task);
        } else {
            queue.graves.push(task);
        }
    }

    /// The last of what was to be dropped; from here on nothing is taken any more. JS thread.
    pub(crate) fn take_graves(&self) -> Vec<Task> {
        let mut queue = self.lock();
        queue.is_gone = true;
        std::mem::take(&mut queue.graves)
    }

    fn wake(&self) {
        if self.is_woken.swap(true, Ordering::AcqRel) {
            return;
        }
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = *wake {
            // SAFETY: still there, so the environment has not begun to go (that needs this lock).
            unsafe { wake.send() };
        }
    }

    /// What is posted from here on wakes the JS thread again.
    pub(crate) fn let_wake(&self) {
        self.is_woken.store(false, Ordering::Release);
    }

    /// Everything that is queued now. JS thread.
    pub(crate) fn take(&self) -> VecDeque<Task> {
        std::mem::take(&mut self.lock().tasks)
    }

    /// Nothing is accepted from here on. Returns what was queued, to be dropped. JS thread.
    pub(crate) fn close(&self) -> VecDeque<Task> {
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let mut queue = self.lock();
        queue.is_open = false;
        let mut left = std::mem::take(&mut queue.tasks);
        left.append(&mut queue.urgent);
        self.urgent_count.store(0, Ordering::Release);
        left
    }

    pub(crate) fn release_slot(&self, index: u32) {
        self.released
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(index);
        self.count_released();
    }

    fn count_released(&self) {
        let count = self.released_count.fetch_add(1, Ordering::Relaxed);
        if count == RELEASED_BEFORE_WAKE {
            // Only matters while the environment lives.
            let _ = self.post(Box::new(|_| {}));
        }
    }

    /// Whether there is anything to give back.
    #[inline]
    pub(crate) fn has_released(&self) -> bool {
        self.released_count.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn take_released(&self) -> Vec<u32> {
        self.released_count.store(0, Ordering::Relaxed);
        std::mem::take(&mut *self.released.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Of one thread alone, also when it is gone: what it has left must not take a later one for it.
#[inline]
fn this_thread() -> ThreadId {
    thread_local!(static THIS: ThreadId = std::thread::current().id());
    THIS.with(|id| *id)
}
