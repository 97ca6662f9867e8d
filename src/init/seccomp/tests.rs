use super::*;
use crate::sys::testing::in_child;
use nix::errno::Errno;

fn config(json: &str) -> LinuxSeccomp {
    serde_json::from_str(json).unwrap()
}

/// Loads the filter under no_new_privs.
fn install(json: &str) -> Option<OwnedFd> {
    nix::sys::prctl::set_no_new_privs().unwrap();
    load(&compile(&config(json)).unwrap()).unwrap()
}

fn errno_of(number: libc::c_long) -> Errno {
    // SAFETY: the arguments are zero, and the calls tested here do nothing with them.
    let ret = unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
    assert_eq!(ret, -1);
    Errno::last()
}

#[test]
fn a_denied_call_gets_its_errno() {
    in_child(0, || {
        install(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                {"names":["getcwd","no_such_call"],"action":"SCMP_ACT_ERRNO","errnoRet":99},
                {"names":["personality"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
        );
        assert_eq!(errno_of(libc::SYS_getcwd), Errno::EADDRNOTAVAIL);
        // SAFETY: numbers only.
        assert!(unsafe { libc::personality(0xffff_ffff) } >= 0);
        // SAFETY: numbers only.
        assert_eq!(unsafe { libc::personality(8) }, -1);
    });
}

#[test]
fn masks_and_repeated_arguments_are_understood() {
    in_child(0, || {
        install(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                {"names":["personality"],"action":"SCMP_ACT_ERRNO","errnoRet":5,
                 "args":[{"index":0,"value":240,"valueTwo":16,"op":"SCMP_CMP_MASKED_EQ"}]},
                {"names":["umask"],"action":"SCMP_ACT_ERRNO","errnoRet":6,
                 "args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":2,"op":"SCMP_CMP_EQ"}]}]}"#,
        );
        let call = |nr, arg: libc::c_long| {
            // SAFETY: numbers only.
            let ret = unsafe { libc::syscall(nr, arg) };
            if ret == -1 { Errno::last() } else { Errno::from_raw(0) }
        };
        assert_eq!(call(libc::SYS_personality, 0x1f), Errno::EIO);
        assert_eq!(call(libc::SYS_personality, 0), Errno::from_raw(0));
        assert_eq!(call(libc::SYS_umask, 1), Errno::ENXIO);
        assert_eq!(call(libc::SYS_umask, 2), Errno::ENXIO);
        assert_eq!(call(libc::SYS_umask, 3), Errno::from_raw(0));
    });
}

/// What a program that denies by default has to allow for the test itself to go on.
const LEFT: &str = r#"{"names":["exit_group","write","close","munmap","rt_sigprocmask","sigaltstack","brk","mmap",
    "futex","getpid","madvise"],"action":"SCMP_ACT_ALLOW"}"#;

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    in_child(0, || {
        install(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
                "syscalls":[{LEFT},{{"names":["openat2"],"action":"SCMP_ACT_ALLOW"}}]}}"#
        ));
        // Below the highest number of the profile: denied. Above: unknown.
        assert_eq!(errno_of(libc::SYS_getuid), Errno::EPERM);
        assert_eq!(errno_of(libc::SYS_openat2 + 1), Errno::ENOSYS);
        assert_eq!(errno_of(5000), Errno::ENOSYS);
        // An x32 number, too.
        assert_eq!(errno_of(0x4000_0000 + 5000), Errno::ENOSYS);
    });
}

#[test]
fn a_listener_is_returned() {
    in_child(0, || {
        let listener = install(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x","syscalls":[
                {"names":["getcwd"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        );
        assert!(listener.is_some());
    });
}

#[test]
fn what_would_deadlock_or_make_no_sense_is_refused() {
    for (json, words) in [
        (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "default action"),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["write"],"action":"SCMP_ACT_NOTIFY"}]}"#,
            "write syscall",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
                "args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#,
            "out of range",
        ),
    ] {
        let e = compile(&config(json)).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}

#[test]
fn flags_become_bits() {
    let flags = |json: &str| compile(&config(json)).unwrap().flags;
    assert_eq!(flags(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#), libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    assert_eq!(flags(r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":[]}"#), 0);
    assert_eq!(
        flags(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_TSYNC"]}"#
        ),
        libc::SECCOMP_FILTER_FLAG_LOG
    );
}
