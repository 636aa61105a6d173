//! Slot 0 at home: entered by its own thread without a lock.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use crate::gate::{AT_HOME, Admission, Gate, GateCounts, Refused, WaitId, Waiter};
use crate::state::{Asker, Entry, HomeIs, Slot, State};
use crate::sync::Ordering;

/// The owner of slot 0, on the thread where it was [taken](Gate::take_home).
///
/// Synchronous calls are the hot path of glue code, so [`enter`](Self::enter) is a load, a compare
/// and an increment. That it suffices rests on who writes the word:
///
/// * `AT_HOME → AWAY` by the home thread itself: `admit_as`, `serve_queued`, `close`, `shut`,
///   `cut`, [`Inside::retire`]. It knows its depth and puts it on record under the mutex (`Inside`)
///   if it is not 0; leaving then takes the slow path.
/// * `AWAY → AT_HOME` by any thread under the mutex, with `Release`: the `Acquire` load in `enter`
///   thereby sees everything that the ticket holders before did to the replica.
/// * `AT_HOME → AWAY` by another thread only in [`Gate::close`] and [`Gate::retire`], which cannot
///   know whether the home is inside and therefore take slot 0 for in flight (`Recalled`) until the
///   home thread comes by. An entry that misses that store is thus still waited for.
///
/// In the other direction the mutex orders: the home thread takes it before anybody else can get
/// slot 0.
///
/// While the thread is inside, `enter` succeeds again whatever the word says: that is the same
/// call, deeper.
///
/// Dropping it (its environment is gone) makes slot 0 a slot like any other.
///
/// It stays on its thread:
///
/// ```compile_fail
/// # use wasm_molt_lifecycle::{Home, Waiter};
/// fn is_send<T: Send>() {}
/// fn check<W: Waiter>() { is_send::<Home<W>>() }
/// ```
pub struct Home<W: Waiter> {
    gate: Gate<W>,
    /// How many [`Inside`]s there are.
    depth: Cell<u32>,
    on_its_thread: PhantomData<*const ()>,
}

/// Why [`Home::enter`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Away {
    /// A ticket has slot 0, or had it a moment ago.
    Busy,
    /// The gate is closed.
    Closed,
    /// Slot 0 is out of service.
    Retired,
    /// The gate is shut: slot 0 does not come home any more.
    Shut,
}

impl<W: Waiter> Home<W> {
    pub(crate) fn new(gate: Gate<W>) -> Self {
        Self {
            gate,
            depth: Cell::new(0),
            on_its_thread: PhantomData,
        }
    }

