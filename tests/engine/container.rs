//! A container that runs one fixture: its bundle, and the runtime's commands on it.

use std::fs;
use std::io::{PipeReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::console::Console;
use crate::fixture::Fixture;

/// With what a fixture begins that says why there is nothing to be tested.
const SKIPPED: &str = "skipped: ";

/// Where a test keeps everything, and which runtime it drives.
#[derive(Debug, Clone)]
pub struct Place {
    /// The runtime's binary.
    pub runtime: PathBuf,
    /// The runtime that images are exchanged with.
    pub rival: PathBuf,
    /// Where containers of another machine come from, or go to.
    pub exchange: PathBuf,
    /// A directory of the run's own.
    pub dir: PathBuf,
}

/// A bundle and an id.
pub type Old = (PathBuf, String);

/// One container. Dropping it deletes it, whatever happened.
pub struct Container<'a> {
    place: &'a Place,
    fixture: &'a Fixture,
    id: String,
    /// Its directory in the place, which keeps its name when the container gets another id.
    home: PathBuf,
    bundle: PathBuf,
    /// Who runs it at present.
    runtime: PathBuf,
    /// What the container, and the commands it inherits its output from, have printed.
    printed: Arc<Mutex<Vec<u8>>>,
    console: Option<Console>,
    log: String,
}

impl<'a> Container<'a> {
    /// Lays out a bundle for the fixture's program. Nothing runs yet.
    pub fn new(place: &'a Place, fixture: &'a Fixture, program: &Path, id: &str) -> Result<Self, String> {
        let home = place.dir.join(id);
        let bundle = home.join("bundle");
        let rootfs = bundle.join("rootfs");
        for dir in ["t", "proc", "dev", "sys", "tmp", "etc", "data"] {
            fs::create_dir_all(rootfs.join(dir)).map_err(|e| format!("{}: {e}", rootfs.display()))?;
        }
        use std::os::unix::fs::PermissionsExt;
        for dir in ["t", "tmp", "data"] {
            fs::set_permissions(rootfs.join(dir), fs::Permissions::from_mode(0o1777))
                .map_err(|e| e.to_string())?;
        }
        // What fixtures mount from outside.
        for name in ["outside", "another"] {
            fs::create_dir_all(bundle.join(name).join("sub"))
                .map_err(|e| format!("{}: {e}", bundle.display()))?;
            fs::write(bundle.join(name).join("which"), name).map_err(|e| e.to_string())?;
        }
        // By another process: a child that another test starts here might hold it open for writing while it is executed.
        let copied = std::process::Command::new("cp").arg(program).arg(rootfs.join("fixture")).status();
        if !copied.is_ok_and(|status| status.success()) {
            return Err(format!("{}: it cannot be copied", program.display()));
        }
        let mut config: Value =
            serde_json::from_str(include_str!("config.json")).map_err(|e| e.to_string())?;
        for patch in &fixture.config {
            merge(&mut config, patch);
        }
        if let Some(args) = config.pointer_mut("/process/args").and_then(Value::as_array_mut) {
            args.extend(fixture.args.iter().map(|a| json!(a)));
        }
        if let Some(env) = config.pointer_mut("/process/env").and_then(Value::as_array_mut)
            && !place.exchange.as_os_str().is_empty()
        {
            // The other machine's processor may be a smaller one, as the virtual machine's is.
            env.push(json!(
                "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-RTM,-AVX2"
            ));
        }
        config["process"]["terminal"] = json!(fixture.tty);
        let text = serde_json::to_string_pretty(&config).map_err(|e| e.to_string())?;
        fs::write(bundle.join("config.json"), text).map_err(|e| e.to_string())?;
        let printed = Arc::new(Mutex::new(Vec::new()));
        let (id, runtime) = (id.to_owned(), place.runtime.clone());
        Ok(Self { place, fixture, id, home, bundle, runtime, printed, console: None, log: String::new() })
    }

    /// The runtime's command line for `words` on this container.
    fn command(&self, words: &[&str]) -> Command {
        let mut c = Command::new(&self.runtime);
        let mut root = self.runtime.file_name().unwrap_or_default().to_owned();
        root.push(".root");
        c.arg("--root").arg(self.place.dir.join(root)).args(words).stdin(Stdio::null());
        c
    }

