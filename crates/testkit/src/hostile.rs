//! What must hold of any bytes and any values at all. The fuzz targets ask it of what a fuzzer makes up,
//! and tests ask it of seeds and of the corpus that was kept.
//!
//! Whatever does not hold panics, as a test does.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use wasm_molt_engine::{
    CacheChoice, Error, ErrorCode, HostRef, ImageKind, ImportKind, ImportValue, ManagerOptions,
    MemoryThreshold, OnTrap, Outcome, RecycleOptions, Replica, Result, Source, Value, ValueType,
};
use wasmparser::{Parser, Payload, TypeRef, Validator, WasmFeatures};

use crate::dice::Dice;
use crate::folder::Folder;
use crate::guests;
use crate::history;
use crate::host::{Script, function};
use crate::rig::{Ended, Rig, Setup};
use crate::smith::{self, Purpose};
use crate::wait::eventually;

/// What came of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// They are no module.
    Invalid,
    /// They are one, and could not be started.
    Refused(ErrorCode),
    /// They ran.
    Ran,
}

/// What a module may use, as docs/limits.md says: the reference for what validates.
pub fn features(threads: bool) -> WasmFeatures {
    let mut features = WasmFeatures::WASM3;
    features.set(WasmFeatures::THREADS, threads);
    features.set(WasmFeatures::LEGACY_EXCEPTIONS, false);
    features
}

/// What the validator says of the bytes as they are, before anything was spliced in.
pub fn is_valid(bytes: &[u8], threads: bool) -> bool {
    let is_core = Validator::new_with_features(features(threads)).validate_all(bytes);
    // A component is valid, too, and is no module.
    is_core.is_ok() && bytes.get(4..8) == Some(&[1, 0, 0, 0])
}

/// The same for a module of a realm, which may have atomic instructions, but no shared memory unless asked.
pub fn is_valid_in_realm(bytes: &[u8]) -> bool {
    is_valid(bytes, true) && !has_shared_memory(bytes)
}

fn has_shared_memory(bytes: &[u8]) -> bool {
    let payloads = Parser::new(0).parse_all(bytes).map_while(|it| it.ok());
    payloads.into_iter().any(|payload| match payload {
        Payload::MemorySection(memories) => memories.into_iter().flatten().any(|ty| ty.shared),
        Payload::ImportSection(imports) => {
            let types = imports.into_imports().flatten().map(|import| import.ty);
            types
                .into_iter()
                .any(|ty| matches!(ty, TypeRef::Memory(ty) if ty.shared))
        }
        _ => false,
    })
}

/// The input of the target `modules`: bytes as they are, a valid module, or one that is almost valid.
pub fn module_of(input: &[u8]) -> Option<Vec<u8>> {
    let (&kind, rest) = input.split_first()?;
    match kind % 4 {
        // So that a file that begins as modules do is taken as it is.
        0 => Some(if kind == 0 { input.into() } else { rest.into() }),
        1 | 2 => smith::module(Purpose::Anything, features(true), &mut Dice::read(rest)),
        _ => {
            let (damage, rest) = rest.split_at_checked(12)?;
            let mut dice = Dice::read(rest);
            let mut bytes = smith::module(Purpose::Anything, features(true), &mut dice)?;
            smith::damage(&mut bytes, &mut Dice::read(damage));
            Some(bytes)
        }
    }
}

/// * `threads`: whether it may have a shared memory.
fn setup(bytes: &[u8], threads: bool) -> Setup {
    let script = Script::new().imports(|_, module| module.imports().iter().map(import).collect());
    Setup::of(Source::Bytes(bytes.into()))
        .script(script)
        .options(|options| {
            options.name = Some("hostile".into());
            options.engine.fuel = true;
            options.engine.threads = threads;
            options.engine.memory_reservation_bytes = 16 << 20;
            options.limits.fuel = Some(50_000);
            options.limits.memory_bytes = Some(8 << 20);
            options.limits.table_elements = Some(10_000);
            options.limits.stack = Some(128 << 10);
            // What it did before the trap is compared, too.
            options.recycle = Some(RecycleOptions {
                on_trap: OnTrap::Keep,
                ..RecycleOptions::default()
            });
        })
}

