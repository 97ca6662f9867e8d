//! Images as people would rather look at them: `stasis image`.
//!
//! ```text
//!   images --read--> model --┬-- summary   what it is, how big, what it needs
//!                            ├-- tree      processes, threads, who they are
//!                            ├-- memory    mappings, and how much of each is in the images
//!                            ├-- files     descriptors of every process
//!                            └-- verify    everything read to its end
//! ```
//!
//! Every view is data that serialises, and prints itself. Images are hostile input: what a terminal would obey is
//! printed as an escape.

mod files;
mod memory;
mod summary;
mod tree;
mod verify;

pub use files::{Table, files};
pub use memory::{Space, memory};
pub use summary::{Summary, summary};
pub use tree::{Process, tree};
pub use verify::{Verdict, verify};

use std::path::Path;

use crate::checkpoint::Result;
use crate::checkpoint::image::{CoreEntry, ImageDir};
use crate::checkpoint::model::Model;

/// Reads a set of images that makes sense.
pub fn open(path: &Path) -> Result<(ImageDir, Model)> {
    let images = ImageDir::open(path)?;
    let model = Model::read(&images)?;
    model.validate()?;
    Ok((images, model))
}

/// Text from an image, fit for a terminal.
fn clean(text: &str) -> String {
    let escape = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(escape).collect()
}

/// Bytes in the largest unit that leaves a number above one.
fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

/// The name of a process.
fn comm(model: &Model, pid: u32) -> String {
    let core: Option<&CoreEntry> = model.cores.get(&pid);
    core.and_then(|core| core.tc.as_ref())
        .map(|tc| clean(&String::from_utf8_lossy(&tc.comm)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::image::{FileEntry, PagemapEntry, RegFileEntry};
    use crate::checkpoint::memory::pagemap;
    use crate::checkpoint::model::tests::{small, written};
    use crate::checkpoint::task::process::DEAD;

    #[test]
    fn terminals_get_nothing_to_obey() {
        assert_eq!(clean("a\x1b[2Jb\n\u{9b}é"), "a\\u{1b}[2Jb\\n\\u{9b}é");
        assert_eq!((size(5), size(1536), size(3 << 20)), ("5 B".into(), "1.5 KiB".into(), "3.0 MiB".into()));
    }

    /// The main thread has 8 MiB of stack, those of tests 2.
    #[test]
    fn a_long_chain_of_processes_is_no_recursion() {
        let mut model = small();
        model.pstree = (1..100_000)
            .map(|pid| crate::checkpoint::image::PstreeEntry {
                pid,
                ppid: pid - 1,
                pgid: 1,
                sid: 1,
                threads: vec![pid],
            })
            .collect();
        let (_place, images) = written(&small());
        let all = tree(&images, &model);
        assert_eq!((all.len(), all[0].ppid, all[99_998].pid, all[99_998].ppid), (99_999, 0, 99_999, 99_998));
        assert!(serde_json::to_string(&all).unwrap().contains("\"pid\":99999"));
        assert!(all[99_998].to_string().len() < 200);
    }

    #[test]
    fn every_view_shows_a_whole_set_and_verify_sees_that_it_is() {
        let mut model = small();
        let child =
            crate::checkpoint::image::PstreeEntry { pid: 2, ppid: 1, pgid: 1, sid: 1, threads: vec![2] };
        for id in [2, 3] {
            let core = model.cores[&1].clone();
            model.cores.insert(id, core);
        }
        model.cores.get_mut(&2).unwrap().tc.as_mut().unwrap().comm = b"child\x1b[1m".to_vec();
        model.cores.get_mut(&2).unwrap().tc.as_mut().unwrap().task_state = DEAD;
        model.cores.get_mut(&3).unwrap().tc = None;
        model.pstree[0].threads = vec![1, 3];
        model.pstree.push(child);
        model.remaps.clear();
        model.ghosts.clear();
        let reg = RegFileEntry { id: 1, name: "/a\nb".into(), ..RegFileEntry::default() };
        model.files = vec![FileEntry { r#type: 1, id: 1, reg: Some(reg), ..FileEntry::default() }];
        let (place, images) = written(&model);
        // Written by whoever writes pages.
        let file = images.raw_create("pages-1.img").unwrap();
        file.set_len(4096).unwrap();
        let mut map = images.writer(crate::checkpoint::image::Kind::Pagemap, &pagemap::of_task(1)).unwrap();
        map.record(&crate::checkpoint::image::PagemapHead { pages_id: 1 }).unwrap();
        let run: PagemapEntry = pagemap::present(&(0x1000..0x2000), false);
        map.record(&run).unwrap();
        map.finish().unwrap();

        let text = tree(&images, &model).iter().map(ToString::to_string).collect::<String>();
        assert!(text.contains("\n  2 [child\\u{1b}[1m]") && text.contains("thread 3"), "{text}");
        let spaces = memory(&images, &model);
        assert_eq!((spaces[0].mapped_bytes, spaces[0].saved_bytes), (0x2000, 0x1000));
        assert_eq!(spaces[0].mappings[0].saved_bytes, 0x1000);
        let text = files(&model)[0].to_string();
        assert!(text.contains("0  file") && text.contains("/a\\nb"), "{text}");
        let text = summary(&images, &model).unwrap().to_string();
        assert!(text.contains("processes        2, threads"), "{text}");

        let whole = verify(&images);
        assert_eq!(whole.problems, Vec::<String>::new());
        file.set_len(4095).unwrap();
        let short = verify(&images);
        assert!(!short.whole && short.problems[0].contains("4095 bytes of pages"), "{short}");
        file.set_len(4096).unwrap();
        std::fs::write(place.path().join("core-3.img"), "x").unwrap();
        assert!(verify(&images).problems[0].contains("core-3.img"));
    }
}
