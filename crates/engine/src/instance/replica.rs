//! One instance in a store of its own, and the right to enter it.
//!
//! # Who may enter
//! A replica is entered by one thread at a time: the thread that *holds* it. Holding is decided
//! elsewhere (a ticket of the gate, a lease, the home thread, or a control thread while nobody else
//! knows the replica); the `unsafe` methods here name that as their contract. While the guest is
//! inside a host function, the same thread may enter again: the call then runs in the context of the
//! running one. Everything else on the type may be used by any thread at any time.

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use wasm_molt_lifecycle::Generation;
use wasmtime::{AsContextMut, Caller, RootScope, Store, StoreContextMut, Val, ValRaw};

use crate::error::{Error, ErrorCode, Result};
use crate::instance::capture::{Captured, Reach, SavedTable};
use crate::instance::deadline::Deadline;
use crate::instance::interrupt::{Interrupter, Stop};
use crate::instance::limits::Limiter;
use crate::instance::memory::{MemoryRecord, MemoryUsage};
use crate::instance::module::Module;
use crate::instance::occupant::Occupant;
use crate::instance::raw_value::RawValue;
use crate::instance::realm::{Realm, Twin};
use crate::instance::threads::Threads;
use crate::instance::trap::{ALLOCATION_FAILED, triage};
use crate::instance::value::{FuncHandle, Signature, Value, ValueType, default_val};
use crate::instance::wait::Attendant;
use crate::instance::watch::Watch;
use crate::instance::wear::Wear;

mod blueprint;
mod state;

pub(crate) use blueprint::{Blueprint, all_memories};

/// Externrefs made between two collections of the guest's reference heap.
const EXTERNREFS_PER_COLLECTION: u64 = 4096;

/// What wasmtime keeps beside each instance.
pub(crate) struct Guest {
    limiter: Limiter,
    replica: Address,
    replica_id: u64,
}

/// Where the replica is whose store this is.
#[derive(Clone, Copy)]
struct Address(*const Replica);

// SAFETY: the pointer is only read while the replica it names is alive and entered (see `host::enter`);
// a `Replica` is itself `Send` and `Sync`.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

impl Guest {
    pub(crate) fn replica(&self) -> *const Replica {
        self.replica.0
    }

    pub(crate) fn replica_id(&self) -> u64 {
        self.replica_id
    }

    /// Which limit refused something, if one did.
    pub(crate) fn take_refusal(&mut self) -> Option<String> {
        self.limiter.refused.take()
    }

    pub(crate) fn forget_refusal(&mut self) {
        self.limiter.refused = None;
    }
}

/// What exists once instantiation has succeeded.
struct Live {
    /// By position; `None` where this build has nothing.
    functions: Vec<Option<FuncHandle>>,
    memories: Vec<Arc<MemoryRecord>>,
    /// The one that the host is shown: of a realm, that of its first instance that has any.
    main_memory: OnceLock<Arc<MemoryRecord>>,
    reach: Reach,
}

/// The tables of an instance as they were when their flags were last cleared: at a capture, or when a
/// state was put back.
type KnownTables = Option<Vec<Arc<SavedTable>>>;

/// A snapshot's number and its state.
type StandsOn = Option<(u64, Arc<Captured>)>;

/// One instance, its store and its memories.
pub struct Replica {
    id: u64,
    slot: usize,
    /// Its number; settled when it is published.
    generation: AtomicU64,
    module: Arc<Module>,
    interrupter: Arc<Interrupter>,
    is_poisoned: AtomicBool,
    /// What poisoned it.
    last_trap: Mutex<Option<Error>>,
    is_released: AtomicBool,
    /// The innermost host call's `Caller`, null while no host function runs. Read and written only by
    /// the thread that holds the replica; atomic so that the type stays `Sync`.
    active: AtomicPtr<()>,
    fuel: Option<u64>,
    externrefs: AtomicU64,
    /// Types of functions that came out as funcrefs and are no exports.
    types: Mutex<HashMap<usize, Signature>>,
    live: OnceLock<Live>,
    known_tables: Mutex<KnownTables>,
    /// What it was last captured as, or given: while it is [pristine](Self::is_pristine) it is that.
    stands_on: Mutex<StandsOn>,
    /// The snapshot whose state the instance has, and nobody has been inside since; 0 for none.
    pristine: AtomicU64,
    /// What the host has made in the store, if it may.
    realm: Option<Mutex<Realm>>,
    /// What the home thread does while it waits inside.
    attendant: Option<Arc<dyn Attendant>>,
    /// Who knows whether the thread must end, where only the thread itself can be asked.
    watch: Option<Arc<Watch>>,
    /// The native threads that run the same guest.
    threads: Arc<Threads>,
    /// What it is a twin of, if it belongs to such a thread.
    twin: OnceLock<Twin>,
    wear: Wear,
    /// As in [`Limiter`].
    refused_growth_of: Arc<AtomicUsize>,
    /// It serves on after a trap.
    outlives_traps: bool,
    store: StoreCell,
    occupant: Occupant,
}

