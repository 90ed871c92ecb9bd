"""Draw the steps of GRPO: reward, time and accept length of both systems."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class StepValues(Protocol):
    """The values of one step of one system."""

    system: str
    step: int
    rollout_seconds: float
    train_seconds: float
    update_seconds: float
    rewards: list[float]
    accept_length: float


def plot(steps: Sequence[StepValues], path: Path) -> None:
    """Write the picture to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (reward, seconds, accept) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for index, name in enumerate(dict.fromkeys(one.system for one in steps)):
        own = [one for one in steps if one.system == name]
        numbers = [one.step + 1 for one in own]
        reward.plot(numbers, [statistics.mean(one.rewards) for one in own], "o-", label=name)
        _draw_seconds(seconds, own, index)
        accept.plot(numbers, [one.accept_length for one in own], "o-", label=name)
    reward.set_title("mean reward")
    seconds.set_title("seconds of a step")
    accept.set_title("accept length")
    for axes in (reward, seconds, accept):
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7, loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_seconds(axes: Axes, steps: Sequence[StepValues], index: int) -> None:
    """Draw a system's steps as bars: rollout, training and update on top of each other."""
    left = [one.step + 1 + 0.4 * (index - 0.5) for one in steps]
    base = [0.0] * len(steps)
    for part, heights, alpha in (
        ("rollout", [one.rollout_seconds for one in steps], 1.0),
        ("train", [one.train_seconds for one in steps], 0.55),
        ("update", [one.update_seconds for one in steps], 0.25),
    ):
        label = f"{steps[0].system}: {part}"
        axes.bar(left, heights, 0.36, base, color=f"C{index}", alpha=alpha, label=label)
        base = [a + b for a, b in zip(base, heights, strict=True)]
