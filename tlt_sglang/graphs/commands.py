"""The command line of `tlt plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tlt_sglang.config import command_line, flags
from tlt_sglang.config.cuda_memory import sidecar_bytes
from tlt_sglang.config.settings import SETTINGS
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.model_plan import BATCH_SIZES, plan_for_model, plan_table
from tlt_sglang.graphs.plan import CapturePlan
from tlt_sglang.graphs.sizes import GPUS, ModelSizes
from tlt_sglang.strategy.strategies import Strategy, parse

CHAIN_BACKENDS = {"h100": "fa3", "h200": "fa3", "b200": "trtllm_mha"}
"""SGLang's default attention backend for drafts without branches, where a tree changes it."""
STRATEGIES = "eagle3:5x8x32,eagle3:4x4x16,eagle3:3x4x8,eagle3:3x1x4,ngram:8"


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    return command_line.run("plan", _plan, argv)


def _plan(argv: Sequence[str]) -> None:
    parser = _parser()
    if command_line.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    model = _config(args.model)
    print(plan_table(_made(args, model)))
    note = _backend_note(args.gpu, [parse(text) for text in args.tlt_strategies.split(",")])
    if note is not None:
        print(note)
    print(_sidecar_note(ModelSizes.from_config(model, args.draft_vocab)))


def _backend_note(gpu: str, pool: Sequence[Strategy]) -> str | None:
    """Return what a tree among `pool` changes for all of its strategies; None if nothing."""
    default, trees = CHAIN_BACKENDS.get(gpu), [one for one in pool if one.topk > 1]
    if default is None or not trees:
        return None
    return (
        f"\nWith {trees[0]} SGLang's default attention backend is flashinfer for all strategies; "
        f"it is {default} where all of them are chains. flashinfer waits for the device in each "
        "step. "
        "--attention-backend names another."
    )


def _sidecar_note(sizes: ModelSizes) -> str:
    """Return what a sidecar needs, which SGLang does not know of."""
    need = sidecar_bytes(sizes)
    return (
        f"\nA sidecar that trains on the same GPU needs about {need / 1e9:.1f} GB more; leave it "
        f"free by a smaller --mem-fraction-static, {need / 80e9:.2f} less on a GPU of 80 GB."
    )


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        "tlt plan",
        "Plan the CUDA graphs that several strategies need, and their memory; needs no GPU.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="Target: a folder with a config.json, a hub id, or smollm2-135m",
    )
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), default="h100", help="GPU to plan for (default: %(default)s)"
    )
    flags.add_flag(parser, SETTINGS["strategies"], default=STRATEGIES)
    flags.add_flag(parser, SETTINGS["graph_memory_gb"])
    flags.add_flag(parser, SETTINGS["max_batch"])
    add_number = command_line.add_number
    add_number(parser, "--max-running-requests", 128, "Largest number of running requests")
    add_number(parser, "--draft-vocab", 32000, "Number of tokens in the drafter's vocabulary")
    return parser


def _made(args: argparse.Namespace, model: Mapping[str, object]) -> CapturePlan:
    """Return the plan that the arguments ask for."""
    flags.flag_values(args)  # raises for a value out of range
    most = args.max_running_requests
    return plan_for_model(
        [parse(text) for text in args.tlt_strategies.split(",")],
        model,
        draft_vocab=args.draft_vocab,
        batch_sizes=[size for size in BATCH_SIZES if size < most] + [most],
        max_batch=args.tlt_max_batch,
        budget_gb=args.tlt_graph_memory_gb,
        gpu=args.gpu,
    )


def _config(model: str) -> dict[str, object]:
    """Return the config.json of a folder or of a model on the hub; raises ConfigError."""
    from tlt_sglang.models.named import resolve_model

    path = Path(resolve_model(model)) / "config.json"
    if not path.exists():
        from transformers import AutoConfig

        try:
            hub_config: dict[str, object] = AutoConfig.from_pretrained(model).to_dict()
        except (OSError, ValueError) as error:
            raise ConfigError(f"The model {model} has no config.json that can be read.") from error
        return hub_config
    try:
        config: dict[str, object] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from error
    return config
