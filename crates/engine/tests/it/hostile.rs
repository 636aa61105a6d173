//! Bytes, values, histories and files that mean harm: what the fuzz targets ask, asked of seeds, and of every input
//! that fuzzing has found worth keeping (`fuzz/corpus`, by target).

use std::fs;
use std::path::Path;

use wasm_molt_testkit::dice::Dice;
use wasm_molt_testkit::hostile::{self, Came, Modules};

use crate::exactly_once::seed;

/// Inputs that were kept, each with its name.
fn kept(target: &str) -> Vec<(String, Vec<u8>)> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let mut inputs: Vec<_> = fs::read_dir(corpus.join(target))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    assert!(!inputs.is_empty(), "nothing was kept for {target}");
    inputs.sort();
    inputs
}

/// So many inputs that nobody has chosen, after those that were kept.
fn inputs(target: &str, count: usize) -> Vec<(String, Vec<u8>)> {
    let seed = seed();
    println!("{target}: WASM_MOLT_SEED={seed}");
    let mut inputs = kept(target);
    for round in 0..count {
        let mut dice = Dice::seeded(seed.wrapping_add(round as u64));
        let len = 1 + dice.roll(2048);
        inputs.push((format!("seed {seed}, {round}"), dice.bytes(len)));
    }
    inputs
}

/// What fails says which input it was; the names are hashes of the contents, as the fuzzer gives them.
fn ask(target: &str, count: usize, mut oracle: impl FnMut(&[u8])) {
    for (name, input) in inputs(target, count) {
        println!("{target}: {name}");
        oracle(&input);
    }
}

#[test]
fn any_bytes_are_refused_or_run_within_their_limits_and_run_the_same_after_a_reset() {
    let modules = Modules::new();
    let (mut invalid, mut ran) = (0, 0);
    ask("modules", 150, |input| match modules.ask(input) {
        Came::Invalid => invalid += 1,
        Came::Refused(_) => {}
        Came::Ran => ran += 1,
    });
    // Else there would be nothing to say of either.
    assert!(invalid >= 10 && ran >= 50, "{invalid} invalid, {ran} ran");
}

#[test]
fn any_values_come_back_bit_for_bit_or_are_refused_by_name() {
    ask("values", 100, hostile::values);
}

#[test]
fn any_history_agrees_with_the_model() {
    ask("histories", 20, hostile::history);
}

#[test]
fn whatever_was_done_to_a_cache_entry_what_runs_is_what_was_given() {
    ask("cache", 20, hostile::cache);
}
