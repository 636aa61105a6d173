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
//! - where calls fan out so much that more than [`MAX_WEIGHT`] bytes of code could run without a
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
use std::collections::BTreeSet;
use std::ops::Range;

use wasm_encoder::{Encode, RawSection, Section};
use wasmparser::{
    BinaryReader, CompositeInnerType, ConstExpr, DataKind, ElementItems, ElementKind, ExternalKind,
    FunctionBody, GlobalType, KnownCustom, Name, Operator, Parser, Payload, SubType, TableInit,
    TableType, TypeRef, ValType, WasmFeatures,
};

use inline::{Function, Inlining};
use scan::{Declared, Site, Sites, Space, check_mentions, scan};
pub(crate) use state::StateMap;
use state::{Described, Items, Plan};

mod inline;
mod scan;
mod state;
#[cfg(test)]
mod state_tests;
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

/// A section as it stands in the module.
struct Piece<'a> {
    id: u8,
    data: &'a [u8],
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
    /// Its part of all rare instructions.
    rares: Range<usize>,
    values: u32,
}

/// A data segment.
struct Segment<'a> {
    active: Option<Active<'a>>,
    bytes: &'a [u8],
}

/// Where an active segment goes.
struct Active<'a> {
    memory: u32,
    /// Code that puts the offset on the stack, without its end.
    offset: &'a [u8],
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
    types: Vec<Described>,
    /// The types of all functions, imported ones first.
    functions: Vec<u32>,
    /// With whether they are imported.
    tables: Vec<(TableType, bool)>,
    globals: Vec<GlobalType>,
    data: Vec<Segment<'a>>,
    data_count: Option<u32>,
    start: Option<u32>,
    /// The functions that are named outside of code, again and again maybe: what is exported, and
    /// what may become a funcref.
    mentioned: Vec<u32>,
    /// What hidden exports must not be called.
    taken_numbers: BTreeSet<u64>,
    exports: Vec<Place>,
    has_tags: bool,
    customs: Vec<(&'a str, &'a [u8])>,
}

