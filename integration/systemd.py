"""Control groups managed by systemd. Needs systemd as init: `integration/vm/test` boots the virtual machine with it."""

import json
import os
import pathlib

from harness import Container, Skip, check, config, equal, need, real_checkpoints, sh, until

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
    (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.run(ok=[1])
    check("slice:prefix:name" in c.text(), c.text())


PROFILE = """
profile stasis-test flags=(attach_disconnected, mediate_deleted) {
  file, capability, network, mount, umount, pivot_root, ptrace, signal, dbus, unix,
  deny /secret r,
}
profile stasis-test-other flags=(attach_disconnected, mediate_deleted) {
  file, capability, network, mount, umount, pivot_root, ptrace, signal, dbus, unix,
}
"""


def test_apparmor(host):
    """A profile confines the program and what exec starts, which may have another; an unknown one is an error."""
    enabled = pathlib.Path("/sys/module/apparmor/parameters/enabled")
    if not enabled.exists() or enabled.read_text().strip() != "Y" or not os.path.exists("/sys/kernel/security/apparmor"):
        raise Skip("AppArmor is not on")
    need("apparmor_parser")
    (host.dir / "profile").write_text(PROFILE)
    sh("apparmor_parser", "--replace", "--skip-cache", host.dir / "profile")
    host.undo.append(lambda: sh("apparmor_parser", "--remove", host.dir / "profile"))
    c = busybox(host, "sh", "-c", "cat /proc/self/attr/current; cat /secret; sleep 1000")
    (host.dir / "c/rootfs/secret").write_text("told\n")
    c.spec["process"]["apparmorProfile"] = "stasis-test"
    (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.run()
    until(lambda: "ermission denied" in c.text(), "the denial")
    check("stasis-test (enforce)" in c.text() and "told" not in c.text(), c.text())
    said = c.exec("cat", "/proc/self/attr/current", "/secret", ok=[1])
    check("stasis-test (enforce)" in said.stdout and "told" not in said.stdout, f"exec: {said.stdout}{said.stderr}")
    said = c.call("exec", "--apparmor", "stasis-test-other", c.id, "cat", "/proc/self/attr/current", "/secret").stdout
    check("stasis-test-other (enforce)" in said and "told" in said, f"exec --apparmor: {said}")
    said = c.call("exec", "--apparmor", "nowhere", c.id, "true", ok=[255]).stderr
    check("apparmor failed to apply profile: write " in said and "no such file or directory" in said, said)
    # Restored processes are confined by what config.json says, all threads of them, and what they start.
    c = busybox(host, "sh", "-c", "sleep 1000 & while :; do cat /secret; sleep 0.5; done", label="restored")
    (host.dir / "restored/rootfs/secret").write_text("told\n")
    c.spec["process"]["apparmorProfile"] = "stasis-test"
    (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.run()
    for n in range(2):
        c.checkpoint(f"image{n}")
        c.restore(f"image{n}")
        denials = c.text().count("ermission denied")
        until(lambda: c.text().count("ermission denied") > denials + 1, "denials after the restore")
        labels = [open(f"/proc/{pid}/attr/current").read().strip() for pid in json.loads(c.call("ps", "-f", "json", c.id).stdout)]
        equal(set(labels), {"stasis-test (enforce)"}, "the labels")
    check("told" not in c.text(), c.text())
