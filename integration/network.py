"""`checkpoint --keep-network`: what a container has outside of its own network namespace. The runtime runs in a network
namespace of its own, which takes the place of the host's."""
import json

from harness import Container, Failed, Host, check, config, equal, need, program, real_checkpoints, sh, until
from tcp import Peer, end, flowing, streams


class Inside(Container):
    """Its runtime is in the namespace of the peer."""

    peer = None

    def command(self, *words):
        return ["nsenter", f"--net=/run/netns/{self.peer.name}", *super().command(*words)]

    def ip(self, *words, **how):
        return sh("nsenter", "-t", self.pid(), "-n", "ip", *words, **how).stdout


def container(host, peer, change=lambda spec: None, label="n"):
    need("ip", "nsenter")
    real_checkpoints()
    root = host.dir / "rootfs"
    for d in ("proc", "dev", "sys"):
        (root / d).mkdir(parents=True, exist_ok=True)
    program("stream", root)
    spec = config(["/stream"], root=root)
    change(spec)
    c = Inside(host, label, spec)
    c.peer = peer
    return c


def connect(c):
    """A pair of devices between the container and the bridge."""
    c.peer.ip("link", "add", "p2", "type", "veth", "peer", "name", "eth0", "netns", c.pid())
    c.peer.ip("link", "set", "p2", "master", "br0", "up")
    c.ip("link", "set", "eth0", "mtu", "1400", "address", "02:00:00:00:00:42")
    c.ip("addr", "add", "10.77.0.2/24", "dev", "eth0")
    c.ip("addr", "add", "fd77::2/64", "dev", "eth0", "nodad")
    c.ip("link", "set", "eth0", "up")
    c.ip("route", "add", "default", "via", "10.77.0.1", "metric", "7")


def told(c):
    """Addresses and routes as `ip` tells them."""
    addresses = [[(a["local"], a["prefixlen"]) for a in d["addr_info"]] for d in json.loads(c.ip("-j", "addr"))]
    devices = [(d["ifindex"], d["ifname"], d.get("address"), d["mtu"]) for d in json.loads(c.ip("-j", "addr"))]
    return devices, addresses, json.loads(c.ip("-j", "route"))


def names(peer):
    return {d["ifname"]: d for d in json.loads(sh("ip", "-n", peer.name, "-j", "link").stdout)}


def test_pair_with_its_other_end_outside(host: Host):
    """Connections go on over a new pair, which is a port of the old bridge."""
    peer = Peer(host)
    c = container(host, peer)
    c.run()
    connect(c)
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    flowing(all_streams)
    before = told(c)
    for n in range(3):
        c.checkpoint(f"set{n}", "--tcp-established", "--keep-network")
        check("p2" not in names(peer), "the other end is still there")
        c.restore(f"set{n}", "--tcp-established", "--external", "veth[eth0]=p2@br0")
        equal(told(c), before, "the network of the container")
        flowing(all_streams)
    # As CRIU spells it; under another name.
    c.checkpoint("renamed", "--tcp-established", "--keep-network")
    c.restore("renamed", "--tcp-established", "--external", "veth[eth0]:other@br0")
    equal(names(peer)["other"]["master"], "br0", "the bridge of the other end")
    flowing(all_streams)
    end(c, all_streams)


def test_pair_under_its_old_name(host: Host):
    """Without a word about it the other end is there again, down, and whoever wants to connects it."""
    peer = Peer(host)
    c = container(host, peer)
    c.run()
    connect(c)
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    flowing(all_streams)
    c.checkpoint("set", "--tcp-established", "--keep-network")
    c.restore("set", "--tcp-established")
    link = names(peer)["p2"]
    check("master" not in link and "UP" not in link["flags"], str(link))
    peer.ip("link", "set", "p2", "master", "br0", "up")
    flowing(all_streams)
    # One that is taken is named, and nothing stays behind.
    c.checkpoint("taken", "--tcp-established", "--keep-network")
    peer.ip("link", "add", "p2", "type", "bridge")
    try:
        c.restore("taken", "--tcp-established")
        raise Failed("a restore whose device is there already succeeded")
    except Failed as e:
        check("--external veth[eth0]=NAME" in str(e), str(e))
    peer.ip("link", "del", "p2")
    c.restore("taken", "--tcp-established", "--external", "veth[eth0]=p2@br0")
    flowing(all_streams)
    end(c, all_streams)


