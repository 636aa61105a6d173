//! Native threads of guests, as JavaScript starts and ends them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use napi::sys;
use wasm_molt_engine::{Error, GuestThread, Result, ThreadCall, Value};

use crate::binding::arg;
use crate::env::EnvState;
use crate::error::Place;
use crate::exports::{function_of, realm_of, signature_of};
use crate::js::{Js, JsResult, Native, Pending, Val};
use crate::js_only::JsOnly;
use crate::namespace::{Handle, realm};

/// Every function, by the name that `lib/` uses.
pub(crate) const FUNCTIONS: &[(&str, Native)] = &[
    ("threadSpawn", spawn),
    ("threadTerminate", terminate),
    ("threadHold", hold),
    ("threadRealm", realm_number),
    ("threadCounts", counts),
    ("threadsRecycle", recycle),
];

/// What JavaScript has of a thread.
struct ThreadSide {
    env: Rc<EnvState>,
    thread: GuestThread,
    /// Somebody waits for its end, which keeps the process alive.
    is_held: Rc<Cell<bool>>,
    is_over: Rc<Cell<bool>>,
}

/// Who is told of the end.
struct Listener {
    env: Rc<EnvState>,
    /// `(error, isByItself) => void`
    ended: RefCell<sys::napi_ref>,
    is_held: Rc<Cell<bool>>,
    is_over: Rc<Cell<bool>>,
}

impl Listener {
    fn tell(&self, outcome: Result<bool>) {
        let js = self.env.js();
        self.is_over.set(true);
        if self.is_held.replace(false) {
            self.env.end();
        }
        let Some(ended) = js.dereference(*self.ended.borrow()) else {
            return;
        };
        let told = match outcome {
            Ok(by_itself) => js
                .boolean(by_itself)
                .map(|by_itself| [js.undefined(), by_itself]),
            Err(error) => self
                .env
                .error_value(&error, &Place::default())
                .map(|it| [it, js.undefined()]),
        };
        let told = told.and_then(|told| js.call(ended, &told));
        if told.is_err() && js.is_exception_pending() {
            js.report_uncaught();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.env.js().unreference(*self.ended.borrow());
    }
}

/// `([function, ...args][], ended) => [thread, generation]`
fn spawn(js: Js, args: &[Val]) -> JsResult<Val> {
    let given = arg(args, 0);
    let first = js.element(js.element(given, 0)?, 0)?;
    let Some(realm) = &realm_of(js, first) else {
        let env = EnvState::of(js)?;
        let error = Error::invalid(
            "a thread calls functions that modules of glue export, and nothing else",
        );
        return Err(env.throw(&error, &Place::default()));
    };
    let mut calls = Vec::new();
    for index in 0..js.array_length(given)? {
        calls.push(call(js, realm, js.element(given, index)?)?);
    }
    let (is_held, is_over) = (Rc::<Cell<bool>>::default(), Rc::<Cell<bool>>::default());
    let listener = Listener {
        env: Rc::clone(&realm.env),
        ended: RefCell::new(js.reference(arg(args, 1))?),
        is_held: Rc::clone(&is_held),
        is_over: Rc::clone(&is_over),
    };
    let listener = JsOnly::new(&realm.env.inbox, listener);
    let done = Box::new(move |outcome: Result<bool>| {
        let inbox = Arc::clone(listener.inbox());
        // Without an environment nobody waits.
        let _ = inbox.post(Box::new(move |_| {
            if let Some(listener) = listener.get() {
                listener.tell(outcome);
            }
        }));
    });
    let manager = &realm.manager.manager;
    let replica = &realm.side.replica;
    // SAFETY: `enter` has got the right to be inside.
    let spawned = realm.enter(|_| unsafe { manager.spawn(replica, calls, done) })?;
    let thread = spawned.map_err(|error| realm.throw(&error))?;
    let generation = replica.generation().get();
    let thread = js.external(ThreadSide {
        env: Rc::clone(&realm.env),
        thread,
        is_held,
        is_over,
    })?;
    let both = js.array(2)?;
    js.set_element(both, 0, thread)?;
    js.set_element(both, 1, js.number(generation as f64)?)?;
    Ok(both)
}

/// One `[function, ...args]`.
fn call(js: Js, realm: &Handle, given: Val) -> JsResult<ThreadCall> {
    let function = js.element(given, 0)?;
    let signature = signature_of(js, function);
    let (Some(Value::Func(Some(func))), Some(signature)) = (function_of(js, function), signature)
    else {
        let error =
            Error::invalid("a thread calls functions that a module exports, and nothing else");
        return Err(realm.throw(&error));
    };
    if func.replica_id() != realm.side.replica.id() {
        let error = Error::invalid("the functions that a thread calls must be of one generation");
        return Err(realm.throw(&error));
    }
    let mut args = Vec::with_capacity(signature.params.len());
    for (index, ty) in (1..).zip(&*signature.params) {
        args.push(realm.env.to_wasm(js.element(given, index)?, *ty)?);
    }
    Ok(ThreadCall { func, args })
}

fn thread<'a>(js: Js, args: &[Val]) -> JsResult<&'a ThreadSide> {
    // SAFETY: `lib/` passes what `threadSpawn` returned, and holds it.
    unsafe { js.external_ref::<ThreadSide>(arg(args, 0)) }
}

/// `(thread) => void`
fn terminate(js: Js, args: &[Val]) -> JsResult<Val> {
    thread(js, args)?.thread.terminate();
    Ok(js.undefined())
}

/// `(thread) => void`: somebody waits for it.
fn hold(js: Js, args: &[Val]) -> JsResult<Val> {
    let side = thread(js, args)?;
    if !side.is_over.get() && !side.is_held.replace(true) {
        side.env.begin();
    }
    Ok(js.undefined())
}

/// `(function) => generation | undefined`: of a function of a realm.
fn realm_number(js: Js, args: &[Val]) -> JsResult<Val> {
    match realm_of(js, arg(args, 0)) {
        Some(realm) => js.number(realm.side.replica.generation().get() as f64),
        None => Ok(js.undefined()),
    }
}

/// `(realm) => [state, threads]`
fn counts(js: Js, args: &[Val]) -> JsResult<Val> {
    let counts = realm(js, args)?.side.replica.guest_threads();
    let array = js.array(2)?;
    js.set_element(array, 0, js.string(counts.state.as_str())?)?;
    js.set_element(array, 1, js.number(counts.threads as f64)?)?;
    Ok(array)
}

/// A function of `lib/` that may throw.
fn run(realm: &Handle, function: Val) -> Result<()> {
    let js = realm.env.js();
    match js.scoped(|| js.call(function, &[]).map(drop)) {
        Ok(()) => Ok(()),
        Err(Pending) => Err(realm.env.take_thrown()),
    }
}

/// `(realm, ask, start) => void`: `ask` has them end in good order.
fn recycle(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let (ask, start) = (arg(args, 1), arg(args, 2));
    let replica = &realm.side.replica;
    let recycled = replica.recycle_threads(|| run(realm, ask), || run(realm, start));
    recycled.map_err(|error| realm.throw(&error))?;
    Ok(js.undefined())
}
