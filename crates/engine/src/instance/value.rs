//! Values that cross between host and guest.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use wasmtime::{AsContextMut, ExternRef, FuncType, HeapType, Ref, Val, ValType};

use crate::error::{Error, ErrorCode, Result};

/// A value of the host that a guest may hold as an `externref`, or that host code threw.
#[derive(Clone)]
pub struct HostRef(Arc<dyn Any + Send + Sync>);

impl HostRef {
    /// Wraps a value of the host.
    pub fn new<T: Any + Send + Sync>(value: T) -> Self {
        Self(Arc::new(value))
    }

    /// Whether the two are one value.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The value, if it is a `T`.
    pub fn downcast_ref<T: Any>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }
}

impl fmt::Debug for HostRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HostRef")
    }
}

/// A function of one instance, usable as long as that instance lives.
#[derive(Clone, Copy, Debug)]
pub struct FuncHandle {
    pub(crate) func: wasmtime::Func,
    /// The replica that owns it ([`crate::Replica::id`]).
    pub(crate) replica: u64,
    /// Identity: the same guest function has the same address within its store.
    pub(crate) address: usize,
}

impl FuncHandle {
    /// The replica that owns the function.
    pub fn replica_id(&self) -> u64 {
        self.replica
    }

    /// Equal for two handles of one guest function; stable for the life of its instance.
    pub fn address(&self) -> usize {
        self.address
    }
}

/// Type of a [`Value`], plus the types that cannot cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// 32-bit integer.
    I32,
    /// 64-bit integer.
    I64,
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// Any value of the host, nullable.
    ExternRef,
    /// A function or null.
    FuncRef,
    /// `v128`, exceptions, GC references: cannot cross to JS.
    Opaque,
}

impl From<&ValType> for ValueType {
    fn from(ty: &ValType) -> Self {
        match ty {
            ValType::I32 => Self::I32,
            ValType::I64 => Self::I64,
            ValType::F32 => Self::F32,
            ValType::F64 => Self::F64,
            ValType::V128 => Self::Opaque,
            ValType::Ref(r) => match r.heap_type() {
                HeapType::Extern if r.is_nullable() => Self::ExternRef,
                HeapType::Func if r.is_nullable() => Self::FuncRef,
                _ => Self::Opaque,
            },
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::ExternRef => "externref",
            Self::FuncRef => "funcref",
            Self::Opaque => "a type that cannot cross to JS",
        })
    }
}

/// What the JS API calls a type; `other` where it has no name for it.
pub(crate) fn type_name(ty: &ValType) -> &'static str {
    match ty {
        ValType::I32 => "i32",
        ValType::I64 => "i64",
        ValType::F32 => "f32",
        ValType::F64 => "f64",
        ValType::V128 => "v128",
        ValType::Ref(r) if r.is_nullable() => match r.heap_type() {
            HeapType::Extern => "externref",
            HeapType::Func => "funcref",
            HeapType::Exn => "exnref",
            _ => "other",
        },
        ValType::Ref(_) => "other",
    }
}

/// Parameters and results of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Parameter types.
    pub params: Box<[ValueType]>,
    /// Result types.
    pub results: Box<[ValueType]>,
}

impl Signature {
    pub(crate) fn of(ty: &FuncType) -> Self {
        Self {
            params: ty.params().map(|t| ValueType::from(&t)).collect(),
            results: ty.results().map(|t| ValueType::from(&t)).collect(),
        }
    }

    /// Only numbers: the raw calling convention can be used.
    pub fn is_numeric(&self) -> bool {
        let numeric = |t: &ValueType| {
            matches!(
                t,
                ValueType::I32 | ValueType::I64 | ValueType::F32 | ValueType::F64
            )
        };
        self.params.iter().all(numeric) && self.results.iter().all(numeric)
    }

    /// Names of parameters' and results' types.
    pub fn names(&self) -> (Vec<String>, Vec<String>) {
        let names = |types: &[ValueType]| types.iter().map(ToString::to_string).collect();
        (names(&self.params), names(&self.results))
    }

    /// No type in it is [`ValueType::Opaque`].
    pub fn can_cross(&self) -> bool {
        !self
            .params
            .iter()
            .chain(&*self.results)
            .any(|t| *t == ValueType::Opaque)
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |types: &[ValueType]| {
            types
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        };
        write!(f, "({}) -> ({})", list(&self.params), list(&self.results))
    }
}

