//! Imports: JavaScript functions that guests call.
//!
//! On the JS thread the function is called directly. From a pool thread the call travels to the JS
//! thread, and the pool thread waits in a [`conversation`]. If the JavaScript function calls back into the
//! guest, the JS thread sends a *nested call* to that waiting thread, which alone may run its store,
//! and serves the thread's own requests until the nested result is there. Requests and nested calls
//! alternate strictly, so each side always knows what it waits for. When the pool thread gives up
//! (timeout, signal, `destroy`), its end of the conversation is gone, and nobody is left waiting.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use std::time::Duration;

use crossbeam_channel::bounded;
use napi::sys;
use smallvec::SmallVec;
use wasm_molt_engine::{
    Answerer, Asker, Error, ErrorCode, ForAnswerer, ForAsker, FuncHandle, HostCall, HostFunction,
    Import, ImportKind, ImportValue, Listening, Module, RawValue, Replica, Result, Signature,
    Silence, Stop, Value, ValueType, Words, conversation, memory_discard,
};

use crate::env::EnvState;
use crate::inbox::Task;
use crate::js::{Js, JsResult, Kind, Pending, Val};
use crate::js_only::JsOnly;
use crate::side::{Frame, ManagerSide, ReplicaSide};

/// A JS thread that spins until another thread has done something, which needs the JS thread, does so for
/// ever.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);
/// Between two looks of the JS thread at what others want, while it waits for one of them.
const LOOK_AROUND: Duration = Duration::from_millis(1);

/// Arguments that most imports do not exceed; the frame is on the stack at each level of re-entrance.
const FEW: usize = 6;

struct Bound {
    env: Rc<EnvState>,
    manager: Rc<ManagerSide>,
    side: Rc<ReplicaSide>,
    function: sys::napi_ref,
}

impl Bound {
    /// JavaScript is about to answer a host call.
    #[inline]
    fn begin(&self, frame: Frame) {
        self.side.before_js(self.env.js());
        self.manager.push_frame(&self.side, frame);
        self.env.scratch().next_epoch();
    }

    #[inline]
    fn end(&self) {
        self.manager.pop_frame(&self.side);
        self.env.scratch().next_epoch();
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.env.js().unreference(self.function);
    }
}

/// One imported JavaScript function of one instance.
struct JsImport {
    bound: JsOnly<Bound>,
    name: String,
    /// Its instance is in a realm: promises are values like any other, as in the JS API.
    is_plain: bool,
}

/// What the engine holds of it.
struct Handle(Arc<JsImport>);

/// What is said between the pool thread and the JS thread.
enum HostCalls {}

impl Words for HostCalls {
    type Request = Arc<Request>;
    type Reply = Result<Reply, Box<Error>>;
    type Call = Box<Nested>;
    type Outcome = Result<Vec<Value>>;
}

/// In a box, as all that is on the stack while a nested call runs.
type Reply = Box<SmallVec<[Value; 2]>>;

/// What the waiting thread is to do inside its guest.
enum Nested {
    /// A call back into it.
    Call {
        func: FuncHandle,
        signature: Signature,
        args: Vec<Value>,
        /// `limits.timeoutMs`.
        timeout_ms: Option<u64>,
    },
    /// Something else in its store; who wants it hears of it by other ways.
    Act(Box<dyn FnOnce(&Replica) + Send>),
}

/// A host call on its way to the JS thread.
struct Request {
    import: Arc<JsImport>,
    signature: Signature,
    args: SmallVec<[Value; 6]>,
    /// The JS thread has begun with it.
    is_begun: AtomicBool,
}

/// The pool thread's end of a conversation.
struct PoolEnd<'a> {
    asker: Asker<HostCalls>,
    asked: Arc<Request>,
    /// Stops come to the outermost host call for all in there.
    _listening: Option<Listening<'a>>,
}

/// The JS thread's end.
pub(crate) struct JsEnd(Answerer<HostCalls>);

