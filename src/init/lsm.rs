//! Labels of Linux security modules, which take effect at execve(2).
//!
//! They are written to this process's own attributes through a proved procfs: a false one would leave the program
//! unconfined (CVE-2019-19921, CVE-2025-52881).

use std::path::Path;

use nix::errno::Errno;
use oci_spec::runtime::Process;

use crate::sys::procfs::{Later, Procfs};
use crate::sys::{Context, Error, Result};

fn read_flag(path: &str) -> bool {
    std::fs::read(path).is_ok_and(|text| text.first() == Some(&b'Y'))
}

/// True if this kernel has AppArmor switched on. To be asked on the host.
pub fn has_apparmor() -> bool {
    Path::new("/sys/kernel/security/apparmor").exists()
        && read_flag("/sys/module/apparmor/parameters/enabled")
}

/// True if this kernel has SELinux switched on. To be asked on the host.
pub fn has_selinux() -> bool {
    static FOUND: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FOUND.get_or_init(|| Path::new("/sys/fs/selinux/enforce").exists())
}

/// Refuses labels that this kernel cannot apply.
pub fn validate(process: &Process) -> Result<()> {
    let wants = |label: &Option<String>| label.as_deref().is_some_and(|l| !l.is_empty());
    if wants(process.selinux_label()) && !has_selinux() {
        return Err(Error::new(
            "selinux label is specified in config, but selinux is disabled or not supported",
        ));
    }
    if wants(process.apparmor_profile()) && !has_apparmor() {
        return Err(Error::new("apparmor: config provided but apparmor not supported"));
    }
    Ok(())
}

/// The AppArmor profile for the next program.
pub fn apply_apparmor(process: &Process, procfs: &Later) -> Result<()> {
    let Some(profile) = process.apparmor_profile().as_deref().filter(|p| !p.is_empty()) else {
        return Ok(());
    };
    let value = format!("exec {profile}");
    let procfs = procfs.get()?;
    let write = || match procfs.write("self/attr/apparmor/exec", &value) {
        Err(e) if e.errno() == Some(Errno::ENOENT) => procfs.write("self/attr/exec", &value),
        other => other,
    };
    write().context(|| "apparmor failed to apply profile")
}

/// Runs `make`, whose keys get the SELinux label of the program that is to use them.
pub fn with_key_label(process: &Process, make: impl FnOnce() -> Result<()>) -> Result<()> {
    let Some(label) = process.selinux_label().as_deref().filter(|l| !l.is_empty()) else { return make() };
    let procfs = Procfs::open()?;
    let set = |value: &str| procfs.write("self/attr/keycreate", value).context(|| "can't set key label");
    set(label)?;
    let made = make();
    // An empty line is no label.
    set("\n")?;
    made
}

/// The SELinux label for the next program.
pub fn apply_selinux(process: &Process, procfs: &Later) -> Result<()> {
    let Some(label) = process.selinux_label().as_deref().filter(|l| !l.is_empty()) else { return Ok(()) };
    procfs.get()?.write("self/attr/exec", label).context(|| "can't set process label")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(rest: &str) -> Process {
        serde_json::from_str(&format!(r#"{{"user":{{"uid":0,"gid":0}},"cwd":"/","args":["x"]{rest}}}"#))
            .unwrap()
    }

    #[test]
    fn no_label_needs_nothing() {
        let plain = process("");
        validate(&plain).unwrap();
        let procfs = Later::default();
        apply_apparmor(&plain, &procfs).unwrap();
        apply_selinux(&plain, &procfs).unwrap();
    }

    #[test]
    fn a_label_that_cannot_be_applied_is_an_error() {
        if !has_selinux() {
            let e = validate(&process(r#","selinuxLabel":"a:b:c""#)).unwrap_err().to_string();
            assert!(e.contains("selinux is disabled"), "{e}");
        }
        if !has_apparmor() {
            let e = validate(&process(r#","apparmorProfile":"docker-default""#)).unwrap_err().to_string();
            assert!(e.contains("apparmor not supported"), "{e}");
        }
    }

    #[test]
    fn labels_are_written_whatever_covers_proc() {
        use nix::mount::{MsFlags, mount};
        crate::sys::testing::in_child(libc::CLONE_NEWNS, || {
            // What an image could have in the place of /proc (CVE-2019-19921).
            let none: Option<&str> = None;
            mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty(), none).unwrap();
            let files = ["attr/exec", "attr/keycreate", "attr/apparmor/exec"]
                .map(|name| Path::new("/proc/self").join(name));
            for file in &files {
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                std::fs::write(file, "").unwrap();
            }
            let labelled = process(r#","selinuxLabel":"a:b:c","apparmorProfile":"unconfined""#);
            // Whether it works depends on the kernel.
            let _ = apply_apparmor(&labelled, &Later::default());
            let _ = apply_selinux(&labelled, &Later::default());
            let _ = with_key_label(&labelled, || Ok(()));
            for file in &files {
                assert_eq!(std::fs::read_to_string(file).unwrap(), "", "{}", file.display());
            }
        });
    }
}
