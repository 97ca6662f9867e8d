//! Memory: mappings and pages.

pub mod maps;
pub mod pages;
