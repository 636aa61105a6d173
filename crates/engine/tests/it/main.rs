//! The engine as an embedder sees it: real instances, a host made of closures, a file per noun.
//!
//! Nothing sleeps. Calls meet the test at doors (host functions), hooks are held by faults, and every
//! wait ends in an answer or in a failure that says what did not come.
#![allow(
    clippy::pedantic,
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::type_complexity,
    reason = "a test may stop, and its helpers are read where they are used"
)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod call;
mod close;
mod exactly_once;
mod fault_matrix;
mod host;
mod hostile;
mod hot_swap;
mod interrupt;
mod invoke;
mod lease;
mod load;
mod memory;
mod pool;
mod realm;
mod recycle;
mod reload;
mod repair;
mod rolling;
mod snapshot;
mod stress;
mod survival;
