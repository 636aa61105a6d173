//! Node-API, one call at a time: the raw functions behind safe names.
//!
//! The generated wrappers of napi-rs cost some 200 ns a call; exports and imports of a guest cannot
//! afford that, so everything below the module's entry speaks the C interface through this file.
//!
//! A failed call always leaves a JavaScript exception pending, and [`Pending`] says so: whoever gets
//! one returns to JavaScript, or takes the exception with [`Js::take_exception`].

use std::any::{Any, TypeId};
use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use napi::sys;

use crate::env::EnvState;

/// A JavaScript value, valid in the present handle scope on the JS thread.
pub(crate) type Val = sys::napi_value;

/// A JavaScript exception is pending.
#[derive(Debug)]
pub(crate) struct Pending;

/// A result whose failure is a pending JavaScript exception.
pub(crate) type JsResult<T> = Result<T, Pending>;

/// A function of the binding: arguments in, value out.
pub(crate) type Native = fn(Js, &[Val]) -> JsResult<Val>;

/// `napi_create_type_error` and its kin.
type CreateError = unsafe extern "C" fn(
    sys::napi_env,
    sys::napi_value,
    sys::napi_value,
    *mut sys::napi_value,
) -> sys::napi_status;

/// The environment of the running callback. Lives on its JS thread only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Js(sys::napi_env);

/// `typeof`, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Undefined,
    Null,
    Boolean,
    Number,
    String,
    Object,
    Function,
    BigInt,
    External,
    Other,
}

/// Bytes of a typed array or buffer, borrowed for the present callback.
#[derive(Debug)]
pub(crate) struct Bytes {
    pub(crate) data: *const u8,
    pub(crate) len: usize,
}

impl Bytes {
    /// # Safety
    /// No JavaScript may have run since the bytes were taken (it could have detached them).
    pub(crate) unsafe fn to_vec(&self) -> Vec<u8> {
        let mut copy = Vec::with_capacity(self.len);
        if self.len > 0 {
            // SAFETY: contract of this function; Node-API gave a valid range. No reference is made: it may be
            // shared, or linear memory, and somebody else may write there meanwhile.
            unsafe { ptr::copy_nonoverlapping(self.data, copy.as_mut_ptr(), self.len) };
            // SAFETY: so many bytes have room, and have just been written.
            unsafe { copy.set_len(self.len) };
        }
        copy
    }
}

/// Whether `napi_get_value_int32` takes what is no number, and coerces it, as Deno's does.
static COERCES: AtomicBool = AtomicBool::new(false);

/// Calls one Node-API function and turns its status into a [`JsResult`].
macro_rules! napi {
    ($js:expr, $name:ident ( $($arg:expr),* $(,)? )) => {{
        // SAFETY: `Js` is only made from the environment of a running callback and stays on its
        // thread; pointers passed here are valid for the call, as the surrounding code shows.
        let status = unsafe { sys::$name($js.0, $($arg),*) };
        $js.check(status, stringify!($name))
    }};
}

impl Js {
    /// # Safety
    /// `env` is the environment of a callback that runs on this thread.
    pub(crate) unsafe fn new(env: sys::napi_env) -> Self {
        Self(env)
    }

    pub(crate) fn raw(self) -> sys::napi_env {
        self.0
    }

    #[inline]
    fn check(self, status: sys::napi_status, name: &str) -> JsResult<()> {
        if status == sys::Status::napi_ok {
            Ok(())
        } else {
            Err(self.failed(status, name))
        }
    }

    #[cold]
    fn failed(self, status: sys::napi_status, name: &str) -> Pending {
        if !self.is_exception_pending() && status != sys::Status::napi_pending_exception {
            self.throw_type_error(&format!("{name} failed with Node-API status {status}"));
        }
        Pending
    }

    pub(crate) fn is_exception_pending(self) -> bool {
        let mut pending = false;
        // SAFETY: valid environment, valid out pointer.
        unsafe { sys::napi_is_exception_pending(self.0, &raw mut pending) };
        pending
    }

    /// Whether the environment is being ended from outside (`worker.terminate()`, `process.exit()`):
    /// Node then refuses whatever might run JavaScript. Asking makes, allocates and runs nothing, so
    /// it may be done in a signal handler on the JS thread, and V8 has no other way to ask.
    pub(crate) fn is_ending(self) -> bool {
        // SAFETY: valid environment; nothing is thrown, because there is no value to throw.
        let status = unsafe { sys::napi_throw(self.0, ptr::null_mut()) };
        status != sys::Status::napi_invalid_arg && !self.is_exception_pending()
    }

