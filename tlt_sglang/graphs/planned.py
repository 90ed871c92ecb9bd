"""The plan of an engine, or of one that is to be: from its configuration and its model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.plan import Plan, Use, plan
from tlt_sglang.graphs.sizes import GPUS, Sizes, worth
from tlt_sglang.strategy.arms import Strategy

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""What is captured where SGLang does not say."""
GPU = "h100"


def planned(
    pool: Sequence[Strategy],
    model: Mapping[str, Any],
    *,
    draft_vocab: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    max_batch: int | None = None,
    budget_gb: float | None = None,
    gpu: str = GPU,
) -> Plan:
    """The plan for `pool` and a target with the config.json `model`.

    Raises ConfigError for a model of another kind, and for a budget that has no room for plain
    decoding.
    """
    sizes = Sizes.of(model, draft_vocab)
    try:
        return plan(
            pool,
            batch_sizes,
            sizes.memory,
            None if budget_gb is None else int(budget_gb * 1e9),
            lambda arm, size: worth(sizes, GPUS[gpu], arm, size),
            max_batch=max_batch,
        )
    except ValueError as error:
        raise ConfigError(
            f"--tlt-graph-memory-gb {budget_gb:g} is not possible: {error}; give more."
        ) from error


def described(made: Plan) -> str:
    """The plan as a table, a line for each strategy, and what it takes and leaves out."""
    arms = dict.fromkeys(use.strategy for use in [*made.uses, *made.dropped])
    rows = [("strategy", "batch sizes", "dropped", "loss")]
    for arm in arms:
        gone = [use.batch_size for use in made.dropped if use.strategy == arm]
        lost = sum(made.dropped[Use(arm, size)] for size in gone)
        kept = [use.batch_size for use in made.uses if use.strategy == arm]
        rows.append((str(arm), _spans(kept), _spans(gone), f"{100 * lost:.1f} %" if gone else ""))
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append("")
    for name, size in (
        ("naive: every strategy its own graphs", made.naive_bytes),
        ("shared: each graph once", made.shared_bytes),
        (f"chosen: {len(made.graphs)} graphs", made.bytes),
    ):
        lines.append(f"{name:38} {size / 1e9:7.2f} GB")
    return "\n".join(lines)


def _spans(batch_sizes: Sequence[int]) -> str:
    """`1-8 (4)`: the first, the last, and how many."""
    if not batch_sizes:
        return "-"
    first, last = min(batch_sizes), max(batch_sizes)
    return str(first) if first == last else f"{first}-{last} ({len(batch_sizes)})"
