"""What happens at the same time, or at the wrong moment: many containers at once, programs that are gone before anybody
looks, a command that is killed in its middle, a full disk. Whatever comes first, the answer is true and nothing is left.

```text
   Race ── one bundle, many ids ──> ROOT/ID            a directory each
                                ──> /NAME/ID           a control group each, in every hierarchy
                                ──> environment: NAME  by which every process of it is found
```
"""

import json
import os
import pathlib
import random
import subprocess
import time

from cli import busybox
from harness import (PATIENCE, RUNTIME, Container, Failed, Skip, check, config, equal, program, real_checkpoints,
                     remove_cgroup, sh, until)


class Race:
    """Containers of one bundle, and where they might leave something."""

    def __init__(self, host, *args, root=None):
        self.host, self.name = host, host.id
        self.mark = f"STASIS_RACE={self.name}"
        self.root = root or host.dir / "root"
        host.undo.append(lambda: remove_cgroup(self.name))
        self.bundle = busybox(host, *args).bundle
        self.spec = json.loads((self.bundle / "config.json").read_text())
        self.rootfs = pathlib.Path(self.spec["root"]["path"])
        self.spec["process"]["env"].append(self.mark)
        self.ids = []

    def new(self, label):
        """An id, and the config.json to make it of."""
        id = f"{self.name}-{label}"
        self.ids.append(id)
        self.host.undo.append(lambda: self.call("delete", "--force", id, ok=None))
        bundle = self.host.dir / f"{label}.of"
        bundle.mkdir()
        spec = json.loads(json.dumps(self.spec))
        spec["linux"]["cgroupsPath"] = f"/{self.name}/{id}"
        (bundle / "config.json").write_text(json.dumps(spec))
        return id, bundle

    def launch(self, *words, log):
        """A command whose output the container may keep."""
        with open(self.host.dir / log, "wb") as out:
            name, value = self.mark.split("=")
            return subprocess.Popen(self.command(*words), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                    env={**os.environ, name: value})

    def command(self, *words):
        return [RUNTIME, "--root", str(self.root), *map(str, words)]

    def call(self, *words, **how):
        return sh(*self.command(*words), **how)

    def done(self, process, log, ok=(0,)):
        try:
            status = process.wait(120 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Failed(f"$ {' '.join(process.args)}\nhung") from None
        text = (self.host.dir / log).read_text(errors="replace")
        check(status in ok, f"$ {' '.join(process.args)}\nstatus {status}\n{text}")
        return status, text

    def killed(self, whole, *words, log):
        """A command that is killed at some moment of the time that it takes."""
        process = self.launch(*words, log=log)
        time.sleep(random.uniform(0, whole * 1.1))
        process.kill()
        process.wait()

    def timed(self, *words, log):
        """How long a command takes that nobody kills."""
        began = time.monotonic()
        self.done(self.launch(*words, log=log), log)
        return time.monotonic() - began

    def run(self, label):
        id, bundle = self.new(label)
        self.done(self.launch("run", "--detach", "--bundle", bundle, id, log=f"{id}.log"), f"{id}.log")
        return id, bundle

    def truth(self, id, *allowed):
        """Waits for a state that is one of these, and true."""
        def true():
            status, pid = self.status(id)
            if status in ("", "stopped"):
                return pid == 0 and status in allowed and (status,)
            check(status in allowed, f"state: {status}, not one of {allowed}")
            return os.path.exists(f"/proc/{pid}") and (status,)

        return until(true, f"a state that is true, of {allowed}; it is {self.status(id)}")[0]

    def cleared(self, id):
        """`delete --force` leaves nothing, whatever came before."""
        self.call("delete", "--force", id)
        equal(self.status(id), ("", 0), "after delete")
        self.nothing_left()

    def status(self, id):
        """The state, or nothing where there is no container."""
        done = self.call("state", id, ok=(0, 1))
        if done.returncode:
            check("container does not exist" in done.stderr, f"state: {done.stderr}")
            return "", 0
        state = json.loads(done.stdout)
        return state["status"], state["pid"]

    def left(self):
        """What there is of all ids."""
        found = [str(self.root / id) for id in self.ids if (self.root / id).exists()]
        tops = [pathlib.Path("/sys/fs/cgroup"), *pathlib.Path("/sys/fs/cgroup").iterdir()]
        found += [str(path) for top in tops for id in self.ids if (path := top / self.name / id).is_dir()]
        found += [line for line in open("/proc/self/mountinfo") if any(id in line for id in self.ids)]
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(f"{process}: {(process / 'cmdline').read_bytes()!r}")
            except OSError:
                pass  # it has ended
        return found

    def nothing_left(self):
        """Processes that were killed may take their time to go; nothing else may."""
        until(lambda: not any(x.startswith("/proc") for x in self.left()), "the last process to go")
        equal(self.left(), [], "left behind")


def test_many_at_once(host):
    """50 containers are started in parallel, and deleted in parallel."""
    race = Race(host, "sleep", "1000")
    all = [race.new(str(n)) for n in range(50)]
    started = [race.launch("run", "--detach", "--bundle", bundle, id, log=f"{id}.log") for id, bundle in all]
    for (id, _), process in zip(all, started):
        race.done(process, f"{id}.log")
    listed = {x["id"]: x["status"] for x in json.loads(race.call("list", "--format", "json").stdout)}
    equal(listed, {id: "running" for id, _ in all}, "list")
    found = race.left()
    for what in (str(race.root), "/sys/fs/cgroup/", "/proc/"):
        check(len([x for x in found if x.startswith(what)]) >= 50, f"what is there now must be seen, or nothing would be later: {found}")
    gone = [race.launch("delete", "--force", id, log=f"{id}.gone") for id, _ in all]
    for (id, _), process in zip(all, gone):
        race.done(process, f"{id}.gone")
    race.nothing_left()


def test_gone_at_once(host):
    """A program that ends at once: state, kill, exec and delete see it running or stopped, and nothing else."""
    race = Race(host, "true")
    for n in range(10):
        id, bundle = race.new(str(n))
        race.done(race.launch("create", "--bundle", bundle, id, log=f"{id}.log"), f"{id}.log")
        equal(race.status(id)[0], "created", "after create")
        race.call("start", id)
        check(race.status(id)[0] in ("running", "stopped"), f"after start: {race.status(id)}")
        killed = race.call("kill", id, "KILL", ok=(0, 1))
        check(killed.returncode == 0 or "container not running" in killed.stderr, f"kill: {killed.stderr}")
        until(lambda id=id: race.status(id) == ("stopped", 0), "the end")
        killed = race.call("kill", id, "KILL", ok=[1])
        check("container not running" in killed.stderr, f"kill of one that has ended: {killed.stderr}")
        late = race.call("exec", id, "true", ok=range(1, 256))
        check("cannot exec in a stopped container" in late.stderr, f"exec in one that has ended: {late.stderr}")
        again = race.call("start", id, ok=[1])
        check("cannot start a container that has stopped" in again.stderr, f"start of one that has ended: {again.stderr}")
        race.call("delete", id)
        equal(race.status(id), ("", 0), "after delete")
    race.nothing_left()


def test_exec_while_it_ends(host):
    """The container is killed in the middle of an exec, which works or says why it did not."""
    race = Race(host, "sleep", "1000")
    for n in range(20):
        id, bundle = race.new(str(n))
        race.done(race.launch("run", "--detach", "--bundle", bundle, id, log=f"{id}.log"), f"{id}.log")
        exec = race.launch("exec", id, "true", log=f"{id}.exec")
        time.sleep(random.uniform(0, 0.03))
        race.call("kill", id, "KILL")
        status, text = race.done(exec, f"{id}.exec", ok=range(256))
        # 137: the program itself was killed, with the rest of the container.
        check(status in (0, 137) or text.strip(), f"exec failed with {status} and without a word")
        check("panicked" not in text, text)
        until(lambda id=id: race.status(id)[0] == "stopped", "the end")
        race.call("delete", id)
    race.nothing_left()


def better_than_runc():
    if os.path.basename(RUNTIME) == "runc":
        raise Skip("runc does worse")


def test_create_killed(host):
    """`create` and `run` are killed at random moments: `state` tells the truth, and `delete --force` leaves nothing."""
    better_than_runc()
    race = Race(host, "sleep", "1000")
    for words, alive in (("create",), "created"), (("run", "--detach"), "running"):
        id, bundle = race.new(f"{alive}-whole")
        whole = race.timed(*words, "--bundle", bundle, id, log="whole.log")
        race.call("delete", "--force", id)
        for n in range(12):
            id, bundle = race.new(f"{alive}-{n}")
            race.killed(whole, *words, "--bundle", bundle, id, log=f"{id}.log")
            race.truth(id, "", "stopped", alive)
            race.cleared(id)


def test_start_killed(host):
    """`start` is killed at random moments: the container is created, and can be started, or it runs."""
    better_than_runc()
    race = Race(host, "sleep", "1000")
    race.spec["process"]["user"] = {"uid": 7, "gid": 8}
    id, bundle = race.new("whole")
    race.done(race.launch("create", "--bundle", bundle, id, log="whole.log"), "whole.log")
    whole = race.timed("start", id, log="whole.log")
    race.call("delete", "--force", id)
    for n in range(12):
        id, bundle = race.new(str(n))
        race.done(race.launch("create", "--bundle", bundle, id, log=f"{id}.log"), f"{id}.log")
        race.killed(whole, "start", id, log=f"{id}.start")
        if race.truth(id, "created", "running") == "created":
            again = race.call("start", id, ok=(0, 1))
            # The program had been let go, but that was not yet to be seen.
            check(again.returncode == 0 or "already running" in again.stderr, again.stderr)
        race.truth(id, "running")
        equal(race.call("exec", id, "echo", "there").stdout, "there\n", "exec")
        race.cleared(id)


def test_exec_killed(host):
    """`exec` is killed at random moments: the container runs on, takes the next one, and goes when it is told to."""
    better_than_runc()
    race = Race(host, "sleep", "1000")
    id, _ = race.run("c")
    whole = race.timed("exec", id, "true", log="whole.log")
    for n in range(20):
        race.killed(whole, "exec", *(["--detach"] if n % 2 else []), id, "sleep", "1000", log=f"{n}.exec")
        equal(race.status(id)[0], "running", "state")
    equal(race.call("exec", id, "echo", "there").stdout, "there\n", "exec")
    # The processes of a pid namespace that were executed into it have parents outside, who take note of their end late.
    race.call("kill", id, "KILL")
    until(lambda: race.status(id) == ("stopped", 0), "the end")
    race.call("delete", id)
    race.nothing_left()


def test_delete_killed(host):
    """`delete` and `delete --force` are killed at random moments: the next one does the rest."""
    better_than_runc()
    race = Race(host, "sleep", "1000")
    id, _ = race.run("whole")
    whole = race.timed("delete", "--force", id, log="whole.log")
    for n in range(12):
        id, _ = race.run(str(n))
        race.killed(whole, "delete", "--force", id, log=f"{id}.delete")
        if race.truth(id, "", "stopped", "running") == "stopped":
            # What is left of it is no hindrance for somebody who does not use force.
            race.call("delete", id)
        race.cleared(id)


def test_pause_killed(host):
    """`pause` and `resume` are killed at random moments: what `state` says holds, and the other one turns it round."""
    better_than_runc()
    race = Race(host, "sh", "-c", "while :; do echo >>/ticks; sleep 0.01; done")
    id, _ = race.run("c")
    ticks = race.rootfs / "ticks"
    size = lambda: ticks.stat().st_size if ticks.exists() else 0  # noqa: E731
    whole = race.timed("pause", id, log="whole.log")
    race.call("resume", id)
    for n in range(12):
        race.killed(whole, "pause", id, log=f"{n}.pause")
        if race.truth(id, "paused", "running") == "paused":
            at = size()
            time.sleep(0.05)
            equal(size(), at, "ticks of a paused container")
            race.killed(whole, "resume", id, log=f"{n}.resume")
            if race.truth(id, "paused", "running") == "paused":
                race.call("resume", id)
        at = size()
        until(lambda at=at: size() > at, "ticks of a running container")
    race.killed(whole, "pause", id, log="last.pause")
    race.cleared(id)


def test_checkpoint_killed(host):
    """`checkpoint` is killed at random moments: the container runs on, or there is an image that brings it back."""
    better_than_runc()
    real_checkpoints()
    race = Race(host, "sh", "-c", "while :; do echo >>/ticks; sleep 0.01; done")
    ticks = race.rootfs / "ticks"
    size = lambda: ticks.stat().st_size if ticks.exists() else 0  # noqa: E731

    def goes_on(what):
        at = size()
        until(lambda: size() > at + 2, what)

    id, _ = race.run("whole")
    whole = race.timed("checkpoint", "--image-path", host.dir / "whole", id, log="whole.log")
    for n in range(16):
        id, bundle = race.run(str(n))
        leave = ["--leave-running"] if n % 2 else []
        image = host.dir / f"{n}.image"
        race.killed(whole, "checkpoint", *leave, "--image-path", image, id, log=f"{id}.checkpoint")
        # A look is enough to undo what the killed command has left.
        if race.truth(id, "running", *([] if leave else ["", "stopped"])) == "running":
            goes_on("a container whose checkpoint was killed")
            equal(race.call("exec", id, "echo", "there").stdout, "there\n", "exec")
        else:
            race.call("delete", "--force", id)
            race.done(race.launch("restore", "--detach", "--bundle", bundle, "--image-path", image, id, log=f"{id}.restore"), f"{id}.restore")
            goes_on("a container from the image of a killed checkpoint")
        race.cleared(id)


def test_restore_killed(host):
    """`restore` is killed at random moments: `delete --force` leaves nothing, and the image can be restored again."""
    better_than_runc()
    real_checkpoints()
    race = Race(host, "sh", "-c", "while :; do echo >>/ticks; sleep 0.01; done")
    ticks = race.rootfs / "ticks"
    size = lambda: ticks.stat().st_size if ticks.exists() else 0  # noqa: E731
    id, bundle = race.run("c")
    until(lambda: size() > 5, "the program")
    race.call("checkpoint", "--image-path", host.dir / "image", id)
    words = ("restore", "--detach", "--bundle", bundle, "--image-path", host.dir / "image", id)
    whole = race.timed(*words, log="whole.log")
    race.cleared(id)
    for n in range(16):
        race.killed(whole, *words, log=f"{n}.restore")
        if race.truth(id, "", "stopped", "running") == "running":
            at = size()
            until(lambda at=at: size() > at, "the restored program")
        race.cleared(id)
    race.timed(*words, log="last.log")
    at = size()
    until(lambda: size() > at, "the restored program at last")


def test_full_disk(host):
    """No room for the container's files, each of them in turn: an error that says so, and nothing is left."""
    better_than_runc()
    tiny = host.dir / "tiny"
    tiny.mkdir()
    race = Race(host, "sleep", "1000", root=tiny / "root")
    failures = []
    for pages in range(1, 20):
        sh("mount", "-t", "tmpfs", "-o", f"size={pages * os.sysconf('SC_PAGE_SIZE')}", "tiny", tiny)
        try:
            id, bundle = race.new(str(pages))
            log = f"{id}.log"
            status, text = race.done(race.launch("create", "--bundle", bundle, id, log=log), log, ok=(0, 1))
            if status:
                check("no space left on device" in text.lower(), text)
                failures.append(text)
            else:
                race.call("delete", "--force", id)
            race.nothing_left()
        finally:
            sh("umount", "-l", tiny)
        if status == 0:
            break
    else:
        raise Failed(f"never enough room\n{failures[-1]}")
    check(any("state.json" in text for text in failures), f"no failure was about state.json:\n{''.join(failures)}")


def test_kinds(host):
    """Processes that make, use and drop resources of all kinds all the time are never refused, and always go on rightly."""
    real_checkpoints()
    root = host.overlay("busybox", "kinds")
    program("kinds", root / "kinds")
    spec = config(["/kinds", 8], root=root, mounts=[
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}])
    c = Container(host, "kinds", spec)
    keep = ["--file-locks", "--tcp-established", "--ext-unix-sk"]

    def rounds():
        text = (root / "status").read_text()
        check(not text.startswith("BAD"), text)
        return int(text)

    c.run()
    until((root / "status").exists, "the program begins")
    for n in range(18):
        before = until(rounds, "the program has done something")
        c.call("check", *keep, "--tcp-skip-in-flight", c.id)
        more = ["--leave-running"] if n % 3 else []
        c.checkpoint(f"image{n}", *keep, "--tcp-skip-in-flight", *more)
        if not more:
            c.restore(f"image{n}", *keep)
        until(lambda before=before: rounds() > before, "the program goes on")
