"""The runtime's command line by itself: what clients rely on, without a client."""

import json
import os
import pathlib
import re
import socket
import subprocess
import threading
import time

from harness import PATIENCE, Container, Failed, Skip, check, config, equal, program, real_checkpoints, running, sh, tail, until


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
    until(lambda: not running(pid), "its end")


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
    """A paused container can be checkpointed, stays paused beside its checkpoint and after a restore; or it runs then, as asked or for a client."""
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
    for name in ("one", "two"):
        c.checkpoint(name)
        still = c.text()
        c.restore(name)
        equal(c.state(), "paused", f"state after the restore of {name}")
        time.sleep(0.2)
        equal(c.text(), still, "output of a paused container")
    c.call("resume", c.id)
    last = int(c.text().split()[-1])
    until(lambda: int(c.text().split()[-1]) > last + 10, "counting after the restore")
    got = [int(n) for n in c.text().split()]
    equal(got, list(range(1, len(got) + 1)), "numbers")
    for flag in ("--resume", "--no-subreaper"):
        c.delete()
        still = c.text()
        c.restore("two", flag)
        equal(c.state(), "running", f"state after restore {flag}")
        until(lambda: c.text() != still, f"counting after restore {flag}")


def group_file(c, controller, v1, v2):
    """A setting of the container's control group, whichever version has it."""
    for line in pathlib.Path(f"/proc/{c.pid()}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return pathlib.Path("/sys/fs/cgroup") / controller / path[1:] / v1
        if not names and not pathlib.Path("/sys/fs/cgroup", controller).is_dir():
            return pathlib.Path("/sys/fs/cgroup") / path[1:] / v2
    raise Failed(f"no control group for {controller}")


def test_cgroup_modes(host):
    """What `update` has changed comes back with --manage-cgroups-mode full, as far as config.json allows."""
    real_checkpoints()
    c = busybox(host, "sleep", "1000")
    c.spec["linux"]["resources"].update({"memory": {"limit": 256 << 20}})
    config_file = c.bundle / "config.json"
    config_file.write_text(json.dumps(c.spec))

    def limits():
        files = group_file(c, "pids", "pids.max", "pids.max"), group_file(c, "memory", "memory.limit_in_bytes", "memory.max")
        return [f.read_text().strip() for f in files]

    c.run()
    equal(limits(), ["max", str(256 << 20)], "limits of config.json")
    c.call("update", "--pids-limit", "77", "--memory", str(200 << 20), c.id)
    equal(limits(), ["77", str(200 << 20)], "limits after the update")
    c.checkpoint("image")
    for flags, expected in ((), ["max", str(256 << 20)]), (("--manage-cgroups-mode", "soft"), ["max", str(256 << 20)]), \
            (("--manage-cgroups-mode", "ignore"), ["max", str(256 << 20)]), \
            (("--manage-cgroups-mode", "full"), ["77", str(200 << 20)]), \
            (("--manage-cgroups-mode", "strict"), ["77", str(200 << 20)]):
        c.restore("image", *flags)
        equal(limits(), expected, f"limits with {flags}")
        c.delete()
    # A config.json that allows less has the last word.
    c.spec["linux"]["resources"].update({"pids": {"limit": 9}, "memory": {"limit": 64 << 20}})
    config_file.write_text(json.dumps(c.spec))
    c.restore("image", "--manage-cgroups-mode", "full")
    equal(limits(), ["9", str(64 << 20)], "limits under a narrower config.json")
    c.checkpoint("again")
    # strict wants a group that was not there.
    c.spec["linux"]["cgroupsPath"] = f"/{c.id}-there"
    config_file.write_text(json.dumps(c.spec))
    c.restore("again")
    directory = group_file(c, "devices", "", "").resolve()
    c.checkpoint("third")
    directory.mkdir()
    try:
        c.restore("third", "--manage-cgroups-mode", "strict")
    except Failed as e:
        check("is there already" in str(e), str(e))
    else:
        raise Failed("strict took a control group that was there")
    c.restore("third", "--manage-cgroups-mode", "full")
    equal(limits(), ["9", str(64 << 20)], "limits in a group that was there")
    c.delete()


def test_fresh_bundle(host):
    """A restore in another place: each thing that may differ alone, then all of them together."""
    real_checkpoints()

    def network():
        holder = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
        host.undo.append(lambda: (holder.kill(), holder.wait()))
        link = pathlib.Path(f"/proc/{holder.pid}/ns/net")
        own = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(link) != own, "a network namespace")
        return link

    def volume(name):
        (host.dir / name).mkdir()
        (host.dir / name / "name").write_text(f"{name}\n")
        return host.dir / name

    networks, volumes = [network(), network()], [volume("one"), volume("two")]
    command = ["sh", "-c", "exec 3</vol/name; i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"]
    first = busybox(host, *command, label="first", tty=True)
    root = pathlib.Path(first.spec["root"]["path"])
    (root / "which").write_text("root one")

    def spec(changed):
        made = json.loads(json.dumps(first.spec))
        net = networks["network" in changed]
        made["linux"]["namespaces"] = [n for n in made["linux"]["namespaces"] if n["type"] != "network"]
        made["linux"]["namespaces"].append({"type": "network", "path": str(net)})
        made["mounts"].append({"destination": "/vol", "type": "bind", "options": ["rbind"],
                               "source": str(volumes["volume" in changed])})
        if "cgroup" in changed:
            made["linux"]["cgroupsPath"] = f"/{host.id}-other"
        if "root" in changed:
            made["root"]["path"] = str(other_root)
        return made

    other_root = host.overlay("busybox", "other")
    (other_root / "which").write_text("root two")
    (other_root / "vol").mkdir(exist_ok=True)
    first.spec = spec(())
    first.bundle.joinpath("config.json").write_text(json.dumps(first.spec))
    first.run()
    until(lambda: "20\r\n" in first.text(), "counting")
    first.checkpoint("image")
    first.drained()
    last = int(first.lines()[-1])
    everything = ("bundle", "root", "volume", "network", "cgroup")
    cases = [(thing,) for thing in everything] + [everything]
    for at, changed in enumerate(cases):
        # The id and the console are others each time.
        c = Container(host, f"c{at}", spec(changed))
        if "bundle" not in changed:
            c.bundle = first.bundle
            c.bundle.joinpath("config.json").write_text(json.dumps(c.spec))
        c.restore("image")
        until(lambda: len(c.lines()) > 10, f"counting with another {changed}")
        check(int(c.lines()[-1]) > last, f"it goes on: {c.text()[-50:]}")
        equal(int(c.lines()[0]), last + 1, f"the first line with another {changed}")
        pid = c.pid()
        equal(os.readlink(f"/proc/{pid}/ns/net"), os.readlink(networks["network" in changed]), "network")
        two = lambda thing: "two" if thing in changed else "one"  # noqa: E731
        equal(c.exec("cat", "/vol/name").stdout, f"{two('volume')}\n", "volume")
        equal(pathlib.Path(f"/proc/{pid}/fd/3").read_text(), f"{two('volume')}\n", "open file of the volume")
        equal(c.exec("cat", "/which").stdout, f"root {two('root')}", "root file system")
        group = pathlib.Path(f"/proc/{pid}/cgroup").read_text()
        equal(f"{host.id}-other" in group, "cgroup" in changed, "control group")
        # And once more from there.
        c.checkpoint(f"image{at}")
        c.restore(f"image{at}")
        equal(c.state(), "running", f"state after a second restore with another {changed}")
        c.delete()


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
        until(lambda n=size: len(c.printed) > n, f"the container to go on after kill number {i}")
    c.checkpoint("image")
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
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=120 * PATIENCE)
            done.stderr = said.read_text(errors="replace")
            tried += 1
            check("panicked" not in done.stderr, f"{what} {image.name}: {done.stderr}")
            check(done.returncode in (0, 1), f"{what} {image.name}: status {done.returncode}: {done.stderr}")
            if done.returncode == 0:
                # Contents that carry no structure (pages, tmpfs archives) can't be told apart; the seal may be absent.
                check(what == "random" or (what, image.name) == ("missing", "stasis.img"), f"{what} {image.name} was restored")
                c.delete()
            else:
                check(done.stderr.strip(), f"{what} {image.name}: no message")
                equal(c.state(), "", f"state after {what} {image.name}")
    check(tried > 20, "too few images")
    c.restore("good")
    equal(c.state(), "running", f"the good images, afterwards: {tail(host.dir / 'good.work/restore.log')}")


