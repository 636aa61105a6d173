//! Any sequence of writes, snapshots, resets, forks and reloads.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wasm_molt_testkit::hostile;

fuzz_target!(|input: &[u8]| hostile::history(input));
