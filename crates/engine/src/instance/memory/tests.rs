//! Whole memories under wasmtime: on this system's platform, and on the portable one.

mod image;
mod interrupt;
mod lifetime;
mod size;

use wasmtime::{Config, Engine, Instance, Module, Store, TypedFunc, WasmParams, WasmResults};

use super::host::{Created, configure_for};
use super::region::Platform;
use super::{MemoryOptions, MemoryPlan, MemoryRecord, with_plan};

const SMALL: MemoryOptions = MemoryOptions {
    reservation_bytes: 1 << 20,
    signals_based_traps: true,
};

/// An engine with our memories and everything that the tests' guests use.
fn engine(platform: Platform, options: &MemoryOptions) -> Engine {
    let mut config = Config::new();
    config
        .shared_memory(true)
        .wasm_multi_memory(true)
        .wasm_memory64(true)
        .wasm_tail_call(true);
    config.wasm_custom_page_sizes(true);
    configure_for(platform, &mut config, options);
    Engine::new(&config).unwrap()
}

/// An instance and what was made for it. `polls` says whether the module was instrumented.
struct Guest {
    store: Store<()>,
    instance: Instance,
    created: Created,
}

impl Guest {
    fn new(engine: &Engine, wat: &str) -> Self {
        Self::with_bytes(engine, &wat::parse_str(wat).unwrap(), false, &[])
    }

    fn with_bytes(engine: &Engine, wasm: &[u8], poll: bool, imports: &[wasmtime::Extern]) -> Self {
        let plan = MemoryPlan {
            poll,
            ..MemoryPlan::default()
        };
        Self::with_plan(engine, wasm, imports, plan)
    }

    /// The plan's number of guests is filled in.
    fn with_plan(
        engine: &Engine,
        wasm: &[u8],
        imports: &[wasmtime::Extern],
        plan: MemoryPlan,
    ) -> Self {
        let poll = plan.poll;
        let mut store = Store::new(engine, ());
        let module = Module::new(engine, wasm).unwrap();
        let guests = module.resources_required().num_memories as usize - usize::from(poll);
        let plan = MemoryPlan { guests, ..plan };
        let (instance, created) = with_plan(plan, || Instance::new(&mut store, &module, imports));
        let instance = instance.unwrap();
        assert_eq!(created.guests.len(), guests);
        assert_eq!(created.poll.is_some(), poll);
        Self {
            store,
            instance,
            created,
        }
    }

    fn memory(&self) -> &MemoryRecord {
        &self.created.guests[0]
    }

    fn func<P: WasmParams, R: WasmResults>(&mut self, name: &str) -> TypedFunc<P, R> {
        self.instance.get_typed_func(&mut self.store, name).unwrap()
    }

    fn call<P: WasmParams, R: WasmResults>(
        &mut self,
        name: &str,
        params: P,
    ) -> wasmtime::Result<R> {
        self.func::<P, R>(name).call(&mut self.store, params)
    }
}

fn module(engine: &Engine, wat: &str) -> Module {
    Module::new(engine, wat::parse_str(wat).unwrap()).unwrap()
}

fn is_out_of_bounds(error: &wasmtime::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(wasmtime::Trap::MemoryOutOfBounds)
    )
}

/// Peek, poke, grow and size over one memory of that type.
fn accessors(ty: &str) -> String {
    let index = if ty.starts_with("i64") { "i64" } else { "i32" };
    format!(
        r#"(module
            (memory (export "memory") {ty})
            (func (export "peek") (param {index}) (result i32) (i32.load8_u (local.get 0)))
            (func (export "poke") (param {index} i32) (i32.store8 (local.get 0) (local.get 1)))
            (func (export "grow") (param {index}) (result {index}) (memory.grow (local.get 0)))
            (func (export "size") (result {index}) (memory.size)))"#
    )
}
