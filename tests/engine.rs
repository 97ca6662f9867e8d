//! Engine tests: every fixture in `tests/fixtures`, in a real container, checkpointed and restored in several ways.
//!
//! Needs root and gcc; skipped aloud without. `RUNTIME=/path` drives another runtime (one without a working
//! checkpoint runs the `plain` mode only). `INTEROP=/path/to/runc` exchanges images with it and the criu on PATH instead:
//! each of the two restores what the other has checkpointed; `INTEROP_TABLE=FILE` has the outcome. Arguments select tests by substring: `cargo test --test engine -- pipe/stop`.
//! `EXCHANGE=DIR` takes half of a test to another machine: a fixture without `DIR/NAME.tar` is checkpointed into it, one
//! with it is restored from it.
//! `--build` only builds the fixtures, for a machine without gcc; `PATIENCE=5` gives every step five times as long.
//! `docs/testing.md` describes the protocol and the directives.

// A test program has no callers to document for.
#![allow(missing_docs)]

#[path = "engine/console.rs"]
mod console;
#[path = "engine/container.rs"]
mod container;
#[path = "engine/fixture.rs"]
mod fixture;
#[path = "engine/known.rs"]
mod known;
#[path = "engine/processor.rs"]
mod processor;
#[path = "engine/table.rs"]
mod table;
#[path = "engine/vdso.rs"]
mod vdso;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use container::{Container, Place};
use fixture::{Fixture, Mode};
use known::Known;
use table::Table;

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

