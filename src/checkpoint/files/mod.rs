//! Descriptors, one file a kind.
