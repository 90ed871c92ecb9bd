"""The processes that a benchmark compares, by name: their flags, and which are alive.

There are never more than three at once, and each is measured only while the others are paused
(`Fleet.only`).
"""

from __future__ import annotations

import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import processes
from benchmarks.harness.program import BenchmarkError, say
from benchmarks.harness.provenance import command
from benchmarks.harness.server import SchedulerStatus, Server
from benchmarks.harness.transformers_process import Transformers

PLAIN = "off"
STOCK = "torch_native"
TRANSFORMERS = "transformers"
DEFAULT = "default"
"""Our launcher with nothing but --adaptive-spec; every other name is a strategy of ours, or several
with commas between them."""
WARM_TOKENS = 8
BUSY = 0.15
"""Load by other processes, in cores, above which the figures are noisy."""

COMMON_FLAGS = ("--device", "cpu", "--max-total-tokens", "20000", "--max-running-requests", "16")
STOCK_FLAGS = (
    *("--attention-backend", "torch_native", "--dtype", "float32"),
    *("--disable-cuda-graph", "--sleep-on-idle"),
)


@dataclass
class Fleet:
    """The processes that are alive, by name."""

    model: str
    """The model's name on the command line."""
    path: str
    """Its folder or hub id."""
    prompt: str
    """A prompt to warm up with."""
    threads: int
    logs: Path
    alive: dict[str, Server | Transformers] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    """CPU use of each process without work, in cores."""
    commands: dict[str, str] = field(default_factory=dict)

    def have(self, *names: str) -> None:
        """Start the processes that are missing and stop all others; all but one are paused then."""
        self.stop(set(self.alive) - set(names))
        missing = [name for name in names if name not in self.alive]
        for name in missing:
            self.start(name)
        for name in missing:
            self.alive[name].wait_started()
            self._check_identity(name)
        for name in missing:
            self.only(name).generate([self.prompt], WARM_TOKENS)
        for name in names:
            self.idle[name] = share = round(self.only(name).idle_share(), 3)
            if share > BUSY:
                say(f"{name} takes {share:.2f} cores without work; the figures are affected")

    def start(self, name: str) -> Server | Transformers:
        """Spawn the process, without waiting for it."""
        say(f"{name}: starting")
        process: Server | Transformers
        if name == TRANSFORMERS:
            process = Transformers(self.path, self.threads, self.logs)
        else:
            flags = ["--model", self.path, *flags_of(name)]
            process = Server(name, flags, self.threads, self.logs)
        self.alive[name] = process
        short = [word.replace(self.path, self.model) for word in process.command[1:]]
        self.commands[name] = command(short)
        return process

    def only(self, name: str) -> Server | Transformers:
        """Let this process run, and pause the others."""
        for other, process in self.alive.items():
            if other != name:
                process.pause()
        self.alive[name].resume()
        return self.alive[name]

    def server(self, name: str) -> Server:
        """Let this server run, and pause the others."""
        process = self.only(name)
        assert isinstance(process, Server)
        return process

    def stop(self, names: Collection[str]) -> None:
        """Stop these, all at the same time."""
        processes.stop([self.alive.pop(name) for name in list(names)])

    def close(self) -> None:
        """Stop everything this benchmark has started; Ctrl-C does not interrupt that."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.alive:
            say("stopping the servers")
        self.stop(list(self.alive))
        processes.stop_children()

    def _check_identity(self, name: str) -> None:
        """Raise BenchmarkError if the server does not run what its name says."""
        process = self.alive[name]
        if not isinstance(process, Server):
            return
        status = process.scheduler()
        if name == STOCK:
            if status is not None or process.server_info().get("attention_backend") != STOCK:
                raise BenchmarkError("The stock server is not stock SGLang with torch_native.")
        elif status is None or _strategies(status) != name:
            raise BenchmarkError(f"The server that should run {name} reports: {status}.")


def _strategies(status: SchedulerStatus) -> str:
    """Return a server's strategies as `--tlt-strategies` has them."""
    several = status.get("strategies")
    return ",".join(several) if several else str(status["strategy"])


def flags_of(name: str) -> tuple[str, ...]:
    """Return the flags of the server called `name`, without its model and port."""
    if name == DEFAULT:
        return ("--device", "cpu", "--adaptive-spec")
    if name == STOCK:
        return (*COMMON_FLAGS, *STOCK_FLAGS)
    return (*COMMON_FLAGS, "--adaptive-spec", "--tlt-strategies", name)
