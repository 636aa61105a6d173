//! Sizes, limits, contents, moving, and who gets which memory.

use std::sync::Arc;

use wasmtime::{Extern, Instance, MemoryType, Module, Ref, RootScope, Store, Val};

use super::super::{configure, new_memory, sys_portable};
use super::*;

const PAGE: usize = 1 << 16;

fn grows_and_is_zeroed(engine: &Engine) {
    let mut guest = Guest::new(engine, &accessors("1 4"));
    assert_eq!(guest.memory().byte_len(), PAGE);
    guest.call::<_, ()>("poke", (0, 7)).unwrap();
    guest.call::<_, ()>("poke", (65535, 8)).unwrap();
    assert!(is_out_of_bounds(
        &guest.call::<_, i32>("peek", 65536).unwrap_err()
    ));
    assert!(is_out_of_bounds(
        &guest.call::<_, i32>("peek", -1).unwrap_err()
    ));

    assert_eq!(guest.call::<_, i32>("grow", 2).unwrap(), 1);
    assert_eq!(guest.memory().byte_len(), 3 * PAGE);
    assert_eq!(guest.call::<_, i32>("peek", 0).unwrap(), 7);
    assert_eq!(guest.call::<_, i32>("peek", 65535).unwrap(), 8);
    let mut new = vec![1; 2 * PAGE];
    guest.memory().read(PAGE as u64, &mut new).unwrap();
    assert!(new.iter().all(|&b| b == 0));
    guest.call::<_, ()>("poke", (3 * 65536 - 1, 9)).unwrap();
    assert!(is_out_of_bounds(
        &guest.call::<_, i32>("peek", 3 * 65536).unwrap_err()
    ));

    assert_eq!(
        guest.call::<_, i32>("grow", 2).unwrap(),
        -1,
        "the declared maximum is 4 pages"
    );
    assert_eq!(guest.call::<_, i32>("grow", 1).unwrap(), 3);
    assert_eq!(guest.call::<_, i32>("grow", 0).unwrap(), 4);
    assert_eq!(guest.call::<_, i32>("peek", 3 * 65536 - 1).unwrap(), 9);
    assert_eq!(guest.memory().peak_bytes(), 4 * PAGE);
}

#[test]
fn memory_grows_and_is_zeroed() {
    for options in [
        MemoryOptions::default(),
        MemoryOptions {
            signals_based_traps: false,
            ..MemoryOptions::default()
        },
        SMALL,
        MemoryOptions {
            reservation_bytes: 0,
            signals_based_traps: true,
        },
        MemoryOptions {
            reservation_bytes: 0,
            signals_based_traps: false,
        },
        MemoryOptions {
            reservation_bytes: 5,
            signals_based_traps: true,
        },
    ] {
        grows_and_is_zeroed(&engine(Platform::NATIVE, &options));
        grows_and_is_zeroed(&engine(sys_portable::PLATFORM, &options));
    }
}

#[test]
fn a_memory_that_outgrows_its_reservation_moves_with_its_contents() {
    for platform in [Platform::NATIVE, sys_portable::PLATFORM] {
        let mut guest = Guest::new(&engine(platform, &SMALL), &accessors("1"));
        let before = guest.memory().view().unwrap();
        guest.call::<_, ()>("poke", (123, 45)).unwrap();
        let mut moves = 0;
        let mut base = guest.memory().base();
        for pages in [10, 100, 500, 1, 1000] {
            assert!(guest.call::<_, i32>("grow", pages).unwrap() > 0);
            moves += u32::from(guest.memory().base() != base);
            base = guest.memory().base();
            let len = guest.memory().byte_len();
            assert_eq!(guest.call::<_, i32>("peek", 123).unwrap(), 45);
            assert_eq!(guest.call::<_, i32>("peek", (len - 1) as i32).unwrap(), 0);
            guest.call::<_, ()>("poke", ((len - 1) as i32, 1)).unwrap();
            assert!(is_out_of_bounds(
                &guest.call::<_, i32>("peek", len as i32).unwrap_err()
            ));
            assert_eq!(guest.memory().view().unwrap().base, base);
        }
        assert!(moves >= 2);
        // SAFETY: the view holds a pin on the old place.
        let left_behind = unsafe { before.base.add(123).read_volatile() };
        assert_eq!(left_behind, 0);
    }
}

