"""What a step costs: seconds for each strategy and batch size, as measured of late.

Where a strategy was not measured at a batch size, its cost comes from a model of the machine,
fitted to all measurements, and corrected by how far that is off where the strategy was measured:

    base + row * (rows of the target) + round + step * (draft steps) + draft_row * (rows of drafts)

in which the last three are for strategies that draft. All are taken not to be negative.

What was calibrated stands for a measurement until there are some. The machine may have been busy
then, or contexts short: by how much the strategies that were measured since are off what was
calibrated, the others are taken to be off, too.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tlt_sglang.strategy.arms import Strategy
from tlt_sglang.strategy.policy import bucket

KEPT = 16
"""Measurements behind a median."""
TRUSTED = 3
"""Measurements from which on a median stands alone."""
EXPECTED = (1.0, 0.02, 0.05, 0.05, 0.002)
"""Of the model's terms, as shares of the first: what is believed before it is measured."""
STIFFNESS = 0.05
"""Weight of what is expected, over that of one measured cost."""
REFIT = 8
"""New costs after which the model is fitted again."""


@dataclass(slots=True)
class _Cell:
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    calibrated: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    median: float = 0.0
    """Of what was measured."""
    calibration: float = 0.0
    """The same of what was calibrated."""
    at: int = 0
    """The step of the last measurement."""

    @property
    def drift(self) -> float | None:
        """Log of measured over calibrated cost, where both are known."""
        if len(self.seconds) < TRUSTED or not self.calibrated:
            return None
        return math.log(self.median / self.calibration)


class Costs:
    """By strategy and bucket of batch sizes."""

    def __init__(self) -> None:
        self._cells: dict[Strategy, dict[int, _Cell]] = {}
        self._terms = np.array(EXPECTED)
        self._news = 0
        self._drifted = 0.0

    def observe(
        self,
        strategy: Strategy,
        batch_size: int,
        seconds: float,
        now: int,
        calibrates: bool = False,
    ) -> None:
        """A step took so long."""
        cells, size = self._cells.setdefault(strategy, {}), bucket(batch_size)
        known = size in cells
        cell = cells.setdefault(size, _Cell())
        cell.at = now
        if calibrates:
            cell.calibrated.append(seconds)
            cell.calibration = statistics.median(cell.calibrated)
        else:
            cell.seconds.append(seconds)
            cell.median = statistics.median(cell.seconds)
        if cell.calibrated:
            self._drifted = self._drift()
        self._news += REFIT if not known else 1
        if self._news >= REFIT:
            self._fit()

    def seconds(
        self, strategy: Strategy, batch_size: int, now: int
    ) -> tuple[float | None, int, int]:
        """(of a step, measurements at this batch size, steps since the last of them).

        What was calibrated counts as one measurement.
        Without measurements it is derived; None if nothing at all was ever measured.
        """
        if not self._cells:
            return None, 0, 0
        size = bucket(batch_size)
        cell = self._cells.get(strategy, {}).get(size)
        if cell is not None and len(cell.seconds) >= TRUSTED:
            return cell.median, len(cell.seconds), now - cell.at
        if cell is not None and len(cell.calibrated) >= TRUSTED:
            derived = self._calibrated(cell)
        else:
            derived = self._modelled(strategy, size) * math.exp(self._off(strategy, size))
        if cell is None:
            return derived, 0, 0
        # One measurement may be an outlier; what is derived counts as another.
        if not cell.seconds:
            count = len(cell.calibrated)
            return _between(derived, self._calibrated(cell), count), 1, now - cell.at
        count = len(cell.seconds)
        return _between(derived, cell.median, count), count, now - cell.at

    def _drift(self) -> float:
        """Log of what steps cost now over what they did when they were calibrated."""
        every = (cell.drift for cells in self._cells.values() for cell in cells.values())
        known = [drift for drift in every if drift is not None]
        return statistics.median(known) if known else 0.0

    def _present(self, cell: _Cell) -> float:
        """What a step of a cell costs now, as far as that is known."""
        return cell.median if cell.seconds else self._calibrated(cell)

    def _calibrated(self, cell: _Cell) -> float:
        """What was calibrated, as it would be now."""
        return cell.calibration * math.exp(self._drifted)

    def _modelled(self, strategy: Strategy, size: int) -> float:
        return float(_features(strategy, size) @ self._terms)

    def _off(self, strategy: Strategy, size: int) -> float:
        """Log of measured over modelled cost, at the batch sizes nearest to `size`."""
        cells = self._cells.get(strategy)
        if not cells:
            return 0.0
        off = weights = 0.0
        for other, cell in cells.items():
            if other == size:
                continue
            weight = 1.0 / abs(math.log(other / size)) ** 2
            off += weight * math.log(self._present(cell) / self._modelled(strategy, other))
            weights += weight
        return off / weights if weights else 0.0

    def _fit(self) -> None:
        """Least squares of relative errors, drawn towards what is expected."""
        self._news = 0
        rows, wanted = [], []
        for strategy, cells in self._cells.items():
            for size, cell in cells.items():
                rows.append(_features(strategy, size) / self._present(cell))
                wanted.append(1.0)
        every = [cell for of_one in self._cells.values() for cell in of_one.values()]
        base = min(map(self._present, every))
        for place, share in enumerate(EXPECTED):
            row = np.zeros(len(EXPECTED))
            row[place] = STIFFNESS / (share * base)
            rows.append(row)
            wanted.append(STIFFNESS)
        fitted = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
        self._terms = np.maximum(fitted, 1e-3 * base * np.array(EXPECTED))


def _between(one: float, other: float, count: int) -> float:
    """Of two costs, of which the other counts so many times."""
    return math.exp((math.log(one) + count * math.log(other)) / (count + 1))


def _features(strategy: Strategy, size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    drafts = float(strategy.drafter != "off")
    steps = strategy.num_steps
    rows = size * strategy.num_draft_tokens
    # The drafter computes what was verified, then topk branches for each step but the last.
    drafted = rows + size * strategy.topk * max(0, steps - 1) if steps else 0
    return np.array([1.0, rows, drafts, steps, drafted], dtype=np.float64)
