//! The manager's own rayon pool.
//!
//! Never rayon's global pool: its threads would be shared with whatever else lives in the process,
//! and a guest may keep one for as long as it likes.

use std::sync::{Arc, PoisonError, RwLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, ErrorCode, Result};

/// Room beside the guest's own stack: host frames, and the compiler's when it runs on the pool.
const HOST_STACK_BYTES: usize = 2 << 20;

/// Threads that run calls and compile modules, until [`Pool::end`].
#[derive(Debug)]
pub(crate) struct Pool {
    prefix: String,
    threads: usize,
    stack_bytes: usize,
    inner: RwLock<Option<Arc<ThreadPool>>>,
}

impl Pool {
    /// * `guest_stack_bytes`: what a call may use (`limits.stackBytes`).
    pub(crate) fn new(name: &str, threads: usize, guest_stack_bytes: usize) -> Result<Self> {
        Self::build(
            thread_name(name),
            threads,
            guest_stack_bytes + HOST_STACK_BYTES,
        )
    }

    /// Another one of the same kind.
    pub(crate) fn another(&self) -> Result<Self> {
        Self::build(self.prefix.clone(), self.threads, self.stack_bytes)
    }

    fn build(prefix: String, threads: usize, stack_bytes: usize) -> Result<Self> {
        let named = prefix.clone();
        ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(move |index| format!("{named}-{index}"))
            .stack_size(stack_bytes)
            // Rayon aborts the process on a panic that nobody handles. Jobs catch their own; this is the net.
            .panic_handler(drop)
            .build()
            .map(|pool| Self {
                prefix,
                threads,
                stack_bytes,
                inner: RwLock::new(Some(Arc::new(pool))),
            })
            .map_err(|e| {
                Error::new(
                    ErrorCode::Internal,
                    format!("the pool of {threads} threads could not be started: {e}; lower `threads` or the process limit on threads"),
                )
            })
    }

    /// Runs `job` on a pool thread; on this one if the pool has ended, so that nothing is lost.
    pub(crate) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        let pool = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        match &*pool {
            Some(pool) => pool.spawn_fifo(job),
            None => {
                drop(pool);
                job();
            }
        }
    }

    /// Runs `job` inside the pool and waits for it, so that parallel compilation uses these threads.
    pub(crate) fn install<R: Send>(&self, job: impl FnOnce() -> R + Send) -> R {
        let pool = self
            .inner
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match pool {
            Some(pool) => pool.install(job),
            None => job(),
        }
    }

    /// Ends the threads once they are idle. They must have nothing left to do.
    pub(crate) fn end(&self) {
        let pool = self
            .inner
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(pool);
    }
}

/// Linux shows 15 bytes of a thread's name; the index needs some of them.
pub(crate) fn thread_name(name: &str) -> String {
    let short: String = name
        .chars()
        .filter(char::is_ascii_graphic)
        .take(8)
        .collect();
    format!("molt-{short}")
}
