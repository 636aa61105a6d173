//! Threads of a manager other than those of its pool, and what becomes of their work where the system refuses them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Shared;
use crate::error::Result;
use crate::instance::deadline::Deadline;
use crate::instance::pool::{no_thread, thread_name};
use crate::scarcity;

/// Between two tries to have a thread that the system refuses.
pub(super) const UNTIL_ANOTHER_TRY: Duration = Duration::from_millis(10);

/// What a thread of a manager is started for.
type Body = Box<dyn FnOnce(&Arc<Shared>) + Send>;

impl Shared {
    /// Runs `body` on a thread of its own; where the system refuses one, it hears of that here and now.
    pub(crate) fn spawn_or(
        self: &Arc<Self>,
        role: &str,
        body: impl FnOnce(&Arc<Self>, Result<()>) + Send + 'static,
    ) -> bool {
        let stack = self.options.limits.stack_bytes() + (2 << 20);
        let name = format!("{}-{role}", thread_name(self.name()));
        let builder = std::thread::Builder::new()
            .name(name.clone())
            .stack_size(stack);
        // Within reach: what cannot be started is dropped.
        let body = Arc::new(Mutex::new(Some(body)));
        let take =
            |body: &Mutex<Option<_>>| body.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (shared, on_thread) = (Arc::clone(self), Arc::clone(&body));
        let run = move || {
            let body = on_thread
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(body) = body {
                body(&shared, Ok(()));
            }
        };
        let Err(error) = scarcity::thread(builder, run) else {
            return true;
        };
        if let Some(body) = take(&body) {
            body(self, Err(no_thread(&format!("the thread {name}"), &error)));
        }
        false
    }

    /// The same for what is done all the same where no thread can be had: late on the pool, or here.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        role: &str,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) {
        self.spawn_or(role, |shared, started| {
            if started.is_ok() {
                body(shared);
                return;
            }
            let (pool, own) = (Arc::clone(&shared.lock_serving().pool), Arc::clone(shared));
            if let Err(run) = pool.spawn_if_running(move || body(&own)) {
                run();
            }
        });
    }

    /// The same for what may take as long as somebody else's call: later, where that can be waited for. At the end
    /// everything has been stopped, and it takes no longer than that.
    pub(super) fn spawn_patiently(self: &Arc<Self>, role: &'static str, body: Body) {
        self.spawn_or(role, move |shared, started| {
            if started.is_ok() {
                body(shared);
            } else if !shared.is_destroyed() && Deadline::is_available() {
                let own = Arc::clone(shared);
                let again = move || own.spawn_patiently(role, body);
                if let Ok(again) = Deadline::after(UNTIL_ANOTHER_TRY, again) {
                    again.detach();
                }
            } else {
                shared.spawn(role, body);
            }
        });
    }
}
