"""Real programs in containers made by hand, checkpointed and restored."""

import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import tempfile
import types

from harness import (RUNTIME, TOP, Container, Failed, Redis, Skip, check, config, equal, image_size, program, real_checkpoints,
                     remove_cgroup, rootfs, sh, until)

KEYS = 100_000


def bind(source, destination):
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rw"]}


def load_client():
    return program("load")


def redis_container(host, label="redis", script=None, output="file"):
    """redis-server, listening on a port of its own network namespace and on a unix socket that the host sees too."""
    data = host.dir / f"{label}.data"
    data.mkdir(mode=0o777)
    root = host.overlay("redis", label)
    server = ["redis-server", "--port", "6379", "--unixsocket", "/data/redis.sock", "--unixsocketperm", "777",
              "--save", "", "--appendonly", "no", "--dir", "/tmp", "--enable-debug-command", "yes"]
    args = ["/bin/sh", "-c", script.replace("REDIS", " ".join(f"'{w}'" for w in server))] if script else server
    container = Container(host, label, config(args, root=root, mounts=[bind(data, "/data")]), output=output)
    container.socket = data / "redis.sock"
    return container


def serving(container):
    def ask():
        try:
            with Redis(container.socket) as redis:
                return redis("PING") == "PONG"
        except (OSError, Failed):
            return False

    until(ask, f"redis in {container.id} to answer: {container.text()}")


def fill(container, keys=KEYS):
    with Redis(container.socket) as redis:
        for at in range(0, keys, 10_000):
            redis.many(("SET", f"key:{i}", hashlib.md5(b"%d" % i).hexdigest()) for i in range(at, min(at + 10_000, keys)))


def digest(container):
    with Redis(container.socket) as redis:
        return redis("DBSIZE"), redis("DEBUG", "DIGEST")


def test_redis(host):
    """100,000 keys: stop checkpoint, restore; the same data set, still writable."""
    real_checkpoints()
    c = redis_container(host)
    c.run()
    serving(c)
    fill(c)
    before = digest(c)
    equal(before[0], KEYS, "keys before")
    c.checkpoint("image")
    check(c.state() in ("", "stopped"), f"after the checkpoint the container is {c.state()}")
    c.restore("image")
    equal(digest(c), before, "keys and digest after the restore")
    with Redis(c.socket) as redis:
        equal(redis("SET", "after", "restore"), "OK", "SET after the restore")
        equal(redis("GET", "key:99999"), hashlib.md5(b"99999").hexdigest(), "a key")
    c.call("kill", c.id, "TERM")
    until(lambda: c.state() == "stopped", "redis to end on SIGTERM")
    check("User requested shutdown" in c.text(), "redis' last words are not in the log that the restore was given")


def test_redis_leave_running(host):
    """The container goes on after --leave-running; the image is what it was at that moment."""
    real_checkpoints()
    c = redis_container(host)
    c.run()
    serving(c)
    fill(c)
    before = digest(c)
    c.checkpoint("image", "--leave-running")
    equal(c.state(), "running", "state after the checkpoint")
    equal(digest(c), before, "the one left running")
    with Redis(c.socket) as redis:
        redis("FLUSHALL")
    c.delete()
    c.restore("image")
    equal(digest(c), before, "keys and digest after the restore")


def test_redis_under_load(host):
    """A client writes all the time over a connection it keeps. Every write it saw acknowledged must be there."""
    real_checkpoints()
    c = redis_container(host, script="REDIS & exec /load /data/redis.sock", output="pipe")
    sh("cp", load_client(), c.spec["root"]["path"] + "/load")
    c.run()
    serving(c)
    fill(c)

    def acknowledged():
        numbers = re.findall(r"^(\d+)$", c.text().rpartition("\n")[0], re.M)
        return int(numbers[-1]) if numbers else 0

    def all_there(upto):
        with Redis(c.socket) as redis:
            for at in range(1, upto + 1, 10_000):
                numbers = range(at, min(at + 10_000, upto + 1))
                equal(redis.many(("GET", f"load:{i}") for i in numbers), [str(i * 7) for i in numbers], "acknowledged writes")

    until(lambda: acknowledged() > 500, "the client to write")
    earlier = acknowledged()
    c.checkpoint("first", "--leave-running")
    until(lambda n=acknowledged(): acknowledged() > n + 500, "the client to go on after --leave-running")
    all_there(acknowledged())
    c.checkpoint("second")
    c.drained()
    upto = acknowledged()
    del c.printed[:]
    c.restore("second")
    until(lambda: acknowledged() > upto + 500, "the client to go on after the restore")
    check(min(int(n) for n in c.lines() if n.isdigit()) == upto + 1,
          "the client's first number after the restore is not the one after its last before")
    all_there(acknowledged())
    c.delete()
    c.restore("first")
    all_there(earlier)


