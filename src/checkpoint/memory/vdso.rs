//! The vdso: code of the kernel that every process has mapped, with the kernel's data before it.
//!
//! Its functions are called by address, so a restored process must find the same functions at the same places. The
//! same kernel maps its vdso wherever it is asked to (`arch_prctl(ARCH_MAP_VDSO_64)`), and that is all there is to do.
//! The vdso of another kernel has its functions elsewhere: see [`super::bridge`].

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::memory::maps;
use crate::checkpoint::memory::plan::Plan;

/// The vdso of this kernel.
#[derive(Debug)]
pub struct Vdso {
    /// Bytes of data before the code.
    data: u64,
    /// The code.
    code: Vec<u8>,
}

impl Vdso {
    /// As this process has it. Nothing has ever been written there, unlike in a task that was driven from outside.
    pub fn own() -> Result<Self> {
        let pid = std::process::id().cast_signed();
        let maps = maps::read(pid)?;
        let code = maps.iter().find(|m| m.name() == b"[vdso]");
        let code = code.ok_or_else(|| Error::new("this kernel has no vdso"))?;
        let data = maps.iter().filter(|m| m.name().starts_with(b"[vvar")).map(|m| code.start - m.start).max();
        let mut bytes = vec![0; usize::try_from(code.len()).unwrap_or(0)];
        let mem =
            File::open("/proc/self/mem").during("cannot read the vdso", || "open(/proc/self/mem)".into())?;
        mem.read_exact_at(&mut bytes, code.start)
            .during("cannot read the vdso", || format!("pread(mem, {}, {:#x})", code.len(), code.start))?;
        Ok(Self { data: data.unwrap_or(0), code: bytes })
    }

    /// The code.
    pub fn code(&self) -> &[u8] {
        &self.code
    }

    /// Bytes of data and code.
    pub fn size(&self) -> u64 {
        self.data + self.code.len() as u64
    }

    /// Bytes of data before the code.
    pub fn data(&self) -> u64 {
        self.data
    }

    /// Whether a process has this one, not that of 32-bit programs: the first bytes tell.
    pub fn is_that_of(&self, pid: i32, at: u64) -> bool {
        const CLASS: usize = 5;
        let mut start = [0; CLASS];
        let read = File::open(format!("/proc/{pid}/mem")).and_then(|mem| mem.read_exact_at(&mut start, at));
        read.is_err() || self.code.starts_with(&start)
    }

    /// How a process that had `code` where the plan says will find its functions there again.
    pub fn fit(&self, plan: &Plan, code: Option<&[u8]>) -> Result<Fit> {
        let Some(vdso) = &plan.vdso else {
            return match plan.vvar {
                Some(_) => Err(Error::new("the image has the data of the vdso without its code")),
                None => Ok(Fit::Same),
            };
        };
        let data = plan.vvar.as_ref().map_or(0..0, Range::clone);
        let same_place = data.is_empty() || data.end == vdso.start;
        let same_size = vdso.end - vdso.start == self.code.len() as u64 && data.end - data.start == self.data;
        match code {
            _ if !same_place => {
                Err(Error::new("the image has the vdso's data elsewhere than before its code"))
            }
            None if same_size => Ok(Fit::Same),
            Some(code) if same_size && (code == self.code || build_id(code) == build_id(&self.code)) => {
                Ok(Fit::Same)
            }
            Some(_) => Ok(Fit::Bridge),
            None => {
                Err(Error::new("the process uses the vdso of another kernel, and the image lacks its code")
                    .remedy("restore it under the kernel it was checkpointed under"))
            }
        }
    }
}

/// How the functions of an image's vdso are found again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// This kernel has the same.
    Same,
    /// Over a bridge.
    Bridge,
}

/// Refuses a 32-bit program that has not got the vdso which it had, in its place. It is looked at afterwards, for this
/// process has none to compare with; and no bridge leads there.
pub fn compare(pid: i32, place: &Range<u64>, old: Option<&[u8]>) -> Result<()> {
    let maps = maps::read(pid)?;
    let in_place = maps.iter().any(|m| m.name() == b"[vdso]" && (m.start..m.end) == *place);
    let same = in_place && old.is_none_or(|old| is_same(pid, place, old));
    if same {
        return Ok(());
    }
    Err(Error::new("the process is a 32-bit program and uses the vdso of another kernel")
        .remedy("restore it under the kernel it was checkpointed under"))
}

fn is_same(pid: i32, place: &Range<u64>, old: &[u8]) -> bool {
    let mut new = vec![0; old.len()];
    let read =
        File::open(format!("/proc/{pid}/mem")).and_then(|mem| mem.read_exact_at(&mut new, place.start));
    read.is_ok() && build_id(&new).is_some_and(|id| build_id(old) == Some(id))
}

/// The build id of an ELF image: the description of its note "GNU", type 3. The code alone is no measure, for the
/// kernel adapts a few instructions to the processor.
fn build_id(elf: &[u8]) -> Option<&[u8]> {
    const TYPE_BUILD_ID: u32 = 3;
    let header =
        [&4u32.to_ne_bytes()[..], &20u32.to_ne_bytes(), &TYPE_BUILD_ID.to_ne_bytes(), b"GNU\0"].concat();
    let at = elf.windows(header.len()).position(|window| window == header)?;
    elf.get(at + header.len()..at + header.len() + 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(vdso: &Vdso) -> Plan {
        let code = 0x40_0000 + vdso.data;
        Plan {
            vvar: Some(0x40_0000..code),
            vdso: Some(code..code + vdso.code.len() as u64),
            ..Plan::default()
        }
    }

    #[test]
    fn the_own_vdso_fits_and_another_does_not() {
        let own = Vdso::own().unwrap();
        assert!(own.code.starts_with(b"\x7fELF"));
        assert_eq!(build_id(&own.code).unwrap().len(), 20);
        assert_eq!(own.fit(&plan(&own), Some(&own.code)).unwrap(), Fit::Same);
        assert_eq!(own.fit(&Plan::default(), None).unwrap(), Fit::Same);
        // Other instructions, same build.
        let mut patched = own.code.clone();
        *patched.last_mut().unwrap() ^= 1;
        assert_eq!(own.fit(&plan(&own), Some(&patched)).unwrap(), Fit::Same);

        let other = vec![0; own.code.len()];
        assert_eq!(own.fit(&plan(&own), Some(&other)).unwrap(), Fit::Bridge);
        let longer = Vdso { data: own.data + 4096, code: own.code.clone() };
        assert_eq!(own.fit(&plan(&longer), Some(&own.code)).unwrap(), Fit::Bridge);
        assert!(own.fit(&plan(&longer), None).unwrap_err().to_string().contains("lacks its code"));
        let apart = Plan { vvar: Some(0..own.data), ..plan(&own) };
        assert!(own.fit(&apart, Some(&own.code)).unwrap_err().to_string().contains("before"));
        let half = Plan { vdso: None, ..plan(&own) };
        assert!(own.fit(&half, None).is_err());
    }
}
