//! Splicing into a module, before it is compiled, what makes it interruptible and its state
//! reachable. The second is in [`state`]; this is about the first, which are safepoint polls.
//!
//! A poll is a store of zero to the first bytes of one extra memory, the *poll memory*, which is
//! appended behind all others so that no index moves and which nothing but polls can name. Its page
//! is ours (see [`crate::instance::memory::PollPage`]): taking it away makes the next poll trap.
//!
//! It has to be a **store**. A load would be removed by the compiler's redundant-load elimination
//! wherever another poll dominates it with no call between, which is to say in every inner loop. A
//! store inside a loop always differs from the one before it, wherever in the loop it stands.
//!
//! Polls stand
//! - in every loop: behind its header, or, where it calls nothing, where it branches back (see
//!   [`scan::Sites`]),
//! - before every indirect call outside of loops (tail calls too),
//! - at the entry of enough functions that no cycle of direct calls outside of loops is without one,
//! - where calls fan out so much that more than [`calls::MAX_WEIGHT`] bytes of code could run without a
//!   poll.
//!
//! So whatever a guest does, it reaches a poll soon, unless it sits in one bulk-memory operation or
//! in the host.
//!
//! Sections are copied as they are, with something appended; only the code and, where it has active
//! segments, the data section are written anew. There is hardly any validation here: what is not
//! understood is refused as malformed, and the compiler validates the result. But since the result
//! has memories, types, functions, globals and data segments that the original has not, an original
//! that names these would pass: so every mention of such an index is checked here, and so is what
//! the result shows no more (the order of sections, the type of the start function, the offsets of
//! data segments).

use std::borrow::Cow;

use wasmparser::ExternalKind;

use inline::Inlining;
use seen::Seen;
use splice::{Additions, splice};
pub(crate) use state::StateMap;

mod calls;
mod inline;
mod scan;
mod section;
mod seen;
mod splice;
mod state;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;

/// What to do to a module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InstrumentOptions {
    /// Insert polls.
    pub(crate) polls: bool,
    /// Prepare for a compiler that inlines, if that is safe; otherwise inlining is refused.
    pub(crate) inlining: bool,
}

/// A module ready to compile, and what was seen in it.
#[derive(Debug)]
pub(crate) struct Instrumented<'a> {
    /// The module; the original bytes where nothing had to change.
    pub(crate) bytes: Cow<'a, [u8]>,
    /// From the name section.
    pub(crate) name: Option<String>,
    /// The guest's memories in the order of their indices: imported ones first. Without the poll
    /// memory.
    pub(crate) memories: Vec<MemoryInfo>,
    /// Whether the poll memory was appended. Not if the module has no place that needs a poll: it
    /// always ends soon.
    pub(crate) has_poll_memory: bool,
    /// Whether it may be compiled with inlining.
    pub(crate) inlining: bool,
    /// Where its state is.
    pub(crate) state: StateMap,
    /// Where the guest's own exports are, in their order.
    pub(crate) exports: Vec<Place>,
    /// It names exception tags.
    pub(crate) has_tags: bool,
    /// Custom sections: names and contents, in their order.
    pub(crate) customs: Vec<(&'a str, &'a [u8])>,
}

/// An index in one of a module's index spaces, imports first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) kind: ExternalKind,
    pub(crate) index: u32,
}

impl Instrumented<'_> {
    /// How many of the memories the module defines itself.
    pub(crate) fn defined_memories(&self) -> usize {
        self.memories.iter().filter(|m| !m.imported).count()
    }
}

/// The type of a memory, as the module declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryInfo {
    pub(crate) imported: bool,
    /// In pages, as is the maximum.
    pub(crate) minimum: u64,
    pub(crate) maximum: Option<u64>,
    pub(crate) shared: bool,
    pub(crate) memory64: bool,
    pub(crate) page_size_log2: u32,
}

impl MemoryInfo {
    fn new(imported: bool, ty: &wasmparser::MemoryType) -> Self {
        Self {
            imported,
            minimum: ty.initial,
            maximum: ty.maximum,
            shared: ty.shared,
            memory64: ty.memory64,
            page_size_log2: ty.page_size_log2.unwrap_or(16),
        }
    }
}

/// Why a module cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InstrumentError {
    /// Not WebAssembly at all.
    #[error(
        "these bytes are no WebAssembly module: they begin with {} and not with 00 61 73 6d",
        hex(first)
    )]
    NotWasm {
        /// The first bytes, 8 at most.
        first: Vec<u8>,
    },
    /// A component.
    #[error("this is a WebAssembly component, not a core module")]
    Component,
    /// The encoding of exceptions that was given up.
    #[error(
        "the module uses the legacy encoding of exception handling (found at byte {offset}), which this engine does not run; \
         translate it with `wasm-opt --translate-to-exnref`, or build it for the final encoding"
    )]
    LegacyExceptions {
        /// Where the first such instruction is.
        offset: usize,
    },
    /// Neither we nor the compiler can read it.
    #[error("the module is malformed at byte {offset}: {message}")]
    Malformed {
        /// Where.
        offset: usize,
        /// What.
        message: String,
    },
    /// It is so close to a limit of the format that polls do not fit in.
    #[error("the module has no room for interruption: {what}; set engine.interruptible: false")]
    NoRoom {
        /// The limit that would be exceeded.
        what: String,
    },
}

fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    if digits.is_empty() {
        "nothing".into()
    } else {
        digits.join(" ")
    }
}

impl From<wasmparser::Error> for InstrumentError {
    fn from(error: wasmparser::Error) -> Self {
        Self::Malformed {
            offset: error.offset(),
            message: error.message().to_owned(),
        }
    }
}

/// In the validator's words.
fn malformed(message: &str, offset: usize) -> InstrumentError {
    InstrumentError::Malformed {
        offset,
        message: message.into(),
    }
}

type Result<T> = std::result::Result<T, InstrumentError>;

/// Looks a module through, makes its state reachable and, if asked, makes it interruptible.
///
/// Who instantiates the result has to call what [`StateMap::init`] and [`StateMap::start`] name.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "options grow")]
pub(crate) fn instrument<'a>(
    wasm: &'a [u8],
    options: &InstrumentOptions,
) -> Result<Instrumented<'a>> {
    check_header(wasm)?;
    let mut seen = Seen::read(wasm)?;
    let plan = state::plan(&seen)?;
    if options.polls {
        seen.calls(&plan).poll();
    }
    let has_poll_memory = options.polls && seen.sites.found.iter().any(|site| site.is_polled());
    let inlining = if options.inlining {
        inline::plan(&seen.functions(&plan), &seen.sites, seen.imported_functions)
    } else {
        Inlining::Refused
    };
    let pads = inlining == Inlining::Padded;
    let bytes = if has_poll_memory || pads || !plan.is_empty() {
        let additions = Additions {
            poll_memory: has_poll_memory,
            pads,
            state: &plan,
        };
        Cow::Owned(splice(&seen, &additions)?)
    } else {
        Cow::Borrowed(wasm)
    };
    Ok(Instrumented {
        bytes,
        name: seen.name,
        memories: seen.memories,
        has_poll_memory,
        inlining: inlining != Inlining::Refused,
        state: plan.map,
        exports: seen.exports,
        has_tags: seen.has_tags,
        customs: seen.customs,
    })
}

fn check_header(wasm: &[u8]) -> Result<()> {
    match wasm {
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => Err(InstrumentError::Component),
        [0, b'a', b's', b'm', ..] => Ok(()),
        _ => Err(InstrumentError::NotWasm {
            first: wasm.iter().take(8).copied().collect(),
        }),
    }
}
