"""Draw a whole RL run: reward over steps and over time, time by phase, and accept length."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("rollout", "train", "update")


class StepValues(Protocol):
    """The values of one step of one system."""

    @property
    def rollout_seconds(self) -> float: ...
    @property
    def train_seconds(self) -> float: ...
    @property
    def update_seconds(self) -> float: ...
    @property
    def reward(self) -> float: ...
    @property
    def drafter_version(self) -> int: ...


def plot(
    systems: Mapping[str, Sequence[StepValues]],
    accept_lengths: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Write the picture to `path`; the systems are in the order of their legend.

    `accept_lengths` are those of each step, of the systems with a drafter.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((rewards, sooner), (phases, accept)) = pyplot.subplots(2, 2, figsize=(11, 7))
    for index, (name, steps) in enumerate(systems.items()):
        numbers = range(1, len(steps) + 1)
        values = [step.reward for step in steps]
        # The curves of one reward lie on each other: the first is the widest.
        width = 1.2 + 2 * (len(systems) - index - 1)
        rewards.plot(numbers, values, color=f"C{index}", linewidth=width, label=name)
        minutes = [at / 60 for at in itertools.accumulate(sum(_parts(step)) for step in steps)]
        sooner.plot(minutes, values, color=f"C{index}", label=name)
        if name in accept_lengths:
            accept.plot(numbers, accept_lengths[name], color=f"C{index}", label=name)
            _draw_versions(accept, steps, accept_lengths[name], index)
    _draw_phases(phases, systems)
    for axes, title, label in (
        (rewards, "mean reward, over steps", "step"),
        (sooner, "mean reward, over time", "minutes"),
        (phases, "time by phase", ""),
        (accept, "accept length, by strategy; a dot is a new version", "step"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    for axes in (rewards, accept):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _parts(step: StepValues) -> tuple[float, float, float]:
    return step.rollout_seconds, step.train_seconds, step.update_seconds


def _draw_phases(axes: Axes, systems: Mapping[str, Sequence[StepValues]]) -> None:
    """Draw the minutes of each system as a bar, its phases on top of each other."""
    names = list(systems)
    base = [0.0] * len(names)
    for phase, label in enumerate(PHASES):
        heights = [sum(_parts(step)[phase] for step in systems[name]) / 60 for name in names]
        axes.bar(names, heights, 0.6, base, color=f"C{phase + 4}", label=label)
        base = [a + b for a, b in zip(base, heights, strict=True)]
    axes.set_ylabel("minutes")


def _draw_versions(
    axes: Axes, steps: Sequence[StepValues], accept_lengths: Sequence[float], index: int
) -> None:
    """Mark the steps that a new version of the drafter reached."""
    before = [0, *(step.drafter_version for step in steps)]
    new = [
        (number, accept_lengths[number - 1])
        for number, step in enumerate(steps, 1)
        if step.drafter_version > before[number - 1]
    ]
    if new:
        axes.plot(*zip(*new, strict=True), "o", color=f"C{index}", markersize=5)
