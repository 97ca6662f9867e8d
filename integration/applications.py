"""What programs that work notice of a checkpoint: Stasis beside runc with CRIU, each in turn.

Containers with 1 GiB: one that writes as fast as it can, and redis with a client that asks it all the time. Both are
checkpointed and run on; what counts is how much of its work the first gets done meanwhile and right after, and the longest that
the client has waited.
"""
import math
import shutil
import statistics
import time

import by_hand
import memory
from harness import Redis, Skip, sh
from statistics_file import freeze_ms

CLIENT = r"""
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
/* Asks redis for one key after the other, sets every tenth; each wait of more than a millisecond is a line of /data/waits. */
int main(void)
{
    struct sockaddr_un at = { AF_UNIX, "/data/redis.sock" };
    int redis = socket(AF_UNIX, SOCK_STREAM, 0), out = open("/data/waits", O_WRONLY | O_CREAT | O_APPEND, 0644);
    struct timespec last, now;
    char text[512];
    while (connect(redis, (struct sockaddr *)&at, sizeof at))
        usleep(10000);
    clock_gettime(CLOCK_MONOTONIC, &last);
    for (unsigned i = 0;; i++, last = now) {
        unsigned key = i * 2654435761u % 250000;
        int n = sprintf(text, i % 10 ? "STRLEN key:%u\r\n" : "APPEND key:%u x\r\n", key);
        if (write(redis, text, n) != n || read(redis, text, sizeof text) <= 0)
            return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
        double ms = (now.tv_sec - last.tv_sec) * 1e3 + (now.tv_nsec - last.tv_nsec) / 1e6;
        if (ms > 1 && dprintf(out, "%.1f\n", ms) < 0)
            return 1;
    }
}
"""
PAUSE = 1.5


def under(runtime, host, name, c):
    c.command = lambda *words: [runtime, "--root", str(host.dir / f"{name}.root"), *map(str, words)]
    c.output = "none"  # CRIU takes no file of the host's
    return c


def live(c, label):
    """A checkpoint that leaves it running; how long it stood still, and the whole command, ms."""
    took = c.checkpoint(label, "--leave-running", timeout=300).seconds * 1000
    freeze = freeze_ms(c.host.dir / f"{label}.work", c.host.dir / label)
    shutil.rmtree(c.host.dir / label, ignore_errors=True)
    return freeze, took


class Hot:
    """1 GiB, of which all is written at random as fast as it goes."""

    def __init__(self, host, name, runtime):
        self.c = under(runtime, host, name, memory.Churn(host, f"hot-{name}", 1024, 1024, 0))
        self.c.start()

    def count(self):
        return int(self.c.status().split()[1])

    def done(self):
        before, began = self.count(), time.monotonic()
        time.sleep(PAUSE)
        return (self.count() - before) / (time.monotonic() - began)

    def round(self):
        usual, before = self.done(), self.count()
        freeze, took = live(self.c, f"{self.c.id}.images")
        # Who stands still for nearly all of the command has no meanwhile.
        meanwhile = (self.count() - before) / (took - freeze) * 1000 if freeze < took / 2 else math.nan
        return freeze, took, meanwhile / usual, self.done() / usual


class Asked:
    """redis with 1 GiB, and its client."""

    def __init__(self, host, name, runtime):
        self.c = under(runtime, host, name, by_hand.redis_container(host, f"redis-{name}", "REDIS & exec /client"))
        root = host.dir / f"redis-{name}/rootfs"
        (host.dir / "client.c").write_text(CLIENT)
        sh("gcc", "-static", "-O2", "-o", root / "client", host.dir / "client.c")
        self.waits = host.dir / f"redis-{name}.data/waits"
        self.c.run()
        by_hand.serving(self.c)
        with Redis(self.c.socket) as redis:
            redis("DEBUG", "POPULATE", 250_000, "key", 4096)
        time.sleep(PAUSE)

    def longest(self, action):
        before = self.waits.stat().st_size if self.waits.exists() else 0
        result = action()
        time.sleep(PAUSE)
        text = self.waits.read_text()[before:] if self.waits.exists() else ""
        return result, max(map(float, text.split()), default=1.0)

    def round(self):
        _, usual = self.longest(lambda: None)
        (freeze, took), longest = self.longest(lambda: live(self.c, f"{self.c.id}.images"))
        return freeze, took, longest, usual


def applications(host, runtimes, rounds=3):
    """Both tables; the median of some rounds."""
    for kind, title, columns in (
            (Hot, "1 GiB that is written as fast as it goes", ("standing still", "whole command", "its speed while it runs meanwhile", "its speed after")),
            (Asked, "redis with 1 GiB that a client asks", ("standing still", "whole command", "longest wait", "without"))):
        try:
            them = {name: kind(host, name, runtime) for name, runtime in runtimes}
        except Skip as why:
            print(f"\n{title}: SKIPPED, {why}")
            continue
        rows = {name: [] for name in them}
        for _ in range(rounds):
            for name, it in them.items():
                rows[name].append(it.round())
        print(f"\n{title}, `checkpoint --leave-running`, ms, median of {rounds}: {', '.join(columns)}")
        for name, found in rows.items():
            print(f"  {name:<18}" + "".join(f"{statistics.median(column):>12.2f}" for column in zip(*found)), flush=True)
        for it in them.values():
            it.c.delete()
