"""The command line of `tlt plan`, and the table that the engine prints at its start, too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.errors import ConfigError, FlagError, TltError
from tlt_sglang.flags import Parser
from tlt_sglang.graphs.plan import Plan, Use, plan
from tlt_sglang.graphs.sizes import GPUS, Sizes, worth
from tlt_sglang.strategy.arms import parse

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
STRATEGIES = "eagle3:5x8x32,eagle3:4x4x16,eagle3:3x4x8,eagle3:3x1x4,ngram:8"


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 a problem (one sentence), 2 bad usage."""
    try:
        _plan(argv)
    except TltError as error:
        print(f"tlt plan: {error}", file=sys.stderr)
        return 2 if isinstance(error, FlagError) else 1
    return 0


def _plan(argv: Sequence[str]) -> None:
    parser = Parser(
        "tlt plan", "Which graphs a pool of strategies needs, and their memory; needs no GPU."
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder with a config.json, a hub id, or smollm2-135m")
    add("--gpu", choices=sorted(GPUS), default="h100", help="(default: h100)")
    add("--tlt-strategies", default=STRATEGIES, metavar="S[,S]", help=f"(default: {STRATEGIES})")
    add("--tlt-graph-memory-gb", type=float, metavar="GB", help="at most so much (default: any)")
    add("--tlt-max-batch", type=int, metavar="N", help="no speculation above this batch size")
    add("--max-running-requests", type=int, default=128, metavar="N", help="(default: 128)")
    add("--draft-vocab", type=int, default=32000, metavar="N", help="(default: 32000)")
    if any(word in ("-h", "--help") for word in argv):
        parser.print_help()
        return
    args = parser.parse_args(argv)
    sizes = Sizes.of(_config(args.model), args.draft_vocab)
    print(described(_made(args, sizes)))


def _made(args: argparse.Namespace, sizes: Sizes) -> Plan:
    budget = args.tlt_graph_memory_gb
    most = args.max_running_requests
    if most < 1:
        raise ConfigError(f"--max-running-requests {most} is no batch; give 1 or more.")
    arms = [parse(text) for text in args.tlt_strategies.split(",")]
    gpu = GPUS[args.gpu]
    try:
        return plan(
            arms,
            [size for size in BATCH_SIZES if size < most] + [most],
            sizes.memory,
            None if budget is None else int(budget * 1e9),
            lambda arm, size: worth(sizes, gpu, arm, size),
            max_batch=args.tlt_max_batch,
        )
    except ValueError as error:
        raise ConfigError(f"--tlt-graph-memory-gb {budget:g} is not possible: {error}.") from error


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
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    lines.append("")
    for name, size in (
        ("naive: every strategy its own graphs", made.naive_bytes),
        ("shared: each graph once", made.shared_bytes),
        (f"chosen: {len(made.graphs)} graphs", made.bytes),
    ):
        lines.append(f"{name:38} {size / 1e9:7.2f} GB")
    return "\n".join(lines)


def _spans(batch_sizes: Sequence[int]) -> str:
    """`1-8, 16`, in terms of the sizes that are captured at all."""
    if not batch_sizes:
        return "-"
    first, last = min(batch_sizes), max(batch_sizes)
    return str(first) if first == last else f"{first}-{last} ({len(batch_sizes)})"


def _config(model: str) -> dict[str, object]:
    import json

    from tlt_sglang.models import resolve_model

    path = Path(resolve_model(model)) / "config.json"
    if not path.exists():
        from transformers import AutoConfig

        try:
            found: dict[str, object] = AutoConfig.from_pretrained(model).to_dict()
        except (OSError, ValueError) as error:
            raise ConfigError(f"The model {model} has no config.json that can be read.") from error
        return found
    try:
        read: dict[str, object] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from error
    return read
