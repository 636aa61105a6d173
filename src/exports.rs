//! Guest functions as JavaScript functions: the hottest path there is.
//!
//! Each function carries a record with everything its call needs. A call of `manager.exports.f` on an
//! idle instance takes: the arguments, one look at the gate's word, the guest, the result.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use napi::sys;
use smallvec::{SmallVec, smallvec};
use wasm_molt_engine::{
    Away, Error, ErrorCode, FuncHandle, Inside, Job, Module, RawValue, Replica, Signature, Value,
    ValueType, has_stack, out_of_stack,
};

use crate::convert::cannot_cross;
use crate::entry::{Entry, busy, enter_realm, lease_on, refused};
use crate::env::EnvState;
use crate::error::Place;
use crate::imports::JsEnd;
use crate::js::{Js, JsResult, Val, callback_info, enter};
use crate::lease::LeaseSide;
use crate::namespace;
use crate::side::{Frame, Handle, LiveExports, ManagerSide, ReplicaSide};

/// Whose function it is.
#[derive(Clone)]
pub(crate) enum Target {
    /// Always the current generation's; keeps the manager in use.
    Live(#[expect(dead_code, reason = "held for its drop")] Rc<Handle>),
    /// A leased instance's, until the lease ends.
    Lease(Rc<LeaseSide>),
    /// One instance's, until it is replaced.
    Instance(Rc<ReplicaSide>),
    /// A realm's, until it is replaced.
    Realm(Rc<ReplicaSide>),
}

/// Which function.
#[derive(Clone, Copy)]
pub(crate) enum Which {
    /// The export at that position.
    Export(usize),
    /// One that came out as a funcref.
    Handle(FuncHandle),
}

/// What a function object carries.
pub(crate) struct Record {
    env: Rc<EnvState>,
    manager: Rc<ManagerSide>,
    target: Target,
    which: Which,
    signature: Signature,
    is_numeric: bool,
    /// The signature of one that is called through the scratch.
    crossing: Option<Crossing>,
    /// The live function, and the stamp at which it was looked up.
    cached: Cell<(u64, Option<FuncHandle>)>,
}

/// Marks our function objects, so that a foreign one is never taken for ours.
const TAG: sys::napi_type_tag = sys::napi_type_tag {
    lower: 0x6d6f_6c74_6675_6e63,
    upper: 0x9d3c_51f0_77aa_e204,
};

/// Values that fit on the stack without thought.
const FEW: usize = 4;

/// Parameters of a function that is called through the scratch: as many as `index.js` has wrappers for.
const SCRATCH_PARAMS: usize = 6;

/// Where arguments and result of the usual signatures cross: an `ArrayBuffer` that JavaScript writes and
/// reads as its own. Two stores cost less than two Node-API calls.
#[repr(C)]
pub(crate) struct Scratch {
    /// Address of the [`Record`] (to JavaScript a tiny f64), from just before the call on; else 0.
    record: Cell<u64>,
    /// The arguments on the way in, as f64; an i32 or f64 in the first place on the way out.
    args: [Cell<u64>; SCRATCH_PARAMS],
    /// Another number whenever a `LinearMemory` may mean another buffer than before: instances were
    /// replaced, a host call began or ended. Detaching is not counted: a detached buffer shows itself.
    epoch: Cell<f64>,
    /// 1 once the call that has just come back has an answer. Where an environment is ending, Node takes no error
    /// from us, and JavaScript would run on with whatever lies in the first place.
    is_answered: Cell<f64>,
}

impl Scratch {
    /// `LinearMemory` has to ask again.
    #[inline]
    pub(crate) fn next_epoch(&self) {
        self.epoch.set(self.epoch.get() + 1.0);
    }
}

/// A call through the scratch, which has no answer until it is [done](Self::done): a panic ends it as well.
struct Answering<'a>(&'a Scratch);

impl Answering<'_> {
    #[inline]
    fn done(self) {
        self.0.is_answered.set(1.0);
        std::mem::forget(self);
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.is_answered.set(0.0);
    }
}

/// A signature as the scratch has it: at hand, where that of the module is two steps away.
#[derive(Clone, Copy)]
struct Crossing {
    count: usize,
    params: [ValueType; SCRATCH_PARAMS],
    result: Option<ValueType>,
}

