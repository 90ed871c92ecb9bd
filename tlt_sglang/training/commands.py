"""The command lines of `tlt data` and `tlt train`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config import command_line
from tlt_sglang.config.command_line import Parser, positive_number, whole_number
from tlt_sglang.errors import ConfigError

MODEL = "Target: a folder, a hub id, or smollm2-135m"
SEED = "Seed of the random numbers (default: %(default)s)"
AT_ONCE = "Number of requests in flight (default: %(default)s)"

WHOLE_VOCABULARY = 2**62
"""SGLang takes the LM head of an EAGLE drafter from the target, with every token."""


def data(argv: Sequence[str]) -> int:
    """Run `tlt data` and return its exit status."""
    return main(["data", *argv])


def train(argv: Sequence[str]) -> int:
    """Run `tlt train` and return its exit status."""
    return main(["train", *argv])


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with.

    Returns the exit status: 0 done, 1 a problem, 2 bad usage, 130 interrupted.
    """
    command, rest = argv[0], argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command_line.run(command, _data if command == "data" else _train, rest)
    except KeyboardInterrupt:
        print(f"tlt {command}: interrupted; start it again to go on.", file=sys.stderr)
        return 130


# ---- tlt data ------------------------------------------------------------------------------------


def _data(argv: Sequence[str]) -> None:
    parser = _data_parser()
    if command_line.print_help(parser, argv):
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


def _data_parser() -> Parser:
    parser = Parser("tlt data", "Generate prompts for the training of a drafter.")
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=MODEL)
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="File to write the prompts to, as JSON lines",
    )
    add(
        "--instructions",
        type=whole_number,
        default=1000,
        metavar="N",
        help="Number of instructions that the model invents (default: %(default)s)",
    )
    add(
        "--composed",
        type=whole_number,
        default=500,
        metavar="N",
        help="Number of requests composed of forms and subjects (default: %(default)s)",
    )
    add(
        "--reasoning",
        type=whole_number,
        default=500,
        metavar="N",
        help="Number of problems from reasoning-gym (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help=SEED)
    add("--at-once", type=positive_number, default=32, metavar="N", help=AT_ONCE)
    return parser


# ---- tlt train -----------------------------------------------------------------------------------


def _train(argv: Sequence[str]) -> None:
    parser = _train_parser()
    if command_line.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    if args.minutes is not None and args.minutes <= 0:
        raise ConfigError(f"--minutes must be greater than 0, not {args.minutes:g}.")
    from tlt_sglang.training.offline import TrainOptions, train
    from tlt_sglang.training.trainer import TrainerSettings

    eagle = args.algorithm == "eagle"
    settings = TrainerSettings(
        steps=args.steps or (1 if eagle else 3),
        epochs=args.epochs,
        minutes=args.minutes,
        batch_tokens=args.batch_tokens,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        seed=args.seed,
        precision=args.precision,
    )
    options = TrainOptions(
        args.model,
        args.data,
        args.out,
        args.algorithm,
        settings,
        WHOLE_VOCABULARY if eagle else args.draft_vocab,
        _temperatures(args.temperatures),
        args.max_new_tokens,
        args.at_once,
        args.start_from,
    )
    print(train(options))


def _train_parser() -> Parser:
    parser = Parser("tlt train", "Train a drafter on the target's own answers.")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, metavar="MODEL", help=MODEL)
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='Training data, as JSON lines: {"prompt": ...} or {"messages": [...]}, each with or '
        'without "response", or {"text": ...}',
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder to write the drafter to; DIR/work holds answers and checkpoints",
    )
    add("--start-from", type=Path, metavar="DIR", help="Drafter to start from (default: none)")
    add(
        "--temperatures",
        default="0,1",
        metavar="T[,T]",
        help="Temperatures of the target's answers, used in turn (default: %(default)s)",
    )
    add(
        "--max-new-tokens",
        type=positive_number,
        default=256,
        metavar="N",
        help="Largest number of tokens in an answer (default: %(default)s)",
    )
    add("--at-once", type=positive_number, default=32, metavar="N", help=AT_ONCE)
    _add_training_flags(parser)
    return parser


def _add_training_flags(parser: Parser) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--algorithm",
        choices=["eagle", "eagle3"],
        default="eagle3",
        help="Architecture of the drafter (default: %(default)s)",
    )
    add(
        "--draft-vocab",
        type=positive_number,
        default=8192,
        metavar="N",
        help="Number of tokens in the vocabulary of an eagle3 drafter, the most frequent ones "
        "(default: %(default)s)",
    )
    add(
        "--epochs",
        type=positive_number,
        default=4,
        metavar="N",
        help="Number of passes over the data (default: %(default)s)",
    )
    add("--minutes", type=float, metavar="M", help="Training time in minutes, instead of --epochs")
    add(
        "--steps",
        type=positive_number,
        metavar="N",
        help="Number of simulated draft steps (default: 3 for eagle3, 1 for eagle)",
    )
    add(
        "--learning-rate",
        type=float,
        default=1e-3,
        metavar="LR",
        help="Highest learning rate (default: %(default)s)",
    )
    add(
        "--batch-tokens",
        type=positive_number,
        default=2048,
        metavar="N",
        help="Largest number of tokens in a packed batch (default: %(default)s)",
    )
    add(
        "--accumulate",
        type=positive_number,
        default=1,
        metavar="N",
        help="Number of batches in an optimizer step (default: %(default)s)",
    )
    add(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="Precision of matrix products; auto is bfloat16 on CUDA and float32 on CPU "
        "(default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help=SEED)


def _temperatures(text: str) -> tuple[float, ...]:
    """Return the temperatures in a list such as 0,1; raises ConfigError."""
    try:
        temperatures = tuple(float(part) for part in text.split(","))
    except ValueError:
        temperatures = ()
    if not temperatures or any(not 0 <= temperature < 10 for temperature in temperatures):
        raise ConfigError(
            f"--temperatures {text!r} is not a list of temperatures; write a list such as 0,1."
        )
    return temperatures
