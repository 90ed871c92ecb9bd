"""Hot swap: which version is wanted, when it comes in, and how a bad one goes."""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.weights import swap as swapping
from tlt_sglang.weights.manifest import Base, Expected, Spec
from tlt_sglang.weights.store import WEIGHTS, Store
from tlt_sglang.weights.swap import AGREE_STEPS, Swap

BASE = Base(hidden_size=4, vocab_size=9, draft_vocab_size=9, layers=2)
EXPECTED = Expected("eagle3", BASE, {"fc.weight": Spec("F32", (2, 2))})
CHAIN = "eagle3:3x1x4"
SECONDS = 10.0


def weights(value: float) -> dict[str, Tensor]:
    return {"fc.weight": torch.full((2, 2), value)}


def publish(store: Store, value: float, base: Base = BASE) -> int:
    return store.publish(weights(value), "eagle3", base)


class Drafter:
    """A drafter that versions are swapped into."""

    def __init__(self) -> None:
        self.weight = torch.zeros(2, 2)

    def copy_in(self, new: Any) -> None:
        self.weight.copy_(new["fc.weight"])

    @property
    def value(self) -> float:
        return float(self.weight[0, 0])


def swap(store: Store, drafter: Drafter, agree: Callable[[int], bool] | None = None) -> Swap:
    return Swap(store, EXPECTED, weights(0.0), drafter.copy_in, agree=agree)


def step(one: Swap) -> bool:
    """The thread looks once, and a decode step begins."""
    one.look()
    return one.swap_in()


def verify_steps(one: Swap, accepted: int, count: int, names: int = 8) -> None:
    for number in range(count):
        requests = [f"{number // 50}-{row}" for row in range(names)]
        one.observe(requests, [accepted + (row + number) % 2 for row in range(names)], CHAIN)


def test_the_newest_version_comes_in_swap_in(tmp_path: Path) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    assert not step(one)
    assert (one.version, drafter.value) == (0, 0.0)
    place = drafter.weight.data_ptr()
    publish(store, 1.0)
    one.look()
    assert (one.version, drafter.value) == (0, 0.0)  # staged, but no step has begun
    assert one.swap_in()
    publish(store, 2.0)
    publish(store, 3.0)
    assert step(one)
    assert not step(one)
    assert (one.version, drafter.value) == (3, 3.0)
    assert drafter.weight.data_ptr() == place
    assert [version for version, _ in one.status()["swaps"]] == [1, 3]


def test_a_thread_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "LOOK_SECONDS", 0.01)
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    one.begin()
    try:
        publish(store, 5.0)
        for _ in range(500):
            if one.swap_in():
                break
            torch.empty(0)
            one._stop.wait(0.01)
    finally:
        one.end()
    assert drafter.value == 5.0


def test_a_pinned_version_stays_and_version_zero_is_what_it_began_with(tmp_path: Path) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    publish(store, 1.0)
    publish(store, 2.0)
    step(one)
    for version, value in ((1, 1.0), (0, 0.0), (2, 2.0)):
        one.pin(version)
        assert step(one)
        assert (one.version, drafter.value) == (version, value)
    one.pin(1)
    step(one)
    publish(store, 3.0)
    assert not step(one)
    one.pin(None)
    assert step(one)
    assert one.version == 3


def test_a_rejected_version_goes_for_good(tmp_path: Path) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    publish(store, 1.0)
    step(one)
    publish(store, 2.0)
    step(one)
    one.reject()
    assert step(one)
    assert (one.version, drafter.value) == (1, 1.0)
    assert store.rejected(2)
    other = swap(store, Drafter())
    step(other)
    assert other.version == 1
    one.reject()
    step(one)
    assert (one.version, drafter.value) == (0, 0.0)


def test_a_damaged_version_is_refused_once_and_the_one_before_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    publish(store, 1.0)
    step(one)
    version = publish(store, 2.0)
    path = store.path(version) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(3):
        assert not step(one)
    assert (one.version, drafter.value) == (1, 1.0)
    assert len(caplog.records) == 1
    assert "bytes" in one.status()["refused"]["2"]
    assert store.rejected(2)


