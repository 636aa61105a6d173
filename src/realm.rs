//! The JS thread's side of a realm: its views, and what its namespaces want to know.

use std::cell::{Cell, RefCell};
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use napi::sys;
use wasm_molt_engine::{Error, ErrorCode, Exception, MemoryRecord, Replica, Result};

use crate::env::EnvState;
use crate::js::{Js, JsResult, Kind, Pending, Val};
use crate::memory::View;
use crate::side::ReplicaSide;

/// The JS thread's side of a realm.
#[derive(Default)]
pub(crate) struct RealmSide {
    hooks: RefCell<Vec<Hooks>>,
    /// By the memories' numbers.
    views: RefCell<Vec<RealmView>>,
}

/// Functions of one namespace over the realm.
struct Hooks {
    /// `(code, message, fields, cause) => Error`
    error: sys::napi_ref,
    /// `(tag, payload) => Exception`
    make_exception: sys::napi_ref,
    /// `(thrown) => [tag, payload] | undefined`
    exception_parts: sys::napi_ref,
    /// `(snapshot) => void`, where somebody wants to know.
    captured: Option<sys::napi_ref>,
    /// Likewise.
    rewound: Option<sys::napi_ref>,
    /// `() => boolean`: has the guest's threads end in good order, if it can.
    exit_threads: Option<sys::napi_ref>,
    /// `() => void`: the realm is gone.
    expired: Option<sys::napi_ref>,
}

impl Hooks {
    fn release(self, js: Js) {
        let own = [self.error, self.make_exception, self.exception_parts];
        let more = [self.captured, self.rewound, self.exit_threads, self.expired];
        for reference in own.into_iter().chain(more.into_iter().flatten()) {
            js.unreference(reference);
        }
    }
}

struct RealmView {
    view: View,
    memory: Arc<MemoryRecord>,
    /// The buffer of a memory without pages.
    empty: Cell<sys::napi_ref>,
    is_shared: bool,
    /// Shorter buffers of a shared memory.
    retired: RefCell<Vec<View>>,
}

/// Retired views beyond which those that nobody holds any more are looked for.
const MANY_RETIRED: usize = 64;

impl RealmView {
    fn check(&self, js: Js) {
        if self.is_shared && self.view.is_outgrown(&self.memory) {
            self.retire(js);
        }
        if self.view.is_live() {
            self.view.check(js, &self.memory);
        }
        if !self.empty.get().is_null() && self.memory.byte_len() > 0 {
            self.drop_empty(js);
        }
    }

    /// The buffer of a shared memory stays as it is when the memory grows.
    fn retire(&self, js: Js) {
        let retired = js.scoped(|| self.view.retire(js));
        let mut all = self.retired.borrow_mut();
        if all.len() >= MANY_RETIRED {
            all.retain(|view| {
                let is_held = !view.is_collected(js);
                if !is_held {
                    view.detach(js);
                }
                is_held
            });
        }
        all.extend(retired.ok().flatten());
    }

    fn drop_empty(&self, js: Js) {
        let empty = self.empty.replace(ptr::null_mut());
        if empty.is_null() {
            return;
        }
        js.scoped(|| {
            if let Some(buffer) = js.dereference(empty)
                && !js.is_detached(buffer)
            {
                js.detach(buffer);
            }
        });
        js.unreference(empty);
    }

    fn detach(&self, js: Js) {
        for view in self.retired.borrow_mut().drain(..) {
            view.detach(js);
        }
        self.view.detach(js);
        self.drop_empty(js);
    }

    fn release(&self, js: Js) {
        for view in self.retired.borrow_mut().drain(..) {
            view.release(js);
        }
        self.view.release(js);
        let empty = self.empty.replace(ptr::null_mut());
        if !empty.is_null() {
            js.unreference(empty);
        }
    }

    fn buffer(&self, js: Js) -> JsResult<Val> {
        self.check(js);
        if self.memory.byte_len() > 0 {
            return self.view.buffer(js, &self.memory);
        }
        let empty = self.empty.get();
        if !empty.is_null()
            && let Some(buffer) = js.dereference(empty)
            && !js.is_detached(buffer)
        {
            return Ok(buffer);
        }
        let buffer = js.buffer(0)?;
        let old = self.empty.replace(js.reference(buffer)?);
        if !old.is_null() {
            js.unreference(old);
        }
        Ok(buffer)
    }
}

