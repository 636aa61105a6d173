//! What the `WebAssembly` namespace of glue is written over.
//!
//! Memories, tables, globals and tags are numbers here; `lib/webassembly.js` has the classes. Functions
//! are made here, because their identity is.

use std::rc::Rc;
use std::sync::Arc;

use wasm_molt_engine::{
    Error, ErrorCode, ExportType, ImportKind, Module, RealmExport, RealmImport, Replica, Result,
    Value, ValueType,
};

use crate::binding::arg;
use crate::convert::cannot_cross;
use crate::deferred::Deferred;
use crate::entry::{Entry, enter_realm, stale_realm};
use crate::env::EnvState;
use crate::error::Place;
use crate::exports::{function_of, function_value, signature_of};
use crate::imports::host_function;
use crate::js::{Js, JsResult, Kind, Native, Pending, Val};
use crate::realm::RealmSide;
use crate::side::{Frame, ManagerSide, ReplicaSide};

/// Every function, by the name that `lib/webassembly.js` uses.
pub(crate) const FUNCTIONS: &[(&str, Native)] = &[
    ("realmOpen", open),
    ("realmIsOpen", is_open),
    ("moduleCompile", module_compile),
    ("moduleCompileAsync", module_compile_async),
    ("moduleValidate", module_validate),
    ("moduleImports", module_imports),
    ("moduleExports", module_exports),
    ("moduleCustomSections", module_custom_sections),
    ("realmInstantiate", instantiate),
    ("memoryNew", memory_new),
    ("realmMemoryBuffer", memory_buffer),
    ("realmMemoryGrow", memory_grow),
    ("realmMemoryType", memory_type),
    ("tableNew", table_new),
    ("tableLength", table_length),
    ("tableGet", table_get),
    ("tableSet", table_set),
    ("tableGrow", table_grow),
    ("tableType", table_type),
    ("globalNew", global_new),
    ("globalGet", global_get),
    ("globalSet", global_set),
    ("globalType", global_type),
    ("tagNew", tag_new),
    ("tagType", tag_type),
    ("functionType", function_type),
];

/// What JavaScript has of a realm.
pub(crate) struct Handle {
    pub(crate) env: Rc<EnvState>,
    pub(crate) manager: Rc<ManagerSide>,
    pub(crate) side: Rc<ReplicaSide>,
}

/// What JavaScript is given of a realm.
pub(crate) fn handle(
    env: &Rc<EnvState>,
    manager: &Rc<ManagerSide>,
    side: &Rc<ReplicaSide>,
) -> JsResult<Val> {
    env.js().external(Handle {
        env: Rc::clone(env),
        manager: Rc::clone(manager),
        side: Rc::clone(side),
    })
}

pub(crate) fn realm<'a>(js: Js, args: &[Val]) -> JsResult<&'a Handle> {
    // SAFETY: `lib/webassembly.js` passes what `leaseRealm` or `managerRealm` returned, and holds it.
    unsafe { js.external_ref::<Handle>(arg(args, 0)) }
}

fn module<'a>(js: Js, value: Val) -> JsResult<&'a Arc<Module>> {
    // SAFETY: `lib/webassembly.js` passes what `moduleCompile` returned, and holds it.
    unsafe { js.external_ref::<Arc<Module>>(value) }
}

impl Handle {
    fn js(&self) -> Js {
        self.env.js()
    }

    fn side(&self) -> JsResult<&RealmSide> {
        let realm = self.side.realm.as_ref();
        realm.ok_or_else(|| self.throw(&Error::internal("an instance that is no realm")))
    }

    #[cold]
    pub(crate) fn throw(&self, error: &Error) -> Pending {
        let place = Place {
            realm: Some(&*self.side),
            ..self.manager.place()
        };
        self.env.throw(error, &place)
    }

    /// What the JS API has a `RangeError` for.
    #[cold]
    fn throw_range(&self, error: &Error) -> Pending {
        match error.code() {
            Some(ErrorCode::InvalidArgument) => self.js().throw_range_error(&error.to_string()),
            _ => self.throw(error),
        }
    }

    /// What the JS API has a `TypeError` for.
    #[cold]
    fn throw_type(&self, error: &Error) -> Pending {
        match error.code() {
            Some(ErrorCode::InvalidArgument | ErrorCode::StaleHandle)
                if !self.side.is_expired.get() =>
            {
                self.js().throw_type_error(&error.to_string())
            }
            _ => self.throw(error),
        }
    }

