"""Fields of config.json that no other test speaks of, each seen to do what the specification says."""

import fcntl
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import threading

from cli import group_file
from harness import Container, Skip, check, config, equal, program, running, until
from parity import create, sleeper
from spec import mount, run

HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def hook(log, name, more="true", title=None):
    """A hook that writes its name, what it was told, where it is, and runs MORE."""
    # startContainer sees the container's files; createContainer has its namespaces, but the host's root.
    path = "/hooks.log" if name == "startContainer" else log
    script = (f'printf "%s\\t%s\\t%s\\t%s\\t%s\\n" {title or name} "$(cat | tr -d "\\n\\t")" "$(readlink /proc/self/ns/mnt)" '
              f'"$(readlink /proc/self/ns/pid)" "$PWD" >>{path}; {more}')
    return {"path": "/bin/sh", "args": ["sh", "-c", script]}


def read(log):
    """What hooks have written: name, state, namespaces, directory."""
    # A line without its end is being written.
    lines = [line.split("\t") for line in log.read_text().rpartition("\n")[0].splitlines()] if log.exists() else []
    # One inside that init's end has overtaken was told nothing.
    return [(name, json.loads(state or "{}"), mnt, pid, cwd) for name, state, mnt, pid, cwd in lines]


def test_hooks(host):
    """All six kinds: their order, the state that each is told, the namespaces and the directory that each runs in."""
    log = host.dir / "hooks.log"

    def change(spec):
        spec["hooks"] = {name: [hook(log, name), hook(log, name)] for name in HOOKS}
        spec["annotations"] = {"test.key": "value"}

    c = sleeper(host, change=change)
    root = pathlib.Path(c.spec["root"]["path"])
    create(c)
    equal([entry[0] for entry in read(log)], [name for name in HOOKS[:3] for _ in "12"], "hooks of create")
    pid = c.pid()
    ours = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid")}
    its = {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "pid")}
    check(not (root / "hooks.log").exists(), "startContainer before start")
    c.call("start", c.id)
    until(lambda: len(read(root / "hooks.log")) == 2, "startContainer")
    equal([entry[0] for entry in read(log)[6:]], ["poststart", "poststart"], "hooks of start")
    c.call("kill", c.id, "KILL")
    until(lambda: c.state() == "stopped", "the end")
    c.call("delete", c.id)
    everything = read(log) + read(root / "hooks.log")
    equal(sorted(entry[0] for entry in everything), sorted(name for name in HOOKS for _ in "12"), "hooks in all")
    status = {"prestart": "creating", "createRuntime": "creating", "createContainer": "creating", "startContainer": "created",
              "poststart": "running", "poststop": "stopped"}
    for name, state, mnt, pidns, cwd in everything:
        equal(state["status"], status[name], f"status that {name} is told")
        equal((state["id"], state["bundle"], state["annotations"]), (c.id, str(c.bundle), {"test.key": "value"}), f"state for {name}")
        check(state["ociVersion"].startswith("1."), f"version for {name}")
        inside = name in ("createContainer", "startContainer")
        equal(mnt, its["mnt"] if inside else ours["mnt"], f"mount namespace of {name}")
        equal(pidns, its["pid"] if inside else ours["pid"], f"pid namespace of {name}")
        if name in ("prestart", "createRuntime", "poststart"):
            equal(state["pid"], pid, f"pid that {name} is told")
        if name not in ("poststart", "poststop"):  # theirs is that of the command
            equal(cwd, {"createContainer": str(root), "startContainer": "/"}.get(name, str(c.bundle)), f"directory of {name}")


