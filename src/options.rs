//! Options of the user, read and checked for their types. Ranges and defaults are the engine's.

use std::path::PathBuf;
use std::time::Duration;

use napi::sys;
use wasm_molt_engine::{
    Backoff, BufferAbi, BufferReturns, CacheChoice, EngineOptions, Error, ImageKind, Isolation,
    Limits, ManagerOptions, MemoryThreshold, OnDrainTimeout, OnTrap, RecycleOptions,
    RecycleStrategy, ReloadOptions, ResetOptions, Source, Strategy,
};

use crate::convert::invalid;
use crate::js::{Js, Kind, Val};
use crate::side::Hooks;

/// A type error of the user's (told as an engine error), or a pending exception of a getter.
pub(crate) enum Refused {
    Error(Error),
    Pending,
}

impl From<crate::js::Pending> for Refused {
    fn from(_: crate::js::Pending) -> Self {
        Self::Pending
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

type Read<T> = Result<T, Refused>;

/// One options object, read key by key.
struct Reader<'a> {
    js: Js,
    /// How errors call it: `options`, `options.limits`, …
    path: &'a str,
    object: Val,
}

/// Larger numbers are not exact in JavaScript.
const MAX_SAFE: f64 = 9_007_199_254_740_991.0;

impl<'a> Reader<'a> {
    /// `None` for undefined. Keys that are not known are mistakes: they are told, with the known ones.
    fn open(js: Js, path: &'a str, object: Val, known: &[&str]) -> Read<Option<Self>> {
        match js.kind(object)? {
            Kind::Undefined | Kind::Null => return Ok(None),
            Kind::Object => {}
            _ => return Err(invalid(format!("{path} must be an object")).into()),
        }
        for key in js.keys(object)? {
            if !known.contains(&key.as_str())
                && js.kind(js.property_named(object, &key)?)? != Kind::Undefined
            {
                return Err(invalid(format!(
                    "{path}.{key} is not an option of this version; known: {}",
                    known.join(", ")
                ))
                .into());
            }
        }
        Ok(Some(Self { js, path, object }))
    }

    fn get(&self, name: &str) -> Read<Option<(Val, Kind)>> {
        let value = self.js.property_named(self.object, name)?;
        let kind = self.js.kind(value)?;
        Ok((kind != Kind::Undefined).then_some((value, kind)))
    }

    fn wrong<T>(&self, name: &str, wanted: &str) -> Read<T> {
        Err(invalid(format!("{}.{name} must be {wanted}", self.path)).into())
    }

    fn boolean(&self, name: &str) -> Read<Option<bool>> {
        match self.get(name)? {
            None => Ok(None),
            Some((value, _)) => match self.js.get_bool(value) {
                Some(v) => Ok(Some(v)),
                None => self.wrong(name, "true or false"),
            },
        }
    }

    fn text(&self, name: &str) -> Read<Option<String>> {
        match self.get(name)? {
            None => Ok(None),
            Some((value, Kind::String)) => Ok(Some(self.js.get_string(value)?)),
            Some(_) => self.wrong(name, "a string"),
        }
    }

    fn count(&self, name: &str, least: u64) -> Read<Option<u64>> {
        let Some((value, _)) = self.get(name)? else {
            return Ok(None);
        };
        let wanted = format!("a whole number from {least} to 2^53 - 1");
        match self.js.get_number(value) {
            Some(v) if v.fract() == 0.0 && v >= least as f64 && v <= MAX_SAFE => Ok(Some(v as u64)),
            Some(v) => self.wrong(name, &format!("{wanted}, and is {v}")),
            None => self.wrong(name, &wanted),
        }
    }

    fn drain_timeout(&self) -> Read<Option<Duration>> {
        Ok(self.count("drainTimeoutMs", 0)?.map(Duration::from_millis))
    }

    fn on_drain_timeout(&self) -> Read<OnDrainTimeout> {
        let choices = [
            ("abort", OnDrainTimeout::Abort),
            ("interrupt", OnDrainTimeout::Interrupt),
        ];
        Ok(self.choice("onDrainTimeout", choices)?.unwrap_or_default())
    }

    /// One of some words.
    fn choice<T, const N: usize>(&self, name: &str, choices: [(&str, T); N]) -> Read<Option<T>> {
        let Some(word) = self.text(name)? else {
            return Ok(None);
        };
        let words = choices.each_ref().map(|(word, _)| format!("'{word}'"));
        let chosen = choices.into_iter().find(|(known, _)| *known == word);
        chosen.map(|(_, value)| Some(value)).ok_or_else(|| {
            let [most @ .., last] = &words[..] else {
                return invalid(format!("{}.{name} is '{word}'", self.path)).into();
            };
            invalid(format!(
                "{}.{name} is '{word}'; it must be {} or {last}",
                self.path,
                most.join(", ")
            ))
            .into()
        })
    }

