//! One Node environment (the main thread's or a worker's): its values, its inbox, its managers.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use napi::sys;
use wasm_molt_engine::{HostRef, Replica, Watch, memory_changes};

use crate::exports::{Scratch, call_through_scratch};
use crate::inbox::{Inbox, Task};
use crate::js::{Js, JsResult, Val};
use crate::side::{ManagerSide, ReplicaSide};
use crate::wake::Wake;

/// Functions of `index.js` that need JavaScript to be written in. Weak: the copy of the package that they are of keeps
/// them, and is kept by what it has given for each manager (its listener); else it could never be collected.
pub(crate) struct Helpers {
    /// `(code, message, fields, cause) => WasmError`
    pub(crate) error: sys::napi_ref,
    /// `() => ({})` and `length => new Array(length)`; null where Node-API makes those of the right realm.
    pub(crate) object: sys::napi_ref,
    pub(crate) array: sys::napi_ref,
    /// `message => TypeError`; Node-API's own would not be that of the realm in which the package was evaluated.
    pub(crate) type_error: sys::napi_ref,
    /// `message => RangeError`
    pub(crate) range_error: sys::napi_ref,
    /// `value => +value`, whose errors are of that realm, too.
    pub(crate) to_number: sys::napi_ref,
    /// `value => BigInt.asIntN(64, value)`, `ToBigInt64` of the WebAssembly JS API.
    pub(crate) to_bigint64: sys::napi_ref,
    /// `iterable => [...iterable]`
    pub(crate) to_array: sys::napi_ref,
    /// `(thenable, id) => …`: reports through `settleHost`.
    pub(crate) follow: sys::napi_ref,
    /// `(lease) => LeasedInstance`
    pub(crate) make_lease: sys::napi_ref,
    /// `(context) => InstanceContext`
    pub(crate) make_context: sys::napi_ref,
    /// `(snapshot) => Snapshot`
    pub(crate) make_snapshot: sys::napi_ref,
    /// `(name, params, result, at) => function` through the scratch.
    pub(crate) make_export: sys::napi_ref,
    /// `() => void`: has `look` called in the next turn of the event loop.
    pub(crate) look_soon: sys::napi_ref,
}

impl Helpers {
    fn release(&self, js: Js) {
        let all = [
            self.error,
            self.object,
            self.array,
            self.type_error,
            self.range_error,
            self.to_number,
            self.to_bigint64,
            self.to_array,
            self.follow,
            self.make_lease,
            self.make_context,
            self.make_snapshot,
            self.make_export,
            self.look_soon,
        ];
        for reference in all.into_iter().filter(|reference| !reference.is_null()) {
            js.unreference(reference);
        }
    }
}

/// A value of JavaScript kept in the environment's slab. Any thread may hold and drop it.
pub(crate) struct Kept {
    inbox: Arc<Inbox>,
    index: u32,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.inbox.release_slot(self.index);
    }
}

/// What waits for `settleHost`.
pub(crate) type Settled = Box<dyn FnOnce(&EnvState, Result<Val, Val>)>;

/// Lives on its JS thread.
pub(crate) struct EnvState {
    env: sys::napi_env,
    pub(crate) inbox: Arc<Inbox>,
    wake: Wake,
    /// Operations under way: while there is one, the process stays alive.
    busy: Cell<u32>,
    /// Until when the event loop looks into the inbox by itself; see `EnvState::look`.
    look_until: Cell<Option<Instant>>,
    look_luck: Cell<Luck>,
    slab: sys::napi_ref,
    slab_free: RefCell<Vec<u32>>,
    slab_len: Cell<u32>,
    pub(crate) helpers: Helpers,
    /// Ends guests on this thread when the environment is ended from outside, which only happens to
    /// workers.
    pub(crate) watch: Option<Arc<Watch>>,
    pub(crate) managers: RefCell<HashMap<u64, Rc<ManagerSide>>>,
    pub(crate) replicas: RefCell<HashMap<u64, Rc<ReplicaSide>>>,
    lookout: Cell<sys::napi_ref>,
    /// The references are given back: nothing can be had by them any more.
    is_gone: Cell<bool>,
    settled: RefCell<HashMap<u32, Settled>>,
    scratch: *const Scratch,
    /// What keeps its buffer.
    scratch_buffer: sys::napi_ref,
    /// `memory_changes` when the views were looked at last.
    memory_changes: Cell<usize>,
    next_id: Cell<u32>,
}

