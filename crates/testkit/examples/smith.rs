//! smith SEED COUNT KIND [FEATURE…]: so many modules of that seed, one a line, for another program to run.
//!
//! * `KIND`: `comparison`, `almost` for modules that were damaged, or `corpus` for what the fuzzer has kept.
//! * `FEATURE`: what another engine knows, in wasmparser's words, such as GC or MEMORY64.
//!
//! A line is JSON: the bytes in hexadecimal, whether they are valid for us and for that engine, why not, whether that is
//! only with exception handling, and the types of imports and exports in their order.
#![expect(clippy::print_stdout, reason = "that is what it is for")]

use std::error::Error;
use std::fs;

use wasm_molt_testkit::dice::Dice;
use wasm_molt_testkit::hostile::{features, is_valid_in_realm, module_of};
use wasm_molt_testkit::smith::{self, Purpose};
use wasmparser::types::{EntityType, TypesRef};
use wasmparser::{Parser, Payload, ValType, Validator, WasmFeatures};

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
            let damage = dice.bytes(3);
            smith::damage(&mut bytes, &mut Dice::read(&damage));
        }
        tell(&seed.to_string(), &bytes, theirs)?;
    }
    Ok(())
}

fn tell(name: &str, bytes: &[u8], theirs: WasmFeatures) -> Result<(), Box<dyn Error>> {
    let ours = is_valid_in_realm(bytes);
    let said = Validator::new_with_features(theirs).validate_all(bytes);
    // In the validator's words, which are plain ASCII.
    let why = said.as_ref().err().map_or("", |error| error.message());
    let is_theirs = said.is_ok();
    let without = Validator::new_with_features(theirs - WasmFeatures::EXCEPTIONS);
    let throws = is_theirs && { without }.validate_all(bytes).is_err();
    let [imports, exports] = if ours {
        shapes(bytes)?
    } else {
        Default::default()
    };
    let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let hex = hex.concat();
    let (imports, exports) = (imports.join(","), exports.join(","));
    println!(
        r#"{{"seed":"{name}","ours":{ours},"theirs":{is_theirs},"throws":{throws},"why":{why:?},"bytes":"{hex}","imports":[{imports}],"exports":[{exports}]}}"#
    );
    Ok(())
}

/// The types of imports and of exports, each as a JSON object.
fn shapes(bytes: &[u8]) -> Result<[Vec<String>; 2], Box<dyn Error>> {
    let types = Validator::new_with_features(features(true)).validate_all(bytes)?;
    let types = types.as_ref();
    let mut shapes = [Vec::new(), Vec::new()];
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let ty = types.entity_type_from_import(&import?);
                    shapes[0].push(ty.map_or("null".into(), |ty| shape(types, ty)));
                }
            }
            Payload::ExportSection(section) => {
                for export in section {
                    let ty = types.entity_type_from_export(&export?);
                    shapes[1].push(ty.map_or("null".into(), |ty| shape(types, ty)));
                }
            }
            _ => {}
        }
    }
    Ok(shapes)
}

fn shape(types: TypesRef<'_>, ty: EntityType) -> String {
    let limits = |initial: u64, maximum: Option<u64>, is_64: bool| {
        let maximum = maximum.map_or("null".into(), |maximum| maximum.to_string());
        format!(r#""initial":{initial},"maximum":{maximum},"is64":{is_64}"#)
    };
    let words = |types: &[ValType]| {
        let words: Vec<_> = types.iter().map(ToString::to_string).collect();
        format!("{words:?}")
    };
    match ty {
        EntityType::Func(id) | EntityType::FuncExact(id) => {
            let ty = types[id].unwrap_func();
            let (params, results) = (words(ty.params()), words(ty.results()));
            format!(r#"{{"kind":"function","params":{params},"results":{results}}}"#)
        }
        EntityType::Memory(ty) => {
            let limits = limits(ty.initial, ty.maximum, ty.memory64);
            format!(r#"{{"kind":"memory",{limits}}}"#)
        }
        EntityType::Table(ty) => {
            let element = ValType::Ref(ty.element_type);
            let limits = limits(ty.initial, ty.maximum, ty.table64);
            format!(r#"{{"kind":"table","element":"{element}",{limits}}}"#)
        }
        EntityType::Global(ty) => format!(
            r#"{{"kind":"global","value":"{}","mutable":{}}}"#,
            ty.content_type, ty.mutable
        ),
        EntityType::Tag(_) => r#"{"kind":"tag"}"#.into(),
    }
}
