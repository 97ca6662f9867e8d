//! `exec`.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;

use oci_spec::runtime::{Capabilities, Capability, Process};

use super::{Context, Count, absolute, check_args, flags, log, new};
use crate::bundle::{self, validate_process};
use crate::container::create::{host_root, write_pid_file};
use crate::container::exec::{Request, exec, target};
use crate::container::foreground::{Signals, stay};
use crate::container::stdio::Stdio;
use crate::container::{Container, Error, Result};
use crate::init::lsm;
use crate::sys::Context as _;

/// Run a further process in a container
///
/// Its settings are those of config.json, as far as flags do not say otherwise, or those of --process.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Path of a socket which will receive the master of the console's pseudoterminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Path of a socket which will receive a pidfd of the process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Set an environment variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Allocate a pseudoterminal
    #[arg(long, short)]
    tty: bool,
    /// User id, and group id
    #[arg(long, short, value_name = "UID[:GID]")]
    user: Option<String>,
    /// Additional group ids
    #[arg(long, short = 'g', value_name = "GID")]
    additional_gids: Vec<i64>,
    /// Path of a file with the process's settings, as in config.json
    #[arg(long, short, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Do not wait for the process
    #[arg(long, short)]
    detach: bool,
    /// File to write the process id to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// SELinux label of the process
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// AppArmor profile of the process
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// The process cannot gain privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Add a capability
    #[arg(long, short, value_name = "CAPABILITY")]
    cap: Vec<String>,
    /// Pass N additional file descriptors to the process
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u16,
    /// Run the process in an existing sub-cgroup
    #[arg(long, value_name = "[CONTROLLER:]PATH")]
    cgroup: Vec<String>,
    /// Allow a paused container: the process starts when it is resumed
    #[arg(long)]
    ignore_paused: bool,
    /// Name of the container, and the command
    #[arg(value_name = "container-id")]
    args: Vec<String>,
}

pub fn run(context: &Context, args: Args) -> Result<u8> {
    check_args("exec", &args.args, Count::AtLeast(1))?;
    new::seal(context)?;
    let pid_file = args.pid_file.as_deref().map(absolute).transpose()?;
    let container = target(&context.store, &args.args[0], args.ignore_paused)?;
    let process = process(&args, &container)?;
    let terminal = process.terminal().unwrap_or(false);
    let owner = host_root(&container.spec()?);
    let stdio = Stdio::new(args.detach, terminal, args.console_socket.as_deref(), owner)?;
    let passed = i32::from(args.preserve_fds);
    new::check_passed(0, passed)?;
    let request = Request {
        process,
        stdio: stdio.theirs,
        console: stdio.console,
        pidfd_socket: args.pidfd_socket.as_deref().map(new::dial).transpose()?,
        passed,
        ignore_paused: args.ignore_paused,
        groups: groups(&args.cgroup)?,
    };
    let signals = if args.detach { None } else { Some(Signals::take()?) };
    let child = exec(&container, &request)?;
    drop(request);
    if let Some(path) = &pid_file {
        write_pid_file(path, child.pid).inspect_err(|_| child.kill())?;
    }
    let Some(signals) = signals else { return Ok(0) };
    let code = stay(child.pid, child.pidfd.as_fd(), stdio.ours, &signals)?;
    u8::try_from(code).map_err(|_| Error::new("exit status out of range"))
}

/// The sub-groups of `--cgroup`, by controller; one without a controller is for all.
fn groups(args: &[String]) -> Result<BTreeMap<String, String>> {
    let mut groups = BTreeMap::new();
    for arg in args {
        let Some((controllers, path)) = arg.split_once(':') else {
            if args.len() != 1 {
                return Err(Error::new(format!(
                    "invalid --cgroup argument: {arg} (missing <controller>: prefix)"
                )));
            }
            groups.insert(String::new(), arg.clone());
            continue;
        };
        for controller in controllers.split(',') {
            if controller.is_empty() {
                return Err(Error::new(format!(
                    "invalid --cgroup argument: {arg} (empty <controller> prefix)"
                )));
            }
            if groups.insert(controller.to_owned(), path.to_owned()).is_some() {
                return Err(Error::new(format!(
                    "invalid --cgroup argument(s): controller {controller} specified multiple times"
                )));
            }
        }
    }
    Ok(groups)
}

fn process(args: &Args, container: &Container) -> Result<Process> {
    let mut unknown = vec![];
    let process = match &args.process {
        Some(path) => {
            let text = std::fs::read(path).context(|| format!("open {}", path.display()))?;
            let parsed = bundle::parse(&text);
            let (process, names) = parsed.map_err(|e| Error::new(format!("{}: {e}", path.display())))?;
            unknown = names;
            completed(process, container)?
        }
        None => from_flags(args, container)?,
    };
    new::warn_of_capabilities(&unknown, Some(&process));
    validate_process(&process)?;
    lsm::validate(&process)?;
    Ok(process)
}

