//! What an instance holds, read out and put back: memories, globals, tables.
//!
//! [`Reach`] are the handles with which one instance's state is reached (the module was prepared for
//! that, see [`crate::instance::instrument`]); [`Captured`] is that state by itself, in no store: it can be put
//! back into the instance that it was read from, into another one of the same module, or be what a new
//! instance begins with. A function in it is named by its index in the module; a value of the host is
//! the very value.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use wasmtime::{
    AsContextMut, Extern, ExternRef, Func, Global, Instance, Ref, RootScope, Table, Val,
};

use crate::error::{Error, ErrorCode, Result};
use crate::instance::instrument::StateMap;
use crate::instance::memory::{AnyMemory, Image, MemoryRecord};
use crate::instance::module::Module;
use crate::instance::realm::RealmState;
use crate::instance::replica::all_memories;
use crate::instance::value::HostRef;

/// The state of one instance at one moment.
#[derive(Debug)]
pub(crate) struct Captured {
    /// In index order, like all of this.
    pub(crate) memories: Vec<Arc<Image>>,
    globals: Vec<Saved>,
    pub(crate) tables: Vec<Arc<SavedTable>>,
    /// How many values of the host are in its tables.
    pub(crate) externs: u64,
    /// What the host has made in its store, whose memories are the last ones.
    pub(crate) realm: Option<RealmState>,
}

/// A value in no store.
#[derive(Debug, Clone)]
enum Saved {
    I32(i32),
    I64(i64),
    F32(u32),
    F64(u64),
    V128(u128),
    Ref(SavedRef),
}

#[derive(Debug, Clone)]
enum SavedRef {
    NullFunc,
    /// By its index in the module.
    Func(u32),
    NullExtern,
    Extern(HostRef),
}

/// The elements of a table that code can change.
#[derive(Debug)]
pub(crate) struct SavedTable {
    elements: Vec<SavedRef>,
    /// They are what instantiation puts there.
    is_initial: bool,
}

impl Captured {
    /// Bytes of linear memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.memories.iter().map(|image| image.byte_len()).sum()
    }

    /// The same, and what the host has made in the store.
    pub(crate) fn with_realm(mut self, realm: RealmState, images: Vec<Arc<Image>>) -> Self {
        self.externs += realm.externs;
        self.realm = Some(realm);
        self.memories.extend(images);
        self
    }

    /// Bytes of pages that are held for it.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.memories
            .iter()
            .map(|image| image.resident_bytes())
            .sum()
    }

    /// Of the largest memory in it.
    pub(crate) fn largest_memory_bytes(&self) -> u64 {
        let sizes = self.memories.iter().map(|image| image.byte_len() as u64);
        sizes.max().unwrap_or(0)
    }

    /// Why a manager of its own cannot begin with this, if so: what belongs to the objects of the parent
    /// would be shared with it behind both their backs.
    pub(crate) fn fork_refusal(&self) -> Option<&'static str> {
        const EXTERN: &str = "it holds values of the host (externref), which a copy cannot share";
        const FUNC: &str = "it has changed its functions (funcref) in a table or global, which belong to the instance";
        if self.realm.is_some() {
            return Some("it is JavaScript's as well, which cannot be copied");
        }
        let refuses = |value: &SavedRef| match value {
            SavedRef::Extern(_) => Some(EXTERN),
            SavedRef::Func(_) => Some(FUNC),
            SavedRef::NullFunc | SavedRef::NullExtern => None,
        };
        let changed = self.tables.iter().filter(|table| !table.is_initial);
        let in_tables = changed.flat_map(|table| &table.elements).find_map(refuses);
        in_tables.or_else(|| {
            self.globals.iter().find_map(|global| match global {
                Saved::Ref(value) => refuses(value),
                _ => None,
            })
        })
    }
}

/// A table that code can change.
#[derive(Debug)]
struct ReachTable {
    table: Table,
    /// Not 0 once the code may have changed it.
    dirty: Global,
    /// Holds its size, where that can be less than what the engine has.
    size: Option<Global>,
}

/// Functions of one instance by their index, and the other way round.
#[derive(Debug)]
struct Functions {
    funcs: HashMap<u32, Func>,
    indices: HashMap<usize, u32>,
}

/// The handles of one instance's state.
#[derive(Debug)]
pub(crate) struct Reach {
    instance: Instance,
    memories: Vec<AnyMemory>,
    globals: Vec<Global>,
    tables: Vec<ReachTable>,
    functions: OnceLock<Functions>,
}

