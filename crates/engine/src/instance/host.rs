//! What the guest calls, and who answers for it.
//!
//! A host function may call back into the instance that called it. The running call's wasmtime
//! `Caller` is therefore reachable for exactly as long as the host function runs, on exactly that
//! thread ([`crate::Replica::call`] finds it): an expiring context, never a second lock on the store.

use std::mem::MaybeUninit;
use std::sync::Arc;

use smallvec::SmallVec;
use wasmtime::{AsContextMut, Caller, Func, FuncType, Val, ValRaw};

use crate::error::{Error, Result};
use crate::instance::module::Module;
use crate::instance::raw_value::{RawValue, number_from_raw, number_to_raw};
use crate::instance::replica::{Guest, Replica};
use crate::instance::value::{Signature, Value, ValueType};
use crate::instance::wait::Attendant;
use crate::instance::watch::Watch;

/// A function that the guest imports.
pub trait HostFunction: Send + Sync + 'static {
    /// Runs on the thread on which the guest runs, which waits for it.
    ///
    /// # Errors
    /// Whatever comes back unwinds the guest and ends its call with that very error.
    fn call(&self, call: &mut HostCall<'_>) -> Result<()>;

    /// The quick way for numbers: `values` holds the arguments and receives the results, each of the
    /// type that the signature says. `None`: not taken, and nothing has been done; [`call`](Self::call)
    /// follows. The error is boxed because the answer then travels in registers.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    #[inline]
    fn call_numbers(
        &self,
        _replica: &Replica,
        _signature: &Signature,
        _values: &mut [RawValue],
    ) -> Option<Result<(), Box<Error>>> {
        None
    }

    /// What a call ends with whose signature has types that cannot cross.
    fn cannot_cross(&self) -> Error {
        Error::invalid("a value of a type that cannot cross between guest and host")
    }
}

/// One call of a host function.
pub struct HostCall<'a> {
    /// The instance that calls.
    pub replica: &'a Replica,
    /// Types of the arguments and results.
    pub signature: &'a Signature,
    /// One value for each parameter.
    pub args: SmallVec<[Value; 6]>,
    /// One default for each result; to be overwritten with values of the same types.
    pub results: SmallVec<[Value; 2]>,
}

impl std::fmt::Debug for HostCall<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostCall")
            .field("signature", self.signature)
            .finish_non_exhaustive()
    }
}

/// What is given for one import.
#[derive(Clone)]
pub enum ImportValue {
    /// A function.
    Function(Arc<dyn HostFunction>),
    /// The value of an immutable global, or the initial value of a mutable one.
    Global(Value),
    /// A memory of the instance's own, in pages.
    Memory {
        /// Pages at the start.
        initial: u64,
        /// Pages it may reach.
        maximum: Option<u64>,
    },
    /// A table of the instance's own.
    Table {
        /// Elements at the start.
        initial: u64,
        /// Elements it may reach.
        maximum: Option<u64>,
    },
}

impl std::fmt::Debug for ImportValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Function(_) => "Function",
            Self::Global(_) => "Global",
            Self::Memory { .. } => "Memory",
            Self::Table { .. } => "Table",
        })
    }
}

/// What an instance wants of the program that it is made for.
pub trait InstanceHost {
    /// The values of the module's imports, in the module's order, for one new instance.
    ///
    /// # Errors
    /// [`crate::ErrorCode::Link`] where one is missing, or whatever the host's code threw.
    fn imports(&self, replica: &Arc<Replica>, module: &Module) -> Result<Vec<ImportValue>>;

    /// What the home thread does while its guest waits for other threads of that guest.
    fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        None
    }

    /// Who tells guests that their thread must end, where that can happen.
    fn watch(&self) -> Option<Arc<Watch>> {
        None
    }
}

/// Restores the previous context however the host function ends.
pub(crate) struct Active<'a> {
    replica: &'a Replica,
    previous: *mut (),
}

impl<'a> Active<'a> {
    pub(crate) fn replica(&self) -> &'a Replica {
        self.replica
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.replica.set_active(self.previous);
    }
}

pub(crate) fn enter<'a>(caller: &mut Caller<'_, Guest>) -> Active<'a> {
    let context = std::ptr::from_mut(caller).cast::<()>();
    // SAFETY: the replica owns the store in which this call runs, so it outlives the call, and
    // `Replica::create` stored its address before anything could call out.
    let replica: &'a Replica = unsafe { &*caller.data().replica() };
    let previous = replica.active();
    replica.set_active(context);
    Active { replica, previous }
}

