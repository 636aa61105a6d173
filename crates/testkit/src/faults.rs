//! A host with faults in it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use wasm_molt_engine::{
    Attendant, Error, ErrorCode, Event, HomeStep, Host, HostRef, ImportValue, InstanceHost, Lease,
    Manager, Module, Replaced, Replica, Result, Watch,
};

use crate::wait::{Answer, Latch, PATIENCE, answer};

/// Where a fault can be put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Before the imports are given.
    Imports,
    /// Before `initialize`.
    Initialize,
    /// Before `saveState`.
    Save,
    /// Before `restoreState`.
    Restore,
    /// Before `reseed`.
    Reseed,
    /// Before a step goes home.
    AtHome,
    /// When instances were replaced (cannot fail).
    Replaced,
    /// When something happened (cannot fail).
    Event,
}

impl Point {
    /// The hooks, in the order in which a reload meets them.
    pub const HOOKS: [Self; 4] = [Self::Imports, Self::Initialize, Self::Save, Self::Restore];
}

enum Fault {
    Fail(Error),
    Panic,
    Block {
        reached: Latch,
        go_on: Receiver<()>,
        then: Then,
    },
    Destroy(Box<dyn FnOnce(Result<()>) + Send>),
    Close(Box<dyn FnOnce(Result<()>) + Send>),
}

/// How a hook ends that was held.
#[derive(Debug)]
pub enum Then {
    /// As it would have.
    GoOn,
    /// With this error.
    Fail(Error),
    /// With a panic.
    Panic,
}

struct Planned {
    point: Point,
    skip: usize,
    fault: Fault,
}

/// A host that passes everything on, except where a fault is planned. Each fault strikes once.
pub struct Faults {
    inner: Arc<dyn Host>,
    planned: Mutex<Vec<Planned>>,
    manager: Mutex<Option<Manager>>,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faults")
            .field("planned", &self.planned().len())
            .finish_non_exhaustive()
    }
}

/// A hook that is held. Dropped, it lets the hook go on.
#[derive(Debug)]
pub struct Held {
    reached: Latch,
    go_on: Sender<()>,
}

impl Held {
    /// Waits until the hook is there.
    #[track_caller]
    pub fn wait(&self) {
        self.reached.wait();
    }

    /// Whether the hook is there.
    pub fn is_reached(&self) -> bool {
        self.reached.is_open()
    }

    /// Lets it go on.
    pub fn release(self) {
        drop(self.go_on);
    }
}

impl Faults {
    /// No faults yet.
    pub fn new(inner: Arc<dyn Host>) -> Self {
        Self {
            inner,
            planned: Mutex::default(),
            manager: Mutex::default(),
        }
    }

    /// The manager that is to be destroyed. Taken back with `None`, for the two hold each other.
    pub fn attach(&self, manager: Option<Manager>) {
        *self.manager.lock().unwrap_or_else(PoisonError::into_inner) = manager;
    }

