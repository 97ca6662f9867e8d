"""Where the test suite of runc found differences: what Stasis does as runc does, and has to go on doing."""

import json
import os
import signal
import socket
import subprocess
import threading

from harness import Container, check, config, equal, sh, until
from spec import in_user_namespace, mount, run


def sleeper(host, label="c", change=None):
    spec = config(("sleep", "1000"), root=host.overlay("busybox", label))
    if change:
        change(spec)
    return Container(host, label, spec, output="null")


def quietly(command):
    """For commands that leave a process behind, which would keep a pipe of ours open."""
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def create(c, *flags):
    quietly(c.command("create", "--bundle", c.bundle, *flags, c.id))


def test_exec_ignore_paused(host):
    """exec --ignore-paused waits for the thaw, and keeps nobody from it."""
    c = sleeper(host)
    c.run()
    c.call("pause", c.id)
    check("paused" in c.call("exec", c.id, "true", ok=[255]).stderr, "exec in a paused container")
    waiting = subprocess.Popen(c.command("exec", "--ignore-paused", c.id, "echo", "thawed"), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, text=True)
    until(lambda: len(json.loads(c.call("ps", "--format", "json", c.id).stdout)) == 2, "the process to be in the container")
    c.call("resume", c.id)
    equal((waiting.communicate(timeout=30)[0], waiting.returncode), ("thawed\n", 0), "exec")


def test_order_of_mounts(host):
    """The source of a bind mount may be what an earlier one shows, the destination a path of the host."""
    for index, change in enumerate([lambda spec: None, in_user_namespace]):
        label = f"m{index}"
        root = host.overlay("busybox", label)
        source = host.dir / f"source{index}"
        for name in "a", "b":
            (source / name / name).mkdir(parents=True)
            (source / name / name / "file").write_text(name)
        # In a user namespace init may not go there itself.
        source.chmod(0o700)

        def mounts(spec, root=root, source=source, change=change):
            change(spec)
            spec["mounts"] += [mount(host, "/mnt", "rbind", source=source / "a"),
                               mount(host, "/mnt/a", "rbind", source=source / "b"),
                               mount(host, f"{root}/final", "rbind", source=f"{root}/mnt/a")]

        sh("mkdir", "-p", f"{root}/mnt", f"{root}/final")
        spec = config(("cat", "/final/b/file"), root=root)
        mounts(spec)
        c = Container(host, label, spec)
        equal(c.call("run", "--bundle", c.bundle, c.id, stdin="").stdout, "b", "the file")


def test_links_to_mount_points(host):
    """A dangling link of the image leads to where it would lead inside; nothing is made outside."""
    root = host.overlay("busybox", "c")
    os.symlink("../../../run/parity/hosts", f"{root}/etc/parity")
    (host.dir / "hosts").write_text("mine")
    spec = config(("cat", "/run/parity/hosts"), root=root)
    spec["mounts"].append(mount(host, "/etc/parity", "bind", source=host.dir / "hosts"))
    c = Container(host, "c", spec)
    equal(c.call("run", "--bundle", c.bundle, c.id, stdin="").stdout, "mine", "the file")
    check(not os.path.exists("/run/parity"), "a directory of the host was made")


def test_locked_flags(host):
    """In a user namespace the flags of the host's mounts cannot be taken away."""
    tree = host.dir / "tree"
    tree.mkdir()
    sh("mount", "-t", "tmpfs", "tmpfs", tree)
    host.undo.append(lambda: sh("umount", tree))
    sh("mount", "-o", "remount,bind,ro,nosuid", tree)

    def bind(*options):
        def change(spec):
            in_user_namespace(spec)
            spec["process"]["capabilities"]["bounding"].append("CAP_SYS_ADMIN")
            for name in "effective", "permitted":
                spec["process"]["capabilities"][name].append("CAP_SYS_ADMIN")
            spec["mounts"].append(mount(host, "/data", *options, source=tree))

        return change

    said = run(host, "mount -o remount,bind,rw /data 2>/dev/null; grep ' /data ' /proc/self/mounts", bind("bind"))
    check(" ro,nosuid" in said, said)
    said = run(host, "true", bind("bind", "rw"), label="rw", ok=[1])
    check("operation not permitted" in said, said)


