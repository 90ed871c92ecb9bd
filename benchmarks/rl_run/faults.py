"""Processes of a server that are killed with SIGKILL while a run goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from benchmarks.harness.program import say
from benchmarks.harness.server import Server

DELAY_SECONDS = 3.0
"""Time from the end of a step to a fault, which is then within the next rollout."""
LEAST_STEPS = 4
"""Steps that a run with faults has at least."""
SIDECAR, ENGINE, LAUNCHER = "sidecar", "engine", "launcher"
"""The launcher has the coordinator in its process."""


@dataclass(frozen=True)
class Fault:
    """A process that is killed during the rollout of a step."""

    step: int
    process: str

    def cause(self, server: Server) -> None:
        """Kill the process."""
        time.sleep(DELAY_SECONDS)
        victim = self._find(server)
        say(f"{server.name}, step {self.step + 1}: kill -9 of the {self.process}")
        victim.send_signal(signal.SIGKILL)

    def _find(self, server: Server) -> psutil.Process:
        others = [one for one in server.processes() if one.pid != server.root.pid]
        if self.process == LAUNCHER:
            return server.root
        if self.process == SIDECAR:
            return next(one for one in others if "sidecar" in one.cmdline())
        engines = [one for one in others if "sidecar" not in one.cmdline()]
        return max(engines, key=lambda one: one.memory_info().rss)


def faults(seed: int, steps: int) -> Sequence[Fault]:
    """Return one fault of each kind, at different random steps after the first one.

    Raises ValueError for fewer than LEAST_STEPS steps.
    """
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(1, steps), 3))
    kinds = rng.sample((SIDECAR, ENGINE, LAUNCHER), 3)
    return [Fault(*pair) for pair in zip(chosen, kinds, strict=True)]
