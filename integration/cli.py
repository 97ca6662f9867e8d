"""The runtime's command line by itself: what clients rely on, without a client."""

import json
import os
import re
import subprocess
import time

from harness import Container, check, config, equal, real_checkpoints, sh, tail, until


def busybox(host, *args, label="c", output="file", change=None, tty=False):
    spec = config(args, root=host.overlay("busybox", label), tty=tty)
    if change:
        change(spec)
    return Container(host, label, spec, output=output)


def test_version_and_features(host):
    """--version, spec, features, help of checkpoint."""
    c = busybox(host, "true")
    check(re.search(r"\d+\.\d+", c.call("--version").stdout), "no version")
    c.call("checkpoint", "--help")
    (host.dir / "spec").mkdir()
    c.call("spec", "--bundle", host.dir / "spec")
    spec = json.loads((host.dir / "spec/config.json").read_text())
    check(spec["ociVersion"] and spec["linux"]["namespaces"], "spec wrote something else")


def test_life(host):
    """create, state, start, kill, state, delete; list and ps."""
    c = busybox(host, "sleep", "1000", output="null")
    with open("/dev/null", "r+b") as null:
        subprocess.run(c.command("create", "--bundle", c.bundle, "--pid-file", host.dir / "pid", c.id), stdin=null, stdout=null,
                       stderr=null, check=True, timeout=30)
    equal(c.state(), "created", "after create")
    state = json.loads(c.call("state", c.id).stdout)
    equal(state["id"], c.id, "id")
    equal(state["bundle"], str(c.bundle), "bundle")
    equal(int((host.dir / "pid").read_text()), state["pid"], "pid file")
    c.call("start", c.id)
    equal(c.state(), "running", "after start")
    until(lambda: open(f"/proc/{state['pid']}/cmdline").read().startswith("sleep"), "the program")
    listed = json.loads(c.call("list", "--format", "json").stdout)
    check(any(x["id"] == c.id and x["status"] == "running" for x in listed), f"list: {listed}")
    equal(json.loads(c.call("ps", "--format", "json", c.id).stdout), [state["pid"]], "ps")
    c.call("delete", c.id, ok=[1])
    c.call("kill", c.id, "KILL")
    until(lambda: c.state() == "stopped", "the end")
    c.call("kill", c.id, "KILL", ok=[1])
    c.call("delete", c.id)
    equal(c.state(), "", "after delete")


def test_messages(host):
    """Words that clients look for."""
    c = busybox(host, "sleep", "1000")
    c.run()
    again = c.call("create", "--bundle", c.bundle, c.id, ok=[1], stdin="")
    check("container with given ID already exists" in again.stderr, again.stderr)
    missing = c.call("state", "no-such-container", ok=[1])
    check("container does not exist" in missing.stderr, missing.stderr)
    log = host.dir / "log.json"
    c.call("--log", log, "--log-format", "json", "state", "no-such-container", ok=[1])
    last = [json.loads(line) for line in log.read_text().splitlines()][-1]
    equal(last["level"], "error", "level of the last log entry")
    check("does not exist" in last["msg"] and last["time"], str(last))
    c.call("delete", "--force", "no-such-container")
    bad = busybox(host, "/no/such/program", label="bad")
    bad.run(ok=[1])
    check("no such file or directory" in bad.text() or "executable file not found" in bad.text(), bad.text())


def test_exit_code(host):
    """run in the foreground has its program's exit code, exec too."""
    c = busybox(host, "sh", "-c", "exit 42")
    c.call("run", "--bundle", c.bundle, c.id, ok=[42], stdin="")
    k = busybox(host, "sleep", "1000", label="k")
    k.run()
    k.exec("sh", "-c", "exit 3", ok=[3])
    equal(k.exec("echo", "hello").stdout, "hello\n", "exec")
    done = k.call("exec", "--env", "A=b", "--cwd", "/tmp", "--user", "5:6", k.id, "sh", "-c", "echo $A; pwd; id -u; id -g")
    equal(done.stdout, "b\n/tmp\n5\n6\n", "exec with options")
    process = host.dir / "process.json"
    process.write_text(json.dumps({"terminal": False, "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "echo $B; exit 6"],
                                   "env": ["PATH=/bin", "B=from-process"], "cwd": "/"}))
    equal(k.call("exec", "--process", process, k.id, ok=[6]).stdout, "from-process\n", "exec --process")


