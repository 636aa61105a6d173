//! A realm: one store in which the host makes what it likes, for JS glue that instantiates by itself.
//!
//! Memories, tables, globals and tags are named by numbers, each kind by its own, in the order in which
//! they were made; a number is never used again, and what has one lives as long as the store. An instance
//! brings its own and may import others, so what two names mean can be one thing: it has one number.
//!
//! # Who may enter
//! The `unsafe` methods are entries into the replica, with its contract: the calling thread holds it.
//! The realm's own lock is a leaf: no guest and no host code runs under it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wasmparser::ExternalKind;
use wasmtime::{
    AsContext, AsContextMut, ExnRef, Extern, ExternType, Global, HeapType, Instance, Mutability,
    OwnedRooted, RefType, StoreContextMut, Table, Tag, Val, ValType,
};

use crate::error::{Error, ErrorCode, Result};
use crate::instance::capture::set_size;
use crate::instance::discard::{DiscardCell, discard_of};
use crate::instance::host::{HostFunction, host_function};
use crate::instance::instrument::Place;
use crate::instance::limits::Limits;
use crate::instance::memory::{AnyMemory, ImageKind, MemoryPlan, MemoryRecord, with_plan_and_poll};
use crate::instance::module::{Import, ImportKind, Module};
use crate::instance::replica::{Guest, Replica};
use crate::instance::value::{FuncHandle, HostRef, Value, ValueType};
use crate::instance::wait::provide;

mod exceptions;
mod globals;
mod memories;
mod state;
mod tables;
mod twins;

pub(crate) use state::RealmState;
pub(crate) use twins::{Sketch, Twin};

/// Why there is no shared memory.
const NO_THREADS: &str = "shared memories are offered with engine: { threads: true }; set it, or use a build without threads";

/// Thrown exceptions whose objects are kept: glue catches and throws again at once, if at all.
const MOST_THROWN: usize = 16;

/// What is given for one import of an instance in a realm.
#[derive(Clone)]
pub enum RealmImport {
    /// A function of the host.
    Function(Arc<dyn HostFunction>),
    /// What gives bytes of the instance's own memory back (see [`Import::is_discard`]).
    Discard,
    /// A function of the same realm.
    Guest(FuncHandle),
    /// A memory, table, global or tag, by its number.
    Item(u32),
}

impl std::fmt::Debug for RealmImport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Function(_) => f.write_str("Function"),
            Self::Discard => f.write_str("Discard"),
            Self::Guest(handle) => handle.fmt(f),
            Self::Item(id) => write!(f, "Item({id})"),
        }
    }
}

/// What an instance in a realm offers.
#[derive(Debug, Clone, Copy)]
pub enum RealmExport {
    /// A function.
    Function(FuncHandle),
    /// A memory, table, global or tag, by its number.
    Item(u32),
}

/// An exception on its way between guest and host.
#[derive(Debug, Clone)]
pub struct Exception {
    /// Its tag's number.
    pub tag: u32,
    /// A value for each of the tag's parameters.
    pub payload: Vec<Value>,
    /// The host's own object, where it has one.
    pub object: Option<HostRef>,
}

/// Who has made a memory larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GrownBy {
    Nobody,
    /// By the JS API only, as Emscripten's glue does: such glue looks at its views when it grows the
    /// memory, and at no other time.
    Host,
    /// By the guest's own instruction: its glue has to look at its views all the time.
    Guest,
}

#[derive(Debug)]
struct RealmMemory {
    memory: AnyMemory,
    record: Arc<MemoryRecord>,
    maximum: Option<u64>,
    is_64: bool,
    grown_by: GrownBy,
    /// Bytes, as last seen here.
    len_seen: usize,
    /// A reset has gone back to before it was made: it has no pages any more.
    is_vacated: bool,
}

impl RealmMemory {
    /// Notices growth that went by without the host.
    fn look(&mut self) {
        let len = self.record.byte_len();
        if len > self.len_seen {
            self.grown_by = GrownBy::Guest;
        }
        self.len_seen = len;
    }
}