    /// The pending exception, no longer pending; `undefined` if there is none.
    pub(crate) fn take_exception(self) -> Val {
        let mut error = ptr::null_mut();
        // SAFETY: valid environment, valid out pointer.
        let status = unsafe { sys::napi_get_and_clear_last_exception(self.0, &raw mut error) };
        if status == sys::Status::napi_ok && !error.is_null() {
            error
        } else {
            self.undefined()
        }
    }

    pub(crate) fn throw(self, error: Val) -> Pending {
        // SAFETY: valid environment and value.
        unsafe { sys::napi_throw(self.0, error) };
        Pending
    }

    pub(crate) fn throw_type_error(self, message: &str) -> Pending {
        let maker = EnvState::known_helper(self, |helpers| helpers.type_error);
        self.throw_built_in(maker, sys::napi_create_type_error, message)
    }

    pub(crate) fn throw_range_error(self, message: &str) -> Pending {
        let maker = EnvState::known_helper(self, |helpers| helpers.range_error);
        self.throw_built_in(maker, sys::napi_create_range_error, message)
    }

    fn throw_built_in(self, maker: Option<Val>, create: CreateError, message: &str) -> Pending {
        let Ok(text) = self.string(message) else {
            return Pending;
        };
        let mut error = ptr::null_mut();
        // SAFETY: valid environment and values. Not by `call`, which comes here when it fails.
        let status = unsafe {
            match maker {
                Some(maker) => sys::napi_call_function(
                    self.0,
                    self.undefined(),
                    maker,
                    1,
                    &raw const text,
                    &raw mut error,
                ),
                None => create(self.0, ptr::null_mut(), text, &raw mut error),
            }
        };
        if status == sys::Status::napi_ok {
            return self.throw(error);
        }
        Pending
    }

    /// An exception that nothing in JavaScript can catch any more: as if thrown in a timer.
    pub(crate) fn report_uncaught(self) {
        let error = self.take_exception();
        // SAFETY: valid environment and value.
        unsafe { sys::napi_fatal_exception(self.0, error) };
    }

    // ------------------------------------------------------------------ making values

    #[inline]
    pub(crate) fn undefined(self) -> Val {
        let mut value = ptr::null_mut();
        // SAFETY: valid environment, valid out pointer; cannot fail otherwise.
        unsafe { sys::napi_get_undefined(self.0, &raw mut value) };
        value
    }

