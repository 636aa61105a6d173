//! Whole memories under wasmtime, on both kinds of platform.
#![allow(clippy::unwrap_used)]

use wasmtime::{Config, Engine, Instance, Module, Store, TypedFunc};

use super::host::configure_for;
use super::region::Platform;
use super::*;
