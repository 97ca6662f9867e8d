//! Driving a task from outside: ptrace and the syscall batch.

/// A seized thread.
#[derive(Debug)]
pub struct Thread {}

/// A stopped task that runs batches.
#[derive(Debug)]
pub struct Injection {}