def test_image_views(host):
    """image show, tree, mem, files, verify, seal: what they say of a set, and of one that is damaged."""
    script = "mkfifo /f; exec 3<>/f; echo hello >&3; cd /tmp; sleep 1000 & echo up; wait"
    c = busybox(host, "sh", "-c", script)
    c.run()
    until(lambda: "up\n" in c.text(), "the program")
    until(lambda: sum(line.endswith(" sleep 1000") for line in c.call("ps", c.id).stdout.splitlines()) == 1, "its child")
    c.checkpoint("image")
    images = host.dir / "image"

    def view(name):
        text = c.call("image", name, images).stdout
        return text, json.loads(c.call("image", name, "--format", "json", images).stdout)

    text, tree = view("tree")
    equal([(p["pid"], p["ppid"], p["name"], p["state"]) for p in tree],
          [(1, 0, "sh", "running"), (tree[1]["pid"], 1, "sleep", "running")], "processes")
    equal([p["arguments"] for p in tree], [["sh", "-c", script], ["sleep", "1000"]], "arguments")
    child = tree[1]["pid"]
    check(text.splitlines()[1].startswith(f"  {child} sleep 1000  (group 1, session 1"), text)

    text, tables = view("files")
    equal([(t["pids"], t["name"], t["directory"]) for t in tables],
          [([1], "sh", "/tmp"), ([child], "sleep", "/tmp")], "tables of descriptors")
    first = {d["fd"]: (d["kind"], d["what"]) for d in tables[0]["descriptors"]}
    equal(first[3], ("fifo", "/f, 6 bytes wait"), "the fifo")
    check("fifo            /f, 6 bytes wait" in text, text)

    text, spaces = view("mem")
    for space in spaces:
        pages = sum(m["saved_bytes"] for m in space["mappings"])
        equal(space["saved_bytes"], pages, f"pages of process {space['pid']}")
        check({"stack", "vdso"} <= {m["kind"] for m in space["mappings"]}, f"mappings: {space}")
    saved = sum(s["saved_bytes"] for s in spaces)
    equal(saved, sum(f.stat().st_size for f in images.glob("pages-*.img")), "bytes of pages")
    check("busybox +0x" in text and "[stack]" in text, text)

    text, summary = view("show")
    equal((summary["container"], summary["command"], summary["processes"], summary["memory_bytes"]),
          (c.id, "sh", 2, saved), "the summary")
    check("written by       Stasis" in text, text)
    text, verdict = view("verify")
    equal((verdict["whole"], verdict["images"]), (True, len(list(images.glob("*.img")))), "verify")

    def damaged(name, views, words):
        for what in views:
            said = c.call("image", what, images, ok=[1])
            check(name in said.stdout + said.stderr and words in said.stdout + said.stderr, f"{what}: {said}")

    core = images / f"core-{child}.img"
    whole = core.read_bytes()
    core.write_bytes(whole[:-3])
    damaged(core.name, ["show", "tree", "mem", "files", "verify"], "truncated")
    c.call("image", "seal", images)
    damaged(core.name, ["verify"], "truncated")
    core.write_bytes(whole)
    c.call("image", "seal", images)
    equal(json.loads(c.call("image", "verify", "--format", "json", images).stdout)["whole"], True, "mended")
    core.unlink()
    damaged(core.name, ["tree", "verify"], "")


