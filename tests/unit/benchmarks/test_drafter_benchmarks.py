"""The pure parts of the benchmarks of drafters and of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_drafter, bench_trainer
from benchmarks.bench_drafter import AnswerCounts, Options
from benchmarks.harness.program import UsageError
from benchmarks.harness.statistics import Run, spread
from tests.support.learning import config, sequences

STRATEGY = "eagle3:3x1x4"


def options(**other: Any) -> Options:
    fields: dict[str, Any] = {
        "instructions": ["a"],
        "problems": ["b"],
        "json": None,
        "quick": True,
        "strategy": STRATEGY,
        "repetitions": 1,
        "tokens": 8,
    }
    return Options(**fields | other)


def runs(part: str, *ratios: float) -> list[Run]:
    """Pairs of plain and speculative runs, the latter faster by these."""
    pairs = []
    for case, ratio in enumerate(ratios):
        pairs.append(Run(part, "off", 0, case, 1.0, 10, 10, output="x"))
        pairs.append(Run(part, STRATEGY, 0, case, 1.0 / ratio, 10, 5, output="x"))
    return pairs


def test_the_summary_is_of_what_was_measured() -> None:
    answers = [
        AnswerCounts("accept_len_greedy", 0, 10, 25),
        AnswerCounts("accept_len_greedy", 1, 30, 35),
        AnswerCounts("accept_len_t1", 0, 0, 0),
    ]
    measured = runs("speedup_b1", 1.2, 1.6, 1.4) + runs("speedup_b4", 0.9)
    document = bench_drafter.results(answers, measured, options(), {})
    assert document["summary"] == {
        "accept_len_greedy": 1.5,
        "accept_len_t1": 1.0,
        "speedup_b1": 1.4,
        "speedup_b4": 0.9,
    }
    assert document["same_output"] == {"speedup_b1": 1.0, "speedup_b4": 1.0}


def test_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        bench_trainer.parse(["--json", str(tmp_path)])
    with pytest.raises(UsageError, match="unrecognized arguments: --much"):
        bench_drafter.parse(["--much"])
    (tmp_path / "prompts").write_text("one\ntwo\n")
    good = ["--json", str(tmp_path / "a.json"), "--quick", "--prompts", str(tmp_path / "prompts")]
    assert bench_trainer.parse(good).prompts == ["one", "two"]
    assert bench_drafter.parse(good).instructions == ["one", "two"]


def test_sequences_hold_the_prompts() -> None:
    sequences = bench_trainer.sequences_of([3, 2, 4], config("eagle3"), [5, 6, 7, 8])
    assert [sequence.ids.tolist() for sequence in sequences] == [[5, 6, 7], [8, 5], [6, 7, 8, 5]]


def test_padding_is_what_it_costs() -> None:
    """Sequences of a batch become as long as its longest; nothing that counts changes."""
    texts = sequences([9, 30, 7, 12, 5, 6, 22, 8, 40, 10])
    longer = bench_trainer.padded(texts)
    assert [len(text) for text in longer] == [30] * 8 + [40] * 2
    for before, after in zip(texts, longer, strict=True):
        assert after.ids[: len(before)].tolist() == before.ids.tolist()
        assert after.prompt_length == before.prompt_length


def test_lengths_are_long_tailed() -> None:
    lengths = bench_trainer.lengths_of(400)
    assert lengths == bench_trainer.lengths_of(400)
    middle = spread(list(map(float, lengths))).median
    assert 80 < middle < 150
    assert max(lengths) > 8 * middle
    assert len(bench_trainer.sequences_of(lengths[:3], config())) == 3
