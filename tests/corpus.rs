//! A short run of every fuzz target: each file of its corpus, and a few thousand mutations of them, the same ones in
//! every run. `tests/fuzz` runs the same targets for as long as one likes.
//!
//! ```text
//!   file ── cut into words ── a few changes: drop, repeat, swap, another file's word, a word nobody expects, a bit ──> target
//! ```

#[path = "fuzz/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use targets::{TARGETS, Target};

/// What a parser is least likely to have thought of.
const WORDS: &[&str] = &[
    "-1",
    "0",
    "1",
    "255",
    "256",
    "65536",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775809",
    "1e400",
    "0.5",
    "null",
    "true",
    "{}",
    "[]",
    "[[]]",
    "\"\"",
    "\"/\"",
    "\"..\"",
    "\"\\u0000\"",
    "\"é\"",
    "..",
    "/",
    "//",
    "\0",
    "\n",
    ",",
    ":",
    "0-4294967295",
    "a",
    "link l VICTIM\nmake l/x/y\n",
];

/// A slow machine does fewer; what has been done decides nothing.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many times longer than short: `FUZZ=100 cargo test --test corpus`.
fn times() -> u32 {
    std::env::var("FUZZ").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Numbers that look random, and are the same every time: xorshift64*.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        if end == 0 { 0 } else { (mixed >> 33) as usize % end }
    }
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut files: Vec<PathBuf> =
        fs::read_dir(&dir).expect("a corpus").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).expect("a file"))).collect()
}

/// Runs of letters and digits, and every other byte alone.
fn words(bytes: &[u8]) -> Vec<&[u8]> {
    bytes.chunk_by(|a, b| a.is_ascii_alphanumeric() && b.is_ascii_alphanumeric()).collect()
}

fn mutation(dice: &mut Dice, files: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
    let file = &files[dice.below(files.len())].1;
    let other = words(&files[dice.below(files.len())].1);
    let mut words = words(file);
    for _ in 0..dice.below(4) {
        let at = dice.below(words.len());
        match dice.below(7) {
            _ if words.is_empty() => {}
            0 => drop(words.remove(at)),
            1 => words.insert(at, words[at]),
            2 => {
                let with = dice.below(words.len());
                words.swap(at, with);
            }
            3 if !other.is_empty() => words[at] = other[dice.below(other.len())],
            4 => words.truncate(at),
            _ => words[at] = WORDS[dice.below(WORDS.len())].as_bytes(),
        }
    }
    let mut bytes = words.concat();
    for _ in 0..dice.below(4) {
        let at = dice.below(bytes.len());
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 1 << dice.below(8);
        }
    }
    bytes
}

fn survives(target: &Target, bytes: &[u8], from: &str) -> bool {
    catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)))
        .unwrap_or_else(|_| panic!("{} panics at {from}:\n{}", target.name, bytes.escape_ascii()))
}

fn short_run(name: &str) {
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target");
    let files = corpus(name);
    let whole =
        files.iter().filter(|(path, bytes)| survives(target, bytes, &path.display().to_string())).count();
    assert!(whole > 0, "no file of the corpus gets to the end of the target");
    let began = Instant::now();
    let mut dice = Dice(0x5742_5157_0000 + files.len() as u64);
    for n in 0..target.short * times() {
        let bytes = mutation(&mut dice, &files);
        survives(target, &bytes, &format!("mutation {n}"));
        if began.elapsed() > PATIENCE * times() {
            break;
        }
    }
}

macro_rules! short_runs {
    ($($name:ident),*) => {
        $(#[test] fn $name() { short_run(stringify!($name)); })*

        /// No target is forgotten, here or in the package for libFuzzer.
        #[test]
        fn every_target_is_run() {
            let names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
            let package = include_str!("fuzz/Cargo.toml");
            for name in names {
                assert!(package.contains(&format!("name = \"{name}\"")), "{name} is not in tests/fuzz/Cargo.toml");
            }
        }
    };
}

short_runs!(config, seccomp, paths, mounts, process, state, resources, record, images);
