//! Mappings and pages.
