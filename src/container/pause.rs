//! Freezing and thawing a container.

use super::{Container, Error, Result, Status, Store};

/// `pause`.
pub fn pause(store: &Store, id: &str) -> Result<()> {
    let (container, _lock) = Container::load_locked(store, id)?;
    match container.status()? {
        Status::Running | Status::Created => Ok(container.cgroup().freeze()?),
        Status::Paused | Status::Stopped => Err(Error::NotRunning),
    }
}

/// `resume`.
pub fn resume(store: &Store, id: &str) -> Result<()> {
    let (container, _lock) = Container::load_locked(store, id)?;
    match container.status()? {
        Status::Paused => Ok(container.cgroup().thaw()?),
        _ => Err(Error::NotPaused),
    }
}
