//! CRIU's image format.

/// A directory of images.
#[derive(Debug)]
pub struct ImageDir {}
