//! From the engine's errors to JavaScript's, and back.

use std::any::Any;

use wasm_molt_engine::{Error, ErrorCode};

use crate::env::EnvState;
use crate::js::{Js, JsResult, Pending, Val};
use crate::side::ReplicaSide;

/// What an error says beyond code and text.
#[derive(Default)]
pub(crate) struct Place<'a> {
    pub(crate) manager: Option<&'a str>,
    pub(crate) generation: Option<u64>,
    /// The realm whose own errors are to be made.
    pub(crate) realm: Option<&'a ReplicaSide>,
}

impl EnvState {
    /// The JavaScript value of an error: for what host code threw, the very same object.
    pub(crate) fn error_value(&self, error: &Error, place: &Place<'_>) -> JsResult<Val> {
        if let Error::Thrown(value) | Error::Aborted(value) = error {
            return self.kept(value);
        }
        let js = self.js();
        let realm = place
            .realm
            .and_then(|side| Some((side, side.realm.as_ref()?)));
        if let (Error::Exception(exception), Some((side, realm))) = (error, realm) {
            return realm.exception_value(self, side, exception);
        }
        let code = error.code().unwrap_or(ErrorCode::Internal);
        let fields = js.object()?;
        if let Some(manager) = place.manager {
            js.set(fields, c"manager", js.string(manager)?)?;
        }
        if let Some(generation) = place.generation {
            js.set(fields, c"generation", js.number(generation as f64)?)?;
        }
        let mut cause = js.undefined();
        match error {
            Error::Trap { info, .. } => {
                js.set(fields, c"trap", js.string(info.kind)?)?;
                js.set(fields, c"wasmStack", js.string(&info.wasm_stack)?)?;
            }
            Error::DrainTimeout { in_flight, .. } => {
                js.set(fields, c"inFlight", js.number(*in_flight as f64)?)?;
            }
            Error::ReloadFailed {
                phase,
                cause: inner,
                ..
            } => {
                js.set(fields, c"phase", js.string(phase.as_str())?)?;
                cause = self.error_value(inner, place)?;
            }
            Error::Incompatible {
                cause: Some(inner), ..
            } => cause = self.error_value(inner, place)?,
            _ => {}
        }
        let message = self.message(error);
        let args = [
            js.string(code.as_str())?,
            js.string(&message)?,
            fields,
            cause,
        ];
        let maker = realm.and_then(|(_, realm)| realm.error_maker());
        js.call(self.helper(maker.unwrap_or(self.helpers.error))?, &args)
    }

    /// The text; where host code threw, with the words of what it threw.
    fn message(&self, error: &Error) -> String {
        let Error::ReloadFailed { what, phase, cause } = error else {
            return error.to_string();
        };
        let (Error::Thrown(value) | Error::Aborted(value)) = &**cause else {
            return error.to_string();
        };
        let words = self.words(value).unwrap_or_default();
        format!("{what} failed in phase '{phase}': {words}")
    }

    fn words(&self, value: &wasm_molt_engine::HostRef) -> Option<String> {
        let js = self.js();
        let value = self.kept(value).ok()?;
        let text = match js.kind(value).ok()? {
            crate::js::Kind::Object => js
                .property(value, c"message")
                .ok()
                .and_then(|m| js.get_string(m).ok()),
            crate::js::Kind::String => js.get_string(value).ok(),
            _ => None,
        };
        if js.is_exception_pending() {
            js.take_exception();
        }
        text.or_else(|| Some("the hook threw something that is no Error".into()))
    }

    /// Throws an error of the engine.
    #[cold]
    pub(crate) fn throw(&self, error: &Error, place: &Place<'_>) -> Pending {
        match self.error_value(error, place) {
            Ok(value) => self.js().throw(value),
            Err(pending) => pending,
        }
    }

    /// Takes the pending exception, keeping the object's identity.
    #[cold]
    pub(crate) fn take_thrown(&self) -> Error {
        let value = self.js().take_exception();
        self.thrown(value)
    }

    /// An error that carries `value` through the engine.
    pub(crate) fn thrown(&self, value: Val) -> Error {
        match self.keep(value) {
            Ok(kept) => Error::Thrown(kept),
            Err(Pending) => {
                self.js().take_exception();
                Error::internal("what host code threw could not be kept")
            }
        }
    }
}

/// A panic of ours becomes an exception.
#[cold]
pub(crate) fn throw_panic(js: Js, panic: &(dyn Any + Send)) {
    let text = panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a text".into());
    if js.is_exception_pending() {
        js.take_exception();
    }
    let error = Error::internal(format_args!("a panic: {text}"));
    match EnvState::of(js) {
        Ok(state) => {
            state.throw(&error, &Place::default());
        }
        Err(Pending) => {
            js.take_exception();
            js.throw_type_error(&error.to_string());
        }
    }
}
