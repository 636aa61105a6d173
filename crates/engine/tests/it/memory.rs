//! Linear memory: limits refuse, figures are true, and what is released is given back.

use wasm_molt_engine::{Error, ErrorCode, ImportValue, Value};
use wasm_molt_testkit::guests;
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::quiet::alone;
use wasm_molt_testkit::rig::{Setup, code, trap, values};
use wasm_molt_testkit::{meter, rig::Rig};

const PAGE: usize = 1 << 16;
const MIB: usize = 1 << 20;

#[test]
fn growth_beyond_the_limit_fails_in_the_guest() {
    for interruptible in [true, false] {
        let setup = Setup::new(&guests::grower("1")).options(|o| {
            o.limits.memory_bytes = Some(10 * PAGE as u64 + 100);
            o.engine.interruptible = interruptible;
        });
        let rig = setup.start();
        assert_eq!(rig.number("grow", &[9]), 1);
        assert_eq!(rig.number("grow", &[1]), -1);
        assert_eq!(rig.number("size", &[]), 10);
        assert_eq!(rig.number("grow", &[65536]), -1);
        assert_eq!(rig.stats().memory_bytes, 10 * PAGE);
        let fresh = rig.reload("the limit holds for the next one too");
        assert_eq!(
            (fresh.memory_bytes_before, fresh.memory_bytes_after),
            (10 * PAGE, PAGE)
        );
        assert_eq!(rig.number("grow", &[10]), -1);
    }
}

#[test]
fn the_limit_holds_for_each_memory_wherever_it_comes_from() {
    let wat = r#"(module
        (import "env" "m" (memory $imported 1 100))
        (memory $own 1 100)
        (func (export "imported") (param i32) (result i32) (memory.grow $imported (local.get 0)))
        (func (export "own") (param i32) (result i32) (memory.grow $own (local.get 0))))"#;
    let script = Script::new().import(
        "env",
        "m",
        ImportValue::Memory {
            initial: 1,
            maximum: Some(50),
        },
    );
    let setup = Setup::new(wat).script(script);
    let rig = setup
        .options(|o| o.limits.memory_bytes = Some(5 * PAGE as u64))
        .start();
    for name in ["imported", "own"] {
        assert_eq!(rig.number(name, &[5]), -1, "{name}");
        assert_eq!(rig.number(name, &[4]), 1, "{name}");
    }
    assert_eq!(rig.stats().memory_bytes, 10 * PAGE);
}

#[test]
fn a_module_that_starts_beyond_its_limits_is_refused_with_the_number_to_raise() {
    let cases = [
        ("(module (memory 20))", "1310720"),
        ("(module (table 2000 funcref))", "2000"),
    ];
    for (wat, number) in cases {
        let setup = Setup::new(wat).options(|o| {
            o.limits.memory_bytes = Some(10 * PAGE as u64);
            o.limits.table_elements = Some(1000);
        });
        let error = setup.start_error();
        assert_eq!(error.code(), Some(ErrorCode::InvalidArgument), "{error}");
        assert!(error.to_string().contains(number), "'{number}' in: {error}");
    }
}

#[test]
fn an_imported_memory_beyond_the_limit_is_refused_too() {
    let wat = r#"(module (import "env" "m" (memory 20)))"#;
    let script = Script::new().import(
        "env",
        "m",
        ImportValue::Memory {
            initial: 20,
            maximum: None,
        },
    );
    let setup = Setup::new(wat).script(script);
    let error = setup
        .options(|o| o.limits.memory_bytes = Some(10 * PAGE as u64))
        .start_error();
    assert_eq!(error.code(), Some(ErrorCode::InvalidArgument), "{error}");
}

#[test]
fn a_table_grows_to_its_limit() {
    let wat = r#"(module (table $t 1 externref)
        (func (export "grow") (param i32) (result i32)
            (table.grow $t (ref.null extern) (local.get 0))))"#;
    let rig = Setup::new(wat)
        .options(|o| o.limits.table_elements = Some(100))
        .start();
    assert_eq!(rig.number("grow", &[99]), 1);
    assert_eq!(rig.number("grow", &[1]), -1);
}

