//! Stasis: an OCI container runtime whose checkpoint/restore engine is built in.
//!
//! ```text
//!   argv ──> cli ──> container ──┬──> init ──> the container's program
//!         migrate ──> │  ▲       └──> cgroup
//!                     │  └ bundle (config.json)
//!                     ▼
//!                checkpoint ──> remote   (drives a stopped task from outside)
//!                  │   ├──> task, memory, files, namespaces   (one room a resource)
//!                  │   └──> image        (CRIU's format on disk)
//!                  └── dump.rs, restore.rs: the order of things
//! ```
//!
//! Data flows one way. A dump turns live tasks into a plain [`checkpoint::model::Model`], and the model into
//! images; a restore reads images into the same model, validates it, and carries it out on new tasks.

pub mod bundle;
pub mod cgroup;
pub mod checkpoint;
pub mod cli;
pub mod container;
pub mod init;
pub mod migrate;
pub mod sys;
