"""The learning curve of a run: the loss, and the accept length on held-out responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tlt_sglang.training import evaluate, responses
from tlt_sglang.training.corpus import Response
from tlt_sglang.training.features import Features
from tlt_sglang.training.trainer import Report, Trainer

EVALUATE_SECONDS = 180.0
"""Training time between two points of the curve."""
EVALUATED = 40
"""Held-out sequences of each kind at a point; the last point is measured on all of them."""


@dataclass(frozen=True)
class Point:
    """A point of the curve."""

    step: int
    tokens: int
    seconds: float
    loss: float
    accept_length: Mapping[str, float]
    """Accept length of a chain of 3, by kind of response."""


class Curve:
    """Follows `trainer`; `features` are those of the `held_out` responses."""

    def __init__(self, trainer: Trainer, features: Features, held_out: Sequence[Response]) -> None:
        self.trainer = trainer
        self.points: list[Point] = []
        self.loss = 0.0
        """Moving average of the loss."""
        kinds = [responses.kind(response) for response in held_out]
        self._groups = evaluate.by_kind(features, kinds, len(held_out))
        self._temperatures = {responses.kind(r): r.temperature for r in held_out}

    def state(self) -> dict[str, Any]:
        """Return the trainer's state with the curve."""
        return self.trainer.state() | {"curve": json.dumps(self.to_json())}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.points = [Point(**point) for point in json.loads(state.pop("curve"))]
        self.trainer.restore(state)

    def add(self, report: Report) -> None:
        """Follow an optimizer step; now and then, add a point."""
        self.loss = report.loss if not self.loss else 0.95 * self.loss + 0.05 * report.loss
        last = self.points[-1].seconds if self.points else 0.0
        if report.progress.seconds - last > EVALUATE_SECONDS:
            self.evaluate(EVALUATED)

    def evaluate(self, most: int | None = None) -> Mapping[str, float]:
        """Add a point, from at most `most` sequences of each kind; return its accept lengths."""
        trainer, progress = self.trainer, self.trainer.progress
        lengths = {}
        for kind, sequences in sorted(self._groups.items()):
            length = evaluate.accept_length(
                trainer.drafter,
                trainer.frozen,
                sequences[:most],
                steps=3,
                temperature=self._temperatures[kind],
            )
            lengths[kind] = round(length.mean, 4)
        seconds, loss = round(progress.seconds, 1), round(self.loss, 4)
        self.points.append(Point(progress.step, progress.tokens, seconds, loss, lengths))
        return lengths

    def line(self, report: Report) -> str:
        """Return one line of progress."""
        lengths = self.points[-1].accept_length if self.points else {}
        accept = ", ".join(f"{kind} {length:.2f}" for kind, length in lengths.items())
        return f"loss {self.loss:.3f}, {report.tokens_per_s:.0f} tokens/s, accept {accept or '-'}"

    def to_json(self) -> list[dict[str, Any]]:
        """Return the points as JSON has them."""
        return [asdict(point) for point in self.points]
