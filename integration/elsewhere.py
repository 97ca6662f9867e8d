"""Restores in another place than that of the checkpoint: what may be another there, each alone, then all at once."""

import json
import os
import re
import shutil

from harness import Container, Failed, Skip, Terminal, check, config, equal, real_checkpoints, sh, until

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


# What mount(8) of Debian 12 cannot do: a mount from here is put into the mount namespace of a process.
PUT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
pid, source, destination = sys.argv[1:]
OPEN_TREE, MOVE_MOUNT, AT_FDCWD, CLONE, EMPTY_PATH = 428, 429, -100, 1, 4
tree = done(libc.syscall(OPEN_TREE, AT_FDCWD, source.encode(), CLONE))
done(libc.setns(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY), 0x20000))
done(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, destination.encode(), EMPTY_PATH))
"""


def test_mounts_that_the_host_adds(host):
    """What comes into a volume by propagation comes again; what is put anywhere else is refused by its place."""
    real_checkpoints()
    volume = host.dir / "volume"
    (volume / "later").mkdir(parents=True)
    sh("mount", "--bind", volume, volume)
    host.undo.append(lambda: sh("umount", "-R", "-l", volume))
    sh("mount", "--make-shared", volume)
    root = host.overlay("busybox", "root")
    (root / "mnt").mkdir(exist_ok=True)
    bind = {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind", "rslave"]}
    c = Container(host, "volume", config(["sleep", "100000"], root=root, mounts=[bind]))
    c.run()
    sh("mount", "-t", "tmpfs", "later", volume / "later")
    (volume / "later/file").write_text("kept")
    equal(c.exec("cat", "/volume/later/file").stdout, "kept", "what has come in")
    for image in "first", "second":
        c.checkpoint(image)
        c.restore(image)
        equal(c.exec("cat", "/volume/later/file").stdout, "kept", f"what had come in, after the {image} restore")
    # What is the volume's may be seen at any place, if config.json says so at the restore.
    sh("python3", "-c", PUT, c.pid(), volume / "later", "/mnt")
    c.checkpoint("third")
    try:
        c.restore("third")
    except Failed as e:
        check("a mount that config.json does not make (/mnt)" in str(e), str(e))
    else:
        raise Failed("a mount came back that config.json does not have")
    plain = (c.bundle / "config.json").read_text()
    c.spec["mounts"].append({"destination": "/mnt", "type": "bind", "source": str(volume / "later"), "options": ["bind"]})
    (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.restore("third")
    equal(c.exec("cat", "/mnt/file").stdout, "kept", "what was put there")
    c.checkpoint("with")
    c.delete()
    (c.bundle / "config.json").write_text(plain)
    c.run()
    (host.dir / "other").mkdir()
    (host.dir / "other/file").write_text("other")
    sh("python3", "-c", PUT, c.pid(), host.dir / "other", "/mnt")
    for words in ("check", c.id), ("checkpoint", "--image-path", host.dir / "refused", c.id):
        done = c.call(*words, ok=[1])
        check("/mnt" in done.stdout + done.stderr, f"{words[0]}: {done.stdout}{done.stderr}")
    equal(c.state(), "running", "the container")
    equal(c.exec("cat", "/mnt/file").stdout, "other", "what is mounted")
    sh("nsenter", f"--mount=/proc/{c.pid()}/ns/mnt", "umount", "/mnt")
    c.checkpoint("fourth")


def test_mount_with_ids_of_its_own(host):
    """An idmapped volume: who owns its files inside is what config.json says, before and after."""
    real_checkpoints()
    volume = host.dir / "volume"
    volume.mkdir()
    (volume / "file").write_text("mine")
    os.chown(volume / "file", 7, 8)
    maps = [{"containerID": 0, "hostID": 1000, "size": 100}]
    bind = {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["bind", "idmap"], "uidMappings": maps, "gidMappings": maps}
    c = Container(host, "mapped", config(["sh", "-c", "exec 3</volume/file; exec sleep 100000"], root=host.overlay("busybox", "root"), mounts=[bind]))
    if c.run(ok=None):
        check("idmap" in c.text(), c.text())
        raise Skip("idmapped mounts are not for this kernel or file system")
    until(lambda: os.path.exists(f"/proc/{c.pid()}/fd/3"), "the open file")
    look = lambda: c.exec("stat", "-c", "%u:%g", "/volume/file", "/proc/1/fd/3", "-L").stdout.split()  # noqa: E731
    equal(look(), ["1007:1008"] * 2, "the owner inside")
    for image in "first", "second":
        c.checkpoint(image)
        c.restore(image)
        equal(look(), ["1007:1008"] * 2, f"the owner inside after the {image} restore")


def test_a_terminal_that_belongs_to_a_client(host):
    """exec --tty: its other end is the client's, which no restore has. Refused by name, whatever becomes of other sessions of
    exec; left out, its client sees the end."""
    real_checkpoints()
    c = Container(host, "plain", config(["sleep", "100000"], root=host.overlay("busybox", "root")))
    c.run()
    there = Terminal(host, *c.command("exec", "--tty", c.id, "sh"))
    there.type("echo $((40 + 2))\n")
    there.expect("42")
    for words in ("check", "--keep-exec", c.id), ("checkpoint", "--keep-exec", "--image-path", host.dir / "refused", c.id):
        done = c.call(*words, ok=[1])
        check("a terminal belongs to somebody outside" in done.stdout + done.stderr, f"{words[0]}: {done.stdout}{done.stderr}")
    there.type("echo $((50 + 2))\n")
    there.expect("52")
    c.checkpoint("without", "--drop-exec")
    until(lambda: there.process.poll() is not None, "the client's end")
    c.restore("without")
    equal(c.exec("pidof", "sh", ok=None).stdout, "", "the session of exec")
