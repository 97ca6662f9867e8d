//! Unix sockets: stream, datagram and sequenced packets.
//!
//! ```text
//!   dump                                              restore
//!   place.rs    where it is bound                     plan.rs     what is to be made, in which order
//!   queue.rs    what waits in it                      names.rs    bound again, under the same name
//!   diag.rs     its peer, by sock_diag                make.rs     made and connected
//!   outside.rs  who holds a peer that is not ours     fill.rs     what waited is sent once more
//!                                                     serve.rs    who listens
//!        └──────────────┬───────────────────────────────┘
//!   UnixSkEntry, SkPacketEntry, and more.rs for what these cannot hold
//! ```
//!
//! A client that asks who its server is (SO_PEERCRED; libpq's `requirepeer`) gets the old answer. So do those that are
//! connected already as far as user and group go; the pid is that of the restore, which a container sees as 0. A connection that nobody has
//! accepted is made again if nothing was sent on it: what was sent cannot be looked at before it is accepted.

mod fill;
mod make;
mod more;
mod names;
mod outside;
mod place;
mod plan;
mod queue;
mod serve;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

pub use make::open;
pub use more::{EXTENSION, More};
pub use place::text;
pub use serve::Listener;

use crate::checkpoint::context::{Dump, Options, Source};
use crate::checkpoint::error::Context;
use crate::checkpoint::files::diag::{Diag, UnixSocket};
use crate::checkpoint::files::dump::record;
use crate::checkpoint::files::live::{Live, Pids};
use crate::checkpoint::files::{inet, locks, sockopts};
use crate::checkpoint::image::{
    FdTypes, FileEntry, FownEntry, ScmEntry, SkOptsEntry, SkPacketEntry, SkShutdown, UnixSkEntry,
};
use crate::checkpoint::namespaces::mount::nested::Tree;
use crate::checkpoint::namespaces::nested;
use crate::checkpoint::{Error, Result};
use crate::sys::procfs::read_text;
use crate::sys::sockopt::{self, get_bytes, get_int};
use more::{Credentials, Sender};

/// States, as the kernel and the images number them.
const ESTABLISHED: u32 = 1;
const LISTEN: u32 = 10;
/// A socket that stays outside: only its name is known.
const USK_EXTERN: u32 = 1;
/// Options that CRIU has no place for, with what they are at first: SO_LOCK_FILTER, SO_PASSPIDFD, SO_PASSRIGHTS, SO_INQ.
const FURTHER: [(i32, i32); 4] = [(44, 0), (76, 0), (83, 1), (84, 0)];

/// What the dump of unix sockets remembers between them.
#[derive(Debug, Default)]
pub struct Found {
    diag: Option<Arc<Diag>>,
    peers: Vec<Peer>,
    more: Vec<More>,
}

/// The other end of a socket, not necessarily seen yet.
#[derive(Debug)]
struct Peer {
    inode: u32,
    /// Connected to it, or waiting to be accepted by us.
    connected: bool,
    name: Vec<u8>,
    kind: u32,
    pid: i32,
    fd: i32,
}

/// A unix socket.
pub fn is(live: &Live) -> bool {
    inet::family(live) == Some(libc::AF_UNIX)
}

/// The inode that names a socket, as sock_diag and the images have it.
fn inode(live: &Live) -> u32 {
    live.stat.st_ino as u32
}

fn kind(live: &Live) -> Result<i32> {
    get_int(&live.file, libc::SOL_SOCKET, libc::SO_TYPE)
        .during("cannot look at a socket", || "getsockopt(_, SOL_SOCKET, SO_TYPE, _, _)".into())
}

/// Nothing to look at without the other sockets: [`check`] does.
pub fn later(_: &Live, _: &OwnedFd) -> Result<()> {
    Ok(())
}

