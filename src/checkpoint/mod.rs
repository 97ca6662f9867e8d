//! The engine: checkpoint and restore of a container, from outside, without a program injected into it.

pub mod context;
pub mod error;
pub mod files;
pub mod image;
pub mod memory;
pub mod model;
pub mod namespaces;
pub mod remote;
pub mod task;

pub use error::{Error, Result};
