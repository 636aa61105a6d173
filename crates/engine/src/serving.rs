//! What serves now, and what an earlier generation has left behind.

use std::sync::Arc;

use wasm_molt_lifecycle::{Generation, TicketId};

use crate::pool::Pool;
use crate::replica::{Blueprint, Replica};

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
    left: Vec<Left>,
}

/// Instances of an earlier generation that somebody may still be inside.
struct Left {
    cohort: u64,
    generation: Generation,
    replicas: Vec<Arc<Replica>>,
    /// Theirs alone, so that a call that does not end keeps no thread from the next generation.
    pool: Arc<Pool>,
}

impl Serving {
    pub(crate) const fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            generation: Generation::FIRST,
            blueprint: None,
            replicas: Vec::new(),
            cohort: 0,
            left: Vec::new(),
        }
    }

    /// The instance that a ticket is for, and the threads that it runs on.
    pub(crate) fn place_of(&self, ticket: TicketId) -> Option<(Arc<Replica>, Arc<Pool>)> {
        if ticket.cohort == self.cohort {
            let replica = self.replicas.get(ticket.slot)?;
            return Some((Arc::clone(replica), Arc::clone(&self.pool)));
        }
        let left = self.left.iter().find(|left| left.cohort == ticket.cohort)?;
        let is_meant = |replica: &&Arc<Replica>| replica.slot() == ticket.slot;
        let replica = left.replicas.iter().find(is_meant)?;
        Some((Arc::clone(replica), Arc::clone(&left.pool)))
    }

    /// What served so far is left behind; `replicas` serve, on `pool`. Returns the cohort that was.
    pub(crate) fn roll(
        &mut self,
        generation: Generation,
        replicas: Vec<Arc<Replica>>,
        pool: Arc<Pool>,
    ) -> u64 {
        let left = Left {
            cohort: self.cohort,
            generation: std::mem::replace(&mut self.generation, generation),
            replicas: std::mem::replace(&mut self.replicas, replicas),
            pool: std::mem::replace(&mut self.pool, pool),
        };
        let cohort = left.cohort;
        self.left.push(left);
        self.cohort += 1;
        cohort
    }

    /// Takes out what a cohort has left behind, except where one of `stragglers` may be inside.
    pub(crate) fn take_left(
        &mut self,
        cohort: u64,
        stragglers: &[TicketId],
    ) -> (Vec<Arc<Replica>>, Generation) {
        let Some(left) = self.left.iter_mut().find(|left| left.cohort == cohort) else {
            return (Vec::new(), self.generation);
        };
        let generation = left.generation;
        let is_used = |replica: &Arc<Replica>| {
            let slot = replica.slot();
            stragglers.contains(&TicketId { cohort, slot })
        };
        let (kept, gone) = std::mem::take(&mut left.replicas)
            .into_iter()
            .partition(is_used);
        left.replicas = kept;
        self.left.retain(|left| !left.replicas.is_empty());
        (gone, generation)
    }

    /// Everything that an earlier generation has left behind.
    pub(crate) fn left(&self) -> Vec<Arc<Replica>> {
        let replicas = self.left.iter().flat_map(|left| &left.replicas);
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
        let left = self.left.iter().flat_map(|left| &left.replicas);
        let all = self.replicas.iter().chain(left);
        all.map(|replica| replica.memory_bytes()).sum()
    }
}
