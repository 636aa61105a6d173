//! Going through function bodies.
//!
//! Modules have megabytes of code, and this happens at every start, even when the compiled code
//! comes from a cache. So the instructions that real modules consist of are stepped over by a
//! table; a body with anything else in it is read again, from its beginning, by `wasmparser`.
//! Neither validates: that is done on what is spliced. Only mentions of what splicing adds to
//! (memories, types, functions, globals, data segments) are looked at here, since what is spliced has
//! more of them than the module may name.

use wasmparser::{BlockType, FunctionBody, HeapType, MemArg, Operator, RefType, ValType};

use super::{InstrumentError, Result};

/// A place where a poll may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Site {
    /// Before the instruction at this offset in the module.
    pub(super) at: usize,
    /// The function that is called there, [`Site::ENTRY`] or [`Site::POLLED`].
    pub(super) callee: u32,
}

impl Site {
    /// In place of a callee: a poll does go there. (No module has so many functions.)
    pub(super) const POLLED: u32 = u32::MAX;
    /// In place of a callee: the first instruction of a function.
    pub(super) const ENTRY: u32 = u32::MAX - 1;
    /// In place of a callee: none goes there after all.
    const DROPPED: u32 = u32::MAX - 2;

    pub(super) fn is_polled(self) -> bool {
        self.callee == Self::POLLED
    }
}

/// An instruction that touches state which the host cannot reach by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rare {
    /// Its place in the module.
    pub(super) at: usize,
    pub(super) end: usize,
    pub(super) what: What,
}

/// What such an instruction does, with its immediates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Only through tables that may grow, and tail calls too.
    CallIndirect(u32),
    TableGet(u32),
    TableSet(u32),
    TableSize(u32),
    TableGrow(u32),
    TableFill(u32),
    TableCopy {
        to: u32,
        from: u32,
    },
    TableInit {
        segment: u32,
        table: u32,
    },
    MemoryInit {
        segment: u32,
        memory: u32,
    },
    DataDrop(u32),
    NewData {
        ty: u32,
        segment: u32,
    },
    InitData {
        ty: u32,
        segment: u32,
    },
    ElemDrop,
    /// `memory.atomic.wait32`, or `wait64`.
    Wait {
        memory: u32,
        offset: u64,
        is_64: bool,
    },
    /// `extern.convert_any`.
    ConvertAny,
    /// `ref.func` of the start function.
    RefStart,
}

/// What can be named by an index, and of what more will be there than the module has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    Memory,
    Type,
    Function,
    Global,
    Data,
}

/// How many of these a module has: it must name no other.
#[derive(Debug, Clone, Default)]
pub(super) struct Declared {
    pub(super) memories: u32,
    pub(super) types: u32,
    pub(super) functions: u32,
    pub(super) globals: u32,
    /// As counted ahead of the code; instructions must name none otherwise.
    pub(super) data: Option<u32>,
    /// For each table, whether it may grow.
    pub(super) may_grow: Vec<bool>,
    pub(super) start: Option<u32>,
}

impl Declared {
    pub(super) fn check(&self, space: Space, index: u32, offset: usize) -> Result<()> {
        let malformed = |message| Err(InstrumentError::Malformed { offset, message });
        let (count, what) = match space {
            Space::Memory => (self.memories, "memory"),
            Space::Type => (self.types, "type"),
            Space::Function => (self.functions, "function"),
            Space::Global => (self.globals, "global"),
            Space::Data => match self.data {
                Some(count) => (count, "data segment"),
                None => return malformed("data count section required".into()),
            },
        };
        if index < count {
            return Ok(());
        }
        malformed(format!("unknown {what} {index}"))
    }

    pub(super) fn check_type(&self, ty: ValType, offset: usize) -> Result<()> {
        match of_val_type(ty) {
            Some((space, index)) => self.check(space, index, offset),
            None => Ok(()),
        }
    }

    fn may_grow(&self, table: u32) -> bool {
        self.may_grow.get(table as usize) == Some(&true)
    }
}

/// What an immediate names.
type Mention = Option<(Space, u32)>;

fn of_heap_type(ty: HeapType) -> Mention {
    match ty {
        HeapType::Abstract { .. } => None,
        HeapType::Concrete(index) | HeapType::Exact(index) => {
            index.as_module_index().map(|index| (Space::Type, index))
        }
    }
}

