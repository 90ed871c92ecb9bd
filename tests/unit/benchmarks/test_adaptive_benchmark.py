"""The benchmark of the adaptive drafter: its flags, and its figures without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_adaptive_drafter as bench
from benchmarks.adaptive_drafter import fine_tune, prompts
from benchmarks.adaptive_drafter.processes import AT_ONCE, CHAIN, NGRAM
from benchmarks.adaptive_drafter.traffic import point_of
from benchmarks.harness.program import UsageError
from benchmarks.harness.server import SchedulerStatus, StrategyCounts
from benchmarks.harness.statistics import quantile
from benchmarks.plots import adaptive_drafter as plots


def test_its_parts(tmp_path: Path) -> None:
    where = ["--json", str(tmp_path / "x.json")]
    assert bench.parse(where).parts == tuple(bench.PARTS)
    some = bench.parse([*where, "--quick", "--part", "cost", "--part", "grow"])
    assert (some.parts, some.quick) == (("cost", "grow"), True)


def test_too_few_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="give more than 16"):
        bench.parse(["--prompts", str(tmp_path / "prompts"), "--json", str(tmp_path / "x.json")])


def test_a_batch_of_traffic_becomes_a_point() -> None:
    def status(chain: tuple[int, int], ngram: tuple[int, int], version: int) -> SchedulerStatus:
        each = {CHAIN: chain, NGRAM: ngram}
        counts = {name: StrategyCounts(verify_steps=n, accepted=a) for name, (n, a) in each.items()}
        return {"strategies": counts, "drafter_version": version, "strategy": CHAIN}

    point = point_of(status((10, 5), (4, 4), 1), status((30, 45), (4, 4), 2), 4.0, 96, 0.0)
    assert point.tokens_per_s == AT_ONCE * 96 / 4
    assert (point.chain, point.ngram, point.accept_length) == (3.0, None, 3.0)
    assert point.version == 2


def test_quantiles() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([1.0, 2.0, 3.0, 9.0], 0.5) == 3.0
    assert quantile([1.0, 2.0, 3.0, 9.0], 0.99) == 9.0


def test_the_prompts_are_many_and_different() -> None:
    for texts in (prompts.composed(200), prompts.one_kind(200)):
        assert len(set(texts)) == 200


def test_the_other_style() -> None:
    assert fine_tune.styled("One. Two! Is it Three?") == "ONE STOP TWO STOP IS IT THREE STOP"


def test_a_picture(tmp_path: Path) -> None:
    points: list[dict[str, object]] = [
        {
            "seconds": 10.0 * i,
            "tokens_per_s": 50.0,
            "accept_length": 1.5,
            "chain": 1.6,
            "ngram": None,
            "version": i // 3,
            "strategy": CHAIN,
        }
        for i in range(9)
    ]
    probes: list[dict[str, object]] = [
        {"seconds": 20.0 * i, "accept_length": 1.0 + 0.1 * i, "version": i} for i in range(5)
    ]
    plots.plot({"grow": points, "grow, held out": probes}, {}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
