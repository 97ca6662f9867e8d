"""A root file system whose owner exchanges paths, over and over, while containers start in it.

```text
   Swap ── renameat2(A, B, RENAME_EXCHANGE), thousands of times a second ──> what the runtime has looked at is gone
```

Each start works, and then everything is where config.json says, or it fails. Nothing outside is ever touched. Classes and
defences: docs/security.md.
"""

import ctypes
import os
import re
import shutil
import threading

from harness import TOP, Container, Skip, check, config, equal, until

ROUNDS = 12
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class Swap:
    """Exchanges two paths until it is left."""

    def __init__(self, root, *pairs):
        self.pairs = [(os.fsencode(f"{root}/{a}"), os.fsencode(f"{root}/{b}")) for a, b in pairs]
        self.over, self.done = threading.Event(), 0
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self):
        libc = ctypes.CDLL(None, use_errno=True)
        while not self.over.is_set():
            for a, b in self.pairs:
                self.done += libc.renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


class Come(Swap):
    """A link that comes and goes. What has been made in its place meanwhile is put away."""

    def __init__(self, root, path, target):
        super().__init__(root)
        self.path, self.target, self.away = f"{root}/{path}", str(target), f"{root}/away-from-{os.path.basename(path)}"
        os.mkdir(self.away)

    def _work(self):
        number = 0
        while not self.over.is_set():
            try:
                os.symlink(self.target, self.path)
                self.done += 1
                os.unlink(self.path)
            except OSError:  # somebody was faster
                number += 1
                try:
                    os.rename(self.path, f"{self.away}/{number}")
                except FileNotFoundError:
                    pass


class Hostile:
    """A container's root file system, a directory outside that nothing may be made in, and many starts."""

    def __init__(self, host, script, tty=False):
        self.host = host
        self.root = host.overlay("busybox", "c")
        self.spec = config(("sh", "-c", script), root=self.root, tty=tty)
        self.victim = host.dir / "victim"
        self.victim.mkdir()
        (self.victim / "file").write_text("untouched")
        self.runs = 0

    def without(self, *destinations):
        self.spec["mounts"] = [m for m in self.spec["mounts"] if m["destination"] not in destinations]

    def link(self, name, target):
        os.symlink(target, self.root / name)

    def own(self, name):
        """A directory that can be renamed: an overlay keeps those of its lower layer where they are."""
        shutil.rmtree(self.root / name)
        (self.root / name).mkdir()

    def starts(self, *pairs, holds):
        """`holds` gets what a container printed that did start."""
        self.runs += 1
        c = Container(self.host, f"c{self.runs}", self.spec)
        with Swap(self.root, *pairs) as swap:
            for _ in range(ROUNDS):
                done = c.call("run", "--bundle", c.bundle, c.id, stdin="", ok=None)
                if done.returncode == 0:
                    holds(done.stdout)
                else:
                    check("panicked" not in done.stderr, done.stderr)
                self.untouched()
        check(swap.done > 50, f"only {swap.done} exchanges: that is no race")

    def untouched(self):
        equal(os.listdir(self.victim), ["file"], "what is in the directory outside")
        equal((self.victim / "file").read_text(), "untouched", "a file outside")

    def calm(self):
        """Without anybody who exchanges anything it does start: only then do the other starts say something."""
        c = Container(self.host, "calm", self.spec)
        return c.call("run", "--bundle", c.bundle, c.id, stdin="").stdout


def mounts(text):
    """What /proc/self/mountinfo says: root, point and type of each."""
    return [(f[3], f[4], f[f.index("-") + 1]) for f in (line.split() for line in text.splitlines()) if "-" in f]


def test_proc(host):
    """/proc, and what sysctls and labels are written to (CVE-2019-16884, CVE-2023-27561, CVE-2025-52881)."""
    h = Hostile(host, "cat /proc/sys/kernel/shmmax /proc/self/mountinfo")
    h.spec["linux"]["sysctl"] = {"kernel.shmmax": "1234567"}
    fake = h.root / "fake"
    (fake / "sys/kernel").mkdir(parents=True)
    (fake / "sys/kernel/shmmax").write_text("fake")
    h.link("link", "/fake")
    h.link("out", h.victim)
    h.own("proc")

    def holds(text):
        # The program's own /proc may have been exchanged since: then there is nothing that it could say.
        if text.startswith("fake"):
            return
        equal(text.split()[0], "1234567", "the sysctl")
        # A mount goes along with its directory when that is renamed.
        names = {"proc", "link", "out", "fake", *h.victim.parts[1:2]}
        points = {point for _, point, kind in mounts(text) if kind == "proc"}
        equal({point for point in points if point.split("/")[1] not in names}, set(), "where a procfs is")

    holds(h.calm())
    h.starts(("proc", "link"), ("proc", "out"), holds=holds)
    equal((fake / "sys/kernel/shmmax").read_text(), "fake", "a false sysctl")


