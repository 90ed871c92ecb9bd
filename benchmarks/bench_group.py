"""Gain of sidecars that train one drafter together, over one that trains alone.

    python benchmarks/bench_group.py [--quick] [--json PATH] [--prompts FILE]

The shipped drafter of the small model adapts to worked solutions of one kind, a stream that the
sidecar's own learner trains on. A group is simulated in this process: its members train one after
another, each on draws of its own, as sidecars on as many devices do at the same time, and after
each round of the group their weights are averaged as in tlt_sglang/sidecar/group.py. Time is
counted in the optimizer steps of one member. Every size is run with several seeds, that of the
draws and of the problems; accept lengths are those of greedy drafts on solutions held out.

accept_len_start   Before training.
accept_len_N       After the last round, of N members; the mean over seeds.
speedup_N          Steps that one member takes over those that N take, to the accept length that
                   one has after half of the steps; by the means over seeds, between rounds
                   interpolated.

With `--prompts` the texts are these, not the built-in problems.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import program, provenance
from benchmarks.harness.program import UsageError, say
from benchmarks.harness.prompts import load_prompts
from benchmarks.rl_run import problems
from benchmarks.rl_run.drafter import shipped_drafter
from benchmarks.rl_run.fine_tune import MODEL
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.models.named import resolve_model
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.group import ROUND_STEPS
from tlt_sglang.sidecar.learner import Learner
from tlt_sglang.sidecar.learner_settings import LearnerSettings
from tlt_sglang.training.corpus import Prompt, Response
from tlt_sglang.training.evaluate import accept_length
from tlt_sglang.training.models import DraftConfig, Drafter
from tlt_sglang.training.offline import load_weights
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.training.target import Target
from tlt_sglang.weights import describe

MEMBERS = (1, 2, 4)
MOST_TOKENS = 256
"""Longest prompt and longest response in tokens."""
BUFFER_BYTES = 2 << 30


@dataclass(frozen=True)
class Data:
    """The sequences of a seed: those that every group trains on, and those it is measured with."""

    training: list[TokenSequence[Tensor]]
    held_out: list[TokenSequence[Tensor]]


class Bench:
    """The target, and drafters for it."""

    def __init__(self) -> None:
        path = resolve_model(MODEL)
        self.shipped = shipped_drafter()
        self.target = Target(str(path), torch.device("cpu"))
        config = describe.target_config(path)
        ids = describe.draft_ids(self.shipped, config["vocab_size"])
        self.config = DraftConfig.for_target(config, "eagle3", len(ids))
        self.frozen: Frozen = self.target.frozen(ids)

    def data(self, texts: Sequence[tuple[str, str]], held_out: int) -> Data:
        """Return the target's features of (prompt, response), the first ones held out."""
        responses = []
        for prompt, response in texts:
            before = self.target.encode(prompt)[:MOST_TOKENS]
            after = self.target.encode(response)[:MOST_TOKENS]
            responses.append(Response(Prompt(tuple(before)), tuple(after)))
        groups = self.target.sequences(responses, self.config)
        sequences = [
            replace(sequence, request=str(number))
            for number, sequence in enumerate(itertools.chain.from_iterable(groups))
        ]
        return Data(sequences[held_out:], sequences[:held_out])

    def learner(self, data: Data, stream: str) -> Learner:
        """Return a sidecar's learner that begins with the shipped drafter."""
        drafter = Drafter(self.config)
        load_weights(drafter, self.shipped)
        buffer = Buffer(BUFFER_BYTES)
        buffer.stream = stream
        for sequence in data.training:
            buffer.add(sequence)
        settings = LearnerSettings()
        return Learner(drafter, self.frozen, buffer, settings, torch.device("cpu"))

    def accept_length(self, data: Data, drafter: Drafter) -> float:
        """Return the accept length of greedy chains of three drafts."""
        return float(accept_length(drafter, self.frozen, data.held_out, steps=3).mean)

    def curve(self, data: Data, members: int, rounds: int, seed: int) -> list[float]:
        """Return the accept length before training, and after every round."""
        group = [self.learner(data, f"{seed} {number}") for number in range(members)]
        lengths = [self.accept_length(data, group[0].drafter)]
        for _ in range(rounds):
            for learner in group:
                end = learner.step + ROUND_STEPS
                while learner.step < end:
                    learner.micro_step()
            group[0].average([(one.weights(), ROUND_STEPS) for one in group[1:]], ROUND_STEPS)
            for learner in group[1:]:
                learner.drafter.take(group[0].weights())
            lengths.append(self.accept_length(data, group[0].drafter))
        return lengths


def reached(curve: Sequence[float], length: float) -> float | None:
    """Return after how many rounds a curve reaches `length`, None if it does not."""
    if curve[0] >= length:
        return 0.0
    for number, (before, after) in enumerate(itertools.pairwise(curve)):
        if after >= length:
            return number + (length - before) / (after - before)
    return None


def summarise(curves: dict[int, list[list[float]]]) -> dict[str, float | None]:
    """Return the figures of curves, of each size and seed."""
    means = {
        members: [statistics.mean(values) for values in zip(*own, strict=True)]
        for members, own in curves.items()
    }
    alone = means[1]
    goal = alone[len(alone) // 2]
    taken = reached(alone, goal)
    summary: dict[str, float | None] = {"accept_len_start": round(alone[0], 4)}
    for members, curve in means.items():
        summary[f"accept_len_{members}"] = round(curve[-1], 4)
    for members, curve in means.items():
        together = reached(curve, goal)
        if members > 1:
            summary[f"speedup_{members}"] = (
                round(taken / together, 3) if taken and together else None
            )
    return summary


def texts_of(seed: int, count: int, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Return prompts and responses of a seed; those of `prompts` if there are any."""
    if prompts:
        if len(prompts) < 4:
            raise UsageError("--prompts has fewer than four texts; give more, or leave it out.")
        return [(text[: len(text) // 4], text[len(text) // 4 :]) for text in prompts[:count]]
    chosen = itertools.islice(problems.problems("training", seed), count)
    return [(problems.prompt(one.question), one.solution) for one in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_group", lambda _: _benchmark(arguments))


def _benchmark(argv: Sequence[str]) -> None:
    parser = program.Parser("bench_group", __doc__, "One seed, few steps, two members at most")
    args = parser.parse_args(argv)
    path = args.json or provenance.result_path("bench_group")
    program.check_writable(path)
    sizes = MEMBERS[:2] if args.quick else MEMBERS
    seeds, rounds, count = (1, 2, 60) if args.quick else (3, 6, 180)
    prompts = load_prompts(args.prompts) if args.prompts else []
    bench = Bench()
    curves: dict[int, list[list[float]]] = {members: [] for members in sizes}
    for seed in range(seeds):
        texts = texts_of(seed, count, prompts)
        data = bench.data(texts, max(1, len(texts) // 6))
        for members in sizes:
            curves[members].append(bench.curve(data, members, rounds, seed))
            shown = " ".join(f"{length:.3f}" for length in curves[members][-1])
            say(f"seed {seed}, members {members}: {shown}")
    summary = summarise(curves)
    figures = [(name, "-" if value is None else f"{value:.3f}") for name, value in summary.items()]
    print(program.table(("figure", "value"), figures))
    document = provenance.document(
        "group",
        summary,
        settings={"round_steps": ROUND_STEPS, "texts": count, "quick": args.quick},
        curves={str(members): own for members, own in curves.items()},
    )
    provenance.write_json(path, document)
    say(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