def test_hooks_that_fail(host):
    """A hook that fails, or takes longer than it may, ends the container, but for poststop; later hooks do not run, poststop does."""
    for at, name in enumerate(HOOKS):
        for kind, more, words in ("fails", "echo why >&2; exit 3", "exit status 3"), ("hangs", "exec sleep 1000", "hook ran past specified timeout of 1.0s"):
            label = f"{name.lower()}-{kind}"
            log = host.dir / f"{label}.hooks"

            def change(spec):
                spec["hooks"] = {n: [hook(log, n)] for n in HOOKS}
                broken = hook(log, name, more)
                if kind == "hangs":
                    broken["timeout"] = 1
                # One behind it is not run.
                spec["hooks"][name] = [broken, hook(log, name, title="after")]

            c = sleeper(host, label, change)
            done = subprocess.run(c.command("create", "--bundle", c.bundle, c.id), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=(host.dir / f"{label}.err").open("wb"), timeout=120)
            said = (host.dir / f"{label}.err").read_text()
            if name in HOOKS[:3]:
                check(done.returncode != 0 and f"error running {name} hook #0: {words}" in said, f"{label}: {said}")
                equal(c.state(), "", f"what is left after {label}")
                # One that is killed for its time may not have come to write.
                ran = [entry[0] for entry in read(log) if entry[0] != name]
                equal([n for n in ran if n != "poststop"], list(HOOKS[:at]), f"hooks that ran: {label}")
                continue
            equal(done.returncode, 0, f"create: {said}")
            pid = c.pid()
            done = c.call("start", c.id, ok=None)
            if name == "poststop":
                equal(done.returncode, 0, "start")
                until(lambda: open(f"/proc/{pid}/cmdline").read().startswith("sleep"), "the program")
                c.call("kill", c.id, "KILL")
                until(lambda: c.state() == "stopped", "the end")
                said = c.call("delete", c.id, ok=None).stderr
                check(f"error running poststop hook #0: {words}" in said, f"{label}: {said}")
            else:
                # start does not wait for what happens inside: its own output tells of the second, init's of the first.
                if name == "poststart":
                    check(done.returncode != 0 and f"error running poststart hook #0: {words}" in done.stderr, f"{label}: {done.stderr}")
                until(lambda: c.state() in ("stopped", ""), f"the end after {label}")
                c.call("delete", "--force", c.id)
            equal(c.state(), "", f"what is left after {label}")
            until(lambda p=pid: not running(p), f"the end of init after {label}")
            ran = [entry[0] for entry in read(log)]
            check("after" not in ran and "after" not in [entry[0] for entry in read(pathlib.Path(c.spec["root"]["path"]) / "hooks.log")], f"hooks that ran: {label}: {ran}")
            check("poststop" in ran or (name, kind) == ("poststop", "hangs"), f"poststop after {label}: {ran}")


