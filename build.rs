//! Lets the linker leave Node-API symbols to the host process.

fn main() {
    napi_build::setup();
}
