//! The order of a dump.
//!
//! ```text
//!  running --check--> running --freeze, seize, thaw--> every thread in a ptrace stop
//!     ^                  |                                  | capture: registers, tasks, files, memory, namespaces
//!     |                  | refused: all findings            v
//!     |                  v                            model + pages in a staging directory
//!     +--- error --------+------ heal, detach <------------ | any error
//!     |                                                     v
//!     +<-- leave-running: heal, detach ------------- write, publish
//!                                                           v
//!                                            stopping: publish, then SIGKILL, never resumed
//! ```

use crate::checkpoint::context::{Options, Source};
use crate::checkpoint::report::DumpReport;
use crate::checkpoint::{Error, Freezer, Result};

/// Dumps the container into `options.image_path`. On an error the container runs as before.
pub fn dump(_options: &Options, _source: &Source, _freezer: &mut dyn Freezer) -> Result<DumpReport> {
    Err(Error::new("cannot dump yet"))
}
