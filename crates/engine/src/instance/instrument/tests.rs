//! What a spliced module looks like. That it can be stopped is tested beside the poll page.

use wasmparser::{Operator, Parser, Payload, Validator, WasmFeatures};

use super::calls::Mark;
use super::splice::{MAX_FUNCTION_BYTES, MAX_MEMORIES};
use super::*;

const POLLS: InstrumentOptions = InstrumentOptions {
    polls: true,
    inlining: false,
};
const NOTHING: InstrumentOptions = InstrumentOptions {
    polls: false,
    inlining: false,
};

pub(super) fn wasm(wat: &str) -> Vec<u8> {
    wat::parse_str(wat).unwrap_or_else(|e| panic!("{e}: {wat}"))
}

pub(super) fn valid(bytes: &[u8]) -> bool {
    Validator::new_with_features(WasmFeatures::all())
        .validate_all(bytes)
        .is_ok()
}

/// Numbers that are the same each time.
pub(super) fn random(mut state: u64) -> impl FnMut() -> usize {
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    }
}

fn refused(bytes: &[u8]) -> InstrumentError {
    instrument(bytes, &POLLS).map(|_| ()).unwrap_err()
}

/// Splices, validates, and checks that leaving out the polls and their memory gives the module
/// back.
fn spliced(bytes: &[u8]) -> Instrumented<'_> {
    let spliced = instrument(bytes, &POLLS).unwrap();
    Validator::new_with_features(WasmFeatures::all())
        .validate_all(&spliced.bytes)
        .unwrap();
    let poll_memory = spliced.memories.len() as u32;
    let mut polls = 0;
    let (before, after) = (operators(bytes), operators(&spliced.bytes));
    let copies_data = usize::from(spliced.state.init.is_some());
    assert_eq!(before.len() + copies_data, after.len());
    for (before, after) in before.iter().zip(&after) {
        let mut kept = Vec::new();
        for operator in after {
            kept.push(operator.clone());
            if operator.contains(&format!("memory: {poll_memory} ")) {
                assert!(operator.starts_with("I32Store "), "{operator}");
                kept.truncate(kept.len() - 3);
                polls += 1;
            }
        }
        assert_eq!(before, &kept);
    }
    assert_eq!(spliced.has_poll_memory, polls > 0);
    spliced
}

fn operators(bytes: &[u8]) -> Vec<Vec<String>> {
    bodies(bytes)
        .iter()
        .map(|body| body.iter().map(|o| format!("{o:?}")).collect())
        .collect()
}

fn bodies(bytes: &[u8]) -> Vec<Vec<Operator<'_>>> {
    Parser::new(0)
        .parse_all(bytes)
        .filter_map(|payload| match payload.unwrap() {
            Payload::CodeSectionEntry(body) => Some(
                body.get_operators_reader()
                    .unwrap()
                    .into_iter()
                    .map(std::result::Result::unwrap)
                    .collect(),
            ),
            _ => None,
        })
        .collect()
}

/// Polls per function.
fn polls(wat: &str) -> Vec<usize> {
    let bytes = wasm(wat);
    let spliced = spliced(&bytes);
    let (before, after) = (operators(&bytes), operators(&spliced.bytes));
    before
        .iter()
        .zip(after)
        .map(|(b, a)| (a.len() - b.len()) / 3)
        .collect()
}

