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


def fill_status(c):
    try:
        return json.loads((c.host.dir / "root" / c.id / "fill.json").read_text())
    except FileNotFoundError:
        return None


def filled(c):
    until(lambda: fill_status(c) is None, "the memory is filled", 60)


def lazy(host, *more):
    c = Churn(host, "c", 128, 64, 0, *more).start()
    for _ in range(3):
        c.checkpoint("a")
        c.restore("a", "--lazy")
        c.right()
        filled(c)
        c.right()
        equal(c.state(), "running", "the state after the fill")
    c.checkpoint("a")
    c.restore("a", "--lazy-pages")
    c.checkpoint("b")  # waits for the fill
    c.restore("b")
    c.right()


def test_lazy(host):
    lazy(host)


def test_lazy_while_the_program_moves_its_memory(host):
    lazy(host, "mix")


def test_lazy_from_a_chain_of_pre_dumps(host):
    c = Churn(host, "c", 128, 32, 0, "mix").start()
    c.checkpoint("a", "--pre-dump")
    c.right()
    c.checkpoint("b", "--pre-dump", "--parent-path", "../a")
    c.checkpoint("d", "--parent-path", "../b")
    c.restore("d", "--lazy")
    c.right()


def half_filled(c):
    """A container whose memory is being filled, and who fills it: the guard and the filler."""
    for _ in range(20):
        c.restore("a", "--lazy")
        status = fill_status(c)
        if status:
            guard = status["pid"]
            try:
                with open(f"/proc/{guard}/task/{guard}/children") as f:
                    children = f.read().split()
            except FileNotFoundError:
                children = []
            if children and fill_status(c):
                return guard, int(children[0])
        c.delete()
    raise Failed("the memory is always filled before anybody can look")


def dies(c, number):
    victim = half_filled(c)[number]
    os.kill(victim, signal.SIGKILL)
    until(lambda: c.state() == "stopped", "the container's end")
    status = until(lambda: (fill_status(c) or {}).get("failed"), "the reason")
    check("died" in status, f"the reason: {status}")
    annotations = json.loads(c.call("state", c.id).stdout)["annotations"]
    check("killed" in annotations["org.stasis.fill"], f"state says why: {annotations}")
    c.status()  # it has seen no wrong memory until then
    c.delete()


def test_nobody_runs_on_with_half_of_the_memory(host):
    c = Churn(host, "c", 512, 512, 0).start()
    c.checkpoint("a")
    dies(c, 1)
    dies(c, 0)
    c.restore("a")
    c.right()


def test_a_container_can_end_while_its_memory_is_filled(host):
    c = Churn(host, "c", 512, 512, 0).start()
    c.checkpoint("a")
    guard, filler = half_filled(c)
    c.delete()
    for pid in guard, filler:
        until(lambda: not os.path.exists(f"/proc/{pid}") or ") Z" in open(f"/proc/{pid}/stat").read(), "the filler's end")
