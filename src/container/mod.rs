//! The life of a container: its state on disk, and what each command does to it.
