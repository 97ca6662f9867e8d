"""Containers of users without privileges who have control groups of their own: delegated directories, the user's own
systemd, more than one id. Needs systemd as init and pure cgroup v2: `integration/vm/test` boots the virtual machine with it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile

from harness import RUNTIME, Skip, check, config, equal, need, rootfs, sh, until

ME, FIRST, COUNT = 23456, 200000, 65536
# The machine as systemd sees it: what it mounts does not come into our own mount namespace.
SEEN = pathlib.Path("/proc/1/root")
GROUPS = pathlib.Path("/sys/fs/cgroup")
SLICE = f"user.slice/user-{ME}.slice/user@{ME}.service"


class User:
    """A user with a session: a systemd and a bus of his own, and a directory with Stasis and a bundle."""

    def __init__(self, host, maps=()):
        if not os.path.exists("/run/systemd/private"):
            raise Skip("systemd does not run here")
        need("setpriv", "newuidmap", "useradd", "dbus-daemon")
        if sh("id", "-u", "tester", ok=None).returncode != 0:
            sh("useradd", "--create-home", "--uid", ME, "tester")
            for file in "/etc/subuid", "/etc/subgid":
                pathlib.Path(file).write_text(f"tester:{FIRST}:{COUNT}\n")
        sh("systemctl", "start", "dbus.socket", "systemd-logind.service", f"user@{ME}.service")
        self.runtime = pathlib.Path(f"/run/user/{ME}")
        until((SEEN / f"run/user/{ME}/bus").exists, "the user's bus")
        self.top = pathlib.Path(tempfile.mkdtemp(dir="/tmp", prefix="stasis-rootless-"))
        host.undo.append(lambda: shutil.rmtree(self.top))
        self.bundle = self.top / "bundle"
        shutil.copytree(rootfs("busybox"), self.bundle / "rootfs", symlinks=True)
        shutil.copy(RUNTIME, self.top / "stasis")
        sh("chown", "-R", f"{ME}:{ME}", self.top)
        for directory in self.top, self.bundle, self.bundle / "rootfs", self.top / "stasis":
            directory.chmod(0o755)
        self.host, self.maps = host, maps
        self.prefix, self.flags = [], []

    def outside(self):
        """In front of what the user runs in no namespace or scope of his own."""
        return ["nsenter", "--target=1", "--mount", f"--wdns={self.bundle}", "--", "setpriv", f"--reuid={ME}", f"--regid={ME}",
                "--init-groups", "--", "env", "-u", "DBUS_SESSION_BUS_ADDRESS", f"XDG_RUNTIME_DIR={self.runtime}",
                f"HOME={self.top}"]

    def words(self, *words):
        return [str(w) for w in (*self.outside(), *self.prefix, *words)]

    def sh(self, *words, **how):
        return sh(*self.words(*words), **how)

    def call(self, *words, **how):
        return self.sh(self.top / "stasis", *self.flags, *words, **how)

    def delegate(self):
        """From now on, commands are run in a scope of his systemd: beside it he may make groups."""
        self.prefix = ["systemd-run", "--user", "--scope", "--quiet", "--collect", "--"]

    def create(self, name, script, resources=None, path=None, change=None):
        """Makes and starts a container; its output is in the file that is returned."""
        spec = config(["sh", "-c", script])
        spec["process"]["capabilities"] = {k: spec["process"]["capabilities"]["bounding"] for k in ("bounding", "effective", "permitted")}
        for mount in spec["mounts"]:
            mount["options"] = [o for o in mount["options"] if self.maps or not o.startswith("gid=")]
        linux = spec["linux"]
        linux["namespaces"] += [{"type": "user"}, {"type": "cgroup"}]
        one = [{"containerID": 0, "hostID": ME, "size": 1}]
        linux["uidMappings"] = linux["gidMappings"] = one + list(self.maps)
        linux["resources"].update(resources or {})
        if path:
            linux["cgroupsPath"] = path
        if change:
            change(spec)
        (self.bundle / "config.json").write_text(json.dumps(spec))
        log = self.top / f"{name}.log"
        self.host.undo.append(lambda: self.call("delete", "--force", name, ok=None))
        with log.open("wb") as out:
            self.made = subprocess.run(self.words(self.top / "stasis", *self.flags, "run", "--detach", name), timeout=600,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        return log

    def run(self, *args, **how):
        log = self.create(*args, **how)
        equal(self.made.returncode, 0, f"run: {log.read_text()}")
        return log

    def state(self, name):
        return json.loads(self.call("state", name).stdout)


def group_of(pid):
    return GROUPS / pathlib.Path(f"/proc/{pid}/cgroup").read_text().strip()[4:]


LIMITS = {"memory": {"limit": 64 << 20}, "pids": {"limit": 20}, "cpu": {"quota": 20000, "period": 100000}}


def life(user, name, group):
    """What a container with a control group of its own can do, whoever made the group."""
    equal((group / "memory.max").read_text().strip(), str(64 << 20), "memory.max")
    equal((group / "pids.max").read_text().strip(), "20", "pids.max")
    equal((group / "cpu.max").read_text().strip(), "20000 100000", "cpu.max")
    user.call("update", "--memory", 80 << 20, "--pids-limit", "30", name)
    equal((group / "memory.max").read_text().strip(), str(80 << 20), "memory.max after an update")
    equal((group / "pids.max").read_text().strip(), "30", "pids.max after an update")
    said = user.call("exec", "--user", "0", name, "sh", "-c", "id -u; cat /proc/self/cgroup").stdout.split()
    equal(said, ["0", "0::/"], "exec")
    user.call("pause", name)
    equal(user.state(name)["status"], "paused", "after pause")
    equal((group / "cgroup.freeze").read_text().strip(), "1", "cgroup.freeze")
    user.call("resume", name)
    equal(user.state(name)["status"], "running", "after resume")
    stats = json.loads(user.call("events", "--stats", name).stdout)["data"]
    equal(stats["pids"]["limit"], 30, "events --stats")
    pids = json.loads(user.call("ps", "--format", "json", name).stdout)
    check(user.state(name)["pid"] in pids, f"ps: {pids}")
    user.call("kill", "--all", name, "KILL")
    until(lambda: user.state(name)["status"] == "stopped", "the end")
    user.call("delete", name)
    check(not group.exists(), f"{group} is still there")


def test_delegated(host):
    """A directory beside the user's own group, which he may write."""
    user = User(host)
    user.delegate()
    user.run("one", "echo here; sleep 1000", resources=LIMITS)
    group = group_of(user.state("one")["pid"])
    check(str(group).startswith(str(GROUPS / SLICE)), f"{group} is not below the user's systemd")
    equal(os.stat(group).st_uid, ME, "owner of the group")
    check((SEEN / f"run/user/{ME}/stasis/one/state.json").exists(), "state.json is not below XDG_RUNTIME_DIR")
    life(user, "one", group)


