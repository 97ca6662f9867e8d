//! A connection to systemd over D-Bus: one call at a time, no thread, no event loop.
//!
//! ```text
//!   root    /run/dbus/system_bus_socket, or without a bus /run/systemd/private
//!   others  $DBUS_SESSION_BUS_ADDRESS, $XDG_RUNTIME_DIR/bus
//! ```
//!
//! Root of a user namespace may be either: another user who has mapped himself to 0, as Podman does, or the root of a
//! system container with a systemd of its own. Whose session bus it is tells them apart.

use std::env;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::wire::{self, FIXED, Reader, Value, Writer};
use crate::sys::{Context, Error, Result};

/// How long systemd may take to answer, and a job to end.
const PATIENCE: Duration = Duration::from_secs(30);

const BUS: &str = "org.freedesktop.DBus";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const OBJECT: &str = "/org/freedesktop/systemd1";

/// What systemd said no with.
#[derive(Debug)]
pub struct Refusal {
    /// `org.freedesktop.systemd1.NoSuchUnit` and the like.
    pub name: String,
    text: String,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::new(format!("systemd: {} ({})", refusal.text, refusal.name))
    }
}

/// A connection.
#[derive(Debug)]
pub struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Jobs that have ended: their paths, and how.
    ended: Vec<(String, String)>,
}

impl Bus {
    /// Connects to the systemd that this user's containers belong to.
    pub fn open() -> Result<Self> {
        if let Some(uid) = user() {
            let path = session_bus().ok_or_else(|| {
                Error::new("could not detect DBUS_SESSION_BUS_ADDRESS from the environment")
            })?;
            return Self::connect(&path, uid, true);
        }
        let system =
            address("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_else(|| "/run/dbus/system_bus_socket".into());
        let private = Path::new("/run/systemd/private");
        Self::connect(&system, 0, true).or_else(|e| Self::connect(private, 0, false).map_err(|_| e))
    }

    /// Connects to a socket as a user whom those behind it call `uid`; `bus` if that is a bus, and not systemd itself.
    pub fn connect(path: &Path, uid: u32, bus: bool) -> Result<Self> {
        let failed = || format!("cannot reach systemd: connect {}", path.display());
        let mut stream = UnixStream::connect(path).context(failed)?;
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&stream, Some(PATIENCE)).context(failed)?;
        }
        let id: String = uid.to_string().bytes().map(|b| format!("{b:02x}")).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {id}\r\n").as_bytes()).context(failed)?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\n") && answer.len() < 256 {
            let mut byte = [0];
            stream.read_exact(&mut byte).context(failed)?;
            answer.push(byte[0]);
        }
        if !answer.starts_with(b"OK") {
            let said = String::from_utf8_lossy(&answer).trim().to_owned();
            return Err(Error::new(format!("{}: {said}", failed())));
        }
        stream.write_all(b"BEGIN\r\n").context(failed)?;
        let mut connection = Self { stream, serial: 0, ended: Vec::new() };
        if bus {
            connection.call("/org/freedesktop/DBus", BUS, "Hello", "", &[])??;
        }
        Ok(connection)
    }

    /// From now on systemd tells of jobs that end.
    pub fn subscribe(&mut self) -> Result<()> {
        let mut rule = Writer::default();
        rule.string(&format!("type='signal',interface='{MANAGER}',member='JobRemoved',path='{OBJECT}'"));
        // Without a bus in between there is nobody to tell.
        let _ = self.call("/org/freedesktop/DBus", BUS, "AddMatch", "s", &rule.bytes())?;
        self.manager("Subscribe", "", &[])?.map(drop).map_err(Error::from)
    }

    /// Calls systemd's manager.
    pub fn manager(
        &mut self,
        member: &str,
        signature: &str,
        body: &[u8],
    ) -> Result<std::result::Result<Vec<u8>, Refusal>> {
        self.call(OBJECT, MANAGER, member, signature, body)
    }

    /// A property of the manager that is a text.
    pub fn property(&mut self, name: &str) -> Result<String> {
        let mut body = Writer::default();
        body.string(MANAGER);
        body.string(name);
        let properties = "org.freedesktop.DBus.Properties";
        let answer = self.call(OBJECT, properties, "Get", "ss", &body.bytes())??;
        let mut r = Reader::new(&answer);
        match r.signature()?.as_str() {
            "s" => r.string(),
            other => Err(Error::new(format!("systemd's {name} is no text, but {other:?}"))),
        }
    }

    fn call(
        &mut self,
        path: &str,
        interface: &str,
        member: &str,
        signature: &str,
        body: &[u8],
    ) -> Result<std::result::Result<Vec<u8>, Refusal>> {
        self.serial += 1;
        let message = wire::call(self.serial, path, interface, member, signature, body);
        self.stream.write_all(&message).context(|| format!("send {member} to systemd"))?;
        loop {
            let (header, body) = self.receive(member)?;
            match header.kind {
                2 if header.reply_to == self.serial => return Ok(Ok(body)),
                3 if header.reply_to == self.serial => {
                    let text = Reader::new(&body).string().unwrap_or_default();
                    return Ok(Err(Refusal { name: header.error, text }));
                }
                _ => {}
            }
        }
    }

    /// The next message. The end of a job is noted by the way.
    fn receive(&mut self, waiting_for: &str) -> Result<(wire::Header, Vec<u8>)> {
        let failed = || format!("wait for systemd's answer to {waiting_for}");
        let mut fixed = [0; FIXED];
        self.stream.read_exact(&mut fixed).context(failed)?;
        let (fields, body) = wire::sizes(&fixed)?;
        let mut rest = vec![0; fields + body];
        self.stream.read_exact(&mut rest).context(failed)?;
        let body = rest.split_off(fields);
        let exact = u32::from_le_bytes([fixed[12], fixed[13], fixed[14], fixed[15]]) as usize;
        let header = wire::header(fixed[1], &rest, exact)?;
        if header.kind == 4 && header.member == "JobRemoved" {
            let mut r = Reader::new(&body);
            let (_id, job, _unit, how) = (r.u32()?, r.string()?, r.string()?, r.string()?);
            self.ended.push((job, how));
        }
        Ok((header, body))
    }

    /// Waits for a job that an answer names; how it ended.
    pub fn wait(&mut self, answer: &[u8]) -> Result<String> {
        let job = Reader::new(answer).string()?;
        loop {
            if let Some((_, how)) = self.ended.iter().find(|(path, _)| *path == job) {
                return Ok(how.clone());
            }
            self.receive("a job")?;
        }
    }
}

