//! Any damage to what is kept between processes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wasm_molt_testkit::hostile;

fuzz_target!(|input: &[u8]| hostile::cache(input));
