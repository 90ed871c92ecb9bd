"""The command line of `tlt train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config.command_line import Parser, add_number, positive_number, print_help
from tlt_sglang.errors import ConfigError

WHOLE_VOCABULARY = 2**62
"""SGLang takes the LM head of an EAGLE drafter from the target, with every token."""


def run(argv: Sequence[str]) -> None:
    """Train the drafter that `argv` asks for; raises TltError."""
    parser = _parser()
    if print_help(parser, argv):
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
        loss=args.loss,
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


def _parser() -> Parser:
    parser = Parser("tlt train", "Train a drafter on the target's own answers.")
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="Target: a folder, a hub id, or smollm2-135m",
    )
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='Training data, as JSON lines: {"prompt": ...} or {"messages": [...]}, each with or '
        'without "response", or {"text": ...}',
    )
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder to write the drafter to; DIR/work holds answers and checkpoints",
    )
    group.add_argument(
        "--start-from", type=Path, metavar="DIR", help="Drafter to start from (default: none)"
    )
    group.add_argument(
        "--temperatures",
        default="0,1",
        metavar="T[,T]",
        help="Temperatures of the target's answers, used in turn (default: %(default)s)",
    )
    add_number(group, "--max-new-tokens", 256, "Largest number of tokens in an answer")
    add_number(group, "--at-once", 32, "Number of requests in flight")
    _add_training_flags(parser)
    return parser


def _add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--algorithm",
        choices=["eagle", "eagle3"],
        default="eagle3",
        help="Architecture of the drafter (default: %(default)s)",
    )
    group.add_argument(
        "--loss",
        choices=["soft", "lk"],
        default="soft",
        help="Loss of predicted tokens: soft cross-entropy, or lk, which aims at acceptance at "
        "temperature 1 (default: %(default)s)",
    )
    vocabulary = "Number of tokens in the vocabulary of an eagle3 drafter, the most frequent ones"
    add_number(group, "--draft-vocab", 8192, vocabulary)
    add_number(group, "--epochs", 4, "Number of passes over the data")
    group.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="Training time in minutes, instead of --epochs",
    )
    group.add_argument(
        "--steps",
        type=positive_number,
        metavar="N",
        help="Number of simulated draft steps (default: 3 for eagle3, 1 for eagle)",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        default=1e-3,
        metavar="LR",
        help="Highest learning rate (default: %(default)s)",
    )
    add_number(group, "--batch-tokens", 2048, "Largest number of tokens in a packed batch")
    add_number(group, "--accumulate", 1, "Number of batches in an optimizer step")
    group.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="Precision of matrix products; auto is bfloat16 on CUDA and float32 on CPU "
        "(default: %(default)s)",
    )
    add_number(group, "--seed", 0, "Seed of the random numbers", int)


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