#[test]
fn loops_and_recursion_are_polled_and_nothing_else() {
    assert_eq!(polls("(module (func) (func i32.const 1 drop))"), [0, 0]);
    assert_eq!(
        polls("(module (func loop end loop loop end end) (func call 0))"),
        [3, 0]
    );
    assert_eq!(polls("(module (func call 0))"), [1]);
    assert_eq!(
        polls("(module (func call 1) (func call 2) (func call 0))"),
        [1, 0, 0]
    );
    assert_eq!(polls("(module (func call 1 call 1) (func))"), [0, 0]);
    assert_eq!(
        polls("(module (func return_call 1) (func return_call 0))"),
        [1, 0]
    );
    // Imports come first in the index space.
    assert_eq!(
        polls(r#"(module (import "" "" (func)) (func call 0) (func call 2 call 0))"#),
        [0, 1]
    );
    assert_eq!(
        polls(
            "(module (table 1 funcref) (func (call_indirect (i32.const 0))) (func (return_call_indirect (i32.const 0))))"
        ),
        [1, 1]
    );
}

#[test]
fn a_poll_stands_first_in_a_loop_and_in_a_function_and_before_an_indirect_call() {
    let bytes = wasm(
        "(module (table 1 funcref) (func (local i64) nop loop nop end (call_indirect (i32.const 0)) call 0))",
    );
    let spliced = spliced(&bytes);
    let names: Vec<_> = operators(&spliced.bytes)
        .remove(0)
        .iter()
        .map(|o| o.split([' ', '{']).next().unwrap().to_owned())
        .collect();
    let poll = ["I32Const", "I32Const", "I32Store"];
    let expected = [
        &poll[..],
        &["Nop", "Loop"],
        &poll,
        &["Nop", "End", "I32Const"],
        &poll,
        &["CallIndirect", "Call", "End"],
    ];
    assert_eq!(names, expected.concat());
}

/// The instructions of the first function, each by its name, polls as one.
fn shape(body: &str) -> String {
    let bytes = wasm(&format!(
        r#"(module (import "" "" (func)) (table 1 funcref) (tag $t) (memory 1) (func {body}))"#
    ));
    let names: Vec<_> = operators(&spliced(&bytes).bytes)
        .remove(0)
        .iter()
        .map(|o| match o.split([' ', '{']).next().unwrap() {
            "I32Store" => "POLL".to_owned(),
            name => name.to_lowercase(),
        })
        .collect();
    names.join(" ").replace("i32const i32const POLL", "POLL")
}

#[test]
fn a_loop_that_calls_nothing_is_polled_where_it_branches_back() {
    for (body, expected) in [
        ("loop br 0 end", "loop POLL br end end"),
        (
            "loop nop (br_if 0 (i32.const 1)) end",
            "loop nop i32const POLL brif end end",
        ),
        (
            "block loop (br_if 1 (i32.const 1)) br 0 end end",
            "block loop i32const brif POLL br end end end",
        ),
        // At most one of them is taken.
        (
            "loop (if (i32.const 1) (then br 1) (else br 1)) end",
            "loop i32const if POLL br else POLL br end end end",
        ),
        (
            "loop loop br 1 end br 0 end",
            // Nothing leads back to the inner one.
            "loop loop POLL POLL br end POLL br end end",
        ),
        (
            "loop loop (br_if 0 (i32.const 1)) end br 0 end",
            "loop loop i32const POLL brif end POLL br end end",
        ),
    ] {
        assert_eq!(shape(body), expected, "{body}");
    }
}

#[test]
fn a_loop_is_polled_at_its_header_where_that_is_cheaper_or_needed() {
    for body in [
        "loop end",
        // Calls, of whatever kind: the first round has not branched back yet.
        "loop call 0 br 0 end",
        "loop (call_indirect (i32.const 0)) br 0 end",
        "loop (if (i32.const 1) (then call 1)) br 0 end",
        "loop (if (i32.const 1) (then return_call 1)) br 0 end",
        // More than one branch on a condition, taken or not.
        "loop (br_if 0 (i32.const 1)) (br_if 0 (i32.const 1)) end",
        "loop (br_if 0 (i32.const 1)) br 0 end",
        // Other ways to branch.
        "loop (br_table 0 1 (i32.const 1)) end",
        "loop (br_table 1 0 (i32.const 1)) end",
        "loop br 0 (br_table 1 1 0 (i32.const 1)) end",
        "loop (block try_table (catch $t 0) end) br 0 end",
        "loop try_table (catch $t 1) end br 0 end",
        "loop (br_on_null 0 (ref.null func)) drop br 0 end",
    ] {
        let shape = shape(body);
        assert!(shape.contains("loop POLL"), "{body}: {shape}");
        assert_eq!(shape.matches("POLL").count(), 1, "{body}: {shape}");
    }
    // In an inner loop a condition may be looked at much more often than the outer one begins anew.
    assert_eq!(
        shape("loop loop (br_if 1 (i32.const 1)) br 0 end end"),
        "loop POLL loop i32const brif POLL br end end end"
    );
    // An inner loop is judged for itself.
    assert_eq!(
        shape("loop loop br 0 end call 0 br 0 end"),
        "loop POLL loop POLL br end call br end end"
    );
    assert_eq!(
        shape("loop loop call 0 br 0 end br 0 end"),
        "loop POLL loop POLL call br end br end end"
    );
}

/// A random function body of valid code without operands, `depth` labels deep.
fn random_code(
    random: &mut dyn FnMut(usize) -> usize,
    depth: usize,
    functions: usize,
    code: &mut String,
) {
    for _ in 0..random(4) {
        match random(11) {
            0..=2 if depth < 6 => {
                code.push_str("loop ");
                random_code(random, depth + 1, functions, code);
                code.push_str("end ");
            }
            3 if depth < 6 => {
                code.push_str("block ");
                random_code(random, depth + 1, functions, code);
                code.push_str("end ");
            }
            4 if depth < 6 => {
                code.push_str("i32.const 1 if ");
                random_code(random, depth + 1, functions, code);
                code.push_str("else ");
                random_code(random, depth + 1, functions, code);
                code.push_str("end ");
            }
            kind @ 5..=9 => {
                let label = random(depth + 1);
                let branch = match kind {
                    5 => format!("br {label} "),
                    8 => format!("i32.const 1 br_table {label} {} ", random(depth + 1)),
                    9 => format!("call {} ", random(functions)),
                    _ => format!("i32.const 1 br_if {label} "),
                };
                code.push_str(&branch);
            }
            _ => code.push_str("nop "),
        }
    }
}

/// Every place of a module's code, as the places that may be next; `None` where a poll is.
fn flow(bytes: &[u8]) -> Vec<Option<Vec<usize>>> {
    let poll_memory =
        |o: &Operator<'_>| matches!(o, Operator::I32Store { memarg } if memarg.memory == 0);
    let bodies = bodies(bytes);
    let starts: Vec<usize> = bodies
        .iter()
        .scan(0, |next, body| {
            let start = *next;
            *next += body.len();
            Some(start)
        })
        .collect();
    let mut places = Vec::new();
    for (body, start) in bodies.iter().zip(&starts) {
        // Where a branch to each label leads: filled in backwards for blocks.
        let mut ends = vec![0; body.len()];
        let mut elses = vec![None; body.len()];
        let mut open = Vec::new();
        for (at, operator) in body.iter().enumerate() {
            match operator {
                Operator::Loop { .. } | Operator::Block { .. } | Operator::If { .. } => {
                    open.push(at);
                }
                Operator::Else => elses[*open.last().unwrap()] = Some(at),
                Operator::End => {
                    if let Some(begin) = open.pop() {
                        ends[begin] = at;
                    }
                }
                _ => {}
            }
        }
        let mut open = Vec::new();
        for (at, operator) in body.iter().enumerate() {
            let label = |depth: u32| match (open.len() as u32).checked_sub(depth + 1) {
                None => body.len() - 1,
                Some(outer) => {
                    let begin: usize = open[outer as usize];
                    if matches!(body[begin], Operator::Loop { .. }) {
                        begin
                    } else {
                        ends[begin]
                    }
                }
            };
            let mut next = Vec::new();
            match operator {
                Operator::Br { relative_depth } => next.push(label(*relative_depth)),
                Operator::BrIf { relative_depth } => next.extend([label(*relative_depth), at + 1]),
                Operator::BrTable { targets } => {
                    next.push(label(targets.default()));
                    next.extend(targets.targets().map(|depth| label(depth.unwrap())));
                }
                Operator::If { .. } => next.extend([at + 1, elses[at].map_or(ends[at], |e| e + 1)]),
                Operator::Else => next.push(ends[*open.last().unwrap()]),
                _ if at + 1 < body.len() => next.push(at + 1),
                _ => {}
            }
            let mut next: Vec<usize> = next.iter().map(|next| next + start).collect();
            match operator {
                // Into it, or past it.
                Operator::Call { function_index } => next.push(starts[*function_index as usize]),
                Operator::Loop { .. } | Operator::Block { .. } | Operator::If { .. } => {
                    open.push(at);
                }
                Operator::End => {
                    open.pop();
                }
                _ => {}
            }
            places.push((!poll_memory(operator)).then_some(next));
        }
    }
    places
}

/// Whether one can go round somewhere without meeting a poll.
fn has_unpolled_cycle(places: &[Option<Vec<usize>>]) -> bool {
    let mut marks = vec![Mark::New; places.len()];
    for root in 0..places.len() {
        let mut open = vec![(root, 0)];
        while let Some((place, next)) = open.pop() {
            let Some(successors) = &places[place] else {
                marks[place] = Mark::Done;
                continue;
            };
            if next == 0 {
                match marks[place] {
                    Mark::New => marks[place] = Mark::Open,
                    Mark::Open => return true,
                    Mark::Done => continue,
                }
            }
            match successors.get(next) {
                Some(successor) => open.extend([(place, next + 1), (*successor, 0)]),
                None => marks[place] = Mark::Done,
            }
        }
    }
    false
}

#[test]
fn no_way_through_the_code_goes_round_without_a_poll() {
    let mut state = 1_u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut polls = [0, 0];
    for _ in 0..1_000 {
        let functions = 1 + random(3);
        let text = (0..functions).fold(String::new(), |text, _| {
            let mut code = String::new();
            random_code(&mut random, 0, functions, &mut code);
            text + &format!("(func {code})")
        });
        let bytes = wasm(&format!("(module {text})"));
        let spliced = spliced(&bytes);
        assert!(!has_unpolled_cycle(&flow(&spliced.bytes)), "{text}");
        if !spliced.has_poll_memory {
            continue;
        }
        // The check itself can fail: one poll less, and often something goes round.
        let mut places = flow(&spliced.bytes);
        let at: Vec<_> = (0..places.len())
            .filter(|at| places[*at].is_none())
            .collect();
        let one = at[random(at.len())];
        places[one] = Some(vec![one + 1]);
        polls[usize::from(has_unpolled_cycle(&places))] += 1;
    }
    assert!(polls[1] > 150, "{polls:?}");
}

/// Functions of which each calls the next, `calls` times; and a last one.
fn chain(depth: usize, calls: usize) -> usize {
    let functions = (1..=depth).fold(String::new(), |wat, next| {
        wat + "(func" + &format!(" call {next}").repeat(calls) + ")"
    });
    polls(&format!("(module {functions} (func))")).iter().sum()
}

#[test]
fn calls_that_multiply_are_polled_somewhere() {
    assert_eq!(chain(16, 2), 0);
    assert!((2..=20).contains(&chain(64, 2)));
    // Depth costs neither stack nor time.
    assert_eq!(chain(50_000, 1), 0);
}

#[test]
fn the_poll_memory_is_the_last() {
    for (wat, memories, defined) in [
        ("(module (func loop end))", 0, 0),
        ("(module (memory 1) (func loop end))", 1, 1),
        (
            "(module (memory 1) (memory 0 5) (memory i64 7) (func loop end))",
            3,
            3,
        ),
        (
            r#"(module (import "" "" (memory 2 3 shared)) (memory 4) (func loop end))"#,
            2,
            1,
        ),
        (
            r#"(module (import "" "" (memory 0)) (func loop end))"#,
            1,
            0,
        ),
    ] {
        let bytes = wasm(wat);
        let spliced = spliced(&bytes);
        assert_eq!(
            (spliced.memories.len(), spliced.defined_memories()),
            (memories, defined),
            "{wat}"
        );
    }
}

#[test]
fn a_memory_section_is_made_in_the_right_place() {
    for rest in [
        "",
        "(global i32 (i32.const 0))",
        "(tag)",
        r#"(export "f" (func 0))"#,
        "(start 0)",
        "(table 1 funcref) (elem (i32.const 0) 0)",
        r#"(data "passive")"#,
        "(table 1 funcref)",
    ] {
        spliced(&wasm(&format!("(module (func loop end) {rest})")));
    }
}

#[test]
fn the_types_of_memories_are_reported_as_declared() {
    let bytes = wasm(
        r#"(module (import "" "" (memory 2 3 shared)) (memory i64 4 (pagesize 1)) (memory 5) (func loop end))"#,
    );
    let plain = MemoryInfo {
        imported: false,
        minimum: 5,
        maximum: None,
        shared: false,
        memory64: false,
        page_size_log2: 16,
    };
    let expected = [
        MemoryInfo {
            imported: true,
            minimum: 2,
            maximum: Some(3),
            shared: true,
            ..plain
        },
        MemoryInfo {
            minimum: 4,
            memory64: true,
            page_size_log2: 0,
            ..plain
        },
        plain,
    ];
    assert_eq!(spliced(&bytes).memories, expected);
    let unpolled = instrument(&bytes, &NOTHING).unwrap();
    assert_eq!(unpolled.memories, expected);
    assert!(!unpolled.has_poll_memory);
}

#[test]
fn a_module_without_state_that_always_ends_soon_is_left_alone() {
    let bytes = wasm("(module (global i32 (i32.const 0)) (func) (func call 0))");
    assert!(matches!(
        instrument(&bytes, &POLLS).unwrap().bytes,
        Cow::Borrowed(_)
    ));
}

#[test]
fn names_are_kept_and_code_offsets_dropped() {
    let bytes = wasm(
        r#"(module $the_name
            (@custom ".debug_info" "x") (@custom "sourceMappingURL" "x") (@custom "producers" (after last) "\00")
            (@custom "my.own" "x") (@custom "reloc.CODE" "x")
            (func $a_function loop (@metadata.code.branch_hint "\00") (if (i32.const 0) (then)) end))"#,
    );
    let spliced = spliced(&bytes);
    assert_eq!(spliced.name.as_deref(), Some("the_name"));
    let customs: Vec<_> = Parser::new(0)
        .parse_all(&spliced.bytes)
        .filter_map(|payload| match payload.unwrap() {
            Payload::CustomSection(custom) => Some(custom.name().to_owned()),
            _ => None,
        })
        .collect();
    assert_eq!(customs, ["producers", "my.own", "name"]);
    assert_eq!(instrument(&wasm("(module)"), &POLLS).unwrap().name, None);
}

