//! A thread that owns slot 0, as Node's JS thread does, and runs steps from a channel.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle, ThreadId};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use wasm_molt_engine::{
    Away, Error, ErrorCode, GuestThread, Home, HomeStep, Inside, Job, Manager, Replica, Result,
    ThreadCall, Value,
};

use crate::inside::{self, InRealm};
use crate::wait::{Answer, PATIENCE};

enum Task {
    Run(Box<dyn FnOnce() + Send>),
    End,
}

/// What the home thread has before it.
pub struct Desk {
    home: Home<Job>,
    manager: Manager,
}

thread_local! {
    static DESK: RefCell<Option<Rc<Desk>>> = const { RefCell::new(None) };
}

fn desk() -> Option<Rc<Desk>> {
    DESK.with_borrow(Clone::clone)
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk")
            .field("manager", &self.manager)
            .finish_non_exhaustive()
    }
}

impl Desk {
    /// The right to enter slot 0.
    pub fn home(&self) -> &Home<Job> {
        &self.home
    }

    /// The manager.
    pub fn manager(&self) -> &Manager {
        &self.manager
    }

    fn enter(&self) -> Result<(Inside<'_, Job>, Arc<Replica>)> {
        let inside = match self.home.enter() {
            Some(inside) => inside,
            None => {
                if self.home.refusal() == Away::Retired {
                    self.manager.repair_now()?;
                }
                self.home.enter().ok_or_else(|| self.refused())?
            }
        };
        match self.manager.replica(0) {
            Some(replica) => Ok((inside, replica)),
            None => Err(self.refused()),
        }
    }

    /// Does something in the realm in slot 0 on this thread, as glue does in JS.
    pub fn realm<R>(&self, f: impl FnOnce(&InRealm<'_>) -> R) -> Result<R> {
        let (inside, replica) = self.enter_realm()?;
        let timeout_ms = self.manager.options().limits.timeout_ms;
        let outcome = f(&InRealm::at_home(&inside, &replica, timeout_ms));
        if replica.must_be_replaced() {
            inside.retire();
            self.manager.retired_at_home();
        }
        Ok(outcome)
    }

    /// Starts a native thread of the realm's guest, as glue does in JS; and how it ended.
    pub fn spawn(&self, calls: Vec<ThreadCall>) -> Result<(GuestThread, Answer<Result<bool>>)> {
        let (inside, replica) = self.enter_realm()?;
        inside::spawn_at_home(&inside, &self.manager, &replica, calls)
    }

    /// One that has broken off in the middle of something is entered by nobody.
    fn enter_realm(&self) -> Result<(Inside<'_, Job>, Arc<Replica>)> {
        let (inside, replica) = self.enter()?;
        if replica.is_poisoned() {
            return Err(replica.broken());
        }
        Ok((inside, replica))
    }

    /// Calls an export in slot 0 on this thread, as `manager.exports` does in JS.
    pub fn call(&self, name: &str, args: Vec<Value>) -> Result<Vec<Value>> {
        let (inside, replica) = self.enter()?;
        let call = || inside::call_at_home(&inside, &replica, name, args);
        let outcome = match self.manager.options().limits.timeout_ms {
            Some(ms) => replica.with_deadline(ms, call).and_then(|outcome| outcome),
            None => call(),
        };
        match &outcome {
            Ok(_) => self.manager.count_completed(1),
            Err(error) => self.manager.call_failed_at_home(error),
        }
        if replica.is_poisoned() {
            inside.retire();
            self.manager.retired_at_home();
            return outcome;
        }
        drop(inside);
        if replica.note_call() && self.home.depth() == 0 {
            self.manager.judge_at_home(&self.home, &replica);
        }
        outcome
    }

    fn refused(&self) -> Error {
        let code = match self.home.refusal() {
            Away::Busy => ErrorCode::Busy,
            Away::Closed | Away::Retired => ErrorCode::Reloading,
            Away::Shut => ErrorCode::Closed,
        };
        Error::new(code, "slot 0 cannot be entered now")
    }
}

/// The way to the home thread, for any thread.
#[derive(Clone)]
pub struct HomeMail {
    tasks: Sender<Task>,
    thread: ThreadId,
}

impl std::fmt::Debug for HomeMail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HomeMail")
            .field("thread", &self.thread)
            .finish_non_exhaustive()
    }
}

