"""A server for the page of a run that only this machine reaches.

Web pages of others must neither read a run nor ask it. So requests are refused that name another host, as after DNS
rebinding, or that come from another origin. Other users of this machine don't know the token in the address.
"""

import errno
import json
import secrets
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from seg_core.errors import SegError
from seg_core.view.site import RunSite

HOST = "127.0.0.1"
NAMES = ("localhost", HOST, "[::1]")
HTTP_PORT = 80  # which a browser does not name
MAX_BODY = 100_000  # bytes of a question
JSON, HTML, TEXT = "application/json", "text/html; charset=utf-8", "text/plain; charset=utf-8"
HEADERS = {
    # What a page may load is in the page itself. This can only be said here.
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; connect-src 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class RefusedError(Exception):
    """A request is refused: a status, and a line."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


class ViewServer(ThreadingHTTPServer):
    """Serves a run at `url`, on this machine alone."""

    daemon_threads = True  # a browser may keep a connection that it never uses

    def __init__(self, site: RunSite, port: int) -> None:
        """Bind a port; 0 is any that is free. Raises SegError if that can't be done."""
        self.site, self.token = site, secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else str(error.strerror).lower()
            raise SegError(f"--port {port}: {why}: name another one, or 0 for any that is free") from error

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    @property
    def hosts(self) -> set[str]:
        """What the header Host may be."""
        names = {f"{name}:{self.server_port}" for name in NAMES}
        return names | set(NAMES) if self.server_port == HTTP_PORT else names


class Handler(BaseHTTPRequestHandler):
    """Answers one request: GET for the page, POST with a query."""

    server: ViewServer
    timeout = 60  # s until a request must have arrived

    def do_GET(self) -> None:
        """Send the page."""
        self._respond("", self._page)

    def do_POST(self) -> None:
        """Answer a query."""
        self._respond("query", self._answer)

    def _respond(self, path: str, make: Any) -> None:
        try:
            self._check(path)
            self._send(HTTPStatus.OK, *make())
        except RefusedError as refusal:
            self._send(refusal.status, TEXT, f"{refusal}\n")
        except SegError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, f"seg: {error}\n")
        except Exception as error:  # nobody reads a traceback here, and a page waits for an answer
            line = " ".join(str(error).split())
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, f"seg: {type(error).__name__}: {line}\n")

    def _check(self, path: str) -> None:
        """Raise RefusedError for a request that is not made to this server, by its own page or by none."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise RefusedError(HTTPStatus.FORBIDDEN, "refused: the request names another host")
        if any(origin.lower() not in {f"http://{host}" for host in self.server.hosts} for origin in origins):
            raise RefusedError(HTTPStatus.FORBIDDEN, "refused: the request comes from another origin")
        if not secrets.compare_digest(self.path.encode(), f"/{self.server.token}/{path}".encode()):
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here: use the address that seg view has printed")

    def _page(self) -> tuple[str, str]:
        return HTML, self.server.site.page()

    def _answer(self) -> tuple[str, str]:
        if self.headers.get_content_type() != JSON:
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"refused: a question must be {JSON}")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"refused: a question has at most {MAX_BODY} bytes")
        try:
            sql = json.loads(self.rfile.read(int(length)))["sql"]
        except (ValueError, KeyError, TypeError):
            sql = None
        if not isinstance(sql, str):
            raise RefusedError(HTTPStatus.BAD_REQUEST, 'refused: a question is {"sql": "SELECT ..."}')
        return JSON, json.dumps(self.server.site.ask(sql))

    def _send(self, status: HTTPStatus, kind: str, content: str) -> None:
        body = content.encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # the browser has left
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: standard error is for messages to the user."""