#[test]
fn memory64_grows_beyond_its_reservation() {
    for options in [
        SMALL,
        MemoryOptions {
            reservation_bytes: 0,
            signals_based_traps: false,
        },
    ] {
        for platform in [Platform::NATIVE, sys_portable::PLATFORM] {
            let mut guest = Guest::new(&engine(platform, &options), &accessors("i64 1"));
            guest.call::<_, ()>("poke", (9_i64, 3)).unwrap();
            assert_eq!(guest.call::<_, i64>("grow", 63_i64).unwrap(), 1);
            assert_eq!(guest.call::<_, i32>("peek", 9_i64).unwrap(), 3);
            assert_eq!(guest.call::<_, i32>("peek", 64 * 65536 - 1_i64).unwrap(), 0);
            assert!(is_out_of_bounds(
                &guest.call::<_, i32>("peek", 64 * 65536_i64).unwrap_err()
            ));
            assert!(is_out_of_bounds(
                &guest.call::<_, i32>("peek", 1_i64 << 40).unwrap_err()
            ));
        }
    }
}

#[test]
#[cfg(all(target_pointer_width = "64", unix))]
fn memory64_passes_4_gib_without_moving() {
    let mut guest = Guest::new(
        &engine(Platform::NATIVE, &MemoryOptions::default()),
        &accessors("i64 1"),
    );
    let base = guest.memory().base();
    assert_eq!(guest.call::<_, i64>("grow", 5_i64 << 14).unwrap(), 1);
    assert_eq!(guest.memory().base(), base);
    guest.call::<_, ()>("poke", ((5_i64 << 30) + 7, 1)).unwrap();
    assert_eq!(guest.call::<_, i32>("peek", (5_i64 << 30) + 7).unwrap(), 1);
    assert!(is_out_of_bounds(
        &guest
            .call::<_, i32>("peek", (5_i64 << 30) + 65536)
            .unwrap_err()
    ));
}

#[test]
fn a_growing_shared_memory_never_moves() {
    for (platform, options, reaches) in [
        (Platform::NATIVE, MemoryOptions::default(), 64),
        // Compiled code takes the reservation for the bound.
        (Platform::NATIVE, SMALL, if cfg!(unix) { 16 } else { 64 }),
        (sys_portable::PLATFORM, MemoryOptions::default(), 64),
    ] {
        let mut guest = Guest::new(&engine(platform, &options), &accessors("1 64 shared"));
        let base = guest.memory().base();
        let mut pages = 1;
        while guest.call::<_, i32>("grow", 1).unwrap() >= 0 {
            pages += 1;
        }
        assert_eq!(pages, reaches);
        assert_eq!(guest.memory().base(), base);
        guest
            .call::<_, ()>("poke", (reaches * 65536 - 1, 1))
            .unwrap();
        assert!(is_out_of_bounds(
            &guest.call::<_, i32>("peek", reaches * 65536).unwrap_err()
        ));
    }
}

#[test]
fn a_limit_refuses_growth_of_private_and_shared_memories() {
    for ty in ["1 64", "1 64 shared", "i64 1 64"] {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        let mut guest = Guest::new(&engine, &accessors(ty));
        guest.memory().set_limit_bytes(3 * PAGE);
        let memory = guest
            .instance
            .get_export(&mut guest.store, "memory")
            .unwrap();
        let mut grow = |pages| match &memory {
            Extern::Memory(m) => m.grow(&mut guest.store, pages).is_ok(),
            Extern::SharedMemory(m) => m.grow(pages).is_ok(),
            _ => unreachable!(),
        };
        assert!(!grow(3));
        assert!(grow(2));
        assert!(!grow(1));
        assert_eq!(guest.memory().byte_len(), 3 * PAGE);
    }
}

#[test]
fn pages_of_one_byte_work() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let mut guest = Guest::new(&engine, &accessors("10 100000 (pagesize 1)"));
    assert_eq!(guest.memory().byte_len(), 10);
    assert!(is_out_of_bounds(
        &guest.call::<_, i32>("peek", 10).unwrap_err()
    ));
    assert_eq!(guest.call::<_, i32>("grow", 70000).unwrap(), 10);
    guest.call::<_, ()>("poke", (70009, 1)).unwrap();
    assert!(is_out_of_bounds(
        &guest.call::<_, i32>("peek", 70010).unwrap_err()
    ));
    assert!(guest.memory().write(70009, &[2, 3]).is_err());
}

