//! A look at the wire form of a record before `prost` decodes it.
//!
//! `prost` drops fields that it does not know and fills in required ones that are missing. In a checkpoint both would
//! restore something else than what was saved, in silence, so each record is first walked field by field:
//!
//! ```text
//!   key = number << 3 | type    type 0  varint
//!   ├── number in the schema?   type 1  8 bytes
//!   ├── nested: walk into it    type 2  varint length, then as many bytes
//!   └── value skipped           type 5  4 bytes
//! ```
//!
//! The walk also adds up what the decoded record will occupy: two bytes of hostile input can stand for a struct
//! of hundreds, and a budget stops that before anything is allocated.

use std::fmt;

/// The fields of a message.
#[derive(Debug)]
pub struct Schema {
    /// Name in CRIU's definitions.
    pub name: &'static str,
    /// In any order; at most 64.
    pub fields: &'static [Field],
}

/// One field of a message.
#[derive(Debug)]
pub struct Field {
    /// Its number on the wire.
    pub number: u32,
    /// Its name, as a Rust identifier.
    pub name: &'static str,
    /// Its wire type; a repeated scalar may also come packed, as type 2.
    pub wire: u8,
    /// A record without it is malformed.
    pub required: bool,
    /// The message it holds, if it is one.
    pub nested: Option<fn() -> &'static Schema>,
    /// Memory that one decoded value takes.
    pub size: usize,
}

/// What is wrong with the bytes of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Defect {
    /// The bytes end within a field.
    Short(&'static str),
    /// A varint of more than 64 bits, or a wire type out of use.
    Malformed(&'static str),
    /// A field that the schema lacks.
    Unknown(&'static str, u64),
    /// A required field that the record lacks.
    Missing(&'static str, &'static str),
    /// Messages within messages beyond any that the format has.
    Deep(&'static str),
    /// Decoded, the record would be too large.
    Large(&'static str),
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(at) => write!(f, "{at} ends within a field"),
            Self::Malformed(at) => write!(f, "{at} is malformed"),
            Self::Unknown(at, number) => {
                write!(f, "{at} has a field {number}, which this version does not know")
            }
            Self::Missing(at, field) => write!(f, "{at} lacks its field {}", field.trim_start_matches("r#")),
            Self::Deep(at) => write!(f, "{at} is nested too deeply"),
            Self::Large(at) => write!(f, "{at} is too large"),
        }
    }
}

/// Deepest nesting of messages; control groups nest as directories do.
const DEPTH: usize = 64;

/// Checks the bytes of a record. `budget` is the memory that decoded records may still take, and is reduced.
pub fn check(schema: &'static Schema, bytes: &[u8], budget: &mut usize) -> Result<(), Defect> {
    walk(schema, bytes, budget, 0)
}

fn walk(schema: &'static Schema, mut rest: &[u8], budget: &mut usize, depth: usize) -> Result<(), Defect> {
    let at = schema.name;
    if depth > DEPTH {
        return Err(Defect::Deep(at));
    }
    let mut seen = 0u64;
    while !rest.is_empty() {
        let key = varint(&mut rest, at)?;
        let index = schema.fields.iter().position(|f| u64::from(f.number) == key >> 3);
        let (Some(index), Some(field)) = (index, index.and_then(|i| schema.fields.get(i))) else {
            return Err(Defect::Unknown(at, key >> 3));
        };
        seen |= 1 << index;
        *budget = budget.checked_sub(field.size).ok_or(Defect::Large(at))?;
        let wire = key & 7;
        if wire != u64::from(field.wire) && (wire != 2 || field.required) {
            return Err(Defect::Malformed(at));
        }
        match wire {
            0 => drop(varint(&mut rest, at)?),
            1 => drop(take(&mut rest, 8, at)?),
            5 => drop(take(&mut rest, 4, at)?),
            2 => {
                let length = varint(&mut rest, at)?;
                let value = take(&mut rest, length, at)?;
                match field.nested {
                    Some(nested) => walk(nested(), value, budget, depth + 1)?,
                    // Packed scalars take up to eight bytes for each one here.
                    None => *budget = budget.checked_sub(value.len() * 8).ok_or(Defect::Large(at))?,
                }
            }
            _ => return Err(Defect::Malformed(at)),
        }
    }
    match schema.fields.iter().enumerate().find(|(i, f)| f.required && seen & (1 << i) == 0) {
        Some((_, field)) => Err(Defect::Missing(at, field.name)),
        None => Ok(()),
    }
}

fn take<'a>(rest: &mut &'a [u8], length: u64, at: &'static str) -> Result<&'a [u8], Defect> {
    let (value, after) =
        usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n)).ok_or(Defect::Short(at))?;
    *rest = after;
    Ok(value)
}

fn varint(rest: &mut &[u8], at: &'static str) -> Result<u64, Defect> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let (&byte, after) = rest.split_first().ok_or(Defect::Short(at))?;
        *rest = after;
        if shift == 63 && byte > 1 {
            return Err(Defect::Malformed(at));
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Defect::Malformed(at))
}