    /// Runs `f` inside the realm.
    pub(crate) fn enter<T>(&self, f: impl FnOnce(&Replica) -> Result<T>) -> JsResult<Result<T>> {
        let entry = enter_realm(&self.manager, &self.side).map_err(|e| self.throw(&e))?;
        let outcome = f(&self.side.replica);
        if let Entry::Home(inside) = entry {
            drop(inside);
        }
        Ok(outcome)
    }

    /// The same in the store of the guest's thread whose host call JavaScript is answering, if so.
    fn enter_there<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Replica) -> Result<T> + Send + 'static,
    ) -> JsResult<Result<T>> {
        let there = match self.side.frames.borrow().last() {
            Some(Frame::Remote(end)) => Some(Rc::clone(end)),
            _ => None,
        };
        match there {
            Some(end) => Ok(end.act(&self.env, &self.side, f)),
            None => self.enter(f),
        }
    }

    fn run_there<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Replica) -> Result<T> + Send + 'static,
    ) -> JsResult<T> {
        self.enter_there(f)?.map_err(|e| self.throw(&e))
    }

    fn run<T>(&self, f: impl FnOnce(&Replica) -> Result<T>) -> JsResult<T> {
        self.enter(f)?.map_err(|e| self.throw(&e))
    }

    fn id(&self, args: &[Val], index: usize) -> u32 {
        let number = self.js().get_number(arg(args, index));
        number.unwrap_or_default() as u32
    }

    fn count(&self, args: &[Val], index: usize) -> u64 {
        let number = self.js().get_number(arg(args, index));
        number.unwrap_or_default() as u64
    }

    fn maximum(&self, args: &[Val], index: usize) -> Option<u64> {
        self.js().get_number(arg(args, index)).map(|n| n as u64)
    }

    fn flag(&self, args: &[Val], index: usize) -> bool {
        self.js().get_bool(arg(args, index)).unwrap_or(false)
    }
}

/// `(realm, hooks) => void`
fn open(js: Js, args: &[Val]) -> JsResult<Val> {
    realm(js, args)?.side()?.open(js, arg(args, 1))?;
    Ok(js.undefined())
}

/// `(realm) => boolean`: whether it could be entered now.
fn is_open(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    js.boolean(enter_realm(&realm.manager, &realm.side).is_ok())
}

// ---------------------------------------------------------------------- modules

fn bytes(realm: &Handle, args: &[Val]) -> JsResult<Vec<u8>> {
    match realm.js().bytes(arg(args, 1))? {
        // SAFETY: no JavaScript has run since the bytes were taken.
        Some(bytes) => Ok(unsafe { bytes.to_vec() }),
        None => Err(realm
            .js()
            .throw_type_error("a module's bytes must be an ArrayBuffer or a view of one")),
    }
}

/// `(realm, bytes) => module`
fn module_compile(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let bytes = bytes(realm, args)?;
    let module = realm.manager.manager.compile(bytes);
    js.external(module.map_err(|e| realm.throw(&e))?)
}

/// `(realm, bytes) => Promise<module>`
fn module_compile_async(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let bytes = bytes(realm, args)?;
    let pending = Deferred::new(&realm.env, &realm.manager)?;
    let promise = pending.promise;
    let id = realm.side.replica.id();
    let done = pending.done(
        move |env, manager, outcome: Result<Arc<Module>>| match outcome {
            Ok(module) => env.js().external(module),
            Err(error) => {
                let side = env.replicas.borrow().get(&id).map(Rc::clone);
                let place = Place {
                    realm: side.as_deref(),
                    ..manager.place()
                };
                Err(env.throw(&error, &place))
            }
        },
    );
    let done = Box::new(move |outcome| done(Ok(outcome)));
    realm.manager.manager.compile_later(bytes, done);
    Ok(promise)
}

/// `(realm, bytes) => boolean`
fn module_validate(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let bytes = bytes(realm, args)?;
    let valid = realm.manager.manager.validates(&bytes);
    js.boolean(valid.map_err(|e| realm.throw(&e))?)
}

fn names<S: AsRef<str>>(js: Js, names: &[S]) -> JsResult<Val> {
    let array = js.array(names.len())?;
    for (index, name) in (0..).zip(names) {
        js.set_element(array, index, js.string(name.as_ref())?)?;
    }
    Ok(array)
}

fn list(js: Js, values: &[Val]) -> JsResult<Val> {
    let array = js.array(values.len())?;
    for (index, value) in (0..).zip(values) {
        js.set_element(array, index, *value)?;
    }
    Ok(array)
}

fn optional(js: Js, number: Option<u64>) -> JsResult<Val> {
    number.map_or_else(|| Ok(js.undefined()), |number| js.number(number as f64))
}

