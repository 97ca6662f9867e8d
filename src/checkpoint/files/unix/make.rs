//! Making the unix sockets of the images again, by the steps of [`plan`](super::plan).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{Backlog, MsgFlags, SockFlag, accept4, listen, send, shutdown};

use super::LISTEN;
use super::fill::fill;
use super::more::{self, Credentials};
use super::names::{Names, Reach};
use super::place::named;
use super::plan::{Sockets, Step, plan};
use super::serve::listeners;
use crate::checkpoint::context::Target;
use crate::checkpoint::error::Context;
use crate::checkpoint::files::opener::Opener;
use crate::checkpoint::files::{external, inside, sockopts};
use crate::checkpoint::image::{FdTypes, UnixSkEntry};
use crate::checkpoint::{Error, Result};
use crate::sys::{socket, sockopt};

const WHAT: &str = "cannot make a unix socket";

/// What has been made so far.
#[derive(Default)]
pub struct Made {
    /// The sockets, by id.
    pub fds: BTreeMap<u32, OwnedFd>,
    /// The other ends of those whose peer is gone, by the id of the near one.
    pub far: BTreeMap<u32, OwnedFd>,
    /// How bound ones are reached.
    pub reach: BTreeMap<u32, Reach>,
}

impl Made {
    /// A socket that an earlier step made.
    pub fn fd(&self, id: u32) -> Result<&OwnedFd> {
        self.fds.get(&id).ok_or_else(|| Error::new(format!("the images use unix socket {id} too early")))
    }

    /// How a bound socket is reached.
    pub fn reach(&self, id: u32) -> Result<&Reach> {
        self.reach.get(&id).ok_or_else(|| Error::new(format!("unix socket {id} of the images has no name")))
    }
}

/// Makes all sockets, in the container's network namespace and root, and fills their queues.
pub fn open(opener: &mut Opener<'_, '_>) -> Result<()> {
    let entries: Vec<&UnixSkEntry> = opener.of(FdTypes::Unixsk).filter_map(|e| e.usk.as_ref()).collect();
    if entries.is_empty() {
        return Ok(());
    }
    let sockets = Sockets::new(entries, more::read(opener.restore.model, &opener.restore.owners)?)?;
    let (first, last) = plan(&sockets, opener.restore.options.ext_unix_sk)?;
    let (target, files) = (opener.restore.target, &opener.files.opened);
    let queues = &opener.restore.model.sk_queues;
    let doors = opener.restore.made.networks()?;
    let mut roots = BTreeMap::new();
    for e in sockets.all.iter().filter(|e| e.mnt_id.is_some()) {
        roots.insert(e.id, opener.restore.root_at(e.mnt_id)?);
    }
    let made = inside::in_network(target.init, || {
        let mut names = Names::on_this_thread(target.root.as_fd())?;
        let mut made = Made::default();
        let mut around = Around { target, doors: &doors, roots: &roots, here: None };
        for s in &first {
            around.enter(&sockets, *s, &mut names)?;
            step(*s, &sockets, &mut made, &mut names)?;
        }
        fill(queues, &sockets, &made, files, &mut names)?;
        for s in &last {
            around.enter(&sockets, *s, &mut names)?;
            step(*s, &sockets, &mut made, &mut names)?;
        }
        Ok(made)
    })?;
    opener.files.listeners = listeners(opener.restore.model, &sockets.all, &sockets.more);
    let Made { mut fds, mut far, .. } = made;
    for e in &sockets.all {
        let Some(fd) = fds.get(&e.id) else { continue };
        if let Some(far) = far.remove(&e.id) {
            let reset = sockets.more(e.id).is_some_and(|more| more.reset);
            hang_up(fd, far, reset).map_err(|err| named(err, &e.name))?;
        }
    }
    for e in &sockets.all {
        let Some(fd) = fds.remove(&e.id) else { continue };
        finish(e, &sockets, &fd).map_err(|err| named(err, &e.name))?;
        opener.put_owned(e.id, fd, &e.fown, e.flags);
    }
    Ok(())
}

/// Where sockets are made.
struct Around<'n> {
    target: &'n Target,
    /// Doors to network namespaces, by their numbers.
    doors: &'n BTreeMap<u32, OwnedFd>,
    /// Root directories other than the container's, by socket.
    roots: &'n BTreeMap<u32, OwnedFd>,
    /// The network namespace that this thread is in.
    here: Option<u32>,
}

impl<'n> Around<'n> {
    /// Goes where the socket of a step was made.
    fn enter(&mut self, sockets: &Sockets<'_>, step: Step, names: &mut Names<'n>) -> Result<()> {
        let network = sockets.by_id.get(&step.id()).and_then(|e| e.ns_id);
        let there = network.and_then(|id| self.doors.get_key_value(&id));
        if self.here != there.map(|(id, _)| *id) {
            match there {
                Some((_, door)) => inside::through(door)?,
                None => inside::into_network(self.target.init)?,
            }
            self.here = there.map(|(id, _)| *id);
        }
        names.in_root(self.roots.get(&step.id()).map_or(self.target.root.as_fd(), AsFd::as_fd));
        Ok(())
    }
}

/// An unconnected socket of the kind of another one.
pub fn like(e: &UnixSkEntry) -> Result<OwnedFd> {
    let kind = e.r#type.cast_signed();
    socket::socket(libc::AF_UNIX, kind, 0).during(WHAT, || format!("socket(AF_UNIX, {kind}, 0)"))
}