fn of_ref_type(ty: RefType) -> Mention {
    of_heap_type(ty.heap_type())
}

fn of_val_type(ty: ValType) -> Mention {
    match ty {
        ValType::Ref(ty) => of_ref_type(ty),
        _ => None,
    }
}

fn of_block_type(ty: BlockType) -> Mention {
    match ty {
        BlockType::Empty => None,
        BlockType::Type(ty) => of_val_type(ty),
        BlockType::FuncType(index) => Some((Space::Type, index)),
    }
}

/// Finds the places, in order: a function's entry, its loops, its calls. Calls inside a loop are no
/// place: the loop's own poll comes before them.
///
/// A loop is polled in one of two places. At its header, which also covers what it calls; or, if it
/// calls nothing and that costs no more, where it branches back: a loop that mostly does not repeat
/// then passes no poll at all.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sites {
    pub(super) found: Vec<Site>,
    /// In order.
    pub(super) rares: Vec<Rare>,
    /// The indices of all functions called directly, loops or not.
    pub(super) calls: Vec<u32>,
    /// About how many SSA values the compiler makes of the body at hand.
    pub(super) values: u32,
    /// For each open block of the body at hand, its loop if it is one.
    open: Vec<Option<usize>>,
    /// The open loops, from the outside in.
    nest: Vec<usize>,
    loops: Vec<Loop>,
    /// The branches back to loops: the places of their sites, and which loop it is.
    latches: Vec<(usize, usize)>,
    /// What was met so far that only a poll at the header is good for.
    obstacles: usize,
}

/// A loop of the body at hand.
#[derive(Debug, PartialEq, Eq)]
struct Loop {
    /// The place of its header's site.
    header: usize,
    obstacles_before: usize,
    /// Branches back, those on a condition among them.
    latches: usize,
    conditions: usize,
    is_unfit: bool,
    is_closed: bool,
}

impl Loop {
    /// Whether to poll where it branches back. One pass executes at most one plain branch; but one on
    /// a condition is polled whether it is taken or not, so there it must be the only one.
    fn has_polled_latches(&self) -> bool {
        self.is_closed
            && !self.is_unfit
            && self.latches > 0
            && (self.conditions == 0 || self.latches == 1)
    }
}

impl Sites {
    fn begin(&mut self, entry: usize) {
        self.open.clear();
        self.nest.clear();
        self.loops.clear();
        self.latches.clear();
        self.obstacles = 0;
        self.values = 0;
        self.found.push(Site {
            at: entry,
            callee: Site::ENTRY,
        });
    }

    fn enter(&mut self) {
        self.open.push(None);
    }

    fn enter_loop(&mut self, body: usize) {
        let index = self.loops.len();
        self.open.push(Some(index));
        self.nest.push(index);
        self.loops.push(Loop {
            header: self.found.len(),
            obstacles_before: self.obstacles,
            latches: 0,
            conditions: 0,
            is_unfit: false,
            is_closed: false,
        });
        self.found.push(Site {
            at: body,
            callee: Site::POLLED,
        });
    }

    fn leave(&mut self) {
        if let Some(Some(index)) = self.open.pop() {
            self.nest.pop();
            if let Some(left) = self.loops.get_mut(index) {
                left.is_closed = true;
                left.is_unfit |= left.obstacles_before != self.obstacles;
            }
        }
    }

    /// The loop that a branch to this depth leads back to.
    fn target(&self, depth: u32) -> Option<usize> {
        let from_outside = self.open.len().checked_sub(depth as usize + 1)?;
        *self.open.get(from_outside)?
    }

    fn branch(&mut self, at: usize, depth: u32) {
        self.branch_back(at, depth, false);
    }

    /// A branch on a condition, polled before that is looked at. In an inner loop that could be much
    /// more often than the outer one begins anew.
    fn branch_if(&mut self, at: usize, depth: u32) {
        self.branch_back(at, depth, true);
    }

