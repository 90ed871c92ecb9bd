"""The benchmark of a whole RL run: problems, settings, figures and flags, without an engine."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench_rl_run as bench
from benchmarks.harness.program import UsageError
from benchmarks.plots.rl_run import plot
from benchmarks.rl_run import problems, settings
from benchmarks.rl_run.acceptance import Yardstick
from benchmarks.rl_run.faults import faults
from benchmarks.rl_run.settings import Settings, Step
from benchmarks.rl_run.systems import ADAPTIVE, PLAIN, SIDECAR, System

CHAIN, LONG_CHAIN = "eagle3:3x1x4", "eagle3:7x1x8"


def step(number: int, rollout: float, accept: float, tokens: str = "a") -> Step:
    """Return a step with an accept length, of a chain where it is above 1."""
    tail, drafts = rollout - 6.0, round(500 * (accept - 1))
    counts = {"off": [400, 0]} | ({CHAIN: [500, drafts]} if drafts else {})
    rest = (900, 800, 300, 60.0, tail, 1e-5, 0)
    return Step(number, tokens, rollout, 4.0, 1.0, 0.5, accept, counts, *rest)


def test_every_solution_is_right() -> None:
    """reasoning-gym accepts the answer that the worked solution ends with."""
    for problem in itertools.islice(problems.problems("held out"), 60):
        assert problems.reward(problem.answer, problem.solution) == 1.0
        assert problems.reward(problem.answer, problem.solution + "0") == 0.0
        assert problems.reward(problem.answer, f"Answer: {problem.answer}\nand so on") == 0.0


def test_problems_are_decided_by_their_use_and_seed() -> None:
    first = list(itertools.islice(problems.problems("training", 3), 9))
    assert first == list(itertools.islice(problems.problems("training", 3), 9))
    assert first != list(itertools.islice(problems.problems("training", 4), 9))
    assert {problem.family for problem in first} == {one.name for one in problems.FAMILIES}


def test_every_step_has_small_and_large_problems() -> None:
    """The last problem is from the largest eighth; the families take turns in that place."""
    steps = [problems.of_step(0, step, 8) for step in range(30)]
    assert steps[7] == problems.of_step(0, 7, 8)
    assert len({problem.question for step in steps for problem in step}) > 230
    lengths = [[len(problem.solution) for problem in step] for step in steps]
    assert statistics.median(max(own) / statistics.median(own) for own in lengths) > 5
    assert {step[-1].family for step in steps} == {one.name for one in problems.FAMILIES}


def test_sizes_have_a_long_tail() -> None:
    lengths = sorted(len(p.solution) for p in itertools.islice(problems.problems("training"), 300))
    assert lengths[-5] > 5 * lengths[150]


@pytest.mark.parametrize(
    ("rewards", "count", "kept"),
    [
        ([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 4, [0.0, 0.0, 1.0, 1.0]),
        ([1.0, 1.0, 1.0, 0.0, 1.0], 4, [0.0, 1.0, 1.0, 1.0]),
        ([0.5, 0.0, 1.0, 0.4], 2, [0.0, 1.0]),
        ([0.1, 0.0, 0.9, 0.2], 3, [0.0, 0.1, 0.9]),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 4, []),
        ([0.0, 1.0], 4, []),
    ],
)
def test_most_varied_rewards(rewards: list[float], count: int, kept: list[float]) -> None:
    """The chosen rewards vary most, their places ascend, and without difference there are none."""
    places = problems.most_varied(rewards, count)
    assert places == sorted(places)
    assert sorted(rewards[place] for place in places) == kept


def test_every_response_has_its_seed(tmp_path: Path) -> None:
    run = Settings("policy", seed=1)
    run.write(tmp_path)
    assert Settings.read(tmp_path) == run
    places = itertools.product(range(4), range(8), range(8))
    seeds = {run.sample_seed(*place) for place in places}
    assert len(seeds) == 4 * 8 * 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert run.sample_seed(1, 2, 3) != replace(run, seed=2).sample_seed(1, 2, 3)


def test_figures(tmp_path: Path) -> None:
    steps = {
        PLAIN: [step(i, 20.0, 1.0) for i in range(8)],
        ADAPTIVE: [step(i, 12.0, 1.8) for i in range(8)],
        SIDECAR: [step(i, 10.0, 1.8 + i / 10) for i in range(8)],
    }
    summary = bench.summarise(steps, dict.fromkeys(steps, "x"))
    assert summary == {
        "rollouts_identical": 1.0,
        "weights_identical": 1.0,
        "run_speedup": round(25 / 15, 4),
        "rollout_speedup": 2.0,
        "run_speedup_frozen": round(25 / 17, 4),
        "rollout_speedup_frozen": round(20 / 12, 4),
        "rollout_share_plain": 0.8,
        "tail_speedup": 3.5,
        "tail_share_plain": 0.7,
        "accept_len_frozen_first": 1.8,
        "accept_len_frozen_last": 1.8,
        "accept_len_adapted_last": 2.45,
        "logprob_gap": 1e-5,
    }
    plot(steps, bench.yardstick_of(steps).each(steps), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    steps[ADAPTIVE][3] = step(3, 12.0, 1.8, "b")
    other = bench.summarise(steps, {PLAIN: "x", ADAPTIVE: "y", SIDECAR: "x"})
    assert (other["rollouts_identical"], other["weights_identical"]) == (0.0, 0.0)


def test_figures_of_one_system() -> None:
    summary = bench.summarise({PLAIN: [step(0, 15.0, 1.0)]}, {PLAIN: "x"})
    assert summary["rollout_share_plain"] == 0.75
    assert summary["run_speedup"] is summary["accept_len_frozen_last"] is None


def test_drafters_are_compared_strategy_by_strategy() -> None:
    """A drafter is not better because its system chose the longer chain more often."""
    mostly_short = {"off": [900, 0], CHAIN: [800, 800], LONG_CHAIN: [200, 400], "ngram:8": [9, 63]}
    mostly_long = {CHAIN: [200, 200], LONG_CHAIN: [800, 1600], "eagle3:5x1x6": [7, 0]}
    better = {CHAIN: [200, 250], LONG_CHAIN: [800, 1800]}

    def steps(strategies: dict[str, list[int]]) -> list[Step]:
        return [replace(step(0, 9.0, 1.0), strategies=strategies)]

    yardstick = Yardstick(steps(mostly_short))
    assert yardstick.accept_length(steps(mostly_short)) == pytest.approx(2.2)
    assert yardstick.accept_length(steps(mostly_long)) == pytest.approx(2.2)
    assert yardstick.accept_length(steps(better)) == pytest.approx(2.2 * 3050 / 2800)
    assert yardstick.accept_length(steps({"off": [100, 0]})) is None
    lengths = yardstick.each({PLAIN: steps({"off": [9, 0]}), SIDECAR: [*steps(better), *steps({})]})
    assert lengths.keys() == {SIDECAR} and math.isnan(lengths[SIDECAR][1])


def test_faults_are_one_of_each_kind() -> None:
    chosen = faults(0, 40)
    assert {fault.process for fault in chosen} == {"sidecar", "engine", "coordinator"}
    assert len({fault.step for fault in chosen}) == 3
    assert all(0 < fault.step < 40 for fault in chosen)
    assert chosen == faults(0, 40) != faults(1, 40)


def test_a_folder_has_one_run(tmp_path: Path) -> None:
    run = Settings("policy")
    system = System(PLAIN, tmp_path, run, Path("drafter"), tmp_path)
    assert system.weights is None
    settings.write_steps(tmp_path, [step(0, 1.0, 1.0)])
    assert System(PLAIN, tmp_path, run, Path("drafter"), tmp_path).steps == [step(0, 1.0, 1.0)]
    with pytest.raises(UsageError, match="other settings"):
        System(PLAIN, tmp_path, replace(run, seed=1), Path("drafter"), tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "from 1 on"),
        (["--prompts", "x"], "known answers"),
        (["--faults", "--steps", "3"], "needs 4 steps"),
    ],
)
def test_what_cannot_be(tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bench.parse([*words, "--json", str(tmp_path / "x.json")])


def test_the_drafter_at_the_end_is_measured_after_a_full_run_alone(tmp_path: Path) -> None:
    def measures(*words: str) -> bool:
        return bench.parse([*words, "--json", str(tmp_path / "x.json")]).by_product

    assert measures()
    others = (["--quick"], ["--faults"], ["--shipped"], ["--system", PLAIN])
    assert not any(measures(*words) for words in others)
    assert bench.parse(["--shipped", "--json", str(tmp_path / "x.json")]).settings.shipped
