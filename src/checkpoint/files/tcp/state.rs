//! The states of a TCP socket, as the kernel and the images number them.
//!
//! ```text
//!                        we end first                        the peer ends first
//!   ESTABLISHED ── FIN ──> FIN_WAIT1 ── acknowledged ──> FIN_WAIT2      ── FIN ──> CLOSE_WAIT ── ours ──> LAST_ACK
//!                             └── the peer's FIN ──> CLOSING            then, both: (TIME_WAIT,) CLOSE
//! ```

/// Data flows both ways.
pub const ESTABLISHED: u32 = 1;
/// Connecting.
pub const SYN_SENT: u32 = 2;
/// We have ended; the peer has not heard it.
pub const FIN_WAIT1: u32 = 4;
/// We have ended, and the peer knows.
pub const FIN_WAIT2: u32 = 5;
/// No connection, or none any more.
pub const CLOSE: u32 = 7;
/// The peer has ended.
pub const CLOSE_WAIT: u32 = 8;
/// The peer has ended, then we; it has not heard it.
pub const LAST_ACK: u32 = 9;
/// Waiting for connections.
pub const LISTEN: u32 = 10;
/// We have ended, then the peer, which has not heard that we have.
pub const CLOSING: u32 = 11;

/// A connection that can be kept.
pub fn is_connection(state: u32) -> bool {
    matches!(state, ESTABLISHED | SYN_SENT | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING)
}

/// We have ended our direction.
pub fn has_sent_fin(state: u32) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK | CLOSE)
}

/// The peer has ended its direction.
pub fn has_received_fin(state: u32) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING | CLOSE)
}
