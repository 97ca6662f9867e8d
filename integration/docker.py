"""Docker, Debian's, with daemons of the test's own."""

import ctypes
import os
import re
import socket
import threading
import time

from by_hand import KEYS, digest, fill, serving
from dockerd import Docker, docker, finish  # noqa: F401  (finish: for integration/run)
from harness import RUNTIME, Redis, Skip, Terminal, check, equal, need, real_checkpoints, session, sh, until
from same import SAME


def test_run(host):
    """Output, exit codes, environment, user, directory, hostname; `--rm` leaves nothing behind."""
    d = docker(host)
    out = d("run", "--rm", "-e", "A=b c", "-w", "/tmp", "-u", "7:8", "--hostname", "inside", "busybox:test",
            "sh", "-c", "echo $A; pwd; id -u; id -g; hostname; echo error >&2; exit 7", ok=[7])
    equal(out.stdout, "b c\n/tmp\n7\n8\ninside\n", "output")
    equal(out.stderr, "error\n", "errors")
    equal(d("ps", "-aq").stdout, "", "containers left")


def test_exit_codes(host):
    """125 for Docker's own failures, 126 for what can't be executed, 127 for what isn't there, 128+n for signals."""
    d = docker(host)
    d("run", "--rm", "--no-such-flag", "busybox:test", "true", ok=[125])
    d("run", "--rm", "busybox:test", "/no/such/program", ok=[127])
    d("run", "--rm", "busybox:test", "no-such-program", ok=[127])
    d("run", "--rm", "busybox:test", "/etc/passwd", ok=[126])
    d("run", "--rm", "busybox:test", "/etc", ok=[126])
    d("run", "--rm", "busybox:test", "sh", "-c", "kill -KILL $$; sleep 1 & kill -9 $!; wait $!", ok=[137])
    d("run", "-d", "--name", "codes", "busybox:test", "sleep", "1000")
    d("exec", "codes", "/no/such/program", ok=[126, 127])
    d("exec", "codes", "false", ok=[1])


def test_stdin(host):
    """Standard input reaches the container and ends there."""
    d = docker(host)
    equal(d("run", "--rm", "-i", "busybox:test", "cat", stdin="through and through\n").stdout, "through and through\n", "cat")


def test_tty(host):
    """A terminal inside; its size; both streams are one."""
    d = docker(host)
    d("run", "-d", "-t", "--name", "tty", "busybox:test", "sh", "-c", "tty; test -t 0 && echo in; echo error >&2; sleep 1000")
    until(lambda: "error" in d("logs", "tty").stdout, "the log")
    text = d("logs", "tty").stdout.replace("\r", "")
    check(re.fullmatch(r"/dev/(pts/0|console)\nin\nerror\n", text), f"log: {text!r}")
    equal(d("exec", "-t", "tty", "sh", "-c", "test -t 1 && echo terminal").stdout.strip(), "terminal", "exec -t")


def test_terminal(host):
    """run -it and exec -it, with somebody who types, and whose window changes its size."""
    d = docker(host)
    session(Terminal(host, *d.client, "run", "--rm", "-it", "busybox:test", "sh"))
    d("run", "-d", "--name", "typed", "busybox:test", "sleep", "1000")
    session(Terminal(host, *d.client, "exec", "-it", "typed", "sh"))
    # Leaving with Ctrl-P Ctrl-Q, and coming back.
    there = Terminal(host, *d.client, "run", "-it", "--name", "left", "busybox:test", "sh")
    there.type("echo a$((1 + 1))b\n")
    there.expect("a2b")
    there.type("\x10\x11")
    there.ends()
    equal(d.status("left"), "running 0", "after leaving it")
    back = Terminal(host, *d.client, "attach", "left")
    session(back)
    equal(d.status("left"), "exited 7", "at the end")


def test_exec(host):
    """exec: output, environment, exit codes, detached, and into the same namespaces."""
    d = docker(host)
    d("run", "-d", "--name", "exec", "busybox:test", "sleep", "1000")
    equal(d("exec", "-e", "X=y", "exec", "sh", "-c", "echo $X; exit 5", ok=[5]).stdout, "y\n", "exec")
    equal(d("exec", "-i", "exec", "cat", stdin="input").stdout, "input", "exec -i")
    d("exec", "-d", "exec", "sh", "-c", "echo detached >/tmp/said; sleep 500")
    until(lambda: d("exec", "exec", "cat", "/tmp/said", ok=None).stdout == "detached\n", "exec -d to say so")
    until(lambda: "sleep 1000" in d("exec", "exec", "ps", "-o", "args").stdout, "ps inside to show the main program")
    until(lambda: "sleep 500" in d("top", "exec").stdout, "docker top to show what was executed")


