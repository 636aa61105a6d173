//! Images: what comes back, what is shared, what is given back, and what a stale view sees.

use std::io;
use std::sync::Arc;

use wasmtime::{Extern, MemoryType};

use super::super::image::{Image, ImageKind};
use super::super::{memory_changes, new_memory, sys_portable};
use super::*;

const PAGE: usize = 1 << 16;

#[derive(Clone, Copy, Debug)]
struct Case {
    platform: Platform,
    kind: ImageKind,
    prepared: bool,
}

const COPY_ON_WRITE: Case = Case {
    platform: Platform::NATIVE,
    kind: ImageKind::CopyOnWrite,
    prepared: false,
};

const PREPARED: Case = Case {
    prepared: true,
    ..COPY_ON_WRITE
};

const CASES: [Case; 5] = [
    COPY_ON_WRITE,
    PREPARED,
    Case {
        kind: ImageKind::Copy,
        ..COPY_ON_WRITE
    },
    Case {
        kind: ImageKind::Copy,
        ..PREPARED
    },
    Case {
        platform: sys_portable::PLATFORM,
        ..PREPARED
    },
];

const LAYOUTS: [MemoryOptions; 4] = [
    MemoryOptions {
        reservation_bytes: 1 << 32,
        signals_based_traps: true,
    },
    MemoryOptions {
        reservation_bytes: 1 << 32,
        signals_based_traps: false,
    },
    SMALL,
    MemoryOptions {
        reservation_bytes: 0,
        signals_based_traps: false,
    },
];

impl Case {
    fn start(&self, engine: &Engine, wat: &str, image: Option<&Arc<Image>>) -> Guest {
        let plan = MemoryPlan {
            images: image.cloned().into_iter().collect(),
            kind: self.kind,
            prepared: self.prepared,
            ..MemoryPlan::default()
        };
        Guest::with_plan(engine, &wat::parse_str(wat).unwrap(), &[], plan)
    }

    fn is_mapped(&self) -> bool {
        cfg!(target_os = "linux") && self.platform.guards && self.kind == ImageKind::CopyOnWrite
    }
}

impl Guest {
    /// What the caller of a reset has to do.
    fn refresh(&mut self) {
        match self.instance.get_export(&mut self.store, "memory") {
            Some(Extern::Memory(memory)) => {
                memory.grow(&mut self.store, 0).unwrap();
            }
            Some(Extern::SharedMemory(memory)) => {
                memory.grow(0).unwrap();
            }
            _ => panic!("no memory"),
        }
    }

    fn reset(&mut self, image: &Arc<Image>) -> usize {
        let dirty = self.memory().reset(image).unwrap();
        self.refresh();
        dirty
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory().byte_len()];
        self.memory().read(0, &mut bytes).unwrap();
        bytes
    }

    fn grow_to(&mut self, pages: i32) {
        let now: i32 = self.call("size", ()).unwrap();
        assert_eq!(self.call::<_, i32>("grow", pages - now).unwrap(), now);
    }

    /// Whether the guest itself sees that size, and nothing beyond.
    fn ends_at(&mut self, pages: i32) {
        assert_eq!(self.call::<_, i32>("size", ()).unwrap(), pages);
        assert_eq!(self.memory().byte_len(), pages as usize * PAGE);
        assert!(self.call::<_, i32>("peek", pages * 65536 - 1).is_ok());
        for beyond in [pages * 65536, pages * 65536 + 5000, pages * 65536 + 70000] {
            let error = self.call::<_, i32>("peek", beyond).unwrap_err();
            assert!(is_out_of_bounds(&error));
        }
    }
}

