"""Restores in another place than that of the checkpoint: what may be another there, each alone, then all at once."""

import json
import os
import re
import shutil

from harness import Container, Failed, check, config, equal, real_checkpoints, until

# Descriptor 3 is a file in the root file system, 4 one of a mount from outside, 1 the console.
COUNT = "exec 3>>/var/count 4</outside/which; i=0; while :; do i=$((i+1)); echo $i >&3; echo $i; sleep 0.02; done"


class Places:
    """Makes what a container can be given: another one each time."""

    def __init__(self, host):
        self.host, self.count = host, 0

    def new(self, what, old=None):
        self.count += 1
        name = f"{what}{self.count}"
        return getattr(self, what)(name, old)

    def bundle(self, name, _):
        (self.host.dir / name).mkdir()
        return self.host.dir / name

    def id(self, name, _):
        return f"{self.host.id}-{name}"

    def root(self, name, old):
        root = self.host.overlay("busybox", name)
        (root / "var").mkdir(exist_ok=True)
        (root / "outside").mkdir()
        if old:
            shutil.copy2(old / "var/count", root / "var/count")
        return root

    def outside(self, name, _):
        (self.host.dir / name).mkdir()
        # All of one length: the container has it open.
        (self.host.dir / name / "which").write_text(name.ljust(20))
        return self.host.dir / name

    def group(self, name, _):
        return f"/{self.host.id}-{name}"

    def network(self, name, _):
        holder = self.host.daemon("unshare", "--net", "sleep", "100000", log=self.host.dir / name)
        path, own = f"/proc/{holder.pid}/ns/net", os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(path) != own, "the network namespace")
        return path


KINDS = "bundle", "id", "root", "outside", "group", "network"


def container(host, place, number):
    """As it is to be there; `run` or `restore` is up to the caller."""
    bind = {"destination": "/outside", "type": "bind", "source": str(place["outside"]), "options": ["rbind", "ro"]}
    spec = config(["sh", "-c", COUNT], root=place["root"], tty=True, mounts=[bind])
    spaces = [space for space in spec["linux"]["namespaces"] if space["type"] != "network"]
    spec["linux"]["namespaces"] = [*spaces, {"type": "network", "path": place["network"]}]
    spec["linux"]["cgroupsPath"] = place["group"]
    c = Container(host, f"laid-out{number}", spec)
    c.bundle, c.id = place["bundle"], place["id"]
    (c.bundle / "config.json").write_text(json.dumps(spec))
    return c


def counted(c):
    # The last line may be half of one.
    return [int(n) for n in re.findall(r"(\d+)\r\n", c.text())]


def look(c, place):
    """It goes on, and has what the place has."""
    seen = len(counted(c))
    until(lambda: len(counted(c)) > seen + 3, f"counting: {c.text()[-200:]}")
    state = json.loads(c.call("state", c.id).stdout)
    proc = f"/proc/{state['pid']}"
    equal(state["bundle"], str(place["bundle"]), "the bundle")
    check(os.path.samefile(f"{proc}/root", place["root"]), "the root file system is another")
    equal(os.readlink(f"{proc}/ns/net"), os.readlink(place["network"]), "the network namespace")
    groups = [line.split(":", 2)[2] for line in open(f"{proc}/cgroup").read().splitlines()]
    check(place["group"] in groups, f"not in {place['group']}: {groups}")
    equal(c.exec("cat", "/outside/which").stdout.strip(), place["outside"].name, "what is mounted from outside")
    equal(c.exec("readlink", "/proc/1/fd/4").stdout, "/outside/which\n", "the open file of that mount")
    equal(os.stat(f"{proc}/fd/4").st_ino, os.stat(place["outside"] / "which").st_ino, "what it is open on")


def test_each_alone_and_all_together(host):
    real_checkpoints()
    places = Places(host)
    place = {kind: places.new(kind) for kind in KINDS}
    c = container(host, place, 0)
    c.run()
    look(c, place)
    # The console is another one each time.
    for number, kinds in enumerate([(), *((kind,) for kind in KINDS), KINDS, ()], 1):
        c.checkpoint(f"image{number}")
        last, old = counted(c)[-1], c
        place = {kind: places.new(kind, place[kind]) if kind in kinds else place[kind] for kind in KINDS}
        c = container(host, place, number)
        c.restore(f"image{number}")
        until(lambda c=c: counted(c), "the first number")
        check(counted(c)[0] > last, f"{counted(c)[0]} comes after {last} with another {kinds}")
        look(c, place)
        old.delete = lambda: None  # its name may be this one's
    c.call("kill", c.id, "KILL")
    until(lambda: c.state() == "stopped", "the end")
    lines = (place["root"] / "var/count").read_text().split("\n")
    equal(lines[:-1], [str(n) for n in range(1, len(lines))], "all numbers, each once")


def test_another_source_by_the_command_line(host):
    """--external mnt[DST]=SRC: config.json stays as it is."""
    real_checkpoints()
    places = Places(host)
    place = {kind: places.new(kind) for kind in KINDS}
    c = container(host, place, 0)
    c.run()
    look(c, place)
    c.checkpoint("image")
    place["outside"] = places.new("outside")
    try:
        c.restore("image", "--external", f"mnt[/other]={place['outside']}")
    except Failed:
        said = c.log.read_text()
        check("no bind mount there" in said and "/other" in said, said)
    else:
        raise Failed("a mount that config.json does not have got a source")
    c.restore("image", "--external", f"mnt[/outside]={place['outside']}")
    look(c, place)
    # It is written down: whoever looks at the container's mounts later finds the new source.
    c.checkpoint("again", "--leave-running")
    look(c, place)
