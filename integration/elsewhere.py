"""Restores in another place than that of the checkpoint: what may be another there, each alone, then all at once."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import tty

from harness import Consoles, Container, Failed, Skip, Terminal, check, config, equal, real_checkpoints, sh, until

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


def test_a_file_that_was_written_since(host):
    """It is named, with both sizes and times, unless whoever restores the container wants it as it is."""
    real_checkpoints()
    root = host.overlay("busybox", "root")
    file = root / "file"
    file.write_text("four")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    c = Container(host, "written", config(["sh", "-c", "exec 3</file; exec sleep 100000"], root=root))
    c.run()
    until(lambda: os.path.exists(f"/proc/{c.pid()}/fd/3"), "the open file")
    c.checkpoint("image")
    with file.open("a") as more:
        more.write(" and more")
    os.utime(file, (1_100_000_000, 1_100_000_000))
    told = "it has 13 bytes and was written 2004-11-09T11:33:20Z, had 4 and was written 2001-09-09T01:46:40Z"
    try:
        c.restore("image")
    except Failed as e:
        check(told in str(e) and "/file" in str(e) and "--file-validation none" in str(e), str(e))
    else:
        raise Failed("a file of another size was taken for that of the checkpoint")
    c.restore("image", "--file-validation", "none")
    equal(c.exec("cat", "/proc/1/fd/3").stdout, "four and more", "the file")


def test_terminals_of_exec(host):
    """exec --tty: its other end is the client's. Left out, its client sees the end; kept, it is somebody else's after a restore
    with --exec-console-socket, with all that belongs to it; without, it is hung up, as when its client had died."""
    real_checkpoints()
    c = Container(host, "plain", config(["sleep", "100000"], root=host.overlay("busybox", "root")))
    root = pathlib.Path(c.spec["root"]["path"])
    c.run()
    shell = Terminal(host, *c.command("exec", "--tty", c.id, "sh"), size=(31, 97))
    shell.type("echo $((40 + 2))\n")
    shell.expect("42")
    # It has the terminal for its own, and reads from it; it outlives the end of it.
    faithful = "trap 'echo hung up >>/faithful' HUP; while [ ! -e /stop ]; do read line && echo got $line || sleep 0.05; done"
    other = Terminal(host, *c.command("exec", "--tty", c.id, "sh", "-c", f"stty -echo; echo re''ady; {faithful}"))
    other.expect("ready")
    for words in ("check", c.id), ("checkpoint", "--image-path", host.dir / "refused", c.id):
        done = c.call(*words, ok=[1])
        check("started by exec" in done.stdout + done.stderr, f"{words[0]}: {done.stdout}{done.stderr}")
    done = json.loads(c.call("check", "--keep-exec", "--format", "json", c.id).stdout)
    check(done["possible"] and any("2 processes of exec lose their clients" in f["message"] for f in done["findings"]), done)
    # What runs in the foreground: ^C is for it alone.
    shell.type("sh -c 'echo s$((3 + 4))p; exec sleep 2000'\n")
    shell.expect("s7p")
    c.checkpoint("left", "--keep-exec", "--leave-running")
    other.type("one\n")
    other.expect("got one")
    c.checkpoint("first", "--keep-exec")
    shell.ends(None)
    other.ends(None)

    def again(image, consoles):
        c.restore(image, "--exec-console-socket", consoles.path)
        screens = dict(consoles.next() for _ in range(2))
        equal(sorted(screens), ["/dev/pts/0", "/dev/pts/1"], "the terminals")
        return screens["/dev/pts/0"], screens["/dev/pts/1"]

    consoles = Consoles(host, "exec")
    shell, other = again("first", consoles)
    shell.type("\x03")
    shell.expect("# ")  # what is typed earlier may be thrown away
    shell.type("echo c$?d\n")
    shell.expect("c130d")
    shell.type("stty size; tty; echo t''y\n")
    shell.expect(r"31 97\r*\n/dev/pts/0\r*\nty")
    other.type("two\n")
    other.expect("got two")
    check("two" not in other.text().replace("got two", ""), f"an echo: {other.text()}")
    check(not (root / "faithful").exists(), "a terminal was hung up that somebody has")
    # What is typed and not read yet.
    shell.type("exec sleep 3000 <&-; ")
    shell.expect("3000 <&-; ")
    c.checkpoint("second", "--keep-exec")
    until(lambda: shell.over and other.over, "the end of the terminals")
    shell, other = again("second", consoles)
    shell.type("\x15echo w$((7 + 7))x\n")
    shell.expect("w14x")
    other.type("three\n")
    other.expect("got three")
    programs = lambda: c.call("ps", c.id, "-eo", "pid,args").stdout  # noqa: E731
    check("-c stty" in programs() and re.search(r" sh$", programs(), re.M), programs())
    c.checkpoint("third", "--keep-exec")
    c.restore("third")
    until(lambda: (root / "faithful").exists(), "the end of the terminal to be seen")
    until(lambda: not re.search(r" sh$", programs(), re.M), "the shell's end")
    check("is hung up" in (host.dir / "third.work/restore.log").read_text(), "the log does not say so")
    # What is left is a terminal that is hung up.
    c.checkpoint("fourth", "--keep-exec")
    c.restore("fourth")
    check("-c stty" in programs(), programs())
    equal((root / "faithful").read_text(), "hung up\n", "how often it was told")
    (root / "stop").touch()
    until(lambda: "-c stty" not in programs(), "its end")

    # Nobody there to take them: nothing is left of the restore.
    shell = Terminal(host, *c.command("exec", "--tty", c.id, "sh"))
    shell.type("echo $((50 + 2))\n")
    shell.expect("52")
    c.checkpoint("without", "--drop-exec", "--leave-running")
    c.checkpoint("fifth", "--keep-exec")
    shell.ends(None)
    c.restore("fifth", "--exec-console-socket", host.dir / "nobody", ok=[1])
    check("nobody" in c.text() and "No such file" in c.text(), c.text())
    equal(c.state(), "", "after a restore that was refused")
    c.restore("without")
    equal(c.exec("pidof", "sh", ok=None).stdout, "", "the session of exec that was left out")
    c.delete()

    # Beside the container's own.
    c = Container(host, "console", config(["sh"], root=host.overlay("busybox", "with"), tty=True))
    c.run()
    shell = Terminal(host, *c.command("exec", "--tty", c.id, "sh"))
    shell.type("echo $((60 + 2))\n")
    shell.expect("62")
    c.checkpoint("both", "--keep-exec")
    shell.ends(None)
    c.restore("both", "--exec-console-socket", consoles.path)
    name, shell = consoles.next()
    equal(name, "/dev/pts/1", "the terminal of exec")
    shell.type("echo $((70 + 2)) >/dev/pts/0; tty\n")
    until(lambda: "72" in c.text(), "what was written to the console")
    shell.expect(r"/dev/pts/1\r*\n")
    c.type("echo $((80 + 2))\n")
    until(lambda: "82" in c.text(), "the console")


class Ends:
    """What a container can be given as standard input and output: theirs, and what we type and read."""

    def __init__(self, host, kind, name):
        self.kind, self.text = kind, bytearray()
        if kind == "terminal":
            master, theirs = os.openpty()
            tty.setraw(theirs)
            self.given, self.ours = (theirs, theirs), (os.dup(master), master)
        elif kind == "socket":
            one, other = socket.socketpair()
            self.given, self.ours = (other.detach(),) * 2, (os.dup(one.fileno()), one.detach())
        elif kind == "fifos":
            paths = [host.dir / f"{name}.{end}" for end in ("in", "out")]
            for path in paths:
                os.mkfifo(path)
            # Opened both ways: nobody waits for the other end, and none of them sees its end.
            self.ours = tuple(os.open(path, os.O_RDWR) for path in paths)
            self.given = (os.open(paths[0], os.O_RDONLY), os.open(paths[1], os.O_WRONLY))
        else:
            (theirs, write), (read, out) = os.pipe(), os.pipe()
            self.given, self.ours = (theirs, out), (write, read)
        threading.Thread(target=self.drain, args=(self.ours[1],), daemon=True).start()

    def drain(self, fd):
        try:
            while data := os.read(fd, 4096):
                self.text += data
        except OSError:
            pass  # EIO: a terminal that nobody has any more

    def gone(self):
        for fd in set(self.given):
            os.close(fd)


def begin_with(c, words, given, out):
    """Runs or restores a container that gets these descriptors."""
    errors = c.host.dir / f"{c.id}.stderr"
    with errors.open("w") as error:
        done = subprocess.run(c.command(*words, "--detach", "--bundle", c.bundle, c.id), stdin=given, stdout=out, stderr=error, timeout=120)
    equal(done.returncode, 0, f"{c.id}: {words[0]}: {errors.read_text()}")


def test_standard_descriptors(host):
    """What a shim, a shell or conmon gives: terminals of the host (--shell-job), sockets, fifos, pipes, each other ones at a
    restore; and files."""
    real_checkpoints()
    script = "while read -r line; do echo got $line; done; echo end; exec sleep 100000"
    for kind in "terminal", "socket", "fifos", "pipes":
        c = Container(host, kind, config(["sh", "-c", script], root=host.overlay("busybox", kind)))
        flags = ["--shell-job"] if kind == "terminal" else []
        ends = Ends(host, kind, f"{kind}0")

        def begin(*words):
            begin_with(c, words, *ends.given)  # noqa: B023
            ends.gone()  # noqa: B023

        begin("run")
        for n in range(2):
            os.write(ends.ours[0], f"line{n}\n".encode())
            until(lambda: f"got line{n}\n".encode() in ends.text, f"{kind}: an answer")  # noqa: B023
            equal(ends.text.count(b"got"), 1, f"{kind}: answers")
            c.checkpoint(f"{kind}{n}", *flags)
            ends = Ends(host, kind, f"{kind}{n + 1}")
            begin("restore", "--image-path", host.dir / f"{kind}{n}", *flags)
        c.delete()

    # Files: the caller's, with the offset that he has in common with the container.
    (host.dir / "lines").write_text("".join(f"{n}\n" for n in range(10000)))
    script = "while read -r line; do echo $line; sleep 0.01; done; exec sleep 100000"
    c = Container(host, "file", config(["sh", "-c", script], root=host.overlay("busybox", "file")))
    with open(host.dir / "lines") as given, open(c.log, "a") as out:
        for n, words in enumerate((["run"], ["restore", "--image-path", host.dir / "file1"], ["restore", "--image-path", host.dir / "file2"])):
            before = len(c.lines())
            if n:
                c.checkpoint(f"file{n}")
            begin_with(c, words, given, out)
            until(lambda: len(c.lines()) > before + 20, "lines")  # noqa: B023
    equal(c.lines(), [str(n) for n in range(len(c.lines()))], "lines")