    fn branch_back(&mut self, at: usize, depth: u32, is_conditional: bool) {
        let Some(index) = self.target(depth) else {
            return;
        };
        let is_innermost = self.nest.last() == Some(&index);
        let Some(to) = self.loops.get_mut(index) else {
            return;
        };
        to.latches += 1;
        to.conditions += usize::from(is_conditional);
        to.is_unfit |= is_conditional && !is_innermost;
        self.latches.push((self.found.len(), index));
        self.found.push(Site {
            at,
            callee: Site::DROPPED,
        });
    }

    /// One of the targets of a table.
    fn branch_by_table(&mut self, depth: u32) {
        if let Some(index) = self.target(depth)
            && let Some(to) = self.loops.get_mut(index)
        {
            to.is_unfit = true;
        }
    }

    /// Something that may lead back to any open loop.
    fn branch_anywhere(&mut self) {
        self.obstacles += 1;
    }

    fn call(&mut self, at: usize, callee: u32) {
        self.obstacles += 1;
        if self.nest.is_empty() {
            self.found.push(Site { at, callee });
        }
    }

    fn rare(&mut self, at: usize, end: usize, what: What) {
        self.rares.push(Rare { at, end, what });
    }

    fn direct_call(&mut self, at: usize, callee: u32) {
        self.calls.push(callee);
        self.call(at, callee);
    }

    /// A call of who knows what, which may well lead back here.
    fn indirect_call(&mut self, at: usize) {
        self.call(at, Site::POLLED);
    }

    /// The body was read to its end: decides where its loops are polled. `before`: where its sites
    /// begin.
    fn finish(&mut self, before: usize) {
        if self.latches.is_empty() {
            return;
        }
        for each in self.loops.iter().filter(|each| each.has_polled_latches()) {
            if let Some(header) = self.found.get_mut(each.header) {
                header.callee = Site::DROPPED;
            }
        }
        for (site, index) in &self.latches {
            let is_polled = self.loops.get(*index).is_some_and(Loop::has_polled_latches);
            if let Some(site) = self.found.get_mut(*site).filter(|_| is_polled) {
                site.callee = Site::POLLED;
            }
        }
        let mut kept = before;
        for at in before..self.found.len() {
            if self.found[at].callee != Site::DROPPED {
                self.found[kept] = self.found[at];
                kept += 1;
            }
        }
        self.found.truncate(kept);
    }
}

/// Notes what is in `body`.
pub(super) fn scan(body: &FunctionBody<'_>, declared: &Declared, sites: &mut Sites) -> Result<()> {
    let mut locals = body.get_locals_reader()?;
    for _ in 0..locals.get_count() {
        let at = locals.original_position();
        let (_, ty) = locals.read()?;
        declared.check_type(ty, at)?;
    }
    let entry = locals.original_position();
    let code = body
        .as_bytes()
        .get(entry - body.range().start..)
        .unwrap_or_default();
    let (before, calls_before) = (sites.found.len(), sites.calls.len());
    let rares_before = sites.rares.len();
    if scan_common(code, entry, declared, sites).is_none() {
        sites.found.truncate(before);
        sites.calls.truncate(calls_before);
        sites.rares.truncate(rares_before);
        scan_any(body, declared, sites)?;
    }
    sites.finish(before);
    Ok(())
}

/// Every instruction there is.
fn scan_any(body: &FunctionBody<'_>, declared: &Declared, sites: &mut Sites) -> Result<()> {
    let mut operators = body.get_operators_reader()?;
    sites.begin(operators.original_position());
    while !operators.eof() {
        let at = operators.original_position();
        let operator = operators.read()?;
        check_mentions(&operator, declared, at)?;
        if let Some(what) = rare(&operator, declared) {
            sites.rare(at, operators.original_position(), what);
        }
        let opcode = body.as_bytes().get(at - body.range().start);
        sites.values += opcode.map_or(0, |opcode| u32::from(VALUES[usize::from(*opcode)]));
        if may_branch(&operator) {
            sites.branch_anywhere();
        }
        match operator {
            Operator::Loop { .. } => sites.enter_loop(operators.original_position()),
            Operator::Block { .. } | Operator::If { .. } | Operator::TryTable { .. } => {
                sites.enter();
            }
            Operator::End => sites.leave(),
            Operator::Br { relative_depth } => sites.branch(at, relative_depth),
            Operator::BrIf { relative_depth } => sites.branch_if(at, relative_depth),
            Operator::BrTable { targets } => {
                sites.branch_by_table(targets.default());
                for depth in targets.targets() {
                    sites.branch_by_table(depth?);
                }
            }
            Operator::Call { function_index } | Operator::ReturnCall { function_index } => {
                sites.direct_call(at, function_index);
            }
            Operator::CallIndirect { .. }
            | Operator::ReturnCallIndirect { .. }
            | Operator::CallRef { .. }
            | Operator::ReturnCallRef { .. }
            | Operator::Resume { .. }
            | Operator::ResumeThrow { .. }
            | Operator::ResumeThrowRef { .. }
            | Operator::Switch { .. } => sites.indirect_call(at),
            Operator::Try { .. }
            | Operator::Catch { .. }
            | Operator::Rethrow { .. }
            | Operator::Delegate { .. }
            | Operator::CatchAll => return Err(InstrumentError::LegacyExceptions { offset: at }),
            _ => {}
        }
    }
    Ok(())
}

