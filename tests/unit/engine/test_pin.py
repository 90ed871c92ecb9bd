"""`POST /tlt/strategy`: what it takes, and one sentence for what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.config.settings import Config
from tlt_sglang.engine import admin as status
from tlt_sglang.engine import engine
from tlt_sglang.engine.engine import Engine
from tlt_sglang.errors import ConfigError, TltError

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


# ---- POST /tlt/drafter and /tlt/harvest ----------------------------------------------------------


def use_store(monkeypatch: pytest.MonkeyPatch, store: Path | None) -> None:
    patcher: Any = None
    config = Config(store=None if store is None else str(store))
    monkeypatch.setattr(engine, "current", Engine(config, "cpu", patcher))


def test_orders_for_the_drafter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_store(monkeypatch, tmp_path)
    for body in ({"version": 0}, {"version": None}, {"reject": True}):
        assert status.drafter_order(body) == {"drafter": body}
    with pytest.raises(TltError, match="does not exist"):
        status.drafter_order({"version": 3})
    for bad in ({}, {"version": "3"}, {"version": True}, {"version": 1, "reject": True}):
        with pytest.raises(ConfigError, match="Write"):
            status.drafter_order(bad)
    with pytest.raises(ConfigError, match="0 is what the engine began with"):
        status.drafter_order({"version": -1})


def test_orders_for_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_store(monkeypatch, tmp_path)
    assert status.harvest_order({"rate": 1}) == {"harvest": 1.0}
    for bad in ({}, {"rate": 2}, {"rate": "1"}, {"rate": 0.5, "more": 1}):
        with pytest.raises(ConfigError, match="a fraction of requests"):
            status.harvest_order(bad)


def test_without_a_store_there_is_nothing_to_order(monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, None)
    for ask in (status.drafter_order, status.harvest_order):
        with pytest.raises(ConfigError, match="start it with --tlt-store"):
            ask({"version": 1})
