"""The command line of `tlt plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config import command_line as commands
from tlt_sglang.config.flags import Parser
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.plan import Plan
from tlt_sglang.graphs.planned import BATCH_SIZES, described, planned
from tlt_sglang.graphs.sizes import GPUS
from tlt_sglang.strategy.arms import parse

STRATEGIES = "eagle3:5x8x32,eagle3:4x4x16,eagle3:3x4x8,eagle3:3x1x4,ngram:8"


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 a problem (one sentence), 2 bad usage."""
    return commands.run("plan", _plan, argv)


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
    if commands.helped(parser, argv):
        return
    args = parser.parse_args(argv)
    print(described(_made(args)))


def _made(args: argparse.Namespace) -> Plan:
    most = args.max_running_requests
    if most < 1:
        raise ConfigError(f"--max-running-requests {most} is no batch; give 1 or more.")
    return planned(
        [parse(text) for text in args.tlt_strategies.split(",")],
        _config(args.model),
        draft_vocab=args.draft_vocab,
        batch_sizes=[size for size in BATCH_SIZES if size < most] + [most],
        max_batch=args.tlt_max_batch,
        budget_gb=args.tlt_graph_memory_gb,
        gpu=args.gpu,
    )


def _config(model: str) -> dict[str, object]:
    import json

    from tlt_sglang.models.named import resolve_model

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
