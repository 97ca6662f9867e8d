//! Thin, safe wrappers of system calls that `nix` lacks.