fn rare(operator: &Operator<'_>, declared: &Declared) -> Option<What> {
    Some(match *operator {
        Operator::CallIndirect { table_index, .. }
        | Operator::ReturnCallIndirect { table_index, .. }
            if declared.may_grow(table_index) =>
        {
            What::CallIndirect(table_index)
        }
        Operator::TableGet { table } => What::TableGet(table),
        Operator::TableSet { table } => What::TableSet(table),
        Operator::TableSize { table } => What::TableSize(table),
        Operator::TableGrow { table } => What::TableGrow(table),
        Operator::TableFill { table } => What::TableFill(table),
        Operator::TableCopy {
            dst_table: to,
            src_table: from,
        } => What::TableCopy { to, from },
        Operator::TableInit { elem_index, table } => What::TableInit {
            segment: elem_index,
            table,
        },
        Operator::MemoryInit { data_index, mem } => What::MemoryInit {
            segment: data_index,
            memory: mem,
        },
        Operator::DataDrop { data_index } => What::DataDrop(data_index),
        Operator::ArrayNewData {
            array_type_index,
            array_data_index,
        } => What::NewData {
            ty: array_type_index,
            segment: array_data_index,
        },
        Operator::ArrayInitData {
            array_type_index,
            array_data_index,
        } => What::InitData {
            ty: array_type_index,
            segment: array_data_index,
        },
        Operator::MemoryAtomicWait32 { memarg } => What::Wait {
            memory: memarg.memory,
            offset: memarg.offset,
            is_64: false,
        },
        Operator::MemoryAtomicWait64 { memarg } => What::Wait {
            memory: memarg.memory,
            offset: memarg.offset,
            is_64: true,
        },
        Operator::ElemDrop { .. } => What::ElemDrop,
        Operator::ExternConvertAny => What::ConvertAny,
        Operator::RefFunc { function_index } if declared.start == Some(function_index) => {
            What::RefStart
        }
        _ => return None,
    })
}

/// What an instruction's immediate of this name names.
macro_rules! mention_of {
    (memarg $value:ident) => {
        Some((Space::Memory, MemArg::clone($value).memory))
    };
    (mem $value:ident) => {
        Some((Space::Memory, *$value))
    };
    (dst_mem $value:ident) => {
        Some((Space::Memory, *$value))
    };
    (src_mem $value:ident) => {
        Some((Space::Memory, *$value))
    };
    (function_index $value:ident) => {
        Some((Space::Function, *$value))
    };
    (global_index $value:ident) => {
        Some((Space::Global, *$value))
    };
    (data_index $value:ident) => {
        Some((Space::Data, *$value))
    };
    (array_data_index $value:ident) => {
        Some((Space::Data, *$value))
    };
    (type_index $value:ident) => {
        Some((Space::Type, *$value))
    };
    (struct_type_index $value:ident) => {
        Some((Space::Type, *$value))
    };
    (array_type_index $value:ident) => {
        Some((Space::Type, *$value))
    };
    (array_type_index_dst $value:ident) => {
        Some((Space::Type, *$value))
    };
    (array_type_index_src $value:ident) => {
        Some((Space::Type, *$value))
    };
    (cont_type_index $value:ident) => {
        Some((Space::Type, *$value))
    };
    (argument_index $value:ident) => {
        Some((Space::Type, *$value))
    };
    (result_index $value:ident) => {
        Some((Space::Type, *$value))
    };
    (blockty $value:ident) => {
        of_block_type(*$value)
    };
    (try_table $value:ident) => {
        of_block_type($value.ty)
    };
    (hty $value:ident) => {
        of_heap_type(*$value)
    };
    (ty $value:ident) => {
        of_val_type(*$value)
    };
    (from_ref_type $value:ident) => {
        of_ref_type(*$value)
    };
    (to_ref_type $value:ident) => {
        of_ref_type(*$value)
    };
    ($other:ident $value:ident) => {{
        let _ = $value;
        None
    }};
}