def test_access_times(host):
    """A bind mount that speaks of directories alone has `relatime`, as mount(2) has it, whatever its source has."""
    tree = host.dir / "tree"
    tree.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "noatime", "tmpfs", tree)
    host.undo.append(lambda: sh("umount", tree))
    for index, (options, flags) in enumerate([(("bind",), {"noatime"}), (("bind", "nodiratime"), {"nodiratime", "relatime"}),
                                              (("bind", "relatime"), {"relatime"}), (("bind", "strictatime"), set())]):
        change = lambda spec, options=options: spec["mounts"].append(mount(host, "/data", *options, source=tree))  # noqa: E731
        said = run(host, "grep ' /data ' /proc/self/mounts", change, label=f"c{index}")
        equal({flag for flag in said.split()[3].split(",") if flag.endswith("atime")}, flags, f"{options}")


def test_clocks_in_a_user_namespace(host):
    """Offsets of a time namespace beside a user namespace."""

    def change(spec):
        in_user_namespace(spec)
        spec["linux"]["namespaces"].append({"type": "time"})
        spec["linux"]["timeOffsets"] = {"monotonic": {"secs": 1000, "nanosecs": 5}, "boottime": {"secs": 2000}}

    said = run(host, "cat /proc/self/timens_offsets", change)
    equal([line.split() for line in said.splitlines()], [["monotonic", "1000", "5"], ["boottime", "2000", "0"]], "offsets")


def test_filter_without_new_calls(host):
    """A seccomp filter that knows no close_range, openat2 or new mount calls."""

    def change(spec):
        names = ["close_range", "fsopen", "fsconfig", "fspick", "openat2", "open_tree", "move_mount", "mount_setattr"]
        spec["process"]["noNewPrivileges"] = False
        spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW",
                                    "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}

    equal(run(host, "echo fine", change), "fine\n", "output")


def test_hooks_inside(host):
    """createContainer hooks start in the container's root, startContainer hooks have the program's environment."""
    log = host.dir / "log"

    def change(spec):
        spec["hooks"] = {
            "createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", f"ls bin/busybox >{log}"]}],
            "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo $HOME $PARITY >/hook"]}],
        }
        spec["process"]["env"].append("PARITY=yes")

    equal(run(host, "cat /hook", change), "/root yes\n", "environment")
    equal(log.read_text(), "bin/busybox\n", "working directory")

    def failing(spec):
        spec["hooks"] = {"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "kill -SYS $$"]}]}

    said = run(host, "true", failing, label="f", ok=[255])
    check("error running startContainer hook #0: signal: bad system call" in said, said)


def test_host_mounts(host):
    """A container without a mount namespace is in the root file system all the same; it can't be checkpointed."""
    root = host.overlay("busybox", "c")
    spec = config(("sh", "-c", "echo $(ls -d /bin/busybox)"), root=root)
    spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "mount"]
    spec["linux"]["maskedPaths"] = spec["linux"]["readonlyPaths"] = []
    c = Container(host, "c", spec)
    # Its mounts end with the mount namespace that the command runs in.
    script = 'mount --make-rprivate / && exec "$@"'
    done = sh("unshare", "--mount", "sh", "-c", script, "sh", *c.command("run", "--bundle", c.bundle, c.id), stdin="")
    equal(done.stdout, "/bin/busybox\n", f"output: {done.stderr}")


def test_signal_before_start(host):
    """SIGTERM ends a container that waits for its start, though init is the first of its pid namespace."""
    c = sleeper(host)
    create(c)
    c.call("kill", c.id, "TERM")
    until(lambda: c.state() == "stopped", "its end")


def test_pidfd_socket(host):
    """--pidfd-socket of create, run and exec: a descriptor of the process, with runc's word beside it."""
    path = str(host.dir / "pidfd")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(1)
    got = []

    def receive():
        peer, _ = server.accept()
        word, fds, _, _ = socket.recv_fds(peer, 100, 1)
        got.append((word, fds[0]))

    def taken(start):
        thread = threading.Thread(target=receive)
        thread.start()
        start()
        thread.join(30)
        word, fd = got.pop()
        pid = int(next(line for line in open(f"/proc/self/fdinfo/{fd}") if line.startswith("Pid:")).split()[1])
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)
        return word, pid

    created, started = sleeper(host, "created"), sleeper(host, "started")
    pids = []

    def make():
        create(created, "--pidfd-socket", path)
        pids.append(created.pid())

    equal(taken(make), (b"standard", pids[0]), "create")
    until(lambda: created.state() == "stopped", "the end of what was created")
    started.run()
    process = host.dir / "exec.pid"
    words = ("exec", "--detach", "--pid-file", process, "--pidfd-socket", path, started.id, "sleep", "1000")
    word, pid = taken(lambda: quietly(started.command(*words)))
    equal((word, pid), (b"setns", int(process.read_text())), "exec")
    equal(started.state(), "running", "the container")