def test_redis_twenty_cycles(host):
    """Checkpoint and restore, twenty times in a row, a new key each time."""
    real_checkpoints()
    c = redis_container(host)
    c.run()
    serving(c)
    fill(c)
    for cycle in range(20):
        c.checkpoint("image")  # into the directory that holds the last one
        c.restore("image")
        with Redis(c.socket) as redis:
            redis("SET", f"cycle:{cycle}", cycle)
            equal(redis("DBSIZE"), KEYS + cycle + 1, f"keys after cycle {cycle}")
            equal(redis("MGET", *(f"cycle:{i}" for i in range(cycle + 1))), [str(i) for i in range(cycle + 1)], "cycles")


def ask_threads(path):
    s = socket.socket(socket.AF_UNIX)
    directory = os.open(path, os.O_PATH)
    try:
        s.connect(f"/proc/self/fd/{directory}/threads.sock")
    finally:
        os.close(directory)
    with s, s.makefile() as f:
        return json.loads(f.read())


def chain(upto):
    d = hashlib.sha256(b"0").hexdigest()
    for _ in range(upto):
        d = hashlib.sha256(d.encode()).hexdigest()
    return d


def python_story(host, kill):
    data = host.dir / "data"
    data.mkdir()
    program = (TOP / "integration/programs/threads.py").read_text()
    (data / "threads.py").write_text(program)
    spec = config(["/usr/bin/python3", "-u", "/data/threads.py"], root=host.overlay("python", "python"), mounts=[bind(data, "/data")])
    c = Container(host, "python", spec)
    c.run()
    until(lambda: "serving" in c.text() or c.state() != "running", "python to serve")
    check("serving" in c.text(), c.text())
    until(lambda: all(n > 0 for n, _ in ask_threads(data)["state"]), "every counter to have begun")
    before = ask_threads(data)
    kill(c)
    middle = ask_threads(data)

    def further():
        """How it is when each thread has done something more."""
        now = ask_threads(data)
        counters = all(later[0] > was[0] for was, later in zip(middle["state"], now["state"]))
        return now if counters and all(now[what] > middle[what] for what in ("taken", "ticks", "turns")) or not all(now["alive"]) else None

    after = until(further, f"every thread to go on from {middle}", 60)
    for a in (middle, after):
        check(all(a["alive"]), f"threads died: {a['alive']}\n{c.text()}")
        equal(a["tids"], before["tids"], "thread ids")
        equal(a["listening"], before["listening"], "the listening socket")
    for was, now, later in zip(before["state"], middle["state"], after["state"]):
        check(was[0] <= now[0] < later[0], f"a counter went from {was[0]} to {now[0]} to {later[0]}")
        equal(later[1], chain(later[0]), f"hash number {later[0]}")
    for what in ("taken", "ticks", "turns"):
        check(before[what] <= middle[what] < after[what], f"{what}: {before[what]}, {middle[what]}, {after[what]}")


def test_python_plain(host):
    """The Python program itself, without a checkpoint: does the test hold water?"""
    python_story(host, lambda c: None)


def test_python_threads(host):
    """Fourteen Python threads, restored in the middle of what they do."""
    real_checkpoints()

    def cycle(c):
        for i in range(3):
            c.checkpoint(f"image{i}")
            c.restore(f"image{i}")

    python_story(host, cycle)


