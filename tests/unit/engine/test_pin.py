"""The commands of `POST /tlt/...`: the bodies they accept, and one sentence for any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.config.settings import Config
from tlt_sglang.engine import admin, engine
from tlt_sglang.engine.engine import Engine
from tlt_sglang.errors import ConfigError, TltError

POOL = ("off", "eagle:3x1x4", "ngram:4")


def use(monkeypatch: pytest.MonkeyPatch, *strategies: str) -> None:
    patcher: Any = None
    monkeypatch.setattr(engine, "current", Engine(Config(strategies), "cpu", patcher))


@pytest.mark.parametrize(
    ("strategy", "index"), [("off", 0), ("EAGLE:3x1x4", 1), ("ngram:4", 2), (None, -1)]
)
def test_a_strategy_of_the_pool(
    monkeypatch: pytest.MonkeyPatch, strategy: str | None, index: int
) -> None:
    use(monkeypatch, *POOL)
    assert admin.strategy_index({"strategy": strategy}) == index


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "or null for what the policy chooses"),
        ({"strategy": "eagle:1x1x2"}, "it has off, eagle:3x1x4, ngram:4"),
        ({"strategy": "fast"}, "Unknown strategy 'fast'"),
        ({"strategy": 7}, "Unknown strategy '7'"),
    ],
)
def test_a_bad_strategy_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], message: str
) -> None:
    use(monkeypatch, *POOL)
    with pytest.raises(ConfigError) as error:
        admin.strategy_index(body)
    assert message in str(error.value)


def test_with_one_strategy_there_is_nothing_to_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "off")
    with pytest.raises(ConfigError, match="one strategy only"):
        admin.strategy_index({"strategy": "off"})


# ---- POST /tlt/drafter and /tlt/harvest ----------------------------------------------------------


def use_store(monkeypatch: pytest.MonkeyPatch, store: Path | None) -> None:
    patcher: Any = None
    config = Config(store=None if store is None else str(store))
    monkeypatch.setattr(engine, "current", Engine(config, "cpu", patcher))


def test_commands_for_the_drafter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_store(monkeypatch, tmp_path)
    for body in ({"version": 0}, {"version": None}, {"rollback": True}):
        assert admin.drafter_command(body) == {"drafter": body}
    with pytest.raises(TltError, match="does not exist"):
        admin.drafter_command({"version": 3})
    for bad in ({}, {"version": "3"}, {"version": True}, {"version": 1, "rollback": True}):
        with pytest.raises(ConfigError, match="Write"):
            admin.drafter_command(bad)
    with pytest.raises(ConfigError, match="0 is what the engine began with"):
        admin.drafter_command({"version": -1})


def test_commands_for_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_store(monkeypatch, tmp_path)
    assert admin.harvest_command({"rate": 1}) == {"harvest": 1.0}
    for bad in ({}, {"rate": 2}, {"rate": "1"}, {"rate": 0.5, "more": 1}):
        with pytest.raises(ConfigError, match="a fraction of requests"):
            admin.harvest_command(bad)


def test_without_a_store_there_are_no_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, None)
    for command in (admin.drafter_command, admin.harvest_command):
        with pytest.raises(ConfigError, match="start it with --tlt-store"):
            command({"version": 1})
