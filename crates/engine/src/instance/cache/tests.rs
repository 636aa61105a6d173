//! What is taken for an entry, and what is not. Damage of every kind, through a manager: tests/it/cache.rs.

use wasmtime::{Instance, Store};

use super::*;
use crate::instance::engine;
use crate::instance::engine::EngineOptions;

/// A folder of this test alone, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("wasm-molt-entry-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn cache(&self) -> Cache {
        self.try_cache().unwrap()
    }

    fn try_cache(&self) -> Result<Cache, String> {
        Cache::open(&CacheChoice::Folder(self.0.clone())).map(Option::unwrap)
    }

    /// Of the cache itself.
    fn path(&self, name: &str) -> PathBuf {
        self.0.join("modules").join(name)
    }

    /// What is kept, without the key.
    fn entries(&self) -> Vec<PathBuf> {
        let all = fs::read_dir(self.path("")).unwrap();
        let mut paths: Vec<_> = all.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| !path.ends_with("key"));
        paths.sort();
        paths
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn engine() -> Engine {
    let shared = engine::Engine::shared(&EngineOptions::default(), 512 << 10, &CacheChoice::Off);
    shared.unwrap().wasmtime
}

fn module(cache: &Cache, engine: &Engine, wasm: &[u8]) -> wasmtime::Result<Module> {
    cache.module(engine, wasm, || Module::new(engine, wasm))
}