thread_local! {
    /// Conversations in which this pool thread is running a nested call: the JS thread waits there.
    static NESTED: RefCell<Vec<Asker<HostCalls>>> = const { RefCell::new(Vec::new()) };
}

impl HostFunction for Handle {
    fn call(&self, call: &mut HostCall<'_>) -> Result<()> {
        match self.0.bound.get() {
            Some(bound) => self.0.call_here(bound, call),
            None => {
                let args = std::mem::take(&mut call.args);
                let pool = self.0.ask(call.replica, call.signature, args)?;
                call.results = *pool.converse(call.replica)?;
                Ok(())
            }
        }
    }

    fn cannot_cross(&self) -> Error {
        let Some(bound) = self.0.bound.get() else {
            return gone();
        };
        let Pending = crate::convert::cannot_cross(bound.env.js());
        bound.env.take_thrown()
    }

    #[inline]
    fn call_numbers(
        &self,
        replica: &Replica,
        signature: &Signature,
        values: &mut [RawValue],
    ) -> Option<Result<(), Box<Error>>> {
        Some(match self.0.bound.get() {
            Some(bound) => {
                let js = bound.env.js();
                js.scoped(|| self.0.call_numbers_here(bound, signature, values))
            }
            None => self.0.call_numbers_there(replica, signature, values),
        })
    }
}

impl JsImport {
    // ------------------------------------------------------------------ on the JS thread

    fn call_here(&self, bound: &Bound, call: &mut HostCall<'_>) -> Result<()> {
        let js = bound.env.js();
        js.scoped(|| {
            bound.begin(Frame::Direct);
            let returned = Self::call_js(bound, &call.args);
            bound.end();
            let returned = returned.map_err(|Pending| *thrown(bound))?;
            if !self.is_plain && must_wait(&bound.env, returned, call.signature)? {
                bound.env.ignore(returned);
                return Err(self.async_import());
            }
            convert(bound, returned, call.signature, &mut call.results)
        })
    }

    /// What most imports are: numbers in, a number or nothing out.
    #[inline]
    fn call_numbers_here(
        &self,
        bound: &Bound,
        signature: &Signature,
        values: &mut [RawValue],
    ) -> Result<(), Box<Error>> {
        let js = bound.env.js();
        bound.begin(Frame::Direct);
        let returned = Self::call_js_with_numbers(bound, &signature.params, values);
        bound.end();
        let Ok(returned) = returned else {
            return Err(thrown(bound));
        };
        match (&*signature.results, &mut *values) {
            ([], _) if js.is_undefined(returned) => Ok(()),
            ([ty], [slot, ..]) if let Some(number) = plain_number(js, returned, *ty) => {
                *slot = number;
                Ok(())
            }
            _ => self.convert_numbers(bound, returned, signature, values),
        }
    }

    #[inline]
    fn call_js_with_numbers(
        bound: &Bound,
        params: &[ValueType],
        values: &[RawValue],
    ) -> JsResult<Val> {
        let function = bound.env.helper(bound.function)?;
        let mut few = [std::ptr::null_mut(); FEW];
        let Some(args) = few.get_mut(..params.len()) else {
            return Self::call_js_with_many(bound, params, values);
        };
        for (arg, (value, ty)) in args.iter_mut().zip(values.iter().zip(params)) {
            *arg = bound.env.raw_to_js(*value, *ty)?;
        }
        bound.env.js().call(function, args)
    }

    #[cold]
    #[inline(never)]
    fn call_js_with_many(
        bound: &Bound,
        params: &[ValueType],
        values: &[RawValue],
    ) -> JsResult<Val> {
        let values: Vec<_> = values
            .iter()
            .zip(params)
            .map(|(value, ty)| value.to_value(*ty))
            .collect();
        Self::call_js(bound, &values)
    }

