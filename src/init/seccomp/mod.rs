//! The seccomp filter of config.json: compiled once by the runtime, loaded by init.
//!
//! ```text
//!   LinuxSeccomp ── libseccomp ── BPF ── stub in front (enosys) ──> Program ── seccomp(2)
//! ```
//!
//! The compiled program is plain data: the checkpoint engine puts the same program under a restored process.

mod enosys;

use std::io::{Read, Seek};
use std::os::fd::OwnedFd;

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};

use crate::sys::{Context, Error, Result, seccomp as call};

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, since Linux 5.19.
const WAIT_KILLABLE_RECV: u64 = 1 << 5;

/// A compiled filter.
#[derive(Debug, Clone)]
pub struct Program {
    /// The instructions, as seccomp(2) takes them.
    pub filters: Vec<libc::sock_filter>,
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u64,
}

impl Program {
    /// True if loading it yields a descriptor that somebody must listen on.
    pub fn has_listener(&self) -> bool {
        self.flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0
    }
}

fn explain(what: &str) -> impl Fn(SeccompError) -> Error {
    let what = what.to_owned();
    move |e| Error::new(format!("{what}: {e}"))
}

/// Compiles the filter.
pub fn compile(config: &LinuxSeccomp) -> Result<Program> {
    let default = action(config.default_action(), config.default_errno_ret());
    if default == ScmpAction::Notify {
        return Err(Error::new("SCMP_ACT_NOTIFY cannot be used as default action"));
    }
    let rules = config.syscalls().as_deref().unwrap_or_default();
    let mut flags = filter_flags(config.flags().as_deref())?;
    let mut filter = ScmpFilterContext::new(default).map_err(explain("error creating filter"))?;
    let archs = architectures(config)?;
    for arch in &archs {
        filter.add_arch(*arch).map_err(explain("error adding architecture to seccomp filter"))?;
    }
    // A binary tree pays with many rules, and libseccomp up to 2.5.4 fails on a tree without any.
    if rules.iter().map(|r| r.names().len()).sum::<usize>() > 32 {
        // Older versions have no tree, which is only slower.
        let _ = filter.set_ctl_optimize(2);
    }
    filter.set_ctl_nnp(false).map_err(explain("error setting no new privileges"))?;
    for rule in rules {
        if rule.action() == LinuxSeccompAction::ScmpActNotify {
            flags |= libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
            if rule.names().iter().any(|name| name == "write") {
                // Init writes the listener's number to the runtime after loading.
                return Err(Error::new("SCMP_ACT_NOTIFY cannot be used for the write syscall"));
            }
        }
        add_rule(&mut filter, rule, default)?;
    }
    let mut filters = export(&filter)?;
    if let Some(stub) = enosys::stub(config, &archs) {
        filters.splice(0..0, stub);
    }
    Ok(Program { filters, flags })
}

/// Loads a program onto this thread. Needs CAP_SYS_ADMIN or no_new_privs. Returns the listener, if it has one.
pub fn load(program: &Program) -> Result<Option<OwnedFd>> {
    call::set_mode_filter(program.flags, &program.filters).context(|| "error loading seccomp filter")
}

fn action(action: LinuxSeccompAction, code: Option<u32>) -> ScmpAction {
    let code = code.unwrap_or(libc::EPERM as u32);
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(code as i32),
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(code as u16),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
    }
}

/// The architectures of the filter; the native one is always among them.
fn architectures(config: &LinuxSeccomp) -> Result<Vec<ScmpArch>> {
    let mut all = vec![ScmpArch::native()];
    for arch in config.architectures().iter().flatten() {
        let arch = match arch {
            Arch::ScmpArchNative => continue,
            Arch::ScmpArchX86 => ScmpArch::X86,
            Arch::ScmpArchX86_64 => ScmpArch::X8664,
            Arch::ScmpArchX32 => ScmpArch::X32,
            Arch::ScmpArchArm => ScmpArch::Arm,
            Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
            Arch::ScmpArchMips => ScmpArch::Mips,
            Arch::ScmpArchMips64 => ScmpArch::Mips64,
            Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
            Arch::ScmpArchMipsel => ScmpArch::Mipsel,
            Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
            Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
            Arch::ScmpArchPpc => ScmpArch::Ppc,
            Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
            Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
            Arch::ScmpArchS390 => ScmpArch::S390,
            Arch::ScmpArchS390x => ScmpArch::S390X,
            Arch::ScmpArchParisc => ScmpArch::Parisc,
            Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
            Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
            Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
            Arch::ScmpArchM68k => ScmpArch::M68k,
            Arch::ScmpArchSh => ScmpArch::Sh,
            Arch::ScmpArchSheb => ScmpArch::Sheb,
        };
        if !all.contains(&arch) {
            all.push(arch);
        }
    }
    Ok(all)
}

