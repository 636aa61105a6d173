//! `memory.buffer`: one `ArrayBuffer` over the live pages, until they move or change in number.
//!
//! The buffer pins the address range, so a view that outlives its instance (transferred away, kept by
//! mistake) reads zeros at worst. Only what has been moved out of a buffer can outlive the environment,
//! in another worker, and its address range is then never given back. It is made once and kept: each new one would count its whole length
//! as fresh external memory in V8.

use std::cell::{Cell, RefCell};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use napi::sys;
use wasm_molt_engine::{MemoryRecord, OutOfBounds, Pin};

use crate::env::EnvState;
use crate::js::{Js, JsResult, Val};

/// The `ArrayBuffer` that JavaScript has of one memory.
pub(crate) struct View {
    buffer: Cell<sys::napi_ref>,
    base: Cell<*mut u8>,
    len: Cell<usize>,
    /// The buffer's, to be told when nobody can read through it any more.
    pin: RefCell<Weak<Pin>>,
    /// JavaScript has moved the bytes to another buffer, perhaps in another worker: their address range
    /// must not go with this environment.
    is_moved: RefCell<Arc<AtomicBool>>,
}

impl Default for View {
    fn default() -> Self {
        Self {
            buffer: Cell::new(ptr::null_mut()),
            base: Cell::new(ptr::null_mut()),
            len: Cell::new(0),
            pin: RefCell::default(),
            is_moved: RefCell::default(),
        }
    }
}

impl View {
    #[inline]
    pub(crate) fn is_live(&self) -> bool {
        !self.buffer.get().is_null()
    }

    /// Detaches the buffer if the memory has grown or moved since it was made.
    #[inline]
    pub(crate) fn check(&self, js: Js, memory: &MemoryRecord) {
        if memory.byte_len() != self.len.get() || memory.base() != self.base.get() {
            self.detach(js);
        }
    }

    /// The buffer of this moment; a `Uint8Array` where it is only a copy, which must not be kept.
    pub(crate) fn buffer(&self, js: Js, memory: &MemoryRecord) -> JsResult<Val> {
        if self.is_live() {
            self.check(js, memory);
        }
        if self.is_live()
            && let Some(buffer) = js.dereference(self.buffer.get())
        {
            if !js.is_detached(buffer) {
                return Ok(buffer);
            }
            // JavaScript has moved it away; the pages are still there for a new one.
            self.detach(js);
        }
        let Some(view) = memory.view() else {
            return js.buffer(0);
        };
        if view.byte_length == 0 {
            return js.buffer(0);
        }
        let (base, len) = (view.base, view.byte_length);
        let is_moved = Arc::default();
        let pin = Arc::downgrade(&view.pin);
        let pin_of_object = Arc::clone(&view.pin);
        match js.external_buffer(base, len, view.pin, Arc::clone(&is_moved))? {
            Some(buffer) => {
                // Detaching lets go of the bytes at once, and native code that was given them (zlib) may
                // still be at work: it holds the object.
                if js.can_run() {
                    js.keep_with(buffer, pin_of_object)?;
                }
                EnvState::of(js)?.look_out()?;
                *self.is_moved.borrow_mut() = is_moved;
                *self.pin.borrow_mut() = pin;
                self.buffer.set(js.reference(buffer)?);
                self.base.set(base);
                self.len.set(len);
                Ok(buffer)
            }
            // Electron and its like: a copy of this moment is the best there is.
            None => copy(js, memory, len),
        }
    }

    /// Only JavaScript detaches a buffer that is still in use here. Of one that is collected nobody can tell: its
    /// bytes may live on in another.
    pub(crate) fn look_whether_moved(&self, js: Js) {
        if !self.is_live() {
            return;
        }
        js.scoped(|| {
            let buffer = js.dereference(self.buffer.get());
            if buffer.is_none_or(|buffer| js.is_detached(buffer)) {
                self.is_moved.borrow().store(true, Ordering::Relaxed);
            }
        });
    }

    /// Whether the memory has become larger since, in the same place.
    pub(crate) fn is_outgrown(&self, memory: &MemoryRecord) -> bool {
        self.is_live() && memory.byte_len() > self.len.get() && memory.base() == self.base.get()
    }

    /// Goes on showing what it shows, beside a larger one, for as long as JavaScript holds the buffer. For
    /// shared memories, whose old buffers stay as they are.
    pub(crate) fn retire(&self, js: Js) -> JsResult<Option<Self>> {
        let reference = self.buffer.replace(ptr::null_mut());
        let weak = match js.dereference(reference) {
            Some(buffer) => Some(js.weak_reference(buffer)?),
            None => None,
        };
        js.unreference(reference);
        Ok(weak.map(|weak| Self {
            buffer: Cell::new(weak),
            base: Cell::new(self.base.get()),
            len: Cell::new(self.len.get()),
            pin: RefCell::new(self.pin.take()),
            is_moved: RefCell::new(self.is_moved.take()),
        }))
    }

    /// Whether JavaScript has let go of a retired one.
    pub(crate) fn is_collected(&self, js: Js) -> bool {
        js.scoped(|| js.dereference(self.buffer.get()).is_none())
    }

    /// Lets go of the buffer as it is: it reads zeros in the end, and its address range stays for as long as JavaScript
    /// holds it.
    pub(crate) fn release(&self, js: Js) {
        let reference = self.buffer.replace(ptr::null_mut());
        if !reference.is_null() {
            js.unreference(reference);
        }
    }

    pub(crate) fn detach(&self, js: Js) {
        self.look_whether_moved(js);
        if !self.is_live() {
            return;
        }
        if !js.scoped(|| js.can_run()) {
            // Tried again later, or never, and then nobody looks whether it is moved. The pin keeps it harmless.
            self.is_moved.borrow().store(true, Ordering::Relaxed);
            return;
        }
        let reference = self.buffer.replace(ptr::null_mut());
        let pin = self.pin.take().upgrade();
        // A scope of its own: this also runs where no JavaScript is on the stack.
        js.scoped(|| {
            // One that is detached already was moved: its bytes are read through another.
            if let Some(buffer) = js.dereference(reference)
                && !js.is_detached(buffer)
            {
                js.detach(buffer);
                if !js.is_detached(buffer) {
                    // Native code is at work on it (Bun). JavaScript can still move it later, when nobody looks.
                    self.is_moved.borrow().store(true, Ordering::Relaxed);
                } else if let Some(pin) = pin {
                    pin.harmless();
                }
            }
        });
        js.unreference(reference);
    }
}

fn copy(js: Js, memory: &MemoryRecord, len: usize) -> JsResult<Val> {
    js.new_uint8_array(len, |bytes| {
        memory.read(0, bytes).map_err(|e| out_of_bounds(js, &e))
    })
}

/// `read`, `readString` and `write` throw a `RangeError`.
pub(crate) fn out_of_bounds(js: Js, error: &OutOfBounds) -> crate::js::Pending {
    js.throw_range_error(&error.to_string())
}
