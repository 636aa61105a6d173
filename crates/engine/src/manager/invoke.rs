//! A buffer through the guest: allocate, copy in, call, copy out, free.

use crate::error::{Error, ErrorCode, Result, TrapInfo};
use crate::instance::memory::{MemoryRecord, OutOfBounds};
use crate::instance::module::Module;
use crate::instance::raw_value::RawValue;
use crate::instance::replica::Replica;
use crate::instance::trap::ALLOCATION_FAILED;
use crate::instance::value::{FuncHandle, Signature, ValueType};
use crate::manager::options::{BufferAbi, BufferReturns};

const POINTER_BYTES: u32 = 4;

/// Looks up and checks what `invoke` of `function` needs, so that a mistake is told before it runs.
///
/// # Errors
/// [`ErrorCode::ExportNotFound`] or [`ErrorCode::InvalidArgument`].
pub(crate) fn check(module: &Module, abi: &BufferAbi, function: usize) -> Result<()> {
    use ValueType::{I32, I64};
    let (params, results): (&[ValueType], &[ValueType]) = match abi.returns {
        BufferReturns::OutPointer => (&[I32, I32, I32], &[I32]),
        BufferReturns::PackedI64 => (&[I32, I32], &[I64]),
        BufferReturns::MultiValue => (&[I32, I32], &[I32, I32]),
    };
    expect(module, function, params, results)?;
    expect(
        module,
        helper(module, &abi.allocate, "allocate")?,
        &[I32],
        &[I32],
    )?;
    if let Some(name) = &abi.deallocate {
        expect(
            module,
            helper(module, name, "deallocate")?,
            &[I32, I32],
            &[],
        )?;
    }
    Ok(())
}

fn helper(module: &Module, name: &str, role: &str) -> Result<usize> {
    module.function_index(name).map_err(|e| {
        let null = if role == "deallocate" {
            " (null where the guest has none)"
        } else {
            ""
        };
        Error::new(
            ErrorCode::ExportNotFound,
            format!("{e}; name the right one in abi.{role}{null}"),
        )
    })
}

fn expect(
    module: &Module,
    function: usize,
    params: &[ValueType],
    results: &[ValueType],
) -> Result<()> {
    let Some(export) = module.functions().get(function) else {
        return Err(Error::internal("a function that the module does not have"));
    };
    let wanted = Signature {
        params: params.into(),
        results: results.into(),
    };
    if export.signature == wanted {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "invoke needs '{}' of {} to be {wanted}, and it is {}; see abi.returns",
        export.name,
        module.name(),
        export.signature
    )))
}

/// # Safety
/// The calling thread holds `replica`, `func` is its function at position `function`, and [`check`]
/// has accepted them.
pub(crate) unsafe fn run(
    replica: &Replica,
    abi: &BufferAbi,
    func: &FuncHandle,
    function: usize,
    input: &[u8],
) -> Result<Vec<u8>> {
    check(replica.module(), abi, function)?;
    let guest = Guest {
        replica,
        memory: memory(replica)?,
        abi,
    };
    let len = u32::try_from(input.len()).map_err(|_| {
        Error::invalid(format!(
            "the input has {} bytes; a 32-bit guest takes at most 4294967295",
            input.len()
        ))
    })?;
    let input_ptr = guest.allocate(len)?;
    guest
        .memory
        .write(u64::from(input_ptr), input)
        .map_err(|e| bad_buffer(&e, "allocate"))?;
    let output = guest.exchange(func, input_ptr, len);
    // After a trap the guest's allocator is in an unknown state; the instance is replaced anyway.
    if !replica.is_poisoned() {
        guest.free(input_ptr, len)?;
    }
    output
}

struct Guest<'a> {
    replica: &'a Replica,
    memory: &'a MemoryRecord,
    abi: &'a BufferAbi,
}