def test_what_one_machine_cannot_read_is_not_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    publish(store, 1.0)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(store, "_read", fail)
        assert not step(one) and not step(one)
    assert caplog.text.count("it is tried again") == 1
    assert store.notes(1) == [] and one.status()["refused"] == {}
    assert step(one) and drafter.value == 1.0


def test_a_version_is_marked_while_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapping, "LOOK_SECONDS", 0.01)
    store, drafter = Store(tmp_path), Drafter()
    now = [0.0]
    one = Swap(store, EXPECTED, weights(0.0), drafter.copy_in, clock=lambda: now[0])
    one.begin()
    try:
        for value in (1.0, 2.0):
            publish(store, value)
            assert wait_for(one.swap_in, SECONDS) and drafter.value == value
        assert wait_for(lambda: not [*store.path(1).glob("used@*")], SECONDS)
        (mark,) = store.path(2).glob("used@*")
        os.utime(mark, (0, 0))
        now[0] += 2 * swapping.MARK_SECONDS
        assert wait_for(lambda: mark.stat().st_mtime > 0, SECONDS)
    finally:
        one.end()
    assert not mark.exists()


def test_a_version_for_another_target_is_left_to_others(tmp_path: Path) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    version = publish(store, 1.0, Base(5, 9, 9, 2))
    assert not step(one)
    assert "hidden size" in one.refused[version]
    assert not store.rejected(version)


def test_a_worse_version_is_rolled_back_at_once(tmp_path: Path) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    publish(store, 1.0)
    step(one)
    verify_steps(one, 2, 600)
    assert not one.status()["guarded"]
    publish(store, 2.0)
    step(one)
    assert one.status()["guarded"]
    verify_steps(one, 0, 100)
    assert (one.version, drafter.value) == (1, 1.0)
    assert store.rejected(2)
    assert store.notes(2)[-1]["figures"]["ratio"] < 0.5
    assert one.rolled_back == 1
    assert not step(one)
    verify_steps(one, 2, 50)
    assert one.version == 1


def test_an_equally_good_version_is_kept(tmp_path: Path) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    verify_steps(one, 2, 600)
    for value in (1.0, 2.0, 3.0):
        publish(store, value)
        step(one)
        verify_steps(one, 2, 600)
        assert not one.status()["guarded"]
    assert (one.version, one.rolled_back) == (3, 0)


def test_nothing_is_held_against_it_when_the_target_changes(tmp_path: Path) -> None:
    store, drafter = Store(tmp_path), Drafter()
    one = swap(store, drafter)
    verify_steps(one, 2, 600)
    publish(store, 1.0)
    step(one)
    one.target_changed()
    verify_steps(one, 0, 200)
    assert (one.version, one.rolled_back) == (1, 0)


def test_ranks_swap_at_the_same_step(tmp_path: Path) -> None:
    """A rank that is late, or cannot read the store for a moment, has the other one wait."""
    store, drafters = Store(tmp_path), [Drafter(), Drafter()]
    numbers, both = [0, 0], threading.Barrier(2, timeout=10)

    def agree(rank: int, own: int) -> bool:
        numbers[rank] = own
        both.wait()
        same = numbers[0] == numbers[1]
        both.wait()
        return same

    ranks = [
        swap(store, drafter, functools.partial(agree, rank))
        for rank, drafter in enumerate(drafters)
    ]
    publish(store, 4.0)
    ranks[0].look()
    with ThreadPoolExecutor(2) as threads:
        for number in range(1, 3 * AGREE_STEPS):
            if number == AGREE_STEPS + 1:
                assert [one.version for one in ranks] == [0, 0]
                ranks[1].look()
            swapped = [*threads.map(Swap.swap_in, ranks)]
            assert swapped == [number == 2 * AGREE_STEPS] * 2
    assert [drafter.value for drafter in drafters] == [4.0, 4.0]
