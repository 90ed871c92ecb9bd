"""An engine and a sidecar on a core each, for `bench_adaptive_drafter`.

The engine has the machine's first core and the sidecar its last one, so that on a machine with one
core for each they share nothing but memory. If there is one core only, they share it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.processes import MeasuredProcess, Process, stop
from benchmarks.harness.program import BenchmarkError
from benchmarks.harness.prompts import Prompt
from benchmarks.harness.server import NO_COUNTS, Json, SchedulerStatus, Server

AT_ONCE = 4
FLAGS = ("--device", "cpu", "--max-total-tokens", "12288", "--max-running-requests", str(AT_ONCE))
CHAIN, NGRAM = "eagle3:3x1x4", "ngram:4"
POOL = f"off,{NGRAM},eagle3:1x1x2,{CHAIN}"


@dataclass
class Processes:
    """The processes of one model that run, and the folder for their logs."""

    path: str
    """Folder of the model."""
    logs: Path
    running: list[MeasuredProcess] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)

    @property
    def cores(self) -> tuple[int, int]:
        """The cores of the engine and of the sidecar."""
        available = sorted(os.sched_getaffinity(0))
        return available[0], available[-1]

    def engine(self, store: Path, *flags: str, core: int | None = None) -> Engine:
        """Start a server with this store on one core, and return before it is ready."""
        arguments = ["--model", self.path, *FLAGS, "--adaptive-spec", "--tlt-strategies", POOL]
        arguments += ["--tlt-store", str(store), *flags]
        engine = Engine("engine", arguments, 1, self.logs)
        self._register(engine, self.cores[0] if core is None else core)
        return engine

    def sidecar(self, store: Path, *flags: str, core: int | None = None) -> Sidecar:
        """Start a sidecar for this store on one core."""
        sidecar = Sidecar(store, flags, self.logs)
        self._register(sidecar, self.cores[1] if core is None else core)
        return sidecar

    def other(self, name: str, *arguments: str) -> Process:
        """Start another Python program."""
        process = Process(name, arguments, 1, self.logs)
        self._register(process, None)
        return process

    def _register(self, process: MeasuredProcess, core: int | None) -> None:
        if core is not None:
            process.root.cpu_affinity([core])
        self.running.append(process)
        self.commands.setdefault(process.name, " ".join(process.command[1:]))

    def stop(self) -> None:
        """End everything that runs, whatever state it is in."""
        stop(self.running)
        self.running.clear()


class Engine(Server):
    """A server whose drafter is swapped."""

    def status(self) -> SchedulerStatus:
        """Return what its scheduler reports."""
        status = self.scheduler()
        if status is None:
            raise BenchmarkError(f"{self.name} has no /tlt/status.")
        return status

    def harvest(self, rate: float) -> None:
        """Set the share of requests that are logged for training."""
        self.send("/tlt/harvest", {"rate": rate})

    def accept_length(self, prompts: Sequence[Prompt], tokens: int, strategy: str) -> float:
        """Return the greedy accept length of `strategy`.

        These prompts are not logged: the drafter must not learn from its evaluation.
        """
        self.harvest(0.0)
        self.pin(strategy)
        before = self.status()["strategies"].get(strategy, NO_COUNTS)
        for first in range(0, len(prompts), AT_ONCE):
            self.generate(prompts[first : first + AT_ONCE], tokens)
        after = self.status()["strategies"][strategy]
        self.pin(None)
        self.harvest(1.0)
        verify_steps = after["verify_steps"] - before["verify_steps"]
        accepted = after["accepted"] - before["accepted"]
        return 1 + accepted / max(1.0, float(verify_steps))


class Sidecar(Process):
    """A sidecar, and the status that it writes."""

    def __init__(self, store: Path, flags: Sequence[str], logs: Path) -> None:
        self.store = store
        arguments = ["-m", "tlt_sglang.cli", "sidecar", "--tlt-store", str(store), *flags]
        super().__init__("sidecar", arguments, 1, logs)

    def status(self) -> Json:
        """Return its latest status; empty before the first."""
        try:
            status: Json = json.loads((self.store / "sidecar.json").read_text())
        except (OSError, ValueError):
            return {}
        return status


def wait(event: str, condition: Callable[[], object], seconds: float) -> None:
    """Return once `condition` is true; raise BenchmarkError if it is false for too long."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise BenchmarkError(f"{event} did not happen within {seconds:.0f} s.")
        time.sleep(0.2)
