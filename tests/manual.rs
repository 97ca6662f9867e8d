//! Man pages and completions are whole: a page for each command, every flag in it, nothing that leads nowhere; and bash
//! completes what it is given.

#[path = "../examples/manual.rs"]
mod manual;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn every_command_and_flag_has_its_place_in_the_manual() {
    let dir = tempfile::tempdir().unwrap();
    manual::write_all(dir.path()).unwrap();
    let pages = manual::pages("stasis", &stasis::cli::definition());
    let names: BTreeSet<&str> = pages.iter().map(|(name, _)| *name).collect();
    for name in ["stasis", "stasis-create", "stasis-exec", "stasis-checkpoint", "stasis-image"] {
        assert!(names.contains(name), "{name} is not among {names:?}");
    }
    for (name, command) in &pages {
        let text = fs::read_to_string(dir.path().join(format!("man/man8/{name}.8"))).unwrap();
        let plain = text.replace("\\-", "-");
        assert!(command.get_about().is_some(), "{name} says nothing of itself");
        for flag in command.get_arguments().filter(|a| !a.is_hide_set()).filter_map(clap::Arg::get_long) {
            assert!(plain.contains(&format!("--{flag}")), "--{flag} is not in {name}.8");
        }
        for (at, _) in plain.match_indices("(8)") {
            let word = plain[..at]
                .rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '-')
                .next()
                .unwrap_or_default();
            assert!(names.contains(word), "{name}.8 speaks of {word}(8)");
        }
    }
}

fn complete(script: &Path, words: &[&str]) -> BTreeSet<String> {
    let (count, last) = (words.len() - 1, words[words.len() - 1]);
    let program = format!(
        "source {}; COMP_WORDS=({}); COMP_CWORD={count}; _stasis stasis '{last}' '{}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display(),
        words.join(" "),
        words[count - 1]
    );
    let output = Command::new("bash").args(["-c", &program]).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_flags() {
    let dir = tempfile::tempdir().unwrap();
    manual::write_all(dir.path()).unwrap();
    let script = dir.path().join("bash/stasis");
    let all = |words: &[&str]| words.iter().map(|&w| w.to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(complete(&script, &["stasis", "re"]), all(&["receive", "restore", "resume"]));
    assert_eq!(complete(&script, &["stasis", "exec", "--pid"]), all(&["--pid-file", "--pidfd-socket"]));
    assert_eq!(complete(&script, &["stasis", "image", "ver"]), all(&["verify"]));
    for (file, words) in [("zsh/_stasis", "#compdef stasis"), ("fish/stasis.fish", "complete -c stasis")] {
        let text = fs::read_to_string(dir.path().join(file)).unwrap();
        for part in [words, "leave-running", "preserve-fds", "manage-cgroups-mode"] {
            assert!(text.contains(part), "{part} is not in {file}");
        }
    }
}