def shell_story(host, between):
    spec = config(["/bin/sh"], root=host.overlay("busybox", "shell"), tty=True)
    c = Container(host, "shell", spec)
    c.run()
    until(lambda: "# \x1b[6n" in c.text(), "a prompt")
    c.type("i=0; while [ $i -lt 1000000 ]; do echo n$i; i=$((i+1)); sleep 0.02; done | cat | cat\n")
    until(lambda: "\nn20\r" in c.text(), "the pipeline to count")
    between(c)
    reached = len(re.findall(r"^n\d+\r$", c.text(), re.M))
    until(lambda: len(re.findall(r"^n\d+\r$", c.text(), re.M)) > reached + 20, "the pipeline to go on")
    numbers = [int(n) for n in re.findall(r"^n(\d+)\r$", c.text(), re.M)]
    equal(numbers, list(range(len(numbers))), "the numbers")
    prompts = c.text().count("# \x1b[6n")
    c.type("\x03")
    until(lambda: c.text().count("# \x1b[6n") > prompts, "a prompt after Ctrl-C")  # what is typed earlier may be thrown away
    c.type("echo $((6*7))-$$; stty size; tty\n")
    until(lambda: "\n42-1\r" in c.text(), f"the shell to answer after Ctrl-C: {c.text()[-200:]!r}")
    until(lambda: re.search(r"\n/dev/(pts/0|console)\r", c.text()), f"the terminal's name: {c.text()[-200:]!r}")
    c.type("exit 3\n")
    until(lambda: c.state() == "stopped", "the shell to end")


def test_shell_plain(host):
    """The shell itself, without a checkpoint."""
    shell_story(host, lambda c: None)


def test_shell_with_tty(host):
    """An interactive shell with a pipeline running on its terminal, restored onto another terminal."""
    real_checkpoints()

    def cycle(c):
        for i in range(2):
            c.checkpoint(f"image{i}")
            c.restore(f"image{i}")

    shell_story(host, cycle)


def postgres_story(host, between):
    data = host.dir / "data"
    data.mkdir(mode=0o777)
    os.chown(data, 105, 105)
    bin_ = "/usr/lib/postgresql/15/bin"
    script = (f"set -e; {bin_}/initdb -D /data/db -A trust -U postgres -N >/dev/null; "
              f"exec {bin_}/postgres -D /data/db -k /data -c listen_addresses=127.0.0.1 -c shared_buffers=32MB -c jit=off")
    spec = config(["/bin/sh", "-c", script], root=host.overlay("postgres", "postgres"), user=(105, 105),
                  mounts=[bind(data, "/data")], env=["LC_ALL=C", "HOME=/data"])
    c = Container(host, "postgres", spec)
    c.run()

    def sql(text, **how):
        # Each statement by itself: some don't like to be in a transaction with others.
        statements = [word for one in text.split("; ") for word in ("-c", one)]
        return c.exec(f"{bin_}/psql", "-h", "/data", "-U", "postgres", "-AtXq", "-v", "ON_ERROR_STOP=1", *statements, **how)

    until(lambda: sql("select 1", ok=None).stdout == "1\n", "PostgreSQL to answer", 60)
    sql("create table t as select i, md5(i::text) as h from generate_series(1, 100000) i; create index on t(i)")
    query = "select count(*), sum(i), md5(string_agg(h, '' order by i)) from t"
    before = sql(query).stdout
    processes = c.exec("ps", "-o", "pid,args").stdout
    between(c)
    equal(sql(query).stdout, before, "the table")
    sql("insert into t values (-1, 'after'); checkpoint; vacuum analyze t")
    equal(sql("select h from t where i = -1").stdout, "after\n", "a new row")
    sql("set max_parallel_workers_per_gather = 2; set parallel_setup_cost = 0; set parallel_tuple_cost = 0; "
        "set min_parallel_table_scan_size = 0; select count(*) from t")  # new shared memory, new processes
    for name in ("checkpointer", "background writer", "walwriter", "autovacuum launcher"):
        line = re.search(rf"^ *(\d+) .*{name}", processes, re.M)
        check(line, f"no {name} in {processes}")
        check(re.search(rf"^ *{line[1]} .*{name}", c.exec("ps", "-o", "pid,args").stdout, re.M), f"{name} is not pid {line[1]} any more")
    c.call("kill", c.id, "INT")
    until(lambda: c.state() == "stopped", f"PostgreSQL to end on SIGINT: {c.text()}")
    check("database system is shut down" in c.text(), f"PostgreSQL did not end in good order: {c.text()}")


