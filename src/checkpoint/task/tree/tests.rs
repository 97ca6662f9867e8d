//! Trees that are known, hostile ones, and random histories.

use super::*;
use crate::checkpoint::namespaces::nested::pids::{self, Ids};

fn n(pid: i32, ppid: i32, sid: i32, pgid: i32) -> Node {
    Node { pid, ppid, sid, pgid }
}
fn ok(nodes: &[Node]) -> Vec<Step> {
    plan(nodes, &BTreeSet::new(), &Pids::default()).unwrap()
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
        plan(&[n(1, 0, 1, 1), n(5, 1, 5, 5), n(7, 1, 5, 5)], &BTreeSet::from([300, 301]), &Pids::default())
            .unwrap();
    assert!(steps.contains(&fork(302, 7)));
}

#[test]
fn who_cannot_see_a_group_is_born_in_it() {
    // 8 is the first of a pid namespace, 9 and 10 (the first of another) are in it; all are in the group of 7.
    let pids = pids::tests::two();
    let nodes = [n(1, 0, 1, 1), n(7, 1, 1, 7), n(8, 7, 1, 7), n(9, 8, 9, 9), n(10, 8, 1, 7)];
    let steps = plan(&nodes, &BTreeSet::new(), &pids).unwrap();
    let found = Step::Setpgid { pid: 7, pgid: 7 };
    assert_eq!(steps[..3], [fork(1, 7), found, fork(7, 8)]);
    assert!(!steps.iter().any(|s| matches!(s, Step::Setpgid { pid: 8 | 10, .. })), "{steps:?}");
    // They would have to leave it for one that they do not see, either.
    let nodes = [n(1, 0, 1, 1), n(7, 1, 1, 7), n(8, 7, 1, 7), n(9, 8, 1, 1)];
    let error = plan(&nodes, &BTreeSet::new(), &pids).unwrap_err();
    assert_eq!(error.fields().pid, Some(9), "{error}");
}

#[test]
fn who_joins_a_pid_namespace_comes_after_its_first_process() {
    let mut pids = pids::tests::two();
    pids.ids.insert(6, Ids { space: 21, inner: vec![4] });
    let nodes = [n(1, 0, 1, 1), n(5, 1, 1, 1), n(6, 5, 1, 1), n(7, 1, 1, 1), n(8, 7, 1, 1)];
    let steps = plan(&nodes, &BTreeSet::new(), &pids).unwrap();
    let forks: Vec<_> = steps.into_iter().filter(|s| matches!(s, Step::Fork { .. })).collect();
    assert_eq!(forks, [fork(1, 5), fork(1, 7), fork(7, 8), fork(5, 6)]);
    // The first process of one inside cannot be that of the container's making.
    let nodes = [n(1, 0, 1, 1), n(10, 1, 1, 1)];
    assert!(plan(&nodes, &BTreeSet::new(), &pids).unwrap_err().to_string().contains("pid namespace"));
}

#[test]
fn an_orphan_is_adopted_in_its_pid_namespace() {
    // 9 leads a session there; 11 is of it, and the child of nobody any more.
    let mut pids = pids::tests::two();
    pids.ids.insert(11, Ids { space: 21, inner: vec![5] });
    let nodes = [n(1, 0, 1, 1), n(8, 1, 1, 1), n(9, 8, 9, 9), n(11, 8, 9, 9)];
    let steps = plan(&nodes, &BTreeSet::new(), &pids).unwrap();
    assert!(steps.contains(&Step::Exit { pid: 300, by: 9 }) && !steps.contains(&Step::Subreaper { pid: 8 }));
}

#[test]
fn who_comes_from_outside_has_a_tree_of_his_own() {
    // exec'ed: 7 with its child 8; 9, which it has left behind, is init's.
    let nodes = [n(1, 0, 1, 1), n(9, 1, 7, 7), n(7, 0, 7, 7), n(8, 7, 7, 8)];
    let steps = ok(&nodes);
    assert_eq!(steps[..2], [Step::Enter { pid: 7 }, Step::Setsid { pid: 7 }]);
    assert!(steps.contains(&fork(7, 8)) && steps.contains(&fork(300, 9)));
    // It is in nobody's session but its own.
    assert!(plan(&[n(1, 0, 1, 1), n(7, 0, 1, 1)], &BTreeSet::new(), &Pids::default()).is_err());
}

#[test]
fn what_cannot_be_made_is_refused_by_name() {
    // 6 is a child of 5 in a session to which 5 never belonged, and 5 is no subreaper above that session.
    let error = plan(
        &[n(1, 0, 1, 1), n(5, 1, 1, 1), n(6, 5, 9, 9), n(9, 1, 9, 9)],
        &BTreeSet::new(),
        &Pids::default(),
    )
    .unwrap_err();
    assert_eq!(error.fields().pid, Some(6));
    assert!(error.to_string().contains("cannot be made again"), "{error}");
}

#[test]
fn hostile_trees_end() {
    let none = BTreeSet::new();
    assert!(plan(&[], &none, &Pids::default()).is_err());
    assert!(plan(&[n(1, 0, 1, 1), n(1, 1, 1, 1)], &none, &Pids::default()).is_err());
    assert!(plan(&[n(1, 0, 1, 1), n(2, 3, 1, 1), n(3, 2, 1, 1)], &none, &Pids::default()).is_err());
    assert!(plan(&[n(1, 0, 1, 1), n(2, 2, 1, 1)], &none, &Pids::default()).is_err());
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
            match random(7) {
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
                6 if random(3) == 0 => {
                    live.push(n(next, 0, next, next));
                    next += 1;
                }
                _ => {}
            }
        }
        // A leader that was born in a session which its children, born there too, have not left is the one case
        // of two possible births; everything must be found.
        if let Err(error) = plan(&live, &BTreeSet::new(), &Pids::default()) {
            panic!("{error}: {live:?}");
        }
    }
}

#[test]
fn many_processes_are_planned_without_a_look_at_all_of_them_for_each() {
    // Half of them are in groups of their own, the others are orphans of a session whose leader has gone on.
    let mut nodes = vec![n(1, 0, 1, 1), n(2, 1, 2, 2)];
    nodes.extend((1000..11_000).map(|pid| if pid % 2 == 0 { n(pid, 1, 1, pid) } else { n(pid, 1, 2, 2) }));
    let began = std::time::Instant::now();
    assert!(ok(&nodes).len() > 20_000);
    assert!(began.elapsed() < std::time::Duration::from_secs(10), "{:?}", began.elapsed());
}
