//! Finding the program to run, and the environment it gets: runc's rules, in the words of Go's `os/exec`, which
//! Docker and Podman turn into exit codes 126 and 127.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};

use crate::sys::error::words;
use crate::sys::{Error, Result};

/// A program ready for execve(2).
#[derive(Debug)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// Its arguments, the name first.
    pub args: Vec<CString>,
    /// Its environment.
    pub env: Vec<CString>,
}

impl Program {
    /// Finds `args[0]` in the PATH of `env`.
    pub fn find(args: &[String], env: Vec<String>) -> Result<Self> {
        let name = args.first().ok_or_else(|| Error::new("args must not be empty"))?;
        let path = env.iter().find_map(|e| e.strip_prefix("PATH=")).unwrap_or_default();
        let path = look_up(name, path)?;
        let args = args.iter().map(|a| c_string(a)).collect::<Result<_>>()?;
        let env = env.iter().map(|e| c_string(e)).collect::<Result<_>>()?;
        Ok(Self { path, args, env })
    }

    /// Becomes the program. Returns only a failure.
    pub fn exec(&self) -> Error {
        let path = match CString::new(self.path.as_os_str().as_bytes()) {
            Ok(path) => path,
            Err(_) => return nul(&self.path.display().to_string()),
        };
        match nix::unistd::execve(&path, &self.args, &self.env) {
            Ok(never) => match never {},
            Err(errno) => Error::call(format!("exec {}", self.path.display()), errno),
        }
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| nul(text))
}

fn nul(text: &str) -> Error {
    Error::new(format!("{text:?} contains a nul byte"))
}

fn look_up(name: &str, search: &str) -> Result<PathBuf> {
    let failed = |why: &str| Error::new(format!("exec: {name:?}: {why}"));
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err((Step::Stat, errno)) => Err(failed(&format!("stat {name}: {}", words(errno)))),
            // Docker makes exit code 126 of the last words only.
            Err((Step::Access, Errno::EISDIR)) => Err(failed("is a directory: permission denied")),
            Err((Step::Access, errno)) => Err(failed(&words(errno))),
        };
    }
    for dir in search.split(':') {
        let path = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        if executable(&path).is_ok() {
            if path.is_relative() {
                return Err(failed("cannot run executable found relative to current directory"));
            }
            return Ok(path);
        }
    }
    Err(failed("executable file not found in $PATH"))
}

enum Step {
    Stat,
    Access,
}

fn executable(path: &Path) -> Result<(), (Step, Errno)> {
    let meta = fs::metadata(path)
        .map_err(|e| (Step::Stat, Errno::from_raw(e.raw_os_error().unwrap_or(libc::EINVAL))))?;
    if meta.is_dir() {
        return Err((Step::Access, Errno::EISDIR));
    }
    match faccessat(nix::fcntl::AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        // Refused by a seccomp profile or missing: the mode bits have to do.
        Err(Errno::ENOSYS | Errno::EPERM) if meta.mode() & 0o111 != 0 => Ok(()),
        Err(Errno::ENOSYS | Errno::EPERM) => Err((Step::Access, Errno::EACCES)),
        done => done.map_err(|errno| (Step::Access, errno)),
    }
}

/// Checks the variables, keeps the last of each name in the order of config.json, and adds HOME.
/// To be called inside the container: HOME comes from its /etc/passwd.
pub fn environment(env: &[String], uid: u32) -> Result<Vec<String>> {
    let mut seen = std::collections::HashSet::with_capacity(env.len());
    let mut out = Vec::with_capacity(env.len() + 1);
    for pair in env.iter().rev() {
        let name = match pair.split_once('=') {
            None => return Err(Error::new("invalid environment variable: missing '='")),
            Some(("", _)) => return Err(Error::new("invalid environment variable: name cannot be empty")),
            Some((name, _)) => name,
        };
        if pair.contains('\0') {
            let name = name.replace('\0', "\\x00");
            return Err(Error::new(format!(
                "invalid environment variable \"{name}\": contains nul byte (\\x00)"
            )));
        }
        // An empty HOME counts as none.
        if seen.insert(name) && pair != "HOME=" {
            out.push(pair.clone());
        }
    }
    out.reverse();
    if !out.iter().any(|pair| pair.starts_with("HOME=")) {
        out.push(format!("HOME={}", home(uid)));
    }
    Ok(out)
}

/// A passwd file longer than this is not the kind that names users of a container.
const PASSWD_LIMIT: u64 = 16 << 20;

fn home(uid: u32) -> String {
    let read = || -> Option<String> {
        use std::io::Read;
        use std::os::unix::fs::OpenOptionsExt;
        // Whoever made the image may have put a fifo there, which would keep us waiting, or a device.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = fs::File::options().read(true).custom_flags(flags).open("/etc/passwd").ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut text = vec![];
        file.take(PASSWD_LIMIT).read_to_end(&mut text).ok()?;
        home_in(&text, uid)
    };
    read().unwrap_or_else(|| "/".to_owned())
}

fn home_in(passwd: &[u8], uid: u32) -> Option<String> {
    let uid = uid.to_string();
    passwd.split(|&b| b == b'\n').find_map(|line| {
        let line = std::str::from_utf8(line).ok()?;
        let mut fields = line.trim().split(':');
        (fields.nth(2)? == uid).then(|| fields.nth(2).map(str::to_owned))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|&s| s.to_owned()).collect()
    }

    #[test]
    fn the_last_of_each_variable_stays() {
        let env = environment(&strings(&["A=1", "HOME=", "B=2", "A=3", "HOME=/h"]), 0).unwrap();
        assert_eq!(env, ["B=2", "A=3", "HOME=/h"]);
        assert!(environment(&strings(&["A"]), 0).is_err());
        assert!(environment(&strings(&["=x"]), 0).is_err());
    }

    #[test]
    fn home_is_the_sixth_field() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbad\nredis:x:999:999::/data:/sbin/nologin\n";
        assert_eq!(home_in(passwd, 999).as_deref(), Some("/data"));
        assert_eq!(home_in(passwd, 5), None);
    }

    #[test]
    fn failures_read_as_gos() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tool");
        std::fs::write(&path, "").unwrap();
        let find = |name: &str| look_up(name, dir.path().to_str().unwrap()).map_err(|e| e.to_string());
        assert_eq!(find("tool").unwrap_err(), r#"exec: "tool": executable file not found in $PATH"#);
        let p = path.to_str().unwrap();
        assert_eq!(find(p).unwrap_err(), format!(r#"exec: "{p}": permission denied"#));
        assert_eq!(find("/x/y").unwrap_err(), r#"exec: "/x/y": stat /x/y: no such file or directory"#);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find("tool").unwrap(), path);
        assert_eq!(find("/").unwrap_err(), r#"exec: "/": is a directory: permission denied"#);
    }
}
