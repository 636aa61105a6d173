//! Which functions are polled at their entry, so that no chain of calls goes on without a poll.

use std::ops::Range;

use super::scan::Site;
use super::seen::Body;

/// Bytes of code that calls may run one after the other without a poll: less than a millisecond.
pub(super) const MAX_WEIGHT: u64 = 1 << 20;

/// Who calls whom by index, outside of loops.
pub(super) struct CallGraph<'a> {
    /// Imported functions come first in the index space and are none of our business.
    pub(super) imported: usize,
    /// Bytes of code of each function, with those of the helpers it calls.
    pub(super) own: Vec<u64>,
    pub(super) bodies: &'a [Body<'a>],
    pub(super) sites: &'a mut [Site],
}

/// How far the walk has got with a function.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    New,
    Open,
    Done,
}

impl CallGraph<'_> {
    /// Decides which functions need a poll at their entry, and which direct calls before them.
    ///
    /// Every cycle has a call that leads back to a function which a depth-first walk still has
    /// open: polling in that function cuts all cycles. (At its entry and not before the call:
    /// measured, fewer places are worth more than fewer executions.) What remains is a tree of
    /// calls, whose weights are known from the leaves up.
    pub(super) fn poll(&mut self) {
        let count = self.bodies.len();
        let mut marks = vec![Mark::New; count];
        let mut weights = vec![0_u64; count];
        // A function and the next of its sites to look at.
        let mut open: Vec<(usize, usize)> = Vec::new();
        for root in 0..count {
            if marks[root] != Mark::New {
                continue;
            }
            marks[root] = Mark::Open;
            open.push((root, self.sites_of(root).start));
            while let Some((function, next)) = open.last_mut() {
                let (function, site) = (*function, *next);
                if site >= self.sites_of(function).end {
                    weights[function] = self.weigh(function, &weights);
                    marks[function] = Mark::Done;
                    open.pop();
                    continue;
                }
                *next += 1;
                let Some(callee) = self.callee(site) else {
                    continue;
                };
                match marks[callee] {
                    Mark::New => {
                        marks[callee] = Mark::Open;
                        open.push((callee, self.sites_of(callee).start));
                    }
                    Mark::Open => self.poll_entry(callee),
                    Mark::Done => {}
                }
            }
        }
    }

    fn poll_entry(&mut self, function: usize) {
        let entry = self.sites_of(function).start;
        if let Some(site) = self.sites.get_mut(entry) {
            site.callee = Site::POLLED;
        }
    }

    /// The positions of a function's sites.
    fn sites_of(&self, function: usize) -> Range<usize> {
        self.bodies
            .get(function)
            .map_or(0..0, |body| body.sites.clone())
    }

    /// The position of the defined function that is called at a site without a poll.
    fn callee(&self, site: usize) -> Option<usize> {
        let site = self.sites.get(site).filter(|site| !site.is_polled())?;
        let callee = (site.callee as usize).checked_sub(self.imported)?;
        (callee < self.bodies.len()).then_some(callee)
    }

    /// Bytes of code that a call of `function` adds to what its caller runs without a poll, at most:
    /// branches count all, loops once, polled calls not at all. Where that is too much, the
    /// function gets a poll at its entry, and so many before its calls that no two are too far
    /// apart; it then adds nothing.
    fn weigh(&mut self, function: usize, weights: &[u64]) -> u64 {
        let own = self.own.get(function).copied().unwrap_or(0);
        let sites = self.sites_of(function);
        let mut weight = own;
        for site in sites.clone() {
            let Some(callee) = self.callee(site) else {
                continue;
            };
            let adds = weights.get(callee).copied().unwrap_or(0);
            weight = weight.saturating_add(adds);
            if weight > MAX_WEIGHT {
                self.sites[site].callee = Site::POLLED;
                self.poll_entry(function);
                weight = adds;
            }
        }
        let polled = self
            .sites
            .get(sites.start)
            .is_some_and(|entry| entry.is_polled());
        if polled { 0 } else { weight }
    }
}
