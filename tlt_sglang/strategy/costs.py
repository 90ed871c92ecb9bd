"""Step costs: seconds for each strategy and batch size, as recently measured.

Where a strategy was not measured at a batch size, its cost comes from a model of the machine,
fitted to all measurements, and corrected by how far that is off where the strategy was measured:

    base + row * (rows of the target) + drafts + step * (draft steps) + draft_row * (rows of drafts)

in which the last three are for strategies that draft. All coefficients are non-negative.

Calibrated costs stand in for measurements until there are some. The machine may have been busy
during the calibration, or contexts short: the strategies that were measured since then show by how
much calibrated costs are off, and the others are corrected by the same factor.

When the cost of a strategy that is in use changes at once, the machine has: another process takes
its cores or leaves them, a trainer beside the engine for one. What was measured before says little
then, and how much each strategy suffers differs. So an *era* ends: strategies that were not
measured since count as calibrated only, or as measured and changed by the same factor, and should
be tried once.

Pure (numpy only), and runs in the scheduler process. It holds no clock: the engine measures.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tlt_sglang.strategy.policy import bucket
from tlt_sglang.strategy.strategies import Strategy

WINDOW = 16
"""Measurements behind a median."""
TRUSTED = 3
"""Measurements from which on a median stands alone."""
PRIOR = (1.0, 0.02, 0.05, 0.05, 0.002)
"""The model's coefficients before anything is measured, as shares of the first."""
STIFFNESS = 0.05
"""Weight of the prior, over that of one measured cost."""
REFIT = 8
"""New costs after which the model is fitted again."""
TRIED = 2
"""Measurements in an era after which a strategy needs no trial."""
RECENT = 5
"""Measurements that are compared with those before them in the window."""
NEW_ERA = math.log(1.3)
"""Change of the log of a cost that ends an era."""
FRESH = 64
"""Steps for which a measurement stands: with longer contexts a step costs more, and how much more
differs between strategies."""


