"""The server's life: from a bound socket to the last answer."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from halfbyte.errors import ConfigError, HalfbyteError, ResourceError
from halfbyte.serve.adapters import Adapters
from halfbyte.serve.app import make_app
from halfbyte.serve.engine import Engine, Runner
from halfbyte.serve.guard import App, Keys
from halfbyte.serve.protocol import MOST_CONNECTIONS, DeadlineProtocol
from halfbyte.serve.text import Texts

log = logging.getLogger("halfbyte.serve")
IDLE_SECONDS = 15
SEND_BUFFER = 128 * 1024
"""Of a connection, in the system: what a client that reads slowly makes us hold."""
DRAIN_SECONDS = 20
NO_KEYS = Keys(None, None)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve.

    Attributes:
        batch: answers that are written at once.
        queue: that may wait.
        planned_memory: bytes, for /metrics; 0 where nothing was planned.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 16
    queue: int = 64
    keys: Keys = NO_KEYS
    planned_memory: int = 0


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(settings: Settings) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: open to others than this machine, without a key.
        ResourceError: the address is not to be had.
    """
    if not is_loopback(settings.host) and not settings.keys.user:
        raise ConfigError(
            "open to other machines without a key", where=f"--host {settings.host}",
            fix="Set HALFBYTE_API_KEY or give --api-key-file",
        )  # fmt: skip
    listening = None
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted ones inherit it
        listening.bind(address)
        listening.listen(MOST_CONNECTIONS)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ResourceError(
            "cannot be listened on", where=f"{settings.host}:{settings.port}", why=error.strerror or str(error),
            fix="Choose another --port, or 0 for any",
        ) from None  # fmt: skip
    return listening


def make_server(app: App) -> uvicorn.Server:
    """uvicorn with the limits that a public server needs."""
    return uvicorn.Server(uvicorn.Config(
        app, http=DeadlineProtocol, ws="none", lifespan="off", access_log=False, log_level="warning",
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False, proxy_headers=False, log_config=None,
    ))  # fmt: skip


def serve(
    runner: Runner, adapters: Adapters, texts: Texts, settings: Settings, listening: socket.socket,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:  # fmt: skip
    """Answer until a signal comes, then finish what is being written.

    Raises:
        HalfbyteError: the engine died.
    """
    lost = threading.Event()
    engine = Engine(runner, most_running=settings.batch, most_waiting=settings.queue, on_death=lambda: give_up())
    app = make_app(
        engine, adapters, texts, settings.keys, local_only=is_loopback(settings.host),
        planned_memory=settings.planned_memory,
    )  # fmt: skip
    server = make_server(app)

    def give_up() -> None:
        lost.set()
        server.should_exit = True

    host, port = listening.getsockname()[:2]
    engine.start()
    on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        server.run(sockets=[listening])
    finally:
        engine.stop(1)
    if lost.is_set():
        raise HalfbyteError("the engine died", where="serve", fix="See the log above, and report it")
