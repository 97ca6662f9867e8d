"""containerd as Kubernetes drives it: its CRI service, asked over gRPC, with a daemon and a network plugin of the test's own.

```text
   test ── gRPC ──> containerd's CRI plugin ── shim ──> Stasis     the pod's sandbox, then each container in its namespaces
                        └─ CNI ──> a script: brings the loopback device up, and names an address
```

Debian has no generated Python code for the CRI; `Message` speaks the few messages that are needed.
CRI's CheckpointContainer came with containerd 2.0: with Debian 12's 1.6 that test is skipped.
"""

import json
import os
import re
import time

from harness import (RUNTIME, Failed, Host, Skip, check, equal, need, oci_archive, real_checkpoints, remove_cgroup, sh, tail,
                     until)
from streams import Streams

try:
    import grpc
except ImportError:
    grpc = None

_daemon = {}
IMAGE = "localhost/busybox:test"

# Messages of runtime.v1: fields by name, with their number, and the message they hold. A list: they may come many times.
MESSAGES = {
    "Empty": {},
    "Name": {"name": 1, "uid": 2, "namespace": 3, "attempt": 4},
    "Namespaces": {"network": 1, "pid": 2, "ipc": 3, "target_id": 4},
    "Value": {"value": 1},
    "Profile": {"profile_type": 1, "localhost_ref": 2},
    "SandboxSecurity": {"namespace_options": (1, "Namespaces"), "seccomp": (9, "Profile")},
    "SandboxLinux": {"cgroup_parent": 1, "security_context": (2, "SandboxSecurity"), "sysctls": [3, "Pair"]},
    "Sandbox": {"metadata": (1, "Name"), "hostname": 2, "log_directory": 3, "linux": (8, "SandboxLinux")},
    "RunPodSandbox": {"config": (1, "Sandbox")},
    "Id": {"id": 1, "timeout": 2},
    "SandboxStatus": {"id": 1, "state": 3, "network": (5, "Value")},
    "Sandboxes": {"items": [1, "SandboxStatus"]},
    "SandboxStatusAnswer": {"status": (1, "SandboxStatus")},
    "ContainerName": {"name": 1, "attempt": 2},
    "Image": {"image": 1, "user_specified_image": 18},
    "Pair": {"key": 1, "value": 2},
    "Mount": {"container_path": 1, "host_path": 2, "readonly": 3, "propagation": 5},
    "Resources": {"cpu_period": 1, "cpu_quota": 2, "cpu_shares": 3, "memory_limit_in_bytes": 4, "oom_score_adj": 5, "cpuset_cpus": 6},
    "Capabilities": {"add": [1], "drop": [2]},
    "Security": {"capabilities": (1, "Capabilities"), "privileged": 2, "namespace_options": (3, "Namespaces"), "run_as_user": (5, "Value"),
                 "readonly_rootfs": 7, "supplemental_groups": 8, "no_new_privs": 11, "run_as_group": (12, "Value"),
                 "masked_paths": [13], "readonly_paths": [14], "seccomp": (15, "Profile")},
    "ContainerLinux": {"resources": (1, "Resources"), "security_context": (2, "Security")},
    "Container": {"metadata": (1, "ContainerName"), "image": (2, "Image"), "command": [3], "working_dir": 5, "envs": [6, "Pair"],
                  "mounts": [7, "Mount"], "log_path": 11, "stdin": 12, "tty": 14, "linux": (15, "ContainerLinux")},
    "CreateContainer": {"pod_sandbox_id": 1, "config": (2, "Container"), "sandbox_config": (3, "Sandbox")},
    "ContainerStatus": {"id": 1, "state": 3, "finished_at": 6, "exit_code": 7, "reason": 10, "message": 11},
    "ContainerStatusAnswer": {"status": (1, "ContainerStatus")},
    "Listed": {"id": 1, "pod_sandbox_id": 2, "state": 6},
    "Containers": {"containers": [1, "Listed"]},
    "Update": {"container_id": 1, "linux": (2, "Resources")},
    "ExecSync": {"container_id": 1, "cmd": [2], "timeout": 3},
    "Exec": {"container_id": 1, "cmd": [2], "tty": 3, "stdin": 4, "stdout": 5, "stderr": 6},
    "Attach": {"container_id": 1, "stdin": 2, "tty": 3, "stdout": 4, "stderr": 5},
    "Url": {"url": 1},
    "Checkpoint": {"container_id": 1, "location": 2, "timeout": 3},
    "Executed": {"stdout": 1, "stderr": 2, "exit_code": 3},
    "Cpu": {"timestamp": 1, "usage": (2, "Value")},
    "Memory": {"timestamp": 1, "working_set": (2, "Value")},
    "Stats": {"cpu": (2, "Cpu"), "memory": (3, "Memory")},
    "StatsAnswer": {"stats": (1, "Stats")},
    "Condition": {"type": 1, "status": 2},
    "Conditions": {"conditions": [1, "Condition"]},
    "StatusAnswer": {"status": (1, "Conditions")},
    "Version": {"version": 1, "runtime_name": 2, "runtime_version": 3},
}
# What is asked with which message, and answered with which.
CALLS = {
    "Version": ("Version", "Version"), "Status": ("Empty", "StatusAnswer"),
    "RunPodSandbox": ("RunPodSandbox", "Id"), "StopPodSandbox": ("Id", "Empty"), "RemovePodSandbox": ("Id", "Empty"),
    "PodSandboxStatus": ("Id", "SandboxStatusAnswer"), "ListPodSandbox": ("Empty", "Sandboxes"),
    "CreateContainer": ("CreateContainer", "Id"), "StartContainer": ("Id", "Empty"), "StopContainer": ("Id", "Empty"),
    "RemoveContainer": ("Id", "Empty"), "ContainerStatus": ("Id", "ContainerStatusAnswer"), "ListContainers": ("Empty", "Containers"),
    "UpdateContainerResources": ("Update", "Empty"), "ExecSync": ("ExecSync", "Executed"),
    "CheckpointContainer": ("Checkpoint", "Empty"), "Exec": ("Exec", "Url"), "Attach": ("Attach", "Url"), "ContainerStats": ("Id", "StatsAnswer"),
}