#[test]
fn the_host_copies_within_bounds_only() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let mut guest = Guest::new(
        &engine,
        r#"(module (memory 1) (data (i32.const 5) "hello")
            (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0))))"#,
    );
    let mut five = [0; 5];
    guest.memory().read(5, &mut five).unwrap();
    assert_eq!(&five, b"hello");
    guest.memory().write(65534, b"ab").unwrap();
    assert_eq!(
        guest.call::<_, i32>("peek", 65535).unwrap(),
        i32::from(b'b')
    );
    guest.memory().read(65536, &mut []).unwrap();
    for ptr in [65532, 65536, u64::from(u32::MAX), u64::MAX] {
        let error = guest.memory().read(ptr, &mut five).unwrap_err();
        assert_eq!(
            (error.ptr, error.byte_length, error.memory_bytes),
            (ptr, 5, 65536)
        );
        assert_eq!(guest.memory().write(ptr, &five), Err(error));
    }
    let error = guest.memory().read(65532, &mut five).unwrap_err();
    assert_eq!(
        error.to_string(),
        "5 bytes at 65532 are outside the linear memory of 65536 bytes"
    );
}

#[test]
fn a_plan_gets_the_memories_in_order_and_the_poll_last() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let wasm =
        wat::parse_str("(module (memory 1) (memory 2 2 shared) (memory i64 3) (memory 1 1))")
            .unwrap();
    let guest = Guest::with_bytes(&engine, &wasm, crate::instance::memory::HAS_POLL_PAGE, &[]);
    let pages: Vec<_> = guest
        .created
        .guests
        .iter()
        .map(|m| m.byte_len() / PAGE)
        .collect();
    assert_eq!(pages[..3], [1, 2, 3]);
}

#[test]
fn without_a_plan_memories_are_made_all_the_same() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let compiled = module(&engine, "(module (memory 1) (data (i32.const 0) \"x\"))");
    Instance::new(&mut Store::new(&engine, ()), &compiled, &[]).unwrap();
    // A plan that is used up is no obstacle either, nor one that nobody uses.
    let (made, created) = with_plan(
        MemoryPlan {
            guests: 0,
            ..MemoryPlan::default()
        },
        || Instance::new(&mut Store::new(&engine, ()), &compiled, &[]),
    );
    made.unwrap();
    assert!(created.guests.is_empty());
    let ((), created) = with_plan(
        MemoryPlan {
            guests: 5,
            poll: true,
            ..MemoryPlan::default()
        },
        || (),
    );
    assert!(created.guests.is_empty() && created.poll.is_none());
}

#[test]
fn plans_nest() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let inner = module(&engine, "(module (memory 7))");
    let outer = module(
        &engine,
        r#"(module (import "" "" (func $f)) (memory 3) (memory 4) (start $f))"#,
    );
    let mut store = Store::new(&engine, Vec::new());
    let start = wasmtime::Func::wrap(
        &mut store,
        move |mut caller: wasmtime::Caller<'_, Vec<Created>>| {
            // Not planned, and must not take what belongs to the outer plan.
            let compiled = module(caller.engine(), "(module (memory 9))");
            Instance::new(&mut caller, &compiled, &[]).unwrap();
            let (made, created) = with_plan(
                MemoryPlan {
                    guests: 1,
                    ..MemoryPlan::default()
                },
                || Instance::new(&mut caller, &inner, &[]),
            );
            made.unwrap();
            caller.data_mut().push(created);
        },
    );
    let (made, created) = with_plan(
        MemoryPlan {
            guests: 2,
            ..MemoryPlan::default()
        },
        || Instance::new(&mut store, &outer, &[start.into()]),
    );
    made.unwrap();
    let pages = |c: &Created| {
        c.guests
            .iter()
            .map(|m| m.byte_len() / PAGE)
            .collect::<Vec<_>>()
    };
    assert_eq!(pages(&created), [3, 4]);
    assert_eq!(pages(&store.data()[0]), [7]);
}

#[test]
fn a_plan_is_gone_after_a_panic() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let result = std::panic::catch_unwind(|| {
        with_plan(
            MemoryPlan {
                guests: 3,
                poll: true,
                ..MemoryPlan::default()
            },
            || panic!("on purpose"),
        )
    });
    assert!(result.is_err());
    let guest = Guest::new(&engine, "(module (memory 2))");
    assert_eq!(guest.memory().byte_len(), 2 * PAGE);
}

#[test]
fn imported_memories_are_ours_too() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    for ty in [
        MemoryType::new(1, None),
        MemoryType::new(2, Some(3)),
        MemoryType::shared(1, 5),
        MemoryType::new64(1, Some(9)),
    ] {
        let mut store = Store::new(&engine, ());
        let (memory, created) = with_plan(
            MemoryPlan {
                guests: 1,
                ..MemoryPlan::default()
            },
            || new_memory(&mut store, &ty),
        );
        let memory = memory.unwrap();
        let base = match &memory {
            Extern::Memory(m) => {
                assert_eq!(format!("{:?}", m.ty(&store)), format!("{ty:?}"));
                m.data_ptr(&store)
            }
            Extern::SharedMemory(m) => {
                assert!(ty.is_shared());
                m.data().as_ptr().cast_mut().cast()
            }
            _ => unreachable!(),
        };
        assert_eq!(created.guests[0].base(), base);
        assert_eq!(
            created.guests[0].byte_len() as u64,
            ty.minimum() * PAGE as u64
        );
        drop(store);
        // A shared memory lives for as long as somebody holds it.
        drop(memory);
        assert!(created.guests[0].is_released());
    }
}

