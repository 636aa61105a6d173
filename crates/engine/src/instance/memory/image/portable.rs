//! Images as copies: what works everywhere.
//!
//! `unsafe` because contents are read from and written to linear memory, under the record's lock.

use std::io;

use super::super::reservation::Reservation;
use super::super::{GRANULE, extent};
use super::{UNIT, finish, not_zero};

/// The bytes of a memory, without what is zero.
#[derive(Debug)]
pub(super) struct Copied {
    len: usize,
    /// In order; none crosses a multiple of [`GRANULE`].
    runs: Vec<Run>,
}

#[derive(Debug)]
struct Run {
    offset: usize,
    bytes: Vec<u8>,
}

impl Copied {
    pub(super) fn of(at: &Reservation, len: usize) -> io::Result<Self> {
        let mut runs = Vec::new();
        let mut buffer = vec![0; GRANULE];
        for start in (0..len).step_by(GRANULE) {
            let piece = &mut buffer[..GRANULE.min(len - start)];
            // SAFETY: the caller holds the record's lock.
            unsafe { at.copy_out(start, piece) }?;
            for part in not_zero(piece) {
                // Large in sum: running out of memory is an error here, no abort.
                let mut bytes = Vec::new();
                bytes.try_reserve_exact(part.len())?;
                bytes.extend_from_slice(&piece[part.clone()]);
                runs.try_reserve(1)?;
                runs.push(Run {
                    offset: start + part.start,
                    bytes,
                });
            }
        }
        Ok(Self { len, runs })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn resident_bytes(&self) -> usize {
        self.runs.iter().map(|run| run.bytes.len()).sum()
    }

    pub(super) fn place(&self, at: &Reservation) -> io::Result<()> {
        at.commit(extent(self.len)?)?;
        for run in &self.runs {
            // SAFETY: a fresh reservation is the caller's alone.
            unsafe { at.copy_in(run.offset, &run.bytes) }?;
        }
        Ok(())
    }

    /// Writes what differs and nothing else, so that untouched pages stay so.
    pub(super) fn put_back(&self, at: &Reservation, keeps_size: bool) -> io::Result<usize> {
        let extent = extent(self.len)?;
        at.commit(extent)?;
        let beyond = at.accessible_bytes() - extent;
        let mut differed = 0;
        self.compare(at, extent, |offset, expected| {
            differed += expected.len();
            // SAFETY: the caller holds the record's lock.
            unsafe { at.copy_in(offset, expected) }?;
            Ok(true)
        })?;
        finish(at, extent, keeps_size)?;
        Ok(differed + beyond)
    }

    pub(super) fn equals(&self, at: &Reservation, len: usize) -> bool {
        if self.len != len {
            return false;
        }
        let mut equal = true;
        let compared = self.compare(at, at.accessible_bytes(), |_, _| {
            equal = false;
            Ok(false)
        });
        equal && compared.is_ok()
    }

    /// Calls `differs` with where and what it should be, for each unit of the first `extent` bytes,
    /// until that says `false`.
    fn compare(
        &self,
        at: &Reservation,
        extent: usize,
        mut differs: impl FnMut(usize, &[u8]) -> io::Result<bool>,
    ) -> io::Result<()> {
        let (mut is, mut should_be) = (vec![0; GRANULE], vec![0; GRANULE]);
        let mut runs = self.runs.iter().peekable();
        for start in (0..extent).step_by(GRANULE) {
            should_be.fill(0);
            while let Some(run) = runs.next_if(|run| run.offset < start + GRANULE) {
                let from = run.offset - start;
                should_be[from..from + run.bytes.len()].copy_from_slice(&run.bytes);
            }
            // SAFETY: the caller holds the record's lock.
            unsafe { at.copy_out(start, &mut is) }?;
            for (i, (is, should_be)) in is.chunks(UNIT).zip(should_be.chunks(UNIT)).enumerate() {
                if is != should_be && !differs(start + i * UNIT, should_be)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
