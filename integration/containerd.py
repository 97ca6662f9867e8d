"""containerd's own client, ctr, with a daemon of the test's own."""

import os
import re
import time

from harness import (RUNTIME, Failed, Host, Skip, Terminal, check, equal, need, oci_archive, real_checkpoints, remove_cgroup, session,
                     sh, tail, until)

_daemon = {}


class Containerd:
    """A containerd; `ctr` through a call."""

    def __init__(self, host):
        need("containerd", "ctr")
        self.dir = host.dir
        self.short = f"/tmp/stasis-ctr-{os.getpid()}"
        os.makedirs(self.short, exist_ok=True)
        host.undo.append(lambda: sh("rm", "-rf", self.short))
        self.namespace = f"stasis{os.getpid()}"
        self.client = ["ctr", "--address", f"{self.short}/containerd.sock", "--namespace", self.namespace]
        host.undo.append(lambda: remove_cgroup(self.namespace))
        (host.dir / "containerd.toml").write_text(
            f'version = 2\nroot = "{host.dir}/containerd"\nstate = "{self.short}/state"\n'
            f'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
            f'[grpc]\naddress = "{self.short}/containerd.sock"\n')
        daemon = host.daemon("containerd", "--config", host.dir / "containerd.toml", log=host.dir / "containerd.log")
        host.undo.append(self.remove_all)
        until(lambda: daemon.poll() is not None or self("version", ok=None).returncode == 0, "containerd to answer")
        check(daemon.poll() is None, tail(host.dir / "containerd.log"))
        self("images", "import", oci_archive("busybox"))

    def __call__(self, *words, **how):
        return sh(*self.client, *words, **how)

    def run(self, *words, **how):
        return self("run", "--runc-binary", RUNTIME, *words, **how)

    def tasks(self):
        lines = self("tasks", "ls").stdout.splitlines()[1:]
        return {line.split()[0]: line.split()[2] for line in lines}

    def remove_all(self):
        for name in self("containers", "ls", "-q", ok=None).stdout.split():
            self("tasks", "kill", "-s", "KILL", name, ok=None)
            for _ in range(100):
                if self("tasks", "rm", "-f", name, ok=None).returncode == 0 or name not in self.tasks():
                    break
                time.sleep(0.05)
            self("containers", "rm", name, ok=None)


def containerd(host):
    if "it" not in _daemon:
        own = Host("containerd-daemon")
        _daemon["host"] = own
        try:
            _daemon["it"] = Containerd(own)
        except (Failed, Skip) as e:
            own.close(keep=isinstance(e, Failed))
            _daemon["it"] = e
    if isinstance(_daemon["it"], Exception):
        raise _daemon["it"]
    host.undo.append(_daemon["it"].remove_all)
    return _daemon["it"]


def finish():
    """Called by integration/run when this file's tests are over."""
    if isinstance(_daemon.get("it"), Containerd):
        _daemon["host"].close(keep=False)


IMAGE = "localhost/busybox:test"


def test_run(host):
    """run in the foreground: output and exit code."""
    ctr = containerd(host)
    equal(ctr.run("--rm", IMAGE, "first", "sh", "-c", "echo out; exit 9", ok=[9]).stdout, "out\n", "output")
    equal(ctr("containers", "ls", "-q").stdout, "", "containers left")


def test_exec(host):
    """run -d, tasks ls, ps, exec, pause, resume, kill."""
    ctr = containerd(host)
    ctr.run("-d", IMAGE, "exec", "sleep", "1000")
    equal(ctr.tasks().get("exec"), "RUNNING", "task")
    equal(ctr("tasks", "exec", "--exec-id", "e1", "exec", "sh", "-c", "echo hello; exit 4", ok=[4]).stdout, "hello\n", "exec")
    check(len(ctr("tasks", "ps", "exec").stdout.splitlines()) == 2, "tasks ps")
    ctr("tasks", "pause", "exec")
    equal(ctr.tasks()["exec"], "PAUSED", "paused")
    ctr("tasks", "resume", "exec")
    equal(ctr.tasks()["exec"], "RUNNING", "resumed")
    check("memory" in ctr("tasks", "metrics", "exec").stdout, "metrics")
    ctr("tasks", "kill", "-s", "KILL", "exec")
    until(lambda: ctr.tasks()["exec"] == "STOPPED", "the task to end")


