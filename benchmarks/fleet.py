"""The processes that `bench_engine` compares, by name: which flags each gets, and who is alive.

Never more than three at once, and each is asked only while the others are halted (`Fleet.only`).
"""

from __future__ import annotations

import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common, processes, server
from benchmarks.common import BenchmarkError, say

PLAIN = "off"
STOCK = "torch_native"
TRANSFORMERS = "transformers"
DEFAULT = "default"
"""Our launcher with nothing but --adaptive-spec; every other name is a strategy of ours, or several
with commas between them."""
WARM_TOKENS = 8
BUSY = 0.15
"""Above this load by others, in cores, the figures are noisy and the user should know."""

COMMON_FLAGS = ("--device", "cpu", "--max-total-tokens", "20000", "--max-running-requests", "16")
STOCK_FLAGS = (
    *("--attention-backend", "torch_native", "--dtype", "float32"),
    *("--disable-cuda-graph", "--sleep-on-idle"),
)


@dataclass
class Fleet:
    """The processes that are alive, by name."""

    model: str
    """As the user names it."""
    path: str
    """Its folder or hub id."""
    prompt: str
    """To warm up with."""
    threads: int
    logs: Path
    alive: dict[str, server.Server | server.Transformers] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    def have(self, *names: str) -> None:
        """Start those that are missing, stop all others, and see that everyone is idle; all but
        one are halted then."""
        self.stop(set(self.alive) - set(names))
        missing = [name for name in names if name not in self.alive]
        for name in missing:
            self.start(name)
        for name in missing:
            self.alive[name].wait_ready()
            self._check_identity(name)
        for name in missing:
            self.only(name).generate([self.prompt], WARM_TOKENS)
        for name in names:
            self.idle[name] = share = round(self.only(name).idle_share(), 3)
            if share > BUSY:
                say(f"{name} is not idle while not asked: {share:.2f} cores; figures suffer")

    def start(self, name: str) -> server.Server | server.Transformers:
        """Spawn the process, without waiting for it."""
        say(f"{name}: starting")
        started: server.Server | server.Transformers
        if name == TRANSFORMERS:
            started = server.Transformers(self.path, self.threads, self.logs)
        else:
            flags = ["--model", self.path, *flags_of(name)]
            started = server.Server(name, flags, self.threads, self.logs)
        self.alive[name] = started
        self.commands[name] = common.command(started.words).replace(self.path, self.model)
        return started

    def only(self, name: str) -> server.Server | server.Transformers:
        """Let this one run, and halt the others."""
        for other, process in self.alive.items():
            if other != name:
                process.halt()
        self.alive[name].go_on()
        return self.alive[name]

    def stop(self, names: Collection[str]) -> None:
        """Stop these, all at the same time."""
        processes.stop([self.alive[name].root for name in names])
        for name in list(names):
            self.alive.pop(name).close()

    def close(self) -> None:
        """Stop everything this benchmark has started; Ctrl-C does not break that off."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.alive:
            say("stopping the servers")
        # One whose spawning was interrupted is a child that is not on the list; one that has died
        # is no child any more, but may have left some of its own.
        roots = [process.root for process in self.alive.values()]
        processes.stop([*roots, *psutil.Process().children()])
        self.alive.clear()

    def _check_identity(self, name: str) -> None:
        """Raise BenchmarkError if the server does not run what its name says."""
        process = self.alive[name]
        if not isinstance(process, server.Server):
            return
        status = process.get("/tlt/status")
        if name == STOCK:
            info = process.get("/get_server_info") or {}
            if status is not None or info.get("attention_backend") != STOCK:
                raise BenchmarkError("The stock server is not stock SGLang with torch_native.")
        elif status is None or _strategies(status) != name:
            raise BenchmarkError(f"The server that should run {name} says: {status}.")


def _strategies(status: dict[str, Any]) -> str:
    """What a server of ours was started with, as `--tlt-strategies` has it."""
    several = status["schedulers"][0].get("strategies")
    return ",".join(several) if several else str(status["strategy"])


def flags_of(name: str) -> tuple[str, ...]:
    """The flags of the server called `name`, but for its model and port."""
    if name == DEFAULT:
        return ("--device", "cpu", "--adaptive-spec")
    if name == STOCK:
        return (*COMMON_FLAGS, *STOCK_FLAGS)
    return (*COMMON_FLAGS, "--adaptive-spec", "--tlt-strategies", name)
