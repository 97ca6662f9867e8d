//! The device policy on cgroup v1: `devices.allow` and `devices.deny`.
//!
//! The group is brought from what it has to what it should have with as few writes as possible, so that `update` does
//! not cut a running container off from its devices for a moment.

use std::path::Path;

use super::{Access, Devices, Policy};
use crate::cgroup::file::{read, write};
use crate::sys::{Error, Result};

/// Makes the group's policy `target`.
pub fn apply(dir: &Path, target: &Policy) -> Result<()> {
    if crate::init::credentials::in_user_namespace() {
        // The kernel denies it there.
        return Ok(());
    }
    let current = parse(&read(dir, "devices.list")?)?;
    for (file, rule) in transition(&current, target) {
        write(dir, file, &rule)?;
    }
    let after = parse(&read(dir, "devices.list")?)?;
    // Of an allow-by-default group devices.list shows no exceptions.
    if after.allow != target.allow || (!target.allow && after != *target) {
        return Err(Error::new("resulting devices cgroup doesn't precisely match target"));
    }
    Ok(())
}

/// The writes that lead from one policy to another.
fn transition(current: &Policy, target: &Policy) -> Vec<(&'static str, String)> {
    let file = |allow: bool| if allow { "devices.allow" } else { "devices.deny" };
    let rule = |which: &Devices, access: Access| format!("{which} {access}");
    let mut writes = Vec::new();
    // The exceptions of an allow-by-default group can't be read, so start afresh from there.
    let fresh = current.allow || current.allow != target.allow;
    if fresh {
        writes.push((file(target.allow), "a *:* rwm".to_owned()));
    }
    let old = |which: &Devices| {
        if fresh { Access(0) } else { current.exceptions.get(which).copied().unwrap_or(Access(0)) }
    };
    if !fresh {
        for (which, access) in &current.exceptions {
            let kept = target.exceptions.get(which).copied().unwrap_or(Access(0));
            let dropped = access.without(kept);
            if !dropped.is_empty() {
                writes.push((file(target.allow), rule(which, dropped)));
            }
        }
    }
    for (which, access) in &target.exceptions {
        let gained = access.without(old(which));
        if !gained.is_empty() {
            writes.push((file(!target.allow), rule(which, gained)));
        }
    }
    writes
}

/// Reads devices.list.
fn parse(list: &str) -> Result<Policy> {
    let mut policy = Policy::default();
    for line in list.lines() {
        let malformed = || Error::new(format!("malformed devices.list rule {line}"));
        let mut fields = line.split([' ', ':']);
        let (Some(kind), Some(major), Some(minor), Some(access), None) =
            (fields.next(), fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(malformed());
        };
        let number = |text: &str| match text {
            "*" => Ok(None),
            n => n.parse().map(Some).map_err(|_| malformed()),
        };
        let block = match kind {
            "a" => {
                policy.reset(true);
                continue;
            }
            "b" => true,
            "c" => false,
            _ => return Err(malformed()),
        };
        let which = Devices { major: number(major)?, minor: number(minor)?, block };
        policy.apply(which, Access::parse(access)?, true)?;
    }
    Ok(policy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_group_is_closed_first() {
        let current = parse("a *:* rwm\n").unwrap();
        let target = Policy::of(None, &[]).unwrap();
        let writes = transition(&current, &target);
        assert_eq!(writes[0], ("devices.deny", "a *:* rwm".to_owned()));
        assert!(writes.contains(&("devices.allow", "c 1:3 rwm".to_owned())));
        assert!(writes.contains(&("devices.allow", "b *:* m".to_owned())));
    }

    #[test]
    fn the_same_policy_needs_no_write() {
        let current = parse("c 1:3 rwm\nb *:* m\n").unwrap();
        assert!(transition(&current, &current).is_empty());
    }

    #[test]
    fn only_the_difference_is_written() {
        let current = parse("c 1:3 rwm\nb 8:0 r\n").unwrap();
        let target = parse("c 1:3 r\nb 8:0 rw\n").unwrap();
        let writes = transition(&current, &target);
        assert_eq!(
            writes,
            [("devices.deny", "c 1:3 wm".to_owned()), ("devices.allow", "b 8:0 w".to_owned())]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for list in ["c 1:3\n", "x 1:3 r\n", "c one:3 r\n", "c 1:3 q\n"] {
            assert!(parse(list).is_err(), "{list}");
        }
    }
}