def test_named(host):
    """A cgroupsPath that the user may write."""
    user = User(host)
    user.delegate()
    user.run("one", "sleep 1000", resources=LIMITS, path=f"/{SLICE}/app.slice/stasis-test/one")
    group = group_of(user.state("one")["pid"])
    equal(group, GROUPS / SLICE / "app.slice/stasis-test/one", "the group")
    life(user, "one", group)
    (GROUPS / SLICE / "app.slice/stasis-test").rmdir()


def test_forbidden(host):
    """Where nothing may be made: no group, as long as none is asked for; else an error that says what would help."""
    user = User(host)
    user.run("none", "sleep 1000")
    equal(group_of(user.state("none")["pid"]), group_of(os.getpid()), "the group without any")
    said = user.call("pause", "none", ok=[1]).stderr
    user.call("delete", "--force", "none")
    said = user.create("limits", "true", resources={"pids": {"limit": 10}}).read_text()
    equal(user.made.returncode, 1, said)
    check("rootless needs no limits + no cgrouppath when no permission is granted for cgroups" in said, said)
    said = user.create("path", "true", path="/stasis-forbidden").read_text()
    equal(user.made.returncode, 1, said)
    check("permission denied" in said.lower(), said)


def unit(user, name):
    shown = sh(*user.outside(), "systemctl", "--user", "show", name).stdout
    return dict(line.partition("=")[::2] for line in shown.splitlines())


def managed(user, name):
    user.run(name, "sleep 1000", resources=LIMITS | {"unified": {"memory.high": str(48 << 20)}}, path=f"app.slice:test:{name}")
    scope = f"test-{name}.scope"
    shown = unit(user, scope)
    for key, value in {"ActiveState": "active", "Slice": "app.slice", "Delegate": "yes", "MemoryMax": str(64 << 20),
                       "TasksMax": "20", "CPUQuotaPerSecUSec": "200ms", "MemoryHigh": str(48 << 20)}.items():
        equal(shown[key], value, key)
    group = group_of(user.state(name)["pid"])
    equal(group, GROUPS / SLICE / "app.slice" / scope, "the group")
    user.call("update", "--pids-limit", "25", name)
    sh(*user.outside(), "systemctl", "--user", "daemon-reload")
    equal((group / "pids.max").read_text().strip(), "25", "pids.max after an update and a reload")
    user.call("update", "--pids-limit", "20", name)
    life(user, name, group)
    equal(unit(user, scope)["ActiveState"], "inactive", "the unit after delete")


