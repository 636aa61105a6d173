//! The manager's own rayon pool.
//!
//! Never rayon's global pool: its threads would be shared with whatever else lives in the process,
//! and a guest may keep one for as long as it likes.

use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, ErrorCode, Result};
use crate::scarcity;

/// Room beside the guest's own stack: host frames, and the compiler's when it runs on the pool.
const HOST_STACK_BYTES: usize = 2 << 20;

/// Threads that run calls and compile modules, from their first job until [`Pool::end`].
///
/// They begin late because a fork may never need any: a thousand forks are not a thousand threads.
#[derive(Debug)]
pub(crate) struct Pool {
    prefix: String,
    threads: usize,
    stack_bytes: usize,
    inner: RwLock<Threads>,
}

#[derive(Debug, Clone)]
enum Threads {
    NotYet,
    Running(Arc<ThreadPool>),
    Ended,
}

impl Pool {
    /// * `guest_stack_bytes`: what a call may use (`limits.stackBytes`).
    pub(crate) fn new(name: &str, threads: usize, guest_stack_bytes: usize) -> Self {
        Self {
            prefix: thread_name(name),
            threads,
            stack_bytes: guest_stack_bytes + HOST_STACK_BYTES,
            inner: RwLock::new(Threads::NotYet),
        }
    }

    /// Another one of the same kind, its threads running.
    pub(crate) fn another(&self) -> Result<Self> {
        let other = Self {
            prefix: self.prefix.clone(),
            inner: RwLock::new(Threads::NotYet),
            ..*self
        };
        other.start()?;
        Ok(other)
    }

    /// Starts the threads now, for those who want to hear of a failure.
    pub(crate) fn start(&self) -> Result<()> {
        self.running().map(drop)
    }

    /// The threads; `None` once ended.
    fn running(&self) -> Result<Option<Arc<ThreadPool>>> {
        let inner = self.read();
        match &*inner {
            Threads::Running(pool) => return Ok(Some(Arc::clone(pool))),
            Threads::Ended => return Ok(None),
            Threads::NotYet => drop(inner),
        }
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(*inner, Threads::NotYet) {
            *inner = Threads::Running(Arc::new(self.build()?));
        }
        Ok(match &*inner {
            Threads::Running(pool) => Some(Arc::clone(pool)),
            Threads::NotYet | Threads::Ended => None,
        })
    }

    fn build(&self) -> Result<ThreadPool> {
        build(self.prefix.clone(), self.threads, self.stack_bytes)
    }

    /// Runs `job` on a pool thread; on this one if the pool has ended, so that nothing is lost. Where the system
    /// refuses the threads, the job hears of it here and now. Tells whether it runs.
    pub(crate) fn spawn(&self, job: impl FnOnce(Result<()>) + Send + 'static) -> bool {
        if let Threads::Running(pool) = &*self.read() {
            pool.spawn_fifo(move || job(Ok(())));
            return true;
        }
        match self.running() {
            Ok(Some(pool)) => pool.spawn_fifo(move || job(Ok(()))),
            Ok(None) => job(Ok(())),
            Err(error) => {
                job(Err(error));
                return false;
            }
        }
        true
    }

    /// The same if its threads run; else gives the job back.
    pub(crate) fn spawn_if_running<J: FnOnce() + Send + 'static>(&self, job: J) -> Result<(), J> {
        match &*self.read() {
            Threads::Running(pool) => pool.spawn_fifo(job),
            Threads::NotYet | Threads::Ended => return Err(job),
        }
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Threads> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `job` inside the pool and waits for it, so that parallel compilation uses these threads, and not
    /// those of rayon's global pool.
    ///
    /// # Errors
    /// If the system refuses the threads, or the pool has ended.
    pub(crate) fn install<R: Send>(&self, job: impl FnOnce() -> R + Send) -> Result<R> {
        let ended = || {
            Error::new(
                ErrorCode::Closed,
                "the pool has ended; create a new manager",
            )
        };
        Ok(self.running()?.ok_or_else(ended)?.install(job))
    }

    /// Ends the threads once they are idle. They must have nothing left to do.
    pub(crate) fn end(&self) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let threads = std::mem::replace(&mut *inner, Threads::Ended);
        drop(inner);
        drop(threads);
    }
}

fn build(prefix: String, threads: usize, stack_bytes: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(move |index| format!("{prefix}-{index}"))
        .stack_size(stack_bytes)
        // Rayon aborts the process on a panic that nobody handles. Jobs catch their own; this is the net.
        .panic_handler(drop)
        .spawn_handler(start_thread)
        .build()
        .map_err(|error| no_thread(&format!("the {threads} threads of the pool"), &error))
}

/// Runs `job` on a thread of its own, and waits for it.
///
/// Whatever compiles or validates outside of a pool has wasmtime start rayon's global one. This is for where nobody may
/// wait for the manager's: its threads may be waiting for this very thread.
pub(crate) fn apart<R: Send>(job: impl FnOnce() -> R + Send) -> Result<R> {
    Ok(build("molt-apart".into(), 1, HOST_STACK_BYTES)?.install(job))
}

fn start_thread(thread: ThreadBuilder) -> std::io::Result<()> {
    let mut builder = std::thread::Builder::new();
    if let Some(name) = thread.name() {
        builder = builder.name(name.to_owned());
    }
    if let Some(stack_bytes) = thread.stack_size() {
        builder = builder.stack_size(stack_bytes);
    }
    scarcity::thread(builder, || thread.run()).map(drop)
}

/// The system refuses a thread.
#[cold]
pub(crate) fn no_thread(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::new(
        ErrorCode::Internal,
        format!(
            "{what} could not be started: {error}; lower `threads`, raise the process limit on threads, or the \
             limit on its address space, in which their stacks lie"
        ),
    )
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

/// Asked for once: the system reads files for it, which takes as long as a fork.
pub(crate) fn parallelism() -> usize {
    static PARALLELISM: OnceLock<usize> = OnceLock::new();
    let ask = || std::thread::available_parallelism().map_or(1, usize::from);
    *PARALLELISM.get_or_init(ask)
}
