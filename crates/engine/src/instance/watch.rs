//! Guests on the home thread that must end because the host's own thread has to.
//!
//! Only a thread itself may be able to tell that it is being ended: Node answers that question on the
//! JS thread and nowhere else. So a guest is made to *look up* now and then, with what stops guests
//! anyway: its poll page is taken away (or the epoch bumped), and at the next poll its own thread gives
//! the page back, asks, and runs on or ends.
//!
//! Entering costs nothing for it. A round in which no guest has looked up is the last one: the pages
//! stay away, and the first poll after that begins the rounds again. An idle process has no timer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::instance::deadline::Deadline;
use crate::instance::interrupt::Interrupter;

/// How long an ending thread may go on unnoticed.
pub(crate) const ROUND: Duration = Duration::from_millis(50);

/// Watches over the guests that one home thread may enter.
pub struct Watch {
    is_ending: Box<dyn Fn() -> bool + Send + Sync>,
    rounds: Mutex<Rounds>,
}

#[derive(Default)]
struct Rounds {
    guests: Vec<Weak<Interrupter>>,
    /// The next round, if there is one.
    next: Option<Deadline>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// * `is_ending`: asked by a guest's thread, whichever that is, whether it must end. Asked inside
    ///   a signal handler, at a place where the thread is in guest code: it must be short, and neither
    ///   run JavaScript nor need much stack.
    pub fn new(is_ending: impl Fn() -> bool + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            is_ending: Box::new(is_ending),
            rounds: Mutex::default(),
        })
    }

    /// Waits on the home thread for a guest that runs elsewhere.
    ///
    /// * `hear`: waits for so long; `None` if nothing has come.
    /// * `stop`: called, perhaps more than once, when the thread must end; what it stops is still
    ///   waited for.
    pub fn wait_for<T>(&self, hear: impl Fn(Duration) -> Option<T>, stop: impl Fn()) -> T {
        loop {
            if let Some(heard) = hear(ROUND) {
                return heard;
            }
            if (self.is_ending)() {
                stop();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rounds> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on this guest looks up.
    pub(crate) fn add(self: &Arc<Self>, guest: &Arc<Interrupter>) {
        let mut rounds = self.lock();
        rounds.guests.retain(|guest| guest.strong_count() > 0);
        rounds.guests.push(Arc::downgrade(guest));
        self.go_on(&mut rounds);
    }

    /// A guest has looked up, on this thread: whether it must end.
    pub(crate) fn ask(self: &Arc<Self>) -> bool {
        self.go_on(&mut self.lock());
        (self.is_ending)()
    }

    fn go_on(self: &Arc<Self>, rounds: &mut Rounds) {
        if rounds.next.is_none() {
            let watch = Arc::downgrade(self);
            let round = move || {
                if let Some(watch) = watch.upgrade() {
                    watch.round();
                }
            };
            // Fails where no thread can be made; the next guest that looks up tries again.
            rounds.next = Deadline::after(ROUND, round).ok();
        }
    }

    /// On the timer thread.
    fn round(self: &Arc<Self>) {
        let mut rounds = self.lock();
        rounds.next = None;
        let mut is_any_awake = false;
        rounds.guests.retain(|guest| {
            let Some(guest) = guest.upgrade() else {
                return false;
            };
            is_any_awake |= guest.have_look_up();
            true
        });
        // Under the lock: whoever looks up from here on finds that there is no next round, and makes one.
        if is_any_awake {
            self.go_on(&mut rounds);
        }
    }

    #[cfg(test)]
    fn is_resting(&self) -> bool {
        self.lock().next.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Instant;

    use super::*;

    fn until(what: &str, is: impl Fn() -> bool) {
        let since = Instant::now();
        while !is() {
            assert!(since.elapsed() < Duration::from_secs(20), "never: {what}");
            thread::yield_now();
        }
    }

    #[test]
    fn rounds_rest_while_no_guest_runs_and_begin_again_with_the_first_that_does() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let watch = Watch::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            false
        });
        let guest = Arc::new(Interrupter::new(None));
        watch.add(&guest);
        assert!(!watch.is_resting());
        until("rest", || watch.is_resting());
        for round in 1..=3 {
            assert!(guest.looks_up(&watch), "it may go on");
            assert_eq!(asked.load(Ordering::SeqCst), round);
            assert!(!watch.is_resting());
            until("rest again", || watch.is_resting());
        }
    }

    #[test]
    fn a_guest_whose_thread_ends_is_stopped_for_good() {
        let watch = Watch::new(|| true);
        let guest = Arc::new(Interrupter::new(None));
        watch.add(&guest);
        assert!(!guest.looks_up(&watch));
        assert!(guest.is_stopped());
        let run = guest.begin();
        guest.end(run);
        assert!(guest.is_stopped(), "no later run may begin either");
    }

    #[test]
    fn a_wait_that_must_end_stops_what_it_waits_for_and_still_hears_of_it() {
        let watch = Watch::new(|| true);
        let (tell, told) = crossbeam_channel::bounded(1);
        let stop = || {
            let _ = tell.try_send("stopped");
        };
        let hear = |patience| told.recv_timeout(patience).ok();
        assert_eq!(watch.wait_for(hear, stop), "stopped");
    }
}
