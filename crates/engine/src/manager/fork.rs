//! A manager whose instances begin as a copy of another one's.

use std::sync::Arc;

use wasm_molt_lifecycle::Home;

use crate::error::{Done, Error, Result};
use crate::instance::capture::unsupported;
use crate::instance::replica::Blueprint;
use crate::instance::snapshot::Snapshot;
use crate::manager::control::Op;
use crate::manager::pause::Terms;
use crate::manager::{Job, Manager, Shared};

/// More dirty pages than this are not captured on the home thread: that would take milliseconds.
const CAPTURED_AT_HOME_BYTES: usize = 2 << 20;

impl Manager {
    /// Starts `child`, a manager that has not started yet, as a copy of this one's slot 0. This one serves
    /// on as soon as the copy is taken; what either does from then on the other does not see.
    pub fn fork(&self, child: &Self, done: Done<()>) {
        let (parent, child) = (&self.shared, &child.shared);
        if let Err(error) = parent.check_fork(child) {
            child.start_failed_early();
            done(Err(error));
            return;
        }
        parent.push(Op::Fork {
            child: Arc::clone(child),
            done,
        });
    }

    /// The same on this thread, which must be the home thread, if nothing has to be waited for and it takes
    /// no longer than a call or two; `None` if it does not, and then nothing was done.
    pub fn fork_now(&self, home: &Home<Job>, child: &Self) -> Option<Result<()>> {
        let (parent, child) = (&self.shared, &child.shared);
        // A hook may take its time, and be asynchronous.
        if child.host.reseeds() {
            return None;
        }
        let forked = parent.check_fork(child).and_then(|()| {
            parent.now(Some(home), |scope| {
                parent.copy(&Terms {
                    most: CAPTURED_AT_HOME_BYTES,
                    ..Terms::of("the fork", scope)
                })
            })
        });
        match forked {
            Ok((blueprint, snapshot)) => Some(child.start_from(&blueprint, &snapshot, true)),
            Err(error) if error.is_busy() => None,
            Err(error) => {
                child.start_failed_early();
                Some(Err(error))
            }
        }
    }
}

impl Shared {
    /// Whatever of the child's options the parent's code was not made for.
    fn check_fork(&self, child: &Self) -> Result<()> {
        if self.options.is_realm {
            let why = "it is JavaScript's as well, which cannot be copied; load the glue once more instead";
            return Err(unsupported(self.name(), why));
        }
        let blueprint = self.blueprint()?;
        let (ours, theirs) = (&self.options, &child.options);
        if theirs.limits.stack_bytes() != ours.limits.stack_bytes() {
            return Err(Error::invalid(format!(
                "limits.stackBytes of a fork is {}; it must be its parent's, {}, for which the code was \
                 compiled",
                theirs.limits.stack_bytes(),
                ours.limits.stack_bytes()
            )));
        }
        if theirs.engine != ours.engine {
            return Err(Error::invalid(
                "a fork has the engine options of its parent",
            ));
        }
        blueprint.check_captures()
    }

    /// The copy, and what it is a copy of.
    pub(crate) fn copy(
        self: &Arc<Self>,
        terms: &Terms<'_>,
    ) -> Result<(Arc<Blueprint>, Arc<Snapshot>)> {
        let snapshot = self.capture(terms)?;
        let captured = snapshot.captured();
        if let Some(why) = captured.and_then(|captured| captured.fork_refusal()) {
            return Err(unsupported(self.name(), why));
        }
        Ok((self.blueprint()?, snapshot))
    }
}