#[test]
fn what_is_no_module_is_refused() {
    assert_eq!(refused(b""), InstrumentError::NotWasm { first: Vec::new() });
    assert_eq!(
        refused(b"").to_string(),
        "these bytes are no WebAssembly module: they begin with nothing and not with 00 61 73 6d"
    );
    assert_eq!(
        refused(b"\0as"),
        InstrumentError::NotWasm {
            first: b"\0as".to_vec()
        }
    );
    assert_eq!(
        refused(b"#!/bin/sh\n"),
        InstrumentError::NotWasm {
            first: b"#!/bin/s".to_vec()
        }
    );
    assert_eq!(refused(&wasm("(component)")), InstrumentError::Component);
    assert!(matches!(
        refused(b"\0asm"),
        InstrumentError::Malformed { offset: 4, .. }
    ));
    assert!(matches!(
        refused(b"\0asm\x02\0\0\0"),
        InstrumentError::Malformed { .. }
    ));
    let bytes = wasm("(module (memory 1) (func loop end))");
    for cut in 8..bytes.len() {
        // Between two sections a module may end, as far as can be seen here.
        if let Err(error) = instrument(&bytes[..cut], &POLLS) {
            assert!(
                matches!(error, InstrumentError::Malformed { .. }),
                "{cut}: {error}"
            );
        }
    }
}