#[test]
fn memories_of_every_kind_grow_and_trap_at_their_end() {
    let kinds = ["1 10", "i64 1 10", "1 10 shared", "i64 1 10 shared"];
    for kind in kinds {
        let int = if kind.starts_with("i64") {
            "i64"
        } else {
            "i32"
        };
        let wat = format!(
            r#"(module
            (memory (export "memory") {kind})
            (func (export "grow") (param i32) (result i32) (local $n {int})
                (local.set $n ({extend}))
                ({wrap} (memory.grow (local.get $n))))
            (func (export "peek") (param i32) (result i32) (i32.load8_u ({extend}))))"#,
            extend = if int == "i64" {
                "i64.extend_i32_u (local.get 0)"
            } else {
                "local.get 0"
            },
            wrap = if int == "i64" {
                "i32.wrap_i64"
            } else {
                "i32.add (i32.const 0)"
            },
        );
        for reservation in [0, 4 << 30] {
            for signals in [true, false] {
                let setup = Setup::new(&wat).options(|o| {
                    o.engine.memory_reservation_bytes = reservation;
                    o.engine.signals_based_traps = signals;
                    o.engine.threads = true;
                });
                let what = format!("{kind}, {reservation} reserved, signals {signals}");
                let rig = setup.start();
                let grown = rig.number("grow", &[4]);
                // A shared memory cannot move; without a reservation it may stay as it is.
                if grown == -1 {
                    assert!(kind.contains("shared") && reservation == 0, "{what}");
                    continue;
                }
                assert_eq!(grown, 1, "{what}");
                assert_eq!(rig.number("peek", &[5 * PAGE as i32 - 1]), 0, "{what}");
                assert_eq!(rig.stats().memory_bytes, 5 * PAGE, "{what}");
                let beyond = rig.call("peek", &[Value::I32(5 * PAGE as i32)]).get();
                assert_eq!(trap(beyond), "out-of-bounds-memory", "{what}");
                assert_eq!(rig.number("grow", &[10]), -1, "{what}");
            }
        }
    }
}

#[test]
fn the_host_reads_and_writes_within_bounds_only() {
    let rig = Setup::new(&guests::grower("1 4")).start();
    let memory = rig.replica(0).memory().unwrap().clone();
    let end = PAGE as u64;
    memory.write(end - 3, &[1, 2, 3]).unwrap();
    assert_eq!(rig.number("peek", &[PAGE as i32 - 1]), 3);
    let mut three = [0; 3];
    memory.read(end - 3, &mut three).unwrap();
    assert_eq!(three, [1, 2, 3]);
    memory.read(end, &mut []).unwrap();
    for ptr in [end - 2, end, u64::MAX, u64::MAX - 1] {
        let error = memory.read(ptr, &mut three).unwrap_err();
        assert_eq!(
            (error.ptr, error.byte_length, error.memory_bytes),
            (ptr, 3, PAGE)
        );
        assert!(memory.write(ptr, &[0; 3]).is_err());
    }
    rig.number("grow", &[1]);
    memory.write(end, &[9]).unwrap();
    assert_eq!(rig.number("peek", &[PAGE as i32]), 9);

    let old = rig.replica(0);
    rig.reload("the memory goes");
    assert!(memory.is_released() && old.is_released());
    assert_eq!((memory.byte_len(), old.memory_bytes()), (0, 0));
    assert_eq!(memory.read(0, &mut three).unwrap_err().memory_bytes, 0);
    assert!(memory.write(0, &[0]).is_err());
}

#[test]
fn the_peak_is_what_there_really_was() {
    let rig = Setup::new(&guests::grower("1")).start();
    rig.number("grow", &[9]);
    rig.reload("without having looked");
    let stats = rig.stats();
    assert_eq!(
        (stats.memory_bytes, stats.memory_bytes_peak),
        (PAGE, 11 * PAGE),
        "both generations, when the new one took over"
    );
}

#[test]
fn the_peak_knows_of_an_instance_that_trapped() {
    let rig = Setup::new(&guests::grower("1")).start();
    rig.number("grow", &[19]);
    assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
    rig.host.wait_for("the repair", 1, |event| {
        matches!(event, wasm_molt_engine::Event::Reload(_))
    });
    let stats = rig.stats();
    assert_eq!(
        (stats.memory_bytes, stats.memory_bytes_peak),
        (PAGE, 20 * PAGE)
    );
}