/// The error of a module or an instance that cannot be captured.
pub(crate) fn unsupported(name: &str, why: &str) -> Error {
    Error::new(
        ErrorCode::SnapshotUnsupported,
        format!(
            "{name} cannot be captured: {why}; carry its state over with saveState and restoreState"
        ),
    )
}

impl Reach {
    /// The handles of a fresh instance. Empty for a module that cannot be captured.
    pub(crate) fn find(
        mut store: impl AsContextMut,
        instance: Instance,
        map: &StateMap,
    ) -> Result<Self> {
        let mut reach = Self {
            instance,
            memories: Vec::new(),
            globals: Vec::new(),
            tables: Vec::new(),
            functions: OnceLock::new(),
        };
        for table in &map.tables {
            let found = export(&mut store, &instance, &table.name)?
                .into_table()
                .ok_or_else(|| lost(&table.name))?;
            let size = match &table.size {
                Some(name) => Some(global(&mut store, &instance, name)?),
                None => None,
            };
            let dirty = global(&mut store, &instance, &table.dirty)?;
            reach.tables.push(ReachTable {
                table: found,
                dirty,
                size,
            });
        }
        if map.unsupported.is_some() {
            return Ok(reach);
        }
        reach.memories = all_memories(&mut store, &instance, map)?;
        for name in &map.globals {
            reach.globals.push(global(&mut store, &instance, name)?);
        }
        Ok(reach)
    }

    /// There are tables that the guest's code can change.
    pub(crate) fn has_tables(&self) -> bool {
        !self.tables.is_empty()
    }

    /// A table that the host has made may begin larger than the module declares.
    pub(crate) fn size_tables(&self, mut store: impl AsContextMut) -> Result<()> {
        for each in &self.tables {
            if let Some(size) = &each.size {
                let now = each.table.size(&store);
                set_size(&mut store, size, now)?;
            }
        }
        Ok(())
    }

    /// Reads the state out. The guest does not run.
    ///
    /// * `known`: the tables as they were when their flags were last cleared.
    /// * `most`: bytes of memory that may have to be looked at; beyond, it is [`ErrorCode::Busy`].
    /// * `allows_readers`: the host cannot write through a view meanwhile; else, where there is one, it is
    ///   [`ErrorCode::Busy`].
    pub(crate) fn capture(
        &self,
        mut store: impl AsContextMut,
        module: &Module,
        records: &[Arc<MemoryRecord>],
        known: Option<&[Arc<SavedTable>]>,
        (most, allows_readers): (usize, bool),
    ) -> Result<Captured> {
        let map = &module.state;
        if let Some(why) = &map.unsupported {
            return Err(unsupported(module.name(), why));
        }
        // What can be refused comes first: capturing a memory changes how its pages are held.
        let mut globals = Vec::with_capacity(self.globals.len());
        {
            let mut scope = RootScope::new(&mut store);
            for global in &self.globals {
                let value = global.get(&mut scope);
                globals.push(self.save(&mut scope, module, value)?);
            }
        }
        let mut tables = Vec::with_capacity(self.tables.len());
        for (index, each) in self.tables.iter().enumerate() {
            let before = known.and_then(|known| known.get(index));
            let is_clean = matches!(each.dirty.get(&mut store), Val::I32(0));
            tables.push(match before {
                Some(before) if is_clean => Arc::clone(before),
                _ => {
                    let is_initial = is_clean && known.is_none();
                    Arc::new(self.save_table(&mut store, module, each, is_initial)?)
                }
            });
        }
        let mut memories = Vec::with_capacity(records.len());
        for record in records {
            let image = record.capture_within(most, allows_readers);
            memories.push(image.map_err(|e| out_of_memory(module.name(), &e))?);
        }
        // Last of all: what fails must not leave tables looking as they were at an earlier capture.
        for each in &self.tables {
            each.dirty
                .set(&mut store, Val::I32(0))
                .map_err(Error::internal)?;
        }
        let is_extern = |value: &&SavedRef| matches!(value, SavedRef::Extern(_));
        let in_tables = tables.iter().flat_map(|table| &table.elements);
        let externs = in_tables.filter(is_extern).count() as u64;
        Ok(Captured {
            memories,
            globals,
            tables,
            externs,
            realm: None,
        })
    }

