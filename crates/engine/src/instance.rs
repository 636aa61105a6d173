//! One instance: compiled, held to limits, run, stopped, and its state read out and put back.
//!
//! Nothing here knows a manager, a gate, or that there are generations of which one follows the other.

pub(crate) mod cache;
pub(crate) mod capture;
pub(crate) mod compile;
pub(crate) mod deadline;
pub(crate) mod discard;
pub(crate) mod engine;
pub(crate) mod heap;
pub(crate) mod host;
pub(crate) mod instrument;
pub(crate) mod interrupt;
pub(crate) mod limits;
pub(crate) mod memory;
pub(crate) mod module;
pub(crate) mod occupant;
pub(crate) mod pool;
pub(crate) mod raw_value;
pub(crate) mod realm;
pub(crate) mod replica;
pub(crate) mod signals;
pub(crate) mod snapshot;
pub(crate) mod stack;
pub(crate) mod threads;
pub(crate) mod trap;
pub(crate) mod value;
pub(crate) mod wait;
pub(crate) mod watch;
pub(crate) mod wear;