#[test]
fn legacy_exceptions_are_refused_with_the_remedy() {
    for body in [
        "try catch_all end",
        "try catch 0 end",
        "try end delegate 0",
        "try catch_all rethrow 0 end",
    ] {
        // The assembler does not write them: put them in by hand.
        let bytes: Vec<u8> = match body {
            "try catch_all end" => vec![0x06, 0x40, 0x19, 0x0b, 0x0b],
            "try catch 0 end" => vec![0x06, 0x40, 0x07, 0x00, 0x0b, 0x0b],
            "try end delegate 0" => vec![0x06, 0x40, 0x18, 0x00, 0x0b],
            _ => vec![0x06, 0x40, 0x19, 0x09, 0x00, 0x0b, 0x0b],
        };
        let module = with_body(&bytes);
        for options in [POLLS, NOTHING] {
            let error = instrument(&module, &options).map(|_| ()).unwrap_err();
            let at = module.len() - bytes.len();
            assert_eq!(
                error,
                InstrumentError::LegacyExceptions { offset: at },
                "{body}"
            );
            assert!(error.to_string().contains("wasm-opt --translate-to-exnref"));
        }
    }
}

/// A module of one function with that code.
fn with_body(code: &[u8]) -> Vec<u8> {
    let mut types = wasm_encoder::TypeSection::new();
    types.ty().function([], []);
    let mut functions = wasm_encoder::FunctionSection::new();
    functions.function(0);
    let mut body = wasm_encoder::Function::new([]);
    body.raw(code.iter().copied());
    let mut bodies = wasm_encoder::CodeSection::new();
    bodies.function(&body);
    let mut module = wasm_encoder::Module::new();
    module.section(&types).section(&functions).section(&bodies);
    module.finish()
}

