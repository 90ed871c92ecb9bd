"""Start a server as a child process, wait until it answers, talk to it, and end it.

Runs in the process that needs the server: `tlt train`, a benchmark or a test. Imports neither
SGLang nor torch: the server is reached over HTTP only.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from tlt_sglang.launcher.child_process import ChildProcess

HOST = "127.0.0.1"
LAUNCHER = (sys.executable, "-m", "tlt_sglang.launch_server")
START_SECONDS = 900.0
HEALTH_SECONDS = 30.0
REQUEST_SECONDS = 300.0
POLL_SECONDS = 0.2
PROGRESS_SECONDS = 10.0
PORTS = (21000, 31000)
"""Ports to choose from, below those that the kernel gives to outgoing connections."""


class ServerProcess(ChildProcess):
    """A server on a port of its own.

        with ServerProcess(["--model", model], folder / "server.log") as server:
            server.wait_ready()
            answer = server.post("/generate", {"text": "Hello"})

    The command is `program`, `--port` with the port, and `arguments`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        name: str = "The server",
        program: Sequence[str] = LAUNCHER,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://{HOST}:{self.port}"
        command = [*program, "--port", str(self.port), *arguments]
        super().__init__(name, command, log, environment=environment, cwd=cwd, stdin=stdin)

    def wait_ready(
        self,
        seconds: float = START_SECONDS,
        report: Callable[[float], None] | None = None,
    ) -> None:
        """Return once `/health` answers 200.

        `report` gets the seconds since the start, every ten seconds. Raises `failure` with the end
        of the log if the server ends, or is not ready within `seconds` of its start.
        """
        reported = 0.0
        while not self.healthy():
            self.check_alive()
            waited = time.perf_counter() - self.started
            if waited > seconds:
                raise self.error(f"was not ready within {seconds:.0f} s")
            if report is not None and waited - reported >= PROGRESS_SECONDS:
                reported = waited
                report(waited)
            time.sleep(POLL_SECONDS)

    def healthy(self) -> bool:
        """Return True if `/health` answers 200."""
        return is_healthy(self.url)

    def request(
        self, method: str, path: str, timeout: float = REQUEST_SECONDS, **options: Any
    ) -> requests.Response:
        """Send a request; `options` are those of `requests.request`.

        Raises `failure` with the end of the log if the server cannot be reached.
        """
        try:
            return requests.request(method, self.url + path, timeout=timeout, **options)
        except requests.ConnectionError as error:
            raise self.error(f"did not answer {method} {path} ({error})") from error

    def get(self, path: str, **options: Any) -> Any:
        """Return the answer to a GET, decoded if it is JSON, else as text.

        Raises requests.HTTPError for a status that is not 2xx.
        """
        return _decoded(path, self.request("GET", path, **options))

    def post(self, path: str, body: object = None, **options: Any) -> Any:
        """Return the answer to a POST of JSON (default: an empty object), as `get` does."""
        payload = {} if body is None else body
        return _decoded(path, self.request("POST", path, json=payload, **options))


def is_healthy(url: str, seconds: float = HEALTH_SECONDS) -> bool:
    """Return True if the server at `url` answers `/health` with 200 in time."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/health", timeout=seconds).status_code == 200
    return False


def free_port(host: str = HOST) -> int:
    """Return a port nobody listens on, below those of outgoing connections."""
    while True:
        port = random.randint(*PORTS)
        if can_bind(port, host):
            return port


def can_bind(port: int, host: str = HOST) -> bool:
    """Return True if nobody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _decoded(path: str, response: requests.Response) -> Any:
    if not response.ok:
        raise requests.HTTPError(f"{path}: {response.status_code} {response.text}")
    if "json" in response.headers.get("content-type", ""):
        return response.json()
    return response.text