def test_stop_and_kill(host):
    """stop with a handler and without, kill with a signal, restart; exit codes say which."""
    d = docker(host)
    d("run", "-d", "--name", "polite", "busybox:test", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: "up\n" in d("logs", "polite").stdout, "the trap")
    d("stop", "polite")
    equal(d.status("polite"), "exited 3", "after stop")
    until(lambda: "bye\n" in d("logs", "polite").stdout, "the handler's word")
    d("start", "polite")
    until(lambda: d("logs", "polite").stdout.count("up") == 2, "the second start")
    d("restart", "-t", "5", "polite")
    until(lambda: d("logs", "polite").stdout.count("up") == 3, "the restart")
    d("kill", "polite")
    equal(d.status("polite"), "exited 137", "after kill")
    d("run", "-d", "--name", "deaf", "busybox:test", "sleep", "1000")
    d("stop", "-t", "1", "deaf")
    equal(d.status("deaf"), "exited 137", "after a stop that had to kill")


def test_pause(host):
    """A paused container does nothing, an unpaused one goes on."""
    d = docker(host)
    # Into a file: a log comes through a pipe and a daemon, which is late.
    where = host.dir / "shared"
    where.mkdir()
    d("run", "-d", "--name", "pause", "-v", f"{where}:/shared", "busybox:test", "sh", "-c", "while :; do echo >>/shared/ticks; sleep 0.01; done")

    def ticks():
        return (where / "ticks").stat().st_size if (where / "ticks").exists() else 0

    until(lambda: ticks() > 20, "counting")
    d("pause", "pause")
    equal(d.status("pause"), "paused 0", "state")
    still = ticks()
    d("exec", "pause", "true", ok=[1])
    time.sleep(0.3)
    equal(ticks(), still, "lines written while paused")
    d("unpause", "pause")
    until(lambda: ticks() > still, "counting again")


def test_limits(host):
    """Memory, pids and cpu limits arrive in the control groups; update changes them."""
    d = docker(host)
    d("run", "-d", "--name", "limits", "--memory", "64m", "--pids-limit", "50", "--cpus", "0.5", "busybox:test", "sleep", "1000")
    pid = d("inspect", "-f", "{{.State.Pid}}", "limits").stdout.strip()
    groups = {}
    for line in open(f"/proc/{pid}/cgroup"):
        _, controllers, path = line.strip().split(":", 2)
        groups.update((c, path) for c in controllers.split(","))

    def read(controller, file):
        try:
            with open(f"/sys/fs/cgroup/{controller}{groups[controller]}/{file}") as f:
                return f.read().strip()
        except (OSError, KeyError) as e:
            raise Skip(f"no v1 {controller} controller here: {e}") from None

    equal(read("memory", "memory.limit_in_bytes"), str(64 << 20), "memory limit")
    equal(read("pids", "pids.max"), "50", "pids limit")
    equal(int(read("cpu", "cpu.cfs_quota_us")) * 2, int(read("cpu", "cpu.cfs_period_us")), "cpu quota")
    d("update", "--memory", "80m", "--memory-swap", "80m", "--cpus", "0.25", "--cpu-shares", "77", "--pids-limit", "40", "--cpuset-cpus", "0", "limits")
    equal(read("memory", "memory.limit_in_bytes"), str(80 << 20), "memory limit after update")
    equal(int(read("cpu", "cpu.cfs_quota_us")) * 4, int(read("cpu", "cpu.cfs_period_us")), "cpu quota after update")
    equal([read("cpu", "cpu.shares"), read("pids", "pids.max"), read("cpuset", "cpuset.cpus")], ["77", "40", "0"], "the rest after update")
    check("limits" in d("stats", "--no-stream", "limits").stdout, "docker stats")