impl Crossing {
    /// `None` if the signature does not cross in the scratch.
    fn of(signature: &Signature) -> Option<Self> {
        let fits = |ty: &ValueType| matches!(ty, ValueType::I32 | ValueType::F32 | ValueType::F64);
        let mut params = [ValueType::I32; SCRATCH_PARAMS];
        let count = signature.params.len();
        params.get_mut(..count)?.copy_from_slice(&signature.params);
        let result = match &*signature.results {
            [] => None,
            [one] if fits(one) => Some(*one),
            _ => return None,
        };
        params.iter().all(fits).then_some(Self {
            count,
            params,
            result,
        })
    }

    /// How `index.js` is to read the result.
    fn result_kind(&self) -> u32 {
        match self.result {
            None => 0,
            Some(ValueType::I32) => 1,
            Some(_) => 2,
        }
    }
}

fn new_function(record: Record, name: &str) -> JsResult<Val> {
    let js = record.env.js();
    let env = Rc::clone(&record.env);
    let crossing = record.crossing;
    let record = Box::into_raw(Box::new(record));
    let made = match crossing {
        Some(crossing) => {
            let address = f64::from_bits(record.expose_provenance() as u64);
            env.scratch_function(name, crossing.count, crossing.result_kind(), address)
        }
        None => js.function(name, Some(call_export), record.cast::<c_void>()),
    };
    let function = made.inspect_err(|_| {
        // SAFETY: no function was made, so the box is still ours.
        drop(unsafe { Box::from_raw(record) });
    })?;
    // From here on the function object owns the record.
    js.tag(function, record, &TAG)?;
    Ok(function)
}

/// The live object: all functions of the build that serves, and after a swap those of the next one.
pub(crate) fn live_exports(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    handle: &Rc<Handle>,
) -> JsResult<Val> {
    let js = env.js();
    let object = js.object()?;
    let Some(module) = manager.manager.module() else {
        return Ok(object);
    };
    let target = Target::Live(Rc::clone(handle));
    fill(env, manager, (object, &module, None), &target)?;
    if !env.managers.borrow().contains_key(&manager.id) {
        // It is closed: nothing will change any more, and nobody would give the reference back.
        return Ok(object);
    }
    let exports = LiveExports {
        object: js.weak_reference(object)?,
        handle: Rc::downgrade(handle),
        module,
    };
    let before = manager.exports.borrow_mut().replace(exports);
    if let Some(before) = before {
        js.unreference(before.object);
    }
    Ok(object)
}

/// Brings the live object up to date with the build that serves now.
pub(crate) fn refresh_live_exports(env: &Rc<EnvState>, manager: &Rc<ManagerSide>) -> JsResult<()> {
    let js = env.js();
    let mut exports = manager.exports.borrow_mut();
    let (Some(exports), Some(module)) = (&mut *exports, manager.manager.module()) else {
        return Ok(());
    };
    let before = std::mem::replace(&mut exports.module, Arc::clone(&module));
    let object = js.dereference(exports.object);
    if let (Some(object), Some(handle)) = (object, exports.handle.upgrade())
        && !Arc::ptr_eq(&before, &module)
    {
        let target = Target::Live(handle);
        fill(env, manager, (object, &module, Some(&before)), &target)?;
    }
    Ok(())
}

/// All functions that an instance offers.
pub(crate) fn exports_of(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    module: &Module,
    target: &Target,
) -> JsResult<Val> {
    let object = env.js().object()?;
    fill(env, manager, (object, module, None), target)?;
    Ok(object)
}

/// Makes `object`, which shows the functions of `before`, show those of `module`: functions that both
/// have stay the same objects.
fn fill(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    (object, module, before): (Val, &Module, Option<&Module>),
    target: &Target,
) -> JsResult<()> {
    let js = env.js();
    let had = |index: usize| {
        let function = before.and_then(|module| module.functions().get(index));
        function.is_some_and(|function| function.is_offered)
    };
    let all = || module.functions().iter().enumerate();
    for (_, gone) in all().filter(|(index, now)| had(*index) && !now.is_offered) {
        js.delete(object, &gone.name)?;
    }
    for (index, export) in all().filter(|(index, now)| !had(*index) && now.is_offered) {
        let record = Record {
            env: Rc::clone(env),
            manager: Rc::clone(manager),
            target: target.clone(),
            which: Which::Export(index),
            is_numeric: export.signature.is_numeric(),
            crossing: Crossing::of(&export.signature),
            signature: export.signature.clone(),
            cached: Cell::new((u64::MAX, None)),
        };
        let function = new_function(record, &export.name)?;
        js.define_constant(object, &export.name, function)?;
    }
    Ok(())
}

