"""Threads of several kinds, and a unix socket at which they can be asked how they are.

Each counter hashes its own number again and again, so that a lost, doubled or spoiled step shows; others hand numbers on
through a queue, sleep on a timer, wait on a condition.
"""
import hashlib
import json
import os
import queue
import socket
import threading
import time

COUNTERS = 8
state = [(0, hashlib.sha256(b"0").hexdigest())] * COUNTERS
local = threading.local()
handed = queue.Queue(16)
taken = 0
ticks = 0
condition = threading.Condition()
turns = 0


def count(which):
    local.n, local.digest = 0, hashlib.sha256(b"0").hexdigest()
    while True:
        local.n += 1
        local.digest = hashlib.sha256(local.digest.encode()).hexdigest()
        state[which] = (local.n, local.digest)
        if local.n % 64 == 0:
            time.sleep(0.001)


def give():
    n = 0
    while True:
        n += 1
        handed.put(n)
        if n % 100 == 0:
            time.sleep(0.001)


def take():
    global taken
    while True:
        n = handed.get()
        assert n == taken + 1, (n, taken)
        taken = n


def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1


def turn(mine):
    global turns
    while True:
        with condition:
            condition.wait_for(lambda: turns % 2 == mine)
            turns += 1
            condition.notify_all()
        time.sleep(0.002)


jobs = [(count, (i,)) for i in range(COUNTERS)] + [(give, ()), (take, ()), (tick, ()), (turn, (0,)), (turn, (1,))]
threads = [threading.Thread(target=f, args=a, daemon=True) for f, a in jobs]
for t in threads:
    t.start()

tcp = socket.create_server(("127.0.0.1", 8080))  # listens, and nobody comes
server = socket.socket(socket.AF_UNIX)
os.chdir("/data")
server.bind("threads.sock")
server.listen(8)
print("serving", flush=True)
while True:
    connection, _ = server.accept()
    answer = {
        "state": list(state), "taken": taken, "ticks": ticks, "turns": turns,
        "alive": [t.is_alive() for t in threads], "tids": [t.native_id for t in threads],
        "listening": tcp.getsockname(),
    }
    with connection:
        connection.sendall(json.dumps(answer).encode())
