//! A manager under test.

use std::sync::Arc;
use std::time::Duration;

use wasm_molt_engine::{
    CacheChoice, CallControl, CallLimits, Error, ErrorCode, Event, FuncHandle, GuestThread, Home,
    Host, Job, Lease, LeaseInside, Manager, ManagerOptions, ManagerState, ManagerStats, Module,
    Outcome, ReloadOptions, ReloadReport, Replica, ResetOptions, ResetReport, Result, Snapshot,
    SnapshotControl, Source, ThreadCall, Value, WaitId, Work,
};

use crate::faults::Faults;
use crate::guests;
use crate::home::{Desk, HomeThread};
use crate::host::{Script, TestHost};
use crate::inside::InRealm;
use crate::quiet::{Working, work};
use crate::wait::{Answer, answer, hush_panics_on_purpose};

/// How a call ended.
pub type Ended = Result<Outcome>;

/// What a [`Rig`] is made of.
#[derive(Debug)]
pub struct Setup {
    source: Source,
    options: ManagerOptions,
    script: Script,
}

impl Setup {
    /// One replica of that guest, no hooks, no home, nothing cached.
    #[track_caller]
    pub fn new(wat: &str) -> Self {
        Self::of(guests::source(wat))
    }

    /// The same from any source.
    pub fn of(source: Source) -> Self {
        let options = ManagerOptions {
            cache: CacheChoice::Off,
            ..ManagerOptions::default()
        };
        Self {
            source,
            options,
            script: Script::new(),
        }
    }

    /// Changes the options.
    #[must_use]
    pub fn options(mut self, change: impl FnOnce(&mut ManagerOptions)) -> Self {
        change(&mut self.options);
        self
    }

    /// So many replicas, and as many threads.
    #[must_use]
    pub fn instances(self, instances: usize) -> Self {
        self.options(|options| {
            options.instances = instances;
            options.threads = Some(instances);
        })
    }

    /// Gives the host something to do.
    #[must_use]
    pub fn script(mut self, script: Script) -> Self {
        self.script = script;
        self
    }

    /// A realm: the host makes the instances, on its home thread.
    pub fn realm() -> Self {
        let setup = Self::new("(module $realm)").at_home();
        setup.options(|options| options.is_realm = true)
    }

    /// With a home thread.
    #[must_use]
    pub fn at_home(self) -> Self {
        self.options(|options| options.has_home = true)
    }

    /// Made, not started.
    #[track_caller]
    pub fn create(self) -> Rig {
        match self.try_create() {
            Ok(rig) => rig,
            Err(error) => panic!("the manager was not made: {error}"),
        }
    }

    /// The same, or why not.
    pub fn try_create(self) -> Result<Rig> {
        let working = work();
        hush_panics_on_purpose();
        let home = self.options.has_home.then(HomeThread::spawn);
        let host = Arc::new(TestHost::new(
            self.script,
            home.as_ref().map(HomeThread::mail),
        ));
        let faults = Arc::new(Faults::new(Arc::<TestHost>::clone(&host)));
        let given: Arc<dyn Host> = Arc::<Faults>::clone(&faults);
        let options = self.options;
        let manager = match &home {
            Some(home) => home.settle(move || Manager::new(options, given))?,
            None => Manager::new(options, given)?.0,
        };
        faults.attach(Some(manager.clone()));
        Ok(Rig {
            manager,
            host,
            faults,
            home,
            source: self.source,
            _working: working,
        })
    }

    /// Made and started.
    #[track_caller]
    pub fn start(self) -> Rig {
        let rig = self.create();
        match rig.start().get() {
            Ok(()) => rig,
            Err(error) => panic!("the manager did not start: {error}"),
        }
    }

    /// The error with which it does not start.
    #[track_caller]
    pub fn start_error(self) -> Error {
        let rig = self.create();
        match rig.start().get() {
            Ok(()) => panic!("the manager started"),
            Err(error) => error,
        }
    }
}

/// A manager, its host, and its home thread if it has one. Dropped, it is destroyed, and what every
/// life of a manager must come to is checked.
#[derive(Debug)]
pub struct Rig {
    /// The manager.
    pub manager: Manager,
    /// What it sees as its host, behind the faults.
    pub host: Arc<TestHost>,
    /// The faults.
    pub faults: Arc<Faults>,
    home: Option<HomeThread>,
    source: Source,
    _working: Working,
}

impl Rig {
    /// Starts it.
    pub fn start(&self) -> Answer<Result<()>> {
        let (done, started) = answer("start()");
        self.manager.start(self.source.clone(), Box::new(done));
        started
    }

    /// Starts it on the calling thread, or the home thread.
    #[track_caller]
    pub fn start_now(&self) -> Result<()> {
        let source = self.source.clone();
        match &self.home {
            Some(home) => home.at_desk(move |desk| desk.manager().start_now(&source)),
            None => self.manager.start_now(&source),
        }
    }

