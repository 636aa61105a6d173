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
use wasm_molt_lifecycle::{Generation, Policy};
use wasmtime::{
    AsContextMut, Caller, Extern, ExternType, Instance, RootScope, Store, StoreContextMut, Val,
    ValRaw,
};

use crate::error::{Error, ErrorCode, Result};
use crate::instance::capture::{Captured, Reach, SavedTable};
use crate::instance::deadline::Deadline;
use crate::instance::engine::Engine;
use crate::instance::host::{
    ImportValue, InstanceHost, host_function, number_from_raw, number_to_raw,
};
use crate::instance::instrument::StateMap;
use crate::instance::interrupt::{Interrupter, Stop};
use crate::instance::limits::{Limiter, Limits};
use crate::instance::memory::{
    AnyMemory, Image, ImageKind, MemoryPlan, MemoryRecord, MemoryUsage, new_memory, with_plan,
    with_plan_and_poll,
};
use crate::instance::module::{Import, ImportKind, Module};
use crate::instance::occupant::Occupant;
use crate::instance::realm::{Realm, Twin};
use crate::instance::signals;
use crate::instance::snapshot::{Origin, Snapshot};
use crate::instance::threads::Threads;
use crate::instance::trap::{ALLOCATION_FAILED, triage};
use crate::instance::value::{FuncHandle, Signature, Value, ValueType, default_val, null_ref};
use crate::instance::wait::{Attendant, provide};
use crate::instance::watch::Watch;
use crate::instance::wear::Wear;

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

/// What every instance of a manager shares.
pub(crate) struct Blueprint {
    pub(crate) engine: Engine,
    pub(crate) module: Arc<Module>,
    pub(crate) limits: Limits,
    /// How snapshots keep memory.
    pub(crate) images: ImageKind,
    /// Memories begin on pages that a snapshot can take over without copying.
    pub(crate) prepares_snapshots: bool,
    /// The host makes instances by itself, beside the module's.
    pub(crate) is_realm: bool,
    /// What its instances are held to.
    pub(crate) policy: Policy,
    /// A trap does not end the use of an instance.
    pub(crate) outlives_traps: bool,
}

impl Blueprint {
    /// Makes one instance: store, imports, instantiation, and then start function and `_initialize`, or
    /// the state of a snapshot.
    ///
    /// * `known`: is told of the replica before any guest code runs, so that it can be stopped.
    pub(crate) fn instantiate(
        &self,
        host: &dyn InstanceHost,
        place: (usize, Generation),
        from: Option<&Origin>,
        known: impl FnOnce(&Arc<Replica>),
    ) -> Result<Arc<Replica>> {
        let watch = self.engine.options.interruptible.then(|| host.watch());
        let attendant = self.is_realm.then(|| host.attendant());
        let replica = self.make(place, watch.flatten(), attendant.flatten());
        known(&replica);
        let imports = host.imports(&replica, &self.module)?;
        if self.engine.options.signals_based_traps {
            signals::stay_first()?;
        }
        // SAFETY: nobody else can enter a replica that has no exports yet.
        let outcome = unsafe { replica.bring_up(&imports, self, from.map(|from| &*from.captured)) };
        if let Some(from) = from {
            replica.begins_as(from.snapshot.id(), Arc::clone(&from.captured));
        }
        if outcome.is_err() {
            // SAFETY: as above; the guest has been left.
            unsafe { replica.release() };
        }
        outcome.map(|()| replica)
    }

    /// A realm without a host of its own, for one more thread of a guest.
    pub(crate) fn make_twin(&self, place: (usize, Generation)) -> Result<Arc<Replica>> {
        let replica = self.make(place, None, None);
        // SAFETY: nobody else knows it.
        unsafe { replica.bring_up(&[], self, None) }?;
        Ok(replica)
    }

