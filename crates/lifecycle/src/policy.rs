//! When an instance is to be replaced without being asked.
//!
//! * [`Policy`]: what the user has said. [`Thresholds`]: what that comes to for one instance.
//! * [`Wear`]: what an instance has behind it. [`Crossing`]: which threshold that has crossed.
//! * [`Backoff`]: when what failed is tried again.
//! * [`choose`]: who makes room when all together have too much.

use std::time::Duration;

use crate::growth::Growth;

/// Why an instance is recycled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Its memory has reached the threshold.
    Memory,
    /// Its memory would reach the limit within the next calls.
    Predicted,
    /// It has run as many calls as it may.
    Calls,
    /// It is as old as it may be.
    Age,
    /// All instances of the process together have too much.
    Budget,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Memory,
        Self::Predicted,
        Self::Calls,
        Self::Age,
        Self::Budget,
    ];

    /// As in reports, statistics and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Predicted => "predicted",
            Self::Calls => "calls",
            Self::Age => "age",
            Self::Budget => "budget",
        }
    }
}

/// How much memory is enough.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MemoryThreshold {
    /// So many bytes.
    Bytes(u64),
    /// A share of what the instance may have at most, above 0 and up to 1.
    Share(f64),
}

impl MemoryThreshold {
    fn bytes(self, limit: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Share(share) => (limit as f64 * share) as u64,
        }
    }
}

/// Thresholds for the instances of a manager.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Linear memory.
    pub memory: Option<MemoryThreshold>,
    /// Calls run.
    pub calls: Option<u64>,
    /// Time since it was made.
    pub age: Option<Duration>,
    /// Before its growth would cross the limit.
    pub predicts: bool,
    /// 0 to 1: the largest share by which an instance's thresholds are lowered.
    pub jitter: f64,
}

impl Policy {
    /// What is told to an application that has set none: nothing is done about it.
    pub const OBSERVED: Self = Self {
        memory: Some(MemoryThreshold::Share(0.75)),
        calls: None,
        age: None,
        predicts: true,
        jitter: 0.0,
    };

    /// What it comes to for one instance. The same instance gets the same; others, and its successors, get
    /// theirs spread evenly.
    pub fn for_instance(&self, slot: usize, generation: u64) -> Thresholds {
        let spread = spread(slot as u64, generation);
        Thresholds {
            policy: *self,
            room: 1.0 - self.jitter * spread,
        }
    }
}

/// From 0 to less than 1: two rounds of `SplitMix64`, whose outputs are equidistributed.
fn spread(slot: u64, generation: u64) -> f64 {
    let mix = |seed: u64| {
        let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(slot) ^ generation);
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// What one instance is held to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    policy: Policy,
    /// The share of the way to each threshold that this instance may go.
    room: f64,
}

/// What an instance has behind it.
#[derive(Debug, Clone, Copy)]
pub struct Wear<'a> {
    /// Calls that it has run.
    pub calls: u64,
    /// Bytes of linear memory.
    pub bytes: u64,
    /// How many it began with.
    pub baseline: u64,
    /// How many it may have.
    pub limit: u64,
    /// How its memory grew.
    pub growth: &'a Growth,
    /// How many calls it will run before a replacement is there.
    pub ahead: u64,
}

/// A threshold was crossed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Crossing {
    /// Which.
    pub reason: Reason,
    /// How many bytes it was, where it was memory.
    pub threshold: Option<u64>,
}

impl Thresholds {
    /// Bytes that count as too many. The way from what it began with is shortened, not the threshold: else
    /// a threshold just above that would be crossed from the start.
    pub fn memory(&self, baseline: u64, limit: u64) -> Option<u64> {
        let threshold = self.policy.memory?.bytes(limit);
        let way = threshold.saturating_sub(baseline) as f64 * self.room;
        Some(if threshold > baseline {
            baseline + way as u64
        } else {
            threshold
        })
    }

    /// Calls that are as many as it may run.
    pub fn calls(&self) -> Option<u64> {
        let most = self.policy.calls?;
        Some(((most as f64 * self.room) as u64).clamp(1, most))
    }

    /// How old it may get.
    pub fn age(&self) -> Option<Duration> {
        Some(self.policy.age?.mul_f64(self.room))
    }

