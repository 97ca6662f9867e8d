//! Who listens: SO_PEERCRED of a client names the process that called listen(2) last.
//!
//! Sockets are made in this process, which the container sees as pid 0, and whoever asks takes a server of that number
//! for none (systemd's own tools do). So one of its processes calls listen(2) once more, with the ids of then: the one
//! that did before, if it still has the socket, or else the first that has it.

use std::collections::BTreeMap;

use super::LISTEN;
use super::more::{Credentials, More};
use crate::checkpoint::Result;
use crate::checkpoint::context::NewTask;
use crate::checkpoint::files::opener::Files;
use crate::checkpoint::image::UnixSkEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::nested;
use crate::checkpoint::remote::Batch;
use crate::checkpoint::task::status::IdMap;

/// `-1` of setresuid(2): leave it.
const KEEP: u64 = u32::MAX as u64;

/// A socket, in the process that is to listen on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    fd: u32,
    backlog: u32,
    who: Option<Credentials>,
}

/// The listeners among these sockets, by process.
pub fn listeners(
    model: &Model,
    sockets: &[&UnixSkEntry],
    more: &BTreeMap<u32, More>,
) -> BTreeMap<i32, Vec<Listener>> {
    let mut found: BTreeMap<i32, Vec<Listener>> = BTreeMap::new();
    let listening: BTreeMap<u32, &UnixSkEntry> =
        sockets.iter().filter(|e| e.state == LISTEN).map(|e| (e.id, *e)).collect();
    if listening.is_empty() {
        return found;
    }
    let mut holders: BTreeMap<u32, Vec<(i32, u32)>> = BTreeMap::new();
    for vpid in model.mm.keys() {
        let table = model.ids.get(vpid).and_then(|ids| model.fdinfo.get(&ids.files_id));
        for number in table.into_iter().flatten().filter(|n| listening.contains_key(&n.id)) {
            holders.entry(number.id).or_default().push((vpid.cast_signed(), number.fd));
        }
    }
    for (id, held) in holders {
        let (Some(e), who) = (listening.get(&id), more.get(&id).and_then(|more| more.peer)) else { continue };
        let owner = held.iter().find(|(vpid, _)| who.is_some_and(|who| who.pid == *vpid));
        if let Some(&(vpid, fd)) = owner.or(held.first()) {
            found.entry(vpid).or_default().push(Listener { fd, backlog: e.backlog, who });
        }
    }
    found
}

impl Files<'_> {
    /// Has a task listen on the sockets that it is to be known for. It has the runtime's credentials still.
    pub(in crate::checkpoint::files) fn listen(&mut self, task: &mut NewTask) -> Result<()> {
        let Some(listeners) = self.listeners.remove(&task.vpid) else { return Ok(()) };
        let mut batch = Batch::new();
        batch.about("cannot listen on a unix socket");
        // In a user namespace of its own it has the ids of there already.
        let own = nested::user_of(self.restore.model, task.vpid.cast_unsigned()).is_some();
        let ids = |who: Credentials| -> Result<(u32, u32)> {
            let (users, groups) = (IdMap::users(task.pid)?, IdMap::groups(task.pid)?);
            Ok((users.inside(who.uid), groups.inside(who.gid)))
        };
        for Listener { fd, backlog, who } in listeners {
            let (uid, gid) = who.filter(|_| !own).map_or(Ok((0, 0)), ids)?;
            let mut call = |nr, args: [u64; 3]| _ = batch.call(nr, &args.map(Into::into));
            if (uid, gid) != (0, 0) {
                call(libc::SYS_setresgid, [KEEP, gid.into(), KEEP]);
                call(libc::SYS_setresuid, [KEEP, uid.into(), KEEP]);
            }
            call(libc::SYS_listen, [fd.into(), backlog.into(), 0]);
            if (uid, gid) != (0, 0) {
                call(libc::SYS_setresuid, [KEEP, 0, KEEP]);
                call(libc::SYS_setresgid, [KEEP, 0, KEEP]);
            }
        }
        task.injection.run(&batch).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::{FdinfoEntry, MmEntry, TaskKobjIdsEntry};

    #[test]
    fn who_listened_listens_again_or_else_who_has_the_socket() {
        let mut model = Model::default();
        for vpid in [1_u32, 5, 9] {
            model.mm.insert(vpid, MmEntry::default());
            model.ids.insert(vpid, TaskKobjIdsEntry { files_id: vpid, ..TaskKobjIdsEntry::default() });
            let table = [7_u32, 8].map(|id| FdinfoEntry { id, fd: id + vpid, ..FdinfoEntry::default() });
            model.fdinfo.insert(vpid, table.to_vec());
        }
        let [a, b] = [7, 8].map(|id| UnixSkEntry { id, state: LISTEN, backlog: 3, ..UnixSkEntry::default() });
        let who = Some(Credentials { pid: 5, uid: 2, gid: 3 });
        let more = BTreeMap::from([(7, More { id: 7, peer: who, ..More::default() })]);
        let found = listeners(&model, &[&a, &b], &more);
        assert_eq!(found[&5], [Listener { fd: 12, backlog: 3, who }]);
        assert_eq!(found[&1], [Listener { fd: 9, backlog: 3, who: None }]);
    }
}