impl Guest<'_> {
    fn exchange(&self, func: &FuncHandle, ptr: u32, len: u32) -> Result<Vec<u8>> {
        let (ptr_in, len_in) = (RawValue::i32(ptr as i32), RawValue::i32(len as i32));
        let (out_ptr, out_len) = match self.abi.returns {
            BufferReturns::OutPointer => {
                let cell = self.allocate(POINTER_BYTES)?;
                let mut values = [ptr_in, len_in, RawValue::i32(cell as i32)];
                if let Err(error) = self.call(func, &mut values) {
                    // What an import threw leaves the guest usable: it gets its cell back.
                    if !self.replica.is_poisoned() {
                        self.free(cell, POINTER_BYTES)?;
                    }
                    return Err(error);
                }
                let mut bytes = [0; 4];
                self.memory
                    .read(u64::from(cell), &mut bytes)
                    .map_err(|e| bad_buffer(&e, "allocate"))?;
                self.free(cell, POINTER_BYTES)?;
                (values[0].to_i32() as u32, u32::from_le_bytes(bytes))
            }
            BufferReturns::PackedI64 => {
                let mut values = [ptr_in, len_in];
                self.call(func, &mut values)?;
                let packed = values[0].to_i64() as u64;
                ((packed >> 32) as u32, packed as u32)
            }
            BufferReturns::MultiValue => {
                let mut values = [ptr_in, len_in];
                self.call(func, &mut values)?;
                (values[0].to_i32() as u32, values[1].to_i32() as u32)
            }
        };
        let output = self
            .memory
            .read_vec(u64::from(out_ptr), out_len as usize)
            .map_err(|e| bad_buffer(&e, "the function"))?;
        if out_len > 0 {
            self.free(out_ptr, out_len)?;
        }
        Ok(output)
    }

    fn call(&self, func: &FuncHandle, values: &mut [RawValue]) -> Result<()> {
        // SAFETY: `run`'s contract; `check` has compared the signatures, so `values` fits.
        unsafe { self.replica.call_raw(func, values) }?;
        Ok(())
    }

    fn function(&self, name: &str) -> Result<FuncHandle> {
        let index = self.replica.module().function_index(name)?;
        self.replica
            .function(index)
            .ok_or_else(|| Error::internal("a helper is missing"))
    }

    fn allocate(&self, bytes: u32) -> Result<u32> {
        // Some allocators answer 0 to a request for nothing, which means failure elsewhere.
        let mut values = [RawValue::i32(bytes.max(1) as i32)];
        self.call(&self.function(&self.abi.allocate)?, &mut values)?;
        let ptr = values[0].to_i32() as u32;
        if ptr != 0 {
            return Ok(ptr);
        }
        let name = self.replica.module().name();
        let error = Error::Trap {
            what: format!("{name}: '{}'", self.abi.allocate),
            info: Box::new(TrapInfo {
                kind: ALLOCATION_FAILED,
                message: format!(
                    "the guest could not allocate {bytes} bytes with {} bytes of linear memory in use; \
                     the instance is replaced",
                    self.memory.byte_len()
                ),
                wasm_stack: String::new(),
            }),
        };
        self.replica.poison_with(&error);
        Err(error)
    }

    fn free(&self, ptr: u32, bytes: u32) -> Result<()> {
        let Some(name) = &self.abi.deallocate else {
            return Ok(());
        };
        let mut values = [
            RawValue::i32(ptr as i32),
            RawValue::i32(bytes.max(1) as i32),
        ];
        self.call(&self.function(name)?, &mut values)
    }
}

fn memory(replica: &Replica) -> Result<&MemoryRecord> {
    replica.memory().map(|m| &**m).ok_or_else(|| {
        Error::invalid(format!(
            "invoke needs a linear memory, and {} has none",
            replica.module().name()
        ))
    })
}

fn bad_buffer(error: &OutOfBounds, who: &str) -> Error {
    Error::invalid(format!(
        "{who} returned a buffer outside the guest's memory: {error}; see abi.returns"
    ))
}
