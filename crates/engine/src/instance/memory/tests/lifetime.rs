//! When pages and address space go.
#![cfg(target_os = "linux")]

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::super::{GRANULE, sys_portable};
use super::*;

/// Resident bytes of the mappings that begin in a range, and how many mappings there are.
pub(super) fn resident(base: *mut u8, len: usize) -> (usize, usize) {
    let (mut bytes, mut mappings, mut inside) = (0, 0, false);
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, _)) = first.split_once('-') {
            let start = usize::from_str_radix(start, 16).unwrap();
            inside = (base as usize..base as usize + len).contains(&start);
            mappings += usize::from(inside);
        } else if first == "Rss:" && inside {
            bytes += words.next().unwrap().parse::<usize>().unwrap() * 1024;
        }
    }
    (bytes, mappings)
}

fn is_mapped(base: *mut u8) -> bool {
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .any(|line| {
            let (start, rest) = line.split_once('-').unwrap();
            let (end, _) = rest.split_once(' ').unwrap();
            let hex = |s| usize::from_str_radix(s, 16).unwrap();
            (hex(start)..hex(end)).contains(&(base as usize))
        })
}

fn filled(engine: &Engine, pages: usize) -> Guest {
    let guest = Guest::new(engine, &accessors(&pages.to_string()));
    guest.memory().write(0, &vec![0xaa; pages << 16]).unwrap();
    guest
}

#[test]
fn a_dropped_memory_is_unmapped() {
    let guest = filled(&engine(Platform::NATIVE, &MemoryOptions::default()), 1024);
    let record = Arc::clone(&guest.created.guests[0]);
    let base = record.base();
    assert_eq!(resident(base, 64 << 20).0, 64 << 20);
    drop(guest);
    assert!(record.is_released());
    assert_eq!(record.byte_len(), 0);
    assert_eq!(record.peak_bytes(), 64 << 20);
    assert!(record.pin().is_none() && record.view().is_none());
    assert_eq!(record.read(0, &mut [0]).unwrap_err().memory_bytes, 0);
    assert_eq!(record.write(0, &[0]).unwrap_err().memory_bytes, 0);
    assert!(record.read(0, &mut []).is_err());
    // Another test may get the same address at any time, but not with the pages.
    assert!(resident(base, 64 << 20).0 < 60 << 20);
}

#[test]
fn a_pin_keeps_the_range_but_not_the_pages() {
    for platform in [Platform::NATIVE, sys_portable::PLATFORM] {
        let mut guest = filled(&engine(platform, &MemoryOptions::default()), 64);
        guest.call::<_, i32>("grow", 3).unwrap();
        let view = guest.memory().view().unwrap();
        let second = guest.memory().pin().unwrap();
        drop(guest);
        assert_eq!(view.byte_length, 67 << 16);
        if platform.guards {
            assert_eq!(
                resident(view.base, view.byte_length).0,
                0,
                "the pages are given back at once"
            );
        }
        for at in (0..view.byte_length)
            .step_by(4096)
            .chain([view.byte_length - 1])
        {
            // SAFETY: the pin keeps the range mapped.
            unsafe {
                assert_eq!(view.base.add(at).read_volatile(), 0);
                view.base.add(at).write_volatile(1);
            }
        }
        drop(second);
        let base = view.base;
        assert!(is_mapped(base));
        drop(view);
        if platform.guards {
            // Somebody else may get the same address at any time, but not with the pages.
            assert!(!is_mapped(base) || resident(base, 67 << 16).0 < 60 << 16);
        }
    }
}

#[test]
fn what_a_region_has_given_back_it_maps_nothing_over() {
    let region = (Platform::NATIVE.reserve)(4 * GRANULE).unwrap();
    region.commit(0, 2 * GRANULE).unwrap();
    region.trim(GRANULE);
    // It may be somebody else's by now.
    assert!(region.commit(0, 2 * GRANULE).is_err());
    assert!(region.decommit(GRANULE, GRANULE).is_err());
    assert!(region.renew(2 * GRANULE).is_err());
    assert!(region.discard(GRANULE, GRANULE).is_err());
    assert!(region.decommit(0, GRANULE).is_ok());
}

#[test]
fn ten_thousand_memories_leave_nothing_behind() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    let compiled = module(&engine, &accessors("4"));
    let statm = || {
        let text = fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let mappings = || {
        fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count()
    };
    let mut before = (0, 0);
    let mut pins = std::collections::VecDeque::new();
    let filling = vec![1; 4 << 16];
    for i in 0..10_000 {
        let mut store = Store::new(&engine, ());
        let plan = MemoryPlan {
            guests: 1,
            ..MemoryPlan::default()
        };
        let (instance, created) = with_plan(plan, || Instance::new(&mut store, &compiled, &[]));
        instance.unwrap();
        created.guests[0].write(0, &filling).unwrap();
        if i % 3 == 0 {
            pins.push_back(created.guests[0].pin());
        }
        if pins.len() > 20 {
            pins.pop_front();
        }
        if i == 100 {
            before = (statm(), mappings());
        }
    }
    // Other tests run in the same process; a leak would be 2.5 GiB and 10 000 mappings.
    let after = (statm(), mappings());
    assert!(
        after.0 < before.0 + (512 << 20),
        "resident {before:?} -> {after:?}"
    );
    assert!(
        after.1 < before.1 + 2000,
        "mappings {before:?} -> {after:?}"
    );
}

#[test]
fn a_host_that_reads_while_the_memory_goes_sees_bytes_or_an_error() {
    let engine = engine(Platform::NATIVE, &SMALL);
    for _ in 0..100 {
        let mut guest = Guest::new(&engine, &accessors("1"));
        let record = Arc::clone(&guest.created.guests[0]);
        let go = Arc::new(AtomicBool::new(false));
        let reader = {
            let (record, go) = (Arc::clone(&record), Arc::clone(&go));
            thread::spawn(move || {
                let mut bytes = [0; 1000];
                let mut reads = 0_u64;
                loop {
                    let at = (record.byte_len() as u64).saturating_sub(1000);
                    if record.read(at, &mut bytes).is_ok() && record.write(at, &bytes).is_ok() {
                        reads += 1;
                    }
                    // A view is good for as long as it is held, whatever happens to the memory.
                    if let Some(view) = record.view() {
                        // SAFETY: the view pins the range.
                        unsafe { view.base.add(view.byte_length - 1).read_volatile() };
                    }
                    go.store(true, Ordering::Release);
                    if record.is_released() {
                        return reads;
                    }
                }
            })
        };
        while !go.load(Ordering::Acquire) {
            thread::yield_now();
        }
        // Growth moves it out of its reservation of 1 MiB several times.
        for pages in [1, 20, 30, 40, 50] {
            assert!(guest.call::<_, i32>("grow", pages).unwrap() > 0);
        }
        drop(guest);
        assert!(reader.join().unwrap() > 0);
    }
}
