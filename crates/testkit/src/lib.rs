//! Guests, hosts, faults and meters for the tests of wasm-molt. Never shipped.
//!
//! - [`guests`]: modules as WAT text, each small enough to be read.
//! - [`host`]: a [`wasm_molt_engine::Host`] made of closures, with or without a home thread.
//! - [`door`]: a host function at which calls stop until they are let through.
//! - [`faults`]: a host that fails, panics, blocks or destroys its manager at a chosen hook.
//! - [`dice`]: decisions by a seed, or by the bytes of a fuzzer.
//! - [`folder`]: folders that end with their test.
//! - [`history`]: snapshots, resets and forks against a plain model.
//! - [`hostile`]: what must hold of any bytes and values at all; the fuzz targets and their kept corpus ask it.
//! - [`smith`]: modules that nobody has written.
//! - [`rig`]: a manager with all of that around it, and waits that end.
//! - [`inside`]: entering an instance; the only unsafe code here.
//! - [`wait`]: answers and latches. Whatever does not come in time fails the test with a message.
//! - [`meter`]: what this process holds.
//! - [`quiet`]: tests that measure the process run alone.
//!
//! What goes wrong in here panics: it runs in tests.
#![expect(clippy::panic, reason = "a test fails by panicking")]
#![expect(
    clippy::missing_panics_doc,
    reason = "everything here panics when a test fails"
)]

pub mod dice;
pub mod door;
pub mod faults;
pub mod folder;
pub mod guests;
pub mod history;
pub mod home;
pub mod host;
pub mod hostile;
pub mod inside;
pub mod meter;
pub mod quiet;
pub mod rig;
pub mod smith;
pub mod wait;