impl RealmSide {
    /// One more namespace over the realm, with the functions that it gives.
    pub(crate) fn open(&self, js: Js, given: Val) -> JsResult<()> {
        let get = |name| js.reference(js.property(given, name)?);
        let maybe = |name| -> JsResult<Option<sys::napi_ref>> {
            let value = js.property(given, name)?;
            match js.kind(value)? {
                Kind::Function => Ok(Some(js.reference(value)?)),
                _ => Ok(None),
            }
        };
        let hooks = Hooks {
            error: get(c"error")?,
            make_exception: get(c"makeException")?,
            exception_parts: get(c"exceptionParts")?,
            captured: maybe(c"captured")?,
            rewound: maybe(c"rewound")?,
            exit_threads: maybe(c"exitThreads")?,
            expired: maybe(c"expired")?,
        };
        self.hooks.borrow_mut().push(hooks);
        Ok(())
    }

    /// The buffer of a memory.
    pub(crate) fn buffer(&self, js: Js, replica: &Replica, id: u32) -> Result<JsResult<Val>> {
        let id = id as usize;
        let mut views = self.views.borrow_mut();
        while views.len() <= id {
            let next = views.len() as u32;
            let memory = replica.realm_memory(next)?;
            views.push(RealmView {
                view: View::default(),
                memory,
                empty: Cell::new(ptr::null_mut()),
                is_shared: replica.realm_memory_is_shared(next),
                retired: RefCell::default(),
            });
        }
        Ok(match views.get(id) {
            Some(view) => view.buffer(js),
            None => js.buffer(0),
        })
    }

    /// JavaScript is about to run: views of memories that have grown must be detached by then.
    #[inline]
    pub(crate) fn check_views(&self, js: Js) {
        for view in &*self.views.borrow() {
            view.check(js);
        }
    }

    pub(crate) fn look_whether_moved(&self, js: Js) {
        for memory in &*self.views.borrow() {
            memory.view.look_whether_moved(js);
            for view in &*memory.retired.borrow() {
                view.look_whether_moved(js);
            }
        }
    }

    /// Views of these memories end.
    pub(crate) fn end_views(&self, js: Js, memories: &[u32]) {
        let views = self.views.borrow();
        for view in memories.iter().filter_map(|id| views.get(*id as usize)) {
            view.detach(js);
        }
    }

    /// The realm is gone for JavaScript.
    pub(crate) fn expire(&self, js: Js) {
        for view in self.views.borrow_mut().drain(..) {
            view.detach(js);
            view.release(js);
        }
        let hooks: Vec<_> = self.hooks.borrow_mut().drain(..).collect();
        for hooks in hooks {
            if let Some(expired) = hooks.expired
                && js.scoped(|| js.can_run())
            {
                js.scoped(|| tell(js, expired, &[]));
            }
            hooks.release(js);
        }
    }

    /// Gives its references back.
    pub(crate) fn release(&self, js: Js) {
        for view in self.views.borrow_mut().drain(..) {
            view.release(js);
        }
        for hooks in self.hooks.borrow_mut().drain(..) {
            hooks.release(js);
        }
    }

    pub(crate) fn error_maker(&self) -> Option<sys::napi_ref> {
        self.hooks.borrow().first().map(|hooks| hooks.error)
    }

    /// The JavaScript value of an exception that nobody has caught: the very object that was thrown, if it
    /// came from there.
    pub(crate) fn exception_value(
        &self,
        env: &EnvState,
        side: &ReplicaSide,
        exception: &Exception,
    ) -> JsResult<Val> {
        if let Some(object) = &exception.object {
            return env.kept(object);
        }
        let js = env.js();
        let maker = self
            .hooks
            .borrow()
            .first()
            .map(|hooks| hooks.make_exception);
        let Some(maker) = maker else {
            return Ok(js.undefined());
        };
        let side = env.replicas.borrow().get(&side.replica.id()).map(Rc::clone);
        let payload = js.array(exception.payload.len())?;
        for (index, value) in (0..).zip(&exception.payload) {
            js.set_element(payload, index, env.to_js(value, side.as_ref())?)?;
        }
        let tag = js.number(f64::from(exception.tag))?;
        js.call(env.helper(maker)?, &[tag, payload])
    }

