//! Folders that end with their test.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use wasm_molt_engine::Source;

/// A folder of this test alone, removed at its end.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// An empty one. `name` is for whoever finds it.
    #[track_caller]
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("wasm-molt-{name}-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        match fs::create_dir_all(&path) {
            Ok(()) => Self(path),
            Err(error) => panic!("no folder {}: {error}", path.display()),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A module in a file.
    #[track_caller]
    pub fn file(&self, name: &str, content: &[u8]) -> Source {
        let path = self.0.join(name);
        match fs::write(&path, content) {
            Ok(()) => Source::File(path),
            Err(error) => panic!("no file {}: {error}", path.display()),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}
