//! Waking the event loop of an environment from another thread.
//!
//! Unsafe because it speaks libuv: Node-API's own way, a thread-safe function, wakes the JS thread while
//! it still holds the lock that this thread takes first, so that on a busy machine every answer costs two
//! more changes of threads. `uv_async_send` has no lock. The functions are looked up in the process, so
//! that nothing has to be linked; where they are missing, or are not libuv's, the thread-safe function
//! serves.

use std::ffi::c_void;
use std::ptr;

use napi::sys;

use crate::env::EnvState;
use crate::js::{Js, JsResult, Val};

/// Lives until the environment's cleanup hooks have run. A copy is the same.
#[derive(Clone, Copy)]
pub(crate) struct Wake(Kind);

#[derive(Clone, Copy)]
enum Kind {
    #[cfg(unix)]
    Handle(handle::Handle),
    Function(sys::napi_threadsafe_function),
}

// SAFETY: an address; what is done with it from any thread (`send`) is made for that, and the rest is asked of
// who shows that this is the JS thread (`Js`).
unsafe impl Send for Wake {}
// SAFETY: as above.
unsafe impl Sync for Wake {}

impl Wake {
    /// Does not keep the process alive at first. Cleanup hooks that are registered later run while it
    /// still works.
    ///
    /// * `resource`: what asynchronous hooks are shown. Held weakly.
    pub(crate) fn new(js: Js, resource: Val) -> JsResult<Self> {
        let has_other_loop = has_other_loop(js)?;
        #[cfg(unix)]
        if !has_other_loop && let Some(handle) = handle::Handle::new(js, resource)? {
            return Ok(Self(Kind::Handle(handle)));
        }
        #[cfg(not(unix))]
        let _ = resource;
        Ok(Self(Kind::Function(make_function(js, has_other_loop)?)))
    }

    /// Has [`EnvState::woken`] called soon. Any thread.
    ///
    /// # Safety
    /// The environment has not finished its cleanup hooks.
    pub(crate) unsafe fn send(self) {
        match self.0 {
            #[cfg(unix)]
            // SAFETY: contract of this function.
            Kind::Handle(handle) => unsafe { handle.send() },
            Kind::Function(function) => {
                let mode = sys::ThreadsafeFunctionCallMode::nonblocking;
                // SAFETY: contract of this function; made to be called from any thread.
                unsafe { sys::napi_call_threadsafe_function(function, ptr::null_mut(), mode) };
            }
        }
    }

    /// Whether the process stays alive for it. JS thread.
    pub(crate) fn keep_alive(self, js: Js, does: bool) {
        match self.0 {
            #[cfg(unix)]
            Kind::Handle(handle) => handle.keep_alive(does),
            // SAFETY: valid environment, and the function lives as long as that.
            Kind::Function(function) => unsafe {
                if does {
                    sys::napi_ref_threadsafe_function(js.raw(), function);
                } else {
                    sys::napi_unref_threadsafe_function(js.raw(), function);
                }
            },
        }
    }
}

