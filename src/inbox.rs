//! What other threads have for the JS thread.
//!
//! Completions, host calls and steps at home are closures in one queue. The JS thread empties it on
//! each wake-up, so many completions cost one wake-up. After the environment is gone nothing is
//! accepted any more, and what was queued is dropped: whoever waits for an answer sees its channel close.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

use wasm_molt_engine::Inbox as Queue;

use crate::env::EnvState;
use crate::wake::Wake;

/// Runs on the JS thread, inside a handle scope.
pub(crate) type Task = Box<dyn FnOnce(&EnvState) + Send>;

/// Wakes the event loop of one environment.
struct Bell(Wake);

impl wasm_molt_engine::Wake for Bell {
    fn wake(&self) {
        // SAFETY: still in the queue, so the environment has not begun to go: `Inbox::close` comes first.
        unsafe { self.0.send() };
    }
}

/// One per environment. Any thread.
pub(crate) struct Inbox {
    queue: Queue<Task, Bell>,
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
            queue: Queue::new(Bell(wake)),
            thread: this_thread(),
            released: Mutex::default(),
            released_count: AtomicUsize::new(0),
        })
    }

    /// Whether this is the environment's own thread.
    #[inline]
    pub(crate) fn is_js_thread(&self) -> bool {
        self.thread == this_thread()
    }

    /// Gives `task` to the JS thread; gives it back if there is no environment any more.
    pub(crate) fn post(&self, task: Task) -> Result<(), Task> {
        self.queue.post(task)
    }

    /// The same for what the JS thread does even inside a guest that waits.
    pub(crate) fn post_urgent(&self, task: Task) -> Result<(), Task> {
        self.queue.post_urgent(task)
    }

    /// Whether there is something of that kind.
    #[inline]
    pub(crate) fn is_urgent(&self) -> bool {
        self.queue.urgent() > 0
    }

    /// How much of it there is.
    pub(crate) fn urgent_count(&self) -> usize {
        self.queue.urgent()
    }

    /// The first of it. JS thread.
    pub(crate) fn take_urgent(&self) -> Option<Task> {
        self.queue.take_urgent()
    }

    /// Gives `task`, which only drops something, to the JS thread, also while the environment goes.
    pub(crate) fn bury(&self, task: Task) {
        if let Err(task) = self.queue.bury(task) {
            // Nobody is left who may drop it: its references went with the environment.
            std::mem::forget(task);
        }
    }

    /// The last of what was to be dropped; from here on nothing is taken any more. JS thread.
    pub(crate) fn take_graves(&self) -> Vec<Task> {
        self.queue.take_graves()
    }

    /// What is posted from here on wakes the JS thread again.
    pub(crate) fn let_wake(&self) {
        self.queue.let_wake();
    }

    /// Everything that is queued now. JS thread.
    pub(crate) fn take(&self) -> VecDeque<Task> {
        self.queue.take()
    }

    /// Nothing is accepted from here on. Returns what was queued, to be dropped. JS thread.
    pub(crate) fn close(&self) -> VecDeque<Task> {
        self.queue.close()
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