    /// Something else than the very numbers that the signature asks for.
    #[cold]
    #[inline(never)]
    fn convert_numbers(
        &self,
        bound: &Bound,
        returned: Val,
        signature: &Signature,
        values: &mut [RawValue],
    ) -> Result<(), Box<Error>> {
        if !self.is_plain && must_wait(&bound.env, returned, signature)? {
            bound.env.ignore(returned);
            return Err(Box::new(self.async_import()));
        }
        let converted = converted(bound, returned, signature)?;
        for (slot, value) in values.iter_mut().zip(&converted) {
            *slot = RawValue::from_number(value);
        }
        Ok(())
    }

    fn call_js(bound: &Bound, args: &[Value]) -> JsResult<Val> {
        let js = bound.env.js();
        let function = bound.env.helper(bound.function)?;
        let mut values: SmallVec<[Val; 8]> = SmallVec::with_capacity(args.len());
        for arg in args {
            values.push(bound.env.to_js(arg, Some(&bound.side))?);
        }
        js.call(function, &values)
    }

    #[cold]
    fn async_import(&self) -> Error {
        Error::new(
            ErrorCode::AsyncImport,
            format!(
                "the import '{}' returned a promise, and nothing can wait for it in a synchronous call; \
                 use call(), or make the import synchronous",
                self.name
            ),
        )
    }

    // ------------------------------------------------------------------ on a pool thread

    #[inline(never)]
    fn call_numbers_there(
        self: &Arc<Self>,
        replica: &Replica,
        signature: &Signature,
        values: &mut [RawValue],
    ) -> Result<(), Box<Error>> {
        let pool = self.ask_with_numbers(replica, signature, values)?;
        let reply = pool.converse(replica)?;
        for (slot, value) in values.iter_mut().zip(&*reply) {
            *slot = RawValue::from_number(value);
        }
        Ok(())
    }

    // Each step of the conversation is apart: only what is on the stack while a nested call runs
    // counts at each level of re-entrance.

    #[inline(never)]
    fn ask_with_numbers<'a>(
        self: &Arc<Self>,
        replica: &'a Replica,
        signature: &Signature,
        values: &[RawValue],
    ) -> Result<PoolEnd<'a>, Box<Error>> {
        let args = values
            .iter()
            .zip(&*signature.params)
            .map(|(value, ty)| value.to_value(*ty))
            .collect();
        self.ask(replica, signature, args)
    }

    #[inline(never)]
    fn ask<'a>(
        self: &Arc<Self>,
        replica: &'a Replica,
        signature: &Signature,
        args: SmallVec<[Value; 6]>,
    ) -> Result<PoolEnd<'a>, Box<Error>> {
        // JavaScript knows the functions of the realm, and not those of its twins.
        let args = args.into_iter().map(|arg| replica.home_value(arg));
        let request = Arc::new(Request {
            import: Arc::clone(self),
            signature: signature.clone(),
            args: args.collect(),
            is_begun: AtomicBool::new(false),
        });
        let kept = Arc::clone(&request);
        let inner = NESTED.with_borrow(|nested| nested.last().cloned());
        if let Some(asker) = inner {
            // The JS thread waits in a nested call of ours: it serves this request right there. One that nobody
            // hears is answered with the reason, where the answer is waited for.
            let _ = asker.ask(request);
            return Ok(PoolEnd {
                asker,
                asked: kept,
                _listening: None,
            });
        }
        let (asker, answerer) = conversation();
        let stopper = asker.stopper();
        let listening = replica.interrupter().listen(move || stopper.stop());
        let end = JsEnd(answerer);
        let inbox = self.bound.inbox();
        let task: Task = Box::new(move |_| answer(&request, end));
        // Whom the JS thread may be waiting for must not wait for the JS thread.
        let posted = if replica.is_twin() {
            inbox.post_urgent(task)
        } else {
            inbox.post(task)
        };
        posted.map_err(|_| gone())?;
        Ok(PoolEnd {
            asker,
            asked: kept,
            _listening: Some(listening),
        })
    }
}