def test_protected_paths_that_are_gone(host):
    """A masked path that the destination lacks, as another kernel's /proc may: nothing is there to be hidden."""
    real_checkpoints()
    c = busybox(host, "sleep", "1000")
    spec = json.loads((c.bundle / "config.json").read_text())
    spec["linux"].setdefault("maskedPaths", []).extend(["/protected/dir", "/protected/file"])
    spec["linux"].setdefault("readonlyPaths", []).append("/protected/seen")
    (c.bundle / "config.json").write_text(json.dumps(spec))
    place = pathlib.Path(spec["root"]["path"]) / "protected"
    place.mkdir()
    (place / "dir").mkdir()
    for name in ("file", "seen"):
        (place / name).write_text("x")
    c.run()
    c.checkpoint("image")
    (place / "dir").rmdir()
    (place / "seen").unlink()
    c.restore("image")
    equal(c.state(), "running", f"restored: {tail(host.dir / 'image.work/restore.log')}")
    mounts = [line.split()[4] for line in open(f"/proc/{c.pid()}/mountinfo")]
    equal([m for m in mounts if m.startswith("/protected")], ["/protected/file"], "protected paths")


def test_clocks_of_another_machine(host):
    """Images of another boot: the clocks go on where they stopped, also under a second restore, and exec sees them."""
    real_checkpoints()
    if not os.path.exists("/proc/self/timens_offsets"):
        raise Skip("this kernel has no time namespaces")
    # Seconds since boot, as the container's own clock shows them.
    c = busybox(host, "sh", "-c", "while :; do read up rest </proc/uptime; echo $up; sleep 0.1; done")
    clocks = lambda: [float(line) for line in c.text().split()]  # noqa: E731
    namespace = lambda: os.stat(f"/proc/{c.pid()}/ns/time").st_ino  # noqa: E731
    ours = os.stat("/proc/self/ns/time").st_ino

    def elsewhere(name, seconds):
        """The images as another machine would have written them, that many seconds after its start."""
        images = host.dir / name
        stasis, boot = images / "stasis.img", pathlib.Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        data = stasis.read_bytes()
        check(boot in data, "stasis.img does not say which boot it is of")
        stasis.write_bytes(data.replace(boot, boot[::-1]))
        if seconds:
            decoded = json.loads(sh("crit", "decode", "-i", images / "timens-0.img").stdout)
            for clock in decoded["entries"][0].values():
                clock["tv_sec"] = seconds
            (host.dir / "clocks.json").write_text(json.dumps(decoded))
            sh("crit", "encode", "-i", host.dir / "clocks.json", "-o", images / "timens-0.img")
        c.call("image", "seal", images)

    c.run()
    until(lambda: len(clocks()) > 3, "the container's clock")
    c.checkpoint("same")
    c.restore("same")
    equal(namespace(), ours, "on the same machine it sees the machine's clocks")
    c.checkpoint("first")
    elsewhere("first", 900_000_000)
    before = len(clocks())
    c.restore("first")
    until(lambda: len(clocks()) > before + 3, "the clock of the other machine")
    check(namespace() != ours, "no time namespace")
    check(900_000_000 <= clocks()[-1] < 900_000_600, f"the clock shows {clocks()[-1]}")
    check(float(c.call("exec", c.id, "cut", "-d.", "-f1", "/proc/uptime").stdout) >= 900_000_000, "exec sees other clocks")
    # A namespace that it has now goes with it, from wherever it comes.
    began = time.monotonic()
    earlier = float(c.exec("cat", "/proc/uptime").stdout.split()[0])
    c.checkpoint("second")
    before = len(clocks())
    time.sleep(3)
    c.restore("second")
    until(lambda: len(clocks()) > before + 3, "the clock after that")
    spent = time.monotonic() - began
    shown = clocks()[before - 1:]
    # It has not seen the three seconds, however long the commands took.
    check(shown[1] - earlier < spent - 2.9, f"showed {earlier}, went on at {shown[1]}, {spent} s later")
    equal(sorted(shown), shown, "clocks never go back")