def test_debug(host):
    """--debug tells the steps, in the log if there is one."""
    c = sleeper(host)
    log = host.dir / "log"
    quietly(c.command("--debug", "--log", log, "--log-format", "json", "run", "--detach", "--bundle", c.bundle, c.id))
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    check(all(s["level"] == "debug" for s in steps), str(steps))
    for words in "nsexec container setup", "child process in init()", "closing the pipe to signal completion":
        check(any(words in s["msg"] for s in steps), f"{words}: {steps}")


def test_plain_process(host):
    """exec --process without a user is root's; a capability that can't be ambient is a warning."""
    c = sleeper(host)
    c.run()
    process = host.dir / "process.json"
    process.write_text(json.dumps({"args": ["id", "-u"], "cwd": "/", "env": ["PATH=/bin:/usr/bin"]}))
    equal(c.call("exec", "--process", process, c.id).stdout, "0\n", "the user")

    def change(spec):
        spec["process"]["args"] = ["true"]
        spec["process"]["capabilities"].update(inheritable=["CAP_KILL"], ambient=["CAP_KILL", "CAP_CHOWN"])

    d = sleeper(host, "d", change)
    said = d.call("run", "--bundle", d.bundle, d.id, stdin="").stderr
    check("can't raise ambient capability CAP_CHOWN: operation not permitted" in said, said)


def test_what_a_process_leaves_out(host):
    """exec --process: capabilities and limits that the file does not name are the container's, not the runtime's."""
    def change(spec):
        spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]

    c = sleeper(host, change=change)
    c.run()
    process = host.dir / "process.json"
    status = {"args": ["sh", "-c", "grep Cap /proc/self/status; ulimit -n; ulimit -Hn"], "cwd": "/", "env": ["PATH=/bin:/usr/bin"]}
    process.write_text(json.dumps(status) + " what follows is not read")
    said = c.call("exec", "--process", process, c.id).stdout
    equal(said, c.call("exec", c.id, *status["args"]).stdout, "capabilities and limits")
    equal(said.split()[-2:], ["77", "88"], "limits")
    process.write_text(json.dumps({**status, "capabilities": {}, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}]}))
    said = c.call("exec", "--process", process, c.id).stdout
    check("CapEff:\t0000000000000000" in said and said.split()[-2:] == ["5", "6"], said)


def test_flags_without_a_value(host):
    """A flag whose value is empty is as if it had not been given; what is wrong with a command line is told in the log."""
    c = sleeper(host)
    c.run()
    empty = [f"--{flag}=" for flag in ("cwd", "user", "process", "apparmor", "process-label", "pid-file", "console-socket", "pidfd-socket")]
    equal(c.call("exec", *empty, c.id, "pwd").stdout, "/\n", "exec")
    log = host.dir / "log"
    for words, text in [(["state", "--nope", "x"], "flag provided but not defined: -nope"), (["nope"], "No help topic for 'nope'"),
                        (["exec", "--preserve-fds", "x", "y", "z"], "invalid value")]:
        log.unlink(missing_ok=True)
        said = c.call("--log", log, "--log-format", "json", *words, ok=[1, 3]).stderr
        check(text in said and text in json.loads(log.read_text())["msg"], f"{words}: {said}, {log.read_text()}")
    check("container does not exist" in c.call("kill", "nobody", "NOPE", ok=[1]).stderr, "kill of nobody")
    equal(c.call("exec", c.id, "--", "echo", "--", "x").stdout, "-- x\n", "two dashes after the container's name")
    equal(c.call("h", "kill").stdout, c.call("kill", "--help").stdout, "help by one letter")


