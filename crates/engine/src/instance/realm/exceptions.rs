//! Tags of a realm, and the exceptions that go between guest and host.

use wasmtime::{
    AsContextMut, ExnRef, ExnRefPre, ExnType, ExternType, FuncType, OwnedRooted, RootScope, Rooted,
    StoreContextMut, Tag, TagType, ThrownException,
};

use super::{Exception, MOST_THROWN, unknown, value_type};
use crate::error::{Error, Result};
use crate::instance::module::ExportType;
use crate::instance::replica::{Guest, Replica};
use crate::instance::value::{Value, ValueType};

impl Replica {
    /// A new tag, with the JS API's names of its parameters' types. Answers its number.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] for a type that cannot be had.
    pub unsafe fn realm_tag_new(&self, params: &[String]) -> Result<u32> {
        let make = |context: &mut StoreContextMut<'_, Guest>| {
            let types = params.iter().map(|name| {
                value_type(name).ok_or_else(|| {
                    Error::invalid(format!("'{name}' is no type of a tag's parameter"))
                })
            });
            let types = types.collect::<Result<Vec<_>>>()?;
            let ty = TagType::new(FuncType::new(context.engine(), types, []));
            let tag = Tag::new(&mut *context, &ty).map_err(Error::internal)?;
            let mut realm = self.realm()?;
            realm.can_catch = true;
            Ok(realm.add_tag(tag))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(make) }
    }

    /// The types of a tag's parameters, and how the JS API calls them.
    ///
    /// # Safety
    /// The calling thread holds the replica.
    ///
    /// # Errors
    /// [`ErrorCode::StaleHandle`] once released.
    pub unsafe fn realm_tag_type(&self, id: u32) -> Result<(Vec<ValueType>, ExportType)> {
        let read = |context: &mut StoreContextMut<'_, Guest>| {
            let tag = self.tag(id)?;
            let ty = tag.ty(&*context);
            let types = ty.ty().params().map(|ty| ValueType::from(&ty)).collect();
            Ok((types, ExportType::of(&ExternType::Tag(ty))))
        };
        // SAFETY: contract of this function.
        unsafe { self.in_realm(read) }
    }

    fn tag(&self, id: u32) -> Result<Tag> {
        let realm = self.realm()?;
        let tag = realm.tags.get(id as usize).copied();
        tag.ok_or_else(|| unknown("tag", id))
    }

    /// Whether guests can catch what the host throws: then its exceptions must say what they are.
    pub fn can_catch(&self) -> bool {
        self.realm_cell().is_some() && self.realm().is_ok_and(|realm| realm.can_catch)
    }

    /// What ends a host function that failed: where it threw an exception, something that guests can catch.
    pub(crate) fn unwind(
        &self,
        context: StoreContextMut<'_, Guest>,
        error: Error,
    ) -> wasmtime::Error {
        let Error::Exception(exception) = error else {
            return wasmtime::Error::new(error);
        };
        self.throw(context, *exception)
            .unwrap_or_else(wasmtime::Error::new)
    }

    fn throw(
        &self,
        mut context: StoreContextMut<'_, Guest>,
        exception: Exception,
    ) -> Result<wasmtime::Error> {
        let tag = self.tag(exception.tag)?;
        let mut scope = RootScope::new(&mut context);
        let mut fields = Vec::with_capacity(exception.payload.len());
        for value in &exception.payload {
            fields.push(value.clone().into_val(self.id(), &mut scope)?);
        }
        let ty = ExnType::from_tag_type(&tag.ty(&scope)).map_err(Error::internal)?;
        let allocator = ExnRefPre::new(&mut scope, ty);
        let made = ExnRef::new(&mut scope, &allocator, &tag, &fields).map_err(Error::internal)?;
        let kept = made.to_owned_rooted(&mut scope).map_err(Error::internal)?;
        {
            let mut realm = self.realm()?;
            realm.thrown.push_back((kept, exception));
            if realm.thrown.len() > MOST_THROWN {
                realm.thrown.pop_front();
            }
        }
        match scope.as_context_mut().throw::<()>(made) {
            Ok(()) => Err(Error::internal("an exception that was not thrown")),
            Err(thrown) => Ok(thrown),
        }
    }

    /// What a guest has thrown and nobody has caught, if that is how a run in that context has ended.
    pub(crate) fn uncaught(
        &self,
        context: impl AsContextMut<Data = Guest>,
        error: &wasmtime::Error,
    ) -> Option<Error> {
        if !error.is::<ThrownException>() {
            return None;
        }
        self.realm_cell()?;
        let take = || -> Result<Error> {
            let mut scope = RootScope::new(context);
            let thrown = scope.as_context_mut().take_pending_exception();
            let thrown = thrown.ok_or_else(|| Error::internal("an exception that is gone"))?;
            let tag = thrown.tag(&mut scope).map_err(Error::internal)?;
            let types = tag.ty(&scope);
            let mut payload = Vec::new();
            for index in 0..types.ty().params().len() {
                let field = thrown.field(&mut scope, index).map_err(Error::internal)?;
                // What cannot cross is shown as nothing.
                let value = Value::from_val(&field, self.id(), &mut scope);
                let value = value.unwrap_or(Value::Extern(None));
                self.seen(&value, &mut scope);
                payload.push(value);
            }
            let mut realm = self.realm()?;
            let known = realm.tags.iter().position(|it| Tag::eq(it, &tag, &scope));
            let tag = known.map_or_else(|| realm.add_tag(tag), |index| index as u32);
            let is_it = |kept: &OwnedRooted<ExnRef>| {
                Rooted::<ExnRef>::ref_eq(&scope, kept, &thrown).unwrap_or(false)
            };
            let same = realm.thrown.iter().find(|(kept, _)| is_it(kept));
            let object = same.and_then(|(_, exception)| exception.object.clone());
            Ok(Error::Exception(Box::new(Exception {
                tag,
                payload,
                object,
            })))
        };
        take().ok()
    }

    /// The store is gone: values of the host are not kept for it.
    pub(crate) fn forget_realm(&self) {
        if self.realm_cell().is_some()
            && let Ok(mut realm) = self.realm()
        {
            realm.thrown.clear();
            // Shared memories are nobody's, so whoever names one keeps it.
            let gone: Vec<_> = realm.memories.drain(..).map(|it| it.record).collect();
            realm.gone = gone;
            realm.shareable.clear();
            for table in &mut realm.tables {
                table.known = None;
            }
        }
    }
}
