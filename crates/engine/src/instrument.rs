//! Splicing safepoint polls into a module before it is compiled.
//!
//! A poll is a store of zero to the first bytes of one extra memory, the *poll memory*, which is
//! appended behind all others so that no index moves and which nothing but polls can name. Its page
//! is ours (see [`crate::memory::PollPage`]): taking it away makes the next poll trap.
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
//! - where calls fan out so much that more than [`MAX_WEIGHT`] bytes of code could run without a
//!   poll.
//!
//! So whatever a guest does, it reaches a poll soon, unless it sits in one bulk-memory operation or
//! in the host.
//!
//! Sections are copied as they are; only the memory and code sections are touched. There is hardly
//! any validation here: what is not understood is refused as malformed, and the compiler validates
//! the result. But since the result has a memory more than the original, an original that names this
//! memory would pass: so every mention of a memory is checked here.

use std::borrow::Cow;
use std::ops::Range;

use wasm_encoder::{Encode, RawSection, Section};
use wasmparser::{
    BinaryReader, DataKind, ExternalKind, FunctionBody, KnownCustom, Name, Parser, Payload,
    TypeRef, WasmFeatures,
};

use inline::{Function, Inlining};
use scan::{Site, Sites, scan};

mod inline;
mod scan;
#[cfg(test)]
mod tests;

/// Bytes of code that calls may run one after the other without a poll: less than a millisecond.
const MAX_WEIGHT: u64 = 1 << 20;
/// `i32.const 0, drop`.
const PAD: [u8; 3] = [0x41, 0x00, 0x1a];
/// What the validator allows (`wasmparser`'s own limits, which it does not export).
const MAX_MEMORIES: usize = 100;
const MAX_FUNCTION_BYTES: usize = 7_654_321;

/// What to do to a module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InstrumentOptions {
    /// Insert polls; otherwise the module is only looked through.
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
fn unknown_memory(index: u32, offset: usize) -> InstrumentError {
    InstrumentError::Malformed {
        offset,
        message: format!("unknown memory {index}"),
    }
}

type Result<T> = std::result::Result<T, InstrumentError>;