/// The plainest thing that an import can be.
fn import(import: &wasm_molt_engine::Import) -> Result<ImportValue> {
    Ok(match &import.kind {
        // Its results are zeros and nulls.
        ImportKind::Function(_) => function(|_| Ok(())),
        ImportKind::Global { ty, .. } => ImportValue::Global(Value::default_of(*ty)),
        ImportKind::Memory {
            minimum, maximum, ..
        } => ImportValue::Memory {
            initial: *minimum,
            maximum: *maximum,
        },
        ImportKind::Table {
            minimum, maximum, ..
        } => ImportValue::Table {
            initial: *minimum,
            maximum: *maximum,
        },
        ImportKind::Tag => {
            let message = format!("no tag for '{}'.'{}'", import.module, import.name);
            return Err(Error::new(ErrorCode::Link, message));
        }
    })
}

/// The error at the bottom.
fn root(error: &Error) -> &Error {
    match error {
        Error::ReloadFailed { cause, .. } => root(cause),
        error => error,
    }
}

#[track_caller]
fn code_of(error: &Error) -> ErrorCode {
    let Some(code) = root(error).code() else {
        panic!("an error without a code: {error:?}")
    };
    assert_ne!(code, ErrorCode::Internal, "{error}");
    assert!(!error.to_string().is_empty(), "an error that says nothing");
    code
}

/// Takes any bytes for modules.
#[derive(Debug)]
pub struct Modules {
    realm: Rig,
}

impl Modules {
    /// With a realm that compiles each of them, too.
    #[expect(clippy::new_without_default, reason = "it starts threads")]
    pub fn new() -> Self {
        let options = |options: &mut ManagerOptions| {
            options.engine.memory_reservation_bytes = 16 << 20;
        };
        let realm = Setup::realm().options(options).start();
        Self { realm }
    }

    /// They are refused, or run within their limits; and what runs does the same again after a reset.
    ///
    /// * `input`: as in [`module_of`]; its last bytes choose what is called.
    pub fn ask(&self, input: &[u8]) -> Came {
        let Some(bytes) = module_of(input) else {
            return Came::Invalid;
        };
        self.compile_in_realm(&bytes);
        // Whoever has threads on has all that others have, so that it is asked for only where it is needed.
        let threads = !is_valid(&bytes, false) && is_valid(&bytes, true);
        let is_valid = is_valid(&bytes, threads);
        let rig = setup(&bytes, threads).create();
        match rig.start().get() {
            Ok(()) => assert!(is_valid, "an invalid module was started"),
            Err(error) => {
                assert_refused_with_reason(is_valid, &error);
                return if is_valid {
                    Came::Refused(code_of(&error))
                } else {
                    Came::Invalid
                };
            }
        }
        run_twice(&rig, input);
        Came::Ran
    }

    fn compile_in_realm(&self, bytes: &[u8]) {
        let manager = &self.realm.manager;
        match manager.validates(bytes) {
            Ok(said) => assert_eq!(said, is_valid_in_realm(bytes), "what validates() says"),
            Err(error) => panic!("{error}"),
        }
        // One with a shared memory compiles, and the error is that of its instances (docs/glue.md).
        let is_valid = is_valid(bytes, true);
        match manager.compile(bytes.into()) {
            Ok(_) => assert!(is_valid, "an invalid module was compiled"),
            Err(error) => assert_refused_with_reason(is_valid, &error),
        }
    }
}

/// Only what is invalid is called so, but for limits that an implementation may have.
fn assert_refused_with_reason(is_valid: bool, error: &Error) {
    let is_called_invalid = code_of(error) == ErrorCode::Compile;
    assert!(
        is_called_invalid != is_valid || is_beyond_limits(error),
        "valid: {is_valid}, and said {error}"
    );
}

/// Whether a valid module was refused for a limit of the implementation: those that compilers may have.
fn is_beyond_limits(error: &Error) -> bool {
    let text = error.to_string();
    // Polls and hidden exports need some room below the format's own limits.
    text.contains("no room for interruption")
}

fn run_twice(rig: &Rig, input: &[u8]) {
    let taken = rig.ask_snapshot().0.get();
    let first = run(rig, input);
    match taken {
        Ok(snapshot) => {
            rig.reset(Some(&snapshot));
            let again = run(rig, input);
            assert_eq!(first, again, "a reset begins with another state");
        }
        Err(error) => assert_eq!(code_of(&error), ErrorCode::SnapshotUnsupported, "{error}"),
    }
}

