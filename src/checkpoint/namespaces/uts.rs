//! Host and domain name.

use nix::unistd::sethostname;

use crate::checkpoint::context::{Dump, Restore};
use crate::checkpoint::error::{Context, Result};
use crate::checkpoint::image::UtsnsEntry;
use crate::checkpoint::namespaces::enter::{Doors, through, within};
use crate::checkpoint::namespaces::kind::Kind;
use crate::sys::uts::set_domainname;

/// Reads both names, where the container has its own and they have not been read with something else.
pub fn dump(dump: &mut Dump<'_>) -> Result<()> {
    let (init, spec) = (dump.source.init, &dump.source.spec);
    if !dump.model.utsns.contains_key(&Kind::Uts.id(true)) && Kind::Uts.owned(init, spec)? {
        let entry = within(init, &[Kind::Uts], read)?;
        dump.model.utsns.insert(Kind::Uts.id(true), entry);
    }
    Ok(())
}

/// Sets both names, where this container has its own.
pub fn restore(restore: &Restore<'_>) -> Result<()> {
    let (init, spec) = (restore.target.init, &restore.target.spec);
    match restore.model.utsns.get(&Kind::Uts.inits(restore.model)) {
        Some(entry) if Kind::Uts.owned(init, spec)? => within(init, &[Kind::Uts], || write(entry)),
        _ => Ok(()),
    }
}

/// Reads both names of a namespace that the container has made.
pub fn save(dump: &mut Dump<'_>, id: u32, doors: Doors) -> Result<()> {
    dump.model.utsns.insert(id, through(doors, read)?);
    Ok(())
}

/// Sets both names there.
pub fn put_back(restore: &Restore<'_>, id: u32, doors: Doors) -> Result<()> {
    match restore.model.utsns.get(&id) {
        Some(entry) => through(doors, || write(entry)),
        None => Ok(()),
    }
}

/// Reads both names of this thread's namespace.
pub(super) fn read() -> Result<UtsnsEntry> {
    let names = nix::sys::utsname::uname().during("cannot read the host name", || "uname(_)".into())?;
    Ok(UtsnsEntry {
        nodename: names.nodename().to_string_lossy().into_owned(),
        domainname: names.domainname().to_string_lossy().into_owned(),
    })
}

fn write(entry: &UtsnsEntry) -> Result<()> {
    let (node, domain) = (&entry.nodename, &entry.domainname);
    sethostname(node).during("cannot set the host name", || format!("sethostname({node:?})"))?;
    set_domainname(domain).during("cannot set the domain name", || format!("setdomainname({domain:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::in_child;

    #[test]
    fn names_go_in_and_come_out_by_entering() {
        in_child(libc::CLONE_NEWUTS, || {
            let entry = UtsnsEntry { nodename: "here".into(), domainname: "there".into() };
            let me = nix::unistd::getpid().as_raw();
            within(me, &[Kind::Uts], || write(&entry)).unwrap();
            assert_eq!(within(me, &[Kind::Uts], read).unwrap(), entry);
            assert_eq!(nix::unistd::gethostname().unwrap(), "here");
        });
    }
}