macro_rules! define_check_mentions {
    ($( @$proposal:ident $op:ident $({ $($arg:ident: $ty:ty),* })? => $visit:ident ($($ann:tt)*) )*) => {
        /// Refuses an instruction that names what the module does not have.
        pub(super) fn check_mentions(
            operator: &Operator<'_>,
            declared: &Declared,
            at: usize,
        ) -> Result<()> {
            match operator {
                $(Operator::$op $({ $($arg),* })? => {
                    $($(
                        let mention: Mention = mention_of!($arg $arg);
                        if let Some((space, index)) = mention {
                            declared.check(space, index, at)?;
                        }
                    )*)?
                })*
                // A kind of instruction that is newer than this list of all of them.
                _ => {}
            }
            Ok(())
        }
    };
}

wasmparser::for_each_operator!(define_check_mentions);

/// Whether an instruction's immediate of this name holds labels.
macro_rules! holds_labels {
    (relative_depth) => {
        true
    };
    (targets) => {
        true
    };
    (try_table) => {
        true
    };
    (resume_table) => {
        true
    };
    ($other:ident) => {
        false
    };
}

macro_rules! define_may_branch {
    ($( @$proposal:ident $op:ident $({ $($arg:ident: $ty:ty),* })? => $visit:ident ($($ann:tt)*) )*) => {
        /// Whether it may branch in a way that is not looked at one by one.
        fn may_branch(operator: &Operator<'_>) -> bool {
            if let Operator::Br { .. } | Operator::BrIf { .. } | Operator::BrTable { .. } = operator {
                return false;
            }
            match operator {
                $(Operator::$op { .. } => false $($(|| holds_labels!($arg))*)?,)*
                // A kind of instruction that is newer than this list of all of them.
                _ => true,
            }
        }
    };
}

wasmparser::for_each_operator!(define_may_branch);

/// What follows an opcode.
#[derive(Clone, Copy)]
enum Immediate {
    None,
    /// That many LEB128 numbers of 32 bits.
    Indices(u8),
    /// The indices of that many memories.
    Memories(u8),
    /// The index of a global.
    Global,
    /// One LEB128 number of 64 bits.
    Long,
    /// That many bytes.
    Bytes(u8),
    BlockType,
    MemArg,
    /// A memory argument and a lane.
    MemArgLane,
    /// A second opcode, of the `0xfd` space.
    Simd,
    /// For [`scan_any`].
    Other,
}

const BLOCK: u8 = 0x02;
const LOOP: u8 = 0x03;
const IF: u8 = 0x04;
const END: u8 = 0x0b;
const BR: u8 = 0x0c;
const BR_IF: u8 = 0x0d;
const BR_TABLE: u8 = 0x0e;
const CALL: u8 = 0x10;
const CALL_INDIRECT: u8 = 0x11;
const RETURN_CALL: u8 = 0x12;
const RETURN_CALL_INDIRECT: u8 = 0x13;
const TABLE_GET: u8 = 0x25;
const TABLE_SET: u8 = 0x26;
const REF_FUNC: u8 = 0xd2;
const PREFIX: u8 = 0xfc;

