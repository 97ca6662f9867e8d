//! The command line: one file a subcommand, holding its arguments and what it prints. No work is done here.
//!
//! ```text
//!   argv ── flags (Go's way into ours) ── clap ── log ── one subcommand ── message and exit code
//! ```

mod check;
mod checkpoint;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod flags;
mod image;
mod kill;
mod list;
pub mod log;
mod migrate;
mod new;
mod pause;
mod ps;
mod receive;
mod restore;
mod run;
mod spec;
mod start;
mod state;
mod swrk;
mod update;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::container::{Error, Result, Store};

/// Open Container Initiative runtime with checkpoint and restore built in.
///
/// Stasis runs containers from bundles, as runc does, and can freeze one into a directory of images and bring it
/// back, on this host or another. A bundle is a directory with a config.json and a root file system.
#[derive(Debug, Parser)]
#[command(
    name = "stasis",
    disable_version_flag = true,
    args_override_self = true,
    subcommand_required = false
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Subcommands>,
}

/// Flags that stand before the subcommand.
#[derive(Debug, clap::Args)]
struct Global {
    /// Enable debug logging
    #[arg(long)]
    debug: bool,
    /// Log file; standard error if not given
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Log format: text or json
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: String,
    /// Directory for the state of containers; best on a tmpfs [default: /run/stasis]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Have systemd manage the control groups (cgroupsPath is then slice:prefix:name)
    #[arg(long)]
    systemd_cgroup: bool,
    /// Ignore control group permission errors: true, false or auto
    #[arg(long, value_name = "MODE", default_value = "auto")]
    rootless: String,
    /// Accepted for old clients, and ignored: no CRIU is needed
    #[arg(long, value_name = "PATH", hide = true)]
    criu: Option<PathBuf>,
    /// Print the version
    #[arg(long, short = 'v')]
    version: bool,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    Check(check::Args),
    Checkpoint(checkpoint::Args),
    Create(create::Args),
    Delete(delete::Args),
    Events(events::Args),
    Exec(exec::Args),
    Features(features::Args),
    Image(image::Args),
    Kill(kill::Args),
    List(list::Args),
    Migrate(migrate::Args),
    Pause(pause::PauseArgs),
    Ps(ps::Args),
    Receive(receive::Args),
    Restore(restore::Args),
    Resume(pause::ResumeArgs),
    Run(run::Args),
    Spec(spec::Args),
    Start(start::Args),
    State(state::Args),
    Update(update::Args),
}

/// What stands after the flags of the subcommands that count their arguments themselves; the others tell clap.
const USAGE: &[(&str, &str)] = &[
    ("check", "[<container-id>]"),
    ("checkpoint", "<container-id>"),
    ("create", "<container-id>"),
    ("delete", "<container-id>"),
    ("events", "<container-id>"),
    ("exec", "<container-id> <command> [command options] || -p process.json <container-id>"),
    ("features", ""),
    ("kill", "<container-id> [signal]"),
    ("list", ""),
    ("migrate", "<container-id>"),
    ("pause", "<container-id>"),
    ("ps", "<container-id> [ps options]"),
    ("receive", "<container-id>"),
    ("restore", "<container-id>"),
    ("resume", "<container-id>"),
    ("run", "<container-id>"),
    ("spec", ""),
    ("start", "<container-id>"),
    ("state", "<container-id>"),
    ("update", "<container-id>"),
];

/// How help is laid out: as runc's is, for those who read it by line.
const HELP: &str = "NAME:\n   {bin} - {about-with-newline}\nUSAGE:\n   {usage}\n\n{all-args}{after-help}";

/// The command line as a whole: what is parsed, and what help, man pages and completions are made of.
///
/// Positional arguments are counted by the commands themselves, in runc's words; here they are only shown.
pub fn definition() -> clap::Command {
    let mut command = Cli::command().help_template(HELP);
    for (name, rest) in USAGE {
        command = command.mut_subcommand(name, |c| {
            let c = c.help_template(HELP);
            let usage = format!("stasis {name} [OPTIONS] {rest}");
            c.mut_arg("args", |a| a.hide(true)).override_usage(usage.trim_end().to_owned())
        });
    }
    command
}

