//! From a source to compiled code: read, look through, compile (or load from the cache).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use wasmtime::ExternType;

use crate::error::{Error, ErrorCode, Result};
use crate::instance::engine::Engine;
use crate::instance::instrument::{
    InstrumentError, InstrumentOptions, Place, StateMap, instrument,
};
use crate::instance::pool::Pool;
use crate::instance::value::{Signature, ValueType, type_name};

/// Smaller modules are compiled without inlining: they gain little, and what is inlined is missing
/// among the frames of a trap.
const INLINING_FROM_BYTES: usize = 64 << 10;

/// Where the module comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A `.wasm` or `.wat` file.
    File(PathBuf),
    /// The bytes themselves.
    Bytes(Vec<u8>),
}

/// Compiled code and what is known about it. Immutable, shared by every instance.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Module {
    name: String,
    /// The engine that compiled it.
    pub(crate) engine: Engine,
    pub(crate) compiled: wasmtime::Module,
    imports: Vec<Import>,
    functions: Vec<ExportedFunction>,
    /// Name of the exported memory that `manager.memory` shows.
    pub(crate) main_memory: Option<String>,
    pub(crate) defined_memories: usize,
    pub(crate) has_poll_memory: bool,
    /// Where its state is, and how it is started.
    pub(crate) state: StateMap,
    /// Of its largest memory.
    pub(crate) initial_memory_bytes: u64,
    exports: Vec<Export>,
    /// It names exception tags: host exceptions must be such that it can catch them.
    pub(crate) has_tags: bool,
    pub(crate) has_shared_memory: bool,
    /// One of them is its own, not imported.
    pub(crate) defines_shared_memory: bool,
    customs: Vec<(Box<str>, Box<[u8]>)>,
    /// What it was compiled from, where it may be wanted for another engine.
    pub(crate) bytes: Option<Arc<[u8]>>,
}

/// Something the module offers.
#[derive(Debug, Clone)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// What it is, and of which type.
    pub ty: ExportType,
    /// Where it is in the module's index space of its kind, imports first.
    pub(crate) place: Place,
}

/// Something the module needs.
#[derive(Debug, Clone)]
pub struct Import {
    /// First name.
    pub module: String,
    /// Second name.
    pub name: String,
    /// What it must be.
    pub kind: ImportKind,
    pub(crate) ty: ExternType,
}

/// What an import must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportKind {
    /// A function of this signature.
    Function(Signature),
    /// A linear memory.
    Memory {
        /// Pages at the start.
        minimum: u64,
        /// Pages it may reach.
        maximum: Option<u64>,
        /// Shared between threads.
        shared: bool,
    },
    /// A global.
    Global {
        /// Its type.
        ty: ValueType,
        /// Whether the guest may write it.
        mutable: bool,
    },
    /// A table.
    Table {
        /// Its element type.
        element: ValueType,
        /// Elements at the start.
        minimum: u64,
        /// Elements it may reach.
        maximum: Option<u64>,
    },
    /// An exception tag.
    Tag,
}

/// A type that the host can be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportType {
    /// Names of its parameters' and results' types.
    Function(Vec<&'static str>, Vec<&'static str>),
    /// A linear memory.
    Memory {
        /// In pages.
        minimum: u64,
        /// In pages.
        maximum: Option<u64>,
        /// Shared between threads.
        shared: bool,
        /// With 64-bit addresses.
        is_64: bool,
    },
    /// A global.
    Global {
        /// Name of its type.
        ty: &'static str,
        /// Whether it can be written.
        mutable: bool,
    },
    /// A table.
    Table {
        /// Name of its elements' type.
        element: &'static str,
        /// Elements at the start.
        minimum: u64,
        /// Elements it may reach.
        maximum: Option<u64>,
        /// With 64-bit indices.
        is_64: bool,
    },
    /// An exception tag: names of its parameters' types.
    Tag(Vec<&'static str>),
}

impl ExportType {
    pub(crate) fn of(ty: &ExternType) -> Self {
        match ty {
            ExternType::Func(f) => Self::Function(
                f.params().map(|ty| type_name(&ty)).collect(),
                f.results().map(|ty| type_name(&ty)).collect(),
            ),
            ExternType::Memory(m) => Self::Memory {
                minimum: m.minimum(),
                maximum: m.maximum(),
                shared: m.is_shared(),
                is_64: m.is_64(),
            },
            ExternType::Global(g) => Self::Global {
                ty: type_name(g.content()),
                mutable: g.mutability() == wasmtime::Mutability::Var,
            },
            ExternType::Table(t) => Self::Table {
                element: type_name(&wasmtime::ValType::Ref(t.element().clone())),
                minimum: t.minimum(),
                maximum: t.maximum(),
                is_64: t.is_64(),
            },
            ExternType::Tag(tag) => Self::Tag(tag.ty().params().map(|ty| type_name(&ty)).collect()),
        }
    }
}

