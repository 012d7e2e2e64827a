"""A run while it goes on, as a page that looks again every two seconds: on this machine only, at a fixed cost."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64encode
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from types import TracebackType
from typing import Any, Self

from halfbyte.errors import ConfigError
from halfbyte.report.html import page
from halfbyte.report.run import RunReport
from halfbyte.report.run_page import cards, curves, exchanges, heading, masks, notes, planned
from halfbyte.report.unhurried import Unhurried

LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?\Z", re.IGNORECASE)
"""What a Host header may say to a server on loopback: another one means a web page that found its way here."""
AS_OLD = 1.5
MOST_CONNECTIONS = 16
PATIENCE = 10.0
"""Seconds for a request to arrive and its answer to be taken."""

SCRIPT = """
const seen = new Map(), state = document.getElementById("state");
let last = new Date();
async function look() {
  try {
    const answer = await fetch("/live", {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.status);
    const said = await answer.json();
    last = new Date();
    document.title = said.title;
    state.textContent = "";
    for (const [name, html] of Object.entries(said.parts)) {
      if (seen.get(name) === html) continue;
      seen.set(name, html);
      document.getElementById(name).innerHTML = html;
    }
  } catch {
    state.textContent = `No answer since ${last.toLocaleTimeString()}: the run has ended, or cannot be reached. ` +
      "A finished run leaves report.html in its folder.";
  }
  setTimeout(look, document.hidden ? 10000 : 2000);
}
look();
"""
PARTS: dict[str, Callable[[RunReport], str]] = {
    "head": heading, "cards": cards, "curves": curves, "answers": lambda run: exchanges(run.answers),
    "plan": planned, "masks": lambda run: masks(run.samples), "notes": notes,
}  # fmt: skip
_HASH = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{_HASH}'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
}  # fmt: skip


class Dashboard:
    """Answers on loopback inside a ``with`` block, from threads of its own.

    Args:
        port: 0 takes a free one.

    Attributes:
        report: what there is to say now; None: nothing yet.
        live: the parts of the page as JSON, the same bytes for all who ask within `AS_OLD` seconds.

    Raises:
        ConfigError: the port is taken, or not to be had.
    """

    def __init__(self, port: int = 0) -> None:
        self.report: Callable[[], RunReport] | None = None
        self.live = Unhurried(self._live, AS_OLD)
        try:
            self._server = _Server(("127.0.0.1", port), self)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"port {port} is not to be had", where="--port", why=why, fix="Give another one, or 0"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="halfbyte-dashboard", daemon=True)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def page(self) -> bytes:
        """The page, which holds nothing yet."""
        sections = "".join(f"<section id={name}></section>" for name in PARTS)
        body = ["<p id=state role=status class=soft>…</p>", sections, f"<script>{SCRIPT}</script>"]
        return page("halfbyte", body).encode()

    def _live(self) -> bytes:
        """The parts of the page as they are now, by their id."""
        run = self.report() if self.report else None
        parts = {name: draw(run) if run else "" for name, draw in PARTS.items()}
        title = f"{run.step}/{run.steps} {run.title}" if run else "halfbyte"
        return json.dumps({"title": title, "parts": parts}).encode()


class _Server(ThreadingHTTPServer):
    """With a bound on its threads."""

    daemon_threads, block_on_close = True, False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], dashboard: Dashboard) -> None:
        self.dashboard = dashboard
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news for a training run."""


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server_version, sys_version = "halfbyte", ""

    def __init__(self, request: Any, client_address: Any, server: BaseServer) -> None:
        assert isinstance(server, _Server)
        self._dashboard = server.dashboard
        super().__init__(request, client_address, server)

    def do_GET(self) -> None:  # noqa: N802: the name that http.server calls
        if not LOOPBACK.match(self.headers.get("Host", "")):
            self._say(HTTPStatus.MISDIRECTED_REQUEST, b"this page is on loopback: no such host here\n", "text/plain")
        elif self.path == "/":
            self._say(HTTPStatus.OK, self._dashboard.page(), "text/html; charset=utf-8")
        elif self.path == "/live":
            self._say(HTTPStatus.OK, self._dashboard.live(), "application/json")
        else:
            self._say(HTTPStatus.NOT_FOUND, b"there is / and /live\n", "text/plain")

    def _say(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002: the name that http.server gives
        """Nothing: the terminal is the run's."""