def test_postgres_plain(host):
    """PostgreSQL itself, without a checkpoint."""
    postgres_story(host, lambda c: None)


def test_postgres(host):
    """PostgreSQL's processes, shared memory and sockets, restored twice and answering queries."""
    real_checkpoints()

    def cycle(c):
        for i in range(2):
            c.checkpoint(f"image{i}")
            c.restore(f"image{i}")

    postgres_story(host, cycle)


def test_redis_plain(host):
    """redis itself with its load, without a checkpoint."""
    c = redis_container(host, script="REDIS & exec /load /data/redis.sock", output="pipe")
    sh("cp", load_client(), c.spec["root"]["path"] + "/load")
    c.run()
    serving(c)
    fill(c, 1000)
    until(lambda: "\n300\n" in c.text(), "the load client to write")
    c.delete()
    check(image_size(host.dir) > 0 and rootfs("redis").exists(), "nothing")


def sandbox(host, label, command, capabilities=("CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_NET_ADMIN"), first=False, **how):
    """A program in a pid namespace that `command` makes in the container, checkpointed and restored, twice: it goes on
    counting, under its old pid, sees itself and its children and nobody else, and so do programs that it starts."""
    real_checkpoints()
    # How many processes /proc shows: the shell, the one that asks, and bubblewrap's own.
    count = "i=0; while :; do i=$((i + 1)); set -- /proc/[0-9]*; echo $$ $i $#; sleep 0.05; done"
    # Not as the container's first process, if not asked for: what that one mounts is the container's.
    outer = [*([] if first else ["/bin/sh", "-c", '"$@"; :', "sh"]), *command, "/bin/sh", "-c", count]
    spec = config(outer, root=host.overlay("sandbox", label), **how)
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] += capabilities
    c = Container(host, label, spec)

    def seen():
        lines = [line.split() for line in c.text().rpartition("\n")[0].splitlines()]
        check(all(len(line) == 3 and all(word.isdigit() for word in line) for line in lines), c.text()[-500:])
        return [tuple(map(int, line)) for line in lines]

    c.run()
    until(lambda: len(seen()) > 3, f"the program in the sandbox to count: {c.text()}")
    for image in ("first", "second"):
        c.checkpoint(image)
        before = seen()[-1][1]
        c.restore(image)
        until(lambda: seen()[-1][1] > before + 3, f"the program in the sandbox to go on: {c.text()[-500:]}")
    lines = seen()
    equal([n for _, n, _ in lines], list(range(1, len(lines) + 1)), "what was counted")
    equal({pid for pid, _, _ in lines}, {lines[0][0]}, "the pid of the shell")
    check(lines[0][0] < 5 and all(others < 5 for _, _, others in lines), f"{lines[-5:]} is not of a pid namespace")


def test_unshare(host):
    """busybox unshare: a shell as the first process of a pid namespace, with a proc of its own."""
    sandbox(host, "unshare", ["unshare", "-f", "-p", "-m", "--mount-proc"])


def test_bwrap(host):
    """bubblewrap with everything unshared but the user namespace."""
    sandbox(host, "bwrap", ["bwrap", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
                            "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"])


def test_bwrap_first(host):
    """bubblewrap as the container's first process, without a capability: a user namespace, and all else in it."""
    sandbox(host, "first", ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/tmp", "--unshare-all"],
            capabilities=(), first=True, user=(1000, 1000))