impl<'a> Seen<'a> {
    fn read(wasm: &'a [u8]) -> Result<Self> {
        let mut seen = Self::default();
        let mut declared = Declared::default();
        let mut last_rank = None;
        let mut parser = Parser::new(0);
        parser.set_features(WasmFeatures::all());
        for payload in parser.parse_all(wasm) {
            let payload = payload?;
            if let Payload::CodeSectionEntry(body) = payload {
                seen.body(&body, &declared)?;
                continue;
            }
            if let Payload::CustomSection(custom) = &payload {
                seen.customs.push((custom.name(), custom.data()));
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
            let Some((id, range)) = payload.as_section() else {
                continue;
            };
            if let Some(rank) = rank(id) {
                if last_rank >= Some(rank) {
                    return Err(malformed("section out of order", range.start));
                }
                last_rank = Some(rank);
            }
            let data = wasm.get(range).unwrap_or_default();
            seen.pieces.push(Piece { id, data });
            seen.section(payload, &mut declared)?;
        }
        Ok(seen)
    }

    /// Looks through a section other than code.
    fn section(&mut self, payload: Payload<'a>, declared: &mut Declared) -> Result<()> {
        match payload {
            Payload::TypeSection(reader) => {
                for group in reader {
                    self.types.extend(group?.types().map(described));
                }
                declared.types = self.types.len() as u32;
            }
            Payload::ImportSection(reader) => {
                let at = reader.range().start;
                for import in reader.into_imports() {
                    self.import(import?.ty, at, declared)?;
                }
                self.count(declared);
            }
            Payload::FunctionSection(reader) => {
                for item in reader.into_iter_with_offsets() {
                    let (offset, ty) = item?;
                    declared.check(Space::Type, ty, offset)?;
                    self.functions.push(ty);
                }
                self.count(declared);
            }
            Payload::TableSection(reader) => {
                for item in reader.into_iter_with_offsets() {
                    let (offset, table) = item?;
                    declared.check_type(ValType::Ref(table.ty.element_type), offset)?;
                    self.tables.push((table.ty, false));
                    if let TableInit::Expr(expr) = table.init {
                        self.expression(&expr, declared)?;
                    }
                }
                self.count(declared);
            }
            Payload::MemorySection(reader) => {
                for ty in reader {
                    self.memories.push(MemoryInfo::new(false, &ty?));
                }
                self.count(declared);
            }
            Payload::TagSection(reader) => {
                self.has_tags |= reader.count() > 0;
                for item in reader.into_iter_with_offsets() {
                    let (offset, ty) = item?;
                    declared.check(Space::Type, ty.func_type_idx, offset)?;
                }
            }
            Payload::GlobalSection(reader) => {
                for item in reader.into_iter_with_offsets() {
                    let (offset, global) = item?;
                    declared.check_type(global.ty.content_type, offset)?;
                    self.expression(&global.init_expr, declared)?;
                    self.globals.push(global.ty);
                    self.count(declared);
                }
            }
            Payload::ExportSection(reader) => {
                for item in reader.into_iter_with_offsets() {
                    let (offset, export) = item?;
                    self.taken_numbers.extend(state::taken_number(export.name));
                    self.exports.push(Place {
                        kind: match export.kind {
                            ExternalKind::FuncExact => ExternalKind::Func,
                            other => other,
                        },
                        index: export.index,
                    });
                    match export.kind {
                        ExternalKind::Memory => {
                            declared.check(Space::Memory, export.index, offset)?;
                        }
                        ExternalKind::Global => {
                            declared.check(Space::Global, export.index, offset)?;
                        }
                        ExternalKind::Func | ExternalKind::FuncExact => {
                            declared.check(Space::Function, export.index, offset)?;
                            self.mentioned.push(export.index);
                        }
                        ExternalKind::Table | ExternalKind::Tag => {}
                    }
                }
            }
            Payload::StartSection { func, range } => self.start(func, range.start, declared)?,
            Payload::ElementSection(reader) => self.elements(reader, declared)?,
            Payload::DataCountSection { count, .. } => {
                self.data_count = Some(count);
                declared.data = Some(count);
            }
            Payload::DataSection(reader) => {
                for item in reader.into_iter_with_offsets() {
                    let (offset, data) = item?;
                    self.segment(data, offset, declared)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes what there is so far.
    fn count(&self, declared: &mut Declared) {
        declared.memories = self.memories.len() as u32;
        declared.functions = self.functions.len() as u32;
        declared.globals = self.globals.len() as u32;
        let tables = self.tables.iter().skip(declared.may_grow.len());
        declared
            .may_grow
            .extend(tables.map(|(ty, _)| state::may_grow(ty)));
    }

    fn import(&mut self, ty: TypeRef, offset: usize, declared: &Declared) -> Result<()> {
        match ty {
            TypeRef::Func(ty) | TypeRef::FuncExact(ty) => {
                declared.check(Space::Type, ty, offset)?;
                self.imported_functions += 1;
                self.functions.push(ty);
            }
            TypeRef::Memory(ty) => self.memories.push(MemoryInfo::new(true, &ty)),
            TypeRef::Table(ty) => {
                declared.check_type(ValType::Ref(ty.element_type), offset)?;
                self.tables.push((ty, true));
            }
            TypeRef::Global(ty) => {
                declared.check_type(ty.content_type, offset)?;
                self.globals.push(ty);
            }
            TypeRef::Tag(ty) => {
                self.has_tags = true;
                declared.check(Space::Type, ty.func_type_idx, offset)?;
            }
        }
        Ok(())
    }

    /// Looks through a constant expression.
    fn expression(&mut self, expr: &ConstExpr<'_>, declared: &Declared) -> Result<()> {
        let mut operators = expr.get_operators_reader();
        while !operators.eof() {
            let at = operators.original_position();
            let operator = operators.read()?;
            check_mentions(&operator, declared, at)?;
            if let Operator::RefFunc { function_index } = operator {
                self.mentioned.push(function_index);
            }
        }
        Ok(())
    }

    fn start(&mut self, index: u32, offset: usize, declared: &mut Declared) -> Result<()> {
        declared.check(Space::Function, index, offset)?;
        let ty = self.functions.get(index as usize);
        let described = ty.and_then(|ty| self.types.get(*ty as usize));
        if described != Some(&Described::Function { is_plain: true }) {
            return Err(malformed("invalid start function type", offset));
        }
        self.start = Some(index);
        declared.start = Some(index);
        Ok(())
    }

    fn elements(
        &mut self,
        reader: wasmparser::ElementSectionReader<'a>,
        declared: &Declared,
    ) -> Result<()> {
        for item in reader.into_iter_with_offsets() {
            let (offset, element) = item?;
            if let ElementKind::Active { offset_expr, .. } = &element.kind {
                self.expression(offset_expr, declared)?;
            }
            match element.items {
                ElementItems::Functions(functions) => {
                    self.mentioned.reserve(functions.count() as usize);
                    for function in functions {
                        let function = function?;
                        declared.check(Space::Function, function, offset)?;
                        self.mentioned.push(function);
                    }
                }
                ElementItems::Expressions(ty, expressions) => {
                    declared.check_type(ValType::Ref(ty), offset)?;
                    for expr in expressions {
                        self.expression(&expr?, declared)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn segment(
        &mut self,
        data: wasmparser::Data<'a>,
        offset: usize,
        declared: &Declared,
    ) -> Result<()> {
        let active = match data.kind {
            DataKind::Passive => None,
            DataKind::Active {
                memory_index: memory,
                offset_expr,
            } => {
                declared.check(Space::Memory, memory, offset)?;
                let offset = self.offset(&offset_expr, declared)?;
                Some(Active { memory, offset })
            }
        };
        self.data.push(Segment {
            active,
            bytes: data.data,
        });
        Ok(())
    }

    /// The code of a segment's offset, which must be constant: its new place in a function would allow
    /// more.
    fn offset(&self, expr: &ConstExpr<'a>, declared: &Declared) -> Result<&'a [u8]> {
        let mut operators = expr.get_operators_reader();
        let start = operators.original_position();
        let mut end = start;
        while !operators.eof() {
            end = operators.original_position();
            let operator = operators.read()?;
            check_mentions(&operator, declared, end)?;
            let is_constant = match operator {
                Operator::GlobalGet { global_index } => {
                    let global = self.globals.get(global_index as usize);
                    global.is_some_and(|ty| !ty.mutable)
                }
                Operator::End => operators.eof(),
                _ => is_constant_number(&operator),
            };
            if !is_constant {
                return Err(malformed("constant expression required", end));
            }
        }
        let mut bytes = expr.get_binary_reader();
        Ok(bytes.read_bytes(end - start)?)
    }

    /// Whether it is a data segment that was passive all along.
    fn is_passive(&self, segment: u32) -> bool {
        self.data
            .get(segment as usize)
            .is_some_and(|segment| segment.active.is_none())
    }

    fn calls(&mut self, plan: &Plan) -> CallGraph<'_> {
        let own = |body: &Body<'_>| {
            let helpers = plan.helpers(body.rares.clone()) * state::BYTES_PER_HELPER;
            (body.bytes.len() + helpers) as u64
        };
        CallGraph {
            imported: self.imported_functions,
            own: self.bodies.iter().map(own).collect(),
            bodies: &self.bodies,
            sites: &mut self.sites.found,
        }
    }

    fn functions(&self, plan: &Plan) -> Vec<Function> {
        let polls = |body: &Body<'_>| {
            let sites = self.sites.found.get(body.sites.clone());
            sites.map_or(0, |sites| sites.iter().filter(|s| s.is_polled()).count())
        };
        // As if every helper were inlined.
        let helpers = |body: &Body<'_>| plan.helpers(body.rares.clone()) as u32;
        self.bodies
            .iter()
            .map(|body| Function {
                bytes: body.bytes.len(),
                values: body
                    .values
                    .saturating_add(helpers(body).saturating_mul(state::VALUES_PER_HELPER)),
                polls: polls(body),
                calls: body.calls.clone(),
            })
            .collect()
    }

    fn body(&mut self, body: &FunctionBody<'a>, declared: &Declared) -> Result<()> {
        let before = self.sites.found.len();
        let calls_before = self.sites.calls.len();
        let rares_before = self.sites.rares.len();
        scan(body, declared, &mut self.sites)?;
        self.bodies.push(Body {
            bytes: body.as_bytes(),
            start: body.range().start,
            sites: before..self.sites.found.len(),
            calls: calls_before..self.sites.calls.len(),
            rares: rares_before..self.sites.rares.len(),
            values: self.sites.values,
        });
        Ok(())
    }
}

fn described(ty: &SubType) -> Described {
    match &ty.composite_type.inner {
        CompositeInnerType::Func(ty) => Described::Function {
            is_plain: ty.params().is_empty() && ty.results().is_empty(),
        },
        CompositeInnerType::Array(_) | CompositeInnerType::Struct(_) => Described::Collected,
        CompositeInnerType::Cont(_) => Described::Continuation,
    }
}

/// Whether it may stand in a constant expression that makes a number.
fn is_constant_number(operator: &Operator<'_>) -> bool {
    matches!(
        operator,
        Operator::I32Const { .. }
            | Operator::I64Const { .. }
            | Operator::I32Add
            | Operator::I32Sub
            | Operator::I32Mul
            | Operator::I64Add
            | Operator::I64Sub
            | Operator::I64Mul
    )
}

/// The sections in their order.
const ORDER: [u8; 13] = [
    TYPE, IMPORT, FUNCTION, TABLE, MEMORY, TAG, GLOBAL, EXPORT, START, ELEMENT, DATA_COUNT, CODE,
    DATA,
];
const TYPE: u8 = 1;
const IMPORT: u8 = 2;
const FUNCTION: u8 = 3;
const TABLE: u8 = 4;
const MEMORY: u8 = 5;
const GLOBAL: u8 = 6;
const EXPORT: u8 = 7;
const START: u8 = 8;
const ELEMENT: u8 = 9;
const CODE: u8 = 10;
const DATA: u8 = 11;
const DATA_COUNT: u8 = 12;
const TAG: u8 = 13;

/// Where a section has its place among the others. Custom sections stand anywhere.
fn rank(id: u8) -> Option<usize> {
    ORDER.iter().position(|known| *known == id)
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
    /// Bytes of code of each function, with those of the helpers it calls.
    own: Vec<u64>,
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

/// What to put into a module.
struct Additions<'p> {
    /// The poll memory and the polls.
    poll_memory: bool,
    /// See [`inline::pads`].
    pads: bool,
    state: &'p Plan,
}

/// Writes the module anew.
fn splice(seen: &Seen<'_>, additions: &Additions<'_>) -> Result<Vec<u8>> {
    if additions.poll_memory && seen.memories.len() >= MAX_MEMORIES {
        return Err(InstrumentError::NoRoom {
            what: format!("it has {MAX_MEMORIES} memories"),
        });
    }
    let mut out = wasm_encoder::Module::HEADER.to_vec();
    let mut done = 0;
    for piece in &seen.pieces {
        let Some(rank) = rank(piece.id) else {
            append_raw(&mut out, piece.id, piece.data);
            continue;
        };
        for missing in ORDER.get(done..rank).unwrap_or_default() {
            append_section(&mut out, seen, additions, *missing, None)?;
        }
        append_section(&mut out, seen, additions, piece.id, Some(piece.data))?;
        done = rank + 1;
    }
    for missing in ORDER.get(done..).unwrap_or_default() {
        append_section(&mut out, seen, additions, *missing, None)?;
    }
    Ok(out)
}

/// Writes a section with what comes to it, where there is any of the two.
fn append_section(
    out: &mut Vec<u8>,
    seen: &Seen<'_>,
    additions: &Additions<'_>,
    id: u8,
    data: Option<&[u8]>,
) -> Result<()> {
    let state = additions.state;
    match id {
        TYPE => append_items(out, id, data, &state.types),
        FUNCTION => append_items(out, id, data, &state.functions),
        GLOBAL => append_items(out, id, data, &state.globals),
        EXPORT => append_items(out, id, data, &state.exports),
        MEMORY if additions.poll_memory => append_items(out, id, data, &poll_memory()),
        START => Ok(()),
        DATA_COUNT => {
            let is_needed = state.moves_data || state.has_empty;
            if is_needed || data.is_some() {
                let declared = seen.data_count.unwrap_or(seen.data.len() as u32);
                let mut count = Vec::new();
                (declared + u32::from(state.has_empty)).encode(&mut count);
                append_raw(out, id, &count);
            }
            Ok(())
        }
        CODE if data.is_some() || !state.bodies.is_empty() => append_code(out, seen, additions),
        DATA if state.moves_data || state.has_empty => {
            append_data(out, seen, state.has_empty);
            Ok(())
        }
        _ => {
            if let Some(data) = data {
                append_raw(out, id, data);
            }
            Ok(())
        }
    }
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

fn append_raw(out: &mut Vec<u8>, id: u8, data: &[u8]) {
    RawSection { id, data }.append_to(out);
}

/// Writes a section with more items than it had.
fn append_items(out: &mut Vec<u8>, id: u8, data: Option<&[u8]>, more: &Items) -> Result<()> {
    if more.count == 0 {
        if let Some(data) = data {
            append_raw(out, id, data);
        }
        return Ok(());
    }
    let (mut count, mut items): (u32, &[u8]) = (0, &[]);
    if let Some(data) = data {
        let mut reader = BinaryReader::new(data, 0);
        count = reader.read_var_u32()?;
        items = data.get(reader.current_position()..).unwrap_or_default();
    }
    let mut all = Vec::with_capacity(items.len() + more.bytes.len() + 5);
    count.saturating_add(more.count).encode(&mut all);
    all.extend_from_slice(items);
    all.extend_from_slice(&more.bytes);
    append_raw(out, id, &all);
    Ok(())
}

fn poll_memory() -> Items {
    let mut bytes = Vec::new();
    // Exactly one page: its address is then a constant of the instance, and no check is compiled.
    let ty = wasm_encoder::MemoryType {
        minimum: 1,
        maximum: Some(1),
        memory64: false,
        shared: false,
        page_size_log2: None,
    };
    ty.encode(&mut bytes);
    Items { count: 1, bytes }
}

/// Writes all data segments as passive ones.
fn append_data(out: &mut Vec<u8>, seen: &Seen<'_>, has_empty: bool) {
    let bytes: usize = seen.data.iter().map(|data| data.bytes.len() + 6).sum();
    let mut data = Vec::with_capacity(bytes + 8);
    (seen.data.len() as u32 + u32::from(has_empty)).encode(&mut data);
    for segment in &seen.data {
        data.push(1);
        segment.bytes.encode(&mut data);
    }
    if has_empty {
        data.extend([1, 0]);
    }
    append_raw(out, DATA, &data);
}

fn append_code(out: &mut Vec<u8>, seen: &Seen<'_>, additions: &Additions<'_>) -> Result<()> {
    let state = additions.state;
    let poll = if additions.poll_memory {
        poll_code(seen.memories.len() as u32)
    } else {
        Vec::new()
    };
    let polls = seen
        .sites
        .found
        .iter()
        .filter(|site| site.is_polled())
        .count();
    let code: usize = seen.bodies.iter().map(|body| body.bytes.len() + 5).sum();
    let more: usize = state.bodies.iter().map(|body| body.len() + 5).sum();
    let mut data = Vec::with_capacity(code + polls * poll.len() + state.text.len() + more + 5);
    ((seen.bodies.len() + state.bodies.len()) as u32).encode(&mut data);
    for body in &seen.bodies {
        append_body(&mut data, seen, body, &poll, additions)?;
    }
    for body in &state.bodies {
        (body.len() as u32).encode(&mut data);
        data.extend_from_slice(body);
    }
    append_raw(out, CODE, &data);
    Ok(())
}

/// Writes a function with its polls and edits.
fn append_body(
    data: &mut Vec<u8>,
    seen: &Seen<'_>,
    body: &Body<'_>,
    poll: &[u8],
    additions: &Additions<'_>,
) -> Result<()> {
    let state = additions.state;
    let sites = seen.sites.found.get(body.sites.clone()).unwrap_or_default();
    let entry = sites.first().map_or(body.start, |entry| entry.at);
    let sites = sites
        .iter()
        .filter(|site| site.is_polled() && additions.poll_memory);
    let edits = state.edits(body.rares.clone());
    let polls = sites.clone().count();
    let pads = if additions.pads {
        inline::pads(body.bytes.len(), polls)
    } else {
        0
    };
    let edited: usize = edits.clone().map(|edit| edit.code.len()).sum();
    let removed: usize = edits.clone().map(|edit| edit.end - edit.at).sum();
    let size = body.bytes.len() + polls * poll.len() + pads * PAD.len() + edited - removed;
    if size > MAX_FUNCTION_BYTES && body.bytes.len() <= MAX_FUNCTION_BYTES {
        return Err(InstrumentError::NoRoom {
            what: format!(
                "the function at byte {} has {} bytes",
                body.start,
                body.bytes.len()
            ),
        });
    }
    (size as u32).encode(data);
    data.extend_from_slice(part(body, body.start, entry));
    data.extend((0..pads).flat_map(|_| PAD));
    let mut copied = entry;
    let mut edits = edits.peekable();
    for site in sites {
        // A poll leaves the stack as it is, and goes before what an instruction needs before itself.
        while let Some(edit) = edits.next_if(|edit| edit.at < site.at) {
            copied = append_edit(data, body, state, edit, copied);
        }
        data.extend_from_slice(part(body, copied, site.at));
        data.extend_from_slice(poll);
        copied = site.at;
    }
    for edit in edits {
        copied = append_edit(data, body, state, edit, copied);
    }
    data.extend_from_slice(part(body, copied, body.start + body.bytes.len()));
    Ok(())
}

/// Writes the code up to an edit, and the edit: where the code goes on.
fn append_edit(
    data: &mut Vec<u8>,
    body: &Body<'_>,
    state: &Plan,
    edit: &state::Edit,
    copied: usize,
) -> usize {
    data.extend_from_slice(part(body, copied, edit.at));
    data.extend_from_slice(state.text.get(edit.code.clone()).unwrap_or_default());
    edit.end
}

/// The bytes of a body between two offsets in the module.
fn part<'a>(body: &Body<'a>, from: usize, to: usize) -> &'a [u8] {
    body.bytes
        .get(from - body.start..to - body.start)
        .unwrap_or_default()
}