#[test]
fn which_memory_is_shown() {
    let cases: [(&str, Option<usize>); 4] = [
        ("(module (memory 1))", Some(1)),
        (
            "(module (memory 1) (memory (export \"b\") 2) (memory (export \"memory\") 3))",
            Some(3),
        ),
        ("(module (memory 1) (memory (export \"b\") 2))", Some(2)),
        ("(module)", None),
    ];
    for (wat, pages) in cases {
        let rig = Setup::new(wat).start();
        let shown = rig
            .replica(0)
            .memory()
            .map(|memory| memory.byte_len() / PAGE);
        assert_eq!(shown, pages, "{wat}");
    }
}

/// Touches so many MiB in the instance of slot 0.
fn fill(rig: &Rig, mib: usize) {
    let pages = (mib * MIB / PAGE) as i32 - rig.number("size", &[]);
    assert_ne!(rig.number("grow", &[pages]), -1);
    values(rig.call("touch", &[Value::I32((mib * MIB) as i32)]).get());
}

/// Fills, ends the instance in some way, and looks at what the process holds.
fn rss_comes_back(end: impl FnOnce(Rig) -> Option<Rig>) {
    let _alone = alone();
    let rig = Setup::new(&guests::grower("1")).start();
    fill(&rig, 1);
    let Some(before) = meter::read() else { return };
    fill(&rig, 256);
    let full = meter::read().unwrap().rss_bytes;
    assert!(
        full > before.rss_bytes + 240 * MIB,
        "{before:?}, then {full}"
    );
    let rig = end(rig);
    let after = meter::read().unwrap().rss_bytes;
    assert!(
        after < before.rss_bytes + 32 * MIB,
        "{before:?} before, {full} full, {after} after"
    );
    drop(rig);
}

#[test]
fn a_reload_gives_the_memory_back() {
    rss_comes_back(|rig| {
        rig.reload("full");
        Some(rig)
    });
}

#[test]
fn a_repair_gives_the_memory_back() {
    rss_comes_back(|rig| {
        assert_eq!(trap(rig.call("trap", &[]).get()), "unreachable");
        // The report comes when the old instance is gone.
        rig.host.wait_for("the repair", 1, |e| {
            matches!(e, wasm_molt_engine::Event::Reload(_))
        });
        Some(rig)
    });
}

#[test]
fn close_gives_the_memory_back() {
    rss_comes_back(|rig| {
        rig.close(None).get().unwrap();
        Some(rig)
    });
}

#[test]
fn a_pin_keeps_the_addresses_but_not_the_memory() {
    let mut pin = None;
    rss_comes_back(|rig| {
        pin = rig.replica(0).memory().unwrap().pin();
        assert!(pin.is_some());
        rig.reload("with a view on the old memory");
        Some(rig)
    });
    drop(pin);
}

#[test]
fn a_reload_that_fails_keeps_nothing_of_the_new_instance() {
    let _alone = alone();
    let script =
        Script::new().restore(|_, _, _| Err(Error::Thrown(wasm_molt_engine::HostRef::new("no"))));
    let script = script.save(|_, _| Ok(Some(wasm_molt_engine::HostRef::new(()))));
    let script = script.initialize(|lease| {
        let memory = lease.replica().memory().unwrap();
        let ones = vec![1; memory.byte_len()];
        memory.write(0, &ones).unwrap();
        Ok(())
    });
    let rig = Setup::new(&guests::grower("512")).script(script).start();
    let fail = |rig: &Rig| {
        let reload = rig.ask_reload(wasm_molt_testkit::rig::because("fails"));
        assert_eq!(code(reload.get()), ErrorCode::ReloadFailed);
    };
    fail(&rig);
    let Some(before) = meter::read() else { return };
    for _ in 0..20 {
        fail(&rig);
    }
    let after = meter::read().unwrap();
    assert!(
        after.rss_bytes < before.rss_bytes + 16 * MIB,
        "{before:?}, then {after:?}"
    );
    assert!(
        after.mappings <= before.mappings + 8,
        "{before:?}, then {after:?}"
    );
}
