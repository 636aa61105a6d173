//! What the fault matrices share: a gate that serves one call, which the test holds.

use std::sync::mpsc::{Receiver, Sender, channel};

use wasm_molt_lifecycle::{Gate, GateOptions, Ticket, Waiter};

/// A call that hands its ticket to the test.
pub(crate) struct Call(pub(crate) Sender<Ticket<Call>>);

impl Waiter for Call {
    fn start(self, ticket: Ticket<Self>) {
        self.0.send(ticket).unwrap();
    }
}

/// An open gate, the call in flight behind it, and the way for others and of their tickets.
pub(crate) struct Busy {
    pub(crate) gate: Gate<Call>,
    pub(crate) in_flight: Option<Ticket<Call>>,
    pub(crate) calls: Sender<Ticket<Call>>,
    pub(crate) started: Receiver<Ticket<Call>>,
}

impl Busy {
    pub(crate) fn new() -> Self {
        let gate = Gate::new(GateOptions {
            slots: 1,
            max_queue: 8,
            home: false,
        });
        gate.open();
        let (calls, started) = channel();
        gate.admit(Call(calls.clone())).unwrap();
        Self {
            gate,
            in_flight: Some(started.recv().unwrap()),
            calls,
            started,
        }
    }
}