    pub(crate) fn global(self) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_get_global(&raw mut value))?;
        Ok(value)
    }

    pub(crate) fn null(self) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_get_null(&raw mut value))?;
        Ok(value)
    }

    pub(crate) fn boolean(self, v: bool) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_get_boolean(v, &raw mut value))?;
        Ok(value)
    }

    #[inline]
    pub(crate) fn int32(self, v: i32) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_create_int32(v, &raw mut value))?;
        Ok(value)
    }

    #[inline]
    pub(crate) fn number(self, v: f64) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_create_double(v, &raw mut value))?;
        Ok(value)
    }

    #[inline]
    pub(crate) fn bigint(self, v: i64) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_create_bigint_int64(v, &raw mut value))?;
        Ok(value)
    }

    pub(crate) fn string(self, v: &str) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(
            self,
            napi_create_string_utf8(v.as_ptr().cast(), v.len() as isize, &raw mut value)
        )?;
        Ok(value)
    }

    pub(crate) fn object(self) -> JsResult<Val> {
        match EnvState::known_helper(self, |helpers| helpers.object) {
            Some(make) => self.call(make, &[]),
            None => self.object_of_node(),
        }
    }

    fn object_of_node(self) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_create_object(&raw mut value))?;
        Ok(value)
    }

    pub(crate) fn array(self, len: usize) -> JsResult<Val> {
        if let Some(make) = EnvState::known_helper(self, |helpers| helpers.array) {
            return self.call(make, &[self.number(len as f64)?]);
        }
        let mut value = ptr::null_mut();
        napi!(self, napi_create_array_with_length(len, &raw mut value))?;
        Ok(value)
    }

    /// A new `Uint8Array` holding a copy.
    pub(crate) fn uint8_array(self, bytes: &[u8]) -> JsResult<Val> {
        self.new_uint8_array(bytes.len(), |fresh| {
            fresh.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// * `fill`: is given its bytes, which are zeros.
    pub(crate) fn new_uint8_array(
        self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> JsResult<()>,
    ) -> JsResult<Val> {
        let mut data: *mut c_void = ptr::null_mut();
        let mut buffer = ptr::null_mut();
        napi!(
            self,
            napi_create_arraybuffer(len, &raw mut data, &raw mut buffer)
        )?;
        if len > 0 {
            // SAFETY: the fresh buffer has `len` bytes at `data`, and nobody else has it yet.
            fill(unsafe { std::slice::from_raw_parts_mut(data.cast(), len) })?;
        }
        let mut value = ptr::null_mut();
        let kind = sys::TypedarrayType::uint8_array;
        napi!(
            self,
            napi_create_typedarray(kind, len, buffer, 0, &raw mut value)
        )?;
        Ok(value)
    }

    /// A function of the binding.
    pub(crate) fn native(self, name: &str, body: Native) -> JsResult<Val> {
        self.function(name, Some(native_entry), body as *mut c_void)
    }

    pub(crate) fn function(
        self,
        name: &str,
        callback: sys::napi_callback,
        data: *mut c_void,
    ) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(
            self,
            napi_create_function(
                name.as_ptr().cast(),
                name.len() as isize,
                callback,
                data,
                &raw mut value
            )
        )?;
        Ok(value)
    }

    /// A value that carries `content` through JavaScript, and drops it when it is collected.
    pub(crate) fn external<T: 'static>(self, content: T) -> JsResult<Val> {
        let data = Box::into_raw(Box::new(Held {
            ty: TypeId::of::<T>(),
            content,
        }));
        let mut value = ptr::null_mut();
        let made = napi!(
            self,
            napi_create_external(
                data.cast(),
                Some(drop_box::<Held<T>>),
                ptr::null_mut(),
                &raw mut value
            )
        );
        if made.is_err() {
            // SAFETY: Node-API did not take it.
            drop(unsafe { Box::from_raw(data) });
        }
        made.map(|()| value)
    }

    /// What [`Js::external`] put in; a `TypeError` for a handle of something else.
    ///
    /// # Safety
    /// If `value` is an external, this addon has made it: the binding is not given to users. What this
    /// returns is not kept beyond the callback, whose argument `value` is.
    pub(crate) unsafe fn external_ref<'a, T: 'static>(self, value: Val) -> JsResult<&'a T> {
        let mut data: *mut c_void = ptr::null_mut();
        napi!(self, napi_get_value_external(value, &raw mut data))?;
        if data.is_null() {
            return Err(self.throw_type_error("an empty handle"));
        }
        // SAFETY: contract of this function: whatever it holds, it begins with its type.
        if unsafe { *data.cast::<TypeId>() } != TypeId::of::<T>() {
            return Err(self.throw_type_error("a handle of something else"));
        }
        // SAFETY: it was made with this `T`, as was just seen; the value is alive in this callback.
        Ok(unsafe { &(*data.cast::<Held<T>>()).content })
    }

    // ------------------------------------------------------------------ reading values

    pub(crate) fn kind(self, value: Val) -> JsResult<Kind> {
        let mut kind = 0;
        napi!(self, napi_typeof(value, &raw mut kind))?;
        Ok(match kind {
            sys::ValueType::napi_undefined => Kind::Undefined,
            sys::ValueType::napi_null => Kind::Null,
            sys::ValueType::napi_boolean => Kind::Boolean,
            sys::ValueType::napi_number => Kind::Number,
            sys::ValueType::napi_string => Kind::String,
            sys::ValueType::napi_object => Kind::Object,
            sys::ValueType::napi_function => Kind::Function,
            sys::ValueType::napi_bigint => Kind::BigInt,
            sys::ValueType::napi_external => Kind::External,
            _ => Kind::Other,
        })
    }

    /// `ToInt32`, as the WebAssembly JS API coerces.
    #[inline]
    pub(crate) fn to_int32(self, value: Val) -> JsResult<i32> {
        if let Some(v) = self.get_int32(value) {
            return Ok(v);
        }
        let mut v = 0;
        let number = self.coerce_number(value)?;
        napi!(self, napi_get_value_int32(number, &raw mut v))?;
        Ok(v)
    }

    /// `ToNumber`.
    #[inline]
    pub(crate) fn to_number(self, value: Val) -> JsResult<f64> {
        let mut v = 0.0;
        // SAFETY: valid environment, value and out pointer.
        if unsafe { sys::napi_get_value_double(self.0, value, &raw mut v) } == sys::Status::napi_ok
        {
            return Ok(v);
        }
        let number = self.coerce_number(value)?;
        napi!(self, napi_get_value_double(number, &raw mut v))?;
        Ok(v)
    }

    #[cold]
    fn coerce_number(self, value: Val) -> JsResult<Val> {
        if let Some(coerce) = EnvState::known_helper(self, |helpers| helpers.to_number) {
            return self.call(coerce, &[value]);
        }
        let mut number = ptr::null_mut();
        napi!(self, napi_coerce_to_number(value, &raw mut number))?;
        Ok(number)
    }

    /// The low 64 bits of a bigint; `None` if it is no bigint.
    #[inline]
    pub(crate) fn bigint_bits(self, value: Val) -> Option<i64> {
        let mut v = 0;
        let mut lossless = false;
        // SAFETY: valid environment, value and out pointers.
        let status = unsafe {
            sys::napi_get_value_bigint_int64(self.0, value, &raw mut v, &raw mut lossless)
        };
        (status == sys::Status::napi_ok).then_some(v)
    }

    /// `ToInt32` of a number; `None` if it is something else.
    #[inline]
    pub(crate) fn get_int32(self, value: Val) -> Option<i32> {
        if COERCES.load(Ordering::Relaxed) && self.get_number(value).is_none() {
            return None;
        }
        let mut v = 0;
        // SAFETY: valid environment, value and out pointer.
        let status = unsafe { sys::napi_get_value_int32(self.0, value, &raw mut v) };
        (status == sys::Status::napi_ok).then_some(v)
    }

    /// Finds out in what the runtime departs from Node. Once per environment, before anything else.
    pub(crate) fn learn(self) -> JsResult<()> {
        let mut v = 0;
        let object = self.object()?;
        // SAFETY: valid environment, value and out pointer.
        let status = unsafe { sys::napi_get_value_int32(self.0, object, &raw mut v) };
        COERCES.store(status == sys::Status::napi_ok, Ordering::Relaxed);
        Ok(())
    }

    #[inline]
    pub(crate) fn is_undefined(self, value: Val) -> bool {
        let mut kind = 0;
        // SAFETY: valid environment, value and out pointer.
        let status = unsafe { sys::napi_typeof(self.0, value, &raw mut kind) };
        status == sys::Status::napi_ok && kind == sys::ValueType::napi_undefined
    }

    #[inline]
    pub(crate) fn get_number(self, value: Val) -> Option<f64> {
        let mut v = 0.0;
        // SAFETY: valid environment, value and out pointer.
        let status = unsafe { sys::napi_get_value_double(self.0, value, &raw mut v) };
        (status == sys::Status::napi_ok).then_some(v)
    }

    pub(crate) fn get_bool(self, value: Val) -> Option<bool> {
        let mut v = false;
        // SAFETY: valid environment, value and out pointer.
        let status = unsafe { sys::napi_get_value_bool(self.0, value, &raw mut v) };
        (status == sys::Status::napi_ok).then_some(v)
    }

    /// The text of a string value.
    pub(crate) fn get_string(self, value: Val) -> JsResult<String> {
        let mut len = 0;
        napi!(
            self,
            napi_get_value_string_utf8(value, ptr::null_mut(), 0, &raw mut len)
        )?;
        let mut buffer = vec![0u8; len + 1];
        napi!(
            self,
            napi_get_value_string_utf8(value, buffer.as_mut_ptr().cast(), len + 1, &raw mut len)
        )?;
        buffer.truncate(len);
        Ok(String::from_utf8_lossy(&buffer).into_owned())
    }

    /// Short strings without an allocation: export names on the way into a call.
    pub(crate) fn with_string<R>(self, value: Val, f: impl FnOnce(&str) -> R) -> JsResult<R> {
        let mut buffer = [0u8; 128];
        let mut len = 0;
        napi!(
            self,
            napi_get_value_string_utf8(
                value,
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                &raw mut len
            )
        )?;
        // A full buffer may have been cut short.
        if len + 1 < buffer.len()
            && let Ok(text) = std::str::from_utf8(buffer.get(..len).unwrap_or_default())
        {
            return Ok(f(text));
        }
        Ok(f(&self.get_string(value)?))
    }

    /// The bytes of a typed array, `Buffer`, `DataView` or `ArrayBuffer`.
    pub(crate) fn bytes(self, value: Val) -> JsResult<Option<Bytes>> {
        let mut is = false;
        napi!(self, napi_is_typedarray(value, &raw mut is))?;
        let mut data: *mut c_void = ptr::null_mut();
        let mut len = 0;
        if is {
            let mut kind = 0;
            napi!(
                self,
                napi_get_typedarray_info(
                    value,
                    &raw mut kind,
                    &raw mut len,
                    &raw mut data,
                    ptr::null_mut(),
                    ptr::null_mut()
                )
            )?;
            let size = match kind {
                sys::TypedarrayType::int16_array | sys::TypedarrayType::uint16_array => 2,
                sys::TypedarrayType::int32_array
                | sys::TypedarrayType::uint32_array
                | sys::TypedarrayType::float32_array => 4,
                sys::TypedarrayType::float64_array
                | sys::TypedarrayType::bigint64_array
                | sys::TypedarrayType::biguint64_array => 8,
                _ => 1,
            };
            return Ok(Some(Bytes {
                data: data.cast(),
                len: len * size,
            }));
        }
        napi!(self, napi_is_dataview(value, &raw mut is))?;
        if is {
            napi!(
                self,
                napi_get_dataview_info(
                    value,
                    &raw mut len,
                    &raw mut data,
                    ptr::null_mut(),
                    ptr::null_mut()
                )
            )?;
            return Ok(Some(Bytes {
                data: data.cast(),
                len,
            }));
        }
        napi!(self, napi_is_arraybuffer(value, &raw mut is))?;
        if is {
            napi!(
                self,
                napi_get_arraybuffer_info(value, &raw mut data, &raw mut len)
            )?;
            return Ok(Some(Bytes {
                data: data.cast(),
                len,
            }));
        }
        Ok(None)
    }

    pub(crate) fn is_array(self, value: Val) -> JsResult<bool> {
        let mut is = false;
        napi!(self, napi_is_array(value, &raw mut is))?;
        Ok(is)
    }

    pub(crate) fn is_promise(self, value: Val) -> JsResult<bool> {
        let mut is = false;
        napi!(self, napi_is_promise(value, &raw mut is))?;
        Ok(is)
    }

    pub(crate) fn array_length(self, value: Val) -> JsResult<u32> {
        let mut len = 0;
        napi!(self, napi_get_array_length(value, &raw mut len))?;
        Ok(len)
    }

    pub(crate) fn element(self, array: Val, index: u32) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(self, napi_get_element(array, index, &raw mut value))?;
        Ok(value)
    }

    /// Whether `await` would wait for it: a promise, or anything else with a method `then`. Asking may
    /// run a getter of the user's.
    pub(crate) fn is_thenable(self, value: Val) -> JsResult<bool> {
        if self.is_promise(value).unwrap_or(false) {
            return Ok(true);
        }
        Ok(matches!(self.kind(value)?, Kind::Object | Kind::Function)
            && self.kind(self.property(value, c"then")?)? == Kind::Function)
    }

    pub(crate) fn set_element(self, array: Val, index: u32, value: Val) -> JsResult<()> {
        napi!(self, napi_set_element(array, index, value))
    }

    pub(crate) fn property(self, object: Val, name: &CStr) -> JsResult<Val> {
        let mut value = ptr::null_mut();
        napi!(
            self,
            napi_get_named_property(object, name.as_ptr(), &raw mut value)
        )?;
        Ok(value)
    }

    /// A property whose name is no constant of ours.
    pub(crate) fn property_named(self, object: Val, name: &str) -> JsResult<Val> {
        let key = self.string(name)?;
        let mut value = ptr::null_mut();
        napi!(self, napi_get_property(object, key, &raw mut value))?;
        Ok(value)
    }

    pub(crate) fn set(self, object: Val, name: &CStr, value: Val) -> JsResult<()> {
        napi!(self, napi_set_named_property(object, name.as_ptr(), value))
    }

    /// Defines an own property, whatever its name (`__proto__` too).
    pub(crate) fn define(self, object: Val, name: &str, value: Val) -> JsResult<()> {
        let writable = sys::PropertyAttributes::writable;
        self.define_as(object, name, value, writable)
    }

    /// Likewise, but only this addon changes it.
    pub(crate) fn define_constant(self, object: Val, name: &str, value: Val) -> JsResult<()> {
        self.define_as(object, name, value, sys::PropertyAttributes::default)
    }

    fn define_as(
        self,
        object: Val,
        name: &str,
        value: Val,
        more: sys::napi_property_attributes,
    ) -> JsResult<()> {
        let property = sys::napi_property_descriptor {
            utf8name: ptr::null(),
            name: self.string(name)?,
            method: None,
            getter: None,
            setter: None,
            value,
            attributes: sys::PropertyAttributes::enumerable
                | sys::PropertyAttributes::configurable
                | more,
            data: ptr::null_mut(),
        };
        napi!(self, napi_define_properties(object, 1, &raw const property))
    }

    /// A property that cannot be written, but configured, and is not listed: as `name` and `length` of
    /// functions are.
    pub(crate) fn define_hidden(self, object: Val, name: &CStr, value: Val) -> JsResult<()> {
        let property = sys::napi_property_descriptor {
            utf8name: name.as_ptr(),
            name: ptr::null_mut(),
            method: None,
            getter: None,
            setter: None,
            value,
            attributes: sys::PropertyAttributes::configurable,
            data: ptr::null_mut(),
        };
        napi!(self, napi_define_properties(object, 1, &raw const property))
    }

    pub(crate) fn delete(self, object: Val, name: &str) -> JsResult<()> {
        let key = self.string(name)?;
        napi!(self, napi_delete_property(object, key, ptr::null_mut()))
    }

    pub(crate) fn keys(self, object: Val) -> JsResult<Vec<String>> {
        let mut names = ptr::null_mut();
        napi!(self, napi_get_property_names(object, &raw mut names))?;
        (0..self.array_length(names)?)
            .map(|i| self.get_string(self.element(names, i)?))
            .collect()
    }

    // ------------------------------------------------------------------ calling

    /// Calls `function` with `this` undefined.
    #[inline]
    pub(crate) fn call(self, function: Val, args: &[Val]) -> JsResult<Val> {
        let mut result = ptr::null_mut();
        napi!(
            self,
            napi_call_function(
                self.undefined(),
                function,
                args.len(),
                args.as_ptr(),
                &raw mut result
            )
        )?;
        Ok(result)
    }

    /// Runs `f` in a handle scope of its own; nothing it makes may leave it.
    #[inline]
    pub(crate) fn scoped<R>(self, f: impl FnOnce() -> R) -> R {
        let mut scope = ptr::null_mut();
        // SAFETY: valid environment; the scope is closed below, in order.
        let opened = unsafe { sys::napi_open_handle_scope(self.0, &raw mut scope) };
        let result = f();
        if opened == sys::Status::napi_ok {
            // SAFETY: opened above, and scopes nest by construction.
            unsafe { sys::napi_close_handle_scope(self.0, scope) };
        }
        result
    }

    // ------------------------------------------------------------------ keeping values

    /// A strong reference. Must be given to [`Js::unreference`] on the JS thread.
    pub(crate) fn reference(self, value: Val) -> JsResult<sys::napi_ref> {
        let mut reference = ptr::null_mut();
        napi!(self, napi_create_reference(value, 1, &raw mut reference))?;
        Ok(reference)
    }

    /// A weak one.
    pub(crate) fn weak_reference(self, value: Val) -> JsResult<sys::napi_ref> {
        let mut reference = ptr::null_mut();
        napi!(self, napi_create_reference(value, 0, &raw mut reference))?;
        Ok(reference)
    }

    /// The value, or `None` if it was collected.
    #[inline]
    pub(crate) fn dereference(self, reference: sys::napi_ref) -> Option<Val> {
        let mut value = ptr::null_mut();
        // SAFETY: valid environment; the reference was made by this file and not given back.
        let status = unsafe { sys::napi_get_reference_value(self.0, reference, &raw mut value) };
        (status == sys::Status::napi_ok && !value.is_null()).then_some(value)
    }

    pub(crate) fn unreference(self, reference: sys::napi_ref) {
        // SAFETY: valid environment; whoever calls this owned the reference.
        unsafe { sys::napi_delete_reference(self.0, reference) };
    }

    // ------------------------------------------------------------------ promises

    pub(crate) fn promise(self) -> JsResult<(sys::napi_deferred, Val)> {
        let mut deferred = ptr::null_mut();
        let mut promise = ptr::null_mut();
        napi!(
            self,
            napi_create_promise(&raw mut deferred, &raw mut promise)
        )?;
        Ok((deferred, promise))
    }

    pub(crate) fn resolve(self, deferred: sys::napi_deferred, value: Val) {
        // SAFETY: each deferred is settled once: settling takes it by value.
        unsafe { sys::napi_resolve_deferred(self.0, deferred, value) };
    }

    pub(crate) fn reject(self, deferred: sys::napi_deferred, error: Val) {
        // SAFETY: as above.
        unsafe { sys::napi_reject_deferred(self.0, deferred, error) };
    }

    // ------------------------------------------------------------------ array buffers over our pages

    /// An `ArrayBuffer` over memory that `pin` keeps mapped. `None` where external buffers are forbidden.
    pub(crate) fn external_buffer<P: Send + 'static>(
        self,
        data: *mut u8,
        len: usize,
        pin: P,
        is_moved: Arc<AtomicBool>,
    ) -> JsResult<Option<Val>> {
        let is_finalized = Rc::new(Cell::new(false));
        let hint = Box::into_raw(Box::new(Hint {
            is_finalized: Rc::clone(&is_finalized),
            is_moved,
            pin,
        }));
        let mut value = ptr::null_mut();
        // SAFETY: valid environment; `data..len` stays mapped until the finalizer drops the pin.
        let status = unsafe {
            sys::napi_create_external_arraybuffer(
                self.0,
                data.cast(),
                len,
                Some(drop_hint::<P>),
                hint.cast(),
                &raw mut value,
            )
        };
        if status == sys::Status::napi_ok {
            return Ok(Some(value));
        }
        // Some failures run the finalizer (a buffer beyond V8's longest), some do not.
        if !is_finalized.get() {
            // SAFETY: Node-API did not take it.
            drop(unsafe { Box::from_raw(hint) });
        }
        if status == sys::Status::napi_no_external_buffers_allowed {
            return Ok(None);
        }
        self.take_exception();
        Err(self.throw_range_error(&format!(
            "an ArrayBuffer over {len} bytes cannot be made (Node-API status {status}); use read() and write()"
        )))
    }

    /// Keeps `content` until the object is collected, or the environment ends.
    pub(crate) fn keep_with<T: 'static>(self, object: Val, content: T) -> JsResult<()> {
        let content = Box::into_raw(Box::new(content));
        // SAFETY: valid environment and value; the finalizer gets the box, once.
        let status = unsafe {
            sys::napi_add_finalizer(
                self.0,
                object,
                content.cast(),
                Some(drop_box::<T>),
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        if status == sys::Status::napi_ok {
            return Ok(());
        }
        // SAFETY: Node-API did not take it.
        drop(unsafe { Box::from_raw(content) });
        Err(Pending)
    }

    /// An `ArrayBuffer` of zeros.
    pub(crate) fn buffer(self, len: usize) -> JsResult<Val> {
        let mut data: *mut c_void = ptr::null_mut();
        let mut buffer = ptr::null_mut();
        napi!(
            self,
            napi_create_arraybuffer(len, &raw mut data, &raw mut buffer)
        )?;
        Ok(buffer)
    }

    /// Whether JavaScript may still run here. While a worker is being terminated it may not, and then
    /// Node *aborts* the process in functions that it believes cannot fail (detaching, wrapping).
    pub(crate) fn can_run(self) -> bool {
        // Setting a property goes through V8's own check and fails softly.
        self.object_of_node()
            .and_then(|probe| self.set(probe, c"p", self.undefined()))
            .is_ok()
    }

    pub(crate) fn is_detached(self, buffer: Val) -> bool {
        let mut is = false;
        // SAFETY: valid environment, value and out pointer.
        unsafe { sys::napi_is_detached_arraybuffer(self.0, buffer, &raw mut is) };
        is
    }

    /// Leaves it as it is where JavaScript may not run: see [`Js::can_run`].
    pub(crate) fn detach(self, buffer: Val) {
        if self.can_run() {
            // SAFETY: valid environment and value; fails harmlessly if it is detached already.
            unsafe { sys::napi_detach_arraybuffer(self.0, buffer) };
        }
    }

    // ------------------------------------------------------------------ tagged functions

    /// Ties `content` to a function object and marks it, so that [`Js::tagged`] finds it again.
    pub(crate) fn tag<T>(
        self,
        object: Val,
        content: *mut T,
        tag: &sys::napi_type_tag,
    ) -> JsResult<()> {
        if !self.can_run() {
            return Err(Pending);
        }
        napi!(
            self,
            napi_wrap(
                object,
                content.cast(),
                Some(drop_box::<T>),
                ptr::null_mut(),
                ptr::null_mut()
            )
        )?;
        napi!(self, napi_type_tag_object(object, tag))
    }

    /// What [`Js::tag`] tied to it; `None` if it does not bear the tag.
    ///
    /// # Safety
    /// The tag is only ever used with this `T`.
    pub(crate) unsafe fn tagged<'a, T>(
        self,
        object: Val,
        tag: &sys::napi_type_tag,
    ) -> Option<&'a T> {
        let mut is = false;
        // SAFETY: valid environment and value.
        let status = unsafe { sys::napi_check_object_type_tag(self.0, object, tag, &raw mut is) };
        if status != sys::Status::napi_ok || !is {
            return None;
        }
        let mut data: *mut c_void = ptr::null_mut();
        // SAFETY: as above.
        let status = unsafe { sys::napi_unwrap(self.0, object, &raw mut data) };
        // SAFETY: contract of this function; the object is alive in this callback.
        (status == sys::Status::napi_ok && !data.is_null()).then(|| unsafe { &*data.cast::<T>() })
    }
}

