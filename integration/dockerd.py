"""Docker's daemons, Debian's: their data, sockets, containers and network are nobody else's."""

import os
import re

from harness import RUNTIME, Failed, Host, Skip, check, need, remove_cgroup, rootfs, sh, tail, until

CLIENT = "/usr/bin/docker"  # a newer one may stand first on the path
_daemon = {}


class Docker:
    """A containerd and a dockerd, in a network namespace of their own."""

    def __init__(self, host, *flags, label="", images=("busybox", "redis")):
        need("dockerd", "containerd", "ip")
        if not os.path.exists(CLIENT):
            raise Skip(f"{CLIENT} is not installed")
        self.host = host
        self.dir = host.dir
        self.short = f"/tmp/stasis-docker-{os.getpid()}{label}"  # sockets' paths have to be short
        self.client = [CLIENT, "--host", f"unix://{self.short}/docker.sock"]
        os.makedirs(self.short, exist_ok=True)
        host.undo.append(lambda: sh("rm", "-rf", self.short))
        # Where dockerd has the network of the "host" mounted, if it was asked for.
        host.undo.append(lambda: sh("umount", "-l", f"{self.short}/exec/netns/default", ok=None))
        # A namespace is kept by a process that sleeps in it; Docker may do with bridges and rules there what it likes.
        cgroup = f"stasis-docker-{os.getpid()}{label}"
        host.undo.append(lambda: remove_cgroup(cgroup))
        holder = host.daemon("unshare", "--net", "sleep", "infinity", log=self.dir / "holder.log")
        until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != os.readlink("/proc/self/ns/net"), "a network namespace")
        self.inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        sh(*self.inside, "ip", "link", "set", "lo", "up")
        (self.dir / "containerd.toml").write_text(
            f'version = 2\nroot = "{self.dir}/containerd"\nstate = "{self.short}/containerd"\n'
            f'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
            f'[grpc]\naddress = "{self.short}/containerd.sock"\n')
        host.daemon(*self.inside, "containerd", "--config", self.dir / "containerd.toml", log=self.dir / "containerd.log")
        until(lambda: os.path.exists(f"{self.short}/containerd.sock"), "containerd to listen")
        (self.dir / "daemon.json").write_text("{}")  # the machine's own, if any, is none of ours
        network = ["--iptables=false", "--ip6tables=false"]
        daemon = host.daemon(*self.inside, "dockerd", "--config-file", self.dir / "daemon.json", "--containerd", f"{self.short}/containerd.sock",
                    "--host", f"unix://{self.short}/docker.sock", "--pidfile", f"{self.short}/docker.pid",
                    "--data-root", self.dir / "data", "--exec-root", f"{self.short}/exec", "--experimental",
                    "--add-runtime", f"stasis={RUNTIME}", "--default-runtime", "stasis", "--cgroup-parent", cgroup, *network, *flags,
                    log=self.dir / "dockerd.log")
        host.undo.append(self.remove_all)
        try:
            until(lambda: self("version", ok=None).returncode == 0 or daemon.poll() is not None, "dockerd to answer", 60)
            check(daemon.poll() is None, "dockerd has ended")
        except Failed as e:
            raise Failed(f"{e}\n{tail(self.dir / 'dockerd.log')}") from None
        for image in images:
            self("import", str(rootfs(image)) + ".tar", f"{image}:test")

    def __call__(self, *words, **how):
        return sh(*self.client, *words, **how)

    def remove_all(self):
        ids = self("ps", "-aq", ok=None).stdout.split()
        if ids:
            self("rm", "-f", *ids, ok=None)

    def status(self, name):
        return self("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name).stdout.strip()

    def start_from(self, checkpoint, name):
        try:
            until(lambda: self.uploaded(checkpoint, name), "containerd to forget the checkpoint it took", 90)
        except Failed as e:
            logs = sorted((self.dir / "data").rglob("restore.log")) + sorted(self.dir.rglob("restore.log"))
            raise Failed(f"{e}\n{''.join(tail(log) for log in logs[:1])}{tail(self.dir / 'dockerd.log', 8)}") from None


    def uploaded(self, checkpoint, name):
        """False where the daemon meets the same bytes in containerd's store, left from `checkpoint create` until they
        are collected: dockerd 20.10 takes that for a failure, whatever the runtime."""
        try:
            self("start", "--checkpoint", checkpoint, name)
        except Failed as e:
            if re.search("failed to upload checkpoint to containerd.*already exists", str(e)):
                return False
            raise
        return True


def docker(host):
    """The daemons are started by the first test that needs them, and shared by the rest."""
    if "docker" not in _daemon:
        own = Host("docker-daemons")
        _daemon["host"] = own
        try:
            _daemon["docker"] = Docker(own)
        except (Failed, Skip) as e:
            own.close(keep=isinstance(e, Failed))
            _daemon["docker"] = e
    if isinstance(_daemon["docker"], Exception):
        raise _daemon["docker"]
    d = _daemon["docker"]
    host.undo.append(d.remove_all)
    return d


def finish():
    """Called by integration/run when this file's tests are over."""
    if isinstance(_daemon.get("docker"), Docker):
        _daemon["host"].close(keep=False)
