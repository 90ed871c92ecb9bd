"""Run real servers for the tests, and share them.

A start takes a quarter of a minute, so tests share servers through `Servers`, which keeps the three
most recently used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.tiny import make_drafter
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.launcher.server_process import ServerProcess, can_bind
from tlt_sglang.models.named import prepare

MODEL = "smollm2-135m"
START_SECONDS = 300.0
STOP_SECONDS = 60.0
KEPT = 3
LIMITS = ("--max-total-tokens", "12288", "--skip-server-warmup")
"""A KV pool large enough for the tests, 0.6 GB for the default model; later flags win."""

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # Threads that wait for each other go to sleep soon. By default they spin, and where another
    # program holds one of the cores a step then takes ten times as long.
    "GOMP_SPINCOUNT": "20000",
}


class ServerFailed(AssertionError):
    """A server did not start, died, or left something behind; carries the end of its log."""


@dataclass(frozen=True)
class Spec:
    """The model, strategy, flags and environment of a server."""

    model: str = MODEL
    strategy: str | None = "off"
    """The value of `--tlt-strategies`; with None, TLT is off and SGLang runs unpatched."""
    drafter: str | None = None
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def arguments(self) -> list[str]:
        """Return the launcher's flags, without the port."""
        arguments = ["--model", self.model, *LIMITS]
        if self.strategy is not None:
            arguments += ["--adaptive-spec", "--tlt-strategies", self.strategy]
        if self.drafter is not None:
            arguments += ["--speculative-draft-model-path", self.drafter]
        return [*arguments, *self.flags]


class Server(ServerProcess):
    """One running server. Requests raise for a status that is not 2xx."""

    failure = ServerFailed

    def __init__(self, spec: Spec, log: Path) -> None:
        """Start it and wait until it answers; raises ServerFailed with the end of its log."""
        self.spec = spec
        environment = ENVIRONMENT | dict(spec.environment)
        super().__init__(spec.arguments(), log, name=str(spec), environment=environment)
        try:
            self.wait_ready(START_SECONDS)
        except BaseException:
            self.kill()
            raise

    # -- requests --------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the answer to `GET /tlt/status`."""
        status: dict[str, Any] = self.get("/tlt/status")
        return status

    def scheduler(self) -> dict[str, Any]:
        """Return the part of its (first) scheduler in `GET /tlt/status`."""
        scheduler: dict[str, Any] = self.status()["schedulers"][0]
        return scheduler

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 32,
        *,
        options: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """Generate from a text or from token ids: greedily, ignoring the end of sequence.

        `sampling` is added to sampling_params, `options` to the body of `POST /generate`. Returns
        the answer, with output_ids, text and meta_info.
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
        """Generate for each prompt, `at_once` in flight; return the answers in the same order."""
        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(lambda prompt: self.generate(prompt, **kwargs), prompts))

    # -- what it holds ---------------------------------------------------------------------------

    def load(self) -> dict[str, Any]:
        """Return the requests and the use of the KV pool that SGLang reports."""
        load: dict[str, Any] = self.get("/v1/loads")["loads"][0]
        return load

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Return once no request runs or waits, and only the radix cache holds KV slots.

        Whenever it is idle, SGLang checks that free and cached slots add up to the whole pool, and
        ends if they do not. Raises ServerFailed if the server is not idle in time.
        """
        held = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        if not wait_for(lambda: not any(self.load()[name] for name in held), seconds):
            raise self.error(f"is not idle: {self.load()}")

    # -- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        """Stop it; raises ServerFailed if a process or its port stays."""
        left = self.stop(STOP_SECONDS)
        if left:
            raise self.error(f"left processes {[process.pid for process in left]}")
        if not can_bind(self.port):
            raise self.error(f"left port {self.port} taken")


class Servers:
    """The servers of a test session; `get` starts one if needed, the last three are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[Spec, Server] = {}  # in order of use, the most recent last
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
        """Return a server that runs `strategy`; without `drafter`, EAGLE gets a random one.

        Raises ServerFailed if it does not start.
        """
        kind = (strategy or "").partition(":")[0]
        if drafter is None and kind in ("eagle", "eagle3"):
            drafter = self.drafter(kind, model)
        spec = Spec(model, strategy, drafter, flags, tuple(sorted((environment or {}).items())))
        server = self.running.pop(spec, None)
        if server is not None and not server.alive:
            server.end()
            raise server.error("died")
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
        """Stop a server that no other test may use."""
        self.running.pop(server.spec, None)
        server.end()

    def close(self) -> None:
        """Stop all of them; raises the first ServerFailed, if any."""
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
        """Return the folder of a random drafter of `kind` (eagle, eagle3) for `model`."""
        if (kind, model) not in self._drafters:
            folder = self.folder / f"{kind}-{len(self._drafters)}"
            self._drafters[kind, model] = str(make_drafter(folder, model_folder(model), kind))
        return self._drafters[kind, model]


def model_folder(model: str) -> Path:
    """Return the folder of a model's checkpoint; `model` is its alias or its path."""
    return prepare(model) if model == MODEL else Path(model)
