;; Upper-cases text, a to z. Every conversion makes its tables anew, 62,000 bytes, and gives nothing back.
(module $converter
  (memory (export "memory") 1 4096)
  (global $top (mut i32) (i32.const 64))

  ;; From the top of the memory, which grows; 0 once it cannot.
  (func $allocate (export "allocate") (param $size i32) (result i32)
    (local $at i32)
    (local $missing i32)
    (local.set $at (global.get $top))
    (local.set $missing (i32.sub
      (i32.add (local.get $at) (local.get $size))
      (i32.mul (memory.size) (i32.const 65536))))
    (if (i32.gt_s (local.get $missing) (i32.const 0))
      (then
        (if (i32.eq (i32.const -1)
              (memory.grow (i32.div_u (i32.add (local.get $missing) (i32.const 65535)) (i32.const 65536))))
          (then (return (i32.const 0))))))
    (global.set $top (i32.and
      (i32.add (i32.add (local.get $at) (local.get $size)) (i32.const 7))
      (i32.const -8)))
    (local.get $at))

  ;; The leak.
  (func (export "deallocate") (param $at i32) (param $size i32))

  ;; (text, its length, where to say the length of the result) -> result. One table for bytes, and one for those after 0xc3.
  (func (export "convert") (param $text i32) (param $length i32) (param $length_out i32) (result i32)
    (local $tables i32)
    (local $table i32)
    (local $out i32)
    (local $i i32)
    (local $byte i32)
    (local.set $tables (call $allocate (i32.const 62000)))
    (if (i32.eqz (local.get $tables)) (then unreachable))
    (memory.fill (local.get $tables) (i32.const 0) (i32.const 62000))
    (loop $every
      (i32.store8 (i32.add (local.get $tables) (local.get $i)) (local.get $i))
      (i32.store8 offset=256 (i32.add (local.get $tables) (local.get $i)) (local.get $i))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $every (i32.lt_u (local.get $i) (i32.const 256))))
    (local.set $i (i32.const 0x61))
    (loop $letters
      (i32.store8 (i32.add (local.get $tables) (local.get $i)) (i32.sub (local.get $i) (i32.const 32)))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $letters (i32.le_u (local.get $i) (i32.const 0x7a))))
    (i32.store (local.get $length_out) (local.get $length))
    (if (i32.eqz (local.get $length)) (then (return (i32.const 0))))
    (local.set $out (call $allocate (local.get $length)))
    (if (i32.eqz (local.get $out)) (then unreachable))
    (local.set $table (local.get $tables))
    (local.set $i (i32.const 0))
    (loop $bytes
      (local.set $byte (i32.load8_u (i32.add (local.get $text) (local.get $i))))
      (i32.store8
        (i32.add (local.get $out) (local.get $i))
        (i32.load8_u (i32.add (local.get $table) (local.get $byte))))
      (local.set $table (i32.add (local.get $tables)
        (select (i32.const 256) (i32.const 0) (i32.eq (local.get $byte) (i32.const 0xc3)))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $bytes (i32.lt_u (local.get $i) (local.get $length))))
    (local.get $out)))
