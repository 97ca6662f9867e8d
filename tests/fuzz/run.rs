//! libFuzzer's way into one of the targets: that which the program is named after.
#![no_main]

#[path = "targets.rs"]
mod targets;

use std::sync::LazyLock;

static TARGET: LazyLock<&targets::Target> = LazyLock::new(|| {
    let name =
        std::env::current_exe().expect("a name").file_name().expect("a name").to_string_lossy().into_owned();
    targets::TARGETS.iter().find(|t| t.name == name).expect("a target of that name")
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    (TARGET.run)(bytes);
});
