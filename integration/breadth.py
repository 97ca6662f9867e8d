"""What many processes, threads, mappings and descriptors cost: Stasis beside runc with CRIU, each in turn.

The least of some rounds counts, for a disturbance only adds. What the machine does not allow (processes, descriptors,
mappings of one process), and what a runtime cannot do, is said aloud and left out.
"""
import itertools
import os
import resource
import shutil
import time

import harness
from chart import chart
from harness import Container, Failed, config, sh, until
from statistics_file import freeze_ms

MANY = r"""
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
static void *wait_forever(void *none)
{
    for (;;)
        pause();
}
int main(int argc, char **argv)
{
    long n = atol(argv[2]);
    struct rlimit limit;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (strcmp(argv[1], "threads") == 0) {
        pthread_t t;
        while (--n > 0)
            if (pthread_create(&t, &small, wait_forever, NULL))
                return 2;
    } else if (strcmp(argv[1], "processes") == 0) {
        while (--n > 0)
            switch (fork()) {
            case -1: return 2;
            case 0: wait_forever(NULL);
            }
    } else if (strcmp(argv[1], "descriptors") == 0) {
        while (n-- > 0)
            if (open("/program", O_RDONLY) < 0)
                return 2;
    } else {
        char *at = mmap(NULL, n * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (long i = 0; i < n; i += 2)
            if (mprotect(at + i * 4096, 4096, PROT_READ | PROT_WRITE))
                return 2;
    }
    if (creat("/filled", 0644) < 0)
        return 1;
    for (;;)
        pause();
}
"""
SIZES = {"processes": (10, 100), "threads": (50, 500, 10000), "mappings": (300, 3000, 30000, 100000),
         "descriptors": (100, 1000, 10000, 100000)}
COLUMNS = ("standing still", "checkpoint", "restore")
PATIENCE = 300


def number(path):
    try:
        with open(path) as file:
            text = file.read().strip()
        return int(text) if text != "max" else 1 << 62
    except OSError:
        return 1 << 62


def room(kind):
    """How many the machine allows, roughly."""
    if kind == "descriptors":
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100
    if kind == "mappings":
        return number("/proc/sys/vm/max_map_count") - 100
    tops = [line.split(":")[2].strip() for line in open("/proc/self/cgroup") if ":pids:" in line or line.startswith("0:")]
    groups = [f"/sys/fs/cgroup{mount}{top}/pids.max" for top in tops for mount in ("", "/pids")]
    return min(map(number, ["/proc/sys/kernel/pid_max", *groups])) - 1000


class Many:
    """One program with many of a kind, under one runtime."""

    def __init__(self, host, name, runtime, kind, count):
        label = f"{name}-{kind}-{count}"
        root = host.overlay("busybox", label)
        shutil.copy(host.dir / "many", root / "program")
        spec = config(["/program", kind, str(count)], root=root)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": min(hard, 1024), "hard": hard}]
        self.name, self.host, self.sets = name, host, itertools.count()
        self.c = Container(host, label, spec, output="none")
        self.c.command = lambda *words: [runtime, "--root", str(host.dir / f"{name}.root"), *map(str, words)]
        self.c.run()
        until((root / "filled").exists, f"{label}: the program", 60)

    def round(self):
        """Milliseconds: standing still in a checkpoint that leaves it running, a checkpoint that stops it, a restore."""
        # Each in a directory of its own, which stays until the end: for some seconds ext4 searches long for the number of a
        # new file where many have just been removed.
        first, images = (self.host.dir / f"{self.c.id}.images{next(self.sets)}" for _ in range(2))
        self.c.checkpoint(first.name, "--leave-running", timeout=PATIENCE)
        freeze = freeze_ms(self.host.dir / f"{first.name}.work", first)
        stop = self.c.checkpoint(images.name, timeout=PATIENCE).seconds * 1000
        deadline = time.monotonic() + 10
        while self.c.state() not in ("", "stopped") and time.monotonic() < deadline:
            time.sleep(0.01)
        self.c.call("delete", "--force", self.c.id, ok=None)
        return freeze, stop, self.c.restore(images.name) * 1000


def measure(host, kind, count, runtimes, rounds):
    """By runtime, the least of each column; None for one that cannot do it."""
    them, rows = [], {}
    for name, runtime in runtimes:
        try:
            them.append(Many(host, name, runtime, kind, count))
        except Failed as e:
            print(f"  {count} {kind}: {name} cannot run it: {str(e).splitlines()[0]}")
    for _ in range(rounds):
        for t in list(them):
            try:
                rows.setdefault(t.name, []).append(t.round())
            except Failed as e:
                lines = [line for line in str(e).splitlines() if line.strip()]
                why = next((line for line in lines if "Error" in line), lines[0] if lines else "")
                print(f"  {count} {kind}: {t.name} cannot do it: {why.strip()[:150]}")
                them.remove(t)
                t.c.call("delete", "--force", t.c.id, ok=None)
    for t in them:
        t.c.delete()
    return {name: [min(r[i] for r in found if r[i] is not None) for i in range(3)] for name, found in rows.items()}


def breadth(host, why, rounds=3, most=None):
    """All kinds and sizes, at most `most` of each; a table, and a chart for each kind."""
    (host.dir / "many.c").write_text(MANY)
    sh("gcc", "-static", "-pthread", "-O2", "-o", host.dir / "many", host.dir / "many.c")
    runtimes = [("stasis", harness.RUNTIME)] + ([] if why else [("runc", shutil.which("runc"))])
    print(f"\nbreadth, ms: {', '.join(COLUMNS)}; the least of {rounds}")
    for kind, sizes in SIZES.items():
        series, allowed = {}, min(room(kind), most or 1 << 62)
        for count in sizes:
            if count > allowed:
                print(f"  {count} {kind}: SKIPPED, {allowed} is the most here")
                continue
            found = measure(host, kind, count, runtimes, rounds if count < 10000 else 1)
            cells = "".join(f"{name:>10}" + "".join(f"{v:>10.1f}" for v in row) for name, row in found.items())
            ratio = ""
            if len(found) == 2:
                ratio = f"{'ratio':>10}" + "".join(f"{a / b:>8.2f}" for a, b in zip(found["stasis"], found["runc"]))
            print(f"  {count:>7} {kind:<12}{cells}{ratio}", flush=True)
            for name, row in found.items():
                who = "Stasis" if name == "stasis" else "runc with CRIU"
                series.setdefault(f"{who}: both", []).append((count, row[1] + row[2]))
                series.setdefault(f"{who}: standing still", []).append((count, row[0]))
        if any(len(points) > 1 for points in series.values()):
            where = harness.TARGET / f"breadth-{kind}.svg"
            where.write_text(chart(f"Checkpoint and restore of many {kind}", kind, "milliseconds", series))
            print(f"  as a chart: {os.path.relpath(where, harness.TOP)}")
