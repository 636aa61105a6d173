//! How a replica is made: its store, its imports, the instance, and what runs before anybody may enter.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use wasm_molt_lifecycle::{Generation, Policy};
use wasmtime::{AsContextMut, Extern, ExternType, Instance, Store};

use super::{Address, Guest, Live, Replica, StoreCell};
use crate::error::{Error, ErrorCode, Result};
use crate::instance::capture::{Captured, Reach};
use crate::instance::deadline::Deadline;
use crate::instance::engine::Engine;
use crate::instance::host::{ImportValue, InstanceHost, host_function};
use crate::instance::instrument::StateMap;
use crate::instance::interrupt::{Interrupter, Stop};
use crate::instance::limits::{Limiter, Limits};
use crate::instance::memory::{
    AnyMemory, ImageKind, MemoryPlan, MemoryRecord, new_memory, with_plan, with_plan_and_poll,
};
use crate::instance::module::{Import, ImportKind, Module};
use crate::instance::occupant::Occupant;
use crate::instance::realm::Realm;
use crate::instance::signals;
use crate::instance::snapshot::Origin;
use crate::instance::value::{FuncHandle, ValueType, null_ref};
use crate::instance::wait::{Attendant, provide};
use crate::instance::watch::Watch;
use crate::instance::wear::Wear;

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
fn look_up_at_polls(store: &mut Store<Guest>, interrupter: &Arc<Interrupter>, watch: &Arc<Watch>) {
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