impl From<String> for Outcome {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

fn main() -> ExitCode {
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    if std::env::args().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    let interop = std::env::var_os("INTEROP").map(PathBuf::from);
    let suite = match std::env::var_os("EXCHANGE") {
        Some(_) => "exchange",
        None if interop.is_some() => "interop",
        None => "engine",
    };
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/known-failures");
    let suites = [suite.to_owned(), format!("{suite}@{}", table::criu_version())];
    let (fixtures, known) = match load().and_then(|f| Ok((f, Known::read(&list, &suites)?))) {
        Ok(both) => both,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
    };
    let exchange = std::env::var_os("EXCHANGE").map(PathBuf::from);
    let modes = |f: &Fixture| match (
        &interop,
        &exchange,
        f.modes.iter().any(|m| matches!(m, Mode::Stop | Mode::Kernel | Mode::Processor)),
    ) {
        (None, None, _) => f.modes.clone(),
        (_, _, false) => vec![],
        (Some(_), ..) => vec![Mode::ToRunc, Mode::FromRunc, Mode::Runc],
        (None, Some(dir), _) if dir.join(&f.name).with_extension("tar").exists() => vec![Mode::Load],
        (None, Some(_), _) => vec![Mode::Save],
    };
    let tests: Vec<(&Fixture, Mode)> = fixtures
        .iter()
        .flat_map(|f| modes(f).into_iter().map(move |m| (f, m)))
        .filter(|(f, m)| {
            let name = format!("{}/{}", f.name, m.name());
            filters.is_empty() || filters.iter().any(|x| name.contains(x.as_str()))
        })
        .collect();

    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let programs = target.join("fixtures");
    if std::env::args().any(|a| a == "--build") {
        return build(&fixtures, &programs);
    }
    if !nix::unistd::geteuid().is_root() {
        println!("{suite}: 0 passed, 0 failed, {} skipped: containers of the test need root", tests.len());
        return ExitCode::SUCCESS;
    }
    if let Some(why) = interop.as_deref().and_then(cannot_exchange) {
        println!("{suite}: 0 passed, 0 failed, {} skipped: {why}", tests.len());
        return ExitCode::SUCCESS;
    }
    let dir = target.join(format!("engine-{}", std::process::id()));
    let runtime = std::env::var_os("RUNTIME")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_stasis")), PathBuf::from);
    for d in [&dir, &programs] {
        if let Err(e) = std::fs::create_dir_all(d) {
            eprintln!("{}: {e}", d.display());
            return ExitCode::FAILURE;
        }
    }
    if let Err(e) = private_mounts() {
        eprintln!("a mount namespace of our own: {e}");
        return ExitCode::FAILURE;
    }
    let (rival, exchange) = (interop.unwrap_or_default(), exchange.unwrap_or_default());
    let place = Place { runtime, rival, exchange, dir };
    let workers = std::thread::available_parallelism().map_or(2, usize::from).min(8);
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let rows = Mutex::new(Table::default());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((fixture, mode)) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let started = Instant::now();
                    let name = format!("{}/{}", fixture.name, mode.name());
                    let outcome = run(&place, fixture, *mode, &programs);
                    let reason = known.reason(&fixture.name, mode.name());
                    if let Ok(mut rows) = rows.lock() {
                        rows.add(fixture, *mode, &outcome, reason);
                    }
                    let outcome = judge(outcome, *mode, reason);
                    let spent = started.elapsed().as_secs_f32();
                    match &outcome {
                        Outcome::Passed => println!("ok      {name} ({spent:.2} s)"),
                        Outcome::Failed(why) => println!("FAILED  {name} ({spent:.2} s)\n{}", indent(why)),
                        Outcome::Skipped(why) => println!("SKIPPED {name}: {why}"),
                    }
                    if let Ok(mut all) = results.lock() {
                        all.push((name, outcome));
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_default();
    if let (Some(to), Ok(rows)) = (std::env::var_os("INTEROP_TABLE"), rows.into_inner())
        && let Err(e) = rows.write(Path::new(&to), &place)
    {
        eprintln!("{}: {e}", to.display());
        return ExitCode::FAILURE;
    }
    let failed: Vec<&str> =
        results.iter().filter(|(_, o)| matches!(o, Outcome::Failed(_))).map(|(n, _)| n.as_str()).collect();
    let skipped = results.iter().filter(|(_, o)| matches!(o, Outcome::Skipped(_))).count();
    if failed.is_empty() {
        let _ = std::fs::remove_dir_all(&place.dir);
    } else {
        println!("\nfailed: {}\nleft for a look: {}", failed.join(" "), place.dir.display());
    }
    println!(
        "{suite}: {} passed, {} failed, {skipped} skipped",
        results.len() - failed.len() - skipped,
        failed.len()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Builds all fixtures, and runs none.
fn build(fixtures: &[Fixture], programs: &Path) -> ExitCode {
    let all = || -> Result<(), String> {
        std::fs::create_dir_all(programs).map_err(|e| format!("{}: {e}", programs.display()))?;
        fixtures.iter().try_for_each(|f| f.build(programs).map(drop))
    };
    match all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// Why images can't be exchanged here, if they can't.
fn cannot_exchange(runc: &Path) -> Option<String> {
    if !runc.is_file() {
        return Some(format!("there is no {}", runc.display()));
    }
    match Command::new("criu").arg("check").output() {
        Err(e) => Some(format!("criu: {e}")),
        Ok(done) if done.status.success() => None,
        Ok(done) => Some(format!("criu check fails here: {}", String::from_utf8_lossy(&done.stderr).trim())),
    }
}

/// All fixtures, by name. A directive that can't be read is an error, not a fixture fewer.
fn load() -> Result<Vec<Fixture>, String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut sources: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "c")).collect();
    sources.sort();
    sources.iter().map(|s| Fixture::parse(s)).collect()
}

/// Whatever a failing test leaves mounted goes away with this process.
fn private_mounts() -> Result<(), nix::Error> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
}

fn run(place: &Place, fixture: &Fixture, mode: Mode, programs: &Path) -> Outcome {
    if let Some(why) = fixture.skipped() {
        return Outcome::Skipped(why);
    }
    if mode != Mode::Plain
        && std::env::var_os("RUNTIME").is_some_and(|r| r.to_string_lossy().ends_with("runc"))
    {
        return Outcome::Skipped("this runtime's checkpoint doesn't work here".to_owned());
    }
    let id = format!("{}-{}-{}", fixture.name, mode.name(), std::process::id());
    let program = match fixture.build(programs) {
        Ok(program) => program,
        Err(e) => return Outcome::Failed(e),
    };
    let mut container = match Container::new(place, fixture, &program, &id) {
        Ok(container) => container,
        Err(e) => return Outcome::Failed(e),
    };
    match walk(place, &mut container, fixture, mode) {
        Ok(()) => {
            container.delete();
            let _ = std::fs::remove_dir_all(place.dir.join(&id));
            Outcome::Passed
        }
        Err(Outcome::Failed(e)) => Outcome::Failed(format!("{e}\n{}", container.story())),
        Err(other) => other,
    }
}

/// Turns round the outcome of a test that is known to fail. What runc and CRIU do alone is told, not judged.
fn judge(outcome: Outcome, mode: Mode, known: Option<&str>) -> Outcome {
    match (outcome, known) {
        (Outcome::Failed(why), _) if mode == Mode::Runc => {
            Outcome::Skipped(format!("CRIU itself can't: {}", table::reason(&why)))
        }
        (Outcome::Failed(why), Some(reason)) => {
            let first = why.lines().next().unwrap_or_default();
            Outcome::Skipped(format!("known to fail: {reason} ({first})"))
        }
        (Outcome::Passed, Some(_)) => {
            Outcome::Failed("it passes now: take it out of tests/known-failures".to_owned())
        }
        (outcome, _) => outcome,
    }
}

/// One mode, step by step.
fn walk(place: &Place, c: &mut Container, fixture: &Fixture, mode: Mode) -> Result<(), Outcome> {
    let [first, second] = match mode {
        Mode::ToRunc => [&place.runtime, &place.rival],
        Mode::FromRunc => [&place.rival, &place.runtime],
        Mode::Runc => [&place.rival, &place.rival],
        _ => [&place.runtime, &place.runtime],
    };
    c.use_runtime(first);
    if mode == Mode::Load {
        c.load()?;
        c.restore("image")?;
        c.check()?;
        return Ok(());
    }
    c.start()?;
    match mode {
        Mode::ToRunc | Mode::FromRunc | Mode::Runc => {
            match c.checkpoint("image", &[]) {
                // What CRIU can't save, there is nothing to restore of.
                Err(e) if mode != Mode::ToRunc => {
                    let why = format!("CRIU can't checkpoint it: {}", table::reason(&e));
                    return Err(Outcome::Skipped(why));
                }
                done => done?,
            }
            c.use_runtime(second);
            c.restore("image")?;
            c.check()?;
        }
        Mode::Save => {
            c.checkpoint("image", &[])?;
            c.save()?;
        }
        // Above: nothing was to be started.
        Mode::Load => {}
        Mode::Plain => c.check()?,
        Mode::Stop => {
            if let (false, said) = c.look()? {
                return Err(format!("check says that it cannot be checkpointed: {said}").into());
            }
            c.checkpoint("image", &[])?;
            c.assert_gone()?;
            decode(&c.dir("image"))?;
            c.verify("image")?;
            c.restore("image")?;
            c.check()?;
        }
        Mode::Leave => {
            c.checkpoint("image", &["--leave-running"])?;
            let original = c.move_elsewhere()?;
            let elsewhere = c.swap(original);
            c.check().map_err(|e| format!("the one left running: {e}"))?;
            c.delete();
            c.swap(elsewhere);
            c.restore("image")?;
            c.check().map_err(|e| format!("the restored one: {e}"))?;
        }
        Mode::Twice => {
            for images in ["image", "again"] {
                c.checkpoint(images, &[]).map_err(|e| format!("{images}: {e}"))?;
                c.assert_gone()?;
                c.restore(images).map_err(|e| format!("{images}: {e}"))?;
            }
            c.check()?;
        }
        Mode::Kernel => {
            for images in ["image", "again"] {
                c.checkpoint(images, &[]).map_err(|e| format!("{images}: {e}"))?;
                vdso::of_another_kernel(&c.dir(images))?;
                c.seal(images)?;
                c.restore(images).map_err(|e| format!("{images}: {e}"))?;
            }
            c.check()?;
        }
        Mode::Processor => {
            c.checkpoint("image", &[])?;
            processor::of_another(&c.dir("image"), true)?;
            c.seal("image")?;
            let strange = format!("component {}", processor::STRANGE);
            let error = match c.restore("image") {
                Ok(()) => return Err("the restore wasn't refused".to_owned().into()),
                Err(e) => e + &c.story(),
            };
            if !error.contains(&strange) {
                return Err(format!("refused, but without \"{strange}\": {error}").into());
            }
            c.assert_gone()?;
            c.restore_with("image", &["--cpu-cap", "none"])?;
            c.checkpoint("again", &[])?;
            processor::of_another(&c.dir("again"), false)?;
            c.seal("again")?;
            c.restore("again")?;
            c.check()?;
        }
        Mode::Denied => {
            c.checkpoint("image", &[])?;
            let original = c.move_elsewhere()?;
            let error = match c.restore("image") {
                Ok(()) => return Err("the restore wasn't refused".to_owned().into()),
                Err(e) => e + &c.story(),
            };
            if let Some(missing) = fixture.denied.iter().find(|t| !error.contains(t.as_str())) {
                return Err(format!("refused, but without \"{missing}\": {error}").into());
            }
            if c.status() != "" {
                return Err(format!("after the refusal the container is {}", c.status()).into());
            }
            c.swap(original);
            c.restore("image")?;
            c.check()?;
        }
        Mode::Refused => {
            let (possible, said) = c.look()?;
            let silent = possible && !fixture.late && !fixture.perhaps;
            let lacks = |t: &&String| !(possible && fixture.late || said.contains(t.as_str()));
            if let Some(missing) = fixture.refused.iter().find(|t| silent || lacks(t)) {
                return Err(format!("check does not say \"{missing}\": {said}").into());
            }
            match c.checkpoint("image", &[]) {
                Ok(()) => return Err("the checkpoint wasn't refused".to_owned().into()),
                Err(e) => {
                    if let Some(missing) = fixture.refused.iter().find(|t| !e.contains(t.as_str())) {
                        return Err(format!("refused, but without \"{missing}\": {e}").into());
                    }
                }
            }
            if !fixture.late && c.has_stopped("image")? {
                return Err("refused, but the container had to stand still for it".to_owned().into());
            }
            if c.status() != "running" {
                return Err(format!("after the refusal the container is {}", c.status()).into());
            }
            c.check()?;
        }
    }
    Ok(())
}

/// CRIU's own tool must be able to read every image. Nothing to check where it's not installed.
fn decode(images: &Path) -> Result<(), String> {
    if !Path::new("/usr/bin/crit").exists() {
        return Ok(());
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/engine/decode.py");
    let output =
        Command::new("/usr/bin/python3").arg(script).arg(images).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("crit can't read the images: {}", String::from_utf8_lossy(&output.stderr)))
}

fn indent(text: &str) -> String {
    text.trim_end().lines().map(|l| format!("        {l}\n")).collect::<String>().trim_end().to_owned()
}
