//! JavaScript-thread values behind something that any thread may hold.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use crate::inbox::Inbox;

/// Only the JS thread looks inside, and only there it is dropped: elsewhere it is sent home first.
pub(crate) struct JsOnly<T: 'static> {
    inbox: Arc<Inbox>,
    content: ManuallyDrop<T>,
}

// SAFETY: `content` is reached through `get`, which checks the thread, and dropped on the JS thread.
unsafe impl<T> Send for JsOnly<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for JsOnly<T> {}

impl<T> JsOnly<T> {
    /// JS thread.
    pub(crate) fn new(inbox: &Arc<Inbox>, content: T) -> Self {
        Self {
            inbox: Arc::clone(inbox),
            content: ManuallyDrop::new(content),
        }
    }

    /// `None` on any other thread.
    pub(crate) fn get(&self) -> Option<&T> {
        self.inbox.is_js_thread().then_some(&*self.content)
    }

    pub(crate) fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }
}

impl<T> Drop for JsOnly<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here; `self.content` is not used again.
        let content = unsafe { ManuallyDrop::take(&mut self.content) };
        if self.inbox.is_js_thread() {
            drop(content);
            return;
        }
        let travelling = Self {
            inbox: Arc::clone(&self.inbox),
            content: ManuallyDrop::new(content),
        };
        self.inbox.bury(Box::new(move |_| drop(travelling)));
    }
}
