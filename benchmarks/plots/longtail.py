"""Draw a rollout: unfinished requests of every system, throughput and strategy of the adaptive one.

    python -m benchmarks.plots.longtail RESULT.json [RESULT.json ...]

The command draws results anew, each next to its file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.harness.workload import CurvePoint

ADAPTIVE = "adaptive"
WIDEST = 1.6
"""Seconds shown, at most, as a multiple of the slowest system's that is not an outlier."""
COLOURS = {
    "off": "#7f7f7f",
    "stock": "#c7c7c7",
    "upstream adaptive": "#9467bd",
    "adaptive": "#d62728",
    "adaptive, sidecar": "#ff9896",
}
FIXED_COLOURS = ("#1f77b4", "#2ca02c", "#17becf", "#ff7f0e", "#8c564b", "#e377c2", "#bcbd22")
_LEGEND: dict[str, Any] = {
    "loc": "upper left",
    "bbox_to_anchor": (1.01, 1.02),
    "frameon": False,
    "alignment": "left",
    "fontsize": 9,
    "title_fontsize": 9,
}


@dataclass(frozen=True)
class Line:
    """One system's rollout."""

    system: str
    seconds: float
    curve: Sequence[CurvePoint]


def plot(lines: Sequence[Line], requests: int, path: Path) -> None:
    """Write the picture of rollouts of `requests` requests to `path`.

    If a system has several lines, the first is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = {line.system: line for line in reversed(lines)}
    ordered = sorted(systems.values(), key=lambda line: line.seconds)
    shown = _shown([line.seconds for line in ordered])
    colours = _colours(ordered)
    adaptive = systems.get(ADAPTIVE)
    with_speed = adaptive is not None and any(p["tokens_per_s"] for p in adaptive.curve)
    figure, panels = pyplot.subplots(
        2 if with_speed else 1,
        1,
        figsize=(11, 5.6 if with_speed else 3.6),
        sharex=True,
        squeeze=False,
        height_ratios=(3, 2) if with_speed else None,
    )
    _draw_left(panels[0][0], ordered, requests, shown, colours)
    if with_speed and adaptive is not None:
        _draw_speed(panels[1][0], adaptive, colours)
    panels[-1][0].set_xlabel("seconds since all requests were submitted")
    panels[0][0].set_xlim(0, shown)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _shown(seconds: Sequence[float]) -> float:
    """Return the seconds to show: of all systems but those far slower than the others."""
    shown = seconds[0]
    for each in seconds:
        if each <= WIDEST * shown:
            shown = each
    return 1.03 * shown


def _colours(lines: Sequence[Line]) -> dict[str, str]:
    """Return a colour for each system and strategy; a strategy has that of its fixed system."""
    systems = {line.system for line in lines}
    strategies = {
        str(p["strategy"]) for line in lines for p in line.curve if line.system == ADAPTIVE
    }
    others = iter(FIXED_COLOURS)
    return {
        name: COLOURS.get(name) or next(others, "#333333") for name in sorted(systems | strategies)
    }


def _draw_left(
    axes: Axes, lines: Sequence[Line], requests: int, shown: float, colours: dict[str, str]
) -> None:
    """Draw the unfinished requests over time, one line a system, the fastest first."""
    for line in reversed(lines):
        seconds = [0.0, *(point["seconds"] for point in line.curve), line.seconds]
        left = [requests, *(point["left"] for point in line.curve), 0]
        emphasised = line.system == ADAPTIVE
        axes.plot(
            seconds,
            left,
            drawstyle="steps-post",
            color=colours[line.system],
            lw=2.6 if emphasised else 1.4,
            zorder=3 if emphasised else 2,
            label=_label(line, shown),
        )
        if line.seconds <= shown:
            # All lines run along the level of one request: a dot shows where each ends.
            axes.plot(line.seconds, 0, "o", color=colours[line.system], ms=5, clip_on=False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="step time", **_LEGEND)
    axes.set_ylabel("unfinished requests")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _label(line: Line, shown: float) -> str:
    beyond = " (not all shown)" if line.seconds > shown else ""
    return f"{line.system}: {line.seconds:.1f} s{beyond}"


def _draw_speed(axes: Axes, line: Line, colours: dict[str, str]) -> None:
    """Draw the adaptive system's throughput, the strategy of each moment as a colour."""
    points = [point for point in line.curve if point["tokens_per_s"] is not None]
    names = list(dict.fromkeys(str(point["strategy"]) for point in points))
    before = 0.0
    for point in points:
        # A point holds the throughput since the point before.
        name = str(point["strategy"])
        axes.bar(
            before,
            point["tokens_per_s"] or 0.0,
            width=point["seconds"] - before,
            align="edge",
            color=colours[name],
            alpha=0.75,
            edgecolor="white",
        )
        before = point["seconds"]
    for name in names:
        axes.bar(0, 0, color=colours[name], alpha=0.75, label=name)
    axes.legend(title="strategy", **_LEGEND)
    axes.set_ylabel(f"tokens/s ({line.system})")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures of these result files anew."""
    for name in sys.argv[1:] if argv is None else argv:
        path = Path(name)
        result = json.loads(path.read_text(encoding="utf-8"))
        lines = [Line(run["system"], run["seconds"], run["curve"]) for run in result["runs"]]
        plot(lines, len(result["workload"]), path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
