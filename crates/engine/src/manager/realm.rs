//! Modules of a realm: compiled when its glue asks, and kept for the next generation, which asks for the same.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

use wasmparser::{Parser, Payload, TypeRef};

use super::control::guarded;
use super::{Manager, Shared};
use crate::error::{Done, Result};
use crate::instance::engine::Engine;
use crate::instance::module::{Company, Module, Source};
use crate::instance::pool::apart;
use crate::instance::replica::Replica;
use crate::instance::threads::{GuestThread, ThreadCall};

/// Modules that a manager keeps. Glue may make helper modules without end (Emscripten does, one for each
/// function that it adds); the oldest go.
const MOST_KEPT: usize = 64;

/// Compiled modules with their bytes, the one that was asked for last at the end.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    hasher: RandomState,
    kept: Mutex<VecDeque<Kept>>,
}

#[derive(Debug)]
struct Kept {
    hash: u64,
    module: Arc<Module>,
}

impl Compiled {
    fn find(&self, hash: u64, bytes: &[u8]) -> Option<Arc<Module>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |it: &Kept| it.hash == hash && it.module.bytes.as_deref() == Some(bytes);
        let at = kept.iter().position(is_it)?;
        let found = kept.remove(at)?;
        let module = Arc::clone(&found.module);
        kept.push_back(found);
        Some(module)
    }

    fn keep(&self, hash: u64, module: &Arc<Module>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(Kept {
            hash,
            module: Arc::clone(module),
        });
        while kept.len() > MOST_KEPT {
            kept.pop_front();
        }
    }

    pub(super) fn clear(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clear();
    }
}

impl Manager {
    /// Whether the host makes its instances.
    pub fn is_realm(&self) -> bool {
        self.shared.options.is_realm
    }

    /// Compiles a module for the realm, or finds it.
    ///
    /// # Errors
    /// [`crate::ErrorCode::Compile`].
    pub fn compile(&self, bytes: Vec<u8>) -> Result<Arc<Module>> {
        self.shared.compile(bytes)
    }

    /// The module itself, or, if it was compiled for another engine, one of the same bytes for this one's.
    ///
    /// # Errors
    /// [`crate::ErrorCode::Compile`].
    pub fn adopt(&self, module: &Arc<Module>) -> Result<Arc<Module>> {
        let engine = self.shared.engine()?;
        match &module.bytes {
            Some(bytes) if !engine.is_same(&module.engine) => self.shared.compile(bytes.to_vec()),
            _ => Ok(Arc::clone(module)),
        }
    }

    /// The same as [`Self::compile`], on a pool thread.
    pub fn compile_later(&self, bytes: Vec<u8>, done: Done<Arc<Module>>) {
        let shared = Arc::clone(&self.shared);
        let pool = Arc::clone(&shared.lock_serving().pool);
        pool.spawn(move |started| {
            done(started.and_then(|()| guarded(|| shared.compile(bytes))));
        });
    }

    /// Starts a native thread of a realm's guest.
    ///
    /// * `done`: hears on that thread whether it has ended by itself or was ended, or how it failed.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`crate::ErrorCode::InvalidArgument`] and [`crate::ErrorCode::Link`] for what cannot run on another
    /// thread, [`crate::ErrorCode::Busy`] while its threads are being ended. Nothing has begun then.
    pub unsafe fn spawn(
        &self,
        replica: &Arc<Replica>,
        calls: Vec<ThreadCall>,
        done: Done<bool>,
    ) -> Result<GuestThread> {
        let blueprint = self.shared.blueprint_of(Arc::clone(replica.module()));
        let shared = Arc::clone(&self.shared);
        let told = move |outcome: Result<bool>| {
            if let Err(error) = &outcome {
                shared.tell_trap(error);
            }
            done(outcome);
        };
        // SAFETY: contract of this function.
        unsafe { replica.spawn(&blueprint, calls, Box::new(told)) }
    }

    /// Whether these bytes are a module that the realm's engine would compile.
    ///
    /// # Errors
    /// [`crate::ErrorCode::InvalidArgument`] if there is no such engine.
    pub fn validates(&self, bytes: &[u8]) -> Result<bool> {
        let engine = self.shared.engine()?;
        // Who asks means to use it.
        if !self.shared.options.engine.threads && has_shared_memory(bytes) {
            return Ok(false);
        }
        apart(|| engine.validates(bytes))
    }
}

impl Shared {
    pub(super) fn engine(&self) -> Result<Engine> {
        let options = &self.options;
        let stack_bytes = options.limits.stack_bytes();
        let find = if options.is_realm {
            Engine::of_realms
        } else {
            Engine::shared
        };
        find(&options.engine, stack_bytes, &options.cache)
    }

    fn compile(&self, bytes: Vec<u8>) -> Result<Arc<Module>> {
        let hash = self.compiled.hasher.hash_one(&*bytes);
        if let Some(module) = self.compiled.find(hash, &bytes) {
            return Ok(module);
        }
        let pool = Arc::clone(&self.lock_serving().pool);
        let source = Source::Bytes(bytes);
        let loaded = Module::load_with(&self.engine()?, &pool, &source, None, Company::Realm)?;
        let module = Arc::new(loaded);
        if !self.is_over() {
            self.compiled.keep(hash, &module);
        }
        Ok(module)
    }
}

/// Whether it has one, as far as the bytes make sense.
fn has_shared_memory(bytes: &[u8]) -> bool {
    let is_shared = |payload: Payload<'_>| match payload {
        Payload::MemorySection(memories) => memories.into_iter().flatten().any(|ty| ty.shared),
        Payload::ImportSection(imports) => {
            let types = imports.into_imports().flatten().map(|import| import.ty);
            types
                .into_iter()
                .any(|ty| matches!(ty, TypeRef::Memory(ty) if ty.shared))
        }
        _ => false,
    };
    let payloads = Parser::new(0)
        .parse_all(bytes)
        .map_while(std::result::Result::ok);
    payloads
        .take_while(|payload| !matches!(payload, Payload::CodeSectionStart { .. }))
        .any(is_shared)
}
