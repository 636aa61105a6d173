//! Atomic waits of guests, such that they can be ended.
//!
//! Nothing ends the engine's own `memory.atomic.wait` but a notify. So the splice makes a wait a call of
//! what is made here (see [`crate::instance::instrument`]). It waits in the engine all the same, where the guest's
//! own notifies find it, but says beforehand at which address: whoever wants to end the wait notifies that
//! address, again and again until the thread has come out. It is then *roused*.
//!
//! The home thread waits by a *sleeper* while its guest has other threads: these may need it meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, after, bounded, select};
use wasmtime::{AsContextMut, Caller, Func, SharedMemory, Trap, Val, WaitResult};

use crate::error::{Error, Result, TrapInfo};
use crate::instance::deadline::Deadline;
use crate::instance::host::{enter, unwind};
use crate::instance::instrument::StateMap;
use crate::instance::memory::AnyMemory;
use crate::instance::pool::no_thread;
use crate::instance::replica::{Guest, Replica};
use crate::instance::watch::ROUND;
use crate::scarcity;

/// Rounds in which nobody in a guest has done anything, before that is called a deadlock: half a second.
const QUIET_ROUNDS: u32 = 10;

/// What runs on the home thread while its guest waits there, on behalf of its guest's other threads.
pub trait Attendant: Send + Sync + 'static {
    /// Whether there is anything to do. Any thread.
    fn is_wanted(&self) -> bool;

    /// Does it. Home thread.
    fn attend(&self);
}

/// Where the thread that runs a guest waits.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    at: Mutex<Option<(SharedMemory, u64)>>,
    /// Even: none that has no end. Another number whenever one begins or is over.
    endless: AtomicU64,
    is_stopped: AtomicBool,
    is_repeating: AtomicBool,
}

impl Waits {
    /// Between two notifies: the first may come before the waiter is really asleep.
    const AGAIN: Duration = Duration::from_millis(1);

    fn lock(&self) -> MutexGuard<'_, Option<(SharedMemory, u64)>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread if it waits. It may have been about to fall asleep only, so this is repeated. Returns how many
    /// slept at its address; `None` if it does not wait.
    fn rouse(&self) -> Option<u32> {
        let at = self.lock();
        let (memory, address) = at.as_ref()?;
        // The address was looked at when the wait began, and memory below it stays.
        Some(memory.atomic_notify(*address, u32::MAX).unwrap_or_default())
    }

    /// No wait lasts from now on. Any thread.
    pub(crate) fn stop(self: &Arc<Self>) {
        self.is_stopped.store(true, Ordering::SeqCst);
        if self.rouse().is_some() {
            self.repeat();
        }
    }

    /// Waits may last again.
    pub(crate) fn resume(&self) {
        self.is_stopped.store(false, Ordering::SeqCst);
    }

    /// The thread sleeps, or is about to.
    fn has_begun(&self) -> bool {
        self.lock().is_some()
    }

    /// The number of the wait that only a notify can end, if the thread is in one.
    pub(crate) fn endless(&self) -> Option<u64> {
        let number = self.endless.load(Ordering::SeqCst);
        (number % 2 == 1).then_some(number)
    }

    fn repeat(self: &Arc<Self>) {
        if self.is_repeating.swap(true, Ordering::SeqCst) {
            return;
        }
        let weak = Arc::downgrade(self);
        let again = Deadline::after(Self::AGAIN, move || {
            let Some(waits) = weak.upgrade() else { return };
            // In this order, so that a stop of this very moment begins its own repetition.
            waits.is_repeating.store(false, Ordering::SeqCst);
            if waits.is_stopped.load(Ordering::SeqCst) && waits.rouse().is_some() {
                waits.repeat();
            }
        });
        match again {
            Ok(deadline) => deadline.detach(),
            Err(_) => self.is_repeating.store(false, Ordering::SeqCst),
        }
    }
}

/// The value that is waited at.
#[derive(Debug, Clone, Copy)]
enum Expected {
    Narrow(u32),
    Wide(u64),
}

/// Says that nobody waits any more, however the wait ended.
struct Left<'a>(&'a Waits);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        if self.0.endless().is_some() {
            self.0.endless.fetch_add(1, Ordering::SeqCst);
        }
        *self.0.lock() = None;
    }
}

/// What one wait is about.
struct Wait {
    memory: SharedMemory,
    address: u64,
    expected: Expected,
    began: Instant,
    /// `None`: for ever.
    until: Option<Instant>,
}

