//! config.json: loading, validation, and the templates that `spec` and `features` print.

pub mod validate;
