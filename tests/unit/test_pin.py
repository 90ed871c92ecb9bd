"""`POST /tlt/strategy`: what it takes, and one sentence for what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from tlt_sglang import engine, status
from tlt_sglang.config import Config
from tlt_sglang.engine import Engine
from tlt_sglang.errors import ConfigError

POOL = ("off", "eagle:3x1x4", "ngram:4")


def use(monkeypatch: pytest.MonkeyPatch, *strategies: str) -> None:
    patcher: Any = None
    monkeypatch.setattr(engine, "current", Engine(Config(strategies), "cpu", patcher))


@pytest.mark.parametrize(
    ("strategy", "place"), [("off", 0), ("EAGLE:3x1x4", 1), ("ngram:4", 2), (None, -1)]
)
def test_a_strategy_of_the_pool(
    monkeypatch: pytest.MonkeyPatch, strategy: str | None, place: int
) -> None:
    use(monkeypatch, *POOL)
    assert status.place_of({"strategy": strategy}) == place


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "or null for what the policy chooses"),
        ({"strategy": "eagle:1x1x2"}, "it has off, eagle:3x1x4, ngram:4"),
        ({"strategy": "fast"}, "Unknown strategy 'fast'"),
        ({"strategy": 7}, "Unknown strategy '7'"),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], says: str) -> None:
    use(monkeypatch, *POOL)
    with pytest.raises(ConfigError) as error:
        status.place_of(body)
    assert says in str(error.value)


def test_with_one_strategy_there_is_nothing_to_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "off")
    with pytest.raises(ConfigError, match="one strategy only"):
        status.place_of({"strategy": "off"})