/// Looks a module through and, if asked, makes it interruptible.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "options grow")]
pub(crate) fn instrument<'a>(
    wasm: &'a [u8],
    options: &InstrumentOptions,
) -> Result<Instrumented<'a>> {
    check_header(wasm)?;
    let mut seen = Seen::read(wasm)?;
    if options.polls {
        seen.calls().poll();
    }
    let has_poll_memory = options.polls && seen.sites.found.iter().any(|site| site.is_polled());
    let inlining = if options.inlining {
        inline::plan(&seen.functions(), &seen.sites, seen.imported_functions)
    } else {
        Inlining::Refused
    };
    let pads = inlining == Inlining::Padded;
    let bytes = if has_poll_memory || pads {
        let additions = Additions {
            poll_memory: has_poll_memory,
            pads,
        };
        Cow::Owned(splice(&seen, additions)?)
    } else {
        Cow::Borrowed(wasm)
    };
    Ok(Instrumented {
        bytes,
        name: seen.name,
        memories: seen.memories,
        has_poll_memory,
        inlining: inlining != Inlining::Refused,
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

/// A section as it stands in the module, or the code section taken apart.
enum Piece<'a> {
    Raw { id: u8, data: &'a [u8] },
    Memories { count: u32, data: &'a [u8] },
    Code,
}

/// A function body.
struct Body<'a> {
    bytes: &'a [u8],
    /// Where `bytes` begins in the module.
    start: usize,
    /// Its part of what was found.
    sites: Range<usize>,
    /// Its part of all calls.
    calls: Range<usize>,
    values: u32,
}

/// What one pass over a module finds.
#[derive(Default)]
struct Seen<'a> {
    pieces: Vec<Piece<'a>>,
    bodies: Vec<Body<'a>>,
    sites: Sites,
    imported_functions: usize,
    name: Option<String>,
    memories: Vec<MemoryInfo>,
}

impl<'a> Seen<'a> {
    fn read(wasm: &'a [u8]) -> Result<Self> {
        let mut seen = Self::default();
        let mut parser = Parser::new(0);
        parser.set_features(WasmFeatures::all());
        for payload in parser.parse_all(wasm) {
            let payload = payload?;
            let section = payload.as_section();
            match payload {
                Payload::ImportSection(reader) => {
                    for import in reader.into_imports() {
                        seen.import(import?.ty);
                    }
                }
                Payload::MemorySection(reader) => {
                    let count = reader.count();
                    for ty in reader.clone() {
                        seen.memories.push(MemoryInfo::new(false, &ty?));
                    }
                    let data = wasm.get(reader.range()).unwrap_or_default();
                    seen.pieces.push(Piece::Memories {
                        count,
                        data: after_count(data)?,
                    });
                    continue;
                }
                Payload::ExportSection(reader) => {
                    for item in reader.into_iter_with_offsets() {
                        let (offset, export) = item?;
                        if matches!(export.kind, ExternalKind::Memory) {
                            seen.names_memory(export.index, offset)?;
                        }
                    }
                }
                Payload::DataSection(reader) => {
                    for item in reader.into_iter_with_offsets() {
                        let (offset, data) = item?;
                        if let DataKind::Active { memory_index, .. } = data.kind {
                            seen.names_memory(memory_index, offset)?;
                        }
                    }
                }
                Payload::CodeSectionStart { .. } => {
                    seen.sites.memories = seen.memories.len() as u32;
                    seen.pieces.push(Piece::Code);
                    continue;
                }
                Payload::CodeSectionEntry(body) => {
                    seen.body(&body)?;
                    continue;
                }
                Payload::CustomSection(custom) => {
                    if let KnownCustom::Name(names) = custom.as_known() {
                        // A damaged name section is no reason to refuse a module.
                        seen.name = names.into_iter().find_map(|name| match name {
                            Ok(Name::Module { name, .. }) => Some(name.to_owned()),
                            _ => None,
                        });
                    }
                    if names_code_offsets(custom.name()) {
                        continue;
                    }
                }
                _ => {}
            }
            if let Some((id, range)) = section {
                let data = wasm.get(range).unwrap_or_default();
                seen.pieces.push(Piece::Raw { id, data });
            }
        }
        Ok(seen)
    }

    fn import(&mut self, ty: TypeRef) {
        match ty {
            TypeRef::Func(_) | TypeRef::FuncExact(_) => self.imported_functions += 1,
            TypeRef::Memory(ty) => self.memories.push(MemoryInfo::new(true, &ty)),
            _ => {}
        }
    }

    /// Refuses an index that is not of one of the module's own memories.
    fn names_memory(&self, index: u32, offset: usize) -> Result<()> {
        if index as usize >= self.memories.len() {
            return Err(unknown_memory(index, offset));
        }
        Ok(())
    }

    fn calls(&mut self) -> CallGraph<'_> {
        CallGraph {
            imported: self.imported_functions,
            bodies: &self.bodies,
            sites: &mut self.sites.found,
        }
    }

    fn functions(&self) -> Vec<Function> {
        let polls = |body: &Body<'_>| {
            let sites = self.sites.found.get(body.sites.clone());
            sites.map_or(0, |sites| sites.iter().filter(|s| s.is_polled()).count())
        };
        self.bodies
            .iter()
            .map(|body| Function {
                bytes: body.bytes.len(),
                values: body.values,
                polls: polls(body),
                calls: body.calls.clone(),
            })
            .collect()
    }

    fn body(&mut self, body: &FunctionBody<'a>) -> Result<()> {
        let before = self.sites.found.len();
        let calls_before = self.sites.calls.len();
        scan(body, &mut self.sites)?;
        self.bodies.push(Body {
            bytes: body.as_bytes(),
            start: body.range().start,
            sites: before..self.sites.found.len(),
            calls: calls_before..self.sites.calls.len(),
            values: self.sites.values,
        });
        Ok(())
    }
}

/// The items of a section, without their count.
fn after_count(data: &[u8]) -> Result<&[u8]> {
    let mut reader = BinaryReader::new(data, 0);
    reader.read_var_u32()?;
    Ok(data.get(reader.current_position()..).unwrap_or_default())
}

/// Whether a custom section speaks of places in the code, which polls move.
fn names_code_offsets(name: &str) -> bool {
    name.starts_with(".debug_")
        || name.starts_with("reloc.")
        || name.starts_with("metadata.code.")
        || matches!(name, "linking" | "sourceMappingURL" | "external_debug_info")
}

/// Who calls whom by index, outside of loops.
struct CallGraph<'a> {
    /// Imported functions come first in the index space and are none of our business.
    imported: usize,
    bodies: &'a [Body<'a>],
    sites: &'a mut [Site],
}