unsafe extern "C" fn drop_box<T>(_env: sys::napi_env, data: *mut c_void, _hint: *mut c_void) {
    guard_drop(|| {
        // SAFETY: `data` came out of `Box::into_raw` as a `T`, and finalizers run once.
        drop(unsafe { Box::from_raw(data.cast::<T>()) });
    });
}

/// What an external holds: first of all its type, which is looked at before anything else.
#[repr(C)]
struct Held<T> {
    ty: TypeId,
    content: T,
}

/// What an external buffer holds on to.
struct Hint<P> {
    is_finalized: Rc<Cell<bool>>,
    is_moved: Arc<AtomicBool>,
    pin: P,
}

/// What may be in use elsewhere for as long as the process lives.
static KEPT: Mutex<Vec<Box<dyn Any + Send>>> = Mutex::new(Vec::new());

unsafe extern "C" fn drop_hint<P: Send + 'static>(
    env: sys::napi_env,
    _data: *mut c_void,
    hint: *mut c_void,
) {
    guard_drop(|| {
        // SAFETY: `hint` came out of `Box::into_raw` as a `Hint<P>`, and finalizers run once.
        let hint = unsafe { Box::from_raw(hint.cast::<Hint<P>>()) };
        hint.is_finalized.set(true);
        // An environment that goes runs its finalizers whether or not the bytes are still in use, before its
        // cleanup hooks (Node) or after them (Bun). What JavaScript has moved may be in another worker by
        // now, which nobody will ever tell us of; Bun tells of it there, where the environment is unknown.
        let is_going = || EnvState::at(env as usize).is_none_or(|env| env.js().is_ending());
        if hint.is_moved.load(Ordering::Relaxed) && is_going() {
            let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push(Box::new(hint.pin));
        }
    });
}

