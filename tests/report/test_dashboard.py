"""The dashboard: what it says, to whom, at what cost, and in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.errors import ConfigError
from halfbyte.report import Dashboard, RunReport
from halfbyte.report.dashboard import MOST_CONNECTIONS
from halfbyte.report.unhurried import SHARE, Unhurried

RUN = RunReport(
    title="<b>model</b>", state="train", started=1.7e9, seconds=75.0, step=3, steps=9,
    loss=[(1, 4.0), (2, 3.5), (3, 3.0)], held_out=[(0, 4.2), (3, 3.1)], lr=[(1, 1e-4), (3, 1e-4)],
    speed=[(1, 50.0), (3, 60.0)], tokens_per_s=200.0, step_seconds=10.0, memory=[(1.0, 10**9), (2.0, 2 * 10**9)],
    peak=2 * 10**9, notes=["</pre><script>alert(1)</script>"],
)  # fmt: skip


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard() as dashboard:
        dashboard.report = lambda: RUN
        yield dashboard


def ask(dashboard: Dashboard, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(dashboard.url.split("/")[2], timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_what_it_says(dashboard: Dashboard) -> None:
    status, headers, page = ask(dashboard, "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"http" not in page
    status, _, body = ask(dashboard, "/live")
    said = json.loads(body)
    assert status == 200
    assert said["title"] == "3/9 <b>model</b>"
    assert "<h1>&lt;b&gt;model" in said["parts"]["head"]
    assert "1 min 00 s" in said["parts"]["cards"]
    assert said["parts"]["curves"].count("<svg") == 4
    assert "<script>" not in "".join(said["parts"].values())


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost:80@evil", ""])
def test_another_host_is_refused(dashboard: Dashboard, host: str) -> None:
    """A web page whose name resolves to 127.0.0.1 must not read a run."""
    assert ask(dashboard, "/live", Host=host)[0] == 421


def test_nothing_else_is_there(dashboard: Dashboard) -> None:
    assert ask(dashboard, "/../result.json")[0] == 404
    assert ask(dashboard, "/live", "POST")[0] == 501
    assert ask(dashboard, "/" + "a" * 70_000)[0] == 414


def test_before_there_is_a_run() -> None:
    with Dashboard() as dashboard:
        assert json.loads(ask(dashboard, "/live")[2])["parts"]["head"] == ""


def test_a_port_that_is_taken(dashboard: Dashboard) -> None:
    port = int(dashboard.url.split(":")[2].strip("/"))
    with pytest.raises(ConfigError, match=rf"--port: port {port} is not to be had"):
        Dashboard(port)


def test_many_who_say_nothing_hold_nothing_up(dashboard: Dashboard) -> None:
    """Connections beyond the bound are closed at once; threads stay few."""
    address = ("127.0.0.1", int(dashboard.url.split(":")[2].strip("/")))
    before = threading.active_count()
    idle = [socket.create_connection(address, timeout=10) for _ in range(2 * MOST_CONNECTIONS)]
    closed = 0
    for connection in idle[MOST_CONNECTIONS:]:
        try:
            closed += connection.recv(1) == b""
        except ConnectionResetError:
            closed += 1
    assert closed == MOST_CONNECTIONS
    assert threading.active_count() <= before + MOST_CONNECTIONS
    for connection in idle:
        connection.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert ask(dashboard, "/live")[0] == 200
            break
        except (ConnectionError, http.client.HTTPException):
            time.sleep(0.05)
    else:
        pytest.fail("no answer after the idle ones have gone")


def test_making_takes_a_fixed_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [100.0], []

    def make() -> int:
        now[0] += 0.1
        made.append(now[0])
        return len(made)

    monkeypatch.setattr("halfbyte.report.unhurried.time.monotonic", lambda: now[0])
    value = Unhurried(make, 1.0)
    for _ in range(1000):
        value()
        now[0] += 0.1
    assert len(made) <= 1 + 101 / (0.1 * SHARE)
    assert value() == len(made)


def test_in_a_browser(dashboard: Dashboard, tmp_path: Path) -> None:
    """Chromium runs the script under its policy: the figures arrive, and nothing of the data runs."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no browser: install chromium, or name one in CHROMIUM")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
         "--virtual-time-budget=4000", "--window-size=390,844", dashboard.url],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "<title>3/9 &lt;b&gt;model&lt;/b&gt;</title>" in done.stdout, done.stderr
    assert done.stdout.count("<svg") == 4
    assert "held-out loss" in done.stdout
    assert "3.1000" in done.stdout
    assert "&lt;script&gt;alert(1)" in done.stdout
    assert "Content Security Policy" not in done.stderr
