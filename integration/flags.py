"""Flags of the runtime's commands that no other test speaks of, each seen to do what it says."""

import ctypes
import errno
import json
import os
import pathlib
import platform
import re
import signal
import socket
import struct
import subprocess

from cli import group_file
from harness import Container, Skip, check, config, equal, real_checkpoints, rootfs, running, sh, until
from parity import create, quietly, sleeper

NOWHERE = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def plain(host, *args, label="c", change=None):
    spec = config(args, root=host.overlay("busybox", label))
    if change:
        change(spec)
    return Container(host, label, spec)


def test_keep(host):
    """run --keep leaves what has ended, to be asked and deleted; without it nothing is left."""
    kept = plain(host, "sh", "-c", "exit 9")
    kept.call("run", "--keep", "--bundle", kept.bundle, kept.id, stdin="", ok=[9])
    equal(kept.state(), "stopped", "state of what was kept")
    kept.call("delete", kept.id)
    equal(kept.state(), "", "after delete")
    gone = plain(host, "true", label="gone")
    gone.call("run", "--bundle", gone.bundle, gone.id, stdin="")
    equal(gone.state(), "", "without --keep")


def without_pivot_root():
    """A seccomp filter that fails pivot_root(2) as a ramdisk does, for this process and those it starts."""
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    program = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | errno.EINVAL), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    length_and_code = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
    if ctypes.CDLL(None).prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, length_and_code, 0, 0):
        os._exit(99)


def test_no_pivot(host):
    """--no-pivot does without pivot_root(2), which a root file system on a ramdisk does not allow."""
    spec_of = lambda label: plain(host, "sh", "-c", f"ls -d {host.dir} 2>&1; ls -d /bin; cut -d' ' -f5 /proc/self/mountinfo | head -n 1", label=label)  # noqa: E731
    call = lambda c, *flags, **how: sh(*c.command("run", *flags, "--bundle", c.bundle, c.id), stdin="", preexec_fn=without_pivot_root, **how)  # noqa: E731
    failed = call(spec_of("with"), ok=[1])
    check("pivot_root" in failed.stderr, f"without the flag: {failed.stderr}")
    lines = call(spec_of("without"), "--no-pivot").stdout.splitlines()
    check("No such file" in lines[0], f"what lies outside is seen: {lines}")
    equal(lines[1:], ["/bin", "/"], "the root file system")


def test_session_keyring(host):
    """A container has a session keyring of its own, or with --no-new-keyring that of the caller."""
    keys = pathlib.Path("/proc/keys")
    if not keys.exists():
        raise Skip("this kernel has no keys")
    own, callers = sleeper(host, "own"), sleeper(host, "callers")
    for c, flags in (own, ()), (callers, ("--no-new-keyring",)):
        quietly(c.command("run", "--detach", *flags, "--bundle", c.bundle, c.id))
    there = keys.read_text()
    if f"_ses.{own.id}" not in there:
        raise Skip("this kernel shows no keyrings of others")
    check(f"_ses.{callers.id}" not in there, f"--no-new-keyring has made one: {there}")


def test_exec_no_new_privs(host):
    """exec --no-new-privs, where config.json does without; --env, and the descriptors that come with LISTEN_FDS."""
    c = sleeper(host, change=lambda s: s["process"].update(noNewPrivileges=False))
    c.run()
    for flags, bit in ((), "0"), (("--no-new-privs",), "1"):
        equal(c.call("exec", *flags, c.id, "grep", "NoNewPrivs", "/proc/self/status").stdout.split()[1], bit, f"with {flags}")


