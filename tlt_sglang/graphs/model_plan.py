"""The capture plan of a model: built from its config.json, and printed as a table.

Pure, and runs in the scheduler process (for the engine that starts) and in `tlt plan` (for one that
is only considered). It captures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.plan import CapturePlan, Use, plan
from tlt_sglang.graphs.sizes import GPUS, ModelSizes, expected_throughput
from tlt_sglang.strategy.strategies import Strategy

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Batch sizes to capture where SGLang does not name them."""
GPU = "h100"


def plan_for_model(
    pool: Sequence[Strategy],
    model: Mapping[str, object],
    *,
    draft_vocab: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    max_batch: int | None = None,
    budget_gb: float | None = None,
    gpu: str = GPU,
) -> CapturePlan:
    """Return the plan for `pool` and a target with the config.json `model`.

    Raises ConfigError for a model that is not Llama-like, and for a budget that has no room for
    plain decoding.
    """
    sizes = ModelSizes.from_config(model, draft_vocab)
    try:
        return plan(
            pool,
            batch_sizes,
            sizes.memory,
            None if budget_gb is None else int(budget_gb * 1e9),
            lambda strategy, size: expected_throughput(sizes, GPUS[gpu], strategy, size),
            max_batch=max_batch,
        )
    except ValueError as error:
        raise ConfigError(
            f"--tlt-graph-memory-gb {budget_gb:g} is not possible: {error}; give more."
        ) from error


def plan_table(made: CapturePlan) -> str:
    """Return the plan as text: a line for each strategy, and three totals of memory."""
    # A line for each strategy: where it is captured, where the budget drops it.
    strategies = dict.fromkeys(use.strategy for use in [*made.uses, *made.dropped])
    rows = [("strategy", "batch sizes", "dropped", "loss")]
    for strategy in strategies:
        kept = [use.batch_size for use in made.uses if use.strategy == strategy]
        dropped = [use.batch_size for use in made.dropped if use.strategy == strategy]
        lost = sum(made.dropped[Use(strategy, size)] for size in dropped)
        loss = f"{100 * lost:.1f} %" if dropped else ""
        rows.append((str(strategy), _size_range(kept), _size_range(dropped), loss))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    # The totals: what sharing and dropping save.
    lines.append("")
    for name, size in (
        ("naive: every strategy its own graphs", made.naive_bytes),
        ("shared: each graph once", made.shared_bytes),
        (f"chosen: {len(made.graphs)} graphs", made.bytes),
    ):
        lines.append(f"{name:38} {size / 1e9:7.2f} GB")
    return "\n".join(lines)


def _size_range(batch_sizes: Sequence[int]) -> str:
    """Return for instance `1-8 (4)`: the first, the last, and how many."""
    if not batch_sizes:
        return "-"
    first, last = min(batch_sizes), max(batch_sizes)
    return str(first) if first == last else f"{first}-{last} ({len(batch_sizes)})"