fn constant(value: i32) -> Vec<u8> {
    let text = format!(r#"(module (func (export "f") (result i32) (i32.const {value})))"#);
    wat::parse_str(text).unwrap()
}

fn answer(module: &Module) -> i32 {
    let mut store = Store::new(module.engine(), ());
    let instance = Instance::new(&mut store, module, &[]).unwrap();
    let f = instance.get_typed_func::<(), i32>(&mut store, "f").unwrap();
    f.call(&mut store, ()).unwrap()
}

#[test]
fn what_this_user_has_kept_is_what_runs() {
    let folder = Folder::new("hit");
    let (engine, cache) = (engine(), folder.cache());
    let wasm = constant(1);
    assert_eq!(answer(&module(&cache, &engine, &wasm).unwrap()), 1);
    // Only whoever has the key can make it say something else, and so it is seen that the entry was read.
    let other = Module::new(&engine, constant(2)).unwrap();
    cache
        .keep(&name_of(&engine, &wasm), &other.serialize().unwrap())
        .unwrap();
    assert_eq!(answer(&module(&cache, &engine, &wasm).unwrap()), 2);
    // Another process of this user has the same key.
    assert_eq!(answer(&module(&folder.cache(), &engine, &wasm).unwrap()), 2);
}

#[test]
fn an_entry_speaks_for_one_module_and_one_engine_only() {
    let folder = Folder::new("name");
    let (engine, cache) = (engine(), folder.cache());
    for value in [1, 2] {
        module(&cache, &engine, &constant(value)).unwrap();
    }
    let names = [1, 2].map(|value| cache.path_of(&name_of(&engine, &constant(value))));
    assert_eq!(folder.entries().len(), 2);
    // A whole and well-sealed entry of this user's, under the name of another module.
    fs::copy(&names[1], &names[0]).unwrap();
    assert!(
        cache
            .find(&engine, &name_of(&engine, &constant(1)))
            .is_none()
    );
    assert_eq!(answer(&module(&cache, &engine, &constant(1)).unwrap()), 1);

    let options = EngineOptions {
        fuel: true,
        ..EngineOptions::default()
    };
    let shared = engine::Engine::shared(&options, 512 << 10, &CacheChoice::Off);
    let counting = shared.unwrap().wasmtime;
    let name = name_of(&counting, &constant(1));
    assert_ne!(name, name_of(&engine, &constant(1)));
    fs::copy(&names[0], cache.path_of(&name)).unwrap();
    assert!(cache.find(&counting, &name).is_none());
}

#[test]
fn another_key_opens_nothing() {
    let (mine, theirs) = (Folder::new("mine"), Folder::new("theirs"));
    let (engine, cache) = (engine(), mine.cache());
    let wasm = constant(1);
    let name = name_of(&engine, &wasm);
    module(&theirs.cache(), &engine, &wasm).unwrap();
    let planted = fs::read(theirs.cache().path_of(&name)).unwrap();
    fs::write(cache.path_of(&name), &planted).unwrap();
    assert!(cache.find(&engine, &name).is_none());
    assert_eq!(answer(&module(&cache, &engine, &wasm).unwrap()), 1);
    assert_ne!(fs::read(cache.path_of(&name)).unwrap(), planted);
    assert!(cache.find(&engine, &name).is_some());
}

#[test]
fn a_key_that_is_damaged_or_was_changed_is_a_new_one() {
    let folder = Folder::new("key");
    let (engine, wasm) = (engine(), constant(1));
    let name = name_of(&engine, &wasm);
    module(&folder.cache(), &engine, &wasm).unwrap();
    let key = folder.path("key");
    for damage in [&b"short"[..], &[0; 31], &[7; 33], &[9; 32], b""] {
        fs::write(&key, damage).unwrap();
        let cache = folder.cache();
        assert!(cache.find(&engine, &name).is_none(), "{damage:?}");
        assert_eq!(answer(&module(&cache, &engine, &wasm).unwrap()), 1);
        assert!(folder.cache().find(&engine, &name).is_some(), "{damage:?}");
        assert_eq!(fs::metadata(&key).unwrap().len(), KEY_BYTES as u64);
    }
}

#[test]
fn what_is_too_much_goes_oldest_first_and_nothing_else_does() {
    let folder = Folder::new("prune");
    let (engine, cache) = (engine(), folder.cache());
    for value in 0..8 {
        module(&cache, &engine, &constant(value)).unwrap();
    }
    let old = SystemTime::now() - 10 * READ_AGAIN;
    let path = |value| cache.path_of(&name_of(&engine, &constant(value)));
    for value in 0..8 {
        let file = File::options().write(true).open(path(value)).unwrap();
        file.set_modified(old + Duration::from_secs(value as u64))
            .unwrap();
    }
    let abandoned = path(7).with_extension("abcdef");
    let stranger = folder.path("notes.txt");
    for path in [&abandoned, &stranger] {
        fs::write(path, "unfinished").unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.set_modified(old).unwrap();
    }
    // The oldest is in use.
    assert!(
        cache
            .find(&engine, &name_of(&engine, &constant(0)))
            .is_some()
    );
    prune(&cache.folder, u64::MAX, 8).unwrap();
    assert!(!abandoned.exists(), "what was never finished stays");
    assert_eq!(folder.entries().len(), 9, "there was room");
    prune(&cache.folder, u64::MAX, 4).unwrap();
    let left: Vec<_> = (0..8).filter(|value| path(*value).exists()).collect();
    assert_eq!(left, [0, 6, 7]);
    prune(&cache.folder, 1, usize::MAX).unwrap();
    assert_eq!(folder.entries(), [stranger]);
    assert!(folder.path("key").exists());
}

#[cfg(unix)]
mod on_unix {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn everything_is_this_users_alone() {
        let folder = Folder::new("alone");
        module(&folder.cache(), &engine(), &constant(1)).unwrap();
        let mut paths = folder.entries();
        paths.extend([folder.path("key"), folder.path("")]);
        for path in paths {
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o077, 0, "{path:?}");
        }
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused_by_name() {
        let folder = Folder::new("open");
        drop(folder.cache());
        for mode in [0o770, 0o707, 0o777, 0o1777] {
            set_mode(&folder.path(""), mode);
            let why = folder.try_cache().unwrap_err();
            assert!(why.contains("is open to others"), "{why}");
            assert!(why.contains(&*folder.0.to_string_lossy()), "{why}");
        }
        set_mode(&folder.path(""), 0o755);
        drop(folder.cache());
    }

    #[test]
    fn a_link_in_the_place_of_the_folder_is_refused() {
        let (folder, other) = (Folder::new("link"), Folder::new("behind"));
        drop(other.cache());
        symlink(other.path(""), folder.0.join("modules")).unwrap();
        let why = folder.try_cache().unwrap_err();
        assert!(why.contains("is a link"), "{why}");
    }

    #[test]
    fn a_key_that_others_can_read_is_none() {
        let folder = Folder::new("readable");
        let (engine, name) = (engine(), name_of(&engine(), &constant(1)));
        module(&folder.cache(), &engine, &constant(1)).unwrap();
        set_mode(&folder.path("key"), 0o644);
        assert!(folder.cache().find(&engine, &name).is_none());
        assert_eq!(fs::metadata(folder.path("key")).unwrap().mode() & 0o077, 0);
    }

    #[test]
    fn only_a_plain_file_that_is_this_users_alone_is_an_entry() {
        let folder = Folder::new("kind");
        let (engine, cache) = (engine(), folder.cache());
        let name = name_of(&engine, &constant(1));
        module(&cache, &engine, &constant(1)).unwrap();
        let path = cache.path_of(&name);
        let kept = folder.path("kept");
        fs::rename(&path, &kept).unwrap();
        let found = || cache.find(&engine, &name).is_some();

        fs::copy(&kept, &path).unwrap();
        assert!(found());
        for mode in [0o620, 0o602, 0o666] {
            set_mode(&path, mode);
            assert!(!found(), "{mode:o}");
        }
        fs::remove_file(&path).unwrap();

        // Even to a good one.
        symlink(&kept, &path).unwrap();
        assert!(!found());
        fs::remove_file(&path).unwrap();

        fs::create_dir(&path).unwrap();
        assert!(!found());
        // It cannot be put right either, and the module runs all the same.
        assert_eq!(answer(&module(&cache, &engine, &constant(1)).unwrap()), 1);
        fs::remove_dir(&path).unwrap();

        // Reading one with nobody at the other end would wait for ever.
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        assert!(!found());
        assert_eq!(answer(&module(&cache, &engine, &constant(1)).unwrap()), 1);
        assert!(found());
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
        // Only root can give files away.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = Folder::new("owner");
        let (engine, cache) = (engine(), folder.cache());
        let name = name_of(&engine, &constant(1));
        module(&cache, &engine, &constant(1)).unwrap();
        let give = |path: &Path| std::os::unix::fs::chown(path, Some(12345), None).unwrap();
        give(&cache.path_of(&name));
        assert!(cache.find(&engine, &name).is_none());
        assert_eq!(answer(&module(&cache, &engine, &constant(1)).unwrap()), 1);
        assert!(cache.find(&engine, &name).is_some());
        give(&folder.path(""));
        let why = folder.try_cache().unwrap_err();
        assert!(why.contains("belongs to user 12345"), "{why}");
    }
}
