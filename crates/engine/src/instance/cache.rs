//! Compiled code between processes.
//!
//! What an entry holds is machine code, and the engine runs it as it is: that is the one `unsafe` here. So an entry
//! is taken only if this user has written it (a keyed hash, whose key only this user can read, over what it was
//! compiled from and what it was compiled to), in a folder and a file that nobody else can write to. Whatever is
//! cut off, damaged, of another version, of another module or planted is compiled again, and overwritten.
//!
//! The bytes are read once and checked as they lie in memory; what happens to the file afterwards does not matter.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use blake3::Hash as Digest;
use wasmtime::{Engine, Module};

use crate::instance::engine::CacheChoice;

/// Goes up with whatever changes what an entry holds.
const FORMAT: &str = "wasm-molt compiled module, format 1";
const KEY_BYTES: usize = 32;
const DIGEST_BYTES: usize = blake3::OUT_LEN;
/// Entries are removed, those first that nobody has read for longest, above either of these.
const MOST_BYTES: u64 = 512 << 20;
const MOST_ENTRIES: usize = 4096;
/// One write in so many looks whether there are too many.
const PRUNE_EVERY: u8 = 16;
/// How exactly it is known when an entry was read last.
const READ_AGAIN: Duration = Duration::from_secs(24 * 60 * 60);
/// A half-written entry that is older has nobody who writes on.
const ABANDONED: Duration = Duration::from_secs(60 * 60);

/// A folder of compiled modules.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    key: [u8; KEY_BYTES],
}

impl Cache {
    /// The cache of that choice; `None` where there is to be none, or the user's own cannot be used.
    ///
    /// # Errors
    /// Why a folder that was named cannot be used.
    pub(crate) fn open(choice: &CacheChoice) -> Result<Option<Self>, String> {
        match choice {
            CacheChoice::Off => Ok(None),
            // A machine without a usable home folder must still be able to run modules.
            CacheChoice::User => {
                Ok(user_folder().and_then(|user| Self::in_folder(user.join("modules")).ok()))
            }
            // A folder of its own in it: the named one may have other files, and be open to others.
            CacheChoice::Folder(named) => {
                let folder = std::path::absolute(named).unwrap_or_else(|_| named.clone());
                Self::in_folder(folder.join("modules")).map(Some)
            }
        }
    }

    fn in_folder(folder: PathBuf) -> Result<Self, String> {
        let shown = folder.display();
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        owner::keep_to_ourselves(&mut builder);
        builder
            .create(&folder)
            .map_err(|e| format!("the cache folder '{shown}' cannot be made: {e}"))?;
        let found = fs::symlink_metadata(&folder)
            .map_err(|e| format!("the cache folder '{shown}' cannot be looked at: {e}"))?;
        if !found.is_dir() {
            return Err(format!(
                "the cache folder '{shown}' is a link, not a folder"
            ));
        }
        if let Some(why) = owner::distrust(&found, 0o022) {
            return Err(format!(
                "the cache folder '{shown}' {why}, who could have code of theirs run"
            ));
        }
        let key = key(&folder)
            .map_err(|e| format!("the cache folder '{shown}' has no key and gets none: {e}"))?;
        Ok(Self { folder, key })
    }

    /// The module of these bytes, out of its entry if that can be trusted, else compiled and kept.
    ///
    /// # Errors
    /// What the compiler says.
    pub(crate) fn module(
        &self,
        engine: &Engine,
        bytes: &[u8],
        compile: impl FnOnce() -> wasmtime::Result<Module>,
    ) -> wasmtime::Result<Module> {
        let name = name_of(engine, bytes);
        if let Some(module) = self.find(engine, &name) {
            return Ok(module);
        }
        let module = compile()?;
        // Read-only, full, or no file: compiled again each time.
        if let Ok(code) = module.serialize() {
            let _ = self.keep(&name, &code);
        }
        Ok(module)
    }

