//! Compiling on an engine that ends with it.
//!
//! A compiler keeps the buffers of all functions that it had in work at once for its next module, for as long as its
//! engine lives. With inlining that is every function of a module: 300 KB of gofmt have left 180 MB behind, and more
//! of it with each further module.

use wasmtime::{Config, Engine, Module, Result};

/// Compiles for `engine`, which was made of `config`.
///
/// # Errors
/// What the compiler says.
pub(crate) fn apart(engine: &Engine, config: &Config, bytes: &[u8]) -> Result<Module> {
    let code = {
        let compiler = Engine::new(config)?;
        Module::new(&compiler, bytes)?.serialize()?
    };
    give_back();
    // SAFETY: these bytes were made here and now, by this very version with these very settings.
    unsafe { Module::deserialize(engine, code) }
}

/// What is free goes back to the system: else it stays in the arenas of the threads that have compiled, which are the
/// pool's, and few of them ever need as much again.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    // SAFETY: any thread may ask at any time; nothing in use moves.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators do so by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
const fn give_back() {}
