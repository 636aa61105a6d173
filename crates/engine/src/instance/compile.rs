//! Compiling, and what it leaves behind.

use wasmtime::{Config, Engine, Module, Result};

use crate::instance::heap;

/// Compiles for `engine`, which was made of `config`.
///
/// * `apart`: on an engine that ends with it. A compiler keeps the buffers of all functions that it had in work at once
///   for its next module, for as long as its engine lives. With inlining that is every function of a module: 300 KB of
///   gofmt have left 180 MB behind, and more of it with each further module.
///
/// # Errors
/// What the compiler says.
pub(crate) fn compile(
    engine: &Engine,
    config: &Config,
    bytes: &[u8],
    apart: bool,
) -> Result<Module> {
    let module = if apart {
        let code = {
            let compiler = Engine::new(config)?;
            Module::new(&compiler, bytes)?.serialize()?
        };
        // SAFETY: these bytes were made here and now, by this very version with these very settings.
        unsafe { Module::deserialize(engine, code) }
    } else {
        Module::new(engine, bytes)
    };
    heap::give_back_soon();
    module
}
