//! What runs inside a new container before its program does.
