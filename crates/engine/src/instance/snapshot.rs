//! The state of one instance, with which others can begin.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wasm_molt_lifecycle::Generation;

use crate::instance::capture::Captured;
use crate::instance::module::Module;

/// The state of one instance at one moment, kept until it is released.
#[derive(Debug)]
pub struct Snapshot {
    id: u64,
    /// The manager that it was taken of.
    owner: u64,
    generation: Generation,
    module: Arc<Module>,
    memory_bytes: usize,
    /// Gone once released.
    captured: Mutex<Option<Arc<Captured>>>,
}

impl Snapshot {
    pub(crate) fn new(
        (id, owner): (u64, u64),
        generation: Generation,
        module: Arc<Module>,
        captured: Arc<Captured>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            owner,
            generation,
            module,
            memory_bytes: captured.memory_bytes(),
            captured: Mutex::new(Some(captured)),
        })
    }

    /// A number for the next one, unique in the process.
    pub(crate) fn next_id() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// Unique in the process, rising.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What served when it was taken.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The manager that it was taken of.
    pub(crate) fn owner(&self) -> u64 {
        self.owner
    }

    pub(crate) fn module(&self) -> &Arc<Module> {
        &self.module
    }

    /// Bytes of linear memory in it.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// Bytes of pages that are held for it; 0 once released.
    pub fn resident_bytes(&self) -> usize {
        self.captured()
            .map_or(0, |captured| captured.resident_bytes())
    }

    pub(crate) fn captured(&self) -> Option<Arc<Captured>> {
        self.lock().clone()
    }

    /// Whether it can be used no more.
    pub fn is_released(&self) -> bool {
        self.lock().is_none()
    }

    /// It can be used no more; its pages go with the last instance that stands on them.
    pub(crate) fn let_go(&self) {
        drop(self.lock().take());
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Captured>>> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A snapshot and its state, which stays even if the snapshot is released meanwhile.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) captured: Arc<Captured>,
}

impl Origin {
    /// `None` once released.
    pub(crate) fn of(snapshot: &Arc<Snapshot>) -> Option<Self> {
        Some(Self {
            captured: snapshot.captured()?,
            snapshot: Arc::clone(snapshot),
        })
    }
}