def test_pause(host):
    """pause, a second pause refused, resume."""
    c = busybox(host, "sh", "-c", "i=0; while :; do echo $((i=i+1)); sleep 0.01; done")
    c.run()
    until(lambda: "20\n" in c.text(), "counting")
    c.call("pause", c.id)
    equal(c.state(), "paused", "state")
    time.sleep(0.1)
    still = c.text()
    time.sleep(0.2)
    equal(c.text(), still, "output while paused")
    c.call("resume", c.id)
    until(lambda: c.text() != still, "counting again")


def test_kill_all(host):
    """kill --all reaches every process, delete --force ends what runs."""
    c = busybox(host, "sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000 & wait")
    c.run()
    until(lambda: len(json.loads(c.call("ps", "--format", "json", c.id).stdout)) == 3, "three processes")
    c.call("kill", "--all", c.id, "KILL")
    until(lambda: c.state() == "stopped", "the end")
    c.delete()
    d = busybox(host, "sleep", "1000", label="d")
    d.run()
    pid = d.pid()
    d.call("delete", "--force", d.id)
    equal(d.state(), "", "after delete --force")
    until(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().rpartition(")")[2][:3], "its end")


def test_hooks(host):
    """Hooks run at their moments, with the state on standard input."""
    log = host.dir / "hooks.log"

    def change(spec):
        def hook(name):
            script = f'echo "{name} $(cat | tr -d "\\n" | sed "s/.*\\"status\\": *\\"\\([a-z]*\\)\\".*/\\1/")" >>{log}'
            return [{"path": "/bin/sh", "args": ["sh", "-c", script]}]

        spec["hooks"] = {n: hook(n) for n in ("prestart", "createRuntime", "createContainer", "poststart", "poststop")}
        spec["hooks"].pop("createContainer")  # runs inside the mount namespace: the log's path may be hidden there

    c = busybox(host, "sleep", "1000", change=change)
    c.run()
    c.call("kill", c.id, "KILL")
    until(lambda: c.state() == "stopped", "the end")
    c.call("delete", c.id)
    names = [line.split()[0] for line in log.read_text().splitlines()]
    equal(names, ["prestart", "createRuntime", "poststart", "poststop"], "hooks")


def test_checkpoint_of_nothing(host):
    """A checkpoint of a stopped or unknown container, a restore of nothing: refused, and nothing is left behind."""
    real_checkpoints()
    c = busybox(host, "true")
    c.run()
    until(lambda: c.state() == "stopped", "the end")
    c.checkpoint("image", ok=[1])
    c.call("checkpoint", "--image-path", host.dir / "image", "no-such-container", ok=[1])
    c.delete()
    (host.dir / "empty").mkdir()
    done = c.call("restore", "--detach", "--bundle", c.bundle, "--image-path", host.dir / "empty", c.id, ok=[1], stdin="")
    check("inventory.img" in done.stderr, done.stderr)
    equal(c.state(), "", "after a restore that failed")


def test_paused_checkpoint(host):
    """A paused container can be checkpointed, stays paused with --leave-running, and the restored one runs."""
    real_checkpoints()
    c = busybox(host, "sh", "-c", "i=0; while :; do echo $((i=i+1)); sleep 0.01; done")
    c.run()
    until(lambda: "20\n" in c.text(), "counting")
    c.call("pause", c.id)
    c.checkpoint("image", "--leave-running")
    equal(c.state(), "paused", "state after the checkpoint")
    still = c.text()
    c.call("resume", c.id)
    until(lambda: c.text() != still, "counting again")
    c.call("pause", c.id)
    c.checkpoint("image")
    last = int(c.text().split()[-1])
    c.restore("image")
    equal(c.state(), "running", "state after the restore")
    until(lambda: int(c.text().split()[-1]) > last + 10, "counting after the restore")
    got = [int(n) for n in c.text().split()]
    equal(got, list(range(1, len(got) + 1)), "numbers")