    /// A store, with nothing in it yet.
    fn make(
        &self,
        (slot, generation): (usize, Generation),
        watch: Option<Arc<Watch>>,
        attendant: Option<Arc<dyn Attendant>>,
    ) -> Arc<Replica> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let options = &self.engine.options;
        let epochs = options.interruptible && !options.uses_poll_page();
        let interrupter = Arc::new(Interrupter::new(
            epochs.then(|| self.engine.wasmtime.clone()),
        ));
        let guest = Guest {
            limiter: Limiter::new(&self.limits),
            replica: Address(std::ptr::null()),
            replica_id: id,
        };
        let refused_growth_of = Arc::clone(&guest.limiter.refused_growth_of);
        let mut store = Store::new(&self.engine.wasmtime, guest);
        store.limiter(|guest| &mut guest.limiter);
        if epochs {
            // A deadline of 0 would trap at once; 1 is reached by the first strike.
            store.set_epoch_deadline(1);
            let interrupter = Arc::clone(&interrupter);
            let watch = watch.clone();
            store.epoch_deadline_callback(move |_| {
                let looks_up = |watch| interrupter.looks_up(watch);
                if interrupter.is_struck() || !watch.as_ref().is_none_or(looks_up) {
                    Ok(wasmtime::UpdateDeadline::Interrupt)
                } else {
                    Ok(wasmtime::UpdateDeadline::Continue(1))
                }
            });
        }
        if let Some(watch) = &watch {
            #[cfg(unix)]
            if !epochs {
                look_up_at_polls(&mut store, &interrupter, watch);
            }
            watch.add(&interrupter);
        }
        Arc::new(Replica {
            id,
            slot,
            generation: AtomicU64::new(generation.get()),
            module: Arc::clone(&self.module),
            interrupter,
            is_poisoned: AtomicBool::new(false),
            last_trap: Mutex::default(),
            is_released: AtomicBool::new(false),
            active: AtomicPtr::new(std::ptr::null_mut()),
            fuel: options.fuel.then(|| self.limits.fuel.unwrap_or(u64::MAX)),
            externrefs: AtomicU64::new(0),
            types: Mutex::default(),
            live: OnceLock::new(),
            known_tables: Mutex::default(),
            stands_on: Mutex::default(),
            pristine: AtomicU64::new(0),
            realm: self
                .is_realm
                .then(|| Realm::new(self.limits.clone(), self.images, self.prepares_snapshots)),
            attendant,
            watch,
            threads: Arc::default(),
            twin: OnceLock::new(),
            wear: Wear::new(self.policy.for_instance(slot, generation.get())),
            outlives_traps: self.outlives_traps,
            refused_growth_of,
            store: StoreCell(UnsafeCell::new(Some(store))),
            occupant: Occupant::default(),
        })
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

    /// # Safety
    /// The calling thread holds the replica, which has not been instantiated yet.
    unsafe fn bring_up(
        self: &Arc<Self>,
        imports: &[ImportValue],
        blueprint: &Blueprint,
        captured: Option<&Captured>,
    ) -> Result<()> {
        let limits = &blueprint.limits;
        let inside = self.occupant.enter();
        // SAFETY: the caller holds the replica, and no other reference into the store exists yet.
        let cell = unsafe { &mut *self.store.0.get() };
        let store = cell.as_mut().ok_or_else(|| self.stale())?;
        store.data_mut().replica = Address(Arc::as_ptr(self));
        let run = self.interrupter.begin();
        let interrupter = Arc::clone(&self.interrupter);
        let deadline = limits
            .timeout_ms
            .map(|ms| {
                Deadline::after(Duration::from_millis(ms), move || {
                    interrupter.stop(run, Stop::Timeout(ms));
                })
            })
            .transpose()?;
        let made = self.instantiate(store, imports, blueprint, captured);
        // Left, before what is there by now is entered like any other.
        drop(inside);
        let outcome = made.and_then(|live| {
            let _ = self.live.set(live);
            match captured {
                Some(captured) => {
                    *self.known_tables() = Some(captured.tables.clone());
                    Ok(())
                }
                None => self.run_initialize(),
            }
        });
        drop(deadline);
        self.interrupter.end(run);
        outcome
    }

