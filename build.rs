//! Has the program begin where `src/init/seal/entry_x86_64.rs` says; everywhere else the C library's start is as good.
//! What is released is also laid out such that little of it has to be in memory to start a container.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/order.ld");
    let is = |key: &str, value: &str| std::env::var(key).is_ok_and(|v| v == value);
    if is("CARGO_CFG_TARGET_OS", "linux") {
        if is("CARGO_CFG_TARGET_ARCH", "x86_64") {
            println!("cargo:rustc-link-arg-bins=-Wl,-e,stasis_entry");
        }
        if is("PROFILE", "release") {
            let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
            println!("cargo:rustc-link-arg-bins=-Wl,-T,{here}/src/order.ld");
            // Relocations in a bit each instead of 24 bytes, all of which are read at the start.
            println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
        }
    }
}