fn shown(js: Js, ty: &ExportType) -> JsResult<(Val, Val)> {
    let (kind, shown) = match ty {
        ExportType::Function(params, results) => (
            "function",
            list(js, &[names(js, params)?, names(js, results)?])?,
        ),
        ExportType::Memory {
            minimum,
            maximum,
            shared,
            is_64,
        } => {
            let parts = [
                js.number(*minimum as f64)?,
                optional(js, *maximum)?,
                js.boolean(*shared)?,
                js.boolean(*is_64)?,
            ];
            ("memory", list(js, &parts)?)
        }
        ExportType::Global { ty, mutable } => (
            "global",
            list(js, &[js.string(ty)?, js.boolean(*mutable)?])?,
        ),
        ExportType::Table {
            element,
            minimum,
            maximum,
            is_64,
        } => {
            let parts = [
                js.string(element)?,
                js.number(*minimum as f64)?,
                optional(js, *maximum)?,
                js.boolean(*is_64)?,
            ];
            ("table", list(js, &parts)?)
        }
        ExportType::Tag(params) => ("tag", list(js, &[names(js, params)?])?),
    };
    Ok((js.string(kind)?, shown))
}

/// `(module) => [module, name, kind, type][]`
fn module_imports(js: Js, args: &[Val]) -> JsResult<Val> {
    let module = module(js, arg(args, 0))?;
    let mut all = Vec::with_capacity(module.imports().len());
    for import in module.imports() {
        let (kind, ty) = shown(js, &import.shown_type())?;
        let parts = [
            js.string(&import.module)?,
            js.string(&import.name)?,
            kind,
            ty,
        ];
        all.push(list(js, &parts)?);
    }
    list(js, &all)
}

/// `(module) => [name, kind, type][]`
fn module_exports(js: Js, args: &[Val]) -> JsResult<Val> {
    let module = module(js, arg(args, 0))?;
    let mut all = Vec::with_capacity(module.exports().len());
    for export in module.exports() {
        let (kind, ty) = shown(js, &export.ty)?;
        all.push(list(js, &[js.string(&export.name)?, kind, ty])?);
    }
    list(js, &all)
}

/// `(module, name) => ArrayBuffer[]`
fn module_custom_sections(js: Js, args: &[Val]) -> JsResult<Val> {
    let module = module(js, arg(args, 0))?;
    let name = js.get_string(arg(args, 1))?;
    let mut all = Vec::new();
    for section in module.custom_sections(&name) {
        let copy = js.uint8_array(section)?;
        all.push(js.property(copy, c"buffer")?);
    }
    list(js, &all)
}

/// `(realm, module, imports) => (function | id)[]`
fn instantiate(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let module = realm.manager.manager.adopt(module(js, arg(args, 1))?);
    let module = &module.map_err(|e| realm.throw(&e))?;
    let given = arg(args, 2);
    let mut imports = Vec::with_capacity(module.imports().len());
    for (index, import) in (0..).zip(module.imports()) {
        let value = js.element(given, index)?;
        imports.push(match &import.kind {
            ImportKind::Function(_)
                if import.is_discard() && matches!(js.kind(value)?, Kind::Undefined) =>
            {
                RealmImport::Discard
            }
            ImportKind::Function(_) => match function_of(js, value) {
                Some(Value::Func(Some(func))) if func.replica_id() == realm.side.replica.id() => {
                    RealmImport::Guest(func)
                }
                _ => {
                    let (env, manager, side) = (&realm.env, &realm.manager, &realm.side);
                    RealmImport::Function(host_function(env, manager, side, value, import)?)
                }
            },
            _ => RealmImport::Item(js.get_number(value).unwrap_or(-1.0) as u32),
        });
    }
    let made = realm.enter(|replica| {
        // SAFETY: `enter` has got the right to be inside.
        let make = || unsafe { replica.realm_instantiate(module, imports) };
        // Its start function is code like any other.
        match realm.manager.timeout_ms {
            Some(ms) => replica.with_deadline(ms, make)?,
            None => make(),
        }
    })?;
    realm.side.before_js(js);
    let exports = made.map_err(|error| {
        realm.manager.manager.call_failed_at_home(&error);
        realm.throw_range(&error)
    })?;
    let array = js.array(exports.len())?;
    for (index, export) in (0..).zip(exports) {
        let value = match export {
            RealmExport::Function(func) => function_value(&realm.env, &realm.side, func)?,
            RealmExport::Item(id) => js.number(f64::from(id))?,
        };
        js.set_element(array, index, value)?;
    }
    Ok(array)
}