#[test]
fn limits_of_the_format_are_named() {
    let memories = "(memory 0)".repeat(MAX_MEMORIES);
    let error = refused(&wasm(&format!("(module {memories} (func loop end))")));
    assert!(matches!(error, InstrumentError::NoRoom { .. }), "{error}");
    assert!(
        error.to_string().contains("engine.interruptible: false"),
        "{error}"
    );

    let mut code = vec![0x03, 0x40, 0x0b];
    code.resize(MAX_FUNCTION_BYTES - 2, 0x01);
    code.push(0x0b);
    assert!(matches!(
        refused(&with_body(&code)),
        InstrumentError::NoRoom { .. }
    ));
    code.drain(3..20);
    spliced(&with_body(&code));
}

/// A module with so many memories, whose text is not checked by the assembler.
fn with_memories(count: usize, rest: &str) -> Vec<u8> {
    let memories = "(memory 1 1)".repeat(count);
    wasm(&format!(r#"(module {memories} (data $d "x") {rest})"#))
}

#[test]
fn no_part_of_a_module_can_name_the_poll_memory() {
    const LOOP: &str = "(func loop end)";
    let instructions = [
        "(drop (i32.load M (i32.const 0)))",
        "(i64.store32 M offset=9 (i32.const 0) (i64.const 0))",
        "(drop (memory.size M))",
        "(drop (memory.grow M (i32.const 0)))",
        "(memory.fill M (i32.const 0) (i32.const 7) (i32.const 65536))",
        "(memory.init M $d (i32.const 0) (i32.const 0) (i32.const 1))",
        "(drop (v128.load M (i32.const 0)))",
        "(drop (v128.load8x8_s M (i32.const 0)))",
        "(v128.store32_lane M offset=300 3 (i32.const 0) (v128.const i64x2 0 0))",
        "(drop (i32.atomic.rmw8.add_u M (i32.const 0) (i32.const 1)))",
        "(drop (memory.atomic.notify M (i32.const 0) (i32.const 1)))",
        "(drop (memory.atomic.wait32 M (i32.const 0) (i32.const 1) (i64.const 0)))",
        // Read by the parser for another reason.
        "(drop (ref.null func)) (drop (i32.load8_u M (i32.const 0)))",
    ];
    let refused_as = |bytes: &[u8], index: usize, what: &str| {
        assert!(!valid(bytes), "{what}");
        for options in [POLLS, NOTHING] {
            match instrument(bytes, &options).map(|_| ()) {
                Err(InstrumentError::Malformed { message, offset }) => {
                    assert_eq!(message, format!("unknown memory {index}"), "{what}");
                    assert!((8..bytes.len()).contains(&offset), "{what}");
                }
                other => panic!("{what}: {other:?}"),
            }
        }
    };
    for count in 0..3 {
        let others = |text: &str| text.replace('M', &count.to_string());
        for instruction in instructions {
            let instruction = others(instruction);
            let rest = format!("{LOOP} (func {instruction})");
            refused_as(&with_memories(count, &rest), count, &instruction);
            // With one more it is fine.
            spliced(&with_memories(count + 1, &rest));
        }
        for rest in [
            r#"(export "m" (memory M))"#,
            r#"(data (memory M) (i32.const 0) "x")"#,
        ] {
            let rest = format!("{} {LOOP}", others(rest));
            refused_as(&with_memories(count, &rest), count, &rest);
            spliced(&with_memories(count + 1, &rest));
        }
    }
    for (copy, unknown) in [("1 0", 1), ("0 1", 1), ("7 0", 7)] {
        let rest =
            format!("{LOOP} (func (memory.copy {copy} (i32.const 0) (i32.const 0) (i32.const 0)))");
        refused_as(&with_memories(1, &rest), unknown, copy);
    }
    // Imported ones count.
    let rest = r#"(import "" "" (memory 1)) (func loop (drop (i32.load 1 (i32.const 0))) end)"#;
    refused_as(&wasm(&format!("(module {rest})")), 1, rest);
    spliced(&wasm(&format!("(module {rest} (memory 1))")));
    // memory.discard, which has no text.
    let discard = [0x03, 0x40, 0x0b, 0xfc, 0x12, 0x00, 0x0b];
    refused_as(&with_body(&discard), 0, "discard");
}

#[test]
fn damaged_modules_are_refused_or_left_to_the_compiler_but_never_a_panic() {
    let bytes = wasm(
        r#"(module $n (import "a" "b" (func)) (import "a" "m" (memory 1)) (memory 1 2) (table 2 funcref) (global i32 (i32.const 0))
            (export "x" (func 1)) (elem (i32.const 0) 1 2) (data (i32.const 0) "hello")
            (func (local i32 i64) loop (br_table 0 0 0 (i32.const 1)) end call 2 (call_indirect (i32.const 0)))
            (func (param i32) (if (local.get 0) (then (call 2 (i32.const 0)) (call 0))) (drop (v128.const i64x2 0 0))))"#,
    );
    let mut random = random(1);
    let mut accepted = 0;
    for _ in 0..100_000 {
        let mut bytes = bytes.clone();
        for _ in 0..=random() % 3 {
            let at = 8 + random() % (bytes.len() - 8);
            match random() % 4 {
                0 => bytes[at] = random() as u8,
                1 => bytes[at] ^= 1 << (random() % 8),
                2 => bytes.truncate(at),
                _ => bytes.insert(at, random() as u8),
            }
            if bytes.len() <= 8 {
                break;
            }
        }
        match instrument(&bytes, &POLLS) {
            Ok(spliced) => {
                accepted += 1;
                assert_eq!(valid(&bytes), valid(&spliced.bytes), "{bytes:x?}");
            }
            Err(InstrumentError::LegacyExceptions { .. } | InstrumentError::NoRoom { .. }) => {}
            Err(error) => assert!(!valid(&bytes), "{error} {bytes:x?}"),
        }
    }
    assert!(accepted > 1000, "{accepted}");
}
