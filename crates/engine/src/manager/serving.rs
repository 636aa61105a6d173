//! What serves now, and what an earlier generation has left behind.

use std::sync::Arc;

use wasm_molt_lifecycle::{Generation, TicketId};

use crate::instance::pool::Pool;
use crate::instance::replica::{Blueprint, Replica};
use crate::instance::snapshot::Origin;

/// Under one lock. A ticket names its replica by slot and cohort, so that one which was given out
/// before a roll never reaches an instance of the generation after it.
pub(crate) struct Serving {
    pub(crate) generation: Generation,
    pub(crate) blueprint: Option<Arc<Blueprint>>,
    pub(crate) replicas: Vec<Arc<Replica>>,
    /// Runs their calls.
    pub(crate) pool: Arc<Pool>,
    /// Goes up together with the gate's, in the same step at home.
    cohort: u64,
    /// By slot, as in the gate; those that are missing are 0.
    cohorts: Vec<u64>,
    left: Vec<Left>,
}

/// An instance that was replaced while somebody was inside.
struct Left {
    /// The roll that has left it behind.
    by: u64,
    ticket: TicketId,
    generation: Generation,
    replica: Arc<Replica>,
    /// Not that of what serves, so that a call that does not end keeps no thread from it.
    pool: Arc<Pool>,
    /// What its isolated calls begin with, where what serves is of another build.
    origin: Option<Origin>,
}

impl Serving {
    pub(crate) const fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            generation: Generation::FIRST,
            blueprint: None,
            replicas: Vec::new(),
            cohort: 0,
            cohorts: Vec::new(),
            left: Vec::new(),
        }
    }

    fn cohort_of(&self, slot: usize) -> u64 {
        self.cohorts.get(slot).copied().unwrap_or_default()
    }

    /// The instance that a ticket is for, and the threads that it runs on.
    pub(crate) fn place_of(&self, ticket: TicketId) -> Option<(Arc<Replica>, Arc<Pool>)> {
        if ticket.cohort == self.cohort_of(ticket.slot) {
            let replica = self.replicas.get(ticket.slot)?;
            return Some((Arc::clone(replica), Arc::clone(&self.pool)));
        }
        let left = self.left.iter().find(|left| left.ticket == ticket)?;
        Some((Arc::clone(&left.replica), Arc::clone(&left.pool)))
    }

    /// What an instance that was left behind begins isolated calls with.
    pub(crate) fn origin_of_left(&self, replica: &Replica) -> Option<Origin> {
        let mut left = self.left.iter();
        left.find(|left| left.replica.id() == replica.id())?
            .origin
            .clone()
    }

    /// What served so far is left behind; `replicas` serve, on `pool`. Returns the number of the roll.
    ///
    /// * `origin`: what isolated calls of the former begin with.
    pub(crate) fn roll(
        &mut self,
        generation: Generation,
        replicas: &[Arc<Replica>],
        pool: Arc<Pool>,
        origin: Option<&Origin>,
    ) -> u64 {
        let generation = std::mem::replace(&mut self.generation, generation);
        let pool = std::mem::replace(&mut self.pool, pool);
        self.cohort += 1;
        for (slot, replica) in replicas.iter().enumerate() {
            self.leave(slot, generation, &pool, origin);
            self.set(slot, replica);
        }
        self.cohort
    }

    /// The same for one slot.
    pub(crate) fn roll_slot(&mut self, replica: &Arc<Replica>, pool: Arc<Pool>) -> u64 {
        let generation = std::mem::replace(&mut self.generation, replica.generation());
        let pool = std::mem::replace(&mut self.pool, pool);
        self.cohort += 1;
        // Of the same build.
        self.leave(replica.slot(), generation, &pool, None);
        self.set(replica.slot(), replica);
        self.cohort
    }

    fn leave(
        &mut self,
        slot: usize,
        generation: Generation,
        pool: &Arc<Pool>,
        origin: Option<&Origin>,
    ) {
        let cohort = self.cohort_of(slot);
        if let Some(replica) = self.replicas.get(slot) {
            self.left.push(Left {
                by: self.cohort,
                ticket: TicketId { cohort, slot },
                generation,
                replica: Arc::clone(replica),
                pool: Arc::clone(pool),
                origin: origin.cloned(),
            });
        }
    }

    fn set(&mut self, slot: usize, replica: &Arc<Replica>) {
        if let Some(place) = self.replicas.get_mut(slot) {
            *place = Arc::clone(replica);
        }
        if self.cohorts.len() < self.replicas.len() {
            self.cohorts.resize(self.replicas.len(), 0);
        }
        if let Some(cohort) = self.cohorts.get_mut(slot) {
            *cohort = self.cohort;
        }
    }

    /// Takes out, with its generation, what was left behind up to a roll, except where one of `stragglers`
    /// may be inside; and tells whether such are left. Of later rolls the gate may not know yet.
    pub(crate) fn take_left(
        &mut self,
        roll: u64,
        stragglers: &[TicketId],
    ) -> (Vec<(Arc<Replica>, Generation)>, bool) {
        let is_gone = |left: &mut Left| left.by <= roll && !stragglers.contains(&left.ticket);
        let gone = self.left.extract_if(.., is_gone);
        let gone = gone.map(|left| (left.replica, left.generation)).collect();
        (gone, self.left.iter().any(|left| left.by <= roll))
    }

    /// Everything that was left behind.
    pub(crate) fn left(&self) -> Vec<Arc<Replica>> {
        let replicas = self.left.iter().map(|left| &left.replica);
        replicas.cloned().collect()
    }

    /// Whatever exists, of all generations.
    pub(crate) fn all(&self) -> Vec<Arc<Replica>> {
        let mut all = self.replicas.clone();
        all.extend(self.left());
        all
    }

    /// Bytes of linear memory over all that exists.
    pub(crate) fn memory_bytes(&self) -> usize {
        let left = self.left.iter().map(|left| &left.replica);
        let all = self.replicas.iter().chain(left);
        all.map(|replica| replica.memory_bytes()).sum()
    }
}
