"""What a container costs that is never checkpointed: Stasis beside every other runtime found on PATH, each in turn.

Wall time is what a user waits; processor time, of the command and all that it waits for, is steadier on a busy machine.
"""
import os
import resource
import shutil
import statistics
import subprocess
import time

import harness
from harness import Container, config, sh

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PARALLEL = 50
# A launcher without memory of its own: what a process has before execve(2) counts as its peak, too.
PEAK = r"""
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    struct rusage used;
    int status;
    pid_t pid = vfork();
    if (pid == 0) {
        execv(argv[2], argv + 2);
        _exit(127);
    }
    wait4(pid, &status, 0, &used);
    FILE *out = fopen(argv[1], "w");
    fprintf(out, "%ld", used.ru_maxrss);
    fclose(out);
    return argc < 3 || status != 0;
}
"""
NOWHERE = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def used():
    """Processor time of all that was started here and has ended, in seconds."""
    u = resource.getrusage(resource.RUSAGE_CHILDREN)
    return u.ru_utime + u.ru_stime


class Life:
    """One runtime, and its containers."""

    def __init__(self, host, name, runtime):
        self.host, self.name, self.runtime = host, name, runtime
        self.true = self.container("true", ["true"])
        self.waiting = self.container("waiting", ["sleep", "100000"])
        self.rows, self.many = {}, []

    def container(self, label, args, root=None):
        root = root or self.host.overlay("busybox", f"{self.name}-{label}")
        c = Container(self.host, f"{self.name}-{label}", config(args, root=root))
        c.command = lambda *words: [self.runtime, "--root", str(self.host.dir / f"{self.name}.root"), *map(str, words)]
        return c

    def row(self, name, value):
        self.rows.setdefault(name, []).append(value)

    def timed(self, name, *commands):
        """Runs commands one after the other; a row of wall time and one of processor time, in ms."""
        before, began = used(), time.monotonic()
        for words in commands:
            harness.check(harness.ended(subprocess.Popen(words, **NOWHERE), 60) == 0, f"{words} fails")
        self.row(name, (time.monotonic() - began) * 1000)
        self.row(f"{name}, processor", (used() - before) * 1000)

    def round(self):
        c = self.true
        self.timed("run true", c.command("run", "--bundle", c.bundle, c.id))
        self.timed("create, start, delete", c.command("create", "--bundle", c.bundle, c.id), c.command("start", c.id),
                   c.command("delete", "--force", c.id))
        self.timed("exec true", c.command("exec", self.waiting.id, "true"))

    def crowd(self):
        """Many containers started at the same time."""
        if not self.many:
            root = self.host.overlay("busybox", f"{self.name}-crowd")
            self.many = [self.container(f"crowd{i}", ["sleep", "100000"], root) for i in range(PARALLEL)]
        began = time.monotonic()
        starts = [subprocess.Popen(c.command("run", "--detach", "--bundle", c.bundle, c.id), **NOWHERE) for c in self.many]
        failed = sum(p.wait() != 0 for p in starts)
        harness.check(not failed, f"{self.name}: {failed} of {PARALLEL} starts failed")
        self.row(f"{PARALLEL} starts at once", (time.monotonic() - began) * 1000)
        for c in self.many:
            c.delete()

    def sizes(self):
        """Peak memory of `create`, of whichever process had most; the program; and how many system calls a run takes."""
        c, out = self.true, self.host.dir / f"{self.name}.peak"
        words = c.command("create", "--bundle", c.bundle, c.id)
        subprocess.run([self.host.dir / "peak", out, shutil.which(words[0], path=PATH), *words[1:]], check=True, timeout=60, **NOWHERE)
        c.delete()
        self.row("peak memory of create, MB", int(out.read_text()) / 1000)
        self.row("program, MB", os.stat(self.runtime).st_size / 1e6)
        if strace := shutil.which("strace", path=PATH):
            counts = self.host.dir / f"{self.name}.calls"
            subprocess.run([strace, "-f", "-c", "-U", "calls,name", "-o", counts, *c.command("run", "--bundle", c.bundle, c.id)], check=True, timeout=60, **NOWHERE)
            total = next(line.split()[0] for line in counts.read_text().splitlines() if line.endswith(" total"))
            self.row("system calls of run true", int(total))


def contenders():
    """The runtimes: name and program, and why one is left out. crun refuses a hybrid of cgroup v1 and v2; there the v2
    tree, which limits nothing, is taken away from all of them, in our own mount namespace."""
    found = [("stasis", harness.RUNTIME)]
    for name in ("crun", "runc"):
        if program := shutil.which(name, path=PATH):
            found.append((name, program))
    unified = "/sys/fs/cgroup/unified"
    if any(name == "crun" for name, _ in found) and os.path.ismount(unified):
        sh("umount", unified)
        print("the v2 tree beside cgroup v1 is out of sight of all: crun doesn't start with it")
    return found


def lives(host, rounds=30):
    """All of it, and the table."""
    (host.dir / "peak.c").write_text(PEAK)
    sh("gcc", "-static", "-O2", "-o", host.dir / "peak", host.dir / "peak.c")
    them = [Life(host, name, program) for name, program in contenders()]
    for t in them:
        t.waiting.run()
        t.round()  # what is read for the first time
        t.rows.clear()
    for _ in range(rounds):
        for t in them:
            t.round()
    for _ in range(3):
        for t in them:
            t.crowd()
    for t in them:
        t.sizes()
    print(f"\nlife of a container, ms where nothing else is said, median of {rounds}")
    print(f"  {'':<34}" + "".join(f"{t.name:>10}" for t in them) + "".join(f"{'/ ' + t.name:>10}" for t in them[1:]))
    for name in them[0].rows:
        values = [statistics.median(t.rows[name]) for t in them]
        ratios = [f"{values[0] / v:>10.2f}" if v else f"{'-':>10}" for v in values[1:]]
        print(f"  {name:<34}" + "".join(f"{v:>10.1f}" for v in values) + "".join(ratios))
    for t in them:
        t.waiting.delete()
