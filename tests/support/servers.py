"""Real servers for the tests: start one, talk to it, end it; and a small pool of them.

A start takes a quarter of a minute, so tests share servers through `Servers`, which keeps the three
used last. Every server runs in a session of its own, by which what it leaves behind is found.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.support.tiny import make_drafter
from tlt_sglang.models.named import prepare
from tlt_sglang.training.generate import free_port

MODEL = "smollm2-135m"
START_SECONDS = 300.0
STOP_SECONDS = 60.0
KEPT = 3
LIMITS = ("--max-total-tokens", "12288", "--skip-server-warmup")
"""A KV pool that the tests fit in, of 0.6 GB for the default model; flags given later win."""


ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # Threads that wait for each other go to sleep soon. By default they spin, and where another
    # program holds one of the cores a step then takes ten times as long.
    "GOMP_SPINCOUNT": "20000",
}


class ServerFailed(AssertionError):
    """A server did not start, died, or left something behind; the log's tail is in the message."""


@dataclass(frozen=True)
class Spec:
    """How a server is started."""

    model: str = MODEL
    strategy: str | None = "off"
    """What `--tlt-strategies` gets; None leaves TLT out, so that SGLang runs as it is."""
    drafter: str | None = None
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, port: int) -> list[str]:
        """The launcher's command line."""
        words = [sys.executable, "-m", "tlt_sglang.launch_server", "--model", self.model]
        words += ["--port", str(port), *LIMITS]
        if self.strategy is not None:
            words += ["--adaptive-spec", "--tlt-strategies", self.strategy]
        if self.drafter is not None:
            words += ["--speculative-draft-model-path", self.drafter]
        return [*words, *self.flags]


