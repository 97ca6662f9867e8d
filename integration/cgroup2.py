"""Limits, devices and the freezer on pure cgroup v2: what the kernel is told, and what becomes of it.

Needs every controller, which only a machine of its own has: `make test-vm` runs these in the virtual one.
"""

import os
import pathlib
import signal
import threading

from harness import Container, Skip, check, config, equal, real_checkpoints, until

TOP = pathlib.Path("/sys/fs/cgroup")
CONTROLLERS = {"cpu", "cpuset", "io", "memory", "pids"}
COUNT = "i=0; while :; do echo $((i=i+1)); sleep 0.01; done"


def busybox(host, *args, label="c", resources=None, change=None):
    controllers = TOP / "cgroup.subtree_control"
    if not controllers.exists() or not CONTROLLERS <= set(controllers.read_text().split()):
        raise Skip("cgroup v2 with all controllers is not here")
    spec = config(args, root=host.overlay("busybox", label))
    spec["linux"]["resources"].update(resources or {})
    spec["linux"]["namespaces"].append({"type": "cgroup"})
    if change:
        change(spec)
    return Container(host, label, spec)


def group(container):
    """The container's control group, as init's /proc names it."""
    line = pathlib.Path(f"/proc/{container.pid()}/cgroup").read_text().strip()
    check(line.startswith("0::/"), line)
    return TOP / line[4:]


def files(directory, **expected):
    for name, value in expected.items():
        name = name.replace("__", ".")
        equal((directory / name).read_text().strip(), value, name)


def disk():
    """major:minor of the whole disk that / is on."""
    device = os.stat("/").st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def test_limits(host):
    """Every limit of config.json arrives, converted from v1's units; `update` changes them."""
    major, minor = map(int, disk().split(":"))
    c = busybox(host, "sleep", "1000", resources={
        "memory": {"limit": 64 << 20, "swap": 96 << 20, "reservation": 32 << 20},
        "cpu": {"shares": 2048, "quota": 20000, "period": 50000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 20},
        "blockIO": {"throttleReadBpsDevice": [{"major": major, "minor": minor, "rate": 1 << 20}],
                    "throttleWriteIOPSDevice": [{"major": major, "minor": minor, "rate": 100}]},
        "unified": {"memory.high": str(48 << 20)},
    })
    c.run()
    g = group(c)
    files(g, memory__max=str(64 << 20), memory__low=str(32 << 20), memory__high=str(48 << 20), cpu__max="20000 50000",
          cpuset__cpus="0", cpuset__mems="0", pids__max="20")
    if (g / "memory.swap.max").exists():
        files(g, memory__swap__max=str(32 << 20))
    weight = int((g / "cpu.weight").read_text())
    check(150 < weight < 180, f"cpu.weight for 2048 shares: {weight}")
    io = (g / "io.max").read_text()
    check(f"{disk()} rbps={1 << 20} wbps=max riops=max wiops=100" in io, f"io.max: {io}")
    c.call("update", "--memory", 80 << 20, "--memory-swap", 80 << 20, "--pids-limit", "30", "--cpu-quota", "30000",
           "--cpu-period", "100000", "--cpu-share", "1024", c.id)
    files(g, memory__max=str(80 << 20), pids__max="30", cpu__max="30000 100000", cpu__weight="100")
    events = c.call("events", "--stats", c.id).stdout
    check('"pids"' in events and '"memory"' in events, events)
    c.call("delete", "--force", c.id)
    check(not g.exists(), f"{g} is still there")


