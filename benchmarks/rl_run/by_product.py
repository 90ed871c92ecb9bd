"""Measure what the drafter is worth at the end: its accept length on problems not seen before.

Served with the policy at the end, at temperature 1 and with one strategy, beside the drafter that
the run began with, that one trained offline for as long as the sidecar has trained, and the one
that ships with this package. Output is the same with each of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.program import BenchmarkError, say
from benchmarks.rl_run.competence import responses
from benchmarks.rl_run.drafter import shipped_drafter, trained_further

PROBLEMS = 24
STRATEGY = "eagle3:3x1x4"


def accept_lengths(
    policy: Path, drafter: Path, store: Path, threads: int, logs: Path
) -> dict[str, float]:
    """Return the accept length of the `shipped` drafter, of `drafter`, and of the trained ones.

    Raises BenchmarkError if the policy answers differently with one of them.
    """
    seconds = json.loads((store / "sidecar.json").read_text())["seconds"]
    offline = trained_further(drafter, policy, seconds / 60, store.with_name("offline-drafter"))
    learned = ["--tlt-store", str(store), "--tlt-harvest-gb", "0"]
    drafters: dict[str, tuple[Path, Sequence[str]]] = {
        "accept_len_held_out_shipped": (shipped_drafter(), ()),
        "accept_len_held_out_frozen": (drafter, ()),
        "accept_len_held_out_offline": (offline, ()),
        "accept_len_held_out_adapted": (drafter, learned),
    }
    figures: dict[str, float] = {}
    answers: list[list[int]] | None = None
    for name, (folder, more) in drafters.items():
        flags = ["--speculative-draft-model-path", str(folder), "--tlt-strategies", STRATEGY, *more]
        sampled = responses(policy, PROBLEMS, threads, logs, flags)
        outputs = [one.output for one in sampled]
        if answers is not None and outputs != answers:
            raise BenchmarkError("Output on held-out problems depends on the drafter.")
        answers = outputs
        tokens, steps = sum(map(len, outputs)), sum(one.verify_steps for one in sampled)
        figures[name] = round(tokens / steps, 4)
        say(f"{name}: {figures[name]:.3f}")
    return figures
