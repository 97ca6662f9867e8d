//! Sockets of a network namespace, as sock_diag(7) lists them.

/// The sockets of the container.
#[derive(Debug, Default)]
pub struct Diag {}
