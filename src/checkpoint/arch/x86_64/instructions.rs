//! Instructions that not every processor of this architecture has.

/// The flags of `/proc/cpuinfo` that stand for instructions which a program may use without asking the kernel, once it
/// has seen that they are there: C libraries, cryptography and just-in-time compilers look at their start.
const INSTRUCTIONS: &[&str] = &[
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_complex",
    "amx_fp16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx2",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_ifma",
    "avx_ne_convert",
    "avx_vnni",
    "avx_vnni_int8",
    "bmi1",
    "bmi2",
    "cldemote",
    "clflushopt",
    "clwb",
    "clzero",
    "cx16",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "gfni",
    "lahf_lm",
    "movbe",
    "movdir64b",
    "movdiri",
    "pclmulqdq",
    "pni",
    "popcnt",
    "prefetchi",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha_ni",
    "sm3",
    "sm4",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xop",
    "xsave",
    "xsavec",
];

/// Those of the text of `/proc/cpuinfo`.
pub fn instructions(cpuinfo: &str) -> Vec<String> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    let flags = flags.map_or("", |(_, flags)| flags);
    flags.split_ascii_whitespace().filter(|flag| INSTRUCTIONS.contains(flag)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_programs_use_by_themselves() {
        assert!(INSTRUCTIONS.is_sorted());
        let text = "processor\t: 0\nflags\t\t: fpu sse sse2 sgx avx2 smep rtm\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n";
        assert_eq!(instructions(text), ["avx2", "rtm"]);
        assert_eq!(instructions("processor: 0\n"), Vec::<String>::new());
    }
}