def test_environment_of_hooks(host):
    """A hook has the environment that it brings, and its first argument as its name."""
    log = host.dir / "log"

    def change(spec):
        spec["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["other", "-c", f"echo $0 $A ${{PATH:-none}} >{log}"], "env": ["A=b"]}]}

    run(host, "true", change)
    name, a, path = log.read_text().split()
    equal((name, a), ("other", "b"), "what the hook has")
    check("sbin" not in path or path.startswith("/usr/local"), f"a PATH that nobody gave: {path}")


# An option of mounts, and what is to be read in mountinfo: of the mount, or of its file system.
OPTIONS = [("ro", "ro"), ("rw", "rw"), ("nosuid", "nosuid"), ("nodev", "nodev"), ("noexec", "noexec"), ("noatime", "noatime"),
           ("nodiratime", "nodiratime"), ("relatime", "relatime"), ("nosymfollow", "nosymfollow")]
# And those that take such a flag away again.
UNDONE = [("suid", "nosuid"), ("dev", "nodev"), ("exec", "noexec"), ("diratime", "nodiratime"), ("symfollow", "nosymfollow"), ("rw", "ro")]


def flags_of(text, point):
    """Flags of the mounts at POINT and below it, and of their file systems; their propagation."""
    found = {}
    for line in text.splitlines():
        f = line.split()
        if len(f) > 9 and (f[4] == point or f[4].startswith(point + "/")):
            dash = f.index("-")
            found[f[4]] = (set(f[5].split(",")), set(f[dash + 3].split(",")), " ".join(f[6:dash]))
    return found


def test_mount_options(host):
    """Each option of a mount, alone: ours and below (`rbind`), what it sets and what it takes away."""
    tree = host.dir / "tree"
    (tree / "below").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / "below"], check=True)
    host.undo.append(lambda: subprocess.run(["umount", tree / "below"], check=True))
    mounts, expected = [], []

    def one(*options, kind="bind", flag, on=True, below=None):
        point = f"/m{len(mounts)}"
        mounts.append(mount(host, point, *(("rbind",) if kind == "bind" else ()), *options, kind=kind, source=tree if kind == "bind" else kind))
        expected.append((point, options, kind, flag, on, below))

    for option, flag in OPTIONS:
        one(option, flag=flag)
        one(option, kind="tmpfs", flag=flag)
        # The recursive form reaches what lies below.
        one(f"r{option}", flag=flag, below=True)
    for option, flag in UNDONE:
        one(flag, option, flag=flag, on=False)
        one(flag, option, kind="tmpfs", flag=flag, on=False)
        one(f"r{flag}", f"r{option}", flag=flag, on=False, below=False)
    one("sync", kind="tmpfs", flag="sync")
    one("dirsync", kind="tmpfs", flag="dirsync")
    one("strictatime", kind="tmpfs", flag="relatime", on=False)
    one("rstrictatime", flag="relatime", on=False, below=False)
    one("rnorelatime", flag="relatime", on=None)
    one("lazytime", kind="tmpfs", flag="lazytime", on=None)
    one("silent", "loud", "iversion", "noiversion", "mand", "nomand", "defaults", "async", kind="tmpfs", flag="rw", on=None)
    for option, words in (("rshared", "shared:"), ("rslave", "master:"), ("rprivate", None), ("runbindable", "unbindable"),
                          ("shared", "shared:"), ("private", None), ("unbindable", "unbindable")):
        one(option, flag=None, on=words)
    said = run(host, "cat /proc/self/mountinfo", lambda s: s["mounts"].extend(mounts))
    for point, options, kind, flag, on, below in expected:
        found = flags_of(said, point)
        check(point in found, f"{kind} {options} is not mounted")
        mine, super_block, propagation = found[point]
        if flag is None:
            if on and on != "master:":  # what is a slave of a private mount is private
                check(on in propagation, f"{options}: propagation {propagation!r}")
            elif not on:
                equal(propagation, "", f"{options}: propagation")
            continue
        if on is not None:
            check((flag in mine | (super_block if flag in ("sync", "dirsync") else set())) == on, f"{kind} {options}: {mine} {super_block}")
        if below is not None:
            check((flag in found[f"{point}/below"][0]) == below, f"{options} below: {found}")
        elif on and kind == "bind" and flag not in ("rw", "relatime"):
            check(flag not in found[f"{point}/below"][0], f"{options} reaches what lies below: {found}")


def test_features_tells_of_no_option_too_many(host):
    """Every mount option that `features` names is taken."""
    c = sleeper(host)
    options = json.loads(c.call("features").stdout)["mountOptions"]
    check(len(options) > 50, str(options))
    tree = host.dir / "tree"
    tree.mkdir()
    recursive = {"idmap", "ridmap"}
    points = [mount(host, f"/m{at}", "rbind" if option not in ("bind",) else "bind", option, source=tree)
              for at, option in enumerate(options) if option not in recursive | {"remount", "tmpcopyup"}]
    run(host, "true", lambda s: s["mounts"].extend(points), "options")


