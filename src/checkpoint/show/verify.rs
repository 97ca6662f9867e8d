//! Is a set of images whole? Everything is read to its end.

use std::fmt;

use serde::Serialize;

use super::clean;
use crate::checkpoint::Error;
use crate::checkpoint::image::{ImageDir, ghost};
use crate::checkpoint::memory::pagemap;
use crate::checkpoint::model::Model;
use crate::checkpoint::namespaces::tmpfs;

/// What was found.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// A restore would find all that it needs.
    pub whole: bool,
    /// Images that were read.
    pub images: usize,
    /// What is wrong.
    pub problems: Vec<String>,
}

/// Reads everything.
pub fn verify(images: &ImageDir) -> Verdict {
    let mut problems = Vec::new();
    let mut note = |result: Result<(), Error>| problems.extend(result.err().map(|e| clean(&e.to_string())));
    let names = images.names().unwrap_or_else(|e| {
        note(Err(e));
        Vec::new()
    });
    match Model::read(images) {
        Err(e) => note(Err(e)),
        Ok(model) => {
            note(model.validate());
            for id in model.ghosts.keys() {
                note(ghost::verify(images, *id));
            }
            for pid in model.mm.keys() {
                let name = pagemap::of_task(*pid);
                if !images.exists(&name) {
                    note(
                        Err(Error::new("the memory of a process is missing").path(images.path().join(name))),
                    );
                }
            }
        }
    }
    for name in &names {
        if name.starts_with("pagemap-") && name.ends_with(".img") {
            note(pagemap::open(images, name).map(drop));
        }
        if name.starts_with("tmpfs-") {
            note(images.raw_open(name).and_then(tmpfs::verify).map_err(|e| e.path(images.path().join(name))));
        }
    }
    problems.dedup();
    let images = names.iter().filter(|name| name.ends_with(".img")).count();
    Verdict { whole: problems.is_empty(), images, problems }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problems.iter().try_for_each(|problem| writeln!(f, "{problem}"))?;
        match self.whole {
            true => writeln!(f, "{} images, all of them whole", self.images),
            false => writeln!(f, "the images are damaged"),
        }
    }
}
