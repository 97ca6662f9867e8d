//! Where containers are kept: one directory each under the root, written so that no crash can tear it.
//!
//! ```text
//!   ROOT/ID/                the lock: flock(2) on this directory
//!          state.json       replaced by rename; there is a container only if it exists
//!          config.json      config.json as the container was created with
//!          exec.fifo        exists from create to start
//!          notify/          the socket that stands in for systemd's
//! ```
//!
//! Changing commands hold the lock; `state`, `list` and `kill` read what rename(2) keeps whole, and never wait.
//!
//! Nothing is flushed to a disk: no container outlives a crash of the machine, and two flushes cost more than all else
//! that a start does. A root that does lie on a disk may then hold an empty state.json, which is as good as none.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::error::{Error, Result};
use super::state::State;
use crate::sys::{self, Context};

/// The directory given by `--root`.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// A container's directory, not yet known to hold a container.
#[derive(Debug, Clone)]
pub struct Dir {
    path: PathBuf,
}

/// The right to change a container, until dropped. The kernel gives it back when the process dies.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] Flock<File>);

impl Store {
    /// The store under this root, which need not exist.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The root itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of that id, without looking whether it exists.
    pub fn dir(&self, id: &str) -> Result<Dir> {
        validate(id)?;
        Ok(Dir { path: self.root.join(id) })
    }

    /// Makes the directory of a new container and locks it.
    ///
    /// What a killed `create` left behind, a directory that nobody holds and that never got its state.json, makes way.
    pub fn create(&self, id: &str) -> Result<(Dir, Lock)> {
        let dir = self.dir(id)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&self.root).context(|| mkdir(&self.root))?;
        match DirBuilder::new().mode(0o711).create(&dir.path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                let _lock = dir.try_lock()?.ok_or(Error::Exists)?;
                if dir.state_exists() {
                    return Err(Error::Exists);
                }
                super::create::sweep(&dir);
                dir.remove()?;
                DirBuilder::new().mode(0o711).create(&dir.path).map_err(|_| Error::Exists)?;
            }
            Err(e) => return Err(e).context(|| mkdir(&dir.path)).map_err(Into::into),
        }
        let lock = dir.try_lock()?.ok_or(Error::Exists)?;
        Ok((dir, lock))
    }

    /// The ids under this root, sorted; none where the root does not exist.
    pub fn ids(&self) -> std::io::Result<Vec<String>> {
        let mut ids = vec![];
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                ids.extend(entry.file_name().into_string().ok());
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }
}

fn mkdir(path: &Path) -> String {
    format!("mkdir {}", path.display())
}

/// Refuses what cannot be a file name, or what runc would not accept.
fn validate(id: &str) -> Result<()> {
    if id.is_empty() {
        return Err(Error::EmptyId);
    }
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"_+-.".contains(&b);
    if id == "." || id == ".." || !id.bytes().all(fits) {
        return Err(Error::InvalidId);
    }
    Ok(())
}

impl Dir {
    /// The path of a file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The fifo that holds init back between create and start.
    pub fn exec_fifo(&self) -> PathBuf {
        self.join("exec.fifo")
    }

    fn state_exists(&self) -> bool {
        fs::metadata(self.join("state.json")).is_ok_and(|m| m.len() > 0)
    }

    /// Reads state.json.
    pub fn load(&self) -> Result<State> {
        let path = self.join("state.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                return Err(Error::NotExist);
            }
            Err(e) => return Err(e).context(|| format!("open {}", path.display())).map_err(Into::into),
        };
        if text.is_empty() {
            return Err(Error::NotExist);
        }
        State::read(&text).map_err(|e| Error::new(format!("{} is damaged: {e}", path.display())))
    }

    /// Replaces state.json.
    pub fn save(&self, state: &State) -> Result<()> {
        let text = serde_json::to_vec(state).map_err(|e| Error::new(format!("encoding state.json: {e}")))?;
        self.write("state.json", &text)
    }

    /// Replaces a file such that a reader sees the old or the new one, whole.
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<()> {
        let tmp = self.join(&format!(".{name}.tmp"));
        let write = || -> std::io::Result<()> {
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
            file.write_all(contents)?;
            fs::rename(&tmp, self.join(name))
        };
        write().context(|| format!("writing {}", self.join(name).display()))?;
        Ok(())
    }

    /// Waits for the right to change the container.
    pub fn lock(&self) -> Result<Lock> {
        self.flock(FlockArg::LockExclusive)?.ok_or(Error::NotExist)
    }

    /// Waits until nobody changes the container, and keeps others from changing it.
    pub fn lock_shared(&self) -> Result<Lock> {
        self.flock(FlockArg::LockShared)?.ok_or(Error::NotExist)
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Result<Option<Lock>> {
        self.flock(FlockArg::LockExclusiveNonblock)
    }

    fn flock(&self, how: FlockArg) -> Result<Option<Lock>> {
        loop {
            let file = match File::options().read(true).custom_flags(libc::O_DIRECTORY).open(&self.path) {
                Ok(file) => file,
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                    return Err(Error::NotExist);
                }
                Err(e) => {
                    return Err(e).context(|| format!("open {}", self.path.display())).map_err(Into::into);
                }
            };
            let opened = file.metadata().context(|| "fstat")?;
            match Flock::lock(file, how) {
                Ok(lock) => {
                    // Deleted, or deleted and created anew, while we waited?
                    match fs::metadata(&self.path) {
                        Ok(now) if now.ino() == opened.ino() && now.dev() == opened.dev() => {
                            return Ok(Some(Lock(lock)));
                        }
                        Ok(_) => {}
                        Err(_) => return Err(Error::NotExist),
                    }
                }
                Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, Errno::EINTR)) => {}
                Err((_, errno)) => {
                    return Err(sys::Error::call(format!("flock {}", self.path.display()), errno).into());
                }
            }
        }
    }

    /// Removes the directory and all that is in it.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            done => Ok(done.context(|| "unable to remove container state dir")?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_leave_the_root_are_refused() {
        for bad in [".", "..", "a/b", "a b", "ä", "a:b"] {
            assert!(matches!(validate(bad), Err(Error::InvalidId)), "{bad}");
        }
        assert!(matches!(validate(""), Err(Error::EmptyId)));
        validate("a-Z_0+.1").unwrap();
    }

    #[test]
    fn a_directory_is_taken_only_with_a_state_or_a_holder() {
        let tmp = tempfile::tempdir().unwrap();
        let store = Store::new(tmp.path());
        let (dir, lock) = store.create("c").unwrap();
        assert!(matches!(store.create("c"), Err(Error::Exists)), "held by its creator");
        drop(lock);
        let (_, lock) = store.create("c").expect("what a dead creator left makes way");
        drop(lock);
        dir.write("state.json", b"").unwrap();
        assert!(
            matches!(dir.load(), Err(Error::NotExist)),
            "what a crash of the machine leaves is no container"
        );
        drop(store.create("c").expect("and makes way"));
        dir.write("state.json", b"{}").unwrap();
        assert!(matches!(store.create("c"), Err(Error::Exists)));
        dir.remove().unwrap();
        assert!(matches!(dir.load(), Err(Error::NotExist)));
        assert!(matches!(dir.lock(), Err(Error::NotExist)));
    }
}
