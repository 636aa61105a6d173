//! wasmtime engines, one per distinct configuration, shared by all managers of the process.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use once_cell::sync::{Lazy, OnceCell};
use wasmtime::Config;

use crate::error::{Error, ErrorCode, Result};
use crate::instance::cache::Cache;
use crate::instance::compile::compile;
use crate::instance::memory::{self, MemoryOptions};
use crate::instance::signals;

/// How guests are compiled and checked. Two managers with equal options share one engine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the public contract"
)]
pub struct EngineOptions {
    /// Running code can be stopped by timeouts, signals and `destroy()`.
    pub interruptible: bool,
    /// Instructions are counted (`limits.fuel`).
    pub fuel: bool,
    /// Faults become traps through signal handlers; otherwise explicit bounds checks.
    pub signals_based_traps: bool,
    /// Fixed-width SIMD.
    pub simd: bool,
    /// Relaxed SIMD.
    pub relaxed_simd: bool,
    /// Atomics and shared memories.
    pub threads: bool,
    /// Bytes of address space reserved for each memory.
    pub memory_reservation_bytes: u64,
}

impl EngineOptions {
    /// 4 GiB: all that a 32-bit memory can reach, so that no access needs a bounds check.
    pub const DEFAULT_MEMORY_RESERVATION_BYTES: u64 = 4 << 30;
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            interruptible: true,
            fuel: false,
            signals_based_traps: true,
            simd: true,
            relaxed_simd: true,
            // Off until waiting guests can be stopped: `memory.atomic.wait` hears no interruption yet.
            threads: false,
            memory_reservation_bytes: Self::DEFAULT_MEMORY_RESERVATION_BYTES,
        }
    }
}

/// Where compiled code is kept between processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum CacheChoice {
    /// The user's cache folder; none if there is no such folder.
    #[default]
    User,
    /// This folder.
    Folder(PathBuf),
    /// Nowhere.
    Off,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    options: EngineOptions,
    stack_bytes: usize,
    cache: CacheChoice,
    inlining: bool,
    /// Atomic instructions are understood even where shared memories are not offered: on an ordinary memory
    /// they are ordinary ones, and waiting traps.
    atomics: bool,
}

impl Key {
    fn new(
        options: &EngineOptions,
        stack_bytes: usize,
        cache: &CacheChoice,
        atomics: bool,
    ) -> Self {
        Self {
            options: options.clone(),
            stack_bytes,
            cache: cache.clone(),
            inlining: false,
            atomics,
        }
    }
}

type Slot = Arc<OnceCell<Engine>>;

static ENGINES: Lazy<Mutex<HashMap<Key, Slot>>> = Lazy::new(Mutex::default);

/// A compiler and its settings.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    pub(crate) wasmtime: wasmtime::Engine,
    pub(crate) options: EngineOptions,
    config: Arc<Config>,
    cache: Option<Arc<Cache>>,
    key: Arc<Key>,
}

impl Engine {
    /// Whether what one has compiled runs on the other.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        wasmtime::Engine::same(&self.wasmtime, &other.wasmtime)
    }

    /// Whether these bytes are a module that it would compile.
    pub(crate) fn validates(&self, bytes: &[u8]) -> bool {
        wasmtime::Module::validate(&self.wasmtime, bytes).is_ok()
    }

    /// The engine for these options, made at most once per process. It does not inline.
    pub(crate) fn shared(
        options: &EngineOptions,
        stack_bytes: usize,
        cache: &CacheChoice,
    ) -> Result<Self> {
        Self::of(Key::new(options, stack_bytes, cache, options.threads))
    }

    /// The engine of realms, whose glue brings what it was built as.
    pub(crate) fn of_realms(
        options: &EngineOptions,
        stack_bytes: usize,
        cache: &CacheChoice,
    ) -> Result<Self> {
        Self::of(Key::new(options, stack_bytes, cache, true))
    }

    /// The engine for the same options that inlines: only for modules that `instrument` has
    /// prepared for it.
    pub(crate) fn with_inlining(&self) -> Result<Self> {
        Self::of(Key {
            inlining: true,
            ..Key::clone(&self.key)
        })
    }

    fn of(key: Key) -> Result<Self> {
        let slot = ENGINES
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(key.clone())
            .or_default()
            .clone();
        slot.get_or_try_init(|| Self::new(key)).cloned()
    }

    fn new(key: Key) -> Result<Self> {
        let Key {
            ref options,
            stack_bytes,
            ref cache,
            inlining,
            atomics,
        } = key;
        let mut config = Config::new();
        memory::configure(
            &mut config,
            &MemoryOptions {
                reservation_bytes: options.memory_reservation_bytes,
                signals_based_traps: options.signals_based_traps,
            },
        );
        config
            .signals_based_traps(options.signals_based_traps)
            // Fibers are not used, but the one limit must not exceed the other.
            .async_stack_size(stack_bytes.max(2 << 20))
            .max_wasm_stack(stack_bytes)
            .consume_fuel(options.fuel)
            .epoch_interruption(options.interruptible && !options.uses_poll_page())
            .wasm_simd(options.simd)
            // Relaxed SIMD cannot be on without SIMD: wasmtime refuses to start.
            .wasm_relaxed_simd(options.simd && options.relaxed_simd)
            .wasm_threads(atomics)
            .shared_memory(options.threads)
            .wasm_multi_memory(true)
            .wasm_memory64(true)
            .wasm_tail_call(true)
            .wasm_extended_const(true)
            .wasm_function_references(true)
            .wasm_gc(true)
            .wasm_exceptions(true)
            .wasm_backtrace_max_frames(std::num::NonZeroUsize::new(64))
            .compiler_inlining(if inlining {
                wasmtime::Inlining::Yes
            } else {
                wasmtime::Inlining::No
            });
        let cache = open_cache(cache)?;
        // V8 owns the Mach exception ports of a Node process.
        #[cfg(target_os = "macos")]
        config.macos_use_mach_ports(false);
        let compiler = || wasmtime::Engine::new(&config);
        let made = if options.signals_based_traps {
            signals::with_engine(compiler)
        } else {
            compiler()
        };
        let wasmtime = made.map_err(|e| {
            Error::invalid(format!(
                "these engine options cannot be combined on this machine: {e}"
            ))
        })?;
        Ok(Self {
            wasmtime,
            options: options.clone(),
            config: Arc::new(config),
            cache,
            key: Arc::new(key),
        })
    }

    /// Compiles what was spliced, or reads what came of it before.
    pub(crate) fn compile(&self, bytes: &[u8]) -> wasmtime::Result<wasmtime::Module> {
        let compile_now = || compile(&self.wasmtime, &self.config, bytes, self.key.inlining);
        match &self.cache {
            Some(cache) => cache.module(&self.wasmtime, bytes, compile_now),
            None => compile_now(),
        }
    }
}

impl EngineOptions {
    /// Whether running guests are stopped by the poll page (else by epochs, if at all).
    pub(crate) fn uses_poll_page(&self) -> bool {
        self.interruptible && self.signals_based_traps && memory::HAS_POLL_PAGE
    }
}

fn open_cache(choice: &CacheChoice) -> Result<Option<Arc<Cache>>> {
    let opened = Cache::open(choice).map_err(|why| {
        Error::new(
            ErrorCode::InvalidArgument,
            format!("{why}; name a folder that is this user's alone, or cache: false"),
        )
    })?;
    Ok(opened.map(Arc::new))
}