fn run(
    host: &dyn HostFunction,
    signature: &Signature,
    active: &Active<'_>,
    args: SmallVec<[Value; 6]>,
) -> Result<SmallVec<[Value; 2]>> {
    let results = signature
        .results
        .iter()
        .map(|t| Value::default_of(*t))
        .collect();
    let mut call = HostCall {
        replica: active.replica,
        signature,
        args,
        results,
    };
    host.call(&mut call)?;
    // Compiled code takes what is there for what the signature says.
    if !call
        .results
        .iter()
        .map(Value::ty)
        .eq(signature.results.iter().copied())
    {
        return Err(Error::internal(format_args!(
            "a host function {signature} returned other results"
        )));
    }
    Ok(call.results)
}

/// Makes `host` callable from guests of `store`.
pub(crate) fn host_function(
    mut store: impl AsContextMut<Data = Guest>,
    ty: FuncType,
    host: Arc<dyn HostFunction>,
) -> Func {
    let signature = Signature::of(&ty);
    if !signature.can_cross() {
        // It can be linked, and not be called.
        return Func::new(store, ty, move |_, _, _| {
            Err(wasmtime::Error::new(host.cannot_cross()))
        });
    }
    if !signature.is_numeric() {
        return reference_function(store, ty, signature, host);
    }
    let body = move |mut caller: Caller<'_, Guest>, raw: &mut [MaybeUninit<ValRaw>]| {
        let active = enter(&mut caller);
        let outcome = host.call_numbers(active.replica, &signature, numbers(&signature, raw));
        match outcome.unwrap_or_else(|| run_values(&*host, &signature, &active, raw)) {
            Ok(()) => Ok(()),
            Err(error) => {
                drop(active);
                Err(unwind(&mut caller, *error))
            }
        }
    };
    // SAFETY: `ty` is numeric; `raw` holds at least as many values as the larger of parameters and
    // results, the parameters are initialised, and every result is written with its own type
    // (`HostCall::results` starts with defaults of the right types).
    unsafe { Func::new_unchecked(&mut store, ty, body) }
}

/// What a failed host function ends its guest with.
#[cold]
#[inline(never)]
pub(crate) fn unwind(caller: &mut Caller<'_, Guest>, error: Error) -> wasmtime::Error {
    // SAFETY: as in `enter`.
    let replica = unsafe { &*caller.data().replica() };
    replica.unwind(caller.as_context_mut(), error)
}

/// Arguments, and room for the results, in the very place where compiled code has them.
#[inline]
fn numbers<'a>(signature: &Signature, raw: &'a mut [MaybeUninit<ValRaw>]) -> &'a mut [RawValue] {
    for slot in raw.iter_mut().skip(signature.params.len()) {
        slot.write(ValRaw::i32(0));
    }
    // SAFETY: wasmtime initialises one slot for each parameter, and the rest has just been; `RawValue`
    // is `ValRaw`.
    unsafe { &mut *(std::ptr::from_mut(raw) as *mut [RawValue]) }
}

/// Apart, so that its frame is not on the stack of the quick way.
#[inline(never)]
fn run_values(
    host: &dyn HostFunction,
    signature: &Signature,
    active: &Active<'_>,
    raw: &mut [MaybeUninit<ValRaw>],
) -> Result<(), Box<Error>> {
    let args = read_numbers(&signature.params, raw);
    let results = run(host, signature, active, args).map_err(Box::new)?;
    for (slot, value) in raw.iter_mut().zip(&results) {
        slot.write(number_to_raw(value));
    }
    Ok(())
}

/// The general way, for signatures with references.
fn reference_function(
    store: impl AsContextMut<Data = Guest>,
    ty: FuncType,
    signature: Signature,
    host: Arc<dyn HostFunction>,
) -> Func {
    Func::new(
        store,
        ty,
        move |mut caller: Caller<'_, Guest>, params: &[Val], results: &mut [Val]| {
            let id = caller.data().replica_id();
            let mut args = SmallVec::new();
            for param in params {
                args.push(Value::from_val(param, id, &mut caller).map_err(wasmtime::Error::new)?);
            }
            // SAFETY: as in `enter`.
            let replica = unsafe { &*caller.data().replica() };
            for arg in &args {
                replica.seen(arg, &mut caller);
            }
            let active = enter(&mut caller);
            let values = run(&*host, &signature, &active, args);
            drop(active);
            let values = values.map_err(|error| unwind(&mut caller, error))?;
            for (slot, value) in results.iter_mut().zip(values) {
                let value = replica.own(value);
                *slot = value
                    .into_val(id, &mut caller)
                    .map_err(wasmtime::Error::new)?;
            }
            Ok(())
        },
    )
}

fn read_numbers(types: &[ValueType], raw: &[MaybeUninit<ValRaw>]) -> SmallVec<[Value; 6]> {
    types
        .iter()
        .zip(raw)
        .map(|(ty, slot)| {
            // SAFETY: wasmtime initialises one slot for each parameter.
            let raw = unsafe { slot.assume_init_ref() };
            number_from_raw(*ty, raw)
        })
        .collect()
}
