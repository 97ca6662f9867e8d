"""Images that somebody has edited to get more out of them than config.json gives: each edit alone is refused by name, or comes
to nothing."""

import gzip
import io
import json
import os
import pathlib
import shutil
import tarfile

from harness import Container, Failed, check, config, equal, real_checkpoints, sh, until

USER = 1000


class Images:
    """A copy of a set, to be edited."""

    def __init__(self, c, original, name):
        self.c, self.dir = c, c.host.dir / name
        shutil.copytree(original, self.dir)

    def decoded(self, image):
        return json.loads(sh("crit", "decode", "-i", self.dir / image).stdout)

    def edit(self, image, change):
        """`change` gets the records, and changes them in place."""
        decoded = self.decoded(image)
        change(decoded["entries"])
        text = self.c.host.dir / f"{self.dir.name}.json"
        text.write_text(json.dumps(decoded))
        sh("crit", "encode", "-i", text, "-o", self.dir / image)

    def seal(self):
        self.c.call("image", "seal", self.dir)


def thread(change):
    return lambda images: images.edit("core-1.img", lambda entries: change(entries[0]["thread_core"]))


def creds(**values):
    return thread(lambda core: core["creds"].update(values))


def task(change):
    return lambda images: images.edit("core-1.img", lambda entries: change(entries[0]["tc"]))


def files(change):
    """The records of open files of that kind, by their path where they have one."""
    def edit(images):
        images.edit("files.img", lambda entries: [change(entry) for entry in entries])
    return edit


def path(old, new):
    def change(entry):
        if entry.get("reg", {}).get("name") == old:
            entry["reg"]["name"] = new
    return files(change)


def archive(member, data=b""):
    """Adds a file to what /dev/shm holds."""
    def edit(images):
        table = [name for name in os.listdir(images.dir) if name.startswith("mountpoints-")]
        points = images.decoded(table[0])["entries"]
        device = next(point["root_dev"] for point in points if point["mountpoint"] == "/dev/shm")
        device = int(device, 16) if isinstance(device, str) else device
        target = images.dir / f"tmpfs-dev-{device}.tar.gz.img"
        raw = gzip.decompress(target.read_bytes())
        whole = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(raw)) as old, tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as new:
            for one in old.getmembers():
                new.addfile(one, old.extractfile(one) if one.isfile() else None)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
        target.write_bytes(gzip.compress(whole.getvalue()))
    return edit


def device():
    member = tarfile.TarInfo("./disk")
    member.type, member.devmajor, member.devminor = tarfile.BLKTYPE, 8, 0
    return member


def mount(**values):
    """One more, like /dev/shm, somewhere else."""
    def edit(images):
        def add(entries):
            top = next(point for point in entries if point["mountpoint"] == "/")
            entries.append({**next(point for point in entries if point["mountpoint"] == "/dev/shm"), "mnt_id": 99999,
                            "parent_mnt_id": top["mnt_id"], "mountpoint": "/mnt", **values})
        table = [name for name in os.listdir(images.dir) if name.startswith("mountpoints-")]
        images.edit(table[0], add)
    return edit


def group(name):
    """A control group beside the container's."""
    def edit(images):
        def add(entries):
            for controller in entries[0]["controllers"]:
                controller["dirs"][0].setdefault("children", []).append({"dir_name": name})
        images.edit("cgroup.img", add)
    return edit


def limit(which, most):
    def change(tc):
        tc["rlimits"]["rlimits"][which].update({"cur": most, "max": most})
    return task(change)


def low(entries):
    first = entries[0]["vmas"][0]
    first["start"] = "0x0" if isinstance(first["start"], str) else 0


