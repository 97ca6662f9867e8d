//! Putting received descriptors under their final numbers.
//!
//! SCM_RIGHTS lands descriptors on the lowest free numbers; the program knows them by others. That is a parallel
//! assignment: a number that is overwritten before it was copied is lost. In a table that is otherwise empty, moving
//! from the highest number down is enough; the plan below doesn't depend on that.
//!
//! ```text
//!   received     3   4   5          dup3(5, 9)   dup3(4, 5)   dup3(3, 4)   close(3)
//!   final        4   5   9
//! ```

use std::collections::{BTreeMap, BTreeSet};

/// A step of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// dup3(from, to, O_CLOEXEC or 0).
    Dup {
        /// Number that has the file now.
        from: i32,
        /// Number that gets it.
        to: i32,
        /// FD_CLOEXEC of the new one.
        cloexec: bool,
    },
    /// fcntl(fd, F_SETFD, FD_CLOEXEC or 0): it is in its place already.
    Flag {
        /// The number.
        fd: i32,
        /// Its FD_CLOEXEC.
        cloexec: bool,
    },
    /// close(fd).
    Close {
        /// The number.
        fd: i32,
    },
}

/// Orders the moves from `(received, final, cloexec)`. One received number may have several final ones; `spare` are
/// received numbers that have none and are closed. No number from `free` on is received or final.
pub fn plan(wanted: &[(i32, i32, bool)], spare: &[i32], free: i32) -> Vec<Move> {
    let mut moves = Vec::new();
    let mut flags = Vec::new();
    let mut todo: Vec<(i32, i32, bool)> = Vec::new();
    let mut readers: BTreeMap<i32, usize> = BTreeMap::new();
    let mut sources: BTreeSet<i32> = spare.iter().copied().collect();
    let finals: BTreeSet<i32> = wanted.iter().map(|w| w.1).collect();
    for &(from, to, cloexec) in wanted {
        sources.insert(from);
        if from == to {
            flags.push(Move::Flag { fd: to, cloexec });
        } else {
            *readers.entry(from).or_default() += 1;
            todo.push((from, to, cloexec));
        }
    }
    todo.sort_by_key(|w| std::cmp::Reverse(w.1));
    let mut free = free;
    while let Some(&(_, blocked, _)) = todo.first() {
        let before = todo.len();
        todo.retain(|&(from, to, cloexec)| {
            if readers.get(&to).is_some_and(|n| *n > 0) {
                return true;
            }
            moves.push(Move::Dup { from, to, cloexec });
            if let Some(n) = readers.get_mut(&from) {
                *n -= 1;
            }
            false
        });
        if todo.len() == before {
            // Only circles are left: copy one file out of its circle, for those who still read it.
            moves.push(Move::Dup { from: blocked, to: free, cloexec: false });
            todo.iter_mut().filter(|w| w.0 == blocked).for_each(|w| w.0 = free);
            let n = readers.remove(&blocked).unwrap_or(0);
            readers.insert(free, n);
            sources.insert(free);
            free += 1;
        }
    }
    moves.extend(flags);
    moves.extend(sources.difference(&finals).map(|&fd| Move::Close { fd }));
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Carries the plan out on a table of names, and checks it against what was wanted.
    fn run(wanted: &[(i32, i32, bool)], spare: &[i32]) -> Vec<Move> {
        let name = |fd: i32| (fd, false);
        let mut table: BTreeMap<i32, (i32, bool)> =
            wanted.iter().map(|w| w.0).chain(spare.iter().copied()).map(|fd| (fd, name(fd))).collect();
        let moves = plan(wanted, spare, 1000);
        for m in &moves {
            match *m {
                Move::Dup { from, to, cloexec } => {
                    assert_ne!(from, to, "dup3 refuses that");
                    let file = table[&from].0;
                    table.insert(to, (file, cloexec));
                }
                Move::Flag { fd, cloexec } => table.get_mut(&fd).unwrap().1 = cloexec,
                Move::Close { fd } => drop(table.remove(&fd).unwrap()),
            }
        }
        let expected: BTreeMap<i32, (i32, bool)> = wanted.iter().map(|w| (w.1, (w.0, w.2))).collect();
        assert_eq!(table, expected, "{wanted:?} by {moves:?}");
        moves
    }

    #[test]
    fn upwards_from_the_highest() {
        let moves = run(&[(3, 4, false), (4, 5, true), (5, 9, false)], &[]);
        assert_eq!(moves[0], Move::Dup { from: 5, to: 9, cloexec: false });
        assert_eq!(moves.len(), 4);
    }

    #[test]
    fn in_place_duplicates_and_spares() {
        run(&[(0, 0, true), (0, 1, false), (0, 2, false), (3, 7, false)], &[4, 5]);
    }

    #[test]
    fn downwards_and_circles() {
        run(&[(5, 4, false), (4, 3, false), (3, 2, true)], &[]);
        run(&[(3, 4, false), (4, 3, true)], &[]);
        run(&[(3, 4, false), (4, 5, false), (5, 3, true), (7, 8, false), (8, 7, false), (3, 20, true)], &[9]);
    }

    #[test]
    fn every_assignment_of_four() {
        for n in 0..7i32.pow(4) {
            let to = [n % 7, n / 7 % 7, n / 49 % 7, n / 343];
            if BTreeSet::from(to).len() == 4 {
                let wanted: Vec<_> = to.iter().zip([2, 3, 4, 5]).map(|(&t, f)| (f, t, t % 2 == 0)).collect();
                run(&wanted, &[]);
            }
        }
    }
}