    fn planned(&self) -> MutexGuard<'_, Vec<Planned>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plan(&self, point: Point, skip: usize, fault: Fault) {
        self.planned().push(Planned { point, skip, fault });
    }

    /// How many have not struck yet.
    pub fn left(&self) -> usize {
        self.planned().len()
    }

    /// The hook fails with `error`; the first `skip` times it goes well.
    pub fn fail(&self, point: Point, skip: usize, error: Error) {
        self.plan(point, skip, Fault::Fail(error));
    }

    /// The hook panics.
    pub fn panic(&self, point: Point, skip: usize) {
        self.plan(point, skip, Fault::Panic);
    }

    /// The hook blocks until it is released, or nobody waits for it any more, as a host should.
    pub fn hold(&self, point: Point, skip: usize) -> Held {
        self.hold_then(point, skip, Then::GoOn)
    }

    /// The same, and then it fails.
    pub fn hold_then_fail(&self, point: Point, skip: usize, error: Error) -> Held {
        self.hold_then(point, skip, Then::Fail(error))
    }

    /// The same, and then it does that.
    pub fn hold_then(&self, point: Point, skip: usize, then: Then) -> Held {
        let reached = Latch::new(format!("the hook {point:?} is reached"));
        let (go_on, released) = bounded(0);
        self.plan(
            point,
            skip,
            Fault::Block {
                reached: reached.clone(),
                go_on: released,
                then,
            },
        );
        Held { reached, go_on }
    }

    /// The hook destroys the manager and then goes on.
    pub fn destroy(&self, point: Point, skip: usize) -> Answer<Result<()>> {
        let (done, destroyed) = answer(format!("destroy() in {point:?}"));
        self.plan(point, skip, Fault::Destroy(Box::new(done)));
        destroyed
    }

    /// The hook closes the manager and then goes on.
    pub fn close(&self, point: Point, skip: usize) -> Answer<Result<()>> {
        let (done, closed) = answer(format!("close() in {point:?}"));
        self.plan(point, skip, Fault::Close(Box::new(done)));
        closed
    }

    fn manager(&self) -> Option<Manager> {
        self.manager
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn pass(&self, point: Point) -> Result<()> {
        self.pass_with(point, None)
    }

    /// * `lease`: of a hook, which is given up as soon as nobody waits for it.
    fn pass_with(&self, point: Point, lease: Option<&Arc<Lease>>) -> Result<()> {
        let fault = {
            let mut planned = self.planned();
            let Some(index) = planned.iter().position(|p| p.point == point) else {
                return Ok(());
            };
            let Some(first) = planned.get_mut(index) else {
                return Ok(());
            };
            if first.skip > 0 {
                first.skip -= 1;
                return Ok(());
            }
            planned.remove(index).fault
        };
        match fault {
            Fault::Fail(error) => Err(error),
            Fault::Panic => panic!("on purpose, in {point:?}"),
            Fault::Block {
                reached,
                go_on,
                then,
            } => {
                reached.open();
                let Some(manager) = self.manager() else {
                    panic!("a hook is held, and no manager is attached")
                };
                let given_up = lease.and_then(|lease| lease.cancelled());
                select! {
                    recv(go_on) -> _ => match then {
                        Then::GoOn => Ok(()),
                        Then::Fail(error) => Err(error),
                        Then::Panic => panic!("on purpose, in {point:?}"),
                    },
                    recv(given_up.unwrap_or(manager.destroyed())) -> _ => {
                        Err(Error::new(ErrorCode::Closed, "nobody waits for the hook any more"))
                    }
                    default(PATIENCE) => panic!("{point:?} was held for {PATIENCE:?}"),
                }
            }
            Fault::Destroy(done) => {
                if let Some(manager) = self.manager() {
                    manager.destroy(done);
                }
                Ok(())
            }
            Fault::Close(done) => {
                if let Some(manager) = self.manager() {
                    manager.close(None, done);
                }
                Ok(())
            }
        }
    }
}

impl InstanceHost for Faults {
    fn imports(&self, replica: &Arc<Replica>, module: &Module) -> Result<Vec<ImportValue>> {
        self.pass(Point::Imports)?;
        self.inner.imports(replica, module)
    }

    fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        self.inner.attendant()
    }

    fn watch(&self) -> Option<Arc<Watch>> {
        self.inner.watch()
    }
}

impl Host for Faults {
    fn initialize(&self, lease: &Arc<Lease>) -> Result<()> {
        self.pass_with(Point::Initialize, Some(lease))?;
        self.inner.initialize(lease)
    }

    fn saves_state(&self) -> bool {
        // A fault in the hook needs the hook to be asked.
        self.inner.saves_state() || self.planned().iter().any(|p| p.point == Point::Save)
    }

    fn save_state(&self, lease: &Arc<Lease>, replica: usize) -> Result<Option<HostRef>> {
        self.pass_with(Point::Save, Some(lease))?;
        self.inner.save_state(lease, replica)
    }

    fn restore_state(&self, lease: &Arc<Lease>, state: &HostRef, replica: usize) -> Result<()> {
        self.pass_with(Point::Restore, Some(lease))?;
        self.inner.restore_state(lease, state, replica)
    }

    fn at_home(&self, step: HomeStep) -> Result<()> {
        self.pass(Point::AtHome)?;
        self.inner.at_home(step)
    }

    fn replaced(&self, change: &Replaced) {
        // It cannot fail, so only the other faults make sense here.
        drop(self.pass(Point::Replaced));
        self.inner.replaced(change);
    }

    fn rewound(&self, replicas: &[Arc<Replica>]) {
        self.inner.rewound(replicas);
    }

    fn realm_captured(&self, replica: &Arc<Replica>, snapshot: u64) {
        self.inner.realm_captured(replica, snapshot);
    }

    fn realm_shrinks(&self, replica: &Arc<Replica>, memories: &[u32]) {
        self.inner.realm_shrinks(replica, memories);
    }

    fn realm_rewound(&self, replica: &Arc<Replica>, snapshot: u64) {
        self.inner.realm_rewound(replica, snapshot);
    }

    fn reseeds(&self) -> bool {
        self.inner.reseeds() || self.planned().iter().any(|p| p.point == Point::Reseed)
    }

    fn reseed(&self, lease: &Arc<Lease>) -> Result<()> {
        self.pass_with(Point::Reseed, Some(lease))?;
        self.inner.reseed(lease)
    }

    fn revoked(&self, lease: &Arc<Lease>) {
        self.inner.revoked(lease);
    }

    fn released(&self) {
        self.inner.released();
    }

    fn event(&self, event: Event) {
        drop(self.pass(Point::Event));
        self.inner.event(event);
    }
}
