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
use crate::checkpoint::report::DumpReport;
use crate::checkpoint::{Error, Freezer, Result, predump};

/// So many pages are saved quickly enough while everything stands still.
const FEW: u64 = 256;

/// Dumps the container after at most `rounds` pre-dumps.
pub fn dump(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    rounds: u32,
) -> Result<DumpReport> {
    clear(&options.image_path)?;
    let (mut tracking, mut written, mut made) = (None, u64::MAX, 0);
    let mut flushing = Vec::new();
    for round in 1..=rounds {
        let next = options_of(options, round);
        let (report, noted) = predump::pre_dump(&next, source, freezer, tracking)?;
        let before = std::mem::replace(&mut written, report.pages_written);
        let notes = noted.is_noting();
        (tracking, made) = (Some(noted), round);
        if !options.no_sync {
            flushing.push(thread::spawn(move || ImageDir::open(&next.image_path)?.sync()));
        }
        // Few are left; or it does not get less, because the program writes as fast as this does; or all is for nothing.
        let enough = written <= FEW || written > before / 10 * 9 || !notes;
        if enough && flushing.iter().rev().skip(1).all(thread::JoinHandle::is_finished) {
            break;
        }
        if enough {
            // Rather now than while everything stands still.
            finish(&mut flushing)?;
        }
    }
    let options = Options { parent_path: Some(PathBuf::from(name(made))), ..options.clone() };
    let mut complete = || finish(&mut flushing);
    dump::dump_after(&options, source, freezer, Before { tracking, complete: Some(&mut complete) })
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
