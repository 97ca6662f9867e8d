//! Memory: mappings and pages.

pub mod copy;
pub mod layout;
pub mod maps;
pub mod pagemap;
pub mod pages;
pub mod plan;
pub mod shmem;
pub mod vdso;
pub mod vmas;