def varint(n):
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def encode(message, value):
    out = b""
    for name, content in value.items():
        field = MESSAGES[message][name]
        number, *inner = [field] if isinstance(field, int) else field
        for one in content if isinstance(content, list) else [content]:
            if isinstance(one, int):
                out += varint(number << 3) + varint(int(one))
                continue
            data = encode(inner[0], one) if isinstance(one, dict) else one.encode()
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def decode(message, data):
    fields = {}
    for name, field in MESSAGES[message].items():
        number, *inner = [field] if isinstance(field, int) else field
        fields[number] = (name, inner, isinstance(field, list))
    value = {name: [] for name, _, many in fields.values() if many}
    at = 0

    def number():
        nonlocal at
        n = shift = 0
        while True:
            n |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return n

    while at < len(data):
        key = number()
        if key & 7 == 0:
            content = number()
        else:
            length = number()
            content = data[at:at + length]
            at += length
        if key >> 3 not in fields:
            continue
        name, inner, many = fields[key >> 3]
        if isinstance(content, bytes):
            content = decode(inner[0], content) if inner else content.decode(errors="replace")
        if many:
            value[name].append(content)
        else:
            value[name] = content
    return value


CNI = """#!/bin/sh
[ "$CNI_COMMAND" != VERSION ] || exec echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.3.1", "0.4.0"]}'
[ "$CNI_COMMAND" != ADD ] || nsenter --net="$CNI_NETNS" ip link set lo up || exit 1
case $0 in
*/loopback) echo '{"cniVersion": "0.3.1"}' ;;
*) echo '{"cniVersion": "0.4.0", "interfaces": [{"name": "eth0", "sandbox": "'"$CNI_NETNS"'"}],
          "ips": [{"version": "4", "address": "10.77.0.5/24", "interface": 0}]}' ;;
esac
"""


