//! Control groups behind one small interface: v1, hybrid and v2.
