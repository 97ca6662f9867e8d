"""Labels of SELinux. Needs a kernel that has it switched on, and may be given the policy of selinux.conf:
`integration/vm/test` boots the virtual machine with it."""

import json
import os
import pathlib

from harness import TARGET, Container, Skip, check, config, equal, program, real_checkpoints, until

SELINUX = pathlib.Path("/sys/fs/selinux")
POLICY = TARGET / "selinux.policy"


def label(kind, level="s0"):
    return f"stasis_u:stasis_r:stasis_{kind}_t:{level}"


BOX, FILES = label("box", "s0:c1,c2"), label("file", "s0:c1,c2")
# What the program `labels` asks for, in its two threads.
ASKED = {"exec": BOX, "keycreate": BOX, "sockcreate": BOX, "fscreate": FILES}, {"fscreate": BOX}


def enforced(host):
    """The policy of these tests, in force until the end of the test."""
    if not (SELINUX / "load").exists():
        raise Skip("SELinux is not on")
    if not POLICY.exists():
        raise Skip(f"{POLICY} is not there: integration/vm/test makes it")
    if not pathlib.Path("/proc/self/attr/current").read_text().startswith("stasis_u"):
        (SELINUX / "load").write_bytes(POLICY.read_bytes())
    (SELINUX / "enforce").write_text("1")
    host.undo.append(lambda: (SELINUX / "enforce").write_text("0"))


def box(host, name, *args, process=BOX, files=FILES):
    """A container with labels, and a file that it may not read."""
    spec = config(args, root=host.overlay("busybox", name))
    if process:
        spec["process"]["selinuxLabel"] = process
    if files:
        spec["linux"]["mountLabel"] = files
    spec["mounts"].append({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]})
    root = host.dir / name / "rootfs"
    (root / "secret").write_text("told\n")
    os.setxattr(root / "secret", "security.selinux", label("secret").encode())
    return Container(host, name, spec)


def attribute(pid, name, tid=None):
    return pathlib.Path(f"/proc/{pid}/task/{tid or pid}/attr/{name}").read_text().strip("\0\n")


def of_file(path):
    return os.getxattr(path, "security.selinux").decode().rstrip("\0")


def inside(c, path):
    return pathlib.Path("/proc", str(c.pid()), "root", path)


def test_start(host):
    """The program, what exec starts, their keys and the mounts have config.json's labels; exec may have another."""
    enforced(host)
    c = box(host, "c", "sh", "-c", "cat /proc/self/attr/current; echo; cat /secret; sleep 1000")
    c.run()
    until(lambda: "ermission denied" in c.text(), "the denial")
    check(BOX in c.text() and "told" not in c.text(), c.text())
    for path in ("dev", "dev/shm", "dev/mqueue", "etc", "sys/firmware"):
        equal(of_file(inside(c, path)), FILES, path)
    said = c.exec("cat", "/proc/self/attr/current", "/secret", ok=[1])
    check(BOX in said.stdout and "told" not in said.stdout, f"exec: {said.stdout}{said.stderr}")
    other = label("other")
    said = c.call("exec", "--process-label", other, c.id, "cat", "/proc/self/attr/current", "/secret").stdout
    check(other in said and "told" in said, f"exec --process-label: {said}")
    said = c.call("exec", "--process-label", "nobody", c.id, "true", ok=[255]).stderr
    check("can't set key label" in said and "invalid argument" in said, said)


def labelled(host):
    """A container that runs the program `labels` and has been denied its file."""
    real_checkpoints()
    enforced(host)
    c = box(host, "c", "/labels", BOX, FILES)
    program("labels", host.dir / "c/rootfs/labels")
    c.run()
    until(lambda: "denied" in c.text(), "the denial")
    return c


def look(c, process):
    """The labels of the program `labels`, of each of its threads, and of its socket."""
    pid = c.pid()
    tids = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    equal(len(tids), 2, "threads")
    for tid, asked in zip(tids, ASKED):
        equal(attribute(pid, "current", tid), process, f"the label of thread {tids.index(tid)}")
        for name in ("exec", "keycreate", "sockcreate", "fscreate"):
            equal(attribute(pid, name, tid), asked.get(name, ""), f"{name} of thread {tids.index(tid)}")
    sockets = [fd for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd).startswith("socket:")]
    equal([of_file(fd) for fd in sockets], [process], "the label of the socket")
    told = c.text().count("\n")
    until(lambda: c.text().count("\n") > told + 2, "going on")


def test_restored(host):
    """Restored processes have config.json's label in all their threads, and what they had asked for."""
    c = labelled(host)
    check(f"keyring {BOX}" in c.text(), c.text())
    look(c, BOX)
    for n in range(2):
        c.checkpoint(f"image{n}")
        c.restore(f"image{n}")
        look(c, BOX)
        equal(of_file(inside(c, "dev/shm")), FILES, "/dev/shm after the restore")
    check("told" not in c.text(), c.text())
    # A process without threads is put under its label last.
    c = box(host, "shell", "sh", "-c", "while :; do cat /secret; sleep 0.5; done")
    c.run()
    c.checkpoint("shell-image")
    c.restore("shell-image")
    denials = c.text().count("ermission denied")
    until(lambda: c.text().count("ermission denied") > denials + 1, "denials after the restore")
    equal(attribute(c.pid(), "current"), BOX, "the shell's label")


def test_named(host):
    """restore --lsm-profile and --lsm-mount-context name what config.json does not, and nothing else."""
    c = labelled(host)
    c.checkpoint("image")
    other = label("other", "s0:c1,c2")
    c.restore("image", "--lsm-profile", f"selinux:{other}", ok=[1])
    check("--lsm-profile names" in c.text() and other in c.text(), c.text())
    del c.spec["process"]["selinuxLabel"], c.spec["linux"]["mountLabel"]
    (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.restore("image", "--lsm-profile", f"selinux:{other}", "--lsm-mount-context", FILES)
    look(c, other)
    check("told" in c.text(), c.text())
    equal(of_file(inside(c, "dev/shm")), FILES, "/dev/shm after the restore")