impl Import {
    /// Its type, as the host can be shown it.
    pub fn shown_type(&self) -> ExportType {
        ExportType::of(&self.ty)
    }
}

impl ImportKind {
    fn of(ty: &ExternType) -> Self {
        match ty {
            ExternType::Func(f) => Self::Function(Signature::of(f)),
            ExternType::Memory(m) => Self::Memory {
                minimum: m.minimum(),
                maximum: m.maximum(),
                shared: m.is_shared(),
            },
            ExternType::Global(g) => Self::Global {
                ty: ValueType::from(g.content()),
                mutable: g.mutability() == wasmtime::Mutability::Var,
            },
            ExternType::Table(t) => Self::Table {
                element: ValueType::from(&wasmtime::ValType::Ref(t.element().clone())),
                minimum: t.minimum(),
                maximum: t.maximum(),
            },
            ExternType::Tag(_) => Self::Tag,
        }
    }

    /// How an error calls it.
    pub fn describe(&self) -> String {
        match self {
            Self::Function(signature) => format!("a function {signature}"),
            Self::Memory {
                minimum,
                maximum,
                shared,
            } => {
                let max = maximum.map_or(String::new(), |m| format!(", maximum: {m}"));
                let shared = if *shared { ", shared: true" } else { "" };
                format!("a memory {{ initial: {minimum}{max}{shared} }}")
            }
            Self::Global { ty, mutable } => {
                format!(
                    "a {}global of type {ty}",
                    if *mutable { "mutable " } else { "" }
                )
            }
            Self::Table {
                element, minimum, ..
            } => {
                format!("a table {{ element: '{element}', initial: {minimum} }}")
            }
            Self::Tag => "an exception tag".into(),
        }
    }
}

/// A function the module offers.
#[derive(Debug)]
pub struct ExportedFunction {
    /// Its name.
    pub name: String,
    /// Its parameters and results.
    pub signature: Signature,
    /// `false`: an earlier build had it, this one keeps its position empty.
    pub is_offered: bool,
    is_used: AtomicBool,
}

impl ExportedFunction {
    fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Relaxed)
    }

    /// Somebody means to call it: another build has to offer it too.
    pub fn mark_used(&self) {
        // Looked at first: every call passes here, and a store would take the line from other threads.
        if !self.is_used() {
            self.is_used.store(true, Ordering::Relaxed);
        }
    }
}

/// Whether an instance has its store for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Company {
    Alone,
    /// Instances of other modules share its store, and therefore its engine: so it is compiled without
    /// inlining, which cannot be had for some modules.
    Realm,
}

impl Module {
    /// Reads and compiles `source` on the threads of `pool`.
    pub(crate) fn load(
        engine: &Engine,
        pool: &Pool,
        source: &Source,
        name: Option<&str>,
    ) -> Result<Self> {
        Self::load_with(engine, pool, source, name, Company::Alone)
    }

    /// The same, for an instance that may share its store with others.
    pub(crate) fn load_with(
        engine: &Engine,
        pool: &Pool,
        source: &Source,
        name: Option<&str>,
        company: Company,
    ) -> Result<Self> {
        let (bytes, file_stem) = read(source)?;
        let options = InstrumentOptions {
            polls: engine.options.uses_poll_page(),
            inlining: company == Company::Alone && bytes.len() >= INLINING_FROM_BYTES,
        };
        let spliced = instrument(&bytes, &options)
            .map_err(|e| refuse_bytes(&called(source, name), &bytes, &e))?;
        let name = name
            .map(ToOwned::to_owned)
            .or_else(|| spliced.name.clone().filter(|n| !n.is_empty()))
            .or(file_stem)
            .unwrap_or_else(|| "wasm".into());
        let engine = if spliced.inlining {
            engine.with_inlining()?
        } else {
            engine.clone()
        };
        let compile = || engine.compile(&spliced.bytes);
        let compiled = pool
            .install(compile)?
            .map_err(|e| refuse_module(&name, &engine, &e))?;
        let imports = compiled
            .imports()
            .map(|i| Import {
                module: i.module().to_owned(),
                name: i.name().to_owned(),
                kind: ImportKind::of(&i.ty()),
                ty: i.ty(),
            })
            .collect();
        let mut functions = Vec::new();
        let mut memories = Vec::new();
        // What was put in is nobody's business.
        let hidden = spliced.state.prefix.as_str();
        let visible = || compiled.exports().filter(|e| !e.name().starts_with(hidden));
        let exports = visible()
            .zip(&spliced.exports)
            .map(|(export, place)| Export {
                name: export.name().to_owned(),
                ty: ExportType::of(&export.ty()),
                place: *place,
            });
        let exports = exports.collect();
        for export in visible() {
            match export.ty() {
                ExternType::Func(ty) => functions.push(ExportedFunction {
                    name: export.name().to_owned(),
                    signature: Signature::of(&ty),
                    is_offered: true,
                    is_used: AtomicBool::new(false),
                }),
                ExternType::Memory(_) => memories.push(export.name().to_owned()),
                _ => {}
            }
        }
        let main_memory = memories
            .iter()
            .find(|name| *name == "memory")
            .or_else(|| memories.first())
            .cloned();
        Ok(Self {
            name,
            engine,
            imports,
            functions,
            main_memory,
            defined_memories: spliced.defined_memories(),
            has_poll_memory: spliced.has_poll_memory,
            state: spliced.state,
            exports,
            has_tags: spliced.has_tags,
            has_shared_memory: spliced.memories.iter().any(|memory| memory.shared),
            defines_shared_memory: spliced.memories.iter().any(|it| it.shared && !it.imported),
            customs: match company {
                // Nobody can ask for them.
                Company::Alone => Vec::new(),
                Company::Realm => {
                    let all = spliced.customs.iter();
                    all.map(|(name, data)| ((*name).into(), (*data).into()))
                        .collect()
                }
            },
            bytes: (company == Company::Realm).then(|| bytes.as_slice().into()),
            initial_memory_bytes: spliced
                .memories
                .iter()
                .map(|m| m.minimum.saturating_mul(1 << m.page_size_log2.min(16)))
                .max()
                .unwrap_or(0),
            compiled,
        })
    }

