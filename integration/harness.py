"""What the integration tests share: running commands, daemons, containers by hand, and cleaning up after them.

Nothing here needs more than Debian's python3. Everything a test makes is undone through `Host.undo`, newest first,
whether it passes or not; processes are ended by pid, and only those that were started here.
"""

import ctypes
import fcntl
import hashlib
import io
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time

TOP = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", TOP / "target"))
RUNTIME = os.environ.get("RUNTIME") or str(TARGET / "x86_64-unknown-linux-gnu/release/stasis")
# How many times longer things may take: a machine that is emulated is slow.
PATIENCE = int(os.environ.get("PATIENCE", "1"))


class Skip(Exception):
    """The test can't run here; the reason is shown."""


class Failed(Exception):
    """The test has found something wrong."""


def check(condition, message):
    if not condition:
        raise Failed(message)


def equal(got, expected, what):
    if got != expected:
        raise Failed(f"{what}: got {got!r}, expected {expected!r}")


def real_checkpoints():
    """Skips the test under a runtime that can't checkpoint on this machine (runc needs a criu that works)."""
    if os.path.basename(RUNTIME) in ("runc", "crun"):
        raise Skip(f"{os.path.basename(RUNTIME)} can't checkpoint here")


def need(*programs):
    for program in programs:
        if not shutil.which(program, path="/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"):
            raise Skip(f"{program} is not installed")


def sh(*command, ok=(0,), timeout=120, stdin=None, env=None, **more):
    """Runs a command to its end. Its output is returned, whole, as `.stdout` and `.stderr`; a status that is not
    in `ok` (None: any will do) fails the test with everything that was printed."""
    command = [str(c) for c in command]
    try:
        done = subprocess.run(command, input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
                              capture_output=True, text=True, timeout=timeout * PATIENCE, errors="replace",
                              env={**os.environ, **env} if env else None, **more)
    except subprocess.TimeoutExpired as late:
        raise Failed(f"$ {' '.join(command)}\ndid not end in {timeout} s\n{late.stdout or ''}{late.stderr or ''}") from None
    if ok is not None and done.returncode not in ok:
        raise Failed(f"$ {' '.join(command)}\nstatus {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def ended(process, timeout):
    """The status of a process, once it has ended. `Popen.wait(timeout)` looks only now and then, up to 50 ms late."""
    handle = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(timeout * PATIENCE * 1000):
            raise subprocess.TimeoutExpired(process.args, timeout * PATIENCE)
    finally:
        os.close(handle)
    return process.wait()


def until(condition, what, seconds=30):
    """Waits until `condition()` is true, and returns what it returned."""
    end = time.monotonic() + seconds * PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.01)


def process_state(pid):
    """The letter of a process's state, or nothing where there is no such process."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def running(pid):
    """Whether a process is there, and does not only wait for its parent."""
    return process_state(pid) not in ("", "Z", "X")


def rootfs(name):
    """The directory of a root file system, made on first use. NAME.tar lies beside it."""
    done = sh(TOP / "integration/rootfs", name, ok=(0, 3), timeout=900)
    if done.returncode == 3:
        raise Skip(f"the Debian packages of {name} can't be fetched here: {done.stderr.strip().splitlines()[-1:]}")
    return pathlib.Path(done.stdout.split()[-1])


def program(name, to=None):
    """A program of programs/NAME.c, made on first use and after each change, and a copy of it at `to`."""
    source, made = TOP / f"integration/programs/{name}.c", TARGET / "programs" / name
    mark = made.with_suffix(".sha256")
    sum = hashlib.sha256(source.read_bytes()).hexdigest()
    if not mark.exists() or mark.read_text() != sum:
        need("gcc")
        made.parent.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}")
        sh("gcc", "-static", "-O2", "-Wall", "-pthread", "-o", new, source)
        os.replace(new, made)
        mark.write_text(sum)
    return shutil.copy(made, to) if to else made


class Host:
    """One test's share of the machine: a directory, and a list of what to undo."""

    def __init__(self, name):
        self.name = name
        self.id = f"{name}-{os.getpid()}"
        self.dir = TARGET / "integration" / self.id
        self.dir.mkdir(parents=True)
        self.undo = []

    def close(self, keep):
        for step in reversed(self.undo):
            try:
                step()
            except Exception as e:  # the rest has to be undone too
                print(f"        (cleaning up: {e})")
        if not keep:
            shutil.rmtree(self.dir, ignore_errors=True)

    def overlay(self, name, label):
        """A writable root file system over the cached one."""
        base = self.dir / label
        for d in ("upper", "work", "rootfs"):
            (base / d).mkdir(parents=True, exist_ok=True)
        options = f"lowerdir={rootfs(name)},upperdir={base}/upper,workdir={base}/work"
        sh("mount", "-t", "overlay", "overlay", "-o", options, base / "rootfs")
        self.undo.append(lambda: sh("umount", "-l", base / "rootfs"))
        return base / "rootfs"

    def daemon(self, *command, log, env=None):
        """Starts a daemon that is ended, by its pid, when the test is over."""
        with open(log, "wb") as out:
            process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                       start_new_session=True, env={**os.environ, **env} if env else None)

        def end():
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        self.undo.append(end)
        process.end = end
        return process


