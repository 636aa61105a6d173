//! Entering an instance, by each of the three rights to do so.
//!
//! The engine's own entry points are unsafe because it cannot see who holds an instance. Here the
//! right is a value that the caller must show.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::Arc;

use wasm_molt_engine::{
    ExportType, FuncHandle, GuestThread, HostCall, Inside, Job, Lease, LeaseInside, Manager,
    MemoryRecord, Module, RealmExport, RealmImport, Replica, Result, ThreadCall, Value, ValueType,
};

use crate::wait::{Answer, answer};

/// Calls an export from within a host function of the same instance.
pub fn call_again(call: &HostCall<'_>, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
    // SAFETY: a `HostCall` exists only while its host function runs, on the thread that holds the
    // instance; no test takes one elsewhere.
    unsafe { call_export(call.replica, name, args) }
}

/// Calls a function that came as a value, from within a host function of the same instance.
pub fn call_handle(call: &HostCall<'_>, func: &FuncHandle, args: Vec<Value>) -> Result<Vec<Value>> {
    assert_eq!(
        func.replica_id(),
        call.replica.id(),
        "a function of another instance"
    );
    // SAFETY: as above; the function is this instance's, as was just checked.
    unsafe { call.replica.call(func, args) }
}

/// Calls an export of a leased instance on the lease's own thread.
pub fn call_leased(inside: &LeaseInside, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
    // SAFETY: the guard is the proof that its thread has the instance for itself.
    unsafe { call_export(inside.replica(), name, args) }
}

/// Calls an export of a leased instance in a hook, on the hook's own thread.
pub fn ask(lease: &Arc<Lease>, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
    call_leased(&lease.enter()?, name, args)
}

/// # Safety
/// The calling thread holds the replica.
unsafe fn call_export(replica: &Replica, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
    let index = replica.module().function_index(name)?;
    let func = replica.function(index).ok_or_else(|| replica.stale())?;
    // SAFETY: contract of this function; the function is the replica's own.
    unsafe { replica.call(&func, args) }
}

/// Calls an export of the instance in slot 0 on the home thread.
pub(crate) fn call_at_home(
    _inside: &Inside<'_, Job>,
    replica: &Replica,
    name: &str,
    args: Vec<Value>,
) -> Result<Vec<Value>> {
    assert_eq!(replica.slot(), 0, "only slot 0 has a home");
    // SAFETY: the guard is the proof that this thread is inside slot 0, and its only caller shows the
    // instance that it found there after it had entered.
    unsafe { call_export(replica, name, args) }
}

/// Starts a native thread of the guest in slot 0, on the home thread; and how it ended.
pub(crate) fn spawn_at_home(
    _inside: &Inside<'_, Job>,
    manager: &Manager,
    replica: &Arc<Replica>,
    calls: Vec<ThreadCall>,
) -> Result<(GuestThread, Answer<Result<bool>>)> {
    assert_eq!(replica.slot(), 0, "only slot 0 has a home");
    let (done, ended) = answer("a guest thread");
    // SAFETY: as for `call_at_home`.
    let thread = unsafe { manager.spawn(replica, calls, Box::new(done)) }?;
    Ok((thread, ended))
}

/// This thread is inside a realm, where the host makes what it likes.
#[derive(Debug)]
pub struct InRealm<'a> {
    replica: &'a Replica,
    timeout_ms: Option<u64>,
    /// The right to be inside is this thread's.
    thread: PhantomData<*const ()>,
}

impl<'a> InRealm<'a> {
    fn new(replica: &'a Replica, timeout_ms: Option<u64>) -> Self {
        assert!(replica.is_realm(), "the manager was not made as a realm");
        Self {
            replica,
            timeout_ms,
            thread: PhantomData,
        }
    }

    /// On the home thread; each entry may take so long.
    pub(crate) fn at_home(
        _inside: &'a Inside<'_, Job>,
        replica: &'a Replica,
        timeout_ms: Option<u64>,
    ) -> Self {
        assert_eq!(replica.slot(), 0, "only slot 0 has a home");
        Self::new(replica, timeout_ms)
    }

    /// From within a host function of the realm.
    pub fn again(call: &'a HostCall<'_>) -> Self {
        Self::new(call.replica, None)
    }

    /// In a lease, as hooks have it.
    pub fn leased(inside: &'a LeaseInside) -> Self {
        Self::new(inside.replica(), None)
    }

