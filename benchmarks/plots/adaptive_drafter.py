"""Draw how the drafter learns: accept length and throughput over the minutes of each part."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.adaptive_drafter.processes import CHAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[Mapping[str, Any]]


def plot(curves: Mapping[str, Points], details: Mapping[str, Any], path: Path) -> None:
    """Write the curves, one part under another; nothing if no part has learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in curves if curves.get(f"{name}, held out")]
    if not names:
        return
    figure, rows = pyplot.subplots(len(names), 2, figsize=(12, 3.2 * len(names)), squeeze=False)
    for name, (left, right) in zip(names, rows, strict=True):
        points = curves[name]
        _draw_accept_length(left, points, curves[f"{name}, held out"])
        if name == "adapted" and "drift" in details:
            _draw_drift(left, curves["frozen"], details["drift"])
        right.plot(
            [point["seconds"] / 60 for point in points],
            [point["tokens_per_s"] for point in points],
            color="tab:green",
        )
        for axes in (left, right):
            _draw_swaps(axes, points)
            axes.set_xlabel("minutes (dotted: a version is swapped in)")
        left.set_title(f"{name}: accept length")
        right.set_title(f"{name}: tokens/s of the traffic")
        left.legend(fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_accept_length(axes: Axes, points: Points, probes: Points) -> None:
    axes.plot(
        [probe["seconds"] / 60 for probe in probes],
        [probe["accept_length"] for probe in probes],
        "o-",
        ms=3,
        label=f"{CHAIN}, greedy, some held-out prompts",
    )
    axes.plot(
        [point["seconds"] / 60 for point in points],
        [point["accept_length"] for point in points],
        color="0.6",
        lw=0.8,
        label="as chosen, traffic",
    )


def _draw_drift(axes: Axes, frozen: Points, levels: Mapping[str, float]) -> None:
    """Draw the time before adaptation, and the levels before and after the target's update."""
    end = frozen[-1]["seconds"]
    axes.plot(
        [(point["seconds"] - end) / 60 for point in frozen],
        [point["accept_length"] for point in frozen],
        color="tab:red",
        lw=0.8,
        label="as chosen, traffic, drafter frozen",
    )
    for level, color, label in (
        ("before", "tab:green", "before the target's update, all prompts"),
        ("fallen", "tab:red", "frozen drafter after it, all prompts"),
    ):
        axes.axhline(levels[level], color=color, lw=1, ls="--", label=label)


def _draw_swaps(axes: Axes, points: Points) -> None:
    for before, after in itertools.pairwise(points):
        if after["version"] != before["version"]:
            axes.axvline(after["seconds"] / 60, color="grey", lw=0.6, ls=":")