impl PoolEnd<'_> {
    /// Runs nested calls until the reply is there.
    fn converse(&self, replica: &Replica) -> Result<Reply, Box<Error>> {
        loop {
            match self.hear(replica)? {
                ForAsker::Reply(reply) if replica.is_twin() => {
                    let values = reply?.into_iter().map(|value| replica.own_value(value));
                    return Ok(Box::new(values.collect::<Result<_>>()?));
                }
                ForAsker::Reply(reply) => return reply,
                ForAsker::Call(nested) => self.run_nested(replica, nested)?,
            }
        }
    }

    #[inline(never)]
    fn hear(&self, replica: &Replica) -> Result<Heard, Box<Error>> {
        if replica.is_twin() {
            return self.hear_at_twin(replica);
        }
        self.asker
            .hear(None)
            .map_err(|silence| silent(replica, silence))
    }

    /// The JS thread may be waiting inside the guest, for this thread even.
    #[inline(never)]
    fn hear_at_twin(&self, replica: &Replica) -> Result<Heard, Box<Error>> {
        replica.ring_for_home();
        let heard = match self.asker.hear(Some(LONGEST_SILENCE)) {
            Err(Silence::Late) if self.asked.is_begun.load(Ordering::Acquire) => {
                self.asker.hear(None)
            }
            heard => heard,
        };
        heard.map_err(|silence| silent(replica, silence))
    }

    #[inline(never)]
    #[expect(
        clippy::boxed_local,
        reason = "out of the box it would be on the stack twice"
    )]
    fn run_nested(&self, replica: &Replica, nested: Box<Nested>) -> Result<(), Box<Error>> {
        NESTED.with_borrow_mut(|nested| nested.push(self.asker.clone()));
        let outcome = match *nested {
            Nested::Call {
                func,
                signature,
                args,
                timeout_ms,
            } => replica.own_function(func).and_then(|func| {
                let args = args.into_iter().map(|arg| replica.own_value(arg));
                let args = args.collect::<Result<Vec<_>>>()?;
                // A host call is on the stack, so what is up is the whole of it.
                let timeout_ms = timeout_ms.filter(|_| replica.is_twin());
                let deadline = timeout_ms.map(|ms| replica.end_after(ms)).transpose()?;
                // SAFETY: this thread holds the replica: it is inside a host call of it. The signature
                // came with the function.
                let outcome = unsafe { replica.call_typed(&func, &signature, args) };
                drop(deadline);
                outcome
            }),
            Nested::Act(act) => {
                act(replica);
                Ok(Vec::new())
            }
        };
        let outcome = outcome.map(|values| {
            let values = values.into_iter();
            values.map(|value| replica.home_value(value)).collect()
        });
        NESTED.with_borrow_mut(Vec::pop);
        self.tell(outcome)
    }

    #[inline(never)]
    fn tell(&self, outcome: Result<Vec<Value>>) -> Result<(), Box<Error>> {
        self.asker.tell(outcome).map_err(|_| Box::new(gone()))
    }
}

type Heard = ForAsker<Result<Reply, Box<Error>>, Box<Nested>>;

#[cold]
#[expect(
    clippy::unnecessary_box_returns,
    reason = "boxed errors keep frames small where guests re-enter"
)]
fn silent(replica: &Replica, silence: Silence) -> Box<Error> {
    Box::new(match silence {
        Silence::Gone => gone(),
        Silence::Stopped => replica.interrupted(),
        Silence::Late => unanswered(replica),
    })
}

fn gone() -> Error {
    Error::new(
        ErrorCode::Interrupted,
        "the JavaScript environment of the import is gone",
    )
}

