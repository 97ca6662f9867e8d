//! The hooks of config.json: programs that others want run at points of a container's life, with its state on
//! standard input.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::{Hook, Hooks, Spec};
use serde::Serialize;

use super::state::State;
use crate::sys::{self, Context, Error, Result, pidfd};

/// The points in a container's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Before pivot_root(2), in the runtime's namespaces. Deprecated, and what Docker uses.
    Prestart,
    /// The same, by its newer name.
    CreateRuntime,
    /// Before pivot_root(2), in the container's namespaces.
    CreateContainer,
    /// Just before the program, inside.
    StartContainer,
    /// After the program was started, in the runtime's namespaces.
    Poststart,
    /// After the container was deleted, in the runtime's namespaces.
    Poststop,
}

impl Point {
    fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    #[allow(deprecated)] // prestart is, and Docker's networks come from it.
    fn of(self, hooks: &Hooks) -> &[Hook] {
        let list = match self {
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::CreateContainer => hooks.create_container(),
            Self::StartContainer => hooks.start_container(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        list.as_deref().unwrap_or_default()
    }
}

/// The state that hooks read, as the specification defines it.
#[derive(Debug, Clone, Serialize)]
pub struct HookState {
    /// Version of the specification.
    #[serde(rename = "ociVersion")]
    pub version: String,
    /// Container id.
    pub id: String,
    /// `creating`, `created`, `running`, `stopped`.
    pub status: &'static str,
    /// Init, as a pid of the reader's namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// The bundle's directory.
    pub bundle: std::path::PathBuf,
    /// The annotations of config.json.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl HookState {
    /// The state of a container that has one on disk.
    pub fn of(state: &State, status: &'static str) -> Self {
        Self {
            version: super::OCI_VERSION.to_owned(),
            id: state.id.clone(),
            status,
            pid: (status != "stopped").then_some(state.init_process_pid),
            bundle: state.bundle().to_owned(),
            annotations: state.annotations(),
        }
    }
}

/// True if config.json has hooks for one of these points.
pub fn any(spec: &Spec, points: &[Point]) -> bool {
    spec.hooks().as_ref().is_some_and(|h| points.iter().any(|p| !p.of(h).is_empty()))
}

/// Runs the hooks of one point in order; the first failure ends it.
///
/// `env` is for hooks that bring none; where it is empty too, they inherit ours.
pub fn run(spec: &Spec, point: Point, state: &HookState, env: &[String]) -> Result<()> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let list = point.of(hooks);
    if list.is_empty() {
        return Ok(());
    }
    let input = serde_json::to_vec(state).map_err(|e| Error::new(format!("encoding the state: {e}")))?;
    for (index, hook) in list.iter().enumerate() {
        run_one(hook, &input, env)
            .map_err(|e| e.context(format!("error running {} hook #{index}", point.name())))?;
    }
    Ok(())
}

fn run_one(hook: &Hook, input: &[u8], env: &[String]) -> Result<()> {
    if hook.path().as_os_str().is_empty() {
        return Err(Error::new("exec: no command"));
    }
    let late = |t: i64| Error::new(format!("hook ran past specified timeout of {t}.0s"));
    if let Some(t) = hook.timeout().filter(|&t| t <= 0) {
        return Err(late(t));
    }
    let mut command = Command::new(hook.path());
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args);
    let pairs = hook.env().as_deref().filter(|e| !e.is_empty()).unwrap_or(env);
    if !pairs.is_empty() {
        command.env_clear().envs(pairs.iter().filter_map(|e| e.split_once('=')));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context(|| format!("fork/exec {}", hook.path().display()))?;
    let deadline =
        hook.timeout().and_then(|t| Instant::now().checked_add(Duration::from_secs(t.unsigned_abs())));
    let talked = converse(&mut child, input, deadline);
    if talked.is_err() {
        // SIGKILL to a child that has already exited changes nothing.
        let _ = child.kill();
    }
    let status = child.wait().context(|| "wait for the hook")?;
    let output = talked.map_err(|e| match hook.timeout() {
        Some(t) if e.errno() == Some(Errno::ETIMEDOUT) => late(t),
        _ => e,
    })?;
    if status.success() {
        return Ok(());
    }
    let (stdout, stderr) = (String::from_utf8_lossy(&output[0]), String::from_utf8_lossy(&output[1]));
    let status = match (status.code(), status.signal()) {
        (_, Some(signal)) => {
            let core = if status.core_dumped() { " (core dumped)" } else { "" };
            format!("signal: {}{core}", sys::error::signal_words(signal))
        }
        (code, None) => format!("exit status {}", code.unwrap_or(255)),
    };
    Err(Error::new(format!("{status}, stdout: {stdout}, stderr: {stderr}")))
}

/// More than this of a hook's output is not kept.
const KEPT: usize = 64 << 10;

/// Feeds the hook and reads what it prints, until it has exited, by one poll(2) over it all. What a background
/// process that it leaves behind holds open does not hold us.
fn converse(child: &mut Child, input: &[u8], deadline: Option<Instant>) -> Result<[Vec<u8>; 2]> {
    let exited = pidfd::open(child.id() as i32, 0).context(|| "pidfd_open")?;
    let mut stdin = child.stdin.take();
    let mut rest = input;
    let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Error::new("a hook without pipes"));
    };
    let (mut open, mut kept) = ([true; 2], [Vec::new(), Vec::new()]);
    loop {
        let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Err(Error::call("hook", Errno::ETIMEDOUT)),
            Some(left) => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        let events = |on: bool, e| if on { e } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(exited.as_fd(), PollFlags::POLLIN),
            PollFd::new(out.as_fd(), events(open[0], PollFlags::POLLIN)),
            PollFd::new(err.as_fd(), events(open[1], PollFlags::POLLIN)),
        ];
        if let Some(stdin) = &stdin {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT));
        }
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => continue,
            done => done.context(|| "poll")?,
        };
        let ready: Vec<bool> = fds.iter().map(|f| f.any().unwrap_or(false)).collect();
        for (i, pipe) in [&mut out as &mut dyn Read, &mut err].into_iter().enumerate() {
            if open[i] && ready[i + 1] {
                let mut buffer = [0; 4096];
                let n = pipe.read(&mut buffer).unwrap_or(0);
                open[i] = n > 0;
                if kept[i].len() < KEPT {
                    kept[i].extend_from_slice(&buffer[..n]);
                }
            }
        }
        if ready.get(3) == Some(&true) {
            match stdin.as_mut().map(|s| s.write(&rest[..rest.len().min(4096)])) {
                Some(Ok(n)) => rest = &rest[n..],
                // A hook need not read its input.
                _ => rest = &[],
            }
            if rest.is_empty() {
                stdin = None;
            }
        }
        let drained = !ready[1] && !ready[2];
        if ready[0] && (drained || open == [false; 2]) {
            return Ok(kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{HookBuilder, HooksBuilder, SpecBuilder};

    fn state() -> HookState {
        HookState {
            version: "1.2.0".into(),
            id: "c".into(),
            status: "creating",
            pid: Some(7),
            bundle: "/b".into(),
            annotations: std::collections::BTreeMap::new(),
        }
    }

    fn run_script(script: &str, timeout: Option<i64>) -> Result<()> {
        let args: Vec<String> = ["sh", "-c", script].iter().map(|&s| s.to_owned()).collect();
        let mut hook = HookBuilder::default().path("/bin/sh").args(args).build().unwrap();
        hook.set_timeout(timeout);
        let hooks = HooksBuilder::default().create_runtime(vec![hook]).build().unwrap();
        let spec = SpecBuilder::default().hooks(hooks).build().unwrap();
        run(&spec, Point::CreateRuntime, &state(), &["A=1".into()])
    }

    #[test]
    fn hooks_read_the_state_and_may_fail() {
        run_script(r#"test "$A" = 1 && grep -q '"pid":7,"bundle":"/b"'"#, None).unwrap();
        run_script("exit 0", None).unwrap();
        let e = run_script("kill -TERM $$", None).unwrap_err().to_string();
        assert_eq!(e, "error running createRuntime hook #0: signal: terminated, stdout: , stderr: ");
        let e = run_script("echo out; echo bad >&2; exit 3", None).unwrap_err().to_string();
        assert_eq!(e, "error running createRuntime hook #0: exit status 3, stdout: out\n, stderr: bad\n");
    }

    #[test]
    fn a_hook_that_hangs_is_killed_and_one_that_leaves_a_daemon_is_not_waited_for() {
        let started = Instant::now();
        let e = run_script("sleep 60", Some(1)).unwrap_err().to_string();
        assert_eq!(e, "error running createRuntime hook #0: hook ran past specified timeout of 1.0s");
        run_script("sleep 20 & exit 0", None).unwrap();
        let e = run_script("exit 0", Some(0)).unwrap_err().to_string();
        assert_eq!(e, "error running createRuntime hook #0: hook ran past specified timeout of 0.0s");
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
