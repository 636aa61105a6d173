//! Stops of a call, wherever it is, under every interleaving that loom can find: one answer, and no run after
//! a stop that was in time.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test -p wasm-molt-lifecycle
//! --release --test stopping_loom`.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::sync::{Arc, Mutex};
use loom::thread;
use wasm_molt_lifecycle::{
    Admission, Gate, GateOptions, Stoppable, Stopping, Ticket, WaitId, Waiter,
};

/// What has become of one call. Orders nothing itself.
#[derive(Default)]
struct Fate {
    ran: AtomicUsize,
    answered: AtomicUsize,
    refused: AtomicUsize,
    /// A run was told to end.
    struck: AtomicUsize,
}

/// Owns the one answer.
struct Job {
    fate: Arc<Fate>,
    control: Arc<Stopping<Call>>,
    threads: Threads,
}

/// Calls that have their slot, until a thread comes for them.
type Threads = Arc<Mutex<Vec<Arc<Stopping<Call>>>>>;

/// As the engine's calls are.
enum Call {}

impl Stoppable for Call {
    type Queue = (Gate<Job>, WaitId);
    type Run = Arc<Fate>;
    type Stop = &'static str;
    type Parked = (Job, Ticket<Job>);

    fn refuse_waiting((gate, id): Self::Queue) -> bool {
        gate.cancel(id).map(Job::refuse).is_some()
    }

    fn refuse_parked((job, ticket): Self::Parked) {
        drop(ticket);
        job.refuse();
    }

    fn stop_run(fate: &Self::Run, _stop: Self::Stop) {
        assert_eq!(fate.answered.load(Relaxed), 0, "it ended before");
        fate.struck.fetch_add(1, Relaxed);
    }
}

impl Waiter for Job {
    fn start(self, ticket: Ticket<Self>) {
        let (control, threads) = (Arc::clone(&self.control), Arc::clone(&self.threads));
        control.park((self, ticket));
        threads.lock().unwrap().push(control);
    }
}

impl Job {
    fn refuse(self) {
        assert!(self.control.stopped().is_some());
        self.control.finish();
        self.fate.refused.fetch_add(1, Relaxed);
        self.fate.answered.fetch_add(1, Relaxed);
    }

    fn run(self, ticket: Ticket<Self>) {
        if self.control.start(Arc::clone(&self.fate)).is_err() {
            drop(ticket);
            self.refuse();
            return;
        }
        self.fate.ran.fetch_add(1, Relaxed);
        self.control.finish();
        drop(ticket);
        self.fate.answered.fetch_add(1, Relaxed);
    }
}

/// A gate with one slot, and one call on its way.
struct Bench {
    gate: Gate<Job>,
    threads: Threads,
    fate: Arc<Fate>,
    control: Arc<Stopping<Call>>,
}

impl Bench {
    fn new() -> Self {
        let gate = Gate::new(GateOptions {
            slots: 1,
            max_queue: 2,
            home: false,
        });
        gate.open();
        Self {
            gate,
            threads: Threads::default(),
            fate: Arc::default(),
            control: Arc::default(),
        }
    }

    /// As a manager admits a call.
    fn admit(&self) {
        let id = self.gate.reserve_id();
        self.control.waits_in((self.gate.clone(), id));
        let job = Job {
            fate: Arc::clone(&self.fate),
            control: Arc::clone(&self.control),
            threads: Arc::clone(&self.threads),
        };
        if let Ok(Admission::Queued(_)) = self.gate.admit_as(id, job) {
            self.control.queued();
        }
    }

    fn stop(&self, why: &'static str) -> thread::JoinHandle<()> {
        let control = Arc::clone(&self.control);
        thread::spawn(move || control.stop(why))
    }

    /// Threads of the pool take what has its slot.
    fn work(&self) {
        loop {
            let next = self.threads.lock().unwrap().pop();
            let Some(control) = next else { return };
            if let Some((job, ticket)) = control.unpark() {
                job.run(ticket);
            }
        }
    }

    fn assert_answered_once(&self) {
        let Fate {
            ran,
            answered,
            refused,
            struck,
        } = &*self.fate;
        let (ran, refused) = (ran.load(Relaxed), refused.load(Relaxed));
        assert_eq!((answered.load(Relaxed), ran + refused), (1, 1));
        assert!(struck.load(Relaxed) <= ran, "stopped a run that never was");
        let counts = self.gate.counts();
        assert_eq!((counts.in_flight, counts.queued), (0, 0));
    }
}

#[test]
fn a_stop_beside_the_admission_leaves_one_answer() {
    loom::model(|| {
        let bench = Bench::new();
        let stop = bench.stop("in time or not");
        bench.admit();
        bench.work();
        stop.join().unwrap();
        bench.assert_answered_once();
    });
}

#[test]
fn a_stop_beside_the_queue_and_the_start_leaves_one_answer() {
    loom::model(|| {
        let bench = Bench::new();
        let first = Bench {
            fate: Arc::default(),
            control: Arc::default(),
            gate: bench.gate.clone(),
            threads: Arc::clone(&bench.threads),
        };
        first.admit();
        let held = bench.threads.lock().unwrap().pop().unwrap();
        bench.admit();
        let stop = bench.stop("while it waits or starts");
        let (job, ticket) = held.unpark().unwrap();
        job.run(ticket);
        bench.work();
        stop.join().unwrap();
        first.assert_answered_once();
        bench.assert_answered_once();
    });
}

#[test]
fn two_stops_and_a_closed_gate_leave_one_answer() {
    loom::model(|| {
        let bench = Bench::new();
        bench.gate.close();
        let stops = [bench.stop("a timeout"), bench.stop("a signal")];
        bench.admit();
        for stop in stops {
            stop.join().unwrap();
        }
        let fate = &bench.fate;
        assert_eq!((fate.refused.load(Relaxed), fate.ran.load(Relaxed)), (1, 0));
        bench.assert_answered_once();
    });
}

#[test]
fn a_stop_beside_a_cut_leaves_one_answer() {
    loom::model(|| {
        let bench = Bench::new();
        bench.gate.close();
        bench.admit();
        let stop = bench.stop("beside the end");
        for job in bench.gate.cut() {
            job.control.finish();
            job.fate.refused.fetch_add(1, Relaxed);
            job.fate.answered.fetch_add(1, Relaxed);
        }
        stop.join().unwrap();
        bench.assert_answered_once();
    });
}