thread_local! {
    /// The environments of this thread: one, unless the addon was loaded more than once.
    static ENVS: RefCell<Vec<Rc<EnvState>>> = const { RefCell::new(Vec::new()) };
}

impl EnvState {
    /// Sets this environment up with the helpers of `index.js`.
    ///
    /// Answers what the functions made by `makeExport` call.
    pub(crate) fn set_up(js: Js, helpers: Val) -> JsResult<Val> {
        if Self::is_set_up(js) {
            return Err(js.throw_type_error("this addon is another copy's; each needs its own"));
        }
        js.learn()?;
        let is_main = js.get_bool(js.property(helpers, c"isMainThread")?) == Some(true);
        let scratch = js.property(helpers, c"scratch")?;
        let bytes = js.bytes(scratch)?.filter(|b| {
            b.len >= size_of::<Scratch>() && (b.data as usize).is_multiple_of(align_of::<Scratch>())
        });
        let Some(bytes) = bytes else {
            return Err(js.throw_type_error("setup needs a scratch"));
        };
        // It lasts as long as the environment, and is never moved nor detached. It holds nothing: it was made by
        // `newScratch`, and so is of Node's own realm.
        let scratch_buffer = js.reference(scratch)?;
        let call = js.function(
            "call",
            Some(call_through_scratch),
            bytes.data as *mut c_void,
        )?;
        let resource = js.property(helpers, c"resource")?;
        let helper = |name| js.weak_reference(js.property(helpers, name)?);
        let optional = |name| match js.property(helpers, name)? {
            value if js.is_undefined(value) => Ok(ptr::null_mut()),
            value => js.weak_reference(value),
        };
        let helpers = Helpers {
            error: helper(c"error")?,
            object: optional(c"object")?,
            array: optional(c"array")?,
            type_error: helper(c"typeError")?,
            range_error: helper(c"rangeError")?,
            to_number: helper(c"toNumber")?,
            to_bigint64: helper(c"toBigInt64")?,
            to_array: helper(c"toArray")?,
            follow: helper(c"follow")?,
            make_lease: helper(c"makeLease")?,
            make_context: helper(c"makeContext")?,
            make_snapshot: helper(c"makeSnapshot")?,
            make_export: helper(c"makeExport")?,
            look_soon: helper(c"lookSoon")?,
        };
        let slab = js.reference(js.array(0)?)?;
        let wake = Wake::new(js, resource)?;
        let inbox = Inbox::new(wake);
        let watch = (!is_main).then(|| watch_over(js, &inbox));
        let state = Rc::new(Self {
            env: js.raw(),
            inbox,
            watch,
            wake,
            busy: Cell::new(0),
            look_until: Cell::new(None),
            look_luck: Cell::default(),
            slab,
            slab_free: RefCell::default(),
            // Place 0 is for `can_run`.
            slab_len: Cell::new(1),
            helpers,
            managers: RefCell::default(),
            replicas: RefCell::default(),
            lookout: Cell::new(ptr::null_mut()),
            is_gone: Cell::new(false),
            settled: RefCell::default(),
            scratch: bytes.data.cast::<c_void>().cast::<Scratch>(),
            scratch_buffer,
            memory_changes: Cell::new(0),
            next_id: Cell::new(0),
        });
        ENVS.with_borrow_mut(|envs| {
            envs.retain(|e| e.env != js.raw());
            envs.push(state);
        });
        // SAFETY: valid environment; the hook finds its state by the environment's address.
        // Registered after the wake-up, so it runs before that is gone.
        unsafe { sys::napi_add_env_cleanup_hook(js.raw(), Some(clean_up), js.raw().cast()) };
        Ok(call)
    }