def test_user_namespaces(host):
    """A daemon with --userns-remap: root inside is nobody special outside; checkpoints too."""
    for name in "subuid", "subgid":
        (host.dir / name).write_text("daemon:200000:65536\n")
        if not os.path.exists(f"/etc/{name}"):
            raise Skip(f"there is no /etc/{name} to mount one's own on")
        sh("mount", "--bind", host.dir / name, f"/etc/{name}")
        host.undo.append(lambda name=name: sh("umount", "-l", f"/etc/{name}"))
    d = Docker(host, "--userns-remap", "daemon:daemon", label="r", images=("busybox",))
    volume = host.dir / "volume"
    volume.mkdir()
    os.chown(volume, 200000, 200000)
    said = d("run", "--rm", "-v", f"{volume}:/volume", "busybox:test", "sh", "-c",
             "id -u; cat /proc/self/uid_map; stat -c %u /bin/sh; touch /volume/mine; mount -t tmpfs x /mnt 2>/dev/null || echo no")
    equal(said.stdout.split(), ["0", "0", "200000", "65536", "0", "no"], "inside")
    equal((volume / "mine").stat().st_uid, 200000, "owner outside")
    d("run", "-d", "--name", "mapped", "busybox:test", "sh", "-c", COUNT)
    until(lambda: len(numbers(d, "mapped")) > 5, "counting")
    pid = d("inspect", "-f", "{{.State.Pid}}", "mapped").stdout.strip()
    equal(os.stat(f"/proc/{pid}").st_uid, 200000, "who runs it")
    equal(d("exec", "mapped", "sh", "-c", "id -u; cat /proc/self/uid_map").stdout.split(), ["0", "0", "200000", "65536"], "exec")
    session(Terminal(host, *d.client, "exec", "-it", "mapped", "sh"))
    d("run", "--rm", "--userns", "host", "busybox:test", "grep", "-q", "4294967295", "/proc/self/uid_map")
    if os.path.basename(RUNTIME) not in ("runc", "crun"):
        d("checkpoint", "create", "mapped", "one")
        until(lambda: d.status("mapped").startswith("exited"), "the container to be shown as exited")
        at = numbers(d, "mapped")
        d.start_from("one", "mapped")
        until(lambda: len(numbers(d, "mapped")) > len(at) + 5, "counting after the restore")


def test_security(host):
    """Docker's seccomp profile, dropped capabilities, read-only root, no-new-privileges, privileged."""
    d = docker(host)
    status = d("run", "--rm", "--cap-drop", "ALL", "--cap-add", "CHOWN", "--security-opt", "no-new-privileges",
               "busybox:test", "cat", "/proc/self/status").stdout
    check(re.search(r"CapEff:\s+0000000000000001\n", status), status)
    check(re.search(r"NoNewPrivs:\s+1\n", status), status)
    check(re.search(r"Seccomp:\s+2\n", status), "Docker's seccomp profile is not in force")
    d("run", "--rm", "--read-only", "busybox:test", "touch", "/file", ok=[1])
    d("run", "--rm", "busybox:test", "sh", "-c", "echo 1 >/proc/sys/kernel/sysrq", ok=[1, 2])
    d("run", "--rm", "busybox:test", "sh", "-c", "test -s /proc/kcore", ok=[1])


def test_privileged(host):
    """A privileged container has all capabilities and no seccomp filter."""
    d = docker(host)
    mine = int(re.search(r"CapBnd:\s+(\w+)", open("/proc/self/status").read())[1], 16)
    every = (1 << (int(open("/proc/sys/kernel/cap_last_cap").read()) + 1)) - 1
    if mine != every:
        raise Skip(f"root lacks capabilities of its own here: {every & ~mine:#x}")
    out = d("run", "--rm", "--privileged", "busybox:test", "grep", "Seccomp:", "/proc/self/status").stdout
    check(re.search(r"Seccomp:\s+0", out), out)