    fn instantiate(
        &self,
        store: &mut Store<Guest>,
        imports: &[ImportValue],
        blueprint: &Blueprint,
        captured: Option<&Captured>,
    ) -> Result<Live> {
        let limits = &blueprint.limits;
        limits.check_memory(self.module.name(), self.module.initial_memory_bytes)?;
        if let Some(fuel) = self.fuel {
            store.set_fuel(fuel).map_err(Error::internal)?;
        }
        let module = &self.module;
        if let Some(captured) = captured {
            limits.check_memory(module.name(), captured.largest_memory_bytes())?;
        }
        let mut images = captured.map_or_else(Vec::new, |captured| captured.memories.clone());
        let plan = |guests: usize, poll: bool, images: Vec<_>| MemoryPlan {
            guests,
            poll,
            images,
            kind: blueprint.images,
            prepared: blueprint.prepares_snapshots,
        };
        let mut memories = Vec::new();
        let mut main_memory = None;
        let mut externs = Vec::with_capacity(imports.len());
        for (import, value) in module.imports().iter().zip(imports) {
            let is_memory = matches!(value, ImportValue::Memory { .. });
            let image = (is_memory && !images.is_empty()).then(|| images.remove(0));
            let plan = plan(1, false, image.into_iter().collect());
            let (made, created) = with_plan(plan, || link(store, import, value, self.id));
            externs.push(made.map_err(|e| self.refused(store, e))?);
            if let Some(record) = created.guests.into_iter().next() {
                limits.check_memory(module.name(), record.byte_len() as u64)?;
                record.set_limit_bytes(limits.memory_cap());
                main_memory.get_or_insert_with(|| Arc::clone(&record));
                memories.push(record);
            }
        }
        let plan = plan(module.defined_memories, module.has_poll_memory, images);
        let interrupter = Arc::clone(&self.interrupter);
        let (instance, created) = with_plan_and_poll(
            plan,
            limits.memory_cap(),
            move |page| interrupter.add_poll(page),
            || Instance::new(&mut *store, &module.compiled, &externs),
        );
        let instance = instance.map_err(|e| self.start_failed(store, e))?;
        memories.extend(created.guests);
        let reach = Reach::find(&mut *store, instance, &module.state)?;
        let all = all_memories(&mut *store, &instance, &module.state)?;
        provide(&mut *store, &instance, &module.state, &all)?;
        match captured {
            Some(captured) => reach.put_rest_back(&mut *store, module, captured, None)?,
            None => {
                reach.size_tables(&mut *store)?;
                self.start_in(&mut *store, module, &instance)
                    .map_err(|e| self.start_failed(store, e))?;
            }
        }
        if let Some(name) = &module.main_memory {
            main_memory = self
                .find_memory(store, &instance, name, &memories)
                .or(main_memory);
        }
        let main_memory = main_memory.or_else(|| memories.first().cloned());
        let main_memory = main_memory.map_or_else(OnceLock::new, OnceLock::from);
        let mut functions = Vec::with_capacity(module.functions().len());
        for exported in module.functions() {
            if !exported.is_offered {
                functions.push(None);
                continue;
            }
            let func = instance
                .get_func(&mut *store, &exported.name)
                .ok_or_else(|| Error::internal("an exported function is missing"))?;
            let address = func.to_raw(&mut *store) as usize;
            functions.push(Some(FuncHandle {
                func,
                replica: self.id,
                address,
            }));
        }
        Ok(Live {
            functions,
            memories,
            main_memory,
            reach,
        })
    }

    /// Does what belongs to instantiation, but is done on its own: copies the data segments, and runs the
    /// start function.
    pub(crate) fn start_in(
        &self,
        mut store: impl AsContextMut<Data = Guest>,
        module: &Module,
        instance: &Instance,
    ) -> wasmtime::Result<()> {
        let state = &module.state;
        if let Some(init) = &state.init {
            if self.fuel.is_some() {
                // Copying costs nothing.
                let mut context = store.as_context_mut();
                let left = context.get_fuel()?;
                context.set_fuel(u64::MAX)?;
                let done = call_hidden(&mut store, instance, init);
                store.as_context_mut().set_fuel(left)?;
                done
            } else {
                call_hidden(&mut store, instance, init)
            }
            // Nor is it seen in the stack.
            .map_err(|error| match error.downcast_ref::<wasmtime::Trap>() {
                Some(trap) => wasmtime::Error::from(*trap),
                None => error,
            })?;
        }
        match &state.start {
            Some(start) => call_hidden(&mut store, instance, start),
            None => Ok(()),
        }
    }

