//! The process tree: who forks whom, and when, so that parents, sessions and process groups come out as they were.
//!
//! A session is inherited at fork and left only by setsid(2), so the moment of a child's fork matters:
//!
//! ```text
//!   parent P:   born in session A ── forks the children of session A ── setsid ── forks the children of session P
//!                                        "early"                                        "late"
//!
//!   leader of session S gone:     init forks helper S, which calls setsid and forks the orphans of S; it exits at the end
//!   orphan in a living session S: leader S forks a helper, which forks the orphan; it exits, init (or the child
//!                                 subreaper that had adopted the orphan) becomes the parent
//!   leader of group G gone:       a member of the session forks helper G, which exits when all have joined the group
//! ```
//!
//! [`plan`] yields plain steps, and plays them through in a model of the kernel's rules: a tree that would come out
//! different is refused, at dump already.

use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::{Error, Result};

/// A process as the images know it. Session or group 0: it lives outside the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Process id.
    pub pid: i32,
    /// Parent; 0 for init.
    pub ppid: i32,
    /// Session.
    pub sid: i32,
    /// Process group.
    pub pgid: i32,
}

/// One step of making the tree. Every pid is one inside the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `by` forks `pid`; `helper` if no process of the images has that number.
    Fork {
        /// The parent at birth.
        by: i32,
        /// The child.
        pid: i32,
        /// It exits again.
        helper: bool,
    },
    /// `pid` calls setsid(2).
    Setsid {
        /// The new leader.
        pid: i32,
    },
    /// `pid` calls setpgid(2) for itself.
    Setpgid {
        /// Who joins.
        pid: i32,
        /// The group.
        pgid: i32,
    },
    /// `pid` becomes a child subreaper; the restore of its own state decides later whether it stays one.
    Subreaper {
        /// Who adopts.
        pid: i32,
    },
    /// Helper `pid` exits and `by` reaps it; its children are adopted.
    Exit {
        /// The helper.
        pid: i32,
        /// Its parent.
        by: i32,
    },
}

/// The steps that make `nodes` out of init, `nodes[0]`, which exists and, if it leads a session, has called setsid.
/// `taken`: every other number in use, thread ids above all.
pub fn plan(nodes: &[Node], taken: &BTreeSet<i32>) -> Result<Vec<Step>> {
    let Some(&root) = nodes.first() else { return Err(Error::new("the images hold no process")) };
    let tree: BTreeMap<i32, Node> = nodes.iter().map(|n| (n.pid, *n)).collect();
    if tree.len() != nodes.len() {
        return Err(Error::new("the images hold two processes with the same id"));
    }
    for node in &nodes[1..] {
        if !tree.contains_key(&node.ppid) {
            return Err(Error::new(format!("the parent, {}, is not a process of the container", node.ppid))
                .pid(node.pid));
        }
    }
    let mut used: BTreeSet<i32> = taken.clone();
    used.extend(nodes.iter().flat_map(|n| [n.pid, n.sid, n.pgid]));
    let mut planner = Planner { root, births: births(nodes, &tree)?, tree, used, ..Planner::default() };
    planner.adopt(nodes);
    planner.dead_groups(nodes);
    planner.grow(root.pid, 0);
    planner.groups(nodes);
    planner.leave();
    verify(nodes, &planner.steps)?;
    Ok(planner.steps)
}

/// The session in which each process has to be born; None where any will do.
fn births(nodes: &[Node], tree: &BTreeMap<i32, Node>) -> Result<BTreeMap<i32, Option<i32>>> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for node in &nodes[1..] {
        children.entry(node.ppid).or_default().push(node.pid);
    }
    // Children before parents: a depth-first order, reversed.
    let (mut order, mut stack) = (Vec::new(), vec![nodes[0].pid]);
    while let Some(pid) = stack.pop() {
        order.push(pid);
        stack.extend(children.get(&pid).into_iter().flatten());
    }
    if order.len() != nodes.len() {
        return Err(Error::new("the process tree of the images is not connected"));
    }
    let mut births: BTreeMap<i32, Option<i32>> = BTreeMap::new();
    for pid in order.into_iter().rev() {
        let node = tree[&pid];
        let birth = if node.sid != node.pid {
            Some(node.sid)
        } else if node.ppid == 0 {
            None
        } else {
            // A leader with children in another session was born in that one; of several, one can be true,
            // the others are orphans (init's) or the plan will not verify.
            children.get(&pid).into_iter().flatten().filter_map(|c| births[c]).find(|s| *s != node.sid)
        };
        births.insert(pid, birth);
    }
    Ok(births)
}

