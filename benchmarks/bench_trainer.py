"""What packing and asynchronous checkpoints are worth in training a drafter.

    python benchmarks/bench_trainer.py [--quick] [--prompts FILE] [--json PATH]

packing_speedup         Training tokens per second (forward, backward, optimizer) of packed batches
                        over those of padded ones, on the same sequences: lengths from a seeded
                        lognormal, as responses have them, and eight sequences to a padded batch.
                        The median over pairs of passes, A B A B; padding is not counted.
checkpoint_stall_ratio  Time that training waits for one of our checkpoints (trainable weights,
                        optimizer state and cursor, written in the background) over that of a plain
                        save of everything (target, drafter and optimizer state, by torch.save),
                        each the median of several, with training steps in between.

With `--prompts` the sequences hold these, over and over, in the place of random tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common
from benchmarks.common import Spread, say
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.models.named import resolve_model
from tlt_sglang.training.checkpoints import Checkpoints
from tlt_sglang.training.models import DraftConfig, Drafter
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.training.target import Target
from tlt_sglang.training.trainer import Settings, Trainer

MODEL = "smollm2-135m"
PADDED = 8
"""Sequences to a padded batch."""
DRAFT_VOCAB = 8192
SPREAD = 1.0
"""Sigma of the lognormal; responses of reasoning models have as much or more."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    json: Path
    quick: bool
    prompts: list[str]

    @property
    def sequences(self) -> int:
        return 64 if self.quick else 160

    @property
    def passes(self) -> int:
        return 2 if self.quick else 3

    @property
    def saves(self) -> int:
        return 4 if self.quick else 8


def lengths_of(count: int) -> list[int]:
    """Long-tailed: a median of 110 tokens, the longest 2,000."""
    torch.manual_seed(0)
    drawn = (4.7 + SPREAD * torch.randn(count)).exp()
    found: list[int] = drawn.clamp(16, 2000).int().tolist()
    return found


