//! What goes wrong in the life of a container. The texts are runc's where clients match on them.

use nix::errno::Errno;

use crate::{checkpoint, sys};

/// A result of the runtime.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure or refusal. [`Error::Failed`] carries a finished sentence; the others are matched on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No container of that id under this root.
    #[error("container does not exist")]
    NotExist,
    /// The id is taken.
    #[error("container with given ID already exists")]
    Exists,
    /// The id cannot name a directory safely.
    #[error("invalid container ID format")]
    InvalidId,
    /// No id was given.
    #[error("container id cannot be empty")]
    EmptyId,
    /// The command line is not one of ours; its help has been printed.
    #[error("{0}")]
    Usage(String),
    /// The container's init is gone.
    #[error("container not running")]
    NotRunning,
    /// Resume without pause.
    #[error("container not paused")]
    NotPaused,
    /// Anything else: what was being done, and why it failed.
    #[error(transparent)]
    Failed(#[from] sys::Error),
    /// The checkpoint engine's own error, whose fields the JSON log prints one by one.
    #[error(transparent)]
    Engine(#[from] checkpoint::Error),
}

impl Error {
    /// A failure that no system call reported, as a clause without a full stop.
    pub fn new(what: impl Into<String>) -> Self {
        Self::Failed(sys::Error::new(what))
    }

    /// Puts what was being done before what went wrong.
    #[must_use]
    pub fn context(self, what: &str) -> Self {
        match self {
            Self::Failed(e) => Self::Failed(e.context(what)),
            other => Self::new(format!("{what}: {other}")),
        }
    }

    /// What the kernel answered, if a system call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Failed(e) => e.errno(),
            Self::Engine(e) => e.errno(),
            _ => None,
        }
    }
}
