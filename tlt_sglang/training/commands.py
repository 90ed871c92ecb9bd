"""The command lines of `tlt data` and `tlt train`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config import command_line as commands
from tlt_sglang.config.flags import Parser
from tlt_sglang.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 a problem (one sentence), 2 bad usage, 130 interrupted."""
    command, rest = argv[0], argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return commands.run(command, _data if command == "data" else _train, rest)
    except KeyboardInterrupt:
        print(f"tlt {command}: interrupted; start it again to go on.", file=sys.stderr)
        return 130


def _data(argv: Sequence[str]) -> None:
    parser = Parser("tlt data", "Make prompts to train a drafter on.")
    parser.add_argument("--model", required=True, help="a folder, a hub id, or smollm2-135m")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--instructions",
        type=commands.amount,
        default=1000,
        metavar="N",
        help="made up by the model (default: 1000)",
    )
    parser.add_argument(
        "--composed",
        type=commands.amount,
        default=500,
        metavar="N",
        help="composed of forms and subjects (default: 500)",
    )
    parser.add_argument(
        "--reasoning",
        type=commands.amount,
        default=500,
        metavar="N",
        help="problems of reasoning-gym (default: 500)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--at-once", type=commands.count, default=32, metavar="N", help="requests in flight"
    )
    if commands.helped(parser, argv):
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


def _train(argv: Sequence[str]) -> None:
    parser = Parser("tlt train", "Train a drafter on what the target itself answers.")
    add = parser.add_argument
    add("--model", required=True, help="the target: a folder, a hub id, or smollm2-135m")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines of {"prompt": ...} or {"messages": [...]}, with or without "response", or of '
        '{"text": ...}',
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the drafter, and work/ beside it")
    add("--algorithm", choices=["eagle", "eagle3"], default="eagle3")
    add("--minutes", type=float, metavar="M", help="train so long, in the place of --epochs")
    add("--epochs", type=commands.count, default=4, metavar="N")
    add(
        "--steps",
        type=commands.count,
        metavar="N",
        help="simulated draft steps (default: 3, with eagle 1)",
    )
    add("--learning-rate", type=float, default=1e-3, metavar="LR")
    add("--batch-tokens", type=commands.count, default=2048, metavar="N", help="of a packed batch")
    add("--accumulate", type=commands.count, default=1, metavar="N", help="batches of one step")
    add(
        "--draft-vocab",
        type=commands.count,
        default=8192,
        metavar="N",
        help="most frequent tokens that an eagle3 drafter knows",
    )
    add("--temperatures", default="0,1", metavar="T[,T]", help="of the answers, in turn")
    add("--max-new-tokens", type=commands.count, default=256, metavar="N", help="of an answer")
    add("--at-once", type=commands.count, default=32, metavar="N", help="requests in flight")
    add("--start-from", type=Path, metavar="DIR", help="a drafter to go on from")
    add(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of training (auto: bfloat16 on CUDA, float32 on CPU)",
    )
    add("--seed", type=int, default=0)
    if commands.helped(parser, argv):
        return
    args = parser.parse_args(argv)
    if args.minutes is not None and args.minutes <= 0:
        raise ConfigError(f"--minutes {args.minutes:g} is no time to train in; give more than 0.")
    from tlt_sglang.training.offline import Options, train
    from tlt_sglang.training.trainer import Settings

    eagle = args.algorithm == "eagle"
    settings = Settings(
        steps=args.steps or (1 if eagle else 3),
        epochs=args.epochs,
        minutes=args.minutes,
        batch_tokens=args.batch_tokens,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        seed=args.seed,
        precision=args.precision,
    )
    options = Options(
        args.model,
        args.data,
        args.out,
        args.algorithm,
        settings,
        # SGLang takes EAGLE's head from the target, whole.
        2**62 if eagle else args.draft_vocab,
        _temperatures(args.temperatures),
        args.max_new_tokens,
        args.at_once,
        args.start_from,
    )
    print(train(options))


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or any(not 0 <= temperature < 10 for temperature in found):
        raise ConfigError(f"--temperatures {text!r} is no list such as 0,1.")
    return found
