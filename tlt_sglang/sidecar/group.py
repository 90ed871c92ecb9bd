"""Sidecars that train one drafter together: local SGD by whoever is there.

    STORE/work/group/round              the weights that the newest round begins with
    STORE/work/group/part@PID@HOST      what a helper has made of them so far

The holder of the lease trains, gates and publishes. Those that wait for the lease help: each trains
from the weights of the round, on draws of its own, and at the end of the round the holder averages
their weights with its own, by optimizer steps (local SGD, arXiv 1805.09767). A drafter fits on one
device, so what a second one can add is more data. Nobody waits for anybody: a helper may come, or
be preempted, between any two micro-batches, and what is late for its round is not used. Files are
read and written by a thread, so that training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.sidecar.learner import Learner
from tlt_sglang.training.progress import say
from tlt_sglang.weights import files

FOLDER = Path("work", "group")
ROUND, PART = "round", "part"
ROUND_STEPS = 32
"""Optimizer steps of the holder in a round."""
PART_STEPS = 8
"""Optimizer steps of a helper between two versions of its part."""
LOOK_SECONDS = 0.5
"""Time between two looks for a new round."""


@dataclass(frozen=True)
class Snapshot:
    """Weights as of a moment in a round."""

    epoch: int
    """Epoch of the lease."""
    number: int
    """Number of the round, from 1."""
    steps: int
    """Optimizer steps since the beginning of the round."""
    weights: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        """Return it as its file has it."""
        facts = {"epoch": self.epoch, "number": self.number, "steps": self.steps}
        return save(dict(self.weights), {name: str(value) for name, value in facts.items()})

    @classmethod
    def read(cls, path: Path) -> Snapshot | None:
        """Return what a file has, None if there is no such file or it is damaged."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                names = file.keys()
                weights = {name: file.get_tensor(name) for name in names}
                epoch, number, steps = (int(facts[name]) for name in ("epoch", "number", "steps"))
                return cls(epoch, number, steps, weights)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def is_of(self, epoch: int, number: int) -> bool:
        """Return whether it is of this round."""
        return (self.epoch, self.number) == (epoch, number)


class Group:
    """One sidecar's part in the group of the store `root`."""

    def __init__(self, root: Path, learner: Learner) -> None:
        self._root, self._folder, self._learner = root, root / FOLDER, learner
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="group")
        self._epoch = self._number = self._began = self._restarts = self._sent = 0
        self._parts: Future[list[Snapshot]] | None = None
        self._newest: Future[Snapshot | None] | None = None
        self._written: Future[None] | None = None
        self._looked, self._changed = float("-inf"), 0
        self.helpers = 0
        """Helpers whose work the last round has taken up."""

    def lead(self, epoch: int) -> None:
        """Go on with the group; the holder of `epoch` calls it after each micro-batch."""
        steps = self._learner.step - self._began
        if epoch != self._epoch or self._learner.restarts != self._restarts:
            self._epoch = epoch
            self._open()
        elif self._parts is not None and self._parts.done():
            parts = self._parts.result()
            self._learner.average([(one.weights, one.steps) for one in parts], steps)
            self.helpers = len(parts)
            self._open()
        elif self._parts is None and steps >= ROUND_STEPS:
            self._parts = self._worker.submit(self._read_parts, self._epoch, self._number)

    def pause(self) -> None:
        """End the round, as nobody waits to help."""
        self._epoch, self._parts, self.helpers = 0, None, 0

    def follow(self) -> bool:
        """Return whether there is a round to help in; begin with its weights if it is a new one."""
        now = time.monotonic()
        if self._newest is None and now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._newest = self._worker.submit(self._read_round)
        if self._newest is not None and self._newest.done():
            newest, self._newest = self._newest.result(), None
            if newest is not None and not self._learner.drafter.unfit(newest.weights):
                self._learner.drafter.take(newest.weights)
                self._epoch, self._number = newest.epoch, newest.number
                self._began, self._sent = self._learner.step, 0
        return self._number > 0

    def contribute(self) -> None:
        """Hand over what this helper has made of the round; it calls this after micro-batches."""
        steps = self._learner.step - self._began
        writes = self._written is not None and not self._written.done()
        if steps >= self._sent + PART_STEPS and not writes:
            self._sent = steps
            part = self._snapshot(steps)
            self._written = self._worker.submit(self._write, files.owned(PART), part)

    def close(self) -> None:
        """Finish writing, and remove this process's part."""
        self._worker.shutdown(cancel_futures=True)
        (self._folder / files.owned(PART)).unlink(missing_ok=True)

    def _open(self) -> None:
        """Begin the next round from the holder's weights."""
        self._parts, self._restarts = None, self._learner.restarts
        self._number, self._began = self._number + 1, self._learner.step
        self._worker.submit(self._write, ROUND, self._snapshot(0))

    def _snapshot(self, steps: int) -> Snapshot:
        weights = {name: w.to("cpu", copy=True) for name, w in self._learner.weights().items()}
        return Snapshot(self._epoch, self._number, steps, weights)

    # -- in the thread ---------------------------------------------------------------------------

    def _write(self, name: str, snapshot: Snapshot) -> None:
        try:
            files.replace(self._root, self._folder / name, snapshot.to_bytes())
        except EnvironmentProblem as error:
            say(f"sidecar: {error}")

    def _read_round(self) -> Snapshot | None:
        """Return the newest round, None if it is the one that was read before."""
        path = self._folder / ROUND
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return None
        if changed == self._changed:
            return None
        self._changed = changed
        return Snapshot.read(path)

    def _read_parts(self, epoch: int, number: int) -> list[Snapshot]:
        """Return the parts of a round, and remove those of processes that have ended."""
        parts = []
        for path in self._folder.glob("*@*"):
            if files.is_orphan(path) or files.is_old(path):
                path.unlink(missing_ok=True)
                continue
            part = Snapshot.read(path) if path.name.startswith(PART) else None
            if part is not None and part.is_of(epoch, number) and part.steps > 0:
                parts.append(part)
        return parts
