//! What the system says of the whole process: Linux.

use std::fs;

/// Bytes of the process that are in memory now. The kernel counts in batches for each thread, so it may be
/// some hundred KiB off.
///
/// Source: `/proc/self/statm`, proc(5).
pub(crate) fn resident_bytes() -> Option<usize> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: usize = text.split(' ').nth(1)?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size())
}
