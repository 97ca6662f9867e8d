//! The source's side.

use std::fs;
use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::checkpoint::context::{NetworkLock, Options};
use crate::checkpoint::dump::{self, Before, Heir};
use crate::checkpoint::image::ImageDir;
use crate::checkpoint::memory::capture::Stream;
use crate::checkpoint::memory::copy;
use crate::checkpoint::precopy::{Made, Rounds};
use crate::checkpoint::predump::Round;
use crate::checkpoint::progress::Bar;
use crate::checkpoint::{self as engine, precopy, processor};
use crate::container::{Container, Error, Result, Store};
use crate::migrate::wire::{Kind, LARGEST, Wire};
use crate::sys::Context;
use crate::sys::fd::Room;

/// What is spoken. Another version is refused.
pub(super) const VERSION: u32 = 1;

/// Pieces of memory that are read before they can be sent.
const AHEAD: usize = 4;

/// What the source says first.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// [`VERSION`]
    pub(super) stasis_migrate: u32,
    /// Id of the container there.
    pub(super) id: String,
    /// Whether the two sides are to do the same with TCP connections, and so on.
    pub(super) tcp_established: bool,
    pub(super) tcp_close: bool,
    pub(super) network_lock: bool,
    pub(super) ext_unix_sk: bool,
    pub(super) shell_job: bool,
    pub(super) file_locks: bool,
    pub(super) empty_network: bool,
    pub(super) manage_cgroups: Option<String>,
    /// What the container's programs may use: to be refused before anything is sent.
    #[serde(default)]
    pub(super) instructions: Vec<String>,
}

/// Where `receive` is.
#[derive(Debug, Clone)]
pub enum Destination {
    /// Listening at this address and port.
    Tcp(String),
    /// At the other end of the standard input and output of a command: ssh.
    Command(String),
}

/// How a migration went.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Rounds before the container stood still.
    pub rounds: u32,
    /// Bytes of images that were sent, in all.
    pub sent: u64,
    /// How long the container stood still.
    pub downtime: Duration,
    /// From the first byte to the last.
    pub total: Duration,
}

/// Moves a container to another host. It is gone here afterwards; on an error it goes on, but for the one error that says
/// that it is paused.
pub fn send(
    store: &Store,
    id: &str,
    options: &Options,
    to: &Destination,
    most: u32,
    patience: Duration,
) -> Result<Outcome> {
    let began = Instant::now();
    let (container, _lock) = Container::load_locked(store, id)?;
    container.can_be_dumped()?;
    let source = container.source()?;
    // In this order: the command ends when the connection, dropped first, is closed.
    let (_command, wire) = connect(to, patience)?;
    let hello = Hello {
        stasis_migrate: VERSION,
        id: id.to_owned(),
        tcp_established: options.tcp_established,
        tcp_close: options.tcp_close,
        network_lock: options.network_lock == NetworkLock::Nftables,
        ext_unix_sk: options.ext_unix_sk,
        shell_job: options.shell_job,
        file_locks: options.file_locks,
        empty_network: options.empty_network,
        manage_cgroups: options.manage_cgroups.clone(),
        instructions: processor::here()?,
    };
    let hello = serde_json::to_vec(&hello).map_err(|e| Error::new(format!("encoding the greeting: {e}")))?;
    wire.send(Kind::Hello, &hello)?;
    wire.expect(Kind::Hello)?;

    let images = Temporary::new(&options.image_path)?;
    let options = Options { no_sync: true, ..options.clone() };
    let mut freezer = container.cgroup();
    let mut sender = Sender { wire: &wire, images: images.0.clone(), made: 0, sent: 0, committed: false };
    let room = Room::make();
    let moved = precopy::rounds(&options, &source, &mut freezer, most, &mut |round| {
        let Made { pages, options, enough, .. } = round;
        sender.round(pages, &options)?;
        Ok(enough)
    })
    .and_then(|rounds| {
        let Rounds { tracking, looks, known, .. } = rounds;
        let before = Before { tracking, looks, known, complete: None, heir: Some(&mut sender) };
        let report = dump::dump_after(&rounds.options, &source, &mut freezer, before)?;
        Ok((rounds.made, report))
    });
    drop(room);
    match moved {
        Ok((rounds, report)) => {
            let sent = sender.sent;
            container.destroy()?;
            Ok(Outcome { rounds, sent, downtime: report.frozen, total: began.elapsed() })
        }
        Err(error) if sender.committed => Err(Error::from(error).context(
            "the other side may run the container now, so it is left paused here: \
             delete it here if it runs there, resume it here if it does not",
        )),
        Err(error) => {
            // So that the other side need not find out by itself.
            let _ = wire.send(Kind::Failed, error.to_string().as_bytes());
            Err(error.into())
        }
    }
}

