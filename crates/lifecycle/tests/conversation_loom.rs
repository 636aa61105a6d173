//! A question, and what is done before its answer, under every interleaving that loom can find.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test -p wasm-molt-lifecycle
//! --release --test conversation_loom`.
//!
//! A [`Ledger`] counts what each call and each request came to. Whoever waits for something that does not come
//! shows as loom's deadlock.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::sync::{Arc, Mutex};
use loom::thread;
use wasm_molt_lifecycle::{
    Answerer, Asker, ForAnswerer, ForAsker, Inbox, Silence, Wake, Words, conversation,
};

struct Talk;

impl Words for Talk {
    /// Of that level.
    type Request = usize;
    type Reply = usize;
    type Call = usize;
    /// `Err`: a stop has ended it.
    type Outcome = Result<usize, ()>;
}

/// By level: how often it came to that. Orders nothing itself.
#[derive(Default)]
struct Ledger {
    asked: [AtomicUsize; 3],
    replied: [AtomicUsize; 3],
    unanswered: [AtomicUsize; 3],
    called: [AtomicUsize; 3],
    ran: [AtomicUsize; 3],
    outcomes: [AtomicUsize; 3],
    lost: [AtomicUsize; 3],
}

fn count(counters: &[AtomicUsize; 3], level: usize) {
    counters[level].fetch_add(1, Relaxed);
}

fn counted(counters: &[AtomicUsize; 3], level: usize) -> usize {
    counters[level].load(Relaxed)
}

impl Ledger {
    /// Each call has been run at most once and had one end; so has each request.
    fn assert_settled(&self, is_stopped: bool) {
        for level in 0..3 {
            let (asked, called) = (counted(&self.asked, level), counted(&self.called, level));
            let ends = counted(&self.replied, level) + counted(&self.unanswered, level);
            assert_eq!(asked, ends, "requests of level {level}");
            let ends = counted(&self.outcomes, level) + counted(&self.lost, level);
            assert_eq!(called, ends, "calls of level {level}");
            let ran = counted(&self.ran, level);
            assert!(ran <= called, "level {level} ran {ran} times");
            if !is_stopped {
                assert_eq!((called, asked), (ran, counted(&self.replied, level)));
            }
        }
    }
}

/// The thread of the guest: asks at `level`, does what it is called for, which asks one level further in.
fn ask(asker: &Asker<Talk>, ledger: &Ledger, level: usize, deepest: usize) -> Result<usize, ()> {
    count(&ledger.asked, level);
    // The first one has travelled with the answerer.
    if level > 0 && asker.ask(level).is_err() {
        count(&ledger.unanswered, level);
        return Err(());
    }
    loop {
        match asker.hear(None) {
            Ok(ForAsker::Reply(reply)) => {
                assert_eq!(reply, level, "the answer to another question");
                count(&ledger.replied, level);
                return Ok(reply);
            }
            Ok(ForAsker::Call(call)) => {
                assert_eq!(call, level, "called for another question");
                count(&ledger.ran, level);
                let outcome = if level < deepest {
                    ask(asker, ledger, level + 1, deepest).map(|_| level)
                } else {
                    Ok(level)
                };
                if asker.tell(outcome).is_err() {
                    count(&ledger.unanswered, level);
                    return Err(());
                }
            }
            Err(_) => {
                count(&ledger.unanswered, level);
                return Err(());
            }
        }
    }
}

/// The thread that answers: has the asker called back once at each level, and serves it meanwhile.
fn answer(answerer: &Answerer<Talk>, ledger: &Ledger, level: usize) {
    count(&ledger.called, level);
    if answerer.call(level).is_err() {
        count(&ledger.lost, level);
    } else {
        loop {
            match answerer.hear(None) {
                Ok(ForAnswerer::Request(request)) => {
                    assert_eq!(request, level + 1);
                    answer(answerer, ledger, request);
                }
                Ok(ForAnswerer::Outcome(outcome)) => {
                    assert!(outcome.is_err() || outcome == Ok(level), "of another call");
                    count(&ledger.outcomes, level);
                    break;
                }
                Err(silence) => {
                    assert_eq!(silence, Silence::Gone);
                    count(&ledger.lost, level);
                    break;
                }
            }
        }
    }
    // Nobody listens after a stop.
    let _ = answerer.reply(level);
}

#[test]
fn calls_and_requests_alternate_to_any_depth() {
    loom::model(|| {
        let ledger = Arc::<Ledger>::default();
        let (asker, answerer) = conversation();
        let guest = {
            let ledger = Arc::clone(&ledger);
            thread::spawn(move || ask(&asker, &ledger, 0, 2))
        };
        answer(&answerer, &ledger, 0);
        assert_eq!(guest.join().unwrap(), Ok(0));
        ledger.assert_settled(false);
    });
}