def test_stasis_inside(host):
    """A container in a container: Stasis run by a program of one that is checkpointed and restored from outside, twice. The
    container inside goes on, and its Stasis goes on ruling it: list, exec, pause, checkpoint and restore there, kill, delete."""
    real_checkpoints()
    root = host.overlay("busybox", "outer")
    shutil.copy(RUNTIME, root / "stasis")
    inner = root / "inner"
    inner.mkdir()
    sh("cp", "-a", rootfs("busybox"), inner / "rootfs")
    spec = config(["sh", "-c", "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.05; done"])
    (inner / "config.json").write_text(json.dumps(spec))
    spec = config(["sh", "-c", "/stasis --root /run/s run --detach --bundle /inner inner </dev/null >>/inner/log 2>&1; exec sleep 100000"], root=root)
    every = [f"CAP_{name}" for name in "SYS_ADMIN SYS_PTRACE NET_ADMIN DAC_READ_SEARCH CHECKPOINT_RESTORE".split()]
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] += every
    for key in "maskedPaths", "readonlyPaths":
        spec["linux"][key] = []
    spec["linux"]["resources"]["devices"] = [{"allow": True, "access": "rwm"}]
    spec["linux"]["namespaces"].append({"type": "cgroup"})
    for mount in spec["mounts"]:
        if mount["destination"].startswith("/sys"):
            mount["options"].remove("ro")
    c = Container(host, "outer", spec)
    log = inner / "log"
    said = lambda: log.read_text() if log.exists() else ""  # noqa: E731
    counted = lambda: [int(line) for line in said().rpartition("\n")[0].splitlines() if line.isdigit()]  # noqa: E731

    def stasis(*words, **how):
        return c.exec("/stasis", "--root", "/run/s", *words, **how)

    def works(n):
        before = len(counted())
        until(lambda: len(counted()) > before + 3, f"the container inside to count, after {n}: {said()[-500:]}")
        equal(json.loads(stasis("state", "inner").stdout)["status"], "running", f"the container inside, after {n}")
        check("inner" in stasis("list", "-q").stdout, "list")
        equal(stasis("exec", "inner", "cat", "/proc/1/comm").stdout.strip(), "sh", "its first process")
        stasis("pause", "inner")
        equal(json.loads(stasis("state", "inner").stdout)["status"], "paused", "paused inside")
        stasis("resume", "inner")

    c.run()
    until(lambda: len(counted()) > 3 or "error" in c.text() + said(), "the container inside")
    check(len(counted()) > 3, c.text() + said())
    works("the start")
    for image in "first", "second":
        c.checkpoint(image)
        c.restore(image)
        works(f"{image} restore")
    stasis("checkpoint", "--image-path", "/inner/image", "inner")
    equal(stasis("list", "-q").stdout, "", "what is left after a checkpoint inside")
    c.exec("sh", "-c", "/stasis --root /run/s restore --detach --bundle /inner --image-path /inner/image inner </dev/null >>/inner/log 2>&1")
    works("a checkpoint inside")
    c.checkpoint("after")
    c.restore("after")
    works("another one outside")
    equal(counted(), list(range(1, len(counted()) + 1)), "what was counted")
    stasis("kill", "inner", "KILL")
    until(lambda: json.loads(stasis("state", "inner").stdout)["status"] == "stopped", "the end of the container inside")
    stasis("delete", "inner")
    equal(stasis("list", "-q").stdout, "", "what is left inside")
    c.checkpoint("third")
    c.restore("third")
    c.delete()


def test_many_processes(host):
    """More processes than the command may have descriptors at first, as in a shell: it makes room for itself alone."""
    real_checkpoints()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = "for i in $(seq 300); do sleep 1000 & done; ulimit -n; wait"
    c = Container(host, "many", config(["sh", "-c", script], root=host.overlay("busybox", "many")))
    c.run()
    until(lambda: c.lines(), "all to be there")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most[1]))
    host.undo.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, most))
    for image in ("first", "second"):
        c.checkpoint(image)
        c.restore(image)
    until(lambda: len(c.exec("pidof", "sleep").stdout.split()) == 300, "300 processes")
    limits = pathlib.Path(f"/proc/{c.pid()}/limits").read_text()
    check(re.search(r"Max open files +1024 +1024", limits), limits)


