//! Promises that other threads answer.

use std::rc::Rc;
use std::sync::Arc;

use napi::sys;
use wasm_molt_engine::Error;

use crate::env::EnvState;
use crate::js::{JsResult, Pending, Val};
use crate::js_only::JsOnly;
use crate::side::ManagerSide;

/// A promise that another thread will answer. While it is open the process stays alive.
pub(crate) struct Deferred {
    inside: JsOnly<Inside>,
    pub(crate) promise: Val,
}

/// Used on the JS thread, once.
pub(crate) struct Inside {
    env: Rc<EnvState>,
    side: Rc<ManagerSide>,
    deferred: sys::napi_deferred,
}

pub(crate) type Done<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

impl Deferred {
    pub(crate) fn new(env: &Rc<EnvState>, side: &Rc<ManagerSide>) -> JsResult<Self> {
        let (deferred, promise) = env.js().promise()?;
        env.begin();
        let inside = Inside {
            env: Rc::clone(env),
            side: Rc::clone(side),
            deferred,
        };
        Ok(Self {
            inside: JsOnly::new(&env.inbox, inside),
            promise,
        })
    }

    pub(crate) fn done<T: Send + 'static>(
        self,
        convert: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>, T) -> JsResult<Val> + Send + 'static,
    ) -> Done<T> {
        self.done_always(|_| {}, convert)
    }

    /// * `always`: runs on the JS thread before the promise settles, whichever way.
    pub(crate) fn done_always<T: Send + 'static>(
        self,
        always: impl FnOnce(&ManagerSide) + Send + 'static,
        convert: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>, T) -> JsResult<Val> + Send + 'static,
    ) -> Done<T> {
        let inside = self.inside;
        Box::new(move |outcome| {
            let inbox = Arc::clone(inside.inbox());
            // Without an environment there is nobody to answer.
            let _ = inbox.post(Box::new(move |_| {
                if let Some(inside) = inside.get() {
                    always(&inside.side);
                    inside.settle(outcome, convert);
                }
            }));
        })
    }
}

impl Inside {
    fn settle<T>(
        &self,
        outcome: Result<T, Error>,
        convert: impl FnOnce(&Rc<EnvState>, &Rc<ManagerSide>, T) -> JsResult<Val>,
    ) {
        let Self {
            env,
            side,
            deferred,
        } = self;
        let js = env.js();
        env.end();
        let settled = match outcome {
            Ok(value) => convert(env, side, value).map_err(|Pending| js.take_exception()),
            Err(error) => Err(env
                .error_value(&error, &side.place())
                .unwrap_or_else(|Pending| js.take_exception())),
        };
        match settled {
            Ok(value) => js.resolve(*deferred, value),
            Err(error) => js.reject(*deferred, error),
        }
    }
}
