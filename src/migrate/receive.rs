//! The destination's side.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::checkpoint::context::{NetworkLock, Options};
use crate::checkpoint::processor;
use crate::checkpoint::progress::Bar;
use crate::container::create::{Created, Request};
use crate::container::{Error, Result, Store, checkpoint};
use crate::migrate::send::{Hello, VERSION, is_image};
use crate::migrate::wire::{Kind, Wire, text};
use crate::sys::Context;

/// Most sets that one migration has.
const ROUNDS: u32 = 1000;
/// Most files of one set.
const FILES: u32 = 1 << 20;

/// Waits for one source.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// Listens at an address and port.
    pub fn new(address: &str) -> Result<Self> {
        Ok(Self(TcpListener::bind(address).context(|| format!("listen at {address}"))?))
    }

    /// Where it listens: the port that was chosen, if none was given.
    pub fn address(&self) -> String {
        self.0.local_addr().map_or_else(|_| String::new(), |address| address.to_string())
    }

    /// The first that connects.
    pub fn accept(self, patience: Duration) -> Result<Receive> {
        let (stream, _) = self.0.accept().context(|| "accept")?;
        stream.set_nodelay(true).context(|| "setsockopt(TCP_NODELAY)")?;
        let output = stream.try_clone().context(|| "dup")?;
        Ok(Receive(Wire::new(stream.into(), output.into(), patience)))
    }
}

/// A source that has connected.
#[derive(Debug)]
pub struct Receive(Wire);

impl Receive {
    /// At the other end of two pipes.
    pub fn new(input: OwnedFd, output: OwnedFd, patience: Duration) -> Self {
        Self(Wire::new(input, output, patience))
    }
}

/// Receives a container, and lets it go on here. On an error nothing of it is left. The images are kept in `images`, which
/// must not exist, as long as they are needed.
pub fn receive(
    store: &Store,
    request: Request,
    from: &Receive,
    images: &Path,
    options: Options,
    pid_file: Option<&Path>,
) -> Result<Created> {
    let wire = &from.0;
    let done = take(store, request, wire, images, options, pid_file);
    let _ = fs::remove_dir_all(images);
    match done {
        Ok(done) => {
            // It runs here, whether the other side hears of it or not.
            let _ = wire.send(Kind::Running, &[]);
            Ok(done)
        }
        Err(error) => {
            let _ = wire.send(Kind::Failed, error.to_string().as_bytes());
            Err(error)
        }
    }
}

fn take(
    store: &Store,
    request: Request,
    wire: &Wire,
    images: &Path,
    options: Options,
    pid_file: Option<&Path>,
) -> Result<Created> {
    let hello: Hello = serde_json::from_slice(&wire.expect(Kind::Hello)?)
        .ok()
        .filter(|hello: &Hello| hello.stasis_migrate == VERSION)
        .ok_or_else(|| Error::new("the other side is of another version"))?;
    if store.dir(&request.id)?.load().is_ok() {
        return Err(Error::Exists);
    }
    processor::accept(&hello.instructions, &options)?;
    make(images)?;
    wire.send(Kind::Hello, &[])?;
    let last = sets(wire, images)?;
    let options = Options {
        image_path: last,
        tcp_established: hello.tcp_established,
        tcp_close: hello.tcp_close,
        network_lock: if hello.network_lock { NetworkLock::Nftables } else { NetworkLock::Skip },
        ext_unix_sk: hello.ext_unix_sk,
        shell_job: hello.shell_job,
        file_locks: hello.file_locks,
        empty_network: hello.empty_network,
        manage_cgroups: hello.manage_cgroups,
        ..options
    };
    let mut agreed = || -> Result<()> {
        wire.send(Kind::Ready, &[])?;
        wire.expect(Kind::Commit)?;
        Ok(())
    };
    Ok(checkpoint::restore_when(store, request, options, pid_file, &mut agreed)?.0)
}

