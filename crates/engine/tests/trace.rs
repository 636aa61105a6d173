//! Spans, as a subscriber sees them: `cargo test --workspace --features wasm-molt-engine/tracing --test trace`.
#![cfg(feature = "tracing")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use wasm_molt_testkit::guests;
use wasm_molt_testkit::rig::Setup;

/// Keeps every line of what it is told.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn push(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Durations differ from run to run.
        if field.name() != "took_us" {
            let _ = write!(self.0, " {field}={value:?}");
        }
    }
}

fn fields(record: impl FnOnce(&mut Fields)) -> String {
    let mut fields = Fields(String::new());
    record(&mut fields);
    fields.0
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("wasm_molt_engine")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let name = span.metadata().name();
        self.push(format!("{name}{}", fields(|f| span.record(f))));
        Id::from_u64(if name == "reload" { 1 } else { 2 })
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        self.push(format!(
            "{}:{}",
            span.into_u64(),
            fields(|f| values.record(f))
        ));
    }

    fn event(&self, event: &Event<'_>) {
        self.push(format!("event{}", fields(|f| event.record(f))));
    }

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

#[test]
fn reloads_and_calls_are_spans_with_their_outcome() {
    let log = Log::default();
    // Calls and reloads run on threads of the manager's: only a global subscriber hears of them.
    tracing::subscriber::set_global_default(log.clone()).unwrap();
    let setup = Setup::new(&guests::adder());
    let rig = setup.options(|o| o.name = Some("traced".into())).start();
    assert_eq!(rig.number("add", &[1, 2]), 3);
    rig.reload("to be seen");
    drop(rig);
    let lines = log.0.lock().unwrap().clone();
    assert_eq!(
        lines,
        [
            "call manager=\"traced\"",
            "2: function=\"add\"",
            "2: outcome=\"ok\"",
            "reload manager=\"traced\" reason=\"to be seen\" strategy=\"exclusive\"",
            "event step=\"instantiate\"",
            "event step=\"drain\"",
            "event step=\"save\"",
            "event step=\"restore\"",
            "event step=\"commit\"",
            "1: outcome=\"ok\"",
        ]
    );
}