/// The bit of a flag; TSYNC has none, as init has one thread only.
fn flag_bit(flag: LinuxSeccompFilterFlag) -> u64 {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => WAIT_KILLABLE_RECV,
    }
}

/// All flags of the spec.
pub const FLAGS: [LinuxSeccompFilterFlag; 4] = [
    LinuxSeccompFilterFlag::SeccompFilterFlagTsync,
    LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow,
    LinuxSeccompFilterFlag::SeccompFilterFlagLog,
    LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv,
];

/// True if this kernel has the flag.
pub fn supported(flag: LinuxSeccompFilterFlag) -> bool {
    let bit = flag_bit(flag);
    // This one is valid only together with a listener.
    let with = if bit == WAIT_KILLABLE_RECV { libc::SECCOMP_FILTER_FLAG_NEW_LISTENER } else { 0 };
    bit == 0 || call::knows_flag(bit | with)
}

/// Without a list, speculation is left alone; an empty list means none.
fn filter_flags(flags: Option<&[LinuxSeccompFilterFlag]>) -> Result<u64> {
    let Some(flags) = flags else {
        let default = LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow;
        return Ok(if supported(default) { flag_bit(default) } else { 0 });
    };
    flags.iter().try_fold(0, |all, flag| {
        if supported(*flag) {
            Ok(all | flag_bit(*flag))
        } else {
            Err(Error::new(format!("seccomp flag {flag} is not supported by this kernel")))
        }
    })
}

fn condition(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (op, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // `value` is the mask here.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    ScmpArgCompare::new(arg.index() as u32, op, value)
}

fn add_rule(filter: &mut ScmpFilterContext, rule: &LinuxSyscall, default: ScmpAction) -> Result<()> {
    let action = action(rule.action(), rule.errno_ret());
    if action == default {
        // Redundant, and refused by libseccomp.
        return Ok(());
    }
    let args = rule.args().as_deref().unwrap_or_default();
    if let Some(arg) = args.iter().find(|a| a.index() > 5) {
        return Err(Error::new(format!("seccomp argument index {} is out of range", arg.index())));
    }
    let conditions: Vec<_> = args.iter().map(condition).collect();
    // The same argument twice means one or the other: a rule for each condition.
    let repeated = args.iter().enumerate().any(|(i, a)| args[..i].iter().any(|b| b.index() == a.index()));
    for name in rule.names() {
        if name.is_empty() {
            return Err(Error::new("empty string is not a valid syscall"));
        }
        // Names that this libseccomp does not know are of system calls that the stub answers.
        let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
        let mut add = |conditions: &[ScmpArgCompare]| {
            filter
                .add_rule_conditional(action, syscall, conditions)
                .map(drop)
                .map_err(explain(&format!("error adding seccomp filter rule for syscall {name}")))
        };
        if repeated {
            for condition in &conditions {
                add(std::slice::from_ref(condition))?;
            }
        } else {
            add(&conditions)?;
        }
    }
    Ok(())
}

/// The BPF that libseccomp makes of a filter.
fn export(filter: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>> {
    let memory = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC).context(|| "memfd_create")?;
    filter.export_bpf(&memory).map_err(explain("error exporting BPF"))?;
    let mut file = std::fs::File::from(memory);
    let mut bytes = Vec::new();
    file.rewind().context(|| "lseek")?;
    file.read_to_end(&mut bytes).context(|| "read")?;
    let (instructions, []) = bytes.as_chunks::<8>() else {
        return Err(Error::new("program parsing halted mid-instruction"));
    };
    Ok(instructions
        .iter()
        .map(|i| libc::sock_filter {
            code: u16::from_ne_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect())
}

#[cfg(test)]
mod tests;