/// What instrumented code keeps about a table that it can change.
#[derive(Debug, Clone, Copy)]
struct Watch {
    /// An i32, 0 until the code has changed the table.
    dirty: Global,
    /// Its size as the code sees it, if that can be less than what the engine has.
    size: Option<Global>,
}

#[derive(Debug)]
struct RealmTable {
    table: Table,
    element: ValueType,
    /// Of each instance whose code can change it.
    watches: Vec<Watch>,
    /// Its size, if no code keeps account of it and a reset may have left the engine's table larger; and
    /// how large that was then.
    len: Option<(u64, u64)>,
    /// The host has changed it since its elements were last known.
    is_changed: bool,
    known: Option<Arc<state::Elements>>,
}

#[derive(Debug)]
struct RealmGlobal {
    global: Global,
    content: ValType,
    is_mutable: bool,
}

/// What there is in a realm. See the module's text.
#[derive(Debug)]
pub(crate) struct Realm {
    limits: Limits,
    images: ImageKind,
    prepares_snapshots: bool,
    memories: Vec<RealmMemory>,
    /// What the host knows of them once the realm is gone.
    gone: Vec<Arc<MemoryRecord>>,
    tables: Vec<RealmTable>,
    globals: Vec<RealmGlobal>,
    /// State that only instrumented code knows of.
    hidden: Vec<Global>,
    /// Its instances over shared memories, which other threads may have too.
    shareable: Vec<Made>,
    tags: Vec<Tag>,
    /// Function indices by address, for names.
    indices: HashMap<usize, u32>,
    /// By the address that a function has in an instance which imports it: what it is where it comes from.
    originals: HashMap<usize, FuncHandle>,
    /// Why it cannot be captured, if so.
    unsupported: Option<String>,
    /// Some module names tags, so what the host throws must be such that guests can catch it.
    can_catch: bool,
    /// The exceptions that went in last, so that the same objects come out.
    thrown: VecDeque<(OwnedRooted<ExnRef>, Exception)>,
}

impl Realm {
    pub(crate) fn new(limits: Limits, images: ImageKind, prepares_snapshots: bool) -> Mutex<Self> {
        Mutex::new(Self {
            limits,
            images,
            prepares_snapshots,
            memories: Vec::new(),
            gone: Vec::new(),
            tables: Vec::new(),
            globals: Vec::new(),
            hidden: Vec::new(),
            shareable: Vec::new(),
            tags: Vec::new(),
            indices: HashMap::new(),
            originals: HashMap::new(),
            unsupported: None,
            can_catch: false,
            thrown: VecDeque::new(),
        })
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = &Arc<MemoryRecord>> {
        self.memories.iter().map(|it| &it.record)
    }

    fn plan(&self, guests: usize, poll: bool) -> MemoryPlan {
        MemoryPlan {
            guests,
            poll,
            images: Vec::new(),
            kind: self.images,
            prepared: self.prepares_snapshots,
        }
    }

    fn add_memory(
        &mut self,
        memory: AnyMemory,
        record: Arc<MemoryRecord>,
        context: impl AsContext,
    ) -> u32 {
        let ty = memory.ty(context);
        self.memories.push(RealmMemory {
            memory,
            maximum: ty.maximum(),
            is_64: ty.is_64(),
            grown_by: GrownBy::Nobody,
            len_seen: record.byte_len(),
            is_vacated: false,
            record,
        });
        self.memories.len() as u32 - 1
    }

    fn add_table(&mut self, table: Table, context: impl AsContext) -> u32 {
        let ty = table.ty(context);
        self.tables.push(RealmTable {
            table,
            element: ValueType::from(&ValType::Ref(ty.element().clone())),
            watches: Vec::new(),
            len: None,
            is_changed: true,
            known: None,
        });
        self.tables.len() as u32 - 1
    }

    fn add_global(&mut self, global: Global, context: impl AsContext) -> u32 {
        let ty = global.ty(context);
        self.globals.push(RealmGlobal {
            global,
            content: ty.content().clone(),
            is_mutable: ty.mutability() == Mutability::Var,
        });
        self.globals.len() as u32 - 1
    }

    fn add_tag(&mut self, tag: Tag) -> u32 {
        self.tags.push(tag);
        self.tags.len() as u32 - 1
    }
}

impl RealmTable {
    /// Elements as everybody sees them.
    fn len(&self, mut context: impl AsContextMut) -> u64 {
        let real = self.table.size(&context);
        let kept = self.watches.iter().filter_map(|watch| watch.size);
        // Each instance keeps account of its own growth; what is larger is newer.
        let seen = kept.map(|size| number_of(&size.get(&mut context))).max();
        let set = self.len.filter(|(_, then)| *then == real);
        seen.or(set.map(|(len, _)| len)).unwrap_or(real).min(real)
    }

