//! Starting waiters outside the lock, without losing one and without an unbounded stack.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::gate::Waiter;
use crate::sync::thread_locals;
use crate::ticket::Ticket;

/// How many starts may be nested on one thread: a waiter that drops its ticket while it starts
/// makes the next one start, and so on. Deeper ones wait until the innermost start has returned; a
/// queue of any length then needs a bounded stack.
const NESTED_STARTS_MAX: usize = 16;

type Panic = Box<dyn Any + Send>;
type Deferred = Box<dyn FnOnce() -> Result<(), Panic>>;

thread_locals! {
    static NESTED_STARTS: Cell<usize> = const { Cell::new(0) };
    static DEFERRED_STARTS: RefCell<VecDeque<Deferred>> = const { RefCell::new(VecDeque::new()) };
}

/// Starts every waiter, in order. A panic in one does not keep the others from starting.
///
/// # Panics
///
/// Passes on the first panic of a waiter when all have started; on a thread that already unwinds it
/// ends here.
pub(crate) fn start_all<W: Waiter>(starts: impl IntoIterator<Item = (W, Ticket<W>)>) {
    let mut panic = None;
    for (waiter, ticket) in starts {
        if let Err(payload) = start_nested(waiter, ticket) {
            panic.get_or_insert(payload);
        }
    }
    if let Some(payload) = panic
        && !std::thread::panicking()
    {
        resume_unwind(payload);
    }
}

fn start_nested<W: Waiter>(waiter: W, ticket: Ticket<W>) -> Result<(), Panic> {
    // A thread that is being torn down has no thread locals any more; there, every start is made at
    // once.
    let nested = NESTED_STARTS.try_with(Cell::get).unwrap_or(0);
    if nested >= NESTED_STARTS_MAX && DEFERRED_STARTS.try_with(|_| ()).is_ok() {
        let start: Deferred = Box::new(move || start(waiter, ticket));
        DEFERRED_STARTS.with(|deferred| deferred.borrow_mut().push_back(start));
        return Ok(());
    }
    set_nested(nested + 1);
    let mut outcome = start(waiter, ticket);
    while let Some(deferred) = next_deferred() {
        outcome = outcome.and(deferred());
    }
    set_nested(nested);
    outcome
}

fn start<W: Waiter>(waiter: W, ticket: Ticket<W>) -> Result<(), Panic> {
    catch_unwind(AssertUnwindSafe(|| waiter.start(ticket)))
}

fn set_nested(nested: usize) {
    // Fails only where the count reads as 0 anyway.
    let _ = NESTED_STARTS.try_with(|count| count.set(nested));
}

fn next_deferred() -> Option<Deferred> {
    DEFERRED_STARTS
        .try_with(|deferred| deferred.borrow_mut().pop_front())
        .ok()
        .flatten()
}