    /// Runs a command that starts or restores: it and the container share a new pipe (or terminal) for output.
    fn launch(&mut self, words: &[&str], arguments: &[String]) -> Result<(), String> {
        let mut command = self.command(words);
        command.args(arguments);
        if self.fixture.tty {
            let console = Console::listen()?;
            command.arg("--console-socket").arg(console.path());
            self.console = Some(console);
        }
        let (reader, writer) = std::io::pipe().map_err(|e| e.to_string())?;
        let copy = writer.try_clone().map_err(|e| e.to_string())?;
        command.arg(&self.id).stdout(writer).stderr(copy);
        self.log += &format!("$ {command:?}\n");
        let mut child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        drop(command);
        drain(reader, Arc::clone(&self.printed));
        let status =
            self.wait_for(|| child.try_wait().map_err(|e| e.to_string()), &format!("{} to return", words[0]));
        if status.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let status = status?;
        if let Some(console) = self.console.as_mut().filter(|_| status.success()) {
            console.receive(Arc::clone(&self.printed), Duration::from_secs(self.fixture.timeout))?;
        }
        if status.success() { Ok(()) } else { Err(format!("{} failed: {status}", words[0])) }
    }

    /// `run --detach`, and the fixture says it's ready, or why there is nothing to be tested here.
    pub fn start(&mut self) -> Result<(), Outcome> {
        let bundle = self.bundle.to_string_lossy().into_owned();
        self.launch(&["run", "--detach", "--bundle", &bundle], &[])?;
        let t = self.bundle.join("rootfs/t");
        let mut lacking = None;
        self.wait_for(
            || match (t.join("ready").exists(), fs::read_to_string(t.join("result"))) {
                (_, Ok(result)) if result.starts_with(SKIPPED) => {
                    lacking = Some(result[SKIPPED.len()..].to_owned());
                    Ok(Some(()))
                }
                (_, Ok(result)) if result != "ok" => {
                    Err(format!("the fixture failed before it was ready: {result}"))
                }
                (true, _) => Ok(Some(())),
                _ => Ok(None),
            },
            "the fixture to be ready",
        )?;
        lacking.map_or(Ok(()), |why| Err(Outcome::Skipped(why)))
    }

    /// `checkpoint` into `images`; the error holds what the runtime printed.
    pub fn checkpoint(&mut self, images: &str, flags: &[&str]) -> Result<(), String> {
        let (images, work) = (self.dir(images), self.dir(&format!("{images}.work")));
        let mut command = self.command(&["checkpoint", "--image-path"]);
        command
            .arg(&images)
            .arg("--work-path")
            .arg(&work)
            .args(flags)
            .args(&self.fixture.checkpoint)
            .arg(&self.id);
        self.log += &format!("$ {command:?}\n");
        let output = bounded(command, Duration::from_secs(self.fixture.timeout))?;
        self.log += &output.1;
        if output.0 {
            if !images.join("inventory.img").exists() {
                return Err("checkpoint succeeded but there is no inventory.img".to_owned());
            }
            return Ok(());
        }
        Err(format!("checkpoint failed: {}\n{}", output.1, tail(&work.join("dump.log"))))
    }