def sequences_of(
    lengths: Sequence[int], config: DraftConfig, tokens: Sequence[int] = ()
) -> list[TokenSequence[torch.Tensor]]:
    """Of `tokens` one after another, or random ones: what they hold costs the same."""
    size = config.hidden_size
    ids = torch.randint(config.vocab_size, (sum(lengths),))
    if tokens:
        ids = torch.tensor(tokens).repeat(-(-len(ids) // len(tokens)))[: len(ids)]
    return [
        TokenSequence(
            part,
            torch.randn(length, 3 * size).bfloat16(),
            4,
            torch.randn(length, size).bfloat16(),
        )
        for length, part in zip(lengths, torch.split(ids, list(lengths)), strict=True)
    ]


def padded(sequences: Sequence[TokenSequence[torch.Tensor]]) -> list[TokenSequence[torch.Tensor]]:
    """Every eight made as long as the longest of them, with tokens that count for nothing."""
    found = []
    for first in range(0, len(sequences), PADDED):
        group = sequences[first : first + PADDED]
        longest = max(map(len, group))
        for sequence in group:
            more = longest - len(sequence)
            found.append(
                TokenSequence(
                    torch.cat([sequence.ids, sequence.ids.new_zeros(more)]),
                    _longer(sequence.features, more),
                    sequence.prompt_length,
                    _longer(sequence.head_input, more),
                )
            )
    return found


def _longer(rows: torch.Tensor, more: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(more, rows.shape[1])])


class _Padded(Trainer):
    """A trainer whose batches are the sequences in order, eight at a time."""

    def _batches(self, epoch: int) -> list[list[int]]:
        count = len(self.sequences)
        return [list(range(at, min(count, at + PADDED))) for at in range(0, count, PADDED)]


def measure_packing(
    config: DraftConfig, frozen: Frozen, tokens: Sequence[int], options: Options
) -> list[float]:
    """Ratios of training tokens/s, a pair of passes each."""
    lengths = lengths_of(options.sequences)
    sequences = sequences_of(lengths, config, tokens)
    longer = padded(sequences)
    ratios = []
    for number in range(-1, options.passes):  # one to warm up
        seconds = []
        for kind, texts in ((Trainer, sequences), (_Padded, longer)):
            trainer = kind(
                Drafter(config),
                frozen,
                texts,
                list(map(len, texts)),
                Settings(epochs=1),
                frozen.head.device,
            )
            started = time.perf_counter()
            for _ in trainer.run():
                pass
            seconds.append(time.perf_counter() - started)
        ratio = seconds[1] / seconds[0]
        say(
            f"packing: {sum(lengths) / seconds[0]:.0f} against {sum(lengths) / seconds[1]:.0f} "
            f"tokens/s, {ratio:.2f}x" + (" (not counted)" if number < 0 else "")
        )
        if number >= 0:
            ratios.append(ratio)
    return ratios


def measure_checkpoints(
    target: Target, config: DraftConfig, frozen: Frozen, options: Options, folder: Path
) -> tuple[list[float], list[float]]:
    """(seconds that ours stall, seconds that plain full ones do)."""
    lengths = [300] * 48
    trainer = Trainer(
        Drafter(config),
        frozen,
        sequences_of(lengths, config),
        lengths,
        Settings(epochs=10_000),
        frozen.head.device,
    )
    steps = trainer.run()
    saved = Checkpoints(folder / "ours")
    ours, plain = [], []
    for number in range(-1, options.saves):
        for _ in range(3):
            next(steps)
        started = time.perf_counter()
        saved.save(trainer.progress.step, trainer.state())
        stall = time.perf_counter() - started
        for _ in range(3):
            next(steps)
        started = time.perf_counter()
        everything = trainer.state() | {"target": target.model.state_dict()}
        torch.save(everything, folder / "plain.pt")
        whole = time.perf_counter() - started
        say(f"checkpoints: {1000 * stall:.0f} ms against {1000 * whole:.0f} ms")
        if number >= 0:
            ours.append(stall)
            plain.append(whole)
    saved.finish()
    return ours, plain


def parse(argv: Sequence[str]) -> Options:
    """The options; raises UsageError where results cannot be written."""
    args = common.Parser("bench_trainer", __doc__, "fewer sequences and saves").parse_args(argv)
    json = args.json or common.RESULTS / "bench_trainer.json"
    common.check_writable(json)
    prompts = common.load_prompts(args.prompts) if args.prompts else []
    return Options(json, args.quick, prompts)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a problem, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    return common.run("bench_trainer", lambda _: _benchmark(parse(words)))


def _benchmark(options: Options) -> None:
    target = Target(resolve_model(MODEL), torch.device("cpu"))
    config = DraftConfig.for_target(target.config, "eagle3", DRAFT_VOCAB)
    frozen = target.frozen(torch.arange(DRAFT_VOCAB))
    tokens = [token for text in options.prompts for token in target.encode(text)]
    ratios = measure_packing(config, frozen, tokens, options)
    with tempfile.TemporaryDirectory(prefix="bench-trainer-") as folder:
        ours, plain = measure_checkpoints(target, config, frozen, options, Path(folder))
    stall, whole = common.spread(ours), common.spread(plain)
    packing = common.spread(ratios)
    figures: dict[str, Spread] = {
        "packing_speedup": packing,
        "our checkpoint, s": stall,
        "plain checkpoint, s": whole,
    }
    rows = [
        (n, f"{s.median:.3f}", f"{s.min:.3f}", f"{s.max:.3f}", str(s.count))
        for n, s in figures.items()
    ]
    print(common.table(("figure", "median", "min", "max", "count"), rows))
    summary = {
        "packing_speedup": round(packing.median, 4),
        "checkpoint_stall_ratio": round(stall.median / whole.median, 4),
    }
    settings: dict[str, Any] = {"model": MODEL, "quick": options.quick, "padded": PADDED}
    spreads = {name: spread.as_json() for name, spread in figures.items()}
    document = common.document("trainer", summary, settings=settings, spreads=spreads)
    common.write_json(options.json, document)
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