/// Answers a request on the JS thread; a promise is answered later.
fn answer(request: &Arc<Request>, end: JsEnd) {
    let import = &*request.import;
    let Some(bound) = import.bound.get() else {
        return;
    };
    request.is_begun.store(true, Ordering::Release);
    let end = Rc::new(end);
    let returned = match run_request(bound, request, &end) {
        Ok(returned) => returned,
        Err(error) => return end.reply(Err(*error)),
    };
    if import.is_plain {
        return end.reply(converted(bound, returned, &request.signature));
    }
    match must_wait(&bound.env, returned, &request.signature) {
        Ok(true) => {}
        Ok(false) => return end.reply(converted(bound, returned, &request.signature)),
        Err(error) => return end.reply(Err(error)),
    }
    *bound.side.awaiting.borrow_mut() = Some(Rc::clone(&end));
    // It may never settle, and the call be stopped.
    let side = Rc::downgrade(&bound.side);
    let signature = request.signature.clone();
    let replier = Rc::clone(&end);
    let then = move |env: &EnvState, outcome: std::result::Result<Val, Val>| {
        if let Some(side) = side.upgrade() {
            let mut awaiting = side.awaiting.borrow_mut();
            if awaiting
                .as_ref()
                .is_some_and(|other| Rc::ptr_eq(other, &replier))
            {
                *awaiting = None;
            }
        }
        replier.reply(match outcome {
            Ok(value) => converted_in(env, value, &signature),
            Err(reason) => Err(env.thrown(reason)),
        });
    };
    if bound.env.follow(returned, Box::new(then)).is_err() {
        *bound.side.awaiting.borrow_mut() = None;
        end.reply(Err(bound.env.take_thrown()));
    }
}

fn run_request(bound: &Bound, request: &Request, end: &Rc<JsEnd>) -> Result<Val, Box<Error>> {
    bound.begin(Frame::Remote(Rc::clone(end)));
    let returned = JsImport::call_js(bound, &request.args);
    bound.end();
    returned.map_err(|Pending| thrown(bound))
}

impl JsEnd {
    fn reply(&self, reply: Result<SmallVec<[Value; 2]>>) {
        // Nobody listens if the call was stopped meanwhile.
        let reply = reply.map(Box::new).map_err(Box::new);
        let _ = self.0.reply(reply);
    }

    /// Has the waiting pool thread call back into the guest; serves its requests until that is done.
    pub(crate) fn call(
        self: &Rc<Self>,
        env: &EnvState,
        side: &ReplicaSide,
        func: FuncHandle,
        signature: &Signature,
        args: Vec<Value>,
    ) -> Result<Vec<Value>> {
        let nested = Nested::Call {
            func,
            signature: signature.clone(),
            args,
            timeout_ms: side.manager.upgrade().and_then(|it| it.timeout_ms),
        };
        self.have_done(env, side, nested)
    }