class Cri:
    """A containerd whose CRI service is on; a call by its name, with its message's fields."""

    def __init__(self, host):
        need("containerd", "ctr", "nsenter", "ip")
        if grpc is None:
            raise Skip("python3-grpcio is not installed")
        self.dir = host.dir
        self.short = f"/tmp/stasis-cri-{os.getpid()}"
        os.makedirs(f"{self.short}/cni", exist_ok=True)
        host.undo.append(lambda: sh("rm", "-rf", self.short))
        self.cgroup = f"stasis-cri-{os.getpid()}"
        host.undo.append(lambda: remove_cgroup(self.cgroup))
        for plugin in "loopback", "none":
            with open(f"{self.short}/cni/{plugin}", "w") as f:
                f.write(CNI)
            os.chmod(f.name, 0o755)
        (host.dir / "net.d").mkdir()
        (host.dir / "net.d/10-none.conflist").write_text(json.dumps(
            {"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "none"}]}))
        plugin = 'plugins."io.containerd.grpc.v1.cri"'
        # Without CAP_SYS_RESOURCE no process gets less likely to be killed than its parent.
        (host.dir / "containerd.toml").write_text(
            f'version = 2\nroot = "{host.dir}/containerd"\nstate = "{self.short}/state"\n'
            f'disabled_plugins = ["io.containerd.internal.v1.opt"]\n'
            f'[grpc]\naddress = "{self.short}/containerd.sock"\n'
            f'[{plugin}]\nsandbox_image = "localhost/busybox:pause"\nrestrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n'
            f'[{plugin}.cni]\nbin_dir = "{self.short}/cni"\nconf_dir = "{host.dir}/net.d"\n'
            f'[{plugin}.containerd.runtimes.runc]\nruntime_type = "io.containerd.runc.v2"\n'
            f'[{plugin}.containerd.runtimes.runc.options]\nBinaryName = "{RUNTIME}"\n')
        log = host.dir / "containerd.log"
        # Its streams are on the loopback device, which a machine may have switched off.
        holder = host.daemon("unshare", "--net", "sleep", "infinity", log=host.dir / "holder.log")
        self.network = f"/proc/{holder.pid}/ns/net"
        until(lambda: os.readlink(self.network) != os.readlink("/proc/self/ns/net"), "a network namespace")
        sh("nsenter", f"--net={self.network}", "ip", "link", "set", "lo", "up")
        # It asks a program called criu for its version before a checkpoint. Under that name Stasis answers.
        os.mkdir(f"{self.short}/bin")
        os.symlink(RUNTIME, f"{self.short}/bin/criu")
        daemon = host.daemon("nsenter", f"--net={self.network}", "containerd", "--config", host.dir / "containerd.toml", log=log,
                             env={"PATH": f"{self.short}/bin:{os.environ['PATH']}"})
        address = f"{self.short}/containerd.sock"
        until(lambda: daemon.poll() is not None or os.path.exists(address), "containerd to listen")
        for archive in oci_archive("busybox"), oci_archive("busybox", tag="pause", command=["sleep", "100000"]):
            sh("ctr", "--address", address, "--namespace", "k8s.io", "images", "import", archive)
        self.channel = grpc.insecure_channel(f"unix://{address}")
        host.undo.append(self.remove_all)
        try:
            until(lambda: all(c.get("status") for c in self("Status")["status"]["conditions"]), "the runtime and its network to be ready")
        except Failed as e:
            raise Failed(f"{e}\n{tail(log)}") from None

    def __call__(self, name, fails=None, **fields):
        asked, answered = CALLS[name]
        call = self.channel.unary_unary(f"/runtime.v1.RuntimeService/{name}", request_serializer=lambda v: encode(asked, v),
                                        response_deserializer=lambda data: decode(answered, data))
        try:
            answer = call(fields, timeout=120)
        except grpc.RpcError as e:
            if fails is not None and re.search(fails, e.details()):
                return e.details()
            raise Failed(f"{name} {fields}: {e.code()}: {e.details()}") from None
        check(fails is None, f"{name} {fields} did not fail: {answer}")
        return answer

    def remove_all(self):
        for pod in self("ListPodSandbox")["items"]:
            self("StopPodSandbox", id=pod["id"])
            self("RemovePodSandbox", id=pod["id"])


class Pod:
    """A pod, and the containers in it."""

    def __init__(self, cri, host, name, sysctls=(), **namespaces):
        self.cri, self.dir, self.made = cri, host.dir, 0
        self.namespaces = {"pid": 1, **namespaces}
        linux = {"cgroup_parent": f"/{cri.cgroup}", "security_context": {"namespace_options": self.namespaces}, "sysctls": list(sysctls)}
        self.config = {"metadata": {"name": name, "uid": f"{name}-uid", "namespace": "test", "attempt": 0}, "hostname": name,
                       "log_directory": str(host.dir), "linux": linux}
        self.id = cri("RunPodSandbox", config=self.config)["id"]

    def create(self, *command, resources=None, security=None, image=IMAGE, **more):
        self.made += 1
        security = {"namespace_options": self.namespaces, **(security or {})}
        linux = {"resources": resources or {}, "security_context": security}
        config = {"metadata": {"name": f"c{self.made}", "attempt": 0}, "image": {"image": image, "user_specified_image": image}, "command": list(command),
                  "log_path": f"c{self.made}.log", "linux": linux, **more}
        return self.cri("CreateContainer", pod_sandbox_id=self.id, config=config, sandbox_config=self.config)["id"]

    def start(self, *command, **how):
        id = self.create(*command, **how)
        self.cri("StartContainer", id=id)
        return id

    def log(self, number=1):
        """What the container printed, without containerd's time stamps."""
        try:
            lines = (self.dir / f"c{number}.log").read_text().rpartition("\n")[0].splitlines()
        except FileNotFoundError:
            return []
        return [line.split(" ", 3)[3] for line in lines]

    def state(self, id):
        status = self.cri("ContainerStatus", id=id)["status"]
        return ["created", "running", "exited", "unknown"][status.get("state", 0)], status.get("exit_code", 0), status.get("reason", "")

    def output(self, id, script, code=0):
        done = self.cri("ExecSync", container_id=id, cmd=["sh", "-c", script])
        equal(done.get("exit_code", 0), code, f"status of {script}: {done}")
        return done.get("stdout", "")


def cri(host):
    if "it" not in _daemon:
        own = Host("cri-daemon")
        _daemon["host"] = own
        try:
            _daemon["it"] = Cri(own)
        except (Failed, Skip) as e:
            own.close(keep=isinstance(e, Failed))
            _daemon["it"] = e
    if isinstance(_daemon["it"], Exception):
        raise _daemon["it"]
    host.undo.append(_daemon["it"].remove_all)
    return _daemon["it"]


def finish():
    """Called by integration/run when this file's tests are over."""
    if isinstance(_daemon.get("it"), Cri):
        _daemon["host"].close(keep=False)


def test_pod(host):
    """A pod and a container from the first call to the last, as a kubelet makes them."""
    c = cri(host)
    equal(c("Version")["runtime_name"], "containerd", "Version")
    pod = Pod(c, host, "pod")
    status = c("PodSandboxStatus", id=pod.id)["status"]
    equal((status.get("state", 0), status["network"]["value"]), (0, "10.77.0.5"), "the pod: ready, with the address")
    id = pod.create("sh", "-c", "trap 'echo bye; exit 3' TERM; echo up $A; echo error >&2; while :; do sleep 0.05; done",
                    envs=[{"key": "A", "value": "b c"}], working_dir="/tmp")
    equal(pod.state(id)[0], "created", "after CreateContainer")
    c("StartContainer", id=id)
    equal(pod.state(id)[0], "running", "after StartContainer")
    until(lambda: sorted(pod.log()) == ["error", "up b c"], "the log")
    equal([(x["id"], x["pod_sandbox_id"], x["state"]) for x in c("ListContainers")["containers"]], [(id, pod.id, 1)], "ListContainers")
    done = c("ExecSync", container_id=id, cmd=["sh", "-c", "pwd; hostname; echo oops >&2; exit 4"])
    equal((done["stdout"], done["stderr"], done["exit_code"]), ("/tmp\npod\n", "oops\n", 4), "ExecSync")
    stats = c("ContainerStats", id=id)["stats"]
    check(stats["memory"]["working_set"]["value"] > 0 and stats["cpu"]["usage"]["value"] > 0, f"ContainerStats: {stats}")
    c("StopContainer", id=id, timeout=20)
    equal(pod.state(id), ("exited", 3, "Error"), "after StopContainer")
    until(lambda: "bye" in pod.log(), "the handler's word")
    c("RemoveContainer", id=id)
    c("ContainerStatus", id=id, fails="not found")
    c("StopPodSandbox", id=pod.id)
    equal(c("PodSandboxStatus", id=pod.id)["status"]["state"], 1, "the pod after StopPodSandbox")
    c("RemovePodSandbox", id=pod.id)
    equal((c("ListPodSandbox")["items"], c("ListContainers")["containers"]), ([], []), "what is left")


def test_shared_namespaces(host):
    """Containers of a pod share network, ipc and, if asked, pids; one may look into another's pids."""
    c = cri(host)
    pod = Pod(c, host, "shared", pid=0)
    first = pod.start("sh", "-c", "while :; do echo hello | nc -l -p 8000; done")
    second = pod.start("sleep", "2000")
    until(lambda: c("ExecSync", container_id=second, cmd=["nc", "-w", "2", "127.0.0.1", "8000"]).get("stdout") == "hello\n", "the neighbour")
    check("nc -l -p 8000" in pod.output(second, "ps -o args"), "the neighbour's program among the processes")
    until(lambda: "sleep 100000" in pod.output(second, "ps -o args"), "the sandbox among the processes")
    for kind in "net", "ipc", "pid", "uts":
        equal(pod.output(first, f"readlink /proc/self/ns/{kind}"), pod.output(second, f"readlink /proc/self/ns/{kind}"), kind)
    alone = Pod(c, host, "alone")
    watched = alone.start("sleep", "3000")
    check("sleep 100000" not in alone.output(watched, "ps -o args"), "the sandbox among the processes of a container with pids of its own")
    watcher = alone.start("sleep", "4000", security={"namespace_options": {"pid": 3, "target_id": watched}})
    until(lambda: "sleep 3000" in alone.output(watcher, "ps -o args"), "the target's program among the processes")
    # Without being pid 1, it can be ended, and alone.
    c("StopContainer", id=watcher, timeout=0)
    equal(alone.state(watcher)[:2], ("exited", 137), "the one that looked")
    equal(alone.state(watched)[0], "running", "the one that was looked at")


def test_security(host):
    """User, groups, capabilities, seccomp, read-only root, masked paths, sysctls of the pod, a read-only volume."""
    c = cri(host)
    volume = host.dir / "volume"
    volume.mkdir()
    pod = Pod(c, host, "secure", sysctls=[{"key": "kernel.shm_rmid_forced", "value": "1"}])
    id = pod.start("sleep", "1000", mounts=[{"container_path": "/volume", "host_path": str(volume), "readonly": True}], security={
        "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]}, "run_as_user": {"value": 7}, "run_as_group": {"value": 8}, "no_new_privs": True,
        "readonly_rootfs": True, "masked_paths": ["/proc/kcore"], "readonly_paths": ["/proc/sys"], "seccomp": {"profile_type": 0}})
    status = pod.output(id, "id -u; id -g; cat /proc/self/status")
    equal(status.split()[:2], ["7", "8"], "user and group")
    for line in r"CapBnd:\s+0000000000000001\n", r"NoNewPrivs:\s+1\n", r"Seccomp:\s+2\n":
        check(re.search(line, status), f"{line} in {status}")
    pod.output(id, "touch /x", code=1)
    pod.output(id, "touch /volume/x", code=1)
    pod.output(id, "test -s /proc/kcore", code=1)
    equal(pod.output(id, "cat /proc/sys/kernel/shm_rmid_forced").strip(), "1", "the pod's sysctl")


def test_limits(host):
    """Limits at the start, UpdateContainerResources, and what became of one that wanted more memory."""
    c = cri(host)
    if not os.path.exists("/sys/fs/cgroup/memory/memory.oom_control"):
        raise Skip("no v1 memory controller here")
    pod = Pod(c, host, "limits")
    id = pod.start("sleep", "1000", resources={"memory_limit_in_bytes": 64 << 20, "cpu_shares": 100, "cpu_period": 100000, "cpu_quota": 50000})
    read = lambda controller, file: open(f"/sys/fs/cgroup/{controller}/{c.cgroup}/{id}/{file}").read().strip()  # noqa: E731
    equal((read("memory", "memory.limit_in_bytes"), read("cpu", "cpu.shares")), (str(64 << 20), "100"), "limits")
    c("UpdateContainerResources", container_id=id, linux={"memory_limit_in_bytes": 80 << 20, "cpu_quota": 70000, "cpuset_cpus": "0"})
    equal((read("memory", "memory.limit_in_bytes"), read("cpu", "cpu.cfs_quota_us"), read("cpuset", "cpuset.cpus")),
          (str(80 << 20), "70000", "0"), "limits after the update")
    def killed():
        greedy = pod.start("sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=64M count=1", resources={"memory_limit_in_bytes": 16 << 20})
        until(lambda: pod.state(greedy)[:2] == ("exited", 137), "the end of the one that wanted too much")
        try:
            return until(lambda: pod.state(greedy)[2] == "OOMKilled", "why", 5)
        except Failed:
            return False

    # The shim tells nothing of a group that is gone when it comes to it.
    until(killed, "the word that it wanted too much", 60)


def test_failures(host):
    """A program that isn't there, one that takes too long, one that ends at once: each is told as what it is."""
    c = cri(host)
    pod = Pod(c, host, "failures")
    missing = pod.create("/no/such/program")
    c("StartContainer", id=missing, fails="no such file or directory")
    equal(pod.state(missing), ("exited", 128, "StartError"), "one that could not start")
    c("RemoveContainer", id=missing)
    id = pod.start("sleep", "1000")
    began = time.monotonic()
    c("ExecSync", container_id=id, cmd=["sleep", "500"], timeout=1, fails="timeout 1s exceeded")
    check(time.monotonic() - began < 30, "it took its time")
    check("sleep 500" not in pod.output(id, "ps -o args"), "the command that took too long goes on")
    c("ExecSync", container_id=id, cmd=["/no/such/program"], fails="no such file or directory")
    short = [pod.start("true") for _ in range(3)]
    for one in short:
        until(lambda one=one: pod.state(one) == ("exited", 0, "Completed"), "the end of a short one")
    c("RemovePodSandbox", id=pod.id)
    equal(c("ListContainers")["containers"], [], "what is left")


def test_checkpoint(host):
    """CheckpointContainer, as a kubelet's checkpoint API asks for it, and a container made of the archive in another pod."""
    real_checkpoints()
    c = cri(host)
    # An archive names its image as one that was pulled is named, and containerd pulls that for a restore.
    ctr = ["ctr", "--address", f"{c.short}/containerd.sock", "--namespace", "k8s.io", "images"]
    digest = re.search(r"sha256:[0-9a-f]{64}", sh(*ctr, "ls", f"name=={IMAGE}").stdout)[0]
    sh(*ctr, "tag", IMAGE, f"localhost/busybox@{digest}")
    pod = Pod(c, host, "frozen")
    id = pod.start("sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; echo $n >/count; sleep 0.05; done")
    until(lambda: len(pod.log()) > 5, "counting")
    archive = host.dir / "checkpoint.tar"
    try:
        c("CheckpointContainer", container_id=id, location=str(archive), timeout=60)
    except Failed as e:
        if "UNIMPLEMENTED" in str(e) or "not implemented" in str(e):
            raise Skip("this containerd has no CheckpointContainer (2.0 and later have)") from None
        raise
    equal(pod.state(id)[0], "running", "after CheckpointContainer")
    names = sh("tar", "-tf", archive).stdout
    check("checkpoint/inventory.img" in names and "spec.dump" in names, f"the archive: {names}")
    at = int(pod.log()[-1])
    until(lambda: int(pod.log()[-1]) > at + 3, "counting on")
    need("docker-registry")
    (host.dir / "registry.yml").write_text(
        f"version: 0.1\nstorage:\n filesystem:\n  rootdirectory: {host.dir}/registry\nhttp:\n addr: 127.0.0.1:80\n")
    inside = ["nsenter", f"--net={c.network}"]
    host.daemon(*inside, "docker-registry", "serve", host.dir / "registry.yml", log=host.dir / "registry.log")
    until(lambda: sh(*inside, *ctr, "push", "--plain-http", IMAGE, ok=None).returncode == 0, "the image in a registry")
    other = Pod(c, host, "thawed")
    other.made = 1
    again = other.create(image=str(archive))
    c("StartContainer", id=again)
    equal(other.state(again)[0], "running", "the restored container")
    numbers = lambda: [int(n) for n in other.log(2) if n.isdigit()]  # noqa: E731
    until(lambda: numbers() and numbers()[-1] > at, "the restored container counts on")
    # containerd brings the old log along, as far as it was written.
    equal(numbers().count(1), 1, f"beginnings in {numbers()}")


def test_streams(host):
    """Exec and Attach, by streams: input, output and errors apart; a terminal with a size; exit codes."""
    c = cri(host)
    pod = Pod(c, host, "streams")

    def streams(call, **how):
        opened = Streams(c(call, **how)["url"], c.network)
        host.undo.append(opened.close)
        return opened

    id = pod.start("sh", "-c", "while read line; do echo got $line; echo seen >&2; done; exit 9", stdin=1)
    done = streams("Exec", container_id=id, cmd=["sh", "-c", "read a; echo out $a; echo err >&2; exit 5"], stdin=1, stdout=1, stderr=1)
    done.type("word\n")
    equal((done.end(), done.output, done.errors), (5, "out word\n", "err\n"), "exec")
    done = streams("Exec", container_id=id, cmd=["sh", "-c", "read a; until [ \"$(stty size)\" = '31 97' ]; do sleep 0.05; done; stty size; tty"],
                   tty=1, stdin=1, stdout=1)
    done.resize(97, 31)
    done.type("\n")
    equal(done.end(), 0, f"exec with a terminal: {done.output}")
    check("31 97" in done.output and "/dev/pts/" in done.output, f"exec with a terminal: {done.output!r}")
    equal(streams("Exec", container_id=id, cmd=["true"], stdout=1).end(), 0, "exec without input")
    first = streams("Attach", container_id=id, stdin=1, stdout=1, stderr=1)

    def typed(at, line, answer):
        """An answer to what is typed. Input is passed on a moment before the output of the container is."""
        def answered():
            at.type(line)
            try:
                return until(answer, "an answer", 3)
            except Failed:
                return False

        until(answered, f"an answer to {line!r}")

    typed(first, "one\n", lambda: first.output and first.errors)
    until(lambda: (set(first.output.split("\n")), set(first.errors.split("\n"))) == ({"got one", ""}, {"seen", ""}), "what an attached client has typed")
    second = streams("Attach", container_id=id, stdin=1, stdout=1, stderr=1)
    typed(second, "two\n", lambda: "got two\n" in second.output and "got two\n" in first.output)
    equal(pod.state(id)[0], "running", "the container")
    shell = pod.start("sh", stdin=1, tty=1)
    at = streams("Attach", container_id=shell, stdin=1, stdout=1, tty=1)
    typed(at, "\n", lambda: "# " in at.output)
    at.type("echo $((6*7)); exit 4\n")
    until(lambda: "42" in at.output, "the shell's answer")
    until(lambda: pod.state(shell)[:2] == ("exited", 4), "the end of the shell")