/// The function object of a funcref; the same object for the same guest function.
pub(crate) fn function_value(
    env: &EnvState,
    side: &Rc<ReplicaSide>,
    handle: FuncHandle,
) -> JsResult<Val> {
    let js = env.js();
    let is_realm = side.realm.is_some();
    let handle = if is_realm {
        side.replica.realm_original(handle)
    } else {
        handle
    };
    let known = side.functions.borrow().get(&handle.address()).copied();
    if let Some(reference) = known {
        if let Some(function) = js.dereference(reference) {
            return Ok(function);
        }
        js.unreference(reference);
    }
    let (Some(manager), Ok(env)) = (side.manager.upgrade(), EnvState::of(js)) else {
        return js.null();
    };
    let Some(signature) = side.replica.signature(&handle) else {
        return js.null();
    };
    let record = Record {
        env,
        manager,
        target: if is_realm {
            Target::Realm(Rc::clone(side))
        } else {
            Target::Instance(Rc::clone(side))
        },
        which: Which::Handle(handle),
        is_numeric: signature.is_numeric(),
        crossing: Crossing::of(&signature),
        signature,
        cached: Cell::new((0, Some(handle))),
    };
    // The JS API's name of an exported function is its index.
    let index = side.replica.realm_function_index(&handle);
    let name = index
        .map_or(handle.address(), |index| index as usize)
        .to_string();
    let params = record.signature.params.len();
    let has_length = record.crossing.is_some() || !is_realm;
    let function = new_function(record, &name)?;
    if !has_length {
        js.define_hidden(function, c"length", js.number(params as f64)?)?;
    }
    side.functions
        .borrow_mut()
        .insert(handle.address(), js.weak_reference(function)?);
    Ok(function)
}

/// The guest function behind a function object of ours.
pub(crate) fn function_of(js: Js, function: Val) -> Option<Value> {
    // SAFETY: the tag is only ever put on functions with a `Record`.
    let record = unsafe { js.tagged::<Record>(function, &TAG) }?;
    match (&record.target, record.which) {
        (Target::Live(_), Which::Export(index)) => {
            let module = record.manager.manager.module()?.id();
            Some(Value::Export { module, index })
        }
        (Target::Live(_), Which::Handle(handle)) => Some(Value::Func(Some(handle))),
        (Target::Lease(lease), which) => Some(Value::Func(resolve(&lease.side.replica, which))),
        (Target::Instance(side) | Target::Realm(side), which) => {
            Some(Value::Func(resolve(&side.replica, which)))
        }
    }
}

/// The realm that a function object of ours belongs to.
pub(crate) fn realm_of(js: Js, function: Val) -> Option<namespace::Handle> {
    // SAFETY: the tag is only ever put on functions with a `Record`.
    let record = unsafe { js.tagged::<Record>(function, &TAG) }?;
    let Target::Realm(side) = &record.target else {
        return None;
    };
    Some(namespace::Handle {
        env: Rc::clone(&record.env),
        manager: Rc::clone(&record.manager),
        side: Rc::clone(side),
    })
}

/// The types of a function object of ours.
pub(crate) fn signature_of(js: Js, function: Val) -> Option<Signature> {
    // SAFETY: the tag is only ever put on functions with a `Record`.
    let record = unsafe { js.tagged::<Record>(function, &TAG) }?;
    Some(record.signature.clone())
}

fn resolve(replica: &Replica, which: Which) -> Option<FuncHandle> {
    match which {
        Which::Export(index) => {
            let export = replica.module().functions().get(index);
            if let Some(export) = export.filter(|export| export.is_offered) {
                export.mark_used();
            }
            replica.function(index)
        }
        Which::Handle(handle) => Some(handle),
    }
}

/// How the call gets to its guest.
enum Path<'a> {
    Here(Entry<'a>, Rc<ReplicaSide>),
    /// Ask the pool thread that is inside.
    There(Rc<JsEnd>, Rc<ReplicaSide>),
}