    /// Puts the state back into this instance, or into another one of the module. The guest does not
    /// run. Returns how many bytes of memory had been dirty, if that is `counted`.
    ///
    /// * `known`: the tables as they were when their flags were last cleared.
    ///
    /// After an error the instance is in an unknown state.
    pub(crate) fn put_back(
        &self,
        mut store: impl AsContextMut,
        module: &Module,
        records: &[Arc<MemoryRecord>],
        captured: &Captured,
        (known, counted): (Option<&[Arc<SavedTable>]>, bool),
    ) -> Result<usize> {
        let mut dirty_bytes = 0;
        for ((memory, record), image) in self.memories.iter().zip(records).zip(&captured.memories) {
            let outcome = if counted {
                record.reset(image)
            } else {
                record.reset_uncounted(image).map(|()| 0)
            };
            dirty_bytes += outcome.map_err(|e| out_of_memory(module.name(), &e))?;
            // Compiled code has the size, and the address, in a place of its own; this refreshes it.
            memory.grow(&mut store, 0).map_err(Error::internal)?;
        }
        self.put_rest_back(&mut store, module, captured, known)?;
        Ok(dirty_bytes)
    }

    /// Globals and tables; the memories are made with what they hold.
    pub(crate) fn put_rest_back(
        &self,
        mut store: impl AsContextMut,
        module: &Module,
        captured: &Captured,
        known: Option<&[Arc<SavedTable>]>,
    ) -> Result<()> {
        for (global, saved) in self.globals.iter().zip(&captured.globals) {
            match saved {
                Saved::Ref(value) => {
                    let mut scope = RootScope::new(&mut store);
                    let value = self.load(&mut scope, module, value)?;
                    global.set(&mut scope, value.into())
                }
                Saved::I32(v) => global.set(&mut store, Val::I32(*v)),
                Saved::I64(v) => global.set(&mut store, Val::I64(*v)),
                Saved::F32(v) => global.set(&mut store, Val::F32(*v)),
                Saved::F64(v) => global.set(&mut store, Val::F64(*v)),
                Saved::V128(v) => global.set(&mut store, Val::V128((*v).into())),
            }
            .map_err(Error::internal)?;
        }
        for (index, (each, saved)) in self.tables.iter().zip(&captured.tables).enumerate() {
            let is_clean = matches!(each.dirty.get(&mut store), Val::I32(0));
            let is_same = match known.and_then(|known| known.get(index)) {
                Some(before) => Arc::ptr_eq(before, saved),
                // Never captured and never put back: as instantiation left it.
                None => saved.is_initial,
            };
            // An imported one may begin smaller than it was.
            let fits = each.table.size(&store) >= saved.elements.len() as u64;
            if !(is_clean && is_same && fits) {
                self.load_table(&mut store, module, each, saved)?;
            }
        }
        Ok(())
    }

    fn save_table(
        &self,
        mut store: impl AsContextMut,
        module: &Module,
        each: &ReachTable,
        is_initial: bool,
    ) -> Result<SavedTable> {
        let len = match &each.size {
            Some(size) => match size.get(&mut store) {
                Val::I64(len) => len as u64,
                Val::I32(len) => u64::from(len as u32),
                _ => return Err(Error::internal("the size of a table is no number")),
            },
            None => each.table.size(&store),
        };
        let mut elements = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        for index in 0..len {
            let mut scope = RootScope::new(&mut store);
            let value = each.table.get(&mut scope, index);
            let value = value.ok_or_else(|| Error::internal("a table is shorter than it says"))?;
            elements.push(self.save_ref(&mut scope, module, value)?);
        }
        Ok(SavedTable {
            elements,
            is_initial,
        })
    }

    fn load_table(
        &self,
        mut store: impl AsContextMut,
        module: &Module,
        each: &ReachTable,
        saved: &SavedTable,
    ) -> Result<()> {
        let table = &each.table;
        let len = saved.elements.len() as u64;
        let real = table.size(&store);
        let null = null_of(table, &store);
        if real < len {
            let missing = len - real;
            table
                .grow(&mut store, missing, null.clone())
                .map_err(Error::internal)?;
        }
        for (index, saved) in (0..).zip(&saved.elements) {
            let mut scope = RootScope::new(&mut store);
            let value = self.load(&mut scope, module, saved)?;
            table
                .set(&mut scope, index, value)
                .map_err(Error::internal)?;
        }
        if real > len {
            // Beyond its size nothing is kept alive.
            table
                .fill(&mut store, len, null, real - len)
                .map_err(Error::internal)?;
        }
        each.dirty
            .set(&mut store, Val::I32(0))
            .map_err(Error::internal)
    }