    /// Has the waiting thread do something else in its store.
    pub(crate) fn act<T: Send + 'static>(
        self: &Rc<Self>,
        env: &EnvState,
        side: &ReplicaSide,
        act: impl FnOnce(&Replica) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = bounded(1);
        let act = Box::new(move |replica: &Replica| {
            let _ = tell.send(act(replica));
        });
        self.have_done(env, side, Nested::Act(act))?;
        told.recv().unwrap_or_else(|_| Err(stopped(side)))
    }

    fn have_done(
        self: &Rc<Self>,
        env: &EnvState,
        side: &ReplicaSide,
        nested: Nested,
    ) -> Result<Vec<Value>> {
        let sent = self.0.call(Box::new(nested));
        sent.map_err(|_| stopped(side))?;
        loop {
            match self.hear(env, side)? {
                ForAnswerer::Outcome(outcome) => return outcome,
                ForAnswerer::Request(request) => env.js().scoped(|| self.serve(&request)),
            }
        }
    }

    #[inline(never)]
    fn hear(&self, env: &EnvState, side: &ReplicaSide) -> Result<Told> {
        let stop = || {
            let why = Stop::Interrupted("its worker is ending".into());
            side.replica.interrupter().stop_current(why);
        };
        if side.realm.is_some() {
            return self.hear_beside_others(env, side, stop);
        }
        let told = match &env.watch {
            Some(watch) => {
                let hear = |patience| match self.0.hear(Some(patience)) {
                    Err(Silence::Late) => None,
                    heard => Some(heard),
                };
                watch.wait_for(hear, stop)
            }
            None => self.0.hear(None),
        };
        told.map_err(|_| stopped(side))
    }

    /// Another thread of the guest may want something before this one can go on.
    #[inline(never)]
    fn hear_beside_others(
        &self,
        env: &EnvState,
        side: &ReplicaSide,
        stop: impl Fn(),
    ) -> Result<Told> {
        loop {
            match self.0.hear(Some(LOOK_AROUND)) {
                Err(Silence::Late) => {}
                heard => return heard.map_err(|_| stopped(side)),
            }
            env.attend();
            let is_ending = env.watch.is_some() && env.js().is_ending();
            if is_ending {
                stop();
            }
            if is_ending || side.replica.interrupter().is_stopped() {
                self.0.give_up();
                return Err(stopped(side));
            }
        }
    }

    /// An import of a nested call: this thread waits, so it must be synchronous.
    #[inline(never)]
    fn serve(self: &Rc<Self>, request: &Request) {
        let Some(bound) = request.import.bound.get() else {
            return self.reply(Err(gone()));
        };
        request.is_begun.store(true, Ordering::Release);
        let returned = run_request(bound, request, self);
        self.reply_with(bound, request, returned);
    }

    #[inline(never)]
    fn reply_with(&self, bound: &Bound, request: &Request, returned: Result<Val, Box<Error>>) {
        let returned = match returned {
            Ok(returned) => returned,
            Err(error) => return self.reply(Err(*error)),
        };
        if request.import.is_plain {
            return self.reply(converted(bound, returned, &request.signature));
        }
        let waits = match must_wait(&bound.env, returned, &request.signature) {
            Ok(waits) => waits,
            Err(error) => return self.reply(Err(error)),
        };
        if waits {
            bound.env.ignore(returned);
            return self.reply(Err(request.import.async_import()));
        }
        self.reply(converted(bound, returned, &request.signature));
    }
}

type Told = ForAnswerer<Arc<Request>, Result<Vec<Value>>>;

#[cold]
fn unanswered(replica: &Replica) -> Error {
    Error::new(
        ErrorCode::Busy,
        format!(
            "a thread of {} needs the JavaScript thread, which has neither come to its event loop nor \
             waited in the guest for {} seconds; have it wait instead of spin, or leave imports to it",
            replica.module().name(),
            LONGEST_SILENCE.as_secs()
        ),
    )
}

#[cold]
fn stopped(side: &ReplicaSide) -> Error {
    Error::new(
        ErrorCode::Interrupted,
        format!(
            "the call of {} that made this host call was stopped",
            side.replica.module().name()
        ),
    )
}

#[cold]
#[expect(
    clippy::unnecessary_box_returns,
    reason = "boxed errors keep frames small where guests re-enter"
)]
fn thrown(bound: &Bound) -> Box<Error> {
    let value = bound.env.js().take_exception();
    Box::new(match &bound.side.realm {
        Some(realm) => realm.thrown(&bound.env, &bound.side, value),
        None => bound.env.thrown(value),
    })
}

/// The value if it needs no coercion.
#[inline]
fn plain_number(js: Js, value: Val, ty: ValueType) -> Option<RawValue> {
    Some(match ty {
        ValueType::I64 => RawValue::i64(js.bigint_bits(value)?),
        ValueType::F32 => RawValue::f32(js.get_number(value)? as f32),
        ValueType::F64 => RawValue::f64(js.get_number(value)?),
        _ => RawValue::i32(js.get_int32(value)?),
    })
}

