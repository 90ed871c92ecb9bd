"""Processes of a run that are killed with SIGKILL while it goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.harness.processes import MeasuredProcess
from benchmarks.harness.program import say
from benchmarks.harness.server import Server

DELAY_SECONDS = 3.0
"""Time from the end of a step to a fault, which is then within the next rollout."""
LEAST_STEPS = 4
"""Steps that a run with faults has at least."""
SIDECAR, ENGINE, COORDINATOR = "sidecar", "engine", "coordinator"


@dataclass(frozen=True)
class Fault:
    """A process that is killed during the rollout of a step."""

    step: int
    process: str

    def cause(self, servers: Sequence[Server], beside: Mapping[str, MeasuredProcess]) -> None:
        """Kill the process: the first server's sidecar, the last one's engine, or one `beside` the
        servers."""
        time.sleep(DELAY_SECONDS)
        if self.process in beside:
            victim = beside[self.process].root
        elif self.process == SIDECAR:
            victim = next(one for one in servers[0].processes() if _is_sidecar(one))
        else:
            engines = [one for one in servers[-1].processes() if not _is_sidecar(one)]
            victim = max(engines, key=lambda one: one.memory_info().rss)
        say(f"step {self.step + 1}: kill -9 of the {self.process}")
        victim.send_signal(signal.SIGKILL)


def _is_sidecar(process: psutil.Process) -> bool:
    return "sidecar" in process.cmdline()


def faults(seed: int, steps: int) -> Sequence[Fault]:
    """Return one fault of each kind, at different random steps after the first one.

    Raises ValueError for fewer than LEAST_STEPS steps.
    """
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(1, steps), 3))
    kinds = rng.sample((SIDECAR, ENGINE, COORDINATOR), 3)
    return [Fault(*pair) for pair in zip(chosen, kinds, strict=True)]