    fn save(&self, mut store: impl AsContextMut, module: &Module, value: Val) -> Result<Saved> {
        Ok(match value {
            Val::I32(v) => Saved::I32(v),
            Val::I64(v) => Saved::I64(v),
            Val::F32(v) => Saved::F32(v),
            Val::F64(v) => Saved::F64(v),
            Val::V128(v) => Saved::V128(v.as_u128()),
            other => {
                let value = other.ref_();
                let value = value.ok_or_else(|| Error::internal("a value of no known type"))?;
                Saved::Ref(self.save_ref(&mut store, module, value)?)
            }
        })
    }

    fn save_ref(
        &self,
        mut store: impl AsContextMut,
        module: &Module,
        value: Ref,
    ) -> Result<SavedRef> {
        let refuse = |why: &str| unsupported(module.name(), why);
        Ok(match value {
            Ref::Func(None) => SavedRef::NullFunc,
            Ref::Func(Some(func)) => {
                let address = func.to_raw(store.as_context_mut()) as usize;
                let functions = self.functions(&mut store, module)?;
                let index = functions.indices.get(&address).copied();
                SavedRef::Func(index.ok_or_else(|| {
                    refuse("a table or global holds a function that is not of this module")
                })?)
            }
            Ref::Extern(None) => SavedRef::NullExtern,
            Ref::Extern(Some(held)) => {
                let data = held.data(&store).map_err(Error::internal)?;
                let value = data.and_then(|any| any.downcast_ref::<HostRef>()).cloned();
                SavedRef::Extern(value.ok_or_else(|| {
                    refuse("a table or global holds a garbage-collected object as externref")
                })?)
            }
            _ => return Err(refuse("a table or global holds a garbage-collected object")),
        })
    }

    fn load(&self, mut store: impl AsContextMut, module: &Module, value: &SavedRef) -> Result<Ref> {
        Ok(match value {
            SavedRef::NullFunc => Ref::Func(None),
            SavedRef::Func(index) => {
                let functions = self.functions(&mut store, module)?;
                let func = functions.funcs.get(index).copied();
                Ref::Func(Some(func.ok_or_else(|| {
                    Error::internal("a function that the instance does not have")
                })?))
            }
            SavedRef::NullExtern => Ref::Extern(None),
            SavedRef::Extern(value) => {
                let held = ExternRef::new(&mut store, value.clone()).map_err(|e| {
                    Error::new(
                        ErrorCode::Internal,
                        format!("an externref could not be made: {e}"),
                    )
                })?;
                Ref::Extern(Some(held))
            }
        })
    }

    fn functions(&self, mut store: impl AsContextMut, module: &Module) -> Result<&Functions> {
        if let Some(functions) = self.functions.get() {
            return Ok(functions);
        }
        let mut funcs = HashMap::new();
        let mut indices = HashMap::new();
        for (index, name) in &module.state.functions {
            let func = export(&mut store, &self.instance, name)?.into_func();
            let func = func.ok_or_else(|| lost(name))?;
            indices.insert(func.to_raw(store.as_context_mut()) as usize, *index);
            funcs.insert(*index, func);
        }
        Ok(self.functions.get_or_init(|| Functions { funcs, indices }))
    }
}

pub(crate) fn set_size(mut store: impl AsContextMut, size: &Global, to: u64) -> Result<()> {
    let value = match size.get(&mut store) {
        Val::I64(_) => Val::I64(to as i64),
        _ => Val::I32(to as i32),
    };
    size.set(&mut store, value).map_err(Error::internal)
}

fn null_of(table: &Table, store: impl wasmtime::AsContext) -> Ref {
    Ref::null(table.ty(&store).element().heap_type())
}

fn export(mut store: impl AsContextMut, instance: &Instance, name: &str) -> Result<Extern> {
    let found = instance.get_export(store.as_context_mut(), name);
    found.ok_or_else(|| lost(name))
}

fn global(store: impl AsContextMut, instance: &Instance, name: &str) -> Result<Global> {
    let found = export(store, instance, name)?.into_global();
    found.ok_or_else(|| lost(name))
}

fn lost(name: &str) -> Error {
    Error::internal(format_args!(
        "the prepared module has lost its export {name:?}"
    ))
}

pub(crate) fn out_of_memory(name: &str, error: &std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::WouldBlock {
        return Error::new(ErrorCode::Busy, format!("capturing {name} takes long"));
    }
    Error::new(
        ErrorCode::Internal,
        format!(
            "the memory of {name} could not be captured or put back: {error}; free memory, address space \
             or file descriptors, and try again"
        ),
    )
}
