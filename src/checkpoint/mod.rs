//! The engine: checkpoint and restore of a container, from outside, without a program injected into it.

pub mod arch;
pub mod check;
pub mod context;
pub mod dump;
pub mod error;
pub mod external;
pub mod features;
pub mod files;
pub mod image;
pub mod live;
pub mod memory;
pub mod model;
pub mod namespaces;
pub mod outlook;
pub mod pieces;
pub mod precopy;
pub mod predump;
pub mod processor;
pub mod progress;
pub mod recovery;
pub mod remote;
pub mod report;
pub mod restore;
pub mod show;
mod stop;
pub mod task;
pub mod trace;

pub use error::{Error, Result};
pub use task::freeze::Freezer;