#[derive(Debug)]
struct Planner {
    root: Node,
    tree: BTreeMap<i32, Node>,
    births: BTreeMap<i32, Option<i32>>,
    used: BTreeSet<i32>,
    /// Children to fork before setsid, and after it.
    early: BTreeMap<i32, Vec<i32>>,
    late: BTreeMap<i32, Vec<i32>>,
    /// Helpers that lead a session.
    leaders: BTreeSet<i32>,
    helpers: BTreeSet<i32>,
    /// Helpers in the order of their birth, with their parents.
    born: Vec<(i32, i32)>,
    steps: Vec<Step>,
}

impl Default for Planner {
    fn default() -> Self {
        Self {
            root: Node { pid: 0, ppid: 0, sid: 0, pgid: 0 },
            tree: BTreeMap::new(),
            births: BTreeMap::new(),
            used: BTreeSet::new(),
            early: BTreeMap::new(),
            late: BTreeMap::new(),
            leaders: BTreeSet::new(),
            helpers: BTreeSet::new(),
            born: Vec::new(),
            steps: Vec::new(),
        }
    }
}

impl Planner {
    /// Gives every process the one that forks it.
    fn adopt(&mut self, nodes: &[Node]) {
        for node in &nodes[1..] {
            let parent = self.tree[&node.ppid];
            let birth = self.births[&node.pid];
            match birth {
                None => self.late.entry(parent.pid).or_default().push(node.pid),
                Some(session) if session == parent.sid => {
                    self.late.entry(parent.pid).or_default().push(node.pid)
                }
                Some(session) if parent.sid == parent.pid && self.births[&parent.pid] == Some(session) => {
                    self.early.entry(parent.pid).or_default().push(node.pid);
                }
                Some(session) => self.orphan(*node, session),
            }
        }
    }

    /// `node` was adopted: its session's leader, or a helper of it, forks it.
    fn orphan(&mut self, node: Node, session: i32) {
        if node.ppid != self.root.pid && !self.steps.contains(&Step::Subreaper { pid: node.ppid }) {
            self.steps.push(Step::Subreaper { pid: node.ppid });
        }
        if self.tree.contains_key(&session) {
            let helper = self.free();
            self.helpers.insert(helper);
            self.late.entry(session).or_default().push(helper);
            self.late.entry(helper).or_default().push(node.pid);
        } else {
            if self.leaders.insert(session) {
                self.helpers.insert(session);
                self.late.entry(node.ppid).or_default().push(session);
            }
            self.late.entry(session).or_default().push(node.pid);
        }
    }

    /// Helpers for groups whose leader is gone; a helper that leads a session has its own group already.
    fn dead_groups(&mut self, nodes: &[Node]) {
        for node in nodes {
            let known =
                node.pgid == 0 || self.tree.contains_key(&node.pgid) || self.helpers.contains(&node.pgid);
            if !known {
                self.helpers.insert(node.pgid);
                let by = if node.sid == 0 { self.root.pid } else { node.sid };
                self.late.entry(by).or_default().push(node.pgid);
            }
        }
    }

    /// Forks what `pid` forks, in order, depth first.
    fn grow(&mut self, pid: i32, depth: usize) {
        // Deeper than any tree that was accepted; a cycle in hostile images ends here and does not verify.
        if depth > self.used.len() + 1 {
            return;
        }
        for child in self.early.remove(&pid).unwrap_or_default() {
            self.fork(pid, child, depth);
        }
        let leads = self.leaders.contains(&pid) || self.tree.get(&pid).is_some_and(|n| n.sid == pid);
        if leads && pid != self.root.pid {
            self.steps.push(Step::Setsid { pid });
        }
        for child in self.late.remove(&pid).unwrap_or_default() {
            self.fork(pid, child, depth);
        }
    }

    fn fork(&mut self, by: i32, pid: i32, depth: usize) {
        let helper = self.helpers.contains(&pid);
        self.steps.push(Step::Fork { by, pid, helper });
        if helper {
            self.born.push((pid, by));
        }
        self.grow(pid, depth + 1);
    }

    /// First the groups are founded, then joined, then their founders may leave for others.
    fn groups(&mut self, nodes: &[Node]) {
        let wanted: BTreeSet<i32> = nodes.iter().map(|n| n.pgid).filter(|g| *g != 0).collect();
        for &group in &wanted {
            let leads_session =
                self.leaders.contains(&group) || self.tree.get(&group).is_some_and(|n| n.sid == group);
            if !leads_session {
                self.steps.push(Step::Setpgid { pid: group, pgid: group });
            }
        }
        let (founders, members): (Vec<&Node>, Vec<&Node>) =
            nodes.iter().partition(|n| wanted.contains(&n.pid));
        for node in members.into_iter().chain(founders) {
            let in_roots = node.pgid == self.root.pgid;
            let moves = if in_roots { node.pid != self.root.pid } else { node.pgid != node.pid };
            if node.pgid != 0 && moves {
                self.steps.push(Step::Setpgid { pid: node.pid, pgid: node.pgid });
            }
        }
    }

