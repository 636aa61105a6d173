//! Globals of a realm, for the host.

use wasmtime::{Global, GlobalType, Mutability, RootScope, StoreContextMut, Val};

use super::{unknown, value_type};
use crate::error::{Error, Result};
use crate::instance::module::ExportType;
use crate::instance::replica::{Guest, Replica};
use crate::instance::value::{Value, ValueType, type_name};

impl Replica {
    /// A new global. Answers its number.
    ///
    /// * `ty`: the JS API's name of its type.
    /// * `value`: its first value; the default one of a type that cannot cross.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for a type that cannot be had.
    pub unsafe fn realm_global_new(
        &self,
        ty: &str,
        is_mutable: bool,
        value: Option<Value>,
    ) -> Result<u32> {
        let make = |context: &mut StoreContextMut<'_, Guest>| {
            let content = value_type(ty)
                .ok_or_else(|| Error::invalid(format!("'{ty}' is no type of a global")))?;
            let mutability = if is_mutable {
                Mutability::Var
            } else {
                Mutability::Const
            };
            let mut scope = RootScope::new(&mut *context);
            let value = match value {
                Some(value) => value.into_val(self.id(), &mut scope)?,
                None => Val::default_for_ty(&content)
                    .ok_or_else(|| Error::invalid(format!("'{ty}' has no default value")))?,
            };
            let ty = GlobalType::new(content, mutability);
            let global = Global::new(&mut scope, ty, value)
                .map_err(|error| Error::invalid(format!("{error:#}")))?;
            drop(scope);
            Ok(self.realm()?.add_global(global, &*context))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(make) }
    }

    /// The value of a global; `None` if it cannot cross.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released.
    pub unsafe fn realm_global_get(&self, id: u32) -> Result<Option<Value>> {
        let read = |context: &mut StoreContextMut<'_, Guest>| {
            let (global, ty) = self.global(id)?;
            if ty == ValueType::Opaque {
                return Ok(None);
            }
            let mut scope = RootScope::new(&mut *context);
            let value = global.get(&mut scope);
            let value = Value::from_val(&value, self.id(), &mut scope)?;
            self.seen(&value, &mut scope);
            Ok(Some(value))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(read) }
    }

    /// Writes a global, which must be mutable and hold values of that type.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released, [`ErrorCode::InvalidArgument`] for another value.
    pub unsafe fn realm_global_set(&self, id: u32, value: Value) -> Result<()> {
        let write = |context: &mut StoreContextMut<'_, Guest>| {
            let (global, _) = self.global(id)?;
            let mut scope = RootScope::new(&mut *context);
            let value = value.into_val(self.id(), &mut scope)?;
            let set = global.set(&mut scope, value);
            set.map_err(|error| Error::invalid(format!("{error:#}")))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(write) }
    }

    fn global(&self, id: u32) -> Result<(Global, ValueType)> {
        let realm = self.realm()?;
        let global = realm.globals.get(id as usize);
        let global = global.ok_or_else(|| unknown("global", id))?;
        Ok((global.global, ValueType::from(&global.content)))
    }

    /// What a global holds, and how the JS API calls that. Any thread.
    ///
    /// # Errors
    /// [`ErrorCode::Internal`] for a number that means nothing.
    pub fn realm_global_type(&self, id: u32) -> Result<(ValueType, ExportType)> {
        let realm = self.realm()?;
        let global = realm.globals.get(id as usize);
        let global = global.ok_or_else(|| unknown("global", id))?;
        let ty = ExportType::Global {
            ty: type_name(&global.content),
            mutable: global.is_mutable,
        };
        Ok((ValueType::from(&global.content), ty))
    }
}