def test_words(host):
    """What config.json may not ask for is refused, and what is done without is warned of, in runc's words."""
    root = host.overlay("busybox", "words")
    sound = config(["sh", "-c", "pwd"], root=root)
    linux, process = sound["linux"], sound["process"]

    def said(part, value, status=1):
        """What `run` prints, with the `value` in `part` of config.json."""
        spec = json.loads(json.dumps(sound))
        *path, last = part.split(".")
        into = spec
        for step in path:
            into = into.setdefault(step, {})
        into[last] = value
        c = Container(host, f"{part}-{len(os.listdir(host.dir))}".replace(".", "-"), spec)
        done = c.call("run", "--bundle", c.bundle, c.id, ok=[status])
        return (done.stdout + done.stderr).replace('\\"', '"')

    namespaces, hook = linux["namespaces"], {"path": "/bin/true", "args": ["true"]}
    for part, value, words in [
        ("linux.memoryPolicy", {"nodes": "0"}, 'run failed: invalid memory policy mode ""'),
        ("linux.memoryPolicy", {"mode": "MPOL_BIND", "nodes": "x"},
         'run failed: invalid memory policy nodes "x": strconv.ParseUint: parsing "x": invalid syntax'),
        ("process.execCPUAffinity", {"initial": "5-1"}, "run failed: bad CPUAffinity.Initial: invalid range: 5-1"),
        ("process.execCPUAffinity", {"final": "99999"}, "bad CPUAffinity.Final: values larger than 65536 are not supported"),
        ("process.ioPriority", {"priority": 1}, 'run failed: invalid ioPriority.Class: ""'),
        ("process.scheduler", {}, "run failed: scheduler policy is required"),
        ("process.rlimits", [{"type": "RLIMIT_X", "hard": 1, "soft": 1}], "run failed: wrong rlimit value: RLIMIT_X"),
        ("linux.namespaces", [*namespaces, {"type": "pid"}], 'malformed spec file: duplicated ns {"pid" ""}'),
        ("linux.namespaces", [*namespaces, {"type": "foo"}], 'run failed: namespace {"foo" ""} does not exist'),
        ("linux.namespaces", [*namespaces, {"type": "user"}], "user namespaces enabled, but no uid mappings found"),
        ("linux.netDevices", {"nope0": {}}, "error creating network interfaces: move netDevice nope0 to namespace"),
        ("linux.netDevices", {"a b": {}}, 'invalid network device name "a b"'),
        ("linux.seccomp", {"defaultAction": "X"}, "run failed: string X is not a valid action for seccomp"),
        ("linux.resources.devices", [{"allow": True, "type": "c", "major": -5, "access": "r"}], "-5"),
        ("linux.resources.cpu", {"quota": 20000, "period": 100000, "burst": 100000}, "error setting cgroup config for procHooks process: "),
        ("hooks.createRuntime", [{"path": ""}], "error running createRuntime hook #0: exec: no command"),
        ("hooks.createRuntime", [hook | {"timeout": 0}], "hook #0: hook ran past specified timeout of 0.0s"),
        ("process.args", ["/etc"], 'exec: "/etc": is a directory'),
        # Docker asks, of the second, whether a directory was meant to go onto a file.
        ("mounts", [*sound["mounts"], mount(host, "/mnt", "bind", source="/nope")],
         "failed to fulfil mount request: open /nope: no such file or directory"),
        ("mounts", [*sound["mounts"], mount(host, "/etc/passwd", "bind")], 'to rootfs at "/etc/passwd": move_mount: not a directory'),
        ("mounts", [*sound["mounts"], mount(host, "/proc", kind="tmpfs")],
         'to rootfs at "/proc": create mountpoint for /proc mount: check proc-safety of /proc mount: "'),
        ("mounts", [*sound["mounts"], mount(host, "/", kind="tmpfs")], "create mountpoint for / mount: mountpoint "),
    ]:
        text = said(part, value)
        check(words in text, f"{part} = {value}: {text}")
    if not os.path.exists("/sys/fs/resctrl"):
        text = said("linux.intelRdt", {})
        check("intelRdt is specified in config, but Intel RDT is not enabled" in text, text)
    for part, value, words in [
        ("linux.resources.memory", {"kernel": 1 << 30}, "Kernel memory settings are ignored and will be removed"),
        ("linux.personality", {"domain": "LINUX", "flags": ["X"]}, "ignoring unsupported personality flags: [X]"),
        ("mounts", [*sound["mounts"], {"destination": "tmp", "type": "tmpfs", "source": "x"}], "mount destination tmp is not absolute"),
        ("hooks.poststop", [{"path": "/bin/false"}], "unable to destroy container: error running poststop hook #0: exit status 1"),
    ]:
        text = said(part, value, 0)
        check("level=warning" in text and words in text and "/\n" in text, f"{part} = {value}: {text}")
    # What runc passes over.
    for part, value in [("vm", {"hypervisor": {"path": "/x"}}), ("linux.uidMappings", [{"containerID": 0, "hostID": 1, "size": 1}]),
                        ("linux.seccomp", {}), ("linux.resources.pids", {}), ("process.execCPUAffinity", {"initial": ""}), ("process.rlimits", None), ("process.user", None)]:
        equal(said(part, value, 0), "/\n", f"{part} = {value}")
    check(process["cwd"] == "/" and not (root / "made").exists(), "the sound config.json")
    sound["root"]["readonly"] = True
    equal(said("process.cwd", "/made/here", 0), "/made/here\n", "a working directory that the image lacks")
    equal(oct((root / "made/here").stat().st_mode & 0o777), "0o755", "its mode")