    /// Helpers exit, the youngest first: a helper's own helpers are gone before it is.
    fn leave(&mut self) {
        for (pid, by) in std::mem::take(&mut self.born).into_iter().rev() {
            self.steps.push(Step::Exit { pid, by });
        }
    }

    /// A pid that nothing uses.
    fn free(&mut self) -> i32 {
        let free = (300..).find(|pid| !self.used.contains(pid)).unwrap_or(i32::MAX);
        self.used.insert(free);
        free
    }
}

/// Plays the steps through by the kernel's rules, and compares.
fn verify(nodes: &[Node], steps: &[Step]) -> Result<()> {
    let root = nodes[0];
    let mut live: BTreeMap<i32, Node> = BTreeMap::from([(root.pid, root)]);
    let mut reapers = BTreeSet::new();
    let impossible = |pid: i32, what: String| {
        Error::new(format!("the process tree cannot be made again: {what}"))
            .pid(pid)
            .remedy("end the process, or start it in a way that leaves it in its parent's session")
    };
    for step in steps {
        match *step {
            Step::Fork { by, pid, .. } => {
                let Some(parent) = live.get(&by).copied() else {
                    return Err(impossible(pid, format!("its creator {by} does not exist yet")));
                };
                if live.insert(pid, Node { pid, ppid: by, ..parent }).is_some() {
                    return Err(impossible(pid, "it would be made twice".into()));
                }
            }
            Step::Setsid { pid } => {
                if live.values().any(|n| n.pgid == pid) {
                    return Err(impossible(pid, "it leads a process group and a session".into()));
                }
                if let Some(node) = live.get_mut(&pid) {
                    (node.sid, node.pgid) = (pid, pid);
                }
            }
            Step::Setpgid { pid, pgid } => {
                let founded = pid == pgid || live.values().any(|n| n.pgid == pgid);
                match live.get(&pid).copied() {
                    Some(n) if n.sid == pid && n.pgid == pgid => {}
                    Some(n) if n.sid == pid => return Err(impossible(pid, "it leads a session".into())),
                    Some(n) if founded && live.values().all(|m| m.pgid != pgid || m.sid == n.sid) => {}
                    _ => return Err(impossible(pid, format!("process group {pgid} is not in its session"))),
                }
                live.entry(pid).and_modify(|n| n.pgid = pgid);
            }
            Step::Subreaper { pid } => _ = reapers.insert(pid),
            Step::Exit { pid, .. } => {
                let mut heir = live.get(&pid).map_or(root.pid, |n| n.ppid);
                while heir != root.pid && !reapers.contains(&heir) {
                    heir = live.get(&heir).map_or(root.pid, |n| n.ppid);
                }
                live.remove(&pid);
                live.values_mut().filter(|n| n.ppid == pid).for_each(|n| n.ppid = heir);
            }
        }
    }
    for node in nodes {
        let made = live.remove(&node.pid);
        let outside = |have: i32, want: i32| want == 0 || have == want;
        match made {
            Some(m) if m.ppid == node.ppid && outside(m.sid, node.sid) && outside(m.pgid, node.pgid) => {}
            Some(m) => {
                let Node { ppid, sid, pgid, .. } = m;
                return Err(impossible(
                    node.pid,
                    format!(
                        "parent {}, session {}, group {} would become {ppid}, {sid}, {pgid}",
                        node.ppid, node.sid, node.pgid
                    ),
                ));
            }
            None => return Err(impossible(node.pid, "nobody can fork it".into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(pid: i32, ppid: i32, sid: i32, pgid: i32) -> Node {
        Node { pid, ppid, sid, pgid }
    }
    fn ok(nodes: &[Node]) -> Vec<Step> {
        plan(nodes, &BTreeSet::new()).unwrap()
    }
    fn fork(by: i32, pid: i32) -> Step {
        Step::Fork { by, pid, helper: false }
    }

    #[test]
    fn one_process_needs_no_step() {
        assert_eq!(ok(&[n(1, 0, 1, 1)]), []);
    }

    #[test]
    fn children_and_a_pipeline_of_a_shell() {
        // sh (5) leads a session; 6 and 7 are one job in the foreground.
        let steps = ok(&[n(1, 0, 1, 1), n(5, 1, 5, 5), n(6, 5, 5, 6), n(7, 5, 5, 6)]);
        assert_eq!(
            steps,
            [
                fork(1, 5),
                Step::Setsid { pid: 5 },
                fork(5, 6),
                fork(5, 7),
                Step::Setpgid { pid: 6, pgid: 6 },
                Step::Setpgid { pid: 7, pgid: 6 },
            ]
        );
    }

    #[test]
    fn a_child_born_before_setsid_is_forked_before_it() {
        let steps = ok(&[n(1, 0, 1, 1), n(5, 1, 5, 5), n(6, 5, 1, 1), n(7, 5, 5, 5)]);
        let at = |s: Step| steps.iter().position(|x| *x == s).unwrap();
        assert!(at(fork(5, 6)) < at(Step::Setsid { pid: 5 }));
        assert!(at(fork(5, 7)) > at(Step::Setsid { pid: 5 }));
    }

    #[test]
    fn a_helper_stands_in_for_a_dead_session_leader() {
        let steps = ok(&[n(1, 0, 1, 1), n(8, 1, 7, 7), n(9, 1, 7, 7)]);
        assert!(steps.contains(&Step::Fork { by: 1, pid: 7, helper: true }));
        assert!(steps.contains(&fork(7, 8)));
        assert_eq!(*steps.last().unwrap(), Step::Exit { pid: 7, by: 1 });
    }

    #[test]
    fn an_orphan_of_a_living_session_is_reparented_to_init() {
        // (sleep 100 &) in the shell 5
        let steps = ok(&[n(1, 0, 1, 1), n(5, 1, 5, 5), n(7, 1, 5, 5)]);
        assert!(steps.contains(&fork(300, 7)));
        assert!(steps.contains(&Step::Exit { pid: 300, by: 5 }));
    }

    #[test]
    fn an_orphan_of_a_subreaper() {
        let steps = ok(&[n(1, 0, 1, 1), n(5, 1, 1, 1), n(6, 5, 6, 6), n(8, 5, 6, 6)]);
        assert!(steps.contains(&Step::Subreaper { pid: 5 }));
    }

    #[test]
    fn a_dead_group_leader_and_one_that_moved_away() {
        ok(&[n(1, 0, 1, 1), n(4, 1, 1, 3), n(5, 1, 1, 3)]);
        // 4 founded group 4, 5 joined, then 4 went back to init's.
        let steps = ok(&[n(1, 0, 1, 1), n(4, 1, 1, 1), n(5, 1, 1, 4)]);
        assert_eq!(*steps.last().unwrap(), Step::Setpgid { pid: 4, pgid: 1 });
    }

    #[test]
    fn helpers_avoid_thread_ids() {
        let steps =
            plan(&[n(1, 0, 1, 1), n(5, 1, 5, 5), n(7, 1, 5, 5)], &BTreeSet::from([300, 301])).unwrap();
        assert!(steps.contains(&fork(302, 7)));
    }

    #[test]
    fn what_cannot_be_made_is_refused_by_name() {
        // 6 is a child of 5 in a session to which 5 never belonged, and 5 is no subreaper above that session.
        let error = plan(&[n(1, 0, 1, 1), n(5, 1, 1, 1), n(6, 5, 9, 9), n(9, 1, 9, 9)], &BTreeSet::new())
            .unwrap_err();
        assert_eq!(error.fields().pid, Some(6));
        assert!(error.to_string().contains("cannot be made again"), "{error}");
    }

    #[test]
    fn hostile_trees_end() {
        let none = BTreeSet::new();
        assert!(plan(&[], &none).is_err());
        assert!(plan(&[n(1, 0, 1, 1), n(1, 1, 1, 1)], &none).is_err());
        assert!(plan(&[n(1, 0, 1, 1), n(2, 3, 1, 1), n(3, 2, 1, 1)], &none).is_err());
        assert!(plan(&[n(1, 0, 1, 1), n(2, 2, 1, 1)], &none).is_err());
    }

    #[test]
    fn random_histories_can_be_made_again() {
        // Play random forks, setsids, setpgids, exits: whatever the kernel's rules can produce below init alone,
        // the planner must find. A small linear congruence keeps it repeatable.
        let mut seed = 7_u32;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as usize % below
        };
        for _ in 0..2000 {
            let mut live = vec![n(1, 0, 1, 1)];
            let mut next = 2;
            for _ in 0..random(60) {
                let i = random(live.len());
                let who = live[i];
                match random(6) {
                    0..=2 => {
                        live.push(Node { pid: next, ppid: who.pid, ..who });
                        next += 1;
                    }
                    3 if live.iter().all(|m| m.pgid != who.pid) => {
                        live[i] = Node { sid: who.pid, pgid: who.pid, ..who };
                    }
                    4 if who.sid != who.pid => live[i].pgid = who.pid,
                    5 if i > 0 => {
                        live.remove(i);
                        live.iter_mut().filter(|m| m.ppid == who.pid).for_each(|m| m.ppid = 1);
                    }
                    _ => {}
                }
            }
            // A leader that was born in a session which its children, born there too, have not left is the one case
            // of two possible births; everything must be found.
            if let Err(error) = plan(&live, &BTreeSet::new()) {
                panic!("{error}: {live:?}");
            }
        }
    }
}
