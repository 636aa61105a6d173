//! The snapshots of one manager, and which of them new instances begin with.

use std::sync::{Arc, Weak};

use crate::error::{Error, ErrorCode, Result};
use crate::instance::module::Module;
use crate::instance::snapshot::{Origin, Snapshot};

/// The snapshots of one manager. New instances begin with the newest; it is kept here, while the others
/// are kept by whoever has a handle.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    /// Nobody has a handle on it: what a fork began with, or what calls are isolated with at first.
    own: Option<Arc<Snapshot>>,
    newest: Option<Arc<Snapshot>>,
    /// The newest before, until whoever asked for the newest has got it.
    before: Option<Arc<Snapshot>>,
    /// Oldest first.
    others: Vec<Weak<Snapshot>>,
}

impl Snapshots {
    pub(crate) fn newest(&self) -> Option<&Arc<Snapshot>> {
        self.newest.as_ref().or(self.own.as_ref())
    }

    /// What new instances begin with.
    pub(crate) fn origin(&self) -> Option<Origin> {
        Origin::of(self.newest()?)
    }

    /// The one that nobody asked for. New instances begin with it, and the others of the same build live as
    /// long as their handles.
    pub(crate) fn set_own(&mut self, own: Arc<Snapshot>) {
        self.accept();
        if let Some(newest) = self.newest.take() {
            self.others.push(Arc::downgrade(&newest));
        }
        self.own = Some(own);
    }

    /// Until it is [accepted](Self::accept) nothing is lost with it.
    pub(crate) fn push(&mut self, snapshot: Arc<Snapshot>) {
        self.accept();
        self.before = self.newest.replace(snapshot);
    }

    /// Whoever asked for the newest has got it; the one before lives as long as its handles.
    pub(crate) fn accept(&mut self) {
        self.others.retain(|other| other.strong_count() > 0);
        if let Some(before) = self.before.take() {
            self.others.push(Arc::downgrade(&before));
        }
    }

    /// Lets go of one. If it was the newest, the one before it that is still there is the newest.
    pub(crate) fn release(&mut self, snapshot: &Snapshot) {
        snapshot.let_go();
        let is_alive = |it: &Arc<Snapshot>| !it.is_released();
        if self
            .newest
            .as_ref()
            .is_some_and(|it| it.id() == snapshot.id())
        {
            let own = self.own.as_ref().map_or(0, |own| own.id());
            let is_next = |it: &Arc<Snapshot>| is_alive(it) && it.id() > own;
            self.newest = self.before.take().filter(is_alive).or_else(|| {
                let upgraded = self.others.iter().filter_map(Weak::upgrade);
                upgraded.filter(is_next).max_by_key(|it| it.id())
            });
            let newest = self.newest.as_ref().map(Arc::downgrade);
            self.others
                .retain(|other| newest.as_ref().is_none_or(|newest| !newest.ptr_eq(other)));
        }
    }

    /// Another build serves: none of them can be used with it.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The manager is closed: whoever has a handle has nothing but that.
    pub(crate) fn release_all(&mut self) {
        for snapshot in self.all() {
            snapshot.let_go();
        }
        self.clear();
    }

    fn all(&self) -> Vec<Arc<Snapshot>> {
        let others = self.others.iter().filter_map(Weak::upgrade);
        let kept = [&self.own, &self.before, &self.newest];
        others.chain(kept.into_iter().flatten().cloned()).collect()
    }

    /// Those that can still be used.
    pub(crate) fn alive(&self) -> Vec<Arc<Snapshot>> {
        let mut alive = self.all();
        alive.retain(|snapshot| !snapshot.is_released());
        alive
    }

    /// The one that is meant: `to`, or the newest.
    pub(crate) fn choose(
        &self,
        to: Option<&Arc<Snapshot>>,
        (serving, manager): (&Arc<Module>, u64),
    ) -> Result<Origin> {
        let name = serving.name();
        let Some(to) = to else {
            return self.origin().ok_or_else(|| {
                Error::invalid(format!(
                    "{name} has no snapshot to reset to; take one first, with snapshot()"
                ))
            });
        };
        let Some(origin) = Origin::of(to) else {
            return Err(Error::new(
                ErrorCode::StaleHandle,
                format!(
                    "snapshot {} of {name} was released; take a new one",
                    to.id()
                ),
            ));
        };
        if self.alive().iter().any(|known| known.id() == to.id()) {
            return Ok(origin);
        }
        if to.owner() == manager {
            return Err(Error::new(
                ErrorCode::IncompatibleModule,
                format!(
                    "snapshot {} is of another build of {name} than the one that serves; take a new one",
                    to.id()
                ),
            ));
        }
        Err(Error::invalid(format!(
            "options.to is snapshot {} of another manager; {name} can only be reset to its own",
            to.id()
        )))
    }
}