/// Subcommands whose arguments end in a command line of their own.
const STOPS: &[&str] = &["exec", "kill", "ps"];

/// What a command of the command line gets.
struct Context {
    store: Store,
    /// `--root` was given.
    root_given: bool,
    systemd_cgroup: bool,
    /// Control groups that may not be had are done without.
    rootless: bool,
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os().map(|a| a.to_string_lossy().into_owned());
    let program = args.next().unwrap_or_default();
    let args: Vec<String> = args.collect();
    if Path::new(&program).file_name().is_some_and(|n| n == "criu") {
        return swrk::main(&args);
    }
    let command = definition();
    // The log that a command line asks for which is wrong elsewhere.
    let given = |name| flags::given(&args, &command, name).unwrap_or_default().to_owned();
    let (log_file, log_format) = (given("log"), given("log-format"));
    let early_log = || {
        // What is wrong with these is less than what is told next.
        let _ = log::init(Some(Path::new(&log_file)), &log_format, false);
    };
    let args = match flags::normalise(&args, &command, STOPS) {
        Ok(args) => args,
        Err(text) => {
            early_log();
            complain(format_args!("Incorrect Usage: {text}\n\n"));
            help(args.iter().find(|a| command.find_subcommand(a).is_some()));
            log::error(&text, None);
            return ExitCode::FAILURE;
        }
    };
    let parsed = command.try_get_matches_from(std::iter::once("stasis".to_owned()).chain(args));
    let cli = match parsed.and_then(|m| Cli::from_arg_matches(&m)) {
        Ok(cli) => cli,
        Err(e) => {
            if e.use_stderr() {
                early_log();
            }
            return misunderstood(&e);
        }
    };
    if cli.global.version {
        say(version());
        return ExitCode::SUCCESS;
    }
    match dispatch(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            let cause = match &failure.error {
                Error::Engine(e) => Some(e),
                _ => None,
            };
            log::error(&format!("{}{}", failure.prefix, failure.error), cause);
            ExitCode::from(failure.code)
        }
    }
}

/// Says what is wrong with a command line, in the words of Go's flags; or prints the help that was asked for.
fn misunderstood(e: &clap::Error) -> ExitCode {
    use clap::error::{ContextKind, ErrorKind};
    let part = |kind| e.get(kind).map(ToString::to_string).unwrap_or_default();
    match e.kind() {
        ErrorKind::InvalidSubcommand => {
            log::error(&format!("No help topic for '{}'", part(ContextKind::InvalidSubcommand)), None);
            return ExitCode::from(3);
        }
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
            let flag = part(ContextKind::InvalidArg);
            let flag = flag.split(' ').next().unwrap_or_default().trim_start_matches('-');
            let value = part(ContextKind::InvalidValue);
            // Most are numbers, of which it is told why they are none.
            let why = flags::integer::<i64>("ParseInt", &value).err();
            let why = why.unwrap_or_else(|| "parse error".to_owned());
            let text = format!("invalid value {value:?} for flag -{flag}: {why}");
            complain(format_args!("Incorrect Usage: {text}\n\n"));
            log::error(&text, None);
            return ExitCode::FAILURE;
        }
        _ => {}
    }
    // A closed pipe is no reason to say more.
    let _ = e.print();
    if e.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// A failed command.
struct Failure {
    /// What is printed before the error.
    prefix: &'static str,
    error: Error,
    code: u8,
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { prefix: "", error: error.into(), code: 1 }
    }
}