#[test]
fn a_reset_brings_contents_and_size_back() {
    for case in CASES {
        for options in LAYOUTS {
            let engine = engine(case.platform, &options);
            let wat = accessors("3 200");
            let mut guest = case.start(&engine, &wat, None);
            guest.call::<_, ()>("poke", (70_000, 7)).unwrap();
            let small = guest.memory().capture().unwrap();
            guest.grow_to(100);
            guest.call::<_, ()>("poke", (99 * 65536, 9)).unwrap();
            guest.call::<_, ()>("poke", (70_000, 8)).unwrap();
            let large = guest.memory().capture().unwrap();
            assert_eq!(
                (small.byte_len(), large.byte_len()),
                (3 * PAGE, 100 * PAGE),
                "{case:?}"
            );
            for _ in 0..3 {
                let changes = memory_changes();
                guest.reset(&small);
                assert_ne!(changes, memory_changes());
                guest.ends_at(3);
                assert_eq!(guest.call::<_, i32>("peek", 70_000).unwrap(), 7);
                guest.grow_to(100);
                assert_eq!(guest.call::<_, i32>("peek", 99 * 65536).unwrap(), 0);
                assert_eq!(guest.call::<_, i32>("peek", 3 * 65536).unwrap(), 0);
                guest.call::<_, ()>("poke", (5 * 65536, 1)).unwrap();
                guest.reset(&large);
                guest.ends_at(100);
                assert_eq!(guest.call::<_, i32>("peek", 70_000).unwrap(), 8);
                assert_eq!(guest.call::<_, i32>("peek", 99 * 65536).unwrap(), 9);
                assert_eq!(guest.call::<_, i32>("peek", 5 * 65536).unwrap(), 0);
                guest.call::<_, ()>("poke", (5 * 65536, 1)).unwrap();
                guest.memory().reset_uncounted(&large).unwrap();
                guest.refresh();
                assert_eq!(guest.call::<_, i32>("peek", 5 * 65536).unwrap(), 0);
                guest.grow_to(200);
                assert_eq!(guest.call::<_, i32>("grow", 1).unwrap(), -1);
            }
        }
    }
}

/// What lies below what was written may be an image of a larger size.
#[test]
fn a_reset_in_place_leaves_zeros_beyond_the_image_and_moves_nothing() {
    for case in CASES {
        for options in LAYOUTS {
            let engine = engine(case.platform, &options);
            let mut guest = case.start(&engine, &accessors("3 200"), None);
            guest.call::<_, ()>("poke", (70_000, 7)).unwrap();
            let small = guest.memory().capture().unwrap();
            guest.grow_to(100);
            guest.memory().write(0, &vec![8; 100 * PAGE]).unwrap();
            let large = guest.memory().capture().unwrap();
            let view = guest.memory().view().unwrap();
            let all = |guest: &Guest| {
                let mut bytes = vec![0xee; 100 * PAGE];
                guest.memory().read(0, &mut bytes).unwrap();
                bytes
            };
            let mut expected = vec![0; 100 * PAGE];
            expected[70_000] = 7;
            for round in 0..3 {
                // Standing on the large one first, on this very one then.
                for _ in 0..2 {
                    guest.memory().write(0, &vec![9; 100 * PAGE]).unwrap();
                    guest.memory().reset_in_place(&small).unwrap();
                    guest.refresh();
                    guest.ends_at(100);
                    assert!(all(&guest) == expected, "{case:?}, {options:?}, {round}");
                }
                guest.call::<_, ()>("poke", (99 * 65536, 9)).unwrap();
                guest.memory().reset_in_place(&large).unwrap();
                guest.refresh();
                guest.ends_at(100);
                assert!(all(&guest) == vec![8; 100 * PAGE], "{case:?}, {options:?}");
            }
            assert_eq!(guest.memory().base(), view.base, "{case:?}, {options:?}");
            // One that has become smaller grows into the larger image again.
            drop(view);
            guest.reset(&small);
            guest.ends_at(3);
            guest.memory().reset_in_place(&large).unwrap();
            guest.refresh();
            guest.ends_at(100);
            assert!(all(&guest) == vec![8; 100 * PAGE], "{case:?}, {options:?}");
        }
    }
}

#[test]
fn memories_made_from_one_image_are_their_own() {
    for case in CASES {
        for options in LAYOUTS {
            let engine = engine(case.platform, &options);
            let wat = accessors("1 50");
            let mut first = case.start(&engine, &wat, None);
            first.grow_to(40);
            first.call::<_, ()>("poke", (39 * 65536 + 1, 4)).unwrap();
            let image = first.memory().capture().unwrap();
            drop(first);
            let mut guests: Vec<_> = (0..3)
                .map(|_| case.start(&engine, &wat, Some(&image)))
                .collect();
            for (i, guest) in guests.iter_mut().enumerate() {
                guest.ends_at(40);
                assert_eq!(guest.call::<_, i32>("peek", 39 * 65536 + 1).unwrap(), 4);
                guest.call::<_, ()>("poke", (100, i as i32 + 1)).unwrap();
                guest.grow_to(41 + i as i32);
            }
            for (i, guest) in guests.iter_mut().enumerate() {
                assert_eq!(guest.call::<_, i32>("peek", 100).unwrap(), i as i32 + 1);
                let own = guest.memory().capture().unwrap();
                assert_eq!(own.byte_len(), (41 + i) * PAGE);
                guest.reset(&image);
                guest.ends_at(40);
                assert_eq!(guest.call::<_, i32>("peek", 100).unwrap(), 0);
                guest.reset(&own);
                assert_eq!(guest.call::<_, i32>("peek", 100).unwrap(), i as i32 + 1);
            }
        }
    }
}

