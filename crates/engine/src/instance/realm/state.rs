//! The state of a realm, read out and put back into the same one.
//!
//! Unlike what a single instance holds it cannot begin another one: JavaScript has made it, and holds
//! handles on it. So functions are kept as they are, and what was made later stays where it is.

use std::sync::Arc;

use wasmtime::{AsContextMut, ExternRef, Func, Ref, RootScope, StoreContextMut, Val};

use super::{GrownBy, RealmTable};
use crate::error::{Error, Result};
use crate::instance::capture::{out_of_memory, unsupported};
use crate::instance::memory::Image;
use crate::instance::replica::{Guest, Replica};
use crate::instance::value::HostRef;

/// All that can change in a realm but its memories, whose images are kept beside it.
#[derive(Debug)]
pub(crate) struct RealmState {
    /// The store that it is of.
    replica: u64,
    /// Of each global, in order; `None` for an immutable one.
    globals: Vec<Option<Saved>>,
    hidden: Vec<Saved>,
    tables: Vec<Arc<Elements>>,
    pub(crate) externs: u64,
}

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
    Func(Func),
    NullExtern,
    Extern(HostRef),
    NullExn,
}

/// What a table holds.
#[derive(Debug)]
pub(super) struct Elements(Vec<SavedRef>);

impl Replica {
    /// Reads the realm's state out; `None` if this is none.
    pub(crate) fn capture_realm(
        &self,
        mut context: StoreContextMut<'_, Guest>,
        bounds: (usize, bool),
    ) -> Result<Option<(RealmState, Vec<Arc<Image>>)>> {
        let Some(cell) = self.realm_cell() else {
            return Ok(None);
        };
        let mut realm = cell
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let name = self.module().name();
        let threads = self.guest_threads().threads;
        if threads > 0 {
            let why = format!("{threads} of its threads run, whose stacks belong to no snapshot");
            return Err(unsupported(name, &why));
        }
        if let Some(why) = &realm.unsupported {
            return Err(unsupported(name, why));
        }
        // What can be refused comes first: capturing a memory changes how its pages are held.
        let mut globals = Vec::with_capacity(realm.globals.len());
        for global in &realm.globals {
            let value = if global.is_mutable {
                Some(save(&mut context, name, |scope| global.global.get(scope))?)
            } else {
                None
            };
            globals.push(value);
        }
        let mut hidden = Vec::with_capacity(realm.hidden.len());
        for global in &realm.hidden {
            hidden.push(save(&mut context, name, |scope| global.get(scope))?);
        }
        let mut tables = Vec::with_capacity(realm.tables.len());
        for table in &realm.tables {
            tables.push(match &table.known {
                Some(known) if table.is_clean(&mut context) => Arc::clone(known),
                _ => Arc::new(save_table(&mut context, name, table)?),
            });
        }
        let mut images = Vec::with_capacity(realm.memories.len());
        for memory in &mut realm.memories {
            memory.look();
            let image = memory.record.capture_within(bounds.0, bounds.1);
            images.push(image.map_err(|e| out_of_memory(name, &e))?);
        }
        for (table, known) in realm.tables.iter_mut().zip(&tables) {
            table.is_known(&mut context, known)?;
        }
        let is_extern = |it: &&SavedRef| matches!(it, SavedRef::Extern(_));
        let in_tables = tables.iter().flat_map(|table| &table.0);
        let externs = in_tables.filter(is_extern).count() as u64;
        let state = RealmState {
            replica: self.id(),
            globals,
            hidden,
            tables,
            externs,
        };
        Ok(Some((state, images)))
    }

    /// The memories that will lose pages in a reset to these images: views of them end. Those of the
    /// others stay attached, and show what the snapshot has.
    ///
    /// A memory that has grown since becomes smaller if its guest grows it by itself, whose glue has to
    /// expect that views end at any moment and whose allocator goes on where the memory ends. One that
    /// only its glue grows keeps its size: such glue (Emscripten's) looks at its views when it grows the
    /// memory and at no other time, and its allocator keeps account of the end by itself.
    pub(crate) fn realm_shrinks(&self, images: &[Arc<Image>]) -> Vec<u32> {
        let Some(cell) = self.realm_cell() else {
            return Vec::new();
        };
        let mut realm = cell
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut ids = Vec::new();
        for ((id, memory), image) in (0..).zip(&mut realm.memories).zip(images) {
            memory.look();
            if memory.record.byte_len() > image.byte_len() && memory.grown_by == GrownBy::Guest {
                ids.push(id);
            }
        }
        let later = realm.memories.iter().enumerate().skip(images.len());
        ids.extend(
            later
                .filter(|(_, it)| !it.is_vacated)
                .map(|(id, _)| id as u32),
        );
        ids
    }