def test_propagation_of_the_root(host):
    """rootfsPropagation: what the container's own mounts do for others, and what they get from outside."""
    tree = host.dir / "tree"
    (tree / "in").mkdir(parents=True)
    subprocess.run(["mount", "--bind", tree, tree], check=True)
    host.undo.append(lambda: subprocess.run(["umount", "-l", tree], check=True))
    subprocess.run(["mount", "--make-shared", tree], check=True)
    for kind, root_is, arrives in ("shared", "shared:", True), ("slave", "", True), ("private", "", False), ("unbindable", "unbindable", False):

        def change(spec, kind=kind):
            spec["linux"]["rootfsPropagation"] = kind
            spec["mounts"].append(mount(host, "/data", "rbind", kind if kind != "unbindable" else "private", source=tree))

        c = sleeper(host, kind, change)
        c.run()
        info = pathlib.Path(f"/proc/{c.pid()}/mountinfo").read_text()
        propagation = flags_of(info, "/")["/"][2]
        check(root_is in propagation if root_is else "shared" not in propagation and "unbindable" not in propagation, f"{kind}: {propagation!r}")
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / "in"], check=True)
        try:
            there = " /data/in " in pathlib.Path(f"/proc/{c.pid()}/mountinfo").read_text()
        finally:
            subprocess.run(["umount", tree / "in"], check=True)
        equal(there, arrives, f"{kind}: whether a later mount arrives")
        c.delete()


def test_devices(host):
    """linux.devices: characters, blocks and fifos with their mode and owners; `u` is a character device."""
    devices = [{"path": "/dev/made-c", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8},
               {"path": "/dev/deep/er/b", "type": "b", "major": 7, "minor": 99, "fileMode": 0o604},
               {"path": "/dev/made-p", "type": "p", "fileMode": 0o622, "uid": 3},
               {"path": "/dev/made-u", "type": "u", "major": 1, "minor": 3}]
    said = run(host, "stat -c '%n %F %a %u %g %t %T' /dev/made-c /dev/deep/er/b /dev/made-p /dev/made-u",
               lambda s: s["linux"].update(devices=devices))
    equal(said.splitlines(), ["/dev/made-c character special file 640 7 8 1 5", "/dev/deep/er/b block special file 604 0 0 7 63",
                              "/dev/made-p fifo 622 3 0 0 0", "/dev/made-u character special file 666 0 0 1 3"], "devices")
    failed = run(host, "true", lambda s: s["linux"].update(devices=[{"path": "/dev/x", "type": "q"}]), "bad", ok=[1])
    check("invalid device type" in failed, failed)