/// How far the walk has got with a function.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
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
    fn poll(&mut self) {
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
        let own = self
            .bodies
            .get(function)
            .map_or(0, |body| body.bytes.len() as u64);
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

/// What to put into a module.
#[derive(Clone, Copy)]
struct Additions {
    /// The poll memory and the polls.
    poll_memory: bool,
    /// See [`inline::pads`].
    pads: bool,
}

/// Writes the module anew.
fn splice(seen: &Seen<'_>, additions: Additions) -> Result<Vec<u8>> {
    if additions.poll_memory && seen.memories.len() >= MAX_MEMORIES {
        return Err(InstrumentError::NoRoom {
            what: format!("it has {MAX_MEMORIES} memories"),
        });
    }
    let poll = if additions.poll_memory {
        poll_code(seen.memories.len() as u32)
    } else {
        Vec::new()
    };
    let mut out = wasm_encoder::Module::HEADER.to_vec();
    let mut has_memories = !additions.poll_memory;
    for piece in &seen.pieces {
        match piece {
            // An extension point: exports of hidden globals go into section 7 here.
            Piece::Raw { id, data } => {
                if !has_memories && comes_after_memories(*id) {
                    append_memories(&mut out, 0, &[])?;
                    has_memories = true;
                }
                append_raw(&mut out, *id, data);
            }
            Piece::Memories { count, data } if !additions.poll_memory => {
                let mut items = Vec::with_capacity(data.len() + 5);
                count.encode(&mut items);
                items.extend_from_slice(data);
                append_raw(&mut out, wasm_encoder::SectionId::Memory.into(), &items);
            }
            Piece::Memories { count, data } => {
                append_memories(&mut out, *count, data)?;
                has_memories = true;
            }
            Piece::Code => {
                if !has_memories {
                    append_memories(&mut out, 0, &[])?;
                    has_memories = true;
                }
                append_code(&mut out, seen, &poll, additions.pads)?;
            }
        }
    }
    Ok(out)
}

/// `i32.const 0, i32.const 0, i32.store (memory n)`: leaves the stack as it was, wherever it
/// stands.
fn poll_code(memory: u32) -> Vec<u8> {
    let mut code = Vec::with_capacity(12);
    let argument = wasm_encoder::MemArg {
        offset: 0,
        align: 2,
        memory_index: memory,
    };
    wasm_encoder::InstructionSink::new(&mut code)
        .i32_const(0)
        .i32_const(0)
        .i32_store(argument);
    code
}

fn comes_after_memories(id: u8) -> bool {
    // Custom, type, import, function and table sections may stand before it.
    id > 4
}

fn append_raw(out: &mut Vec<u8>, id: u8, data: &[u8]) {
    RawSection { id, data }.append_to(out);
}

fn append_memories(out: &mut Vec<u8>, count: u32, items: &[u8]) -> Result<()> {
    let no_room = || InstrumentError::NoRoom {
        what: format!("it has {count} memories"),
    };
    let mut data = Vec::with_capacity(items.len() + 8);
    count.checked_add(1).ok_or_else(no_room)?.encode(&mut data);
    data.extend_from_slice(items);
    // Exactly one page: its address is then a constant of the instance, and no check is compiled.
    let ty = wasm_encoder::MemoryType {
        minimum: 1,
        maximum: Some(1),
        memory64: false,
        shared: false,
        page_size_log2: None,
    };
    ty.encode(&mut data);
    append_raw(out, wasm_encoder::SectionId::Memory.into(), &data);
    Ok(())
}

fn append_code(out: &mut Vec<u8>, seen: &Seen<'_>, poll: &[u8], pads: bool) -> Result<()> {
    let polls = seen
        .sites
        .found
        .iter()
        .filter(|site| site.is_polled())
        .count();
    let code: usize = seen.bodies.iter().map(|body| body.bytes.len() + 5).sum();
    let mut data = Vec::with_capacity(code + polls * poll.len() + 5);
    (seen.bodies.len() as u32).encode(&mut data);
    for body in &seen.bodies {
        let sites = seen.sites.found.get(body.sites.clone()).unwrap_or_default();
        let entry = sites.first().map_or(body.start, |entry| entry.at);
        let sites = sites.iter().filter(|site| site.is_polled());
        let polls = sites.clone().count();
        let pads = if pads {
            inline::pads(body.bytes.len(), polls)
        } else {
            0
        };
        let size = body.bytes.len() + polls * poll.len() + pads * PAD.len();
        if size > MAX_FUNCTION_BYTES && body.bytes.len() <= MAX_FUNCTION_BYTES {
            return Err(InstrumentError::NoRoom {
                what: format!(
                    "the function at byte {} has {} bytes",
                    body.start,
                    body.bytes.len()
                ),
            });
        }
        (size as u32).encode(&mut data);
        data.extend_from_slice(part(body, body.start, entry));
        data.extend((0..pads).flat_map(|_| PAD));
        let mut copied = entry;
        for site in sites {
            data.extend_from_slice(part(body, copied, site.at));
            data.extend_from_slice(poll);
            copied = site.at;
        }
        data.extend_from_slice(part(body, copied, body.start + body.bytes.len()));
    }
    append_raw(out, wasm_encoder::SectionId::Code.into(), &data);
    Ok(())
}

/// The bytes of a body between two offsets in the module.
fn part<'a>(body: &Body<'a>, from: usize, to: usize) -> &'a [u8] {
    body.bytes
        .get(from - body.start..to - body.start)
        .unwrap_or_default()
}
