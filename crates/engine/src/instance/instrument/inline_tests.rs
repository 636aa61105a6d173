//! What passes and what does not. That the compiler's output stays small is tested with it.

use std::time::Instant;

use super::super::{InstrumentOptions, Instrumented, instrument};
use super::*;

const BOTH: InstrumentOptions = InstrumentOptions {
    polls: true,
    inlining: true,
};

fn engine(inlining: bool) -> wasmtime::Engine {
    let mut config = wasmtime::Config::new();
    config.compiler_inlining(if inlining {
        wasmtime::Inlining::Yes
    } else {
        wasmtime::Inlining::No
    });
    wasmtime::Engine::new(&config).unwrap()
}

/// Machine code of a module, compiled as it would be.
fn code_bytes(instrumented: &Instrumented<'_>) -> usize {
    let module = wasmtime::Module::new(&engine(instrumented.inlining), &instrumented.bytes);
    module.unwrap().text().len()
}

/// Functions of which each does `body`, where `N` is the next one; and a last one.
fn chain(depth: usize, body: &str) -> String {
    let functions = (1..=depth).fold(String::new(), |wat, next| {
        wat + "(func " + &body.replace('N', &next.to_string()) + ")"
    });
    format!(r#"(module {functions} (func) (export "f" (func 0)))"#)
}

#[test]
fn modules_that_would_explode_stay_small() {
    for (depth, body) in [
        (64, "call N call N"),
        (64, "loop call N call N end"),
        (300, "call N call N call N"),
        (1000, "call N call N"),
        // Looks like many values, but none of it is compiled.
        (
            64,
            &("call N call N return ".to_owned() + &"i32.const 1 drop ".repeat(500)),
        ),
        (
            64,
            &("call N call N unreachable ".to_owned() + &"i32.const 1 drop ".repeat(10)),
        ),
        (
            64,
            &("block br 0 ".to_owned() + &"i32.const 1 drop ".repeat(900) + "end call N call N"),
        ),
        (64, "return_call N"),
    ] {
        for polls in [true, false] {
            let wasm = wat::parse_str(chain(depth, body)).unwrap();
            let begin = Instant::now();
            let instrumented = instrument(
                &wasm,
                &InstrumentOptions {
                    polls,
                    inlining: true,
                },
            );
            let bytes = code_bytes(&instrumented.unwrap());
            let what = body.get(..30).unwrap_or(body);
            assert!(bytes < 8 << 20, "{depth} {what}: {bytes}");
            assert!(begin.elapsed().as_secs() < 60, "{depth} {what}");
        }
    }
}

#[test]
fn small_modules_keep_their_frames_and_middling_ones_get_pads() {
    let wasm = wat::parse_str("(module (func call 1) (func call 2) (func))").unwrap();
    let plain = instrument(&wasm, &BOTH).unwrap();
    assert!(!plain.inlining && matches!(plain.bytes, std::borrow::Cow::Borrowed(_)));
    let wasm = wat::parse_str(chain(14, "loop call N call N end")).unwrap();
    for polls in [true, false] {
        let options = InstrumentOptions {
            polls,
            inlining: true,
        };
        let padded = instrument(&wasm, &options).unwrap();
        wasmparser::Validator::new_with_features(wasmparser::WasmFeatures::all())
            .validate_all(&padded.bytes)
            .unwrap();
        let padding = 15 * super::super::splice::PAD.len();
        assert!(padded.inlining && padded.bytes.len() > wasm.len() + padding);
        let refused = instrument(
            &wasm,
            &InstrumentOptions {
                polls,
                inlining: false,
            },
        )
        .unwrap();
        assert!(!refused.inlining && refused.bytes.len() < padded.bytes.len());
        assert_eq!(padded.has_poll_memory, polls);
    }
    let wasm = wat::parse_str(chain(1000, "call N call N")).unwrap();
    assert!(!instrument(&wasm, &BOTH).unwrap().inlining);
    let large = "i32.const 1 drop ".repeat(1 << 19);
    let wasm = wat::parse_str(format!("(module (func {large}))")).unwrap();
    assert!(!instrument(&wasm, &BOTH).unwrap().inlining);
}

#[test]
fn components_come_after_those_they_call() {
    // 0 → 1 ⇄ 2 → 3, 4 → 4, 5 → 0
    let graph = [vec![1], vec![2], vec![1, 3], vec![], vec![4], vec![0]];
    let (order, component) = components(graph.len(), |f| graph[f].iter().copied());
    assert_eq!(component[1], component[2]);
    let place = |f: usize| order.iter().position(|o| *o == f).unwrap();
    assert!(place(3) < place(2) && place(1) < place(0) && place(0) < place(5));
    assert_eq!(order.len(), 6);
    let distinct: std::collections::HashSet<_> = component.iter().collect();
    assert_eq!(distinct.len(), 5);
    let (order, _) = components(200_000, |f| (f + 1 < 200_000).then_some(f + 1).into_iter());
    assert_eq!(order[0], 199_999);
}
