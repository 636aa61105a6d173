//! Writes a module anew, with what comes to it.

use wasm_encoder::{Encode, RawSection, Section};
use wasmparser::BinaryReader;

use super::inline;
use super::section::{
    CODE, DATA, DATA_COUNT, EXPORT, FUNCTION, GLOBAL, MEMORY, ORDER, START, TYPE, rank,
};
use super::seen::{Body, Seen};
use super::state::{Edit, Items, Plan};
use super::{InstrumentError, Result};

/// `i32.const 0, drop`.
pub(super) const PAD: [u8; 3] = [0x41, 0x00, 0x1a];
/// What the validator allows (`wasmparser`'s own limits, which it does not export).
pub(super) const MAX_MEMORIES: usize = 100;
pub(super) const MAX_FUNCTION_BYTES: usize = 7_654_321;

/// What to put into a module.
pub(super) struct Additions<'p> {
    /// The poll memory and the polls.
    pub(super) poll_memory: bool,
    /// See [`inline::pads`].
    pub(super) pads: bool,
    pub(super) state: &'p Plan,
}

/// Writes the module anew.
pub(super) fn splice(seen: &Seen<'_>, additions: &Additions<'_>) -> Result<Vec<u8>> {
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
    edit: &Edit,
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