@dataclass(slots=True)
class _Cell:
    """The costs of one strategy in one bucket of batch sizes."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    calibrated: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    median: float = 0.0
    """Median of `seconds`."""
    calibration: float = 0.0
    """Median of `calibrated`."""
    updated: int = 0
    """The step of the last measurement."""
    era: int = 0
    """The era of `seconds`."""
    change: float = 0.0
    """The sum of all changes up to that era."""

    @property
    def drift(self) -> float | None:
        """Log of measured over calibrated cost, where both are known."""
        if len(self.seconds) < TRUSTED or not self.calibrated:
            return None
        return math.log(self.median / self.calibration)

    def take_change(self) -> float:
        """Return by how much the log of the cost has just changed, and forget what was before; 0.0
        if it has not."""
        seconds = list(self.seconds)
        before, recent = seconds[:-RECENT], seconds[-RECENT:]
        if len(before) < RECENT:
            return 0.0
        change = math.log(statistics.median(recent) / statistics.median(before))
        if abs(change) < NEW_ERA:
            return 0.0
        self.seconds = deque(recent, maxlen=WINDOW)
        return change


class Costs:
    """Step costs by strategy and bucket of batch sizes."""

    def __init__(self) -> None:
        self._cells: dict[Strategy, dict[int, _Cell]] = {}
        self._coefficients = np.array(PRIOR)
        self._unfitted = 0
        self._drift = 0.0
        self._drifts: dict[Strategy, float] = {}
        """The log of present over calibrated costs, by what was measured in this era: for all
        strategies, and for those that were."""
        self._is_dirty = False
        """True if something was measured since those were computed."""
        self._now = 0
        """The step of the last measurement."""
        self._era = 0
        self._era_size = 0
        """The bucket in which the change was seen that began the era; 0 for the first era."""
        self._change = 0.0
        """The log of all changes of the machine together."""

    def observe(
        self,
        strategy: Strategy,
        batch_size: int,
        seconds: float,
        now: int,
        calibrates: bool = False,
    ) -> None:
        """Add the time of one step, measured or calibrated, at step number `now`."""
        cells, size = self._cells.setdefault(strategy, {}), bucket(batch_size)
        is_new = size not in cells
        cell = cells.setdefault(size, _Cell())
        if calibrates:
            cell.calibrated.append(seconds)
            cell.calibration = statistics.median(cell.calibrated)
        else:
            if now - cell.updated > FRESH:
                cell.seconds.clear()
            self._add(cell, size, seconds)
        cell.updated = self._now = now
        self._is_dirty = True
        self._unfitted += REFIT if is_new else 1

    def seconds(
        self, strategy: Strategy, batch_size: int, now: int
    ) -> tuple[float | None, int, int]:
        """Return (step cost, measurements at this batch size, steps since the last of them).

        A calibration counts as one measurement. Without measurements the cost is derived; it is
        None if nothing at all was ever measured.
        """
        if not self._cells:
            return None, 0, 0
        # Enough measurements stand alone.
        size = bucket(batch_size)
        cell = self._cells.get(strategy, {}).get(size)
        measured = 0 if cell is None else self._fresh(cell)
        if cell is not None and measured >= TRUSTED:
            return cell.median, measured, now - cell.updated
        # Otherwise the cost is derived from the calibration, or from the model.
        if cell is not None and len(cell.calibrated) >= TRUSTED:
            derived = self._corrected(strategy, cell)
        else:
            derived = self._modelled(strategy, size) * math.exp(self._model_error(strategy, size))
        if cell is None:
            return derived, 0, 0
        # One measurement may be an outlier; the derived cost counts as another.
        if not measured:
            count = len(cell.calibrated) or TRUSTED
            present = self._present(strategy, cell)
            return _weighted(derived, present, count), 1, now - cell.updated
        return _weighted(derived, cell.median, measured), measured, now - cell.updated

    def is_outdated(self, strategy: Strategy, batch_size: int) -> bool:
        """Return whether a strategy should be tried, as the machine has changed since it was
        measured. Only for the batch sizes at which that was seen: it tells of others, too."""
        size = bucket(batch_size)
        cell = self._cells.get(strategy, {}).get(size)
        return size == self._era_size and (cell is None or self._measured(cell) < TRIED)

    def _add(self, cell: _Cell, size: int, seconds: float) -> None:
        """Add a measurement to a cell; where it shows that the machine has changed, end the era."""
        if cell.era != self._era:
            cell.seconds.clear()
        cell.seconds.append(seconds)
        if change := cell.take_change():
            self._era += 1
            self._change += change
            self._era_size, self._drifts = size, {}
        cell.era, cell.change = self._era, self._change
        cell.median = statistics.median(cell.seconds)

    def _measured(self, cell: _Cell) -> int:
        """Return how many measurements a cell has of this era."""
        return len(cell.seconds) if cell.era == self._era else 0

    def _fresh(self, cell: _Cell) -> int:
        """Return how many measurements stand: those of this era, unless they are old."""
        return self._measured(cell) if self._now - cell.updated <= FRESH else 0

    def _median_drifts(self) -> tuple[float, dict[Strategy, float]]:
        """Return the log of present over calibrated costs, as far as this era tells."""
        drifts = {
            strategy: [
                cell.drift
                for cell in cells.values()
                if self._fresh(cell) and cell.drift is not None
            ]
            for strategy, cells in self._cells.items()
        }
        measured = [drift for those in drifts.values() for drift in those]
        if not measured:
            return self._drift, self._drifts
        by_strategy = {each: statistics.median(those) for each, those in drifts.items() if those}
        return statistics.median(measured), by_strategy if self._era else {}

    def _present(self, strategy: Strategy, cell: _Cell) -> float:
        """Return the present cost of a cell's steps as far as it is known."""
        if self._fresh(cell):
            return cell.median
        if cell.calibrated:
            return self._corrected(strategy, cell)
        return cell.median * math.exp(self._change - cell.change)

    def _corrected(self, strategy: Strategy, cell: _Cell) -> float:
        """Return the calibrated cost, corrected by the drift since then."""
        if self._is_dirty:
            self._drift, self._drifts = self._median_drifts()
            self._is_dirty = False
        return cell.calibration * math.exp(self._drifts.get(strategy, self._drift))

    def _modelled(self, strategy: Strategy, size: int) -> float:
        if self._unfitted >= REFIT:
            self._fit()
        return float(_features(strategy, size) @ self._coefficients)

    def _model_error(self, strategy: Strategy, size: int) -> float:
        """Return the log of measured over modelled cost, at the batch sizes nearest to `size`."""
        cells = self._cells.get(strategy)
        if not cells:
            return 0.0
        error = weights = 0.0
        for other, cell in cells.items():
            if other == size:
                continue
            weight = 1.0 / abs(math.log(other / size)) ** 2
            error += weight * math.log(
                self._present(strategy, cell) / self._modelled(strategy, other)
            )
            weights += weight
        return error / weights if weights else 0.0

    def _fit(self) -> None:
        """Fit the coefficients by least squares of relative errors, pulled towards the prior."""
        self._unfitted = 0
        # A row for every cell: the modelled cost over the present one should be 1.
        rows, targets = [], []
        for strategy, cells in self._cells.items():
            for size, cell in cells.items():
                rows.append(_features(strategy, size) / self._present(strategy, cell))
                targets.append(1.0)
        # A row for every coefficient: its value over that of the prior should be 1, too.
        present = [
            self._present(strategy, cell)
            for strategy, cells in self._cells.items()
            for cell in cells.values()
        ]
        base = min(present)
        for index, share in enumerate(PRIOR):
            row = np.zeros(len(PRIOR))
            row[index] = STIFFNESS / (share * base)
            rows.append(row)
            targets.append(STIFFNESS)
        solution = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
        self._coefficients = np.maximum(solution, 1e-3 * base * np.array(PRIOR))


def _weighted(one: float, other: float, count: int) -> float:
    """Return the geometric mean of two costs, the other with a weight of `count`."""
    return math.exp((math.log(one) + count * math.log(other)) / (count + 1))


def _features(strategy: Strategy, size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the factors of the model's coefficients for a step of `size` requests."""
    drafts = float(strategy.drafter != "off")
    steps = strategy.num_steps
    rows = size * strategy.num_draft_tokens
    # The drafter computes what was verified, then topk branches for each step but the last.
    draft_rows = rows + size * strategy.topk * max(0, steps - 1) if steps else 0
    return np.array([1.0, rows, drafts, steps, draft_rows], dtype=np.float64)
