//! What the JS thread knows of a manager and of each of its instances.
//!
//! Everything here lives and dies on the JS thread (`Rc`, `Cell`); the engine's own objects are behind `Arc`.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use napi::sys;
use wasm_molt_engine::{Error, Home, Job, Manager, Module, Replaced, Replica};

use crate::env::EnvState;
use crate::error::Place;
use crate::exports::refresh_live_exports;
use crate::imports::JsEnd;
use crate::js::Js;
use crate::lease::LeaseSide;
use crate::memory::View;
use crate::realm::RealmSide;

/// A host call of an instance that JavaScript is answering right now.
pub(crate) enum Frame {
    /// The guest runs on this thread: its exports are entered directly.
    Direct,
    /// The guest runs on a pool thread, which waits: its exports are entered by asking that thread.
    Remote(Rc<JsEnd>),
}

/// One instance.
pub(crate) struct ReplicaSide {
    pub(crate) replica: Arc<Replica>,
    pub(crate) manager: Weak<ManagerSide>,
    pub(crate) is_expired: Cell<bool>,
    /// A reload has saved its state: what happened in it now would be lost.
    pub(crate) is_saved: Cell<bool>,
    pub(crate) view: View,
    pub(crate) frames: RefCell<Vec<Frame>>,
    /// The pool thread that waits for a promise of an import.
    pub(crate) awaiting: RefCell<Option<Rc<JsEnd>>>,
    /// Function objects by guest function, weakly, so that identity holds.
    pub(crate) functions: RefCell<HashMap<usize, sys::napi_ref>>,
    /// What JavaScript has made in its store, if it may.
    pub(crate) realm: Option<RealmSide>,
}

impl ReplicaSide {
    pub(crate) fn new(replica: Arc<Replica>, manager: &Rc<ManagerSide>) -> Rc<Self> {
        Rc::new(Self {
            realm: replica.is_realm().then(RealmSide::default),
            replica,
            manager: Rc::downgrade(manager),
            is_expired: Cell::new(false),
            is_saved: Cell::new(false),
            view: View::default(),
            frames: RefCell::default(),
            awaiting: RefCell::default(),
            functions: RefCell::default(),
        })
    }

    /// JavaScript is about to run: views of a memory that has grown must be detached by then.
    #[inline]
    pub(crate) fn before_js(&self, js: Js) {
        if self.view.is_live()
            && let Some(memory) = self.replica.memory()
        {
            self.view.check(js, memory);
        }
        if let Some(realm) = &self.realm {
            realm.check_views(js);
        }
    }

    /// The environment ends: what JavaScript has moved out of its buffers may be in use elsewhere.
    pub(crate) fn look_whether_moved(&self, js: Js) {
        self.view.look_whether_moved(js);
        if let Some(realm) = &self.realm {
            realm.look_whether_moved(js);
        }
    }

    /// The instance is gone for JavaScript.
    pub(crate) fn expire(&self, js: Js) {
        self.is_expired.set(true);
        self.view.detach(js);
        if let Some(realm) = &self.realm {
            realm.expire(js);
        }
        self.release(js);
    }

    /// Gives its references back: no view of it is asked for any more.
    pub(crate) fn release(&self, js: Js) {
        self.view.release(js);
        if let Some(realm) = &self.realm {
            realm.release(js);
        }
        for (_, reference) in self.functions.borrow_mut().drain() {
            js.unreference(reference);
        }
    }
}

/// JavaScript functions that a manager was given.
#[derive(Default)]
pub(crate) struct Hooks {
    pub(crate) imports: Cell<Option<sys::napi_ref>>,
    pub(crate) imports_is_function: bool,
    pub(crate) initialize: Cell<Option<sys::napi_ref>>,
    pub(crate) save_state: Cell<Option<sys::napi_ref>>,
    pub(crate) restore_state: Cell<Option<sys::napi_ref>>,
    pub(crate) reseed: Cell<Option<sys::napi_ref>>,
    /// `(kind, payload) => void`
    pub(crate) on_event: Cell<Option<sys::napi_ref>>,
}