# What is done to the images, and what the refusal says.
REFUSED = {
    "capabilities": (creds(cap_prm=[1 << 21, 0], cap_eff=[1 << 21, 0]), "CAP_SYS_ADMIN"),
    "the bounding set": (creds(cap_bnd=[0xffffffff, 0xff]), "bounding"),
    "root": (creds(uid=0, euid=0, suid=0, fsuid=0), "user 0"),
    "a saved user": (creds(suid=0), "user 0"),
    "a group": (creds(groups=[6]), "group 6"),
    "descriptors": (limit(7, 1 << 20), "RLIMIT_NOFILE"),
    "the oom killer": (task(lambda tc: tc.update(oom_score_adj=-1000)), "oom_score_adj -1000"),
    "real time": (thread(lambda core: core.update(sched_policy=1, sched_prio=50)), "real-time"),
    "the processor": (thread(lambda core: core.update(sched_nice=-19)), "nice value -19"),
    "the first page": (lambda images: images.edit("mm-1.img", low), "mm"),
    "a masked file": (path("/etc/passwd", "/proc/kcore"), "/proc/kcore"),
    "a file outside": (path("/etc/passwd", "/../../../../../../../../etc/shadow-of-nobody"), "shadow-of-nobody"),
    "a device": (path("/etc/passwd", "/dev/mem"), "/dev/mem"),
    "a device in a tmpfs": (archive(device()), "device 8:0"),
    "a file beside a tmpfs": (archive(tarfile.TarInfo("../evil"), b"evil"), "outside"),
    "a mount": (mount(), "that config.json does not make"),
    "a mount of the host": (mount(ext_key="/etc"), "config.json lacks a mount from the host"),
    "a control group outside": (group("../evil"), "control group"),
    "a raw socket": (files(lambda entry: entry.get("isk", {}).update(type=3 if isinstance(entry.get("isk", {}).get("type"), int) else "RAW")), "raw socket"),
    "a socket with a mark": (files(lambda entry: entry.get("isk", {}).get("opts", {}).update(so_mark=7)), "mark 0x7"),
    "a low port": (files(lambda entry: entry.get("isk", {}).update(src_port=80)), "CAP_NET_BIND_SERVICE"),
}


def busy(host):
    """A user without any capability, with one open file, a tmpfs and a listening socket."""
    root = host.overlay("busybox", "plain")
    (root / "mnt").mkdir(exist_ok=True)
    script = "exec 3</etc/passwd; echo kept >/dev/shm/file; nc -l -p 8080 & exec sleep 100000"
    spec = config(["sh", "-c", script], root=root, user=(USER, USER))
    spec["process"]["capabilities"] = {kind: [] for kind in ("bounding", "effective", "permitted")}
    spec["process"]["oomScoreAdj"] = 0
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                                "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]}
    c = Container(host, "plain", spec, output="none")
    c.run()
    until(lambda: pathlib.Path("/proc", str(c.pid()), "root", "dev/shm/file").exists() and ":1F90 " in open(f"/proc/{c.pid()}/net/tcp6").read() + open(f"/proc/{c.pid()}/net/tcp").read(), "the program")
    c.checkpoint("original")
    return c


def status(c, field):
    text = open(f"/proc/{c.pid()}/status").read()
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{field}:"))


def test_what_is_refused(host):
    real_checkpoints()
    c = busy(host)
    original = host.dir / "original"
    untouched = Images(c, original, "untouched")
    untouched.edit("core-1.img", lambda entries: None)
    untouched.seal()
    c.restore("untouched")
    c.call("kill", c.id, "KILL")
    c.delete()
    for number, (what, (edit, words)) in enumerate(REFUSED.items()):
        images = Images(c, original, f"edited{number}")
        edit(images)
        images.seal()
        done = sh(*c.command("restore", "--detach", "--bundle", c.bundle, "--image-path", images.dir, "--work-path", host.dir / f"work{number}", c.id), ok=None)
        check(done.returncode != 0, f"{what} was restored")
        check(words in done.stderr, f"{what}: {done.stderr}")
        print(f"        {what}: {done.stderr.strip().split('msg=')[-1][:170]}")
        equal(c.state(), "", f"the container after {what}")
    check(not (host.dir / "evil").exists() and not list(pathlib.Path("/sys/fs/cgroup").glob("*/evil")), "something is outside")


