// A converter of our own that leaks, as text: it turns plain text into HTML, and its allocator never frees.
// Both engines get the same module, and the same conversion in JavaScript says what is right.

const entities: Record<string, string> = { '<': '&lt;', '>': '&gt;', '&': '&amp;', '"': '&quot;', '\n': '<br>\n' }

/** Where the guest keeps the entities, and for each ASCII character: how many bytes its answer has, and where it stands. */
const [texts, lengths, places, free] = [0, 64, 192, 320]

const pooled = Object.values(entities).join('')
const ascii = Array.from({ length: 128 }, (_, code) => entities[String.fromCharCode(code)])

/** As the guest does it. */
export function convert(text: string): string {
  return text.replace(/[<>&"\n]|\P{ASCII}/gu, (found) => entities[found] ?? `&#${found.codePointAt(0)};`)
}

/** For an escaped string of WAT. */
function data(bytes: Iterable<number>): string {
  return [...bytes].map((byte) => `\\${byte.toString(16).padStart(2, '0')}`).join('')
}

/**
 * `convert` follows the ABI of `invoke`. It decodes UTF-8 into UTF-16, as many a converter does before it looks at its text, counts what
 * the answer needs, and writes it. A call leaves its input, those units and its answer behind: about 62 KB for 15 KB of text.
 */
export const converterText = `(module
  (memory (export "memory") 1)
  (global $top (mut i32) (i32.const ${free}))
  (data (i32.const ${texts}) "${data(new TextEncoder().encode(pooled))}")
  (data (i32.const ${lengths}) "${data(ascii.map((entity) => entity?.length ?? 1))}")
  (data (i32.const ${places}) "${data(ascii.map((entity) => (entity ? texts + pooled.indexOf(entity) : 0)))}")

  ;; A pointer that goes up. 0: there is no more memory.
  (func $allocate (export "allocate") (param $size i32) (result i32)
    (local $at i32) (local $end i32) (local $pages i32)
    (local.set $at (global.get $top))
    (local.set $end (i32.and (i32.add (i32.add (local.get $at) (local.get $size)) (i32.const 15)) (i32.const -16)))
    (local.set $pages (i32.shr_u (i32.add (local.get $end) (i32.const 65535)) (i32.const 16)))
    (if (i32.gt_u (local.get $pages) (memory.size))
      (then
        (if (i32.eq (memory.grow (i32.sub (local.get $pages) (memory.size))) (i32.const -1))
          (then (return (i32.const 0))))))
    (global.set $top (local.get $end))
    (local.get $at))
  (func (export "deallocate") (param i32 i32))

  (func $digits (param $value i32) (result i32)
    (local $count i32)
    (loop $again
      (local.set $count (i32.add (local.get $count) (i32.const 1)))
      (local.set $value (i32.div_u (local.get $value) (i32.const 10)))
      (br_if $again (local.get $value)))
    (local.get $count))

  (func (export "convert") (param $in i32) (param $size i32) (param $cell i32) (result i32)
    (local $end i32) (local $units i32) (local $unit i32) (local $code i32) (local $bytes i32)
    (local $out i32) (local $to i32) (local $length i32) (local $digit i32)
    (local.set $units (call $allocate (i32.shl (local.get $size) (i32.const 1))))
    (if (i32.eqz (local.get $units)) (then (unreachable)))
    (local.set $unit (local.get $units))
    (local.set $end (i32.add (local.get $in) (local.get $size)))

    (block $decoded
      (loop $next
        (br_if $decoded (i32.ge_u (local.get $in) (local.get $end)))
        (local.set $code (i32.load8_u (local.get $in)))
        (if (i32.lt_u (local.get $code) (i32.const 128))
          (then
            (local.set $in (i32.add (local.get $in) (i32.const 1)))
            (local.set $bytes (i32.add (local.get $bytes) (i32.load8_u offset=${lengths} (local.get $code)))))
          (else
            (if (i32.lt_u (local.get $code) (i32.const 0xe0))
              (then
                (local.set $code (i32.or
                  (i32.shl (i32.and (local.get $code) (i32.const 0x1f)) (i32.const 6))
                  (i32.and (i32.load8_u offset=1 (local.get $in)) (i32.const 0x3f))))
                (local.set $in (i32.add (local.get $in) (i32.const 2))))
              (else
                (if (i32.lt_u (local.get $code) (i32.const 0xf0))
                  (then
                    (local.set $code (i32.or (i32.or
                      (i32.shl (i32.and (local.get $code) (i32.const 0x0f)) (i32.const 12))
                      (i32.shl (i32.and (i32.load8_u offset=1 (local.get $in)) (i32.const 0x3f)) (i32.const 6)))
                      (i32.and (i32.load8_u offset=2 (local.get $in)) (i32.const 0x3f))))
                    (local.set $in (i32.add (local.get $in) (i32.const 3))))
                  (else
                    (local.set $code (i32.or (i32.or (i32.or
                      (i32.shl (i32.and (local.get $code) (i32.const 0x07)) (i32.const 18))
                      (i32.shl (i32.and (i32.load8_u offset=1 (local.get $in)) (i32.const 0x3f)) (i32.const 12)))
                      (i32.shl (i32.and (i32.load8_u offset=2 (local.get $in)) (i32.const 0x3f)) (i32.const 6)))
                      (i32.and (i32.load8_u offset=3 (local.get $in)) (i32.const 0x3f))))
                    (local.set $in (i32.add (local.get $in) (i32.const 4)))))))
            (local.set $bytes (i32.add (local.get $bytes) (i32.add (i32.const 3) (call $digits (local.get $code)))))))
        (if (i32.ge_u (local.get $code) (i32.const 0x10000))
          (then
            (i32.store16 (local.get $unit)
              (i32.add (i32.const 0xd7c0) (i32.shr_u (local.get $code) (i32.const 10))))
            (local.set $unit (i32.add (local.get $unit) (i32.const 2)))
            (local.set $code (i32.or (i32.const 0xdc00) (i32.and (local.get $code) (i32.const 0x3ff))))))
        (i32.store16 (local.get $unit) (local.get $code))
        (local.set $unit (i32.add (local.get $unit) (i32.const 2)))
        (br $next)))

    (local.set $out (call $allocate (local.get $bytes)))
    (if (i32.eqz (local.get $out)) (then (unreachable)))
    (local.set $to (local.get $out))
    (local.set $end (local.get $unit))
    (local.set $unit (local.get $units))
    (block $written
      (loop $next
        (br_if $written (i32.ge_u (local.get $unit) (local.get $end)))
        (local.set $code (i32.load16_u (local.get $unit)))
        (local.set $unit (i32.add (local.get $unit) (i32.const 2)))
        (if (i32.lt_u (local.get $code) (i32.const 128))
          (then
            (local.set $length (i32.load8_u offset=${lengths} (local.get $code)))
            (if (i32.eq (local.get $length) (i32.const 1))
              (then (i32.store8 (local.get $to) (local.get $code)))
              (else (memory.copy
                (local.get $to) (i32.load8_u offset=${places} (local.get $code)) (local.get $length))))
            (local.set $to (i32.add (local.get $to) (local.get $length))))
          (else
            (if (i32.eq (i32.and (local.get $code) (i32.const 0xfc00)) (i32.const 0xd800))
              (then
                (local.set $code (i32.add
                  (i32.shl (i32.sub (local.get $code) (i32.const 0xd7c0)) (i32.const 10))
                  (i32.and (i32.load16_u (local.get $unit)) (i32.const 0x3ff))))
                (local.set $unit (i32.add (local.get $unit) (i32.const 2)))))
            (i32.store16 (local.get $to) (i32.const 0x2326))
            (local.set $to (i32.add (i32.add (local.get $to) (i32.const 2)) (call $digits (local.get $code))))
            (local.set $digit (local.get $to))
            (loop $again
              (local.set $digit (i32.sub (local.get $digit) (i32.const 1)))
              (i32.store8 (local.get $digit)
                (i32.add (i32.const 48) (i32.rem_u (local.get $code) (i32.const 10))))
              (local.set $code (i32.div_u (local.get $code) (i32.const 10)))
              (br_if $again (local.get $code)))
            (i32.store8 (local.get $to) (i32.const 59))
            (local.set $to (i32.add (local.get $to) (i32.const 1)))))
        (br $next)))
    (i32.store (local.get $cell) (local.get $bytes))
    (local.get $out)))`