def test_dev(host):
    """/dev as a link that comes and goes (CVE-2026-41579): devices, links and ptmx are made inside or not at all."""
    h = Hostile(host, "cat /proc/self/mountinfo")
    h.without("/dev/pts", "/dev/shm", "/dev/mqueue")
    h.link("out", h.victim)
    h.link("inside", "/tmp")
    h.own("dev")
    # A link that leads out is followed inside the root file system: there, a directory of that name is not the victim.
    # And a mount goes along with its directory when that is renamed.
    places = {"/dev", "/out", "/inside", "/tmp", "/sys/fs/cgroup", str(h.victim), *h.spec["linux"]["maskedPaths"]}
    holds = lambda text: check({p for _, p, k in mounts(text) if k == "tmpfs"} <= places, text)  # noqa: E731
    holds(h.calm())
    h.starts(("dev", "inside"), ("dev", "out"), holds=holds)
    # And one that is the image's own, where devices are made on the disk.
    h.without("/dev")
    h.starts(("dev", "out"), ("dev", "inside"), holds=lambda text: None)


def test_null(host):
    """/dev/null, which masks paths, is exchanged for a link to a file of procfs (CVE-2025-31133)."""
    # Many of them, so that there is a while between the first and the last.
    masked = [f"/masked/{n}" for n in range(400)]
    h = Hostile(host, "stat -c '%t %T' /proc/keys /proc/timer_list /masked/*")
    h.without("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")
    (h.root / "masked").mkdir()
    for path in masked:
        (h.root / path[1:]).touch()
    h.spec["linux"]["maskedPaths"] = ["/proc/keys", "/proc/timer_list", *masked]
    h.link("trigger", "/proc/version")
    h.link("out", h.victim / "file")
    holds = lambda text: equal(text, "1 3\n" * (len(masked) + 2), "what masks the paths")  # noqa: E731
    holds(h.calm())
    h.starts(("dev/null", "trigger"), holds=holds)
    h.starts(("dev/null", "out"), holds=holds)


def test_masked(host):
    """The directory above a masked and a read-only path is exchanged for a link."""
    h = Hostile(host, "cat /proc/self/mountinfo")
    (h.root / "a/b").mkdir(parents=True)
    (h.root / "a/secret").write_text("x")
    h.link("out", h.victim)
    h.link("sys-link", "/proc/sys")
    h.spec["linux"]["maskedPaths"] = ["/a/secret", "/a/file"]
    h.spec["linux"]["readonlyPaths"] = ["/a/b", "/proc/sys"]
    h.calm()
    h.starts(("a", "out"), ("a", "sys-link"), holds=lambda text: check(str(h.victim) not in text, text))


