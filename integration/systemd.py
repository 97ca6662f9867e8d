"""Control groups managed by systemd. Needs systemd as init: `integration/vm/test` boots the virtual machine with it."""

import os
import pathlib

from harness import Container, Skip, check, config, equal, real_checkpoints, sh, until

COUNT = "i=0; while :; do echo $((i=i+1)); sleep 0.01; done"


class Managed(Container):
    def command(self, *words):
        words = super().command(*words)
        return [words[0], "--systemd-cgroup", *words[1:]]


def busybox(host, *args, label="c", resources=None, annotations=None):
    if not os.path.exists("/run/systemd/private"):
        raise Skip("systemd does not run here")
    spec = config(args, root=host.overlay("busybox", label))
    spec["linux"]["resources"].update(resources or {})
    spec["linux"]["cgroupsPath"] = f"stasis-tests.slice:test:{host.id}-{label}"
    spec["annotations"] = annotations or {}
    c = Managed(host, label, spec)
    c.unit = f"test-{host.id}-{label}.scope"
    return c


def show(unit):
    return dict(line.partition("=")[::2] for line in sh("systemctl", "show", unit).stdout.splitlines())


def test_scope(host):
    """run, update, delete: the unit, its place, its properties, and its end."""
    c = busybox(host, "sleep", "1000", resources={"memory": {"limit": 64 << 20}, "pids": {"limit": 20},
                                                   "cpu": {"shares": 2048, "quota": 20000, "period": 100000}},
                annotations={"org.systemd.property.TimeoutStopUSec": "uint64 7000000",
                             "org.systemd.property.CollectMode": "'inactive-or-failed'"})
    c.run()
    unit = show(c.unit)
    for name, value in {"ActiveState": "active", "Slice": "stasis-tests.slice", "Delegate": "yes", "MemoryMax": str(64 << 20),
                        "TasksMax": "20", "CPUQuotaPerSecUSec": "200ms", "TimeoutStopUSec": "7s",
                        "CollectMode": "inactive-or-failed"}.items():
        equal(unit[name], value, name)
    group = pathlib.Path("/sys/fs/cgroup/stasis.slice/stasis-tests.slice") / c.unit
    equal(f"/{group.relative_to('/sys/fs/cgroup')}", unit["ControlGroup"], "ControlGroup")
    check(str(c.pid()) in (group / "cgroup.procs").read_text().split(), "init is elsewhere")
    equal((group / "memory.max").read_text().strip(), str(64 << 20), "memory.max")
    c.call("update", "--memory", 80 << 20, "--pids-limit", "30", c.id)
    sh("systemctl", "daemon-reload")
    equal((group / "memory.max").read_text().strip(), str(80 << 20), "memory.max after an update and a reload")
    equal((group / "pids.max").read_text().strip(), "30", "pids.max after an update and a reload")
    check("not permitted" in c.exec("sh", "-c", "mknod /m c 1 1; cat /m 2>&1; true").stdout, "devices after a reload")
    c.call("pause", c.id)
    c.call("resume", c.id)
    c.call("delete", "--force", c.id)
    check(not group.exists(), f"{group} is still there")
    equal(show(c.unit)["ActiveState"], "inactive", "the unit")


def test_again(host):
    """A container that ended by itself leaves nothing in the way of the next of its name."""
    c = busybox(host, "false")
    for _ in range(2):
        c.run()
        until(lambda: c.state() == "stopped", "the end")
        c.call("delete", c.id)
    equal(show(c.unit)["ActiveState"], "inactive", "the unit")


def test_checkpoint(host):
    """A checkpoint ends the unit; the restored container has one again."""
    real_checkpoints()
    c = busybox(host, "sh", "-c", COUNT, resources={"pids": {"limit": 20}})
    c.run()
    until(lambda: "5\n" in c.text(), "counting")
    c.checkpoint("image")
    c.restore("image")
    unit = show(c.unit)
    equal((unit["ActiveState"], unit["TasksMax"]), ("active", "20"), "the unit")
    still = c.text()
    until(lambda: c.text() != still, "counting again")


def test_wrong_path(host):
    """A cgroupsPath of the other driver is refused by name."""
    c = busybox(host, "true")
    c.spec["linux"]["cgroupsPath"] = "/docker/x"
    (c.bundle / "config.json").write_text(__import__("json").dumps(c.spec))
    c.run(ok=[1])
    check("slice:prefix:name" in c.text(), c.text())
