//! Memory: mappings and pages.
//!
//! ```text
//!   dump      /proc/PID/smaps, map_files ─maps, layout, vmas─> MmEntry { VmaEntry... }          mm-N.img
//!             /proc/PID/pagemap ─pages─> ranges ─pagemap, copy─> pagemap-N.img, pages-N.img
//!             shared memory ─shmem─> pagemap-shmem-N.img, pages-N.img
//!
//!   restore   MmEntry ─plan─> steps ─restore─> batches in the new task
//!             pages-N.img ─fill─> its memory, from outside
//! ```
//!
//! | file      | what it knows                                                     |
//! |-----------|-------------------------------------------------------------------|
//! | `maps`    | the text of `maps` and `smaps`                                    |
//! | `vmas`    | what a mapping is, in the words of the image; what is refused     |
//! | `layout`  | the mappings of a live task, with their files                     |
//! | `look`    | flags of mappings, read before the program stands still           |
//! | `mm`      | bounds of code, data, heap and stack; executable, auxiliary vector |
//! | `pages`   | which pages are a process's own                                   |
//! | `pagemap` | pagemap-N.img                                                     |
//! | `copy`    | moving pages in pieces, on two threads                            |
//! | `shmem`   | contents of shared memory                                         |
//! | `lock`    | locked memory                                                     |
//! | `marks`   | names, protection keys and seals of mappings                      |
//! | `aio`     | rings of Linux AIO                                                |
//! | `vdso`    | whether the vdso of the image is this kernel's                    |
//! | `bridge`  | the way from another kernel's vdso to this one's                  |
//! | `capture` | private pages between being found and being written              |
//! | `snapshot` | copies of processes that go on                                   |
//! | `track`   | which pages are written between one set of images and the next   |
//! | `parent`  | the set that a dump builds on                                     |
//! | `dedup`   | taking out of earlier sets what later ones have                   |
//! | `dump`    | from live tasks to model and images                               |
//! | `plan`    | from an image's mappings to ordered steps                         |
//! | `restore` | carrying the steps out in a new task                              |
//! | `inherit` | memory that a child has from its parent                          |
//! | `choose`  | mappings of which the kernel chooses the address                 |
//! | `sources` | the files that its mappings need                                 |
//! | `fill`    | filling its memory                                                |
//! | `lazy`    | filling it while the program already runs                         |

pub mod aio;
pub mod bridge;
pub mod capture;
pub mod choose;
pub mod compressed;
pub mod copy;
pub mod dedup;
pub mod dump;
pub mod fill;
pub mod inherit;
pub mod layout;
pub mod lazy;
pub mod lock;
pub mod look;
pub mod maps;
pub mod marks;
pub mod mm;
pub mod pagemap;
pub mod pages;
pub mod parent;
pub mod plan;
pub mod restore;
pub mod shmem;
pub mod snapshot;
mod sources;
pub mod track;
pub mod vdso;
pub mod vmas;

#[cfg(test)]
mod tests;

pub use self::capture::Capture;
pub use self::dump::capture;
pub use self::layout::refusals as check;
pub use self::restore::{Memories, free_window};
pub use self::shmem::Shared;