impl Wait {
    /// Waits, if `waits` allows, where whoever has it can end that.
    fn until_roused(&self, waits: &Waits, until: Option<Instant>) -> Result<WaitResult, Trap> {
        *waits.lock() = Some((self.memory.clone(), self.address));
        if until.is_none() {
            waits.endless.fetch_add(1, Ordering::SeqCst);
        }
        let _left = Left(waits);
        // Whoever stops from here on finds the address.
        if waits.is_stopped.load(Ordering::SeqCst) {
            return Ok(WaitResult::TimedOut);
        }
        self.once(until)
    }

    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }

    fn once(&self, until: Option<Instant>) -> Result<WaitResult, Trap> {
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
        match self.expected {
            Expected::Narrow(value) => self.memory.atomic_wait32(self.address, value, timeout),
            Expected::Wide(value) => self.memory.atomic_wait64(self.address, value, timeout),
        }
    }

    /// Whether it could wait at all.
    fn check(&self) -> Result<(), Trap> {
        let bytes = match self.expected {
            Expected::Narrow(_) => 4,
            Expected::Wide(_) => 8,
        };
        if !self.address.is_multiple_of(bytes) {
            return Err(Trap::HeapMisaligned);
        }
        let end = self.address.checked_add(bytes);
        let is_inside = end.is_some_and(|end| end <= self.memory.data_size() as u64);
        if is_inside {
            Ok(())
        } else {
            Err(Trap::MemoryOutOfBounds)
        }
    }
}

/// A thread that waits in the place of another one, which is free to do something else meanwhile.
#[derive(Debug)]
pub(crate) struct Sleeper {
    jobs: Sender<Job>,
    waits: Arc<Waits>,
}

/// One wait of a sleeper.
struct Job {
    wait: Wait,
    tell: Sender<Result<WaitResult, Trap>>,
}

impl Sleeper {
    /// More than channels and the engine's parking need.
    const STACK_BYTES: usize = 128 << 10;

    fn start() -> Result<Self> {
        let (jobs, given) = bounded::<Job>(1);
        let waits = Arc::<Waits>::default();
        let own = Arc::clone(&waits);
        let run = move || {
            for Job { wait, tell } in given {
                // Nobody listens if the wait was given up.
                let _ = tell.send(wait.until_roused(&own, wait.until));
            }
        };
        let builder = std::thread::Builder::new().name("molt-sleeper".into());
        let started = scarcity::thread(builder.stack_size(Self::STACK_BYTES), run);
        started.map_err(|error| no_thread("a thread to wait on", &error))?;
        Ok(Self { jobs, waits })
    }
}

impl Replica {
    fn wait(&self, wait: Wait) -> wasmtime::Result<WaitResult> {
        wait.check()?;
        // Most of those who come have something to do at once.
        let at_once = wait.once(Some(wait.began))?;
        if at_once != WaitResult::TimedOut || wait.is_over() {
            return Ok(at_once);
        }
        match self.attendant() {
            Some(attendant) if !self.threads().is_empty() => {
                self.wait_and_attend(wait, &**attendant)
            }
            // Nobody else is there who could ever notify it; it ends only if there is nothing to wait for.
            Some(_) if wait.until.is_none() => Err(wasmtime::Error::new(self.deadlock())),
            _ => self.wait_here(&wait),
        }
    }

    /// The error of a guest all of whose threads wait for each other.
    #[cold]
    fn deadlock(&self) -> Error {
        let threads = self.guest_threads().threads;
        Error::Trap {
            what: format!("{}: memory.atomic.wait", self.module().name()),
            info: Box::new(TrapInfo {
                kind: "deadlock",
                message: format!(
                    "the home thread would wait for ever: the guest has {threads} other threads, and none that \
                     does anything but wait"
                ),
                wasm_stack: String::new(),
            }),
        }
    }

    fn wait_here(&self, wait: &Wait) -> wasmtime::Result<WaitResult> {
        let interrupter = self.interrupter();
        loop {
            // A thread that only itself can tell that it must end has to come back and look.
            let look = self.watch().map(|_| Instant::now() + ROUND);
            let until = [wait.until, look].into_iter().flatten().min();
            let result = wait.until_roused(interrupter.waits(), until)?;
            if interrupter.is_stopped() {
                return Err(wasmtime::Error::new(self.interrupted()));
            }
            if result != WaitResult::TimedOut || wait.is_over() {
                return Ok(result);
            }
            self.look();
        }
    }