/// Receives all sets of images; the directory of the last.
fn sets(wire: &Wire, images: &Path) -> Result<PathBuf> {
    let (mut round, mut files) = (0_u32, 0_u32);
    let mut payload = Vec::new();
    let mut file: Option<(File, PathBuf)> = None;
    let dir = |round: u32| images.join(round.to_string());
    let bar = Bar::unbounded();
    loop {
        match wire.receive(&mut payload)? {
            Kind::Round => {
                round += 1;
                if payload != round.to_le_bytes() || round > ROUNDS {
                    return Err(Error::new("the sets of images come out of order"));
                }
                (file, files) = (None, 0);
                make(&dir(round))?;
                if round > 1 {
                    let link = dir(round).join("parent");
                    symlink(Path::new("..").join((round - 1).to_string()), &link)
                        .context(|| format!("symlink {}", link.display()))?;
                }
            }
            Kind::File if round > 0 && files < FILES => {
                let name = name(&payload)?;
                files += 1;
                let path = dir(round).join(name);
                let opened = File::options().write(true).create_new(true).mode(0o600).open(&path);
                file = Some((opened.context(|| format!("open {}", path.display()))?, path));
            }
            Kind::Data => {
                let (file, path) = file.as_mut().ok_or_else(|| Error::new("bytes of no image have come"))?;
                file.write_all(&payload).context(|| format!("write {}", path.display()))?;
                if let Some(bar) = &bar {
                    bar.add(payload.len());
                }
            }
            Kind::Restore if round > 0 => return Ok(dir(round)),
            Kind::Failed => return Err(Error::new(format!("the other side: {}", text(&payload)))),
            other => return Err(Error::new(format!("the other side says {other:?} too early"))),
        }
    }
}

/// The name of an image: nothing that could lead out of its directory.
fn name(payload: &[u8]) -> Result<&str> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    std::str::from_utf8(payload)
        .ok()
        .filter(|name| name.len() < 128 && is_image(name) && !name.starts_with('.'))
        .filter(|name| name.bytes().all(fits))
        .ok_or_else(|| Error::new(format!("no image is called {:?}", text(payload))))
}

fn make(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().mode(0o700).create(dir);
    Ok(made.context(|| format!("mkdir {}", dir.display()))?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// What `sets` makes of these frames.
    fn received(frames: &[(Kind, &[u8])], images: &Path) -> Result<PathBuf> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let wire = |stream: UnixStream| {
            let output = stream.try_clone().unwrap();
            Wire::new(stream.into(), output.into(), Duration::from_secs(60))
        };
        let theirs = wire(theirs);
        frames.iter().for_each(|(kind, payload)| theirs.send(*kind, payload).unwrap());
        drop(theirs);
        sets(&wire(ours), images)
    }

    #[test]
    fn sets_become_directories_that_follow_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let frames: [(Kind, &[u8]); 7] = [
            (Kind::Round, &[1, 0, 0, 0]),
            (Kind::File, b"pages-1.img"),
            (Kind::Data, b"one"),
            (Kind::Data, b"two"),
            (Kind::Round, &[2, 0, 0, 0]),
            (Kind::File, b"inventory.img"),
            (Kind::Restore, b""),
        ];
        assert_eq!(received(&frames, dir.path()).unwrap(), dir.path().join("2"));
        assert_eq!(fs::read(dir.path().join("2/parent/pages-1.img")).unwrap(), b"onetwo");
        assert!(dir.path().join("2/inventory.img").exists() && !dir.path().join("1/parent").exists());
    }

    #[test]
    fn nothing_is_written_elsewhere() {
        for bad in ["../a.img", "/etc/a.img", "a/b.img", ".a.img", "passwd", "", "a\0.img", "parent"] {
            let dir = tempfile::tempdir().unwrap();
            let frames: [(Kind, &[u8]); 2] = [(Kind::Round, &[1, 0, 0, 0]), (Kind::File, bad.as_bytes())];
            assert!(received(&frames, dir.path()).is_err(), "{bad:?}");
        }
        let orders: [&[(Kind, &[u8])]; 5] = [
            &[(Kind::Round, &[2, 0, 0, 0])],
            &[(Kind::File, b"a.img")],
            &[(Kind::Round, &[1, 0, 0, 0]), (Kind::Data, b"x")],
            &[(Kind::Restore, b"")],
            &[(Kind::Round, &[1, 0, 0, 0]), (Kind::File, b"a.img"), (Kind::File, b"a.img")],
        ];
        for frames in orders {
            let dir = tempfile::tempdir().unwrap();
            assert!(received(frames, dir.path()).is_err(), "{frames:?}");
        }
    }
}