unsafe extern "C" fn call_export(env: sys::napi_env, info: sys::napi_callback_info) -> Val {
    // SAFETY: the environment of this very callback.
    let js = unsafe { Js::new(env) };
    enter(js, || {
        // Node fills what was not given, so a large array costs even where it is not used.
        let mut args = [ptr::null_mut(); FEW];
        let (_, data) = callback_info(js, info, &mut args)?;
        // SAFETY: `new_function` stored a record there, and the function that is being called owns it.
        let record = unsafe { &*data.cast::<Record>() };
        let params = record.signature.params.len();
        if let Some(args) = args.get(..params) {
            return record.call(args);
        }
        let mut more = vec![ptr::null_mut(); params];
        callback_info(js, info, &mut more)?;
        record.call(&more)
    })
}

/// What all functions with a scratch call; their one argument is the function itself, which thereby
/// stays alive.
pub(crate) unsafe extern "C" fn call_through_scratch(
    env: sys::napi_env,
    info: sys::napi_callback_info,
) -> Val {
    // SAFETY: the environment of this very callback.
    let js = unsafe { Js::new(env) };
    enter(js, || {
        let (_, data) = callback_info(js, info, &mut [])?;
        // SAFETY: `EnvState::set_up` gave the scratch, which the calling function holds; only this thread
        // touches it.
        let scratch = unsafe { &*data.cast::<Scratch>() };
        let address = scratch.record.replace(0) as usize;
        let record = ptr::with_exposed_provenance::<Record>(address);
        let answering = Answering(scratch);
        // SAFETY: an export has just written the address of the record that it owns. Where somebody
        // got hold of this function by other ways (the call sites of a stack trace), it is null.
        let returned = match unsafe { record.as_ref() }.map(|record| (record, &record.crossing)) {
            Some((record, Some(crossing))) => record.call_scratch(crossing, scratch)?,
            _ => return Err(js.throw_type_error("only exported functions can call this")),
        };
        answering.done();
        Ok(returned)
    })
}

/// Calls an export of the current generation by name, for `callSync`.
pub(crate) fn call_sync(
    env: &Rc<EnvState>,
    handle: &Rc<Handle>,
    index: usize,
    args: Val,
) -> JsResult<Val> {
    let js = env.js();
    let manager = &handle.0;
    let Some(module) = manager.manager.module() else {
        return Ok(js.undefined());
    };
    let Some(export) = module.functions().get(index) else {
        return Ok(js.undefined());
    };
    let record = Record {
        env: Rc::clone(env),
        manager: Rc::clone(manager),
        target: Target::Live(Rc::clone(handle)),
        which: Which::Export(index),
        // The arguments are in an array already: values are as good as raw ones.
        is_numeric: false,
        crossing: None,
        signature: export.signature.clone(),
        cached: Cell::new((u64::MAX, None)),
    };
    if !record.signature.can_cross() {
        return Err(cannot_cross(js));
    }
    let values = env.arguments(args, &record.signature)?;
    record.call_values(values)
}

impl Record {
    fn call(&self, args: &[Val]) -> JsResult<Val> {
        if self.is_numeric {
            self.call_numeric(args)
        } else {
            self.call_general(args)
        }
    }

    #[inline(always)]
    fn call_scratch(&self, crossing: &Crossing, scratch: &Scratch) -> JsResult<Val> {
        let mut raw = [RawValue::i32(0); SCRATCH_PARAMS];
        let args = scratch.args.iter().map(|arg| f64::from_bits(arg.get()));
        let args = args.take(crossing.count);
        for ((slot, arg), ty) in raw.iter_mut().zip(args).zip(&crossing.params) {
            *slot = match ty {
                ValueType::F32 => RawValue::f32(arg as f32),
                ValueType::F64 => RawValue::f64(arg),
                _ => RawValue::i32(to_int32(arg)),
            };
        }
        self.run(&mut raw)?;
        if let Some(ty) = crossing.result {
            let [value, ..] = raw;
            let [place, ..] = &scratch.args;
            place.set(match ty {
                ValueType::F32 => f64::from(value.to_f32()).to_bits(),
                ValueType::F64 => value.to_f64().to_bits(),
                // Both halves alike, so that byte order does not matter.
                _ => u64::from(value.to_i32() as u32) * 0x1_0000_0001,
            });
        }
        Ok(ptr::null_mut())
    }