    fn set_len(&mut self, mut context: impl AsContextMut, len: u64) -> Result<()> {
        for size in self.watches.iter().filter_map(|watch| watch.size) {
            set_size(&mut context, &size, len)?;
        }
        self.len = Some((len, self.table.size(&context)));
        Ok(())
    }
}

fn number_of(value: &Val) -> u64 {
    match value {
        Val::I64(v) => *v as u64,
        Val::I32(v) => u64::from(*v as u32),
        _ => 0,
    }
}

/// What an instance was made of, and what it has.
#[derive(Debug, Clone)]
struct Made {
    module: Arc<Module>,
    imports: Vec<RealmImport>,
    exports: Vec<RealmExport>,
    spaces: Spaces,
    /// Those that can be in a table, by their indices.
    functions: HashMap<u32, FuncHandle>,
}

/// Numbers by index, for one new instance: imports first.
#[derive(Debug, Clone, Default)]
struct Spaces {
    memories: Vec<u32>,
    tables: HashMap<u32, u32>,
    globals: HashMap<u32, u32>,
    tags: HashMap<u32, u32>,
}

fn unknown(kind: &str, id: u32) -> Error {
    Error::internal(format_args!("a realm has no {kind} {id}"))
}

/// The index in the name of a hidden export, if it is one of that kind.
fn hidden_index(name: &str, prefix: &str, kind: char) -> Option<u32> {
    name.strip_prefix(prefix)?.strip_prefix(kind)?.parse().ok()
}

impl Replica {
    fn realm(&self) -> Result<MutexGuard<'_, Realm>> {
        let realm = self
            .realm_cell()
            .ok_or_else(|| Error::internal("an instance that is no realm"))?;
        Ok(realm.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// # Safety
    /// The calling thread holds the replica.
    unsafe fn in_realm<R>(
        &self,
        f: impl FnOnce(&mut StoreContextMut<'_, Guest>) -> Result<R>,
    ) -> Result<R> {
        self.touch();
        let run = |mut context: StoreContextMut<'_, Guest>| f(&mut context);
        // SAFETY: contract of this function.
        unsafe { self.with_context(run) }.unwrap_or_else(|| Err(self.stale()))
    }

    /// Makes an instance of a module in the realm and runs its start function. Answers what it offers, in
    /// the order of [`Module::exports`].
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::Link`] for what does not fit, [`ErrorCode::InvalidArgument`] for a limit; else however
    /// the start function ended. What was made stays in the realm, unreachable.
    pub unsafe fn realm_instantiate(
        &self,
        module: &Arc<Module>,
        imports: Vec<RealmImport>,
    ) -> Result<Vec<RealmExport>> {
        // SAFETY: contract of this function.
        unsafe { self.realm_instantiate_told(module, imports, |_| {}) }
    }

    /// The same; `before` is told what was made over a shared memory, before any of its code runs.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    unsafe fn realm_instantiate_told(
        &self,
        module: &Arc<Module>,
        imports: Vec<RealmImport>,
        before: impl FnOnce(&Made),
    ) -> Result<Vec<RealmExport>> {
        // SAFETY: contract of this function.
        unsafe {
            self.in_realm(|context| {
                let (instance, exports) = self.link_and_make(context, module, imports)?;
                let made = self.realm()?.shareable.last().cloned();
                if let Some(made) = made.filter(|_| module.has_shared_memory) {
                    before(&made);
                }
                self.refuel(context);
                self.start_in(&mut *context, module, &instance)
                    .map_err(|error| self.run_failed(context, error, "the start function"))?;
                Ok(exports)
            })
        }
    }

    fn link_and_make(
        &self,
        context: &mut StoreContextMut<'_, Guest>,
        module: &Arc<Module>,
        imports: Vec<RealmImport>,
    ) -> Result<(Instance, Vec<RealmExport>)> {
        if !wasmtime::Engine::same(context.engine(), &module.engine.wasmtime) {
            return Err(Error::new(
                ErrorCode::Link,
                format!(
                    "{} was compiled with other engine options than those of this realm; compile it with \
                     the WebAssembly object with which it is instantiated",
                    module.name()
                ),
            ));
        }
        if module.has_shared_memory && !self.module().engine.options.threads {
            let why = format!("{} has a shared memory; {NO_THREADS}", module.name());
            return Err(Error::new(ErrorCode::Link, why));
        }
        let mut realm = self.realm()?;
        let limits = realm.limits.clone();
        if module.defined_memories > 0 {
            limits.check_memory(module.name(), module.initial_memory_bytes)?;
        }
        let mut spaces = Spaces::default();
        let is_function = |import: &&Import| matches!(import.kind, ImportKind::Function(_));
        let guests: Vec<_> = imports
            .iter()
            .zip(module.imports())
            .filter(|(_, import)| is_function(import))
            .map(|(given, _)| match given {
                RealmImport::Guest(handle) => Some(*handle),
                _ => None,
            })
            .collect();
        let kept = module.has_shared_memory.then(|| imports.clone());
        let mut discards = Vec::new();
        let externs = resolve(
            context,
            &realm,
            module,
            imports,
            (&mut spaces, &mut discards),
        )?;
        // Its element segments are copied even where it cannot be made in the end.
        for id in spaces.tables.values() {
            if let Some(table) = realm.tables.get_mut(*id as usize) {
                table.is_changed = true;
            }
        }
        let interrupter = Arc::clone(self.interrupter());
        context.data_mut().forget_refusal();
        let (instance, created) = with_plan_and_poll(
            realm.plan(module.defined_memories, module.has_poll_memory),
            limits.memory_cap(),
            move |page| interrupter.add_poll(page),
            || Instance::new(&mut *context, &module.compiled, &externs),
        );
        let instance = instance.map_err(|error| self.making_failed(context, module, error))?;
        let named = |context: &mut StoreContextMut<'_, Guest>, name: &str| {
            let found = instance.get_export(&mut *context, name);
            found.ok_or_else(|| Error::internal(format_args!("the export {name:?} is lost")))
        };
        let lost = || Error::internal("an export of another kind");
        let state = &module.state;
        let own = state.memories.iter().skip(spaces.memories.len());
        for (name, record) in own.zip(created.guests) {
            let memory = AnyMemory::of(named(context, name)?).ok_or_else(lost)?;
            let id = realm.add_memory(memory, record, &*context);
            spaces.memories.push(id);
        }
        let memories = spaces.memories.iter();
        let memories = memories.filter_map(|id| realm.memories.get(*id as usize));
        let memories: Vec<_> = memories.map(|it| it.memory.clone()).collect();
        provide(&mut *context, &instance, state, &memories)?;
        if let Some(first) = spaces.memories.first()
            && let Some(memory) = realm.memories.get(*first as usize)
        {
            self.show_memory(&memory.record);
        }
        for name in &state.globals {
            let global = named(context, name)?.into_global().ok_or_else(lost)?;
            match hidden_index(name, &state.prefix, 'g') {
                Some(index) if spaces.globals.contains_key(&index) => {}
                Some(index) => {
                    let id = realm.add_global(global, &*context);
                    spaces.globals.insert(index, id);
                }
                None => realm.hidden.push(global),
            }
        }
        for table in &state.tables {
            let index = hidden_index(&table.name, &state.prefix, 't').ok_or_else(lost)?;
            let dirty = named(context, &table.dirty)?
                .into_global()
                .ok_or_else(lost)?;
            let size = match &table.size {
                Some(name) => Some(named(context, name)?.into_global().ok_or_else(lost)?),
                None => None,
            };
            let id = match spaces.tables.get(&index) {
                Some(id) => *id,
                None => {
                    let table = named(context, &table.name)?.into_table().ok_or_else(lost)?;
                    let id = realm.add_table(table, &*context);
                    spaces.tables.insert(index, id);
                    id
                }
            };
            let table = realm.tables.get_mut(id as usize).ok_or_else(lost)?;
            let len = table.len(&mut *context);
            table.watches.push(Watch { dirty, size });
            table.is_changed = true;
            table.set_len(&mut *context, len)?;
        }
        if let Some(why) = &state.unsupported {
            let refusal = || format!("{} {}", module.name(), why);
            realm.unsupported.get_or_insert_with(refusal);
        }
        for (index, name) in &state.imported_functions {
            if let Some(Some(original)) = guests.get(*index as usize) {
                let func = named(context, name)?.into_func().ok_or_else(lost)?;
                let address = func.to_raw(&mut *context) as usize;
                let original = realm
                    .originals
                    .get(&original.address)
                    .copied()
                    .unwrap_or(*original);
                realm.originals.insert(address, original);
            }
        }
        realm.can_catch |= module.has_tags;
        let mut exports = Vec::with_capacity(module.exports().len());
        for export in module.exports() {
            let Place { kind, index } = export.place;
            let known = match kind {
                ExternalKind::Memory => spaces.memories.get(index as usize),
                ExternalKind::Table => spaces.tables.get(&index),
                ExternalKind::Global => spaces.globals.get(&index),
                ExternalKind::Tag => spaces.tags.get(&index),
                _ => None,
            };
            if let Some(id) = known {
                exports.push(RealmExport::Item(*id));
                continue;
            }
            exports.push(match named(context, &export.name)? {
                Extern::Func(func) => {
                    let address = func.to_raw(&mut *context) as usize;
                    realm.indices.entry(address).or_insert(index);
                    let handle = FuncHandle {
                        func,
                        replica: self.id(),
                        address,
                    };
                    let value = Value::Func(Some(handle));
                    self.seen(&value, &mut *context);
                    RealmExport::Function(handle)
                }
                Extern::Table(table) => {
                    let id = realm.add_table(table, &*context);
                    spaces.tables.insert(index, id);
                    RealmExport::Item(id)
                }
                Extern::Global(global) => {
                    let id = realm.add_global(global, &*context);
                    spaces.globals.insert(index, id);
                    RealmExport::Item(id)
                }
                Extern::Tag(tag) => {
                    let id = realm.add_tag(tag);
                    spaces.tags.insert(index, id);
                    RealmExport::Item(id)
                }
                Extern::Memory(_) | Extern::SharedMemory(_) => return Err(lost()),
            });
        }
        for cell in discards {
            let memory = spaces.memories.first();
            let memory = memory.and_then(|id| realm.memories.get(*id as usize));
            if let Some(memory) = memory {
                let _ = cell.set(Arc::clone(&memory.record));
            }
        }
        if let Some(imports) = kept {
            let mut functions = HashMap::with_capacity(state.functions.len());
            for (index, name) in &state.functions {
                let func = named(context, name)?.into_func().ok_or_else(lost)?;
                let handle = FuncHandle {
                    func,
                    replica: self.id(),
                    address: func.to_raw(&mut *context) as usize,
                };
                self.seen(&Value::Func(Some(handle)), &mut *context);
                realm.indices.entry(handle.address).or_insert(*index);
                functions.insert(*index, handle);
            }
            realm.shareable.push(Made {
                module: Arc::clone(module),
                imports,
                exports: exports.clone(),
                spaces,
                functions,
            });
        }
        Ok((instance, exports))
    }

    fn making_failed(
        &self,
        context: &mut StoreContextMut<'_, Guest>,
        module: &Module,
        error: wasmtime::Error,
    ) -> Error {
        if let Some(why) = context.data_mut().take_refusal() {
            return Error::invalid(format!("{}: {why}", module.name()));
        }
        if error.is::<wasmtime::Trap>() {
            return self.triage(error, "the instantiation");
        }
        Error::not_instantiated(module.name(), &error)
    }

    /// The same function as the instance has it that defines it.
    pub fn realm_original(&self, handle: FuncHandle) -> FuncHandle {
        let Ok(realm) = self.realm() else {
            return handle;
        };
        realm
            .originals
            .get(&handle.address)
            .copied()
            .unwrap_or(handle)
    }

    /// The index of a function in the module that it came from, if that is known.
    pub fn realm_function_index(&self, handle: &FuncHandle) -> Option<u32> {
        let realm = self.realm().ok()?;
        realm.indices.get(&handle.address).copied()
    }
}

/// The type that the JS API calls so.
fn value_type(name: &str) -> Option<ValType> {
    Some(match name {
        "i32" => ValType::I32,
        "i64" => ValType::I64,
        "f32" => ValType::F32,
        "f64" => ValType::F64,
        "v128" => ValType::V128,
        "externref" => ValType::EXTERNREF,
        "funcref" | "anyfunc" => ValType::FUNCREF,
        "exnref" => ValType::Ref(RefType::new(true, HeapType::Exn)),
        _ => return None,
    })
}

/// What is given, as the engine takes it. Notes the numbers that it has.
fn resolve(
    context: &mut StoreContextMut<'_, Guest>,
    realm: &Realm,
    module: &Module,
    imports: Vec<RealmImport>,
    (spaces, discards): (&mut Spaces, &mut Vec<DiscardCell>),
) -> Result<Vec<Extern>> {
    let mut externs = Vec::with_capacity(imports.len());
    let mut counts = [0_u32; 3];
    let mut next = |kind: usize| {
        counts.get_mut(kind).map_or(0, |count| {
            *count += 1;
            *count - 1
        })
    };
    for (import, given) in module.imports().iter().zip(imports) {
        let wrong = || {
            Error::new(
                ErrorCode::Link,
                format!(
                    "import '{}'.'{}' must be {}",
                    import.module,
                    import.name,
                    import.kind.describe()
                ),
            )
        };
        externs.push(match (&import.ty, given) {
            (ExternType::Func(ty), RealmImport::Function(host)) => {
                host_function(&mut *context, ty.clone(), host).into()
            }
            (ExternType::Func(ty), RealmImport::Discard) => {
                let (host, cell) = discard_of();
                discards.push(cell);
                host_function(&mut *context, ty.clone(), host).into()
            }
            (ExternType::Func(_), RealmImport::Guest(handle)) => handle.func.into(),
            (ExternType::Memory(_), RealmImport::Item(id)) => {
                let memory = realm.memories.get(id as usize).ok_or_else(wrong)?;
                spaces.memories.push(id);
                memory.memory.clone().into()
            }
            (ExternType::Table(_), RealmImport::Item(id)) => {
                let table = realm.tables.get(id as usize).ok_or_else(wrong)?;
                spaces.tables.insert(next(0), id);
                table.table.into()
            }
            (ExternType::Global(_), RealmImport::Item(id)) => {
                let global = realm.globals.get(id as usize).ok_or_else(wrong)?;
                spaces.globals.insert(next(1), id);
                global.global.into()
            }
            (ExternType::Tag(_), RealmImport::Item(id)) => {
                let tag = realm.tags.get(id as usize).ok_or_else(wrong)?;
                spaces.tags.insert(next(2), id);
                (*tag).into()
            }
            _ => return Err(wrong()),
        });
    }
    if externs.len() < module.imports().len() {
        return Err(Error::internal("fewer imports than the module has"));
    }
    Ok(externs)
}
