//! A waiter for the unit tests.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::{Admission, Gate, GateOptions, Refused, Ticket, WaitId, Waiter};

/// A call with a number, which sends that and its ticket to the test when it starts.
pub(crate) struct Call {
    pub(crate) number: u32,
    started: Sender<(u32, Ticket<Call>)>,
}

impl Waiter for Call {
    fn start(self, ticket: Ticket<Self>) {
        // Fails when the test is over and what still waits runs down.
        let _ = self.started.send((self.number, ticket));
    }
}

/// A gate, and what started in it.
pub(crate) struct Bench {
    pub(crate) gate: Gate<Call>,
    calls: Sender<(u32, Ticket<Call>)>,
    started: Receiver<(u32, Ticket<Call>)>,
}

impl Bench {
    pub(crate) fn closed(options: GateOptions) -> Self {
        let (calls, started) = channel();
        Self {
            gate: Gate::new(options),
            calls,
            started,
        }
    }

    pub(crate) fn open(slots: usize) -> Self {
        let bench = Self::closed(GateOptions {
            slots,
            max_queue: 8,
            home: true,
        });
        bench.gate.open();
        bench
    }

    pub(crate) fn call(&self, number: u32) -> Call {
        Call {
            number,
            started: self.calls.clone(),
        }
    }

    pub(crate) fn admit(&self, number: u32) -> Result<Admission, Refused<Call>> {
        self.gate.admit(self.call(number))
    }

    pub(crate) fn queue(&self, number: u32) -> WaitId {
        match self.admit(number).unwrap() {
            Admission::Queued(id) => id,
            Admission::Started => panic!("call {number} did not queue"),
        }
    }

    /// Admits a call that must start at once, and takes its ticket.
    pub(crate) fn hold(&self, number: u32) -> Ticket<Call> {
        assert_eq!(self.admit(number).unwrap(), Admission::Started);
        self.next(number)
    }

    /// The ticket of the call that started next, which must have this number.
    pub(crate) fn next(&self, number: u32) -> Ticket<Call> {
        let (started, ticket) = self.started.try_recv().unwrap();
        assert_eq!(started, number);
        ticket
    }

    /// Nothing has started that was not taken by `next`.
    pub(crate) fn assert_quiet(&self) {
        assert!(self.started.try_recv().is_err());
    }
}
