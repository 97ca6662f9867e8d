"""Real programs from Debian, each checkpointed while it works and restored, twice; then it must go on as before.

Their root file system is made by debootstrap, which takes minutes and a gigabyte: `make programs`.
"""
import json
import os
import pathlib
import re
import shutil
import time

import podman
from harness import TARGET, TOP, Container, Skip, check, config, equal, real_checkpoints, sh, until
from tcp import Peer, attach

finish = podman.finish

def container(host, args, **how):
    return Container(host, "c", config(args, root=host.overlay("programs", "root"), **how))


CYCLES = int(os.environ.get("CYCLES", "2"))


def cycles(c, ask, *flags):
    """`ask(n)` must be answered before anything happens, and after each of the restores (CYCLES of them)."""
    real_checkpoints()
    ask(0)
    for n in range(1, CYCLES + 1):
        c.checkpoint(f"image{n}", *flags)
        c.restore(f"image{n}", *flags)
        ask(n)


def get(c, port=80, path="/"):
    return c.exec("curl", "-sS", "--max-time", "20", f"http://127.0.0.1:{port}{path}", ok=None)


def serving(c, port=80):
    until(lambda: get(c, port).returncode == 0, f"an answer on port {port}: {c.text()[-2000:]}", 60)


def put(c, path, text):
    """A file in the container's root file system."""
    target = f"{c.spec['root']['path']}{path}"
    with open(target, "w") as f:
        f.write(text)


def test_nginx(host):
    """A master with its workers, and a listening socket that they share."""
    c = container(host, ["/usr/sbin/nginx", "-g", "daemon off;"])
    put(c, "/var/www/html/index.html", "from nginx")
    c.run()
    serving(c)
    workers = c.exec("pgrep", "-c", "-f", "worker process").stdout

    def ask(n):
        equal(get(c).stdout, "from nginx", "the page")
        # Workers of before the reload may still be on their way out.
        until(lambda: c.exec("pgrep", "-c", "-f", "worker process").stdout == workers, f"{workers} workers")
        c.exec("nginx", "-s", "reload")

    cycles(c, ask)


def test_apache(host):
    """A threaded server with its scoreboard in shared memory and its pipes of death."""
    c = container(host, ["/bin/sh", "-c", ". /etc/apache2/envvars; mkdir -p $APACHE_RUN_DIR; exec apache2 -D FOREGROUND"])
    put(c, "/var/www/html/index.html", "from apache")
    c.run()
    serving(c)

    def ask(n):
        for _ in range(20):
            equal(get(c).stdout, "from apache", "the page")

    cycles(c, ask)


def test_memcached(host):
    """Worker threads with libevent: epoll, eventfds, pipes."""
    c = container(host, ["/usr/bin/memcached", "-u", "nobody", "-l", "127.0.0.1", "-t", "4"])
    c.run()

    def talk(text):
        return c.exec("bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/11211 && printf '{text}quit\\r\\n' >&3 && cat <&3", ok=None).stdout

    until(lambda: "VERSION" in talk("version\\r\\n"), "memcached to answer")
    for i in range(50):
        equal(talk(f"set key{i} 0 0 5\\r\\nabc{i:02}\\r\\n"), "STORED\n", "set")

    def ask(n):
        for i in range(0, 50, 7):
            check(f"abc{i:02}" in talk(f"get key{i}\\r\\n"), f"key{i} is lost")

    cycles(c, ask)