    pub(crate) fn is_set_up(js: Js) -> bool {
        find(js.raw()).is_some()
    }

    #[inline]
    pub(crate) fn scratch(&self) -> &Scratch {
        // SAFETY: `set_up` keeps the buffer behind it, whose length and alignment it has checked; all in
        // it are cells, and only this thread touches them.
        unsafe { &*self.scratch }
    }

    /// Something that happened elsewhere is about to be told to JavaScript: views of a memory that has
    /// grown by then must be detached first.
    fn check_views(&self) {
        let changes = memory_changes();
        if self.memory_changes.replace(changes) == changes {
            return;
        }
        let js = self.js();
        for side in self.replicas.borrow().values() {
            side.before_js(js);
        }
    }

    /// The memories of these instances have other contents now, or are about to: views of them end.
    pub(crate) fn end_views(&self, replicas: &[Arc<Replica>]) {
        let sides = self.replicas.borrow();
        for side in replicas.iter().filter_map(|it| sides.get(&it.id())) {
            side.view.detach(self.js());
        }
        self.scratch().next_epoch();
    }

    /// A function whose arguments and result cross in the scratch.
    ///
    /// * `at`: what is in the scratch's first place when it calls.
    pub(crate) fn scratch_function(
        &self,
        name: &str,
        params: usize,
        result: u32,
        at: f64,
    ) -> JsResult<Val> {
        let js = self.js();
        let args = [
            js.string(name)?,
            js.number(params as f64)?,
            js.number(f64::from(result))?,
            js.number(at)?,
        ];
        js.call(self.helper(self.helpers.make_export)?, &args)
    }

    /// The state of the running callback's environment.
    pub(crate) fn of(js: Js) -> JsResult<Rc<Self>> {
        find(js.raw())
            .ok_or_else(|| js.throw_type_error("wasm-molt is not set up in this environment"))
    }

    /// A helper, where they are known already.
    pub(crate) fn known_helper(js: Js, choose: impl Fn(&Helpers) -> sys::napi_ref) -> Option<Val> {
        let reference = choose(&find(js.raw())?.helpers);
        (!reference.is_null()).then(|| js.dereference(reference))?
    }

    /// The state of the environment at that address, if it is this thread's.
    pub(crate) fn at(address: usize) -> Option<Rc<Self>> {
        ENVS.with_borrow(|envs| {
            envs.iter()
                .find(|e| e.env as usize == address)
                .map(Rc::clone)
        })
    }

    pub(crate) fn js(&self) -> Js {
        // SAFETY: the state lives on the environment's thread, and only callbacks get to it.
        unsafe { Js::new(self.env) }
    }

    #[inline]
    pub(crate) fn helper(&self, reference: sys::napi_ref) -> JsResult<Val> {
        let js = self.js();
        let value = (!self.is_gone.get()).then(|| js.dereference(reference));
        value
            .flatten()
            .ok_or_else(|| js.throw_type_error("a helper is missing"))
    }

    // ------------------------------------------------------------------ staying alive

    /// An operation begins that must be answered before the process may end by itself.
    pub(crate) fn begin(&self) {
        let busy = self.busy.get();
        self.busy.set(busy + 1);
        if busy == 0 {
            self.wake.keep_alive(self.js(), true);
        }
    }