/// Refuses what can't be put back, by the names of all it concerns. `sockets` are the container's.
pub fn check(
    options: &Options,
    source: &Source,
    root: &OwnedFd,
    trees: &[Tree],
    sockets: &[Live],
    tasks: &[(i32, i32)],
) -> Vec<Error> {
    if sockets.is_empty() {
        return Vec::new();
    }
    let diag = match Diag::of(source.init, &nested::in_networks(source.init, tasks)) {
        Ok(diag) => diag,
        Err(e) => return vec![e],
    };
    let known: BTreeSet<u32> = sockets.iter().map(inode).collect();
    let others = |s: &UnixSocket| s.waiting.iter().copied().chain([s.peer]).collect::<Vec<_>>();
    let strangers: BTreeSet<u32> = sockets
        .iter()
        .filter_map(|live| diag.unix.get(&inode(live)))
        .flat_map(others)
        .filter(|peer| *peer != 0 && !known.contains(peer))
        .collect();
    let holders = if strangers.is_empty() {
        BTreeMap::new()
    } else {
        outside::holders(&strangers, &tasks.iter().map(|t| t.0).collect())
    };
    let judge = |live: &Live| {
        supported(live, &diag).and_then(|seen| {
            place::find(live, root, trees)?;
            let ends = seen.waiting.iter().map(|w| (*w, false)).chain([(seen.peer, true)]);
            // A stranger that nobody holds is on its way in some queue: the dump will come upon it.
            for (peer, connected) in ends.filter(|(peer, _)| holders.contains_key(peer)) {
                outsider(options, &met(live, peer, connected)?, holders.get(&peer))?;
            }
            Ok(())
        })
    };
    sockets.iter().filter_map(|live| judge(live).err().map(|e| live.name(e))).collect()
}

/// What the kernel lists of a socket that can be kept, as far as that doesn't hang on others.
fn supported<'d>(live: &Live, diag: &'d Diag) -> Result<&'d UnixSocket> {
    let Some(seen) = diag.unix.get(&inode(live)) else {
        return Err(Error::new("a unix socket belongs to another network namespace than the container's")
            .remedy("let the program close it, or stop it"));
    };
    let name =
        || sockopt::name(&live.file).map_or_else(|_| Vec::new(), |n| n.get(2..).unwrap_or(&[]).to_vec());
    let unreadable = |client: &u32| *client == 0 || diag.unix.get(client).is_some_and(|c| c.sent);
    let count = seen.waiting.iter().filter(|client| unreadable(client)).count();
    if count > 0 {
        let e = Error::new(format!(
            "{count} connections to a unix socket have not been accepted, and have sent something or are closed"
        ));
        return Err(place::named(e, &name())
            .remedy("try again once the program has accepted them")
            .passing());
    }
    if queue::urgent(live, kind(live)?) {
        let e = Error::new("urgent data (MSG_OOB) waits in a unix socket");
        return Err(place::named(e, &name()).remedy("try again once the program has received it").passing());
    }
    Ok(seen)
}

fn met(live: &Live, inode: u32, connected: bool) -> Result<Peer> {
    let end = if connected { sockopt::peer(&live.file) } else { sockopt::name(&live.file) };
    Ok(Peer {
        inode,
        connected,
        name: end.map_or_else(|_| Vec::new(), |n| n.get(2..).unwrap_or(&[]).to_vec()),
        kind: kind(live)?.cast_unsigned(),
        pid: live.vpid,
        fd: live.fd,
    })
}

/// A peer outside the container is refused, unless it is told to stay there and can be found again.
fn outsider(options: &Options, peer: &Peer, holder: Option<&String>) -> Result<()> {
    let reachable = peer.connected && peer.kind.cast_signed() == libc::SOCK_DGRAM && !peer.name.is_empty();
    if reachable && options.ext_unix_sk {
        return Ok(());
    }
    let what = if peer.connected { "is connected to" } else { "has not accepted the connection of" };
    let held = holder.map_or_else(String::new, |h| format!(", held by {h}"));
    let e =
        Error::new(format!("a unix socket {what} one outside the container (socket:[{}]{held})", peer.inode));
    let e = place::named(e.pid(peer.pid).fd(peer.fd), &peer.name);
    Err(if reachable {
        e.remedy("close it first, or use --ext-unix-sk if a socket of that name is there at the restore, too")
    } else {
        e.remedy("close it first: only a connected datagram socket can find its peer again")
    })
}