    /// Runs `f` where the manager is spoken to: on the home thread if there is one, else here.
    #[track_caller]
    fn there<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Manager, Option<&Home<Job>>) -> R + Send + 'static,
    ) -> R {
        match &self.home {
            Some(home) => home.at_desk(move |desk| f(desk.manager(), Some(desk.home()))),
            None => f(&self.manager, None),
        }
    }

    /// The home thread.
    #[track_caller]
    pub fn home(&self) -> &HomeThread {
        match &self.home {
            Some(home) => home,
            None => panic!("this rig has no home thread"),
        }
    }

    /// Ends the home thread while the manager lives on.
    pub fn end_home(&mut self) {
        self.home = None;
    }

    /// Position of an export.
    #[track_caller]
    pub fn function(&self, name: &str) -> usize {
        let found = self
            .manager
            .module()
            .map(|module| module.function_index(name));
        match found {
            Some(Ok(index)) => index,
            Some(Err(error)) => panic!("{error}"),
            None => panic!("the manager has not started"),
        }
    }

    /// Hands work to the pool.
    #[track_caller]
    pub fn work(
        &self,
        what: &str,
        work: Work,
        limits: CallLimits,
    ) -> (Answer<Ended>, Option<Arc<CallControl>>) {
        let (settle, ended) = answer(what.to_owned());
        let control = self.there(move |m, home| m.call(home, work, limits, Box::new(settle)));
        (ended, control)
    }

    /// Calls an export on the pool.
    #[track_caller]
    pub fn call(&self, name: &str, args: &[Value]) -> Answer<Ended> {
        self.call_with(name, args, CallLimits::default()).0
    }

    /// The same with limits.
    #[track_caller]
    pub fn call_with(
        &self,
        name: &str,
        args: &[Value],
        limits: CallLimits,
    ) -> (Answer<Ended>, Option<Arc<CallControl>>) {
        let work = Work::Call {
            function: self.function(name),
            args: args.to_vec(),
        };
        self.work(name, work, limits)
    }

    /// The same with a timeout.
    #[track_caller]
    pub fn call_for(&self, ms: u64, name: &str, args: &[Value]) -> Answer<Ended> {
        let limits = CallLimits {
            timeout_ms: Some(ms),
            can_abort: false,
        };
        self.call_with(name, args, limits).0
    }

    /// The same with a signal.
    #[track_caller]
    pub fn call_abortable(&self, name: &str, args: &[Value]) -> (Answer<Ended>, Arc<CallControl>) {
        let limits = CallLimits {
            timeout_ms: None,
            can_abort: true,
        };
        match self.call_with(name, args, limits) {
            (ended, Some(control)) => (ended, control),
            (_, None) => panic!("no control for a call that can be aborted"),
        }
    }

    /// Calls and waits for the one i32 that comes back.
    #[track_caller]
    pub fn number(&self, name: &str, args: &[i32]) -> i32 {
        let args: Vec<_> = args.iter().copied().map(Value::I32).collect();
        number(self.call(name, &args).get())
    }

    /// The same under a short `limits.timeoutMs`, which a busy machine may take for any call at all.
    #[track_caller]
    pub fn number_in_time(&self, name: &str, args: &[i32]) -> i32 {
        let args: Vec<_> = args.iter().copied().map(Value::I32).collect();
        loop {
            match self.call(name, &args).get() {
                Err(error) if error.code() == Some(ErrorCode::Timeout) => {}
                ended => return number(ended),
            }
        }
    }

    /// Sends a buffer through an export.
    #[track_caller]
    pub fn invoke(&self, name: &str, input: &[u8]) -> Answer<Ended> {
        let work = Work::Invoke {
            function: self.function(name),
            input: input.to_vec(),
        };
        self.work(name, work, CallLimits::default()).0
    }

    /// Calls an export in slot 0 on the home thread.
    #[track_caller]
    pub fn call_sync(&self, name: &str, args: &[Value]) -> Result<Vec<Value>> {
        let (name, args) = (name.to_owned(), args.to_vec());
        self.home()
            .at_desk(move |desk: &Desk| desk.call(&name, args))
    }

    /// Does something in the realm.
    #[track_caller]
    pub fn realm<R: Send + 'static>(
        &self,
        f: impl FnOnce(&InRealm<'_>) -> R + Send + 'static,
    ) -> R {
        match self.try_realm(f) {
            Ok(outcome) => outcome,
            Err(error) => panic!("the realm cannot be entered: {error}"),
        }
    }

    /// The same, or why it cannot be entered.
    #[track_caller]
    pub fn try_realm<R: Send + 'static>(
        &self,
        f: impl FnOnce(&InRealm<'_>) -> R + Send + 'static,
    ) -> Result<R> {
        self.home().at_desk(move |desk: &Desk| desk.realm(f))
    }

    /// Starts a native thread of the realm's guest that calls this; and how it ended.
    #[track_caller]
    pub fn spawn(&self, func: FuncHandle) -> Result<(GuestThread, Answer<Result<bool>>)> {
        let args = Vec::new();
        self.home()
            .at_desk(move |desk: &Desk| desk.spawn(vec![ThreadCall { func, args }]))
    }

    /// Compiles a module for the realm.
    #[track_caller]
    pub fn compile(&self, wat: &str) -> Arc<Module> {
        match self.manager.compile(guests::bytes(wat)) {
            Ok(module) => module,
            Err(error) => panic!("{error}"),
        }
    }

    /// Asks for an instance.
    #[track_caller]
    pub fn ask_lease(&self) -> (Answer<Result<Arc<Lease>>>, WaitId) {
        let (done, leased) = answer("lease()");
        let host = Arc::clone(&self.host);
        let done = move |lease: Result<Arc<Lease>>| {
            if let Ok(lease) = &lease {
                host.watch(lease);
            }
            done(lease);
        };
        (
            leased,
            self.there(move |m, home| m.lease(home, Box::new(done))),
        )
    }

    /// Asks for an instance and waits for it.
    #[track_caller]
    pub fn lease(&self) -> Arc<Lease> {
        match self.ask_lease().0.get() {
            Ok(lease) => lease,
            Err(error) => panic!("no lease: {error}"),
        }
    }

    /// Calls an export of a leased instance on the pool.
    #[track_caller]
    pub fn call_in(&self, lease: &Arc<Lease>, name: &str, args: &[Value]) -> Answer<Ended> {
        self.call_in_with(lease, name, args, CallLimits::default())
            .0
    }

    /// The same with limits.
    #[track_caller]
    pub fn call_in_with(
        &self,
        lease: &Arc<Lease>,
        name: &str,
        args: &[Value],
        limits: CallLimits,
    ) -> (Answer<Ended>, Option<Arc<CallControl>>) {
        let (settle, ended) = answer(format!("{name} in a lease"));
        let work = Work::Call {
            function: self.function(name),
            args: args.to_vec(),
        };
        let lease = Arc::clone(lease);
        let control = self.there(move |m, _| m.call_in(&lease, work, limits, Box::new(settle)));
        (ended, control)
    }

    /// Enters a leased instance where leases are entered.
    #[track_caller]
    pub fn enter<R: Send + 'static>(
        &self,
        lease: &Arc<Lease>,
        f: impl FnOnce(LeaseInside) -> R + Send + 'static,
    ) -> Result<R> {
        let lease = Arc::clone(lease);
        self.there(move |_, _| lease.enter().map(f))
    }

    /// Ends a lease.
    #[track_caller]
    pub fn release(&self, lease: &Arc<Lease>) {
        let lease = Arc::clone(lease);
        self.there(move |_, _| lease.release());
    }

    /// Asks for a reload.
    pub fn ask_reload(&self, options: ReloadOptions) -> Answer<Result<Arc<ReloadReport>>> {
        let (done, reloaded) = answer(format!("reload() for {}", options.reason));
        self.manager.reload(options, Box::new(done));
        reloaded
    }

    /// Reloads with a reason, and waits for it.
    #[track_caller]
    pub fn reload(&self, reason: &str) -> Arc<ReloadReport> {
        match self.ask_reload(because(reason)).get() {
            Ok(report) => report,
            Err(error) => panic!("the reload failed: {error}"),
        }
    }

    /// Reloads on the home thread.
    #[track_caller]
    pub fn reload_now(&self, options: ReloadOptions) -> Result<Arc<ReloadReport>> {
        self.there(move |m, home| m.reload_now(home, &options))
    }

    /// Asks for a snapshot.
    pub fn ask_snapshot(&self) -> (Answer<Result<Arc<Snapshot>>>, SnapshotControl) {
        let (done, taken) = answer("snapshot()");
        let control = self.manager.snapshot(Box::new(done));
        (taken, control)
    }

    /// Takes a snapshot.
    #[track_caller]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        match self.ask_snapshot().0.get() {
            Ok(snapshot) => snapshot,
            Err(error) => panic!("no snapshot: {error}"),
        }
    }

    /// Asks for a reset.
    pub fn ask_reset(&self, options: ResetOptions) -> Answer<Result<ResetReport>> {
        let (done, reset) = answer("reset()");
        self.manager.reset(options, Box::new(done));
        reset
    }

    /// Resets to that snapshot, or to the newest.
    #[track_caller]
    pub fn reset(&self, to: Option<&Arc<Snapshot>>) -> ResetReport {
        let options = ResetOptions {
            to: to.cloned(),
            ..ResetOptions::default()
        };
        match self.ask_reset(options).get() {
            Ok(report) => report,
            Err(error) => panic!("the reset failed: {error}"),
        }
    }

    /// Resets on the home thread.
    #[track_caller]
    pub fn reset_now(&self, options: ResetOptions) -> Result<ResetReport> {
        self.there(move |m, home| m.reset_now(home, &options))
    }

    /// Takes a snapshot on the home thread.
    #[track_caller]
    pub fn snapshot_now(&self) -> Result<Arc<Snapshot>> {
        self.there(Manager::snapshot_now)
    }

    /// Starts `child`, which was made and not started, as a copy.
    pub fn fork_into(&self, child: &Self) -> Result<()> {
        self.ask_fork(child).get()
    }

    /// Asks for that.
    pub fn ask_fork(&self, child: &Self) -> Answer<Result<()>> {
        let (done, forked) = answer("fork()");
        let manager = child.manager.clone();
        self.there(move |m, home| match home {
            Some(home) => match m.fork_now(home, &manager) {
                Some(outcome) => done(outcome),
                None => m.fork(&manager, Box::new(done)),
            },
            None => m.fork(&manager, Box::new(done)),
        });
        forked
    }

    /// Asks for the end.
    pub fn close(&self, drain_timeout: Option<Duration>) -> Answer<Result<()>> {
        let (done, closed) = answer("close()");
        self.manager.close(drain_timeout, Box::new(done));
        closed
    }

    /// Asks for the end at once.
    pub fn destroy(&self) -> Answer<Result<()>> {
        let (done, destroyed) = answer("destroy()");
        self.manager.destroy(Box::new(done));
        destroyed
    }

    /// Figures, as the home sees them.
    #[track_caller]
    pub fn stats(&self) -> ManagerStats {
        self.there(|m, home| m.stats(home))
    }

    /// The instance in a slot.
    #[track_caller]
    pub fn replica(&self, slot: usize) -> Arc<Replica> {
        match self.manager.replica(slot) {
            Some(replica) => replica,
            None => panic!("no instance in slot {slot}"),
        }
    }

    /// Waits until that generation serves, with every slot in service.
    #[track_caller]
    pub fn wait_generation(&self, generation: u64) {
        let what = format!("generation {generation} serves");
        crate::wait::eventually(&what, || {
            self.manager.generation().get() >= generation
                && self.manager.stats(None).gate.retired == 0
        });
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let destroyed = self.destroy();
        if !std::thread::panicking() {
            let outcome = destroyed.get();
            assert!(
                outcome.is_ok(),
                "destroy() cannot fail, and did: {outcome:?}"
            );
            assert_eq!(self.manager.state(), ManagerState::Closed);
            assert!(
                self.manager.replica(0).is_none(),
                "an instance was left behind"
            );
            self.host
                .wait_for("close", 1, |event| matches!(event, Event::Close));
            let closes = self.host.count(|event| matches!(event, Event::Close));
            assert_eq!(closes, 1, "the end is told once");
            // Without its home nobody can tell the host what went.
            if self.home.is_some() == self.manager.options().has_home {
                self.host.assert_consistent();
            }
        }
        self.faults.attach(None);
    }
}

