//! Live migration: a container goes on at another host, after standing still for as long as the last changes take.
//!
//! ```text
//!   migrate                                           receive
//!     hello, what was asked          ───────────────>   bundle is loaded, container's id is free
//!     pre-dump 1: all pages          ───────────────>   1/
//!     pre-dump 2: what has changed   ───────────────>   2/  parent -> ../1
//!     ...
//!     (stands still)
//!     last dump                      ───────────────>   N/  parent -> ../N-1
//!                                    <─ ready ───────   restored, and not let go yet
//!     (frozen by its freezer)  commit ──────────────>   let go; its memory is filled from N/ ... 1/ while it runs
//!                                    <─ running ─────
//!     killed
//! ```
//!
//! Until `commit` is sent whatever fails leaves the container running here, and nothing there. When the answer to it does
//! not come nobody can know here whether it runs there: it stays, paused, and the operator is told. It never runs twice.
//!
//! The stream is neither encrypted nor authenticated: it belongs into ssh (`--via`) or a network of one's own. The root
//! file system is not sent: both bundles have the same files, by shared storage or a copy.

mod receive;
mod send;
mod wire;

pub use receive::{Listener, Receive, receive};
pub use send::{Destination, Outcome, send};