// ---------------------------------------------------------------------- memories

/// `(realm, initial, maximum, isShared, is64) => id`
fn memory_new(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let (initial, maximum) = (realm.count(args, 1), realm.maximum(args, 2));
    let kind = (realm.flag(args, 3), realm.flag(args, 4));
    // SAFETY: `enter` has got the right to be inside.
    let made = realm.enter(|it| unsafe { it.realm_memory_new(initial, maximum, kind) })?;
    js.number(f64::from(made.map_err(|e| match e.code() {
        Some(ErrorCode::Link) => js.throw_type_error(&e.to_string()),
        _ => realm.throw_range(&e),
    })?))
}

/// `(realm, id) => ArrayBuffer`
fn memory_buffer(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let id = realm.id(args, 1);
    if realm.side.is_expired.get() {
        let stale = stale_realm(&realm.manager, &realm.side);
        return Err(realm.throw(&stale));
    }
    let side = realm.side()?;
    side.buffer(js, &realm.side.replica, id)
        .unwrap_or_else(|error| Err(realm.throw(&error)))
}

/// `(realm, id, delta) => pages`, -1 if refused
fn memory_grow(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let (id, delta) = (realm.id(args, 1), realm.count(args, 2));
    // SAFETY: `run` has got the right to be inside.
    let grown = realm.run(|it| unsafe { it.realm_memory_grow(id, delta) })?;
    if grown.is_some() && !realm.side.replica.realm_memory_is_shared(id) {
        // Also where it has not become larger: the JS API says so.
        realm.side()?.end_views(js, &[id]);
    }
    js.number(grown.map_or(-1.0, |pages| pages as f64))
}

/// `(realm, id) => [pages, maximum, isShared, is64]`
fn memory_type(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let ty = realm.side.replica.realm_memory_type(realm.id(args, 1));
    Ok(shown(js, &ty.map_err(|e| realm.throw(&e))?)?.1)
}

// ---------------------------------------------------------------------- tables

/// `(realm, element, initial, maximum, value, is64) => id`
fn table_new(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let element = match js.get_string(arg(args, 1))?.as_str() {
        "externref" => ValueType::ExternRef,
        _ => ValueType::FuncRef,
    };
    let (initial, maximum) = (realm.count(args, 2), realm.maximum(args, 3));
    let value = realm.env.to_wasm(arg(args, 4), element)?;
    let sizes = (initial, maximum, realm.flag(args, 5));
    // SAFETY: `enter` has got the right to be inside.
    let new_table = |it: &Replica| unsafe { it.realm_table_new(element, sizes, value) };
    let made = realm.enter(new_table)?;
    js.number(f64::from(made.map_err(|e| realm.throw_range(&e))?))
}

/// `(realm, id) => number`
fn table_length(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let id = realm.id(args, 1);
    // SAFETY: `run` has got the right to be inside.
    let len = realm.run_there(move |it| unsafe { it.realm_table_len(it.own_table(id)?) })?;
    js.number(len as f64)
}

#[cold]
fn no_element(js: Js, index: u64) -> Pending {
    js.throw_range_error(&format!("the table has no element {index}"))
}

/// `(realm, id, index) => value`
fn table_get(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let (id, index) = (realm.id(args, 1), realm.count(args, 2));
    // SAFETY: `enter` has got the right to be inside.
    let got = realm.enter_there(move |it| {
        // SAFETY: whoever runs this is inside that store.
        let got = unsafe { it.realm_table_get(it.own_table(id)?, index) }?;
        Ok(got.map(|value| it.home_value(value)))
    })?;
    match got.map_err(|e| realm.throw_type(&e))? {
        Some(value) => realm.env.to_js(&value, Some(&realm.side)),
        None => Err(no_element(js, index)),
    }
}

fn element(realm: &Handle, id: u32, value: Val) -> JsResult<Value> {
    let element = realm.side.replica.realm_table_element(id);
    let element = element.map_err(|e| realm.throw(&e))?;
    realm.env.to_wasm(value, element)
}

/// `(realm, id, index, value) => void`
fn table_set(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let (id, index) = (realm.id(args, 1), realm.count(args, 2));
    let value = element(realm, id, arg(args, 3))?;
    // SAFETY: `enter` has got the right to be inside.
    let set = realm.enter_there(move |it| unsafe {
        it.realm_table_set(it.own_table(id)?, index, it.own_value(value)?)
    })?;
    if set.map_err(|e| realm.throw_type(&e))? {
        Ok(js.undefined())
    } else {
        Err(no_element(js, index))
    }
}