def test_devices(host):
    """A device of config.json, and a bind mount, whose directory is exchanged for a link (CVE-2021-30465, CVE-2024-45310)."""
    h = Hostile(host, "cat /proc/self/mountinfo")
    os.mkdir(h.root / "made")
    h.link("out", h.victim)
    h.link("up", "../../../../../../../../../.." + str(h.victim))
    h.spec["linux"]["devices"] = [{"path": "/made/deep/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666}]
    source = host.dir / "source"
    source.mkdir()
    h.spec["mounts"].append({"destination": "/made/x/y/z", "type": "bind", "source": str(source), "options": ["rbind", "ro"]})
    h.calm()
    h.starts(("made", "out"), ("made", "up"), holds=lambda text: None)


def test_appearing_links(host):
    """A link out appears where a directory, a file or a device is just being made (CVE-2024-45310, CVE-2021-30465)."""
    h = Hostile(host, "true")
    os.mkdir(h.root / "made")
    source = host.dir / "source"
    source.mkdir()
    (source / "file").touch()
    h.spec["linux"]["devices"] = [{"path": "/made/deep/null", "type": "c", "major": 1, "minor": 3}, {"path": "/made/null", "type": "c", "major": 1, "minor": 3}]
    h.spec["mounts"] += [{"destination": "/made/x/y/z", "type": "bind", "source": str(source), "options": ["rbind"]},
                         {"destination": "/made/file", "type": "bind", "source": str(source / "file"), "options": ["bind"]}]
    h.calm()
    for at, (path, target) in enumerate([("deep", h.victim), ("null", h.victim / "new"), ("x", h.victim), ("file", h.victim / "new")]):
        shutil.rmtree(h.root / "made")
        os.mkdir(h.root / "made")
        c = Container(host, f"c{at}", h.spec)
        with Come(h.root, f"made/{path}", target) as come:
            for _ in range(ROUNDS):
                c.call("run", "--bundle", c.bundle, c.id, stdin="", ok=None)
                h.untouched()
        check(come.done > 50, f"only {come.done} links: that is no race")


def test_working_directory(host):
    """The working directory is exchanged for a link to a descriptor (CVE-2024-21626)."""
    h = Hostile(host, "pwd; cat ../../../../../../etc/hostname 2>/dev/null; true")
    os.mkdir(h.root / "work")
    # The image has a host name of its own, which is not ours.
    (h.root / "etc/hostname").write_text("inside\n")
    h.spec["process"]["cwd"] = "/work"
    ours = open("/etc/hostname").read().strip() if os.path.exists("/etc/hostname") else "?"
    h.calm()
    for number in range(6, 10):
        h.link(f"fd{number}", f"/proc/self/fd/{number}")
    h.starts(*[("work", f"fd{number}") for number in range(6, 10)], holds=lambda text: check(ours not in text.split(), text))


def test_console(host):
    """/dev/console and /dev/pts are exchanged for links (CVE-2025-52565): the terminal covers no other file."""
    h = Hostile(host, "cat /proc/self/mountinfo; echo over; exec sleep 1000", tty=True)
    h.without("/dev", "/dev/shm", "/dev/mqueue")
    # Not every kernel has /proc/sysrq-trigger, and a link that leads nowhere is no danger.
    h.link("trigger", "/proc/version")
    h.link("out", h.victim / "file")
    (h.root / "dev/console").touch()
    worked = 0
    with Swap(h.root, ("dev/console", "trigger"), ("dev/console", "out")) as swap:
        for n in range(ROUNDS):
            c = Container(host, f"c{n}", h.spec)
            if c.run(ok=None) == 0:
                worked += 1
                until(lambda c=c: "\nover\r\n" in c.text() or c.state() == "stopped", "the program to say where its mounts are")
                for root, point, kind in mounts(c.text().replace("\r", "")):
                    # What is covered may have been renamed since.
                    check(kind != "devpts" or point in ("/dev/pts", "/dev/console", "/trigger", "/out"), f"a terminal at {point}: {root}")
            c.delete()
            h.untouched()
    check(swap.done > 50, f"only {swap.done} exchanges: that is no race")
    check(worked, "none of them started")
    # What is no terminal at all is not handed out as one.
    h.without("/dev/pts")
    (h.root / "dev/pts").mkdir(exist_ok=True)
    (h.root / "dev/pts/ptmx").write_text("false")
    c = Container(host, "false", h.spec)
    c.run(ok=[1])
    check("is not a terminal of a devpts" in c.log.read_text(), c.log.read_text())


def test_user_files(host):
    """/etc/passwd, read for HOME, is exchanged for a fifo and for a device: no start or exec waits for anybody."""
    h = Hostile(host, "echo $HOME; exec sleep 1000")
    os.mkfifo(h.root / "fifo")
    h.link("zero", "/dev/zero")
    (h.root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    c = Container(host, "c", h.spec)
    c.run()
    with Swap(h.root, ("etc/passwd", "fifo"), ("etc/passwd", "zero")):
        for _ in range(ROUNDS):
            done = c.call("exec", c.id, "sh", "-c", "echo $HOME", ok=None)
            check(done.stdout.strip() in ("/root", "/") or done.returncode != 0, f"HOME: {done.stdout}")
    # What a fifo says to whoever does read it, and what lies beyond all that is read of a file.
    (h.root / "etc/passwd").unlink()
    os.mkfifo(h.root / "etc/passwd")
    writer = os.open(h.root / "etc/passwd", os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, b"root:x:0:0:root:/evil:/bin/sh\n")
    equal(c.exec("sh", "-c", "echo $HOME").stdout, "/\n", "HOME by a fifo")
    os.close(writer)
    (h.root / "etc/passwd").unlink()
    with open(h.root / "etc/passwd", "wb") as large:
        large.seek(20 << 20)
        large.write(b"\nroot:x:0:0:root:/late:/bin/sh\n")
    equal(c.exec("sh", "-c", "echo $HOME").stdout, "/\n", "HOME from far away")


def test_documentation(host):
    """Every test that docs/security.md names is there."""
    text = TOP / "docs/security.md"
    if not text.exists():
        raise Skip("the documentation is not here")
    sources = "\n".join(path.read_text() for path in (TOP / "src").rglob("*.rs"))
    named = re.findall(r"`([a-z_0-9/:]+)`", "\n".join(line.rsplit("|", 2)[1] for line in text.read_text().splitlines() if line.startswith("| ")))
    check(len(named) > 30, f"{named}")
    for name in named:
        module, _, test = name.partition("/")
        if (TOP / f"integration/{module}.py").exists():
            script = (TOP / f"integration/{module}.py").read_text()
            check(f"def test_{test}" in script, f"{name} is no test")
        elif "::" in name:
            check(list((TOP / "src").rglob(f"{name.split('::')[-2]}.rs")), f"{name} is no file with tests")
        elif test == "" and "_" in name and not name.endswith("_"):
            check(f"fn {name}()" in sources, f"{name} is no test")
