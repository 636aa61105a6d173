//! Guests as WAT text.

use wasm_molt_engine::Source;

/// The module of a text.
#[track_caller]
pub fn source(wat: &str) -> Source {
    Source::Bytes(bytes(wat))
}

/// The same as bytes.
#[track_caller]
pub fn bytes(wat: &str) -> Vec<u8> {
    match wat::parse_str(wat) {
        Ok(bytes) => bytes,
        Err(error) => panic!("a guest of the testkit does not assemble: {error}\n{wat}"),
    }
}

/// `add(i32, i32) -> i32`. No memory, no imports.
pub fn adder() -> String {
    r#"(module $adder
        (func (export "add") (param i32 i32) (result i32)
            (i32.add (local.get 0) (local.get 1))))"#
        .into()
}

/// Identity functions of every type that can cross, and a swap of two values.
pub fn echo() -> String {
    r#"(module $echo
        (func (export "i32") (param i32) (result i32) (local.get 0))
        (func (export "i64") (param i64) (result i64) (local.get 0))
        (func (export "f32") (param f32) (result f32) (local.get 0))
        (func (export "f64") (param f64) (result f64) (local.get 0))
        (func (export "extern") (param externref) (result externref) (local.get 0))
        (func (export "func") (param funcref) (result funcref) (local.get 0))
        (func (export "nothing"))
        (func (export "swap") (param i32 f64) (result f64 i32) (local.get 1) (local.get 0))
        (func (export "vector") (param v128) (result v128) (local.get 0)))"#
        .into()
}

/// State in memory: `increment() -> i32`, `get() -> i32`, `set(i32)`; `trap()` loses it.
pub fn counter() -> String {
    r#"(module $counter
        (memory (export "memory") 1)
        (func (export "increment") (result i32)
            (i32.store (i32.const 16) (i32.add (i32.load (i32.const 16)) (i32.const 1)))
            (i32.load (i32.const 16)))
        (func (export "get") (result i32) (i32.load (i32.const 16)))
        (func (export "set") (param i32) (i32.store (i32.const 16) (local.get 0)))
        (func (export "trap") (i32.store (i32.const 16) (i32.const -1)) unreachable))"#
        .into()
}

/// How [`allocator`] returns its buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Returns {
    /// `process(ptr, len, out_len_ptr) -> ptr`
    OutPointer,
    /// `process(ptr, len) -> ptr << 32 | len`
    PackedI64,
    /// `process(ptr, len) -> (ptr, len)`
    MultiValue,
}

/// A guest that takes and returns buffers, and leaks.
///
/// - `allocate(size) -> ptr` (bump, 0 when memory cannot grow), `deallocate(ptr, size)`
/// - `process`: a copy of the input with every byte one higher, in the form that was asked for
/// - `wild`: the same form, with a buffer far outside; `endless`: never returns; `trap`: traps
/// - `hosted`: asks `env.host`, then does as `process` does
/// - `live() -> i32`: allocations without their deallocation, `bytes() -> i32`: the bytes of those
/// - `deny(i32)`: after that many more allocations, `allocate` answers 0
pub fn allocator(returns: Returns) -> String {
    let (params, result, store) = match returns {
        Returns::OutPointer => (
            "(param $ptr i32) (param $len i32) (param $cell i32)",
            "(result i32)",
            "(i32.store (local.get $cell) (local.get $out_len)) (local.get $out)",
        ),
        Returns::PackedI64 => (
            "(param $ptr i32) (param $len i32)",
            "(result i64)",
            "(i64.or (i64.shl (i64.extend_i32_u (local.get $out)) (i64.const 32))
                     (i64.extend_i32_u (local.get $out_len)))",
        ),
        Returns::MultiValue => (
            "(param $ptr i32) (param $len i32)",
            "(result i32 i32)",
            "(local.get $out) (local.get $out_len)",
        ),
    };
    format!(
        r#"(module $allocator
        (import "env" "host" (func $host))
        (memory (export "memory") 1)
        (global $top (mut i32) (i32.const 1024))
        (global $live (mut i32) (i32.const 0))
        (global $bytes (mut i32) (i32.const 0))
        (global $left (mut i32) (i32.const -1))
        (func $allocate (export "allocate") (param $size i32) (result i32) (local $ptr i32)
            (if (i32.eqz (global.get $left)) (then (return (i32.const 0))))
            (global.set $left (i32.sub (global.get $left) (i32.const 1)))
            (local.set $ptr (global.get $top))
            (global.set $top (i32.and (i32.const -8)
                (i32.add (i32.const 7) (i32.add (global.get $top) (local.get $size)))))
            (block $fits
                (loop $more
                    (br_if $fits (i32.le_u (global.get $top)
                        (i32.mul (memory.size) (i32.const 65536))))
                    (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))
                    (return (i32.const 0))))
            (global.set $live (i32.add (global.get $live) (i32.const 1)))
            (global.set $bytes (i32.add (global.get $bytes) (local.get $size)))
            (local.get $ptr))
        (func (export "deallocate") (param $ptr i32) (param $size i32)
            (global.set $live (i32.sub (global.get $live) (i32.const 1)))
            (global.set $bytes (i32.sub (global.get $bytes) (local.get $size))))
        (func (export "deny") (param i32) (global.set $left (local.get 0)))
        (func (export "live") (result i32) (global.get $live))
        (func (export "bytes") (result i32) (global.get $bytes))
        (func $process (export "process") {params} {result}
            (local $out i32) (local $out_len i32) (local $i i32)
            (local.set $out_len (local.get $len))
            (if (local.get $len) (then (local.set $out (call $allocate (local.get $len)))))
            (block $done
                (loop $next
                    (br_if $done (i32.ge_u (local.get $i) (local.get $len)))
                    (i32.store8 (i32.add (local.get $out) (local.get $i))
                        (i32.add (i32.const 1)
                            (i32.load8_u (i32.add (local.get $ptr) (local.get $i)))))
                    (local.set $i (i32.add (local.get $i) (i32.const 1)))
                    (br $next)))
            {store})
        (func (export "hosted") {params} {result} (local $out i32) (local $out_len i32)
            (call $host)
            (local.set $out (call $allocate (i32.const 4)))
            (local.set $out_len (i32.const 4))
            {store})
        (func (export "wild") {params} {result} (local $out i32) (local $out_len i32)
            (local.set $out (i32.const 0x7fffff00))
            (local.set $out_len (i32.const 4096))
            {store})
        (func (export "endless") {params} {result} (loop $again (br $again)) unreachable)
        (func (export "trap") {params} {result} unreachable))"#
    )
}