fn step(step: Step, sockets: &Sockets<'_>, made: &mut Made, names: &mut Names<'_>) -> Result<()> {
    let id = step.id();
    let e = *sockets.by_id.get(&id).ok_or_else(|| Error::new(WHAT))?;
    // What SO_PEERCRED of this socket says: whoever is at its other end.
    let peer = |id: u32| sockets.more(id).and_then(|more| more.peer);
    let result = match step {
        Step::Pair(..) | Step::Orphan(_) => names
            .as_user(peer(id), || {
                let kind = e.r#type.cast_signed();
                socket::unix_pair(kind).during(WHAT, || format!("socketpair(AF_UNIX, {kind}, 0)"))
            })
            .map(|(near, other)| {
                made.fds.insert(id, near);
                match step {
                    Step::Pair(_, second) => made.fds.insert(second, other),
                    _ => made.far.insert(id, other),
                };
            }),
        Step::Accepted(_, client) => accepted(e, client, sockets, made, names),
        Step::Bound(_) => bound(e, sockets, made, names),
        Step::Knock(_, listener) => {
            let owner = sockets.more(id).and_then(|more| more.owner);
            names.as_user(owner, || names.connect(made.fd(id)?, made.reach(listener)?))
        }
        Step::Direct(_, to) => names.connect(made.fd(id)?, made.reach(to)?),
        Step::Leave(_, to) => {
            let name = sockets.by_id.get(&to).map_or(&[][..], |to| &to.name);
            names.connect_out(made.fd(id)?, name)
        }
    };
    result.map_err(|err| named(err, &e.name))
}

/// Both ends of a connection that was accepted once, by a listener that is there for this only.
fn accepted(
    e: &UnixSkEntry,
    client: Option<u32>,
    sockets: &Sockets<'_>,
    made: &mut Made,
    names: &mut Names<'_>,
) -> Result<()> {
    let peer = |id: u32| sockets.more(id).and_then(|more| more.peer);
    let (listener, dialler) = (like(e)?, like(e)?);
    let door = names.bind_unseen(&listener, &e.name)?;
    names.as_user(client.and_then(peer), || {
        listen(&listener, Backlog::new(1).unwrap_or(Backlog::MAXCONN)).during(WHAT, || "listen(_, 1)".into())
    })?;
    if let Some(entry) = client.and_then(|id| sockets.by_id.get(&id)).filter(|e| !e.name.is_empty()) {
        names.bind(&dialler, entry, sockets.more(entry.id))?;
    }
    names.as_user(peer(e.id), || names.connect(&dialler, &door))?;
    let taken = accept4(&listener, SockFlag::SOCK_CLOEXEC).during(WHAT, || "accept(_)".into())?;
    made.fds.insert(e.id, taken);
    match client {
        Some(client) => made.fds.insert(client, dialler),
        None => made.far.insert(e.id, dialler),
    };
    Ok(())
}

/// A name, and a queue of connections, for what has them.
fn bound(e: &UnixSkEntry, sockets: &Sockets<'_>, made: &mut Made, names: &mut Names<'_>) -> Result<()> {
    let more = sockets.more(e.id);
    let fd = match made.fds.entry(e.id) {
        std::collections::btree_map::Entry::Occupied(there) => there.into_mut(),
        std::collections::btree_map::Entry::Vacant(free) => free.insert(like(e)?),
    };
    if !e.name.is_empty() {
        let reach = names.bind(fd, e, more)?;
        made.reach.insert(e.id, reach);
    }
    if e.state == LISTEN {
        // As many as wait must find room, whatever is allowed from then on.
        let backlog = i32::try_from(e.backlog).ok().and_then(|n| Backlog::new(n).ok());
        let backlog = backlog.unwrap_or(Backlog::MAXCONN);
        let own: Option<Credentials> = more.and_then(|more| more.peer);
        names.as_user(own, || listen(fd, backlog).during(WHAT, || format!("listen(_, {})", e.backlog)))?;
    }
    Ok(())
}

/// The far end goes: without having read everything, where that was so.
fn hang_up(near: &OwnedFd, far: OwnedFd, reset: bool) -> Result<()> {
    if reset {
        send(near.as_raw_fd(), &[0], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
            .during(WHAT, || "send(_, 1 byte)".into())?;
    }
    drop(far);
    Ok(())
}

/// What comes last: shut down directions, options, flags.
fn finish(e: &UnixSkEntry, sockets: &Sockets<'_>, fd: &OwnedFd) -> Result<()> {
    if let Some(how) = sockopts::directions(e.shutdown) {
        match shutdown(fd.as_raw_fd(), how) {
            // It was shut down from the other side, and that is gone.
            Ok(()) | Err(Errno::ENOTCONN) => {}
            Err(errno) => return Err(Error::new(WHAT).call(format!("shutdown(_, {how:?})"), errno)),
        }
    }
    sockopts::restore(fd, &e.opts, libc::AF_UNIX)?;
    if let Some(more) = sockets.more(e.id) {
        let offset = more.peek_offset.map(|offset| (libc::SO_PEEK_OFF, offset));
        for &(name, value) in more.options.iter().chain(&offset) {
            sockopt::set_int(fd, libc::SOL_SOCKET, name, value)
                .during(WHAT, || format!("setsockopt(_, SOL_SOCKET, {name}, {value})"))?;
        }
    }
    external::set_flags(fd, e.flags)
}