/// Records a socket and what waits in its queue.
pub fn dump(dump: &mut Dump<'_>, live: &Live, id: u32) -> Result<()> {
    let diag = match &dump.files.unix.diag {
        Some(diag) => Arc::clone(diag),
        None => Arc::clone(
            dump.files.unix.diag.insert(Arc::new(Diag::of(dump.source.init, &dump.spaces.in_networks())?)),
        ),
    };
    let seen = supported(live, &diag)?;
    let kind = kind(live)?;
    let place = place::find(live, dump.files.root()?, &dump.files.trees)?;
    let mut more = More { id, waiting: seen.waiting.clone(), ..More::default() };
    let mut peer = seen.peer;
    if peer == 0 && seen.state == ESTABLISHED {
        if let Some(listener) = diag.listener_of(inode(live)) {
            peer = listener;
            more.owner = owner(live);
        }
    }
    if peer != 0 {
        let peer = met(live, peer, true)?;
        dump.files.unix.peers.push(peer);
    }
    for client in &seen.waiting {
        let peer = met(live, *client, false)?;
        dump.files.unix.peers.push(peer);
    }
    more.file = place.moved;
    more.orphan = seen.faceless && kind == libc::SOCK_DGRAM;
    more.peer = peer_credentials(live, &dump.files.pids)?;
    let further = |(name, usual)| {
        let value = get_int(&live.file, libc::SOL_SOCKET, name).ok().filter(|v| *v != usual)?;
        Some((name, value))
    };
    more.options = FURTHER.into_iter().filter_map(further).collect();
    if seen.state != LISTEN {
        waiting(dump, live, kind, &mut more)?;
    }
    let shutdown = match seen.shutdown & 3 {
        1 => Some(SkShutdown::Read),
        2 => Some(SkShutdown::Write),
        3 => Some(SkShutdown::Both),
        _ => None,
    };
    let entry = UnixSkEntry {
        id,
        ino: inode(live),
        r#type: kind.cast_unsigned(),
        state: seen.state,
        flags: live.info.flags,
        uflags: 0,
        backlog: seen.backlog,
        peer,
        fown: live.fown(&dump.files.pids)?,
        opts: sockopts::dump(&live.file, libc::AF_UNIX)?,
        name: place.name,
        shutdown: shutdown.map(|s| s as i32),
        file_perms: place.perms,
        name_dir: place.dir.map(|dir| dir.into_os_string().into_vec()),
        deleted: place.deleted.then_some(true),
        ns_id: dump.spaces.of_socket(dump.source.init, &live.file)?.0,
        mnt_id: place.mount,
    };
    push(dump, entry);
    if !more.is_empty() {
        dump.files.unix.more.push(more);
    }
    Ok(())
}

fn network(dump: &Dump<'_>) -> Option<u32> {
    dump.model.ids.values().find_map(|ids| ids.net_ns_id)
}