/// The ends of a call that never comes: `spin()`, `bare()` (an empty loop), `copy()` (only bulk
/// memory operations), `fib(i32) -> i32` (recursion without a loop), `well() -> i32`.
pub fn spinner() -> String {
    r#"(module $spinner
        (memory (export "memory") 2)
        (func (export "spin") (local $i i32)
            (loop $again
                (local.set $i (i32.add (local.get $i) (i32.const 1)))
                (i32.store (i32.const 0) (local.get $i))
                (br $again)))
        (func (export "bare") (loop $again (br $again)))
        (func (export "copy")
            (loop $again
                (memory.copy (i32.const 0) (i32.const 65536) (i32.const 65536))
                (br $again)))
        (func $fib (export "fib") (param i32) (result i32)
            (if (result i32) (i32.lt_s (local.get 0) (i32.const 2))
                (then (local.get 0))
                (else (i32.add
                    (call $fib (i32.sub (local.get 0) (i32.const 1)))
                    (call $fib (i32.sub (local.get 0) (i32.const 2)))))))
        (func (export "well") (result i32) (i32.const 7)))"#
        .into()
}

/// Traps of every kind that a guest can run into, by name; `fine() -> i32`.
pub const TRAPS: [(&str, &str); 9] = [
    ("unreachable", "unreachable"),
    ("memory", "out-of-bounds-memory"),
    ("table", "out-of-bounds-table"),
    ("null", "indirect-call-to-null"),
    ("type", "indirect-call-type-mismatch"),
    ("divide", "integer-divide-by-zero"),
    ("overflow", "integer-overflow"),
    ("convert", "invalid-conversion-to-integer"),
    ("deep", "stack-overflow"),
];

/// One export for each of [`TRAPS`].
pub fn trapper() -> String {
    r#"(module $trapper
        (memory 1)
        (table 2 funcref)
        (elem (i32.const 0) $fine)
        (type $v (func))
        (type $i (func (result i32)))
        (func $fine (export "fine") (result i32) (i32.const 7))
        (func (export "unreachable") unreachable)
        (func (export "memory") (drop (i32.load (i32.const 65536))))
        (func (export "table") (drop (table.get 0 (i32.const 2))))
        (func (export "null") (call_indirect (type $v) (i32.const 1)))
        (func (export "type") (call_indirect (type $v) (i32.const 0)))
        (func (export "divide") (drop (i32.div_s (i32.const 1) (i32.const 0))))
        (func (export "overflow")
            (drop (i32.div_s (i32.const 0x80000000) (i32.const -1))))
        (func (export "convert") (drop (i32.trunc_f32_s (f32.const nan))))
        (func $deep (export "deep") (result i32)
            (i32.add (i32.const 1) (call $deep))))"#
        .into()
}

