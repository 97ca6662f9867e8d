//! A fixture: one C file in `tests/fixtures`, its directives, and the static program gcc makes of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

/// The ways a fixture is put to the test, in the order they are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// No checkpoint at all: is the fixture itself right?
    Plain,
    /// Checkpoint (which ends the container), restore, check.
    Stop,
    /// Checkpoint with `--leave-running`, check the running one, end it, restore the image elsewhere, check: another
    /// id, bundle and root file system.
    Leave,
    /// Checkpoint, restore, checkpoint again, restore again, check.
    Twice,
    /// The checkpoint is refused by name, and the container goes on.
    Refused,
    /// Checkpoint; elsewhere the restore is refused by name, and leaves nothing; where it was, it succeeds; check.
    Denied,
    /// As twice, and each restore takes the vdso of the images for that of another kernel.
    Kernel,
    /// As twice, and the images are those of another processor: what this one lacks is refused, and left out on request.
    Processor,
    /// Checkpoint, restore by runc with CRIU, check. Only with `INTEROP`.
    ToRunc,
    /// Run and checkpoint by runc with CRIU, restore, check. Only with `INTEROP`.
    FromRunc,
    /// Both halves by runc with CRIU: what it can do itself. Only with `INTEROP`.
    Runc,
    /// Checkpoint, and leave container and images in the directory `EXCHANGE`.
    Save,
    /// Restore what `save` has left there, elsewhere: on another machine, under another kernel. Check.
    Load,
}

impl Mode {
    /// Its name in directives and in test names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Stop => "stop",
            Self::Leave => "leave",
            Self::Twice => "twice",
            Self::Refused => "refused",
            Self::Denied => "denied",
            Self::Kernel => "kernel",
            Self::Processor => "processor",
            Self::ToRunc => "to-runc",
            Self::FromRunc => "from-runc",
            Self::Runc => "runc-alone",
            Self::Save => "save",
            Self::Load => "load",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [
            Self::Plain,
            Self::Stop,
            Self::Leave,
            Self::Twice,
            Self::Refused,
            Self::Denied,
            Self::Kernel,
            Self::Processor,
        ]
        .into_iter()
        .find(|m| m.name() == name)
    }
}

/// What the `//@ key: value` lines of a fixture say. `docs/testing.md` lists them.
#[derive(Debug, Clone, Default)]
pub struct Fixture {
    pub name: String,
    pub source: PathBuf,
    /// Its first line.
    pub about: String,
    pub modes: Vec<Mode>,
    /// Texts that the refusal must contain, every one.
    pub refused: Vec<String>,
    /// Texts that the refusal to restore elsewhere must contain, every one.
    pub denied: Vec<String>,
    /// JSON merge patch on the base config.json.
    pub config: Vec<Value>,
    /// JSON merge patch on config.json where mode `leave` restores.
    pub elsewhere: Vec<Value>,
    pub args: Vec<String>,
    pub cflags: Vec<String>,
    pub checkpoint: Vec<String>,
    pub restore: Vec<String>,
    pub tty: bool,
    /// What is refused shows only when the container stands still.
    pub late: bool,
    /// Whether it is refused shows only when it has been waited for.
    pub perhaps: bool,
    /// Paths on the host without which the fixture is skipped.
    pub needs: Vec<String>,
    /// Why the fixture can't pass yet: it's skipped, aloud.
    pub skip: Option<String>,
    /// Seconds for each step.
    pub timeout: u64,
}