    /// Whether the process stays alive for it.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.get() > 0
    }

    pub(crate) fn end(&self) {
        let busy = self.busy.get().saturating_sub(1);
        self.busy.set(busy);
        if busy == 0 {
            self.wake.keep_alive(self.js(), false);
        }
    }

    // ------------------------------------------------------------------ looking

    /// A call has been handed to the pool. Sleeping and being woken takes longer than most short calls,
    /// so for a moment the event loop keeps turning and looks by itself. Only latency depends on it:
    /// every answer wakes the loop as well.
    pub(crate) fn expect_answer(&self) {
        let is_looking = self.look_until.get().is_some();
        if !is_looking && !self.try_luck() {
            return;
        }
        self.look_until.set(Some(Instant::now() + LOOK_FOR));
        if is_looking {
            return;
        }
        let asked = self
            .helper(self.helpers.look_soon)
            .and_then(|f| self.js().call(f, &[]));
        if asked.is_err() {
            self.js().take_exception();
            self.look_until.set(None);
        }
    }

    /// As [`Js::can_run`], without making anything.
    fn can_run(&self) -> bool {
        let js = self.js();
        let probe = |slab| js.set_element(slab, 0, js.undefined());
        self.helper(self.slab).and_then(probe).is_ok()
    }

    /// One look; tells whether another one should follow.
    pub(crate) fn look(&self) -> bool {
        if self.drain() {
            self.look_luck.set(Luck::default());
            self.look_until.set(Some(Instant::now() + LOOK_FOR));
        }
        let busy = self.busy.get();
        let until = self.look_until.get();
        let is_in_time = until.is_some_and(|until| Instant::now() < until);
        // Without a time nobody hoped for anything: it is the second half of `woken_paced`.
        if busy > 0 && until.is_some() && !is_in_time {
            self.look_luck.set(self.look_luck.get().worse());
        }
        if busy == 0 || !is_in_time {
            self.look_until.set(None);
        }
        busy > 0 && is_in_time
    }

    /// Whether looking has been of use lately. Where calls are long or the cores are taken, it only
    /// burns time that a pool thread could use.
    fn try_luck(&self) -> bool {
        let mut luck = self.look_luck.get();
        let may = luck.skip == 0;
        luck.skip = luck.skip.saturating_sub(1);
        self.look_luck.set(luck);
        may
    }

    // ------------------------------------------------------------------ moved views

    /// A buffer over linear memory has been made: has somebody look, when this worker ends, whether it is
    /// still here.
    pub(crate) fn look_out(&self) -> JsResult<()> {
        if self.watch.is_none() {
            return Ok(());
        }
        let js = self.js();
        let mut byte = Box::new(0);
        let data = &raw mut *byte;
        let lookout = Lookout {
            env: self.env as usize,
            _byte: byte,
        };
        if let Some(buffer) = js.external_buffer(data, 1, lookout, Arc::default())? {
            let old = self.lookout.replace(js.reference(buffer)?);
            if !old.is_null() {
                js.unreference(old);
            }
        }
        Ok(())
    }

    /// What JavaScript has moved must not go with this environment.
    fn look_whether_moved(&self) {
        for side in self.replicas.borrow().values() {
            side.look_whether_moved(self.js());
        }
    }

    // ------------------------------------------------------------------ the slab

    /// Keeps a value until the last clone of the result is dropped, on whatever thread.
    pub(crate) fn keep(&self, value: Val) -> JsResult<HostRef> {
        let js = self.js();
        // A long synchronous stretch keeps without ever coming by the inbox.
        if self.slab_free.borrow().is_empty() {
            self.sweep();
        }
        let array = self.helper(self.slab)?;
        let index = self.slab_free.borrow_mut().pop().unwrap_or_else(|| {
            let index = self.slab_len.get();
            self.slab_len.set(index + 1);
            index
        });
        js.set_element(array, index, value)?;
        Ok(HostRef::new(Kept {
            inbox: Arc::clone(&self.inbox),
            index,
        }))
    }

    /// The value that was kept; undefined if it is not this environment's.
    pub(crate) fn kept(&self, value: &HostRef) -> JsResult<Val> {
        match value.downcast_ref::<Kept>() {
            Some(kept) if Arc::ptr_eq(&kept.inbox, &self.inbox) => {
                self.js().element(self.helper(self.slab)?, kept.index)
            }
            _ => Ok(self.js().undefined()),
        }
    }

    /// Gives back what other threads have let go of.
    pub(crate) fn sweep(&self) {
        if !self.inbox.has_released() {
            return;
        }
        let js = self.js();
        let slots = self.inbox.take_released();
        let Ok(array) = self.helper(self.slab) else {
            return;
        };
        let undefined = js.undefined();
        let mut free = self.slab_free.borrow_mut();
        for index in slots {
            if js.set_element(array, index, undefined).is_ok() {
                free.push(index);
            }
        }
    }

    // ------------------------------------------------------------------ promises of the host

    /// Waits for a promise or thenable of the user; `then` runs when it settles, and is kept until that, or until
    /// it is [not waited for](Self::unfollow) any more.
    pub(crate) fn follow(&self, promise: Val, then: Settled) -> JsResult<u32> {
        let js = self.js();
        let id = self.next_id.get().wrapping_add(1);
        self.next_id.set(id);
        self.settled.borrow_mut().insert(id, then);
        js.call(
            self.helper(self.helpers.follow)?,
            &[promise, js.number(f64::from(id))?],
        )?;
        Ok(id)
    }

    /// Nobody wants to know: it may never settle.
    pub(crate) fn unfollow(&self, id: u32) {
        // Dropped once nothing is borrowed: what it holds may want to follow or unfollow something itself.
        let then = self.settled.borrow_mut().remove(&id);
        drop(then);
    }

    /// For what nobody here will wait for: the rejection of a promise must not count as unhandled.
    /// Other thenables are left alone, because asking starts some of them (query builders).
    pub(crate) fn ignore(&self, promise: Val) {
        if self.js().is_promise(promise).unwrap_or(false)
            && self.follow(promise, Box::new(|_, _| {})).is_err()
        {
            self.js().take_exception();
        }
    }

    pub(crate) fn settle_host(&self, id: u32, outcome: Result<Val, Val>) {
        let then = self.settled.borrow_mut().remove(&id);
        if let Some(then) = then {
            then(self, outcome);
        }
    }

    // ------------------------------------------------------------------ the inbox

    /// Runs what is queued; tells whether there was anything.
    fn drain(&self) -> bool {
        // Cleared first: what is posted from here on wakes again.
        self.inbox.let_wake();
        self.drain_asleep()
    }

    /// The same, and nobody wakes this thread for what is posted from here on.
    fn drain_asleep(&self) -> bool {
        self.sweep();
        let tasks = self.inbox.take();
        let was_any = self.attend() || !tasks.is_empty();
        if was_any {
            self.check_views();
        }
        for task in tasks {
            if !self.run_scoped(task) {
                break;
            }
        }
        was_any
    }

    /// Does what threads of guests want; tells whether there was anything. This thread may be inside a
    /// guest that waits.
    pub(crate) fn attend(&self) -> bool {
        let mut was_any = false;
        // And not what comes meanwhile: whoever asks again and again would keep everything else away.
        for _ in 0..self.inbox.urgent_count() {
            let Some(task) = self.inbox.take_urgent() else {
                break;
            };
            if !was_any {
                self.check_views();
            }
            was_any = true;
            if !self.run_scoped(task) {
                break;
            }
        }
        was_any
    }

    /// Another thread has posted something.
    pub(crate) fn woken(&self) {
        // Whoever has just been answered may well be back soon: a guest with one import after another.
        if self.drain() && self.busy.get() > 0 {
            self.js().scoped(|| self.expect_answer());
        }
    }

    /// The same once in a turn of the event loop: what is posted meanwhile waits for the next one.
    pub(crate) fn woken_paced(&self) {
        self.drain_asleep();
        let js = self.js();
        js.scoped(|| {
            let asked = self
                .helper(self.helpers.look_soon)
                .and_then(|f| js.call(f, &[]));
            if asked.is_err() {
                js.take_exception();
                self.drain();
            }
        });
    }

    /// Tells whether it ran. If not, this is a worker being terminated: what is left is dropped, and whoever
    /// waits for it sees its channel close.
    fn run_scoped(&self, task: Task) -> bool {
        self.js().scoped(|| {
            let may_run = self.can_run();
            if may_run {
                self.run_task(task);
            }
            may_run
        })
    }

    fn run_task(&self, task: Task) {
        let run = std::panic::AssertUnwindSafe(|| task(self));
        if let Err(panic) = std::panic::catch_unwind(run) {
            crate::error::throw_panic(self.js(), &*panic);
        }
        if self.js().is_exception_pending() {
            self.js().report_uncaught();
        }
    }

    /// The environment goes: stop everything, wait for the threads that are inside guests, let go.
    fn tear_down(&self) {
        // Where buffers are finalized only after this (Bun), nobody has looked yet. Deno finalizes them when
        // nobody has them any more, and says nothing of an end: looking ends its process.
        if self.js().is_ending() {
            self.look_whether_moved();
        }
        self.settled.borrow_mut().clear();
        let managers: Vec<_> = self.managers.borrow_mut().drain().map(|(_, m)| m).collect();
        let mut ends = Vec::new();
        for side in &managers {
            let (tell, told) = crossbeam_channel::bounded(1);
            side.tear_down();
            side.manager.destroy(Box::new(move |_| {
                let _ = tell.send(());
            }));
            ends.push(told);
        }
        // After the managers know that they are destroyed: a swap that loses its home must not go on.
        drop(self.inbox.close());
        // A guest stops at its next poll; a bound keeps stuck ones from hanging the exit.
        let latest = Instant::now() + LONGEST_GOODBYE;
        for told in ends {
            let _ = told.recv_deadline(latest);
        }
        let js = self.js();
        let replicas: Vec<_> = self.replicas.borrow_mut().drain().map(|(_, r)| r).collect();
        // Node does not delete references that an addon has made.
        if js.is_ending() {
            for side in &managers {
                side.release(js);
            }
            for side in &replicas {
                side.release(js);
            }
            self.release(js);
        }
        drop(replicas);
        drop(self.inbox.take_graves());
    }

    fn release(&self, js: Js) {
        if self.is_gone.replace(true) {
            return;
        }
        self.helpers.release(js);
        js.unreference(self.slab);
        js.unreference(self.scratch_buffer);
        let lookout = self.lookout.replace(ptr::null_mut());
        if !lookout.is_null() {
            js.unreference(lookout);
        }
    }
}

