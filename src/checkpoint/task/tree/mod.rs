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
//! A pid namespace that the container has made begins with its first process, whoever is adopted in it is adopted by that
//! one, and nobody in it can join a group of outside: its parent joins before it is forked. Whoever has been born there
//! from outside comes after all others.
//!
//! What exec has started comes from outside, and leads a session.
//!
//! [`plan`] yields plain steps, and plays them through in a model of the kernel's rules: a tree that would come out
//! different is refused, at dump already.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::checkpoint::namespaces::nested::pids::Pids;
use crate::checkpoint::{Error, Result};

/// A process as the images know it. Session or group 0: it lives outside the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Process id.
    pub pid: i32,
    /// Parent; 0 for init and what exec has started.
    pub ppid: i32,
    /// Session.
    pub sid: i32,
    /// Process group.
    pub pgid: i32,
}

/// One step of making the tree. Every pid is one inside the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `pid` comes from outside: its stub is there already.
    Enter {
        /// The newcomer.
        pid: i32,
    },
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
pub fn plan(nodes: &[Node], taken: &BTreeSet<i32>, pids: &Pids) -> Result<Vec<Step>> {
    let Some(&root) = nodes.first() else { return Err(Error::new("the images hold no process")) };
    let tree: BTreeMap<i32, Node> = nodes.iter().map(|n| (n.pid, *n)).collect();
    if tree.len() != nodes.len() {
        return Err(Error::new("the images hold two processes with the same id"));
    }
    for node in &nodes[1..] {
        if node.ppid != 0 && !tree.contains_key(&node.ppid) {
            return Err(Error::new(format!("the parent, {}, is not a process of the container", node.ppid))
                .pid(node.pid));
        }
    }
    let mut used: BTreeSet<i32> = taken.clone();
    used.extend(nodes.iter().flat_map(|n| [n.pid, n.sid, n.pgid]));
    used.extend(pids.numbers());
    let births = births(nodes, &tree)?;
    let mut planner = Planner {
        root,
        pids,
        births,
        tree,
        used,
        next: 300,
        early: BTreeMap::new(),
        late: BTreeMap::new(),
        joining: VecDeque::new(),
        leaders: BTreeSet::new(),
        helpers: BTreeSet::new(),
        born: Vec::new(),
        steps: Vec::new(),
    };
    planner.adopt(nodes);
    planner.dead_groups(nodes);
    planner.grow(root.pid, 0);
    for newcomer in nodes[1..].iter().filter(|n| n.ppid == 0) {
        planner.steps.push(Step::Enter { pid: newcomer.pid });
        planner.grow(newcomer.pid, 0);
    }
    while let Some((by, pid)) = planner.joining.pop_front() {
        planner.fork(by, pid, 0);
    }
    planner.groups(nodes);
    planner.leave();
    verify(nodes, &planner.steps, pids)?;
    Ok(planner.steps)
}

/// The session in which each process has to be born; None where any will do.
fn births(nodes: &[Node], tree: &BTreeMap<i32, Node>) -> Result<BTreeMap<i32, Option<i32>>> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for node in &nodes[1..] {
        children.entry(node.ppid).or_default().push(node.pid);
    }
    // Children before parents: a depth-first order, reversed.
    let mut stack = children.remove(&0).unwrap_or_default();
    stack.push(nodes[0].pid);
    let mut order = Vec::new();
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
struct Planner<'a> {
    root: Node,
    pids: &'a Pids,
    tree: BTreeMap<i32, Node>,
    births: BTreeMap<i32, Option<i32>>,
    used: BTreeSet<i32>,
    /// Nothing from the first pid for helpers up to this one is free.
    next: i32,
    /// Children to fork before setsid, and after it.
    early: BTreeMap<i32, Vec<i32>>,
    late: BTreeMap<i32, Vec<i32>>,
    /// Processes, each after its parent, that are born into a pid namespace which is neither their parent's nor new.
    joining: VecDeque<(i32, i32)>,
    /// Helpers that lead a session.
    leaders: BTreeSet<i32>,
    helpers: BTreeSet<i32>,
    /// Helpers in the order of their birth, with their parents.
    born: Vec<(i32, i32)>,
    steps: Vec<Step>,
}

