"""Podman, with storage and state of the test's own. `criu` on its path is Stasis itself."""

import json
import os
import pathlib
import re
import resource
import shutil
import socket
import tempfile

from harness import (RUNTIME, Failed, Host, Skip, Terminal, check, equal, need, oci_archive, program, real_checkpoints, remove_cgroup,
                     session, sh, tail, until)

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
        # Nobody's systemd has to run the health checks: the test asks for each.
        self.env["DISABLE_HC_SYSTEMD"] = "true"
        # Podman 5 says of control groups of version 1 that they are old.
        self.env["PODMAN_IGNORE_CGROUPSV1_WARNING"] = "true"
        self.storage = ["--root", self.dir / "storage", "--runroot", f"{self.short}/run", "--storage-driver", "overlay"]
        self.client = ["podman", "--runtime", RUNTIME, *self.storage, "--tmpdir", f"{self.short}/tmp", "--cgroup-manager", "cgroupfs",
                       "--events-backend", "none"]
        host.undo.append(self.unmount)
        host.undo.append(self.remove_all)
        self("load", "-i", oci_archive("busybox"), "--signature-policy", self.dir / "policy.json")
        names = self("images", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").stdout.split()
        check(names, "the image was not loaded")
        self("tag", names[1], "localhost/busybox:test")

    def __call__(self, *words, env=None, **how):
        return sh(*self.client, *words, env={**self.env, **(env or {})}, **how)

    def run(self, *words, network="none", **how):
        return self(*self.new(network), *words, **how)

    def new(self, network="none"):
        return ["run", "--cgroup-parent", self.cgroup, "--network", network]

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
    until(lambda: "up\n" in p("logs", "exec").stdout, "the log")
    equal(p("exec", "exec", "sh", "-c", "echo hello; exit 4", ok=[4]).stdout, "hello\n", "exec")
    p("pause", "exec")
    equal(p.status("exec"), "paused 0", "paused")
    p("unpause", "exec")
    p("stop", "exec")
    equal(p.status("exec"), "exited 3", "stopped")


def test_terminal(host):
    """run -it and exec -it, with somebody who types; attach to what was left."""
    p = podman(host)
    session(Terminal(host, *p.client, *p.new(), "--rm", "-it", IMAGE, "sh", env=p.env))
    p.run("-d", "-it", "--name", "typed", IMAGE, "sh")
    session(Terminal(host, *p.client, "exec", "-it", "typed", "sh", env=p.env))
    there = Terminal(host, *p.client, "attach", "typed", env=p.env)
    there.type("\n")
    there.expect("#")
    session(there, status=None)
    until(lambda: p.status("typed") == "exited 7", "the end")


def test_health(host):
    """healthcheck run: an exec in the container, whose status decides."""
    p = podman(host)
    p.run("-d", "--name", "health", "--health-cmd", "test ! -e /ill", "--health-retries", "1", IMAGE, "sleep", "1000")
    health = lambda: p("inspect", "-f", "{{.State.Health.Status}}", "health").stdout.strip()  # noqa: E731
    p("healthcheck", "run", "health")
    equal(health(), "healthy", "health")
    p("exec", "health", "touch", "/ill")
    p("healthcheck", "run", "health", ok=[1])
    equal(health(), "unhealthy", "illness")


def test_sdnotify(host):
    """--sdnotify=container: what the program says reaches who waits for it, with the pid to watch."""
    p = podman(host)
    notify = program("notify")
    path = f"{p.short}/notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(60)
        p.run("-d", "--name", "notify", "--sdnotify", "container", "-v", f"{notify}:/notify:ro", IMAGE, "/notify", "READY=1",
              env={"NOTIFY_SOCKET": path})
        said = set()
        while len(said) < 2:
            said |= set(manager.recv(4096).decode().split())
    os.unlink(path)
    conmon = p("inspect", "-f", "{{.State.ConmonPid}}", "notify").stdout.strip()
    equal(said, {"READY=1", f"MAINPID={conmon}"}, "what was said")


def test_user_namespace(host):
    """--uidmap, --gidmap: root inside is nobody special outside, and its files and volumes are its own."""
    p = podman(host)
    volume = host.dir / "volume"
    volume.mkdir()
    os.chown(volume, 200000, 300000)
    maps = ("--uidmap", "0:200000:5000", "--gidmap", "0:300000:6000")
    p.run("-d", "--name", "mapped", *maps, "-v", f"{volume}:/volume", IMAGE, "sh", "-c", "touch /volume/mine /etc/mine && exec sleep 1000")
    until(lambda: p("exec", "mapped", "test", "-e", "/etc/mine", ok=None).returncode == 0, "the program's files")
    said = p("exec", "mapped", "sh", "-c", "id -u; cat /proc/self/uid_map /proc/self/gid_map; stat -c '%u %g' /bin/sh /etc/mine").stdout
    equal(said.split(), "0 0 200000 5000 0 300000 6000 0 0 0 0".split(), "inside")
    made = os.stat(volume / "mine")
    equal((made.st_uid, made.st_gid), (200000, 300000), "owner outside")
    p("exec", "-u", "7:8", "mapped", "sh", "-c", "id -u; id -g; touch /tmp/mine")
    p("exec", "mapped", "mknod", "/tmp/disk", "b", "8", "0", ok=[1])
    p("stop", "-t", "0", "mapped")
    p("start", "mapped")
    until(lambda: p.status("mapped") == "running 0", "the second start")


def ids_of_containers(host):
    """What --userns=auto takes."""
    for name in "subuid", "subgid":
        if not os.path.exists(f"/etc/{name}"):
            raise Skip(f"there is no /etc/{name} to mount one's own on")
        (host.dir / name).write_text("containers:500000:200000\n")
        sh("mount", "--bind", host.dir / name, f"/etc/{name}")
        host.undo.append(lambda name=name: sh("umount", "-l", f"/etc/{name}"))


def remove_for_good(p):
    """Removes all containers. Whoever watches over one that has ended cleans up as well, and one of the two fails then."""

    def removed():
        p("rm", "-f", "-t", "0", "-a", ok=None)
        return p("ps", "-aq").stdout == ""

    until(removed, "the containers to be removed")


def test_user_namespace_auto(host):
    """--userns=auto: each container gets ids of its own from those of the user `containers`."""
    ids_of_containers(host)
    p = podman(host)
    seen = set()
    for name in "first", "second":
        p.run("-d", "--name", name, "--userns", "auto:size=2000", IMAGE, "sleep", "1000")
        inside, outside, size = p("exec", name, "cat", "/proc/self/uid_map").stdout.split()
        equal((inside, size), ("0", "2000"), "the map")
        check(500000 <= int(outside) <= 698000, f"ids from {outside} on")
        seen.add(outside)
        p("exec", name, "touch", "/etc/mine")
    equal(len(seen), 2, "ranges of ids")
    remove_for_good(p)


def test_preserve_fds(host):
    """--preserve-fds: descriptors of whoever calls are the container's, from 3 on."""
    p = podman(host)
    # Podman takes them from its own 3 and 4, whatever this process has there.
    script = 'exec 3<"$1" 4>"$2"; shift 2; exec "$@"'
    (host.dir / "in").write_text("given\n")
    out = host.dir / "out"
    words = [*p.client, *p.new(), "--rm", "--preserve-fds", "2", IMAGE, "sh", "-c", "read x <&3; echo $x and back >&4; ls /proc/$$/fd"]
    done = sh("sh", "-c", script, "sh", host.dir / "in", out, *words, env=p.env)
    equal(out.read_text(), "given and back\n", "what came through the descriptors")
    check({"3", "4"} <= set(done.stdout.split()), f"descriptors: {done.stdout}")


def test_limits(host):
    """Limits at the start, update, stats."""
    p = podman(host)
    p.run("-d", "--name", "limits", "--memory", "64m", "--pids-limit", "50", IMAGE, "sleep", "1000")
    if not os.path.exists("/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        raise Skip("no v1 memory controller here")
    pid = p("inspect", "-f", "{{.State.Pid}}", "limits").stdout.strip()

    def read(controller, file):
        path = re.search(rf"[:,]{controller}[:,]\S*?(/.*)", open(f"/proc/{pid}/cgroup").read())[1]
        return open(f"/sys/fs/cgroup/{controller}{path}/{file}").read().strip()

    equal((read("memory", "memory.limit_in_bytes"), read("pids", "pids.max")), (str(64 << 20), "50"), "limits")
    p("update", "--memory", "80m", "--memory-swap", "80m", "--cpus", "0.5", "--cpuset-cpus", "0", "limits")
    equal(read("memory", "memory.limit_in_bytes"), str(80 << 20), "memory after the update")
    equal(int(read("cpu", "cpu.cfs_quota_us")) * 2, int(read("cpu", "cpu.cfs_period_us")), "cpu after the update")
    equal(read("cpuset", "cpuset.cpus"), "0", "processors after the update")
    stats = p("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}} {{.MemUsage}}", "limits").stdout
    check(re.match(r"limits 1 [1-9]\S+B / ", stats), f"stats: {stats}")


def test_pod_namespaces(host):
    """Containers of a pod that shares pids as well; the pod is paused, stopped, started and removed as one."""
    p = podman(host)
    p("pod", "create", "--name", "pod", "--share", "net,ipc,uts,pid", "--network", "none", "--infra-image", IMAGE,
      "--infra-command", "sleep 10000", "--cgroup-parent", p.cgroup, "--hostname", "pod")
    for name in "one", "two":
        p("run", "-d", "--pod", "pod", "--name", name, IMAGE, "sh", "-c", f"trap 'exit 0' TERM; : {name}; while :; do sleep 0.1; done")
    for kind in "net", "ipc", "uts", "pid":
        seen = {p("exec", name, "readlink", f"/proc/self/ns/{kind}").stdout for name in ("one", "two")}
        equal(len(seen), 1, f"{kind} namespaces: {seen}")
    until(lambda: ": two" in p("exec", "one", "ps", "-o", "args").stdout, "the neighbour among the processes")
    equal(p("exec", "two", "hostname").stdout, "pod\n", "host name")
    p("pod", "pause", "pod")
    equal({p.status(name) for name in ("one", "two")}, {"paused 0"}, "after pod pause")
    p("pod", "unpause", "pod")
    p("pod", "stop", "-t", "1", "pod")
    equal({p.status(name).split()[0] for name in ("one", "two")}, {"exited"}, "after pod stop")
    p("pod", "start", "pod")
    equal({p.status(name) for name in ("one", "two")}, {"running 0"}, "after pod start")
    done = p("pod", "rm", "-f", "-t", "0", "pod", ok=None)
    # Where a controller of v1 is not mounted, Podman makes mere directories, and fails to remove them again.
    check(done.returncode == 0 or "conmon cgroup: remove /sys/fs/cgroup/" in done.stderr, done.stderr)
    equal(p("ps", "-q").stdout, "", "containers that run on")


def test_buildah(host):
    """buildah run and buildah bud: what is built with Stasis runs with it."""
    need("buildah")
    p = podman(host)
    buildah = lambda *words, **how: sh("buildah", *p.storage, *words, env=p.env, **how)  # noqa: E731
    flags = ["--runtime", RUNTIME, "--isolation", "oci", "--network", "none"]
    name = buildah("from", "--pull-never", IMAGE).stdout.strip()
    host.undo.append(lambda: buildah("rm", name, ok=None))
    done = buildah("run", *flags, "--user", "7:8", "-v", f"{host.dir}:/host:ro", name, "sh", "-c", "id -u; echo oops >&2; exit 5", ok=[5])
    equal((done.stdout, done.stderr.splitlines()[0]), ("7\n", "oops"), "buildah run")
    buildah("run", *flags, name, "sh", "-c", "echo kept >/kept")
    buildah("run", *flags, name, "/no/such/program", ok=[1, 125, 127])
    session(Terminal(host, "buildah", *p.storage, "run", *flags, "-t", name, "sh", env=p.env), resize=False)
    buildah("commit", "-q", "--signature-policy", p.dir / "policy.json", name, "localhost/built:run")
    equal(p.run("--rm", "localhost/built:run", "cat", "/kept").stdout, "kept\n", "a file of the image")
    (host.dir / "Dockerfile").write_text(f"FROM {IMAGE}\nENV A=b\nRUN echo $A >/made && id -u >>/made\nUSER 9\nRUN id -u >/tmp/mine\n")
    bud = lambda file, **how: buildah("bud", *flags, "-q", "--pull-never", "--signature-policy", p.dir / "policy.json", "-t", "localhost/built:bud",  # noqa: E731
                                      "-f", host.dir / file, host.dir, **how)
    bud("Dockerfile")
    equal(p.run("--rm", "localhost/built:bud", "cat", "/made", "/tmp/mine").stdout, "b\n0\n9\n", "what RUN has made")
    (host.dir / "Failing").write_text(f"FROM {IMAGE}\nRUN exit 6\n")
    check("exit status 6" in bud("Failing", ok=range(1, 128)).stderr, "a RUN that fails")


def of_user(host, me):
    """Podman of a user without privileges: its image, and a function that calls it."""
    need("setpriv", "unshare")
    p = podman(host)
    user = ["env", "-u", "USER", "setpriv", f"--reuid={me}", f"--regid={me}", "--clear-groups", "--"]
    probe = sh(*user, "unshare", "--map-root-user", "--mount", "--pid", "--fork", "mount", "-t", "proc", "proc", "/proc", ok=None)
    if probe.returncode != 0:
        raise Skip(f"no user namespaces for everybody here: {probe.stderr.strip()}")
    top = tempfile.mkdtemp(dir="/tmp", prefix="stasis-podman-rootless-")
    host.undo.append(lambda: shutil.rmtree(top))
    for name in "home", "run", "store", "runroot", "tmp":
        os.mkdir(f"{top}/{name}", 0o700)
    shutil.copy(RUNTIME, f"{top}/stasis")
    shutil.copy(p.dir / "policy.json", top)
    shutil.copy(oci_archive("busybox"), f"{top}/image.tar")
    (host.dir / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{top}/runroot"\ngraphroot = "{top}/store"\n[storage.options]\nignore_chown_errors = "true"\n')
    shutil.copy(host.dir / "storage.conf", f"{top}/storage.conf")
    shutil.copy(p.dir / "containers.conf", f"{top}/containers.conf")
    sh("chown", "-R", f"{me}:{me}", top)
    os.chmod(top, 0o755)
    env = {"HOME": f"{top}/home", "XDG_RUNTIME_DIR": f"{top}/run", "CONTAINERS_STORAGE_CONF": f"{top}/storage.conf",
           "CONTAINERS_CONF": f"{top}/containers.conf", "TMPDIR": f"{top}/tmp", "DBUS_SESSION_BUS_ADDRESS": ""}

    def call(*words, **how):
        return sh(*user, "podman", "--runtime", f"{top}/stasis", "--cgroup-manager", "cgroupfs", "--events-backend", "none", *words,
                  env=env, cwd=top, **how)

    call("load", "-i", f"{top}/image.tar", "--signature-policy", f"{top}/policy.json")
    host.undo.append(lambda: call("rm", "-f", "-t", "0", "-a", ok=None))
    return call("images", "-q").stdout.split()[0], call


def test_rootless(host):
    """Podman of a user without privileges, with his one id: run, exec, logs, stop, rm."""
    me = 23457
    name, call = of_user(host, me)
    flags = ["--network", "none"]
    call("run", "-d", "--name", "there", *flags, name, "sh", "-c", "echo up; exec sleep 1000")
    until(lambda: call("logs", "there").stdout == "up\n", "the log")
    said = call("exec", "there", "sh", "-c", "id -u; cat /proc/1/uid_map; exit 6", ok=[6]).stdout
    equal(said.split(), ["0", "0", str(me), "1"], "ids inside")
    call("run", "--rm", *flags, name, "/no/such/program", ok=[127])
    call("stop", "-t", "0", "there")
    call("rm", "there")


def test_keep_id(host):
    """--userns=keep-id: the user has his own id inside, and what he makes in a volume is his outside."""
    need("newuidmap", "newgidmap")
    me = 23458
    for name, line in {"passwd": f"keeper:x:{me}:{me}::/:/bin/sh", "group": f"keeper:x:{me}:", "subuid": "keeper:700000:65536",
                       "subgid": "keeper:700000:65536"}.items():
        if not os.path.exists(f"/etc/{name}"):
            raise Skip(f"there is no /etc/{name} to mount one's own on")
        (host.dir / name).write_text(pathlib.Path(f"/etc/{name}").read_text() + line + "\n")
        sh("mount", "--bind", host.dir / name, f"/etc/{name}")
        host.undo.append(lambda name=name: sh("umount", "-l", f"/etc/{name}"))
    name, call = of_user(host, me)
    volume = tempfile.mkdtemp(dir="/tmp", prefix="stasis-podman-keep-id-")
    host.undo.append(lambda: shutil.rmtree(volume))
    os.chown(volume, me, me)
    flags = ["--network", "none", "--userns", "keep-id", "-v", f"{volume}:/volume"]
    call("run", "-d", "--name", "kept", *flags, name, "sh", "-c", "id -u; touch /volume/mine; exec sleep 1000")
    until(lambda: call("logs", "kept").stdout == f"{me}\n", "the log")
    until(lambda: os.path.exists(f"{volume}/mine"), "a file in the volume")
    equal(os.stat(f"{volume}/mine").st_uid, me, "owner outside")
    equal(call("exec", "kept", "id", "-u").stdout, f"{me}\n", "exec")
    equal(call("exec", "--user", "0", "kept", "sh", "-c", "chown 5 /volume/mine; id -u").stdout, "0\n", "exec as root")
    equal(os.stat(f"{volume}/mine").st_uid, 700005, "owner outside after chown")
    call("rm", "-f", "-t", "0", "kept")


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


def test_checkpoint_user_namespace(host):
    """--uidmap and --userns=auto: checkpoint and restore, then export and import under another name."""
    real_checkpoints()
    ids_of_containers(host)
    p = podman(host)
    counting = "echo kept >/file; chown 7:8 /file; echo too >/tmp/file; chown 9:10 /tmp/file; " + COUNT
    ways = ("--uidmap", "0:200000:5000", "--gidmap", "0:300000:6000"), ("--userns", "auto:size=2000")
    for way in ways:
        p.run("-d", "--name", "mapped", *way, "--tmpfs", "/tmp", IMAGE, "sh", "-c", counting)
        until(lambda: len(numbers(p, "mapped")) > 10, "counting")
        archive, at = host.dir / "mapped.tar", 0

        def look(name, at=at):
            said = p("exec", name, "sh", "-c", "id -u; stat -c %u:%g /file /tmp/file /etc /tmp /dev/pts; cat /file /tmp/file").stdout
            equal(said.split(), ["0", "7:8", "9:10", "0:0", "0:0", "0:0", "kept", "too"], f"inside {name} with {way}")
            print(f"        {name}: {' '.join(p('exec', name, 'cat', '/proc/self/uid_map').stdout.split())}")

        look("mapped")
        p("container", "checkpoint", "mapped")
        at = numbers(p, "mapped")[-1]
        restore(p, "mapped")
        went_on(p, "mapped", at)
        look("mapped")
        p("container", "checkpoint", "--export", archive, "--compress", "none", "mapped")
        at = numbers(p, "mapped")[-1]
        # With --userns=auto Podman gives the files other ids where the old ones are taken, and config.json the old ones.
        remove_for_good(p)
        for name in "second", "third":
            restore(p, "--import", archive, "--name", name)
            went_on(p, name, at)
            look(name)
            remove_for_good(p)


def test_pre_checkpoint(host):
    """--pre-checkpoint saves the memory of a container that runs on, --with-previous the rest; here, and elsewhere."""
    real_checkpoints()
    p = podman(host)
    # Memory of its own, to be seen in the sizes.
    grow = "x=0123456789abcdef; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19; do x=$x$x; done; "
    p.run("-d", "--name", "first", IMAGE, "sh", "-c", grow + "i=0; while :; do echo $((i=i+1)); sleep 0.02; done; echo $x")

    def size(archive):
        return os.path.getsize(archive)

    for cycle in range(2):
        until(lambda: len(numbers(p, "first")) > 10 * (cycle + 1), "counting", 60)
        p("container", "checkpoint", "--pre-checkpoint", "first")
        equal(p.status("first"), "running 0", "after the pre-checkpoint")
        p("container", "checkpoint", "--with-previous", "first")
        last = numbers(p, "first")[-1]
        restore(p, "first")
        until(lambda: numbers(p, "first")[-1] > last + 10, "counting on")
    before, rest = host.dir / "before.tar", host.dir / "rest.tar"
    p("container", "checkpoint", "--pre-checkpoint", "--compress", "none", "--export", before, "first")
    p("container", "checkpoint", "--with-previous", "--compress", "none", "--export", rest, "first")
    check(size(before) > 4 << 20 and size(rest) < size(before) / 2, f"{size(before)} bytes, then {size(rest)}")
    last = numbers(p, "first")[-1]
    p("rm", "first")
    restore(p, "--import-previous", before, "--import", rest, "--name", "second")
    went_on(p, "second", last)


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