    /// An exported memory is known by the address of its pages.
    #[expect(clippy::unused_self, reason = "reads better beside its only caller")]
    fn find_memory(
        &self,
        store: &mut Store<Guest>,
        instance: &Instance,
        name: &str,
        memories: &[Arc<MemoryRecord>],
    ) -> Option<Arc<MemoryRecord>> {
        let base = match instance.get_export(&mut *store, name)? {
            Extern::Memory(memory) => memory.data_ptr(&*store),
            Extern::SharedMemory(memory) => memory.data().as_ptr().cast_mut().cast::<u8>(),
            _ => return None,
        };
        memories.iter().find(|m| m.base() == base).cloned()
    }

    fn start_failed(&self, store: &Store<Guest>, error: wasmtime::Error) -> Error {
        if store.data().limiter.refused.is_some() {
            return self.refused(store, Error::internal("refused"));
        }
        let is_run = error.is::<wasmtime::Trap>()
            || error.is::<Error>()
            || error.is::<wasmtime::WasmBacktrace>();
        if is_run {
            return self.triage(error, "the start function");
        }
        Error::not_instantiated(self.module.name(), &error)
    }

    fn refused(&self, store: &Store<Guest>, error: Error) -> Error {
        match &store.data().limiter.refused {
            Some(why) => Error::invalid(format!("{}: {why}", self.module.name())),
            None => error,
        }
    }

    /// WASI reactors and their like want this before anything else.
    fn run_initialize(&self) -> Result<()> {
        let Ok(index) = self.module.function_index("_initialize") else {
            return Ok(());
        };
        let Some(func) = self.function(index) else {
            return Ok(());
        };
        let plain = self
            .module
            .functions()
            .get(index)
            .is_some_and(|f| f.signature.params.is_empty() && f.signature.results.is_empty());
        if plain {
            // SAFETY: only `bring_up` calls this, and its caller holds the replica.
            unsafe { self.call_raw(&func, &mut []) }?;
        }
        Ok(())
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

    // ------------------------------------------------------------------ state

    fn known_tables(&self) -> MutexGuard<'_, KnownTables> {
        self.known_tables
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn stands_on(&self) -> MutexGuard<'_, StandsOn> {
        self.stands_on
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody has been inside since its state is that.
    fn begins_as(&self, snapshot: u64, captured: Arc<Captured>) {
        *self.stands_on() = Some((snapshot, captured));
        self.pristine.store(snapshot, Ordering::Relaxed);
    }

    /// The snapshot is released: it is not kept alive for what could be had from it quickly.
    pub(crate) fn forget(&self, snapshot: &Snapshot) {
        let mut stands_on = self.stands_on();
        if stands_on
            .as_ref()
            .is_some_and(|(id, _)| *id == snapshot.id())
        {
            *stands_on = None;
        }
    }

    fn live(&self) -> Result<&Live> {
        self.live
            .get()
            .ok_or_else(|| Error::internal("an instance that is not made yet"))
    }

    /// Reads out the instance's state.
    ///
    /// * `bounds`: as for [`Reach::capture`]; beyond them it is [`ErrorCode::Busy`].
    ///
    /// # Safety
    /// The calling thread holds the replica, and no call of it is on any stack.
    ///
    /// # Errors
    /// [`ErrorCode::SnapshotUnsupported`] with the reason, and nothing has changed.
    pub(crate) unsafe fn capture(
        &self,
        snapshot: u64,
        bounds: (usize, bool),
    ) -> Result<Arc<Captured>> {
        let live = self.live()?;
        {
            // What nobody has touched since need not be looked through again.
            let mut stands_on = self.stands_on();
            if let Some((id, captured)) = &mut *stands_on
                && self.is_pristine_since(*id)
            {
                *id = snapshot;
                self.pristine.store(snapshot, Ordering::Relaxed);
                return Ok(Arc::clone(captured));
            }
            // Else its images would count as somebody's, and could not be written on in place.
            *stands_on = None;
        }
        let mut known = self.known_tables();
        let read = |mut context: StoreContextMut<'_, Guest>| {
            let realm = self.capture_realm(context.as_context_mut(), bounds)?;
            let captured = live.reach.capture(
                context,
                &self.module,
                &live.memories,
                known.as_deref(),
                bounds,
            );
            captured.map(|captured| match realm {
                Some((state, images)) => captured.with_realm(state, images),
                None => captured,
            })
        };
        // SAFETY: contract of this function.
        let captured = unsafe { self.with_context(read) }.unwrap_or_else(|| Err(self.stale()))?;
        *known = Some(captured.tables.clone());
        let captured = Arc::new(captured);
        self.begins_as(snapshot, Arc::clone(&captured));
        Ok(captured)
    }

