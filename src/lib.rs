//! The Node-API layer of wasm-molt: converts, delegates, converts back.
//!
//! It holds no default, no threshold and no retry, and names no type of the engine below the engine.

mod binding;
mod convert;
mod deferred;
mod entry;
mod env;
mod error;
mod exports;
mod hooks;
mod imports;
mod inbox;
mod js;
mod js_only;
mod lease;
mod memory;
mod namespace;
mod options;
mod realm;
mod report;
mod side;
mod threads;
mod wake;

use napi::bindgen_prelude::Object;
use napi::{Env, JsValue, Result};
use napi_derive::napi;
use wasm_molt_engine::ErrorCode;

/// The version of the native part, which must be the package's own.
#[napi]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Every error code there is, in the order of the contract.
#[napi]
pub fn error_codes() -> Vec<&'static str> {
    ErrorCode::ALL.iter().map(|code| code.as_str()).collect()
}

/// Puts the functions of [`binding`] onto the module.
#[napi(module_exports)]
pub fn init(exports: Object, env: Env) -> Result<()> {
    // SAFETY: the environment of this very callback.
    let js = unsafe { js::Js::new(env.raw()) };
    let object = exports.raw();
    for (name, body) in binding::FUNCTIONS
        .iter()
        .chain(namespace::FUNCTIONS)
        .chain(threads::FUNCTIONS)
    {
        let made = js
            .native(name, *body)
            .and_then(|function| js.define(object, name, function));
        if made.is_err() {
            return Err(napi::Error::from_reason(format!(
                "the function {name} could not be made"
            )));
        }
    }
    Ok(())
}
