//! The table must agree with `wasmparser` wherever it does not give up.

use wasmparser::BinaryReader;

use super::*;

/// A body without locals, at an offset.
fn body(code: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend_from_slice(code);
    bytes
}

/// A module with two memories, and two tables of which one may grow.
fn declared() -> Declared {
    Declared {
        memories: 2,
        types: u32::MAX,
        functions: u32::MAX,
        globals: u32::MAX,
        data: Some(u32::MAX),
        may_grow: vec![false, true],
        start: Some(3),
    }
}

fn by_table(bytes: &[u8]) -> Option<(Vec<Site>, Vec<Rare>)> {
    let mut sites = Sites::default();
    scan_common(&bytes[1..], 1001, &declared(), &mut sites)?;
    sites.finish(0);
    Some((sites.found, sites.rares))
}

fn by_parser(bytes: &[u8]) -> Result<(Vec<Site>, Vec<Rare>)> {
    let mut sites = Sites::default();
    let body = FunctionBody::new(BinaryReader::new(bytes, 1000));
    scan_any(&body, &declared(), &mut sites)?;
    sites.finish(0);
    Ok((sites.found, sites.rares))
}

/// Code of the one function in a module.
fn assemble(code: &str) -> Vec<u8> {
    let wat = format!(
        r#"(module (type $f (func)) (memory 1) (memory i64 1) (table 1 funcref) (table 1 funcref)
            (global $g (mut i32) (i32.const 0)) (elem $e func 0) (data $d "x") (tag $t)
            (func (type $f) {code}))"#
    );
    let wasm = wat::parse_str(wat).unwrap();
    let body = wasmparser::Parser::new(0)
        .parse_all(&wasm)
        .find_map(|p| match p.unwrap() {
            wasmparser::Payload::CodeSectionEntry(body) => Some(body.as_bytes().to_vec()),
            _ => None,
        });
    body.unwrap()
}

#[test]
fn what_compilers_emit_is_read_by_the_table() {
    for (code, sites, callees) in [
        ("", 0, 0),
        ("nop unreachable drop select return br 0 br_if 0", 0, 0),
        ("block loop if else end end end", 1, 0),
        (
            "block (result i32) loop (result f64) loop (type $f) end end end",
            2,
            0,
        ),
        ("loop (param i32) (result v128 externref) end", 1, 0),
        ("br_table 0 0 0 0", 0, 0),
        (
            "loop br 0 br 0 br 0 end loop br_if 0 loop br 1 end end",
            5,
            0,
        ),
        (
            "loop br_if 0 br_if 0 end loop loop br_if 1 end end loop br_table 0 1 0 end",
            4,
            0,
        ),
        ("call 0 return_call 0 call 0", 0, 3),
        (
            "call_indirect (type $f) call_indirect 1 (type $f) return_call_indirect (type $f)",
            3,
            0,
        ),
        (
            "local.get 0 local.set 300 local.tee 70000 global.get 0 global.set 0",
            0,
            0,
        ),
        (
            "i32.const -1 i32.const 2147483647 i64.const -9223372036854775808 f32.const 1 f64.const 2",
            0,
            0,
        ),
        (
            "i32.load i64.load8_s offset=4294967295 i32.store16 offset=7 align=1 i64.store 1 offset=18446744073709551615",
            0,
            0,
        ),
        ("memory.size memory.grow memory.size 1 memory.grow 1", 0, 0),
        (
            "i32.eqz i64.rotr f64.copysign i32.wrap_i64 f64.reinterpret_i64 i32.extend8_s i64.extend32_s",
            0,
            0,
        ),
        (
            "ref.func 0 ref.is_null table.get 0 table.set 1 table.size 1 table.grow 1 table.fill 1",
            0,
            0,
        ),
        (
            "memory.fill memory.copy memory.copy 0 1 memory.init 0 data.drop 0",
            0,
            0,
        ),
        (
            "table.copy 0 1 table.init 1 0 elem.drop 0 i32.trunc_sat_f32_s i64.trunc_sat_f64_u",
            0,
            0,
        ),
        (
            "v128.load offset=9 v128.load8x8_u v128.load64_splat v128.store v128.load32_zero v128.load64_zero",
            0,
            0,
        ),
        (
            "v128.const i64x2 1 2 i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 i8x16.swizzle i8x16.splat",
            0,
            0,
        ),
        (
            "i8x16.extract_lane_s 3 f64x2.replace_lane 1 v128.load8_lane offset=1 5 v128.store64_lane 1 0",
            0,
            0,
        ),
        (
            "i8x16.eq v128.not v128.any_true f32x4.demote_f64x2_zero i64x2.mul f64x2.convert_low_i32x4_u",
            0,
            0,
        ),
        (
            "i8x16.relaxed_swizzle f32x4.relaxed_madd i32x4.relaxed_dot_i8x16_i7x16_add_s",
            0,
            0,
        ),
    ] {
        let bytes = assemble(code);
        let found = by_parser(&bytes).unwrap();
        assert_eq!(by_table(&bytes).as_ref(), Some(&found), "{code}");
        let (found, _) = found;
        let polled = found.iter().filter(|site| site.is_polled()).count();
        assert_eq!(
            (polled, found.len() - 1 - polled),
            (sites, callees),
            "{code}"
        );
    }
}

