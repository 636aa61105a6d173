//! Tables of a realm, for the host.

use wasmtime::{
    AsContextMut, ExternType, Ref, RefType, RootScope, StoreContextMut, Table, TableType,
};

use super::unknown;
use crate::error::{Error, Result};
use crate::instance::module::ExportType;
use crate::instance::replica::{Guest, Replica};
use crate::instance::value::{Value, ValueType};

impl Replica {
    /// A new table of functions or host values, with its first size, its largest one, and whether its
    /// indices are 64-bit. Answers its number.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for sizes that cannot be had.
    pub unsafe fn realm_table_new(
        &self,
        element: ValueType,
        (initial, maximum, is_64): (u64, Option<u64>, bool),
        value: Value,
    ) -> Result<u32> {
        let make = |context: &mut StoreContextMut<'_, Guest>| {
            let too_large =
                |count: u64| Error::invalid(format!("a table of {count} elements is too large"));
            let element = ref_type(element);
            let ty = if is_64 {
                TableType::new64(element, initial, maximum)
            } else {
                let least = u32::try_from(initial).map_err(|_| too_large(initial))?;
                let most = maximum.map(|most| u32::try_from(most).unwrap_or(u32::MAX));
                TableType::new(element, least, most)
            };
            if maximum.is_some_and(|most| most < initial) {
                return Err(Error::invalid(format!(
                    "a table of {initial} elements cannot be made: its maximum is less"
                )));
            }
            let value = self.reference(&mut *context, value)?;
            context.data_mut().forget_refusal();
            let table = Table::new(&mut *context, ty, value).map_err(|error| {
                let why = context.data_mut().take_refusal();
                let why = why.unwrap_or_else(|| format!("{error:#}"));
                Error::invalid(format!(
                    "a table of {initial} elements cannot be made: {why}"
                ))
            })?;
            Ok(self.realm()?.add_table(table, &*context))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(make) }
    }

    /// How many elements a table has.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released.
    pub unsafe fn realm_table_len(&self, id: u32) -> Result<u64> {
        let read = |context: &mut StoreContextMut<'_, Guest>| {
            let realm = self.realm()?;
            let table = realm.tables.get(id as usize);
            Ok(table
                .ok_or_else(|| unknown("table", id))?
                .len(&mut *context))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(read) }
    }

    /// An element; `None` out of bounds.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released, [`ErrorCode::InvalidArgument`] for what cannot cross.
    pub unsafe fn realm_table_get(&self, id: u32, index: u64) -> Result<Option<Value>> {
        let read = |context: &mut StoreContextMut<'_, Guest>| {
            let table = {
                let realm = self.realm()?;
                let table = realm.tables.get(id as usize);
                let table = table.ok_or_else(|| unknown("table", id))?;
                if index >= table.len(&mut *context) {
                    return Ok(None);
                }
                table.table
            };
            let mut scope = RootScope::new(&mut *context);
            let Some(element) = table.get(&mut scope, index) else {
                return Ok(None);
            };
            let value = Value::from_val(&element.into(), self.id(), &mut scope)
                .map_err(|_| Error::invalid("the element cannot be shown to JavaScript"))?;
            self.seen(&value, &mut scope);
            Ok(Some(value))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(read) }
    }

    /// Writes an element; `false` out of bounds.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released, [`ErrorCode::InvalidArgument`] for a value of another type.
    pub unsafe fn realm_table_set(&self, id: u32, index: u64, value: Value) -> Result<bool> {
        let write = |context: &mut StoreContextMut<'_, Guest>| {
            let value = self.reference(&mut *context, value)?;
            let mut realm = self.realm()?;
            let table = realm.tables.get_mut(id as usize);
            let table = table.ok_or_else(|| unknown("table", id))?;
            if index >= table.len(&mut *context) {
                return Ok(false);
            }
            table.is_changed = true;
            let set = table.table.set(&mut *context, index, value);
            set.map_err(|error| Error::invalid(format!("{error:#}")))?;
            Ok(true)
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(write) }
    }

    /// Grows a table; answers how many elements it had, `None` if that is refused.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// As [`Self::realm_table_set`].
    pub unsafe fn realm_table_grow(
        &self,
        id: u32,
        delta: u64,
        value: Value,
    ) -> Result<Option<u64>> {
        let grow = |context: &mut StoreContextMut<'_, Guest>| {
            let value = self.reference(&mut *context, value)?;
            let mut realm = self.realm()?;
            let table = realm.tables.get_mut(id as usize);
            let table = table.ok_or_else(|| unknown("table", id))?;
            let len = table.len(&mut *context);
            let real = table.table.size(&*context);
            let Some(wanted) = len.checked_add(delta) else {
                return Ok(None);
            };
            if wanted > real
                && table
                    .table
                    .grow(&mut *context, wanted - real, value.clone())
                    .is_err()
            {
                context.data_mut().forget_refusal();
                return Ok(None);
            }
            // What a reset has left behind is used first.
            let slack = real.min(wanted) - len;
            if slack > 0 {
                let filled = table.table.fill(&mut *context, len, value, slack);
                filled.map_err(Error::internal)?;
            }
            table.is_changed = true;
            table.set_len(&mut *context, wanted)?;
            Ok(Some(len))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(grow) }
    }

    /// The type of a table; its minimum is the size of now.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released.
    pub unsafe fn realm_table_type(&self, id: u32) -> Result<ExportType> {
        let read = |context: &mut StoreContextMut<'_, Guest>| {
            let realm = self.realm()?;
            let table = realm.tables.get(id as usize);
            let table = table.ok_or_else(|| unknown("table", id))?;
            let len = table.len(&mut *context);
            let ty = ExportType::of(&ExternType::Table(table.table.ty(&*context)));
            Ok(match ty {
                ExportType::Table {
                    element,
                    maximum,
                    is_64,
                    ..
                } => ExportType::Table {
                    element,
                    minimum: len,
                    maximum,
                    is_64,
                },
                other => other,
            })
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(read) }
    }

    /// What the elements of a table are. Any thread.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] for a number that means nothing.
    pub fn realm_table_element(&self, id: u32) -> Result<ValueType> {
        let realm = self.realm()?;
        let table = realm.tables.get(id as usize);
        Ok(table.ok_or_else(|| unknown("table", id))?.element)
    }

    fn reference(&self, mut context: impl AsContextMut, value: Value) -> Result<Ref> {
        let value = value.into_val(self.id(), &mut context)?;
        let reference = value.ref_();
        reference.ok_or_else(|| Error::invalid("a table holds references only"))
    }
}

fn ref_type(element: ValueType) -> RefType {
    match element {
        ValueType::ExternRef => RefType::EXTERNREF,
        _ => RefType::FUNCREF,
    }
}