impl Fixture {
    /// Reads the directives of one C file.
    pub fn parse(source: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(source).map_err(|e| format!("{}: {e}", source.display()))?;
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let about = text.lines().next().unwrap_or_default().trim_start_matches(['/', ' ']).to_owned();
        let mut f = Self { name, about, source: source.to_owned(), timeout: 60, ..Self::default() };
        for line in text.lines() {
            let Some(directive) = line.strip_prefix("//@") else { continue };
            let (key, value) = directive.split_once(':').unwrap_or((directive, ""));
            let (key, value) = (key.trim(), value.trim());
            let words = || value.split_whitespace().map(str::to_owned);
            let bad = |what: &str| format!("{}: //@ {key}: {what}", source.display());
            match key {
                "modes" => {
                    for word in value.split_whitespace() {
                        f.modes.push(Mode::parse(word).ok_or_else(|| bad("no such mode"))?);
                    }
                }
                "denied" => f.denied.push(value.to_owned()),
                "refused" => f.refused.push(value.to_owned()),
                "config" => f.config.push(serde_json::from_str(value).map_err(|e| bad(&e.to_string()))?),
                "elsewhere" => {
                    f.elsewhere.push(serde_json::from_str(value).map_err(|e| bad(&e.to_string()))?);
                }
                "args" => f.args.extend(words()),
                "cflags" => f.cflags.extend(words()),
                "checkpoint" => f.checkpoint.extend(words()),
                "restore" => f.restore.extend(words()),
                "tty" => f.tty = true,
                "late" => f.late = true,
                "perhaps" => f.perhaps = true,
                "needs" => f.needs.extend(words()),
                "skip" => f.skip = Some(value.to_owned()),
                "timeout" => f.timeout = value.parse().map_err(|_| bad("not a number of seconds"))?,
                _ => return Err(bad("no such directive")),
            }
        }
        let patience = std::env::var("PATIENCE").ok().and_then(|p| p.parse().ok());
        f.timeout *= patience.unwrap_or(1);
        if f.modes.is_empty() {
            f.modes = match (f.refused.is_empty(), f.denied.is_empty()) {
                (false, _) => vec![Mode::Plain, Mode::Refused],
                (_, false) => vec![Mode::Plain, Mode::Denied],
                _ => vec![Mode::Plain, Mode::Stop, Mode::Leave, Mode::Twice],
            };
        }
        Ok(f)
    }

    /// Builds the program into `dir`, unless it is there already and newer than its sources.
    ///
    /// Several modes of one fixture may build it at once: each under a name of its own, put in place whole.
    pub fn build(&self, dir: &Path) -> Result<PathBuf, String> {
        static BUILDS: AtomicUsize = AtomicUsize::new(0);
        let program = dir.join(&self.name);
        let age = |p: &Path| std::fs::metadata(p).and_then(|m| m.modified()).ok();
        if age(&program).is_some_and(|built| {
            let headers = headers(&self.source);
            [&self.source].into_iter().chain(&headers).all(|s| age(s).is_some_and(|changed| changed < built))
        }) {
            return Ok(program);
        }
        let build = BUILDS.fetch_add(1, Ordering::Relaxed);
        let fresh = dir.join(format!("{}.{}.{build}", self.name, std::process::id()));
        let output = Command::new("gcc")
            .args(["-static", "-O1", "-g0", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE", "-o"])
            .arg(&fresh)
            .arg(&self.source)
            .args(&self.cflags)
            .output()
            .map_err(|e| format!("gcc: {e}"))?;
        if !output.status.success() {
            return Err(format!(
                "gcc {}:\n{}",
                self.source.display(),
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        std::fs::rename(&fresh, &program).map_err(|e| format!("{}: {e}", program.display()))?;
        Ok(program)
    }

    /// Why the fixture can't run on this machine, if it can't.
    pub fn skipped(&self) -> Option<String> {
        if let Some(why) = &self.skip {
            return Some(why.clone());
        }
        self.needs.iter().find(|p| !Path::new(p).exists()).map(|p| format!("{p} is not there"))
    }
}

/// All headers beside a fixture: any of them may be its.
fn headers(source: &Path) -> Vec<PathBuf> {
    let beside = source.parent().and_then(|dir| std::fs::read_dir(dir).ok());
    let paths = beside.into_iter().flatten().flatten().map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|x| x == "h")).collect()
}
