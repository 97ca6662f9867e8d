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
use crate::checkpoint::live;
use crate::checkpoint::memory::copy::Disk;
use crate::checkpoint::memory::look::Looks;
use crate::checkpoint::memory::pages::PAGE;
use crate::checkpoint::memory::parent::Known;
use crate::checkpoint::memory::track::Tracking;
use crate::checkpoint::predump::{self, Round};
use crate::checkpoint::report::DumpReport;
use crate::checkpoint::{Error, Freezer, Result};

/// So many bytes of one round are kept in memory until the container goes on.
const HELD: u64 = 256 << 20;
/// So many pages are saved quickly enough while everything stands still.
pub const FEW: u64 = 256;

/// Dumps the container after at most `most` pre-dumps.
pub fn dump(options: &Options, source: &Source, freezer: &mut dyn Freezer, most: u32) -> Result<DumpReport> {
    let (mut flushing, mut held) = (Flushing::new(), Vec::new());
    let made = rounds(options, source, freezer, most, &mut |round| {
        let small = round.number > 1 && round.pages.bytes() <= HELD;
        if let Some(images) = ImageDir::in_memory(&round.options.image_path).filter(|_| small) {
            round.pages.write(&images, &round.options, Disk::Later)?;
            held.push(images);
        } else {
            let images = ImageDir::create(&round.options.image_path)?;
            round.pages.write(&images, &round.options, Disk::of(!options.no_sync))?;
            flush(options, &round.options.image_path, &mut flushing);
        }
        if round.enough && !flushing.iter().all(thread::JoinHandle::is_finished) {
            // Rather now than while everything stands still.
            finish(&mut flushing)?;
            return Ok(false);
        }
        Ok(round.enough)
    })?;
    let mut complete = || {
        for images in held.drain(..) {
            images.copy_out()?;
            flush(options, images.path(), &mut flushing);
        }
        finish(&mut flushing)
    };
    let Rounds { tracking, looks, known, options, .. } = made;
    let before = Before { tracking, looks, known, complete: Some(&mut complete), heir: None };
    dump::dump_after(&options, source, freezer, before)
}

/// One pre-dump, found and not written yet.
#[derive(Debug)]
pub struct Made {
    /// The first is 1.
    pub number: u32,
    /// Its pages.
    pub pages: Round,
    /// Where it goes, and on what it builds.
    pub options: Options,
    /// Another one would save little.
    pub enough: bool,
}

/// Pre-dumps that were made, and what is to follow.
#[derive(Debug)]
pub struct Rounds {
    /// What has noted the writes since the last of them.
    pub tracking: Option<Tracking>,
    /// What was seen of the mappings between two of them.
    pub looks: Option<Looks>,
    /// The pages that the last of them has, or an earlier one.
    pub known: Option<Known>,
    /// Of the dump that builds on them.
    pub options: Options,
    /// How many.
    pub made: u32,
}

/// Makes at most `most` pre-dumps. `each` gets every one, to write it, and says whether to end.
pub fn rounds(
    options: &Options,
    source: &Source,
    freezer: &mut dyn Freezer,
    most: u32,
    each: &mut dyn FnMut(Made) -> Result<bool>,
) -> Result<Rounds> {
    clear(&options.image_path)?;
    let mut made = Rounds { tracking: None, looks: None, known: None, options: options.clone(), made: 0 };
    let mut written = u64::MAX;
    for number in 1..=most {
        let next = options_of(options, number);
        let before = std::mem::replace(&mut written, 0);
        let live = match (&mut made.tracking, &mut made.known) {
            (Some(tracking), Some(known)) => live::round(source.init, freezer, tracking, known)?,
            _ => None,
        };
        let pages = match live {
            Some(pages) => pages,
            None => {
                let given = made.tracking.take().zip(made.known.take());
                let (pages, noted) = predump::round(&next, source, freezer, given)?;
                made.tracking = Some(noted);
                pages
            }
        };
        (made.made, made.known) = (number, Some(pages.known()));
        written = pages.bytes() / PAGE;
        if made.looks.is_none() {
            // The rounds that follow make up for the time that this takes.
            made.looks = Some(Looks::at(freezer.pids()?));
        }
        let notes = made.tracking.as_ref().is_some_and(Tracking::is_noting);
        // Few are left; or it does not get less, because the program writes as fast as this does; or all is for nothing.
        let enough = written <= FEW || written > before / 10 * 9 || !notes;
        if each(Made { number, pages, options: next, enough })? {
            break;
        }
    }
    made.options.parent_path = (made.made > 0).then(|| PathBuf::from(name(made.made)));
    Ok(made)
}

/// A thread that waits for a set to be on the disk.
type Flushing = Vec<thread::JoinHandle<Result<()>>>;

fn flush(options: &Options, set: &Path, flushing: &mut Flushing) {
    let path = set.to_owned();
    if !options.no_sync {
        flushing.push(thread::spawn(move || ImageDir::open(path)?.sync()));
    }
}

/// Waits until the rounds are on the disk.
fn finish(flushing: &mut Flushing) -> Result<()> {
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
