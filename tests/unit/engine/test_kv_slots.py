"""Drafts without a KV slot are not accepted, and the narrowest strategy runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.engine import kv_slots
from tlt_sglang.engine.kv_slots import KvSlots
from tlt_sglang.strategy.strategies import parse

WIDTH = 4
SEQ_LENS = torch.tensor([10, 20, 30])


def outcome_of(*rows: list[int]) -> Any:
    """Return the outcome of a verification that accepts these rows of each request."""
    lengths = torch.tensor([sum(row >= 0 for row in request) for request in rows])
    return torch.arange(3 * WIDTH), lengths.to(torch.int32), torch.tensor(rows, dtype=torch.int32)


def slots_of(*allocated: int) -> KvSlots:
    slots = KvSlots()
    slots._allocated = torch.tensor(allocated)
    return slots


def test_a_pool_that_is_not_short_changes_nothing() -> None:
    outcome = outcome_of([0, 1, 2, 3], [4, -1, -1, -1], [8, 9, -1, -1])
    slots = KvSlots()
    assert not slots.short
    assert slots.accept(outcome, SEQ_LENS, WIDTH) is outcome


def test_a_chain_ends_where_its_slots_end() -> None:
    outcome = outcome_of([0, 1, 2, 3], [4, 5, -1, -1], [8, 9, 10, 11])
    slots = slots_of(11, 23, 34)
    assert slots.short
    tokens, lengths, rows = slots.accept(outcome, SEQ_LENS, WIDTH)
    assert not slots.short
    assert tokens is outcome[0]
    assert lengths.tolist() == [1, 2, 4]
    assert rows.tolist() == [[0, -1, -1, -1], [4, 5, -1, -1], [8, 9, 10, 11]]
    assert lengths.dtype == rows.dtype == torch.int32


def test_a_path_of_a_tree_ends_at_its_first_node_without_a_slot() -> None:
    outcome = outcome_of([0, 2, 3], [4, 7, -1], [8, 9, 11])
    _, lengths, rows = slots_of(12, 22, 33).accept(outcome, SEQ_LENS, WIDTH)
    assert lengths.tolist() == [1, 1, 2]
    assert rows.tolist() == [[0, -1, -1], [4, -1, -1], [8, 9, -1]]


@pytest.mark.parametrize("reserve", [None, 1])
def test_sglangs_reservation_is_replaced_only_where_it_does_not_fit(reserve: int | None) -> None:
    slots = KvSlots()
    slots._reserve = reserve
    assert slots.reserve(lambda: 16) == (reserve or 16)
    assert slots.fits(lambda: True, None, SimpleNamespace())
    assert slots.reserve(lambda: 16) == 16


def test_a_request_is_not_judged_while_a_step_is_in_flight() -> None:
    """Until its outcome is known, the slots of earlier steps may be in use."""
    answers: list[int] = []

    def upstream() -> bool:
        answers.append(slots.reserve(lambda: 16))
        return False

    slots, scheduler = KvSlots(), SimpleNamespace(result_queue=["a step"])
    assert not slots.fits(upstream, scheduler, SimpleNamespace())
    assert answers == [16]


@pytest.mark.parametrize("what", ["penalties", "a processor", "neither"])
def test_tokens_that_decide_what_follows_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Else an answer would depend on whether a step was in flight."""
    monkeypatch.setattr(kv_slots, "_reserves", lambda batch: False)
    info = SimpleNamespace(
        penalizer_orchestrator=SimpleNamespace(is_required=what == "penalties"),
        has_custom_logit_processor=what == "a processor",
    )
    batch = SimpleNamespace(sampling_info=info, is_empty=lambda: False)
    slots = KvSlots()
    assert slots.waits(SimpleNamespace(result_queue=["a step"]), batch) == (what != "neither")
    assert not slots.waits(SimpleNamespace(result_queue=[]), batch)
    batch.is_empty = lambda: True
    assert not slots.waits(SimpleNamespace(result_queue=["a step"]), batch)


def test_slots_of_a_pool_are_those_of_its_largest_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are seven deep, as the n-grams, and four wide, as the tree: 28 slots."""
    spec = SimpleNamespace(speculative_num_steps=7, speculative_eagle_topk=4)

    @contextlib.contextmanager
    def override(**changes: int) -> Iterator[None]:
        before = dict(vars(spec))
        vars(spec).update(changes)
        yield
        vars(spec).update(before)

    def upstream() -> int:
        slots: int = spec.speculative_num_steps * spec.speculative_eagle_topk
        return max(8, slots)

    context: Any = ModuleType("runtime_context")
    context.get_spec = lambda: SimpleNamespace(override=override)
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    pool = [parse(text) for text in ("off", "eagle3:3x1x4", "eagle3:3x4x8", "ngram:8")]
    assert KvSlots().of_pool(upstream, pool[:1]) == 28
    assert KvSlots().of_pool(upstream, pool) == 12
    assert KvSlots().of_pool(upstream, pool[:2]) == 8