class Server:
    """One running server. Requests raise for a status that is not 2xx."""

    def __init__(self, spec: Spec, log: Path) -> None:
        """Start it and wait until it answers; raises ServerFailed with the log's tail."""
        self.spec = spec
        self.log_path = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        started = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                spec.command(self.port),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | ENVIRONMENT | dict(spec.environment),
            )
        try:
            self._wait_until_ready(started + START_SECONDS)
        except BaseException:
            self._kill()
            raise
        self.start_seconds = time.monotonic() - started

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            code = self.process.poll()
            if code is not None:
                raise ServerFailed(f"{self.spec} ended with status {code}:\n{self.tail()}")
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise ServerFailed(f"{self.spec} not ready in {START_SECONDS:.0f} s:\n{self.tail()}")

    # -- its log ---------------------------------------------------------------------------------

    def log(self) -> str:
        """Everything it has printed."""
        return self.log_path.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """The end of its log, without the ends of very long lines."""
        return "\n".join(line[:500] for line in self.log().splitlines()[-lines:])

    # -- requests --------------------------------------------------------------------------------

    def request(self, method: str, path: str, timeout: float = 300.0, **kwargs: Any) -> Any:
        """The response; raises ServerFailed, with the log's tail, if the server cannot answer."""
        try:
            return requests.request(method, self.url + path, timeout=timeout, **kwargs)
        except requests.ConnectionError as error:
            raise ServerFailed(f"{method} {path}: {error}\n{self.tail()}") from error

    def post(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        """The answer to a POST of JSON: decoded, or as text where it is none."""
        response = self.request("POST", path, json=body if body is not None else {}, **kwargs)
        if not response.ok:
            raise requests.HTTPError(f"{path}: {response.status_code} {response.text}")
        return _decoded(response)

    def get(self, path: str, **kwargs: Any) -> Any:
        """The answer to a GET: decoded, or as text where it is none."""
        response = self.request("GET", path, **kwargs)
        if not response.ok:
            raise requests.HTTPError(f"{path}: {response.status_code} {response.text}")
        return _decoded(response)

    def status(self) -> dict[str, Any]:
        """`GET /tlt/status`."""
        status: dict[str, Any] = self.get("/tlt/status")
        return status

    def scheduler(self) -> dict[str, Any]:
        """The part of its (first) scheduler in `GET /tlt/status`."""
        told: dict[str, Any] = self.status()["schedulers"][0]
        return told

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 32,
        *,
        options: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """`POST /generate` of a text or of token ids; greedy, and past the end of sequence.

        `sampling` goes into sampling_params, `options` beside it. The answer has output_ids, text
        and meta_info.
        """
        body: dict[str, Any] = {"text": prompt} if isinstance(prompt, str) else {}
        if not isinstance(prompt, str):
            body["input_ids"] = list(prompt)
        parameters = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body["sampling_params"] = parameters | sampling
        answer: dict[str, Any] = self.post("/generate", body | (options or {}))
        return answer

    def generate_all(
        self, prompts: Iterable[str | Sequence[int]], at_once: int = 8, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """`generate` for each prompt, `at_once` of them in flight; answers in the same order."""
        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(lambda prompt: self.generate(prompt, **kwargs), prompts))

    # -- what it holds ---------------------------------------------------------------------------

    def load(self) -> dict[str, Any]:
        """SGLang's own account of its requests and its KV pool."""
        load: dict[str, Any] = self.get("/v1/loads")["loads"][0]
        return load

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Return once no request is there and no KV slot is held but by the radix cache.

        SGLang checks by itself, whenever it is idle, that free and cached slots make up the whole
        pool, and dies if they do not. Raises ServerFailed where that does not come about in time.
        """
        held = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        if not wait_for(lambda: not any(self.load()[name] for name in held), seconds):
            raise ServerFailed(f"{self.spec} is not idle: {self.load()}\n{self.tail()}")

    # -- the end ---------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the launcher still runs."""
        return self.process.poll() is None

    def processes(self) -> list[int]:
        """Pids of its session that still exist; zombies do not count."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) == self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def ask_to_stop(self) -> None:
        """Ask it to end, as a user does, by SIGTERM; it takes five seconds, most of them asleep."""
        if self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        """End it; raises ServerFailed if a process or its port stays."""
        self.ask_to_stop()
        try:
            gone = wait_for(self._gone, STOP_SECONDS)
            left = self.processes()
        finally:
            self._kill()
        if not gone:
            raise ServerFailed(f"{self.spec} left processes {left}:\n{self.tail()}")
        if not can_bind(self.port):
            raise ServerFailed(f"{self.spec} left port {self.port} taken:\n{self.tail()}")

    def _gone(self) -> bool:
        return self.process.poll() is not None and not self.processes()

    def _kill(self) -> None:
        """End what is left of its session at once."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


class Servers:
    """The servers of a test session; `get` starts one if need be, the three used last are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[Spec, Server] = {}  # the one used last is last
        self.started: list[Server] = []
        self._drafters: dict[tuple[str, str], str] = {}

    def get(
        self,
        strategy: str | None = "off",
        *flags: str,
        model: str = MODEL,
        drafter: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> Server:
        """The server that runs `strategy`; EAGLE gets a random drafter where none is given.

        Raises ServerFailed if it does not start.
        """
        kind = (strategy or "").partition(":")[0]
        if drafter is None and kind in ("eagle", "eagle3"):
            drafter = self.drafter(kind, model)
        spec = Spec(model, strategy, drafter, flags, tuple(sorted((environment or {}).items())))
        server = self.running.pop(spec, None)
        if server is not None and not server.alive:
            server.stop()
            raise ServerFailed(f"{spec} died:\n{server.tail()}")
        if server is None:
            leaving = list(self.running.values())[: max(0, len(self.running) - KEPT + 1)]
            for old in leaving:
                old.ask_to_stop()
            try:
                server = Server(spec, self.folder / f"server-{len(self.started)}.log")
            finally:
                for old in leaving:
                    self.drop(old)
            self.started.append(server)
        self.running[spec] = server
        return server

    def drop(self, server: Server) -> None:
        """Stop a server that others must not use any more."""
        self.running.pop(server.spec, None)
        server.stop()

    def close(self) -> None:
        """Stop all; raises what the first of them that failed raised."""
        problems = []
        for server in self.running.values():
            server.ask_to_stop()
        for server in list(self.running.values()):
            try:
                self.drop(server)
            except ServerFailed as problem:
                problems.append(problem)
        if problems:
            raise problems[0]

    def drafter(self, kind: str, model: str = MODEL) -> str:
        """The folder of a random drafter of `kind` (eagle, eagle3) for `model`; made once."""
        if (kind, model) not in self._drafters:
            folder = self.folder / f"{kind}-{len(self._drafters)}"
            self._drafters[kind, model] = str(make_drafter(folder, model_folder(model), kind))
        return self._drafters[kind, model]


def model_folder(model: str) -> Path:
    """Where the checkpoint of a model given by alias or path lies."""
    return prepare(model) if model == MODEL else Path(model)


def can_bind(port: int) -> bool:
    """Whether nothing listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> bool:
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _decoded(response: Any) -> Any:
    if "json" in response.headers.get("content-type", ""):
        return response.json()
    return response.text
