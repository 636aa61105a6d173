//! Which pages of a memory are its own: written since it lies on its image.
//!
//! Three ways, the fastest one that the system offers: the kernel's scan of page tables (Linux 6.7),
//! its page map as a file, and comparing.
//!
//! `unsafe` because of the scan, a system call that rustix does not know, and because comparing reads
//! linear memory, under the record's lock.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use once_cell::sync::OnceCell;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::param::page_size;

use super::super::reservation::Reservation;
use super::total;

/// A way to find out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::instance::memory) enum Strategy {
    /// `PAGEMAP_SCAN`.
    Scan,
    /// `/proc/self/pagemap`, one word per page.
    Pagemap,
    /// Reading everything.
    Compare,
}

/// The best one here.
pub(super) fn strategy() -> Strategy {
    static BEST: LazyLock<Strategy> = LazyLock::new(|| {
        let probe = 0_u8;
        let start = (&raw const probe).addr() & !(page_size() - 1);
        let mut runs = Vec::new();
        if scan(start, start + page_size(), &mut runs).is_ok() {
            Strategy::Scan
        } else if read_map(start, start + page_size(), &mut runs).is_ok_and(|()| !runs.is_empty()) {
            Strategy::Pagemap
        } else {
            Strategy::Compare
        }
    });
    *BEST
}

/// The pages that are the memory's own, as offsets in order. `image` reads what lies below them.
pub(in crate::instance::memory) fn runs(
    strategy: Strategy,
    at: &Reservation,
    image: impl Fn(usize, &mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<Range<usize>>> {
    let base = at.base().addr();
    let end = base + at.accessible_bytes();
    let mut runs = Vec::new();
    match strategy {
        Strategy::Scan => scan(base, end, &mut runs)?,
        Strategy::Pagemap => read_map(base, end, &mut runs)?,
        Strategy::Compare => compare(at, image, &mut runs)?,
    }
    if strategy != Strategy::Compare {
        from_base(base, &mut runs);
    }
    Ok(runs)
}

/// Makes offsets of addresses.
fn from_base(base: usize, runs: &mut [Range<usize>]) {
    for run in runs {
        *run = run.start - base..run.end - base;
    }
}

fn push(runs: &mut Vec<Range<usize>>, run: Range<usize>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

/// Opened once; it is this process's whoever reads it.
fn pagemap() -> io::Result<&'static File> {
    static PAGEMAP: OnceCell<File> = OnceCell::new();
    PAGEMAP.get_or_try_init(|| File::open("/proc/self/pagemap"))
}

/// Categories of pages, as `linux/fs.h` numbers them.
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
/// The page of zeros that all share: read, and never written.
const IS_ZERO: u64 = 1 << 5;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The call, which answers how many regions it has filled in.
struct PagemapScan<'a>(&'a mut ScanArg);

// SAFETY: the opcode is that of `PAGEMAP_SCAN`, whose argument is a `pm_scan_arg` in and out; it
// changes nothing but that and the vector that it names.
unsafe impl Ioctl for PagemapScan<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<ScanArg>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.0).cast()
    }

    unsafe fn output_from_ptr(
        out: IoctlOutput,
        _extract_output: *mut c_void,
    ) -> rustix::io::Result<usize> {
        Ok(usize::try_from(out).unwrap_or(0))
    }
}

/// The pages that are the memory's own, if they are no more than `most` and that is known fast.
pub(super) fn few(at: &Reservation, len: usize, most: usize) -> Option<Vec<Range<usize>>> {
    if strategy() != Strategy::Scan {
        return None;
    }
    let base = at.base().addr();
    let mut runs = Vec::new();
    scan_some(base, base + len, most as u64 + 1, &mut runs).ok()?;
    from_base(base, &mut runs);
    (total(&runs) <= most * page_size()).then_some(runs)
}

fn scan(start: usize, end: usize, runs: &mut Vec<Range<usize>>) -> io::Result<()> {
    scan_some(start, end, 0, runs)
}

/// Stops after `most` pages, unless that is 0.
fn scan_some(start: usize, end: usize, most: u64, runs: &mut Vec<Range<usize>>) -> io::Result<()> {
    let mut regions = [PageRegion::default(); 128];
    let mut at = start as u64;
    while at < end as u64 {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: at,
            end: end as u64,
            vec: (&raw mut regions).addr() as u64,
            vec_len: regions.len() as u64,
            max_pages: most,
            category_inverted: IS_FILE | IS_ZERO,
            category_mask: IS_FILE | IS_ZERO,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_FILE,
            ..ScanArg::default()
        };
        // SAFETY: the vector is alive and as long as it is said to be.
        let filled = unsafe { ioctl(pagemap()?, PagemapScan(&mut arg)) }?;
        for region in regions.iter().take(filled) {
            push(runs, region.start as usize..region.end as usize);
        }
        if most > 0 && filled > 0 {
            // So few fit into the vector: either these are all, or there are more than wanted.
            return Ok(());
        }
        if arg.walk_end <= at {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = arg.walk_end;
    }
    Ok(())
}

/// Bits of a word of the page map.
const MAP_PRESENT: u64 = 1 << 63;
const MAP_SWAPPED: u64 = 1 << 62;
const MAP_FILE: u64 = 1 << 61;

fn read_map(start: usize, end: usize, runs: &mut Vec<Range<usize>>) -> io::Result<()> {
    const WORD: usize = size_of::<u64>();
    let page = page_size();
    let mut words = [0; WORD * 2048];
    let mut at = start;
    while at < end {
        let wanted = ((end - at).div_ceil(page) * WORD).min(words.len());
        pagemap()?.read_exact_at(&mut words[..wanted], (at / page * WORD) as u64)?;
        for word in words[..wanted].as_chunks::<WORD>().0 {
            let word = u64::from_ne_bytes(*word);
            if word & (MAP_PRESENT | MAP_SWAPPED) != 0 && word & MAP_FILE == 0 {
                push(runs, at..at + page);
            }
            at += page;
        }
    }
    Ok(())
}

fn compare(
    at: &Reservation,
    image: impl Fn(usize, &mut [u8]) -> io::Result<()>,
    runs: &mut Vec<Range<usize>>,
) -> io::Result<()> {
    let page = page_size();
    let (mut is, mut was) = (vec![0; page], vec![0; page]);
    for offset in (0..at.accessible_bytes()).step_by(page) {
        // SAFETY: the caller holds the record's lock.
        unsafe { at.copy_out(offset, &mut is) }?;
        image(offset, &mut was)?;
        if is != was {
            push(runs, offset..offset + page);
        }
    }
    Ok(())
}