def test_more_limits(host):
    """Huge pages, bursts, idleness, weights of devices, and files by their own names; what the kernel has not is an error."""
    def limited(label, resources, ok=(0,)):
        c = busybox(host, "sleep", "1000", label=label, resources=resources)
        c.run(ok=ok)
        return c

    c = limited("all", {
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
        "cpu": {"quota": 20000, "period": 100000, "burst": 10000},
        "blockIO": {"weight": 500},
        "unified": {"memory.oom.group": "1", "cpu.weight": "7", "hugetlb.1GB.max": "0"},
    })
    g = group(c)
    files(g, hugetlb__2MB__max=str(4 << 20), hugetlb__2MB__rsvd__max=str(4 << 20), cpu__max__burst="10000", memory__oom__group="1",
          cpu__weight="7", hugetlb__1GB__max="0")
    weights = {"io.bfq.weight": "500", "io.weight": "4950"}
    there = [name for name in weights if (g / name).exists()]
    check(there, "no file for weights")
    equal((g / there[0]).read_text().split()[-1], weights[there[0]], there[0])
    c.call("update", "--cpu-burst", "5000", "--blkio-weight", "1000", c.id)
    files(g, cpu__max__burst="5000")
    c.call("update", "--cpu-idle", "1", c.id)
    files(g, cpu__idle="1")
    files(group(limited("idle", {"cpu": {"idle": 1}})), cpu__idle="1")
    for label, resources, words in [
        ("size", {"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}, "hugetlb.3MB.max: no such file or directory"),
        ("rdma", {"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10}}}, "rdma.max: "),
        ("burst", {"cpu": {"quota": 20000, "period": 100000, "burst": 30000}}, "cpu.max: invalid argument"),
        ("form", {"unified": {"memory": "1"}}, 'unified resource "memory" must be in the form CONTROLLER.PARAMETER'),
        ("slash", {"unified": {"a/b": "1"}}, 'unified resource "a/b" must be a file name (no slashes)'),
        ("nobody", {"unified": {"nobody.max": "1"}}, "can't be set: controller \"nobody\" not available"),
        ("swap", {"memory": {"limit": 100 << 20, "swap": 50 << 20}}, "memory+swap limit should be >= memory limit"),
    ]:
        text = limited(label, resources, ok=[1]).text().replace('\\"', '"')
        check(words in text, f"{label}: {text}")


def test_memory_limit(host):
    """Too much memory: the kernel ends the program, and `memory.events` says so."""
    c = busybox(host, "sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M count=1; echo status $?; sleep 1000",
                resources={"memory": {"limit": 16 << 20, "swap": 16 << 20}})
    c.run()
    until(lambda: "status" in c.text(), "dd to end")
    check("status 137" in c.text(), c.text())
    events = dict(line.split() for line in (group(c) / "memory.events").read_text().splitlines())
    check(int(events["oom_kill"]) > 0, str(events))


def test_pids_limit(host):
    """No more processes than allowed, those of `exec` included."""
    c = busybox(host, "sleep", "1000", resources={"pids": {"limit": 5}})
    c.run()
    done = c.exec("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1000 >/dev/null 2>&1 & done; echo all made", ok=None)
    check("can't fork" in done.stderr and "all made" not in done.stdout, f"{done.stdout}{done.stderr}")
    events = (group(c) / "pids.events").read_text()
    check(int(events.split()[1]) > 0, events)


def test_io_limit(host):
    """A throttled disk is slow: 2 MiB at 1 MiB/s take more than a second."""
    major, minor = map(int, disk().split(":"))
    script = "s=$(cut -d. -f1 /proc/uptime); dd if=/dev/zero of=/big bs=1M count=3 conv=fsync 2>/dev/null; e=$(cut -d. -f1 /proc/uptime); echo took $((e-s)); sleep 1000"
    c = busybox(host, "sh", "-c", script, resources={
        "blockIO": {"throttleWriteBpsDevice": [{"major": major, "minor": minor, "rate": 1 << 20}]}})
    c.run()
    until(lambda: "took" in c.text(), "dd to end", 60)
    check(int(c.text().split("took")[1].split()[0]) >= 2, c.text())


def test_devices(host):
    """The device program: default devices open, others don't, for `exec` too; a rule may allow reading only."""
    def change(spec):
        spec["linux"]["resources"]["devices"] = [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "c", "major": 10, "minor": 237, "access": "r"},  # loop-control
        ]

    c = busybox(host, "sleep", "1000", change=change)
    c.run()
    say = lambda script: c.exec("sh", "-c", f"({script}) 2>&1; true").stdout  # noqa: E731
    equal(say("echo x >/dev/null && head -c 1 /dev/zero | wc -c").strip(), "1", "default devices")
    equal(say("mknod /mem c 1 1 && echo made").strip(), "made", "mknod, which is always allowed")
    say("mknod /loop c 10 237")
    equal(say("exec 3</loop && echo opened").strip(), "opened", "reading what may be read")
    check("not permitted" in say("exec 3>/loop"), "writing what may only be read")
    check("not permitted" in say("cat /mem"), "opening another device")
    c.call("update", "--pids-limit", "100", c.id)
    check("not permitted" in say("cat /mem"), "opening another device after an update")


def test_everything_allowed(host):
    """A privileged container opens any device."""
    def change(spec):
        spec["linux"]["resources"]["devices"] = [{"allow": True, "access": "rwm"}]
        for kind in ("bounding", "effective", "permitted"):
            spec["process"]["capabilities"][kind] = [*spec["process"]["capabilities"][kind], "CAP_SYS_ADMIN", "CAP_SYSLOG"]

    c = busybox(host, "sh", "-c", "mknod /k c 1 11 && exec 3</k && echo opened; sleep 1000", change=change)
    c.run()
    until(lambda: "opened" in c.text(), f"it to be opened: {c.text()}")


def test_freeze(host):
    """pause writes cgroup.freeze and waits for `frozen 1`; kill reaches what is frozen."""
    c = busybox(host, "sh", "-c", COUNT)
    c.run()
    until(lambda: "5\n" in c.text(), "counting")
    g = group(c)
    c.call("pause", c.id)
    files(g, cgroup__freeze="1")
    check("frozen 1" in (g / "cgroup.events").read_text(), "it isn't frozen")
    equal(c.state(), "paused", "state")
    c.call("resume", c.id)
    files(g, cgroup__freeze="0")
    still = c.text()
    until(lambda: c.text() != still, "counting again")
    c.call("pause", c.id)
    c.call("kill", c.id, "KILL")
    until(lambda: c.state() == "stopped", "the end of what is frozen")
    c.call("delete", c.id)
    check(not g.exists(), f"{g} is still there")


def test_groups_inside(host):
    """Groups that the container makes: --all kills in them, a checkpoint keeps them, delete removes them."""
    real_checkpoints()

    def change(spec):
        for mount in spec["mounts"]:
            if mount["destination"] == "/sys/fs/cgroup":
                mount["options"] = ["nosuid", "noexec", "nodev", "rw"]

    script = ("mkdir /sys/fs/cgroup/leaf && echo $$ >/sys/fs/cgroup/leaf/cgroup.procs && "
              "echo +pids >/sys/fs/cgroup/cgroup.subtree_control; mkdir /sys/fs/cgroup/other && "
              "echo 7 >/sys/fs/cgroup/other/pids.max; (echo 0 >/sys/fs/cgroup/other/cgroup.procs; exec sleep 1000) & ") + COUNT
    c = busybox(host, "sh", "-c", script, change=change)
    c.run()
    until(lambda: "5\n" in c.text(), f"counting: {c.text()}")
    g = group(c).parent
    equal(group(c).name, "leaf", "init's group")
    equal(len((g / "other/cgroup.procs").read_text().split()), 1, "processes in the other group")
    c.checkpoint("image")
    until(lambda: not g.exists() or c.call("delete", c.id, ok=None) and not g.exists(), "the group to go")
    c.restore("image")
    equal(group(c).name, "leaf", "init's group after the restore")
    equal(len((group(c).parent / "other/cgroup.procs").read_text().split()), 1, "processes in the other group")
    files(group(c).parent / "other", pids__max="7")
    still = c.text()
    until(lambda: c.text() != still, "counting again")
    c.call("kill", "--all", c.id, "KILL")
    until(lambda: c.state() == "stopped", "the end")
    c.call("delete", c.id)
    check(not g.exists(), f"{g} is still there")


def test_checkpoint_keeps_limits(host):
    """A restored container has the limits of its config.json, and is frozen if it was."""
    real_checkpoints()
    c = busybox(host, "sh", "-c", COUNT, resources={"memory": {"limit": 64 << 20}, "pids": {"limit": 20}})
    c.run()
    until(lambda: "5\n" in c.text(), "counting")
    c.call("pause", c.id)
    c.checkpoint("image")
    c.restore("image")
    g = group(c)
    files(g, memory__max=str(64 << 20), pids__max="20", cgroup__freeze="1")
    still = c.text()
    c.call("resume", c.id)
    files(g, cgroup__freeze="0")
    until(lambda: c.text() != still, "counting again")
    check("not permitted" in c.exec("sh", "-c", "mknod /m c 1 1; cat /m 2>&1; true").stdout, "devices after the restore")


def test_crowd(host):
    """Ten containers started at once, each in a group of its own."""
    all_of_them = [busybox(host, "sleep", "1000", label=f"c{i}") for i in range(10)]
    errors = []

    def run(c):
        try:
            c.run()
        except Exception as e:  # shown below
            errors.append(e)

    threads = [threading.Thread(target=run, args=(c,)) for c in all_of_them]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    check(not errors, "\n".join(map(str, errors)))
    equal(len({group(c) for c in all_of_them}), 10, "groups")
    for c in all_of_them:
        os.kill(c.pid(), signal.SIGKILL)
    for c in all_of_them:
        until(lambda c=c: c.state() == "stopped", "the end")
