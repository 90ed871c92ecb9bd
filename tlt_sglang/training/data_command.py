"""The command line of `tlt data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config.command_line import Parser, add_number, print_help, whole_number


def run(argv: Sequence[str]) -> None:
    """Write the prompts that `argv` asks for; raises TltError."""
    parser = _parser()
    if print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    from tlt_sglang.training.make_prompts import make_prompts

    make_prompts(
        args.model,
        args.out,
        instructions=args.instructions,
        composed=args.composed,
        reasoning=args.reasoning,
        seed=args.seed,
        at_once=args.at_once,
    )


def _parser() -> Parser:
    parser = Parser("tlt data", "Generate prompts for the training of a drafter.")
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="Target: a folder, a hub id, or smollm2-135m",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="File to write the prompts to, as JSON lines",
    )
    for flag, default, text in (
        ("--instructions", 1000, "Number of instructions that the model invents"),
        ("--composed", 500, "Number of requests composed of forms and subjects"),
        ("--reasoning", 500, "Number of problems from reasoning-gym"),
    ):
        add_number(parser, flag, default, text, whole_number)
    add_number(parser, "--seed", 0, "Seed of the random numbers", int)
    add_number(parser, "--at-once", 32, "Number of requests in flight")
    return parser