    /// What an import threw, such that guests can catch it where they can catch anything.
    pub(crate) fn thrown(&self, env: &EnvState, side: &ReplicaSide, value: Val) -> Error {
        if !side.replica.can_catch() {
            return env.thrown(value);
        }
        match self.parts(env, &side.replica, value) {
            Ok(Some(exception)) => Error::Exception(Box::new(exception)),
            Ok(None) => env.thrown(value),
            Err(Pending) => env.take_thrown(),
        }
    }

    fn parts(&self, env: &EnvState, replica: &Replica, value: Val) -> JsResult<Option<Exception>> {
        let js = env.js();
        let asks = self
            .hooks
            .borrow()
            .first()
            .map(|hooks| hooks.exception_parts);
        let Some(asks) = asks else { return Ok(None) };
        let parts = js.call(env.helper(asks)?, &[value])?;
        if !js.is_array(parts)? {
            return Ok(None);
        }
        let tag = js.get_number(js.element(parts, 0)?).unwrap_or_default() as u32;
        let values = js.element(parts, 1)?;
        // SAFETY: a host call of the realm has just ended on this thread, which holds it.
        let types = unsafe { replica.realm_tag_type(tag) };
        let Ok((types, _)) = types else {
            return Ok(None);
        };
        let mut payload = Vec::with_capacity(types.len());
        for (index, ty) in (0..).zip(types) {
            payload.push(env.to_wasm(js.element(values, index)?, ty)?);
        }
        Ok(Some(Exception {
            tag,
            payload,
            object: Some(env.keep(value)?),
        }))
    }

    /// It was captured as that snapshot.
    pub(crate) fn captured(&self, env: &EnvState, snapshot: u64) {
        self.tell(env, snapshot, |hooks| hooks.captured);
    }

    /// Has the guest's threads asked to end in good order.
    ///
    /// # Errors
    /// What was thrown, or that nobody knows how.
    pub(crate) fn exit_threads(&self, env: &EnvState, side: &ReplicaSide) -> Result<()> {
        let asks = self.hooks.borrow().first().and_then(|it| it.exit_threads);
        let asked = asks.map(|asks| env.helper(asks).and_then(|asks| env.js().call(asks, &[])));
        match asked {
            Some(Ok(asked)) if env.js().get_bool(asked) == Some(true) => Ok(()),
            Some(Err(Pending)) => Err(env.take_thrown()),
            _ => Err(Error::new(
                ErrorCode::SnapshotUnsupported,
                format!(
                    "{} cannot be captured: {} of its threads run, and options.threadPool does not say how \
                     they end in good order; capture it before it starts threads, or give that option",
                    side.replica.module().name(),
                    side.replica.guest_threads().threads
                ),
            )),
        }
    }

    /// It is as that snapshot again.
    pub(crate) fn rewound(&self, env: &EnvState, snapshot: u64) {
        self.tell(env, snapshot, |hooks| hooks.rewound);
    }

    fn tell(&self, env: &EnvState, snapshot: u64, which: impl Fn(&Hooks) -> Option<sys::napi_ref>) {
        let js = env.js();
        let told: Vec<_> = self.hooks.borrow().iter().filter_map(which).collect();
        let Ok(snapshot) = js.number(snapshot as f64) else {
            return;
        };
        for reference in told {
            tell(js, reference, &[snapshot]);
        }
    }
}

/// Calls a function of `lib/`, which does not throw.
fn tell(js: Js, function: sys::napi_ref, args: &[Val]) {
    let Some(function) = js.dereference(function) else {
        return;
    };
    if js.call(function, args).is_err() && js.is_exception_pending() {
        js.report_uncaught();
    }
}
