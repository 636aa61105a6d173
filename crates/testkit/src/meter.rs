//! What this process holds, as the system counts it.

/// One reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Resident bytes.
    pub rss_bytes: usize,
    /// Mappings of the address space.
    pub mappings: usize,
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub descriptors: usize,
}

/// Reads the meter; `None` on systems that do not tell.
#[cfg(target_os = "linux")]
pub fn read() -> Option<Reading> {
    use std::fs;
    const PAGE_BYTES: usize = 4096;
    let count = |folder| fs::read_dir(folder).ok().map(Iterator::count);
    // Resident pages stand second; in pages of the system, which are 4 KiB on every Linux we test on.
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: usize = statm.split(' ').nth(1)?.parse().ok()?;
    Some(Reading {
        rss_bytes: pages * PAGE_BYTES,
        mappings: fs::read_to_string("/proc/self/maps").ok()?.lines().count(),
        threads: count("/proc/self/task")?,
        // Reading the folder takes one itself.
        descriptors: count("/proc/self/fd")?.saturating_sub(1),
    })
}

/// Reads the meter; `None` on systems that do not tell.
#[cfg(not(target_os = "linux"))]
pub fn read() -> Option<Reading> {
    None
}
