//! The order of a restore.
//!
//! ```text
//!  images --read, validate--> model --plan--> steps
//!  stub of init, waiting in its namespaces (made by `container/` from *this* bundle's config.json)
//!     | seize, settle outside every mapping of the images
//!     v
//!  namespaces' contents -> open files -> tree (clone3 set_tid, setsid, setpgid) -> descriptors -> memory -> threads
//!     -> signals, seccomp, credentials, ... -> ready() -> registers, masks -> detach
//! ```
//!
//! Until `ready()` has returned, a failure kills everything that was made; the images are only read.

use crate::checkpoint::context::{Options, Target};
use crate::checkpoint::image::ImageDir;
use crate::checkpoint::model::Model;
use crate::checkpoint::report::RestoreReport;
use crate::checkpoint::{Error, Result};

/// Fills the container that `target` describes from the images. `ready` is called once everything is in place and
/// before any restored instruction runs: the caller writes state.json and the pid file there; its error fails the restore.
pub fn restore(
    _options: &Options,
    _target: &Target,
    _model: &Model,
    _images: &ImageDir,
    _ready: &mut dyn FnMut() -> Result<()>,
) -> Result<RestoreReport> {
    Err(Error::new("cannot restore yet"))
}