BASE_CAPS = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
             "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
             "CAP_AUDIT_WRITE"]


def config(args, root="rootfs", tty=False, mounts=(), env=(), user=(0, 0), cwd="/"):
    """A config.json like the ones Docker writes, without its seccomp profile."""
    def mount(where, kind, source, *options):
        return {"destination": where, "type": kind, "source": source, "options": list(options)}

    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": tty,
            "user": {"uid": user[0], "gid": user[1]},
            "args": [str(a) for a in args],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm", *env],
            "cwd": cwd,
            "capabilities": {k: list(BASE_CAPS) for k in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": "stasis",
        "mounts": [
            mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
            mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
            mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
            mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
            *mounts,
        ],
        "linux": {
            "namespaces": [{"type": n} for n in ("pid", "network", "ipc", "uts", "mount")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


class Container:
    """A container driven by hand, through the runtime's command line."""

    def __init__(self, host, label, spec, output="file", store="root"):
        self.host, self.id, self.store = host, f"{host.id}-{label}", host.dir / store
        self.bundle = host.dir / f"{label}.bundle"
        self.bundle.mkdir()
        self.spec = spec
        (self.bundle / "config.json").write_text(json.dumps(spec, indent=1))
        self.output = output
        self.log = host.dir / f"{label}.log"
        self.printed = bytearray()
        self.master = None
        self.readers = []
        host.undo.append(self.delete)

    def command(self, *words):
        return [RUNTIME, "--root", str(self.store), *map(str, words)]

    def call(self, *words, **how):
        return sh(*self.command(*words), **how)

    def _launch(self, *words, ok=(0,)):
        """`run -d` and `restore -d`: the container keeps the output that the command was given."""
        self.drained()
        words = list(words)
        listener = None
        if self.spec["process"]["terminal"]:
            path = f"/tmp/stasis-tty-{os.getpid()}-{len(self.id)}.sock"  # short: sun_path is
            if os.path.exists(path):
                os.unlink(path)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(1)
            listener.settimeout(60)
            words += ["--console-socket", path]
        errors = self.host.dir / f"{self.id}.stderr"
        nowhere = lambda: open("/dev/null", "wb")  # noqa: E731
        out = {"file": lambda: open(self.log, "ab"), "null": nowhere, "none": nowhere, "pipe": self._pipe}[self.output]()
        with open(errors, "wb") as e, out:
            process = subprocess.Popen(self.command(*words, self.id), stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=e if self.output == "null" else out)
            try:
                status = ended(process, 120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = "none: it hung"
        try:
            if ok is not None and status not in ok:
                raise Failed(f"$ {' '.join(self.command(*words, self.id))}\nstatus {status}\n{errors.read_text()}{self.text()}")
            if listener and status == 0:
                connection, _ = listener.accept()
                _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
                connection.close()
                self._read(fds[0])
                self.master = fds[0]
        finally:
            if listener:
                listener.close()
                os.unlink(path)
        return status

    def _pipe(self):
        r, w = os.pipe()
        self._read(r)
        return os.fdopen(w, "wb")

    def _read(self, fd):
        def drain():
            try:
                while data := os.read(fd, 65536):
                    self.printed += data
            except OSError:
                pass  # EIO: the terminal's last user is gone

        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        self.readers.append(reader)

    def drained(self):
        """Waits until all is read that a container has printed which is gone: what one that is restored prints comes behind it."""
        end = time.monotonic() + 10 * PATIENCE
        while self.readers:
            self.readers.pop().join(max(0, end - time.monotonic()))

    def run(self, **how):
        return self._launch("run", "--detach", "--bundle", self.bundle, "--pid-file", self.host.dir / f"{self.id}.pid", **how)

    def checkpoint(self, name, *flags, ok=(0,), **how):
        work = self.host.dir / f"{name}.work"
        began = time.monotonic()
        done = self.call("checkpoint", "--image-path", self.host.dir / name, "--work-path", work, *flags, self.id,
                         ok=None, **how)
        if ok is not None and done.returncode not in ok:
            raise Failed(f"checkpoint: status {done.returncode}\n{done.stdout}{done.stderr}{tail(work / 'dump.log')}")
        done.seconds = time.monotonic() - began
        return done

    def restore(self, name, *flags, **how):
        work = self.host.dir / f"{name}.work"
        began = time.monotonic()
        try:
            self._launch("restore", "--detach", "--bundle", self.bundle, "--image-path", self.host.dir / name,
                         "--work-path", work, "--pid-file", self.host.dir / f"{self.id}.pid", *flags, **how)
        except Failed as e:
            raise Failed(f"{e}\n{tail(work / 'restore.log')}") from None
        return time.monotonic() - began

    def exec(self, *command, **how):
        return self.call("exec", self.id, *command, **how)

    def state(self):
        done = self.call("state", self.id, ok=None)
        return json.loads(done.stdout)["status"] if done.returncode == 0 else ""

    def pid(self):
        return json.loads(self.call("state", self.id).stdout)["pid"]

    def receive(self, *more):
        """The other side, listening; its address."""
        out = open(self.host.dir / f"{self.id}.receive", "w+")
        process = subprocess.Popen(self.command("receive", "--listen", "127.0.0.1:0", "--bundle", self.bundle, *more, self.id),
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.host.undo.append(lambda: process.poll() is None and process.kill())

        def address():
            text = (self.host.dir / f"{self.id}.receive").read_text()
            check(process.poll() is None, f"receive has ended: {text}")
            return text.split()[2] if text.endswith("\n") else ""

        return process, until(address, "the other side listens")

    def delete(self):
        self.call("delete", "--force", self.id, ok=None)
        if self.master is not None:
            os.close(self.master)
            self.master = None

    def text(self):
        if self.output == "file" and not self.spec["process"]["terminal"]:
            return self.log.read_text(errors="replace") if self.log.exists() else ""
        return self.printed.decode(errors="replace")

    def lines(self):
        """What has been printed, in lines that have come to their end."""
        return self.text().rpartition("\n")[0].splitlines()

    def type(self, keys):
        os.write(self.master, keys.encode())


def tail(path, lines=25):
    try:
        text = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return f"{path}:\n" + "\n".join(text[-lines:]) + "\n"


def image_size(directory):
    return sum(f.stat().st_size for f in pathlib.Path(directory).rglob("*") if f.is_file())


class Redis:
    """Just enough of redis' protocol, over its unix socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        # A unix socket's path may have 107 bytes; the build directory's alone may have more.
        directory = os.open(os.path.dirname(path), os.O_PATH)
        try:
            self.socket.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        finally:
            os.close(directory)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Until redis has closed its end, that one is a socket of this side's network namespace, which no checkpoint keeps."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
            while self.file.read(65536):
                pass
        except OSError:
            pass  # it is gone altogether
        self.file.close()
        self.socket.close()

    @staticmethod
    def _encode(words):
        out = [b"*%d\r\n" % len(words)]
        for word in words:
            word = str(word).encode()
            out.append(b"$%d\r\n%s\r\n" % (len(word), word))
        return b"".join(out)

    def _answer(self):
        line = self.file.readline()
        kind, rest = line[:1], line[1:].strip()
        if kind == b"-":
            raise Failed(f"redis says {rest.decode()}")
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return [self._answer() for _ in range(int(rest))]
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest.decode()
        raise Failed(f"redis has hung up: {line!r}")

    def __call__(self, *words):
        self.socket.sendall(self._encode(words))
        return self._answer()

    def many(self, commands):
        """Sends all, then reads all the answers."""
        commands = list(commands)
        data = b"".join(self._encode(c) for c in commands)
        sender = threading.Thread(target=self.socket.sendall, args=(data,))
        sender.start()
        answers = [self._answer() for _ in commands]
        sender.join()
        return answers


class Screen:
    """What somebody sees and types who has the master of a terminal."""

    def __init__(self, host, master, what):
        self.master, self.what = master, what
        self.printed, self.seen, self.over = bytearray(), 0, False
        host.undo.append(self.close)
        threading.Thread(target=self._drain, args=(os.dup(self.master),), daemon=True).start()

    def _drain(self, fd):
        try:
            while data := os.read(fd, 65536):
                self.printed += data
        except OSError:
            pass  # EIO: nobody has the other end any more
        self.over = True

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys):
        os.write(self.master, keys.encode())

    def expect(self, pattern, seconds=30):
        """Waits until that is printed, after what was expected last."""
        def found():
            return re.compile(pattern.encode()).search(self.printed, self.seen)

        try:
            match = until(found, pattern, seconds)
        except Failed as e:
            raise Failed(f"{e}\n{self.what}\n{self.text()}") from None
        self.seen = match.end()
        return match

    def text(self):
        return self.printed.decode(errors="replace")

    def close(self):
        if self.master is not None:
            os.close(self.master)
            self.master = None


class Terminal(Screen):
    """A command whose terminal somebody sits at."""

    def __init__(self, host, *command, env=None, size=(24, 80)):
        master, slave = os.openpty()
        self.command = [str(c) for c in command]
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))

        def sit():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup nobody could trap it

        self.process = subprocess.Popen(self.command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=sit,
                                        env={**os.environ, **env} if env else None)
        os.close(slave)
        super().__init__(host, master, f"$ {' '.join(self.command)}")

    def ends(self, status=0):
        """Waits for the end, with that status; None: any will do."""
        try:
            self.process.wait(30 * PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.what}\ndid not end\n{self.text()}") from None
        check(status in (None, self.process.returncode), f"{self.what}\nstatus {self.process.returncode}, not {status}\n{self.text()}")

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        super().close()


class Consoles:
    """A socket that terminals are sent to, as --console-socket and --exec-console-socket do."""

    def __init__(self, host, label):
        self.host, self.path = host, f"/tmp/stasis-{label}-{os.getpid()}.sock"  # short: sun_path is
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(16)
        self.listener.settimeout(60)
        host.undo.append(self.close)

    def next(self):
        """Path of the slave, and the screen."""
        connection, _ = self.listener.accept()
        name, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        connection.close()
        return name.decode(), Screen(self.host, fds[0], name.decode())

    def close(self):
        self.listener.close()
        if os.path.exists(self.path):
            os.unlink(self.path)


def session(terminal, status=7, resize=True):
    """What a shell with a terminal does in every container: what is typed arrives, a signal, a size that changes."""
    # The echo of what is typed must not be taken for the answer.
    terminal.type("echo a$((40 + 2))b; test -t 0 && test -t 1 && test -t 2 && echo t$((1 + 1))y\n")
    terminal.expect("a42b")
    terminal.expect("t2y")
    if resize:
        window(terminal)
    # It has been given the terminal when it prints.
    terminal.type("sh -c 'echo s$((3 + 4))p; exec sleep 1000'; echo c$((1 + 2))d\n")
    terminal.expect("s7p")
    terminal.type("\x03")
    terminal.expect("[#$] ")  # what is typed earlier may be thrown away
    terminal.type("echo i$((2 + 3))t\n")
    terminal.expect("i5t")
    terminal.type("exit 7\n")
    terminal.ends(status)


def window(terminal):
    """A new size arrives in the container."""
    terminal.resize(33, 99)
    # Again and again: a client that has just begun may not listen yet.
    for _ in range(100):
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.type("stty size\n")
        # The signal may come when stty already runs, and interrupt it.
        if terminal.expect(r"\n(\d+ \d+)\r+\n|Interrupted system call")[1] == b"33 99":
            return
        time.sleep(0.05)
    raise Failed(f"the new size has not arrived\n{terminal.text()}")


def own_mounts():
    """Mounts that a failing test leaves behind go away with this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        sys.exit(f"a mount namespace of our own: {os.strerror(ctypes.get_errno())}")


def loopback():
    """Migrations go over it, and a machine may have it switched off."""
    subprocess.run(["ip", "link", "set", "lo", "up"], stderr=subprocess.DEVNULL)


def forward_signals():
    """Ctrl-C and `kill` end the run in an orderly way."""
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    # A shell starts what it runs in the background with these ignored, which containers would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def oci_archive(name, tag="test", command=("/bin/sh",)):
    """The root file system NAME as an OCI image in a tar, for programs that import nothing else. Made once."""
    source, archive = pathlib.Path(f"{rootfs(name)}.tar"), pathlib.Path(f"{rootfs(name)}.{tag}.oci.tar")
    if archive.exists() and archive.stat().st_mtime >= source.stat().st_mtime:
        return archive
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    blobs = {}

    def blob(value):
        data = json.dumps(value).encode()
        key = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{key}"] = data
        return {"digest": f"sha256:{key}", "size": len(data)}

    settings = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": list(command)}
    image = blob({"architecture": "amd64", "os": "linux", "config": settings,
                  "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}})
    manifest = blob({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **image},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{digest}",
                    "size": source.stat().st_size}]})
    index = {"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", **manifest,
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {"io.containerd.image.name": f"localhost/{name}:{tag}", "org.opencontainers.image.ref.name": tag}}]}
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    blobs["index.json"] = json.dumps(index).encode()
    new = f"{archive}.{os.getpid()}"
    with tarfile.open(new, "w") as tar:
        for path, data in blobs.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        tar.add(source, f"blobs/sha256/{digest}")
    os.rename(new, archive)
    return archive


def remove_cgroup(name):
    """Removes the control groups called `name` at the top of each hierarchy, emptied by now, and those below them."""
    for top in pathlib.Path("/sys/fs/cgroup").iterdir():
        if (top / name).is_dir():
            for directory, _, _ in os.walk(top / name, topdown=False):
                try:
                    os.rmdir(directory)
                except OSError:
                    pass  # somebody is still in it: then it isn't ours to remove