def test_descriptors_of_a_service_manager(host):
    """$LISTEN_FDS descriptors are passed on, with $LISTEN_PID naming the program; --preserve-fds adds more of them."""
    inside = "cat <&3; cat <&4; echo $LISTEN_FDS $LISTEN_PID; ls /proc/self/fd | wc -l"
    for name in "one", "two":
        (host.dir / name).write_text(f"{name}\n")
    c = plain(host, "sh", "-c", inside)
    script = 'exec 3<"$1" 4<"$2" 9<"$1"; shift 2; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
    said = sh("sh", "-c", script, "sh", host.dir / "one", host.dir / "two",
              *c.command("run", "--preserve-fds", "1", "--bundle", c.bundle, c.id)).stdout
    # Of ls: standard input, output and error, the two, and the directory.
    equal(said.split(), ["one", "two", "1", "1", "6"], "run")
    d = sleeper(host, "d")
    d.run()
    said = sh("sh", "-c", script, "sh", host.dir / "one", host.dir / "two",
              *d.command("exec", "--preserve-fds", "1", d.id, "sh", "-c", "cat <&3; echo $LISTEN_FDS; ls /proc/self/fd | wc -l")).stdout
    equal(said.split(), ["one", "5"], "exec, which only counts what --preserve-fds says")


