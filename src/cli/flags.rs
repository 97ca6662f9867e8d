//! Go's way with flags, put into ours before clap sees them.
//!
//! ```text
//!   -no-subreaper --log L --detach=true --no-pivot=false ID -x
//!     ──>  --no-subreaper --log=L --detach -- ID -x
//! ```
//!
//! Go takes one dash or two, values after `=` or a space, booleans with a value, and the same flag any number of
//! times. Flags may follow positional arguments, but not where the rest is a command line of its own.

use std::any::TypeId;
use std::path::PathBuf;

use clap::{ArgAction, Command};

/// Rewrites `args` (without the program's name). `stops` names the subcommands whose flags end at the first
/// positional argument.
pub fn normalise(args: &[String], root: &Command, stops: &[&str]) -> Result<Vec<String>, String> {
    let mut out = vec![];
    let mut flags = vec![];
    let mut positional = vec![];
    let mut level = root;
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let body = match arg.strip_prefix('-') {
            Some(body) if !body.is_empty() => body.strip_prefix('-').unwrap_or(body),
            _ => {
                if std::ptr::eq(level, root) {
                    // The name of the subcommand; clap complains of an unknown one.
                    out.append(&mut flags);
                    out.push(if arg == "h" { "help".to_owned() } else { arg.clone() });
                    match root.get_subcommands().find(|c| c.get_name() == arg) {
                        Some(command) => level = command,
                        None => {
                            out.extend(rest.cloned());
                            return Ok(out);
                        }
                    }
                } else {
                    positional.push(arg.clone());
                    if stops.contains(&level.get_name()) {
                        // What follows is no flag anyway, with or without two dashes.
                        let after = rest.as_slice();
                        let dashes = usize::from(after.first().is_some_and(|a| a == "--"));
                        positional.extend_from_slice(&after[dashes..]);
                        break;
                    }
                }
                continue;
            }
        };
        if body.is_empty() {
            positional.extend(rest.cloned());
            break;
        }
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        if name == "help" || name == "h" {
            flags.push("--help".to_owned());
            continue;
        }
        let Some((Flag { long, takes_value, blank }, global)) = find(level, root, name) else {
            return Err(format!("flag provided but not defined: -{name}"));
        };
        let target = if global { &mut out } else { &mut flags };
        if takes_value == Takes::Optional && value.is_none() {
            target.push(format!("--{long}"));
        } else if takes_value != Takes::Nothing {
            let value = match value {
                Some(value) => value,
                None => rest.next().cloned().ok_or_else(|| format!("flag needs an argument: {arg}"))?,
            };
            if blank && value.is_empty() {
                let before = format!("--{long}=");
                target.retain(|f| !f.starts_with(&before));
                continue;
            }
            // The flags of the program itself go before the subcommand's name, which is the last so far.
            let at = if global { target.len() - 1 } else { target.len() };
            target.insert(at, format!("--{long}={value}"));
        } else {
            let flag = format!("--{long}");
            target.retain(|f| *f != flag);
            if truth(value.as_deref().unwrap_or("true")).ok_or_else(|| {
                format!("invalid value {:?} for flag -{name}: parse error", value.unwrap_or_default())
            })? {
                let at = if global { target.len() - 1 } else { target.len() };
                target.insert(at, flag);
            }
        }
    }
    out.append(&mut flags);
    if !positional.is_empty() {
        out.push("--".to_owned());
        out.append(&mut positional);
    }
    Ok(out)
}

/// The value of one of the program's own flags that stand before the subcommand, in a command line that may be wrong.
pub fn given<'a>(args: &'a [String], root: &Command, name: &str) -> Option<&'a str> {
    let mut rest = args.iter();
    let mut value = None;
    while let Some(body) = rest.next().and_then(|arg| arg.strip_prefix('-')) {
        let body = body.strip_prefix('-').unwrap_or(body);
        let (flag, mut text) = match body.split_once('=') {
            Some((flag, text)) => (flag, Some(text)),
            None => (body, None),
        };
        let Some((found, _)) = find(root, root, flag) else { break };
        if found.takes_value == Takes::Value && text.is_none() {
            text = rest.next().map(String::as_str);
        }
        if found.long == name {
            value = text;
        }
    }
    value
}

/// A number, or what Go's `strconv` says of a text that is none.
pub fn integer<T: std::str::FromStr<Err = std::num::ParseIntError>>(
    function: &str,
    text: &str,
) -> Result<T, String> {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    text.parse().map_err(|e: std::num::ParseIntError| {
        let why = match e.kind() {
            NegOverflow | PosOverflow => "value out of range",
            _ => "invalid syntax",
        };
        format!("strconv.{function}: parsing {text:?}: {why}")
    })
}