fn connect(to: &Destination, patience: Duration) -> Result<(Option<Running>, Wire)> {
    match to {
        Destination::Tcp(address) => {
            let stream = dial(address, patience).context(|| format!("connect to {address}"))?;
            // The last words are short, and waited for.
            stream.set_nodelay(true).context(|| "setsockopt(TCP_NODELAY)")?;
            let output = stream.try_clone().context(|| "dup")?;
            Ok((None, Wire::new(stream.into(), output.into(), patience)))
        }
        Destination::Command(line) => {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", line]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().context(|| format!("sh -c {line:?}"))?;
            let ends = child.stdout.take().zip(child.stdin.take());
            let running = Running(child);
            let (input, output) = ends.ok_or_else(|| Error::new("the command has no pipes"))?;
            Ok((Some(running), Wire::new(OwnedFd::from(input), OwnedFd::from(output), patience)))
        }
    }
}

/// Connects to the first of a host's addresses that answers; none may be silent for longer than that.
fn dial(address: &str, patience: Duration) -> io::Result<TcpStream> {
    let mut last = io::ErrorKind::NotFound.into();
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// A command that ends by itself once the connection, which is dropped before it, is closed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

/// A directory that is this command's alone.
struct Temporary(PathBuf);

impl Temporary {
    fn new(path: &Path) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let made = fs::DirBuilder::new().mode(0o700).create(path);
        made.context(|| format!("mkdir {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether a file belongs to a set of images.
pub(super) fn is_image(name: &str) -> bool {
    name.ends_with(".img") || name == "descriptors.json"
}

struct Sender<'a> {
    wire: &'a Wire,
    images: PathBuf,
    made: u32,
    sent: u64,
    committed: bool,
}

impl Sender<'_> {
    /// Sends a pre-dump, straight from the memory of the processes.
    fn round(&mut self, pages: Round, options: &Options) -> engine::Result<()> {
        let images =
            ImageDir::in_memory(&self.images).map_or_else(|| ImageDir::create(&options.image_path), Ok)?;
        let streams = pages.streams(&images)?;
        self.set(&images)?;
        streams.iter().try_for_each(|stream| self.stream(stream))
    }

    /// Sends an image of pages. While one piece is on its way, the next is read.
    fn stream(&mut self, stream: &Stream) -> engine::Result<()> {
        self.wire.send(Kind::File, stream.name.as_bytes())?;
        let Some(memory) = copy::Memory::of_running(stream.pid)? else { return Ok(()) };
        let pieces = copy::pieces(stream.pages.iter().cloned());
        let (full, filled) = sync_channel::<engine::Result<Vec<u8>>>(AHEAD);
        let (empty, emptied) = sync_channel(AHEAD + 2);
        let bar = Bar::new(pieces.iter().map(|piece| piece.len as u64).sum());
        thread::scope(|scope| {
            scope.spawn(move || {
                for piece in &pieces {
                    let mut buffer: Vec<u8> = emptied.try_recv().unwrap_or_default();
                    buffer.resize(piece.len, 0);
                    let read = memory.read(&piece.ranges, &mut buffer).map(|()| buffer);
                    // Nobody takes any more: the other thread knows why.
                    if full.send(read).is_err() {
                        break;
                    }
                }
            });
            for buffer in filled {
                let buffer = buffer?;
                self.wire.send(Kind::Data, &buffer)?;
                self.sent += buffer.len() as u64;
                if let Some(bar) = &bar {
                    bar.add(buffer.len());
                }
                let _ = empty.try_send(buffer);
            }
            Ok(())
        })
    }

    /// Sends a set of images, of which the link to its parent is no part: the other side knows the order.
    fn set(&mut self, images: &ImageDir) -> engine::Result<()> {
        self.made += 1;
        self.wire.send(Kind::Round, &self.made.to_le_bytes())?;
        let failed = |e: std::io::Error| {
            engine::Error::new(format!("cannot send the images: {e}")).path(images.path())
        };
        let mut buffer = vec![0; LARGEST];
        for name in images.names()?.iter().filter(|name| is_image(name)) {
            let mut file = images.raw_open(name)?;
            self.wire.send(Kind::File, name.as_bytes())?;
            loop {
                let n = file.read(&mut buffer).map_err(failed)?;
                if n == 0 {
                    break;
                }
                self.wire.send(Kind::Data, &buffer[..n])?;
                self.sent += n as u64;
            }
        }
        Ok(())
    }
}

impl Heir for Sender<'_> {
    fn offer(&mut self, images: &ImageDir) -> engine::Result<()> {
        self.set(images)?;
        self.wire.send(Kind::Restore, &[])?;
        self.wire.expect(Kind::Ready).map(drop)
    }

    fn commit(&mut self) -> engine::Result<()> {
        self.committed = true;
        self.wire.send(Kind::Commit, &[])?;
        self.wire.expect(Kind::Running).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sys::socket::{Backlog, listen};

    use super::*;

    #[test]
    fn nobody_waits_long_for_a_host_that_does_not_answer() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // What comes when nobody takes what came before is not answered at all.
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let mut waiting = Vec::new();
        let error = loop {
            match dial(&address, Duration::from_millis(200)) {
                Ok(stream) => waiting.push(stream),
                Err(e) => break e,
            }
            assert!(waiting.len() < 10, "all are taken");
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop((listener, waiting));
        assert_eq!(
            dial(&address, Duration::from_secs(60)).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }
}