def test_events(host):
    """events: statistics again and again in its interval, and the end of it with the container; --stats once."""
    c = sleeper(host)
    c.run()
    one = json.loads(c.call("events", "--stats", c.id).stdout)
    equal((one["type"], one["id"]), ("stats", c.id), "--stats")
    check({"cpu", "memory", "pids", "blkio"} <= set(one["data"]) and one["data"]["pids"]["current"] == 1, str(one))
    watching = subprocess.Popen(c.command("events", "--interval", "50ms", c.id), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    host.undo.append(lambda: (watching.kill(), watching.wait()))
    equal({json.loads(watching.stdout.readline())["type"] for _ in range(4)}, {"stats"}, "what is told")
    c.call("kill", c.id, "KILL")
    rest, _ = watching.communicate(timeout=60)
    equal(watching.returncode, 0, f"status once the container has ended: {rest}")
    check("greater than 0" in c.call("events", "--interval", "0s", c.id, ok=[1]).stderr, "an interval of nothing")
    check("is not running" in c.call("events", "--stats", c.id, ok=[1]).stderr, "statistics of what has ended")


def test_out_of_memory_event(host):
    """events tells that the kernel has ended a program for its memory."""
    c = plain(host, "sh", "-c", "while [ ! -e /go ]; do sleep 0.05; done; dd if=/dev/zero of=/dev/null bs=64M count=1; sleep 1000",
              change=lambda s: s["linux"]["resources"].update(memory={"limit": 16 << 20, "swap": 16 << 20}))
    c.run()
    watching = subprocess.Popen(c.command("events", "--interval", "1000s", c.id), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    host.undo.append(lambda: (watching.kill(), watching.wait()))
    watched = lambda: any("eventfd" in link or "inotify" in link for link in links(watching.pid))  # noqa: E731
    until(watched, "events to watch")
    (pathlib.Path(c.spec["root"]["path"]) / "go").touch()
    equal(json.loads(watching.stdout.readline()), {"type": "oom", "id": c.id}, "the event")


def test_events_after_a_restore(host):
    """events of a container that was restored: its numbers go on, update changes them, and running out of memory is told."""
    real_checkpoints()
    c = plain(host, "sh", "-c", "while [ ! -e /go ]; do sleep 0.05; done; dd if=/dev/zero of=/dev/null bs=64M count=1; sleep 1000",
              change=lambda s: s["linux"]["resources"].update(memory={"limit": 16 << 20, "swap": 16 << 20}, pids={"limit": 20}))
    c.run()
    stats = lambda: json.loads(c.call("events", "--stats", c.id).stdout)["data"]  # noqa: E731
    told = lambda data: (data["pids"]["limit"], data["memory"]["usage"]["limit"], data["cpu"]["usage"]["total"] > 0, data["pids"]["current"] in (1, 2))  # noqa: E731
    equal(told(stats()), (20, 16 << 20, True, True), "before")
    for image in "first", "second":
        c.checkpoint(image)
        c.restore(image)
        equal(told(stats()), (20, 16 << 20, True, True), f"after the {image} restore")
    c.call("update", "--pids-limit", "33", c.id)
    equal(stats()["pids"]["limit"], 33, "what update has changed")
    watching = subprocess.Popen(c.command("events", "--interval", "50ms", c.id), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    host.undo.append(lambda: (watching.kill(), watching.wait()))
    until(lambda: any("eventfd" in link or "inotify" in link for link in links(watching.pid)), "events to watch")
    equal({json.loads(watching.stdout.readline())["type"] for _ in range(4)}, {"stats"}, "what is told")
    (pathlib.Path(c.spec["root"]["path"]) / "go").touch()
    until(lambda: json.loads(watching.stdout.readline()) == {"type": "oom", "id": c.id}, "the end of what wanted too much")
    equal(c.state(), "running", "the container")


def links(pid):
    """Where the descriptors of a process lead to."""
    there = []
    for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            there.append(os.readlink(entry))
        except FileNotFoundError:
            pass  # closed meanwhile
    return there


# A flag of update with a value, what `-r` has in its place, and what is to be read: controller, file of v1, file of v2.
UPDATES = [
    ("--cpu-period", 50000, {"cpu": {"period": 50000}}, ("cpu", "cpu.cfs_period_us", None), "50000"),
    ("--cpu-quota", 20000, {"cpu": {"quota": 20000}}, ("cpu", "cpu.cfs_quota_us", "cpu.max"), "20000"),
    ("--cpu-burst", 5000, {"cpu": {"burst": 5000}}, ("cpu", "cpu.cfs_burst_us", "cpu.max.burst"), "5000"),
    ("--cpu-share", 2048, {"cpu": {"shares": 2048}}, ("cpu", "cpu.shares", None), "2048"),
    ("--cpu-idle", 1, {"cpu": {"idle": 1}}, ("cpu", "cpu.idle", "cpu.idle"), "1"),
    ("--cpu-rt-period", 900000, {"cpu": {"realtimePeriod": 900000}}, ("cpu", "cpu.rt_period_us", None), "900000"),
    ("--cpu-rt-runtime", 0, {"cpu": {"realtimeRuntime": 0}}, ("cpu", "cpu.rt_runtime_us", None), "0"),
    ("--cpuset-cpus", "0", {"cpu": {"cpus": "0"}}, ("cpuset", "cpuset.cpus", "cpuset.cpus"), "0"),
    ("--cpuset-mems", "0", {"cpu": {"mems": "0"}}, ("cpuset", "cpuset.mems", "cpuset.mems"), "0"),
    ("--memory", 64 << 20, {"memory": {"limit": 64 << 20}}, ("memory", "memory.limit_in_bytes", "memory.max"), str(64 << 20)),
    ("--memory-swap", 128 << 20, {"memory": {"limit": 64 << 20, "swap": 128 << 20}}, ("memory", "memory.memsw.limit_in_bytes", None), str(128 << 20)),
    ("--memory-reservation", 32 << 20, {"memory": {"reservation": 32 << 20}},
     ("memory", "memory.soft_limit_in_bytes", "memory.low"), str(32 << 20)),
    ("--pids-limit", 33, {"pids": {"limit": 33}}, ("pids", "pids.max", "pids.max"), "33"),
    ("--blkio-weight", 500, {"blockIO": {"weight": 500}}, ("blkio", "blkio.bfq.weight", "io.bfq.weight"), "500"),
]


def test_update(host):
    """update: each flag, and each member of what `--resources` gives, arrives in its file."""
    by_flags, by_file = sleeper(host, "flags"), sleeper(host, "file")
    for c in by_flags, by_file:
        c.run()
    arrived = 0
    for flag, value, resources, (controller, v1, v2), expected in UPDATES:
        file = group_file(by_flags, controller, v1, v2 or v1)
        if not file.exists():
            # What this kernel has no file for is not passed over in silence.
            if flag not in ("--blkio-weight", "--memory-swap"):
                done = by_flags.call("update", flag, value, by_flags.id, ok=None)
                check(done.returncode != 0 or v2 is None, f"{flag} has nothing to be written to: {done.stderr}")
            continue
        arrived += 1
        by_flags.call("update", flag, value, by_flags.id)
        equal(file.read_text().split()[-1 if "weight" in v1 else 0], expected, flag)
        by_file.call("update", "--resources", "-", by_file.id, stdin=json.dumps(resources))
        equal(group_file(by_file, controller, v1, v2 or v1).read_text().split()[-1 if "weight" in v1 else 0], expected, f"{resources}")
    check(arrived >= 6, f"only {arrived} flags have a file here")
    # From a file; what flags say beside it is not read.
    (host.dir / "resources.json").write_text(json.dumps({"pids": {"limit": 44}}))
    by_file.call("update", "-r", host.dir / "resources.json", "--pids-limit", "55", by_file.id)
    equal(group_file(by_file, "pids", "pids.max", "pids.max").read_text(), "44\n", "-r FILE")
    # -1 is no limit at all.
    by_flags.call("update", "--pids-limit", "-1", by_flags.id)
    equal(group_file(by_flags, "pids", "pids.max", "pids.max").read_text(), "max\n", "no limit of processes")
    for flag, value, words in [("--memory", "x", "invalid value"), ("--cpu-idle", "2", ""), ("--cpuset-cpus", "77777", ""),
                               ("--l3-cache-schema", "L3:0=ff", "l3 cache schema is not enabled"),
                               ("--mem-bw-schema", "MB:0=20", "memory bandwidth schema is not enabled")]:
        if "schema" in flag and os.path.exists("/sys/fs/resctrl/schemata"):
            continue
        said = by_flags.call("update", flag, value, by_flags.id, ok=[1]).stderr
        check(words in said, f"{flag} {value}: {said}")
    check("unexpected end of JSON" in by_file.call("update", "-r", "-", by_file.id, stdin="", ok=[1]).stderr
          or "EOF" in by_file.call("update", "-r", "-", by_file.id, stdin="", ok=[1]).stderr, "resources that are none")


def test_lists(host):
    """list and ps: their tables, -q, JSON and options of ps(1); the fields of state."""
    c = sleeper(host, change=lambda s: s.update(annotations={"test.key": "value"}))
    c.run()
    created = sleeper(host, "created")
    create(created)
    state = json.loads(c.call("state", c.id).stdout)
    equal(sorted(state), ["annotations", "bundle", "created", "id", "ociVersion", "owner", "pid", "rootfs", "status"], "fields of state")
    equal((state["annotations"], state["rootfs"], state["owner"]), ({"test.key": "value"}, str(c.spec["root"]["path"]), ""), "state")
    check(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", state["created"]), state["created"])
    table = c.call("list").stdout.splitlines()
    equal(table[0].split(), ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"], "columns of list")
    rows = {line.split()[0]: line.split() for line in table[1:]}
    equal(rows[c.id], [c.id, str(state["pid"]), "running", str(c.bundle), state["created"], "root"], "a line of list")
    equal(rows[created.id][2], "created", "another")
    # The columns begin below each other.
    equal(table[1].index(str(c.bundle) if c.id in table[1] else str(created.bundle)), table[0].index("BUNDLE"), f"columns: {table}")
    equal(sorted(c.call("list", "-q").stdout.split()), sorted([c.id, created.id]), "list -q")
    listed = {x["id"]: x for x in json.loads(c.call("list", "-f", "json").stdout)}
    equal(listed[c.id], {**state, "owner": "root"}, "list -f json")
    lines = c.call("ps", c.id).stdout.splitlines()
    equal(lines[0].split()[:3], ["UID", "PID", "PPID"], "columns of ps")
    equal((len(lines), lines[1].split()[1]), (2, str(state["pid"])), "the process")
    equal(c.call("ps", c.id, "-o", "pid,comm").stdout.split(), ["PID", "COMMAND", str(state["pid"]), "sleep"], "options of ps")
    equal(json.loads(c.call("ps", "-f", "json", c.id).stdout), [state["pid"]], "ps -f json")
    empty = Container(host, "empty", config(("true",)), store="nothing")
    empty.store.mkdir()
    equal(empty.call("list", "-f", "json").stdout.strip(), "null", "nothing, as JSON")
    equal(len(empty.call("list").stdout.splitlines()), 1, "nothing, as a table")


def test_signals(host):
    """kill: every way to name a signal, and SIGTERM without one."""
    for at, (words, status) in enumerate([((), 15), (("TERM",), 15), (("SIGKILL",), 9), (("9",), 9), (("usr1",), 10), (("RTMIN+1",), 35)]):
        c = sleeper(host, f"c{at}", change=lambda s: s["process"].update(
            args=["sh", "-c", "for n in 15 10 35; do trap \"exit $n\" $n; done; touch /ready; while :; do sleep 0.05; done"]))
        process = subprocess.Popen(c.command("run", "--bundle", c.bundle, c.id), **NOWHERE)
        host.undo.append(lambda p=process: (p.kill(), p.wait()))
        until((pathlib.Path(c.spec["root"]["path"]) / "ready").exists, "the program")
        c.call("kill", c.id, *words)
        equal(process.wait(60), 137 if status == 9 else status, f"kill {words}")
    c = sleeper(host, "bad")
    c.run()
    for word in ("NOPE", "-3", "99999"):
        check(c.call("kill", "--", c.id, word, ok=[1]).stderr, word)
    equal(c.state(), "running", "after signals that are none")


def test_delete_force(host):
    """delete --force ends what is created, running or paused; without it what runs stays."""
    for label in "created", "running", "paused":
        c = sleeper(host, label)
        create(c)
        pid = c.pid()
        if label != "created":
            c.call("start", c.id)
        if label == "paused":
            c.call("pause", c.id)
        if label != "created":
            said = c.call("delete", c.id, ok=[1]).stderr
            check("is not stopped" in said, said)
            equal(c.state(), label, "after a delete that was refused")
        c.call("delete", "--force", c.id)
        equal(c.state(), "", label)
        until(lambda p=pid: not running(p), f"the end of what was {label}")


def test_exec_terminal(host):
    """exec --tty with --console-socket, --detach and --pid-file: the terminal's other end is handed over."""
    c = sleeper(host)
    c.run()
    path = f"/tmp/stasis-exec-tty-{os.getpid()}.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    host.undo.append(lambda: os.unlink(path))
    listener.listen(1)
    listener.settimeout(60)
    pid_file = host.dir / "exec.pid"
    quietly(c.command("exec", "--tty", "--detach", "--console-socket", path, "--pid-file", pid_file, "--env", "A=b", c.id,
                      "sh", "-c", "echo said $A; read x; echo $x; exec sleep 1000"))
    connection, _ = listener.accept()
    name, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    check(name.startswith(b"/dev/pt"), f"what comes with it: {name}")
    text = b""
    while b"said b" not in text:
        text += os.read(fds[0], 4096)
    os.write(fds[0], b"t$yped\n")
    while text.count(b"t$yped") < 2:  # the echo, and the answer
        text += os.read(fds[0], 4096)
    pid = int(pid_file.read_text())
    check(pid in json.loads(c.call("ps", "-f", "json", c.id).stdout), "--pid-file")
    os.kill(pid, signal.SIGKILL)
    os.close(fds[0])
    for words, text in [(("--tty", "--detach"), "cannot allocate tty if"), (("--console-socket", path), "")]:
        said = c.call("exec", *words, c.id, "true", ok=[255]).stderr
        check(text in said, f"{words}: {said}")


def test_logs(host):
    """--log and --log-format: text and JSON, nothing on standard error but the one line; --debug tells more."""
    c = sleeper(host)
    log = host.dir / "log.txt"
    done = c.call("--log", log, "state", "nobody", ok=[1])
    check(re.search(r'^time="[^"]+" level=error msg="[^"]*does not exist"$', log.read_text(), re.M), log.read_text())
    check("does not exist" in done.stderr, done.stderr)
    check("invalid log-format: yaml" in c.call("--log-format", "yaml", "list", ok=[1]).stderr, "a format that is none")
    lines = c.call("--version").stdout.splitlines()
    check(re.fullmatch(r"\S+ version \d+\.\d+\.\d+\S*", lines[0]) and any(line.startswith("spec: 1.") for line in lines), str(lines))


def test_spec(host):
    """spec: what it writes starts; it overwrites nothing; --rootless needs no privileges."""
    bundle = host.dir / "made"
    bundle.mkdir()
    c = sleeper(host)
    c.call("spec", "--bundle", bundle)
    check("exists" in c.call("spec", "--bundle", bundle, ok=[1]).stderr, "a second time")
    made = json.loads((bundle / "config.json").read_text())
    made["process"].update(args=["echo", "it starts"], terminal=False)
    made["root"]["path"] = str(rootfs("busybox"))
    (bundle / "config.json").write_text(json.dumps(made))
    equal(c.call("run", "--bundle", bundle, f"{c.id}-made", stdin="").stdout, "it starts\n", "what spec has written")
    (host.dir / "rootless").mkdir()
    c.call("spec", "--rootless", "--bundle", host.dir / "rootless")
    less = json.loads((host.dir / "rootless/config.json").read_text())
    kinds = {n["type"] for n in less["linux"]["namespaces"]}
    check("user" in kinds and "network" not in kinds and "resources" not in less["linux"], str(less["linux"]))
    equal(less["linux"]["uidMappings"], [{"containerID": 0, "hostID": 0, "size": 1}], "its mappings")


def test_flags_of_checkpoint(host):
    """checkpoint and restore: what is not done is refused by name before anything stands still, the rest is taken."""
    real_checkpoints()
    c = sleeper(host)
    c.run()
    for words in ("--page-server", "127.0.0.1:9"), ("--lazy-pages",), ("--status-fd", "3"), ("--network-lock", "nope"), \
            ("--manage-cgroups-mode", "nope"), ("--empty-ns", "nope"):
        done = c.checkpoint("refused", *words, ok=[1])
        check(words[0] in done.stderr or words[0][2:] in done.stderr or "nope" in done.stderr, f"{words}: {done.stderr}")
        equal(c.state(), "running", f"after {words}")
    for at, words in enumerate([("--link-remap",), ("--network-lock", "skip"), ("--network-lock", "nftables"), ("--empty-ns", "network"),
                                ("--tcp-skip-in-flight", "--file-locks", "--ext-unix-sk", "--shell-job")]):
        c.checkpoint(f"image{at}", *words)
        c.restore(f"image{at}", *(w for w in words if w in ("--network-lock", "skip", "nftables")))
        equal(c.state(), "running", f"after {words}")
    c.checkpoint("image")
    c.restore("image", "--no-pivot")
    equal(c.state(), "running", "after a restore without pivot_root")


def test_help(host):
    """--help of every command, on standard output; `help` and `h` are the same."""
    c = sleeper(host)
    text = c.call("--help").stdout
    commands = ["checkpoint", "create", "delete", "events", "exec", "features", "kill", "list", "pause", "ps", "restore", "resume",
                "run", "spec", "start", "state", "update"]
    for command in commands:
        check(re.search(rf"^\s+{command}\b", text, re.M), f"{command} is not in the list")
        said = c.call(command, "--help")
        check(said.stdout.startswith("NAME:") and "USAGE:" in said.stdout and not said.stderr, f"{command}: {said.stdout}{said.stderr}")
        equal(c.call(command, "-h").returncode, 0, f"{command} -h")
        # A summary has one line for each flag, a page more.
        check(c.call("help", command).stdout.startswith("NAME:"), f"help {command}")