fn dispatch(cli: Cli) -> Result<u8, Failure> {
    log::init(cli.global.log.as_deref(), &cli.global.log_format, cli.global.debug)?;
    let Some(command) = cli.command else {
        // A closed pipe is no reason to say more.
        let _ = definition().print_long_help();
        return Ok(0);
    };
    let context = Context {
        store: Store::new(root(cli.global.root.as_deref())?),
        root_given: cli.global.root.is_some(),
        systemd_cgroup: cli.global.systemd_cgroup,
        rootless: rootless_cgroup(&cli.global.rootless)?,
    };
    let prefixed = |prefix, code| {
        move |error: Error| match error {
            Error::Usage(_) => Failure::from(error),
            error => Failure { prefix, error, code },
        }
    };
    match command {
        Subcommands::Check(args) => Ok(check::run(&context, &args)?),
        Subcommands::Checkpoint(args) => Ok(checkpoint::run(&context, &args)?),
        Subcommands::Create(args) => {
            create::run(&context, args).map_err(prefixed("stasis create failed: ", 1))
        }
        Subcommands::Delete(args) => Ok(delete::run(&context, &args)?),
        Subcommands::Events(args) => Ok(events::run(&context, &args)?),
        Subcommands::Exec(args) => exec::run(&context, args).map_err(prefixed("exec failed: ", 255)),
        Subcommands::Features(args) => Ok(features::run(&args)?),
        Subcommands::Image(args) => Ok(image::run(&args)?),
        Subcommands::Kill(args) => Ok(kill::run(&context, &args)?),
        Subcommands::List(args) => Ok(list::run(&context, &args)?),
        Subcommands::Migrate(args) => Ok(migrate::run(&context, &args)?),
        Subcommands::Pause(args) => Ok(pause::pause(&context, &args)?),
        Subcommands::Ps(args) => Ok(ps::run(&context, &args)?),
        Subcommands::Receive(args) => Ok(receive::run(&context, args)?),
        Subcommands::Restore(args) => Ok(restore::run(&context, args)?),
        Subcommands::Resume(args) => Ok(pause::resume(&context, &args)?),
        Subcommands::Run(args) => run::run(&context, args).map_err(prefixed("stasis run failed: ", 1)),
        Subcommands::Spec(args) => Ok(spec::run(&args)?),
        Subcommands::Start(args) => Ok(start::run(&context, &args)?),
        Subcommands::State(args) => Ok(state::run(&context, &args)?),
        Subcommands::Update(args) => Ok(update::run(&context, &args)?),
    }
}

fn version() -> String {
    let mut text = format!("stasis version {}\n", env!("CARGO_PKG_VERSION"));
    if let Some(commit) = option_env!("STASIS_COMMIT") {
        text += &format!("commit: {commit}\n");
    }
    text += &format!("spec: {}\n", crate::container::OCI_VERSION);
    text
}

/// The directory of all containers, absolute.
fn root(given: Option<&Path>) -> Result<PathBuf> {
    let Some(given) = given else {
        let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty());
        return Ok(match runtime_dir {
            Some(dir) if rootless() => Path::new(&dir).join("stasis"),
            _ => PathBuf::from("/run/stasis"),
        });
    };
    let path = absolute(given)?;
    if path == Path::new("/") {
        return Err(Error::new("Option --root argument should not be set to /"));
    }
    Ok(path)
}

/// What `--rootless` says, or what the user is.
fn rootless_cgroup(mode: &str) -> Result<bool> {
    match mode {
        auto if auto.is_empty() || auto.eq_ignore_ascii_case("auto") => {
            Ok(!nix::unistd::geteuid().is_root() || !all_ids())
        }
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(Error::new(format!("strconv.ParseBool: parsing {other:?}: invalid syntax"))),
    }
}

/// True in a user namespace that has all ids: the host's own.
fn all_ids() -> bool {
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// True for a user who is not root, or root only in a user namespace of his own.
fn rootless() -> bool {
    if !nix::unistd::geteuid().is_root() {
        return true;
    }
    !all_ids() && std::env::var_os("USER").is_none_or(|user| user != "root")
}

/// An absolute path without `.` and `..`, which need not exist: commands change their directory.
fn absolute(path: &Path) -> Result<PathBuf> {
    use crate::sys::Context;
    let path = std::path::absolute(path).context(|| format!("absolute path of {}", path.display()))?;
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => drop(clean.pop()),
            part => clean.push(part),
        }
    }
    Ok(clean)
}

/// How many positional arguments a subcommand takes.
enum Count {
    Exactly(usize),
    AtLeast(usize),
    AtMost(usize),
}