def test_process(host):
    """additionalGids, consoleSize, every kind of limit, a read-only root, the names of user and host."""
    kinds = ["AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE", "NICE", "NOFILE", "NPROC", "RSS", "RTPRIO", "RTTIME",
             "SIGPENDING", "STACK"]
    ours = {m[1].strip(): m[3] for m in re.finditer(r"^(Max [a-z -]+?)\s+(\d+|unlimited)\s+(\d+|unlimited)\s", open("/proc/self/limits").read(), re.M)}
    names = {"AS": "address space", "CORE": "core file size", "CPU": "cpu time", "DATA": "data size", "FSIZE": "file size", "LOCKS": "file locks",
             "MEMLOCK": "locked memory", "MSGQUEUE": "msgqueue size", "NICE": "nice priority", "NOFILE": "open files", "NPROC": "processes",
             "RSS": "resident set", "RTPRIO": "realtime priority", "RTTIME": "realtime timeout", "SIGPENDING": "pending signals", "STACK": "stack size"}

    def most(kind):
        hard = ours[f"Max {names[kind]}"]
        return 1 << 40 if hard == "unlimited" else int(hard)

    # No more than our own: raising needs CAP_SYS_RESOURCE.
    want = {kind: (min(most(kind), (1 << 36) - 3 * at - 1), min(most(kind), (1 << 36) - at)) for at, kind in enumerate(kinds)}

    def change(spec):
        spec["process"]["user"] = {"uid": 5, "gid": 6, "additionalGids": [10, 4242]}
        spec["process"]["rlimits"] = [{"type": f"RLIMIT_{k}", "soft": soft, "hard": hard} for k, (soft, hard) in want.items()]
        spec["root"]["readonly"] = True
        spec["hostname"] = "by-name"

    said = run(host, "id -u; id -g; id -G; hostname; touch /x 2>&1; cat /proc/self/limits", change).splitlines()
    equal(said[:4], ["5", "6", "6 10 4242", "by-name"], "ids and name")
    check("Read-only" in said[4], said[4])
    limits = {m[1].strip(): (m[2], m[3]) for m in re.finditer(r"^(Max [a-z -]+?)\s+(\d+|unlimited)\s+(\d+|unlimited)\s", "\n".join(said[5:]) + "\n", re.M)}
    for kind, (soft, hard) in want.items():
        equal(limits[f"Max {names[kind]}"], (str(soft), str(hard)), f"RLIMIT_{kind}")
    c = Container(host, "tty", config(("sh", "-c", "stty size; sleep 1000"), root=host.overlay("busybox", "tty"), tty=True))
    c.spec["process"]["consoleSize"] = {"height": 17, "width": 93}
    (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.run()
    until(lambda: "17 93" in c.text(), f"the size of the terminal: {c.text()}")


def test_sysctls(host):
    """linux.sysctl: names with dots and with slashes; what is not a namespace's is refused."""
    said = run(host, "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/conf/lo/forwarding /proc/sys/fs/mqueue/queues_max",
               lambda s: s["linux"].update(sysctl={"kernel.msgmax": "4321", "net/ipv4/conf/lo/forwarding": "1", "fs.mqueue.queues_max": "7"}))
    equal(said.split(), ["4321", "1", "7"], "values")
    for name in "vm.swappiness", "kernel.hostname.x", "kernel.pid_max", "fs.file-max":
        failed = run(host, "true", lambda s, name=name: s["linux"].update(sysctl={name: "1"}), name.replace(".", "-"), ok=[1])
        check("is not in a separate kernel namespace" in failed or "not allowed" in failed, f"{name}: {failed}")


def test_masked_and_readonly_paths(host):
    """maskedPaths hide files and directories, readonlyPaths let nobody write; what is not there is passed over."""
    def change(spec):
        spec["linux"]["maskedPaths"] = ["/secret/file", "/secret/directory", "/nope/x"]
        spec["linux"]["readonlyPaths"] = ["/fixed", "/fixed-file", "/nope/y"]

    root = host.overlay("busybox", "c")
    for d in "secret/directory", "fixed":
        (pathlib.Path(root) / d).mkdir(parents=True)
    for f in "secret/file", "secret/directory/file", "fixed/file", "fixed-file":
        (pathlib.Path(root) / f).write_text("x")
    said = run(host, "wc -c </secret/file; ls /secret/directory | wc -l; touch /secret/directory/new 2>&1; echo y 2>&1 >/fixed/file; "
                     "echo z 2>&1 >/fixed-file; cat /fixed/file /fixed-file", change).splitlines()
    equal(said[:2], ["0", "0"], "what is masked")
    equal(sum("Read-only" in line for line in said), 3, f"what cannot be written: {said}")
    equal(said[-1], "xx", "what could not be changed")


def seccomp(default="SCMP_ACT_ALLOW", *rules, **more):
    """A change of config.json: rules are (names, action, further members)."""
    def change(spec):
        spec["linux"]["seccomp"] = {"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64"],
                                    "syscalls": [{"names": names.split(), "action": f"SCMP_ACT_{action}", **(extra or {})}
                                                 for names, action, extra in rules], **more}
    return change


def calls(host, label, change, *words, ok=(0,)):
    spec = config(("/calls", *words), root=host.overlay("busybox", label))
    program("calls", f"{spec['root']['path']}/calls")
    change(spec)
    c = Container(host, label, spec)
    return c.call("run", "--bundle", c.bundle, c.id, stdin="", ok=list(ok)).stdout


