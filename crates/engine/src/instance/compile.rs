//! Compiling, and what it leaves behind.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use wasmtime::{Config, Engine, Module, Result};

use crate::instance::deadline::Deadline;

/// After the first of several modules that are compiled together.
const UNTIL_GIVEN_BACK: Duration = Duration::from_secs(1);

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
    give_back_soon();
    module
}

/// What is free goes back to the system. Else it stays in the allocator's arenas, one for each of many threads: a soak
/// of ten minutes had 45 MB in use, and 350 MB of such free memory, which grew for as long as it ran.
fn give_back_soon() {
    static IS_DUE: AtomicBool = AtomicBool::new(false);
    if !HAS_ARENAS || IS_DUE.swap(true, Ordering::AcqRel) {
        return;
    }
    let later = || {
        IS_DUE.store(false, Ordering::Release);
        give_back();
    };
    match Deadline::after(UNTIL_GIVEN_BACK, later) {
        Ok(deadline) => deadline.detach(),
        Err(_) => later(),
    }
}

const HAS_ARENAS: bool = cfg!(all(target_os = "linux", target_env = "gnu"));

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    // SAFETY: any thread may ask at any time; nothing in use moves.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators give back by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
const fn give_back() {}
