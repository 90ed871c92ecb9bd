"""Coupled sampling on the simulated device: a seed decides the tokens, whatever drafts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cuda.apart import apart

if TYPE_CHECKING:
    from tests.cuda.engine import Engine

LENGTH = 40
FILTERS: tuple[dict[str, float], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 12},
    {"temperature": 1.0, "min_p": 0.1, "frequency_penalty": 0.5},
)


@pytest.mark.parametrize(
    "pool",
    ["off,eagle3:1x1x2,eagle3:3x1x4,eagle3:3x4x8,ngram:8", "off,eagle3:3x1x4,eagle3:5x1x6"],
)
@apart
def test_every_strategy_samples_the_same(tmp_path: Path, pool: str) -> None:
    """Random switches change no token and wait for nothing, with filters and penalties, too."""
    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine
    from tests.cuda.test_pools import UPSTREAM, check_captures, check_waits
    from tlt_sglang.engine import engine as process

    engine = Engine(tmp_path, strategies=pool, policy="random")
    check_captures(engine)
    step = process.require().step
    assert step.pool is not None and step.telemetry is not None
    step.pool.pin(0)
    plain = [engine.generate(LENGTH, **sampling) for sampling in FILTERS]
    assert plain[0] == expected(engine)
    assert plain[0] != engine.expected(LENGTH)
    step.pool.pin(-1)
    DEVICE.waits.clear()
    for sampling, answers in zip(FILTERS, plain, strict=True):
        assert engine.generate(LENGTH, **sampling) == answers
    check_waits(UPSTREAM)
    for strategy, tally in step.telemetry.tallies.items():
        assert tally.accepted > 0 or strategy.num_draft_tokens == 1


@apart
def test_the_drafter_knows_the_noise(tmp_path: Path) -> None:
    """Drafts that are chosen without it are accepted less often, and no token changes."""
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process

    engine = Engine(tmp_path, strategies="off,eagle3:3x1x4,eagle3:3x4x8", policy="fixed")
    step, names = process.require().step, process.require().config.pool
    assert step.noise is not None and step.pool is not None and step.telemetry is not None
    noise, tallies = step.noise, step.telemetry.tallies
    answers, accepted = [], []
    for knows in (True, False):
        if not knows:
            noise.set_batch = lambda info: noise._greedy.fill_(True)  # type: ignore[assignment]
            noise.draft_extend = lambda original, batch, result: original()  # type: ignore[method-assign]
        for index, name in enumerate(names[1:], 1):
            step.pool.pin(index)
            before = tallies[name].accepted
            answers.append(engine.generate(LENGTH, temperature=1.5))
            accepted.append(tallies[name].accepted - before)
    assert all(answer == answers[0] for answer in answers)
    chain, tree, blind_chain, blind_tree = accepted
    assert chain > 1.15 * blind_chain and tree > 1.15 * blind_tree, accepted


def expected(engine: Engine) -> list[list[int]]:
    """Return what the CPU engine's rule samples of transformers' logits at temperature 1; the seed
    of a request is its number."""
    from tests.cuda import graphs
    from tests.support.tiny import by_seed

    model = engine.models.model
    with graphs.busy():
        return [by_seed(model, one, LENGTH, seed) for seed, one in enumerate(engine.prompts)]
