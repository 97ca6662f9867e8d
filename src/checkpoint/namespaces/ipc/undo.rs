//! Semaphore operations that are undone at a process's exit: semop(2), `SEM_UNDO`.
//!
//! The kernel keeps one number for each process and semaphore, what is to be added at the exit, and shows it to nobody.
//! But it lets it not leave the range of -32768 to 32767: an operation that would fails with ERANGE. So the process itself
//! is asked, while it stands still, by operations that change nothing:
//!
//! ```text
//!   semop(set, [ -value                      the semaphore is 0, for nobody sees what is in between: a semop(2) is
//!                +p undo, -p   ...           done as a whole or not at all
//!                +p, -p undo   ...           takes the same back
//!                +value ])
//!
//!   done     the number is at least -32768 + the sum of all p
//!   ERANGE   it is less
//! ```
//!
//! Two questions tell whether it is 0, as it mostly is; sixteen find any other. The restore does the first half with
//! what was found. Whoever shares no list (`CLONE_SYSVSEM`) with a process that has never used the flag has none, which
//! kcmp(2) tells; every process that has made a thread has one, if an empty one.
//!
//! Who may not change a set any more is taken for one who has nothing to undo in it. What is left behind of the question
//! is the number of the process as the one that was last at the semaphore (`GETPID`), and the time of the set.
//!
//! CRIU loses these numbers.

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use crate::checkpoint::context::{Dump, NewTask};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::IpcSemEntry;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::enter::{Doors, through};
use crate::checkpoint::remote::{Batch, Call, Injection};
use crate::checkpoint::task::status;
use crate::sys::kcmp::{What, kcmp};

/// The name of this room's extension in stasis.img.
const EXTENSION: &str = "sem-undo";
/// The least number, and the largest value of a semaphore: SEMAEM, SEMVMX.
const LEAST: i32 = -32768;
const MOST: i32 = 32767;
const UNDO: i16 = 0x1000;
const NOWAIT: i16 = 0o4000;
/// Questions asked at once.
const AT_ONCE: usize = 128;

/// What is to be added to one semaphore at the exit of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Undo {
    pid: i32,
    set: i32,
    number: u16,
    value: i32,
}

/// Asks the processes `pids` (of this host), which are in the namespace behind `doors`, for what they have in `sets`.
pub(super) fn dump(
    dump: &mut Dump<'_>,
    sets: &[(IpcSemEntry, Vec<u16>)],
    doors: Doors,
    pids: &[i32],
) -> Result<()> {
    if sets.is_empty() {
        return Ok(());
    }
    let asked = with_lists(doors, pids)?;
    let mut found: Vec<(i32, Vec<Undo>)> = Vec::new();
    for task in dump.tasks.iter_mut().filter(|task| asked.contains(&task.pid)) {
        let Some(injection) = &mut task.injection else { continue };
        let own = of_process(injection, task.vpid, sets).map_err(|e| e.pid(task.vpid))?;
        if own.is_empty() {
            continue;
        }
        let shared =
            |(other, _): &(i32, Vec<Undo>)| kcmp(*other, task.pid, What::SysvSem).is_ok_and(|o| o.is_eq());
        if found.iter().any(shared) {
            return Err(Error::new(
                "the process shares its semaphore operations to be undone with another one",
            )
            .pid(task.vpid)
            .remedy("let the program do without CLONE_SYSVSEM"));
        }
        check_threads(task.pid).map_err(|e| e.pid(task.vpid))?;
        found.push((task.pid, own));
    }
    let mut all: Vec<Undo> = dump.model.extension(EXTENSION)?;
    all.extend(found.into_iter().flat_map(|(_, own)| own));
    if all.is_empty() { Ok(()) } else { dump.model.set_extension(EXTENSION, &all) }
}

/// Those that have a list at all.
fn with_lists(doors: Doors, pids: &[i32]) -> Result<Vec<i32>> {
    through(doors, || {
        // From here on this thread has none. The kernel says that the lists of two are equal when both have none.
        unshare(CloneFlags::CLONE_SYSVSEM)
            .during("cannot compare processes", || "unshare(CLONE_SYSVSEM)".into())?;
        let me = nix::unistd::gettid().as_raw();
        let has = |pid: &i32| kcmp(me, *pid, What::SysvSem).is_ok_and(|order| order.is_ne());
        Ok(pids.iter().copied().filter(has).collect())
    })
}

/// Refuses threads that have lists of their own.
fn check_threads(pid: i32) -> Result<()> {
    let differs = |tid: &i32| kcmp(pid, *tid, What::SysvSem).is_ok_and(|order| order.is_ne());
    match status::threads(pid)?.iter().find(|tid| differs(tid)) {
        None => Ok(()),
        Some(_) => Err(Error::new("a thread has semaphore operations to be undone of its own")
            .remedy("let the program make its threads with CLONE_SYSVSEM, as all C libraries do")),
    }
}

