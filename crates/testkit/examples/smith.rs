//! smith SEED COUNT KIND [FEATURE…]: so many modules of that seed, one a line, for another program to run.
//!
//! * `KIND`: `comparison`, `almost` for modules that were damaged, or `corpus` for what the fuzzer has kept.
//! * `FEATURE`: what another engine knows, in wasmparser's words, such as GC or MEMORY64.
//!
//! A line is JSON: the bytes in hexadecimal, whether they are valid for us and for that engine, and the types of the
//! exports in their order.
#![expect(clippy::print_stdout, reason = "that is what it is for")]

use std::error::Error;
use std::fs;

use wasm_molt_testkit::dice::Dice;
use wasm_molt_testkit::hostile::{features, is_valid_in_realm, module_of};
use wasm_molt_testkit::smith::{self, Purpose};
use wasmparser::{ExternalKind, Parser, Payload, Validator, WasmFeatures, types::EntityType};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [seed, count, kind, names @ ..] = &args[..] else {
        return Err("usage: smith SEED COUNT comparison|almost|corpus [FEATURE…]".into());
    };
    let (seed, count): (u64, u64) = (seed.parse()?, count.parse()?);
    let mut theirs = WasmFeatures::empty();
    for name in names {
        theirs |= WasmFeatures::from_name(name).ok_or_else(|| format!("no feature {name}"))?;
    }
    let common = theirs & features(false);
    if kind == "corpus" {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/modules");
        for entry in fs::read_dir(corpus)? {
            let path = entry?.path();
            if let Some(bytes) = module_of(&fs::read(&path)?) {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                tell(&name, &bytes, theirs)?;
            }
        }
        return Ok(());
    }
    for index in 0..count {
        let seed = seed.wrapping_add(index);
        let mut dice = Dice::seeded(seed);
        let Some(mut bytes) = smith::module(Purpose::Comparison, common, &mut dice) else {
            continue;
        };
        if kind == "almost" {
            let damage = dice.bytes(12);
            smith::damage(&mut bytes, &mut Dice::read(&damage));
        }
        tell(&seed.to_string(), &bytes, theirs)?;
    }
    Ok(())
}

fn tell(name: &str, bytes: &[u8], theirs: WasmFeatures) -> Result<(), Box<dyn Error>> {
    let ours = is_valid_in_realm(bytes);
    let is_theirs = Validator::new_with_features(theirs)
        .validate_all(bytes)
        .is_ok();
    let exports = if ours { exports(bytes)? } else { Vec::new() };
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    println!(
        r#"{{"seed":"{name}","ours":{ours},"theirs":{is_theirs},"bytes":"{hex}","exports":[{}]}}"#,
        exports.join(",")
    );
    Ok(())
}

/// The type of each export: parameters and results of a function, else its kind.
fn exports(bytes: &[u8]) -> Result<Vec<String>, Box<dyn Error>> {
    let types = Validator::new_with_features(features(true)).validate_all(bytes)?;
    let mut exports = Vec::new();
    for payload in Parser::new(0).parse_all(bytes) {
        let Payload::ExportSection(section) = payload? else {
            continue;
        };
        for export in section {
            let export = export?;
            let types = types.as_ref();
            let kind = match export.kind {
                ExternalKind::Func | ExternalKind::FuncExact => {
                    let Some(EntityType::Func(id)) = types.entity_type_from_export(&export) else {
                        return Err("a function without a type".into());
                    };
                    let ty = types[id].unwrap_func();
                    let words = |types: &[wasmparser::ValType]| {
                        let words: Vec<_> = types.iter().map(ToString::to_string).collect();
                        format!("{words:?}")
                    };
                    format!("[{},{}]", words(ty.params()), words(ty.results()))
                }
                other => format!("\"{other:?}\""),
            };
            exports.push(kind);
        }
    }
    Ok(exports)
}
