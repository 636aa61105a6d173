//! One pass over a module: what it has, and where.

use std::collections::BTreeSet;
use std::ops::Range;

use wasmparser::{
    CompositeInnerType, ConstExpr, DataKind, ElementItems, ElementKind, ExternalKind, FunctionBody,
    GlobalType, KnownCustom, Name, Operator, Parser, Payload, SubType, TableInit, TableType,
    TypeRef, ValType, WasmFeatures,
};

use super::calls::CallGraph;
use super::inline::Function;
use super::scan::{Declared, Sites, Space, check_mentions, scan};
use super::section::rank;
use super::state::{self, Described, Plan};
use super::{MemoryInfo, Place, Result, malformed};

/// A section as it stands in the module.
pub(super) struct Piece<'a> {
    pub(super) id: u8,
    pub(super) data: &'a [u8],
}

/// A function body.
pub(super) struct Body<'a> {
    pub(super) bytes: &'a [u8],
    /// Where `bytes` begins in the module.
    pub(super) start: usize,
    /// Its part of what was found.
    pub(super) sites: Range<usize>,
    /// Its part of all calls.
    pub(super) calls: Range<usize>,
    /// Its part of all rare instructions.
    pub(super) rares: Range<usize>,
    pub(super) values: u32,
}

/// A data segment.
pub(super) struct Segment<'a> {
    pub(super) active: Option<Active<'a>>,
    pub(super) bytes: &'a [u8],
}

/// Where an active segment goes.
pub(super) struct Active<'a> {
    pub(super) memory: u32,
    /// Code that puts the offset on the stack, without its end.
    pub(super) offset: &'a [u8],
}

/// What one pass over a module finds.
#[derive(Default)]
pub(super) struct Seen<'a> {
    pub(super) pieces: Vec<Piece<'a>>,
    pub(super) bodies: Vec<Body<'a>>,
    pub(super) sites: Sites,
    pub(super) imported_functions: usize,
    pub(super) name: Option<String>,
    pub(super) memories: Vec<MemoryInfo>,
    pub(super) types: Vec<Described>,
    /// The types of all functions, imported ones first.
    pub(super) functions: Vec<u32>,
    /// With whether they are imported.
    pub(super) tables: Vec<(TableType, bool)>,
    pub(super) globals: Vec<GlobalType>,
    pub(super) data: Vec<Segment<'a>>,
    pub(super) data_count: Option<u32>,
    pub(super) start: Option<u32>,
    /// The functions that are named outside of code, again and again maybe: what is exported, and
    /// what may become a funcref.
    pub(super) mentioned: Vec<u32>,
    /// What hidden exports must not be called.
    pub(super) taken_numbers: BTreeSet<u64>,
    pub(super) exports: Vec<Place>,
    pub(super) has_tags: bool,
    pub(super) customs: Vec<(&'a str, &'a [u8])>,
}

impl<'a> Seen<'a> {
    pub(super) fn read(wasm: &'a [u8]) -> Result<Self> {
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
    pub(super) fn is_passive(&self, segment: u32) -> bool {
        self.data
            .get(segment as usize)
            .is_some_and(|segment| segment.active.is_none())
    }

    pub(super) fn calls(&mut self, plan: &Plan) -> CallGraph<'_> {
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

    pub(super) fn functions(&self, plan: &Plan) -> Vec<Function> {
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

/// Whether a custom section speaks of places in the code, which polls move.
fn names_code_offsets(name: &str) -> bool {
    name.starts_with(".debug_")
        || name.starts_with("reloc.")
        || name.starts_with("metadata.code.")
        || matches!(name, "linking" | "sourceMappingURL" | "external_debug_info")
}