    fn call_numeric(&self, args: &[Val]) -> JsResult<Val> {
        let len = args.len().max(self.signature.results.len());
        let mut raw: SmallVec<[RawValue; FEW]> = smallvec![RawValue::i32(0); len];
        // Coercion may run JavaScript, so it comes before anything is entered.
        for ((slot, arg), ty) in raw.iter_mut().zip(args).zip(&*self.signature.params) {
            *slot = self.env.to_raw(*arg, *ty)?;
        }
        self.run(&mut raw)?;
        self.raw_results(&raw)
    }

    /// Runs the function; `raw` holds the arguments, and then the results.
    #[inline(always)]
    fn run(&self, raw: &mut [RawValue]) -> JsResult<()> {
        let manager = &*self.manager;
        if manager.detours.get() == 0 && has_stack(manager.stack_floor) {
            match &self.target {
                Target::Live(_) => {
                    if let Some(inside) = manager.home.enter() {
                        return self.call_at_home(inside, raw);
                    }
                }
                Target::Realm(side) if manager.is_current(side) && !side.replica.is_poisoned() => {
                    if let Some(inside) = manager.home.enter() {
                        return self.call_in_realm(inside, side, raw);
                    }
                }
                _ => {}
            }
        }
        match self.calling() {
            Some(side) => self.run_again(&side, raw),
            None => self.run_slow(raw),
        }
    }

    /// The instance, if JavaScript answers a host call of it on this very thread and there is stack
    /// for one more level.
    #[inline(never)]
    fn calling(&self) -> Option<Rc<ReplicaSide>> {
        let side = match &self.target {
            Target::Live(_) => self.manager.stack.borrow().last().map(Rc::clone)?,
            Target::Lease(lease) if !lease.lease.is_released() => Rc::clone(&lease.side),
            Target::Instance(side) | Target::Realm(side) if !side.is_expired.get() => {
                Rc::clone(side)
            }
            Target::Lease(_) | Target::Instance(_) | Target::Realm(_) => return None,
        };
        let is_direct = matches!(side.frames.borrow().last(), Some(Frame::Direct));
        (is_direct && has_stack(self.manager.stack_floor)).then_some(side)
    }

    /// One more level of a call that is on the stack: as little of it as can be.
    #[inline(never)]
    fn run_again(&self, side: &Rc<ReplicaSide>, raw: &mut [RawValue]) -> JsResult<()> {
        let Some(func) = self.function(&side.replica) else {
            return Err(self.throw(&self.missing(&side.replica)));
        };
        // SAFETY: this thread is inside a host call of that instance, whose function it is; `raw` was
        // filled after its signature.
        match unsafe { side.replica.call_raw(&func, raw) } {
            Ok(()) => {
                side.before_js(self.env.js());
                Ok(())
            }
            Err(error) => self.settle(Entry::Again, side, Some(error)),
        }
    }

    #[inline(always)]
    fn call_at_home(&self, inside: Inside<'_, Job>, raw: &mut [RawValue]) -> JsResult<()> {
        let manager = &*self.manager;
        let Some(side) = manager.current_quickly() else {
            drop(inside);
            return Err(self.throw(&self.gone()));
        };
        let Some(func) = self.function(&side.replica) else {
            drop(inside);
            return Err(self.throw(&self.missing(&side.replica)));
        };
        // SAFETY: `inside` is the right to be in slot 0, whose instance `side` shows; the function is
        // that instance's, and `raw` was filled after its signature.
        let outcome = unsafe { side.replica.call_raw(&func, raw) };
        if outcome.is_err() || side.replica.is_poisoned() {
            return self.settle(Entry::Home(inside), &side, outcome.err());
        }
        drop(inside);
        manager.completed.set(manager.completed.get() + 1);
        side.before_js(self.env.js());
        if side.replica.note_call() {
            self.judge(&side);
        }
        Ok(())
    }

    /// The same for a function of the realm at home, which `side` shows.
    #[inline(always)]
    fn call_in_realm(
        &self,
        inside: Inside<'_, Job>,
        side: &Rc<ReplicaSide>,
        raw: &mut [RawValue],
    ) -> JsResult<()> {
        let Which::Handle(func) = self.which else {
            drop(inside);
            return Err(self.throw(&Error::internal("a realm's function without a handle")));
        };
        // SAFETY: `inside` is the right to be in slot 0, whose realm `side` shows; the function is that
        // realm's, and `raw` was filled after its signature.
        let outcome = unsafe { side.replica.call_raw(&func, raw) };
        if outcome.is_err() || side.replica.is_poisoned() {
            return self.settle(Entry::Home(inside), side, outcome.err());
        }
        drop(inside);
        let manager = &*self.manager;
        manager.completed.set(manager.completed.get() + 1);
        side.before_js(self.env.js());
        if side.replica.note_call() {
            self.judge(side);
        }
        Ok(())
    }

