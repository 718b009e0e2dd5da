"""A server between a client and S3 that counts what passes, and can be told to misbehave."""

import random
import socket
import socketserver
import threading
import time
from typing import Any, Self

CHUNK = 65536
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy(socketserver.ThreadingTCPServer):
    """Passes bytes on between 127.0.0.1:`port` and `upstream`, a port of the same machine.

    Of the connections, the share `refused` is answered with 503; after each 64 kB the share `cut` is broken off. What
    is asked is passed on `delay` seconds later. Of the next `garbled` answers that have a body, a bit of it is wrong.
    The next `refusals` connections are answered with 503.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: int, refused: float = 0.0, cut: float = 0.0, seed: int = 0) -> None:
        self.upstream, self.refused, self.cut = upstream, refused, cut
        self.random, self.delay = random.Random(seed), 0.0
        self.garbled = self.refusals = 0
        self.received = self.num_refused = self.num_cut = 0  # bytes from the server, connections
        super().__init__(("127.0.0.1", 0), _Connection)
        self.port: int = self.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """Broken connections are what it is for."""


class _Connection(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        proxy = self.server
        first = self.request.recv(CHUNK)
        if not first:
            return
        if proxy.refusals or proxy.random.random() < proxy.refused:
            proxy.refusals = max(0, proxy.refusals - 1)
            proxy.num_refused += 1
            self.request.sendall(BUSY)
            return
        with socket.create_connection(("127.0.0.1", proxy.upstream)) as server:
            time.sleep(proxy.delay)
            server.sendall(first)
            threading.Thread(target=_pass_on, args=(self.request, server, proxy), daemon=True).start()
            while data := server.recv(CHUNK):
                proxy.received += len(data)
                if proxy.random.random() < proxy.cut:
                    proxy.num_cut += 1
                    self.request.sendall(data[: len(data) // 2])
                    return
                if proxy.garbled and not data.endswith(b"\r\n\r\n"):
                    proxy.garbled -= 1
                    data = data[:-1] + bytes([data[-1] ^ 1])
                self.request.sendall(data)


def _pass_on(client: socket.socket, server: socket.socket, proxy: Proxy) -> None:
    try:
        while data := client.recv(CHUNK):
            time.sleep(proxy.delay)
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)
    except OSError:
        pass
