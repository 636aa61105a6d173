//! A host made of closures.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use wasm_molt_engine::{
    Attendant, Error, ErrorCode, Event, HomeStep, Host, HostCall, HostFunction, HostRef,
    ImportValue, InstanceHost, Lease, Module, Replaced, Replica, Result, Value, Watch,
};

use crate::home::HomeMail;
use crate::inside::ask;
use crate::wait::PATIENCE;

struct Function<F>(F);

impl<F> HostFunction for Function<F>
where
    F: Fn(&mut HostCall<'_>) -> Result<()> + Send + Sync + 'static,
{
    fn call(&self, call: &mut HostCall<'_>) -> Result<()> {
        (self.0)(call)
    }
}

/// A closure as a function of the host.
pub fn host_function(
    f: impl Fn(&mut HostCall<'_>) -> Result<()> + Send + Sync + 'static,
) -> Arc<dyn HostFunction> {
    Arc::new(Function(f))
}

/// A closure as an import.
pub fn function(
    f: impl Fn(&mut HostCall<'_>) -> Result<()> + Send + Sync + 'static,
) -> ImportValue {
    ImportValue::Function(host_function(f))
}

type Imports = dyn Fn(&Arc<Replica>, &Module) -> Result<Vec<ImportValue>> + Send + Sync;
type Initialize = dyn Fn(&Arc<Lease>) -> Result<()> + Send + Sync;
type Save = dyn Fn(&Arc<Lease>, usize) -> Result<Option<HostRef>> + Send + Sync;
type Restore = dyn Fn(&Arc<Lease>, &HostRef, usize) -> Result<()> + Send + Sync;

/// What a [`TestHost`] does.
#[derive(Default)]
pub struct Script {
    values: Vec<(String, String, ImportValue)>,
    imports: Option<Box<Imports>>,
    initialize: Option<Box<Initialize>>,
    save: Option<Box<Save>>,
    restore: Option<Box<Restore>>,
    reseed: Option<Box<Initialize>>,
    watch: Option<Arc<Watch>>,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Script")
            .field("values", &self.values.len())
            .finish_non_exhaustive()
    }
}

impl Script {
    /// No imports, no hooks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Carries over what `get` answers and `set` takes.
    pub fn carrying() -> Self {
        Self::new()
            .save(|lease, _| {
                let state = ask(lease, "get", Vec::new())?.pop();
                Ok(state.map(HostRef::new))
            })
            .restore(|lease, state, _| {
                let state = state.downcast_ref::<Value>().cloned();
                ask(lease, "set", state.into_iter().collect()).map(drop)
            })
    }

    /// Gives one import, the same to every instance.
    #[must_use]
    pub fn import(mut self, module: &str, name: &str, value: ImportValue) -> Self {
        self.values.push((module.into(), name.into(), value));
        self
    }

    /// Gives `env.<name>`.
    #[must_use]
    pub fn function(
        self,
        name: &str,
        f: impl Fn(&mut HostCall<'_>) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.import("env", name, function(f))
    }

    /// Makes the imports of each instance by itself.
    #[must_use]
    pub fn imports(
        mut self,
        f: impl Fn(&Arc<Replica>, &Module) -> Result<Vec<ImportValue>> + Send + Sync + 'static,
    ) -> Self {
        self.imports = Some(Box::new(f));
        self
    }

    /// The `initialize` hook.
    #[must_use]
    pub fn initialize(
        mut self,
        f: impl Fn(&Arc<Lease>) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.initialize = Some(Box::new(f));
        self
    }

    /// The `saveState` hook.
    #[must_use]
    pub fn save(
        mut self,
        f: impl Fn(&Arc<Lease>, usize) -> Result<Option<HostRef>> + Send + Sync + 'static,
    ) -> Self {
        self.save = Some(Box::new(f));
        self
    }

    /// The `restoreState` hook.
    #[must_use]
    pub fn restore(
        mut self,
        f: impl Fn(&Arc<Lease>, &HostRef, usize) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.restore = Some(Box::new(f));
        self
    }

    /// The `reseed` hook.
    #[must_use]
    pub fn reseed(mut self, f: impl Fn(&Arc<Lease>) -> Result<()> + Send + Sync + 'static) -> Self {
        self.reseed = Some(Box::new(f));
        self
    }

    /// Has guests ask whether their thread must end.
    #[must_use]
    pub fn ending(mut self, is_ending: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.watch = Some(Watch::new(is_ending));
        self
    }
}

/// Instances that were replaced, by identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// They do not serve any more.
    pub old: Vec<u64>,
    /// They serve now.
    pub new: Vec<u64>,
    /// The generation of those.
    pub generation: u64,
}

/// What a host is told of its realm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RealmStep {
    /// It was captured as that snapshot.
    Captured(u64),
    /// Views of these memories end.
    Shrinks(Vec<u32>),
    /// It has the state of that snapshot again.
    Rewound(u64),
}

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    changes: Vec<Change>,
    released: usize,
    rewound: Vec<u64>,
    realms: Vec<RealmStep>,
    leases: Vec<Weak<Lease>>,
}