    fn find(&self, engine: &Engine, name: &Digest) -> Option<Module> {
        let path = self.path_of(name);
        let (file, bytes) = read_own(&path, 0o022, MOST_BYTES).ok()?;
        let (digest, code) = bytes.split_at_checked(DIGEST_BYTES)?;
        // Compared in constant time.
        if self.seal(name, code) != *digest {
            return None;
        }
        // SAFETY: `code` is what `Module::serialize` has given to `keep`, for an engine with these very settings and of
        // this version: the hash is over both and `name`, which is over the settings and the version, and its key is
        // only this user's. It is checked in our own memory, and nothing else is read.
        let module = unsafe { Module::deserialize(engine, code) }.ok()?;
        note_read(&file);
        Some(module)
    }

    fn keep(&self, name: &Digest, code: &[u8]) -> io::Result<()> {
        if (DIGEST_BYTES + code.len()) as u64 > MOST_BYTES {
            return Ok(());
        }
        let digest = self.seal(name, code);
        write_own(&self.path_of(name), &[digest.as_bytes(), code])?;
        if name.as_bytes()[0].is_multiple_of(PRUNE_EVERY) {
            prune(&self.folder, MOST_BYTES, MOST_ENTRIES)?;
        }
        Ok(())
    }

    fn path_of(&self, name: &Digest) -> PathBuf {
        self.folder.join(name.to_hex().as_str())
    }

    /// What only this user can make for that name and that content.
    fn seal(&self, name: &Digest, code: &[u8]) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(name.as_bytes()).update(code);
        hasher.finalize()
    }
}

/// Stands for what is compiled, and for everything that decides what comes out.
fn name_of(engine: &Engine, bytes: &[u8]) -> Digest {
    struct Settings(blake3::Hasher);
    impl Hasher for Settings {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }

        /// Whoever hashes into it takes the whole.
        fn finish(&self) -> u64 {
            0
        }
    }
    let mut settings = Settings(blake3::Hasher::new_derive_key(FORMAT));
    env!("CARGO_PKG_VERSION").hash(&mut settings);
    engine.precompile_compatibility_hash().hash(&mut settings);
    bytes.hash(&mut settings);
    settings.0.finalize()
}

/// The user's cache folder, as `lib/glue/conversions.js` finds it.
fn user_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let folder = if cfg!(windows) {
        PathBuf::from(variable("LOCALAPPDATA")?)
    } else if let Some(folder) = variable("XDG_CACHE_HOME") {
        PathBuf::from(folder)
    } else {
        let home = std::env::home_dir()?;
        home.join(if cfg!(target_os = "macos") {
            "Library/Caches"
        } else {
            ".cache"
        })
    };
    // What is relative would be another one wherever the process is started.
    folder.is_absolute().then(|| folder.join("wasm-molt"))
}

/// The key of a folder, made where there is none.
fn key(folder: &Path) -> io::Result<[u8; KEY_BYTES]> {
    // Where files have no owner that we could look at, what keeps others out is the user's own folder.
    let folder = if cfg!(unix) {
        folder.to_path_buf()
    } else {
        user_folder().unwrap_or_else(|| folder.to_path_buf())
    };
    let path = folder.join("key");
    // One that others can read is none.
    let read = || {
        let (_, bytes) = read_own(&path, 0o077, KEY_BYTES as u64)?;
        <[u8; KEY_BYTES]>::try_from(bytes).map_err(|_| io::Error::other("the key is cut off"))
    };
    if let Ok(key) = read() {
        return Ok(key);
    }
    fs::create_dir_all(&folder)?;
    let mut fresh = [0; KEY_BYTES];
    getrandom::fill(&mut fresh).map_err(io::Error::other)?;
    write_own(&path, &[&fresh])?;
    // Another process may have been later: what it has put there is what counts.
    read()
}

