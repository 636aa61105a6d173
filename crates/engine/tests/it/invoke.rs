//! Buffers through the guest, in the three forms, and guests that get it wrong.

use wasm_molt_engine::{BufferReturns, CallLimits, Error, ErrorCode, HostRef, Value, Work};
use wasm_molt_testkit::guests::{self, Returns};
use wasm_molt_testkit::host::Script;
use wasm_molt_testkit::rig::{Rig, Setup, bytes, code, trap, values};
use wasm_molt_testkit::wait::answer;

const FORMS: [(Returns, BufferReturns); 3] = [
    (Returns::OutPointer, BufferReturns::OutPointer),
    (Returns::PackedI64, BufferReturns::PackedI64),
    (Returns::MultiValue, BufferReturns::MultiValue),
];

fn allocator((guest, abi): (Returns, BufferReturns)) -> Setup {
    let script = Script::new().function("host", |_| Err(Error::Thrown(HostRef::new("thrown"))));
    Setup::new(&guests::allocator(guest))
        .script(script)
        .options(|o| o.abi.returns = abi)
}

/// Nothing that was allocated is still allocated.
#[track_caller]
fn assert_balanced(rig: &Rig, what: &str) {
    let left = (rig.number("live", &[]), rig.number("bytes", &[]));
    assert_eq!(left, (0, 0), "allocations and bytes left after {what}");
}

#[test]
fn a_buffer_goes_in_and_another_comes_out_and_both_are_freed() {
    for form in FORMS {
        let rig = allocator(form).start();
        rig.manager.check_invoke(rig.function("process")).unwrap();
        for length in [0usize, 1, 2, 100, 65_536, 1 << 20] {
            let input: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let output = bytes(rig.invoke("process", &input).get());
            let expected: Vec<u8> = input.iter().map(|byte| byte.wrapping_add(1)).collect();
            assert!(output == expected, "{form:?}, {length} bytes");
            assert_balanced(&rig, &format!("{form:?}, {length} bytes"));
        }
        assert_eq!(rig.stats().generation, 1);
    }
}

#[test]
fn many_at_once_do_not_get_mixed_up() {
    for form in FORMS {
        let rig = allocator(form).instances(3).start();
        let sent: Vec<Vec<u8>> = (0..200u8).map(|n| vec![n; 10 + usize::from(n)]).collect();
        let calls: Vec<_> = sent
            .iter()
            .map(|input| rig.invoke("process", input))
            .collect();
        for (input, call) in sent.into_iter().zip(calls) {
            let expected: Vec<u8> = input.iter().map(|byte| byte + 1).collect();
            assert_eq!(bytes(call.get()), expected);
        }
    }
}

#[test]
fn a_buffer_outside_the_memory_is_refused() {
    for form in FORMS {
        let rig = allocator(form).start();
        let error = rig.invoke("wild", b"input").get().unwrap_err();
        assert_eq!(
            error.code(),
            Some(ErrorCode::InvalidArgument),
            "{form:?}: {error}"
        );
        assert!(error.to_string().contains("abi.returns"), "{error}");
        assert_balanced(&rig, &format!("a wild buffer, {form:?}"));
        assert_eq!(bytes(rig.invoke("process", &[1]).get()), [2]);
        assert_eq!(rig.stats().generation, 1);
    }
}

#[test]
fn an_allocator_that_answers_a_pointer_outside_is_refused() {
    let wat = r#"(module (memory 1)
        (func (export "allocate") (param i32) (result i32) (i32.const 0x7fff0000))
        (func (export "deallocate") (param i32 i32))
        (func (export "process") (param i32 i32 i32) (result i32) (i32.const 0)))"#;
    let rig = Setup::new(wat).start();
    let error = rig.invoke("process", &[1]).get().unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidArgument), "{error}");
    assert!(error.to_string().contains("allocate"), "{error}");
}

#[test]
fn an_allocation_that_fails_costs_the_instance_and_says_so() {
    for form in FORMS {
        let rig = allocator(form).start();
        let allocations = if form.0 == Returns::OutPointer { 2 } else { 1 };
        for succeed in 0..allocations {
            let generation = rig.stats().generation;
            values(rig.call("deny", &[Value::I32(succeed)]).get());
            let ended = rig.invoke("process", b"input").get();
            assert_eq!(trap(ended), "allocation-failed", "{form:?} after {succeed}");
            assert_eq!(bytes(rig.invoke("process", &[1]).get()), [2]);
            assert_eq!(rig.stats().generation, generation + 1);
        }
    }
}

#[test]
fn an_input_beyond_the_limit_is_an_allocation_that_fails() {
    let rig = allocator(FORMS[0])
        .options(|o| o.limits.memory_bytes = Some(1 << 20))
        .start();
    assert_eq!(
        trap(rig.invoke("process", &vec![0; 2 << 20]).get()),
        "allocation-failed"
    );
    assert_eq!(bytes(rig.invoke("process", &[1]).get()), [2]);
}

#[test]
fn a_trap_inside_is_a_trap() {
    for form in FORMS {
        let rig = allocator(form).start();
        assert_eq!(trap(rig.invoke("trap", b"input").get()), "unreachable");
        assert_eq!(bytes(rig.invoke("process", &[1]).get()), [2]);
        assert_eq!(rig.stats().generation, 2);
    }
}

