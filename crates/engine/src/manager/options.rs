//! What a manager is asked to be.

use std::time::Duration;

use wasm_molt_lifecycle::{Backoff, MemoryThreshold, Policy};

use crate::error::{Error, Result};
use crate::instance::engine::{CacheChoice, EngineOptions};
use crate::instance::limits::Limits;
use crate::instance::memory::ImageKind;
use crate::manager::host::Host;

/// How a guest takes and returns buffers.
#[derive(Debug, Clone)]
pub struct BufferAbi {
    /// `(size: i32) -> ptr`.
    pub allocate: String,
    /// `(ptr: i32, size: i32)`, if the guest has one.
    pub deallocate: Option<String>,
    /// How the result comes back.
    pub returns: BufferReturns,
}

impl Default for BufferAbi {
    fn default() -> Self {
        Self {
            allocate: "allocate".into(),
            deallocate: Some("deallocate".into()),
            returns: BufferReturns::OutPointer,
        }
    }
}

/// How a buffer comes back from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BufferReturns {
    /// `f(ptr, len, out_len_ptr) -> ptr`.
    OutPointer,
    /// `f(ptr, len) -> (ptr << 32 | len)` as one i64.
    PackedI64,
    /// `f(ptr, len) -> (ptr, len)`.
    MultiValue,
}

/// What calls on the pool see of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Isolation {
    /// The state that the calls before have left in the instance.
    #[default]
    Shared,
    /// Nothing: each begins with the newest snapshot's state, and leaves nothing behind.
    PerCall,
}

/// What becomes of an instance that has trapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnTrap {
    /// It is replaced before it serves again.
    #[default]
    Reload,
    /// It serves on.
    Keep,
}

/// How an instance is recycled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RecycleStrategy {
    /// A fresh one takes its place once nobody is inside, and gets its state.
    #[default]
    Exclusive,
    /// A fresh one takes its place at once, and it goes when nobody is inside.
    Rolling,
    /// It is put back to the newest snapshot, where there is one.
    Reset,
}

impl RecycleStrategy {
    /// The word for it in the public interface.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exclusive => "exclusive",
            Self::Rolling => "rolling",
            Self::Reset => "reset",
        }
    }
}

/// When instances are replaced without being asked.
#[derive(Debug, Clone)]
pub struct RecycleOptions {
    /// Linear memory of one instance.
    pub memory: Option<MemoryThreshold>,
    /// Calls of one instance. From 1.
    pub calls: Option<u64>,
    /// Age of one instance.
    pub age: Option<Duration>,
    /// What becomes of an instance that has trapped.
    pub on_trap: OnTrap,
    /// Before its growth would cross the limit. Default: if `memory` is set.
    pub predict: Option<bool>,
    /// 0 to 1: how far thresholds are spread.
    pub jitter: f64,
    /// How.
    pub strategy: RecycleStrategy,
    /// After failures.
    pub backoff: Backoff,
}

impl RecycleOptions {
    /// 0.1.
    pub const DEFAULT_JITTER: f64 = 0.1;

    pub(crate) fn policy(&self) -> Policy {
        Policy {
            memory: self.memory,
            calls: self.calls,
            age: self.age,
            predicts: self.predict.unwrap_or(self.memory.is_some()),
            jitter: self.jitter,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::invalid(format!("options.recycle.{what}")));
        match self.memory {
            Some(MemoryThreshold::Bytes(0)) => {
                return wrong("memory is 0; it must be 1 byte or more".into());
            }
            Some(MemoryThreshold::Share(share)) if !(share > 0.0 && share <= 1.0) => {
                return wrong(format!(
                    "memory is '{}%'; it must lie above '0%' and up to '100%'",
                    share * 100.0
                ));
            }
            _ => {}
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            return wrong(format!(
                "jitter is {}; it must lie between 0 and 1",
                self.jitter
            ));
        }
        let Backoff { initial, max } = self.backoff;
        if max < initial {
            return wrong(format!(
                "backoff.maxMs is {}; it must not be less than initialMs, which is {}",
                max.as_millis(),
                initial.as_millis()
            ));
        }
        Ok(())
    }
}