    /// Puts this build into the place of `old`: checks that it offers everything that is in use, and
    /// gives each function the position that it has there.
    ///
    /// Positions are how calls that wait, and functions that the host holds, name what they mean; so
    /// they hold for every build of a manager's life. A function that is gone leaves its position
    /// empty until it comes back, and one whose type is another counts as gone and as new.
    ///
    /// # Errors
    /// [`ErrorCode::IncompatibleModule`], with everything that is in use and missing.
    pub(crate) fn succeed(&mut self, old: &Self) -> Result<()> {
        let mut own: Vec<Option<ExportedFunction>> = std::mem::take(&mut self.functions)
            .into_iter()
            .map(Some)
            .collect();
        let mut functions = Vec::with_capacity(old.functions.len());
        let mut missing = Vec::new();
        for before in &old.functions {
            let named = |f: &&mut Option<ExportedFunction>| {
                f.as_ref().is_some_and(|f| f.name == before.name)
            };
            // An empty position, too: a function that comes back finds its own.
            let found = own.iter_mut().find(named);
            let fits = found
                .as_ref()
                .and_then(|f| f.as_ref())
                .is_some_and(|f| f.signature == before.signature);
            if !fits && before.is_offered && before.is_used() {
                let instead = match found.as_ref().and_then(|f| f.as_ref()) {
                    Some(other) => format!("is {}", other.signature),
                    None => "is missing".into(),
                };
                missing.push(format!("'{}' {} {instead}", before.name, before.signature));
            }
            let same = if fits {
                found.and_then(Option::take)
            } else {
                None
            };
            functions.push(match same {
                Some(same) => {
                    same.is_used.store(before.is_used(), Ordering::Relaxed);
                    same
                }
                None => ExportedFunction {
                    name: before.name.clone(),
                    signature: before.signature.clone(),
                    is_offered: false,
                    is_used: AtomicBool::new(false),
                },
            });
        }
        if let Some(memory) = &old.main_memory
            && self.main_memory.is_none()
        {
            missing.push(format!("the memory '{memory}' is missing"));
        }
        if !missing.is_empty() {
            return Err(Error::Incompatible {
                message: format!(
                    "the other build of {} does not offer what is in use: {}; build it with these \
                     exports, or create a new manager for it",
                    old.name,
                    missing.join(", ")
                ),
                cause: None,
            });
        }
        functions.extend(own.into_iter().flatten());
        self.functions = functions;
        Ok(())
    }

