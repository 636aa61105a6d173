//! Waiting that ends, and panics that are meant.

use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded};

/// The longest wait of any test: far more than a loaded machine needs, far less than for ever.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The first words of every panic that a test wants.
pub const ON_PURPOSE: &str = "on purpose";

/// From now on panics [on purpose](ON_PURPOSE) say nothing on other threads' behalf.
pub fn hush_panics_on_purpose() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.payload_as_str().unwrap_or_default();
            if !text.starts_with(ON_PURPOSE) {
                usual(info);
            }
        }));
    });
}

/// The one answer of something asynchronous.
///
/// That it is answered at most once is a matter of types (`FnOnce`); that it is answered at all is
/// what [`Answer::get`] finds out: a sender that was dropped fails the test at once.
#[derive(Debug)]
#[must_use = "an answer that nobody looks at proves nothing"]
pub struct Answer<T> {
    what: String,
    receiver: Receiver<T>,
}

/// A way to answer, and the answer. `what` is for the message if none comes.
pub fn answer<T: Send + 'static>(
    what: impl Into<String>,
) -> (impl FnOnce(T) + Send + 'static, Answer<T>) {
    let (sender, receiver) = bounded(1);
    let what = what.into();
    // Fails if the test has lost interest.
    let send = move |value| drop(sender.send(value));
    (send, Answer { what, receiver })
}

impl<T> Answer<T> {
    /// The answer.
    #[track_caller]
    pub fn get(self) -> T {
        match self.receiver.recv_timeout(PATIENCE) {
            Ok(value) => value,
            Err(RecvTimeoutError::Timeout) => {
                panic!("no answer within {PATIENCE:?}: {}", self.what)
            }
            Err(RecvTimeoutError::Disconnected) => {
                panic!("dropped without an answer: {}", self.what)
            }
        }
    }

    /// The answer, if it is there already.
    #[track_caller]
    pub fn try_get(&self) -> Option<T> {
        match self.receiver.try_recv() {
            Ok(value) => Some(value),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("dropped without an answer: {}", self.what),
        }
    }

    /// Nothing has come yet.
    pub fn is_open(&self) -> bool {
        self.receiver.is_empty()
    }
}

/// Opened once; everybody waits until then.
#[derive(Debug, Clone)]
pub struct Latch(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    what: String,
    is_open: Mutex<bool>,
    changed: Condvar,
}

impl Latch {
    /// A closed latch. `what` is for the message if it stays closed.
    pub fn new(what: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            what: what.into(),
            is_open: Mutex::new(false),
            changed: Condvar::new(),
        }))
    }

    /// Opens it. Idempotent.
    pub fn open(&self) {
        *self
            .0
            .is_open
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }

    /// Whether it has been opened.
    pub fn is_open(&self) -> bool {
        *self
            .0
            .is_open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is open.
    #[track_caller]
    pub fn wait(&self) {
        let is_open = self
            .0
            .is_open
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (is_open, _) = self
            .0
            .changed
            .wait_timeout_while(is_open, PATIENCE, |is_open| !*is_open)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            *is_open,
            "did not happen within {PATIENCE:?}: {}",
            self.0.what
        );
    }
}

/// Looks until it is so: for what the system does in its own time, such as ending a thread.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(
            started.elapsed() < PATIENCE,
            "not so within {PATIENCE:?}: {what}"
        );
        std::thread::yield_now();
    }
}