#[test]
fn a_capture_without_writes_is_the_same_image() {
    for case in CASES {
        let engine = engine(case.platform, &MemoryOptions::default());
        let mut guest = case.start(&engine, &accessors("20 50"), None);
        guest.call::<_, ()>("poke", (100, 1)).unwrap();
        let first = guest.memory().capture().unwrap();
        assert!((1..=PAGE).contains(&first.resident_bytes()));
        assert_eq!(guest.call::<_, i32>("peek", 100).unwrap(), 1);
        assert!(Arc::ptr_eq(&first, &guest.memory().capture().unwrap()));
        guest.call::<_, ()>("poke", (100, 2)).unwrap();
        let second = guest.memory().capture().unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        guest.grow_to(21);
        let third = guest.memory().capture().unwrap();
        assert!(!Arc::ptr_eq(&second, &third));
        guest.reset(&first);
        assert!(Arc::ptr_eq(&first, &guest.memory().capture().unwrap()));
    }
}

/// A memory, what it should contain, and images with what they should contain.
struct History {
    case: Case,
    engine: Engine,
    wat: String,
    seed: u64,
    guest: Guest,
    model: Vec<u8>,
    images: Vec<(Arc<Image>, Vec<u8>)>,
}

impl History {
    fn random(&mut self, below: usize) -> usize {
        // xorshift64: the same history in every run.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed as usize % below
    }

    fn check(&self, what: usize) {
        assert!(
            self.guest.bytes() == self.model,
            "{:?} after {what}",
            self.case
        );
    }

    fn step(&mut self) {
        let what = self.random(20);
        match what {
            0..8 => {
                let len = 1 + self.random(if what == 0 { 200_000 } else { 5_000 });
                let at = self.random(self.model.len().saturating_sub(len).max(1));
                let len = len.min(self.model.len() - at);
                let byte = self.random(256) as u8;
                self.model[at..at + len].fill(byte);
                let bytes = self.model[at..at + len].to_vec();
                self.guest.memory().write(at as u64, &bytes).unwrap();
            }
            8..10 => {
                let by = 1 + self.random(10);
                if self.model.len() + by * PAGE <= 150 * PAGE {
                    let now = self.model.len() / PAGE;
                    self.guest.grow_to((now + by) as i32);
                    self.model.resize(self.model.len() + by * PAGE, 0);
                }
            }
            10..13 => {
                let image = self.guest.memory().capture().unwrap();
                assert_eq!(image.byte_len(), self.model.len());
                if self.random(3) > 0 {
                    self.images.push((image, self.model.clone()));
                }
            }
            13..17 if !self.images.is_empty() => {
                let i = self.random(self.images.len());
                let (image, model) = self.images[i].clone();
                if what < 15 {
                    self.guest.memory().reset_uncounted(&image).unwrap();
                    self.guest.refresh();
                } else {
                    self.guest.reset(&image);
                }
                self.model = model;
            }
            17 if !self.images.is_empty() => {
                let i = self.random(self.images.len());
                self.images.swap_remove(i);
            }
            18.. if !self.images.is_empty() => {
                let i = self.random(self.images.len());
                let (image, model) = &self.images[i];
                let fork = self.case.start(&self.engine, &self.wat, Some(image));
                assert!(fork.bytes() == *model, "{:?}: a fork", self.case);
                if what == 19 {
                    self.model.clone_from(model);
                    self.guest = fork;
                }
            }
            _ => {}
        }
        self.check(what);
    }
}

#[test]
fn random_histories_agree_with_a_plain_model() {
    for case in CASES {
        for options in [MemoryOptions::default(), SMALL] {
            let engine = engine(case.platform, &options);
            let wat = accessors("30 200");
            let guest = case.start(&engine, &wat, None);
            let mut history = History {
                case,
                engine,
                wat,
                seed: 0x9e37_79b9_7f4a_7c15,
                guest,
                model: vec![0; 30 * PAGE],
                images: Vec::new(),
            };
            for _ in 0..300 {
                history.step();
            }
            // Every image is still what it was.
            for (image, model) in std::mem::take(&mut history.images) {
                history.guest.reset(&image);
                history.model = model;
                history.check(99);
            }
        }
    }
}