/// Calls everything that can be called; what comes back, and the memory at the end.
fn run(rig: &Rig, input: &[u8]) -> (Vec<String>, u64) {
    let Some(module) = rig.manager.module() else {
        panic!("no module, though it has started")
    };
    // From the end, because the beginning has made the module.
    let choices: Vec<u8> = input.iter().rev().take(64).copied().collect();
    let mut dice = Dice::read(&choices);
    let mut said = Vec::new();
    for function in module.functions().iter().take(24) {
        let types = &function.signature.params;
        let args: Vec<_> = types.iter().map(|ty| value(*ty, &mut dice)).collect();
        let ended = rig.call(&function.name, &args).get();
        said.push(told(&function.name, &function.signature.results, ended));
        eventually("whoever was stopped is replaced", || {
            let stats = rig.manager.stats(None);
            stats.gate.retired == 0 && stats.poisoned == 0
        });
    }
    (said, rig.manager.replica(0).map_or(0, |it| digest(&it)))
}

/// A value of that type: of those that break things, or any.
pub fn value(ty: ValueType, dice: &mut Dice<'_>) -> Value {
    const EDGES: [u64; 12] = [
        0,
        1,
        u64::MAX,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        // Not a number, signalling, in both widths; and the infinities.
        0x7fa0_0000,
        0x7ff4_0000_0000_0000,
        0x7f80_0000,
        0xfff0_0000_0000_0000,
    ];
    let choice = dice.roll(2 * EDGES.len());
    let bits = EDGES.get(choice).copied().unwrap_or_else(|| dice.number());
    match ty {
        ValueType::I32 => Value::I32(bits as i32),
        ValueType::I64 => Value::I64(bits as i64),
        ValueType::F32 => Value::F32(f32::from_bits(bits as u32)),
        ValueType::F64 => Value::F64(f64::from_bits(bits)),
        ValueType::ExternRef if bits % 3 > 0 => Value::Extern(Some(HostRef::new(bits))),
        other => Value::default_of(other),
    }
}

/// How a call ended, in words that are the same each time.
fn told(name: &str, types: &[ValueType], ended: Ended) -> String {
    match ended {
        Ok(Outcome::Values(values)) => {
            let came: Vec<_> = values.iter().map(Value::ty).collect();
            assert_eq!(came, types, "'{name}' has results of other types");
            values.iter().map(word).collect::<Vec<_>>().join(" ")
        }
        Ok(Outcome::Bytes(_)) => panic!("bytes out of a plain call"),
        Err(Error::Trap { info, .. }) => info.kind.into(),
        Err(error) => {
            let code = code_of(&error);
            let may = [
                ErrorCode::OutOfFuel,
                // A value that cannot cross.
                ErrorCode::InvalidArgument,
            ];
            assert!(may.contains(&code), "'{name}' ended with {error}");
            code.to_string()
        }
    }
}

fn word(value: &Value) -> String {
    match value {
        Value::I32(v) => format!("{v:x}"),
        Value::I64(v) => format!("{v:x}"),
        Value::F32(v) => format!("{:x}", v.to_bits()),
        Value::F64(v) => format!("{:x}", v.to_bits()),
        Value::Extern(None) => "null".into(),
        Value::Extern(Some(held)) => match held.downcast_ref::<u64>() {
            Some(number) => format!("host {number:x}"),
            None => panic!("a host value that nobody has given: {held:?}"),
        },
        Value::Func(function) => format!("function {}", function.is_some()),
        Value::Export { .. } => panic!("a position came out of a guest"),
    }
}

/// A number that stands for the main memory's contents.
fn digest(replica: &Arc<Replica>) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    if let Some(memory) = replica.memory() {
        let mut bytes = vec![0; memory.byte_len()];
        let read = memory.read(0, &mut bytes);
        assert!(read.is_ok(), "the memory cannot be read: {read:?}");
        hasher.write(&bytes);
    }
    hasher.finish()
}

/// Plays any sequence of writes, growths, snapshots, resets, forks and reloads against the model.
pub fn history(input: &[u8]) {
    let Some((&kind, rest)) = input.split_first() else {
        return;
    };
    let image = if kind & 1 == 0 {
        ImageKind::CopyOnWrite
    } else {
        ImageKind::Copy
    };
    history::play(image, kind & 2 != 0, &mut Dice::read(rest), 64, "bytes");
}