/// `(realm, id, delta, value) => length`, -1 if refused
fn table_grow(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let (id, delta) = (realm.id(args, 1), realm.count(args, 2));
    let value = element(realm, id, arg(args, 3))?;
    // SAFETY: `enter` has got the right to be inside.
    let grown = realm.enter_there(move |it| unsafe {
        it.realm_table_grow(it.own_table(id)?, delta, it.own_value(value)?)
    })?;
    let grown = grown.map_err(|e| realm.throw_type(&e))?;
    js.number(grown.map_or(-1.0, |len| len as f64))
}

/// `(realm, id) => [element, length, maximum, is64]`
fn table_type(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let id = realm.id(args, 1);
    // SAFETY: `run` has got the right to be inside.
    Ok(shown(js, &realm.run(|it| unsafe { it.realm_table_type(id) })?)?.1)
}

// ---------------------------------------------------------------------- globals

/// `(realm, type, isMutable, value) => id`
fn global_new(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let name = js.get_string(arg(args, 1))?;
    let is_mutable = realm.flag(args, 2);
    let ty = match name.as_str() {
        "i32" => Some(ValueType::I32),
        "i64" => Some(ValueType::I64),
        "f32" => Some(ValueType::F32),
        "f64" => Some(ValueType::F64),
        "externref" => Some(ValueType::ExternRef),
        "funcref" | "anyfunc" => Some(ValueType::FuncRef),
        _ => None,
    };
    let value = ty
        .map(|ty| realm.env.to_wasm(arg(args, 3), ty))
        .transpose()?;
    // SAFETY: `enter` has got the right to be inside.
    let made = realm.enter(|it| unsafe { it.realm_global_new(&name, is_mutable, value) })?;
    js.number(f64::from(made.map_err(|e| realm.throw_type(&e))?))
}

/// `(realm, id) => value`
fn global_get(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let id = realm.id(args, 1);
    // SAFETY: `run` has got the right to be inside.
    let get = move |it: &Replica| {
        // SAFETY: whoever runs this is inside that store.
        let got = unsafe { it.realm_global_get(it.own_global(id)?) }?;
        Ok(got.map(|value| it.home_value(value)))
    };
    match realm.run_there(get)? {
        Some(value) => realm.env.to_js(&value, Some(&realm.side)),
        None => Err(cannot_cross(js)),
    }
}

/// `(realm, id, value) => void`
fn global_set(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let id = realm.id(args, 1);
    let ty = realm.side.replica.realm_global_type(id);
    let (ty, _) = ty.map_err(|e| realm.throw(&e))?;
    let value = realm.env.to_wasm(arg(args, 2), ty)?;
    // SAFETY: `enter` has got the right to be inside.
    let set = realm.enter_there(move |it| unsafe {
        it.realm_global_set(it.own_global(id)?, it.own_value(value)?)
    })?;
    set.map_err(|e| realm.throw_type(&e))?;
    Ok(js.undefined())
}

/// `(realm, id) => [type, isMutable]`
fn global_type(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let ty = realm.side.replica.realm_global_type(realm.id(args, 1));
    Ok(shown(js, &ty.map_err(|e| realm.throw(&e))?.1)?.1)
}

// ---------------------------------------------------------------------- tags and functions

/// `(realm, params) => id`
fn tag_new(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let given = arg(args, 1);
    let mut params = Vec::new();
    for index in 0..js.array_length(given)? {
        params.push(js.get_string(js.element(given, index)?)?);
    }
    // SAFETY: `enter` has got the right to be inside.
    let made = realm.enter(|it| unsafe { it.realm_tag_new(&params) })?;
    js.number(f64::from(made.map_err(|e| realm.throw_type(&e))?))
}

/// `(realm, id) => params`
fn tag_type(js: Js, args: &[Val]) -> JsResult<Val> {
    let realm = realm(js, args)?;
    let id = realm.id(args, 1);
    // SAFETY: `run` has got the right to be inside.
    let (_, ty) = realm.run(|it| unsafe { it.realm_tag_type(id) })?;
    match ty {
        ExportType::Tag(params) => names(js, &params),
        _ => js.array(0),
    }
}

/// `(value) => [params, results] | undefined`
fn function_type(js: Js, args: &[Val]) -> JsResult<Val> {
    let value = arg(args, 0);
    if js.kind(value)? != Kind::Function {
        return Ok(js.undefined());
    }
    match signature_of(js, value) {
        Some(signature) => {
            let (params, results) = signature.names();
            list(js, &[names(js, &params)?, names(js, &results)?])
        }
        None => Ok(js.undefined()),
    }
}
