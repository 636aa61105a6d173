//! WebAssembly instances that can be replaced under load: wasmtime, linear memories, the pool, the manager.
//!
//! No Node here: whoever embeds this gives a [`Host`].
//!
//! ## Terminology
//! - **Replica**: one instance in a store of its own, in a slot of the manager's gate.
//! - **Generation**: everything that one successful load or reload made, numbered from 1.
//! - **Lease**: one replica held over several calls; no swap can come between.
//! - **Home**: the thread that enters slot 0 synchronously (Node's JS thread).
//! - **Snapshot**: the state of one instance at one moment, with which others begin; *reset*: an
//!   instance is given that state again; *fork*: a manager begins with it.
//! - **Poisoned**: a call did not end normally, so the instance is replaced before it serves again.

mod error;
mod instance;
mod manager;
#[doc(hidden)]
pub mod scarcity;

pub use error::{Done, Error, ErrorCode, Result, TrapInfo};
pub use instance::discard::memory_discard;
pub use instance::engine::{CacheChoice, EngineOptions};
pub use instance::host::{HostCall, HostFunction, ImportValue, InstanceHost};
pub use instance::interrupt::{Interrupter, Listening, Stop};
pub use instance::limits::Limits;
pub use instance::memory::{
    ImageKind, MemoryRecord, MemoryUsage, MemoryView, OutOfBounds, Pin, memory_changes,
};
pub use instance::module::{
    Export, ExportType, ExportedFunction, Import, ImportKind, Module, Source, assemble_text,
};
pub use instance::raw_value::RawValue;
pub use instance::realm::{Exception, RealmExport, RealmImport};
pub use instance::replica::Replica;
pub use instance::snapshot::Snapshot;
pub use instance::stack::{has_stack, out_of_stack, stack_floor};
pub use instance::threads::{GuestThread, ThreadCall};
pub use instance::value::{FuncHandle, HostRef, Signature, Value, ValueType};
pub use instance::wait::Attendant;
pub use instance::watch::Watch;
pub use manager::budget::set_memory_budget;
pub use manager::call::{CallControl, CallLimits, Outcome, Settle, Work};
pub use manager::freed::Freed;
pub use manager::host::{Event, HomeStep, Host, Replaced};
pub use manager::lease::{Lease, LeaseInside};
pub use manager::options::{
    BufferAbi, BufferReturns, Isolation, ManagerOptions, OnTrap, RecycleOptions, RecycleStrategy,
};
pub use manager::pause::{ResetOptions, ResetReport, SnapshotControl};
pub use manager::recycle::{Pressure, RecycleReport};
pub use manager::stats::{CallCounts, Histogram, ManagerStats, Times};
pub use manager::swap::{ReloadOptions, ReloadReport, ReloadStep, Strategy};
pub use manager::{Job, LeaseDone, Manager, ManagerState};
pub use wasm_molt_lifecycle::{
    Answerer, Asker, Away, Backoff, FailedPhase, ForAnswerer, ForAsker, Generation, Home, Inbox,
    Inside, MemoryThreshold, OnDrainTimeout, PoolCounts, PoolState, Reason, Silence, Step, WaitId,
    Wake, Words, conversation,
};
