"""A client of the streams that a CRI service opens for exec and attach: a WebSocket, as kubectl's newer ones use.

```text
   every message, both ways:   one byte, which stream: 0 input, 1 output, 2 errors, 3 how it ended (JSON), 4 size of the terminal
```
"""

import base64
import ctypes
import json
import os
import socket
import struct
import threading
import urllib.parse

from harness import PATIENCE, check, until


def connect(network, address):
    """A connection out of another network namespace: a thread goes there, and the socket stays with it."""
    made = []

    def go():
        with open(network) as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) != 0:
                made.append(OSError(ctypes.get_errno(), f"setns to {network}"))
                return
        try:
            made.append(socket.create_connection(address, timeout=60 * PATIENCE))
        except OSError as e:
            made.append(e)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


class Streams:
    """One connection. What has come so far is in `output` and `errors`; `ended` is the JSON of the end."""

    def __init__(self, url, network):
        """`network` is the network namespace of whoever listens."""
        parts = urllib.parse.urlsplit(url)
        self.socket = connect(network, (parts.hostname, parts.port))
        key = base64.b64encode(os.urandom(16)).decode()
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        self.socket.sendall((f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Origin: http://{parts.netloc}\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
                             "Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n").encode())
        self.file = self.socket.makefile("rb")
        status = self.file.readline()
        check(b" 101 " in status, f"{url}: {status} {self.file.peek()[:300]}")
        while self.file.readline().strip():
            pass
        self.streams, self.closed = {1: b"", 2: b"", 3: b""}, False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while head := self.file.read(2):
                code, length = head[0] & 0xF, head[1] & 0x7F
                if length == 126:
                    (length,) = struct.unpack(">H", self.file.read(2))
                elif length == 127:
                    (length,) = struct.unpack(">Q", self.file.read(8))
                data = self.file.read(length)
                if code == 8:
                    break
                if code in (1, 2) and data:
                    self.streams[data[0]] = self.streams.get(data[0], b"") + data[1:]
        except OSError:
            pass  # it was closed
        self.closed = True

    def send(self, stream, data):
        content = bytes([stream]) + data
        mask = os.urandom(4)
        check(len(content) < 126, "a message of this client is short")
        masked = bytes(b ^ mask[i % 4] for i, b in enumerate(content))
        self.socket.sendall(bytes([0x82, 0x80 | len(content)]) + mask + masked)

    def type(self, text):
        self.send(0, text.encode())

    def resize(self, width, height):
        self.send(4, json.dumps({"Width": width, "Height": height}).encode())

    @property
    def output(self):
        return self.streams[1].decode()

    @property
    def errors(self):
        return self.streams[2].decode()

    def end(self):
        """How the command ended: its exit code."""
        until(lambda: self.streams[3] or self.closed, "the end of the stream")
        ended = json.loads(self.streams[3] or b"{}")
        if ended.get("status") == "Success":
            return 0
        causes = ended.get("details", {}).get("causes", [])
        codes = [int(c["message"]) for c in causes if c.get("reason") == "ExitCode"]
        check(codes, f"an end without an exit code: {ended}")
        return codes[0]

    def close(self):
        self.socket.close()
