//! The seal: stasis.img says how long every other image is, so that one that was cut is told from a whole one even
//! where the cut falls between two records.
//!
//! It guards against accidents of copying, not against people: whoever may write to the directory can write a seal.

use crate::checkpoint::error::{Error, Result};
use crate::checkpoint::image::{INVENTORY, ImageDigest, ImageDir, Kind, StasisExtension};

/// Where the seal is kept.
pub(super) const SEAL: &str = "stasis.img";

/// The lengths of all images that are there. The two that complete a set are one record each: they tell by themselves.
pub(super) fn lengths(dir: &ImageDir) -> Result<Vec<ImageDigest>> {
    let mut names = dir.names()?;
    names.retain(|name| name.ends_with(".img") && name != SEAL && name != INVENTORY);
    names.sort_unstable();
    let digest = |name: String| {
        let size = length(dir, &name)?;
        Ok(ImageDigest { name, size, sha256: Vec::new() })
    };
    names.into_iter().map(digest).collect()
}

/// Whether all images are as long as they were when the set was sealed.
pub(super) fn check(dir: &ImageDir, sealed: &[ImageDigest]) -> Result<()> {
    for ImageDigest { name, size, .. } in sealed {
        if name.contains('/') {
            return Err(Error::new(format!("no image is called {name:?}")).path(dir.path().join(SEAL)));
        }
        let there = length(dir, name)?;
        if there != *size {
            let what = if there < *size { "is truncated" } else { "has grown" };
            let text = format!("the image {what}: {there} bytes, {size} when the set was made");
            return Err(Error::new(text)
                .path(dir.path().join(name))
                .remedy("copy the checkpoint again; `stasis image seal` accepts images that were edited"));
        }
    }
    Ok(())
}

/// Seals a set anew, after its images were edited.
pub fn reseal(dir: &ImageDir) -> Result<()> {
    let old = dir.read_one::<StasisExtension>(Kind::Stasis, SEAL)?;
    let new = StasisExtension { digests: lengths(dir)?, ..old };
    dir.rewrite(Kind::Stasis, SEAL, std::slice::from_ref(&new))
}

fn length(dir: &ImageDir, name: &str) -> Result<u64> {
    dir.length(name)
}