/// Gives any values, and any options, to guests that say what they got: what fits comes back bit for bit, and what
/// does not is refused by name, with the guest untouched.
pub fn values(input: &[u8]) {
    let mut dice = Dice::read(input);
    let Some(rig) = any_options(&mut dice) else {
        return;
    };
    let Some(module) = rig.manager.module() else {
        panic!("no module, though it has started")
    };
    while !dice.is_over() {
        let function = &module.functions()[dice.roll(module.functions().len())];
        let params = &function.signature.params;
        let count = match dice.roll(8) {
            0 => dice.roll(6),
            _ => params.len(),
        };
        let ty = |index: usize, dice: &mut Dice<'_>| match (dice.roll(8), params.get(index)) {
            (1.., Some(ty)) => *ty,
            _ => ANY_TYPE[dice.roll(ANY_TYPE.len())],
        };
        let mut args = Vec::new();
        for index in 0..count {
            let ty = ty(index, &mut dice);
            args.push(value(ty, &mut dice));
        }
        let fits = args.iter().map(Value::ty).eq(params.iter().copied());
        let given: Vec<_> = args.iter().map(word).collect();
        let name = &function.name;
        match rig.call(name, &args).get() {
            Ok(Outcome::Values(values)) => {
                assert!(fits, "'{name}' took {given:?}");
                let mut came: Vec<_> = values.iter().map(word).collect();
                if name == "swap" {
                    came.reverse();
                }
                assert_eq!(came, given, "'{name}'");
            }
            Ok(Outcome::Bytes(_)) => panic!("bytes out of a plain call"),
            Err(error) => {
                let code = code_of(&error);
                assert_eq!(code, ErrorCode::InvalidArgument, "{error}");
                assert!(
                    !fits || !function.signature.can_cross(),
                    "'{name}': {error}"
                );
            }
        }
    }
}

const ANY_TYPE: [ValueType; 6] = [
    ValueType::I32,
    ValueType::I64,
    ValueType::F32,
    ValueType::F64,
    ValueType::ExternRef,
    ValueType::FuncRef,
];

/// A manager of the echo with options as the dice fall; `None` where they are refused, as they have to be.
fn any_options(dice: &mut Dice<'_>) -> Option<Rig> {
    // Most of what is possible would only cost time: many instances, hours of waiting.
    let small = |dice: &mut Dice<'_>| dice.roll(3) + 1;
    let count = |dice: &mut Dice<'_>| match dice.roll(8) {
        0 => 0,
        1 => 4097 + dice.number() as usize % (usize::MAX - 4097),
        _ => small(dice),
    };
    let (instances, threads) = (count(dice), count(dice));
    let stack = match dice.roll(6) {
        0 => dice.number() as usize,
        1 => (64 << 10) - 1,
        2 => (256 << 20) + 1,
        _ => 128 << 10,
    };
    let (counts_fuel, has_fuel) = (dice.roll(2) == 1, dice.roll(3) == 0);
    let jitter = match dice.roll(4) {
        0 => f64::from_bits(dice.number()),
        _ => 0.5,
    };
    let share = match dice.roll(4) {
        0 => f64::from_bits(dice.number()),
        _ => 0.5,
    };
    let memory = match dice.roll(4) {
        0 => Some(MemoryThreshold::Share(share)),
        1 => Some(MemoryThreshold::Bytes(dice.number() % 3)),
        _ => None,
    };
    let range = (64 << 10)..=(256 << 20);
    let may_be = (1..=4096).contains(&instances)
        && (1..=4096).contains(&threads)
        && range.contains(&stack)
        && (counts_fuel || !has_fuel)
        && (0.0..=1.0).contains(&jitter)
        && match memory {
            Some(MemoryThreshold::Share(share)) => share > 0.0 && share <= 1.0,
            Some(MemoryThreshold::Bytes(bytes)) => bytes > 0,
            None => true,
        };
    let made = Setup::new(&guests::echo())
        .options(|options| {
            options.instances = instances;
            options.threads = Some(threads);
            options.limits.stack = Some(stack);
            options.limits.fuel = has_fuel.then_some(1 << 20);
            options.engine.fuel = counts_fuel;
            options.engine.memory_reservation_bytes = 1 << 20;
            options.recycle = Some(RecycleOptions {
                memory,
                jitter,
                ..RecycleOptions::default()
            });
        })
        .try_create();
    match made {
        Ok(rig) => {
            assert!(may_be, "options that cannot be were taken");
            match rig.start().get() {
                Ok(()) => Some(rig),
                // The machine may have less stack than may be asked for.
                Err(error) => {
                    assert_ne!(code_of(&error), ErrorCode::Compile, "{error}");
                    None
                }
            }
        }
        Err(error) => {
            assert!(!may_be, "{error}");
            assert_eq!(code_of(&error), ErrorCode::InvalidArgument, "{error}");
            None
        }
    }
}