def test_seccomp_actions(host):
    """Each action of a filter, seen by what becomes of the call and of its caller."""
    script = "trap 'echo trapped' SYS; mkdir /x 2>&1; echo status $?; test -d /x && echo made; true"
    for action, expected in [("ALLOW", ["status 0", "made"]), ("LOG", ["status 0", "made"]), ("KILL_PROCESS", ["status 159"]),
                             ("KILL_THREAD", ["status 159"]), ("KILL", ["status 159"]), ("TRAP", ["status 159"]),
                             ("TRACE", ["mkdir: can't create directory '/x': Function not implemented", "status 1"]),
                             ("ERRNO", ["mkdir: can't create directory '/x': Operation not permitted", "status 1"])]:
        said = run(host, script, seccomp("SCMP_ACT_ALLOW", ("mkdir mkdirat", action, None)), action.lower().replace("_", "-"))
        # The shell itself tells of a child that was killed.
        equal([line for line in said.splitlines() if "Bad system call" not in line], expected, action)
    said = run(host, "trap 'echo trapped' SYS; kill -USR1 $$; echo on", seccomp("SCMP_ACT_ALLOW", ("kill", "TRAP", None)), "trap-self")
    equal(said.split(), ["trapped", "on"], "TRAP, to one who listens")
    for action, expected, status in ("KILL_THREAD", "main\n", 0), ("KILL_PROCESS", "", 159):
        said = calls(host, f"thread-{action[5:].lower()}", seccomp("SCMP_ACT_ALLOW", ("mkdir mkdirat", action, None)), "thread", ok=[status])
        equal(said, expected, f"{action} of a thread")
    # The default action, and defaultErrnoRet: what is not listed.
    # All that a runtime may need once the filter is in force, and what the start of a static program takes.
    names = {"execve", "openat", "fstatfs", "close", "write", "exit_group", "brk", "arch_prctl", "set_tid_address", "set_robust_list", "rseq", "mprotect",
             "prlimit64", "readlinkat", "getrandom", "newfstatat", "fstat", "ioctl"}
    said = calls(host, "default", seccomp("SCMP_ACT_ERRNO", (" ".join(sorted(names)), "ALLOW", None), defaultErrnoRet=77), "seek", "1")
    equal(said, "77 \n", "defaultErrnoRet")


def test_seccomp_conditions(host):
    """Each operator of a condition on an argument, of 64 bits; conditions of one rule, and of two."""
    values = ["4", "5", "6", "0x100000005", "0xffffffffffffffff"]
    errno_of = lambda matches: " ".join("28" if m else "9" for m in matches) + " \n"  # noqa: E731
    for op, value, two, matches in [
        ("EQ", 5, 0, [0, 1, 0, 0, 0]), ("NE", 5, 0, [1, 0, 1, 1, 1]), ("LT", 5, 0, [1, 0, 0, 0, 0]), ("LE", 5, 0, [1, 1, 0, 0, 0]),
        ("GE", 5, 0, [0, 1, 1, 1, 1]), ("GT", 5, 0, [0, 0, 1, 1, 1]), ("GT", 0x100000004, 0, [0, 0, 0, 1, 1]), ("LT", 0x100000005, 0, [1, 1, 1, 0, 0]),
        ("EQ", 0x100000005, 0, [0, 0, 0, 1, 0]), ("MASKED_EQ", 0xF, 5, [0, 1, 0, 1, 0]), ("MASKED_EQ", 0xFFFFFFFF00000000, 0x100000000, [0, 0, 0, 1, 0]),
    ]:
        rule = ("lseek", "ERRNO", {"errnoRet": 28, "args": [{"index": 1, "value": value, "valueTwo": two, "op": f"SCMP_CMP_{op}"}]})
        label = f"{op}-{value:x}".lower().replace("_", "-")
        equal(calls(host, label, seccomp("SCMP_ACT_ALLOW", rule), "seek", *values), errno_of(matches), f"{op} {value:#x} {two:#x}")
    both = [{"index": 1, "value": 4, "op": "SCMP_CMP_GT"}, {"index": 2, "value": 0, "op": "SCMP_CMP_EQ"}]
    other = [{"index": 1, "value": 4, "op": "SCMP_CMP_GT"}, {"index": 2, "value": 1, "op": "SCMP_CMP_EQ"}]
    same = [{"index": 1, "value": 4, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 6, "op": "SCMP_CMP_EQ"}]
    for label, args, matches in ("both", both, [0, 1, 1, 1, 1]), ("one", other, [0, 0, 0, 0, 0]), ("same", same, [1, 0, 1, 0, 0]):
        rule = ("lseek", "ERRNO", {"errnoRet": 28, "args": args})
        equal(calls(host, label, seccomp("SCMP_ACT_ALLOW", rule), "seek", *values), errno_of(matches), f"conditions: {label}")


