"""Gains of packed batches and asynchronous checkpoints in training a drafter.

    python benchmarks/bench_trainer.py [--quick] [--prompts FILE] [--json PATH]

packing_speedup         Training tokens per second (forward, backward, optimizer) of packed batches
                        over those of padded ones, on the same sequences: lengths from a seeded
                        lognormal distribution, as responses have them, and eight sequences in a
                        padded batch. The median over pairs of passes, A B A B; padding does not
                        count.
checkpoint_stall_ratio  Time that training waits for one of our checkpoints (trainable weights,
                        optimizer state and cursor, written in the background) over that of a plain
                        save of everything (target, drafter and optimizer state, by torch.save),
                        each the median of several, with training steps in between.

With `--prompts` the sequences hold these prompts, repeated, instead of random tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import program, provenance
from benchmarks.harness.program import say, spread_table
from benchmarks.harness.prompts import load_prompts
from benchmarks.harness.statistics import Spread, spread
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.models.named import resolve_model
from tlt_sglang.training.checkpoints import Checkpoints
from tlt_sglang.training.models import DraftConfig, Drafter
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.training.target import Target
from tlt_sglang.training.trainer import Trainer, TrainerSettings

MODEL = "smollm2-135m"
PADDED = 8
"""Sequences in a padded batch."""
DRAFT_VOCAB = 8192
SPREAD = 1.0
"""Sigma of the lognormal distribution; responses of reasoning models have as much or more."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    json: Path
    quick: bool
    prompts: list[str]

    @property
    def sequences(self) -> int:
        """Sequences of a pass."""
        return 64 if self.quick else 160

    @property
    def passes(self) -> int:
        """Pairs of passes that count."""
        return 2 if self.quick else 3

    @property
    def saves(self) -> int:
        """Pairs of checkpoints that count."""
        return 4 if self.quick else 8


def lengths_of(count: int) -> list[int]:
    """Return lengths with a long tail: a median of 110 tokens, the longest 2,000."""
    torch.manual_seed(0)
    samples = (4.7 + SPREAD * torch.randn(count)).exp()
    lengths: list[int] = samples.clamp(16, 2000).int().tolist()
    return lengths


def sequences_of(
    lengths: Sequence[int], config: DraftConfig, tokens: Sequence[int] = ()
) -> list[TokenSequence[torch.Tensor]]:
    """Return sequences of `tokens`, one after another, or of random ones, which cost the same."""
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
    """Return the sequences, every eight padded to the longest of them; padding has no weight."""
    longer = []
    for first in range(0, len(sequences), PADDED):
        group = sequences[first : first + PADDED]
        longest = max(map(len, group))
        for sequence in group:
            more = longest - len(sequence)
            longer.append(
                TokenSequence(
                    torch.cat([sequence.ids, sequence.ids.new_zeros(more)]),
                    _longer(sequence.features, more),
                    sequence.prompt_length,
                    _longer(sequence.head_input, more),
                )
            )
    return longer


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
    """Return the ratios of training tokens/s, one of each pair of passes."""
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
                TrainerSettings(epochs=1),
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
    """Return (seconds that training waits for ours, seconds that it waits for plain ones)."""
    lengths = [300] * 48
    trainer = Trainer(
        Drafter(config),
        frozen,
        sequences_of(lengths, config),
        lengths,
        TrainerSettings(epochs=10_000),
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
    """Return the options; raise UsageError if results cannot be written."""
    args = program.Parser("bench_trainer", __doc__, "Fewer sequences and saves").parse_args(argv)
    json = args.json or provenance.RESULTS / "bench_trainer.json"
    program.check_writable(json)
    prompts = load_prompts(args.prompts) if args.prompts else []
    return Options(json, args.quick, prompts)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_trainer", lambda _: _benchmark(parse(arguments)))


def _benchmark(options: Options) -> None:
    target = Target(resolve_model(MODEL), torch.device("cpu"))
    config = DraftConfig.for_target(target.config, "eagle3", DRAFT_VOCAB)
    frozen = target.frozen(torch.arange(DRAFT_VOCAB))
    tokens = [token for text in options.prompts for token in target.encode(text)]
    ratios = measure_packing(config, frozen, tokens, options)
    with tempfile.TemporaryDirectory(prefix="bench-trainer-") as folder:
        ours, plain = measure_checkpoints(target, config, frozen, options, Path(folder))
    stall, whole = spread(ours), spread(plain)
    packing = spread(ratios)
    figures: dict[str, Spread] = {
        "packing_speedup": packing,
        "our checkpoint, s": stall,
        "plain checkpoint, s": whole,
    }
    print(spread_table(figures))
    summary = {
        "packing_speedup": round(packing.median, 4),
        "checkpoint_stall_ratio": round(stall.median / whole.median, 4),
    }
    settings: dict[str, object] = {"model": MODEL, "quick": options.quick, "padded": PADDED}
    spreads = {name: figure.as_json() for name, figure in figures.items()}
    document = provenance.document("trainer", summary, settings=settings, spreads=spreads)
    provenance.write_json(options.json, document)
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