const IMMEDIATES: [Immediate; 256] = {
    let mut table = [Immediate::Other; 256];
    let mut opcode = 0;
    while opcode < table.len() {
        table[opcode] = match opcode {
            // unreachable, nop, else, end, return, drop, select, numeric, ref.is_null
            0x00 | 0x01 | 0x05 | 0x0b | 0x0f | 0x1a | 0x1b | 0x45..=0xc4 | 0xd1 => Immediate::None,
            // block, loop, if
            0x02..=0x04 => Immediate::BlockType,
            // local.*, i32.const
            0x20..=0x22 | 0x41 => Immediate::Indices(1),
            // global.get, global.set
            0x23 | 0x24 => Immediate::Global,
            // memory.size, memory.grow
            0x3f | 0x40 => Immediate::Memories(1),
            // loads and stores
            0x28..=0x3e => Immediate::MemArg,
            0x42 => Immediate::Long,
            0x43 => Immediate::Bytes(4),
            0x44 => Immediate::Bytes(8),
            0xfd => Immediate::Simd,
            _ => Immediate::Other,
        };
        opcode += 1;
    }
    table
};

/// How many SSA values the compiler makes of an instruction before it optimises, about.
const VALUES: [u8; 256] = {
    let mut table = [0; 256];
    let mut opcode = 0;
    while opcode < table.len() {
        table[opcode] = match opcode {
            // Addresses are extended and added; so many are constants.
            0x28..=0x35 => 4,
            0x36..=0x3e => 3,
            // Comparisons are widened.
            0x45..=0x66 => 2,
            0x23 | 0x24 => 2,
            0x41..=0x44 | 0x67..=0xc4 | 0xd2 | 0xfc..=0xfe => 1,
            _ => 0,
        };
        opcode += 1;
    }
    table
};

/// After `0xfc`: saturating conversions, bulk memory. What is rare has been looked at before.
fn prefixed(opcode: u32) -> Immediate {
    match opcode {
        0..=7 => Immediate::None,
        // memory.copy, memory.fill
        10 => Immediate::Memories(2),
        11 => Immediate::Memories(1),
        _ => Immediate::Other,
    }
}

/// After `0xfd`: vectors, the relaxed ones too.
fn simd(opcode: u32) -> Immediate {
    match opcode {
        0..=11 | 92 | 93 => Immediate::MemArg,
        // v128.const, i8x16.shuffle
        12 | 13 => Immediate::Bytes(16),
        // extract_lane, replace_lane
        21..=34 => Immediate::Bytes(1),
        84..=91 => Immediate::MemArgLane,
        14..=20 | 35..=83 | 94..=275 => Immediate::None,
        _ => Immediate::Other,
    }
}

/// The instructions of ordinary modules. `None` where one is not, or names something that the module
/// does not have: the sites are then incomplete.
fn scan_common(code: &[u8], start: usize, declared: &Declared, sites: &mut Sites) -> Option<()> {
    sites.begin(start);
    let mut cursor = Cursor {
        code,
        at: 0,
        declared,
    };
    let mut values = 0;
    while let Some(&opcode) = code.get(cursor.at) {
        let at = start + cursor.at;
        cursor.at += 1;
        match opcode {
            CALL | RETURN_CALL => {
                sites.direct_call(at, cursor.below(declared.functions)?);
                continue;
            }
            BR => {
                sites.branch(at, cursor.index()?);
                continue;
            }
            BR_IF => {
                sites.branch_if(at, cursor.index()?);
                continue;
            }
            BR_TABLE => {
                // The default is one more.
                for _ in 0..=cursor.index()? {
                    sites.branch_by_table(cursor.index()?);
                }
                continue;
            }
            _ => {}
        }
        values += u32::from(*VALUES.get(usize::from(opcode))?);
        if let CALL_INDIRECT | RETURN_CALL_INDIRECT | TABLE_GET | TABLE_SET | REF_FUNC | PREFIX =
            opcode
        {
            cursor.maybe_rare(opcode, at, start, sites)?;
            continue;
        }
        cursor.step_over(*IMMEDIATES.get(usize::from(opcode))?)?;
        match opcode {
            BLOCK | IF => sites.enter(),
            LOOP => sites.enter_loop(start + cursor.at),
            END => sites.leave(),
            _ => {}
        }
    }
    sites.values = values;
    // The last instruction must not have been cut off.
    (cursor.at == code.len()).then_some(())
}

struct Cursor<'a> {
    code: &'a [u8],
    at: usize,
    declared: &'a Declared,
}

