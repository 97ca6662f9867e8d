"""What config.json can ask for, seen from inside the container."""

import errno
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import threading

from harness import RUNTIME, Container, Failed, Skip, check, config, equal, need, rootfs, sh, until
from hostile import Swap


def run(host, script, change=None, label="c", ok=(0,)):
    """Runs a script in busybox, and returns what it printed."""
    spec = config(("sh", "-c", script), root=host.overlay("busybox", label))
    if change:
        change(spec)
    c = Container(host, label, spec)
    done = c.call("run", "--bundle", c.bundle, c.id, stdin="", ok=list(ok))
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


def mount(host, destination, *options, kind="bind", source=None):
    return {"destination": destination, "type": kind, "source": str(source or host.dir), "options": list(options)}


def in_user_namespace(spec, first=100000):
    spec["linux"]["namespaces"].append({"type": "user"})
    for name in "uidMappings", "gidMappings":
        spec["linux"][name] = [{"containerID": 0, "hostID": first, "size": 65536}]
    spec["mounts"] = [m for m in spec["mounts"] if m["type"] != "cgroup"]


def test_recursive_options(host):
    """rro, rnoexec and friends hold for what is mounted below; ro for the mount itself alone."""
    tree = host.dir / "tree"
    (tree / "below").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / "below"], check=True)
    try:
        flags = "grep -o '^[^ ]* [^ ]* [^ ]* [^ ]* /data[^ ]* [^ ]*' /proc/self/mountinfo | cut -d' ' -f5,6"
        script = f"{flags}; touch /data/a 2>/dev/null && echo top; touch /data/below/a 2>/dev/null && echo below; true"
        said = run(host, script, lambda s: s["mounts"].append(mount(host, "/data", "rbind", "ro", source=tree)), "ro")
        check("top" not in said.split("\n") and "below" in said.split("\n"), f"ro: {said}")
        said = run(host, script, lambda s: s["mounts"].append(mount(host, "/data", "rbind", "rro", "rnosuid", source=tree)), "rro")
        check("below" not in said.split("\n"), f"rro: {said}")
        equal(len(re.findall(r"^/data\S* ro,nosuid", said, re.M)), 2, f"rro,rnosuid: {said}")
    finally:
        subprocess.run(["umount", tree / "below"], check=True)


def test_copy_up(host):
    """tmpcopyup: a tmpfs starts with what it hides, and keeps changes to itself."""
    spec = lambda s: s["mounts"].append(mount(host, "/etc", "tmpcopyup", kind="tmpfs", source="tmpfs"))  # noqa: E731
    said = run(host, "ls /etc; touch /etc/new && mount | grep -c 'tmpfs on /etc '", spec)
    plain = run(host, "ls /etc", label="plain")
    equal(said.split()[:-1], plain.split(), "the copy")
    equal(said.split()[-1], "1", "tmpfs")


def test_idmap(host):
    """idmap: owners are shifted by the mount's own mappings, or by the container's."""
    tree = host.dir / "tree"
    tree.mkdir()
    (tree / "file").write_text("x")
    os.chown(tree / "file", 7, 8)

    def change(spec):
        mapped = mount(host, "/data", "bind", source=tree)
        for name in "uidMappings", "gidMappings":
            mapped[name] = [{"containerID": 0, "hostID": 1000, "size": 100}]
        spec["mounts"].append(mapped)

    said = run(host, "stat -c '%u %g' /data/file", change, ok=(0, 1))
    if "idmap mounts on this kernel" in said:
        raise Skip("this file system can't be mounted with other ids")
    equal(said, "1007 1008\n", "owner through the mount")
    # What mount_setattr(2) maps from: the ids on disk, here those of a container in a user namespace.

    def change(spec):  # noqa: F811
        in_user_namespace(spec)
        spec["mounts"].append(mount(host, "/data", "bind", "idmap", source=tree))

    os.chmod(host.dir, 0o755)
    equal(run(host, "stat -c '%u %g' /data/file; touch /data/new", change, "u"), "7 8\n", "owner seen from inside")
    new = os.stat(tree / "new")
    equal((new.st_uid, new.st_gid), (0, 0), "owner of what was made inside")
    # `ridmap` is for the mounts below it, too.
    below = host.dir / "below"
    below.mkdir()
    (below / "file").write_text("x")
    os.chown(below / "file", 7, 8)
    (tree / "sub").mkdir()
    sh("mount", "--bind", below, tree / "sub")
    host.undo.append(lambda: sh("umount", tree / "sub"))
    for option, owner in ("ridmap", "7 8"), ("idmap", "65534 65534"):

        def change(spec):  # noqa: F811
            in_user_namespace(spec)
            spec["mounts"].append(mount(host, "/data", "bind", "rbind", option, source=tree))

        equal(run(host, "stat -c '%u %g' /data/sub/file", change, option), f"{owner}\n", f"owner below {option}")