impl Planner<'_> {
    /// Gives every process the one that forks it.
    fn adopt(&mut self, nodes: &[Node]) {
        for node in &nodes[1..] {
            let Some(parent) = self.tree.get(&node.ppid).copied() else { continue };
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
        let adopts = node.ppid == self.root.pid || self.pids.made_by(node.ppid).is_some();
        if !adopts && !self.steps.contains(&Step::Subreaper { pid: node.ppid }) {
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
                let by = match self.pids.spaces.get(&self.pids.space(node.pgid)) {
                    Some(level) => level.init,
                    None if node.sid == 0 => self.root.pid,
                    None => node.sid,
                };
                let late = self.late.entry(by).or_default();
                // Those who cannot join it later are born into it.
                let at = if self.pids.is_empty() { late.len() } else { 0 };
                late.insert(at, node.pgid);
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
            let joins = self.is_elsewhere(pid, child) && self.pids.made_by(child).is_none();
            match joins {
                true => self.joining.push_back((pid, child)),
                false => self.fork(pid, child, depth),
            }
        }
    }

    /// Whether a child is born in another pid namespace than its parent. Helpers are not.
    fn is_elsewhere(&self, parent: i32, child: i32) -> bool {
        !self.helpers.contains(&child) && self.pids.space(parent) != self.pids.space(child)
    }

    /// Before somebody is born where nobody sees it, the parent joins the group that is to be inherited there.
    fn bequeath_group(&mut self, by: i32, child: i32) {
        let space = self.pids.space(child);
        let heirs = self.tree.get(&child).into_iter().chain(self.tree.values());
        let mut heirs = heirs.filter(|n| self.pids.within(self.pids.space(n.pid), space) && n.pgid != 0);
        let group = heirs.find(|n| self.pids.seen(n.pgid, space).is_none()).map(|n| n.pgid);
        let joins =
            self.tree.get(&by).filter(|n| Some(n.pgid) == group && n.sid != by && by != self.root.pid);
        // One that does not see it has inherited it, too.
        let seen = |group: &i32| self.pids.seen(*group, self.pids.space(by)).is_some();
        let Some(group) = joins.and(group).filter(seen) else { return };
        if self.tree.get(&group).is_none_or(|n| n.sid != group) {
            self.steps.push(Step::Setpgid { pid: group, pgid: group });
        }
        if group != by {
            self.steps.push(Step::Setpgid { pid: by, pgid: group });
        }
    }

    fn fork(&mut self, by: i32, pid: i32, depth: usize) {
        let helper = self.helpers.contains(&pid);
        if self.is_elsewhere(by, pid) {
            self.bequeath_group(by, pid);
        }
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
            // Or it has been born there.
            let sees = self.pids.seen(node.pgid, self.pids.space(node.pid)).is_some();
            let moves = sees && if in_roots { node.pid != self.root.pid } else { node.pgid != node.pid };
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
        let free = (self.next..).find(|pid| !self.used.contains(pid)).unwrap_or(i32::MAX);
        self.used.insert(free);
        self.next = free;
        free
    }
}

/// The processes that are there while the steps are played through, and who is in a group, and whose child, without a look
/// at all of them.
#[derive(Debug, Default)]
struct Live {
    nodes: BTreeMap<i32, Node>,
    /// By group and session.
    members: BTreeSet<(i32, i32, i32)>,
    /// By parent.
    children: BTreeSet<(i32, i32)>,
}

impl Live {
    fn get(&self, pid: i32) -> Option<Node> {
        self.nodes.get(&pid).copied()
    }

    /// False: there is one with this number.
    fn insert(&mut self, node: Node) -> bool {
        let new = self.remove(node.pid).is_none();
        self.nodes.insert(node.pid, node);
        self.members.insert((node.pgid, node.sid, node.pid));
        self.children.insert((node.ppid, node.pid));
        new
    }

    fn remove(&mut self, pid: i32) -> Option<Node> {
        let node = self.nodes.remove(&pid)?;
        self.members.remove(&(node.pgid, node.sid, pid));
        self.children.remove(&(node.ppid, pid));
        Some(node)
    }

    fn change(&mut self, pid: i32, how: impl FnOnce(&mut Node)) {
        if let Some(mut node) = self.remove(pid) {
            how(&mut node);
            self.insert(node);
        }
    }

    fn group(&self, pgid: i32) -> impl DoubleEndedIterator<Item = &(i32, i32, i32)> {
        self.members.range((pgid, i32::MIN, i32::MIN)..=(pgid, i32::MAX, i32::MAX))
    }

