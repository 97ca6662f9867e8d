//! Images as another processor would have them: it keeps the registers of signal frames elsewhere.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use prost::Message;
use stasis::checkpoint::image::StasisExtension;

use crate::vdso::pages;

/// The extension that says where registers are: number, offset and length of each component.
const EXTENSION: &str = "xsave";
/// Words before the record: two magics and its length.
const HEAD: usize = 12;
const MAGIC1: [u8; 4] = 0x4650_5853_u32.to_le_bytes();
const MAGIC2: [u8; 4] = 0x4650_5845_u32.to_le_bytes();
/// No processor has it.
pub const STRANGE: u64 = 40;

/// Lays the components of all frames out the other way round. `strange`: and one more is used that no processor has.
pub fn of_another(images: &Path, strange: bool) -> Result<(), String> {
    let path = images.join("stasis.img");
    let bytes = fs::read(&path).map_err(|e| e.to_string())?;
    let mut record = StasisExtension::decode(bytes.get(HEAD..).ok_or("stasis.img is short")?)
        .map_err(|e| e.to_string())?;
    let extension = record
        .extensions
        .iter_mut()
        .find(|x| x.name == EXTENSION)
        .ok_or("the images do not tell of frames")?;
    let here: Vec<(u64, usize, usize)> =
        serde_json::from_slice(&extension.data).map_err(|e| e.to_string())?;
    let mut at = 576;
    let mut there = Vec::new();
    for (number, _, length) in here.iter().rev() {
        there.push((*number, at, *length));
        at += length.next_multiple_of(64);
    }
    there.reverse();
    let moved: Vec<_> = here.iter().map(|part| part.1).zip(&there).collect();
    if rearranged(images, &moved, strange)? == 0 {
        return Err("the images have no frame of a signal".to_owned());
    }
    extension.data = serde_json::to_vec(&there).map_err(|e| e.to_string())?;
    let payload = record.encode_to_vec();
    let length = u32::try_from(payload.len()).map_err(|e| e.to_string())?;
    let whole = [&bytes[..HEAD - 4], &length.to_le_bytes(), &payload].concat();
    fs::write(&path, whole).map_err(|e| e.to_string())
}

type Moved<'a> = (usize, &'a (u64, usize, usize));

fn rearranged(images: &Path, moved: &[Moved<'_>], strange: bool) -> Result<usize, String> {
    let mut found = 0;
    for (bytes, file) in pages(images)? {
        for start in (0..bytes.len().saturating_sub(576)).step_by(64) {
            let before = &bytes[start..];
            if before[464..468] != MAGIC1 {
                continue;
            }
            let size = u32::from_le_bytes(before[480..484].try_into().map_err(|_| "short")?) as usize;
            if before.get(size..size + 4) != Some(&MAGIC2[..]) {
                continue;
            }
            let mut after = before[..size].to_vec();
            after[576..].fill(0);
            for (from, (_, to, length)) in moved {
                let part = before.get(*from..from + length).filter(|_| from + length <= size);
                let place = if to + length <= size { after.get_mut(*to..to + length) } else { None };
                // What AMX adds is in no frame of these programs.
                let (Some(part), Some(place)) = (part, place) else { continue };
                place.copy_from_slice(part);
            }
            if strange {
                after[512 + (STRANGE / 8) as usize] |= 1 << (STRANGE % 8);
            }
            file.write_all_at(&after, start as u64).map_err(|e| e.to_string())?;
            found += 1;
        }
    }
    Ok(found)
}
