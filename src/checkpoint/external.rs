//! `restore --external`: what a container of the images is connected to outside.
//!
//! ```text
//!   mnt[DST]=SRC                  the bind mount of config.json at DST shows SRC
//!   veth[IN]=OUT and the like     see `namespaces::net`
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci_spec::runtime::{Mount, Spec};

use crate::checkpoint::context::Options;
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::namespaces::net;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum External {
    /// A network device.
    Device(net::External),
    /// Where a mount leads, and what it shows.
    Mount(PathBuf, PathBuf),
}

impl FromStr for External {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(rest) = text.strip_prefix("mnt[") else { return text.parse().map(Self::Device) };
        let parts = rest.split_once(']').and_then(|(to, rest)| Some((to, rest.strip_prefix(['=', ':'])?)));
        match parts.map(|(to, from)| (Path::new(to), Path::new(from))) {
            Some((to, from)) if to.is_absolute() && from.is_absolute() => {
                Ok(Self::Mount(to.to_owned(), from.to_owned()))
            }
            _ => Err(format!("--external {text}: must be mnt[DST]=SRC, both of them absolute paths")),
        }
    }
}

impl External {
    /// Adds it to what was asked of a restore.
    pub fn add_to(self, options: &mut Options) {
        match self {
            Self::Device(device) => options.external.push(device),
            Self::Mount(to, from) => _ = options.external_mounts.insert(to, from),
        }
    }
}

/// Gives the bind mounts of config.json their other sources.
pub fn mounts(wanted: &BTreeMap<PathBuf, PathBuf>, spec: &mut Spec) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    let mut all = spec.mounts().clone().unwrap_or_default();
    for (to, from) in wanted {
        let bind = |mount: &Mount| {
            let named = mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
            named || mount.typ().as_deref() == Some("bind")
        };
        let found = all.iter_mut().rev().find(|mount| mount.destination() == to && bind(mount));
        let Some(mount) = found else {
            return Err(Error::new(
                "config.json has no bind mount there, for which --external names a source",
            )
            .path(to)
            .remedy("add it to the mounts of config.json"));
        };
        mount.set_source(Some(from.clone()));
    }
    spec.set_mounts(Some(all));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_have_two_paths() {
        let mount = External::Mount("/data".into(), "/srv/a=b".into());
        assert_eq!("mnt[/data]=/srv/a=b".parse(), Ok(mount.clone()));
        assert_eq!("mnt[/data]:/srv/a=b".parse(), Ok(mount));
        assert!(matches!("veth[eth0]=out".parse(), Ok(External::Device(_))));
        for bad in
            ["mnt[/data]", "mnt[/data]=", "mnt[data]=/srv", "mnt[/data]=srv", "mnt[/data=/srv", "dev[a]=b"]
        {
            assert!(bad.parse::<External>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_bind_mounts_have_sources() {
        let text = r#"{"ociVersion": "1.0.2", "mounts": [{"destination": "/a", "type": "tmpfs", "source": "x"},
            {"destination": "/b", "source": "/old", "options": ["rbind", "ro"]}]}"#;
        let mut spec: Spec = serde_json::from_str(text).unwrap();
        mounts(&[("/b".into(), "/new".into())].into(), &mut spec).unwrap();
        let sources: Vec<_> =
            spec.mounts().iter().flatten().map(|mount| mount.source().clone().unwrap()).collect();
        assert_eq!(sources, [Path::new("x"), Path::new("/new")]);
        let error = mounts(&[("/a".into(), "/new".into())].into(), &mut spec).unwrap_err().to_string();
        assert!(error.contains("no bind mount") && error.contains("/a"), "{error}");
    }
}
