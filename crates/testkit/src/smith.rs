//! Modules that nobody has written: valid ones out of any bytes, by wasm-smith.

use arbitrary::Unstructured;
use wasm_smith::{Config, Module};
use wasmparser::WasmFeatures;

use crate::dice::Dice;

/// What the modules are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To be taken by the engine, or refused.
    Anything,
    /// To be run by two engines: no result depends on which of them it is.
    Comparison,
}

/// Loops and calls that such a module may begin before it traps.
const FUEL: u32 = 1_000;
/// What one memory may reach: 2 MiB.
const MOST_MEMORY_BYTES: u64 = 32 << 16;

fn config(purpose: Purpose, features: WasmFeatures, dice: &mut Dice<'_>) -> Config {
    let has = |feature| features.contains(feature);
    let mut on = |sides| dice.roll(sides) != 0;
    let mut config = Config {
        // What is not said here is as wasm-smith has it.
        export_everything: on(4),
        generate_custom_sections: on(2),
        min_funcs: 1,
        max_funcs: 12,
        max_instructions: 120,
        max_memories: if !on(2) && has(WasmFeatures::MULTI_MEMORY) {
            3
        } else {
            1
        },
        max_tables: if on(2) { 1 } else { 3 },
        max_table_elements: 1_000,
        max_memory32_bytes: MOST_MEMORY_BYTES,
        max_memory64_bytes: MOST_MEMORY_BYTES.into(),
        memory_max_size_required: true,
        table_max_size_required: true,
        memory64_enabled: !on(4) && has(WasmFeatures::MEMORY64),
        simd_enabled: on(2) && has(WasmFeatures::SIMD),
        gc_enabled: !on(3) && has(WasmFeatures::GC),
        exceptions_enabled: !on(3) && has(WasmFeatures::EXCEPTIONS),
        tail_call_enabled: on(2) && has(WasmFeatures::TAIL_CALL),
        extended_const_enabled: has(WasmFeatures::EXTENDED_CONST),
        threads_enabled: !on(4) && has(WasmFeatures::THREADS),
        disallow_traps: !on(4),
        min_uleb_size: if on(8) { 1 } else { 5 },
        ..Config::default()
    };
    match purpose {
        Purpose::Anything => {
            config.relaxed_simd_enabled = config.simd_enabled && has(WasmFeatures::RELAXED_SIMD);
        }
        Purpose::Comparison => {
            // What a relaxed instruction answers, and which bits a NaN has, is each machine's own affair.
            config.relaxed_simd_enabled = false;
            config.canonicalize_nans = true;
            config.export_everything = true;
            // Shared memories are an option of ours, and waiting takes time.
            config.threads_enabled = false;
            config.max_imports = 8;
        }
    }
    config
}

/// A valid module that ends, whatever is called; `None` where the dice say too little.
pub fn module(purpose: Purpose, features: WasmFeatures, dice: &mut Dice<'_>) -> Option<Vec<u8>> {
    let config = config(purpose, features, dice);
    let bytes = dice.bytes(4096);
    let mut module = Module::new(config, &mut Unstructured::new(&bytes)).ok()?;
    module.ensure_termination(FUEL).ok()?;
    Some(module.to_bytes())
}

/// Bytes that are almost a valid module.
pub fn damage(bytes: &mut Vec<u8>, dice: &mut Dice<'_>) {
    while !dice.is_over() && bytes.len() > 9 {
        let at = 8 + dice.roll(bytes.len() - 8);
        let value = dice.roll(256) as u8;
        match value % 3 {
            0 => bytes[at] ^= 1 << (value >> 5),
            1 => bytes[at] = value,
            _ => drop(bytes.remove(at)),
        }
    }
}