/// Threads of its guest want nothing of it.
struct Unwanted;

impl Attendant for Unwanted {
    fn is_wanted(&self) -> bool {
        false
    }

    fn attend(&self) {}
}

/// A host for Rust. Leases that it [was told of](TestHost::watch) end when their instance is replaced.
pub struct TestHost {
    script: Script,
    home: Option<HomeMail>,
    log: Mutex<Log>,
    changed: Condvar,
}

impl std::fmt::Debug for TestHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestHost")
            .field("script", &self.script)
            .finish_non_exhaustive()
    }
}

impl TestHost {
    /// * `home`: where steps at home run; without one they run on whichever thread asks.
    pub fn new(script: Script, home: Option<HomeMail>) -> Self {
        Self {
            script,
            home,
            log: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that happened so far.
    pub fn events(&self) -> Vec<Event> {
        self.log().events.clone()
    }

    /// The instances that were given the state of a snapshot, in order.
    pub fn rewound(&self) -> Vec<u64> {
        self.log().rewound.clone()
    }

    /// What was told of realms, in order.
    pub fn realm_steps(&self) -> Vec<RealmStep> {
        self.log().realms.clone()
    }

    fn realm_step(&self, step: RealmStep) {
        let is_home = self.home.as_ref().is_none_or(HomeMail::is_here);
        assert!(is_home, "{step:?} was not told on the home thread");
        self.log().realms.push(step);
    }

    /// How many of the events are meant by `is`.
    pub fn count(&self, is: impl Fn(&Event) -> bool) -> usize {
        self.log().events.iter().filter(|event| is(event)).count()
    }

    /// Waits until at least `count` events are meant by `is`.
    #[track_caller]
    pub fn wait_for(&self, what: &str, count: usize, is: impl Fn(&Event) -> bool) {
        let is_missing =
            |log: &mut Log| log.events.iter().filter(|event| is(event)).count() < count;
        let (log, timeout) = self
            .changed
            .wait_timeout_while(self.log(), PATIENCE, is_missing)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            !timeout.timed_out(),
            "no {count} events '{what}' within {PATIENCE:?}, but {:?}",
            log.events
        );
    }

    /// Every replacement so far.
    pub fn changes(&self) -> Vec<Change> {
        self.log().changes.clone()
    }

    /// What must be true of every life that has ended: each instance that came has gone, no
    /// number of a generation was used twice, and each slot saw them rise.
    #[track_caller]
    pub fn assert_consistent(&self) {
        let changes = self.changes();
        let has_gone = |id: &u64| changes.iter().any(|change| change.old.contains(id));
        for id in changes.iter().flat_map(|change| &change.new) {
            assert!(
                has_gone(id),
                "instance {id} came and never went: {changes:?}"
            );
        }
        let came = changes.iter().filter(|change| !change.new.is_empty());
        let mut generations: Vec<_> = came.clone().map(|change| change.generation).collect();
        generations.sort_unstable();
        let is_used_once = generations.windows(2).all(|pair| pair[0] < pair[1]);
        assert!(is_used_once, "a number was used twice: {changes:?}");
        // Only a home puts the steps of different threads in an order, and those of different slots come to it by
        // different ways: of one slot each follows what it replaces.
        if self.home.is_none() {
            return;
        }
        let mut known = std::collections::HashMap::new();
        for change in came {
            for id in &change.old {
                let before = known.get(id).copied();
                assert!(
                    before.is_some_and(|before| before < change.generation),
                    "out of order: {id} goes with {change:?} and came with {before:?}: {changes:?}"
                );
            }
            known.extend(change.new.iter().map(|id| (*id, change.generation)));
        }
    }

    /// Forgets what happened, but for instances that came and have not gone: a log that grows would
    /// look like a leak.
    pub fn forget(&self) {
        let mut log = self.log();
        log.events = Vec::new();
        let changes = std::mem::take(&mut log.changes);
        let has_gone = |id: &u64| changes.iter().any(|change| change.old.contains(id));
        let lives = |change: &&Change| !change.new.iter().all(has_gone);
        log.changes = changes.iter().filter(lives).cloned().collect();
    }

    /// How often the host was told that it is not needed any more.
    pub fn released_count(&self) -> usize {
        self.log().released
    }

    /// From now on the lease ends when its instance is replaced.
    pub fn watch(&self, lease: &Arc<Lease>) {
        let mut log = self.log();
        log.leases.retain(|lease| lease.strong_count() > 0);
        log.leases.push(Arc::downgrade(lease));
    }
}

fn missing(module: &str, name: &str) -> Error {
    Error::new(
        ErrorCode::Link,
        format!("the script gives no '{module}'.'{name}'"),
    )
}

impl InstanceHost for TestHost {
    fn imports(&self, replica: &Arc<Replica>, module: &Module) -> Result<Vec<ImportValue>> {
        if let Some(imports) = &self.script.imports {
            return imports(replica, module);
        }
        let find = |import: &wasm_molt_engine::Import| {
            let is_meant = |(module, name, _): &&(String, String, ImportValue)| {
                *module == import.module && *name == import.name
            };
            let given = self.script.values.iter().find(is_meant);
            given
                .map(|(_, _, value)| value.clone())
                .ok_or_else(|| missing(&import.module, &import.name))
        };
        module.imports().iter().map(find).collect()
    }

    fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        Some(Arc::new(Unwanted))
    }

    fn watch(&self) -> Option<Arc<Watch>> {
        self.script.watch.clone()
    }
}

impl Host for TestHost {
    fn initialize(&self, lease: &Arc<Lease>) -> Result<()> {
        self.script
            .initialize
            .as_ref()
            .map_or(Ok(()), |hook| hook(lease))
    }

    fn saves_state(&self) -> bool {
        self.script.save.is_some()
    }

    fn save_state(&self, lease: &Arc<Lease>, replica: usize) -> Result<Option<HostRef>> {
        self.script
            .save
            .as_ref()
            .map_or(Ok(None), |hook| hook(lease, replica))
    }

    fn restore_state(&self, lease: &Arc<Lease>, state: &HostRef, replica: usize) -> Result<()> {
        self.script
            .restore
            .as_ref()
            .map_or(Ok(()), |hook| hook(lease, state, replica))
    }

    fn at_home(&self, step: HomeStep) -> Result<()> {
        match &self.home {
            Some(home) => home.at_home(step),
            None => {
                step(None);
                Ok(())
            }
        }
    }

    fn replaced(&self, change: &Replaced) {
        let ids = |replicas: &[Arc<Replica>]| replicas.iter().map(|r| r.id()).collect::<Vec<_>>();
        let change = Change {
            old: ids(&change.old),
            new: ids(&change.new),
            generation: change.generation.get(),
        };
        let leases: Vec<_> = {
            let mut log = self.log();
            log.changes.push(change.clone());
            log.leases.iter().filter_map(Weak::upgrade).collect()
        };
        for lease in leases {
            if change.old.contains(&lease.replica().id()) {
                lease.release();
            }
        }
    }

    fn rewound(&self, replicas: &[Arc<Replica>]) {
        self.log().rewound.extend(replicas.iter().map(|r| r.id()));
    }

    fn realm_captured(&self, _replica: &Arc<Replica>, snapshot: u64) {
        self.realm_step(RealmStep::Captured(snapshot));
    }

    fn realm_shrinks(&self, _replica: &Arc<Replica>, memories: &[u32]) {
        self.realm_step(RealmStep::Shrinks(memories.to_vec()));
    }

    fn realm_rewound(&self, _replica: &Arc<Replica>, snapshot: u64) {
        self.realm_step(RealmStep::Rewound(snapshot));
    }

    fn reseeds(&self) -> bool {
        self.script.reseed.is_some()
    }

    fn reseed(&self, lease: &Arc<Lease>) -> Result<()> {
        self.script
            .reseed
            .as_ref()
            .map_or(Ok(()), |hook| hook(lease))
    }

    /// There are no views, and the engine releases the lease itself.
    fn revoked(&self, _lease: &Arc<Lease>) {}

    fn released(&self) {
        self.log().released += 1;
        self.changed.notify_all();
    }

    fn event(&self, event: Event) {
        self.log().events.push(event);
        self.changed.notify_all();
    }
}