fn of_process(injection: &mut Injection, pid: i32, sets: &[(IpcSemEntry, Vec<u16>)]) -> Result<Vec<Undo>> {
    let all: Vec<Place> = sets.iter().flat_map(|(set, values)| places(set.desc.id, values)).collect();
    let mut found = Vec::new();
    for some in all.chunks(AT_ONCE) {
        let mut batch = Batch::new();
        let asked: Vec<(Call, Call)> =
            some.iter().map(|place| (place.ask(&mut batch, 0), place.ask(&mut batch, 1))).collect();
        let results = injection.run(&batch)?;
        let mut odd = Vec::new();
        for (place, (least, more)) in some.iter().zip(asked) {
            let (least, more) = (place.holds(results.result(least))?, place.holds(results.result(more))?);
            if let (Some(least), Some(more)) = (least, more)
                && (!least || more)
            {
                odd.push(*place);
            }
        }
        for place in odd {
            let value = place.find(injection)?;
            found.push(Undo { pid, set: place.set, number: place.number, value });
        }
    }
    Ok(found)
}

/// One semaphore, and what it has.
#[derive(Debug, Clone, Copy)]
struct Place {
    set: i32,
    number: u16,
    value: u16,
}

fn places(id: u32, values: &[u16]) -> impl Iterator<Item = Place> {
    let set = id.cast_signed();
    (0..=u16::MAX).zip(values).map(move |(number, value)| Place { set, number, value: *value })
}

impl Place {
    /// Asks whether the number is at least `least`.
    fn ask(&self, batch: &mut Batch, least: i32) -> Call {
        let parts: Vec<i16> = parts(least - LEAST).collect();
        let forth = parts.iter().flat_map(|part| [(*part, UNDO), (-part, 0)]);
        let back = parts.iter().flat_map(|part| [(*part, 0), (-part, UNDO)]);
        let call = self.operate(batch, forth.chain(back).collect());
        batch.tolerate(call)
    }

    /// What the answer says; nothing about somebody who may not change the set.
    fn holds(&self, answer: nix::Result<i64>) -> Result<Option<bool>> {
        match answer {
            Ok(_) => Ok(Some(true)),
            Err(Errno::ERANGE) => Ok(Some(false)),
            Err(Errno::EACCES) => Ok(None),
            Err(errno) => Err(Error::new("cannot ask for semaphore operations that are to be undone")
                .call(format!("semop({}, _, _)", self.set), errno)),
        }
    }

    /// Finds the number.
    fn find(&self, injection: &mut Injection) -> Result<i32> {
        // It is at least `low`, and less than `high`.
        let (mut low, mut high) = (LEAST, MOST + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let mut batch = Batch::new();
            let call = self.ask(&mut batch, middle);
            let answer = injection.run(&batch)?.result(call);
            if self.holds(answer)? == Some(true) { low = middle } else { high = middle }
        }
        Ok(low)
    }

    /// Operations on the semaphore while it is 0.
    fn operate(&self, batch: &mut Batch, operations: Vec<(i16, i16)>) -> Call {
        let mut all = operations;
        // It is no more than 32767.
        let value = i16::try_from(self.value).unwrap_or(i16::MAX);
        if value != 0 {
            all.insert(0, (-value, 0));
            all.push((value, 0));
        }
        let bytes: Vec<u8> = all
            .iter()
            .flat_map(|(amount, flags)| {
                let (number, amount, flags) =
                    (self.number.to_ne_bytes(), amount.to_ne_bytes(), flags | NOWAIT);
                [number, amount, flags.to_ne_bytes()].concat()
            })
            .collect();
        let list = batch.data(&bytes);
        batch.call(libc::SYS_semop, &[self.set.into(), list, all.len().into()])
    }
}

/// A sum as amounts of single operations.
fn parts(mut sum: i32) -> impl Iterator<Item = i16> {
    std::iter::from_fn(move || {
        let part = i16::try_from(sum.min(MOST)).ok().filter(|part| *part > 0)?;
        sum -= i32::from(part);
        Some(part)
    })
}

/// Gives a process what it had to undo, while it may still do everything.
pub fn restore(task: &mut NewTask, model: &Model) -> Result<()> {
    let all: Vec<Undo> = model.extension(EXTENSION)?;
    let own: Vec<&Undo> = all.iter().filter(|undo| undo.pid == task.vpid).collect();
    if own.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    batch.about("cannot give the process its semaphore operations to be undone");
    for undo in own {
        let sets = model.ipcns.values().flat_map(|namespace| &namespace.sem);
        let values = sets.filter(|(set, _)| set.desc.id.cast_signed() == undo.set);
        let value = values.filter_map(|(_, values)| values.get(usize::from(undo.number))).next();
        let (Some(value), LEAST..=MOST) = (value, undo.value) else {
            return Err(Error::new(format!(
                "the images have operations to be undone of semaphore {} of a set {} that they lack",
                undo.number, undo.set
            )));
        };
        let place = Place { set: undo.set, number: undo.number, value: *value };
        let (first, second) = if undo.value < 0 { (UNDO, 0) } else { (0, UNDO) };
        let parts = parts(undo.value.abs()).flat_map(|part| [(part, first), (-part, second)]);
        place.operate(&mut batch, parts.collect());
    }
    task.injection.run(&batch).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_made_of_what_an_operation_can_add() {
        let of = |sum| parts(sum).collect::<Vec<_>>();
        assert_eq!((of(0), of(1), of(32767)), (vec![], vec![1], vec![32767]));
        assert_eq!((of(32768), of(65535)), (vec![32767, 1], vec![32767, 32767, 1]));
    }
}