impl Hooks {
    /// Lets go of the functions. JS thread.
    pub(crate) fn release(&self, js: Js) {
        let all = [
            &self.imports,
            &self.initialize,
            &self.save_state,
            &self.restore_state,
            &self.reseed,
            &self.on_event,
        ];
        for reference in all.into_iter().filter_map(Cell::take) {
            js.unreference(reference);
        }
    }
}

/// Somebody in JavaScript can still reach the manager. When the last one is collected, it is closed:
/// the safety net for programs that forget to.
pub(crate) struct Handle(pub(crate) Rc<ManagerSide>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.manager.close(None, Box::new(|_| {}));
    }
}

/// One manager.
pub(crate) struct ManagerSide {
    pub(crate) id: u64,
    pub(crate) manager: Manager,
    pub(crate) home: Home<Job>,
    pub(crate) hooks: Hooks,
    pub(crate) timeout_ms: Option<u64>,
    /// Synchronous calls may not begin below this address of the JS thread's stack.
    pub(crate) stack_floor: usize,
    /// The instance at home: what `manager.exports` and `manager.memory` show.
    pub(crate) current: RefCell<Option<Rc<ReplicaSide>>>,
    /// Goes up whenever `current` changes, so that cached functions are looked up again.
    pub(crate) stamp: Cell<u64>,
    /// Instances whose host calls JavaScript is answering, innermost last.
    pub(crate) stack: RefCell<Vec<Rc<ReplicaSide>>>,
    /// Asynchronous reloads under way.
    pub(crate) swapping: Cell<u32>,
    /// Reasons (frames on the stack, reloads) why a synchronous call must look closer.
    pub(crate) detours: Cell<u32>,
    /// Synchronous calls that ended well, not yet handed to the statistics.
    pub(crate) completed: Cell<u64>,
    pub(crate) leases: RefCell<Vec<Weak<LeaseSide>>>,
    /// What `manager.exports` is, once somebody has asked for it.
    pub(crate) exports: RefCell<Option<LiveExports>>,
    /// Somebody in JavaScript wants to hear of the steps of reloads.
    pub(crate) watches_steps: Arc<AtomicBool>,
}

/// The live exports object.
pub(crate) struct LiveExports {
    /// Weak.
    pub(crate) object: sys::napi_ref,
    pub(crate) handle: Weak<Handle>,
    /// The build whose functions it shows.
    pub(crate) module: Arc<Module>,
}