/// Entered only by the thread that holds the replica. `None` once released.
struct StoreCell(UnsafeCell<Option<Store<Guest>>>);

// SAFETY: it is entered only under the contract of the unsafe methods below, by one thread at a time, and a
// `Store<Guest>` may move between threads: the compiler sees that, for the cell is `Send` by itself.
unsafe impl Sync for StoreCell {}

/// Whatever else a replica has may be shared as it is.
const _: () = {
    const fn may_be_shared<T: Send + Sync>() {}
    may_be_shared::<Replica>();
};

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica")
            .field("module", &self.module.name())
            .field("slot", &self.slot)
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

impl Replica {
    /// Unique in the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its place among the manager's replicas.
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// The generation it was made for.
    pub fn generation(&self) -> Generation {
        Generation::new(self.generation.load(Ordering::Relaxed))
    }

    /// Gives it the number under which it is published.
    pub(crate) fn number(&self, generation: Generation) {
        self.generation.store(generation.get(), Ordering::Relaxed);
    }

    /// The code it runs.
    pub fn module(&self) -> &Arc<Module> {
        &self.module
    }

    /// Stops what runs inside.
    pub fn interrupter(&self) -> &Arc<Interrupter> {
        &self.interrupter
    }

    pub(crate) fn attendant(&self) -> Option<&Arc<dyn Attendant>> {
        self.attendant.as_ref()
    }

    pub(crate) fn watch(&self) -> Option<&Arc<Watch>> {
        self.watch.as_ref()
    }

    pub(crate) fn threads(&self) -> &Arc<Threads> {
        &self.threads
    }

    /// What it has behind it.
    pub(crate) fn wear(&self) -> &Wear {
        &self.wear
    }

    /// One more call has ended, by the thread that holds the replica; whether it is to be judged.
    #[inline]
    pub fn note_call(&self) -> bool {
        self.wear.note_call()
    }

    /// What its memories may have, all together.
    pub(crate) fn memory_limit_bytes(&self) -> u64 {
        let mut sum = 0_u64;
        self.each_memory(|record| sum = sum.saturating_add(record.most_bytes() as u64));
        sum
    }

    pub(crate) fn twin(&self) -> &OnceLock<Twin> {
        &self.twin
    }

