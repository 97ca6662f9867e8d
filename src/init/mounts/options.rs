//! Mount options of config.json: which are mount(2) flags, which propagation, which attributes of a whole tree, and
//! which belong to the file system.

use std::path::{Path, PathBuf};

use libc::{
    MS_BIND, MS_DIRSYNC, MS_I_VERSION, MS_LAZYTIME, MS_MANDLOCK, MS_NOATIME, MS_NODEV, MS_NODIRATIME,
    MS_NOEXEC, MS_NOSUID, MS_NOSYMFOLLOW, MS_PRIVATE, MS_RDONLY, MS_REC, MS_RELATIME, MS_REMOUNT, MS_SHARED,
    MS_SILENT, MS_SLAVE, MS_STRICTATIME, MS_SYNCHRONOUS, MS_UNBINDABLE,
};
use oci_spec::runtime::LinuxIdMapping;

use crate::sys::mount::Attributes;
use crate::sys::{Error, Result};

/// What an option means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// A mount(2) flag to set.
    Set(u64),
    /// A mount(2) flag to clear.
    Clear(u64),
    /// A propagation type, with MS_REC for the whole tree.
    Propagation(u64),
    /// MOUNT_ATTR_* to set on the whole tree.
    SetAll(u64),
    /// MOUNT_ATTR_* to clear on the whole tree.
    ClearAll(u64),
    /// Copy what the mount hides into it.
    CopyUp,
    /// Map owners; on the whole tree if true.
    IdMap(bool),
    /// Nothing.
    Nothing,
}

use Meaning::{Clear, ClearAll, CopyUp, IdMap, Nothing, Propagation, Set, SetAll};

/// Every option that is not the file system's own. `defaults` and the id-mapping options are not listed by `features`,
/// as with runc.
const OPTIONS: &[(&str, Meaning)] = &[
    ("async", Clear(MS_SYNCHRONOUS)),
    ("atime", Clear(MS_NOATIME)),
    ("bind", Set(MS_BIND)),
    ("defaults", Nothing),
    ("dev", Clear(MS_NODEV)),
    ("diratime", Clear(MS_NODIRATIME)),
    ("dirsync", Set(MS_DIRSYNC)),
    ("exec", Clear(MS_NOEXEC)),
    ("iversion", Set(MS_I_VERSION)),
    ("lazytime", Set(MS_LAZYTIME)),
    ("loud", Clear(MS_SILENT)),
    ("mand", Set(MS_MANDLOCK)),
    ("noatime", Set(MS_NOATIME)),
    ("nodev", Set(MS_NODEV)),
    ("nodiratime", Set(MS_NODIRATIME)),
    ("noexec", Set(MS_NOEXEC)),
    ("noiversion", Clear(MS_I_VERSION)),
    ("nolazytime", Clear(MS_LAZYTIME)),
    ("nomand", Clear(MS_MANDLOCK)),
    ("norelatime", Clear(MS_RELATIME)),
    ("nostrictatime", Clear(MS_STRICTATIME)),
    ("nosuid", Set(MS_NOSUID)),
    ("nosymfollow", Set(MS_NOSYMFOLLOW)),
    ("private", Propagation(MS_PRIVATE)),
    ("ratime", ClearAll(libc::MOUNT_ATTR_NOATIME)),
    ("rbind", Set(MS_BIND | MS_REC)),
    ("rdev", ClearAll(libc::MOUNT_ATTR_NODEV)),
    ("rdiratime", ClearAll(libc::MOUNT_ATTR_NODIRATIME)),
    ("relatime", Set(MS_RELATIME)),
    ("remount", Set(MS_REMOUNT)),
    ("rexec", ClearAll(libc::MOUNT_ATTR_NOEXEC)),
    ("rnoatime", SetAll(libc::MOUNT_ATTR_NOATIME)),
    ("rnodev", SetAll(libc::MOUNT_ATTR_NODEV)),
    ("rnodiratime", SetAll(libc::MOUNT_ATTR_NODIRATIME)),
    ("rnoexec", SetAll(libc::MOUNT_ATTR_NOEXEC)),
    ("rnorelatime", ClearAll(libc::MOUNT_ATTR_RELATIME)),
    ("rnostrictatime", ClearAll(libc::MOUNT_ATTR_STRICTATIME)),
    ("rnosuid", SetAll(libc::MOUNT_ATTR_NOSUID)),
    ("rnosymfollow", SetAll(libc::MOUNT_ATTR_NOSYMFOLLOW)),
    ("ro", Set(MS_RDONLY)),
    ("rprivate", Propagation(MS_PRIVATE | MS_REC)),
    ("rrelatime", SetAll(libc::MOUNT_ATTR_RELATIME)),
    ("rro", SetAll(libc::MOUNT_ATTR_RDONLY)),
    ("rrw", ClearAll(libc::MOUNT_ATTR_RDONLY)),
    ("rshared", Propagation(MS_SHARED | MS_REC)),
    ("rslave", Propagation(MS_SLAVE | MS_REC)),
    ("rstrictatime", SetAll(libc::MOUNT_ATTR_STRICTATIME)),
    ("rsuid", ClearAll(libc::MOUNT_ATTR_NOSUID)),
    ("rsymfollow", ClearAll(libc::MOUNT_ATTR_NOSYMFOLLOW)),
    ("runbindable", Propagation(MS_UNBINDABLE | MS_REC)),
    ("rw", Clear(MS_RDONLY)),
    ("shared", Propagation(MS_SHARED)),
    ("silent", Set(MS_SILENT)),
    ("slave", Propagation(MS_SLAVE)),
    ("strictatime", Set(MS_STRICTATIME)),
    ("suid", Clear(MS_NOSUID)),
    ("symfollow", Clear(MS_NOSYMFOLLOW)),
    ("sync", Set(MS_SYNCHRONOUS)),
    ("tmpcopyup", CopyUp),
    ("unbindable", Propagation(MS_UNBINDABLE)),
    // Not options of mount(8) but of the spec.
    ("idmap", IdMap(false)),
    ("ridmap", IdMap(true)),
];