impl Cursor<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.code.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// Steps over a LEB128 number of at most `most` bytes.
    fn skip(&mut self, most: u8) -> Option<()> {
        for _ in 0..most {
            if self.byte()? < 0x80 {
                return Some(());
            }
        }
        None
    }

    /// An unsigned LEB128 number of 32 bits.
    fn index(&mut self) -> Option<u32> {
        let mut value = 0;
        for shift in [0, 7, 14, 21, 28] {
            let byte = self.byte()?;
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return (shift < 28 || byte < 0x10).then_some(value);
            }
        }
        None
    }

    /// An index of something of which there are so many.
    fn below(&mut self, count: u32) -> Option<u32> {
        self.index().filter(|index| *index < count)
    }

    /// Steps over the index of a memory that there is.
    fn memory(&mut self) -> Option<()> {
        self.below(self.declared.memories).map(|_| ())
    }

    /// Steps over the type of a block.
    fn block_type(&mut self) -> Option<()> {
        match *self.code.get(self.at)? {
            // Nothing, or a plain value type.
            0x40 | 0x6f | 0x70 | 0x7b..=0x7f => self.at += 1,
            // The index of a type. It has a sign, which makes some lengthier than they need be.
            0x00..=0x3f | 0x80.. => {
                self.below(self.declared.types)?;
                let last = *self.code.get(self.at.checked_sub(1)?)?;
                (last < 0x40).then_some(())?;
            }
            _ => return None,
        }
        Some(())
    }

    /// Steps over the immediates of an instruction that may be one of [`What`], and notes it if it is.
    fn maybe_rare(&mut self, opcode: u8, at: usize, start: usize, sites: &mut Sites) -> Option<()> {
        let what = match opcode {
            CALL_INDIRECT | RETURN_CALL_INDIRECT => {
                self.below(self.declared.types)?;
                let table = self.index()?;
                sites.indirect_call(at);
                if !self.declared.may_grow(table) {
                    return Some(());
                }
                What::CallIndirect(table)
            }
            TABLE_GET => What::TableGet(self.index()?),
            TABLE_SET => What::TableSet(self.index()?),
            REF_FUNC => {
                let function = self.below(self.declared.functions)?;
                if self.declared.start != Some(function) {
                    return Some(());
                }
                What::RefStart
            }
            _ => match self.index()? {
                8 => What::MemoryInit {
                    segment: self.below(self.declared.data?)?,
                    memory: self.below(self.declared.memories)?,
                },
                9 => What::DataDrop(self.below(self.declared.data?)?),
                12 => What::TableInit {
                    segment: self.index()?,
                    table: self.index()?,
                },
                13 => {
                    self.index()?;
                    What::ElemDrop
                }
                14 => What::TableCopy {
                    to: self.index()?,
                    from: self.index()?,
                },
                15 => What::TableGrow(self.index()?),
                16 => What::TableSize(self.index()?),
                17 => What::TableFill(self.index()?),
                other => return self.step_over(prefixed(other)),
            },
        };
        sites.rare(at, start + self.at, what);
        Some(())
    }

    fn mem_arg(&mut self) -> Option<()> {
        match self.byte()? {
            0..0x40 if self.declared.memories > 0 => {}
            // The index of a memory follows.
            0x40..0x80 => self.memory()?,
            _ => return None,
        }
        self.skip(10)
    }

    fn step_over(&mut self, immediate: Immediate) -> Option<()> {
        match immediate {
            Immediate::None => {}
            Immediate::Indices(count) => {
                for _ in 0..count {
                    self.skip(5)?;
                }
            }
            Immediate::Memories(count) => {
                for _ in 0..count {
                    self.memory()?;
                }
            }
            Immediate::Global => {
                self.below(self.declared.globals)?;
            }
            Immediate::Long => self.skip(10)?,
            Immediate::Bytes(count) => self.at += usize::from(count),
            Immediate::BlockType => self.block_type()?,
            Immediate::MemArg => self.mem_arg()?,
            Immediate::MemArgLane => {
                self.mem_arg()?;
                self.at += 1;
            }
            Immediate::Simd => {
                let opcode = self.index()?;
                self.step_over(simd(opcode))?;
            }
            Immediate::Other => return None,
        }
        Some(())
    }
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
