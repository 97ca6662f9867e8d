//! Images that CRIU has written, in the shape that ours have.

use crate::checkpoint::image::{CoreEntry, SkShutdown};
use crate::checkpoint::model::{Model, TcpStream};
use crate::checkpoint::namespaces::kind::Kind;
use crate::checkpoint::namespaces::user::outside;
use crate::checkpoint::namespaces::{cgroup, mount};

/// TCP_CLOSE.
const CLOSE: u32 = 7;

impl Model {
    /// Changes what CRIU writes in another way than we do.
    pub(super) fn adopt(&mut self) {
        if let Some(groups) = self.cgroup.take() {
            self.cgroup = Some(cgroup::rooted(groups));
        }
        for table in self.mountpoints.values_mut() {
            *table = mount::in_kernels_order(std::mem::take(table));
        }
        self.cores.values_mut().for_each(adopt_core);
        self.adopt_owners();
        self.adopt_ended_connections();
    }

    /// Owners of files are the container's there, and this host's in ours.
    fn adopt_owners(&mut self) {
        let Some(maps) = self.userns.get(&Kind::User.inits(self)).cloned() else { return };
        // It never fails.
        let _ = self.each_owner(&mut |_, uid, gid| {
            (*uid, *gid) = (outside(&maps.uid_map, *uid), outside(&maps.gid_map, *gid));
            Ok(())
        });
    }

    /// A TCP connection that both sides have ended has a stream there, with nothing in it.
    fn adopt_ended_connections(&mut self) {
        for socket in self.files.iter_mut().filter_map(|file| file.isk.as_mut()) {
            let ended = socket.proto == libc::IPPROTO_TCP.cast_unsigned() && socket.state == CLOSE;
            let empty = |stream: &mut TcpStream| stream.received.is_empty() && stream.sent.is_empty();
            if ended && self.tcp_streams.get_mut(&socket.ino).is_some_and(empty) {
                self.tcp_streams.remove(&socket.ino);
                socket.shutdown = Some(SkShutdown::Both as i32);
            }
        }
    }
}

fn adopt_core(core: &mut CoreEntry) {
    let Some(tc) = &mut core.tc else { return };
    // Since 4.0 every thread has its own set of control groups, its process has none.
    tc.cg_set = tc.cg_set.or(core.thread_core.as_ref().and_then(|thread| thread.cg_set));
    // The kernel shows hexadecimal digits, which CRIU reads as decimal ones.
    tc.personality = u32::from_str_radix(&tc.personality.to_string(), 16).unwrap_or(tc.personality);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::*;

    #[test]
    fn owners_go_through_the_containers_mappings() {
        let extent = UidGidExtent { first: 0, lower_first: 100_000, count: 1000 };
        let maps = UsernsEntry { uid_map: vec![extent.clone()], gid_map: vec![extent] };
        let ids = TaskKobjIdsEntry { user_ns_id: Some(9), ..TaskKobjIdsEntry::default() };
        let mut model = Model {
            pstree: vec![PstreeEntry { pid: 1, ..PstreeEntry::default() }],
            ids: [(1, ids)].into(),
            userns: [(9, maps)].into(),
            ghosts: [(5, GhostFileEntry { uid: 7, gid: 5000, ..GhostFileEntry::default() })].into(),
            ..Model::default()
        };
        model.adopt();
        // One that nothing maps stays.
        assert_eq!((model.ghosts[&5].uid, model.ghosts[&5].gid), (100_007, 5000));
    }

    #[test]
    fn an_ended_connection_is_none() {
        let socket = |ino, state| {
            let isk = InetSkEntry { ino, state, proto: 6, ..InetSkEntry::default() };
            FileEntry { isk: Some(isk), ..FileEntry::default() }
        };
        let mut model = Model {
            files: vec![socket(1, CLOSE), socket(2, 1)],
            tcp_streams: [(1, TcpStream::default()), (2, TcpStream::default())].into(),
            ..Model::default()
        };
        model.adopt();
        assert_eq!(model.tcp_streams.into_keys().collect::<Vec<_>>(), [2]);
        assert_eq!(model.files[0].isk.as_ref().unwrap().shutdown, Some(SkShutdown::Both as i32));
    }

    #[test]
    fn a_process_has_its_group_and_its_personality() {
        // ADDR_NO_RANDOMIZE, and READ_IMPLIES_EXEC.
        for (theirs, personality) in [(40_000, 0x4_0000), (400_000, 0x40_0000), (0, 0)] {
            let mut core = CoreEntry {
                tc: Some(TaskCoreEntry { personality: theirs, ..TaskCoreEntry::default() }),
                thread_core: Some(ThreadCoreEntry { cg_set: Some(4), ..ThreadCoreEntry::default() }),
                ..CoreEntry::default()
            };
            adopt_core(&mut core);
            let tc = core.tc.unwrap();
            assert_eq!((tc.personality, tc.cg_set), (personality, Some(4)));
        }
    }
}