    /// Which threshold is crossed, memory first; age is for a clock to say.
    pub fn judge(&self, wear: &Wear<'_>) -> Option<Crossing> {
        let Wear {
            calls,
            bytes,
            limit,
            ..
        } = *wear;
        if let Some(threshold) = self.memory(wear.baseline, limit)
            && bytes >= threshold
        {
            return Some(Crossing {
                reason: Reason::Memory,
                threshold: Some(threshold),
            });
        }
        if self.policy.predicts && wear.will_cross() {
            return Some(Crossing {
                reason: Reason::Predicted,
                threshold: Some(limit),
            });
        }
        if self.calls().is_some_and(|most| calls >= most) {
            return Some(Crossing {
                reason: Reason::Calls,
                threshold: None,
            });
        }
        None
    }
}

impl Wear<'_> {
    /// An instance that begins at its limit is not to be recycled for that.
    fn will_cross(&self) -> bool {
        if self.bytes <= self.baseline {
            return false;
        }
        let growth = self.growth.per_call(self.calls, self.ahead);
        growth > 0.0 && self.bytes as f64 + growth * self.ahead as f64 >= self.limit as f64
    }
}

/// When what failed is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure.
    pub initial: Duration,
    /// At most.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(100),
            max: Duration::from_secs(30),
        }
    }
}

impl Backoff {
    /// How long to wait after so many failures in a row.
    pub fn after(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.initial.saturating_mul(1 << doublings).min(self.max)
    }
}

/// Somebody who could give memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// How many bytes.
    pub bytes: u64,
    /// In how much time.
    pub cost: Duration,
}

