//! Any bytes as a module.
#![no_main]

use std::mem::ManuallyDrop;

use libfuzzer_sys::{Corpus, fuzz_target};
use wasm_molt_testkit::hostile::{Came, Modules};

thread_local! {
    /// Lives as long as the process: what would end it has been ended before.
    static MODULES: ManuallyDrop<Modules> = ManuallyDrop::new(Modules::new());
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let is_raw = input.first().is_some_and(|kind| kind % 4 == 0);
    match MODULES.with(|modules| modules.ask(input)) {
        // Raw bytes that nobody takes for a module teach nothing.
        Came::Invalid if is_raw && input.get(..4) != Some(b"\0asm") => Corpus::Reject,
        _ => Corpus::Keep,
    }
});