    /// The realm itself, for what any thread may ask.
    pub fn replica(&self) -> &'a Replica {
        self.replica
    }

    fn timed<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        match self.timeout_ms {
            Some(ms) => self.replica.with_deadline(ms, f)?,
            None => f(),
        }
    }

    /// Makes an instance.
    pub fn instantiate(&self, module: &Arc<Module>, imports: Vec<RealmImport>) -> Result<Made> {
        // SAFETY: that there is an `InRealm` is the proof that this thread is inside; so it is below.
        let exports = self.timed(|| unsafe { self.replica.realm_instantiate(module, imports) })?;
        let named = module.exports().iter().zip(exports);
        let named = named.map(|(it, export)| (it.name.clone(), (export, it.ty.clone())));
        Ok(Made(named.collect()))
    }

    /// Calls a function of the realm.
    pub fn call(&self, func: &FuncHandle, args: &[Value]) -> Result<Vec<Value>> {
        let home = self.replica.id();
        assert_eq!(func.replica_id(), home, "a function of another instance");
        // SAFETY: as above; the function is the realm's own, as was just checked.
        self.timed(|| unsafe { self.replica.call(func, args.to_vec()) })
    }

    /// A new memory, in pages.
    pub fn memory(&self, initial: u64, maximum: Option<u64>, is_64: bool) -> Result<u32> {
        // SAFETY: as above.
        unsafe {
            self.replica
                .realm_memory_new(initial, maximum, (false, is_64))
        }
    }

    /// A new memory that threads share, in pages.
    pub fn shared_memory(&self, initial: u64, maximum: u64) -> Result<u32> {
        // SAFETY: as above.
        unsafe {
            self.replica
                .realm_memory_new(initial, Some(maximum), (true, false))
        }
    }

    /// Grows a memory by pages.
    pub fn grow_memory(&self, memory: u32, delta: u64) -> Result<Option<u64>> {
        // SAFETY: as above.
        unsafe { self.replica.realm_memory_grow(memory, delta) }
    }

    /// What the host knows of a memory.
    #[track_caller]
    pub fn record(&self, memory: u32) -> Arc<MemoryRecord> {
        match self.replica.realm_memory(memory) {
            Ok(record) => record,
            Err(error) => panic!("{error}"),
        }
    }

    /// A new table, with sizes and whether its indices are 64-bit.
    pub fn table(
        &self,
        element: ValueType,
        sizes: (u64, Option<u64>, bool),
        value: Value,
    ) -> Result<u32> {
        // SAFETY: as above.
        unsafe { self.replica.realm_table_new(element, sizes, value) }
    }

    /// How many elements a table has.
    #[track_caller]
    pub fn table_len(&self, table: u32) -> u64 {
        // SAFETY: as above.
        match unsafe { self.replica.realm_table_len(table) } {
            Ok(len) => len,
            Err(error) => panic!("{error}"),
        }
    }

    /// An element.
    pub fn element(&self, table: u32, index: u64) -> Result<Option<Value>> {
        // SAFETY: as above.
        unsafe { self.replica.realm_table_get(table, index) }
    }

    /// Writes an element.
    pub fn set_element(&self, table: u32, index: u64, value: Value) -> Result<bool> {
        // SAFETY: as above.
        unsafe { self.replica.realm_table_set(table, index, value) }
    }

    /// Grows a table.
    pub fn grow_table(&self, table: u32, delta: u64, value: Value) -> Result<Option<u64>> {
        // SAFETY: as above.
        unsafe { self.replica.realm_table_grow(table, delta, value) }
    }

    /// The type of a table.
    pub fn table_type(&self, table: u32) -> Result<ExportType> {
        // SAFETY: as above.
        unsafe { self.replica.realm_table_type(table) }
    }

    /// A new global.
    pub fn global(&self, ty: &str, is_mutable: bool, value: Option<Value>) -> Result<u32> {
        // SAFETY: as above.
        unsafe { self.replica.realm_global_new(ty, is_mutable, value) }
    }

    /// The value of a global.
    pub fn read_global(&self, global: u32) -> Result<Option<Value>> {
        // SAFETY: as above.
        unsafe { self.replica.realm_global_get(global) }
    }

    /// Writes a global.
    pub fn write_global(&self, global: u32, value: Value) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.replica.realm_global_set(global, value) }
    }

    /// A new tag.
    pub fn tag(&self, params: &[&str]) -> Result<u32> {
        let params: Vec<_> = params.iter().map(|&name| name.to_owned()).collect();
        // SAFETY: as above.
        unsafe { self.replica.realm_tag_new(&params) }
    }

    /// The types of a tag's parameters.
    pub fn tag_type(&self, tag: u32) -> Result<(Vec<ValueType>, ExportType)> {
        // SAFETY: as above.
        unsafe { self.replica.realm_tag_type(tag) }
    }
}

/// An instance in a realm: what it offers, by name.
#[derive(Debug, Clone, Default)]
pub struct Made(HashMap<String, (RealmExport, ExportType)>);

impl Made {
    /// Whatever has that name.
    pub fn get(&self, name: &str) -> Option<RealmExport> {
        self.0.get(name).map(|(export, _)| *export)
    }

    /// The type that the module says it has.
    pub fn ty(&self, name: &str) -> Option<&ExportType> {
        self.0.get(name).map(|(_, ty)| ty)
    }

    /// The function of that name.
    #[track_caller]
    pub fn func(&self, name: &str) -> FuncHandle {
        match self.get(name) {
            Some(RealmExport::Function(func)) => func,
            other => panic!("a function '{name}' was expected, not {other:?}"),
        }
    }

    /// The number of the memory, table, global or tag of that name.
    #[track_caller]
    pub fn item(&self, name: &str) -> u32 {
        match self.get(name) {
            Some(RealmExport::Item(id)) => id,
            other => panic!("a thing '{name}' was expected, not {other:?}"),
        }
    }
}