    /// Gives the instance the state of a snapshot. A trap that it had means nothing then. Returns how
    /// many bytes of memory had been dirty, if that is `counted`.
    ///
    /// # Safety
    /// The calling thread holds the replica, and no call of it is on any stack.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] where the system refuses; the instance is then poisoned.
    pub(crate) unsafe fn reset(&self, to: &Origin, counted: bool) -> Result<usize> {
        let captured = &to.captured;
        let live = self.live()?;
        self.end_threads()?;
        let mut known = self.known_tables();
        let had_externs = live.reach.has_tables();
        let write = |mut context: StoreContextMut<'_, Guest>| {
            let outcome = live.reach.put_back(
                &mut context,
                &self.module,
                &live.memories,
                captured,
                (known.as_deref(), counted),
            );
            let outcome = outcome.and_then(|dirty| match &captured.realm {
                Some(state) => {
                    let images = self.realm_images(captured);
                    let more = self.put_realm_back(context.as_context_mut(), state, images)?;
                    Ok(dirty + more)
                }
                None => Ok(dirty),
            });
            if counted && (captured.externs > 0 || had_externs) {
                // What the host gave the guest since is let go of now, not some time.
                let _ = context.gc(None);
            } else {
                self.collect_now_and_then(&mut context, captured.externs);
            }
            outcome
        };
        // SAFETY: contract of this function.
        let outcome = unsafe { self.with_context(write) }.unwrap_or_else(|| Err(self.stale()));
        match outcome {
            Ok(dirty_bytes) => {
                *known = Some(captured.tables.clone());
                *self.lock_last_trap() = None;
                self.interrupter.revive();
                self.is_poisoned.store(false, Ordering::Release);
                self.begins_as(to.snapshot.id(), Arc::clone(captured));
                Ok(dirty_bytes)
            }
            Err(error) => {
                self.pristine.store(0, Ordering::Relaxed);
                self.poison();
                Err(error)
            }
        }
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