/// Checks their number, in runc's words.
fn check_args(name: &str, args: &[String], count: Count) -> Result<()> {
    let (wrong, words) = match count {
        Count::Exactly(n) => (args.len() != n, format!("exactly {n}")),
        Count::AtLeast(n) => (args.len() < n, format!("a minimum of {n}")),
        Count::AtMost(n) => (args.len() > n, format!("a maximum of {n}")),
    };
    if !wrong {
        return Ok(());
    }
    say("Incorrect Usage.\n\n");
    help(Some(name));
    let program = std::env::args().next().unwrap_or_else(|| "stasis".to_owned());
    Err(Error::Usage(format!("{program}: {name:?} requires {words} argument(s)")))
}

/// Prints what a subcommand takes, or the program.
fn help(name: Option<impl AsRef<str>>) {
    let mut command = definition();
    // A closed pipe is no reason to say more.
    let _ = match name.and_then(|name| command.find_subcommand_mut(name.as_ref())) {
        Some(subcommand) => subcommand.print_help(),
        None => command.print_help(),
    };
}

/// Prints, and says whether somebody still reads. A closed pipe is no failure of a command.
fn say(text: impl std::fmt::Display) -> bool {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).is_ok()
}

/// The same on standard error.
fn complain(text: impl std::fmt::Display) {
    use std::io::Write;
    // There is no place left to tell.
    let _ = write!(std::io::stderr().lock(), "{text}");
}

/// The one container id that most subcommands take.
fn one_id<'a>(name: &str, args: &'a [String]) -> Result<&'a str> {
    check_args(name, args, Count::Exactly(1))?;
    match args[0].as_str() {
        "" => Err(Error::EmptyId),
        id => Ok(id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        definition().debug_assert();
        let command = definition();
        for subcommand in command.get_subcommands() {
            let name = subcommand.get_name();
            assert!(subcommand.get_about().is_some(), "{name} says nothing about itself");
            for flag in subcommand.get_arguments().filter(|a| !a.is_hide_set()) {
                assert!(flag.get_help().is_some(), "{name} {}", flag.get_id());
            }
        }
    }

    #[test]
    fn clients_find_the_specification_version() {
        let text = version();
        assert!(text.starts_with("stasis version "));
        assert!(text.lines().any(|l| l == "spec: 1.3.0"));
    }

    #[test]
    fn the_root_is_absolute_and_not_everything() {
        assert!(root(Some(Path::new("/a/../"))).is_err());
        assert_eq!(root(Some(Path::new("/a/./b/../c"))).unwrap(), Path::new("/a/c"));
    }

    /// Every command line that clients were seen to send.
    #[test]
    fn what_clients_send_is_understood() {
        for line in [
            "--root R --log L --log-format json create --bundle B --pid-file F --console-socket S ID",
            "--root R start ID",
            "--root R kill --all ID 9",
            "delete --force ID",
            "ps --format json ID",
            "update --resources - ID",
            "exec --process F --console-socket S --detach --pid-file F ID",
            "checkpoint --image-path I --work-path W --file-locks --leave-running --leave-running ID",
            "restore --image-path I --work-path W --detach --pid-file F -no-subreaper --bundle B ID",
            "--log-format=json --log L create --bundle B --pid-file F --preserve-fds 2 ID",
            "exec --pid-file F --process P --detach --tty --console-socket S ID",
            "restore --bundle B --pid-file F --detach --image-path I --work-path W --tcp-established ID",
            "update --resources=FILE ID",
            "checkpoint --image-path I --work-path W --tcp-established --pre-dump ID",
            "--systemd-cgroup --rootless=true --criu /usr/sbin/criu state ID",
            "events --stats ID",
            "features",
            "migrate --to H:1 --rounds 3 ID",
            "receive --listen A:1 --bundle B ID",
            "list --format json",
            "run --no-pivot --no-new-keyring --pidfd-socket S --keep -d -b B ID",
            "checkpoint --ext-unix-sk --shell-job --empty-ns network --manage-cgroups-mode soft --status-fd 3 \
             --lazy-pages --page-server A:1 --parent-path P --auto-dedup ID",
        ] {
            let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            let args =
                flags::normalise(&args, &definition(), STOPS).unwrap_or_else(|e| panic!("{line}: {e}"));
            let parsed = Cli::try_parse_from(std::iter::once("stasis".to_owned()).chain(args));
            if let Err(e) = parsed {
                panic!("{line}: {e}");
            }
        }
    }
}