/// A memory of `type_` pages (`"1"`, `"1 10"`): `grow(i32) -> i32`, `size() -> i32`,
/// `touch(bytes)` writes one byte into each page, `peek(ptr) -> i32`, `trap()`.
pub fn grower(type_: &str) -> String {
    format!(
        r#"(module $grower
        (memory (export "memory") {type_})
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
        (func (export "size") (result i32) (memory.size))
        (func (export "touch") (param $bytes i32)
            (block $done
                (loop $next
                    (br_if $done (i32.eqz (local.get $bytes)))
                    (local.set $bytes (i32.sub (local.get $bytes) (i32.const 4096)))
                    (i32.store8 (local.get $bytes) (i32.const 1))
                    (br $next))))
        (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0)))
        (func (export "trap") unreachable))"#
    )
}

/// Calls the host: `run(i32) -> i32` answers what `env.host(i32) -> i32` says; `twice(i32) -> i32`
/// and `again(i32) -> i32` (which asks the host once more) are for the way back in; `both(i32)`
/// asks twice; `trap()`, `spin()`, `after(i32) -> i32` asks and then loops for ever.
pub fn importer() -> String {
    r#"(module $importer
        (import "env" "host" (func $host (param i32) (result i32)))
        (memory (export "memory") 1)
        (func (export "run") (param i32) (result i32) (call $host (local.get 0)))
        (func (export "again") (param i32) (result i32) (call $host (local.get 0)))
        (func (export "twice") (param i32) (result i32)
            (i32.mul (local.get 0) (i32.const 2)))
        (func (export "both") (param i32) (result i32)
            (i32.add (call $host (local.get 0)) (call $host (local.get 0))))
        (func (export "after") (param i32) (result i32)
            (drop (call $host (local.get 0)))
            (loop $again (br $again))
            unreachable)
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
        (func (export "spin") (loop $again (br $again)))
        (func (export "trap") unreachable))"#
        .into()
}

/// References: `keep(externref)`, `kept() -> externref`, `pick(i32) -> funcref` (0: `one`, 1: an
/// unexported function, 2: null), `ask(externref) -> externref` and `pass(funcref) -> funcref` go
/// through `env.extern` and `env.func`, `apply(i32) -> i32` calls what `set(i32, funcref)` stored.
pub fn references() -> String {
    r#"(module $references
        (import "env" "extern" (func $extern (param externref) (result externref)))
        (import "env" "func" (func $func (param funcref) (result funcref)))
        (table $refs 4 externref)
        (table $funcs (export "table") 4 funcref)
        (elem declare func $one $two)
        (type $i (func (result i32)))
        (func $one (export "one") (result i32) (i32.const 1))
        (func $two (result i32) (i32.const 2))
        (func (export "keep") (param externref) (table.set $refs (i32.const 0) (local.get 0)))
        (func (export "kept") (result externref) (table.get $refs (i32.const 0)))
        (func (export "pick") (param i32) (result funcref)
            (if (i32.eqz (local.get 0)) (then (return (ref.func $one))))
            (if (i32.eq (local.get 0) (i32.const 1)) (then (return (ref.func $two))))
            (ref.null func))
        (func (export "ask") (param externref) (result externref) (call $extern (local.get 0)))
        (func (export "pass") (param funcref) (result funcref) (call $func (local.get 0)))
        (func (export "set") (param i32 funcref)
            (table.set $funcs (local.get 0) (local.get 1)))
        (func (export "apply") (param i32) (result i32)
            (call_indirect $funcs (type $i) (local.get 0))))"#
        .into()
}

/// Throws an exception that nobody catches, and one that it catches itself.
pub fn thrower() -> String {
    r#"(module $thrower
        (tag $e (param i32))
        (func (export "throw") (throw $e (i32.const 1)))
        (func (export "caught") (result i32)
            (block $h (result i32)
                (try_table (catch $e $h) (throw $e (i32.const 5)))
                unreachable))
        (func (export "fine") (result i32) (i32.const 7)))"#
        .into()
}

/// The start function asks `env.host()`, as `_initialize` does afterwards with `env.reactor()`.
pub fn starter() -> String {
    r#"(module $starter
        (import "env" "host" (func $host))
        (import "env" "reactor" (func $reactor))
        (memory (export "memory") 1)
        (func $start (call $host))
        (start $start)
        (func (export "_initialize") (call $reactor))
        (func (export "fine") (result i32) (i32.const 7)))"#
        .into()
}