/// The names of all options, sorted, for `features`.
pub fn known_options() -> Vec<&'static str> {
    let mut names: Vec<_> =
        OPTIONS.iter().filter(|(_, m)| !matches!(m, IdMap(_))).map(|(name, _)| *name).collect();
    names.sort_unstable();
    names
}

/// MS_* bits of a propagation word such as `rslave`.
pub fn propagation(word: &str) -> Option<u64> {
    OPTIONS.iter().find_map(|(name, meaning)| match meaning {
        Propagation(flags) if *name == word => Some(*flags),
        _ => None,
    })
}

/// Whose ids a mount shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMapping {
    /// Also in all mounts below.
    pub recursive: bool,
    /// Explicit mappings; empty means those of the container's user namespace.
    pub uids: Vec<LinuxIdMapping>,
    /// Likewise.
    pub gids: Vec<LinuxIdMapping>,
}

/// One mount of config.json, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where, inside the container.
    pub destination: PathBuf,
    /// What: a path of the host for a bind mount, absolute; a device or a mere name otherwise.
    pub source: PathBuf,
    /// File system type; `bind` for every bind mount, whatever config.json says.
    pub kind: String,
    /// MS_* bits.
    pub flags: u64,
    /// MS_* bits that were asked to be absent.
    pub cleared: u64,
    /// Propagation types, in order.
    pub propagation: Vec<u64>,
    /// The file system's own options, comma-separated.
    pub data: String,
    /// Attributes for this mount and all below it.
    pub recursive: Option<Attributes>,
    /// Copy what the mount hides into it.
    pub copy_up: bool,
    /// Map owners.
    pub idmap: Option<IdMapping>,
}

impl Mount {
    /// Understands one entry of `mounts`. Relative sources of bind mounts are relative to `bundle`.
    pub fn parse(mount: &oci_spec::runtime::Mount, bundle: &Path) -> Result<Self> {
        let mut m = Self {
            destination: mount.destination().clone(),
            source: mount.source().clone().unwrap_or_default(),
            kind: mount.typ().clone().unwrap_or_default(),
            flags: 0,
            cleared: 0,
            propagation: Vec::new(),
            data: String::new(),
            recursive: None,
            copy_up: false,
            idmap: None,
        };
        for option in mount.options().iter().flatten() {
            m.option(option);
        }
        if m.is_bind() {
            m.kind = "bind".to_owned();
            m.flags |= MS_BIND;
            if m.source.is_relative() {
                m.source = bundle.join(&m.source);
            }
        }
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
            let idmap = m.idmap.get_or_insert(IdMapping { recursive: false, uids: vec![], gids: vec![] });
            idmap.uids = mount.uid_mappings().clone().unwrap_or_default();
            idmap.gids = mount.gid_mappings().clone().unwrap_or_default();
        }
        m.check().map_err(|e| e.context(format_args!("invalid mount {}", m.destination.display())))?;
        Ok(m)
    }

    fn check(&self) -> Result<()> {
        let zero = |path: &Path| path.as_os_str().as_encoded_bytes().contains(&0);
        if zero(&self.source)
            || zero(&self.destination)
            || self.kind.contains('\0')
            || self.data.contains('\0')
        {
            return Err(Error::new("mount field contains null byte"));
        }
        if self.is_bind() && !self.data.is_empty() {
            // The kernel would silently ignore them.
            return Err(Error::new("bind mounts cannot have any filesystem-specific options applied"));
        }
        if let Some(idmap) = &self.idmap {
            if !self.is_bind() {
                return Err(Error::new("id-mapped mounts are only supported for bind-mounts"));
            }
            if idmap.uids.is_empty() != idmap.gids.is_empty() {
                return Err(Error::new("id-mapped mounts must have both uid and gid mappings specified"));
            }
        }
        Ok(())
    }

    fn option(&mut self, option: &str) {
        let meaning = OPTIONS.iter().find(|(name, _)| *name == option).map(|(_, meaning)| *meaning);
        match meaning {
            Some(Set(flag)) => {
                self.flags |= flag;
                self.cleared &= !flag;
            }
            Some(Clear(flag)) => {
                self.flags &= !flag;
                self.cleared |= flag;
            }
            Some(Propagation(flags)) => self.propagation.push(flags),
            Some(SetAll(attr)) => {
                let all = self.recursive.get_or_insert_default();
                all.set |= attr;
                all.clear &= !attr;
                all.clear |= atime_mask(attr);
            }
            Some(ClearAll(attr)) => {
                let all = self.recursive.get_or_insert_default();
                all.clear |= attr;
                all.set &= !attr;
                all.clear |= atime_mask(attr);
            }
            Some(CopyUp) => self.copy_up = true,
            Some(IdMap(recursive)) => {
                self.idmap = Some(IdMapping { recursive, uids: vec![], gids: vec![] });
            }
            Some(Nothing) => {}
            None => {
                if !self.data.is_empty() {
                    self.data.push(',');
                }
                self.data.push_str(option);
            }
        }
    }

    /// True for a bind mount.
    pub fn is_bind(&self) -> bool {
        self.flags & MS_BIND != 0 || self.kind == "bind"
    }
}