    /// The call has ended, and what it left of the instance is a matter for the policy.
    #[cold]
    #[inline(never)]
    fn judge(&self, side: &Rc<ReplicaSide>) {
        let manager = &*self.manager;
        // Somebody further out on the stack is inside, or a swap is at it.
        let is_outermost = manager.home.depth() == 0 && manager.stack.borrow().is_empty();
        if is_outermost && manager.is_current(side) {
            manager.flush_counts();
            manager.manager.judge_at_home(&manager.home, &side.replica);
        }
    }

    #[inline(always)]
    fn raw_results(&self, raw: &[RawValue]) -> JsResult<Val> {
        match (&*self.signature.results, raw) {
            ([], _) => Ok(self.env.js().undefined()),
            ([ty], [value, ..]) => self.env.raw_to_js(*value, *ty),
            (types, raw) => {
                let js = self.env.js();
                let array = js.array(types.len())?;
                for (index, (value, ty)) in raw.iter().zip(types).enumerate() {
                    js.set_element(array, index as u32, self.env.raw_to_js(*value, *ty)?)?;
                }
                Ok(array)
            }
        }
    }

    /// The function in that instance, looked up again whenever the instance has changed.
    #[inline(always)]
    fn function(&self, replica: &Replica) -> Option<FuncHandle> {
        let stamp = self.manager.stamp.get();
        if let (at, Some(func)) = self.cached.get()
            && at == stamp
            && func.replica_id() == replica.id()
        {
            return Some(func);
        }
        let func = resolve(replica, self.which).filter(|f| f.replica_id() == replica.id());
        self.cached.set((stamp, func));
        func
    }

    #[cold]
    fn gone(&self) -> Error {
        match self.manager.current() {
            Ok(_) => Error::internal("an instance that has gone while it was looked up"),
            Err(error) => error,
        }
    }

    /// Why the instance has no such function.
    #[cold]
    fn missing(&self, replica: &Replica) -> Error {
        match self.which {
            Which::Export(index) if replica.is_started() => replica.missing(index),
            _ => Error::new(
                ErrorCode::Busy,
                "the instance is still being made; its exports can be used once its start function has returned",
            ),
        }
    }

    #[cold]
    fn throw(&self, error: &Error) -> crate::js::Pending {
        let realm = match &self.target {
            Target::Realm(side) => Some(&**side),
            _ => None,
        };
        let place = Place {
            realm,
            ..self.manager.place()
        };
        self.env.throw(error, &place)
    }

    // ------------------------------------------------------------------ everything but the fast path

    #[cold]
    #[inline(never)]
    fn run_slow(&self, raw: &mut [RawValue]) -> JsResult<()> {
        let path = self.path().map_err(|e| self.throw(&e))?;
        let (entry, side) = match path {
            Path::Here(entry, side) => (entry, side),
            Path::There(pool, side) => return self.run_there(&pool, &side, raw),
        };
        let Some(func) = self.function(&side.replica) else {
            self.leave(entry, &side);
            return Err(self.throw(&self.missing(&side.replica)));
        };
        // SAFETY: `entry` is the right to be inside; the function is that instance's, and `raw` was
        // filled after its signature.
        let call = || unsafe { side.replica.call_raw(&func, raw) };
        let outcome = self.timed(&entry, &side, call);
        let is_outermost = !matches!(entry, Entry::Again);
        self.settle(entry, &side, outcome.err())?;
        if is_outermost && side.replica.note_call() {
            self.judge(&side);
        }
        Ok(())
    }

    #[inline(never)]
    fn run_there(
        &self,
        pool: &Rc<JsEnd>,
        side: &Rc<ReplicaSide>,
        raw: &mut [RawValue],
    ) -> JsResult<()> {
        let types = self.signature.params.iter();
        let args = raw
            .iter()
            .zip(types)
            .map(|(v, ty)| v.to_value(*ty))
            .collect();
        let results = self.call_there(pool, side, args)?;
        for (slot, value) in raw.iter_mut().zip(&results) {
            *slot = RawValue::from_number(value);
        }
        Ok(())
    }