    /// Puts the state back. Returns how many bytes of memory had been dirty. Nobody looks meanwhile.
    ///
    /// After an error the realm is in an unknown state.
    pub(crate) fn put_realm_back(
        &self,
        mut context: StoreContextMut<'_, Guest>,
        state: &RealmState,
        images: &[Arc<Image>],
    ) -> Result<usize> {
        let Some(cell) = self.realm_cell() else {
            return Err(Error::internal("the state of a realm, and no realm"));
        };
        if state.replica != self.id() {
            return Err(Error::internal("the state of another realm"));
        }
        let shrinks = self.realm_shrinks(images);
        let mut realm = cell
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let realm = &mut *realm;
        let name = self.module().name();
        let mut dirty_bytes = 0;
        for ((id, memory), image) in (0..).zip(&mut realm.memories).zip(images) {
            let outcome = if shrinks.contains(&id) {
                memory.record.reset(image)
            } else {
                memory.record.reset_in_place(image)
            };
            dirty_bytes += outcome.map_err(|e| out_of_memory(name, &e))?;
            // Compiled code has size and address in a place of its own; this refreshes it.
            memory
                .memory
                .grow(&mut context, 0)
                .map_err(Error::internal)?;
            memory.len_seen = memory.record.byte_len();
            memory.is_vacated = false;
        }
        for (global, saved) in realm.globals.iter().zip(&state.globals) {
            if let Some(saved) = saved {
                let mut scope = RootScope::new(&mut context);
                let value = load(&mut scope, saved)?;
                global
                    .global
                    .set(&mut scope, value)
                    .map_err(Error::internal)?;
            }
        }
        for (global, saved) in realm.hidden.iter().zip(&state.hidden) {
            let mut scope = RootScope::new(&mut context);
            let value = load(&mut scope, saved)?;
            global.set(&mut scope, value).map_err(Error::internal)?;
        }
        // What was made later is nobody's any more.
        for memory in realm.memories.iter_mut().skip(images.len()) {
            if !memory.is_vacated {
                memory.is_vacated = true;
                dirty_bytes += memory.record.byte_len();
                memory.record.vacate();
                memory
                    .memory
                    .grow(&mut context, 0)
                    .map_err(Error::internal)?;
                memory.len_seen = 0;
            }
        }
        for (table, saved) in realm.tables.iter_mut().zip(&state.tables) {
            let is_same = table
                .known
                .as_ref()
                .is_some_and(|it| Arc::ptr_eq(it, saved));
            if !(is_same && table.is_clean(&mut context)) {
                load_table(&mut context, table, saved)?;
            }
        }
        Ok(dirty_bytes)
    }
}

impl RealmTable {
    /// Nobody has changed it since its elements were known.
    fn is_clean(&self, mut context: impl AsContextMut) -> bool {
        let mut is_zero =
            |global: &wasmtime::Global| matches!(global.get(&mut context), Val::I32(0));
        !self.is_changed && self.watches.iter().all(|watch| is_zero(&watch.dirty))
    }

    /// It holds more than what was saved.
    fn is_known_in_part(&mut self, context: impl AsContextMut) -> Result<()> {
        self.is_known(context, &Arc::new(Elements(Vec::new())))?;
        self.is_changed = true;
        Ok(())
    }

    fn is_known(&mut self, mut context: impl AsContextMut, known: &Arc<Elements>) -> Result<()> {
        for watch in &self.watches {
            let cleared = watch.dirty.set(&mut context, Val::I32(0));
            cleared.map_err(Error::internal)?;
        }
        self.is_changed = false;
        self.known = Some(Arc::clone(known));
        Ok(())
    }
}

