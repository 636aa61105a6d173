//! One allowance of linear memory over all managers of the process, those of worker threads included.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use wasm_molt_lifecycle::{Candidate, Crossing, Reason, choose};

use crate::instance::memory::memory_total;
use crate::instance::replica::Replica;
use crate::manager::Shared;
use crate::manager::recycle::Due;

/// Where the budget cannot be kept, this part of it has to be won all the same.
const LEAST_SHARE: u64 = 16;

/// Bytes; 0: none.
static BUDGET: AtomicU64 = AtomicU64::new(0);
/// How often the sum has come back within it.
static EPISODE: AtomicUsize = AtomicUsize::new(0);
static IS_OVER: AtomicBool = AtomicBool::new(false);
/// By [`Shared::id`], oldest first, so that one of thousands comes and goes without a look at the others.
static MANAGERS: Mutex<BTreeMap<u64, Weak<Shared>>> = Mutex::new(BTreeMap::new());
/// Bytes of instances that have been replaced, and still have their memory.
static LEAVING: AtomicU64 = AtomicU64::new(0);
/// Who decides.
static DECIDING: Mutex<()> = Mutex::new(());

/// Sets it, for all managers of the process; `None`: there is none.
pub fn set_memory_budget(bytes: Option<u64>) {
    BUDGET.store(bytes.unwrap_or(0), Ordering::Relaxed);
    for (shared, due) in enforce() {
        shared.enqueue(due);
    }
}

/// That instance is about to go: its memory counts as given back, until this is dropped.
pub(crate) fn leaving(replica: &Replica) -> Leaving {
    let bytes = replica.memory_bytes() as u64;
    LEAVING.fetch_add(bytes, Ordering::Relaxed);
    Leaving(bytes)
}

/// See [`leaving`].
pub(crate) struct Leaving(u64);

impl Drop for Leaving {
    fn drop(&mut self) {
        LEAVING.fetch_sub(self.0, Ordering::Relaxed);
    }
}

pub(crate) fn register(shared: &Arc<Shared>) {
    lock_managers().insert(shared.id(), Arc::downgrade(shared));
}

/// That manager is being dropped.
pub(crate) fn forget(shared: &Shared) {
    lock_managers().remove(&shared.id());
}

fn lock_managers() -> MutexGuard<'static, BTreeMap<u64, Weak<Shared>>> {
    MANAGERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those who have no policy are told once in each.
pub(crate) fn episode() -> usize {
    EPISODE.load(Ordering::Relaxed)
}

/// Decides who is recycled, if there is too much; the caller sees to it that they are.
///
/// # Cost
/// Two loads while there is none, or all is well; else it looks at every replica of the process.
pub(crate) fn enforce() -> Vec<(Arc<Shared>, Due)> {
    let budget = BUDGET.load(Ordering::Relaxed);
    if budget == 0 {
        return Vec::new();
    }
    let over = (memory_total() as u64).saturating_sub(budget);
    if over == 0 {
        if IS_OVER.swap(false, Ordering::Relaxed) {
            EPISODE.fetch_add(1, Ordering::Relaxed);
        }
        return Vec::new();
    }
    // Whoever is at it already sees what the others see, or the next call does.
    let Ok(_deciding) = DECIDING.try_lock() else {
        return Vec::new();
    };
    IS_OVER.store(true, Ordering::Relaxed);
    let managers: Vec<_> = lock_managers().values().cloned().collect();
    let mut candidates = Vec::new();
    let mut on_its_way = LEAVING.load(Ordering::Relaxed);
    let mut observers = Vec::new();
    for shared in managers.iter().filter_map(Weak::upgrade) {
        let replicas = shared.lock_serving().replicas.clone();
        let is_idle = shared.gate.counts().in_flight == 0;
        let mut largest: Option<(u64, Arc<Replica>)> = None;
        for replica in replicas {
            let wear = replica.wear();
            let bytes = (replica.memory_bytes() as u64).saturating_sub(wear.baseline());
            if bytes == 0 {
                continue;
            }
            if !shared.is_recycled() {
                if largest.as_ref().is_none_or(|(most, _)| bytes > *most) {
                    largest = Some((bytes, replica));
                }
            } else if wear.is_due() {
                on_its_way += bytes;
            } else if shared.may_recycle(&replica) {
                let mut cost = shared.recycling.cost();
                if !is_idle {
                    // Whoever is inside is waited for.
                    cost += shared.stats.mean_run();
                }
                candidates.push((Candidate { bytes, cost }, Arc::clone(&shared), replica));
            }
        }
        observers.extend(largest.map(|(_, replica)| (shared, replica)));
    }
    let crossing = Crossing {
        reason: Reason::Budget,
        threshold: Some(budget),
    };
    for (shared, replica) in observers {
        let _ = shared.decide(&replica, crossing);
    }
    let offers: Vec<_> = candidates.iter().map(|(offer, ..)| *offer).collect();
    let over = over.saturating_sub(on_its_way);
    let offered: u64 = offers.iter().map(|offer| offer.bytes).sum();
    if offered < over && offered < budget / LEAST_SHARE {
        // What is too much is what instances begin with: to recycle them over and over would help nobody.
        return Vec::new();
    }
    let chosen = choose(over, &offers);
    let chosen = chosen.into_iter().filter_map(|index| candidates.get(index));
    let decide = |(_, shared, replica): &(Candidate, Arc<Shared>, Arc<Replica>)| {
        Some((Arc::clone(shared), shared.decide(replica, crossing)?))
    };
    chosen.filter_map(decide).collect()
}