    /// Enters slot 0 if it is at home, or if this thread is inside already.
    ///
    /// # Cost
    ///
    /// A load, a compare and an increment, and as much again to leave.
    #[inline]
    pub fn enter(&self) -> Option<Inside<'_, W>> {
        let depth = self.depth.get();
        if self.gate.shared.word.0.load(Ordering::Acquire) == AT_HOME || depth > 0 {
            self.depth.set(depth + 1);
            Some(Inside { home: self })
        } else {
            None
        }
    }

    /// Why [`enter`](Self::enter) has just failed. If slot 0 has come home since, the answer is
    /// [`Away::Busy`]; entering again is worth a try.
    pub fn refusal(&self) -> Away {
        self.gate.locked(|state| {
            state.meet_home(self.is());
            match state.home_slot() {
                _ if state.is_shut() => Away::Shut,
                _ if !state.is_open() => Away::Closed,
                Slot::Retired => Away::Retired,
                _ => Away::Busy,
            }
        })
    }

    /// How deep this thread is inside slot 0. 0: not at all.
    pub fn depth(&self) -> u32 {
        self.depth.get()
    }

    /// Like [`Gate::admit_as`], but may give slot 0 to the waiter, if no other slot is free and
    /// this thread is not inside.
    ///
    /// If this thread is inside, a waiter that finds no other slot queues, and may start when the
    /// outermost [`Inside`] goes.
    ///
    /// # Errors
    ///
    /// Gives the waiter back if the queue is full or the gate is shut.
    pub fn admit_as(&self, id: WaitId, waiter: W) -> Result<Admission, Refused<W>> {
        let home = self.is();
        let (mut starts, entry) = self.gate.locked(|state| {
            // Another thread may have left waiters that only slot 0 can serve. They were first.
            let earlier = state.serve_from_home(home);
            (earlier, state.admit(id, waiter, Asker::Home(home)))
        });
        let admission = entry.map(|entry| match entry {
            Entry::Start(start) => {
                starts.push(start);
                Admission::Started
            }
            Entry::Queued => Admission::Queued(id),
        });
        self.gate.start(starts);
        admission
    }

    /// Like [`Gate::admit`], with the rules of [`admit_as`](Self::admit_as).
    ///
    /// # Errors
    ///
    /// Gives the waiter back if the queue is full or the gate is shut.
    pub fn admit(&self, waiter: W) -> Result<Admission, Refused<W>> {
        self.admit_as(self.gate.reserve_id(), waiter)
    }

    /// Comes by for waiters that other threads have queued and that only slot 0 can serve, and
    /// gives it to them, now or when this thread leaves it.
    pub fn serve_queued(&self) {
        let starts = self.gate.locked(|state| state.serve_from_home(self.is()));
        self.gate.start(starts);
    }

    /// Closes the gate. Returns how many are in flight now; being inside counts as one.
    pub fn close(&self) -> usize {
        self.gate.locked(|state| state.close_from_home(self.is()))
    }

    /// [`Gate::roll`] from the home thread. `None`, and nothing has happened, if that thread is inside.
    pub fn roll(&self) -> Option<u64> {
        self.gate.roll_as(Asker::Home(self.is()))
    }

    /// [`Gate::roll_slot`] from the home thread. `None`, and nothing has happened, for slot 0 if that thread
    /// is inside.
    pub fn roll_slot(&self, slot: usize) -> Option<u64> {
        self.gate.roll_slot_as(slot, Asker::Home(self.is()))
    }

    /// [`Gate::withdraw`] from the home thread: slot 0 leaves at once, or with this thread if it is inside.
    pub fn withdraw(&self, slot: usize) {
        self.gate.locked(|state| {
            state.withdraw(slot);
            state.meet_home(self.is());
        });
    }

    /// Like [`Gate::shut`], and slot 0 leaves home for good: `enter` fails from now on, unless this
    /// thread is inside.
    pub fn shut(&self) {
        let starts = self.gate.locked(|state| state.shut_from_home(self.is()));
        self.gate.start(starts);
    }

    /// Like [`Gate::cut`], and slot 0 leaves home for good: `enter` fails from now on, unless this
    /// thread is inside.
    #[must_use = "the waiters have to be told"]
    pub fn cut(&self) -> Vec<W> {
        self.gate.locked(|state| {
            let cut = state.take_queue();
            // Nobody is queued, so nobody starts.
            drop(state.shut_from_home(self.is()));
            cut
        })
    }

    /// The counts at this moment, with this thread's own entry.
    pub fn counts(&self) -> GateCounts {
        self.gate.locked(|state| {
            state.meet_home(self.is());
            let mut counts = state.counts();
            let is_unseen = state.is_at_home() && self.depth.get() > 0;
            counts.in_flight += usize::from(is_unseen);
            counts
        })
    }

    /// The gate that this is the home of.
    pub fn gate(&self) -> &Gate<W> {
        &self.gate
    }

    fn is(&self) -> HomeIs {
        if self.depth.get() > 0 {
            HomeIs::Inside
        } else {
            HomeIs::Outside
        }
    }

    /// The outermost entry is gone and slot 0 is not at home.
    #[cold]
    fn leave(&self) {
        let next = self.gate.locked(State::leave_inside);
        self.gate.start(next);
    }
}

impl<W: Waiter> Drop for Home<W> {
    fn drop(&mut self) {
        let home = self.is();
        let starts = self.gate.locked(|state| State::drop_home(state, home));
        self.gate.start(starts);
    }
}

impl<W: Waiter> fmt::Debug for Home<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home")
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