/// The content of a file that only this user can have written.
///
/// * `forbidden`: what others must not be allowed.
fn read_own(path: &Path, forbidden: u32, most_bytes: u64) -> io::Result<(File, Vec<u8>)> {
    let mut options = OpenOptions::new();
    options.read(true);
    owner::open_only_files(&mut options);
    let mut file = options.open(path)?;
    // Of what was opened, not of what has that name by now.
    let found = file.metadata()?;
    if !found.is_file() || found.len() > most_bytes {
        return Err(io::Error::other("not a file of ours"));
    }
    if let Some(why) = owner::distrust(&found, forbidden) {
        return Err(io::Error::other(why));
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(found.len() as usize)?;
    (&mut file).take(most_bytes).read_to_end(&mut bytes)?;
    Ok((file, bytes))
}

/// Puts a file in its place at once and whole.
fn write_own(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut mark = [0; 6];
    getrandom::fill(&mut mark).map_err(io::Error::other)?;
    let mark = mark.map(|byte| format!("{byte:02x}")).concat();
    let early = path.with_extension(mark);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    owner::create_for_ourselves(&mut options);
    let mut file = options.open(&early)?;
    let written = parts
        .iter()
        .try_for_each(|part| file.write_all(part))
        .and_then(|()| {
            drop(file);
            fs::rename(&early, path)
        });
    if written.is_err() {
        let _ = fs::remove_file(&early);
    }
    written
}

/// So that what is in use is removed last.
fn note_read(file: &File) {
    let now = SystemTime::now();
    let is_old = |read: SystemTime| now.duration_since(read).is_ok_and(|age| age > READ_AGAIN);
    if file
        .metadata()
        .and_then(|found| found.modified())
        .is_ok_and(is_old)
    {
        // Where that is not allowed, it is a matter of when it was written.
        let _ = file.set_modified(now);
    }
}

/// Removes entries until there is room for more, and what was never finished.
fn prune(folder: &Path, most_bytes: u64, most_entries: usize) -> io::Result<()> {
    let now = SystemTime::now();
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder)?.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        // Nothing that is not ours.
        let (stem, mark) = name
            .split_once('.')
            .map_or((name, None), |(s, m)| (s, Some(m)));
        if stem != "key" && Digest::from_hex(stem).is_err() {
            continue;
        }
        let Ok(found) = entry.metadata() else {
            continue;
        };
        let modified = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        if mark.is_some() {
            if now
                .duration_since(modified)
                .is_ok_and(|age| age > ABANDONED)
            {
                let _ = fs::remove_file(entry.path());
            }
        } else if stem != "key" {
            entries.push((modified, found.len(), entry.path()));
        }
    }
    let mut bytes: u64 = entries.iter().map(|(_, len, _)| len).sum();
    let mut count = entries.len();
    if bytes <= most_bytes && count <= most_entries {
        return Ok(());
    }
    entries.sort();
    for (_, len, path) in entries {
        if bytes <= most_bytes / 4 * 3 && count <= most_entries / 4 * 3 {
            break;
        }
        let _ = fs::remove_file(path);
        bytes -= len;
        count -= 1;
    }
    Ok(())
}

#[cfg(unix)]
mod owner {
    use std::fs::{DirBuilder, Metadata, OpenOptions};
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};

    use rustix::fs::OFlags;
    use rustix::process::geteuid;

    pub(super) fn keep_to_ourselves(builder: &mut DirBuilder) {
        builder.mode(0o700);
    }

    pub(super) fn create_for_ourselves(options: &mut OpenOptions) {
        options.mode(0o600);
    }

    /// No link is followed, and nothing waits for the other end of a pipe.
    pub(super) fn open_only_files(options: &mut OpenOptions) {
        options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
    }

    /// Why others may have a hand in it.
    pub(super) fn distrust(found: &Metadata, forbidden: u32) -> Option<String> {
        let (owner, user, mode) = (found.uid(), geteuid().as_raw(), found.mode() & 0o7777);
        if owner != user {
            Some(format!(
                "belongs to user {owner} and not to this one ({user})"
            ))
        } else if mode & forbidden != 0 {
            Some(format!("is open to others (mode {mode:o})"))
        } else {
            None
        }
    }
}

/// Where files have no such owner, the key is in the user's own folder (see [`key`]).
#[cfg(not(unix))]
mod owner {
    use std::fs::{DirBuilder, Metadata, OpenOptions};

    pub(super) fn keep_to_ourselves(_builder: &mut DirBuilder) {}

    pub(super) fn create_for_ourselves(_options: &mut OpenOptions) {}

    pub(super) fn open_only_files(_options: &mut OpenOptions) {}

    pub(super) fn distrust(_found: &Metadata, _forbidden: u32) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests;
