//! User namespaces: a container with id mappings of its own.
//!
//! ```text
//!   credentials        as the container sees them          the kernel maps what a process sets itself
//!   owners of files    as this host sees them              the engine sets them, from outside the namespace
//! ```
//!
//! So the mappings must be the same at a restore. What the engine makes, it makes as the container's root: a file
//! system of the container's knows no owner that is not mapped.

use crate::checkpoint::context::{Dump, Restore, Source, Target};
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::{UidGidExtent, UsernsEntry};
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::credentials;

/// Whether the container has id mappings of its own.
pub fn private(source: &Source) -> Result<bool> {
    Kind::User.private(source.init)
}

/// Saves the mappings.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let init = dump.source.init;
    if Kind::User.private(init)? {
        dump.model.userns.insert(Kind::User.id(true), maps(init)?);
    }
    Ok(())
}

/// Refuses a container whose mappings are not those of the images, naming both.
pub fn restore(restore: &Restore<'_>) -> Result<()> {
    let init = restore.target.init;
    let saved = restore.model.userns.get(&Kind::User.inits(restore.model));
    let here = match Kind::User.private(init)? {
        true => Some(maps(init)?),
        false => None,
    };
    compare(saved, here.as_ref())
}

fn compare(saved: Option<&UsernsEntry>, here: Option<&UsernsEntry>) -> Result<()> {
    if saved == here {
        return Ok(());
    }
    let text = |maps: Option<&UsernsEntry>| match maps {
        None => "none".to_owned(),
        Some(maps) => {
            let extent = |e: &UidGidExtent| format!("{}:{}:{}", e.first, e.lower_first, e.count);
            let list = |all: &[UidGidExtent]| all.iter().map(extent).collect::<Vec<_>>().join(",");
            format!("users {} groups {}", list(&maps.uid_map), list(&maps.gid_map))
        }
    };
    Err(Error::new(format!(
        "the id mappings of config.json ({}) are not those of the checkpoint ({})",
        text(here),
        text(saved)
    ))
    .remedy("give linux.uidMappings and linux.gidMappings of config.json the values of the checkpoint"))
}

/// The mappings of a process, as this host sees them.
fn maps(pid: i32) -> Result<UsernsEntry> {
    let read = |name| {
        let path = format!("/proc/{pid}/{name}");
        let text = std::fs::read_to_string(&path)
            .during("cannot read the id mappings", || format!("read({path:?})"))?;
        parse(&text)
    };
    Ok(UsernsEntry { uid_map: read("uid_map")?, gid_map: read("gid_map")? })
}

fn parse(text: &str) -> Result<Vec<UidGidExtent>> {
    let line = |line: &str| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(UidGidExtent { first: next()?, lower_first: next()?, count: next()? })
    };
    let all: Option<Vec<_>> = text.lines().map(line).collect();
    all.ok_or_else(|| Error::new(format!("the id mappings are unreadable: {text:?}")))
}

/// Runs `work` with the ids that the container's root has on this host, and all capabilities, on a thread of its own.
/// A container without id mappings of its own makes no difference.
pub fn as_root_of<T: Send>(target: &Target, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if !Kind::User.private(target.init)? {
        return work();
    }
    let maps = maps(target.init)?;
    let root = |map: &[UidGidExtent]| map.iter().find(|e| e.first == 0 && e.count > 0).map(|e| e.lower_first);
    let (Some(uid), Some(gid)) = (root(&maps.uid_map), root(&maps.gid_map)) else {
        return Err(Error::new("the id mappings of config.json have no root"));
    };
    std::thread::scope(|scope| {
        let become_root = move || {
            credentials::keep_capabilities()
                .and_then(|()| credentials::set_thread_ids(uid, gid))
                .during("cannot become the container's root", || format!("setresuid(-1, {uid}, -1)"))?;
            work()
        };
        let thread = scope.spawn(become_root);
        thread.join().unwrap_or_else(|_| Err(Error::new("a helper thread of the engine failed")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_and_compared() {
        let users = parse("         0     100000      65536\n     70000          7          1\n").unwrap();
        assert_eq!(users[1], UidGidExtent { first: 70000, lower_first: 7, count: 1 });
        assert!(parse("0 1").is_err());
        let saved = UsernsEntry { uid_map: users, gid_map: Vec::new() };
        compare(Some(&saved), Some(&saved)).unwrap();
        compare(None, None).unwrap();
        let error = compare(Some(&saved), None).unwrap_err().to_string();
        assert!(error.contains("(none)") && error.contains("0:100000:65536,70000:7:1"), "{error}");
    }
}