/// The home thread is inside slot 0, at one level. Dropped, it has left that level.
///
/// When the outermost goes and the slot is wanted elsewhere, the drop hands it on, and may
/// [start](Waiter::start) a waiter on this thread.
#[must_use = "dropping it leaves the slot at once"]
pub struct Inside<'a, W: Waiter> {
    home: &'a Home<W>,
}

impl<W: Waiter> Inside<'_, W> {
    /// Takes slot 0 out of service once the outermost entry is gone: its instance is not to be
    /// called again.
    ///
    /// Entries that are still open stay valid, and this thread may still nest further ones in them.
    /// A [`Gate::reinstate`] before that takes it back.
    pub fn retire(self) {
        self.home.gate.locked(State::retire_inside);
    }
}

impl<W: Waiter> Drop for Inside<'_, W> {
    #[inline]
    fn drop(&mut self) {
        let depth = self.home.depth.get() - 1;
        self.home.depth.set(depth);
        // Relaxed: the slow path takes the mutex, and the fast one publishes nothing.
        if depth == 0 && self.home.gate.shared.word.0.load(Ordering::Relaxed) != AT_HOME {
            self.home.leave();
        }
    }
}

impl<W: Waiter> fmt::Debug for Inside<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inside")
            .field("depth", &self.home.depth)
            .finish()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::InFlight;
    use crate::testing::{Bench, Call};
    use crate::{GateOptions, Refusal, Ticket};

    const NOW: Option<Duration> = Some(Duration::ZERO);

    fn at_home(slots: usize) -> (Bench, Home<Call>) {
        let bench = Bench::open(slots);
        let home = bench.gate.take_home().unwrap();
        (bench, home)
    }

    fn hold_from(home: &Home<Call>, bench: &Bench, number: u32) -> Ticket<Call> {
        assert_eq!(home.admit(bench.call(number)).unwrap(), Admission::Started);
        bench.next(number)
    }

    fn queue_from(home: &Home<Call>, bench: &Bench, number: u32) -> WaitId {
        let id = bench.gate.reserve_id();
        let admission = home.admit_as(id, bench.call(number)).unwrap();
        assert_eq!(admission, Admission::Queued(id));
        bench.assert_quiet();
        id
    }

    #[test]
    fn there_is_one_home_if_any() {
        let (bench, home) = at_home(1);
        assert!(bench.gate.take_home().is_none());
        drop(home);
        assert!(bench.gate.take_home().is_none());
        let homeless = Bench::closed(GateOptions {
            slots: 1,
            max_queue: 0,
            home: false,
        });
        assert!(homeless.gate.take_home().is_none());
    }

    #[test]
    fn slot_0_goes_home_when_the_gate_opens_and_nobody_waits() {
        let bench = Bench::closed(GateOptions {
            slots: 1,
            max_queue: 8,
            home: true,
        });
        let home = bench.gate.take_home().unwrap();
        assert!(home.enter().is_none());
        assert_eq!(home.refusal(), Away::Closed);
        bench.queue(0);
        bench.gate.open();
        let ticket = bench.next(0);
        assert!(home.enter().is_none());
        assert_eq!(home.refusal(), Away::Busy);
        drop(ticket);
        assert!(home.enter().is_some());
    }

    #[test]
    fn entries_nest_and_are_counted_once() {
        let (bench, home) = at_home(1);
        let outer = home.enter().unwrap();
        let inner = home.enter().unwrap();
        assert_eq!(home.depth(), 2);
        assert_eq!(home.counts().in_flight, 1);
        assert_eq!(bench.gate.counts().in_flight, 0, "unseen from outside");
        // In whatever order they go.
        drop(outer);
        assert_eq!(home.depth(), 1);
        drop(inner);
        assert_eq!((home.depth(), home.counts().in_flight), (0, 0));
    }

    #[test]
    fn other_threads_leave_slot_0_at_home() {
        let (bench, home) = at_home(2);
        let ticket = bench.hold(0);
        assert_eq!(ticket.slot(), 1);
        bench.queue(1);
        assert!(home.enter().is_some());
        bench.assert_quiet();
        home.serve_queued();
        assert_eq!(bench.next(1).slot(), 0);
    }

    #[test]
    fn home_gives_up_its_slot_last() {
        let (bench, home) = at_home(2);
        let tickets = [hold_from(&home, &bench, 0), hold_from(&home, &bench, 1)];
        assert_eq!([tickets[0].slot(), tickets[1].slot()], [1, 0]);
        assert_eq!(home.counts().in_flight, 2);
        assert!(home.enter().is_none());
    }

    #[test]
    fn home_serves_who_was_queued_before_it() {
        let (bench, home) = at_home(1);
        bench.queue(0);
        assert!(matches!(
            home.admit(bench.call(1)).unwrap(),
            Admission::Queued(_)
        ));
        drop(bench.next(0));
        drop(bench.next(1));
        assert!(home.enter().is_some());
    }

    #[test]
    fn what_home_queues_while_inside_starts_when_it_leaves() {
        let (bench, home) = at_home(1);
        let outer = home.enter().unwrap();
        let inner = home.enter().unwrap();
        queue_from(&home, &bench, 0);
        drop(inner);
        bench.assert_quiet();
        assert!(home.enter().is_some(), "deeper, it is the same call");
        drop(outer);
        let ticket = bench.next(0);
        assert!(home.enter().is_none());
        drop(ticket);
        assert!(home.enter().is_some());
    }

    #[test]
    fn home_keeps_its_slot_if_who_waited_is_gone_when_it_leaves() {
        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        let id = queue_from(&home, &bench, 0);
        assert_eq!(bench.gate.cancel(id).unwrap().number, 0);
        drop(inside);
        assert!(home.enter().is_some());
    }

    #[test]
    fn serving_the_queue_while_inside_happens_on_leaving() {
        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        bench.queue(0);
        home.serve_queued();
        bench.assert_quiet();
        drop(inside);
        drop(bench.next(0));
    }

    #[test]
    fn a_close_from_inside_is_drained_when_home_leaves() {
        let (bench, home) = at_home(2);
        let ticket = hold_from(&home, &bench, 0);
        let inside = home.enter().unwrap();
        assert_eq!(home.close(), 2);
        drop(ticket);
        assert_eq!(bench.gate.wait_drained(NOW), Err(InFlight(1)));
        drop(home.enter().unwrap());
        drop(inside);
        assert_eq!(bench.gate.wait_drained(NOW), Ok(()));
        assert_eq!(
            (home.enter().is_none(), home.refusal()),
            (true, Away::Closed)
        );
        queue_from(&home, &bench, 1);
        bench.gate.open();
        assert_eq!(bench.next(1).slot(), 1, "slot 0 goes home rather");
        assert!(home.enter().is_some());
    }

    #[test]
    fn a_gate_may_reopen_while_home_is_inside() {
        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        home.close();
        bench.queue(0);
        bench.gate.open();
        bench.assert_quiet();
        drop(inside);
        drop(bench.next(0));
        assert!(home.enter().is_some());
    }

    #[test]
    fn a_close_from_elsewhere_waits_until_home_comes_by() {
        let come_by: [fn(&Home<Call>); 4] = [
            |home| assert_eq!(home.refusal(), Away::Closed),
            |home| assert_eq!(home.counts().in_flight, 0),
            |home| assert_eq!(home.close(), 0),
            |home| home.serve_queued(),
        ];
        for come_by in come_by {
            let (bench, home) = at_home(1);
            assert_eq!(bench.gate.close(), 1);
            assert_eq!(bench.gate.wait_drained(NOW), Err(InFlight(1)));
            assert!(home.enter().is_none());
            come_by(&home);
            assert_eq!(bench.gate.wait_drained(NOW), Ok(()));
        }
    }

    #[test]
    fn a_close_from_elsewhere_waits_until_home_leaves() {
        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        bench.gate.close();
        assert_eq!(home.counts().in_flight, 1);
        assert_eq!(bench.gate.wait_drained(NOW), Err(InFlight(1)));
        drop(inside);
        assert_eq!(bench.gate.wait_drained(NOW), Ok(()));
    }

    #[test]
    fn a_close_from_elsewhere_that_is_taken_back_is_never_noticed() {
        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        bench.gate.close();
        bench.queue(0);
        bench.gate.open();
        assert_eq!(bench.gate.counts().in_flight, 0);
        drop(inside);
        bench.assert_quiet();
        home.serve_queued();
        drop(bench.next(0));
    }

    #[test]
    fn retiring_from_inside_waits_for_the_outermost_entry() {
        let (bench, home) = at_home(2);
        let outer = home.enter().unwrap();
        home.enter().unwrap().retire();
        assert_eq!(bench.gate.counts().retired, 0);
        drop(home.enter().unwrap());
        drop(outer);
        let counts = bench.gate.counts();
        assert_eq!((counts.retired, counts.in_flight), (1, 0));
        assert_eq!(
            (home.enter().is_none(), home.refusal()),
            (true, Away::Retired)
        );
        assert_eq!(hold_from(&home, &bench, 0).slot(), 1);
        bench.gate.reinstate(0);
        home.enter().unwrap().retire();
        assert_eq!(bench.gate.counts().retired, 1);
        bench.gate.close();
        bench.gate.reinstate_all();
        assert_eq!(home.refusal(), Away::Closed);
        bench.gate.open();
        drop(home.enter().unwrap());
        assert_eq!(bench.gate.counts().retired, 0, "retired once, not for ever");
    }

    #[test]
    fn a_retirement_from_inside_may_be_taken_back() {
        let (bench, home) = at_home(1);
        let outer = home.enter().unwrap();
        home.enter().unwrap().retire();
        bench.gate.reinstate(0);
        drop(outer);
        drop(home.enter().unwrap());
        assert_eq!(bench.gate.counts().retired, 0);
    }

    #[test]
    fn a_slot_retired_from_elsewhere_goes_when_home_comes_by_or_leaves() {
        let (bench, home) = at_home(1);
        bench.gate.retire(0);
        assert!(home.enter().is_none());
        assert_eq!(home.refusal(), Away::Retired);

        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        bench.gate.retire(0);
        // What happens meanwhile does not help it.
        queue_from(&home, &bench, 0);
        home.close();
        bench.gate.open();
        drop(inside);
        bench.assert_quiet();
        assert_eq!(
            (home.enter().is_none(), home.refusal()),
            (true, Away::Retired)
        );
        bench.gate.reinstate_all();
        drop(bench.next(0));
        assert!(home.enter().is_some());

        let (bench, home) = at_home(1);
        bench.gate.close();
        bench.gate.retire(0);
        bench.gate.open();
        assert_eq!(bench.gate.counts().in_flight, 1);
        bench.gate.reinstate(0);
        assert!(home.enter().is_some(), "it has never noticed");
        bench.gate.retire(0);
        drop(home);
        let counts = bench.gate.counts();
        assert_eq!((counts.retired, counts.in_flight), (1, 0));
    }

    #[test]
    fn shutting_from_home_takes_slot_0_away_but_serves_who_waits() {
        let (bench, home) = at_home(1);
        bench.queue(0);
        home.shut();
        let ticket = bench.next(0);
        assert_eq!((home.enter().is_none(), home.refusal()), (true, Away::Shut));
        assert_eq!(
            home.admit(bench.call(1)).unwrap_err().refusal,
            Refusal::Shut
        );
        drop(ticket);
        assert!(home.enter().is_none(), "it does not come home again");
        assert_eq!(bench.gate.wait_idle(NOW), Ok(()));
    }

    #[test]
    fn shutting_from_inside_lets_the_call_end() {
        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        queue_from(&home, &bench, 0);
        home.shut();
        drop(home.enter().unwrap());
        assert_eq!(bench.gate.wait_idle(NOW), Err(InFlight(2)));
        drop(inside);
        drop(bench.next(0));
        assert_eq!(bench.gate.wait_idle(NOW), Ok(()));
    }

    #[test]
    fn cutting_from_home_starts_nobody() {
        let (bench, home) = at_home(1);
        let inside = home.enter().unwrap();
        queue_from(&home, &bench, 0);
        assert_eq!(home.cut().len(), 1);
        assert_eq!(bench.gate.wait_drained(NOW), Err(InFlight(1)));
        drop(inside);
        bench.assert_quiet();
        assert_eq!(bench.gate.wait_idle(NOW), Ok(()));
        assert!(home.enter().is_none());
    }

    #[test]
    fn shutting_from_elsewhere_leaves_slot_0_at_home_until_a_ticket_has_had_it() {
        let (bench, home) = at_home(1);
        bench.gate.shut();
        assert!(home.enter().is_some());
        home.shut();
        assert!(home.enter().is_none());

        let (bench, home) = at_home(1);
        let ticket = hold_from(&home, &bench, 0);
        bench.gate.shut();
        drop(ticket);
        assert_eq!((home.enter().is_none(), home.refusal()), (true, Away::Shut));
    }

    #[test]
    fn a_slot_without_its_home_serves_anybody() {
        let (bench, home) = at_home(1);
        bench.queue(0);
        drop(home);
        let ticket = bench.next(0);
        bench.queue(1);
        drop(ticket);
        drop(bench.next(1));
        assert_eq!(bench.hold(2).slot(), 0);
    }

    #[test]
    fn only_home_rolls_while_slot_0_lives_there() {
        let (bench, home) = at_home(1);
        assert_eq!(bench.gate.roll(), None);
        assert_eq!(home.roll(), Some(1));
        let inside = home.enter().unwrap();
        assert_eq!((bench.gate.roll(), home.roll()), (None, None));
        bench.gate.close();
        assert_eq!((bench.gate.roll(), home.roll()), (None, None));
        drop(inside);
        bench.gate.open();

        // Recalled by another thread: it is not known to be free until the home comes by.
        bench.gate.close();
        assert_eq!(bench.gate.roll(), None);
        assert_eq!(home.roll(), Some(2));
        bench.gate.open();
        drop(home.enter().unwrap());
        let ticket = hold_from(&home, &bench, 0);
        assert_eq!(
            ticket.id().cohort,
            2,
            "a roll that did not happen has no number"
        );
        assert_eq!(bench.gate.roll(), Some(3), "a ticket has it: anybody may");
        assert!(home.enter().is_some(), "the new one is at home");
        drop(ticket);
    }

    #[test]
    fn a_slot_left_behind_does_not_keep_home_out() {
        let (bench, home) = at_home(2);
        let old = [hold_from(&home, &bench, 0), hold_from(&home, &bench, 1)];
        queue_from(&home, &bench, 2);
        assert!(home.enter().is_none());
        assert_eq!(home.roll(), Some(1));
        let new = bench.next(2);
        assert_eq!(new.slot(), 1, "slot 0 comes last");
        let inside = home.enter().unwrap();
        assert_eq!(home.counts().in_flight, 4);
        drop(old);
        drop(inside);
        assert_eq!(home.counts().in_flight, 1);
        drop(new);
    }

    #[test]
    fn a_roll_brings_a_slot_back_that_was_retired_at_home() {
        let (bench, home) = at_home(1);
        home.enter().unwrap().retire();
        assert_eq!(home.refusal(), Away::Retired);
        assert_eq!(home.roll(), Some(1));
        drop(home.enter().unwrap());
        // Retired from elsewhere, and home has not come by yet.
        bench.gate.retire(0);
        assert_eq!(home.roll(), Some(2));
        drop(home.enter().unwrap());
        assert_eq!(bench.gate.counts().retired, 0);
    }

    #[test]
    fn without_its_home_anybody_rolls() {
        let (bench, home) = at_home(1);
        let ticket = hold_from(&home, &bench, 0);
        bench.queue(1);
        drop(home);
        assert_eq!(bench.gate.roll(), Some(1));
        drop(bench.next(1));
        assert_eq!(bench.gate.roll(), Some(2));
        assert_eq!(bench.gate.stragglers(), [ticket.id()]);
        drop(ticket);
    }

    #[test]
    fn an_entry_that_was_leaked_retires_the_slot_with_its_home() {
        let (bench, home) = at_home(1);
        std::mem::forget(home.enter());
        assert_eq!(home.close(), 1);
        drop(home);
        let counts = bench.gate.counts();
        assert_eq!((counts.in_flight, counts.retired), (0, 1));
    }
}