/// Default options with a reason.
pub fn because(reason: &str) -> ReloadOptions {
    ReloadOptions {
        reason: reason.into(),
        ..ReloadOptions::default()
    }
}

/// The values that came back.
#[track_caller]
pub fn values(ended: Ended) -> Vec<Value> {
    match ended {
        Ok(Outcome::Values(values)) => values,
        other => panic!("values were expected, not {other:?}"),
    }
}

/// The one i32 that came back.
#[track_caller]
pub fn number(ended: Ended) -> i32 {
    let values = values(ended);
    match values.as_slice() {
        [Value::I32(value)] => *value,
        other => panic!("one i32 was expected, not {other:?}"),
    }
}

/// The buffer that came back.
#[track_caller]
pub fn bytes(ended: Ended) -> Vec<u8> {
    match ended {
        Ok(Outcome::Bytes(bytes)) => bytes,
        other => panic!("a buffer was expected, not {other:?}"),
    }
}

/// The code of the error that came back.
#[track_caller]
pub fn code<T: std::fmt::Debug>(ended: Result<T>) -> ErrorCode {
    match ended {
        Ok(value) => panic!("an error was expected, not {value:?}"),
        Err(error) => match error.code() {
            Some(code) => code,
            None => panic!("an error with a code was expected, not {error:?}"),
        },
    }
}

/// The kind of the trap that came back.
#[track_caller]
pub fn trap<T: std::fmt::Debug>(ended: Result<T>) -> &'static str {
    match ended {
        Err(Error::Trap { info, .. }) => info.kind,
        other => panic!("a trap was expected, not {other:?}"),
    }
}
