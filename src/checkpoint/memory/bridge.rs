//! A bridge from the vdso of the kernel that a process was checkpointed under to this kernel's.
//!
//! Programs call the functions of the vdso by address, and may have looked the addresses up long ago. So the old code
//! stays where it was, and the entries of its functions lead to the vdso of this kernel, mapped elsewhere:
//!
//! ```text
//!   image      │ vvar (old) │ vdso (old)     │
//!   restored   │    free    │ anonymous, r-x │ ...  │ vvar (this kernel) │ vdso (this kernel) │
//!                             clock_gettime: jmp ──────────────────────────> clock_gettime
//!                             getrandom:     its system call
//! ```
//!
//! A function that this kernel lacks becomes its system call; so does getrandom, because its callers keep state in
//! the layout of the kernel that they asked for it. What stays of the old code is what a debugger unwinds by.
//!
//! A thread that was stopped inside the old code can't go on there: the data it reads is gone. At a checkpoint threads
//! are let out of the vdso (see `remote::vdso`), so that only images of others have any.

use object::{Object, ObjectSymbol};

use crate::checkpoint::arch::bridge;
use crate::checkpoint::error::{Error, Result};

/// The old code with its entries changed, for this kernel's vdso with its code at `at`.
pub fn build(old: &[u8], new: &[u8], at: u64) -> Result<Vec<u8>> {
    let (old_functions, new_functions) = (functions(old)?, functions(new)?);
    if old_functions.is_empty() {
        return Err(refused("it has no functions"));
    }
    let mut code = old.to_vec();
    for (name, offset, size) in &old_functions {
        let readable = String::from_utf8_lossy(name);
        let here = new_functions.iter().find(|(other, ..)| other == name && !bridge::has_state(name));
        let entry = match here {
            Some((_, offset, _)) => bridge::jump(at + offset),
            None if bridge::stands_alone(name) => continue,
            None => bridge::by_call(name)
                .ok_or_else(|| refused(&format!("this kernel has nothing for its function {readable}")))?,
        };
        if entry.len() as u64 > *size {
            return Err(refused(&format!("its function {readable} has {size} bytes only")));
        }
        let range = usize::try_from(*offset).ok().map(|start| start..start + entry.len());
        let place = range.and_then(|range| code.get_mut(range));
        place
            .ok_or_else(|| refused(&format!("its function {readable} is outside of it")))?
            .copy_from_slice(&entry);
    }
    Ok(code)
}

/// Names, offsets and sizes of the functions that a vdso offers.
fn functions(elf: &[u8]) -> Result<Vec<(Vec<u8>, u64, u64)>> {
    let file = object::read::elf::ElfFile64::<object::Endianness>::parse(elf)
        .map_err(|e| refused(&format!("it cannot be read: {e}")))?;
    let offered = file.dynamic_symbols().filter(|symbol| symbol.is_definition() && symbol.size() != 0);
    let functions = offered.filter(|symbol| symbol.kind() == object::SymbolKind::Text);
    let named = functions.map(|symbol| {
        let name = symbol.name_bytes().map_err(|e| refused(&format!("it cannot be read: {e}")))?;
        Ok((name.to_vec(), symbol.address(), symbol.size()))
    });
    named.collect()
}

fn refused(why: &str) -> Error {
    Error::new(format!("the process uses the vdso of another kernel: {why}"))
        .remedy("restore it under the kernel it was checkpointed under")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::memory::vdso::Vdso;

    #[test]
    fn every_function_leads_to_its_namesake_or_its_call() {
        let own = Vdso::own().unwrap();
        let old = own.code();
        let built = build(old, old, 0x1234_0000).unwrap();
        assert_eq!(built.len(), old.len());
        let all = functions(old).unwrap();
        assert!(all.iter().any(|(name, ..)| name == b"__vdso_clock_gettime"));
        for (name, offset, _) in &all {
            let start = usize::try_from(*offset).unwrap();
            let expected = match () {
                () if bridge::has_state(name) => bridge::by_call(name).unwrap(),
                () => bridge::jump(0x1234_0000 + offset),
            };
            let name = String::from_utf8_lossy(name);
            assert_eq!(built[start..start + expected.len()], expected, "{name}");
        }
        let changed = built.iter().zip(old).filter(|(a, b)| a != b).count();
        assert!(changed <= all.len() * 22, "{changed} bytes were changed");
    }

    #[test]
    fn a_function_that_is_missing_here_becomes_its_call() {
        let own = Vdso::own().unwrap();
        let old = own.code();
        // A kernel with functions of other names.
        let mut stranger = old.to_vec();
        let at = |name: &[u8]| (0..old.len()).filter(|at| old[*at..].starts_with(name)).collect::<Vec<_>>();
        for at in [at(b"time\0"), at(b"__vdso_time\0")].concat() {
            stranger[at + 1] = b'!';
        }
        let built = build(old, &stranger, 0x1234_0000).unwrap();
        let all = functions(old).unwrap();
        let (_, offset, _) = all.iter().find(|(name, ..)| name == b"__vdso_time").unwrap();
        let call = bridge::by_call(b"__vdso_time").unwrap();
        let start = usize::try_from(*offset).unwrap();
        assert_eq!(built[start..start + call.len()], call);
        let error = build(&stranger, old, 0x1234_0000).unwrap_err().to_string();
        assert!(error.contains("has nothing for its function") && error.contains('!'), "{error}");
    }

    #[test]
    fn no_vdso_at_all() {
        let own = Vdso::own().unwrap();
        assert!(build(&[0; 4096], own.code(), 0).is_err());
        assert!(build(&own.code()[..4096.min(own.code().len() / 2)], own.code(), 0).is_err());
    }
}
