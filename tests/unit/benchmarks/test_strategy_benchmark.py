"""The pure parts of the benchmark of strategies."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_policy, bench_strategies
from benchmarks.bench_strategies import ADAPTIVE, ALL, DUEL
from benchmarks.harness.fleet import PLAIN
from benchmarks.harness.program import UsageError
from benchmarks.harness.statistics import Run
from benchmarks.plots import strategies as plots


def runs(part: str, size: int, **speeds: float) -> list[Run]:
    """Two repetitions of each side at these tokens a second."""
    return [
        Run(f"{part} {size}", side.replace("_", " "), number, 0, 1.0 / speed, 1, 1)
        for number in range(2)
        for side, speed in speeds.items()
    ]


def test_adaptive_is_held_against_the_best_of_each_column() -> None:
    """The first part selects the best side; its throughput in the second counts."""
    measured = runs(ALL, 1, **{PLAIN: 10, "pinned_a": 20, "pinned_b": 15, ADAPTIVE: 10})
    measured += runs(DUEL, 1, **{PLAIN: 10, "pinned_a": 16, ADAPTIVE: 19})
    measured += runs(ALL, 8, **{PLAIN: 40, "pinned_a": 30, "pinned_b": 20, ADAPTIVE: 38})
    measured += runs(DUEL, 8, **{PLAIN: 40, ADAPTIVE: 38})
    ratios = bench_strategies.ratios(measured, (1, 8))
    assert ratios[1] == pytest.approx({"best": 19 / 16, "plain": 1.9})
    assert ratios[8] == pytest.approx({"best": 0.95, "plain": 0.95})


@pytest.mark.parametrize("benchmark", [bench_strategies.main, bench_policy.main])
def test_wrong_flags(benchmark: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(benchmark)
    assert benchmark(["--slowly"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unrecognized arguments: --slowly" in captured.err


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\n")
    words = ["--json", str(tmp_path / "a.json"), "--prompts", str(tmp_path / "prompts")]
    assert bench_strategies.parse(words).prompts == ["one"]
    with pytest.raises(UsageError, match="cannot be read"):
        bench_strategies.parse(["--prompts", str(tmp_path / "none")])


def test_the_policies_in_the_simulation(tmp_path: Path) -> None:
    """A quick run: the cost model is within three percent or so, and beats the others."""
    (gpu, *_, cpu) = bench_policy.measure(1, 1200)
    for world in (gpu, cpu):
        regrets = {name: float(str(world[name])) for name in ("cost_model", "beg_mab", "ema")}
        assert regrets["cost_model"] < 0.05
        assert regrets["cost_model"] < min(regrets["beg_mab"], regrets["ema"])


def test_sampled_results_have_files_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    greedy, sampled = (bench_strategies.parse(words) for words in ([], ["--temperature", "1"]))
    assert (greedy.temperature, greedy.json.name) == (0.0, "bench_strategies.json")
    assert (sampled.temperature, sampled.json.name) == (1.0, "bench_strategies_sampled.json")
    assert bench_strategies.main(["--temperature", "hot"]) == 2
    assert "hot is not from 0 to 2" in capsys.readouterr().err


def test_outputs_are_identical_where_every_repetition_has_one() -> None:
    def run(side: str, number: int, output: str) -> Run:
        return Run("batch 1", side, number, 0, 1.0, 1, 1, output=output)

    same = [run(side, number, f"text {number}") for side in "ab" for number in range(2)]
    assert bench_strategies.outputs_identical(same) == 1.0
    assert bench_strategies.outputs_identical([*same, run("c", 0, "text 1")]) == 0.0


def test_a_picture_of_every_side(tmp_path: Path) -> None:
    measured = runs(ALL, 1, **{PLAIN: 10, "pinned_a": 20})
    over_plain = plots.over_plain(bench_strategies.speeds(measured, (1,)))
    assert over_plain == {PLAIN: {1: pytest.approx(1.0)}, "pinned a": {1: pytest.approx(2.0)}}
    plots.plot(over_plain, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