/// The youngest external buffer of an environment, and so the first that Node finalizes when it ends. Each
/// of the others is detached first, and cannot tell any more whether JavaScript has moved its bytes.
struct Lookout {
    env: usize,
    _byte: Box<u8>,
}

impl Drop for Lookout {
    fn drop(&mut self) {
        let Some(env) = EnvState::at(self.env) else {
            return;
        };
        // Else it was only replaced by a younger one.
        if env.js().is_ending() {
            env.look_whether_moved();
        }
    }
}

/// Several times what a short call takes there and back (benchmark: `call` one by one).
const LOOK_FOR: Duration = Duration::from_micros(20);

/// How looking went lately: each miss doubles the calls that are not looked for.
#[derive(Clone, Copy, Default)]
struct Luck {
    misses: u32,
    skip: u32,
}

impl Luck {
    fn worse(self) -> Self {
        let misses = (self.misses + 1).min(6);
        Self {
            misses,
            skip: (1 << misses) - 1,
        }
    }
}

/// For all managers of an environment together.
const LONGEST_GOODBYE: Duration = Duration::from_secs(5);

/// What tells guests on this environment's thread that it is ending.
fn watch_over(js: Js, inbox: &Arc<Inbox>) -> Arc<Watch> {
    let inbox = Arc::clone(inbox);
    let env = js.raw() as usize;
    Watch::new(move || {
        // Guests on other threads are ended by `tear_down`, when this thread gets there.
        inbox.is_js_thread() && EnvState::at(env).is_none_or(|env| env.js().is_ending())
    })
}

fn find(env: sys::napi_env) -> Option<Rc<EnvState>> {
    ENVS.with_borrow(|envs| envs.iter().find(|e| e.env == env).map(Rc::clone))
}

unsafe extern "C" fn clean_up(env: *mut c_void) {
    let state = find(env.cast());
    if let Some(state) = state {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.tear_down()));
        ENVS.with_borrow_mut(|envs| envs.retain(|e| e.env != env.cast()));
    }
}
