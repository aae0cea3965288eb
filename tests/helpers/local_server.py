"""An HTTP server on 127.0.0.1 that answers what a test says, and notes what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What the server sends; ``body`` is bytes, or what becomes JSON."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = {}


@dataclass
class LocalServer:
    """``url`` of a running server, and what it has seen: JSON bodies, headers, and how many
    requests it answered at once at most."""

    url: str
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    most: int = 0


@contextmanager
def local_server(answer: Callable[[Any], Answer | Any]) -> Iterator[LocalServer]:
    """Run a server that answers each request with ``answer(body)``, an Answer or its body."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                seen.bodies.append(body)
                seen.headers.append({k.lower(): v for k, v in self.headers.items()})
                seen.running += 1
                seen.most = max(seen.most, seen.running)
            try:
                given = answer(body)
            finally:
                with lock:
                    seen.running -= 1
            self.reply(given if isinstance(given, Answer) else Answer(given))

        do_GET = do_POST

        def reply(self, given):
            data = given.body
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            try:
                self.send_response(given.status)
                for name, value in {"Content-Length": str(len(data)), **given.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client did not wait

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        seen = LocalServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()
