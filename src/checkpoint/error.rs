//! The engine's error: what failed, on which resource of which process, by which system call, and the remedy.

use std::fmt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// A result of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One failure or refusal. Boxed, so that results stay one word wide.
#[derive(Debug)]
pub struct Error(Box<Fields>);

/// What is known of a failure; `--log-format json` prints these as fields of their own.
#[derive(Debug, Default)]
pub struct Fields {
    /// What could not be done, as a clause without a full stop: "cannot read the pipe".
    pub what: String,
    /// Kind of resource: "pipe", "unix socket".
    pub resource: Option<&'static str>,
    /// Process id inside the container.
    pub pid: Option<i32>,
    /// File descriptor of that process.
    pub fd: Option<i32>,
    /// File concerned, as the container sees it, or the image file.
    pub path: Option<PathBuf>,
    /// The system call with its arguments, as strace prints it: `tee(5, 7, 65536, 0)`.
    pub call: Option<String>,
    /// What the kernel answered.
    pub errno: Option<Errno>,
    /// What the operator can do about it.
    pub remedy: Option<String>,
    /// It passes by itself when the program runs on.
    pub passing: bool,
}

impl Error {
    /// A failure described by a clause without a full stop.
    pub fn new(what: impl Into<String>) -> Self {
        Self(Box::new(Fields { what: what.into(), ..Fields::default() }))
    }
    /// Names the kind of resource.
    #[must_use]
    pub fn of(mut self, resource: &'static str) -> Self {
        self.0.resource.get_or_insert(resource);
        self
    }
    /// Names the process, by its id inside the container.
    #[must_use]
    pub fn pid(mut self, pid: i32) -> Self {
        self.0.pid.get_or_insert(pid);
        self
    }
    /// Names the descriptor.
    #[must_use]
    pub fn fd(mut self, fd: i32) -> Self {
        self.0.fd.get_or_insert(fd);
        self
    }
    /// Names the file.
    #[must_use]
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }
    /// Names the system call and what it answered.
    #[must_use]
    pub fn call(mut self, call: impl Into<String>, errno: Errno) -> Self {
        self.0.call = Some(call.into());
        self.0.errno = Some(errno);
        self
    }
    /// Says what the operator can do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy.get_or_insert_with(|| remedy.into());
        self
    }
    /// Says that it passes by itself when the program runs on: a dump tries again for a while.
    #[must_use]
    pub fn passing(mut self) -> Self {
        self.0.passing = true;
        self
    }
    /// Whether it passes by itself.
    pub fn is_passing(&self) -> bool {
        self.0.passing
    }
    /// Says that `count` more things are wrong.
    #[must_use]
    pub fn and_others(mut self, count: usize) -> Self {
        self.0.what.push_str(&format!(" (and {count} more, see the log)"));
        self
    }
    /// The parts of the failure.
    pub fn fields(&self) -> &Fields {
        &self.0
    }
    /// What the kernel answered, if a system call failed.
    pub fn errno(&self) -> Option<Errno> {
        self.0.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &self.0;
        f.write_str(&e.what)?;
        let mut open = false;
        let mut item = |f: &mut fmt::Formatter<'_>, text: fmt::Arguments<'_>| {
            f.write_str(if open { ", " } else { " (" })?;
            open = true;
            f.write_fmt(text)
        };
        if let Some(pid) = e.pid {
            item(f, format_args!("process {pid}"))?;
        }
        if let Some(fd) = e.fd {
            item(f, format_args!("descriptor {fd}"))?;
        }
        if let Some(path) = &e.path {
            item(f, format_args!("{}", path.display()))?;
        }
        if open {
            f.write_str(")")?;
        }
        match (&e.call, e.errno) {
            (Some(call), Some(errno)) => write!(f, ": {call}: {}", errno.desc())?,
            (Some(call), None) => write!(f, ": {call}")?,
            (None, Some(errno)) => write!(f, ": {}", errno.desc())?,
            (None, None) => {}
        }
        if let Some(remedy) = &e.remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Adds what was being done to a failed system call.
pub trait Context<T> {
    /// Turns an errno into an [`Error`]: `what` says what failed, `call` is the system call with its arguments.
    fn during(self, what: &str, call: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for nix::Result<T> {
    fn during(self, what: &str, call: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::new(what).call(call(), errno))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn during(self, what: &str, call: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| match e.raw_os_error() {
            Some(errno) => Error::new(what).call(call(), Errno::from_raw(errno)),
            None => Error::new(format!("{what}: {e}")),
        })
    }
}
