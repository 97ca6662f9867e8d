//! Images as another kernel would have them: their vdso has another build id.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Changes the build id of this kernel's vdso wherever it stands in the pages of the images.
pub fn of_another_kernel(images: &Path) -> Result<(), String> {
    let id = build_id()?;
    let mut found = 0;
    for (bytes, file) in pages(images)? {
        for at in (0..bytes.len()).filter(|at| bytes[*at..].starts_with(&id)) {
            file.write_all_at(&[!id[0]], at as u64).map_err(|e| e.to_string())?;
            found += 1;
        }
    }
    if found == 0 { Err("the images have no vdso of this kernel".to_owned()) } else { Ok(()) }
}

/// The files of pages in the images, and what is in them.
pub fn pages(images: &Path) -> Result<Vec<(Vec<u8>, File)>, String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(images).map_err(|e| e.to_string())?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            let bytes = fs::read(entry.path()).map_err(|e| e.to_string())?;
            all.push((bytes, OpenOptions::new().write(true).open(entry.path()).map_err(|e| e.to_string())?));
        }
    }
    Ok(all)
}

/// The build id of this process's vdso.
fn build_id() -> Result<Vec<u8>, String> {
    let maps = fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
    let range = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(|line| line.split(' ').next());
    let (start, end) = range.and_then(|range| range.split_once('-')).ok_or("no vdso here")?;
    let number = |text| u64::from_str_radix(text, 16).map_err(|e| e.to_string());
    let (start, end) = (number(start)?, number(end)?);
    let mut code = vec![0; usize::try_from(end - start).map_err(|e| e.to_string())?];
    let memory = File::open("/proc/self/mem").map_err(|e| e.to_string())?;
    memory.read_exact_at(&mut code, start).map_err(|e| e.to_string())?;
    // An ELF note: lengths of name and description, type 3, name.
    let header = [&4u32.to_ne_bytes()[..], &20u32.to_ne_bytes(), &3u32.to_ne_bytes(), b"GNU\0"].concat();
    let at = code.windows(header.len()).position(|bytes| bytes == header).ok_or("no build id")?;
    Ok(code[at + header.len()..at + header.len() + 20].to_vec())
}