    /// On the home thread, whom the other threads of the guest may need: a sleeper waits, so that no notify
    /// is missed meanwhile, and none is made up.
    fn wait_and_attend(
        &self,
        wait: Wait,
        attendant: &dyn Attendant,
    ) -> wasmtime::Result<WaitResult> {
        let interrupter = self.interrupter();
        let threads = self.threads();
        let sleeper = threads.sleeper().map_or_else(Sleeper::start, Ok);
        let sleeper = sleeper.map_err(wasmtime::Error::new)?;
        let (tell, told) = bounded(1);
        let gone = || wasmtime::Error::new(Error::internal("a sleeper has gone"));
        let is_endless = wait.until.is_none();
        sleeper.jobs.send(Job { wait, tell }).map_err(|_| gone())?;
        let mut round = after(ROUND);
        let mut asleep = (None, 0);
        loop {
            let wanted = if attendant.is_wanted() {
                Duration::ZERO
            } else {
                Duration::MAX
            };
            select! {
                recv(told) -> result => {
                    let result = result.map_err(|_| gone())?;
                    threads.give_back(sleeper);
                    return Ok(result?);
                }
                recv(threads.doorbell()) -> _ => {}
                recv(interrupter.cancelled()) -> _ => {}
                default(wanted) => {}
                recv(round) -> _ => {
                    round = after(ROUND);
                    self.look();
                    // Whoever slept through a whole round has notified nobody in it; but who was notified may
                    // not have come to run yet.
                    let now = is_endless.then(|| threads.asleep()).flatten();
                    let is_same = now.is_some() && now == asleep.0;
                    asleep = (now, if is_same { asleep.1 + 1 } else { 0 });
                    let is_quiet = !attendant.is_wanted() && told.is_empty();
                    // Where nobody sleeps any more at its address, the sleeper was notified by one that has ended since.
                    let may_be = asleep.1 >= QUIET_ROUNDS && is_quiet;
                    if may_be && sleeper.waits.rouse().is_some_and(|woken| woken > 0) {
                        sleeper.waits.stop();
                        return Err(wasmtime::Error::new(self.deadlock()));
                    }
                }
            }
            if attendant.is_wanted() && !interrupter.is_stopped() {
                // Whom it answers may notify next: nobody would be there yet to hear it.
                while told.is_empty() && !sleeper.waits.has_begun() {
                    std::thread::yield_now();
                }
                attendant.attend();
            }
            if interrupter.is_stopped() {
                // It comes out by itself, and ends.
                sleeper.waits.stop();
                return Err(wasmtime::Error::new(self.interrupted()));
            }
        }
    }

    /// Whether the thread must end, it alone can tell.
    fn look(&self) {
        if let Some(watch) = self.watch()
            && watch.ask()
        {
            self.interrupter().end_with_thread();
        }
    }
}

/// Gives an instance, whose memories these are in the order of their indices, what its waits call.
pub(crate) fn provide(
    mut context: impl AsContextMut<Data = Guest>,
    instance: &wasmtime::Instance,
    map: &StateMap,
    memories: &[AnyMemory],
) -> Result<()> {
    let lost = || Error::internal("a global for waiting is lost");
    for (is_wide, name) in [false, true].into_iter().zip(&map.waits) {
        let Some(name) = name else { continue };
        let global = instance.get_global(&mut context, name).ok_or_else(lost)?;
        let shared = memories.iter().map(|it| it.shared().cloned()).collect();
        let waiter = waiter(&mut context, is_wide, shared);
        global
            .set(&mut context, Val::FuncRef(Some(waiter)))
            .map_err(Error::internal)?;
    }
    Ok(())
}

/// `(address, expected, timeout, memory) -> i32`
fn waiter(
    context: impl AsContextMut<Data = Guest>,
    is_wide: bool,
    memories: Vec<Option<SharedMemory>>,
) -> Func {
    let memories: Arc<[_]> = memories.into();
    if is_wide {
        let wait = move |caller: Caller<'_, Guest>, address, expected: i64, timeout, memory| {
            let expected = Expected::Wide(expected.cast_unsigned());
            wait(caller, &memories, (address, timeout, memory), expected)
        };
        return Func::wrap(context, wait);
    }
    let wait = move |caller: Caller<'_, Guest>, address, expected: i32, timeout, memory| {
        let expected = Expected::Narrow(expected.cast_unsigned());
        wait(caller, &memories, (address, timeout, memory), expected)
    };
    Func::wrap(context, wait)
}

fn wait(
    mut caller: Caller<'_, Guest>,
    memories: &[Option<SharedMemory>],
    (address, timeout, memory): (i64, i64, i32),
    expected: Expected,
) -> wasmtime::Result<i32> {
    let memory = memories.get(memory as usize).and_then(Option::as_ref);
    let memory = memory.ok_or(Trap::AtomicWaitNonSharedMemory)?.clone();
    let timeout = u64::try_from(timeout).ok().map(Duration::from_nanos);
    let began = Instant::now();
    let wait = Wait {
        memory,
        address: address.cast_unsigned(),
        expected,
        began,
        until: timeout.and_then(|timeout| began.checked_add(timeout)),
    };
    let active = enter(&mut caller);
    let outcome = active.replica().wait(wait);
    drop(active);
    let outcome = outcome.map_err(|error| match error.downcast::<Error>() {
        Ok(ours) => unwind(&mut caller, ours),
        Err(other) => other,
    })?;
    Ok(outcome as i32)
}