#[test]
fn the_garbage_collectors_heap_lives_beside_the_guests_memories() {
    for (platform, options) in [
        (Platform::NATIVE, MemoryOptions::default()),
        (Platform::NATIVE, SMALL),
        (
            Platform::NATIVE,
            MemoryOptions {
                reservation_bytes: 0,
                signals_based_traps: false,
            },
        ),
        (sys_portable::PLATFORM, MemoryOptions::default()),
    ] {
        // It needs the heap before its memories are made.
        let engine = engine(platform, &options);
        let wasm = r#"(module
            (memory 3)
            (table $t 1 1000000 externref)
            (global $g (mut externref) (ref.null extern))
            (func (export "keep") (param externref) (result externref)
                (drop (table.grow $t (local.get 0) (i32.const 1)))
                (global.set $g (local.get 0))
                (table.get $t (i32.sub (table.size $t) (i32.const 1)))))"#;
        let mut guest = Guest::new(&engine, wasm);
        assert_eq!(guest.memory().byte_len(), 3 * PAGE);
        let keep = guest.instance.get_func(&mut guest.store, "keep").unwrap();
        for i in 0..20_000_u32 {
            let mut scope = RootScope::new(&mut guest.store);
            let value = wasmtime::ExternRef::new(&mut scope, i).unwrap();
            let mut out = [Val::I32(0)];
            keep.call(&mut scope, &[Val::ExternRef(Some(value))], &mut out)
                .unwrap();
            let Val::ExternRef(Some(back)) = out[0] else {
                panic!("no reference")
            };
            assert_eq!(back.data(&scope).unwrap().unwrap().downcast_ref(), Some(&i));
        }
        assert_eq!(guest.memory().byte_len(), 3 * PAGE);
        assert!(matches!(Ref::Extern(None), Ref::Extern(None)));
    }
}

#[test]
fn address_space_that_is_refused_is_an_error() {
    let options = MemoryOptions {
        reservation_bytes: 1 << 55,
        signals_based_traps: true,
    };
    let engine = engine(Platform::NATIVE, &options);
    if !cfg!(unix) {
        return;
    }
    let mut store = Store::new(&engine, ());
    for wat in [
        "(module (memory 1))",
        "(module (memory 1 1 shared))",
        "(module (memory i64 1))",
    ] {
        let compiled = module(&engine, wat);
        for plan in [
            MemoryPlan {
                guests: 1,
                ..MemoryPlan::default()
            },
            MemoryPlan {
                guests: 0,
                poll: true,
                ..MemoryPlan::default()
            },
        ] {
            let (made, created) = with_plan(plan, || Instance::new(&mut store, &compiled, &[]));
            let error = format!("{:#}", made.unwrap_err());
            assert!(error.contains("reserve"), "{error}");
            assert!(created.guests.is_empty() && created.poll.is_none());
        }
    }
}

#[test]
fn the_memories_of_a_failed_instantiation_are_released() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let compiled = module(
        &engine,
        "(module (memory 1) (func $f unreachable) (start $f))",
    );
    let mut store = Store::new(&engine, ());
    let (made, created) = with_plan(
        MemoryPlan {
            guests: 1,
            ..MemoryPlan::default()
        },
        || Instance::new(&mut store, &compiled, &[]),
    );
    made.unwrap_err();
    drop(store);
    assert!(created.guests[0].is_released());
    assert_eq!(Arc::strong_count(&created.guests[0]), 1);
}

#[test]
fn the_defaults_compile_no_bounds_checks() {
    let mut config = Config::new();
    configure(&mut config, &MemoryOptions::default());
    let ours = Engine::new(&config).unwrap();
    let theirs = Engine::new(
        Config::new()
            .memory_init_cow(false)
            .guard_before_linear_memory(false),
    )
    .unwrap();
    let wasm = wat::parse_str(accessors("1")).unwrap();
    if cfg!(unix) {
        let (ours, theirs) = (
            Module::new(&ours, &wasm).unwrap(),
            Module::new(&theirs, &wasm).unwrap(),
        );
        assert_eq!(ours.text(), theirs.text());
    }
}