#[test]
fn an_invoke_that_never_ends_is_stopped() {
    for form in FORMS {
        let rig = allocator(form)
            .options(|o| o.limits.timeout_ms = Some(10))
            .start();
        assert_eq!(
            code(rig.invoke("endless", b"input").get()),
            ErrorCode::Timeout
        );
        // A busy machine may take that long for a call that ends as well.
        let ended = loop {
            match rig.invoke("process", &[1]).get() {
                Err(error) if error.code() == Some(ErrorCode::Timeout) => {}
                ended => break ended,
            }
        };
        assert_eq!(bytes(ended), [2]);
    }
}

#[test]
fn what_the_host_throws_inside_comes_out_and_nothing_is_left() {
    for form in FORMS {
        let rig = allocator(form).start();
        for _ in 0..3 {
            let Err(Error::Thrown(thrown)) = rig.invoke("hosted", b"input").get() else {
                panic!()
            };
            assert_eq!(thrown.downcast_ref(), Some(&"thrown"));
        }
        assert_balanced(&rig, &format!("host errors, {form:?}"));
        assert_eq!(rig.stats().generation, 1);
    }
}

#[test]
fn a_guest_without_deallocate_just_leaks() {
    let setup = allocator(FORMS[0]).options(|o| o.abi.deallocate = None);
    let rig = setup.start();
    assert_eq!(bytes(rig.invoke("process", &[1, 2]).get()), [2, 3]);
    assert_eq!(rig.number("live", &[]), 3);
}

#[test]
fn what_cannot_be_invoked_is_refused_by_name() {
    let rig = allocator(FORMS[0]).start();
    let refused = |name| {
        let index = rig.function(name);
        let checked = rig.manager.check_invoke(index).unwrap_err();
        let ran = rig.invoke(name, &[1]).get().unwrap_err();
        assert_eq!(checked.code(), ran.code());
        assert!(
            checked.to_string().contains(&format!("'{name}'")),
            "{checked}"
        );
        checked.code().unwrap()
    };
    assert_eq!(refused("live"), ErrorCode::InvalidArgument);
    assert_eq!(refused("deny"), ErrorCode::InvalidArgument);

    for other in &FORMS[1..] {
        let rig = allocator((Returns::OutPointer, other.1)).start();
        let refused = rig.manager.check_invoke(rig.function("process"));
        assert_eq!(code(refused), ErrorCode::InvalidArgument);
    }

    type Change = fn(&mut wasm_molt_engine::BufferAbi);
    let changes: [(Change, ErrorCode, &str); 4] = [
        (
            |abi| abi.allocate = "malloc".into(),
            ErrorCode::ExportNotFound,
            "abi.allocate",
        ),
        (
            |abi| abi.deallocate = Some("free".into()),
            ErrorCode::ExportNotFound,
            "abi.deallocate",
        ),
        (
            |abi| abi.allocate = "live".into(),
            ErrorCode::InvalidArgument,
            "'live'",
        ),
        (
            |abi| abi.deallocate = Some("live".into()),
            ErrorCode::InvalidArgument,
            "'live'",
        ),
    ];
    for (change, expected, word) in changes {
        let rig = allocator(FORMS[0]).options(|o| change(&mut o.abi)).start();
        let error = rig
            .manager
            .check_invoke(rig.function("process"))
            .unwrap_err();
        assert_eq!(error.code(), Some(expected), "{error}");
        assert!(error.to_string().contains(word), "'{word}' in: {error}");
        assert_eq!(code(rig.invoke("process", &[1]).get()), expected);
    }
}

#[test]
fn a_guest_without_memory_takes_no_buffers() {
    let wat = r#"(module
        (func (export "allocate") (param i32) (result i32) (i32.const 8))
        (func (export "deallocate") (param i32 i32))
        (func (export "process") (param i32 i32 i32) (result i32) (i32.const 8)))"#;
    let rig = Setup::new(wat).start();
    assert_eq!(
        code(rig.invoke("process", &[1]).get()),
        ErrorCode::InvalidArgument
    );
    assert_eq!(rig.stats().generation, 1);
}

#[test]
fn an_invoke_before_the_start_is_checked_when_it_runs() {
    let rig = allocator(FORMS[0]).create();
    assert_eq!(code(rig.manager.check_invoke(0)), ErrorCode::Closed);
    let (settle, early) = answer("an invoke before the start");
    let work = Work::Invoke {
        function: 0,
        input: vec![1],
    };
    rig.manager
        .call(None, work, CallLimits::default(), Box::new(settle));
    rig.start().get().unwrap();
    // The first export is the allocator itself.
    assert_eq!(code(early.get()), ErrorCode::InvalidArgument);
}

#[test]
fn an_invoke_in_a_lease_finds_the_state_of_the_calls_before() {
    let rig = allocator(FORMS[0]).start();
    let lease = rig.lease();
    values(rig.call_in(&lease, "deny", &[Value::I32(0)]).get());
    let (settle, ended) = answer("an invoke in a lease");
    let work = Work::Invoke {
        function: rig.function("process"),
        input: vec![1],
    };
    rig.manager
        .call_in(&lease, work, CallLimits::default(), Box::new(settle));
    assert_eq!(trap(ended.get()), "allocation-failed");
    rig.release(&lease);
    assert_eq!(bytes(rig.invoke("process", &[1]).get()), [2]);
}