impl ManagerSide {
    pub(crate) fn place(&self) -> Place<'_> {
        Place {
            manager: Some(self.manager.name()),
            generation: Some(self.manager.generation().get()),
            realm: None,
        }
    }

    #[inline]
    pub(crate) fn push_frame(&self, side: &Rc<ReplicaSide>, frame: Frame) {
        side.frames.borrow_mut().push(frame);
        self.stack.borrow_mut().push(Rc::clone(side));
        self.detours.set(self.detours.get() + 1);
    }

    #[inline]
    pub(crate) fn pop_frame(&self, side: &Rc<ReplicaSide>) {
        side.frames.borrow_mut().pop();
        self.stack.borrow_mut().pop();
        self.detours.set(self.detours.get() - 1);
    }

    pub(crate) fn swap_begins(&self) {
        self.swapping.set(self.swapping.get() + 1);
        self.detours.set(self.detours.get() + 1);
    }

    pub(crate) fn swap_ends(&self) {
        self.swapping.set(self.swapping.get() - 1);
        self.detours.set(self.detours.get() - 1);
    }

    /// The instance at home, without the bookkeeping of a borrow.
    #[inline(always)]
    pub(crate) fn current_quickly(&self) -> Option<Rc<ReplicaSide>> {
        // SAFETY: the borrow ends here, with nothing run in between.
        unsafe { self.current.try_borrow_unguarded() }.ok()?.clone()
    }

    /// Whether that is the instance at home.
    #[inline(always)]
    pub(crate) fn is_current(&self, side: &Rc<ReplicaSide>) -> bool {
        // SAFETY: the borrow ends here, with nothing run in between.
        let current = unsafe { self.current.try_borrow_unguarded() };
        matches!(current, Ok(Some(current)) if Rc::ptr_eq(current, side))
    }

    /// The instance at home, or why there is none.
    pub(crate) fn current(&self) -> Result<Rc<ReplicaSide>, Error> {
        self.current
            .borrow()
            .clone()
            .ok_or_else(|| self.no_instance())
    }

    #[cold]
    fn no_instance(&self) -> Error {
        Error::new(
            wasm_molt_engine::ErrorCode::Closed,
            format!(
                "{} is {}; create a new manager",
                self.manager.name(),
                self.manager.state().as_str()
            ),
        )
    }

    /// Instances were replaced: their handles expire now, before anything else runs.
    pub(crate) fn replaced(self: &Rc<Self>, env: &Rc<EnvState>, change: &Replaced) {
        let js = env.js();
        let is_old = |id: u64| change.old.iter().any(|r| r.id() == id);
        self.expire_leases(|side| is_old(side.replica.id()));
        for old in &change.old {
            if let Some(side) = env.replicas.borrow_mut().remove(&old.id()) {
                side.expire(js);
            }
        }
        let mut current = self.current.borrow_mut();
        if current.as_ref().is_some_and(|side| side.is_expired.get()) {
            *current = None;
        }
        if let Some(home) = change.new.iter().find(|r| r.slot() == 0) {
            *current = env.replicas.borrow().get(&home.id()).map(Rc::clone);
        }
        if let Some(side) = &*current
            && change.new.is_empty()
        {
            // Rolled back.
            side.is_saved.set(false);
        }
        self.stamp.set(self.stamp.get() + 1);
        env.scratch().next_epoch();
        drop(current);
        if self.manager.is_realm() && !change.new.is_empty() {
            self.tell_replaced(env, change);
        }
        if !change.new.is_empty() && refresh_live_exports(env, self).is_err() {
            // Only while the environment ends: nobody will look.
            js.take_exception();
        }
    }

    /// `index.js` shows another generation from now on, before any other JavaScript runs.
    fn tell_replaced(&self, env: &EnvState, change: &Replaced) {
        let js = env.js();
        let Some(listener) = self.hooks.on_event.get() else {
            return;
        };
        js.scoped(|| {
            let tell = || {
                let generation = js.number(change.generation.get() as f64)?;
                js.call(env.helper(listener)?, &[js.string("replaced")?, generation])
            };
            if tell().is_err() && js.is_exception_pending() {
                js.report_uncaught();
            }
        });
    }

    pub(crate) fn expire_leases(&self, is_meant: impl Fn(&ReplicaSide) -> bool) {
        let leases: Vec<_> = self.leases.borrow_mut().drain(..).collect();
        for weak in leases {
            let Some(lease) = weak.upgrade() else {
                continue;
            };
            if is_meant(&lease.side) {
                lease.expire();
            } else {
                self.leases.borrow_mut().push(weak);
            }
        }
    }

    /// The manager is closed and everything is answered: what the user gave is let go of.
    pub(crate) fn forget(&self, env: &EnvState) {
        env.managers.borrow_mut().remove(&self.id);
        self.release(env.js());
    }

    /// Gives its references back.
    pub(crate) fn release(&self, js: Js) {
        self.hooks.release(js);
        if let Some(exports) = self.exports.borrow_mut().take() {
            js.unreference(exports.object);
        }
    }

    /// The environment goes: nothing of this manager may be used from JavaScript any more.
    pub(crate) fn tear_down(&self) {
        self.expire_leases(|_| true);
        *self.current.borrow_mut() = None;
        self.stamp.set(self.stamp.get() + 1);
    }

    /// Hands the fast path's own count over.
    pub(crate) fn flush_counts(&self) {
        let completed = self.completed.take();
        if completed > 0 {
            self.manager.count_completed(completed);
        }
    }
}