def test_network(host):
    """Two containers on Docker's bridge talk; one that joins another's network shares its interfaces."""
    d = docker(host)
    d("run", "-d", "--name", "server", "busybox:test", "sh", "-c", "while :; do echo hello | nc -l -p 8000; done")
    address = d("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "server").stdout.strip()
    check(address, "the container has no address")
    until(lambda: d("run", "--rm", "busybox:test", "nc", "-w", "2", address, "8000", ok=None).stdout == "hello\n", "the answer")
    shared = d("run", "--rm", "--network", "container:server", "busybox:test", "ip", "addr").stdout
    check(address in shared, "the joined network namespace doesn't have the address")
    check("eth0" not in d("run", "--rm", "--network", "none", "busybox:test", "ip", "addr").stdout, "network none")


def test_shared_namespaces(host):
    """A container that joins another's pids, or its System V objects and /dev/shm."""
    d = docker(host)
    d("run", "-d", "--name", "first", "--ipc", "shareable", "busybox:test", "sleep", "1000")
    own = {kind: d("exec", "first", "readlink", f"/proc/self/ns/{kind}").stdout for kind in ("pid", "ipc")}
    until(lambda: "sleep 1000" in d("run", "--rm", "--pid", "container:first", "busybox:test", "ps", "-o", "args").stdout,
          "the other's program among the processes")
    d("exec", "first", "touch", "/dev/shm/there")
    d("run", "--rm", "--ipc", "container:first", "busybox:test", "test", "-e", "/dev/shm/there")
    for kind, other in (("pid", "ipc"), ("ipc", "pid")):
        def joined(what):
            return d("run", "--rm", f"--{kind}", "container:first", "busybox:test", "readlink", f"/proc/self/ns/{what}").stdout

        equal(joined(kind), own[kind], f"the joined {kind} namespace")
        check(joined(other) != own[other], f"--{kind} has joined the {other} namespace too")
    # Without a process of its own that is pid 1, it still can be ended.
    d("run", "-d", "--name", "second", "--pid", "container:first", "busybox:test", "sleep", "2000")
    d("kill", "second")
    until(lambda: d.status("second") == "exited 137", "the end of the one that joined")
    equal(d.status("first"), "running 0", "the other one")


def test_health(host):
    """Docker's own look at a container's health, an exec now and then: healthy, and then not."""
    d = docker(host)
    d("run", "-d", "--name", "health", "--health-cmd", "test ! -e /ill", "--health-interval", "200ms", "--health-retries", "1",
      "busybox:test", "sleep", "1000")

    def health():
        return d("inspect", "-f", "{{.State.Health.Status}}", "health").stdout.strip()

    until(lambda: health() == "healthy", "health", 60)
    d("exec", "health", "touch", "/ill")
    until(lambda: health() == "unhealthy", "illness", 60)
    d("exec", "health", "rm", "/ill")
    until(lambda: health() == "healthy", "recovery", 60)


def test_out_of_memory(host):
    """Docker hears that the kernel killed for want of memory, and says so."""
    d = docker(host)
    if not os.path.exists("/sys/fs/cgroup/memory/memory.oom_control"):
        raise Skip("no v1 memory controller here")
    d("run", "-d", "--name", "greedy", "--memory", "16m", "--memory-swap", "16m", "busybox:test", "sh", "-c",
      "dd if=/dev/zero of=/dev/null bs=64M count=1; echo $?; sleep 1000")
    until(lambda: "137" in d("logs", "greedy").stdout, "the end of what wanted too much")
    # It hears of this another way than of the end, which is not to come first.
    until(lambda: "oom" in d("events", "--since", "1h", "--until", "0s", "--filter", "container=greedy", "--filter", "event=oom").stdout,
          "the event")
    d("kill", "greedy")
    until(lambda: d.status("greedy") == "exited 137", "the end")
    equal(d("inspect", "-f", "{{.State.OOMKilled}}", "greedy").stdout.strip(), "true", "OOMKilled")


COUNT = "i=0; while :; do echo $((i=i+1)); sleep 0.02; done"


def numbers(d, name):
    return [int(n) for n in re.findall(r"^(\d+)\r?$", d("logs", name).stdout, re.M)]


def checkpoint_story(host, *flags, leave_running):
    real_checkpoints()
    d = docker(host)
    d("run", "-d", "--name", "count", *flags, "busybox:test", "sh", "-c", COUNT)
    until(lambda: len(numbers(d, "count")) > 10, "counting")
    d("checkpoint", "create", *(["--leave-running"] if leave_running else []), "count", "one")
    check("one" in d("checkpoint", "ls", "count").stdout, "checkpoint ls doesn't show it")
    if leave_running:
        equal(d.status("count"), "running 0", "state after --leave-running")
        at = len(numbers(d, "count"))
        until(lambda: len(numbers(d, "count")) > at + 10, "counting after --leave-running")
        d("kill", "count")
    else:
        until(lambda: d.status("count").startswith("exited"), "the container to be shown as exited")
    before = numbers(d, "count")
    d.start_from("one", "count")
    equal(d.status("count"), "running 0", "state after the restore")
    until(lambda: len(numbers(d, "count")) > len(before) + 10, "counting after the restore")
    after = numbers(d, "count")[len(before):]
    equal(after, list(range(after[0], after[0] + len(after))), "numbers after the restore")
    if leave_running:
        check(10 < after[0] <= before[-1], f"went on at {after[0]}, the checkpoint was taken before {before[-1]}")
    else:
        equal(after[0], before[-1] + 1, "the first number after the restore")
    equal(d("exec", "count", "echo", "exec").stdout, "exec\n", "exec in the restored one")
    d("stop", "-t", "1", "count")
    d("checkpoint", "rm", "count", "one")


def test_checkpoint(host):
    """checkpoint create, ls, start --checkpoint, rm."""
    checkpoint_story(host, leave_running=False)


def test_checkpoint_leave_running(host):
    """The same, with --leave-running."""
    checkpoint_story(host, leave_running=True)


def test_checkpoint_tty(host):
    """The same, with a terminal."""
    checkpoint_story(host, "-t", leave_running=False)


def test_checkpoint_no_network(host):
    """The same, with nothing but the loopback device."""
    checkpoint_story(host, "--network", "none", leave_running=False)


def test_checkpoint_hardened(host):
    """The same, without privileges, read-only, as a user, with limits."""
    checkpoint_story(host, "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "-u", "1000:1000",
                     "--memory", "64m", "--pids-limit", "20", "--tmpfs", "/scratch", leave_running=False)


def test_checkpoint_again_and_again(host):
    """Five cycles; the checkpoint of each is taken from what the one before restored."""
    real_checkpoints()
    d = docker(host)
    d("run", "-d", "--name", "again", "busybox:test", "sh", "-c", COUNT)
    for cycle in range(5):
        at = len(numbers(d, "again"))
        until(lambda n=at: len(numbers(d, "again")) > n + 5, f"counting in cycle {cycle}")
        d("checkpoint", "create", "again", f"c{cycle}")
        until(lambda: d.status("again").startswith("exited"), "the container to be shown as exited")
        d.start_from(f"c{cycle}", "again")
    at = len(numbers(d, "again"))
    until(lambda: len(numbers(d, "again")) > at + 5, "counting at the end")
    got = numbers(d, "again")
    equal(got, list(range(1, len(got) + 1)), "the numbers")


def settings(host, text):
    """CRIU's configuration file, which serves clients without flags."""
    if not os.path.isdir("/etc/criu"):
        raise Skip("there is no /etc/criu to mount a configuration on")
    directory = host.dir / "criu"
    directory.mkdir()
    (directory / "runc.conf").write_text(text)
    sh("mount", "--bind", directory, "/etc/criu")
    host.undo.append(lambda: sh("umount", "-l", "/etc/criu"))


def test_checkpoint_beside_exec(host):
    """A process of exec is in the way, unless the configuration file says to leave it out."""
    real_checkpoints()
    d = docker(host)
    d("run", "-d", "--name", "count", "busybox:test", "sh", "-c", COUNT)
    d("exec", "-d", "count", "sleep", "1000")
    until(lambda: "sleep 1000" in d("top", "count").stdout, "the command")
    refused = d("checkpoint", "create", "count", "refused", ok=[1])
    check("--drop-exec" in refused.stderr, refused.stderr)
    settings(host, "drop-exec\n")
    d("checkpoint", "create", "count", "first")
    until(lambda: d.status("count").startswith("exited"), "the container to be shown as exited")
    before = numbers(d, "count")
    d.start_from("first", "count")
    until(lambda: len(numbers(d, "count")) > len(before) + 5, "counting")
    check("sleep 1000" not in d("top", "count").stdout, "the command is left out")


def test_failed_checkpoint(host):
    """A failed checkpoint leaves the container running: it can't be taken twice under one name."""
    real_checkpoints()
    d = docker(host)
    d("run", "-d", "--name", "twice", "busybox:test", "sh", "-c", COUNT)
    until(lambda: len(numbers(d, "twice")) > 5, "counting")
    d("checkpoint", "create", "--leave-running", "twice", "same")
    d("checkpoint", "create", "--leave-running", "twice", "same", ok=[1])
    equal(d.status("twice"), "running 0", "state")


def test_checkpoint_redis(host):
    """redis with 100,000 keys, on Docker's bridge, with a volume: stop checkpoint, start --checkpoint, all keys there."""
    real_checkpoints()
    d = docker(host)
    data = host.dir / "volume"
    data.mkdir(mode=0o777)
    d("run", "-d", "--name", "redis", "-v", f"{data}:/data", "redis:test", "redis-server", "--bind", "0.0.0.0", "--protected-mode", "no",
      "--unixsocket", "/data/redis.sock", "--unixsocketperm", "777", "--save", "", "--enable-debug-command", "yes")

    class C:
        socket = data / "redis.sock"
        id = "redis"

        @staticmethod
        def text():
            return d("logs", "redis").stdout

    serving(C)
    fill(C)
    before = digest(C)
    equal(before[0], KEYS, "keys before")
    d("checkpoint", "create", "redis", "full")
    until(lambda: d.status("redis").startswith("exited"), "the container to be shown as exited")
    d.start_from("full", "redis")
    serving(C)
    equal(digest(C), before, "keys and digest after")
    address = d("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "redis").stdout.strip()
    answer = d("run", "--rm", "redis:test", "redis-cli", "-h", address, "get", "key:5").stdout
    with Redis(C.socket) as redis:
        equal(answer.strip(), redis("GET", "key:5"), "a key, over the network that Docker attached again")


def test_checkpoint_redis_client(host):
    """A client's TCP connection lives through stop and start: Docker has no flag for it, CRIU's configuration file has."""
    real_checkpoints()
    d = docker(host)
    settings(host, "tcp-established\n")
    d("network", "create", "--subnet", "10.99.0.0/24", "fixed")
    host.undo.append(lambda: d("network", "rm", "fixed", ok=None))
    # Before the network goes, its container has to.
    host.undo.append(d.remove_all)
    d("run", "-d", "--name", "redis", "--network", "fixed", "--ip", "10.99.0.7", "redis:test", "redis-server", "--bind",
      "0.0.0.0", "--protected-mode", "no", "--save", "")
    client = connect(d.inside[1].removeprefix("--net="), ("10.99.0.7", 6379))
    host.undo.append(client.close)
    said = client.makefile("rwb", 0)

    def ask(*words):
        parts = [f"*{len(words)}"] + [part for word in words for part in (f"${len(word)}", word)]
        said.write("".join(part + "\r\n" for part in parts).encode())
        return said.readline().decode().strip()

    equal(ask("SET", "a", "1"), "+OK", "SET")
    for n in range(3):
        d("checkpoint", "create", "redis", f"c{n}")
        until(lambda: d.status("redis").startswith("exited"), "the container to be shown as exited")
        # Said to nobody yet: it must arrive.
        said.write(b"*2\r\n$4\r\nINCR\r\n$1\r\na\r\n")
        d.start_from(f"c{n}", "redis")
        equal(said.readline(), b":%d\r\n" % (n + 2), "the answer on the connection from before")
    equal(ask("CLIENT", "GETNAME"), "$-1", "the connection's name")


def connect(namespace, address):
    """A TCP connection from another network namespace."""
    made = []

    def work():
        fd = os.open(namespace, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(fd)

        def attempt():
            try:
                made.append(socket.create_connection(address, timeout=60))
                return True
            except OSError:
                return False

        until(attempt, f"{address} to answer")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    check(made, f"no connection to {address}")
    return made[0]


def test_same_as_runc(host):
    """What comes out, of both streams, and the status: the same under runc, word for word."""
    need("runc")
    d = docker(host)
    known = {RUNTIME: "RUNTIME", "runc": "RUNTIME", "stasis": "RUNTIME"}
    # Newer than Debian's runc, as upstream's is now.
    known |= {",size=4k,nr_inodes=1": "", "error during container init: exec": "exec", "open sysctl net.no.such file: ": "",
              # What upstream's says, and behind it what makes Docker's exit code 126.
              "is a directory: permission denied": "permission denied"}
    differences = []
    for flags, command in SAME:
        if "blkio" in flags and not os.path.exists("/sys/fs/cgroup/blkio/blkio.throttle.read_bps_device"):
            continue
        said = []
        for runtime in ("runc", "stasis"):
            done = d("run", "--rm", "--runtime", runtime, *flags.split(), "busybox:test",
                     *([] if command == "x" else ["sh", "-c", command]), ok=None)
            text = f"{done.returncode}\n{done.stdout}{done.stderr}"
            # The client's own word, said when it is slow to hear of a failed start.
            text = re.sub(r"time=.*error waiting for container: context canceled.*\n", "", text)
            text = re.sub(r"[0-9a-f]{64}|\b[0-9a-f]{12}\b", "ID", text)
            for word, neutral in known.items():
                text = text.replace(word, neutral)
            said.append(text)
        if said[0] != said[1]:
            differences.append(f"docker run {flags} ... {command}\nrunc:   {said[0]}\nstasis: {said[1]}")
    check(not differences, "\n".join(differences))
