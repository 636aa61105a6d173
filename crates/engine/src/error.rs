//! What can go wrong, as one closed set.
//!
//! Every [`Error`] has one [`ErrorCode`]; the code is what callers match on, the message names the
//! thing, the value, the bound and the remedy.

use std::fmt;

use wasm_molt_lifecycle::FailedPhase;

use crate::instance::memory::NO_MEMORY;
use crate::instance::realm::Exception;
use crate::instance::value::HostRef;

/// The stable codes of the public contract (`WasmErrorCode` in `index.d.ts`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// An argument or option that cannot be used.
    InvalidArgument,
    /// The bytes are no module that this engine can compile.
    Compile,
    /// An import is missing or has another type.
    Link,
    /// No exported function of that name.
    ExportNotFound,
    /// The guest trapped.
    Trap,
    /// The guest asked to exit.
    Exit,
    /// A call took longer than its `timeoutMs`.
    Timeout,
    /// A call used up its fuel.
    OutOfFuel,
    /// A call was stopped by `destroy()` or by a reload.
    Interrupted,
    /// A promise was returned where nothing can wait for it.
    AsyncImport,
    /// Somebody else is inside the instance.
    Busy,
    /// A swap is under way.
    Reloading,
    /// `maxQueue` calls wait already.
    QueueFull,
    /// The handle has expired.
    StaleHandle,
    /// In-flight calls did not end in time.
    DrainTimeout,
    /// The next generation could not be put in place.
    ReloadFailed,
    /// The other build does not offer what is in use.
    IncompatibleModule,
    /// The state cannot be captured.
    SnapshotUnsupported,
    /// The manager is closed.
    Closed,
    /// A fault of ours.
    Internal,
}

impl ErrorCode {
    /// All codes, in the order of the contract.
    pub const ALL: [Self; 20] = [
        Self::InvalidArgument,
        Self::Compile,
        Self::Link,
        Self::ExportNotFound,
        Self::Trap,
        Self::Exit,
        Self::Timeout,
        Self::OutOfFuel,
        Self::Interrupted,
        Self::AsyncImport,
        Self::Busy,
        Self::Reloading,
        Self::QueueFull,
        Self::StaleHandle,
        Self::DrainTimeout,
        Self::ReloadFailed,
        Self::IncompatibleModule,
        Self::SnapshotUnsupported,
        Self::Closed,
        Self::Internal,
    ];

    /// The code as callers see it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "ERR_WASM_INVALID_ARGUMENT",
            Self::Compile => "ERR_WASM_COMPILE",
            Self::Link => "ERR_WASM_LINK",
            Self::ExportNotFound => "ERR_WASM_EXPORT_NOT_FOUND",
            Self::Trap => "ERR_WASM_TRAP",
            Self::Exit => "ERR_WASM_EXIT",
            Self::Timeout => "ERR_WASM_TIMEOUT",
            Self::OutOfFuel => "ERR_WASM_OUT_OF_FUEL",
            Self::Interrupted => "ERR_WASM_INTERRUPTED",
            Self::AsyncImport => "ERR_WASM_ASYNC_IMPORT",
            Self::Busy => "ERR_WASM_BUSY",
            Self::Reloading => "ERR_WASM_RELOADING",
            Self::QueueFull => "ERR_WASM_QUEUE_FULL",
            Self::StaleHandle => "ERR_WASM_STALE_HANDLE",
            Self::DrainTimeout => "ERR_WASM_DRAIN_TIMEOUT",
            Self::ReloadFailed => "ERR_WASM_RELOAD_FAILED",
            Self::IncompatibleModule => "ERR_WASM_INCOMPATIBLE_MODULE",
            Self::SnapshotUnsupported => "ERR_WASM_SNAPSHOT_UNSUPPORTED",
            Self::Closed => "ERR_WASM_CLOSED",
            Self::Internal => "ERR_WASM_INTERNAL",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a guest died.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrapInfo {
    /// The kind, such as `unreachable` or `out-of-bounds-memory`.
    pub kind: &'static str,
    /// The engine's own words.
    pub message: String,
    /// The guest's frames, innermost first, names demangled.
    pub wasm_stack: String,
}

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Receives the one answer of something asynchronous, on any thread.
pub type Done<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// A failure, with what the caller needs to decide what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A failure that is fully told by its code and text.
    #[error("{message}")]
    Plain {
        /// What callers match on.
        code: ErrorCode,
        /// The whole story.
        message: String,
    },
    /// The system has refused memory that an instance needs.
    #[error("{message}")]
    Scarce {
        /// The whole story.
        message: String,
    },
    /// The guest trapped; its instance is poisoned.
    #[error("{what}: {}", .info.message)]
    Trap {
        /// Which call of which module.
        what: String,
        /// Kind, text, frames.
        info: Box<TrapInfo>,
    },
    /// In-flight work did not end in time.
    #[error(
        "{what}: {in_flight} still in flight after {waited_ms} ms; raise drainTimeoutMs, \
             or stop what still runs with onDrainTimeout: 'interrupt' or destroy()"
    )]
    DrainTimeout {
        /// The operation that waited.
        what: String,
        /// Calls and leases still out.
        in_flight: usize,
        /// How long it waited, milliseconds.
        waited_ms: u128,
    },
    /// A generation could not be put in place; the old one, if any, serves on.
    #[error("{what} failed in phase '{phase}': {cause}")]
    ReloadFailed {
        /// `reload of …` or `start of …`.
        what: String,
        /// Where it failed.
        phase: FailedPhase,
        /// Why.
        cause: Box<Error>,
    },
    /// The other build of the module cannot take the place of the one that serves.
    #[error("{message}{}", .cause.as_ref().map_or(String::new(), |cause| format!(": {cause}")))]
    Incompatible {
        /// What does not fit.
        message: String,
        /// What it led to, if it was found by trying.
        cause: Option<Box<Error>>,
    },
    /// Host code threw; the very object travels along.
    #[error("host code threw")]
    Thrown(HostRef),
    /// The guest threw an exception that nobody caught, or the host threw one; in realms only.
    #[error("an exception of WebAssembly was thrown")]
    Exception(Box<Exception>),
    /// A signal was aborted; its reason travels along.
    #[error("the call was aborted by its signal")]
    Aborted(HostRef),
}