    /// Whether a process is in this group.
    fn is_group(&self, pgid: i32) -> bool {
        self.group(pgid).next().is_some()
    }

    /// Whether all who are in it are in this session.
    fn is_group_within(&self, pgid: i32, sid: i32) -> bool {
        // They are in order of their sessions.
        let ends = [self.group(pgid).next(), self.group(pgid).next_back()];
        ends.into_iter().flatten().all(|member| member.1 == sid)
    }

    fn children(&self, pid: i32) -> Vec<i32> {
        self.children.range((pid, i32::MIN)..=(pid, i32::MAX)).map(|child| child.1).collect()
    }
}

/// Plays the steps through by the kernel's rules, and compares.
fn verify(nodes: &[Node], steps: &[Step], pids: &Pids) -> Result<()> {
    let root = nodes[0];
    let mut live = Live::default();
    live.insert(root);
    // Where everybody has been born.
    let mut places: BTreeMap<i32, u32> = BTreeMap::new();
    let known: BTreeSet<i32> = nodes.iter().map(|n| n.pid).collect();
    let mut reapers = BTreeSet::new();
    let impossible = |pid: i32, what: String| {
        Error::new(format!("the process tree cannot be made again: {what}"))
            .pid(pid)
            .remedy("end the process, or start it in a way that leaves it in its parent's session")
    };
    for step in steps {
        match *step {
            Step::Enter { pid } => {
                let newcomer = Node { pid, ppid: 0, sid: 0, pgid: 0 };
                if pids.space(pid) != 0 || !live.insert(newcomer) {
                    return Err(impossible(pid, "it cannot come from outside".into()));
                }
            }
            Step::Fork { by, pid, .. } => {
                let Some(parent) = live.get(by) else {
                    return Err(impossible(pid, format!("its creator {by} does not exist yet")));
                };
                let around = places.get(&by).copied().unwrap_or(0);
                let own = if known.contains(&pid) || pids.ids.contains_key(&pid) {
                    pids.space(pid)
                } else {
                    around
                };
                let there = match pids.spaces.get(&own) {
                    _ if own == around => true,
                    Some(level) if level.init == pid => level.parent == around,
                    Some(level) => live.get(level.init).is_some() && pids.within(own, around),
                    None => false,
                };
                if !there {
                    return Err(impossible(pid, format!("process {by} cannot have it in its pid namespace")));
                }
                places.insert(pid, own);
                if !live.insert(Node { pid, ppid: by, ..parent }) {
                    return Err(impossible(pid, "it would be made twice".into()));
                }
            }
            Step::Setsid { pid } => {
                if live.is_group(pid) {
                    return Err(impossible(pid, "it leads a process group and a session".into()));
                }
                live.change(pid, |node| (node.sid, node.pgid) = (pid, pid));
            }
            Step::Setpgid { pid, pgid } => {
                let sees = pids.seen(pgid, places.get(&pid).copied().unwrap_or(0)).is_some();
                let founded = pid == pgid || sees && live.is_group(pgid);
                match live.get(pid) {
                    Some(n) if n.sid == pid && n.pgid == pgid => {}
                    Some(n) if n.sid == pid => return Err(impossible(pid, "it leads a session".into())),
                    Some(n) if founded && live.is_group_within(pgid, n.sid) => {}
                    _ => return Err(impossible(pid, format!("process group {pgid} is not in its session"))),
                }
                live.change(pid, |node| node.pgid = pgid);
            }
            Step::Subreaper { pid } => _ = reapers.insert(pid),
            Step::Exit { pid, .. } => {
                let place = |pid: i32| places.get(&pid).copied().unwrap_or(0);
                let first = pids.spaces.get(&place(pid)).map_or(root.pid, |level| level.init);
                let mut heir = live.get(pid).map_or(first, |n| n.ppid);
                while heir != first {
                    match live.get(heir).filter(|_| place(heir) == place(pid)) {
                        Some(_) if reapers.contains(&heir) => break,
                        next => heir = next.map_or(first, |n| n.ppid),
                    }
                }
                live.remove(pid);
                for child in live.children(pid) {
                    live.change(child, |node| node.ppid = heir);
                }
            }
        }
    }
    for node in nodes {
        let made = live.get(node.pid);
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
mod tests;