def test_keep_exec(host):
    """Processes of exec are kept on request, as second roots: with their children, sessions, pipes whose other end is gone."""
    real_checkpoints()
    c = busybox(host, "sleep", "1000")
    root = pathlib.Path(json.loads((c.bundle / "config.json").read_text())["root"]["path"])
    said = lambda name: (root / name).read_text().strip() if (root / name).exists() else ""  # noqa: E731
    c.run()
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # With a child of its own, and one that init has inherited.
    script = "sleep 2000 & (sleep 3000 & exit); n=0; while [ ! -e /go ]; do n=$((n + 1)); echo $n >/count; sleep 0.05; done; echo end >/end; wait"
    subprocess.run(c.command("exec", "--detach", c.id, "sh", "-c", script), check=True, timeout=60, **nowhere)
    # One whose client waits for it, and reads what it writes.
    waiting = "while [ ! -e /go ]; do sleep 0.05; done; trap '' PIPE; cat; echo gone 2>/dev/null || echo broken >/pipe; sleep 4000"
    client = subprocess.Popen(c.command("exec", c.id, "sh", "-c", waiting), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    programs = lambda: sorted(line.split(None, 3)[3] for line in c.call("ps", c.id, "-o", "pid,user,ppid,args").stdout.splitlines()[1:] if not line.endswith(" sleep 0.05"))  # noqa: E731
    whole = sorted(["sh -c " + script, "sh -c " + waiting, "sleep 1000", "sleep 2000", "sleep 3000"])
    until(lambda: programs() == whole, "the processes")

    refused = c.checkpoint("refused", ok=None)
    check(refused.returncode != 0 and "--keep-exec" in refused.stderr, refused.stderr)
    c.call("check", "--keep-exec", c.id)
    number = lambda: int(said("count") or 0)  # noqa: E731
    c.checkpoint("left", "--keep-exec", "--leave-running")
    c.checkpoint("before", "--keep-exec", "--pre-dump")
    for name, more in (("one", ["--parent-path", "../before"]), ("two", [])):
        before = number()
        c.checkpoint(name, "--keep-exec", *more)
        equal(c.state(), "", "after the checkpoint")
        client.wait(60)
        c.restore(name)
        until(lambda: programs() == whole, f"all that is in {name}")
        until(lambda: number() > before, "the loop to go on")
    stat = c.call("exec", c.id, "sh", "-c", "for p in $(pidof sh); do cut -d' ' -f1,4,6 /proc/$p/stat; done; true").stdout
    roots = [line.split() for line in stat.splitlines() if line.split()[1] == "0"]
    check(len([r for r in roots if r[0] == r[2]]) >= 2, f"second roots that lead their sessions: {stat}")
    (root / "go").touch()
    until(lambda: said("end") and said("pipe"), "what has been restored to see that its client is gone")
    equal(said("pipe"), "broken", "what the pipe to nobody says")
    c.delete()

    # What exec had given beyond config.json is not given again.
    c = busybox(host, "sleep", "1000", label="wide")
    c.run()
    subprocess.run(c.command("exec", "--detach", "--cap", "CAP_SYS_TIME", c.id, "sleep", "2000"), check=True, timeout=60, **nowhere)
    c.checkpoint("wide", "--keep-exec")
    c.restore("wide", ok=(1,))
    check("CAP_SYS_TIME" in c.text(), c.text())
    equal(c.state(), "", "after a restore that was refused")
    c.restore("wide", "--policy", "clamp")
    equal(programs(), ["sleep 1000", "sleep 2000"], "clamped")
    c.delete()


def test_check_of_many_processes(host):
    """check of a container of 100 processes: all that it would refuse as JSON, and its exit codes."""
    real_checkpoints()
    c = busybox(host, "sh", "-c", "for i in $(seq 99); do sleep 1000 & done; wait", label="many")
    c.run()
    look = lambda: json.loads(c.call("check", "--format", "json", c.id).stdout)  # noqa: E731
    until(lambda: look()["processes"] == 100, "the processes")
    check(look()["possible"] and not look()["findings"], look())
    # All that would be refused, and not the first thing only.
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(2):
        subprocess.run(c.command("exec", "--detach", c.id, "sleep", "2000"), check=True, timeout=60, **nowhere)
    said = json.loads(c.call("check", "--format", "json", c.id, ok=[1]).stdout)
    check(not said["possible"] and said["processes"] == 102, said)
    equal(len({finding["pid"] for finding in said["findings"] if "--drop-exec" in finding["remedy"]}), 2, "processes of exec that are named")
    check(all(finding["fate"] == "refused" for finding in said["findings"]), said)
    equal(json.loads(c.call("check", "--drop-exec", "--format", "json", c.id).stdout)["findings"], [], "without the processes of exec")
    c.delete()


def test_drop_exec(host):
    """Processes of exec: refused by name, or left out; they go on beside a container that is left running."""
    real_checkpoints()
    c = busybox(host, "sleep", "1000")
    c.run()
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # With a child of its own, and one that init has inherited: that one is the container's.
    script = "sleep 2000 & (sleep 3000 & exit); wait"
    subprocess.run(c.command("exec", "--detach", c.id, "sh", "-c", script), check=True, timeout=60, **nowhere)
    programs = lambda c: sorted(line.split(None, 3)[3] for line in c.call("ps", c.id, "-o", "pid,user,ppid,args").stdout.splitlines()[1:])  # noqa: E731
    whole = ["sh -c " + script, "sleep 1000", "sleep 2000", "sleep 3000"]
    until(lambda: programs(c) == whole, "the processes")
    refused = c.checkpoint("refused", ok=None)
    check(refused.returncode != 0 and "--drop-exec" in refused.stderr, refused.stderr)
    check("--drop-exec" in c.call("check", c.id, ok=[1]).stdout, "check says nothing of it")
    c.call("check", "--drop-exec", c.id)
    c.checkpoint("left", "--drop-exec", "--leave-running")
    equal(programs(c), whole, "the container that was left running")
    c.checkpoint("before", "--drop-exec", "--pre-dump")
    equal(programs(c), whole, "after a pre-dump")
    c.checkpoint("image", "--drop-exec", "--parent-path", "../before")
    equal(c.state(), "", "after the checkpoint")
    for name in ("image", "left"):
        c.restore(name)
        equal(programs(c), ["sleep 1000", "sleep 3000"], f"restored from {name}")
        c.delete()


def test_trace(host):
    """--trace: the phases one after another; a file that can't be written is a warning, and no harm."""
    real_checkpoints()
    c = busybox(host, "sleep", "1000")
    c.run()
    c.checkpoint("images", "--trace", host.dir / "dump.json")
    c.restore("images", "--trace", host.dir / "restore.json")
    for name, phases in (("dump", {"freeze", "memory", "publish", "standing still"}), ("restore", {"tree", "memory", "resume"})):
        spans = [e for e in json.loads((host.dir / f"{name}.json").read_text())["traceEvents"] if e["ph"] == "X"]
        check(phases <= {e["name"] for e in spans}, f"phases of a {name}: {spans}")
        one = [e for e in spans if e["tid"] == 1]
        for a, b in zip(one, one[1:]):
            check(abs(a["ts"] + a["dur"] - b["ts"]) < 1, f"{a} and {b} do not meet")
    done = c.checkpoint("again", "--leave-running", "--trace", "/no/such/directory/x")
    check("cannot write the trace" in done.stderr, f"no warning: {done.stderr}")
    equal(c.state(), "running", "state")


def test_exec_flags(host):
    """exec --cgroup, --cap, --user, --additional-gids, --preserve-fds; what is wrong with them is said in runc's words."""
    c = busybox(host, "sleep", "1000")
    c.run()
    said = lambda *words: c.call("exec", *words, ok=[255]).stderr  # noqa: E731
    check("bad uid: strconv.Atoi: parsing" in said("--user", "x", c.id, "true"), "a user who is no number")
    check("bad uid" in said("--user", "4294967296", c.id, "true"), "a user who wraps round to root")
    check("must be a positive number -3" in said("-g", "-3", c.id, "true"), "a negative group")
    check("unknown controller nope in SubCgroupPaths" in said("--cgroup", "nope:x", c.id, "true"), "an unknown controller")
    check("bad sub cgroup path" in said("--cgroup", "../..", c.id, "true"), "a group outside")
    check("no such file or directory" in said("--cgroup", "missing", c.id, "true"), "a missing group")
    groups = c.call("exec", "-g", "10", "-g", "11", c.id, "sh", "-c", "id -G").stdout
    equal(groups.split(), ["0", "10", "11"], "additional groups")
    status = lambda *flags: c.call("exec", *flags, c.id, "cat", "/proc/self/status").stdout  # noqa: E731
    effective = lambda text: int(re.search(r"CapEff:\s*(\w+)", text)[1], 16)  # noqa: E731
    cap_syslog = 1 << 34
    check(not effective(status()) & cap_syslog, "CAP_SYSLOG without being asked for")
    check(effective(status("--cap", "CAP_SYSLOG")) & cap_syslog, "--cap CAP_SYSLOG")
    check("ignoring unknown" in c.call("exec", "--cap", "CAP_NOPE", c.id, "true").stderr, "an unknown capability")
    (host.dir / "kept").write_text("kept")
    command = c.command("exec", "--preserve-fds", "1", c.id, "sh", "-c", "cat <&3")
    done = sh("sh", "-c", 'exec 3<"$1"; shift; exec "$@"', "sh", host.dir / "kept", *command)
    equal(done.stdout, "kept", f"--preserve-fds: {done.stderr}")
    equal(c.call("exec", c.id, "cat", "/proc/self/cgroup").stdout, c.call("exec", "--cgroup", "/", c.id, "cat", "/proc/self/cgroup").stdout,
          "the container's own group")


def test_usage(host):
    """Command lines that make no sense: exit codes and words."""
    c = busybox(host, "true")
    (host.dir / "root").mkdir()
    for words, code, text in [
        (("create",), 1, '"create" requires exactly 1 argument(s)'),
        (("exec",), 1, '"exec" requires a minimum of 1 argument(s)'),
        (("nope",), 3, "No help topic for 'nope'"),
        (("list", "--nope"), 1, "flag provided but not defined: -nope"),
        (("create", "--bundle"), 1, "flag needs an argument: --bundle"),
        (("create", "--preserve-fds", "x", "y"), 1, "invalid value"),
        (("list", "--format", "nope"), 1, "invalid format option"),
        (("update", "--cpu-period", "x", "missing"), 1, ""),
    ]:
        said = c.call(*words, ok=[code]).stderr.replace('\\"', '"')
        check(text in said, f"{words}: {said}")
        check("failed:" not in said, f"{words}: {said}")
    features = json.loads(c.call("features").stdout)
    check({"rro", "rbind", "rslave", "nosymfollow"} <= set(features["mountOptions"]), f"mount options: {features['mountOptions']}")


def test_regex(host):
    """kill --regex and delete --regex reach every container whose name matches, and no other."""
    all = [busybox(host, "sleep", "1000", label=label) for label in ("web-1", "web-2", "db")]
    for c in all:
        c.run()
    pattern = f"^{host.id}-web-[0-9]$"
    all[0].call("kill", "--regex", pattern, "KILL")
    until(lambda: [c.state() for c in all] == ["stopped", "stopped", "running"], "the end of two")
    all[0].call("delete", "--regex", pattern)
    equal([c.state() for c in all], ["", "", "running"], "after delete")
    check("invalid regular expression" in all[0].call("kill", "--regex", "(", ok=[1]).stderr, "a bad expression")
    all[0].call("delete", "--force", "--regex", ".")
    equal(all[2].state(), "", "after delete --force")


def test_unknown_capability(host):
    """A capability that nobody knows is left out, not an error."""

    def change(spec):
        for names in spec["process"]["capabilities"].values():
            names.append("CAP_OF_TOMORROW")

    c = busybox(host, "echo", "fine", change=change)
    equal(c.call("run", "--bundle", c.bundle, c.id, stdin="").stdout, "fine\n", "output")


def test_exec_affinity(host):
    """execCPUAffinity holds for exec alone; without it a process may run on every processor of the container."""

    def change(spec):
        spec["process"]["execCPUAffinity"] = {"initial": "0", "final": "0"}

    allowed = ("sh", "-c", "grep Cpus_allowed_list: /proc/self/status")
    plain, pinned = busybox(host, "sleep", "1000"), busybox(host, "sleep", "1000", label="p", change=change)
    for c in plain, pinned:
        subprocess.run(["taskset", "-c", "0", *c.command("run", "--detach", "--bundle", c.bundle, c.id)], check=True, timeout=60,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    equal(pinned.exec(*allowed).stdout.split()[1], "0", "with execCPUAffinity")
    everywhere = plain.exec(*allowed).stdout.split()[1]
    for c in plain, pinned:
        text = open(f"/proc/{json.loads(c.call('state', c.id).stdout)['pid']}/status").read()
        equal(re.search(r"Cpus_allowed_list:\s*(\S+)", text)[1], everywhere, "init, which is not concerned")
    if len(os.sched_getaffinity(0)) > 1:
        check(everywhere != "0", "the command's own affinity was inherited")


def test_notify(host):
    """NOTIFY_SOCKET: the command that lets the program run stays until it is ready, and tells systemd whom to watch."""
    path = f"/tmp/stasis-notify-{os.getpid()}.sock"
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(path)
    manager.settimeout(60)
    host.undo.append(lambda: os.unlink(path))
    env = {"NOTIFY_SOCKET": path}
    said = []

    def listen():
        """What is said until the barrier, which is lifted by closing what comes with it."""
        said.clear()
        while "BARRIER=1" not in said:
            text, fds, _, _ = socket.recv_fds(manager, 4096, 1)
            said.append(text.decode().strip())
            for fd in fds:
                os.close(fd)

    def call(c, *words):
        """A command whose output the container may keep."""
        nowhere = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
        equal(subprocess.run(c.command(*words), env={**os.environ, **env}, timeout=60, **nowhere).returncode, 0, f"status of {words[0]}")

    def told(c, *words):
        listener = threading.Thread(target=listen)
        listener.start()
        call(c, *words)
        listener.join(60)
        equal(said, ["READY=1", f"MAINPID={c.pid()}", "BARRIER=1"], f"what {words[0]} has passed on")

    def container(label, *args):
        c = busybox(host, "/notify", *args, label=label)
        program("notify", f"{c.spec['root']['path']}/notify")
        return c

    c = container("run", "STATUS=x", "READY=1\nSTATUS=y")
    told(c, "run", "--detach", "--bundle", c.bundle, c.id)
    check("NOTIFY_SOCKET=/run/notify/notify.sock" in c.exec("env").stdout, "exec has it as well")
    equal(c.exec("stat", "-c", "%a", "/run/notify/notify.sock").stdout, "777\n", "any user may write there")
    other = container("start", "READY=1")
    call(other, "create", "--bundle", other.bundle, other.id)
    told(other, "start", other.id)
    # One that ends without a word keeps nobody waiting, nor does one that was not made for it.
    mute = busybox(host, "true", label="mute")
    call(mute, "run", "--detach", "--bundle", mute.bundle, mute.id)
    plain = busybox(host, "sleep", "1000", label="plain")
    env.clear()
    call(plain, "create", "--bundle", plain.bundle, plain.id)
    env["NOTIFY_SOCKET"] = path
    call(plain, "start", plain.id)
    # In the foreground it is the command that is to be watched.
    front = container("front", "READY=1")
    listener = threading.Thread(target=listen)
    listener.start()
    process = subprocess.Popen(front.command("run", "--bundle", front.bundle, front.id), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env})
    listener.join(60)
    equal(said, ["READY=1", f"MAINPID={process.pid}", "BARRIER=1"], "what run in the foreground has passed on")
    front.call("kill", front.id, "KILL")
    equal(process.wait(60), 137, "its end")
