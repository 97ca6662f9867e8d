//! Pre-copy in one command: pre-dumps in rounds, until little is written between one and the next, then the dump.
//!
//! ```text
//!   DIR/precopy-1/             all pages
//!   DIR/precopy-2/parent       -> ../precopy-1      what was written during the first round
//!   DIR/parent                 -> precopy-2         what was written during the last round, saved while all stand still
//! ```
//!
//! It is the layout of pre-dumps by hand, which CRIU restores too.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;

use crate::checkpoint::context::{Options, Source};
use crate::checkpoint::dump::{self, Before};
use crate::checkpoint::error::Context;
use crate::checkpoint::image::ImageDir;
use crate::checkpoint::memory::track::Tracking;
use crate::checkpoint::report::DumpReport;
use crate::checkpoint::{Error, Freezer, Result, predump};

/// So many pages are saved quickly enough while everything stands still.
const FEW: u64 = 256;

/// Dumps the container after at most `most` pre-dumps.
pub fn dump(options: &Options, source: &Source, freezer: &mut dyn Freezer, most: u32) -> Result<DumpReport> {
    let mut flushing = Vec::new();
    let made = rounds(options, source, freezer, most, &mut |round, enough| {
        let path = round.image_path.clone();
        if !options.no_sync {
            flushing.push(thread::spawn(move || ImageDir::open(path)?.sync()));
        }
        if enough && !flushing.iter().rev().skip(1).all(thread::JoinHandle::is_finished) {
            // Rather now than while everything stands still.
            finish(&mut flushing)?;
            return Ok(false);
        }
        Ok(enough)
    })?;
    let mut complete = || finish(&mut flushing);
    let before = Before { tracking: made.tracking, complete: Some(&mut complete), heir: None };
    dump::dump_after(&made.options, source, freezer, before)
}

/// Pre-dumps that were made, and what is to follow.
#[derive(Debug)]
pub struct Rounds {
    /// What has noted the writes since the last of them.
    pub tracking: Option<Tracking>,
    /// Of the dump that builds on them.
    pub options: Options,
    /// How many.
    pub made: u32,
    /// Pages that they have.
    pub pages: u64,
}

/// Makes at most `most` pre-dumps. `each` gets the options of each when it is made, and whether another one would save
/// little; it says whether to end.
pub fn rounds(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    most: u32,
    each: &mut dyn FnMut(&Options, bool) -> Result<bool>,
) -> Result<Rounds> {
    clear(&options.image_path)?;
    let (mut tracking, mut written, mut made, mut pages) = (None, u64::MAX, 0, 0);
    for round in 1..=most {
        let next = options_of(options, round);
        let (report, noted) = predump::pre_dump(&next, source, freezer, tracking)?;
        let before = std::mem::replace(&mut written, report.pages_written);
        let notes = noted.is_noting();
        (tracking, made, pages) = (Some(noted), round, pages + written);
        // Few are left; or it does not get less, because the program writes as fast as this does; or all is for nothing.
        let enough = written <= FEW || written > before / 10 * 9 || !notes;
        if each(&next, enough)? {
            break;
        }
    }
    let parent_path = (made > 0).then(|| PathBuf::from(name(made)));
    Ok(Rounds { tracking, options: Options { parent_path, ..options.clone() }, made, pages })
}

/// Waits until the rounds are on the disk.
fn finish(flushing: &mut Vec<thread::JoinHandle<Result<()>>>) -> Result<()> {
    flushing.drain(..).try_for_each(|one| {
        one.join().unwrap_or_else(|_| Err(Error::new("the thread that flushed the images has failed")))
    })
}

fn options_of(options: &Options, round: u32) -> Options {
    let parent = round.checked_sub(1).filter(|before| *before > 0);
    Options {
        image_path: options.image_path.join(name(round)),
        parent_path: parent.map(|before| Path::new("..").join(name(before))),
        leave_running: true,
        // Flushed beside the next round.
        no_sync: true,
        ..options.clone()
    }
}

fn name(round: u32) -> String {
    format!("precopy-{round}")
}

/// Removes the rounds of an earlier dump into the same directory.
fn clear(dir: &Path) -> Result<()> {
    for round in 1.. {
        let path = dir.join(name(round));
        match fs::remove_dir_all(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => break,
            removed => {
                removed.during("cannot remove the older images", || format!("unlink({})", path.display()))?;
            }
        }
    }
    Ok(())
}
