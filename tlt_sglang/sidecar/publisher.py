"""From the gate to the store: publishes candidates, and follows the version that engines use."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tlt_sglang import __version__
from tlt_sglang.errors import EnvironmentProblem, TltError
from tlt_sglang.sidecar.process import log
from tlt_sglang.weights import describe

if TYPE_CHECKING:
    from tlt_sglang.observe.scalars import Scalars
    from tlt_sglang.sidecar.learner import Gate, Learner
    from tlt_sglang.weights.lease import Lease
    from tlt_sglang.weights.manifest import Expected
    from tlt_sglang.weights.store import Store


class Publisher:
    """Publishes what `learner` has trained where it beats the version in use.

    `folder` holds version 0 of the drafter, `expected` describes it.
    """

    def __init__(
        self,
        learner: Learner,
        store: Store,
        lease: Lease,
        expected: Expected,
        folder: Path,
        scalars: Scalars | None,
    ) -> None:
        self.version = 0
        """Version that engines are to use, as the store has it."""
        self.published = 0
        """Versions that this process has published."""
        self.last_gate: Gate | None = None
        self._learner, self._store, self._scalars = learner, store, scalars
        self._lease = lease
        self._expected, self._folder = expected, folder

    def run_gate(self, may_continue: Callable[[], bool]) -> None:
        """Compare candidate and version in use; publish the candidate if it passes."""
        self.follow()
        gate = self._learner.gate(may_continue)
        if gate is None:
            return
        self.last_gate = gate
        if gate.passed:
            self._publish(gate)
        self._log_gate(gate)

    def follow(self) -> None:
        """Start over from the version in use, where engines rejected ours or another came."""
        try:
            latest = self._store.latest() or 0
            if latest == self.version:
                return
            weights = self._store.load(latest, self._expected) if latest else None
        except TltError as error:
            log(str(error))
            return
        self.version = latest
        self._learner.begin_again(weights or describe.load(self._folder))
        log(f"continuing from version {latest}")

    def _publish(self, gate: Gate) -> None:
        learner = self._learner
        weights = {n: t.detach().bfloat16().cpu() for n, t in learner.candidate().items()}
        figures = {name: round(value, 4) for name, value in asdict(gate).items()}
        figures |= {"step": learner.step, "target_version": learner.buffer.target_version}
        try:
            if not self._lease.hold(now=True) or self._lease.epoch is None:
                return  # another sidecar has taken over, and publishes
            version = self._store.publish(
                weights,
                self._expected.architecture,
                self._expected.base,
                parent=self.version or None,
                gate=figures,
                made_by=f"tlt sidecar, tlt-sglang {__version__}",
                epoch=self._lease.epoch,
            )
        except EnvironmentProblem as error:
            log(str(error))  # the next gate tries again
            return
        learner.published()
        self.version, self.published = version, self.published + 1
        log(
            f"version {version} published: accept length {gate.running:.3f} -> "
            f"{gate.candidate:.3f} on held-out requests, after {learner.step} steps"
        )

    def _log_gate(self, gate: Gate) -> None:
        """Append a line to STORE/training.jsonl."""
        learner = self._learner
        line = asdict(gate) | {
            "time": time.time(),
            "step": learner.step,
            "loss": learner.loss,
            "tokens": learner.tokens,
            "version": self.version,
            "target_version": learner.buffer.target_version,
        }
        try:
            with (self._store.root / "training.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log(f"STORE/training.jsonl cannot be written ({error.strerror})")
        if self._scalars is not None:
            lengths = {"in use": gate.running, "trained": gate.candidate}
            self._scalars.add(
                learner.step, {f"accept length/{name}": value for name, value in lengths.items()}
            )