def test_seccomp_architectures(host):
    """A program of an architecture that is not listed is killed; one that is listed is filtered as well."""
    rule = ("mkdir mkdirat", "ERRNO", {"errnoRet": 28})
    calls(host, "foreign", seccomp("SCMP_ACT_ALLOW", rule), "old", ok=[159])
    both = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    equal(calls(host, "listed", seccomp("SCMP_ACT_ALLOW", rule, architectures=both), "old"), "-28\n", "mkdir by int 0x80")
    equal(calls(host, "passes", seccomp("SCMP_ACT_ALLOW", ("rmdir", "ERRNO", None), architectures=both), "old"), "0\n", "what no rule names")
    calls(host, "x32", seccomp("SCMP_ACT_ALLOW", rule), "x32", ok=[159])


def test_seccomp_flags(host):
    """Every flag is taken that this kernel has; one that is none is refused. A filter holds for exec, too."""
    for flags in (["SECCOMP_FILTER_FLAG_TSYNC"], ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"], ["SECCOMP_FILTER_FLAG_LOG"], [],
                  ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"]):
        label = f"f{len(flags)}-{(flags or ['none'])[0][-5:].lower()}".replace("_", "-")
        said = run(host, "grep Seccomp: /proc/self/status; mkdir /x 2>/dev/null; echo $?",
                   seccomp("SCMP_ACT_ALLOW", ("mkdir mkdirat", "ERRNO", None), flags=flags), label)
        equal(said.split()[1:], ["2", "1"], f"with {flags}")
    failed = run(host, "true", seccomp("SCMP_ACT_ALLOW", ("mkdir", "ERRNO", None), flags=["SECCOMP_FILTER_FLAG_NOPE"]), "bad", ok=[1])
    check("SECCOMP_FILTER_FLAG_NOPE" in failed, failed)
    c = sleeper(host, "exec", seccomp("SCMP_ACT_ALLOW", ("mkdir mkdirat", "ERRNO", {"errnoRet": 28})))
    c.run()
    check("No space left" in c.exec("mkdir", "/x", ok=[1]).stderr, "a filter that does not hold for exec")


class Agent:
    """Somebody at listenerPath who takes what is sent, and answers the calls that are asked about."""

    def __init__(self, host, answer):
        self.path = f"/tmp/stasis-agent-{os.getpid()}.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        host.undo.append(self.close)
        self.listener.listen(4)
        self.listener.settimeout(120)
        self.answer, self.states = answer, []
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101
        while True:
            try:
                connection, _ = self.listener.accept()
                text, fds, _, _ = socket.recv_fds(connection, 65536, 1)
            except OSError:
                return
            self.states.append(json.loads(text))
            connection.close()

            def serve(fd=fds[0]):
                try:
                    while True:
                        request = bytearray(80)
                        fcntl.ioctl(fd, NOTIF_RECV, request)
                        identity, pid, flags, number = struct.unpack_from("QIIi", request)
                        fcntl.ioctl(fd, NOTIF_SEND, struct.pack("QqiI", identity, *self.answer(pid)))
                except OSError:
                    os.close(fd)  # nobody is left who could ask

            threading.Thread(target=serve, daemon=True).start()

    def close(self):
        self.listener.close()
        os.unlink(self.path)


def test_seccomp_agent(host):
    """SCMP_ACT_NOTIFY: an agent answers with a value, an error, and lets a call go on; exec has a listener of its own."""
    answers = iter([(42, 0, 0), (0, -28, 0), (0, 0, 1)])
    agent = Agent(host, lambda pid: next(answers))

    def change(spec):
        seccomp("SCMP_ACT_ALLOW", ("mkdirat", "NOTIFY", None), listenerPath=agent.path, listenerMetadata="meta")(spec)
        program("calls", f"{spec['root']['path']}/calls")

    c = sleeper(host, change=change)
    c.run()
    for said in "42 0\n", "-1 28\n", "0 0\n":
        equal(c.exec("/calls", "ask").stdout, said, "what the call came to")
    check((pathlib.Path(c.spec["root"]["path"]) / "asked").is_dir(), "the call that was let go on")
    until(lambda: len(agent.states) == 4, "the agent to be told of all")
    first, *rest = agent.states
    equal((first["fds"], first["metadata"], first["pid"], first["state"]["id"]), (["seccompFd"], "meta", c.pid(), c.id), "message of run")
    for one in rest:
        equal((one["fds"], one["metadata"], one["state"]["id"], one["state"]["pid"]), (["seccompFd"], "meta", c.id, c.pid()), "message of exec")
        check(one["pid"] not in (c.pid(), 0), f"pid of exec: {one}")
    # With a flag that only listeners know: the caller can be killed alone while it is served.
    waiting = sleeper(host, "wait", lambda s: seccomp("SCMP_ACT_ALLOW", ("mkdirat mkdir", "NOTIFY", None), listenerPath=agent.path,
                                                      flags=["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])(s))
    answers = iter([(0, -17, 0)])
    waiting.run()
    check("File exists" in waiting.exec("mkdir", "/x", ok=[1]).stderr, "the answer with SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV")
    failed = sleeper(host, "nobody", lambda s: seccomp("SCMP_ACT_ALLOW", ("mkdirat", "NOTIFY", None), listenerPath="/nope/x")(s))
    said = failed.call("run", "--bundle", failed.bundle, failed.id, ok=[1]).stderr
    check("/nope/x" in said or "seccomp agent" in said, said)
    equal(failed.state(), "", "what is left without an agent")


def test_limits_of_version_1(host):
    """Limits of disks, memory and processors that only control groups of version 1 have files for, or this one's."""
    device = os.stat("/").st_dev
    disk = (os.major(device), os.minor(device))
    throttles = {f"throttle{way}{unit}Device": f"blkio.throttle.{way.lower()}_{'bps' if unit == 'Bps' else 'iops'}_device"
                 for way in ("Read", "Write") for unit in ("Bps", "IOPS")}

    def change(spec):
        spec["linux"]["resources"].update(
            memory={"limit": 96 << 20, "swappiness": 33, "disableOOMKiller": True, "useHierarchy": True},
            blockIO={key: [{"major": disk[0], "minor": disk[1], "rate": 1000000 + at}] for at, key in enumerate(throttles)})

    if not pathlib.Path("/sys/fs/cgroup/memory/memory.swappiness").exists():
        raise Skip("control groups of version 1 are not here")
    c = sleeper(host, change=change)
    c.run()
    memory = lambda name: group_file(c, "memory", name, name).read_text()  # noqa: E731
    equal(memory("memory.swappiness"), "33\n", "swappiness")
    check("oom_kill_disable 1" in memory("memory.oom_control"), "disableOOMKiller")
    for at, (key, file) in enumerate(throttles.items()):
        path = group_file(c, "blkio", file, file)
        if not path.exists():
            raise Skip(f"this kernel has no {file}")
        equal(path.read_text().split(), [f"{disk[0]}:{disk[1]}", str(1000000 + at)], key)