    /// A call did not end normally; the guest's own state is unknown.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.is_poisoned.load(Ordering::Acquire)
    }

    /// The error that left the instance poisoned.
    pub(crate) fn last_trap(&self) -> Option<Error> {
        self.lock_last_trap().clone()
    }

    fn lock_last_trap(&self) -> MutexGuard<'_, Option<Error>> {
        self.last_trap
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A failure that the engine knows nothing of has left the guest in the middle of something.
    pub(crate) fn poison_with(&self, error: &Error) {
        *self.lock_last_trap() = Some(error.clone());
        self.poison();
    }

    pub(crate) fn poison(&self) {
        self.is_poisoned.store(true, Ordering::Release);
    }

    /// Its store is gone.
    pub fn is_released(&self) -> bool {
        self.is_released.load(Ordering::Acquire)
    }

    /// A host function of this instance is running.
    pub fn is_in_host_call(&self) -> bool {
        !self.active().is_null()
    }

    /// The function at that position of [`Module::functions`]; `None` before the instance exists, and
    /// where its build has none.
    pub fn function(&self, index: usize) -> Option<FuncHandle> {
        self.live.get()?.functions.get(index).copied().flatten()
    }

    /// Instantiated: its functions can be called.
    pub fn is_started(&self) -> bool {
        self.live.get().is_some()
    }

    /// The error of a call at a position where this build has nothing.
    #[cold]
    pub fn missing(&self, index: usize) -> Error {
        let name = self.module.name();
        match self.module.functions().get(index) {
            Some(gone) => Error::new(
                ErrorCode::ExportNotFound,
                format!(
                    "{name} exports no function '{}' {} any more: the build that a reload has put in \
                     its place offers none",
                    gone.name, gone.signature
                ),
            ),
            None => Error::new(
                ErrorCode::ExportNotFound,
                format!("{name} exports this function only in another build"),
            ),
        }
    }

    /// The type of a function of this instance that host code has seen.
    pub fn signature(&self, handle: &FuncHandle) -> Option<Signature> {
        let exported = self.live.get().and_then(|live| {
            let index = live
                .functions
                .iter()
                .position(|f| f.is_some_and(|f| f.address == handle.address))?;
            self.module
                .functions()
                .get(index)
                .map(|f| f.signature.clone())
        });
        let types = || self.types.lock().unwrap_or_else(PoisonError::into_inner);
        exported.or_else(|| types().get(&handle.address).cloned())
    }

    /// Notes the type of a function that goes out to host code. The calling thread is inside.
    pub(crate) fn seen(&self, value: &Value, context: impl AsContextMut) {
        if let Value::Func(Some(handle)) = value {
            let signature = Signature::of(&handle.func.ty(context));
            let mut types = self.types.lock().unwrap_or_else(PoisonError::into_inner);
            types.entry(handle.address).or_insert(signature);
        }
    }

    /// The memory that `manager.memory` shows.
    #[inline]
    pub fn memory(&self) -> Option<&Arc<MemoryRecord>> {
        self.live.get()?.main_memory.get()
    }

    /// Bytes of linear memory, over all its memories.
    pub fn memory_bytes(&self) -> usize {
        let mut sum = 0;
        self.each_memory(|record| sum += record.byte_len());
        sum
    }

    fn each_memory(&self, mut f: impl FnMut(&MemoryRecord)) {
        if self.is_released() {
            return;
        }
        if let Some(live) = self.live.get() {
            live.memories.iter().for_each(|record| f(record));
        }
        if let Some(realm) = &self.realm {
            let realm = realm.lock().unwrap_or_else(PoisonError::into_inner);
            realm.records().for_each(|record| f(record));
        }
    }

    /// What the host has made in the store; `None` if it may not.
    pub(crate) fn realm_cell(&self) -> Option<&Mutex<Realm>> {
        self.realm.as_ref()
    }

    pub(crate) fn show_memory(&self, memory: &Arc<MemoryRecord>) {
        if let Some(live) = self.live.get() {
            let _ = live.main_memory.set(Arc::clone(memory));
        }
    }

    /// The host makes instances in its store by itself.
    pub fn is_realm(&self) -> bool {
        self.realm.is_some()
    }

    /// Somebody has been inside.
    pub(crate) fn touch(&self) {
        self.pristine.store(0, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn active(&self) -> *mut () {
        self.active.load(Ordering::Relaxed)
    }

    pub(crate) fn set_active(&self, context: *mut ()) {
        self.active.store(context, Ordering::Relaxed);
    }

    /// Runs `f` in the innermost context: the running host call's, else the store's own.
    ///
    /// # Safety
    /// The calling thread holds the replica; if a host function of it runs, it runs on this thread.
    #[inline]
    pub(crate) unsafe fn with_context<R>(
        &self,
        f: impl FnOnce(StoreContextMut<'_, Guest>) -> R,
    ) -> Option<R> {
        let active = self.active();
        if active.is_null() {
            let _inside = self.occupant.enter();
            // SAFETY: the thread holds the replica and no call runs, so this is the only reference.
            let cell = unsafe { &mut *self.store.0.get() };
            return cell.as_mut().map(|store| f(store.as_context_mut()));
        }
        let _inside = self.occupant.enter_again();
        // SAFETY: `active` is the `Caller` of a host function that runs further up on this very
        // stack (contract), which does not use it until that function returns.
        let caller = unsafe { &mut *active.cast::<Caller<'_, Guest>>() };
        Some(f(caller.as_context_mut()))
    }

    /// Calls a function of numeric signature; `values` holds the arguments and receives the results.
    ///
    /// # Safety
    /// The calling thread holds the replica (see the module's text); `func` belongs to it; `values`
    /// is as long as the larger of its parameters and results, with arguments of the right types.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released; else however the guest ended.
    #[inline]
    pub unsafe fn call_raw(
        &self,
        func: &FuncHandle,
        values: &mut [RawValue],
    ) -> Result<(), Box<Error>> {
        let len = values.len();
        let raw: *mut [ValRaw] =
            std::ptr::slice_from_raw_parts_mut(values.as_mut_ptr().cast::<ValRaw>(), len);
        let run = |mut context: StoreContextMut<'_, Guest>| {
            self.refuel(&mut context);
            self.pristine.store(0, Ordering::Relaxed);
            // SAFETY: contract of this function; `RawValue` is `ValRaw`.
            unsafe { func.func.call_unchecked(&mut context, raw) }
                .map_err(|error| Box::new(self.call_failed(context, func, error)))
        };
        // SAFETY: contract of this function.
        unsafe { self.with_context(run) }.unwrap_or_else(|| Err(Box::new(self.stale())))
    }

    /// Calls any function.
    ///
    /// # Safety
    /// The calling thread holds the replica (see the module's text) and `func` belongs to it.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for a value of another type, [`ErrorCode::StaleHandle`] once
    /// released; else however the guest ended.
    pub unsafe fn call(&self, func: &FuncHandle, args: Vec<Value>) -> Result<Vec<Value>> {
        let run = |context: StoreContextMut<'_, Guest>| self.call_values(context, func, args);
        // SAFETY: contract of this function.
        unsafe { self.with_context(run) }.unwrap_or_else(|| Err(self.stale()))
    }

    /// Calls the export at that position of [`Module::functions`].
    ///
    /// # Safety
    /// The calling thread holds the replica (see the module's text).
    ///
    /// # Errors
    /// As [`Self::call`].
    pub unsafe fn call_export(&self, index: usize, args: Vec<Value>) -> Result<Vec<Value>> {
        let (Some(func), Some(export)) = (self.function(index), self.module.functions().get(index))
        else {
            return Err(self.missing(index));
        };
        // SAFETY: contract of this function; the signature is the export's.
        unsafe { self.call_typed(&func, &export.signature, args) }
    }

    /// Calls a function whose type is known: numbers take the raw way, which need not ask the engine
    /// for it and leaves more of the stack to who calls back and forth.
    ///
    /// # Safety
    /// As [`Self::call`]; `signature` is the function's.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub unsafe fn call_typed(
        &self,
        func: &FuncHandle,
        signature: &Signature,
        args: Vec<Value>,
    ) -> Result<Vec<Value>> {
        let fits = args
            .iter()
            .map(Value::ty)
            .eq(signature.params.iter().copied());
        if !fits || !signature.is_numeric() {
            // SAFETY: contract of this function.
            return unsafe { self.call(func, args) };
        }
        let mut raw: SmallVec<[RawValue; 4]> = args.iter().map(RawValue::from_number).collect();
        drop(args);
        raw.resize(raw.len().max(signature.results.len()), RawValue::i32(0));
        // SAFETY: contract of this function; the values fit the signature, as was just compared.
        unsafe { self.call_raw(func, &mut raw) }?;
        Ok(raw
            .iter()
            .zip(&*signature.results)
            .map(|(raw, ty)| raw.to_value(*ty))
            .collect())
    }

    fn call_values(
        &self,
        mut context: StoreContextMut<'_, Guest>,
        func: &FuncHandle,
        args: Vec<Value>,
    ) -> Result<Vec<Value>> {
        let given = || args.iter().map(Value::ty);
        let ty = func.func.ty(&context);
        if !given().eq(ty.params().map(|t| ValueType::from(&t))) {
            let signature = Signature::of(&ty);
            let types: Vec<_> = given().map(|ty| ty.to_string()).collect();
            return Err(Error::invalid(format!(
                "{}: a function {signature} was called with ({})",
                self.module.name(),
                types.join(", ")
            )));
        }
        if ty
            .results()
            .any(|t| ValueType::from(&t) == ValueType::Opaque)
        {
            // Before it runs: there would be no way to tell what came of it.
            return Err(Error::invalid(format!(
                "{}: a function {} was called, and not all of its results can cross to the host",
                self.module.name(),
                Signature::of(&ty)
            )));
        }
        self.refuel(&mut context);
        self.pristine.store(0, Ordering::Relaxed);
        let made = args
            .iter()
            .filter(|v| matches!(v, Value::Extern(Some(_))))
            .count() as u64;
        let mut scope = RootScope::new(&mut context);
        let mut params = Vec::with_capacity(args.len());
        for arg in args {
            params.push(self.own(arg).into_val(self.id, &mut scope)?);
        }
        let mut results: Vec<Val> = ty.results().map(|t| default_val(&t)).collect();
        func.func
            .call(&mut scope, &params, &mut results)
            .map_err(|error| self.call_failed(&mut scope, func, error))?;
        let mut values = Vec::with_capacity(results.len());
        for result in &results {
            let value = Value::from_val(result, self.id, &mut scope)?;
            self.seen(&value, &mut scope);
            values.push(value);
        }
        drop(scope);
        self.collect_now_and_then(&mut context, made);
        Ok(values)
    }

    /// Replaces a reference to an export of "the instance" by this instance's own.
    pub(crate) fn own(&self, value: Value) -> Value {
        match value {
            Value::Export { module, index } if module == self.module.id() => {
                let own = self.function(index);
                own.map_or(Value::Export { module, index }, |func| {
                    Value::Func(Some(func))
                })
            }
            other => other,
        }
    }

    /// Runs `f`, an outermost entry, under a deadline: `limits.timeoutMs` of a synchronous call.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] if no deadline can be set; then `f` has not run.
    #[inline(never)]
    pub fn with_deadline<R>(&self, timeout_ms: u64, f: impl FnOnce() -> R) -> Result<R> {
        if self.is_in_host_call() {
            return Ok(f());
        }
        let run = self.interrupter.begin();
        let interrupter = Arc::clone(&self.interrupter);
        let deadline = Deadline::after(Duration::from_millis(timeout_ms), move || {
            interrupter.stop(run, Stop::Timeout(timeout_ms));
        });
        let outcome = deadline.map(|deadline| {
            let outcome = f();
            drop(deadline);
            outcome
        });
        self.interrupter.end(run);
        outcome
    }

    /// Releases host values that the guest has let go of, now and then.
    fn collect_now_and_then(&self, context: &mut StoreContextMut<'_, Guest>, made: u64) {
        if made == 0 {
            return;
        }
        let before = self.externrefs.fetch_add(made, Ordering::Relaxed);
        if before / EXTERNREFS_PER_COLLECTION != (before + made) / EXTERNREFS_PER_COLLECTION {
            // A collection that fails is tried again after the next round.
            let _ = context.gc(None);
        }
    }

    /// Outermost calls start with a full tank; nested ones burn what is left.
    #[inline]
    pub(crate) fn refuel(&self, context: &mut StoreContextMut<'_, Guest>) {
        if let Some(fuel) = self.fuel
            && self.active().is_null()
        {
            // Only fails where fuel is off, and then `self.fuel` is None.
            let _ = context.set_fuel(fuel);
        }
    }

    #[cold]
    fn call_failed(
        &self,
        context: impl AsContextMut<Data = Guest>,
        func: &FuncHandle,
        error: wasmtime::Error,
    ) -> Error {
        let name = self.live.get().and_then(|live| {
            let index = live
                .functions
                .iter()
                .position(|f| f.is_some_and(|f| f.address == func.address))?;
            self.module.functions().get(index).map(|f| f.name.as_str())
        });
        let what = name.map_or_else(|| "a function".to_owned(), |n| format!("'{n}'"));
        self.run_failed(context, error, &what)
    }

    /// Why a run of the guest, in that context, has failed.
    pub(crate) fn run_failed(
        &self,
        context: impl AsContextMut<Data = Guest>,
        error: wasmtime::Error,
        what: &str,
    ) -> Error {
        self.uncaught(context, &error)
            .unwrap_or_else(|| self.triage(error, what))
    }

    pub(crate) fn triage(&self, error: wasmtime::Error, what: &str) -> Error {
        let what = format!("{}: {what}", self.module.name());
        let mut error = triage(error, &what, self.interrupter.pending(), self.fuel);
        if let Error::Trap { info, .. } = &mut error
            && info.kind != ALLOCATION_FAILED
        {
            self.tell_refusal(&mut info.message);
        }
        // Glue goes on after a trap, as it does on other engines; what to do about it is up to who owns it.
        // Not where other threads of the guest may be in the middle of what has broken off.
        let goes_on = self.is_realm() && error.code() != Some(ErrorCode::Internal)
            || self.outlives_traps && matches!(error, Error::Trap { .. });
        if error.poisons_instance() && !(goes_on && self.threads.is_empty()) {
            self.poison_with(&error);
            self.threads.stop();
        }
        error
    }

    /// Most guests trap when they get no memory, and say nothing of the reason.
    #[cold]
    fn tell_refusal(&self, message: &mut String) {
        let mut refused = None;
        let size = self.refused_growth_of.swap(0, Ordering::AcqRel);
        let mut look = |memory: &MemoryRecord| {
            if memory.take_refusal() || (size > 0 && memory.byte_len() == size) {
                refused = Some((memory.byte_len(), memory.limit_bytes()));
            }
        };
        if let Some(live) = self.live.get() {
            live.memories.iter().for_each(|record| look(record));
        }
        // An instantiation that fails holds the lock.
        if let Some(Ok(realm)) = self.realm.as_ref().map(Mutex::try_lock) {
            realm.records().for_each(|record| look(record));
        }
        match refused {
            Some((bytes, usize::MAX)) => {
                let _ = write!(
                    message,
                    "; growth of its memory beyond {bytes} bytes and its declared maximum was refused before"
                );
            }
            Some((bytes, limit)) => {
                let _ = write!(
                    message,
                    "; growth of its memory of {bytes} bytes beyond limits.memoryBytes = {limit} was refused before"
                );
            }
            None => {}
        }
    }

    /// The error of a host call that was waiting when its run was stopped.
    #[cold]
    pub fn interrupted(&self) -> Error {
        let stop = self.interrupter.pending();
        let stop = stop.unwrap_or_else(|| Stop::Interrupted("its run was stopped".into()));
        stop.into_error(self.module.name())
    }

    /// The error of a handle on an instance that is gone.
    #[cold]
    pub fn stale(&self) -> Error {
        Error::new(
            ErrorCode::StaleHandle,
            format!(
                "this handle belongs to generation {} of {}, which is gone; take it again from the manager",
                self.generation(),
                self.module.name()
            ),
        )
    }

    fn live(&self) -> Result<&Live> {
        self.live
            .get()
            .ok_or_else(|| Error::internal("an instance that is not made yet"))
    }

    /// Something has broken off in a realm that has threads: nothing may enter it before a reset or a
    /// reload, and which of the two is up to who owns it.
    pub fn awaits_rescue(&self) -> bool {
        self.is_realm() && self.is_poisoned() && self.can_be_reset()
    }

    /// It does not serve on.
    pub fn must_be_replaced(&self) -> bool {
        self.is_poisoned() && !self.awaits_rescue()
    }

    /// The error of whoever would enter it all the same.
    pub fn broken(&self) -> Error {
        self.last_trap().unwrap_or_else(|| self.stale())
    }

    /// Whether a reset would do: after a fault of ours nobody knows what the instance is worth.
    pub(crate) fn can_be_reset(&self) -> bool {
        let lost = |error: &Error| error.code() == Some(ErrorCode::Internal);
        !self.is_poisoned() || self.last_trap().is_some_and(|error| !lost(&error))
    }

    /// What its memories hold, over all of them.
    pub fn memory_usage(&self) -> MemoryUsage {
        let mut sum = MemoryUsage::default();
        self.each_memory(|record| sum += record.usage());
        sum
    }

    /// Gives pages back bit by bit, ahead of the [release](Self::release): the system keeps everybody who
    /// grows a memory waiting while it takes pages away, and that takes long where they are many.
    ///
    /// # Safety
    /// As for the release: whatever looks finds zeros.
    pub(crate) unsafe fn shed(&self) {
        self.each_memory(MemoryRecord::shed);
    }

    /// Drops the store: memory goes back to the system here. Idempotent.
    ///
    /// # Safety
    /// The calling thread holds the replica, and nobody will enter it any more.
    pub(crate) unsafe fn release(&self) {
        self.wear.end();
        // Those that do not end keep the memory, and nothing else.
        let _ = self.end_threads();
        self.is_released.store(true, Ordering::Release);
        let inside = self.occupant.enter();
        // SAFETY: contract of this function.
        let store = unsafe { &mut *self.store.0.get() }.take();
        drop(store);
        drop(inside);
        *self.stands_on() = None;
        *self.known_tables() = None;
        self.forget_realm();
        self.interrupter.released();
    }
}