/// No panic may cross into Node.
fn guard_drop(body: impl FnOnce()) {
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
}

/// Arguments and data of a raw callback. Missing arguments are `undefined`; returns how many were given.
#[inline]
pub(crate) fn callback_info(
    js: Js,
    info: sys::napi_callback_info,
    args: &mut [Val],
) -> JsResult<(usize, *mut c_void)> {
    let mut count = args.len();
    let mut data: *mut c_void = ptr::null_mut();
    napi!(
        js,
        napi_get_cb_info(
            info,
            &raw mut count,
            args.as_mut_ptr(),
            ptr::null_mut(),
            &raw mut data
        )
    )?;
    Ok((count, data))
}

/// Arguments of one callback; most have few.
const MAX_ARGS: usize = 8;

/// Entry of every function of the binding: data is the [`Native`] itself.
unsafe extern "C" fn native_entry(env: sys::napi_env, info: sys::napi_callback_info) -> Val {
    let js = Js(env);
    enter(js, || {
        let mut args = [ptr::null_mut(); MAX_ARGS];
        let (_, data) = callback_info(js, info, &mut args)?;
        // SAFETY: `Js::native` stored a `Native` there.
        let body = unsafe { std::mem::transmute::<*mut c_void, Native>(data) };
        body(js, &args)
    })
}

/// Runs a callback: a pending exception becomes null, a panic becomes `ERR_WASM_INTERNAL`.
#[inline]
pub(crate) fn enter(js: Js, body: impl FnOnce() -> JsResult<Val>) -> Val {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(Pending)) => ptr::null_mut(),
        Err(panic) => {
            crate::error::throw_panic(js, &*panic);
            ptr::null_mut()
        }
    }
}