def test_what_comes_to_nothing(host):
    """config.json decides these whatever the images say."""
    real_checkpoints()
    c = busy(host)

    def edit(images):
        creds(no_new_privs=0)(images)
        task(lambda tc: [tc.pop(key, None) for key in ("seccomp_mode", "old_seccomp_mode", "seccomp_filter")])(images)
        thread(lambda core: [core.pop(key, None) for key in ("seccomp_mode", "seccomp_filter")])(images)
        table = [name for name in os.listdir(images.dir) if name.startswith("mountpoints-")][0]

        def open_up(entries):
            for point in entries:
                if point["mountpoint"] in ("/proc/sys", "/sys"):
                    point["flags"] = "0x0" if isinstance(point["flags"], str) else 0
        images.edit(table, open_up)

    images = Images(c, host.dir / "original", "edited")
    edit(images)
    images.seal()
    c.restore("edited")
    equal([status(c, field) for field in ("NoNewPrivs", "Seccomp", "CapBnd", "Uid")],
          ["1", "2", "0000000000000000", f"{USER}\t{USER}\t{USER}\t{USER}"], "what the process has")
    mounts = open(f"/proc/{c.pid()}/mountinfo").read().splitlines()
    for point in "/proc/sys", "/sys":
        flags = [line.split()[5] for line in mounts if line.split()[4] == point]
        check(flags and flags[-1].startswith("ro"), f"{point} is {flags}")


def flags_of(point, value):
    """The mount's flags, as `crit` writes them."""
    point["flags"] = hex(value) if isinstance(point["flags"], str) else value


def another(point, entries, **values):
    """One more mount, like POINT, at /mnt of the same table."""
    top = next(e for e in entries if e["mountpoint"] == "/")
    entries.append({**point, "mnt_id": 99999, "parent_mnt_id": top["mnt_id"], "mountpoint": "/mnt", "root": "/", "options": "",
                    "root_dev": "0x777" if isinstance(point["root_dev"], str) else 0x777, "shared_id": 0, "master_id": 0, **values})


def test_a_mount_namespace_of_the_users(host):
    """A mount namespace that a user could make, in whose images is what nobody could mount there: a file system of the
    host's root, what is masked or read-only in the container, a procfs in full view."""
    real_checkpoints()
    root = host.overlay("busybox", "nested")
    (root / "mnt").mkdir(exist_ok=True)
    spec = config(["sh", "-c", "unshare -Urm sleep 100000 & echo started; wait"], root=root, user=(USER, USER))
    spec["process"]["capabilities"] = {kind: [] for kind in ("bounding", "effective", "permitted")}
    c = Container(host, "nested", spec)
    c.run()

    def inside():
        children = c.exec("pidof", "sleep", ok=None).stdout.split()
        own = c.exec("readlink", "/proc/self/ns/user", ok=None).stdout
        return children and c.exec("readlink", f"/proc/{children[0]}/ns/user", ok=None).stdout != own

    until(inside, f"the namespace: {c.text()}")
    c.checkpoint("original")
    at = lambda entries, path: next(e for e in entries if e["mountpoint"] == path)  # noqa: E731
    masked = next(path for path in spec["linux"]["maskedPaths"] if os.path.exists(path))
    for number, (edit, words) in enumerate([
        (lambda entries: another(at(entries, "/dev/shm"), entries, fstype=11, source="debugfs"), "a new debugfs"),
        (lambda entries: flags_of(at(entries, "/proc/sys"), 0), "lifts restrictions"),
        (lambda entries: flags_of(at(entries, "/sys"), 0), "lifts restrictions"),
        (lambda entries: entries.remove(at(entries, masked)), f"shows what {masked} covers"),
        (lambda entries: another(at(entries, "/proc"), entries), "a new proc or sysfs"),
        (lambda entries: another(at(entries, "/sys"), entries), "a new proc or sysfs"),
    ]):
        images = Images(c, host.dir / "original", f"edited{number}")
        tables = sorted((name for name in os.listdir(images.dir) if name.startswith("mountpoints-")), key=lambda name: int(name[12:-4]))
        check(len(tables) == 2, f"{tables} of two mount namespaces")
        images.edit(tables[1], edit)
        images.seal()
        before = len(c.text())
        c.restore(f"edited{number}", ok=(1,))
        check(words in c.text()[before:], f"{words}: {c.text()[before:]}")
        equal(c.state(), "", f"the container after {words}")
    c.restore("original")