class Lodger:
    """Somebody who is root of a user namespace and has a few control groups, and no privilege outside: as Podman and Docker run
    containers of users. What he has lies in a directory of its own."""

    FIRST = 100000

    def __init__(self, host):
        mounted = pathlib.Path("/sys/fs/cgroup")
        if (mounted / "cgroup.controllers").exists():
            raise Skip("whoever has delegated groups of version 2 is tested in the virtual machine (rootless/)")
        self.host, self.top = host, pathlib.Path(tempfile.mkdtemp(dir="/tmp", prefix="stasis-lodger-"))
        host.undo.append(lambda: shutil.rmtree(self.top))
        # That of memory stays the machine's.
        self.groups = [place / self.top.name for place in mounted.iterdir() if (place / "cgroup.procs").exists() and place.name != "memory"]
        for group in self.groups:
            group.mkdir()
            host.undo.append(lambda group=group: remove_cgroup(group.name))
            for file in "cpuset.cpus", "cpuset.mems":
                if (group / file).exists():
                    (group / file).write_text((group.parent / file).read_text())
            for path in group, *group.iterdir():
                os.chown(path, self.FIRST, self.FIRST)
        holder = host.daemon("unshare", "--user", "--mount", "--propagation", "private", "sleep", "100000", log=self.top / "holder")
        own = os.readlink("/proc/self/ns/user")
        until(lambda: os.readlink(f"/proc/{holder.pid}/ns/user") != own and "sleep" in open(f"/proc/{holder.pid}/comm").read(), "the user namespace")
        for file in "uid_map", "gid_map":
            pathlib.Path(f"/proc/{holder.pid}/{file}").write_text(f"0 {self.FIRST} 65536")
        joins = "".join(f"echo $$ >{group}/cgroup.procs && " for group in self.groups)
        self.prefix = ["sh", "-c", f'{joins}exec "$@"', "sh", "nsenter", f"--target={holder.pid}", "--user", "--mount", "--", self.top / "stasis"]
        shutil.copy(RUNTIME, self.top / "stasis")

    def container(self, label, args):
        """One whose commands he runs."""
        shutil.copytree(rootfs("busybox"), self.top / label, symlinks=True)
        place = types.SimpleNamespace(dir=self.top, id=self.host.id, undo=self.host.undo)
        c = Container(place, label, config(args, root=self.top / label))
        c.command = lambda *words: [str(word) for word in (*self.prefix, "--root", c.store, *words)]
        sh("chown", "-R", f"{self.FIRST}:{self.FIRST}", self.top)
        self.top.chmod(0o755)
        return c


def test_without_privileges(host):
    """Checkpoints and restores by who is root of a user namespace only."""
    real_checkpoints()
    lodger = Lodger(host)
    script = "echo kept >/dev/shm/file; exec 3<>/tmp/file; sleep 100000 & i=0; while :; do i=$((i + 1)); echo $i; echo $i >&3; sleep 0.05; done"
    c = lodger.container("plain", ["sh", "-c", script])
    counted = lambda: [int(line) for line in c.lines() if line.isdigit()]  # noqa: E731
    c.run()
    until(lambda: len(counted()) > 3, f"counting: {c.text()}")
    equal(int(status_of(c.pid(), "CapEff"), 16) >> 21 & 1, 0, "CAP_SYS_ADMIN")
    equal(status_of(c.pid(), "Uid").split()[0], str(lodger.FIRST), "the user on this host")
    c.call("check", c.id)
    c.checkpoint("left", "--leave-running")
    for image in "first", "second":
        c.checkpoint(image)
        equal(c.state(), "", "after the checkpoint")
        before = len(counted())
        c.restore(image)
        until(lambda: len(counted()) > before + 3, f"counting after the {image} restore: {c.text()[-500:]}")  # noqa: B023
        equal(c.exec("cat", "/dev/shm/file").stdout, "kept\n", "what a tmpfs has")
        equal(c.exec("stat", "-c", "%u", "/dev/shm/file").stdout, "0\n", "whose it is")
        equal(status_of(c.pid(), "Uid").split()[0], str(lodger.FIRST), "the user on this host")
        check(c.exec("pidof", "sleep").stdout.split(), "the child")
    equal(counted(), list(range(1, len(counted()) + 1)), "what was counted")
    c.call("pause", c.id)
    c.checkpoint("paused")
    c.restore("paused")
    equal(c.state(), "paused", "what was paused")
    c.delete()


def status_of(pid, field):
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{field}:"))