/// What a file leaves out is the container's own: a process without `capabilities` must not have more than its init.
fn completed(mut process: Process, container: &Container) -> Result<Process> {
    let spec = container.spec()?;
    let Some(own) = spec.process() else { return Ok(process) };
    if process.capabilities().is_none() {
        process.set_capabilities(own.capabilities().clone());
    }
    let blank = |text: &Option<String>| text.as_deref().is_none_or(str::is_empty);
    if blank(process.apparmor_profile()) {
        process.set_apparmor_profile(own.apparmor_profile().clone());
    }
    if blank(process.selinux_label()) {
        process.set_selinux_label(own.selinux_label().clone());
    }
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(own.rlimits().clone());
    }
    if process.io_priority().is_none() {
        process.set_io_priority(*own.io_priority());
    }
    if process.scheduler().is_none() {
        process.set_scheduler(own.scheduler().clone());
    }
    if process.exec_cpu_affinity().is_none() {
        process.set_exec_cpu_affinity(own.exec_cpu_affinity().clone());
    }
    Ok(process)
}

fn from_flags(args: &Args, container: &Container) -> Result<Process> {
    let spec = container.spec()?;
    let mut process =
        spec.process().clone().ok_or_else(|| Error::new("process property must not be empty"))?;
    if args.args.len() < 2 {
        return Err(Error::new("exec args cannot be empty"));
    }
    process.set_args(Some(args.args[1..].to_vec()));
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    if args.apparmor.is_some() {
        process.set_apparmor_profile(args.apparmor.clone());
    }
    if args.process_label.is_some() {
        process.set_selinux_label(args.process_label.clone());
    }
    add_capabilities(&mut process, &args.cap)?;
    process.env_mut().get_or_insert_default().extend(args.env.iter().cloned());
    process.set_terminal(Some(args.tty));
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(user) = &args.user {
        let (uid, gid) = user_ids(user)?;
        process.user_mut().set_uid(uid);
        if let Some(gid) = gid {
            process.user_mut().set_gid(gid);
        }
    }
    for gid in &args.additional_gids {
        let gid = u32::try_from(*gid)
            .map_err(|_| Error::new(format!("additional-gids must be a positive number {gid}")))?;
        process.user_mut().additional_gids_mut().get_or_insert_default().push(gid);
    }
    Ok(process)
}

/// `--user`: numbers, which must not wrap round to somebody else's.
fn user_ids(user: &str) -> Result<(u32, Option<u32>)> {
    let id = |what: &str, text: &str| {
        let number: i64 = flags::integer("Atoi", text).map_err(|e| Error::new(format!("bad {what}: {e}")))?;
        u32::try_from(number)
            .map_err(|_| Error::new(format!("bad {what}: {number} is not in range 0-4294967294")))
    };
    match user.split_once(':') {
        Some((uid, gid)) => Ok((id("uid", uid)?, Some(id("gid", gid)?))),
        None => Ok((id("uid", user)?, None)),
    }
}

/// `--cap` widens every set but the inheritable one, and the ambient one only where there are inheritable ones.
fn add_capabilities(process: &mut Process, names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let (mut more, mut unknown) = (vec![], vec![]);
    for name in names {
        match name.strip_prefix("CAP_").map(str::parse::<Capability>) {
            Some(Ok(capability)) => more.push(capability),
            _ => unknown.push(name.as_str()),
        }
    }
    if !unknown.is_empty() {
        log::warn(&format!("ignoring unknown or unavailable capabilities: [{}]", unknown.join(" ")));
    }
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let wider = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(more.iter().copied());
        Some(set)
    };
    let (bounding, effective, permitted) =
        (wider(sets.bounding()), wider(sets.effective()), wider(sets.permitted()));
    sets.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    if sets.inheritable().is_some() {
        let ambient = wider(sets.ambient());
        sets.set_ambient(ambient);
    }
    process.set_capabilities(Some(sets));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_one_number_or_two() {
        assert_eq!(user_ids("5").unwrap(), (5, None));
        assert_eq!(user_ids("5:6").unwrap(), (5, Some(6)));
        let bad = |text| user_ids(text).unwrap_err().to_string();
        assert_eq!(bad("x"), r#"bad uid: strconv.Atoi: parsing "x": invalid syntax"#);
        assert_eq!(bad("5:x"), r#"bad gid: strconv.Atoi: parsing "x": invalid syntax"#);
        for wraps in ["-1", "4294967296", "99999999999", "5:-1"] {
            assert!(user_ids(wraps).is_err(), "{wraps}");
        }
    }

    #[test]
    fn sub_groups_are_one_for_all_or_by_controller() {
        let groups = |list: &[&str]| groups(&list.iter().map(|&s| s.to_owned()).collect::<Vec<_>>());
        assert_eq!(groups(&["a/b"]).unwrap(), BTreeMap::from([(String::new(), "a/b".to_owned())]));
        assert_eq!(groups(&["cpu,memory:a", "pids:b"]).unwrap().len(), 3);
        for (bad, why) in [
            (&["a", "b"][..], "missing <controller>: prefix"),
            (&[":a"], "empty <controller> prefix"),
            (&["cpu:a", "cpu:b"], "specified multiple times"),
        ] {
            assert!(groups(bad).unwrap_err().to_string().contains(why), "{bad:?}");
        }
    }
}