impl HomeMail {
    pub(crate) fn is_here(&self) -> bool {
        thread::current().id() == self.thread
    }

    fn post(&self, task: impl FnOnce() + Send + 'static) -> Result<()> {
        self.tasks
            .send(Task::Run(Box::new(task)))
            .map_err(|_| Error::new(ErrorCode::Closed, "the home thread has ended"))
    }

    /// [`wasm_molt_engine::Host::at_home`].
    pub fn at_home(&self, step: HomeStep) -> Result<()> {
        let run = move || step(desk().as_ref().map(|desk| &desk.home));
        if self.is_here() {
            run();
            return Ok(());
        }
        let (done, is_done) = bounded::<()>(1);
        self.post(move || {
            run();
            let _ = done.send(());
        })?;
        // No timeout: the engine relies on being told the truth. The test has its own.
        is_done
            .recv()
            .map_err(|_| Error::new(ErrorCode::Closed, "the home thread has ended"))
    }
}

/// The thread itself. Dropped, it ends, and slot 0 has no home any more.
#[derive(Debug)]
pub struct HomeThread {
    mail: HomeMail,
    handle: Option<JoinHandle<()>>,
}

impl HomeThread {
    /// Starts it, with an empty desk.
    pub fn spawn() -> Self {
        let (tasks, inbox) = unbounded();
        let handle = match thread::Builder::new()
            .name("home".into())
            .spawn(move || run(&inbox))
        {
            Ok(handle) => handle,
            Err(error) => panic!("no home thread: {error}"),
        };
        let mail = HomeMail {
            tasks,
            thread: handle.thread().id(),
        };
        Self {
            mail,
            handle: Some(handle),
        }
    }

    /// The way to it.
    pub fn mail(&self) -> HomeMail {
        self.mail.clone()
    }

    /// Puts the manager that `make` makes, on that thread, onto its desk.
    pub fn settle(
        &self,
        make: impl FnOnce() -> Result<(Manager, Option<Home<Job>>)> + Send + 'static,
    ) -> Result<Manager> {
        self.run(move || {
            let (manager, home) = make()?;
            let Some(home) = home else {
                panic!("the options ask for no home")
            };
            let desk = Desk {
                home,
                manager: manager.clone(),
            };
            DESK.with_borrow_mut(|place| *place = Some(Rc::new(desk)));
            Ok(manager)
        })
    }

    /// Runs `f` there and waits for it; a panic goes on here.
    #[track_caller]
    pub fn run<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> R {
        assert!(!self.mail.is_here(), "the home thread asks itself");
        let (done, is_done) = bounded(1);
        let posted = self.mail.post(move || {
            drop(done.send(catch_unwind(AssertUnwindSafe(f))));
        });
        assert!(posted.is_ok(), "the home thread has ended");
        match is_done.recv_timeout(PATIENCE) {
            Ok(Ok(value)) => value,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(error) => panic!("the home thread did not come by within {PATIENCE:?}: {error}"),
        }
    }

    /// The same with its desk.
    #[track_caller]
    pub fn at_desk<R: Send + 'static>(&self, f: impl FnOnce(&Desk) -> R + Send + 'static) -> R {
        self.run(move || match desk() {
            Some(desk) => f(&desk),
            None => panic!("the desk is empty"),
        })
    }

    /// Has `f` run there some time; does not wait.
    pub fn later(&self, f: impl FnOnce(&Desk) + Send + 'static) {
        let posted = self.mail.post(move || {
            if let Some(desk) = desk() {
                f(&desk);
            }
        });
        assert!(posted.is_ok(), "the home thread has ended");
    }

    /// Ends it, with everything on its desk: an environment that goes away.
    pub fn end(&mut self) {
        drop(self.mail.tasks.send(Task::End));
        if let Some(handle) = self.handle.take()
            && !self.mail.is_here()
            // A test that fails leaves a thread that hangs alone.
            && !thread::panicking()
        {
            assert!(handle.join().is_ok(), "the home thread panicked");
        }
    }
}

impl Drop for HomeThread {
    fn drop(&mut self) {
        self.end();
    }
}

fn run(inbox: &Receiver<Task>) {
    while let Ok(Task::Run(task)) = inbox.recv() {
        // Whoever waits for the task sees its channel close; the thread lives on, as Node's does.
        drop(catch_unwind(AssertUnwindSafe(task)));
    }
    let desk = DESK.with_borrow_mut(Option::take);
    drop(desk);
}
