"""The benchmark of whole RL steps: its problems, its figures and its flags, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_rl_step as bench
from benchmarks.bench_rl_step import ADAPTIVE, PLAIN, StepResult
from benchmarks.harness.program import UsageError
from benchmarks.plots.rl_step import plot


def step_result(
    system: str, step: int, rollout: float, rewards: list[float], accept: float, tokens: int = 100
) -> StepResult:
    return StepResult(system, step, rollout, 2.0, 1.0, rewards, tokens, accept)


def test_figures_are_of_pairs(tmp_path: Path) -> None:
    steps = [step_result(PLAIN, i, 12.0, [0.5, 0.25], 1.0) for i in range(3)]
    steps += [step_result(ADAPTIVE, i, 6.0, [0.25, 0.5], 1.5 + i / 10) for i in range(3)]
    summary = bench.summarise(steps)
    assert summary["rollout_speedup"] == 2.0
    assert summary["step_speedup"] == round(15 / 9, 4)
    assert summary["reward_plain"] == summary["reward_adaptive"] == 0.375
    assert (summary["reward_noise"] or 0) > 0.1
    assert (summary["accept_len_first"], summary["accept_len_last"]) == (1.5, 1.7)
    plot(steps, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_fewer_tokens_are_not_a_speedup() -> None:
    plain = step_result(PLAIN, 0, 9.0, [0.0], 1.0, tokens=150)
    summary = bench.summarise([plain, step_result(ADAPTIVE, 0, 3.0, [0.0], 2.0, tokens=50)])
    assert summary["rollout_speedup"] == summary["step_speedup"] == 1.0


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--steps", "0"], "from 1 on"), (["--prompts", "x"], "known answers")],
)
def test_what_cannot_be(tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bench.parse([*words, "--json", str(tmp_path / "x.json")])
