"""Memory that changes while it is saved: pre-dumps, pre-copy. The program (programs/churn.c) checks itself all the time."""
import json
import os
import signal

from harness import TOP, Container, Failed, check, config, equal, image_size, need, real_checkpoints, sh, until

MIB = 1 << 20


class Churn(Container):
    """A program that writes `rate` pages a second within `hot` of its `size` MiB."""

    def __init__(self, host, label, size=64, hot=8, rate=20000, *more):
        need("gcc")
        real_checkpoints()
        self.root = host.overlay("busybox", label)
        sh("gcc", "-static", "-O2", "-o", self.root / "churn", TOP / "integration/programs/churn.c")
        super().__init__(host, label, config(["/churn", size, hot, rate, *more], root=self.root), output="null")

    def start(self):
        self.run()
        until(lambda: self.status().startswith("ops"), "the program begins")
        return self

    def status(self):
        try:
            text = (self.root / "status").read_text().strip()
        except OSError:
            return ""
        if text.startswith("BAD"):
            raise Failed(f"the program has found wrong memory: {text}")
        return text

    def checks(self):
        words = self.status().split()
        return int(words[3]) if len(words) > 3 else 0

    def right(self):
        """All of its memory is right, and it goes on."""
        before = self.checks()
        os.kill(self.pid(), signal.SIGUSR1)

        def checked():
            equal(self.state(), "running", "the container's state")
            return self.checks() > before

        until(checked, "a check of all pages", 60)


def pre_dump(host, *more):
    c = Churn(host, "c", 64, 8, 20000, *more).start()
    c.checkpoint("a", "--pre-dump")
    c.right()
    c.checkpoint("b", "--pre-dump", "--parent-path", "../a")
    c.right()
    c.checkpoint("d", "--leave-running", "--parent-path", "../b")
    c.right()
    check(image_size(host.dir / "a") > 60 * MIB, "the first set has all pages")
    if not more:
        check(image_size(host.dir / "d") < 30 * MIB, "the last set has what changed")
    c.checkpoint("a", "--pre-dump")
    c.checkpoint("e", "--parent-path", "../a")
    equal(c.state(), "", "the container is gone")
    c.restore("e")
    c.right()


def test_pre_dump(host):
    pre_dump(host)


def test_pre_dump_of_a_program_that_moves_its_memory(host):
    pre_dump(host, "mix")


def test_precopy(host):
    c = Churn(host, "c").start()
    c.checkpoint("p", "--precopy", "--leave-running")
    c.right()
    check((host.dir / "p/parent").is_symlink(), "the last set builds on the rounds")
    c.checkpoint("p", "--precopy=3", "--no-sync")
    c.restore("p")
    c.right()


def test_a_parent_that_does_not_fit_is_not_used(host):
    """Sets that the marks do not belong to: all pages are saved, and the restore is right."""
    c = Churn(host, "c").start()
    c.checkpoint("a", "--pre-dump")
    c.checkpoint("b", "--pre-dump")
    c.checkpoint("d", "--parent-path", "../a")
    check(image_size(host.dir / "d") > 60 * MIB, "the marks are b's, so a has nothing to give")
    c.restore("d")
    c.right()
    done = c.call("checkpoint", "--image-path", host.dir / "x", "--parent-path", str(host.dir / "a"), c.id, ok=None)
    check(done.returncode != 0 and "relative" in done.stderr, f"an absolute parent is refused: {done.stderr}")
    c.right()


def test_the_death_of_the_keeper_costs_only_time(host):
    c = Churn(host, "c").start()
    c.checkpoint("a", "--pre-dump")
    record = json.loads((host.dir / "root" / c.id / "tracking.json").read_text())
    if record["keeper"] is None:
        return
    keeper = record["keeper"]["pid"]
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{keeper}") or "Z" in open(f"/proc/{keeper}/stat").read(), "the keeper's end")
    c.right()
    c.checkpoint("d", "--parent-path", "../a")
    check(image_size(host.dir / "d") > 60 * MIB, "all pages are saved")
    c.restore("d")
    c.right()


def test_a_pre_dump_alone_is_not_restored(host):
    c = Churn(host, "c").start()
    c.checkpoint("a", "--pre-dump")
    c.delete()
    done = c.call("restore", "--bundle", c.bundle, "--image-path", host.dir / "a", c.id, ok=None)
    check(done.returncode != 0 and "pre-dump" in done.stderr, f"it says why: {done.stderr}")
