//! Whether a module may be compiled with inlining.
//!
//! wasmtime's inliner goes from the callees to their callers and takes in every call as long as
//! caller and callee together have no more than [`MAX_VALUES`] SSA values. Recursion is left alone.
//! The unit is blind to code that makes no values: 64 functions that each call the next one twice
//! have none, and are unfolded into 2^64 calls, until memory ends. So this plays the same game
//! beforehand, and gives every function values of its own where they are needed as a brake.
//!
//! Measured (V8's time on Node 20 divided by ours, medians, two cores): gofmt 0.94 to 0.96 without
//! and 1.02 to 1.03 with inlining, oniguruma 0.76 either way; so it is on wherever it passes. Not in
//! small modules: inlined functions have no frame in the stack of a trap, and there one reads them.

use std::ops::Range;

use super::scan::Sites;

/// wasmtime's `inlining_sum_size_threshold`.
const MAX_VALUES: u32 = 2000;
/// A function gets a value more for so many bytes of it. They are constants that nobody uses, which
/// the compiler removes after inlining.
///
/// So dense that they also keep the inliner from what does not pay: gofmt runs as fast with one for 4
/// or 16 bytes or none, but its machine code grows to 1.7 times its size instead of 2.5 times.
const BYTES_PER_PAD: usize = 2;

/// Bytes of code that inlining may make of a module's: so many times what it was ...
const MAX_GROWTH: u64 = 3;
/// ... or this, if it is more ...
const ALWAYS_ALLOWED: u64 = 64 << 10;
/// ... but never more than this: the compiler has all functions in memory at once, which takes
/// about 350 bytes for one.
const MAX_CODE: u64 = 1 << 20;
/// The same, if all estimates were wrong and only the values that functions are given did count:
/// what a module made for this purpose can cost.
const MAX_CODE_AT_WORST: u64 = 4 << 20;

/// What to do about inlining.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inlining {
    /// Too much would come of it, or nothing that is worth the frames which inlined functions are
    /// missing in the stacks of traps.
    Refused,
    /// Every function must get [`pads`].
    Padded,
}

/// A poll is at least so many values: two constants, an address that is extended and added to a base.
pub(super) const VALUES_PER_POLL: usize = 4;

/// Values that a function of so many bytes gets. Its polls are a brake as well: counted on top, they
/// would keep the inliner from what it does without them.
pub(super) fn pads(bytes: usize, polls: usize) -> usize {
    // With more it is not inlined and nothing into it, anyway.
    let values = (1 + bytes / BYTES_PER_PAD).min(MAX_VALUES as usize);
    values.saturating_sub(VALUES_PER_POLL * polls)
}

/// A function as the inliner sees it.
pub(super) struct Function {
    pub(super) bytes: usize,
    /// Without those of polls.
    pub(super) values: u32,
    pub(super) polls: usize,
    /// Its part of [`Sites::calls`].
    pub(super) calls: Range<usize>,
}

/// Code and values of a function after inlining.
#[derive(Clone, Copy, Default)]
struct Inlined {
    values: u32,
    /// As estimated, if only values put in are counted, and if everything is inlined.
    bytes: u64,
    at_worst: u64,
    if_all: u64,
}

/// Looks through the calls of a module whose first defined function has the index `imported`.
pub(super) fn plan(functions: &[Function], sites: &Sites, imported: usize) -> Inlining {
    let calls = |function: usize| {
        let range = functions[function].calls.clone();
        let calls = sites.calls.get(range).unwrap_or_default();
        calls.iter().filter_map(|callee| {
            let callee = (*callee as usize).checked_sub(imported)?;
            (callee < functions.len()).then_some(callee)
        })
    };
    let original: u64 = functions.iter().map(|f| f.bytes as u64).sum();
    if original > MAX_CODE {
        return Inlining::Refused;
    }
    let (order, component) = components(functions.len(), calls);
    let mut inlined = vec![Inlined::default(); functions.len()];
    let (mut bytes, mut at_worst, mut if_all) = (0_u64, 0_u64, 0_u64);
    for function in order {
        let own = &functions[function];
        let brake = (pads(own.bytes, own.polls) + VALUES_PER_POLL * own.polls) as u32;
        let mut sum = Inlined {
            values: own.values.saturating_add(brake),
            bytes: own.bytes as u64,
            at_worst: own.bytes as u64,
            if_all: own.bytes as u64,
        };
        for callee in calls(function) {
            if component[callee] == component[function] {
                continue;
            }
            let callee = inlined[callee];
            sum.if_all = sum.if_all.saturating_add(callee.if_all);
            sum.at_worst = sum.at_worst.saturating_add(callee.at_worst);
            let values = sum.values.saturating_add(callee.values);
            if values <= MAX_VALUES {
                sum.values = values;
                sum.bytes = sum.bytes.saturating_add(callee.bytes);
            }
        }
        // What is inlined has, pads and polls alone, a value for every so many bytes, and values have a limit.
        let room = u64::from(MAX_VALUES.saturating_sub(brake)) * BYTES_PER_PAD as u64;
        sum.at_worst = sum.at_worst.min(own.bytes as u64 + room);
        inlined[function] = sum;
        bytes = bytes.saturating_add(sum.bytes);
        at_worst = at_worst.saturating_add(sum.at_worst);
        if_all = if_all.saturating_add(sum.if_all);
    }
    let allowed = (original * MAX_GROWTH).clamp(ALWAYS_ALLOWED, MAX_CODE);
    if if_all > ALWAYS_ALLOWED && bytes <= allowed && at_worst <= MAX_CODE_AT_WORST {
        Inlining::Padded
    } else {
        Inlining::Refused
    }
}

/// The functions with callees before callers, and for each by position which strongly connected
/// component it is in (Tarjan's algorithm, without recursion).
fn components<I: Iterator<Item = usize>>(
    count: usize,
    calls: impl Fn(usize) -> I,
) -> (Vec<usize>, Vec<u32>) {
    const NONE: u32 = u32::MAX;
    let mut order = Vec::with_capacity(count);
    let mut component = vec![NONE; count];
    let mut index = vec![NONE; count];
    let mut low = vec![NONE; count];
    let mut pending = Vec::new();
    let mut open = Vec::new();
    let (mut next_index, mut next_component) = (0, 0);
    for root in 0..count {
        if index[root] != NONE {
            continue;
        }
        open.push((root, None));
        while let Some((function, rest)) = open.last_mut() {
            let function = *function;
            let rest = rest.get_or_insert_with(|| {
                index[function] = next_index;
                low[function] = next_index;
                next_index += 1;
                pending.push(function);
                calls(function)
            });
            if let Some(callee) = rest.next() {
                if index[callee] == NONE {
                    open.push((callee, None));
                } else if component[callee] == NONE {
                    low[function] = low[function].min(index[callee]);
                }
                continue;
            }
            open.pop();
            if let Some((caller, _)) = open.last() {
                low[*caller] = low[*caller].min(low[function]);
            }
            if low[function] == index[function] {
                while let Some(member) = pending.pop() {
                    component[member] = next_component;
                    order.push(member);
                    if member == function {
                        break;
                    }
                }
                next_component += 1;
            }
        }
    }
    (order, component)
}

#[cfg(test)]
#[path = "inline_tests.rs"]
mod tests;
