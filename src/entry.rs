//! The right to be inside an instance on this thread, and why there is none.

use std::rc::Rc;

use wasm_molt_engine::{Away, Error, ErrorCode, Inside, Job, LeaseInside};

use crate::lease::LeaseSide;
use crate::side::{ManagerSide, ReplicaSide};

/// The right to be inside, by the way it was got.
pub(crate) enum Entry<'a> {
    Home(Inside<'a, Job>),
    Leased(#[expect(dead_code, reason = "held for its drop")] LeaseInside),
    /// A host call of the same instance is on this stack.
    Again,
    /// Nobody's: only this thread is ever inside a realm.
    Shared,
}

/// A function of an instance that its holder has leased may be used through the lease.
pub(crate) fn lease_on(manager: &ManagerSide, side: &Rc<ReplicaSide>) -> Option<Rc<LeaseSide>> {
    let leases = manager.leases.borrow();
    let mut alive = leases.iter().filter_map(std::rc::Weak::upgrade);
    alive.find(|lease| Rc::ptr_eq(&lease.side, side) && !lease.lease.is_released())
}

/// The right to be in a realm now.
///
/// Only this thread is ever inside one, and whatever a swap does to it is a step of this thread too: so
/// whoever asks gets in as long as the realm is there, whether it serves, is being made, or ends with its
/// last scopes. The exception is a generation whose state has been saved: what happened in it now would be
/// lost.
#[inline(never)]
pub(crate) fn enter_realm<'a>(
    manager: &'a ManagerSide,
    side: &Rc<ReplicaSide>,
) -> Result<Entry<'a>, Box<Error>> {
    if side.is_expired.get() {
        return Err(stale_realm(manager, side).into());
    }
    if side.replica.is_poisoned() {
        return Err(broken_realm(side).into());
    }
    if !side.frames.borrow().is_empty() {
        return Ok(Entry::Again);
    }
    if side.is_saved.get() {
        return match lease_on(manager, side) {
            Some(lease) => Ok(Entry::Leased(lease.lease.enter()?)),
            None => Err(refused(manager).into()),
        };
    }
    if manager.is_current(side)
        && let Some(inside) = manager.home.enter()
    {
        return Ok(Entry::Home(inside));
    }
    Ok(Entry::Shared)
}

/// The error of something in a realm whose threads have left it in an unknown state.
#[cold]
fn broken_realm(side: &ReplicaSide) -> Error {
    match side.replica.broken() {
        Error::Trap { what, mut info } => {
            info.message.push_str(
                "; because the guest has threads, nothing can enter it before a reset() or reload()",
            );
            Error::Trap { what, info }
        }
        other => other,
    }
}

/// The error of something that JavaScript has from glue whose generation is gone.
#[cold]
pub(crate) fn stale_realm(manager: &ManagerSide, side: &ReplicaSide) -> Error {
    let name = manager.manager.name();
    let state = manager.manager.state().as_str();
    if matches!(state, "closing" | "closed" | "failed") {
        return Error::new(
            ErrorCode::Closed,
            format!("{name} is {state}; load the glue once more"),
        );
    }
    Error::new(
        ErrorCode::StaleHandle,
        format!(
            "this belongs to generation {} of {name}, which is gone; take functions and classes from \
             manager.module, and make objects that must survive a reload anew in restoreState",
            side.replica.generation()
        ),
    )
}

#[cold]
pub(crate) fn refused(manager: &ManagerSide) -> Error {
    let name = manager.manager.name();
    match manager.home.refusal() {
        Away::Busy => busy(
            manager,
            "a pool thread is inside the instance, or a lease holds it",
        ),
        Away::Closed | Away::Retired => {
            let rest = if manager.manager.is_realm() {
                " and has saved the state of what serves; use manager.use(), which waits its turn"
            } else {
                "; use call(), which waits its turn"
            };
            Error::new(
                ErrorCode::Reloading,
                format!("a swap of {name} is under way{rest}"),
            )
        }
        Away::Shut => Error::new(
            ErrorCode::Closed,
            format!(
                "{name} is {}; create a new manager",
                manager.manager.state().as_str()
            ),
        ),
    }
}

pub(crate) fn busy(manager: &ManagerSide, why: &str) -> Error {
    Error::new(
        ErrorCode::Busy,
        format!(
            "{}: {why}; use call(), which waits its turn",
            manager.manager.name()
        ),
    )
}
