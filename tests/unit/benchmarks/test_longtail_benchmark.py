"""The rollout benchmark: its workload, its flags and its figures, without an engine."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks import bench_longtail as bench
from benchmarks.bench_longtail import ADAPTIVE, OFF, STOCK
from benchmarks.harness import workload
from benchmarks.harness.program import UsageError
from benchmarks.harness.workload import CurvePoint, RolloutResult
from tlt_sglang import launch_server


def options(tmp_path: Path, *words: str) -> bench.Options:
    return bench.parse([*words, "--json", str(tmp_path / "x.json")])


def result(
    system: str, number: int, seconds: float, tail: float, output: str = "same"
) -> RolloutResult:
    curve: list[CurvePoint] = [
        {
            "seconds": 0.5 * i,
            "left": 8 - i,
            "strategy": "off" if i < 4 else "eagle3:3x1x4",
            "tokens_per_s": 100.0 - i,
        }
        for i in range(8)
    ]
    return RolloutResult(system, number, seconds, tail, 1000, 500, output, curve)


def test_the_lengths_have_a_long_tail_and_are_the_same_every_time(tmp_path: Path) -> None:
    made = bench.workload(options(tmp_path, "--groups", "50", "--samples", "4"))
    assert made == bench.workload(options(tmp_path, "--groups", "50", "--samples", "4"))
    lengths = [request.tokens for request in made]
    assert len(lengths) == 200
    assert all(8 <= length <= 640 for length in lengths)
    assert max(lengths) > 4 * statistics.median(lengths)
    assert made[0].prompt == made[3].prompt != made[4].prompt


def test_every_systems_flags_are_understood(tmp_path: Path) -> None:
    """By our launcher, which would refuse ours where they are wrong."""
    chosen = options(tmp_path)
    for system in chosen.systems:
        words = bench.flags_of(system, chosen, "drafter", tmp_path)
        ours, rest = launch_server._parser().parse_known_args(["--model", "m", *words])
        config = launch_server._config(ours)
        assert (config is None) == (system == STOCK)
        assert not any(word.startswith("--tlt") for word in rest)
        if system == "upstream adaptive":
            assert config is not None and config.policy == "ema"


def test_figures_are_medians_of_pairs(tmp_path: Path) -> None:
    runs = []
    for number, drift in enumerate((1.0, 2.0, 1.5)):
        runs += [result(OFF, number, 20 * drift, 9 * drift), result(STOCK, number, 30 * drift, 9)]
        runs += [result(name, number, 11 * drift, 4) for name in bench.FIXED]
        runs += [result(ADAPTIVE, number, 10 * drift, 3 * drift)]
    summary = bench.summarise(runs)
    assert summary["adaptive_vs_off"] == 2.0
    assert summary["adaptive_vs_stock"] == 3.0
    assert summary["adaptive_vs_best_fixed"] == 1.1
    assert summary["tail_speedup"] == 3.0
    assert summary["adaptive_vs_upstream_adaptive"] is None
    assert summary["outputs_identical"] == 1.0
    runs.append(result("upstream adaptive", 0, 10.0, 3.0, "other"))
    assert bench.summarise(runs)["outputs_identical"] == 0.0
    bench.plot(runs, tmp_path / "x.png", 8)
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--system", "fast"], "There is no system 'fast'"),
        (["--groups", "0"], "from 1 on"),
        (["--prompts", "/no/such/file"], "cannot be read"),
    ],
)
def test_what_cannot_be(tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        options(tmp_path, *words)


def test_a_server_without_a_status_has_no_progress() -> None:
    class Silent:
        def scheduler(self) -> None:
            return None

    assert workload.progress(Silent()) == (0.0, None)  # type: ignore[arg-type]