impl Default for RecycleOptions {
    fn default() -> Self {
        Self {
            memory: None,
            calls: None,
            age: None,
            on_trap: OnTrap::default(),
            predict: None,
            jitter: Self::DEFAULT_JITTER,
            strategy: RecycleStrategy::default(),
            backoff: Backoff::default(),
        }
    }
}

/// Everything a manager is made of.
#[derive(Debug, Clone)]
pub struct ManagerOptions {
    /// In errors, events and thread names. Default: the module's own name, else its file's.
    pub name: Option<String>,
    /// Replicas. Default 1.
    pub instances: usize,
    /// The host makes instances by itself, beside that of the module: see [`crate::RealmImport`].
    pub is_realm: bool,
    /// Threads of the pool. Default: as many as replicas, at most the available parallelism.
    pub threads: Option<usize>,
    /// Calls and leases that may wait. Default 1024.
    pub max_queue: usize,
    /// Hard limits.
    pub limits: Limits,
    /// The engine.
    pub engine: EngineOptions,
    /// Compiled code between processes.
    pub cache: CacheChoice,
    /// For `invoke`.
    pub abi: BufferAbi,
    /// What calls see of each other.
    pub isolation: Isolation,
    /// How snapshots keep memory.
    pub images: ImageKind,
    /// Memories begin on pages that a snapshot can take over without copying: their first touch costs more,
    /// the first snapshot much less. Default: with isolation per call, and for the next build if a snapshot
    /// was taken of this one.
    pub prepares_snapshots: Option<bool>,
    /// An export that gives the guest other random numbers than the instance that it is a copy of has;
    /// takes nothing, an i32 or an i64.
    pub reseed: Option<String>,
    /// When instances are replaced without being asked. Default: after traps and stops only.
    pub recycle: Option<RecycleOptions>,
    /// Slot 0 is entered synchronously by one home thread (the JS thread).
    pub has_home: bool,
}

impl Default for ManagerOptions {
    fn default() -> Self {
        Self {
            name: None,
            instances: 1,
            is_realm: false,
            threads: None,
            max_queue: 1024,
            limits: Limits::default(),
            engine: EngineOptions::default(),
            cache: CacheChoice::default(),
            abi: BufferAbi::default(),
            isolation: Isolation::default(),
            images: ImageKind::default(),
            prepares_snapshots: None,
            reseed: None,
            recycle: None,
            has_home: false,
        }
    }
}

impl ManagerOptions {
    /// Whether a manager can be made of them.
    pub(super) fn check(&self, host: &dyn Host) -> Result<()> {
        const MOST: usize = 4096;
        if let Some(recycle) = &self.recycle {
            recycle.check()?;
            if recycle.strategy == RecycleStrategy::Rolling && host.saves_state() {
                return Err(Error::invalid(
                    "options.recycle.strategy is 'rolling', and there is a saveState hook: two instances that serve \
                 at the same time cannot hand state over; use 'exclusive'",
                ));
            }
        }
        if self.instances == 0 || self.instances > MOST {
            return Err(Error::invalid(format!(
                "instances is {}; it must lie between 1 and {MOST}",
                self.instances
            )));
        }
        if let Some(threads) = self.threads
            && (threads == 0 || threads > MOST)
        {
            return Err(Error::invalid(format!(
                "threads is {threads}; it must lie between 1 and {MOST}"
            )));
        }
        if self.isolation == Isolation::PerCall && host.reseeds() {
            return Err(Error::invalid(
                "options.reseed must be the name of an export with isolation 'per-call': a function would cost \
             each call a turn of the event loop",
            ));
        }
        self.limits.check(self.engine.fuel)
    }
}