def test_user_namespace(host):
    """A user namespace with mappings: root inside is nobody special outside."""

    def change(spec):
        in_user_namespace(spec)
        spec["mounts"].append(mount(host, "/data", "bind", source=outside))

    outside = host.dir / "outside"
    outside.mkdir()
    os.chown(outside, 100000, 100000)
    said = run(host, "id -u; cat /proc/self/uid_map; touch /data/mine; test -c /dev/null && echo x > /dev/null && echo null", change)
    equal(said.split(), ["0", "0", "100000", "65536", "null"], "inside")
    equal(os.stat(outside / "mine").st_uid, 100000, "owner outside")


def test_rootless(host):
    """A user without privileges runs what `spec --rootless` makes: without control groups, as root of a user namespace
    with his one id."""
    need("setpriv", "unshare")
    me = 23456
    user = ["setpriv", f"--reuid={me}", f"--regid={me}", "--clear-groups", "--"]
    probe = sh(*user, "unshare", "--map-root-user", "--mount", "--pid", "--fork", "mount", "-t", "proc", "proc", "/proc", ok=None)
    if probe.returncode != 0:
        raise Skip(f"no user namespaces for everybody here: {probe.stderr.strip()}")
    # Neither the build directory nor the programs in it need be within this user's reach.
    top = pathlib.Path(tempfile.mkdtemp(dir="/tmp", prefix="stasis-rootless-"))
    host.undo.append(lambda: shutil.rmtree(top))
    bundle = top / "bundle"
    shutil.copytree(rootfs("busybox"), bundle / "rootfs", symlinks=True)
    shutil.copy(RUNTIME, top / "stasis")
    sh("chown", "-R", f"{me}:{me}", top)
    for directory in top, bundle, bundle / "rootfs":
        directory.chmod(0o755)
    (top / "stasis").chmod(0o755)

    def call(*words, **how):
        return sh(*user, top / "stasis", "--root", top / "root", *words, cwd=bundle, **how)

    def program(script):
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"].update(args=["sh", "-c", script], terminal=False)
        spec["root"]["readonly"] = False
        (bundle / "config.json").write_text(json.dumps(spec))

    call("spec", "--rootless")
    program("id -u; cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups; exit 7")
    said = call("run", "one", stdin="", ok=[7]).stdout
    equal(said.split(), ["0", "0", str(me), "1", "0", str(me), "1", "deny"], "ids inside")

    host.undo.append(lambda: call("delete", "--force", "two", ok=None))
    program("touch /started; while :; do sleep 1000; done")
    # The container keeps the output it was made with: a pipe of ours would not end.
    with (top / "log").open("wb") as log:
        made = subprocess.run([*user, top / "stasis", "--root", top / "root", "create", "two"], cwd=bundle, timeout=120,
                              stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    equal((made.returncode, (top / "log").read_text()), (0, ""), "create")
    status = lambda: json.loads(call("state", "two").stdout)["status"]  # noqa: E731
    equal(status(), "created", "after create")
    equal(call("exec", "two", "id", "-u").stdout, "0\n", "exec before start")
    call("start", "two")
    until((bundle / "rootfs/started").exists, "the program")
    said = call("exec", "two", "sh", "-c", "id -u; cat /proc/self/uid_map; exit 5", ok=[5]).stdout
    equal(said.split(), ["0", "0", str(me), "1"], "ids of exec")
    equal((bundle / "rootfs/started").stat().st_uid, me, "owner of what was made inside")
    refused = call("checkpoint", "--image-path", top / "image", "two", ok=[1]).stderr
    check("without control groups can't be checkpointed" in refused, refused)
    equal(status(), "running", "after a checkpoint that was refused")
    call("kill", "two", "KILL")
    # The processes of a pid namespace are all reaped before its init is, some by the host's init, which takes its time.
    until(lambda: status() == "stopped", "the end after SIGKILL")
    call("delete", "two")
    equal(os.listdir(top / "root"), [], "what is left")


def test_scheduling(host):
    """scheduler, ioPriority, personality, oomScoreAdj, memoryPolicy, umask reach the program."""

    def change(spec):
        p = spec["process"]
        p["scheduler"] = {"policy": "SCHED_BATCH", "nice": 7}
        p["ioPriority"] = {"class": "IOPRIO_CLASS_IDLE", "priority": 0}
        p["oomScoreAdj"] = 321
        p["user"]["umask"] = 0o27
        spec["linux"]["personality"] = {"domain": "LINUX32"}
        spec["linux"]["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "0"}

    script = "set -- $(cut -d')' -f2 /proc/self/stat); echo ${17}; ionice -p $$; uname -m; cat /proc/self/oom_score_adj; umask; \
              grep -m1 -o 'bind:0' /proc/self/numa_maps || true"
    lines = run(host, script, change).split("\n")
    equal(lines[0], "7", f"nice: {lines}")
    equal(lines[1].split(":")[0], "idle", f"ionice: {lines}")
    equal(lines[2:5], ["i686", "321", "0027"], f"the rest: {lines}")


def test_names_and_clocks(host):
    """domainname; a time namespace with offsets."""

    def change(spec):
        spec["domainname"] = "example.test"
        spec["linux"]["namespaces"].append({"type": "time"})
        spec["linux"]["timeOffsets"] = {"boottime": {"secs": 1000000}}

    said = run(host, "cat /proc/sys/kernel/domainname; cut -d. -f1 /proc/uptime", change).split()
    equal(said[0], "example.test", "domain name")
    ours = float(open("/proc/uptime").read().split()[0])
    check(999000 < float(said[1]) - ours < 1001000, f"uptime inside {said[1]}, outside {ours}")


def test_seccomp_listener(host):
    """SCMP_ACT_NOTIFY: the agent at listenerPath gets the descriptor with the state, and answers the calls."""
    path = f"/tmp/stasis-seccomp-{os.getpid()}.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    listener.settimeout(60)
    got = {}

    def agent():
        connection, _ = listener.accept()
        text, fds, _, _ = socket.recv_fds(connection, 65536, 1)
        got["state"] = json.loads(text)
        got["fd"] = os.readlink(f"/proc/self/fd/{fds[0]}")
        # Closing it lets every call that asked fail with ENOSYS.
        os.close(fds[0])
        connection.close()

    def change(spec):
        spec["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path, "listenerMetadata": "from the test",
            "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
        }

    thread = threading.Thread(target=agent, daemon=True)
    thread.start()
    try:
        said = run(host, "mkdir /made 2>&1; echo over", change)
        thread.join(60)
    finally:
        listener.close()
        os.unlink(path)
    check("not implemented" in said and "over" in said, said)
    equal((got["state"]["metadata"], got["state"]["fds"]), ("from the test", ["seccompFd"]), "message")
    check("seccomp" in got["fd"] and got["state"]["state"]["status"] == "creating", str(got))


def test_seccomp_actions(host):
    """errnoRet, conditions on arguments, and an action for a whole list of calls."""

    def change(spec):
        spec["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat", "call_of_tomorrow"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13, "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
            ],
        }

    said = run(host, "mkdir /x 2>&1; trap '' USR1 USR2; kill -USR1 $$ 2>&1; kill -USR2 $$ && echo fine", change)
    check("No space left" in said and "Permission denied" in said and "fine" in said, said)


def test_hostile_root(host):
    """Links in mount targets, masked paths, devices and /proc itself lead nowhere outside (CVE-2021-30465 and its kin)."""
    victim = host.dir / "victim"
    victim.mkdir()
    for label, link, change in [
        ("target", "drop", lambda s: s["mounts"].append(mount(host, "/drop/x", kind="tmpfs", source="tmpfs"))),
        ("device", "made", lambda s: s["linux"].setdefault("devices", []).append(
            {"path": "/made/null", "type": "c", "major": 1, "minor": 3, "fileMode": 438})),
    ]:
        spec = config(("true",), root=host.overlay("busybox", label))
        change(spec)
        os.symlink(victim, f"{spec['root']['path']}/{link}")
        c = Container(host, label, spec)
        c.call("run", "--bundle", c.bundle, c.id, stdin="", ok=None)
        equal(os.listdir(victim), [], f"{label}: what was made outside")
    for label, name in [("proc", "proc"), ("masked", "etc")]:
        spec = config(("true",), root=host.overlay("busybox", label))
        root = spec["root"]["path"]
        subprocess.run(["rm", "-rf", f"{root}/{name}"], check=True)
        os.symlink("/tmp", f"{root}/{name}")
        if label == "masked":
            spec["linux"]["maskedPaths"] = ["/etc/passwd"]
            spec["linux"]["readonlyPaths"] = ["/etc"]
        c = Container(host, label, spec)
        done = c.call("run", "--bundle", c.bundle, c.id, stdin="", ok=None)
        if label == "proc":
            check(done.returncode != 0, "a /proc that is a link was mounted on")
    check(os.path.getsize("/etc/passwd") > 0, "the host's /etc/passwd")


def test_swapped_target(host):
    """A mount target that is exchanged for a link to a directory outside, over and over while containers start, is
    mounted on inside or not at all."""
    victim = host.dir / "victim"
    victim.mkdir()
    spec = config(("cat", "/proc/self/mountinfo"), root=host.overlay("busybox", "c"))
    # More of them, more of a race.
    points = [f"/drop/x{n}" for n in range(20)]
    spec["mounts"] += [mount(host, point, kind="tmpfs", source="racer") for point in points]
    root = spec["root"]["path"]
    os.mkdir(f"{root}/drop")
    os.symlink(victim, f"{root}/link")
    # Outside there is what could be mounted on.
    names = sorted(os.path.basename(point) for point in points)
    for name in names:
        (victim / name).mkdir()
    c = Container(host, "c", spec)
    with Swap(root, ("drop", "link")) as swap:
        for _ in range(15):
            done = c.call("run", "--bundle", c.bundle, c.id, stdin="", ok=None)
            if done.returncode == 0:
                equal(len(re.findall(r" tmpfs racer ", done.stdout)), len(points), f"mounts of the racer: {done.stdout}")
            equal(sorted(str(path.relative_to(victim)) for path in victim.rglob("*")), names, "what is outside")
    check(swap.done > 50, f"only {swap.done} exchanges: that is no race")


def test_net_devices(host):
    """A device moves into the container with its addresses, under another name, and is up."""
    ours, peer = f"s{os.getpid()}", f"p{os.getpid()}"
    if subprocess.run(["ip", "link", "add", ours, "type", "veth", "peer", "name", peer], capture_output=True).returncode != 0:
        raise Skip("this kernel has no veth devices")
    try:
        subprocess.run(["ip", "address", "add", "10.77.0.1/24", "dev", ours], check=True)
        subprocess.run(["ip", "link", "set", ours, "up"], check=True)
        said = run(host, "ip -o link show inside; ip -o -4 address show inside",
                   lambda s: s["linux"].update(netDevices={ours: {"name": "inside"}}))
        check("UP" in said.split("\n")[0], said)
        check("10.77.0.1/24" in said, said)
        missing = run(host, "true", lambda s: s["linux"].update(netDevices={"nope0": {}}), "missing", ok=(1,))
        check("move netDevice nope0" in missing and "link not found" in missing, missing)
    finally:
        subprocess.run(["ip", "link", "delete", peer], capture_output=True)


def test_leaks(host):
    """No descriptor or working directory of the runtime's, or of who calls it, reaches a program (CVE-2024-21626), no
    exec gets inheritable capabilities that nobody asked for (CVE-2022-29162)."""
    spec = config(("sleep", "1000"), root=host.overlay("busybox", "c"))
    c = Container(host, "c", spec, output="null")
    c.run()
    equal(c.exec("sh", "-c", "ls /proc/self/fd").stdout.split(), ["0", "1", "2", "3"], "descriptors: ls has one itself")
    equal(re.findall(r"Cap(?:Inh|Amb):\s*(\w+)", c.exec("cat", "/proc/self/status").stdout), ["0" * 16] * 2, "inheritable, ambient")
    # The caller's have no close-on-exec flag.
    lists = Container(host, "lists", config(("ls", "/proc/self/fd"), root=host.overlay("busybox", "lists")))
    for command in c.command("exec", c.id, "ls", "/proc/self/fd"), lists.command("run", "--bundle", lists.bundle, lists.id):
        said = sh("sh", "-c", 'exec 4</etc 9</; exec "$@"', "sh", *command).stdout
        equal(said.split(), ["0", "1", "2", "3"], f"descriptors of a caller, in {command}")
    ours = open("/etc/hostname").read().strip() if os.path.exists("/etc/hostname") else "?"
    for number in range(3, 12):
        done = c.call("exec", "--cwd", f"/proc/self/fd/{number}", c.id, "cat", "../../../../../etc/hostname", ok=None)
        check(done.returncode != 0 and ours not in done.stdout.split(), f"descriptor {number}: {done.stdout}")
        label = f"run{number}"
        spec = config(("cat", "../../../../../etc/hostname"), root=host.overlay("busybox", label), cwd=f"/proc/self/fd/{number}")
        r = Container(host, label, spec)
        done = r.call("run", "--bundle", r.bundle, r.id, stdin="", ok=None)
        check(ours not in done.stdout.split(), f"descriptor {number}: {done.stdout}")
    # A directory of the host's that is passed on is no working directory all the same.
    r = Container(host, "passed", config(("true",), root=host.overlay("busybox", "passed"), cwd="/proc/self/fd/3"))
    for command in r.command("run", "--preserve-fds", "1", "--bundle", r.bundle, r.id), \
            c.command("exec", "--preserve-fds", "1", "--cwd", "/proc/self/fd/3", c.id, "true"):
        done = sh("sh", "-c", 'exec 3</; exec "$@"', "sh", *command, ok=None)
        check(done.returncode != 0 and "outside of container mount namespace root" in done.stderr, f"{command}: {done.stderr}")


def test_tracing(host):
    """What waits for `start` is the runtime's still: a process of the container without CAP_SYS_PTRACE cannot look into it."""
    c = Container(host, "c", config(("sleep", "1000"), root=host.overlay("busybox", "c")))
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(c.command("create", "--bundle", c.bundle, c.id), check=True, timeout=60, **nowhere)
    script = "readlink /proc/1/exe; readlink /proc/1/fd/0; readlink /proc/1/cwd; cat /proc/1/environ 2>/dev/null"
    equal(c.exec("sh", "-c", script, ok=None).stdout, "", "what is seen of init before its program")
    c.call("start", c.id)
    until(lambda: open(f"/proc/{c.pid()}/cmdline").read().startswith("sleep"), "the program")
    check("/bin/busybox" in c.exec("sh", "-c", script).stdout, "the program itself can be looked at")


def test_no_proc(host):
    """A created container waits for `start` where it has no /proc, and where its image has something in that place."""
    for label, names in ("none", []), ("forged", [f"self/fd/{n}" for n in range(3, 30)]):
        root = host.overlay("busybox", label)
        for name in names:
            path = pathlib.Path(root) / "proc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("untouched")
        spec = config(("touch", "/started"), root=root)
        spec["mounts"] = [m for m in spec["mounts"] if m["destination"] != "/proc"]
        spec["linux"].update(maskedPaths=[], readonlyPaths=[])
        c = Container(host, label, spec, output="null")
        subprocess.run(c.command("create", "--bundle", c.bundle, c.id), check=True, timeout=60, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        equal(c.state(), "created", label)
        check(not os.path.exists(f"{root}/started"), f"{label}: it has not waited")
        c.call("start", c.id)
        until(lambda c=c: c.state() == "stopped", f"{label}: the end of the program")
        check(os.path.exists(f"{root}/started"), f"{label}: it has not run")
        equal({(pathlib.Path(root) / "proc" / n).read_text() for n in names} - {"untouched"}, set(), f"{label}: what init wrote")


def test_program_file(host):
    """What a container can reach of the runtime's program is not the file on the host (CVE-2019-5736)."""
    c = Container(host, "c", config(("/proc/self/exe", "--version"), root=host.overlay("busybox", "c")))
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(c.command("create", "--bundle", c.bundle, c.id), check=True, timeout=60, **nowhere)
    link = f"/proc/{c.pid()}/exe"
    check(os.path.dirname(os.readlink(link)) == "/", f"init runs from {os.readlink(link)}, which has a place on the host")
    try:
        os.close(os.open(link, os.O_WRONLY))
        raise Failed("the program of init can be written")
    except OSError as e:
        check(e.errno in (errno.EROFS, errno.ETXTBSY), str(e))
    # Nor is one that lies on a read-only overlay of the host's: that can be mounted otherwise, or written below.
    for name in "lower", "empty", "merged":
        (host.dir / name).mkdir()
    shutil.copy(RUNTIME, host.dir / "lower/runtime")
    sh("mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={host.dir}/lower:{host.dir}/empty", host.dir / "merged")
    host.undo.append(lambda: sh("umount", "-l", host.dir / "merged"))
    d = Container(host, "d", config(("true",), root=host.overlay("busybox", "d")))
    subprocess.run([host.dir / "merged/runtime", *d.command("create", "--bundle", d.bundle, d.id)[1:]], check=True, timeout=60, **nowhere)
    check(os.path.dirname(os.readlink(f"/proc/{d.pid()}/exe")) == "/", "init runs from a place on the host")