#[test]
fn a_stop_at_any_moment_ends_every_level_once() {
    // One preemption more takes a minute, and has found nothing else.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let ledger = Arc::<Ledger>::default();
        let (asker, answerer) = conversation();
        let stopper = asker.stopper();
        let guest = {
            let ledger = Arc::clone(&ledger);
            thread::spawn(move || ask(&asker, &ledger, 0, 1))
        };
        let stop = thread::spawn(move || stopper.stop());
        answer(&answerer, &ledger, 0);
        drop(answerer);
        let _ = guest.join().unwrap();
        stop.join().unwrap();
        ledger.assert_settled(true);
    });
}

#[test]
fn an_answerer_that_goes_in_the_middle_leaves_nobody_waiting() {
    loom::model(|| {
        let ledger = Arc::<Ledger>::default();
        let (asker, answerer) = conversation();
        let guest = {
            let ledger = Arc::clone(&ledger);
            thread::spawn(move || ask(&asker, &ledger, 0, 1))
        };
        answerer.call(0).unwrap();
        // It hears of the request in there, or has not waited for it.
        drop(answerer);
        assert_eq!(guest.join().unwrap(), Err(()));
    });
}

#[test]
fn an_asker_that_is_stopped_and_a_call_that_was_not_begun_are_told_apart() {
    loom::model(|| {
        let (asker, answerer) = conversation::<Talk>();
        let stopper = asker.stopper();
        let guest = thread::spawn(move || {
            let mut ran = 0;
            while let Ok(heard) = asker.hear(None) {
                assert_eq!(heard, ForAsker::Call(0));
                ran += 1;
                asker.tell(Ok(0)).unwrap();
            }
            ran
        });
        let stop = thread::spawn(move || stopper.stop());
        let mut done = 0;
        while done < 2 && answerer.call(0).is_ok() {
            match answerer.hear(None) {
                Ok(_) => done += 1,
                Err(silence) => assert_eq!(silence, Silence::Gone),
            }
        }
        stop.join().unwrap();
        assert_eq!(guest.join().unwrap(), done);
    });
}

/// The event loop of the thread that answers.
#[derive(Clone, Default)]
struct Bell(Arc<(Mutex<bool>, loom::sync::Condvar)>);

impl Wake for Bell {
    fn wake(&self) {
        let (has_rung, changed) = &*self.0;
        *has_rung.lock().unwrap() = true;
        changed.notify_all();
    }
}

impl Bell {
    fn wait(&self) {
        let (has_rung, changed) = &*self.0;
        let mut rung = has_rung.lock().unwrap();
        while !*rung {
            rung = changed.wait(rung).unwrap();
        }
        *rung = false;
    }
}

#[test]
fn a_question_that_travels_by_the_inbox_is_answered_or_given_back_when_the_environment_ends() {
    loom::model(|| {
        let bell = Bell::default();
        let inbox = Arc::new(Inbox::<Answerer<Talk>, Bell>::new(bell.clone()));
        let guest = {
            let inbox = Arc::clone(&inbox);
            thread::spawn(move || {
                let (asker, answerer) = conversation();
                // What is given back is dropped with it, as what is left over is.
                let posted = inbox.post(answerer).is_ok();
                let heard = asker.hear(None);
                assert!(posted || heard == Err(Silence::Gone));
                heard
            })
        };
        let mut answered = 0;
        for answerer in inbox.take() {
            answerer.reply(7).unwrap();
            answered += 1;
        }
        drop(inbox.close());
        let expected = if answered == 1 {
            Ok(ForAsker::Reply(7))
        } else {
            Err(Silence::Gone)
        };
        assert_eq!(guest.join().unwrap(), expected);
    });
}

#[test]
fn a_question_wakes_the_thread_that_answers() {
    loom::model(|| {
        let bell = Bell::default();
        let inbox = Arc::new(Inbox::<Answerer<Talk>, Bell>::new(bell.clone()));
        let guest = {
            let inbox = Arc::clone(&inbox);
            thread::spawn(move || {
                for question in 0..2 {
                    let (asker, answerer) = conversation();
                    inbox.post(answerer).unwrap();
                    assert_eq!(asker.hear(None), Ok(ForAsker::Reply(question)));
                }
            })
        };
        let mut answered = 0;
        while answered < 2 {
            bell.wait();
            inbox.let_wake();
            for answerer in inbox.take() {
                answerer.reply(answered).unwrap();
                answered += 1;
            }
        }
        guest.join().unwrap();
    });
}