impl Error {
    /// A failure told by code and text.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Plain {
            code,
            message: message.into(),
        }
    }

    /// [`ErrorCode::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidArgument, message)
    }

    /// [`ErrorCode::Internal`]: an impossible state, reported instead of panicking.
    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(
            ErrorCode::Internal,
            format!(
                "wasm-molt reached a state that should be impossible: {message}; please report this"
            ),
        )
    }

    /// What callers match on; `None` for objects of the host, which travel as they are.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Plain { code, .. } => Some(*code),
            // To whoever links a module it is one reason of several why that cannot be done.
            Self::Scarce { .. } => Some(ErrorCode::Link),
            Self::Trap { .. } => Some(ErrorCode::Trap),
            Self::DrainTimeout { .. } => Some(ErrorCode::DrainTimeout),
            Self::ReloadFailed { .. } => Some(ErrorCode::ReloadFailed),
            Self::Incompatible { .. } => Some(ErrorCode::IncompatibleModule),
            Self::Thrown(_) | Self::Exception(_) | Self::Aborted(_) => None,
        }
    }

    /// An instance could not be made.
    pub(crate) fn not_instantiated(name: &str, error: &wasmtime::Error) -> Self {
        let message = format!("{name} could not be instantiated: {error:#}");
        if message.contains(NO_MEMORY) || error.is::<std::io::Error>() {
            Self::Scarce { message }
        } else {
            Self::new(ErrorCode::Link, message)
        }
    }

    /// Whether it may go well as soon as others are done.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self.code(), Some(ErrorCode::Busy | ErrorCode::Reloading))
    }

    /// Whether the guest was left in the middle of something.
    pub fn poisons_instance(&self) -> bool {
        match self {
            Self::Trap { info, .. } => info.kind != UNCAUGHT_EXCEPTION,
            Self::Aborted(_) => true,
            Self::Plain { code, .. } => matches!(
                code,
                ErrorCode::Timeout
                    | ErrorCode::OutOfFuel
                    | ErrorCode::Interrupted
                    | ErrorCode::Internal
            ),
            _ => false,
        }
    }
}

/// The words of a panic.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a text".into())
}

/// A guest exception nobody caught: an orderly unwinding, the instance stays usable.
pub(crate) const UNCAUGHT_EXCEPTION: &str = "uncaught-exception";

/// Where errors are rare and frames should be small they travel in a box.
impl From<Box<Error>> for Error {
    fn from(error: Box<Error>) -> Self {
        *error
    }
}

impl From<wasm_molt_lifecycle::InFlight> for Error {
    fn from(in_flight: wasm_molt_lifecycle::InFlight) -> Self {
        Self::DrainTimeout {
            what: "the drain".into(),
            in_flight: in_flight.0,
            waited_ms: 0,
        }
    }
}
