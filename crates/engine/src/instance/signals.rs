//! Signal handlers that others in the process install.
//!
//! wasmtime installs its handlers with the first engine, over those that are there, and hands on to them what is no trap
//! of a guest. Whoever installs one *after* that is asked first, and takes every trap for a crash unless he hands it on.
//! So wherever an instance is made the handlers are looked at, and where the first is not ours, one of ours is put before
//! it: traps go to wasmtime, and what is none goes to the other as if there were no guests.
//!
//! wasmtime cannot be asked whose a fault is, but only hands on what is no trap. Therefore it finds a handler of ours when
//! it installs its own ([`last`]), which knows on whose behalf wasmtime was asked.
//!
//! Unsafe because it speaks to the system, in handlers as well; those take no lock and allocate nothing.

use crate::error::{Error, ErrorCode};

#[cfg(unix)]
pub(crate) use unix::{stay_first, with_engine};

/// Elsewhere a trap is no signal.
#[cfg(not(unix))]
pub(crate) fn with_engine<T>(make: impl FnOnce() -> T) -> T {
    make()
}

#[cfg(not(unix))]
pub(crate) fn stay_first() -> crate::error::Result<()> {
    Ok(())
}

fn too_many(signal: &str) -> Error {
    Error::new(
        ErrorCode::InvalidArgument,
        format!(
            "{MOST} handlers for {signal} were installed over those of guests by others in this process; load what \
             installs them before wasm-molt, or set engine.signalsBasedTraps to false"
        ),
    )
}

/// How often somebody else may come first.
const MOST: usize = 4;

