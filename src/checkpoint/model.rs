//! The plain model of a checkpointed container, between live tasks and images.

/// Everything that the images hold, apart from memory pages.
#[derive(Debug, Default)]
pub struct Model {}