    /// Those images of a snapshot that are of memories which the host has made in the store.
    pub(crate) fn realm_images<'a>(&self, captured: &'a Captured) -> &'a [Arc<Image>] {
        let own = self.live.get().map_or(0, |live| live.memories.len());
        captured.memories.get(own..).unwrap_or_default()
    }

    /// Whether nobody has been inside, or written to its memories, since it got the state of that snapshot.
    pub(crate) fn is_pristine(&self, snapshot: &Snapshot) -> bool {
        self.is_pristine_since(snapshot.id())
    }

    fn is_pristine_since(&self, snapshot: u64) -> bool {
        let mut is_untouched = true;
        self.each_memory(|record| is_untouched &= record.is_untouched());
        self.pristine.load(Ordering::Relaxed) == snapshot && is_untouched && self.is_started()
    }

    /// Calls an export that takes no parameter, or one number, with bits that nobody can guess.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::ExportNotFound`], [`ErrorCode::InvalidArgument`] for another signature; else however
    /// the guest ended.
    pub(crate) unsafe fn reseed(&self, export: &str) -> Result<()> {
        let index = self.module.function_index(export)?;
        let missing = || self.missing(index);
        let func = self.function(index).ok_or_else(missing)?;
        let function = self.module.functions().get(index).ok_or_else(missing)?;
        let bits = random_bits()?;
        let arg = match &*function.signature.params {
            [] => None,
            [ValueType::I32] => Some(RawValue::i32(bits as i32)),
            [ValueType::I64] => Some(RawValue::i64(bits as i64)),
            _ => {
                return Err(Error::invalid(format!(
                    "options.reseed names '{export}' of {}, which is {}; it must take nothing, an i32 or an \
                     i64",
                    self.module.name(),
                    function.signature
                )));
            }
        };
        let args = arg.iter().zip(&*function.signature.params);
        let args = args.map(|(arg, ty)| arg.to_value(*ty)).collect();
        // SAFETY: contract of this function; the signature is the export's.
        unsafe { self.call_typed(&func, &function.signature, args) }.map(drop)
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

/// The memories of an instance in the order of their indices, as the splice has named them.
pub(crate) fn all_memories(
    mut store: impl AsContextMut,
    instance: &Instance,
    map: &StateMap,
) -> Result<Vec<AnyMemory>> {
    let lost = |name: &str| Error::internal(format_args!("the memory {name:?} is lost"));
    let find = |name: &String| {
        let found = instance.get_export(&mut store, name);
        found.and_then(AnyMemory::of).ok_or_else(|| lost(name))
    };
    map.memories.iter().map(find).collect()
}

fn call_hidden(
    mut store: impl AsContextMut<Data = Guest>,
    instance: &Instance,
    name: &str,
) -> wasmtime::Result<()> {
    instance
        .get_func(&mut store, name)
        .ok_or_else(|| Error::internal("a hidden function is missing"))?
        .call(&mut store, &[], &mut [])
}

/// Has guests of this store look up where the poll page was taken away for that.
#[cfg(unix)]
fn look_up_at_polls(
    store: &mut Store<Guest>,
    interrupter: &Arc<Interrupter>,
    watch: &Arc<crate::instance::watch::Watch>,
) {
    use wasmtime::unix::StoreExt;
    let (interrupter, watch) = (Arc::clone(interrupter), Arc::clone(watch));
    let looks_up =
        move |address: usize| interrupter.has_poll_at(address) && interrupter.looks_up(&watch);
    // SAFETY: wasmtime asks for what is safe in a signal handler, because a signal may come anywhere.
    // Whatever follows the look at the address only happens at a poll, between two instructions of
    // compiled code: no lock and no allocator can be in the middle of anything on this thread. The
    // kernel gives the address of the fault with this signal.
    unsafe {
        store.set_signal_handler(move |_, info, _| {
            let address = (*info).si_addr().addr();
            // Nothing here panics; if it did, the guest would be stopped, not unwound from inside a
            // signal handler.
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| looks_up(address)))
                .unwrap_or(false)
        });
    }
}

/// From the system's own source.
fn random_bits() -> Result<u64> {
    getrandom::u64().map_err(|e| {
        Error::new(
            ErrorCode::Internal,
            format!("the system gives no random numbers for options.reseed: {e}"),
        )
    })
}

/// A number in the engine's own representation.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct RawValue(ValRaw);

