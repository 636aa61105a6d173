//! How much memory a call takes for good: the Theil-Sen estimator over the last calls.

use std::collections::VecDeque;

/// Growths that are remembered. At most one for each call, so they cover the window of a default horizon.
const MOST_POINTS: usize = 64;
/// Calls that an estimate looks back on, at least.
const WINDOW: u64 = 64;
/// Slopes are taken between so many moments of the window: 528 of them.
const MOMENTS: u64 = 32;
/// With fewer growths in the window anything looks like a trend.
const LEAST_GROWTHS: usize = 3;

/// The sizes that an instance has had, by the calls that it had run by then.
#[derive(Debug, Clone, Default)]
pub struct Growth {
    /// `(calls, bytes)`, wherever the size changed.
    points: VecDeque<(u64, u64)>,
}

impl Growth {
    /// An instance begins with so many bytes.
    pub fn beginning_with(bytes: u64) -> Self {
        Self {
            points: VecDeque::from([(0, bytes)]),
        }
    }

    /// After so many calls it has so many bytes.
    pub fn note(&mut self, calls: u64, bytes: u64) {
        if self.points.back().is_some_and(|(_, last)| *last == bytes) {
            return;
        }
        if self.points.len() == MOST_POINTS {
            self.points.pop_front();
        }
        self.points.push_back((calls, bytes));
    }

    /// The median of the slopes between any two moments of the last calls, in bytes for each call; never
    /// negative. Of two middle ones it is the smaller.
    ///
    /// Few large allocations are no trend: with fewer than 3 growths in the window it is 0, and with more than
    /// that a single one of them does not move the median.
    ///
    /// * `ahead`: for how many calls it is to hold. It looks back on twice as many, and on 64 at least.
    ///
    /// Source: Sen, "Estimates of the Regression Coefficient Based on Kendall's Tau" (1968).
    pub fn per_call(&self, calls: u64, ahead: u64) -> f64 {
        let Some((oldest, _)) = self.points.front() else {
            return 0.0;
        };
        let window = WINDOW.max(ahead.saturating_mul(2));
        let from = calls.saturating_sub(window).max(*oldest);
        let span = calls.saturating_sub(from);
        let is_in_window = |(at, _): &&(u64, u64)| *at > from;
        if self.points.iter().filter(is_in_window).count() < LEAST_GROWTHS {
            return 0.0;
        }
        let steps = span.min(MOMENTS);
        let moments: Vec<_> = (0..=steps)
            .map(|step| from + span * step / steps)
            .map(|call| (call as f64, self.bytes_at(call) as f64))
            .collect();
        let mut slopes = Vec::with_capacity(moments.len() * moments.len() / 2);
        for (index, (call, bytes)) in moments.iter().enumerate() {
            let later = moments.iter().skip(index + 1);
            slopes.extend(later.map(|(then, grown)| (grown - bytes) / (then - call)));
        }
        let middle = slopes.len().saturating_sub(1) / 2;
        if slopes.is_empty() {
            return 0.0;
        }
        let (_, median, _) = slopes.select_nth_unstable_by(middle, f64::total_cmp);
        median.max(0.0)
    }

    fn bytes_at(&self, call: u64) -> u64 {
        let known = self.points.iter().rev().find(|(at, _)| *at <= call);
        let known = known.or_else(|| self.points.front());
        known.map_or(0, |(_, bytes)| *bytes)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const PAGE: u64 = 65_536;

    #[track_caller]
    fn is(growth: f64, bytes: u64) {
        let expected = bytes as f64;
        assert!((growth - expected).abs() < 1e-6, "{growth}, not {expected}");
    }

    fn after(calls: u64, bytes: impl Fn(u64) -> u64) -> Growth {
        let mut growth = Growth::beginning_with(bytes(0));
        for call in 1..=calls {
            growth.note(call, bytes(call));
        }
        growth
    }

    #[test]
    fn a_steady_leak_is_its_slope() {
        for calls in [3, 10, 64, 1000] {
            let growth = after(calls, |call| PAGE * (1 + call));
            is(growth.per_call(calls, 16), PAGE);
        }
    }

    #[test]
    fn a_leak_that_shows_now_and_then_is_spread() {
        let growth = after(1000, |call| PAGE * (1 + call / 5));
        let per_call = growth.per_call(1000, 16);
        let expected = PAGE as f64 / 5.0;
        assert!(
            (per_call - expected).abs() < expected / 4.0,
            "{per_call}, not {expected}"
        );
    }

    #[test]
    fn a_single_large_allocation_is_no_trend() {
        for at in [1, 2, 3, 7, 50, 990] {
            let growth = after(1000, |call| if call >= at { 1000 * PAGE } else { PAGE });
            is(growth.per_call(1000, 16), 0);
        }
        // Nor while there is little else.
        let steps = [PAGE, 2 * PAGE, 3 * PAGE, 1000 * PAGE];
        is(after(3, |call| steps[call as usize]).per_call(3, 16), PAGE);
        for at in 1..=3 {
            let growth = after(3, |call| if call >= at { 1000 * PAGE } else { PAGE });
            is(growth.per_call(3, 16), 0);
        }
    }

    #[test]
    fn warming_up_is_forgotten() {
        let growth = after(500, |call| PAGE * (1 + call.min(20)));
        assert!(growth.per_call(20, 16) > 0.0);
        is(growth.per_call(500, 16), 0);
    }

    #[test]
    fn few_calls_tell_nothing() {
        let growth = after(2, |call| PAGE * (1 + call));
        is(growth.per_call(2, 16), 0);
        is(Growth::default().per_call(1000, 16), 0);
    }

    #[test]
    fn shrinking_is_no_growth() {
        let growth = after(100, |call| PAGE * (200 - call));
        is(growth.per_call(100, 16), 0);
    }
}