    /// Whether the container stood still for the checkpoint into `images`, by what its log says.
    pub fn has_stopped(&self, images: &str) -> Result<bool, String> {
        let log = self.dir(&format!("{images}.work")).join("dump.log");
        let text = fs::read_to_string(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        Ok(text.contains(" threads have stopped"))
    }

    /// `check ID`: whether it says that a checkpoint is possible, and what it prints.
    pub fn look(&mut self) -> Result<(bool, String), String> {
        let mut command = self.command(&["check"]);
        let known = [
            "--tcp-established",
            "--tcp-close",
            "--tcp-skip-in-flight",
            "--ext-unix-sk",
            "--shell-job",
            "--file-locks",
            "--keep-network",
        ];
        command.args(self.fixture.checkpoint.iter().filter(|flag| known.contains(&flag.as_str())));
        command.arg(&self.id);
        self.log += &format!("$ {command:?}\n");
        let output = bounded(command, Duration::from_secs(self.fixture.timeout))?;
        self.log += &output.1;
        Ok(output)
    }

    /// `image verify`, and every other view of `images`, must have nothing to complain of.
    pub fn verify(&mut self, images: &str) -> Result<(), String> {
        let images = self.dir(images).to_string_lossy().into_owned();
        for view in ["verify", "show", "tree", "mem", "files"] {
            let command = self.command(&["image", view, "--format", "json", &images]);
            let (good, said) = bounded(command, Duration::from_secs(self.fixture.timeout))?;
            if !good || serde_json::from_str::<Value>(&said).is_err() {
                return Err(format!("image {view}: {said}"));
            }
        }
        Ok(())
    }

    /// Accepts images that were changed on purpose.
    pub fn seal(&mut self, images: &str) -> Result<(), String> {
        let dir = self.dir(images);
        let mut command = self.command(&["image", "seal"]);
        command.arg(&dir);
        match bounded(command, Duration::from_secs(self.fixture.timeout))? {
            (true, _) => Ok(()),
            (false, said) => Err(format!("image seal: {said}")),
        }
    }

    /// `restore --detach` from `images`.
    pub fn restore(&mut self, images: &str) -> Result<(), String> {
        self.restore_with(images, &[])
    }

    /// The same with more flags.
    pub fn restore_with(&mut self, images: &str, more: &[&str]) -> Result<(), String> {
        let (images, work) = (self.dir(images), self.dir(&format!("{images}.work")));
        let words: Vec<String> =
            [&self.bundle, &images, &work].iter().map(|p| p.to_string_lossy().into_owned()).collect();
        let words = [
            "restore",
            "--detach",
            "--bundle",
            &words[0],
            "--image-path",
            &words[1],
            "--work-path",
            &words[2],
        ];
        let mut flags = self.fixture.restore.clone();
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        if !self.place.exchange.as_os_str().is_empty() {
            // The fixtures use none of the instructions that one of the machines lacks.
            flags.extend(["--cpu-cap", "none"].map(str::to_owned));
        }
        self.launch(&words, &flags).map_err(|e| format!("{e}\n{}", tail(&work.join("restore.log"))))
    }

    /// Lets the fixture check itself.
    pub fn check(&mut self) -> Result<(), String> {
        let t = self.bundle.join("rootfs/t");
        fs::write(t.join("go"), "").map_err(|e| e.to_string())?;
        let verdict = self.wait_for(
            || match fs::read_to_string(t.join("result")) {
                Ok(result) => Ok(Some(result)),
                Err(_) if self.status() == "stopped" && !t.join("result").exists() => {
                    Ok(Some("it died".to_owned()))
                }
                Err(_) => Ok(None),
            },
            "the fixture's result",
        )?;
        if verdict == "ok" { Ok(()) } else { Err(format!("the fixture says: {verdict}")) }
    }

    /// Packs container and images for another machine.
    pub fn save(&self) -> Result<(), String> {
        let to = self.place.exchange.join(&self.fixture.name).with_extension("tar");
        tar(&["--xattrs", "-C", &self.home.to_string_lossy(), "-cf", &to.to_string_lossy(), "."])
    }

    /// Takes over what [`save`](Self::save) has packed elsewhere.
    pub fn load(&self) -> Result<(), String> {
        let from = self.place.exchange.join(&self.fixture.name).with_extension("tar");
        tar(&["--xattrs", "-C", &self.home.to_string_lossy(), "-xpf", &from.to_string_lossy()])
    }

    /// `status` as `state` prints it; empty when there is no such container.
    pub fn status(&self) -> String {
        let output = self.command(&["state", &self.id]).output();
        let state: Value =
            output.ok().and_then(|o| serde_json::from_slice(&o.stdout).ok()).unwrap_or_default();
        state["status"].as_str().unwrap_or_default().to_owned()
    }

    /// The container must not run any more: that's what a stopping checkpoint leaves.
    pub fn assert_gone(&self) -> Result<(), String> {
        match self.status().as_str() {
            "" | "stopped" => Ok(()),
            other => Err(format!("the container is {other} after a stopping checkpoint")),
        }
    }

    /// From now on everything is another: the bundle is a copy of what it is at this moment in another directory, its
    /// root file system lies elsewhere again, the id differs, and so does what the fixture's `elsewhere` says.
    pub fn move_elsewhere(&mut self) -> Result<Old, String> {
        let (copy, rootfs) = (self.home.join("bundle-copy"), self.home.join("roots/rootfs"));
        fs::create_dir_all(self.home.join("roots")).map_err(|e| e.to_string())?;
        let status =
            Command::new("cp").arg("-a").arg(&self.bundle).arg(&copy).status().map_err(|e| e.to_string())?;
        if !status.success() {
            return Err("cp -a of the bundle failed".to_owned());
        }
        fs::rename(copy.join("rootfs"), &rootfs).map_err(|e| format!("{}: {e}", rootfs.display()))?;
        std::os::unix::fs::symlink(&rootfs, copy.join("rootfs")).map_err(|e| e.to_string())?;
        let text = fs::read_to_string(copy.join("config.json")).map_err(|e| e.to_string())?;
        let mut config: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        config["root"]["path"] = json!(rootfs);
        for patch in &self.fixture.elsewhere {
            merge(&mut config, patch);
        }
        fs::write(copy.join("config.json"), config.to_string()).map_err(|e| e.to_string())?;
        let id = format!("{}-elsewhere", self.id);
        Ok((std::mem::replace(&mut self.bundle, copy), std::mem::replace(&mut self.id, id)))
    }

    /// Goes back to what [`move_elsewhere`](Self::move_elsewhere) has replaced, or on to it.
    pub fn swap(&mut self, old: Old) -> Old {
        (std::mem::replace(&mut self.bundle, old.0), std::mem::replace(&mut self.id, old.1))
    }

    /// Another runtime drives it from now on, and knows nothing of it yet.
    pub fn use_runtime(&mut self, path: &Path) {
        self.delete();
        self.runtime = path.to_owned();
    }

    /// `delete --force`, which succeeds when there is nothing to delete.
    pub fn delete(&self) {
        let _ = bounded(self.command(&["delete", "--force", &self.id]), Duration::from_secs(60));
    }

    /// A directory of this container's.
    pub fn dir(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    /// Commands run and everything printed, for the report of a failure.
    pub fn story(&self) -> String {
        let printed =
            self.printed.lock().map(|p| String::from_utf8_lossy(&p).into_owned()).unwrap_or_default();
        format!("{}{printed}", self.log)
    }

    fn wait_for<T>(&self, mut f: impl FnMut() -> Result<Option<T>, String>, what: &str) -> Result<T, String> {
        let end = Instant::now() + Duration::from_secs(self.fixture.timeout);
        loop {
            if let Some(value) = f()? {
                return Ok(value);
            }
            if Instant::now() > end {
                return Err(format!("no end to waiting for {what}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.delete();
    }
}

/// RFC 7386: objects merge, null deletes, everything else replaces.
fn tar(words: &[&str]) -> Result<(), String> {
    let output = Command::new("tar").args(words).output().map_err(|e| format!("tar: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("tar {words:?}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            into.as_object_mut().map(|o| o.remove(key));
        } else {
            merge(&mut into[key.as_str()], value);
        }
    }
}

/// Collects what comes out of a pipe until its last writer is gone.
fn drain(mut reader: PipeReader, into: Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = reader.read(&mut buffer) {
            if let Ok(mut all) = into.lock() {
                all.extend_from_slice(&buffer[..n]);
            }
        }
    })
}

/// Runs a command that must end in time; whether it succeeded, and what it printed.
fn bounded(mut command: Command, limit: Duration) -> Result<(bool, String), String> {
    let (reader, writer) = std::io::pipe().map_err(|e| e.to_string())?;
    let copy = writer.try_clone().map_err(|e| e.to_string())?;
    let text = format!("{command:?}");
    let mut child = command.stdout(writer).stderr(copy).spawn().map_err(|e| format!("{text}: {e}"))?;
    drop(command);
    let printed = Arc::new(Mutex::new(Vec::new()));
    let drained = drain(reader, Arc::clone(&printed));
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            break status;
        }
        if Instant::now() > end {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("{text} did not end in {limit:?} and was killed"));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    // What the command has left behind may hold its output open.
    let end = Instant::now() + Duration::from_secs(5);
    while !drained.is_finished() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    let printed = printed.lock().map(|p| String::from_utf8_lossy(&p).into_owned()).unwrap_or_default();
    Ok((status.success(), printed))
}

/// The errors and the last lines of a log, for a failure's report.
fn tail(path: &Path) -> String {
    let Ok(text) = fs::read_to_string(path) else { return String::new() };
    let lines: Vec<&str> = text.lines().collect();
    let (before, last) = lines.split_at(lines.len().saturating_sub(30));
    let errors = before.iter().filter(|line| line.contains("Error")).copied();
    let shown: Vec<&str> = errors.chain(last.iter().copied()).collect();
    format!("{}:\n{}", path.display(), shown.join("\n"))
}
