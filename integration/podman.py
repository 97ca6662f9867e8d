"""Podman, with storage and state of the test's own. `criu` on its path is Stasis itself."""

import json
import os
import re
import resource

from harness import (RUNTIME, Failed, Host, Skip, check, equal, need, oci_archive, real_checkpoints, remove_cgroup, sh, tail,
                     until)

_shared = {}


class Podman:
    def __init__(self, host):
        need("podman", "conmon")
        self.dir = host.dir
        self.short = f"/tmp/stasis-podman-{os.getpid()}"
        os.makedirs(f"{self.short}/bin", exist_ok=True)
        host.undo.append(lambda: sh("rm", "-rf", self.short))
        self.cgroup = f"stasis-podman-{os.getpid()}"
        host.undo.append(lambda: remove_cgroup(self.cgroup))
        # Podman asks a program called criu for its version. Under that name Stasis answers; nothing else is needed.
        os.symlink(RUNTIME, f"{self.short}/bin/criu")
        # Podman would raise limits to values of its own, which takes a capability that root may lack; and it has lowered
        # its own limit of processes to the greatest pid by then.
        files, processes = (resource.getrlimit(x)[1] for x in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        pids = int(open("/proc/sys/kernel/pid_max").read())
        processes = pids if processes < 0 else min(processes, pids)
        limits = [f"{name}={n}:{n}" for name, n in (("nofile", files), ("nproc", processes))]
        (self.dir / "containers.conf").write_text(f'[containers]\nlog_driver = "k8s-file"\ndefault_ulimits = {json.dumps(limits)}\n')
        (self.dir / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.env = {"PATH": f"{self.short}/bin:{os.environ['PATH']}", "CONTAINERS_CONF": str(self.dir / "containers.conf")}
        host.undo.append(self.unmount)
        host.undo.append(self.remove_all)
        self("load", "-i", oci_archive("busybox"), "--signature-policy", self.dir / "policy.json")
        names = self("images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").stdout.split()
        check(names, "the image was not loaded")
        self("tag", names[1], "localhost/busybox:test")

    def __call__(self, *words, **how):
        return sh("podman", "--runtime", RUNTIME, "--root", self.dir / "storage", "--runroot", f"{self.short}/run",
                  "--tmpdir", f"{self.short}/tmp", "--cgroup-manager", "cgroupfs", "--events-backend", "none",
                  "--storage-driver", "overlay", *words, env=self.env, **how)

    def run(self, *words, network="none", **how):
        return self("run", "--cgroup-parent", self.cgroup, "--network", network, *words, **how)

    def status(self, name):
        return self("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name).stdout.strip()

    def remove_all(self):
        self("pod", "rm", "-f", "-t", "0", "-a", ok=None)
        self("rm", "-f", "-t", "0", "-a", ok=None)

    def unmount(self):
        for line in open("/proc/self/mountinfo"):
            where = line.split()[4]
            if where.startswith((str(self.dir), self.short)):
                sh("umount", "-l", where, ok=None)


def podman(host):
    if "it" not in _shared:
        own = Host("podman-storage")
        _shared["host"] = own
        try:
            _shared["it"] = Podman(own)
        except (Failed, Skip) as e:
            own.close(keep=isinstance(e, Failed))
            _shared["it"] = e
    if isinstance(_shared["it"], Exception):
        raise _shared["it"]
    host.undo.append(_shared["it"].remove_all)
    return _shared["it"]


def finish():
    """Called by integration/run when this file's tests are over."""
    if isinstance(_shared.get("it"), Podman):
        _shared["host"].close(keep=False)


IMAGE = "localhost/busybox:test"
COUNT = "i=0; while :; do echo $((i=i+1)); sleep 0.02; done"


def numbers(p, name):
    return [int(n) for n in re.findall(r"^(\d+)\r?$", p("logs", name).stdout, re.M)]


def test_run(host):
    """Output, exit codes, input."""
    p = podman(host)
    out = p.run("--rm", IMAGE, "sh", "-c", "echo out; echo error >&2; exit 7", ok=[7])
    equal((out.stdout, out.stderr), ("out\n", "error\n"), "output")
    equal(p.run("--rm", "-i", IMAGE, "cat", stdin="input\n").stdout, "input\n", "input")
    p.run("--rm", IMAGE, "/no/such/program", ok=[127])
    p.run("--rm", IMAGE, "/etc/passwd", ok=[126])
    p.run("--rm", "-t", IMAGE, "test", "-t", "0")


def test_exec(host):
    """exec, logs, top, pause, stop."""
    p = podman(host)
    p.run("-d", "--name", "exec", IMAGE, "sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: "up" in p("logs", "exec").stdout, "the log")
    equal(p("exec", "exec", "sh", "-c", "echo hello; exit 4", ok=[4]).stdout, "hello\n", "exec")
    p("pause", "exec")
    equal(p.status("exec"), "paused 0", "paused")
    p("unpause", "exec")
    p("stop", "exec")
    equal(p.status("exec"), "exited 3", "stopped")


def test_pod(host):
    """Two containers of a pod share a network namespace."""
    p = podman(host)
    p("pod", "create", "--name", "pod", "--network", "none", "--infra-image", IMAGE, "--infra-command", "sleep 10000",
      "--cgroup-parent", p.cgroup)
    p("run", "-d", "--pod", "pod", "--name", "server", IMAGE, "sh", "-c", "while :; do echo hello | nc -l -p 8000; done")
    until(lambda: p("run", "--rm", "--pod", "pod", IMAGE, "nc", "-w", "2", "127.0.0.1", "8000", ok=None).stdout == "hello\n",
          "the neighbour's answer")


def story(host, *flags):
    real_checkpoints()
    p = podman(host)
    p.run("-d", "--name", "count", *flags, IMAGE, "sh", "-c", COUNT)
    until(lambda: len(numbers(p, "count")) > 10, "counting")
    p("container", "checkpoint", "count")
    check(p.status("count").startswith("exited"), f"after the checkpoint: {p.status('count')}")
    before = numbers(p, "count")
    restore(p, "count")
    until(lambda: len(numbers(p, "count")) > len(before) + 10, "counting after the restore")
    got = numbers(p, "count")
    equal(got, list(range(1, len(got) + 1)), "the numbers")
    equal(p("exec", "count", "echo", "exec").stdout, "exec\n", "exec in the restored one")


def restore(p, *words):
    try:
        p("container", "restore", *words)
    except Failed as e:
        raise Failed(f"{e}\n" + "".join(tail(log) for log in sorted(p.dir.rglob("restore.log"))[:1])) from None


def test_checkpoint(host):
    """container checkpoint, container restore."""
    story(host)


def test_checkpoint_tty(host):
    """The same with a terminal."""
    story(host, "-t")


def test_checkpoint_leave_running(host):
    """--leave-running and --print-stats."""
    real_checkpoints()
    p = podman(host)
    p.run("-d", "--name", "left", IMAGE, "sh", "-c", COUNT)
    until(lambda: len(numbers(p, "left")) > 10, "counting")
    p("container", "checkpoint", "--leave-running", "left")
    equal(p.status("left"), "running 0", "after --leave-running")
    at = numbers(p, "left")
    until(lambda: len(numbers(p, "left")) > len(at) + 10, "counting on")
    stats = p("container", "checkpoint", "--print-stats", "left").stdout
    check("runtime_checkpoint_duration" in stats, f"statistics: {stats}")


def test_export_import(host):
    """checkpoint --export, the container is removed, restore --import under another name."""
    real_checkpoints()
    p = podman(host)
    p.run("-d", "--name", "first", IMAGE, "sh", "-c", "i=0; echo kept >/file; while :; do echo $((i=i+1)); sleep 0.02; done")
    until(lambda: len(numbers(p, "first")) > 10, "counting")
    archive = host.dir / "checkpoint.tar"
    p("container", "checkpoint", "--export", archive, "--compress", "none", "first")
    last = numbers(p, "first")[-1]
    p("rm", "first")
    restore(p, "--import", archive, "--name", "second")
    went_on(p, "second", last)
    equal(p("exec", "second", "cat", "/file").stdout, "kept\n", "a changed file")
    restore(p, "--import", archive, "--name", "third")
    went_on(p, "third", last)


def went_on(p, name, last):
    """Podman exports the log as well: an unbroken count, past the last number before the checkpoint."""
    until(lambda: numbers(p, name)[-1:] > [last + 10], f"counting in {name}")
    seen = numbers(p, name)
    equal(seen, list(range(seen[0], seen[0] + len(seen))), f"the count of {name}")
    check(seen[0] <= last + 1, f"{name} began at {seen[0]}, after {last + 1}")


def test_criu_version(host):
    """Stasis under the name criu answers what Podman asks."""
    real_checkpoints()
    p = podman(host)
    check(not re.search("criu", p("container", "checkpoint", "no-such-container", ok=[125]).stderr.lower()), "criu was not believed")
