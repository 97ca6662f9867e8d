"""Real services whose clients, in another network namespace, stay connected across checkpoints."""
import os
import re
import struct

from by_hand import bind
from harness import Container, Failed, Host, check, config, equal, real_checkpoints, until
from tcp import Peer, attach

ESTABLISHED = "--tcp-established"


def cycle(c, name):
    c.checkpoint(name, ESTABLISHED)
    c.restore(name, ESTABLISHED)


def redis(host, peer, number, *more):
    server = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp",
              "--enable-debug-command", "yes", *more]
    spec = config(server, root=host.overlay("redis", f"redis{number}"))
    spec.update(attach(host, peer, number))
    c = Container(host, f"redis{number}", spec)
    c.run()

    def ask(*words, **how):
        return c.exec("redis-cli", *words, **how).stdout.strip()

    until(lambda: ask("ping", ok=None) == "PONG", "redis to answer")
    return c, ask


def test_redis_replication(host: Host):
    """A primary and its replica, checkpointed in turn while data flow between them: they go on without a new start."""
    real_checkpoints()
    peer = Peer(host)
    (primary, ask), (replica, ask_replica) = redis(host, peer, 2), redis(host, peer, 3, "--replicaof", "10.77.0.2 6379")
    until(lambda: "master_link_status:up" in ask_replica("info", "replication"), "the link")

    def same():
        ask("eval", "for i = 1, 1000 do redis.call('set', KEYS[1] .. i, i) end", "1", f"key{len(keys)}:")
        keys.append(1000)
        until(lambda: ask_replica("dbsize") == str(sum(keys)), "the replica to have all keys")
        equal(ask_replica("debug", "digest"), ask("debug", "digest"), "what both have")

    keys = []
    # In a stream of commands, not in the first transfer.
    ask("set", "0", "0")
    keys.append(1)
    same()
    for n in range(2):
        cycle(replica, f"replica{n}")
        same()
        cycle(primary, f"primary{n}")
        same()
        # What is written while the replica does not exist waits in the primary.
        replica.checkpoint("gone", ESTABLISHED)
        ask("set", f"while{n}", "x" * 100000)
        keys.append(1)
        replica.restore("gone", ESTABLISHED)
        same()
    statistics = ask("info", "stats")
    check(re.search(r"sync_full:1\b", statistics) and re.search(r"sync_partial_ok:0\b", statistics), f"a new start: {statistics}")


class Postgres:
    """A session, by the simple query protocol; nobody is asked for a password."""

    def __init__(self, peer, address):
        self.socket = peer.connect(address, 5432)
        self.file = self.socket.makefile("rb")
        words = b"user\0postgres\0database\0postgres\0\0"
        self.socket.sendall(struct.pack("!II", 8 + len(words), 3 << 16) + words)
        self.answer()

    def answer(self):
        rows = []
        while True:
            head = self.file.read(5)
            if len(head) < 5:
                raise Failed("PostgreSQL has ended the session")
            kind, length = head[:1], struct.unpack("!I", head[1:])[0]
            body = self.file.read(length - 4)
            if kind == b"E":
                raise Failed(f"PostgreSQL says {body}")
            if kind == b"D":
                rows.append(body[6:].decode())
            if kind == b"Z":
                return rows

    def __call__(self, text):
        text = text.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!I", 4 + len(text)) + text)
        return self.answer()


def test_postgres_sessions(host: Host):
    """Sessions with an open transaction, a lock that one waits for, prepared statements, temporary tables."""
    real_checkpoints()
    peer = Peer(host)
    data = host.dir / "data"
    data.mkdir(mode=0o777)
    os.chown(data, 105, 105)
    bin_ = "/usr/lib/postgresql/15/bin"
    script = (f"set -e; {bin_}/initdb -D /data/db -A trust -U postgres -N >/dev/null; "
              "echo 'host all all 10.77.0.0/24 trust' >>/data/db/pg_hba.conf; "
              f"exec {bin_}/postgres -D /data/db -k /data -c listen_addresses='*' -c shared_buffers=16MB -c jit=off")
    spec = config(["/bin/sh", "-c", script], root=host.overlay("postgres", "postgres"), user=(105, 105),
                  mounts=[bind(data, "/data")], env=["LC_ALL=C", "HOME=/data"])
    spec.update(attach(host, peer))
    c = Container(host, "postgres", spec)
    c.run()
    ready = f"{bin_}/pg_isready"
    until(lambda: "accepting" in c.exec(ready, "-h", "10.77.0.2", ok=None).stdout, f"PostgreSQL to answer: {c.text()}", 60)
    sessions = [Postgres(peer, "10.77.0.2") for _ in range(20)]
    first, second = sessions[:2]
    first("create table t (i int primary key, h text)")
    for n, session in enumerate(sessions):
        session(f"create temp table own as select {n} as n; prepare whose as select n from own")
    for n in range(2):
        first(f"begin; insert into t values ({n}, 'open')")
        # It waits for the other's transaction.
        text = f"insert into t values ({n}, 'late') on conflict do nothing; select 'after'\0".encode()
        second.socket.sendall(b"Q" + struct.pack("!I", 4 + len(text)) + text)
        until(lambda: first("select count(*) from pg_stat_activity where wait_event_type = 'Lock'") == ["1"], "one to wait")
        cycle(c, f"image{n}")
        equal(first(f"select h from t where i = {n}"), ["open"], "what the transaction has written")
        first("commit")
        equal(second.answer(), ["after"], "who waited")
        for n, session in enumerate(sessions):
            equal(session("execute whose"), [str(n)], "each session's own")
    equal(first("select count(*) from t where h = 'open'"), ["2"], "the rows")
    for session in sessions:
        session.socket.close()
