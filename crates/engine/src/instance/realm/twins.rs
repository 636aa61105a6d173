//! Instances of a realm on other threads: each has a store of its own, a *twin*, over the same shared
//! memories.
//!
//! Host functions of the guest know one instance, the realm's. While they answer a twin, what they name
//! has to be the twin's: functions, tables and globals are translated here, by what the two have at the
//! same index.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};

use super::{Made, RealmExport, RealmImport};
use crate::error::{Error, ErrorCode, Result};
use crate::instance::host::HostFunction;
use crate::instance::memory::{AnyMemory, MemoryRecord};
use crate::instance::module::{ExportType, ImportKind};
use crate::instance::replica::{Guest, Replica};
use crate::instance::value::{FuncHandle, Value, ValueType};
use wasmtime::StoreContextMut;

/// What a twin is to be made of.
pub(crate) struct Sketch {
    made: Made,
    imports: Vec<TwinImport>,
}

impl std::fmt::Debug for Sketch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sketch").finish_non_exhaustive()
    }
}

/// One of its imports.
enum TwinImport {
    Function(Arc<dyn HostFunction>),
    Discard,
    Memory(AnyMemory, Arc<MemoryRecord>),
    /// Each thread has tables and globals of its own, as each worker has.
    Table(ValueType, u64, Option<u64>, bool),
    Global(&'static str, bool, Value),
    Tag(Vec<&'static str>),
}

impl TwinImport {
    /// # Safety
    /// The calling thread holds `twin`.
    unsafe fn make(self, twin: &Replica) -> Result<RealmImport> {
        // SAFETY: contract of this function, for each of these.
        let id = unsafe {
            match self {
                Self::Function(host) => return Ok(RealmImport::Function(host)),
                Self::Discard => return Ok(RealmImport::Discard),
                Self::Memory(memory, record) => twin.realm_memory_of(memory, record),
                Self::Table(element, initial, maximum, is_64) => {
                    let null = Value::default_of(element);
                    twin.realm_table_new(element, (initial, maximum, is_64), null)
                }
                Self::Global(ty, is_mutable, value) => {
                    twin.realm_global_new(ty, is_mutable, Some(value))
                }
                Self::Tag(params) => {
                    let params: Vec<_> = params.into_iter().map(str::to_owned).collect();
                    twin.realm_tag_new(&params)
                }
            }
        };
        id.map(RealmImport::Item)
    }
}

/// How a twin's things are called in the realm whose guest it runs, and the other way round.
#[derive(Debug)]
pub(crate) struct Twin {
    pub(crate) home: Weak<Replica>,
    /// Before any of its code runs.
    names: OnceLock<Names>,
}

#[derive(Debug, Default)]
struct Names {
    own: HashMap<usize, FuncHandle>,
    homes: HashMap<usize, FuncHandle>,
    tables: HashMap<u32, u32>,
    globals: HashMap<u32, u32>,
}

impl Twin {
    pub(crate) fn new(home: Weak<Replica>) -> Self {
        Self {
            home,
            names: OnceLock::new(),
        }
    }

    /// The twin's function for one of the realm's.
    pub(crate) fn function(&self, func: &FuncHandle) -> Option<FuncHandle> {
        self.names.get()?.own.get(&func.address).copied()
    }

    /// The realm's function for one of the twin's.
    pub(crate) fn home_function(&self, func: &FuncHandle) -> Option<FuncHandle> {
        self.names.get()?.homes.get(&func.address).copied()
    }

    pub(crate) fn table(&self, id: u32) -> Option<u32> {
        self.names.get()?.tables.get(&id).copied()
    }

    pub(crate) fn global(&self, id: u32) -> Option<u32> {
        self.names.get()?.globals.get(&id).copied()
    }
}

impl Sketch {
    /// At which place among the exports a function is.
    pub(crate) fn position(&self, func: &FuncHandle) -> Option<usize> {
        let is_it = |export: &RealmExport| matches!(export, RealmExport::Function(it) if it.address == func.address);
        self.made.exports.iter().position(is_it)
    }

    /// Makes the instance in a fresh realm, and tells what belongs together. Its exports, in order.
    ///
    /// # Safety
    /// The calling thread holds `twin`.
    pub(crate) unsafe fn make(self, twin: &Replica) -> Result<Vec<RealmExport>> {
        let mut imports = Vec::with_capacity(self.imports.len());
        for import in self.imports {
            // SAFETY: contract of this function.
            imports.push(unsafe { import.make(twin) }?);
        }
        let before = |own: &Made| {
            if let Some(known) = twin.twin().get() {
                let _ = known.names.set(self.made.names(own));
            }
        };
        // SAFETY: contract of this function.
        unsafe { twin.realm_instantiate_told(&self.made.module, imports, before) }
    }
}

impl Made {
    /// What is at the same places here and there.
    fn names(&self, own: &Self) -> Names {
        let pair = |homes: &HashMap<u32, u32>, own: &HashMap<u32, u32>| {
            let both = homes
                .iter()
                .filter_map(|(index, home)| Some((*home, *own.get(index)?)));
            both.collect()
        };
        let mut names = Names {
            tables: pair(&self.spaces.tables, &own.spaces.tables),
            globals: pair(&self.spaces.globals, &own.spaces.globals),
            ..Names::default()
        };
        let exported = self.exports.iter().zip(&own.exports);
        let exported = exported.filter_map(|both| match both {
            (RealmExport::Function(home), RealmExport::Function(own)) => Some((*home, *own)),
            _ => None,
        });
        let in_tables = self.functions.iter();
        let in_tables =
            in_tables.filter_map(|(index, home)| Some((*home, *own.functions.get(index)?)));
        for (home, own) in exported.chain(in_tables) {
            names.own.insert(home.address, own);
            names.homes.insert(own.address, home);
        }
        names
    }
}

impl Replica {
    /// What one more thread needs to run the guest whose export that is.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for a function that no instance over a shared memory exports, and
    /// [`ErrorCode::Link`] for an instance whose imports only exist in this store.
    pub(crate) unsafe fn sketch(&self, func: &FuncHandle) -> Result<Sketch> {
        let made = {
            let realm = self.realm()?;
            let exports = |made: &&Made| {
                let mut all = made.exports.iter();
                all.any(|it| matches!(it, RealmExport::Function(it) if it.address == func.address))
            };
            realm.shareable.iter().rev().find(exports).cloned()
        };
        let made = made.ok_or_else(|| {
            Error::invalid(
                "only functions that an instance over a shared memory exports can run on a thread of their own",
            )
        })?;
        if made.module.defines_shared_memory {
            return Err(Error::new(
                ErrorCode::Link,
                format!(
                    "{} cannot run on another thread: it defines its shared memory, and so would each thread; \
                     build it to import it (--import-memory)",
                    made.module.name()
                ),
            ));
        }
        let mut imports = Vec::with_capacity(made.imports.len());
        for (import, given) in made.module.imports().iter().zip(&made.imports) {
            let refuse = |why: &str| {
                Error::new(
                    ErrorCode::Link,
                    format!(
                        "{} cannot run on another thread: its import '{}'.'{}' is {why}",
                        made.module.name(),
                        import.module,
                        import.name
                    ),
                )
            };
            imports.push(match (given, &import.kind) {
                (RealmImport::Function(host), _) => TwinImport::Function(Arc::clone(host)),
                (RealmImport::Discard, _) => TwinImport::Discard,
                (RealmImport::Guest(_), _) => {
                    return Err(refuse(
                        "a function of another instance, which belongs to this thread",
                    ));
                }
                (RealmImport::Item(id), ImportKind::Memory { .. }) => {
                    let realm = self.realm()?;
                    let memory = realm.memories.get(*id as usize);
                    let memory = memory.filter(|it| it.memory.shared().is_some());
                    let memory = memory.ok_or_else(|| refuse("a memory that is not shared"))?;
                    TwinImport::Memory(memory.memory.clone(), Arc::clone(&memory.record))
                }
                // SAFETY: contract of this function, for each of these.
                (RealmImport::Item(id), _) => unsafe { self.sketch_item(*id, import) }?,
            });
        }
        Ok(Sketch { made, imports })
    }

    /// # Safety
    /// The calling thread holds the replica.
    unsafe fn sketch_item(
        &self,
        id: u32,
        import: &crate::instance::module::Import,
    ) -> Result<TwinImport> {
        // SAFETY: contract of this function, for each of these.
        unsafe {
            match &import.kind {
                ImportKind::Table { .. } => {
                    let element = self.realm_table_element(id)?;
                    let ExportType::Table {
                        minimum,
                        maximum,
                        is_64,
                        ..
                    } = self.realm_table_type(id)?
                    else {
                        return Err(Error::internal("a table of another type"));
                    };
                    Ok(TwinImport::Table(element, minimum, maximum, is_64))
                }
                ImportKind::Global { .. } => {
                    let (content, ty) = self.realm_global_type(id)?;
                    let ExportType::Global { ty, mutable } = ty else {
                        return Err(Error::internal("a global of another type"));
                    };
                    let value = match self.realm_global_get(id)? {
                        // A reference is of this store.
                        Some(Value::Func(_) | Value::Export { .. }) | None => {
                            Value::default_of(content)
                        }
                        Some(other) => other,
                    };
                    Ok(TwinImport::Global(ty, mutable, value))
                }
                _ => {
                    let (_, ty) = self.realm_tag_type(id)?;
                    match ty {
                        ExportType::Tag(params) => Ok(TwinImport::Tag(params)),
                        _ => Err(Error::internal("a tag of another type")),
                    }
                }
            }
        }
    }

    /// A shared memory of another store, as a memory of this realm.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    unsafe fn realm_memory_of(&self, memory: AnyMemory, record: Arc<MemoryRecord>) -> Result<u32> {
        let add = |context: &mut StoreContextMut<'_, Guest>| {
            Ok(self.realm()?.add_memory(memory, record, &*context))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(add) }
    }
}