/// One value.
#[derive(Debug, Clone)]
pub enum Value {
    /// 32-bit integer.
    I32(i32),
    /// 64-bit integer.
    I64(i64),
    /// 32-bit float.
    F32(f32),
    /// 64-bit float.
    F64(f64),
    /// Any value of the host, or null.
    Extern(Option<HostRef>),
    /// A function, or null.
    Func(Option<FuncHandle>),
    /// The called instance's own export at a position of [`crate::Module::functions`]; only valid in
    /// instances of that very module.
    Export {
        /// [`crate::Module::id`].
        module: usize,
        /// Position.
        index: usize,
    },
}

impl Value {
    /// Its type.
    pub fn ty(&self) -> ValueType {
        match self {
            Self::I32(_) => ValueType::I32,
            Self::I64(_) => ValueType::I64,
            Self::F32(_) => ValueType::F32,
            Self::F64(_) => ValueType::F64,
            Self::Extern(_) => ValueType::ExternRef,
            Self::Func(_) | Self::Export { .. } => ValueType::FuncRef,
        }
    }

    /// The zero or null of a type.
    pub fn default_of(ty: ValueType) -> Self {
        match ty {
            ValueType::I32 => Self::I32(0),
            ValueType::I64 => Self::I64(0),
            ValueType::F32 => Self::F32(0.0),
            ValueType::F64 => Self::F64(0.0),
            ValueType::FuncRef => Self::Func(None),
            ValueType::ExternRef | ValueType::Opaque => Self::Extern(None),
        }
    }

    pub(crate) fn into_val(self, replica: u64, mut store: impl AsContextMut) -> Result<Val> {
        Ok(match self {
            Self::I32(v) => Val::I32(v),
            Self::I64(v) => Val::I64(v),
            Self::F32(v) => Val::F32(v.to_bits()),
            Self::F64(v) => Val::F64(v.to_bits()),
            Self::Extern(None) => Val::ExternRef(None),
            Self::Extern(Some(value)) => {
                let held = ExternRef::new(&mut store, value).map_err(|e| {
                    Error::new(
                        ErrorCode::Internal,
                        format!("an externref could not be made: {e}"),
                    )
                })?;
                Val::ExternRef(Some(held))
            }
            Self::Func(None) => Val::FuncRef(None),
            Self::Func(Some(handle)) if handle.replica == replica => {
                Val::FuncRef(Some(handle.func))
            }
            Self::Func(Some(_)) | Self::Export { .. } => {
                return Err(Error::new(
                    ErrorCode::StaleHandle,
                    "the function passed as a funcref belongs to another instance; \
                     take it from the exports of the instance that is called",
                ));
            }
        })
    }

    pub(crate) fn from_val(val: &Val, replica: u64, mut store: impl AsContextMut) -> Result<Self> {
        Ok(match val {
            Val::I32(v) => Self::I32(*v),
            Val::I64(v) => Self::I64(*v),
            Val::F32(v) => Self::F32(f32::from_bits(*v)),
            Val::F64(v) => Self::F64(f64::from_bits(*v)),
            Val::ExternRef(None) => Self::Extern(None),
            Val::ExternRef(Some(held)) => {
                let data = held.data(&store).map_err(Error::internal)?;
                let value = data.and_then(|any| any.downcast_ref::<HostRef>()).cloned();
                Self::Extern(value)
            }
            Val::FuncRef(None) => Self::Func(None),
            Val::FuncRef(Some(func)) => {
                let address = func.to_raw(store.as_context_mut()) as usize;
                Self::Func(Some(FuncHandle {
                    func: *func,
                    replica,
                    address,
                }))
            }
            _ => return Err(Error::internal("a value of a type that cannot cross")),
        })
    }
}

/// A placeholder of the right type for results that wasmtime overwrites.
pub(crate) fn default_val(ty: &ValType) -> Val {
    Val::default_for_ty(ty).unwrap_or(Val::I32(0))
}

/// The initial element of a table that the host makes.
pub(crate) fn null_ref(ty: ValueType) -> Ref {
    match ty {
        ValueType::ExternRef => Ref::Extern(None),
        _ => Ref::Func(None),
    }
}
