//! Namespaces, mounts and control groups.
