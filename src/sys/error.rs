//! The runtime's error: a chain of clauses that ends in what the kernel said, in the words that clients match.
//!
//! Docker and Podman look into the text for `no such file or directory`, `permission denied`,
//! `operation not permitted` and the like, case-sensitively and in lower case, as Go prints them. So an errno is
//! printed by [`words`], never by `strerror` alone.

use std::fmt;
use std::io;

use nix::errno::Errno;

/// A result of the runtime.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One failure: a sentence, and the errno behind it if a system call failed. Boxed, so that results stay small.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    message: String,
    errno: Option<Errno>,
}

impl Error {
    /// A failure that no system call reported.
    pub fn new(message: impl Into<String>) -> Self {
        Self(Box::new(Inner { message: message.into(), errno: None }))
    }

    /// A failed system call: `call` is its name with its arguments, as far as they help.
    pub fn call(call: impl fmt::Display, errno: Errno) -> Self {
        Self(Box::new(Inner { message: format!("{call}: {}", words(errno)), errno: Some(errno) }))
    }

    /// Puts what was being done before what went wrong.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// What the kernel answered, if a system call failed.
    pub fn errno(&self) -> Option<Errno> {
        self.0.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// Puts `what` (usually the system call with its arguments) before the failure.
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T> Context<T> for Result<T, Errno> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|errno| Error::call(what(), errno))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| match e.raw_os_error() {
            Some(raw) => Error::call(what(), Errno::from_raw(raw)),
            None => Error::new(format!("{}: {e}", what())),
        })
    }
}

impl<T> Context<T> for Result<T, Error> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| e.context(what()))
    }
}

/// What Go says of a process that a signal ended.
pub fn signal_words(signal: i32) -> String {
    const NAMES: [&str; 31] = [
        "hangup",
        "interrupt",
        "quit",
        "illegal instruction",
        "trace/breakpoint trap",
        "aborted",
        "bus error",
        "floating point exception",
        "killed",
        "user defined signal 1",
        "segmentation fault",
        "user defined signal 2",
        "broken pipe",
        "alarm clock",
        "terminated",
        "stack fault",
        "child exited",
        "continued",
        "stopped (signal)",
        "stopped",
        "stopped (tty input)",
        "stopped (tty output)",
        "urgent I/O condition",
        "CPU time limit exceeded",
        "file size limit exceeded",
        "virtual timer expired",
        "profiling timer expired",
        "window changed",
        "I/O possible",
        "power failure",
        "bad system call",
    ];
    let name = usize::try_from(signal - 1).ok().and_then(|i| NAMES.get(i));
    name.map_or_else(|| format!("signal {signal}"), |name| (*name).to_owned())
}

/// An errno in words, as Go's standard library prints it: the C library's sentence with a small first letter.
pub fn words(errno: Errno) -> String {
    let text = io::Error::from_raw_os_error(errno as i32).to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    match (chars.next(), chars.next()) {
        // "RFS specific error" keeps its capitals.
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(std::iter::once(second)).chain(chars).collect()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_use_the_words_that_clients_match() {
        assert_eq!(words(Errno::ENOENT), "no such file or directory");
        assert_eq!(words(Errno::EACCES), "permission denied");
        assert_eq!(words(Errno::EPERM), "operation not permitted");
        assert_eq!(words(Errno::ENOTDIR), "not a directory");
        assert_eq!(words(Errno::ESRCH), "no such process");
        assert_eq!(words(Errno::EIO), "input/output error");
    }

    #[test]
    fn context_goes_before_and_the_errno_stays() {
        let failed: Result<(), Errno> = Err(Errno::EBUSY);
        let e = failed.context(|| "rmdir /x").context(|| "cannot remove").unwrap_err();
        assert_eq!(e.to_string(), "cannot remove: rmdir /x: device or resource busy");
        assert_eq!(e.errno(), Some(Errno::EBUSY));
    }
}
