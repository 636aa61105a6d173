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

mod budget;
mod call;
mod capture;
mod deadline;
mod discard;
mod engine;
mod error;
mod fork;
mod freed;
mod host;
mod instrument;
mod interrupt;
mod invoke;
mod isolation;
mod lease;
mod limits;
mod manager;
mod memory;
mod module;
mod occupant;
mod options;
mod pause;
mod pool;
mod realm;
mod replica;
mod serving;
mod signals;
mod snapshot;
mod stack;
mod stats;
mod swap;
mod threads;
mod trace;
mod trap;
mod value;
mod wait;
mod watch;
mod wear;

pub use budget::set_memory_budget;
pub use call::{CallControl, CallLimits, Outcome, Settle, Work};
pub use discard::memory_discard;
pub use error::{Error, ErrorCode, Result, TrapInfo};
pub use freed::Freed;
pub use host::{HomeStep, Host, HostCall, HostFunction, ImportValue};
pub use interrupt::{Interrupter, Stop};
pub use lease::{Lease, LeaseInside};
pub use limits::Limits;
pub use manager::{
    Done, Event, Job, LeaseDone, Manager, ManagerState, ManagerStats, Pressure, RecycleReport,
    Replaced,
};
pub use memory::{
    ImageKind, MemoryRecord, MemoryUsage, MemoryView, OutOfBounds, Pin, memory_changes,
};
pub use module::{Export, ExportType, ExportedFunction, Import, ImportKind, Module, assemble_text};
pub use options::{
    BufferAbi, BufferReturns, CacheChoice, EngineOptions, Isolation, ManagerOptions, OnTrap,
    RecycleOptions, RecycleStrategy, Source,
};
pub use pause::{ResetOptions, ResetReport, SnapshotControl};
pub use realm::{Exception, RealmExport, RealmImport};
pub use replica::{RawValue, Replica};
pub use snapshot::Snapshot;
pub use stack::{has_stack, out_of_stack, stack_floor};
pub use stats::{CallCounts, Histogram, Times};
pub use swap::{ReloadOptions, ReloadReport, ReloadStep, Strategy};
pub use threads::{GuestThread, ThreadCall};
pub use value::{FuncHandle, HostRef, Signature, Value, ValueType};
pub use wait::Attendant;
pub use wasm_molt_lifecycle::{
    Away, Backoff, FailedPhase, Generation, Home, Inside, MemoryThreshold, OnDrainTimeout,
    PoolCounts, PoolState, Reason, Step, WaitId,
};
pub use watch::Watch;