/// Whether the guest has to wait: for a promise, and for any other thenable where it cannot be meant as
/// the value itself. Plain numbers, the usual case, are not looked at twice.
fn must_wait(env: &EnvState, value: Val, signature: &Signature) -> Result<bool> {
    let js = env.js();
    let is_number = matches!(
        &*signature.results,
        [ValueType::I32 | ValueType::F32 | ValueType::F64]
    ) && js.get_number(value).is_some();
    if is_number || matches!(js.kind(value), Ok(Kind::Undefined)) {
        return Ok(false);
    }
    let is_reference = matches!(
        &*signature.results,
        [ValueType::ExternRef | ValueType::FuncRef]
    );
    if is_reference {
        return Ok(js.is_promise(value).unwrap_or(false));
    }
    js.is_thenable(value).map_err(|Pending| env.take_thrown())
}

fn converted(bound: &Bound, value: Val, signature: &Signature) -> Result<SmallVec<[Value; 2]>> {
    let mut results = SmallVec::new();
    results.extend(signature.results.iter().map(|ty| Value::default_of(*ty)));
    convert(bound, value, signature, &mut results)?;
    Ok(results)
}

/// The same where what the conversion throws is no matter of a realm.
fn converted_in(env: &EnvState, value: Val, signature: &Signature) -> Result<SmallVec<[Value; 2]>> {
    let mut results = SmallVec::new();
    results.extend(signature.results.iter().map(|ty| Value::default_of(*ty)));
    fill(env, value, signature, &mut results).map_err(|Pending| env.take_thrown())?;
    Ok(results)
}

fn convert(
    bound: &Bound,
    value: Val,
    signature: &Signature,
    results: &mut SmallVec<[Value; 2]>,
) -> Result<()> {
    fill(&bound.env, value, signature, results).map_err(|Pending| *thrown(bound))
}