fn save(
    context: &mut StoreContextMut<'_, Guest>,
    name: &str,
    get: impl FnOnce(&mut RootScope<&mut StoreContextMut<'_, Guest>>) -> Val,
) -> Result<Saved> {
    let mut scope = RootScope::new(context);
    let value = get(&mut scope);
    Ok(match value {
        Val::I32(v) => Saved::I32(v),
        Val::I64(v) => Saved::I64(v),
        Val::F32(v) => Saved::F32(v),
        Val::F64(v) => Saved::F64(v),
        Val::V128(v) => Saved::V128(v.as_u128()),
        Val::ExnRef(None) => Saved::Ref(SavedRef::NullExn),
        other => {
            let value = other.ref_();
            let value = value.ok_or_else(|| unsupported(name, "a global holds an exception"))?;
            Saved::Ref(save_ref(&mut scope, name, value)?)
        }
    })
}

fn save_ref(context: impl AsContextMut, name: &str, value: Ref) -> Result<SavedRef> {
    Ok(match value {
        Ref::Func(None) => SavedRef::NullFunc,
        Ref::Func(Some(func)) => SavedRef::Func(func),
        Ref::Extern(None) => SavedRef::NullExtern,
        Ref::Extern(Some(held)) => {
            let data = held.data(&context).map_err(Error::internal)?;
            let value = data.and_then(|any| any.downcast_ref::<HostRef>()).cloned();
            SavedRef::Extern(value.ok_or_else(|| {
                unsupported(
                    name,
                    "a table or global holds a garbage-collected object as externref",
                )
            })?)
        }
        _ => {
            return Err(unsupported(
                name,
                "a table or global holds a garbage-collected object",
            ));
        }
    })
}

fn load(mut context: impl AsContextMut, saved: &Saved) -> Result<Val> {
    Ok(match saved {
        Saved::I32(v) => Val::I32(*v),
        Saved::I64(v) => Val::I64(*v),
        Saved::F32(v) => Val::F32(*v),
        Saved::F64(v) => Val::F64(*v),
        Saved::V128(v) => Val::V128((*v).into()),
        Saved::Ref(SavedRef::NullExn) => Val::ExnRef(None),
        Saved::Ref(value) => load_ref(&mut context, value)?.into(),
    })
}

fn load_ref(mut context: impl AsContextMut, saved: &SavedRef) -> Result<Ref> {
    Ok(match saved {
        SavedRef::NullFunc => Ref::Func(None),
        SavedRef::Func(func) => Ref::Func(Some(*func)),
        SavedRef::NullExtern => Ref::Extern(None),
        SavedRef::Extern(value) => {
            let held = ExternRef::new(&mut context, value.clone());
            Ref::Extern(Some(held.map_err(Error::internal)?))
        }
        SavedRef::NullExn => Ref::Exn(None),
    })
}

fn save_table(
    context: &mut StoreContextMut<'_, Guest>,
    name: &str,
    table: &RealmTable,
) -> Result<Elements> {
    let len = table.len(&mut *context);
    let mut elements = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    for index in 0..len {
        let mut scope = RootScope::new(&mut *context);
        let value = table.table.get(&mut scope, index);
        let value = value.ok_or_else(|| Error::internal("a table is shorter than it says"))?;
        elements.push(save_ref(&mut scope, name, value)?);
    }
    Ok(Elements(elements))
}

fn load_table(
    context: &mut StoreContextMut<'_, Guest>,
    table: &mut RealmTable,
    saved: &Arc<Elements>,
) -> Result<()> {
    let len = saved.0.len() as u64;
    for (index, element) in (0..).zip(&saved.0) {
        let mut scope = RootScope::new(&mut *context);
        let value = load_ref(&mut scope, element)?;
        let set = table.table.set(&mut scope, index, value);
        set.map_err(Error::internal)?;
    }
    let real = table.table.size(&*context);
    if table.watches.iter().all(|watch| watch.size.is_none()) && table.len(&mut *context) > len {
        // Only its glue makes it larger, and keeps account in JavaScript of what it has put where.
        return table.is_known_in_part(&mut *context);
    }
    if real > len {
        // Beyond its size nothing is kept alive.
        let null = Ref::null(table.table.ty(&*context).element().heap_type());
        let filled = table.table.fill(&mut *context, len, null, real - len);
        filled.map_err(Error::internal)?;
    }
    table.set_len(&mut *context, len)?;
    table.is_known(&mut *context, saved)
}