def test_terminal(host):
    """run -t and tasks exec -t, with somebody who types."""
    ctr = containerd(host)
    session(Terminal(host, *ctr.client, "run", "--runc-binary", RUNTIME, "--rm", "-t", IMAGE, "typed", "sh"))
    ctr.run("-d", IMAGE, "exec", "sleep", "1000")
    session(Terminal(host, *ctr.client, "tasks", "exec", "-t", "--exec-id", "typed", "exec", "sh"))


def test_limits(host):
    """A memory limit and a control group of one's own."""
    ctr = containerd(host)
    ctr.run("-d", "--memory-limit", str(64 << 20), IMAGE, "limits", "sleep", "1000")
    pid = re.search(r"^limits\s+(\d+)", ctr("tasks", "ls").stdout, re.M)[1]
    path = re.search(r":memory:(.*)", open(f"/proc/{pid}/cgroup").read())
    if not path:
        raise Skip("no v1 memory controller here")
    equal(open(f"/sys/fs/cgroup/memory{path[1]}/memory.limit_in_bytes").read().strip(), str(64 << 20), "limit")


COUNT = "i=0; while :; do echo $((i=i+1)) >>/log; sleep 0.02; done"


def numbers(ctr, name):
    text = ctr("tasks", "exec", "--exec-id", f"n{time.monotonic_ns()}", name, "cat", "/log").stdout
    return [int(n) for n in text.split("\n")[:-1]]


def test_task_checkpoint(host):
    """tasks checkpoint with an image path: without --exit the task goes on, with it it's over."""
    real_checkpoints()
    ctr = containerd(host)
    ctr.run("-d", IMAGE, "plain", "sh", "-c", COUNT)
    until(lambda: len(numbers(ctr, "plain")) > 10, "counting")
    ctr("tasks", "checkpoint", "--image-path", host.dir / "image", "--work-path", host.dir / "work", "plain")
    check((host.dir / "image/inventory.img").exists(), "no inventory.img")
    equal(ctr.tasks()["plain"], "RUNNING", "after a checkpoint")
    at = numbers(ctr, "plain")
    until(lambda: len(numbers(ctr, "plain")) > len(at) + 10, "counting on")
    ctr("tasks", "checkpoint", "--exit", "--image-path", host.dir / "last", "--work-path", host.dir / "work", "plain")
    until(lambda: ctr.tasks()["plain"] == "STOPPED", "the task to end")


def test_checkpoint_restore(host):
    """containers checkpoint into an image of containerd's, containers restore --live."""
    real_checkpoints()
    ctr = containerd(host)
    ctr.run("-d", IMAGE, "moved", "sh", "-c", COUNT)
    until(lambda: len(numbers(ctr, "moved")) > 10, "counting")
    ctr("containers", "checkpoint", "--task", "--rw", "--image", "moved", "localhost/moved:checkpoint")
    ctr("tasks", "kill", "-s", "KILL", "moved")
    until(lambda: ctr.tasks()["moved"] == "STOPPED", "the task to end")
    ctr("tasks", "rm", "moved", ok=None)
    ctr("containers", "rm", "moved")
    ctr("containers", "restore", "--live", "--rw", "moved", "localhost/moved:checkpoint")
    equal(ctr.tasks().get("moved"), "RUNNING", "after the restore")
    at = numbers(ctr, "moved")
    until(lambda: len(numbers(ctr, "moved")) > len(at) + 10, "counting after the restore")
    got = numbers(ctr, "moved")
    equal(got, list(range(1, len(got) + 1)), "the numbers")
