"""TCP connections that live through checkpoints: a server in a container, its peer in another network namespace, both
sending all the time, every byte checked on both sides. The peer must see a pause, never a reset."""
import ctypes
import json
import os
import socket
import stat
import subprocess
import threading
import time

from harness import Container, Failed, Host, check, config, equal, need, program, real_checkpoints, sh, tail, until

PERIOD = 65521
PORT = 7000


def table():
    x, out = 1, bytearray()
    for _ in range(PERIOD):
        x = (x * 1664525 + 1013904223) & 0xffffffff
        out.append(x >> 24)
    return bytes(out) * 3


class Peer:
    """A network namespace with a bridge, and threads in it that talk."""

    def __init__(self, host):
        self.name = f"stasis-peer-{os.getpid()}"
        sh("ip", "netns", "add", self.name)
        host.undo.append(lambda: sh("ip", "netns", "del", self.name))
        self.ip("link", "set", "lo", "up")
        self.ip("link", "add", "br0", "type", "bridge")
        self.ip("link", "set", "br0", "up")
        self.ip("addr", "add", "10.77.0.1/24", "dev", "br0")
        self.ip("addr", "add", "fd77::1/64", "dev", "br0", "nodad")

    def ip(self, *words):
        return sh("ip", "-n", self.name, *words)

    def enter(self):
        """Moves the calling thread, and only it."""
        fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(fd)

    def connect(self, address, port):
        """A connection from there."""
        opened = []

        def open_in_peer():
            try:
                self.enter()
                opened.append(socket.create_connection((address, port), timeout=60))
            except OSError as e:
                opened.append(e)

        thread = threading.Thread(target=open_in_peer, daemon=True)
        thread.start()
        thread.join(90)
        if not opened or isinstance(opened[0], OSError):
            raise Failed(f"{address} port {port}: {opened}")
        return opened[0]


class Stream:
    """One connection to the server: a thread that sends, one that hears."""

    def __init__(self, peer, address, bytes_table):
        self.table, self.sent, self.heard, self.trailer = bytes_table, 0, 0, b""
        self.error, self.stop = None, threading.Event()
        self.last = bytearray()
        self.socket = peer.connect(address, PORT)
        self.threads = [threading.Thread(target=self.guard, args=(f,), daemon=True) for f in (self.send, self.hear)]
        for t in self.threads:
            t.start()

    def guard(self, work):
        try:
            work()
        except Exception as e:  # told by finish()
            self.error = self.error or e

    def send(self):
        while not self.stop.is_set():
            at = self.sent % PERIOD
            self.sent += self.socket.send(self.table[at:at + 20000])
        self.socket.shutdown(socket.SHUT_WR)

    def hear(self):
        while data := self.socket.recv(65536):
            # The last 16 bytes are the trailer, so as many are kept back.
            self.last += data
            body, self.last = self.last[:-16], self.last[-16:]
            at = self.heard % PERIOD
            if body != self.table[at:at + len(body)]:
                raise Failed(f"wrong bytes after {self.heard}")
            self.heard += len(body)

    def finish(self):
        self.stop.set()
        for t in self.threads:
            t.join(120)
        if self.error:
            raise Failed(f"the peer saw {self.error!r}")
        check(not any(t.is_alive() for t in self.threads), "the stream did not end")
        self.socket.close()
        equal(int(self.last, 16), self.sent, "bytes that the server has heard")
        check(self.heard > 0, "the server said nothing")

    def progress(self):
        return self.sent, self.heard


def server(host, spec_of, label="s", **how):
    need("ip")
    real_checkpoints()
    root = host.dir / "rootfs"
    for d in ("proc", "dev", "sys"):
        (root / d).mkdir(parents=True, exist_ok=True)
    program("stream", root)
    spec = config(["/stream"], root=root)
    spec_of(spec)
    return Container(host, label, spec, **how)


def attach(host, peer, number=2):
    """A hook that gives the container its network and its address there, as engines do: a new pair of devices each time."""
    hook = host.dir / f"attach{number}"
    hook.write_text(f"""#!/bin/sh -e
pid=$(sed 's/.*"pid":[ ]*\\([0-9]*\\).*/\\1/')
ip -n {peer.name} link del p{number} || : # it goes by itself with the old network namespace
ip -n {peer.name} link add p{number} type veth peer name eth0 netns $pid
ip -n {peer.name} link set p{number} master br0 up
nsenter -t $pid -n ip addr add 10.77.0.{number}/24 dev eth0
nsenter -t $pid -n ip addr add fd77::{number}/64 dev eth0 nodad
nsenter -t $pid -n ip link set eth0 up
nsenter -t $pid -n ip link set lo up
""")
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    return {"hooks": {"createRuntime": [{"path": str(hook)}]}}


def streams(peer):
    bytes_table = table()
    return [Stream(peer, a, bytes_table) for a in ("10.77.0.2", "fd77::2", "10.77.0.2", "fd77::2")]


def flowing(all_streams, seconds=60):
    """Every stream moves in both directions."""
    before = [s.progress() for s in all_streams]

    def moved():
        for s in all_streams:
            if s.error:
                raise Failed(f"the peer saw {s.error!r}")
        return all(s.sent > b[0] and s.heard > b[1] for s, b in zip(all_streams, before))

    until(moved, "all streams to move on", seconds)


def cycles(c, all_streams, count):
    flowing(all_streams)
    for n in range(count):
        c.checkpoint(f"cycle{n}", "--tcp-established")
        c.restore(f"cycle{n}", "--tcp-established")
        flowing(all_streams)