fn push(dump: &mut Dump<'_>, entry: UnixSkEntry) {
    let r#type = FdTypes::Unixsk as i32;
    dump.model.files.push(FileEntry { r#type, id: entry.id, usk: Some(entry), ..FileEntry::default() });
}

/// Records what waits, and the files that are on their way.
fn waiting(dump: &mut Dump<'_>, live: &Live, kind: i32, more: &mut More) -> Result<()> {
    let queue = queue::read(live, kind)?;
    more.reset = queue.reset;
    more.peek_offset = Some(queue.peek_offset).filter(|o| *o >= 0);
    for packet in queue.packets {
        let mut scm = Vec::new();
        if !packet.rights.is_empty() {
            let mut rights = Vec::new();
            for file in packet.rights {
                let passed = Live::own(file, live.vpid)?;
                locks::refuse(&passed)?;
                let (id, _) = record(dump, &passed).map_err(|e| {
                    e.remedy("it was passed in a unix socket, and nobody has received it yet")
                })?;
                rights.push(id);
                // Later ones are compared with it.
                dump.files.held.push(passed.file);
            }
            scm.push(ScmEntry { r#type: libc::SCM_RIGHTS.cast_unsigned(), rights });
        }
        let length = u32::try_from(packet.bytes.len()).map_err(|_| Error::new("a packet is too large"))?;
        dump.model.sk_queues.push((SkPacketEntry { id_for: more.id, length, scm }, packet.bytes));
        let credentials = packet.credentials.map(|c| inside(c, &dump.files.pids));
        more.senders.push(Sender { address: packet.from, credentials });
    }
    if more.senders.iter().all(|sender| *sender == Sender::default()) {
        more.senders.clear();
    }
    Ok(())
}

/// The pid as the container knows it.
fn inside(credentials: Credentials, pids: &Pids) -> Credentials {
    Credentials { pid: pids.get(&credentials.pid).copied().unwrap_or(0), ..credentials }
}

fn peer_credentials(live: &Live, pids: &Pids) -> Result<Option<Credentials>> {
    let (bytes, _) = get_bytes::<12>(&live.file, libc::SOL_SOCKET, libc::SO_PEERCRED)
        .during("cannot look at a socket", || "getsockopt(_, SOL_SOCKET, SO_PEERCRED, _, _)".into())?;
    let [p0, p1, p2, p3, u0, u1, u2, u3, g0, g1, g2, g3] = bytes;
    let uid = u32::from_ne_bytes([u0, u1, u2, u3]);
    let gid = u32::from_ne_bytes([g0, g1, g2, g3]);
    let pid = i32::from_ne_bytes([p0, p1, p2, p3]);
    Ok((uid != u32::MAX).then(|| inside(Credentials { pid, uid, gid }, pids)))
}

/// Effective ids of the process that has a socket: those it connected with, as a rule.
fn owner(live: &Live) -> Option<Credentials> {
    let status = read_text(format!("/proc/{}/status", live.pid)).ok()?;
    let effective = |key: &str| {
        status.lines().find_map(|l| l.strip_prefix(key))?.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    Some(Credentials { pid: live.vpid, uid: effective("Uid:")?, gid: effective("Gid:")? })
}

/// Looks for peers among all sockets, once these are known. What CRIU's records cannot hold is the result.
pub fn resolve(dump: &mut Dump<'_>) -> Result<Vec<More>> {
    let found = std::mem::take(&mut dump.files.unix);
    let mut known: BTreeSet<u32> =
        dump.model.files.iter().filter_map(|f| f.usk.as_ref()).map(|e| e.ino).collect();
    let strangers: BTreeSet<u32> =
        found.peers.iter().map(|p| p.inode).filter(|inode| !known.contains(inode)).collect();
    if strangers.is_empty() {
        return Ok(found.more);
    }
    let holders = outside::holders(&strangers, &dump.tasks.iter().map(|t| t.pid).collect());
    for peer in &found.peers {
        if known.contains(&peer.inode) {
            continue;
        }
        outsider(dump.options, peer, holders.get(&peer.inode))?;
        known.insert(peer.inode);
        let entry = UnixSkEntry {
            id: dump.new_id(),
            ino: peer.inode,
            r#type: peer.kind,
            state: LISTEN,
            uflags: USK_EXTERN,
            name: peer.name.clone(),
            fown: FownEntry::default(),
            opts: SkOptsEntry::default(),
            ns_id: network(dump),
            ..UnixSkEntry::default()
        };
        push(dump, entry);
    }
    Ok(found.more)
}
