//! Stopping every thread of a container, and letting it go on.

use crate::checkpoint::Result;

/// The container's freezer: `cgroup/` implements it for v1, v2 and for hosts without one.
pub trait Freezer {
    /// Stops the whole subtree and waits until it is stopped.
    fn freeze(&mut self) -> Result<()>;
    /// Lets it go on. Nested groups that were frozen on their own stay so.
    fn thaw(&mut self) -> Result<()>;
    /// Whether the container is frozen now, by whomever: `pause`, or its owner.
    fn is_frozen(&self) -> Result<bool>;
    /// Every process of the subtree, as pids of this host.
    fn pids(&self) -> Result<Vec<i32>>;
}