def end(c, all_streams):
    for s in all_streams:
        s.finish()
    until(lambda: c.text().count("heard") == len(all_streams), "the server to end its streams")
    check("stream:" not in c.text(), c.text())


def test_peer_of_a_private_network(host: Host):
    """The network goes with the container, and comes back by a hook."""
    peer = Peer(host)
    c = server(host, lambda spec: spec.update(attach(host, peer)))
    c.run()
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    cycles(c, all_streams, 5)
    end(c, all_streams)


def test_migrate(host: Host):
    """To another host, which attaches it to the same network; there and back."""
    peer = Peer(host)
    c, d = (server(host, lambda spec: spec.update(attach(host, peer)), label, store=f"{label}.root") for label in "cd")
    c.run()
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    flowing(all_streams)
    for source, destination in ((c, d), (d, c)):
        refused = source.call("migrate", "--to", "127.0.0.1:1", source.id, ok=None)
        check(refused.returncode != 0, "nobody listens there")
        flowing(all_streams)
        process, address = destination.receive()
        done = source.call("migrate", "--tcp-established", "--to", address, source.id)
        check("has moved" in done.stdout, done.stdout)
        equal(process.wait(60), 0, "the other side's status")
        equal(source.state(), "", "the source is gone")
        flowing(all_streams)
    for s in all_streams:
        s.finish()
    until(lambda: (host.dir / f"{c.id}.receive").read_text().count("heard") == len(all_streams), "the server to end its streams")


def joined(host, peer):
    """A network namespace that outlives the container."""
    name = f"stasis-net-{os.getpid()}"
    sh("ip", "netns", "add", name)
    host.undo.append(lambda: sh("ip", "netns", "del", name))
    peer.ip("link", "add", "p0", "type", "veth", "peer", "name", "eth0", "netns", name)
    peer.ip("link", "set", "p0", "master", "br0", "up")
    for words in (("addr", "add", "10.77.0.2/24", "dev", "eth0"), ("addr", "add", "fd77::2/64", "dev", "eth0", "nodad"),
                  ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):
        sh("ip", "-n", name, *words)

    def change(spec):
        spaces = [n for n in spec["linux"]["namespaces"] if n["type"] != "network"]
        spec["linux"]["namespaces"] = [*spaces, {"type": "network", "path": f"/run/netns/{name}"}]

    return name, change


def tables(name):
    return sh("ip", "netns", "exec", name, "nft", "list", "tables").stdout


def test_peer_of_a_joined_network(host: Host):
    """The network stays, and must not answer while nobody is there."""
    need("nft")
    peer = Peer(host)
    name, change = joined(host, peer)
    c = server(host, change)
    c.run()
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    flowing(all_streams)
    # Left running: the lock goes at once, and a failed checkpoint leaves none either.
    c.checkpoint("left", "--tcp-established", "--leave-running")
    equal(tables(name), "", "tables after a checkpoint that left the container running")
    flowing(all_streams)
    refused = c.checkpoint("refused", ok=(1,))
    check("--tcp-established" in refused.stderr, refused.stderr)
    # Stopped: it stays until the restore.
    c.checkpoint("stopped", "--tcp-established")
    check("CRIU-" in tables(name), "no lock after a stopping checkpoint")
    time.sleep(2)
    c.restore("stopped", "--tcp-established")
    equal(tables(name), "", "tables after the restore")
    cycles(c, all_streams, 3)
    end(c, all_streams)


def test_killed_checkpoint_unlocks(host: Host):
    """A checkpoint that is killed anywhere leaves the connections usable, after the next command at the latest."""
    need("nft")
    peer = Peer(host)
    name, change = joined(host, peer)
    c = server(host, change)
    c.run()
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    for n in range(40):
        flowing(all_streams)
        command = c.command("checkpoint", "--image-path", host.dir / f"k{n}", "--tcp-established", "--leave-running", c.id)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.002 * (n + 1))
        process.kill()
        process.wait()
        c.call("state", c.id)
        c.call("ps", c.id)
        if left := tables(name):
            record = "".join(f.read_text() for f in (c.store / c.id).glob("recovery.json"))
            # Whoever wants to change the container says why something cannot be undone.
            said = c.call("pause", c.id, ok=None).stderr
            raise Failed(f"after killed checkpoint {n}: {left}on record: {record}\npause: {said}{tail(host.dir / f'k{n}/dump.log')}")
    flowing(all_streams)
    end(c, all_streams)


def test_images_with_connections_need_the_flag(host: Host):
    peer = Peer(host)
    c = server(host, lambda spec: spec.update(attach(host, peer)))
    c.run()
    until(lambda: "ready" in c.text(), "the server")
    stream = Stream(peer, "10.77.0.2", table())
    flowing([stream])
    c.checkpoint("images", "--tcp-established")
    done = c.call("restore", "--detach", "--bundle", c.bundle, "--image-path", host.dir / "images", c.id, ok=None)
    check(done.returncode != 0 and "--tcp-established" in done.stderr + c.text(), done.stderr)
    inventory = json.loads(sh("crit", "decode", "-i", host.dir / "images/inventory.img").stdout)
    equal(inventory["entries"][0].get("network_lock_method"), 1, "the lock that the inventory tells of: nftables")
    c.restore("images", "--tcp-established")
    flowing([stream])
    stream.finish()
