//! The instructions that programs may use.
//!
//! A program looks at its start what the processor can do, chooses its functions, and never looks again: on a processor
//! that lacks one of those instructions it is killed by SIGILL, some time after the restore. The registers do not tell
//! (transactional memory and random numbers have none), so the images say what the processor had, and a restore on one
//! that has less is refused by name, unless `--cpu-cap none` promises that nobody uses it. So are registers that it
//! lacks, where a thread uses them or a handler of a signal returns to them (`task/frames.rs`): that flag leaves them out.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::sync::OnceLock;

use crate::checkpoint::arch;
use crate::checkpoint::context::Options;
use crate::checkpoint::error::{Context, Error, Result};
use crate::checkpoint::image::ImageDir;
use crate::checkpoint::model::Model;
use crate::checkpoint::task::{frames, process};

/// The name of this room's extension in stasis.img.
const EXTENSION: &str = "processor";
/// More than so many are not named.
const SHOWN: usize = 32;

/// Notes what this processor has.
pub fn dump(model: &mut Model) -> Result<()> {
    frames::dump(model)?;
    model.set_extension(EXTENSION, &here()?)
}

/// Whether this processor has all that the images' had. Images that do not say are taken.
pub fn admit(model: &mut Model, images: &ImageDir, options: &Options) -> Result<()> {
    accept(&model.extension::<Vec<String>>(EXTENSION)?, options)?;
    if options.any_processor {
        mask(model)?;
    }
    registers(model)?;
    frames::mends(model, images, options).map(drop)
}

/// Takes registers out that this processor lacks.
fn mask(model: &mut Model) -> Result<()> {
    let mut extra = process::extra(model)?;
    let mut none = Vec::new();
    for (tid, core) in &mut model.cores {
        let own = extra.threads.iter_mut().find(|thread| thread.tid == *tid);
        if let Some(info) = &mut core.thread_info {
            arch::record::mask(info, own.map_or(&mut none, |own| &mut own.xstate));
        }
    }
    process::set_extra(model, &extra);
    Ok(())
}

/// Whether this processor has the registers of all threads.
fn registers(model: &Model) -> Result<()> {
    let extra = process::extra(model)?;
    for (tid, core) in &model.cores {
        let own = extra.threads.iter().find(|thread| thread.tid == *tid);
        if let Some(info) = &core.thread_info {
            arch::record::admit(info, own.map_or(&[], |own| &own.xstate))
                .map_err(|e| e.pid(tid.cast_signed()))?;
        }
    }
    Ok(())
}

/// Whether this processor has all instructions of another one.
pub fn accept(had: &[String], options: &Options) -> Result<()> {
    if options.any_processor || had.is_empty() {
        return Ok(());
    }
    let here = here()?;
    let missing = had.iter().filter(|one| !here.contains(one));
    // Images and the other side of a migration may say anything.
    let missing: Vec<String> = missing.take(SHOWN).map(|one| one.escape_default().to_string()).collect();
    match missing.as_slice() {
        [] => Ok(()),
        missing => Err(Error::new(format!(
            "programs of the checkpoint may use instructions that this processor lacks: {}",
            missing.join(" ")
        ))
        .remedy(
            "restore on a processor that has them, or promise with --cpu-cap none that nobody uses them",
        )),
    }
}

/// What this processor has.
pub fn here() -> Result<Vec<String>> {
    static HERE: OnceLock<Vec<String>> = OnceLock::new();
    if let Some(known) = HERE.get() {
        return Ok(known.clone());
    }
    let path = "/proc/cpuinfo";
    let what = "cannot tell what the processor can do";
    let file = File::open(path).during(what, || format!("open({path:?})"))?;
    // All are alike, and the kernel takes its time to tell of each.
    let mut first = String::new();
    for line in BufReader::new(file).lines() {
        let line = line.during(what, || format!("read({path:?})"))?;
        if line.is_empty() {
            break;
        }
        first.push_str(&line);
        first.push('\n');
    }
    Ok(HERE.get_or_init(|| arch::instructions(&first)).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_processor_is_refused_by_name() {
        let mut model = Model::default();
        let dir = tempfile::tempdir().unwrap();
        let images = ImageDir::create(dir.path()).unwrap();
        let admit = |model: &mut Model, options: &Options| admit(model, &images, options);
        admit(&mut model, &Options::default()).unwrap();
        dump(&mut model).unwrap();
        admit(&mut model, &Options::default()).unwrap();
        let mut more = here().unwrap();
        more.extend(["avx4096", "\x1b[2J"].map(str::to_owned));
        model.set_extension(EXTENSION, &more).unwrap();
        let error = admit(&mut model, &Options::default()).unwrap_err().to_string();
        assert!(error.contains(r"lacks: avx4096 \u{1b}[2J;") && error.contains("--cpu-cap"), "{error}");
        admit(&mut model, &Options { any_processor: true, ..Options::default() }).unwrap();
    }
}