fn fill(
    env: &EnvState,
    value: Val,
    signature: &Signature,
    results: &mut SmallVec<[Value; 2]>,
) -> JsResult<()> {
    match (&*signature.results, &mut **results) {
        ([], _) => {}
        ([ty], [slot]) => *slot = env.to_wasm(value, *ty)?,
        (types, slots) => {
            let values = env.import_results(value, types)?;
            for (slot, value) in slots.iter_mut().zip(values) {
                *slot = value;
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------------- what the user gave

/// The module's imports out of the user's imports object, for one instance. JS thread.
pub(crate) fn collect(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    side: &Rc<ReplicaSide>,
    module: &Module,
    object: Option<Val>,
) -> Result<Vec<ImportValue>> {
    let place = Given {
        env,
        manager,
        side,
        object,
    };
    module
        .imports()
        .iter()
        .map(|import| place.value(module, import))
        .collect()
}

struct Given<'a> {
    env: &'a Rc<EnvState>,
    manager: &'a Rc<ManagerSide>,
    side: &'a Rc<ReplicaSide>,
    object: Option<Val>,
}

impl Given<'_> {
    fn value(&self, module: &Module, import: &Import) -> Result<ImportValue> {
        let js = self.env.js();
        let found = self
            .find(import)
            .map_err(|Pending| self.env.take_thrown())?;
        let Some(value) = found else {
            if import.is_discard() {
                return Ok(ImportValue::Function(memory_discard()));
            }
            return Err(missing(module, import));
        };
        let kind = js.kind(value).map_err(|Pending| self.env.take_thrown())?;
        match &import.kind {
            ImportKind::Function(signature) => {
                if kind != Kind::Function {
                    return Err(wrong(module, import, "something that is no function"));
                }
                if !signature.can_cross() {
                    return Err(wrong(module, import, "a JavaScript function"));
                }
                self.function(value, import)
            }
            ImportKind::Global { ty, .. } => self.global(module, import, *ty, value, kind),
            ImportKind::Memory { .. } => {
                let (initial, maximum) = self.limits(module, import, value)?;
                Ok(ImportValue::Memory { initial, maximum })
            }
            ImportKind::Table { .. } => {
                let (initial, maximum) = self.limits(module, import, value)?;
                Ok(ImportValue::Table { initial, maximum })
            }
            ImportKind::Tag => Err(wrong(module, import, "something else")),
        }
    }

    fn find(&self, import: &Import) -> JsResult<Option<Val>> {
        let js = self.env.js();
        let Some(object) = self.object else {
            return Ok(None);
        };
        let namespace = js.property_named(object, &import.module)?;
        if !matches!(js.kind(namespace)?, Kind::Object | Kind::Function) {
            return Ok(None);
        }
        let value = js.property_named(namespace, &import.name)?;
        Ok((js.kind(value)? != Kind::Undefined).then_some(value))
    }

    fn function(&self, value: Val, import: &Import) -> Result<ImportValue> {
        let function = host_function(self.env, self.manager, self.side, value, import);
        let function = function.map_err(|Pending| self.env.take_thrown())?;
        Ok(ImportValue::Function(function))
    }

    /// The JS API takes numbers for number globals, bigints for i64, anything for externref.
    fn global(
        &self,
        module: &Module,
        import: &Import,
        ty: ValueType,
        value: Val,
        kind: Kind,
    ) -> Result<ImportValue> {
        let fits = match ty {
            ValueType::I32 | ValueType::F32 | ValueType::F64 => kind == Kind::Number,
            ValueType::I64 => kind == Kind::BigInt,
            ValueType::ExternRef => true,
            ValueType::FuncRef => kind == Kind::Null,
            ValueType::Opaque => false,
        };
        if !fits {
            return Err(wrong(module, import, "a value of another type"));
        }
        let value = self
            .env
            .to_wasm(value, ty)
            .map_err(|Pending| self.env.take_thrown())?;
        Ok(ImportValue::Global(value))
    }

    /// `{ initial, maximum? }`, as the descriptors of the JS API.
    fn limits(&self, module: &Module, import: &Import, value: Val) -> Result<(u64, Option<u64>)> {
        let js = self.env.js();
        let foreign = || {
            let given = "something else (memories and tables belong to the instance: give a plain \
                         { initial, maximum } of whole numbers, no object of Node's own engine)";
            wrong(module, import, given)
        };
        if !matches!(js.kind(value), Ok(Kind::Object)) {
            return Err(foreign());
        }
        let read = |name| -> Result<Option<u64>> {
            let given = js
                .property(value, name)
                .map_err(|Pending| self.env.take_thrown())?;
            match js.get_number(given) {
                None if matches!(js.kind(given), Ok(Kind::Undefined)) => Ok(None),
                Some(v) if v >= 0.0 && v.fract() == 0.0 => Ok(Some(v as u64)),
                _ => Err(foreign()),
            }
        };
        let initial = read(c"initial")?.ok_or_else(foreign)?;
        Ok((initial, read(c"maximum")?))
    }
}

/// A JavaScript function as an import of that instance.
pub(crate) fn host_function(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    side: &Rc<ReplicaSide>,
    function: Val,
    import: &Import,
) -> JsResult<Arc<dyn HostFunction>> {
    let bound = Bound {
        function: env.js().reference(function)?,
        env: Rc::clone(env),
        manager: Rc::clone(manager),
        side: Rc::clone(side),
    };
    let import = JsImport {
        bound: JsOnly::new(&env.inbox, bound),
        name: format!("{}.{}", import.module, import.name),
        is_plain: side.realm.is_some(),
    };
    Ok(Arc::new(Handle(Arc::new(import))))
}

fn missing(module: &Module, import: &Import) -> Error {
    let remedy = if import.module.starts_with("wasi_") {
        "give its functions in options.imports"
    } else {
        "give it in options.imports"
    };
    Error::new(
        ErrorCode::Link,
        format!(
            "{} needs the import '{}'.'{}', {}; {remedy}",
            module.name(),
            import.module,
            import.name,
            import.kind.describe()
        ),
    )
}

fn wrong(module: &Module, import: &Import, given: &str) -> Error {
    Error::new(
        ErrorCode::Link,
        format!(
            "{} needs the import '{}'.'{}' to be {}, and was given {given}",
            module.name(),
            import.module,
            import.name,
            import.kind.describe()
        ),
    )
}