/// A list of properties, `a(sv)`.
pub fn properties(w: &mut Writer, all: &[(String, Value)]) {
    w.array(8, |w| {
        for (name, value) in all {
            w.structure();
            w.string(name);
            w.variant(value);
        }
    });
}

/// The user whose own systemd, and not the host's, manages the containers of this process.
pub fn user() -> Option<u32> {
    let me = nix::unistd::geteuid();
    if !me.is_root() {
        return Some(me.as_raw());
    }
    if !crate::init::credentials::in_user_namespace() {
        return None;
    }
    let stream = UnixStream::connect(session_bus()?).ok()?;
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", peer.pid())).ok()?;
    owner(&groups).filter(|uid| *uid != 0)
}

/// Whose slice a process is in: the number of `user-1000.slice` in its /proc/PID/cgroup.
fn owner(groups: &str) -> Option<u32> {
    let number = |part: &str| part.strip_prefix("user-")?.strip_suffix(".slice")?.parse().ok();
    groups.split(['/', '\n']).find_map(number)
}

/// Where the session bus is.
fn session_bus() -> Option<PathBuf> {
    address("DBUS_SESSION_BUS_ADDRESS").or_else(|| {
        let path = PathBuf::from(env::var_os("XDG_RUNTIME_DIR")?).join("bus");
        path.exists().then_some(path)
    })
}

/// The first path in an address of the form `unix:path=...,...;...`.
fn address(variable: &str) -> Option<PathBuf> {
    let text = env::var(variable).ok()?;
    let path = text.split(';').find_map(|a| a.strip_prefix("unix:path="))?;
    Some(PathBuf::from(path.split(',').next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slice_names_the_owner() {
        assert_eq!(
            owner("0::/user.slice/user-1001.slice/user@1001.service/app.slice/dbus.service\n"),
            Some(1001)
        );
        assert_eq!(owner("1:name=systemd:/user.slice/user-7.slice/session-1.scope\n0::/\n"), Some(7));
        assert_eq!(owner("0::/system.slice/dbus.service\n"), None);
        assert_eq!(owner("0::/user-x.slice\n"), None);
    }
}
