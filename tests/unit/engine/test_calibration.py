"""The calibration: the batches it decodes, and that its failures do no harm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.config.settings import Config
from tlt_sglang.engine import calibration, engine

pytestmark = pytest.mark.sglang


class Manager:
    """SGLang's tokenizer manager, reduced to the parts that the warm-up uses."""

    def __init__(self, has_pool: bool = True, queued: int | None = None) -> None:
        self.server_args = SimpleNamespace(max_running_requests=16, max_queued_requests=queued)
        self.model_config = SimpleNamespace(vocab_size=50)
        self.context_len = 128
        self.has_pool = has_pool
        self.calls: list[Any] = []
        self.fails: Exception | None = None
        self.hangs = False

    async def set_internal_state(self, request: Any) -> list[bool]:
        self.calls.append(request.server_args["tlt"]["calibrate"])
        return [self.has_pool]

    async def generate_request(self, batch: Any, request: None) -> AsyncIterator[None]:
        if self.fails:
            raise self.fails
        if self.hangs:
            await asyncio.sleep(60)
        assert max(max(ids) for ids in batch.input_ids) < 50
        self.calls.append((len(batch.input_ids), batch.sampling_params["max_new_tokens"]))
        yield

    def abort_request(self, abort_all: bool) -> None:
        self.calls.append("abort")

    async def flush_cache(self, timeout_s: float) -> None:
        self.calls.append("flush")


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(("off", "eagle3:3x1x4", "ngram:4"))
    monkeypatch.setattr(engine, "current", SimpleNamespace(config=config))


def run(manager: Manager) -> list[Any]:
    tokenizer_manager: Any = manager
    asyncio.run(calibration.calibrate("null", tokenizer_manager))
    return manager.calls


END = ["abort", "flush", False]
"""The remaining requests end before the steps of others count again."""


def test_the_smallest_a_middle_and_the_largest_batch() -> None:
    tokens = 4 * 3 * 3
    assert run(Manager()) == [True, (1, tokens), True, (4, tokens), True, (16, tokens), *END]
    assert [call for call in run(Manager(queued=2)) if isinstance(call, tuple)] == [
        (1, tokens),
        (2, tokens),
    ]


def test_a_short_context_leaves_room_for_the_prompt() -> None:
    manager = Manager()
    manager.context_len = 20
    assert [call for call in run(manager) if isinstance(call, tuple)] == [
        (1, 10),
        (4, 10),
        (16, 10),
    ]


def test_engines_without_a_pool_do_not_calibrate() -> None:
    assert run(Manager(has_pool=False)) == [True, *END]


def test_a_failure_does_not_stop_the_start(caplog: pytest.LogCaptureFixture) -> None:
    manager = Manager()
    manager.fails = ValueError("the queue is full")
    assert run(manager) == [True, *END]
    assert "the queue is full" in caplog.text


def test_a_busy_machine(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.05)
    manager = Manager()
    manager.hangs = True
    assert run(manager) == [True, *END]
    assert "in part only" in caplog.text
