//! A host function as the point where a test and its calls meet.

use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, select, unbounded};
use wasm_molt_engine::{HostCall, HostRef, Result, Value};

use crate::wait::PATIENCE;

/// How a call goes on.
#[derive(Debug)]
pub enum Pass {
    /// With its own argument for a result.
    Go,
    /// With this result.
    Answer(i32),
    /// With an exception of the host.
    Throw(HostRef),
    /// With a panic of the host.
    Panic,
}

/// Calls arrive at the door, are seen there, and wait to be let through or stopped.
#[derive(Debug, Clone)]
pub struct Door {
    arrive: Sender<i32>,
    arrived: Receiver<i32>,
    /// Gone once the door stands open.
    passes: Arc<Mutex<Option<Sender<Pass>>>>,
    pass: Receiver<Pass>,
    /// Whether a stop of the call is heard while it waits.
    hears_stops: bool,
}

impl Default for Door {
    fn default() -> Self {
        Self::new()
    }
}

impl Door {
    /// A closed door, at which a stop of the call is heard.
    pub fn new() -> Self {
        let (arrive, arrived) = unbounded();
        let (passes, pass) = unbounded();
        Self {
            arrive,
            arrived,
            passes: Arc::new(Mutex::new(Some(passes))),
            pass,
            hears_stops: true,
        }
    }

    /// A closed door at which nobody listens for stops: a host that does not cooperate.
    pub fn deaf() -> Self {
        Self {
            hears_stops: false,
            ..Self::new()
        }
    }

    /// The host function: `(i32) -> i32`, `() -> ()` and the like.
    pub fn function(&self) -> impl Fn(&mut HostCall<'_>) -> Result<()> + Send + Sync + 'static {
        let door = self.clone();
        move |call| door.meet(call)
    }

    fn meet(&self, call: &mut HostCall<'_>) -> Result<()> {
        let arg = match call.args.first() {
            Some(Value::I32(arg)) => *arg,
            _ => 0,
        };
        let _ = self.arrive.send(arg);
        // An inner host call may have heard of the stop in this one's place.
        if self.hears_stops && call.replica.interrupter().is_stopped() {
            return Err(call.replica.interrupted());
        }
        let never = crossbeam_channel::never();
        let stopped = if self.hears_stops {
            call.replica.interrupter().cancelled()
        } else {
            &never
        };
        let pass = select! {
            recv(self.pass) -> pass => pass.unwrap_or(Pass::Go),
            recv(stopped) -> _ => return Err(call.replica.interrupted()),
            default(PATIENCE) => panic!("nobody let call {arg} through the door"),
        };
        let result = match pass {
            Pass::Go => arg,
            Pass::Answer(result) => result,
            Pass::Throw(thrown) => return Err(wasm_molt_engine::Error::Thrown(thrown)),
            Pass::Panic => panic!("on purpose, in a host function"),
        };
        if let Some(first) = call.results.first_mut() {
            *first = Value::I32(result);
        }
        Ok(())
    }

    /// Waits for the next call to arrive; answers its argument.
    #[track_caller]
    pub fn arrived(&self) -> i32 {
        match self.arrived.recv_timeout(PATIENCE) {
            Ok(arg) => arg,
            Err(_) => panic!("no call came to the door within {PATIENCE:?}"),
        }
    }

    /// Whether nobody has arrived who was not taken note of.
    pub fn is_quiet(&self) -> bool {
        self.arrived.is_empty()
    }

    /// Lets one call through.
    pub fn let_through(&self, pass: Pass) {
        let passes = self.passes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(passes) = &*passes {
            drop(passes.send(pass));
        }
    }

    /// Lets one call through with its own argument.
    pub fn go(&self) {
        self.let_through(Pass::Go);
    }

    /// From now on nobody waits.
    pub fn open(&self) {
        self.passes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}