/// The access-time settings are one field of several bits: setting any value needs the whole field cleared.
fn atime_mask(attr: u64) -> u64 {
    if attr & libc::MOUNT_ATTR__ATIME == attr { libc::MOUNT_ATTR__ATIME } else { 0 }
}

/// MOUNT_ATTR_* bits for the MS_* bits that concern a single mount.
pub fn attributes(flags: u64) -> u64 {
    const TABLE: &[(u64, u64)] = &[
        (MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        (MS_NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ];
    let mut attr = TABLE.iter().filter(|(ms, _)| flags & ms != 0).fold(0, |all, (_, attr)| all | attr);
    // In mount(2)'s order: strictatime wins over noatime, relatime is the default.
    if flags & MS_STRICTATIME != 0 {
        attr |= libc::MOUNT_ATTR_STRICTATIME;
    } else if flags & MS_NOATIME != 0 {
        attr |= libc::MOUNT_ATTR_NOATIME;
    }
    attr
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::MountBuilder;

    fn parse(kind: &str, options: &[&str]) -> Result<Mount> {
        let mount = MountBuilder::default()
            .destination("/d")
            .source("s")
            .typ(kind)
            .options(options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
            .build()
            .unwrap();
        Mount::parse(&mount, Path::new("/bundle"))
    }

    #[test]
    fn later_options_win_and_unknown_ones_are_the_file_systems() {
        let m = parse("tmpfs", &["ro", "nosuid", "rw", "size=1k", "mode=755"]).unwrap();
        assert_eq!(m.flags, MS_NOSUID);
        assert_eq!(m.cleared, MS_RDONLY);
        assert_eq!(m.data, "size=1k,mode=755");
    }

    #[test]
    fn bind_mounts_are_recognised_whatever_their_type() {
        let m = parse("none", &["rbind", "rslave", "rro"]).unwrap();
        assert_eq!((m.kind.as_str(), m.source.as_path()), ("bind", Path::new("/bundle/s")));
        assert_eq!(m.flags, MS_BIND | MS_REC);
        assert_eq!(m.propagation, [MS_SLAVE | MS_REC]);
        assert_eq!(m.recursive.unwrap().set, libc::MOUNT_ATTR_RDONLY);
        assert!(parse("none", &["bind", "size=1k"]).unwrap_err().to_string().contains("filesystem-specific"));
    }

    #[test]
    fn access_time_attributes_clear_the_whole_field() {
        let all = parse("none", &["rbind", "rnoatime"]).unwrap().recursive.unwrap();
        assert_eq!((all.set, all.clear), (libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME));
    }

    #[test]
    fn id_mapping_needs_a_bind_mount_and_both_maps() {
        assert!(parse("none", &["rbind", "idmap"]).unwrap().idmap.is_some());
        assert!(parse("tmpfs", &["idmap"]).is_err());
    }

    #[test]
    fn features_lists_options_sorted_and_complete() {
        let names = known_options();
        assert!(names.is_sorted());
        assert_eq!(names.len(), 60);
        assert_eq!(propagation("rslave"), Some(MS_SLAVE | MS_REC));
        assert_eq!(propagation("ro"), None);
    }
}
