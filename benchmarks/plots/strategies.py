"""Draw the throughput of every strategy over that of plain decoding, by batch size.

    python -m benchmarks.plots.strategies RESULT.json [RESULT.json ...]

The command draws results anew, each next to its file.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PLAIN, ADAPTIVE = "off", "adaptive"

SpeedsOverPlain = Mapping[str, Mapping[int, float]]
"""For each side and batch size, the throughput over that of plain decoding."""


def plot(speeds: SpeedsOverPlain, path: Path) -> None:
    """Draw one line a side, the adaptive engine's thickest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    for side, by_size in speeds.items():
        emphasised = side == ADAPTIVE
        axes.plot(
            range(len(by_size)),
            list(by_size.values()),
            marker="o",
            color="#d62728" if emphasised else None,
            lw=2.6 if emphasised else 1.4,
            zorder=3 if emphasised else 2,
            label=side,
        )
    sizes = next(iter(speeds.values()))
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("requests")
    axes.set_ylabel("throughput over plain decoding")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def over_plain(speeds: Mapping[tuple[str, int], Sequence[float]]) -> SpeedsOverPlain:
    """Return the medians of the tokens a second of (side, batch size) over plain decoding's."""
    medians = {key: statistics.median(each) for key, each in speeds.items()}
    ratios: dict[str, dict[int, float]] = {}
    for (side, size), median in medians.items():
        ratios.setdefault(side, {})[size] = median / medians[PLAIN, size]
    return ratios


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures of these result files anew."""
    for name in sys.argv[1:] if argv is None else argv:
        path = Path(name)
        speeds: dict[tuple[str, int], list[float]] = {}
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
            part, _, size = run["part"].partition(" ")
            if part == "batch":
                key = run["side"], int(size)
                speeds.setdefault(key, []).append(run["tokens"] / run["seconds"])
        plot(over_plain(speeds), path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