#[test]
fn memory64_and_pages_of_one_byte_follow_images() {
    for case in CASES {
        let engine = engine(case.platform, &SMALL);
        let mut guest = case.start(&engine, &accessors("i64 1"), None);
        guest.call::<_, ()>("poke", (9_i64, 3)).unwrap();
        let image = guest.memory().capture().unwrap();
        assert_eq!(guest.call::<_, i64>("grow", 99_i64).unwrap(), 1);
        guest.call::<_, ()>("poke", (9_i64, 4)).unwrap();
        guest.reset(&image);
        assert_eq!(guest.call::<_, i32>("peek", 9_i64).unwrap(), 3);
        assert!(is_out_of_bounds(
            &guest.call::<_, i32>("peek", 65536_i64).unwrap_err()
        ));
        assert_eq!(guest.call::<_, i64>("grow", 99_i64).unwrap(), 1);

        let mut guest = case.start(&engine, &accessors("10 100000 (pagesize 1)"), None);
        guest.call::<_, ()>("poke", (9, 1)).unwrap();
        let image = guest.memory().capture().unwrap();
        assert_eq!(guest.call::<_, i32>("grow", 70_000).unwrap(), 10);
        guest.call::<_, ()>("poke", (10, 5)).unwrap();
        guest.call::<_, ()>("poke", (70_009, 5)).unwrap();
        let grown = guest.memory().capture().unwrap();
        guest.reset(&image);
        assert_eq!(guest.call::<_, i32>("size", ()).unwrap(), 10);
        assert!(is_out_of_bounds(
            &guest.call::<_, i32>("peek", 10).unwrap_err()
        ));
        assert_eq!(guest.call::<_, i32>("grow", 70_000).unwrap(), 10);
        assert_eq!(guest.call::<_, i32>("peek", 10).unwrap(), 0);
        assert_eq!(guest.call::<_, i32>("peek", 70_009).unwrap(), 0);
        guest.reset(&grown);
        assert_eq!(guest.call::<_, i32>("peek", 70_009).unwrap(), 5);
    }
}

#[test]
fn imported_memories_begin_with_images_too() {
    for case in CASES {
        let engine = engine(case.platform, &MemoryOptions::default());
        for ty in [MemoryType::new(2, Some(9)), MemoryType::shared(2, 9)] {
            let make = |image: Option<&Arc<Image>>| {
                let mut store = Store::new(&engine, ());
                let plan = MemoryPlan {
                    guests: 1,
                    images: image.cloned().into_iter().collect(),
                    kind: case.kind,
                    prepared: case.prepared,
                    ..MemoryPlan::default()
                };
                let (memory, created) = with_plan(plan, || new_memory(&mut store, &ty));
                (memory.unwrap(), created, store)
            };
            let (memory, created, mut store) = make(None);
            match &memory {
                Extern::Memory(m) => m.grow(&mut store, 3).unwrap(),
                Extern::SharedMemory(m) => m.grow(3).unwrap(),
                _ => unreachable!(),
            };
            created.guests[0].write(300_000, b"here").unwrap();
            let image = created.guests[0].capture().unwrap();
            let (memory, created, store) = make(Some(&image));
            let pages = match &memory {
                Extern::Memory(m) => m.size(&store),
                Extern::SharedMemory(m) => m.size(),
                _ => unreachable!(),
            };
            assert_eq!(pages, 5);
            let mut bytes = [0; 4];
            created.guests[0].read(300_000, &mut bytes).unwrap();
            assert_eq!(&bytes, b"here");
        }
    }
}