def test_killed_checkpoint(host):
    """SIGKILL to `checkpoint` at any moment: the container goes on, and the next checkpoint works."""
    real_checkpoints()
    c = busybox(host, "sh", "-c", "i=0; while :; do echo $((i=i+1)); done", output="pipe")
    c.run()
    for i in range(60):
        work = host.dir / "killed.work"
        p = subprocess.Popen(c.command("checkpoint", "--leave-running", "--image-path", host.dir / "killed", "--work-path", work, c.id),
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(i % 30 / 1000)
        p.kill()
        p.wait()
        c.call("state", c.id)
        size = len(c.printed)
        until(lambda n=size: len(c.printed) > n, f"the container to go on after kill number {i}", 10)
    c.checkpoint("image")
    time.sleep(0.1)
    c.restore("image")
    size = len(c.printed)
    until(lambda: len(c.printed) > size + 1000, "counting after the restore")
    c.call("pause", c.id)
    time.sleep(0.1)
    got = [int(n) for n in c.text().split("\n")[:-1]]
    equal(got[:100000], list(range(1, len(got) + 1))[:100000], "numbers")
    equal(got[-1], len(got), "the last number")


def test_full_disk(host):
    """No room for the images: the checkpoint fails, the container goes on."""
    real_checkpoints()
    c = busybox(host, "sh", "-c", "i=0; while :; do echo $((i=i+1)); sleep 0.01; done")
    c.run()
    until(lambda: "20\n" in c.text(), "counting")
    small = host.dir / "small"
    small.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
    host.undo.append(lambda: sh("umount", "-l", small))
    done = c.call("checkpoint", "--image-path", small, "--work-path", host.dir / "work", c.id, ok=[1])
    check("no space" in done.stderr.lower() or "ENOSPC" in done.stderr, done.stderr)
    equal(c.state(), "running", "state")
    at = len(c.text())
    until(lambda: len(c.text()) > at + 50, "counting on")
    check(not (small / "inventory.img").exists(), "an inventory.img was published")


def test_bad_images(host):
    """Missing, truncated, foreign and random images: a clear error, nothing left, the images intact for another try."""
    real_checkpoints()
    c = busybox(host, "sleep", "1000")
    c.run()
    c.checkpoint("good")
    images = sorted(f for f in (host.dir / "good").iterdir() if f.name.endswith(".img"))
    bad, said = host.dir / "bad", host.dir / "said"
    tried = 0
    for image in images:
        for what in ("missing", "truncated", "random"):
            sh("rm", "-rf", bad)
            sh("cp", "-a", host.dir / "good", bad)
            victim = bad / image.name
            data = image.read_bytes()
            if what == "missing":
                victim.unlink()
            elif what == "truncated":
                victim.write_bytes(data[:len(data) * 2 // 3])
            else:
                victim.write_bytes(data[:8] + os.urandom(max(len(data) - 8, 8)))
            # Not through pipes: the container keeps what the command is given, and we would wait for its end.
            with open(said, "w") as out:
                command = c.command("restore", "--detach", "--bundle", c.bundle, "--image-path", bad, "--work-path",
                                    host.dir / "work", c.id)
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=30)
            done.stderr = said.read_text(errors="replace")
            tried += 1
            check("panicked" not in done.stderr, f"{what} {image.name}: {done.stderr}")
            check(done.returncode in (0, 1), f"{what} {image.name}: status {done.returncode}: {done.stderr}")
            if done.returncode == 0:
                # Contents that carry no structure (pages, tmpfs archives), and what may be absent, can't be told apart.
                check(image.name.startswith("pages") or what != "truncated", f"{what} {image.name} was restored")
                c.delete()
            else:
                check(done.stderr.strip(), f"{what} {image.name}: no message")
                equal(c.state(), "", f"state after {what} {image.name}")
    check(tried > 20, "too few images")
    c.restore("good")
    equal(c.state(), "running", f"the good images, afterwards: {tail(host.dir / 'good.work/restore.log')}")
