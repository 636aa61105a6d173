//! Spans for the crate `tracing`, behind the cargo feature of that name; without it everything here is
//! empty and costs nothing.
//!
//! * `reload` (info): one swap, with `manager`, `reason`, `strategy` and, at its end, `outcome`. Each
//!   step that went well is an event in it, with `step` and `took_us`.
//! * `call` (debug): one call on a pool thread, with `manager`, `function` and, at its end, `outcome`.
//!
//! `outcome` is `ok`, or the code of the error; what host code threw has none and is `thrown`.

#[cfg(feature = "tracing")]
pub(crate) use on::{Span, step};

#[cfg(not(feature = "tracing"))]
pub(crate) use off::{Span, step};

#[cfg(feature = "tracing")]
mod on {
    use std::time::Duration;

    use tracing::field::Empty;

    use crate::error::Result;

    /// Entered until it is dropped, on the thread that made it.
    pub(crate) struct Span(tracing::span::EnteredSpan);

    impl Span {
        pub(crate) fn reload(manager: &str, reason: &str, strategy: &'static str) -> Self {
            let span = tracing::info_span!("reload", manager, reason, strategy, outcome = Empty);
            Self(span.entered())
        }

        pub(crate) fn call(manager: &str, function: impl FnOnce() -> String) -> Self {
            let span = tracing::debug_span!("call", manager, function = Empty, outcome = Empty);
            if !span.is_disabled() {
                span.record("function", function());
            }
            Self(span.entered())
        }

        pub(crate) fn end<T>(self, outcome: &Result<T>) {
            let word = match outcome {
                Ok(_) => "ok",
                Err(error) => error.code().map_or("thrown", |code| code.as_str()),
            };
            self.0.record("outcome", word);
        }
    }

    pub(crate) fn step(step: &'static str, took: Duration) {
        let took_us = took.as_micros() as u64;
        tracing::info!(step, took_us);
    }
}

#[cfg(not(feature = "tracing"))]
mod off {
    use std::time::Duration;

    use crate::error::Result;

    pub(crate) struct Span;

    impl Span {
        pub(crate) const fn reload(_manager: &str, _reason: &str, _strategy: &'static str) -> Self {
            Self
        }

        pub(crate) fn call(_manager: &str, _function: impl FnOnce() -> String) -> Self {
            Self
        }

        pub(crate) const fn end<T>(self, _outcome: &Result<T>) {
            let Self = self;
        }
    }

    pub(crate) const fn step(_step: &'static str, _took: Duration) {}
}
