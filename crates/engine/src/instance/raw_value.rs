//! Numbers as compiled code takes and returns them.

use wasmtime::ValRaw;

use crate::instance::value::{Value, ValueType};

/// A number in the engine's own representation.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct RawValue(ValRaw);

impl RawValue {
    /// From an i32.
    #[inline]
    pub fn i32(v: i32) -> Self {
        Self(ValRaw::i32(v))
    }
    /// From an i64.
    #[inline]
    pub fn i64(v: i64) -> Self {
        Self(ValRaw::i64(v))
    }
    /// From an f32.
    #[inline]
    pub fn f32(v: f32) -> Self {
        Self(ValRaw::f32(v.to_bits()))
    }
    /// From an f64.
    #[inline]
    pub fn f64(v: f64) -> Self {
        Self(ValRaw::f64(v.to_bits()))
    }
    /// From a number; 0 for anything else.
    #[inline]
    pub fn from_number(value: &Value) -> Self {
        Self(number_to_raw(value))
    }
    /// As an i32.
    #[inline]
    pub fn to_i32(self) -> i32 {
        self.0.get_i32()
    }
    /// As an i64.
    #[inline]
    pub fn to_i64(self) -> i64 {
        self.0.get_i64()
    }
    /// As an f32.
    #[inline]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(self.0.get_f32())
    }
    /// As an f64.
    #[inline]
    pub fn to_f64(self) -> f64 {
        f64::from_bits(self.0.get_f64())
    }
    /// As a value of that type, which must be a number's.
    pub fn to_value(self, ty: ValueType) -> Value {
        number_from_raw(ty, &self.0)
    }
}

pub(crate) fn number_from_raw(ty: ValueType, raw: &ValRaw) -> Value {
    match ty {
        ValueType::I64 => Value::I64(raw.get_i64()),
        ValueType::F32 => Value::F32(f32::from_bits(raw.get_f32())),
        ValueType::F64 => Value::F64(f64::from_bits(raw.get_f64())),
        _ => Value::I32(raw.get_i32()),
    }
}

pub(crate) fn number_to_raw(value: &Value) -> ValRaw {
    match value {
        Value::I32(v) => ValRaw::i32(*v),
        Value::I64(v) => ValRaw::i64(*v),
        Value::F32(v) => ValRaw::f32(v.to_bits()),
        Value::F64(v) => ValRaw::f64(v.to_bits()),
        Value::Extern(_) | Value::Func(_) | Value::Export { .. } => ValRaw::i32(0),
    }
}