#[test]
fn sizes_that_are_not_allowed_are_refused() {
    for case in CASES {
        let engine = engine(case.platform, &MemoryOptions::default());
        let mut guest = case.start(&engine, &accessors("1 50"), None);
        let small = guest.memory().capture().unwrap();
        guest.grow_to(20);
        guest.call::<_, ()>("poke", (0, 1)).unwrap();
        let image = guest.memory().capture().unwrap();
        guest.reset(&small);
        guest.memory().set_limit_bytes(19 * PAGE);
        let error = guest.memory().reset(&image).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        assert_eq!(guest.call::<_, i32>("peek", 0).unwrap(), 0);
        guest.ends_at(1);

        for (wat, limit, words) in [
            (accessors("1 19"), usize::MAX, "type allows"),
            (accessors("21 50"), usize::MAX, "type allows"),
            (accessors("1 50"), 19 * PAGE, "limit is 1245184"),
        ] {
            let plan = MemoryPlan {
                guests: 1,
                images: vec![Arc::clone(&image)],
                kind: case.kind,
                ..MemoryPlan::default()
            };
            let mut store = Store::new(&engine, ());
            let compiled = module(&engine, &wat);
            let (made, _) = super::super::with_plan_and_poll(
                plan,
                limit,
                |_| (),
                || Instance::new(&mut store, &compiled, &[]),
            );
            let error = format!("{:#}", made.unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        let record = Arc::clone(&guest.created.guests[0]);
        drop(guest);
        assert!(record.capture().is_err() && record.reset(&small).is_err());
    }
}

#[test]
fn a_view_that_may_be_read_survives_a_shrinking_reset() {
    for case in CASES {
        let engine = engine(case.platform, &MemoryOptions::default());
        let mut guest = case.start(&engine, &accessors("2 100"), None);
        guest.call::<_, ()>("poke", (5, 1)).unwrap();
        let image = guest.memory().capture().unwrap();
        guest.grow_to(100);
        guest.memory().write(0, &vec![7; 100 * PAGE]).unwrap();
        let view = guest.memory().view().unwrap();
        guest.reset(&image);
        guest.ends_at(2);
        assert_eq!(guest.call::<_, i32>("peek", 5).unwrap(), 1);
        assert_ne!(guest.memory().base(), view.base, "{case:?}");
        guest.grow_to(90);
        guest.call::<_, ()>("poke", (80 * 65536, 3)).unwrap();
        for at in (0..view.byte_length).step_by(4096) {
            // SAFETY: the view's pin keeps all of it readable.
            unsafe {
                let byte = view.base.add(at).read_volatile();
                if case.platform.guards {
                    assert_eq!(byte, 0);
                    view.base.add(at).write_volatile(9);
                }
            }
        }
        assert_eq!(guest.call::<_, i32>("peek", 0).unwrap(), 0);
        assert_eq!(guest.call::<_, i32>("peek", 80 * 65536).unwrap(), 3);

        // JavaScript cannot read through it any more, but native code may be at work on its address.
        let harmless = guest.memory().view().unwrap();
        harmless.pin.harmless();
        harmless.pin.harmless();
        guest.reset(&image);
        // Plain allocations can stay: nothing is taken away there.
        assert_eq!(
            guest.memory().base() == harmless.base,
            !case.platform.guards
        );
        // SAFETY: the pin keeps the range readable as far as it was accessible.
        assert_eq!(unsafe { harmless.base.add(80 * 65536).read_volatile() }, 0);
        guest.ends_at(2);
        // Gone, it does not matter.
        guest.grow_to(100);
        let base = guest.memory().base();
        drop(guest.memory().view());
        guest.reset(&image);
        assert_eq!(guest.memory().base(), base);
        // One that takes nothing away need not move from under a harmless one, but from under a reader:
        // what comes after is not for it to see.
        let harmless = guest.memory().view().unwrap();
        harmless.pin.harmless();
        guest.reset(&image);
        assert_eq!(guest.memory().base(), base);
        let kept = guest.memory().view().unwrap();
        guest.call::<_, ()>("poke", (5, 2)).unwrap();
        guest.reset(&image);
        assert_ne!(guest.memory().base(), kept.base);
        // SAFETY: as above.
        assert_eq!(unsafe { kept.base.add(5).read_volatile() }, 0);
    }
}

#[test]
#[cfg(unix)]
fn a_shared_memory_under_a_view_keeps_its_pages_and_shows_zeros() {
    let engine = engine(Platform::NATIVE, &MemoryOptions::default());
    for case in CASES.iter().filter(|case| case.platform.guards) {
        let mut guest = case.start(&engine, &accessors("1 64 shared"), None);
        let image = guest.memory().capture().unwrap();
        guest.grow_to(9);
        guest.memory().write(5 << 16, &[1]).unwrap();
        let view = guest.memory().view().unwrap();
        guest.reset(&image);
        assert_eq!(guest.memory().byte_len(), 1 << 16);
        assert!(guest.memory().read(5 << 16, &mut [0]).is_err());
        // SAFETY: the view keeps the range mapped.
        unsafe {
            assert_eq!(view.base.add(5 << 16).read_volatile(), 0);
            view.base.add(5 << 16).write_volatile(2);
        }
        guest.grow_to(9);
        let mut byte = [3];
        guest.memory().read(5 << 16, &mut byte).unwrap();
        assert_eq!(byte, [0], "what comes with growth is zero");
        drop(view);
        guest.reset(&image);
        guest.ends_at(1);
    }
}

#[test]
fn what_was_written_is_counted() {
    for case in CASES {
        let engine = engine(case.platform, &MemoryOptions::default());
        let mut guest = case.start(&engine, &accessors("100 200"), None);
        guest.memory().write(0, &vec![1; 50 * PAGE]).unwrap();
        let image = guest.memory().capture().unwrap();
        assert_eq!(guest.reset(&image), 0);
        for page in 0..16 {
            guest.call::<_, ()>("poke", (page * 65536, 3)).unwrap();
        }
        if case.is_mapped() {
            let usage = guest.memory().usage();
            assert_eq!(
                (usage.private_bytes, usage.shared_bytes),
                (16 << 12, 50 * PAGE)
            );
            assert!(usage.reserved_bytes > 1 << 32);
        }
        assert_eq!(guest.reset(&image), 16 << 12, "{case:?}");
        guest.grow_to(120);
        guest.call::<_, ()>("poke", (110 * 65536, 3)).unwrap();
        assert!(guest.reset(&image) >= 1 << 12);
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::super::super::image::{Strategy, runs};
    use super::super::lifetime::resident;
    use super::*;

    const MIB: usize = 1 << 20;

    /// Whether a file is open or mapped.
    fn is_held(inode: u64) -> bool {
        let open = fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| fs::metadata(entry.ok()?.path()).ok())
            .any(|file| file.ino() == inode && file.nlink() == 0);
        let mapped = fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .any(|line| {
                line.contains("memfd:wasm-molt")
                    && line.split_whitespace().nth(4) == Some(&inode.to_string())
            });
        open || mapped
    }

    fn filled(case: Case, engine: &Engine, pages: usize) -> Guest {
        let guest = case.start(engine, &accessors(&format!("{pages} 20000")), None);
        guest.memory().write(0, &vec![0xaa; pages * PAGE]).unwrap();
        guest
    }

    #[test]
    fn images_share_one_base_and_their_files_go_with_them() {
        for case in [COPY_ON_WRITE, PREPARED] {
            let engine = engine(case.platform, &MemoryOptions::default());
            let mut guest = filled(case, &engine, 256);
            let first = guest.memory().capture().unwrap();
            assert_eq!(first.resident_bytes(), 16 * MIB);
            guest.call::<_, ()>("poke", (77, 1)).unwrap();
            let second = guest.memory().capture().unwrap();
            guest.call::<_, ()>("poke", (7_000_000, 1)).unwrap();
            guest.grow_to(300);
            guest.call::<_, ()>("poke", (299 * 65536, 1)).unwrap();
            let third = guest.memory().capture().unwrap();
            assert_eq!(guest.memory().usage().private_bytes, 0);
            let files = [&first, &second, &third].map(|image| image.inodes());
            assert_eq!(files.each_ref().map(Vec::len), [1, 2, 2]);
            assert!(files.iter().all(|f| f[0] == files[0][0]), "one base");
            assert!(third.resident_bytes() < 17 * MIB);

            // Nobody else has the third one: it is written over.
            let patch = files[2][1];
            drop(third);
            guest.call::<_, ()>("poke", (5_000_000, 1)).unwrap();
            let third = guest.memory().capture().unwrap();
            assert_eq!(third.inodes(), files[2]);

            drop(second);
            assert!(!is_held(files[1][1]));
            drop(first);
            assert!(is_held(files[0][0]));
            guest.memory().write(0, &vec![3; 100 * PAGE]).unwrap();
            let flat = guest.memory().capture().unwrap();
            assert_eq!(flat.inodes().len(), 1);
            drop(third);
            assert!(!is_held(patch) && !is_held(files[0][0]));
            let last = flat.inodes()[0];
            drop(guest);
            assert!(is_held(last));
            let mut guest = case.start(&engine, &accessors("1 20000"), Some(&flat));
            drop(flat);
            assert_eq!(guest.call::<_, i32>("peek", 5_000_000).unwrap(), 3);
            assert_eq!(guest.call::<_, i32>("peek", 7_000_000).unwrap(), 1);
            assert_eq!(guest.call::<_, i32>("peek", 299 * 65536).unwrap(), 1);
            drop(guest);
            assert!(!is_held(last));
        }
    }

    #[test]
    fn an_image_of_the_only_owner_is_written_in_place() {
        for case in [COPY_ON_WRITE, PREPARED] {
            let engine = engine(case.platform, &MemoryOptions::default());
            let mut guest = filled(case, &engine, 64);
            let inode = guest.memory().capture().unwrap().inodes();
            for i in 1..20 {
                guest.memory().write(0, &vec![i as u8; 20 * PAGE]).unwrap();
                guest.grow_to(64 + i);
                guest.call::<_, ()>("poke", ((63 + i) * 65536, i)).unwrap();
                let model = guest.bytes();
                let image = guest.memory().capture().unwrap();
                assert_eq!(image.inodes(), inode);
                assert!(guest.bytes() == model);
                let fork = case.start(&engine, &accessors("1 20000"), Some(&image));
                assert!(fork.bytes() == model);
            }
        }
    }

    #[test]
    fn a_patch_of_too_many_pieces_becomes_a_base() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        let mut guest = filled(COPY_ON_WRITE, &engine, 1024);
        let first = guest.memory().capture().unwrap();
        let mut counts = Vec::new();
        let mut images = Vec::new();
        for i in 0..200 {
            guest.call::<_, ()>("poke", (i * 5 * 65536, 1)).unwrap();
            let image = guest.memory().capture().unwrap();
            counts.push(image.inodes().len());
            if i % 50 == 0 {
                images.push((image, guest.bytes()));
            }
        }
        // Beyond 32 they are joined, until too much of the base would be in the patch.
        assert_eq!(counts[..32], [2; 32]);
        assert!(counts.contains(&1), "{counts:?}");
        for (image, model) in images {
            guest.reset(&image);
            assert!(guest.bytes() == model);
        }
        guest.reset(&first);
        assert_eq!(guest.call::<_, i32>("peek", 0).unwrap(), 0xaa);
    }

    #[test]
    fn zeros_are_not_kept() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        for case in CASES.iter().filter(|case| !case.prepared) {
            let guest = case.start(&engine, &accessors("1000 2000"), None);
            guest.memory().write(0, &vec![0; 1000 * PAGE]).unwrap();
            guest.memory().write(500 * PAGE as u64, &[1]).unwrap();
            let image = guest.memory().capture().unwrap();
            assert_eq!(image.resident_bytes(), 4096, "{case:?}");
        }
    }

    #[test]
    fn the_three_ways_to_find_written_pages_agree() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        for with_patch in [false, true] {
            let mut guest = filled(COPY_ON_WRITE, &engine, 64);
            let mut image = guest.memory().capture().unwrap();
            let _first = Arc::clone(&image);
            if with_patch {
                guest.call::<_, ()>("poke", (77_777, 1)).unwrap();
                guest.grow_to(65);
                image = guest.memory().capture().unwrap();
                assert_eq!(image.inodes().len(), 2);
            }
            guest.grow_to(70);
            let mut expected = Vec::new();
            for page in [0, 1, 2, 16, 19, 500, 1023, 1070, 1119] {
                guest.call::<_, ()>("poke", (page * 4096 + 5, 3)).unwrap();
                expected.push(page as usize * 4096);
            }
            let found = [Strategy::Scan, Strategy::Pagemap, Strategy::Compare].map(|strategy| {
                guest
                    .memory()
                    .look(|home| runs(strategy, &home.at, |at, out| image.read(at, out)).unwrap())
                    .unwrap()
                    .into_iter()
                    .flat_map(|run| run.step_by(4096))
                    .collect::<Vec<_>>()
            });
            for pages in found {
                assert_eq!(pages, expected);
            }
        }
    }

    #[test]
    fn a_reset_with_much_to_throw_away_moves_and_gives_it_back() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        for case in [COPY_ON_WRITE, PREPARED] {
            let mut guest = filled(case, &engine, 16);
            let image = guest.memory().capture().unwrap();
            guest.grow_to(1040);
            let view = guest.memory().view().unwrap();
            guest.memory().write(0, &vec![1; 64 * MIB]).unwrap();
            let dirty = guest.reset(&image);
            assert!((64 * MIB..66 * MIB).contains(&dirty));
            assert_ne!(guest.memory().base(), view.base);
            assert_eq!(resident(view.base, view.byte_length).0, 0);
            guest.ends_at(16);
            assert_eq!(guest.call::<_, i32>("peek", 0).unwrap(), 0xaa);
        }
    }

    #[test]
    fn a_few_pages_that_are_put_back_may_stay_and_count_as_clean() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        let mut guest = filled(COPY_ON_WRITE, &engine, 64);
        let _base = guest.memory().capture().unwrap();
        guest.call::<_, ()>("poke", (2_000_000, 1)).unwrap();
        guest.grow_to(70);
        let image = guest.memory().capture().unwrap();
        let model = guest.bytes();
        for pages in [1, 16, 32, 33, 200, 5] {
            for page in 0..pages {
                // Base, patch and what lies beyond the base.
                for at in [page * 4096, 2_000_000, 68 * 65536] {
                    guest.call::<_, ()>("poke", (at, 9)).unwrap();
                }
            }
            guest.grow_to(75);
            guest.call::<_, ()>("poke", (74 * 65536, 9)).unwrap();
            guest.memory().reset_uncounted(&image).unwrap();
            guest.refresh();
            guest.ends_at(70);
            assert!(guest.bytes() == model);
            assert!(guest.memory().usage().private_bytes <= 32 << 12);
            assert!(Arc::ptr_eq(&image, &guest.memory().capture().unwrap()));
        }
        assert!(guest.memory().usage().private_bytes > 0);
        guest.call::<_, ()>("poke", (3_000_000, 9)).unwrap();
        assert_eq!(guest.reset(&image), 1 << 12);
        assert_eq!(guest.memory().usage().private_bytes, 0);
    }

    #[test]
    fn what_is_written_where_an_image_has_nothing_stays_nowhere() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        for prepared in [false, true] {
            let case = Case {
                prepared,
                ..COPY_ON_WRITE
            };
            let mut guest = case.start(&engine, &accessors("1024"), None);
            guest.memory().write(5_000_000, &[7; 10_000]).unwrap();
            let image = guest.memory().capture().unwrap();
            let held = image.resident_bytes();
            assert!(held < MIB, "{held}");
            for counted in [true, false] {
                guest.memory().write(0, &vec![1; 64 * MIB]).unwrap();
                if counted {
                    guest.reset(&image);
                } else {
                    guest.memory().reset_uncounted(&image).unwrap();
                    guest.refresh();
                }
                assert_eq!(image.resident_bytes(), held);
                assert!(guest.memory().usage().private_bytes <= 32 << 12);
                assert_eq!(guest.call::<_, i32>("peek", 5_000_000).unwrap(), 7);
                assert_eq!(guest.call::<_, i32>("peek", 20_000_000).unwrap(), 0);
            }
            // Reading what is not there is no writing.
            for page in 0..1000 {
                guest.call::<_, i32>("peek", page * 65536 / 2).unwrap();
            }
            assert!(guest.reset(&image) == 0 && image.resident_bytes() == held);
        }
    }

    #[test]
    fn huge_pages_keep_no_memory() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        for case in CASES.iter().filter(|case| case.platform.guards) {
            let mut guest = case.start(&engine, &accessors("1 20000"), None);
            let image = guest.memory().capture().unwrap();
            for counted in [false, true] {
                guest.grow_to(1600);
                let base = guest.memory().base();
                let len = guest.memory().byte_len();
                // SAFETY: advice changes no contents.
                let _ = unsafe {
                    rustix::mm::madvise(base.cast(), len, rustix::mm::Advice::LinuxHugepage)
                };
                guest.memory().write(0, &vec![1; 64 * MIB]).unwrap();
                assert!(resident(base, len).0 >= 64 * MIB);
                if counted {
                    guest.reset(&image);
                } else {
                    guest.memory().reset_uncounted(&image).unwrap();
                    guest.refresh();
                }
                guest.ends_at(1);
                let now = guest.memory().base();
                assert!(resident(now, 1 << 32).0 <= 4 * PAGE);
            }
        }
    }

    #[test]
    fn a_memory_made_from_an_image_touches_nothing() {
        let engine = engine(Platform::NATIVE, &MemoryOptions::default());
        let image = filled(COPY_ON_WRITE, &engine, 1024)
            .memory()
            .capture()
            .unwrap();
        let guest = COPY_ON_WRITE.start(&engine, &accessors("1 20000"), Some(&image));
        assert_eq!(resident(guest.memory().base(), 64 * MIB).0, 0);
        assert_eq!(guest.memory().usage().private_bytes, 0);
    }
}