def test_migrate(host: Host):
    """The network goes along, to a host on the same bridge."""
    peer = Peer(host)
    c, d = container(host, peer, label="c"), container(host, peer, label="d")
    d.store = host.dir / "d.root"
    c.run()
    connect(c)
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    flowing(all_streams)
    before = told(c)
    for n, (source, destination) in enumerate(((c, d), (d, c))):
        process, address = destination.receive("--external", f"veth[eth0]=q{n}@br0")
        done = source.call("migrate", "--tcp-established", "--keep-network", "--to", address, source.id)
        check("has moved" in done.stdout, done.stdout)
        equal(process.wait(60), 0, "the other side's status")
        equal({name for name in names(peer) if name[0] in "pq"}, {f"q{n}"}, "the other ends")
        equal(told(destination), before, "the network of the container")
        flowing(all_streams)
    for s in all_streams:
        s.finish()


def test_device_of_config_json(host: Host):
    """A device that netDevices moves in goes back with the container, and comes again with what it had."""
    peer = Peer(host)
    c = container(host, peer, lambda spec: spec["linux"].update(netDevices={"d0": {"name": "eth0"}}))
    peer.ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
    peer.ip("link", "set", "d1", "master", "br0", "up")
    peer.ip("addr", "add", "10.77.0.2/24", "dev", "d0")
    c.run()
    c.ip("addr", "add", "fd77::2/64", "dev", "eth0", "nodad")
    c.ip("route", "add", "default", "via", "10.77.0.1", "metric", "7")
    until(lambda: "ready" in c.text(), "the server")
    all_streams = streams(peer)
    flowing(all_streams)
    before = told(c)
    for n in range(2):
        c.checkpoint(f"set{n}", "--tcp-established", "--keep-network")
        check("d0" in names(peer), "the device has not come back")
        c.restore(f"set{n}", "--tcp-established")
        equal(told(c), before, "the network of the container")
        flowing(all_streams)
    end(c, all_streams)


def test_macvlan(host: Host):
    """What it lies on is for the new place to say."""
    peer = Peer(host)
    c = container(host, peer)
    c.run()
    until(lambda: "ready" in c.text(), "the server")
    peer.ip("link", "add", "low0", "type", "veth", "peer", "name", "low1")
    peer.ip("link", "set", "low0", "up")
    peer.ip("link", "set", "low1", "master", "br0", "up")
    done = sh("ip", "-n", peer.name, "link", "add", "link", "low0", "name", "eth0", "netns", c.pid(), "type", "macvlan",
              "mode", "bridge", ok=None)
    if done.returncode:
        need("a kernel with macvlan")
    c.ip("addr", "add", "10.77.0.2/24", "dev", "eth0")
    c.ip("addr", "add", "fd77::2/64", "dev", "eth0", "nodad")
    c.ip("link", "set", "eth0", "up")
    all_streams = streams(peer)
    flowing(all_streams)
    before = told(c)
    c.checkpoint("set", "--tcp-established", "--keep-network")
    try:
        c.restore("set", "--tcp-established")
        raise Failed("a restore without the device below succeeded")
    except Failed as e:
        check("needs a device outside that it lies on, which was low0" in str(e), str(e))
    c.restore("set", "--tcp-established", "--external", "macvlan[eth0]=low0")
    equal(told(c), before, "the network of the container")
    flowing(all_streams)
    end(c, all_streams)


def test_joined_networks_stay_as_they_are(host: Host):
    """One that others have too is not saved, and not changed."""
    peer = Peer(host)
    path = f"/run/netns/{peer.name}"

    def join(spec):
        spaces = [n for n in spec["linux"]["namespaces"] if n["type"] != "network"]
        spec["linux"]["namespaces"] = [*spaces, {"type": "network", "path": path}]

    joined, own = container(host, peer, join, "joined"), container(host, peer, label="own")
    joined.run()
    refused = joined.checkpoint("joined", "--keep-network", ok=(1,))
    check(f"the network namespace {path} belongs to others, too" in refused.stderr, refused.stderr)
    joined.call("delete", "--force", joined.id)
    own.run()
    own.ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
    until(lambda: "ready" in own.text(), "the server")
    own.checkpoint("own", "--keep-network")
    before = names(peer)
    try:
        joined.restore("own")
        raise Failed("a restore into a joined network succeeded")
    except Failed as e:
        check("stays as it is" in str(e) and "--empty-ns network" in str(e), str(e))
    joined.restore("own", "--empty-ns", "network")
    equal(set(names(peer)), set(before), "the devices of the joined network")