def test_connections(host):
    """A thousand connections to memcached, and nginx with clients that keep theirs alive, from another network namespace."""
    peer = Peer(host)
    c = container(host, ["/bin/sh", "-c", "memcached -u nobody -t 4 -c 2000 & exec nginx -g 'daemon off;'"])
    put(c, "/var/www/html/index.html", "from nginx")
    c.spec.update(attach(host, peer))
    c.spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 4096}]
    (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.run()
    serving(c)
    until(lambda: c.exec("bash", "-c", "exec 3<>/dev/tcp/10.77.0.2/11211", ok=None).returncode == 0, "memcached to listen")
    stored = [peer.connect("10.77.0.2", 11211) for _ in range(1000)]
    kept = [(s, s.makefile("rb")) for s in (peer.connect("10.77.0.2", 80) for _ in range(20))]

    def ask(n):
        for i, connection in enumerate(stored):
            # Some wait for the second half of what they have asked.
            connection.sendall(b"0\r\n" if n and i % 2 else b"set key%d 0 0 2\r\n00\r\n" % i)
        for i, connection in enumerate(stored):
            equal(connection.recv(64), b"STORED\r\n", f"connection {i}")
            if i % 2:
                connection.sendall(b"set key%d 0 0 2\r\n0" % i)
        for connection, answers in kept:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            head = b"".join(iter(answers.readline, b"\r\n"))
            check(head.startswith(b"HTTP/1.1 200"), head)
            equal(answers.read(10), b"from nginx", "the page")

    cycles(c, ask, "--tcp-established")
    for connection in stored:
        connection.close()


NODE = r"""
const http = require('http'), fs = require('fs'), { Worker } = require('worker_threads');
let ticks = 0, read = 0, worked = 0;
setInterval(() => { ticks++; }, 5);
(async () => { for (;;) { await fs.promises.readFile('/etc/passwd'); read++; await new Promise(r => setTimeout(r, 3)); } })();
const w = new Worker(`const { parentPort } = require('worker_threads');
  let n = 0; parentPort.on('message', () => parentPort.postMessage(++n));`, { eval: true });
w.on('message', n => { worked = n; setTimeout(() => w.postMessage('go'), 2); });
w.postMessage('go');
http.createServer((q, s) => s.end(JSON.stringify({ ticks, read, worked, big: Buffer.alloc(1 << 20, 7).length })))
  .listen(8080, '127.0.0.1');
"""


def counters_grow(c, port):
    """The answer's numbers must grow, over a restore and afterwards."""
    last = {}

    def ask(n):
        first = numbers(get(c, port).stdout)
        for name, value in last.items():
            check(first[name] >= value, f"{name} went back from {value} to {first[name]}")

        def grown():
            return all(v > first[k] for k, v in numbers(get(c, port).stdout).items() if k != "big")

        until(grown, f"counters to grow from {first} after {n} restores: {get(c, port).stdout}")
        last.update(numbers(get(c, port).stdout))

    return ask


def numbers(text):
    return {k: int(v) for k, v in re.findall(r'"(\w+)":\s*(\d+)', text)}


def test_node(host):
    """libuv's thread pool, timers, a worker with an engine of its own, just-in-time compiled code."""
    c = container(host, ["/usr/bin/node", "/app.js"])
    put(c, "/app.js", NODE)
    c.run()
    serving(c, 8080)
    time.sleep(0.3)
    cycles(c, counters_grow(c, 8080))


JAVA = r"""
import com.sun.net.httpserver.*; import java.net.*; import java.util.*; import java.util.concurrent.*; import java.util.concurrent.atomic.*;
public class Main {
    static final AtomicLong ticks = new AtomicLong(), hashed = new AtomicLong(), garbage = new AtomicLong();
    public static void main(String[] a) throws Exception {
        var timer = Executors.newScheduledThreadPool(2);
        timer.scheduleAtFixedRate(ticks::incrementAndGet, 1, 5, TimeUnit.MILLISECONDS);
        for (int i = 0; i < 4; i++) new Thread(() -> {
            var d = new byte[32];
            for (;;) { try { d = java.security.MessageDigest.getInstance("SHA-256").digest(d); } catch (Exception e) { System.exit(1); }
                hashed.incrementAndGet(); if (hashed.get() % 1000 == 0) LockTime(); } }).start();
        new Thread(() -> { var l = new ArrayList<byte[]>(); for (;;) { l.add(new byte[10000]); garbage.incrementAndGet();
            if (l.size() > 1000) { l.clear(); LockTime(); } } }).start();
        var s = HttpServer.create(new InetSocketAddress("127.0.0.1", 8080), 0);
        s.createContext("/", x -> { var b = String.format("{\"ticks\": %d, \"hashed\": %d, \"garbage\": %d}", ticks.get(), hashed.get(), garbage.get()).getBytes();
            x.sendResponseHeaders(200, b.length); x.getResponseBody().write(b); x.close(); });
        s.start();
    }
    static void LockTime() { try { Thread.sleep(1); } catch (InterruptedException e) { System.exit(2); } }
}
"""


def test_java(host):
    """A JVM: dozens of threads, guard pages, its own signal handlers, perf data file, garbage collection."""
    c = container(host, ["/usr/bin/java", "-Xmx256m", "/Main.java"])
    put(c, "/Main.java", JAVA)
    c.run()
    serving(c, 8080)
    cycles(c, counters_grow(c, 8080))


NO_URING = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO"}]}


def test_mariadb(host):
    """Threads that wait in every way, tablespaces open, a unix socket."""
    mariadb(host, "--innodb-use-native-aio=0")


def test_mariadb_aio(host):
    """The same with Linux AIO, as under Docker, whose seccomp filter forbids io_uring; tables are read past the page cache."""
    mariadb(host, "--innodb-use-native-aio=1 --innodb-flush-method=O_DIRECT --innodb-buffer-pool-size=6M", NO_URING)


def mariadb(host, flags, seccomp=None):
    flags += " --skip-networking --socket=/tmp/m.sock --user=mysql"
    # Somebody who reads and writes all the time.
    work = "insert into d.t (h) values (md5(rand())); insert into d.t (h) select h from d.t limit 500; select sum(length(h)) from d.t;"
    client = f"until test -e /tmp/go; do sleep 0.1; done; while echo '{work}'; do sleep 0.01; done | mariadb -S /tmp/m.sock -nN >/tmp/work"
    c = container(host, ["/bin/sh", "-c", f"mkdir -p /run/mysqld; chown mysql /run/mysqld; ({client}) & exec mariadbd {flags}"])
    if seccomp:
        c.spec["linux"]["seccomp"] = seccomp
        (c.bundle / "config.json").write_text(json.dumps(c.spec))
    c.run()

    def sql(text, ok=(0,)):
        return c.exec("mariadb", "-S", "/tmp/m.sock", "-N", "-e", text, ok=ok).stdout

    until(lambda: sql("select 1", ok=None) == "1\n", f"MariaDB to answer: {c.text()[-2000:]}", 90)
    sql("create database d; create table d.t (i int primary key auto_increment, h char(32)) engine=innodb")
    sql("insert into d.t (h) values " + ",".join(f"(md5({i}))" for i in range(1000)))
    total = sql("select count(*), md5(group_concat(h order by i)) from d.t")

    def ask(n):
        equal(sql("select count(*), md5(group_concat(h order by i)) from d.t where i <= 1000"), total, "the table")
        sql("insert into d.t (h) values ('more'); flush tables")

    if seccomp:
        check("[aio]" in open(f"/proc/{c.pid()}/maps").read(), "MariaDB has no rings of Linux AIO")
    c.exec("touch", "/tmp/go")
    lines = lambda: len(c.exec("cat", "/tmp/work", ok=None).stdout.splitlines())  # noqa: E731
    until(lambda: lines() > 3, "the work to begin")
    cycles(c, lambda n: (ask(n), goes_on(lines)), "--file-locks")


def goes_on(count):
    before = count()
    until(lambda: count() > before + 2, "the work to go on", 60)


def test_tmux(host):
    """A terminal multiplexer with two shells: ptys, sessions, a unix socket."""
    loop = "i=0; while :; do echo n$i; i=$((i+1)); sleep 0.05; done"
    c = container(host, ["/bin/sh", "-c", f"tmux -S /t new-session -d -s one '{loop}'; tmux -S /t new-window -t one sh; exec sleep 100000"])
    c.run()

    def pane(window):
        return c.exec("tmux", "-S", "/t", "capture-pane", "-p", "-t", f"one:{window}", ok=None).stdout

    until(lambda: re.search(r"^n\d", pane(0), re.M), "output in the pane", 30)

    def ask(n):
        last = int(re.findall(r"^n(\d+)", pane(0), re.M)[-1])
        until(lambda: int(re.findall(r"^n(\d+)", pane(0), re.M)[-1]) > last + 2, "the loop to go on")
        c.exec("tmux", "-S", "/t", "send-keys", "-t", "one:1", f"echo answer $((40+{n}))", "Enter")
        until(lambda: f"\nanswer {40 + n}" in pane(1), f"the shell to answer: {pane(1)}")

    cycles(c, ask)


GO = r"""
package main
import ("fmt"; "net/http"; "sync/atomic"; "time"; "crypto/sha256")
var ticks, hashed, sent atomic.Int64
func main() {
    go func() { for range time.Tick(3 * time.Millisecond) { ticks.Add(1) } }()
    for i := 0; i < 50; i++ { go func() { d := []byte("x"); for { s := sha256.Sum256(d); d = s[:]; hashed.Add(1); time.Sleep(time.Millisecond) } }() }
    c := make(chan []byte)
    go func() { for { c <- make([]byte, 100000) } }()
    go func() { for range c { sent.Add(1); time.Sleep(100 * time.Microsecond) } }()
    http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
        fmt.Fprintf(w, "{\"ticks\": %d, \"hashed\": %d, \"sent\": %d}", ticks.Load(), hashed.Load(), sent.Load()) })
    panic(http.ListenAndServe("127.0.0.1:8080", nil))
}
"""


def test_go(host):
    """Go's scheduler: signals for preemption, futexes, epoll, timers of its own."""
    c = container(host, ["/bin/sh", "-c", "mkdir -p /go && cd /go && go build -o /server /main.go && exec /server"], env=["HOME=/go", "GO111MODULE=off"])
    put(c, "/main.go", GO)
    c.run()
    until(lambda: get(c, 8080).returncode == 0, f"the server: {c.text()[-2000:]}", 180)
    cycles(c, counters_grow(c, 8080))


# Asks again and again, over one connection.
ASK = r"""
until (exec 3<>/dev/tcp/127.0.0.1/8080) 2>/dev/null; do sleep 0.05; done
exec 3<>/dev/tcp/127.0.0.1/8080
while printf 'GET / HTTP/1.1\r\n\r\n' >&3; do
    while read -r -u 3 line || exit 1; [ "$line" != $'\r' ]; do :; done
    read -r -d '}' -u 3 line || exit 2
    printf . >>/asked
    sleep 0.02
done
echo the connection has ended
"""


def test_rust(host):
    """tokio: tasks on a few threads, channels, timers, sockets, children with pipes, signals; and a client that stays."""
    if not shutil.which("cargo"):
        raise Skip("cargo is not installed")
    package, made = TOP / "integration/programs/server", TARGET / "server"
    built = sh("cargo", "build", "--release", "--locked", "--target-dir", made, cwd=package, ok=None, timeout=900)
    if built.returncode and "failed to download" in built.stderr:
        raise Skip("the crates of the server can't be fetched here")
    equal(built.returncode, 0, built.stderr)
    c = container(host, ["/bin/sh", "-c", "bash /ask & exec /server"])
    root = pathlib.Path(c.spec["root"]["path"])
    shutil.copy(next(made.glob("*/release/server")), root / "server")
    put(c, "/ask", ASK)
    c.run()
    serving(c, 8080)
    asked = lambda: (root / "asked").stat().st_size if (root / "asked").exists() else 0  # noqa: E731
    grow = counters_grow(c, 8080)

    def ask(n):
        grow(n)
        before = asked()
        until(lambda: asked() > before + 3, "the client to be answered")

    cycles(c, ask, "--tcp-established")
    equal(c.text(), "", "what the client says")


PYTHON = r"""
import asyncio, json, multiprocessing as mp, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
manager_value, squares = mp.Value('l', 0), mp.Value('l', 0)
def worker(q, r):
    while True:
        r.put(q.get() ** 2)
def feeder(q, r):
    n = 0
    while True:
        q.put(n); assert r.get() >= 0; n += 1; squares.value = n; time.sleep(0.002)
loops = 0
def aio():
    async def tick():
        global loops
        while True:
            await asyncio.sleep(0.003); loops += 1
    async def pipe():
        p = await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1)
        while True:
            p.stdin.write(b'line\n'); await p.stdin.drain(); assert await p.stdout.readline() == b'line\n'
            with manager_value.get_lock(): manager_value.value += 1
            await asyncio.sleep(0.002)
    async def both(): await asyncio.gather(tick(), pipe())
    asyncio.run(both())
class H(BaseHTTPRequestHandler):
    def do_GET(self):
        b = json.dumps({'squares': squares.value, 'loops': loops, 'lines': manager_value.value}).encode()
        self.send_response(200); self.send_header('Content-Length', str(len(b))); self.end_headers(); self.wfile.write(b)
    def log_message(self, *a): pass
if __name__ == '__main__':
    q, r = mp.Queue(), mp.Queue()
    [mp.Process(target=worker, args=(q, r), daemon=True).start() for _ in range(3)]
    mp.Process(target=feeder, args=(q, r), daemon=True).start()
    threading.Thread(target=aio, daemon=True).start()
    ThreadingHTTPServer(('127.0.0.1', 8080), H).serve_forever()
"""


def test_python_multiprocessing(host):
    """Queues over pipes with POSIX semaphores in shared memory, asyncio with a subprocess."""
    c = container(host, ["/usr/bin/python3", "-u", "/app.py"])
    put(c, "/app.py", PYTHON)
    c.run()
    serving(c, 8080)
    cycles(c, counters_grow(c, 8080))


def test_php(host):
    c = container(host, ["/usr/bin/php", "-S", "127.0.0.1:8080", "-t", "/srv"], env=["PHP_CLI_SERVER_WORKERS=3"])
    put(c, "/srv/index.php", "<?php echo 6*7;")
    c.run()
    serving(c, 8080)
    cycles(c, lambda n: equal(get(c, 8080).stdout, "42", "the page"))


def test_ruby(host):
    c = container(host, ["/usr/bin/ruby", "/app.rb"])
    put(c, "/app.rb", r"""
require 'socket'
$ticks = $pipe = 0
Thread.new { loop { sleep 0.003; $ticks += 1 } }
r, w = IO.pipe
fork { r.close; loop { w.write 'x'; sleep 0.003 } }
w.close
Thread.new { loop { r.read 1; $pipe += 1 } }
s = TCPServer.new '127.0.0.1', 8080
loop { Thread.start(s.accept) { |c| c.gets; b = %({"ticks": #{$ticks}, "pipe": #{$pipe}}); c.write "HTTP/1.0 200 OK\r\nContent-Length: #{b.size}\r\n\r\n#{b}"; c.close } }
""")
    c.run()
    serving(c, 8080)
    cycles(c, counters_grow(c, 8080))


def test_perl(host):
    c = container(host, ["/usr/bin/perl", "-e", '$|=1; $SIG{ALRM}=sub{$a++; alarm 1}; alarm 1; for($i=0;;$i++){ print "n$i $a\\n"; select undef,undef,undef,0.02 }'])
    c.run()

    def ask(n):
        reached = c.text().count("\nn")
        until(lambda: c.text().count("\nn") > reached + 70, "perl to count")
        lines = [int(x) for x in re.findall(r"^n(\d+) ", c.text(), re.M)]
        equal(lines, list(range(len(lines))), "what perl counted")

    cycles(c, ask)


def test_make(host):
    """Forks and execs all the time: a checkpoint finds processes at every stage of their lives."""
    real_checkpoints()
    c = container(host, ["/bin/sh", "-c", "cd /src && make -s -j4 all && echo built && ./all"])
    root = c.spec["root"]["path"]
    os.makedirs(f"{root}/src")
    count = 60
    for i in range(count):
        put(c, f"/src/f{i}.c", "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n"
            + "".join(f"int f{i}_{j}(int x) {{ return x * {j} + {i}; }}\n" for j in range(200)))
    put(c, "/src/main.c", "#include <stdio.h>\n" + "".join(f"int f{i}_7(int);\n" for i in range(count))
        + "int main(void) { long s = 0;\n" + "".join(f"s += f{i}_7(1);\n" for i in range(count)) + 'printf("sum %ld\\n", s); }\n')
    put(c, "/src/Makefile", "O = $(patsubst %.c,%.o,$(wildcard *.c))\nall: $(O)\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -O2 -c -o $@ $<\n")
    c.run()
    taken = 0
    while c.state() == "running" and taken < 12:
        time.sleep(0.15)
        done = c.checkpoint(f"image{taken}", ok=None)
        if done.returncode:
            check(c.state() in ("running", "stopped"), f"after a refusal: {c.state()}\n{done.stderr}")
            # vfork(2)'s parent waits in the kernel; the next moment is a better one.
            check("vfork" in done.stderr or c.state() == "stopped", done.stderr)
            continue
        c.restore(f"image{taken}")
        taken += 1
    until(lambda: c.state() == "stopped", f"the build to end: {c.text()[-1000:]}", 120)
    check("built\n" in c.text() and f"sum {sum(7 + i for i in range(count))}\n" in c.text(), c.text()[-3000:])
    check(taken >= 3, f"only {taken} checkpoints were taken")


def test_cron(host):
    c = container(host, ["/bin/sh", "-c", "echo '* * * * * root date >>/ran' >/etc/cron.d/t; exec cron -f"])
    c.run()
    until(lambda: "cron" in c.exec("pgrep", "-l", "cron").stdout, "cron")
    cycles(c, lambda n: check("cron" in c.exec("pgrep", "-l", "cron").stdout, "cron is gone"), "--file-locks")


def test_systemd(host):
    """systemd as init: sockets that it listens on for others, timers, control groups, the journal, a login prompt."""
    real_checkpoints()

    def scratch(where, *options):
        return {"destination": where, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", *options]}

    spec = config(["/sbin/init"], root=host.overlay("systemd", "root"), tty=True, env=["container=podman"],
                  mounts=[scratch("/run", "mode=755"), scratch("/run/lock"), scratch("/tmp", "mode=1777")])
    groups = next(m for m in spec["mounts"] if m["type"] == "cgroup")
    groups["options"].remove("ro")
    spec["linux"]["namespaces"].append({"type": "cgroup"})
    # As under Podman's profile, where services get no keys.
    spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW",
                                "syscalls": [{"names": ["add_key"], "action": "SCMP_ACT_ERRNO"}]}
    spec["process"]["noNewPrivileges"] = False
    c = Container(host, "c", spec)
    c.run()

    def systemctl(*words):
        return c.exec("systemctl", *words, ok=None).stdout.strip()

    until(lambda: systemctl("is-system-running") == "running", f"systemd is up: {c.text()[-2000:]}", 120)
    c.exec("systemd-run", "--unit=count", "sh", "-c", "n=0; while sleep 0.1; do n=$((n+1)); echo $n >/tmp/n; done")
    counted = lambda: int(c.exec("cat", "/tmp/n", ok=None).stdout or 0)  # noqa: E731
    until(lambda: counted() > 2, "the service counts")
    ids = systemctl("show", "--property=MainPID", "--property=InvocationID", "cron", "count", "ssh")

    for n in range(1, CYCLES + 1):
        c.exec("systemd-run", "--on-active=2s", "--timer-property=AccuracySec=100ms",
               f"--unit=later{n}", "touch", f"/tmp/later{n}")
        before = counted()
        # Now and then systemd has not read its inotify events yet.
        until(lambda: c.checkpoint(f"image{n}", "--file-locks", ok=None).returncode == 0, "the checkpoint", 60)
        c.restore(f"image{n}", "--file-locks")
        equal(systemctl("is-system-running"), "running", f"the state after restore {n}")
        equal(systemctl("show", "--property=MainPID", "--property=InvocationID", "cron", "count", "ssh"), ids, "the services")
        until(lambda: counted() > before, "the service counts on")
        until(lambda: c.exec("ls", f"/tmp/later{n}", ok=None).returncode == 0, "the timer", 20)
        c.exec("systemctl", "restart", "nginx")
        check("nginx" in get(c).stdout, "no page from nginx")
        c.exec("systemd-cat", "echo", f"after restore {n}")
        until(lambda: f"after restore {n}" in c.exec("journalctl", "--no-pager").stdout, "the journal goes on")
        check("Reached target" in c.exec("journalctl", "--no-pager").stdout, "the journal has lost its beginning")
    equal(systemctl("is-failed", "count"), "active", "the service")


def test_systemd_podman(host):
    """The same as Podman sets it up, with its own mounts of control groups."""
    real_checkpoints()
    p = podman.podman(host)
    p.run("-d", "--name", "s", "--systemd=always", "--rootfs", host.overlay("systemd", "root"), "/sbin/init")
    state = lambda: p("exec", "s", "systemctl", "is-system-running", ok=None).stdout.strip()  # noqa: E731
    until(lambda: state() == "running", "systemd is up", 120)
    for _ in range(CYCLES):
        until(lambda: p("container", "checkpoint", "--file-locks", "s", ok=None).returncode == 0, "the checkpoint", 60)
        podman.restore(p, "--file-locks", "s")
        equal(state(), "running", "the state after the restore")
        p("exec", "s", "systemctl", "restart", "nginx")
        check("nginx" in p("exec", "s", "curl", "-sS", "http://127.0.0.1/").stdout, "no page from nginx")
