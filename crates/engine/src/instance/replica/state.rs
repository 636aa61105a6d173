//! The state of an instance: read out, put back, and whether it is still what it was.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use wasmtime::{AsContextMut, StoreContextMut};

use super::{Guest, KnownTables, Replica, StandsOn};
use crate::error::{Error, ErrorCode, Result};
use crate::instance::capture::Captured;
use crate::instance::memory::Image;
use crate::instance::raw_value::RawValue;
use crate::instance::snapshot::{Origin, Snapshot};
use crate::instance::value::ValueType;

impl Replica {
    pub(super) fn known_tables(&self) -> MutexGuard<'_, KnownTables> {
        self.known_tables
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stands_on(&self) -> MutexGuard<'_, StandsOn> {
        self.stands_on
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody has been inside since its state is that.
    pub(super) fn begins_as(&self, snapshot: u64, captured: Arc<Captured>) {
        *self.stands_on() = Some((snapshot, captured));
        self.pristine.store(snapshot, Ordering::Relaxed);
    }

    /// The snapshot is released: it is not kept alive for what could be had from it quickly.
    pub(crate) fn forget(&self, snapshot: &Snapshot) {
        let mut stands_on = self.stands_on();
        if stands_on
            .as_ref()
            .is_some_and(|(id, _)| *id == snapshot.id())
        {
            *stands_on = None;
        }
    }

    /// Reads out the instance's state.
    ///
    /// * `bounds`: as for [`Reach::capture`]; beyond them it is [`ErrorCode::Busy`].
    ///
    /// # Safety
    /// The calling thread holds the replica, and no call of it is on any stack.
    ///
    /// # Errors
    /// [`ErrorCode::SnapshotUnsupported`] with the reason, and nothing has changed.
    pub(crate) unsafe fn capture(
        &self,
        snapshot: u64,
        bounds: (usize, bool),
    ) -> Result<Arc<Captured>> {
        let live = self.live()?;
        {
            // What nobody has touched since need not be looked through again.
            let mut stands_on = self.stands_on();
            if let Some((id, captured)) = &mut *stands_on
                && self.is_pristine_since(*id)
            {
                *id = snapshot;
                self.pristine.store(snapshot, Ordering::Relaxed);
                return Ok(Arc::clone(captured));
            }
            // Else its images would count as somebody's, and could not be written on in place.
            *stands_on = None;
        }
        let mut known = self.known_tables();
        let read = |mut context: StoreContextMut<'_, Guest>| {
            let realm = self.capture_realm(context.as_context_mut(), bounds)?;
            let captured = live.reach.capture(
                context,
                &self.module,
                &live.memories,
                known.as_deref(),
                bounds,
            );
            captured.map(|captured| match realm {
                Some((state, images)) => captured.with_realm(state, images),
                None => captured,
            })
        };
        // SAFETY: contract of this function.
        let captured = unsafe { self.with_context(read) }.unwrap_or_else(|| Err(self.stale()))?;
        *known = Some(captured.tables.clone());
        let captured = Arc::new(captured);
        self.begins_as(snapshot, Arc::clone(&captured));
        Ok(captured)
    }

    /// Gives the instance the state of a snapshot. A trap that it had means nothing then. Returns how
    /// many bytes of memory had been dirty, if that is `counted`.
    ///
    /// # Safety
    /// The calling thread holds the replica, and no call of it is on any stack.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] where the system refuses; the instance is then poisoned.
    pub(crate) unsafe fn reset(&self, to: &Origin, counted: bool) -> Result<usize> {
        let captured = &to.captured;
        let live = self.live()?;
        self.end_threads()?;
        let mut known = self.known_tables();
        let had_externs = live.reach.has_tables();
        let write = |mut context: StoreContextMut<'_, Guest>| {
            let outcome = live.reach.put_back(
                &mut context,
                &self.module,
                &live.memories,
                captured,
                (known.as_deref(), counted),
            );
            let outcome = outcome.and_then(|dirty| match &captured.realm {
                Some(state) => {
                    let images = self.realm_images(captured);
                    let more = self.put_realm_back(context.as_context_mut(), state, images)?;
                    Ok(dirty + more)
                }
                None => Ok(dirty),
            });
            if counted && (captured.externs > 0 || had_externs) {
                // What the host gave the guest since is let go of now, not some time.
                let _ = context.gc(None);
            } else {
                self.collect_now_and_then(&mut context, captured.externs);
            }
            outcome
        };
        // SAFETY: contract of this function.
        let outcome = unsafe { self.with_context(write) }.unwrap_or_else(|| Err(self.stale()));
        match outcome {
            Ok(dirty_bytes) => {
                *known = Some(captured.tables.clone());
                *self.lock_last_trap() = None;
                self.interrupter.revive();
                self.is_poisoned.store(false, Ordering::Release);
                self.begins_as(to.snapshot.id(), Arc::clone(captured));
                Ok(dirty_bytes)
            }
            Err(error) => {
                self.pristine.store(0, Ordering::Relaxed);
                self.poison();
                Err(error)
            }
        }
    }

    /// Those images of a snapshot that are of memories which the host has made in the store.
    pub(crate) fn realm_images<'a>(&self, captured: &'a Captured) -> &'a [Arc<Image>] {
        let own = self.live.get().map_or(0, |live| live.memories.len());
        captured.memories.get(own..).unwrap_or_default()
    }

    /// Whether nobody has been inside, or written to its memories, since it got the state of that snapshot.
    pub(crate) fn is_pristine(&self, snapshot: &Snapshot) -> bool {
        self.is_pristine_since(snapshot.id())
    }

    pub(super) fn is_pristine_since(&self, snapshot: u64) -> bool {
        let mut is_untouched = true;
        self.each_memory(|record| is_untouched &= record.is_untouched());
        self.pristine.load(Ordering::Relaxed) == snapshot && is_untouched && self.is_started()
    }

    /// Calls an export that takes no parameter, or one number, with bits that nobody can guess.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::ExportNotFound`], [`ErrorCode::InvalidArgument`] for another signature; else however
    /// the guest ended.
    pub(crate) unsafe fn reseed(&self, export: &str) -> Result<()> {
        let index = self.module.function_index(export)?;
        let missing = || self.missing(index);
        let func = self.function(index).ok_or_else(missing)?;
        let function = self.module.functions().get(index).ok_or_else(missing)?;
        let bits = random_bits()?;
        let arg = match &*function.signature.params {
            [] => None,
            [ValueType::I32] => Some(RawValue::i32(bits as i32)),
            [ValueType::I64] => Some(RawValue::i64(bits as i64)),
            _ => {
                return Err(Error::invalid(format!(
                    "options.reseed names '{export}' of {}, which is {}; it must take nothing, an i32 or an \
                     i64",
                    self.module.name(),
                    function.signature
                )));
            }
        };
        let args = arg.iter().zip(&*function.signature.params);
        let args = args.map(|(arg, ty)| arg.to_value(*ty)).collect();
        // SAFETY: contract of this function; the signature is the export's.
        unsafe { self.call_typed(&func, &function.signature, args) }.map(drop)
    }
}

/// From the system's own source.
fn random_bits() -> Result<u64> {
    getrandom::u64().map_err(|e| {
        Error::new(
            ErrorCode::Internal,
            format!("the system gives no random numbers for options.reseed: {e}"),
        )
    })
}
