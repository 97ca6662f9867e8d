//! The macro that defines a record: a struct that `prost` reads and writes, and beside it the [`Schema`] that the
//! framing needs to name what it does not know.
//!
//! Names and numbers of the fields are those of CRIU's published definitions, so one can be read beside the other:
//!
//! ```text
//!   PipeDataEntry = "pipe_data_entry" {      in CRIU's words:  message pipe_data_entry {
//!       pipe_id: required uint32 = 1,                            required uint32 pipe_id = 1; ...
//! ```

use prost::Message;

use crate::checkpoint::image::wire::Schema;

/// A message of the image format.
pub trait Record: Message + Default {
    /// What fields it has.
    const SCHEMA: &'static Schema;
}

/// Defines records. Each line of a record reads `name: label type = number`, where the type is a scalar of
/// protobuf, `message(Record)` or `enumeration(Enum)`.
macro_rules! records {
    ($($(#[$doc:meta])* $name:ident = $wire:literal { $($fields:tt)* })*) => { $(
        $crate::checkpoint::image::record::record_struct! { [$(#[$doc])*] $name [] $($fields)* }
        $crate::checkpoint::image::record::record_schema! { $name $wire [] $($fields)* }
    )*
        /// The records of this file, for tests of all of them.
        #[cfg(test)]
        pub(crate) const RECORDS: &[$crate::checkpoint::image::tests::AnyRecord] =
            &[$($crate::checkpoint::image::tests::AnyRecord::of::<$name>()),*];
    };
}

/// Builds the struct, a field at a time.
macro_rules! record_struct {
    ([$($doc:tt)*] $name:ident [$($done:tt)*]) => {
        $($doc)*
        #[derive(Clone, PartialEq, prost::Message)]
        pub struct $name { $($done)* }
    };
    ($doc:tt $name:ident [$($done:tt)*] $f:ident: $label:ident message($of:ident) = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_struct! { $doc $name [$($done)*
            #[allow(missing_docs)]
            #[prost(message, $label, tag = $n)]
            pub $f: $crate::checkpoint::image::record::labelled!($label $of),
        ] $($rest)* }
    };
    ($doc:tt $name:ident [$($done:tt)*] $f:ident: repeated enumeration($of:ident) = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_struct! { $doc $name [$($done)*
            #[allow(missing_docs)]
            #[prost(enumeration($of), repeated, packed = "false", tag = $n)]
            pub $f: Vec<i32>,
        ] $($rest)* }
    };
    ($doc:tt $name:ident [$($done:tt)*] $f:ident: $label:ident enumeration($of:ident) = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_struct! { $doc $name [$($done)*
            #[allow(missing_docs)]
            #[prost(enumeration($of), $label, tag = $n)]
            pub $f: $crate::checkpoint::image::record::labelled!($label i32),
        ] $($rest)* }
    };
    ($doc:tt $name:ident [$($done:tt)*] $f:ident: repeated $kind:ident = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_struct! { $doc $name [$($done)*
            #[allow(missing_docs)]
            #[prost($kind, repeated, packed = "false", tag = $n)]
            pub $f: Vec<$crate::checkpoint::image::record::scalar!($kind)>,
        ] $($rest)* }
    };
    ($doc:tt $name:ident [$($done:tt)*] $f:ident: required $kind:ident = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_struct! { $doc $name [$($done)*
            #[allow(missing_docs)]
            #[prost($kind, required, tag = $n)]
            pub $f: $crate::checkpoint::image::record::scalar!($kind),
        ] $($rest)* }
    };
    ($doc:tt $name:ident [$($done:tt)*] $f:ident: optional $kind:ident = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_struct! { $doc $name [$($done)*
            #[allow(missing_docs)]
            #[prost($kind, optional, tag = $n)]
            pub $f: Option<$crate::checkpoint::image::record::scalar!($kind)>,
        ] $($rest)* }
    };
}

/// Builds the schema, a field at a time.
macro_rules! record_schema {
    ($name:ident $wire:literal [$($done:tt)*]) => {
        impl $crate::checkpoint::image::record::Record for $name {
            const SCHEMA: &'static $crate::checkpoint::image::wire::Schema =
                &$crate::checkpoint::image::wire::Schema { name: $wire, fields: &[$($done)*] };
        }
    };
    ($name:ident $wire:literal [$($done:tt)*] $f:ident: $label:ident message($of:ident) = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_schema! { $name $wire [$($done)*
            $crate::checkpoint::image::wire::Field {
                number: $n, name: stringify!($f), required: $crate::checkpoint::image::record::is_required!($label),
                wire: 2, nested: Some(|| <$of as $crate::checkpoint::image::record::Record>::SCHEMA),
                size: size_of::<$of>(),
            },
        ] $($rest)* }
    };
    ($name:ident $wire:literal [$($done:tt)*]
        $f:ident: $label:ident $kind:ident $(($of:ident))? = $n:tt, $($rest:tt)*) => {
        $crate::checkpoint::image::record::record_schema! { $name $wire [$($done)*
            $crate::checkpoint::image::wire::Field {
                number: $n, name: stringify!($f), required: $crate::checkpoint::image::record::is_required!($label),
                wire: $crate::checkpoint::image::record::wire_type!($kind), nested: None,
                size: size_of::<$crate::checkpoint::image::record::scalar!($kind)>(),
            },
        ] $($rest)* }
    };
}

/// The Rust type of a labelled message or enumeration.
macro_rules! labelled {
    (required $t:ident) => { $t };
    (optional $t:ident) => { Option<$t> };
    (repeated $t:ident) => { Vec<$t> };
}

/// The wire type of a scalar.
macro_rules! wire_type {
    (string) => {
        2
    };
    (bytes) => {
        2
    };
    (fixed64) => {
        1
    };
    ($varint:ident) => {
        0
    };
}

/// Whether a label makes a field obligatory.
macro_rules! is_required {
    (required) => {
        true
    };
    ($other:ident) => {
        false
    };
}

/// The Rust type of a scalar.
macro_rules! scalar {
    (uint32) => { u32 };
    (uint64) => { u64 };
    (fixed64) => { u64 };
    (int32) => { i32 };
    (sint32) => { i32 };
    (enumeration) => { i32 };
    (int64) => { i64 };
    (sint64) => { i64 };
    (bool) => { bool };
    (string) => { String };
    (bytes) => { Vec<u8> };
}

pub(crate) use {is_required, labelled, record_schema, record_struct, records, scalar, wire_type};