    fn function(&self, name: &str) -> Read<Option<sys::napi_ref>> {
        match self.get(name)? {
            None => Ok(None),
            Some((value, Kind::Function)) => Ok(Some(self.js.reference(value)?)),
            Some(_) => self.wrong(name, "a function"),
        }
    }
}

/// `ManagerOptions`, and the functions in it.
pub(crate) fn manager(js: Js, object: Val) -> Read<(ManagerOptions, Hooks)> {
    let mut hooks = Hooks::default();
    match read_manager(js, object, &mut hooks) {
        Ok(options) => Ok((options, hooks)),
        Err(refused) => {
            hooks.release(js);
            Err(refused)
        }
    }
}

fn read_manager(js: Js, object: Val, hooks: &mut Hooks) -> Read<ManagerOptions> {
    let known = [
        "name",
        "instances",
        "threads",
        "imports",
        "initialize",
        "saveState",
        "restoreState",
        "abi",
        "limits",
        "maxQueue",
        "cache",
        "engine",
        "isolation",
        "snapshots",
        "reseed",
        "recycle",
    ];
    let mut options = ManagerOptions {
        has_home: true,
        ..ManagerOptions::default()
    };
    let Some(reader) = Reader::open(js, "options", object, &known)? else {
        return Ok(options);
    };
    options.name = reader.text("name")?;
    if let Some(n) = reader.count("instances", 1)? {
        options.instances = n as usize;
    }
    options.threads = reader.count("threads", 1)?.map(|n| n as usize);
    if let Some(n) = reader.count("maxQueue", 0)? {
        options.max_queue = n as usize;
    }
    options.limits = limits(js, js.property(object, c"limits")?)?;
    options.engine = engine(js, js.property(object, c"engine")?)?;
    options.abi = abi(js, js.property(object, c"abi")?)?;
    options.cache = match reader.get("cache")? {
        None => CacheChoice::User,
        Some((value, Kind::Boolean)) if js.get_bool(value) == Some(false) => CacheChoice::Off,
        Some((_, Kind::Boolean)) => CacheChoice::User,
        Some((value, Kind::String)) => CacheChoice::Folder(PathBuf::from(js.get_string(value)?)),
        Some(_) => return reader.wrong("cache", "true, false or the path of a folder"),
    };
    let isolations = [
        ("shared", Isolation::Shared),
        ("per-call", Isolation::PerCall),
    ];
    options.isolation = reader.choice("isolation", isolations)?.unwrap_or_default();
    snapshots(js, js.property(object, c"snapshots")?, &mut options)?;
    options.recycle = recycle(js, js.property(object, c"recycle")?)?;
    match reader.get("reseed")? {
        None => {}
        Some((value, Kind::String)) => options.reseed = Some(js.get_string(value)?),
        Some((value, Kind::Function)) => hooks.reseed.set(Some(js.reference(value)?)),
        Some(_) => return reader.wrong("reseed", "the name of an export, or a function"),
    }
    hooks.initialize.set(reader.function("initialize")?);
    hooks.save_state.set(reader.function("saveState")?);
    hooks.restore_state.set(reader.function("restoreState")?);
    if let Some((value, kind)) = reader.get("imports")? {
        if !matches!(kind, Kind::Object | Kind::Function) {
            return reader.wrong("imports", "an object, or a function that returns one");
        }
        hooks.imports_is_function = kind == Kind::Function;
        hooks.imports.set(Some(js.reference(value)?));
    }
    Ok(options)
}

fn snapshots(js: Js, object: Val, options: &mut ManagerOptions) -> Read<()> {
    let known = ["images", "prepare"];
    let Some(reader) = Reader::open(js, "options.snapshots", object, &known)? else {
        return Ok(());
    };
    let kinds = [
        ("copy-on-write", ImageKind::CopyOnWrite),
        ("copy", ImageKind::Copy),
    ];
    options.images = reader.choice("images", kinds)?.unwrap_or_default();
    options.prepares_snapshots = reader.boolean("prepare")?;
    Ok(())
}

fn recycle(js: Js, object: Val) -> Read<Option<RecycleOptions>> {
    let known = [
        "memory", "calls", "ageMs", "onTrap", "predict", "jitter", "strategy", "backoff",
    ];
    let Some(reader) = Reader::open(js, "options.recycle", object, &known)? else {
        return Ok(None);
    };
    let mut recycle = RecycleOptions {
        memory: memory_threshold(&reader)?,
        calls: reader.count("calls", 1)?,
        age: reader.count("ageMs", 1)?.map(Duration::from_millis),
        predict: reader.boolean("predict")?,
        ..RecycleOptions::default()
    };
    let on_trap = [("reload", OnTrap::Reload), ("keep", OnTrap::Keep)];
    recycle.on_trap = reader.choice("onTrap", on_trap)?.unwrap_or_default();
    if let Some((value, _)) = reader.get("jitter")? {
        let Some(jitter) = js.get_number(value) else {
            return reader.wrong("jitter", "a number from 0 to 1");
        };
        recycle.jitter = jitter;
    }
    let strategies = [
        ("exclusive", RecycleStrategy::Exclusive),
        ("rolling", RecycleStrategy::Rolling),
        ("reset", RecycleStrategy::Reset),
    ];
    recycle.strategy = reader.choice("strategy", strategies)?.unwrap_or_default();
    recycle.backoff = backoff(js, js.property(object, c"backoff")?)?;
    Ok(Some(recycle))
}

/// Bytes, or text such as '75%'.
fn memory_threshold(reader: &Reader<'_>) -> Read<Option<MemoryThreshold>> {
    let Some((value, Kind::String)) = reader.get("memory")? else {
        return Ok(reader.count("memory", 1)?.map(MemoryThreshold::Bytes));
    };
    let text = reader.js.get_string(value)?;
    let share = text.strip_suffix('%').map(str::trim).map(str::parse::<f64>);
    match share {
        Some(Ok(percent)) => Ok(Some(MemoryThreshold::Share(percent / 100.0))),
        _ => reader.wrong(
            "memory",
            &format!("a whole number of bytes, or a share such as '75%', and is '{text}'"),
        ),
    }
}

fn backoff(js: Js, object: Val) -> Read<Backoff> {
    let default = Backoff::default();
    let known = ["initialMs", "maxMs"];
    let Some(reader) = Reader::open(js, "options.recycle.backoff", object, &known)? else {
        return Ok(default);
    };
    let ms = |name| Ok::<_, Refused>(reader.count(name, 1)?.map(Duration::from_millis));
    let (initial, max) = (ms("initialMs")?, ms("maxMs")?);
    // Where only one is given, the other follows it.
    let initial =
        initial.unwrap_or_else(|| max.map_or(default.initial, |max| default.initial.min(max)));
    Ok(Backoff {
        initial,
        max: max.unwrap_or_else(|| default.max.max(initial)),
    })
}

fn limits(js: Js, object: Val) -> Read<Limits> {
    let known = [
        "memoryBytes",
        "tableElements",
        "timeoutMs",
        "fuel",
        "stackBytes",
    ];
    let Some(reader) = Reader::open(js, "options.limits", object, &known)? else {
        return Ok(Limits::default());
    };
    Ok(Limits {
        memory_bytes: reader.count("memoryBytes", 0)?,
        table_elements: reader.count("tableElements", 0)?,
        timeout_ms: reader.count("timeoutMs", 1)?,
        fuel: reader.count("fuel", 1)?,
        stack: reader.count("stackBytes", 1)?.map(|n| n as usize),
    })
}

fn engine(js: Js, object: Val) -> Read<EngineOptions> {
    let known = [
        "interruptible",
        "fuel",
        "signalsBasedTraps",
        "simd",
        "relaxedSimd",
        "threads",
        "memoryReservationBytes",
    ];
    let default = EngineOptions::default();
    let Some(reader) = Reader::open(js, "options.engine", object, &known)? else {
        return Ok(default);
    };
    Ok(EngineOptions {
        interruptible: reader
            .boolean("interruptible")?
            .unwrap_or(default.interruptible),
        fuel: reader.boolean("fuel")?.unwrap_or(default.fuel),
        signals_based_traps: reader
            .boolean("signalsBasedTraps")?
            .unwrap_or(default.signals_based_traps),
        simd: reader.boolean("simd")?.unwrap_or(default.simd),
        relaxed_simd: reader
            .boolean("relaxedSimd")?
            .unwrap_or(default.relaxed_simd),
        threads: reader.boolean("threads")?.unwrap_or(default.threads),
        memory_reservation_bytes: reader
            .count("memoryReservationBytes", 0)?
            .unwrap_or(default.memory_reservation_bytes),
    })
}

fn abi(js: Js, object: Val) -> Read<BufferAbi> {
    let known = ["allocate", "deallocate", "returns"];
    let mut abi = BufferAbi::default();
    let Some(reader) = Reader::open(js, "options.abi", object, &known)? else {
        return Ok(abi);
    };
    if let Some(name) = reader.text("allocate")? {
        abi.allocate = name;
    }
    abi.deallocate = match reader.get("deallocate")? {
        None => abi.deallocate,
        Some((_, Kind::Null)) => None,
        Some((value, Kind::String)) => Some(js.get_string(value)?),
        Some(_) => return reader.wrong("deallocate", "a string, or null where the guest has none"),
    };
    abi.returns = match reader.text("returns")?.as_deref() {
        None | Some("out-pointer") => BufferReturns::OutPointer,
        Some("packed-i64") => BufferReturns::PackedI64,
        Some("multi-value") => BufferReturns::MultiValue,
        Some(other) => {
            return Err(invalid(format!(
                "options.abi.returns is '{other}'; it must be 'out-pointer', 'packed-i64' or 'multi-value'"
            ))
            .into());
        }
    };
    Ok(abi)
}

/// `ReloadOptions`.
pub(crate) fn reload(js: Js, object: Val) -> Read<ReloadOptions> {
    let known = [
        "reason",
        "drainTimeoutMs",
        "onDrainTimeout",
        "skipSave",
        "strategy",
        "source",
    ];
    let mut options = ReloadOptions::default();
    let Some(reader) = Reader::open(js, "options", object, &known)? else {
        return Ok(options);
    };
    if let Some(reason) = reader.text("reason")? {
        options.reason = reason;
    }
    if let Some(timeout) = reader.drain_timeout()? {
        options.drain_timeout = Some(timeout);
    }
    options.on_drain_timeout = reader.on_drain_timeout()?;
    options.skip_save = reader.boolean("skipSave")?.unwrap_or(false);
    let strategies = [
        ("exclusive", Strategy::Exclusive),
        ("rolling", Strategy::Rolling),
    ];
    options.strategy = reader.choice("strategy", strategies)?.unwrap_or_default();
    if let Some((value, _)) = reader.get("source")? {
        options.source = Some(source(js, value)?);
    }
    Ok(options)
}

/// The options of a reset; `to` is taken out by `index.js`.
pub(crate) fn reset(js: Js, object: Val) -> Read<ResetOptions> {
    let known = ["to", "drainTimeoutMs", "onDrainTimeout"];
    let mut options = ResetOptions::default();
    let Some(reader) = Reader::open(js, "options", object, &known)? else {
        return Ok(options);
    };
    if let Some(timeout) = reader.drain_timeout()? {
        options.drain_timeout = Some(timeout);
    }
    options.on_drain_timeout = reader.on_drain_timeout()?;
    Ok(options)
}

/// A budget in bytes; `None` for null.
pub(crate) fn budget(js: Js, value: Val) -> Read<Option<u64>> {
    if js.kind(value)? == Kind::Null {
        return Ok(None);
    }
    match js.get_number(value) {
        Some(v) if v.fract() == 0.0 && (1.0..=MAX_SAFE).contains(&v) => Ok(Some(v as u64)),
        _ => Err(invalid(
            "the memory budget must be a whole number of bytes from 1 to 2^53 - 1, or null for none",
        )
        .into()),
    }
}

/// A count of milliseconds; `None` for undefined.
pub(crate) fn milliseconds(js: Js, name: &str, value: Val, least: u64) -> Read<Option<u64>> {
    if js.kind(value)? == Kind::Undefined {
        return Ok(None);
    }
    match js.get_number(value) {
        Some(v) if v.fract() == 0.0 && v >= least as f64 && v <= MAX_SAFE => Ok(Some(v as u64)),
        _ => Err(invalid(format!(
            "{name} must be a whole number of milliseconds from {least} to 2^53 - 1"
        ))
        .into()),
    }
}

/// A path or bytes; `index.js` has turned URLs into paths.
pub(crate) fn source(js: Js, value: Val) -> Read<Source> {
    if js.kind(value)? == Kind::String {
        return Ok(Source::File(PathBuf::from(js.get_string(value)?)));
    }
    match js.bytes(value)? {
        // SAFETY: no JavaScript has run since the bytes were taken.
        Some(bytes) => Ok(Source::Bytes(unsafe { bytes.to_vec() })),
        None => Err(invalid(
            "the module's source must be the path of a .wasm or .wat file, a file: URL, a Uint8Array or an ArrayBuffer",
        )
        .into()),
    }
}