impl RawValue {
    /// From an i32.
    #[inline]
    pub fn i32(v: i32) -> Self {
        Self(ValRaw::i32(v))
    }
    /// From an i64.
    #[inline]
    pub fn i64(v: i64) -> Self {
        Self(ValRaw::i64(v))
    }
    /// From an f32.
    #[inline]
    pub fn f32(v: f32) -> Self {
        Self(ValRaw::f32(v.to_bits()))
    }
    /// From an f64.
    #[inline]
    pub fn f64(v: f64) -> Self {
        Self(ValRaw::f64(v.to_bits()))
    }
    /// From a number; 0 for anything else.
    #[inline]
    pub fn from_number(value: &Value) -> Self {
        Self(number_to_raw(value))
    }
    /// As an i32.
    #[inline]
    pub fn to_i32(self) -> i32 {
        self.0.get_i32()
    }
    /// As an i64.
    #[inline]
    pub fn to_i64(self) -> i64 {
        self.0.get_i64()
    }
    /// As an f32.
    #[inline]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(self.0.get_f32())
    }
    /// As an f64.
    #[inline]
    pub fn to_f64(self) -> f64 {
        f64::from_bits(self.0.get_f64())
    }
    /// As a value of that type, which must be a number's.
    pub fn to_value(self, ty: ValueType) -> Value {
        number_from_raw(ty, &self.0)
    }
}

fn link(
    store: &mut Store<Guest>,
    import: &Import,
    value: &ImportValue,
    replica: u64,
) -> Result<Extern> {
    let wrong = |given: &str| {
        Error::new(
            ErrorCode::Link,
            format!(
                "import '{}'.'{}' must be {}, but {given} was given",
                import.module,
                import.name,
                import.kind.describe()
            ),
        )
    };
    let failed = |e: wasmtime::Error| {
        Error::new(
            ErrorCode::Link,
            format!(
                "import '{}'.'{}' could not be made: {e:#}",
                import.module, import.name
            ),
        )
    };
    match (&import.ty, value) {
        (ExternType::Func(ty), ImportValue::Function(host)) => {
            Ok(host_function(store, ty.clone(), Arc::clone(host)).into())
        }
        (ExternType::Global(ty), ImportValue::Global(value)) => {
            if value.ty() != ValueType::from(ty.content()) {
                return Err(wrong(&format!("a value of type {}", value.ty())));
            }
            let val = value.clone().into_val(replica, &mut *store)?;
            Ok(wasmtime::Global::new(&mut *store, ty.clone(), val)
                .map_err(failed)?
                .into())
        }
        (ExternType::Memory(ty), ImportValue::Memory { initial, maximum }) => {
            check_limits(*initial, *maximum, ty.minimum(), ty.maximum())
                .map_err(|given| wrong(&given))?;
            let made = wasmtime::MemoryTypeBuilder::default()
                .memory64(ty.is_64())
                .shared(ty.is_shared())
                .min(*initial)
                .max(*maximum)
                .build()
                .map_err(failed)?;
            new_memory(&mut *store, &made).map_err(failed)
        }
        (ExternType::Table(ty), ImportValue::Table { initial, maximum }) => {
            check_limits(*initial, *maximum, ty.minimum(), ty.maximum())
                .map_err(|given| wrong(&given))?;
            let count = |n: u64| u32::try_from(n).map_err(|_| wrong("a table too large"));
            let ImportKind::Table { element, .. } = &import.kind else {
                return Err(wrong("a table"));
            };
            let made = wasmtime::TableType::new(
                ty.element().clone(),
                count(*initial)?,
                maximum.map(count).transpose()?,
            );
            Ok(wasmtime::Table::new(&mut *store, made, null_ref(*element))
                .map_err(failed)?
                .into())
        }
        (_, ImportValue::Function(_)) => Err(wrong("a function")),
        (_, ImportValue::Global(_)) => Err(wrong("a value")),
        (_, ImportValue::Memory { .. }) => Err(wrong("a memory")),
        (_, ImportValue::Table { .. }) => Err(wrong("a table")),
    }
}

/// Whether `{ initial, maximum }` may stand where the module wants `minimum` and at most `most`.
fn check_limits(
    initial: u64,
    maximum: Option<u64>,
    minimum: u64,
    most: Option<u64>,
) -> Result<(), String> {
    let fits = initial >= minimum && most.is_none_or(|most| maximum.is_some_and(|m| m <= most));
    let is_sane = maximum.is_none_or(|maximum| initial <= maximum);
    if fits && is_sane {
        return Ok(());
    }
    let maximum = maximum.map_or("none".into(), |m| m.to_string());
    Err(format!("{{ initial: {initial}, maximum: {maximum} }}"))
}
