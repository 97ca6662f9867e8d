//! The set of images that a dump builds on: `--parent-path`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use nix::errno::Errno;

use crate::checkpoint::context::Options;
use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{INVENTORY, ImageDir, InventoryEntry, Kind};
use crate::checkpoint::memory::capture::Earlier;
use crate::checkpoint::memory::pagemap;
use crate::checkpoint::memory::pages::Marks;
use crate::checkpoint::memory::track::Tracking;

/// An earlier set, and what has been written since.
#[derive(Debug, Default)]
pub struct Parent {
    /// None: the marks do not belong to this set, and everything is written.
    tracking: Option<Tracking>,
    known: Known,
}

/// The pages that a set has, or an earlier one, in ascending order by process.
pub type Known = BTreeMap<u32, Vec<Range<u64>>>;

impl Parent {
    /// Opens the set that `options` name, for marks that are `given` or that an earlier command has left.
    ///
    /// Where the two do not belong together the new set will have all pages: that is right, only large.
    pub fn open(
        options: &Options,
        state_dir: Option<&Path>,
        given: Option<Tracking>,
    ) -> Result<Option<Self>> {
        let Some(path) = &options.parent_path else { return Ok(None) };
        if path.is_absolute() {
            return Err(Error::new("--parent-path must be relative to the image directory").path(path));
        }
        let directory = options.image_path.join(path);
        std::fs::metadata(&directory).map_err(|e| {
            let errno = Errno::from_raw(e.raw_os_error().unwrap_or(0));
            Error::new("invalid --parent-path").path(&directory).call("stat", errno)
        })?;
        let images = ImageDir::open(directory)?;
        let inventory: InventoryEntry = images.read_one(Kind::Inventory, INVENTORY)?;
        let tracking = given.or_else(|| state_dir.and_then(Tracking::find)).filter(|tracking| {
            !tracking.run().is_empty() && inventory.dump_criu_run_id.as_deref() == Some(tracking.run())
        });
        let known = if tracking.is_some() { Self::pages_of(&images)? } else { Known::new() };
        Ok(Some(Self { tracking, known }))
    }

    /// The pages that a set of images has.
    pub fn pages_of(images: &ImageDir) -> Result<Known> {
        let mut known = Known::new();
        for name in images.names()? {
            let number = name.strip_prefix("pagemap-").and_then(|name| name.strip_suffix(".img"));
            if let Some(vpid) = number.and_then(|number| number.parse().ok()) {
                known.insert(vpid, pagemap::known(images, &name)?);
            }
        }
        Ok(known)
    }

    /// A set that this command has made itself.
    pub fn given(tracking: Option<Tracking>, known: Known) -> Self {
        Self { tracking, known }
    }

    /// What it has of a process whose writes were noted so.
    pub fn of(&mut self, vpid: u32, marks: Marks) -> Earlier {
        // Another process had the number then.
        let known = if marks == Marks::None { None } else { self.known.remove(&vpid) };
        Earlier { marks, known: known.unwrap_or_default() }
    }

    /// What it has of a stopped process, for a dump.
    pub fn of_task(&mut self, pid: i32, vpid: u32) -> Earlier {
        let marks = self.tracking.as_ref().map_or(Marks::None, |tracking| tracking.marks(pid));
        self.of(vpid, marks)
    }

    /// What has noted the writes, to go on with it.
    pub fn take_tracking(&mut self) -> Option<Tracking> {
        self.tracking.take()
    }

    /// Whether it is known what has been written since.
    pub fn is_known(&self) -> bool {
        self.tracking.is_some()
    }
}