/// Bun and Deno have functions of libuv's names that are not libuv's; some of Bun's end the process.
fn has_other_loop(js: Js) -> JsResult<bool> {
    let global = js.global()?;
    for name in [c"Bun", c"Deno"] {
        if js.kind(js.property(global, name)?)? != crate::js::Kind::Undefined {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Runs what the environment was woken for. JS thread, inside a scope for callbacks.
///
/// * `is_paced`: at most once in a turn of the event loop.
fn woken(env: sys::napi_env, is_paced: bool) {
    let run = || {
        if let Some(state) = EnvState::at(env as usize) {
            if is_paced {
                state.woken_paced();
            } else {
                state.woken();
            }
        }
    };
    // No panic may cross into Node.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
}

/// What the function's context is where it is paced; nobody looks into it.
const PACED: *mut c_void = ptr::without_provenance_mut(1);

/// * `is_paced`: Bun calls such a function for as long as somebody asks for it, and lets nothing else run
///   meanwhile.
fn make_function(js: Js, is_paced: bool) -> JsResult<sys::napi_threadsafe_function> {
    let name = js.string("wasm-molt")?;
    let mut function = ptr::null_mut();
    // SAFETY: valid environment and values; `called` matches the expected signature.
    let status = unsafe {
        sys::napi_create_threadsafe_function(
            js.raw(),
            ptr::null_mut(),
            ptr::null_mut(),
            name,
            0,
            1,
            ptr::null_mut(),
            None,
            if is_paced { PACED } else { ptr::null_mut() },
            Some(called),
            &raw mut function,
        )
    };
    if status != sys::Status::napi_ok {
        return Err(js.throw_type_error("the wake function could not be made"));
    }
    // SAFETY: just made.
    unsafe { sys::napi_unref_threadsafe_function(js.raw(), function) };
    Ok(function)
}

unsafe extern "C" fn called(
    env: sys::napi_env,
    _callback: sys::napi_value,
    context: *mut c_void,
    _data: *mut c_void,
) {
    // Null while the environment goes.
    if !env.is_null() {
        woken(env, !context.is_null());
    }
}

#[cfg(unix)]
mod handle {
    use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
    use std::ffi::{CStr, c_char, c_int, c_void};
    use std::ptr;
    use std::sync::OnceLock;

    use napi::sys;

    use crate::js::{Js, JsResult, Val};

    /// A `uv_async_t`, whose size only libuv knows.
    #[repr(C)]
    struct UvAsync {
        _private: [u8; 0],
    }

    type Callback = unsafe extern "C" fn(*mut UvAsync);

    type HandleSize = unsafe extern "C" fn(c_int) -> usize;
    type SetData = unsafe extern "C" fn(*mut UvAsync, *mut c_void);
    type GetData = unsafe extern "C" fn(*const UvAsync) -> *mut c_void;
    type Init = unsafe extern "C" fn(*mut sys::uv_loop_s, *mut UvAsync, Callback) -> c_int;
    type Send = unsafe extern "C" fn(*mut UvAsync) -> c_int;
    type Reference = unsafe extern "C" fn(*mut UvAsync);
    type Close = unsafe extern "C" fn(*mut UvAsync, Option<Callback>);

    /// What is used of libuv, as it has been since its first stable release.
    struct Uv {
        handle_size: HandleSize,
        set_data: SetData,
        get_data: GetData,
        init: Init,
        send: Send,
        reference: Reference,
        unreference: Reference,
        close: Close,
    }

    /// `uv_handle_type`.
    const UV_ASYNC: c_int = 1;

    unsafe extern "C" {
        /// In every C library of a Unix.
        safe fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    }

    impl Uv {
        fn get() -> Option<&'static Self> {
            static UV: OnceLock<Option<Uv>> = OnceLock::new();
            UV.get_or_init(Self::find).as_ref()
        }

        fn find() -> Option<Self> {
            // `RTLD_DEFAULT`.
            let everywhere = if cfg!(target_vendor = "apple") {
                ptr::without_provenance_mut(-2_isize as usize)
            } else {
                ptr::null_mut()
            };
            let find = |name: &CStr| {
                let found = dlsym(everywhere, name.as_ptr());
                (!found.is_null()).then_some(found)
            };
            // SAFETY: the signatures are those of libuv's header.
            unsafe {
                Some(Self {
                    handle_size: std::mem::transmute::<*mut c_void, HandleSize>(find(
                        c"uv_handle_size",
                    )?),
                    set_data: std::mem::transmute::<*mut c_void, SetData>(find(
                        c"uv_handle_set_data",
                    )?),
                    get_data: std::mem::transmute::<*mut c_void, GetData>(find(
                        c"uv_handle_get_data",
                    )?),
                    init: std::mem::transmute::<*mut c_void, Init>(find(c"uv_async_init")?),
                    send: std::mem::transmute::<*mut c_void, Send>(find(c"uv_async_send")?),
                    reference: std::mem::transmute::<*mut c_void, Reference>(find(c"uv_ref")?),
                    unreference: std::mem::transmute::<*mut c_void, Reference>(find(c"uv_unref")?),
                    close: std::mem::transmute::<*mut c_void, Close>(find(c"uv_close")?),
                })
            }
        }
    }

    #[derive(Clone, Copy)]
    pub(super) struct Handle {
        uv: &'static Uv,
        raw: *mut UvAsync,
    }

    /// What the handle's data points to.
    struct Owner {
        handle: Handle,
        layout: Layout,
        env: sys::napi_env,
        context: sys::napi_async_context,
        hook: sys::napi_async_cleanup_hook_handle,
    }

    impl Handle {
        /// `None` where there is no libuv.
        pub(super) fn new(js: Js, resource: Val) -> JsResult<Option<Self>> {
            let Some(uv) = Uv::get() else {
                return Ok(None);
            };
            let refused = || js.throw_type_error("the event loop's handle could not be made");
            let name = js.string("wasm-molt")?;
            let mut context = ptr::null_mut();
            let mut event_loop = ptr::null_mut();
            // SAFETY: valid environment, values and out pointers; the size is libuv's own for this type,
            // and the memory is given back when the handle is closed, or here if it never was one.
            unsafe {
                if sys::napi_get_uv_event_loop(js.raw(), &raw mut event_loop)
                    != sys::Status::napi_ok
                {
                    return Err(refused());
                }
                let layout = Layout::from_size_align((uv.handle_size)(UV_ASYNC).max(1), 16)
                    .map_err(|_| refused())?;
                let raw: *mut UvAsync = alloc_zeroed(layout).cast();
                if raw.is_null() {
                    handle_alloc_error(layout);
                }
                if (uv.init)(event_loop, raw, awake) != 0 {
                    dealloc(raw.cast(), layout);
                    return Err(refused());
                }
                let handle = Self { uv, raw };
                let owner = Box::into_raw(Box::new(Owner {
                    handle,
                    layout,
                    env: js.raw(),
                    context: ptr::null_mut(),
                    hook: ptr::null_mut(),
                }));
                (uv.set_data)(raw, owner.cast());
                (uv.unreference)(raw);
                let prepared = sys::napi_async_init(js.raw(), resource, name, &raw mut context);
                (*owner).context = context;
                if prepared != sys::Status::napi_ok
                    || sys::napi_add_async_cleanup_hook(
                        js.raw(),
                        Some(clean_up),
                        owner.cast(),
                        &raw mut (*owner).hook,
                    ) != sys::Status::napi_ok
                {
                    (uv.close)(raw, Some(closed));
                    return Err(refused());
                }
                Ok(Some(handle))
            }
        }

        /// # Safety
        /// Not after the environment's cleanup hooks.
        pub(super) unsafe fn send(self) {
            // SAFETY: open, and made to be sent to from any thread.
            unsafe { (self.uv.send)(self.raw) };
        }

        pub(super) fn keep_alive(self, does: bool) {
            // SAFETY: open, and this is the loop's thread.
            unsafe {
                if does {
                    (self.uv.reference)(self.raw);
                } else {
                    (self.uv.unreference)(self.raw);
                }
            }
        }
    }

    /// The event loop was woken.
    unsafe extern "C" fn awake(raw: *mut UvAsync) {
        let Some(uv) = Uv::get() else { return };
        // SAFETY: the data of an open handle is its owner, and callbacks come on the JS thread.
        let (env, context) = unsafe {
            let owner: *mut Owner = (uv.get_data)(raw).cast();
            ((*owner).env, (*owner).context)
        };
        // SAFETY: the environment lives, its cleanup hooks have not run to their end.
        let js = unsafe { Js::new(env) };
        js.scoped(|| {
            let mut scope = ptr::null_mut();
            // SAFETY: valid environment and context; closed below, in order. With the scope microtasks
            // and `process.nextTick` run afterwards, as after any callback.
            let opened = unsafe {
                sys::napi_open_callback_scope(env, js.undefined(), context, &raw mut scope)
            };
            super::woken(env, false);
            if opened == sys::Status::napi_ok {
                // SAFETY: opened above.
                unsafe { sys::napi_close_callback_scope(env, scope) };
            }
        });
    }

    /// The environment goes; it waits until the hook is removed.
    unsafe extern "C" fn clean_up(_hook: sys::napi_async_cleanup_hook_handle, owner: *mut c_void) {
        let owner: *mut Owner = owner.cast();
        // SAFETY: registered with the owner, which `closed` drops; the inbox sends nothing any more,
        // because its hook was registered later and has run before.
        unsafe {
            sys::napi_async_destroy((*owner).env, (*owner).context);
            let handle = (*owner).handle;
            (handle.uv.close)(handle.raw, Some(closed));
        }
    }

    unsafe extern "C" fn closed(raw: *mut UvAsync) {
        let Some(uv) = Uv::get() else { return };
        // SAFETY: the last callback of this handle: its memory and its owner are ours again.
        unsafe {
            let owner: Box<Owner> = Box::from_raw((uv.get_data)(raw).cast());
            dealloc(raw.cast(), owner.layout);
            if !owner.hook.is_null() {
                sys::napi_remove_async_cleanup_hook(owner.hook);
            }
        }
    }
}