    /// `limits.timeoutMs` holds for outermost synchronous calls too.
    #[inline]
    fn timed<T>(
        &self,
        entry: &Entry<'_>,
        side: &ReplicaSide,
        call: impl FnOnce() -> Result<T, Box<Error>>,
    ) -> Result<T, Box<Error>> {
        match (self.manager.timeout_ms, entry) {
            (Some(ms), Entry::Home(_) | Entry::Leased(_) | Entry::Shared) => {
                side.replica.with_deadline(ms, call).map_err(Box::new)?
            }
            _ => call(),
        }
    }

    fn count(&self, entry: &Entry<'_>) {
        if !matches!(entry, Entry::Again) {
            self.manager.completed.set(self.manager.completed.get() + 1);
        }
    }

    /// With references, or from an array.
    fn call_general(&self, args: &[Val]) -> JsResult<Val> {
        if !self.signature.can_cross() {
            return Err(cannot_cross(self.env.js()));
        }
        let mut values = Vec::with_capacity(args.len());
        for (arg, ty) in args.iter().zip(&*self.signature.params) {
            values.push(self.env.to_wasm(*arg, *ty)?);
        }
        self.call_values(values)
    }

    fn call_values(&self, args: Vec<Value>) -> JsResult<Val> {
        let path = self.path().map_err(|e| self.throw(&e))?;
        let (entry, side) = match path {
            Path::Here(entry, side) => (entry, side),
            Path::There(pool, side) => {
                let results = self.call_there(&pool, &side, args)?;
                return self.env.results(&results, Some(&side));
            }
        };
        let Some(func) = self.function(&side.replica) else {
            self.leave(entry, &side);
            return Err(self.throw(&self.missing(&side.replica)));
        };
        let call = || match self.which {
            // SAFETY: `entry` is the right to be inside.
            Which::Export(index) => unsafe { side.replica.call_export(index, args) },
            // SAFETY: as above; the function is that instance's.
            Which::Handle(_) => unsafe { side.replica.call(&func, args) },
        };
        let call = || call().map_err(Box::new);
        let (values, error) = match self.timed(&entry, &side, call) {
            Ok(values) => (values, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let is_outermost = !matches!(entry, Entry::Again);
        self.settle(entry, &side, error)?;
        let results = self.env.results(&values, Some(&side));
        if is_outermost && side.replica.note_call() {
            self.judge(&side);
        }
        results
    }

    /// The guest is on a pool thread that waits for JavaScript: it runs the call, this thread waits.
    fn call_there(
        &self,
        pool: &Rc<JsEnd>,
        side: &Rc<ReplicaSide>,
        args: Vec<Value>,
    ) -> JsResult<Vec<Value>> {
        let Some(func) = resolve(&side.replica, self.which) else {
            return Err(self.throw(&self.missing(&side.replica)));
        };
        let outcome = pool.call(&self.env, side, func, &self.signature, args);
        side.before_js(self.env.js());
        outcome.map_err(|error| self.throw(&error))
    }

    /// Leaves an instance that failed, or that is poisoned although the call went on (JavaScript
    /// inside has caught the trap).
    #[cold]
    fn settle(
        &self,
        entry: Entry<'_>,
        side: &Rc<ReplicaSide>,
        error: Option<Box<Error>>,
    ) -> JsResult<()> {
        let is_outermost = !matches!(entry, Entry::Again);
        match &error {
            Some(error) if is_outermost => {
                // Those before it have completed.
                self.manager.flush_counts();
                self.manager.manager.call_failed_at_home(error);
            }
            None => self.count(&entry),
            Some(_) => {}
        }
        self.leave(entry, side);
        side.before_js(self.env.js());
        let Some(error) = error else { return Ok(()) };
        // Before it is thrown, because hooks may run.
        if is_outermost && !side.replica.is_poisoned() && side.replica.note_call() {
            self.judge(side);
        }
        Err(self.throw(&error))
    }

    fn leave(&self, entry: Entry<'_>, side: &ReplicaSide) {
        match entry {
            Entry::Home(inside) if side.replica.must_be_replaced() => {
                inside.retire();
                self.manager.manager.retired_at_home();
            }
            other => drop(other),
        }
    }

    // ------------------------------------------------------------------ finding the way

    #[inline(never)]
    fn path(&self) -> Result<Path<'_>, Box<Error>> {
        if !has_stack(self.manager.stack_floor) {
            let manager = &self.manager.manager;
            let stack_bytes = manager.options().limits.stack_bytes();
            return Err(out_of_stack(manager.name(), stack_bytes).into());
        }
        match &self.target {
            Target::Live(_) => {
                // Inside a host call "the instance" is the one that called.
                let calling = self.manager.stack.borrow().last().map(Rc::clone);
                match calling.and_then(|side| through_host_call(&side)) {
                    Some(path) => Ok(path),
                    None => self.path_home(),
                }
            }
            Target::Lease(lease) => {
                if lease.lease.is_released() {
                    return Err(lease.lease.stale().into());
                }
                if let Some(path) = through_host_call(&lease.side) {
                    return Ok(path);
                }
                if lease.side.replica.is_poisoned() {
                    return Err(lease.lease.poisoned().into());
                }
                let inside = lease.lease.enter()?;
                Ok(Path::Here(Entry::Leased(inside), Rc::clone(&lease.side)))
            }
            Target::Realm(side) => {
                let entry = enter_realm(&self.manager, side)?;
                // A thread of the guest has asked: its own instance is meant.
                if let Some(Frame::Remote(thread)) = side.frames.borrow().last() {
                    return Ok(Path::There(Rc::clone(thread), Rc::clone(side)));
                }
                Ok(Path::Here(entry, Rc::clone(side)))
            }
            Target::Instance(side) => {
                if side.is_expired.get() {
                    return Err(side.replica.stale().into());
                }
                if let Some(path) = through_host_call(side) {
                    return Ok(path);
                }
                if side.replica.is_poisoned() {
                    return Err(side.replica.stale().into());
                }
                if let Some(lease) = lease_on(&self.manager, side) {
                    let inside = lease.lease.enter()?;
                    return Ok(Path::Here(Entry::Leased(inside), Rc::clone(side)));
                }
                match &*self.manager.current.borrow() {
                    Some(current) if Rc::ptr_eq(current, side) => {}
                    _ => {
                        return Err(
                            busy(&self.manager, "the instance is not in a host call").into()
                        );
                    }
                }
                match self.path_home()? {
                    Path::Here(_, now) if !Rc::ptr_eq(&now, side) => {
                        Err(side.replica.stale().into())
                    }
                    path => Ok(path),
                }
            }
        }
    }

    fn path_home(&self) -> Result<Path<'_>, Box<Error>> {
        let manager = &*self.manager;
        if manager.swapping.get() > 0 && !matches!(manager.home.refusal(), Away::Shut) {
            let name = manager.manager.name();
            return Err(Error::new(
                ErrorCode::Reloading,
                format!("a swap of {name} is under way; use call(), which waits its turn"),
            )
            .into());
        }
        if let Some(inside) = manager.home.enter() {
            return Ok(Path::Here(Entry::Home(inside), manager.current()?));
        }
        if matches!(manager.home.refusal(), Away::Retired) {
            manager.manager.repair_now()?;
        }
        // Once more: the instance may have come home meanwhile.
        match manager.home.enter() {
            Some(inside) => Ok(Path::Here(Entry::Home(inside), manager.current()?)),
            None => Err(refused(&self.manager).into()),
        }
    }
}

/// `ToInt32` of a number.
#[inline(always)]
fn to_int32(value: f64) -> i32 {
    // Saturates, and NaN becomes 0.
    let whole = value as i64;
    if whole.unsigned_abs() < 1 << 53 {
        return whole as i32;
    }
    to_int32_far(value)
}

#[cold]
fn to_int32_far(value: f64) -> i32 {
    if value.is_finite() {
        // Exact: the remainder of two floats always is.
        (value.trunc() % 4_294_967_296.0) as i64 as i32
    } else {
        0
    }
}

/// If JavaScript is answering a host call of that instance, the call goes through it.
fn through_host_call<'a>(side: &Rc<ReplicaSide>) -> Option<Path<'a>> {
    if let Some(frame) = side.frames.borrow().last() {
        return Some(match frame {
            Frame::Direct => Path::Here(Entry::Again, Rc::clone(side)),
            Frame::Remote(pool) => Path::There(Rc::clone(pool), Rc::clone(side)),
        });
    }
    let awaiting = side.awaiting.borrow().clone()?;
    Some(Path::There(awaiting, Rc::clone(side)))
}