#[cfg(unix)]
mod unix {
    use std::cell::{Cell, UnsafeCell};
    use std::ffi::{c_int, c_void};
    use std::mem::MaybeUninit;
    use std::ptr;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Mutex, PoisonError};

    use super::{MOST, too_many};
    use crate::error::Result;

    type Action = libc::sigaction;
    type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

    /// Those that wasmtime handles on this system.
    const SIGNALS: &[(c_int, &str)] = &[
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGILL, "SIGILL"),
        #[cfg(any(target_arch = "x86_64", target_arch = "s390x"))]
        (libc::SIGFPE, "SIGFPE"),
        #[cfg(any(target_vendor = "apple", target_os = "freebsd"))]
        (libc::SIGBUS, "SIGBUS"),
    ];

    /// An action that handlers read, which is written before the handler that reads it is installed, and never again.
    struct Place {
        action: UnsafeCell<MaybeUninit<Action>>,
        /// It was installed for one signal only (`SA_RESETHAND`), which has come.
        is_spent: AtomicBool,
    }

    // SAFETY: written once, under the lock, before anybody can read it.
    unsafe impl Sync for Place {}

    impl Place {
        const fn empty() -> Self {
            Self {
                action: UnsafeCell::new(MaybeUninit::uninit()),
                is_spent: AtomicBool::new(false),
            }
        }

        /// # Safety
        /// Under the lock, and before the handler that reads it is installed.
        unsafe fn put(&self, action: Action) {
            // SAFETY: contract of this function: nobody reads it yet.
            unsafe { (*self.action.get()).write(action) };
        }

        /// # Safety
        /// It was put.
        unsafe fn get(&self) -> Action {
            // SAFETY: contract of this function; not written any more.
            unsafe { (*self.action.get()).assume_init() }
        }
    }

    struct Places {
        /// What was there before wasmtime.
        original: Place,
        engine: Place,
        /// What has come after it, each with one of ours before it.
        others: [Place; MOST],
    }

    static PLACES: [Places; SIGNALS.len()] = [const {
        Places {
            original: Place::empty(),
            engine: Place::empty(),
            others: [const { Place::empty() }; MOST],
        }
    }; SIGNALS.len()];

    /// Handlers in the order of `Places::others`.
    const FIRST: [Handler; MOST] = [first::<0>, first::<1>, first::<2>, first::<3>];

    struct Installed {
        is: bool,
        /// How many of `Places::others` there are.
        others: [usize; SIGNALS.len()],
    }

    static INSTALLED: Mutex<Installed> = Mutex::new(Installed {
        is: false,
        others: [0; SIGNALS.len()],
    });

    thread_local! {
        /// Whom wasmtime is asked on behalf of: one more than his number, or 0 if it was asked by the system.
        static BEHALF: Cell<usize> = const { Cell::new(0) };
    }

    fn present(signal: c_int) -> Action {
        // Zeros are the system's own; it only refuses to tell of signals that there are not.
        let mut action = MaybeUninit::<Action>::zeroed();
        // SAFETY: valid out pointer; nothing is installed. Zeros are a valid action, too.
        unsafe {
            libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
            action.assume_init()
        }
    }

    fn install(signal: c_int, handler: Handler) {
        // SAFETY: all zeros is a valid action, with an empty mask.
        let mut action: Action = unsafe { MaybeUninit::zeroed().assume_init() };
        // As wasmtime's own: on the other stack, because this one may be used up, and again while it runs.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        action.sa_sigaction = handler as usize;
        // SAFETY: a handler of that signature.
        unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    }

    /// Makes an engine, which may be the first that has handlers.
    pub(crate) fn with_engine<T>(make: impl FnOnce() -> T) -> T {
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if installed.is {
            return make();
        }
        for ((signal, _), places) in SIGNALS.iter().zip(&PLACES) {
            // SAFETY: under the lock; `last` is installed below.
            unsafe { places.original.put(present(*signal)) };
            install(*signal, last);
        }
        let engine = make();
        installed.is = true;
        for ((signal, _), places) in SIGNALS.iter().zip(&PLACES) {
            let action = present(*signal);
            if action.sa_sigaction == last as Handler as usize {
                // It has failed before it came to that.
                installed.is = false;
                // SAFETY: put above.
                unsafe {
                    let original = places.original.get();
                    libc::sigaction(*signal, &raw const original, ptr::null_mut());
                }
            } else {
                // SAFETY: under the lock; nothing of `FIRST` is installed yet.
                unsafe { places.engine.put(action) };
            }
        }
        engine
    }

    /// Sees to it that traps come to wasmtime.
    ///
    /// # Errors
    /// If others have come first again and again.
    pub(crate) fn stay_first() -> Result<()> {
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !installed.is {
            return Ok(());
        }
        for (index, ((signal, name), places)) in SIGNALS.iter().zip(&PLACES).enumerate() {
            let action = present(*signal);
            // SAFETY: put by `with_engine`.
            let engine = unsafe { places.engine.get() }.sa_sigaction;
            let is_ours = |handler: usize| {
                handler == engine || FIRST.iter().any(|ours| *ours as usize == handler)
            };
            if is_ours(action.sa_sigaction) {
                continue;
            }
            let next = installed.others[index];
            let Some(place) = places.others.get(next) else {
                return Err(too_many(name));
            };
            // SAFETY: under the lock; `FIRST[next]` is installed below, and only here.
            unsafe { place.put(action) };
            installed.others[index] = next + 1;
            install(*signal, FIRST[next]);
        }
        Ok(())
    }

    fn places(signal: c_int) -> Option<&'static Places> {
        let index = SIGNALS.iter().position(|(number, _)| *number == signal)?;
        PLACES.get(index)
    }

    /// Before somebody who has come after wasmtime: asks wasmtime on his behalf.
    extern "C" fn first<const N: usize>(
        signal: c_int,
        info: *mut libc::siginfo_t,
        context: *mut c_void,
    ) {
        let Some(places) = places(signal) else {
            return;
        };
        BEHALF.set(N + 1);
        // SAFETY: put before this was installed; the arguments are the system's.
        unsafe { hand_on(&places.engine, signal, info, context) };
        BEHALF.set(0);
    }

    /// Behind wasmtime: what comes here is no trap of a guest.
    extern "C" fn last(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let Some(places) = places(signal) else {
            return;
        };
        // He may hand it on himself, and then it is nobody's any more.
        let place = match BEHALF.replace(0) {
            0 => &places.original,
            one_more => &places.others[one_more - 1],
        };
        // SAFETY: put before what leads here was installed; the arguments are the system's.
        unsafe { hand_on(place, signal, info, context) };
    }

    /// As the system would have called it.
    ///
    /// # Safety
    /// It was put, and the arguments are those of a handler.
    unsafe fn hand_on(
        place: &Place,
        signal: c_int,
        info: *mut libc::siginfo_t,
        context: *mut c_void,
    ) {
        // SAFETY: contract of this function.
        let mut action = unsafe { place.get() };
        if action.sa_flags & libc::SA_RESETHAND != 0 && place.is_spent.swap(true, Ordering::Relaxed)
        {
            action.sa_sigaction = libc::SIG_DFL;
        }
        match action.sa_sigaction {
            // The instruction is run again, and the system does what it does where there is no handler.
            libc::SIG_DFL | libc::SIG_IGN => {
                action.sa_sigaction = libc::SIG_DFL;
                action.sa_flags = 0;
                // SAFETY: a valid action.
                unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
            }
            handler if action.sa_flags & libc::SA_SIGINFO != 0 => {
                // SAFETY: installed as a handler of this signature.
                let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
                handler(signal, info, context);
            }
            handler => {
                // SAFETY: installed as a handler of this signature.
                let handler =
                    unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
                handler(signal);
            }
        }
    }
}