    /// Names this very module among all that are loaded.
    pub fn id(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self) as usize
    }

    /// As in errors, events and thread names.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it needs, in order.
    pub fn imports(&self) -> &[Import] {
        &self.imports
    }

    /// What it offers, in order.
    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// The contents of its custom sections of that name, in order.
    pub fn custom_sections<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        let named = self.customs.iter().filter(move |(it, _)| **it == *name);
        named.map(|(_, data)| &**data)
    }

    /// Its functions by position, which is the same in every build of a manager's life.
    pub fn functions(&self) -> &[ExportedFunction] {
        &self.functions
    }

    /// Position in [`Module::functions`] of a function that is to be called.
    ///
    /// # Errors
    /// [`ErrorCode::ExportNotFound`], with what there is.
    pub fn function_index(&self, name: &str) -> Result<usize> {
        let is_meant = |f: &ExportedFunction| f.is_offered && f.name == name;
        let found = self.functions.iter().enumerate().find(|(_, f)| is_meant(f));
        found
            .map(|(index, function)| {
                function.mark_used();
                index
            })
            .ok_or_else(|| {
                let offered = || self.functions.iter().filter(|f| f.is_offered);
                let names: Vec<_> = offered().take(20).map(|f| f.name.as_str()).collect();
                let more = offered().count().saturating_sub(names.len());
                let more = if more > 0 {
                    format!(" and {more} more")
                } else {
                    String::new()
                };
                Error::new(
                    ErrorCode::ExportNotFound,
                    format!(
                        "{} exports no function '{name}'; it exports: {}{more}",
                        self.name,
                        if names.is_empty() {
                            "none".into()
                        } else {
                            names.join(", ")
                        }
                    ),
                )
            })
    }
}

fn read(source: &Source) -> Result<(Vec<u8>, Option<String>)> {
    let path = match source {
        Source::Bytes(bytes) => return Ok((bytes.clone(), None)),
        Source::File(path) => path,
    };
    let bytes = fs::read(path).map_err(|e| {
        Error::new(
            ErrorCode::InvalidArgument,
            format!("the module file '{}' cannot be read: {e}", path.display()),
        )
    })?;
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned());
    let is_text = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("wat"));
    if is_text && !bytes.starts_with(b"\0asm") {
        return Ok((assemble(path, &bytes)?, stem));
    }
    Ok((bytes, stem))
}

fn assemble(path: &Path, text: &[u8]) -> Result<Vec<u8>> {
    let compile_error = |message: String| Error::new(ErrorCode::Compile, message);
    let text = std::str::from_utf8(text)
        .map_err(|e| compile_error(format!("'{}' is not UTF-8 text: {e}", path.display())))?;
    wat::parse_str(text).map_err(|mut e| {
        e.set_path(path);
        compile_error(format!(
            "'{}' is not valid WebAssembly text: {e}",
            path.display()
        ))
    })
}

/// The bytes of a module in text.
///
/// # Errors
/// [`ErrorCode::Compile`].
pub fn assemble_text(text: &str) -> Result<Vec<u8>> {
    assemble(Path::new("the text"), text.as_bytes())
}

/// How an error calls a module that has no name yet.
fn called(source: &Source, name: Option<&str>) -> String {
    match (name, source) {
        (Some(name), _) => name.to_owned(),
        (None, Source::File(path)) => format!("'{}'", path.display()),
        (None, Source::Bytes(_)) => "the module".to_owned(),
    }
}

fn refuse_bytes(what: &str, bytes: &[u8], error: &InstrumentError) -> Error {
    let is_text = bytes.trim_ascii_start().starts_with(b"(module")
        || bytes.trim_ascii_start().starts_with(b";;");
    let message = match error {
        InstrumentError::NotWasm { .. } if is_text => {
            format!("{what} is WebAssembly text; give it as a .wat file, or assemble it")
        }
        InstrumentError::NotWasm { .. } => {
            format!("{what}: {error}; give the path of a .wasm or .wat file, or a module's bytes")
        }
        InstrumentError::Component => format!(
            "{what}: {error}; components are not run yet, give the core module that it was made of"
        ),
        InstrumentError::Malformed { message, .. } if message.contains("end-of-file") => {
            format!("{what} is truncated: {error}; it is not complete, get it or build it again")
        }
        _ => format!("{what}: {error}"),
    };
    Error::new(ErrorCode::Compile, message)
}

fn refuse_module(name: &str, engine: &Engine, error: &wasmtime::Error) -> Error {
    let text = format!("{error:#}");
    let message = match feature_off(&text, engine) {
        Some(remedy) => format!("{name} uses a feature that is off: {text}; {remedy}"),
        None => format!("{name} is not a module that this engine can compile: {text}"),
    };
    Error::new(ErrorCode::Compile, message)
}

/// The option that would let the module in, read off the validator's words.
fn feature_off(text: &str, engine: &Engine) -> Option<&'static str> {
    let text = text.to_ascii_lowercase();
    let options = &engine.options;
    if text.contains("relaxed simd") && !(options.simd && options.relaxed_simd) {
        Some("set engine.relaxedSimd: true (and engine.simd: true)")
    } else if text.contains("simd") && !options.simd {
        Some("set engine.simd: true")
    } else if (text.contains("threads") || text.contains("shared memor")) && !options.threads {
        Some("set engine.threads: true")
    } else if text.contains("not enabled") || text.contains("must be enabled") {
        Some("this engine does not offer it; build the module without it")
    } else {
        None
    }
}
