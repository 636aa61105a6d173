//! Values of JavaScript to values of the guest and back, as the WebAssembly JS API coerces.

use std::rc::Rc;

use wasm_molt_engine::{Error, ErrorCode, RawValue, Signature, Value, ValueType};

use crate::env::EnvState;
use crate::error::Place;
use crate::exports::{self, function_value};
use crate::js::{Js, JsResult, Kind, Val};
use crate::side::ReplicaSide;

impl EnvState {
    /// `ToWebAssemblyValue`.
    pub(crate) fn to_wasm(&self, value: Val, ty: ValueType) -> JsResult<Value> {
        let js = self.js();
        Ok(match ty {
            ValueType::I32 => Value::I32(js.to_int32(value)?),
            ValueType::I64 => Value::I64(self.to_int64(value)?),
            ValueType::F32 => Value::F32(js.to_number(value)? as f32),
            ValueType::F64 => Value::F64(js.to_number(value)?),
            ValueType::ExternRef => match js.kind(value)? {
                Kind::Null => Value::Extern(None),
                _ => Value::Extern(Some(self.keep(value)?)),
            },
            ValueType::FuncRef => match js.kind(value)? {
                Kind::Null => Value::Func(None),
                Kind::Function => {
                    exports::function_of(js, value).ok_or_else(|| not_a_guest_function(js))?
                }
                _ => return Err(not_a_guest_function(js)),
            },
            ValueType::Opaque => return Err(cannot_cross(js)),
        })
    }

    #[inline(always)]
    fn to_int64(&self, value: Val) -> JsResult<i64> {
        let js = self.js();
        if let Some(bits) = js.bigint_bits(value) {
            return Ok(bits);
        }
        let coerced = js.call(self.helper(self.helpers.to_bigint64)?, &[value])?;
        Ok(js.bigint_bits(coerced).unwrap_or_default())
    }

    /// A number straight into the engine's representation.
    #[inline(always)]
    pub(crate) fn to_raw(&self, value: Val, ty: ValueType) -> JsResult<RawValue> {
        let js = self.js();
        Ok(match ty {
            ValueType::I64 => RawValue::i64(self.to_int64(value)?),
            ValueType::F32 => RawValue::f32(js.to_number(value)? as f32),
            ValueType::F64 => RawValue::f64(js.to_number(value)?),
            _ => RawValue::i32(js.to_int32(value)?),
        })
    }

    #[inline(always)]
    pub(crate) fn raw_to_js(&self, value: RawValue, ty: ValueType) -> JsResult<Val> {
        let js = self.js();
        match ty {
            ValueType::I64 => js.bigint(value.to_i64()),
            ValueType::F32 => js.number(f64::from(value.to_f32())),
            ValueType::F64 => js.number(value.to_f64()),
            _ => js.int32(value.to_i32()),
        }
    }

    /// `ToJSValue`. `side` is the instance that the value comes from.
    pub(crate) fn to_js(&self, value: &Value, side: Option<&Rc<ReplicaSide>>) -> JsResult<Val> {
        let js = self.js();
        match value {
            Value::I32(v) => js.int32(*v),
            Value::I64(v) => js.bigint(*v),
            Value::F32(v) => js.number(f64::from(*v)),
            Value::F64(v) => js.number(*v),
            Value::Extern(Some(kept)) => self.kept(kept),
            Value::Func(Some(handle)) => match side {
                Some(side) => function_value(self, side, *handle),
                None => js.null(),
            },
            Value::Extern(None) | Value::Func(None) | Value::Export { .. } => js.null(),
        }
    }

    /// undefined for no result, the value for one, an array for several.
    pub(crate) fn results(
        &self,
        values: &[Value],
        side: Option<&Rc<ReplicaSide>>,
    ) -> JsResult<Val> {
        let js = self.js();
        match values {
            [] => Ok(js.undefined()),
            [one] => self.to_js(one, side),
            several => {
                let array = js.array(several.len())?;
                for (index, value) in several.iter().enumerate() {
                    js.set_element(array, index as u32, self.to_js(value, side)?)?;
                }
                Ok(array)
            }
        }
    }

    /// The arguments of a call from a JavaScript array (or nothing).
    pub(crate) fn arguments(&self, args: Val, signature: &Signature) -> JsResult<Vec<Value>> {
        let js = self.js();
        let given = match js.kind(args)? {
            Kind::Undefined | Kind::Null => 0,
            _ if js.is_array(args)? => js.array_length(args)?,
            _ => {
                let error = Error::invalid("args must be an array of the call's arguments");
                return Err(self.throw(&error, &Place::default()));
            }
        };
        let mut values = Vec::with_capacity(signature.params.len());
        for (index, ty) in signature.params.iter().enumerate() {
            let index = index as u32;
            let value = if index < given {
                js.element(args, index)?
            } else {
                js.undefined()
            };
            values.push(self.to_wasm(value, *ty)?);
        }
        Ok(values)
    }

    /// What an import function returned, as the guest wants it.
    pub(crate) fn import_results(&self, value: Val, types: &[ValueType]) -> JsResult<Vec<Value>> {
        let js = self.js();
        match types {
            [] => Ok(Vec::new()),
            [one] => Ok(vec![self.to_wasm(value, *one)?]),
            several => {
                let array = js.call(self.helper(self.helpers.to_array)?, &[value])?;
                let given = js.array_length(array)? as usize;
                if given != several.len() {
                    return Err(js.throw_type_error(&format!(
                        "the import must return {} values and returned {given}",
                        several.len()
                    )));
                }
                several
                    .iter()
                    .enumerate()
                    .map(|(index, ty)| self.to_wasm(js.element(array, index as u32)?, *ty))
                    .collect()
            }
        }
    }
}

fn not_a_guest_function(js: Js) -> crate::js::Pending {
    js.throw_type_error(
        "a funcref must be null or a function of a WebAssembly instance (taken from its exports)",
    )
}

/// The JS API throws a `TypeError` before anything runs.
pub(crate) fn cannot_cross(js: Js) -> crate::js::Pending {
    js.throw_type_error(
        "v128, exception and GC reference values cannot cross between WebAssembly and JavaScript",
    )
}

/// `ERR_WASM_EXPORT_NOT_FOUND` and the like carry their code also where the engine is not involved.
pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, message)
}