/// Does anything to the files in which compiled code is kept: whatever is there, the module that runs is the one that
/// was given, and its entry is put right.
pub fn cache(input: &[u8]) {
    // One folder for all, because an engine is kept for each.
    static SHELF: OnceLock<Mutex<Shelf>> = OnceLock::new();
    let shelf = SHELF.get_or_init(|| Mutex::new(Shelf::new()));
    let shelf = shelf.lock().unwrap_or_else(PoisonError::into_inner);
    let mut dice = Dice::read(input);
    while !dice.is_over() {
        let what = shelf.damage(&mut dice);
        shelf.check(&what);
    }
}

/// Two modules, kept on disk.
struct Shelf {
    _folder: Folder,
    modules: PathBuf,
    entries: [(PathBuf, Vec<u8>); 2],
    /// A well-made entry of the first module, by somebody else.
    foreign: Vec<u8>,
}

impl Shelf {
    fn new() -> Self {
        let folder = Folder::new("shelf");
        let modules = folder.path().join("modules");
        let kept = |folder: &Folder, which: usize| {
            let before = entries(&folder.path().join("modules"));
            assert_eq!(answer(folder.path(), which), Self::constant(which));
            let after = entries(&folder.path().join("modules"));
            let fresh = after.into_iter().find(|path| !before.contains(path));
            let Some(path) = fresh else {
                panic!("nothing was kept")
            };
            let bytes = read(&path);
            (path, bytes)
        };
        let entries = [kept(&folder, 0), kept(&folder, 1)];
        let other = Folder::new("other-shelf");
        let (_, foreign) = kept(&other, 0);
        Self {
            _folder: folder,
            modules,
            entries,
            foreign,
        }
    }

    fn constant(which: usize) -> i32 {
        [0x1234_5678, 0x0666_0666][which]
    }

    /// Damages the entry of the first module.
    fn damage(&self, dice: &mut Dice<'_>) -> String {
        let (path, good) = &self.entries[0];
        let mut bytes = good.clone();
        let at = dice.roll(bytes.len());
        let what = match dice.roll(9) {
            0 => {
                bytes[at] ^= 1 << dice.roll(8);
                format!("a bit at {at}")
            }
            1 => {
                bytes.truncate(at);
                format!("cut off at {at}")
            }
            2 => {
                let fresh = dice.bytes(32);
                bytes.splice(at..(at + fresh.len()).min(good.len()), fresh);
                format!("other bytes at {at}")
            }
            3 => {
                bytes.extend(dice.bytes(16));
                "more bytes".into()
            }
            4 => {
                bytes.clone_from(&self.entries[1].1);
                "the other module".into()
            }
            5 => {
                bytes.clone_from(&self.foreign);
                "somebody else's".into()
            }
            6 => {
                // What it returns, wherever that stands in the machine code.
                let constant = Self::constant(0).to_le_bytes();
                let evil = Self::constant(1).to_le_bytes();
                for at in 0..bytes.len() - 4 {
                    if bytes[at..at + 4] == constant {
                        bytes[at..at + 4].copy_from_slice(&evil);
                    }
                }
                "other machine code".into()
            }
            7 => {
                bytes = dice.bytes(64);
                "nothing but noise".into()
            }
            _ => {
                bytes[..32].copy_from_slice(&self.entries[1].1[..32]);
                "the other one's seal".into()
            }
        };
        let written = fs::write(path, &bytes);
        assert!(written.is_ok(), "{written:?}");
        what
    }

    fn check(&self, what: &str) {
        let (path, good) = &self.entries[0];
        let folder = self.modules.parent().unwrap_or(&self.modules);
        assert_eq!(answer(folder, 0), Self::constant(0), "{what}");
        assert!(read(path) == *good, "not put right: {what}");
    }
}

fn read(path: &Path) -> Vec<u8> {
    match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(all) = fs::read_dir(folder) else {
        return Vec::new();
    };
    all.flatten()
        .map(|entry| entry.path())
        .filter(|path| !path.ends_with("key"))
        .collect()
}

/// What one of the two says, out of the cache or not.
fn answer(folder: &Path, which: usize) -> i32 {
    let constant = Shelf::constant(which);
    let guest =
        format!(r#"(module $kept (func (export "f") (result i32) (i32.const {constant})))"#);
    let rig = Setup::new(&guest)
        .options(|options| options.cache = CacheChoice::Folder(folder.into()))
        .start();
    rig.number("f", &[])
}