/// Who gives back `over` bytes: those first that give the most for the time it takes. If all together do not
/// have as much, all of them.
pub fn choose(over: u64, candidates: &[Candidate]) -> Vec<usize> {
    let yields = |index: &usize| {
        candidates.get(*index).map_or(0.0, |candidate| {
            candidate.bytes as f64 / candidate.cost.as_secs_f64().max(1e-6)
        })
    };
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|a, b| yields(b).total_cmp(&yields(a)));
    let mut left = over;
    let wanted = |index: &usize| {
        let is_wanted = left > 0;
        left = left.saturating_sub(candidates.get(*index).map_or(0, |c| c.bytes));
        is_wanted
    };
    order.into_iter().take_while(wanted).collect()
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    const NONE: Policy = Policy {
        memory: None,
        calls: None,
        age: None,
        predicts: false,
        jitter: 0.0,
    };

    fn wear(growth: &Growth) -> Wear<'_> {
        Wear {
            calls: 0,
            bytes: MIB,
            baseline: MIB,
            limit: 100 * MIB,
            growth,
            ahead: 16,
        }
    }

    fn reason(policy: Policy, wear: &Wear<'_>) -> Option<Reason> {
        let crossing = policy.for_instance(0, 1).judge(wear);
        crossing.map(|crossing| crossing.reason)
    }

    #[test]
    fn each_threshold_is_crossed_where_it_says() {
        let growth = Growth::default();
        let begin = wear(&growth);
        let memory = |memory| Policy {
            memory: Some(memory),
            ..NONE
        };
        for threshold in [
            MemoryThreshold::Bytes(75 * MIB),
            MemoryThreshold::Share(0.75),
        ] {
            let of = |bytes| Wear { bytes, ..begin };
            assert_eq!(reason(memory(threshold), &of(75 * MIB - 1)), None);
            let crossing = memory(threshold).for_instance(0, 1).judge(&of(75 * MIB));
            let expected = Crossing {
                reason: Reason::Memory,
                threshold: Some(75 * MIB),
            };
            assert_eq!(crossing, Some(expected));
        }
        let calls = Policy {
            calls: Some(10),
            ..NONE
        };
        assert_eq!(reason(calls, &Wear { calls: 9, ..begin }), None);
        let at = Wear { calls: 10, ..begin };
        assert_eq!(reason(calls, &at), Some(Reason::Calls));
        assert_eq!(reason(NONE, &at), None);
    }

    #[test]
    fn memory_comes_first() {
        let growth = Growth::default();
        let policy = Policy {
            memory: Some(MemoryThreshold::Bytes(2 * MIB)),
            calls: Some(1),
            ..NONE
        };
        let both = Wear {
            calls: 5,
            bytes: 3 * MIB,
            ..wear(&growth)
        };
        assert_eq!(reason(policy, &both), Some(Reason::Memory));
    }

    #[test]
    fn a_leak_is_foreseen_before_the_limit_and_not_long_before() {
        let policy = Policy {
            predicts: true,
            ..NONE
        };
        let mut growth = Growth::beginning_with(MIB);
        let first = (1..=99).find(|call| {
            growth.note(*call, MIB * (1 + call));
            let now = Wear {
                calls: *call,
                bytes: MIB * (1 + call),
                ..wear(&growth)
            };
            reason(policy, &now) == Some(Reason::Predicted)
        });
        // 16 calls before the 99th, which would reach 100 MiB.
        assert_eq!(first, Some(83));
    }

    #[test]
    fn an_instance_that_begins_at_its_limit_is_left_alone() {
        let growth = Growth::beginning_with(100 * MIB);
        let policy = Policy {
            predicts: true,
            ..NONE
        };
        let full = Wear {
            calls: 1000,
            bytes: 100 * MIB,
            baseline: 100 * MIB,
            ..wear(&growth)
        };
        assert_eq!(reason(policy, &full), None);
    }

    #[test]
    fn jitter_lowers_and_never_raises_and_is_spread() {
        let policy = Policy {
            memory: Some(MemoryThreshold::Bytes(101 * MIB)),
            calls: Some(1000),
            age: Some(Duration::from_secs(1000)),
            jitter: 0.1,
            ..NONE
        };
        let mut seen = Vec::new();
        for slot in 0..8 {
            for generation in 1..=64 {
                let thresholds = policy.for_instance(slot, generation);
                assert_eq!(thresholds, policy.for_instance(slot, generation));
                let calls = thresholds.calls().unwrap();
                assert!((900..=1000).contains(&calls), "{calls}");
                let memory = thresholds.memory(MIB, 4096 * MIB).unwrap();
                assert!((91 * MIB..=101 * MIB).contains(&memory), "{memory}");
                let age = thresholds.age().unwrap().as_secs_f64();
                assert!((900.0..=1000.0).contains(&age), "{age}");
                seen.push(calls);
            }
        }
        let low = seen.iter().filter(|calls| **calls < 925).count();
        let high = seen.iter().filter(|calls| **calls >= 975).count();
        // A quarter each, of 512.
        assert!((90..170).contains(&low), "{low} in the lowest quarter");
        assert!((90..170).contains(&high), "{high} in the highest");
    }

    #[test]
    fn full_jitter_leaves_a_call() {
        let policy = Policy {
            calls: Some(1),
            memory: Some(MemoryThreshold::Bytes(MIB)),
            jitter: 1.0,
            ..NONE
        };
        for generation in 1..100 {
            let thresholds = policy.for_instance(0, generation);
            assert_eq!(thresholds.calls(), Some(1));
            // Begins above: the threshold stays what it is.
            assert_eq!(thresholds.memory(2 * MIB, 64 * MIB), Some(MIB));
        }
    }

    #[test]
    fn backing_off_doubles_up_to_a_bound() {
        let backoff = Backoff {
            initial: Duration::from_millis(100),
            max: Duration::from_secs(1),
        };
        let waits: Vec<_> = (1..=6).map(|n| backoff.after(n).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.after(u32::MAX), Duration::from_secs(1));
    }

    #[test]
    fn the_most_for_the_time_goes_first_and_no_more_than_needed() {
        let candidate = |mib, ms| Candidate {
            bytes: mib * MIB,
            cost: Duration::from_millis(ms),
        };
        let all = [candidate(10, 1), candidate(100, 5), candidate(50, 50)];
        assert_eq!(choose(0, &all), [] as [usize; 0]);
        assert_eq!(choose(1, &all), [1]);
        assert_eq!(choose(105 * MIB, &all), [1, 0]);
        assert_eq!(choose(1000 * MIB, &all), [1, 0, 2]);
        assert_eq!(choose(1, &[]), [] as [usize; 0]);
    }
}