#[test]
fn what_the_table_does_not_know_goes_to_the_parser() {
    for (code, sites) in [
        ("select (result i32) loop end", 1),
        ("ref.null func loop end", 1),
        ("call_ref $f return_call_ref $f", 2),
        ("throw $t loop end", 1),
        ("block try_table (catch $t 0) loop end end end", 1),
        (
            "block (result (ref null $f)) loop (result (ref func)) end end",
            1,
        ),
        ("i32.atomic.load loop end atomic.fence", 1),
        ("struct.new 0 loop end ref.i31", 1),
    ] {
        let bytes = assemble(code);
        assert_eq!(by_table(&bytes), None, "{code}");
        let earlier = Site { at: 7, callee: 8 };
        let mut seen = Sites {
            found: vec![earlier],
            ..Sites::default()
        };
        scan(
            &FunctionBody::new(BinaryReader::new(&bytes, 1000)),
            &declared(),
            &mut seen,
        )
        .unwrap();
        assert_eq!(seen.found[0], earlier);
        assert_eq!(seen.found.len(), 2 + sites, "{code}");
    }
}

#[test]
fn calls_inside_loops_are_no_sites() {
    for code in [
        "call 0 loop call 0 block call 0 end if call 0 else call 0 end end call 0",
        "call 0 loop loop call 0 end call 0 end call 0",
        "call 0 loop (call_indirect (type $f)) end block call 0 end",
        "call 0 loop block try_table (catch $t 0) call 0 end end end call 0",
        "if call 0 end loop (call_ref $f) select (result i32) end call 0",
    ] {
        let bytes = assemble(code);
        let mut seen = Sites::default();
        scan(
            &FunctionBody::new(BinaryReader::new(&bytes, 1000)),
            &declared(),
            &mut seen,
        )
        .unwrap();
        let calls = seen.found.iter().filter(|site| !site.is_polled()).count();
        let loops = code.matches("loop").count();
        assert_eq!((calls, seen.found.len()), (3, 3 + loops), "{code}");
    }
}

#[test]
fn every_second_opcode_has_the_length_that_the_parser_sees() {
    // Filled up with ends, so that immediates of any length can be read.
    for (prefix, count) in [(0xfc_u8, 300_u16), (0xfd, 700)] {
        for opcode in 0..count {
            for filler in [0x00, 0x01, 0x0b] {
                let mut code = vec![prefix, (opcode & 0x7f) as u8 | 0x80, (opcode >> 7) as u8];
                code.extend([filler; 20]);
                code.extend([LOOP, 0x40, 0x0b, 0x0b]);
                agree(&body(&code));
            }
        }
    }
    for opcode in 0..=0xff {
        for filler in [0x00, 0x01, 0x0b, 0x40, 0x7f] {
            let mut code = vec![0x02, 0x40, opcode];
            code.extend([filler; 12]);
            code.extend([LOOP, 0x40, 0x0b, 0x0b, 0x0b]);
            agree(&body(&code));
        }
    }
}

/// Whether both could read it; they must then have read the same.
fn agree(bytes: &[u8]) -> bool {
    match (by_table(bytes), by_parser(bytes)) {
        (Some(table), Ok(parser)) => {
            assert_eq!(table, parser, "{bytes:x?}");
            true
        }
        _ => false,
    }
}

#[test]
fn random_code_is_read_alike() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut both = 0;
    for _ in 0..200_000 {
        let mut code = Vec::new();
        let mut depth = 0;
        for _ in 0..random(12) {
            match random(9) {
                8 => code.extend([BR + random(2) as u8, random(4) as u8]),
                0 => {
                    code.extend([
                        2 + random(3) as u8,
                        [0x40, 0x7f, 0x7b, 0x00, 0x3f, 0x70, 0x63][random(7) as usize],
                    ]);
                    depth += 1;
                }
                1 => code.extend([0x10, 0x80 | random(128) as u8, random(128) as u8]),
                2 => code.extend([
                    0x41,
                    0x80 | random(128) as u8,
                    0xff,
                    0xff,
                    0xff,
                    random(256) as u8,
                ]),
                3 => code.extend([
                    0x28 + random(23) as u8,
                    random(256) as u8,
                    random(256) as u8,
                    random(128) as u8,
                ]),
                4 => code.extend([0xfd, random(256) as u8, random(4) as u8]),
                5 => code.extend([0xfc, random(20) as u8]),
                6 => code.push(random(256) as u8),
                _ => code.push(0x45 + random(128) as u8),
            }
        }
        code.extend(vec![0x0b; depth + 1]);
        both += u32::from(agree(&body(&code)));
    }
    assert!(both > 20_000, "only {both} readable");
}