def test_systemd(host):
    """--systemd-cgroup: the unit is one of the user's own systemd."""
    user = User(host)
    user.flags = ["--systemd-cgroup"]
    user.run("plain", "sleep 1000")
    equal(group_of(user.state("plain")["pid"]), GROUPS / SLICE / "user.slice/runc-plain.scope", "the group without a path")
    user.call("delete", "--force", "plain")
    managed(user, "one")


def test_systemd_mapped(host):
    """The same for the user as root of a user namespace, which is how Podman calls a runtime."""
    user = User(host)
    user.flags = ["--systemd-cgroup"]
    user.prefix = ["unshare", "--map-root-user", "--mount", "--"]

    def nested(spec):
        for kind in "uid", "gid":
            spec["linux"][f"{kind}Mappings"] = [{"containerID": 0, "hostID": 0, "size": 1}]

    create = user.create
    user.create = lambda *args, **how: create(*args, change=nested, **how)
    # One namespace for all the commands: a second one may not touch what the first has made.
    holder = subprocess.Popen(user.words("sh", "-c", "echo $$; exec sleep 10000"), stdout=subprocess.PIPE, text=True)
    host.undo.append(lambda: (holder.kill(), holder.wait()))
    inside = holder.stdout.readline().strip()
    user.prefix = ["nsenter", f"--target={inside}", "--user", "--mount", f"--wdns={user.bundle}", "--preserve-credentials", "--"]
    managed(user, "one")


def test_no_bus(host):
    """--systemd-cgroup without a bus says what is missing."""
    user = User(host)
    user.flags = ["--systemd-cgroup"]
    user.runtime = user.top / "nowhere"
    said = user.create("one", "true").read_text()
    equal(user.made.returncode, 1, said)
    check("could not detect DBUS_SESSION_BUS_ADDRESS from the environment" in said, said)


def test_many_ids(host):
    """With newuidmap and newgidmap: more than one id, groups, and a program and an exec of another user."""
    user = User(host, maps=[{"containerID": 1, "hostID": FIRST, "size": COUNT}])
    user.delegate()

    def somebody(spec):
        spec["process"]["user"] = {"uid": 1000, "gid": 1000}

    script = "id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map; cat /proc/self/setgroups; touch /tmp/mine; sleep 1000"
    (user.bundle / "rootfs/tmp").mkdir(exist_ok=True)
    (user.bundle / "rootfs/tmp").chmod(0o1777)
    log = user.run("many", script, resources=LIMITS, change=somebody)
    until((user.bundle / "rootfs/tmp/mine").exists, f"the program: {log.read_text()}")
    maps = ["0", str(ME), "1", "1", str(FIRST), str(COUNT)]
    equal(log.read_text().split(), ["1000", "1000", *maps, *maps, "allow"], "inside")
    equal((user.bundle / "rootfs/tmp/mine").stat().st_uid, FIRST + 999, "owner of a file of its making")
    said = user.call("exec", "--user", "7:8", "many", "id").stdout
    check("uid=7 gid=8" in said, said)
    said = user.call("exec", "--user", "0", "many", "sh", "-c", "chown 5:6 /tmp/mine; id -u").stdout
    equal(said, "0\n", "exec as root")
    equal((user.bundle / "rootfs/tmp/mine").stat().st_uid, FIRST + 4, "owner after chown")
    life(user, "many", group_of(user.state("many")["pid"]))
    sh("rm", "-f", user.bundle / "rootfs/tmp/mine")


def test_no_newuidmap(host):
    """Without newuidmap on PATH one id is fine, and more are refused by name."""
    user = User(host, maps=[{"containerID": 1, "hostID": FIRST, "size": COUNT}])
    user.prefix = ["env", "PATH=/nowhere"]
    said = user.create("many", "true").read_text()
    equal(user.made.returncode, 1, said)
    check("newuidmap" in said, said)
    user.maps = []
    user.run("one", "sleep 1000")
    equal(user.state("one")["status"], "running", "with one id")