/// Whether a flag takes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Value,
    /// Only after an equals sign.
    Optional,
}

/// What there is to know of a flag.
struct Flag {
    long: String,
    takes_value: Takes,
    /// Without a value it is as if it had not been given: of paths and words whose default is none.
    blank: bool,
}

/// The flag, and whether it is the program's rather than the subcommand's.
fn find(level: &Command, root: &Command, name: &str) -> Option<(Flag, bool)> {
    let of = |command: &Command| {
        let arg = command.get_arguments().find(|a| {
            a.get_long() == Some(name)
                || a.get_short().is_some_and(|s| name.len() == 1 && name.starts_with(s))
                || a.get_all_aliases().is_some_and(|all| all.contains(&name))
        })?;
        let takes_value = match arg.get_action() {
            ArgAction::Set | ArgAction::Append if arg.is_require_equals_set() => Takes::Optional,
            ArgAction::Set | ArgAction::Append => Takes::Value,
            _ => Takes::Nothing,
        };
        let kind = arg.get_value_parser().type_id();
        let blank = takes_value == Takes::Value
            && matches!(arg.get_action(), ArgAction::Set)
            && (kind == TypeId::of::<PathBuf>() || kind == TypeId::of::<String>())
            && arg.get_default_values().is_empty()
            && arg.get_long() != Some("root");
        Some(Flag { long: arg.get_long()?.to_owned(), takes_value, blank })
    };
    if let Some(flag) = of(level) {
        return Some((flag, false));
    }
    of(root).map(|flag| (flag, true))
}

/// Go's strconv.ParseBool.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command};

    fn command() -> Command {
        let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let value = |name: &'static str| Arg::new(name).long(name);
        Command::new("x").arg(value("log")).arg(flag("debug")).subcommands([
            Command::new("run").args([
                flag("no-pivot"),
                flag("detach").short('d'),
                value("rounds").require_equals(true).num_args(0..=1),
                value("bundle").short('b'),
            ]),
            Command::new("exec")
                .args([flag("tty").short('t'), value("env").short('e').action(ArgAction::Append)]),
        ])
    }

    fn normal(line: &str) -> Result<String, String> {
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        normalise(&args, &command(), &["exec"]).map(|v| v.join(" "))
    }

    #[test]
    fn go_flags_become_ours() {
        for (go, ours) in [
            ("-log L run -no-pivot -b=B id", "--log=L run --no-pivot --bundle=B -- id"),
            ("run id --bundle B -d", "run --bundle=B --detach -- id"),
            ("run --no-pivot=true --no-pivot --detach=0 id", "run --no-pivot -- id"),
            ("run --detach --detach=false id", "run -- id"),
            ("run --debug id --log=L", "--debug --log=L run -- id"),
            ("exec -e A=1 -e B=2 -t id ls -t -e", "exec --env=A=1 --env=B=2 --tty -- id ls -t -e"),
            ("run --rounds id", "run --rounds -- id"),
            ("run -rounds=3 id", "run --rounds=3 -- id"),
            ("run --help", "run --help"),
            ("h run", "help run"),
            ("exec id -- ls -- -l", "exec -- id ls -- -l"),
            ("exec -- id -- ls", "exec -- id -- ls"),
            ("--debug nonsense -x", "--debug nonsense -x"),
            ("run -- -id", "run -- -id"),
            ("-log= run --bundle=B --bundle= id", "run -- id"),
            ("exec -e= id", "exec --env= -- id"),
            ("run --rounds= id", "run --rounds= -- id"),
        ] {
            assert_eq!(normal(go).as_deref(), Ok(ours), "{go}");
        }
    }

    #[test]
    fn the_log_of_a_wrong_command_line_is_found() {
        let log = |line: &str| {
            let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
            given(&args, &command(), "log").map(str::to_owned)
        };
        assert_eq!(log("--debug --log L run --nope").as_deref(), Some("L"));
        assert_eq!(log("-log=L -nope").as_deref(), Some("L"));
        assert_eq!(log("exec --nope id tool --log L"), None);
        assert_eq!(log("--nope --log L run"), None);
    }

    #[test]
    fn what_is_wrong_is_said_as_go_says_it() {
        assert_eq!(normal("run --bundle").unwrap_err(), "flag needs an argument: --bundle");
        assert_eq!(normal("run --nope id").unwrap_err(), "flag provided but not defined: -nope");
        assert_eq!(normal("run -b").unwrap_err(), "flag needs an argument: -b");
        let said = "invalid value \"maybe\" for flag -detach: parse error";
        assert_eq!(normal("run --detach=maybe id").unwrap_err(), said);
    }
}
