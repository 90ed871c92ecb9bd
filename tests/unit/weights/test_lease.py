"""At any time at most one process trains for a store, and nobody publishes over another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.weights import files, lease
from tlt_sglang.weights.lease import LEASE_SECONDS, RENEW_SECONDS, Lease
from tlt_sglang.weights.manifest import Base
from tlt_sglang.weights.store import Store

BASE = Base(hidden_size=8, vocab_size=100, draft_vocab_size=50, layers=3)


class Process:
    """A process on another machine, as far as a store can tell, with a clock of its own."""

    def __init__(self, root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._name, self._patch = 0.0, name, monkeypatch
        self.lease = Lease(root, clock=lambda: self.now)

    def hold(self, after: float = RENEW_SECONDS) -> bool:
        """Let time pass here, then ask for the lease."""
        self.now += after
        self.become()
        return self.lease.hold()

    def release(self) -> None:
        self.become()
        self.lease.release()

    def become(self) -> None:
        self._patch.setattr(files, "owned", lambda name: f"{name}@1@{self._name}")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Process, Process]]:
    yield tuple(Process(tmp_path / "store", name, monkeypatch) for name in ("one", "two"))  # type: ignore[misc]


def test_one_holds_it_and_the_other_waits(pair: tuple[Process, Process]) -> None:
    one, two = pair
    assert one.hold() and one.lease.epoch == 1 and not one.lease.is_wanted
    for _ in range(100):
        assert not two.hold() and one.hold()
    assert one.lease.is_wanted and one.lease.epoch == 1 and two.lease.epoch is None


def test_it_passes_on_when_it_is_released(pair: tuple[Process, Process]) -> None:
    one, two = pair
    assert one.hold() and not two.hold()
    one.release()
    assert one.lease.epoch is None
    assert two.hold() and two.lease.epoch == 2
    assert not one.hold() and two.hold() and two.lease.is_wanted
    two.release()
    assert one.hold() and one.lease.epoch == 3
    assert one.hold() and not one.lease.is_wanted


def test_a_silent_holder_loses_it_by_the_clock_of_who_waits(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.now = 1e6  # no clock is compared with another
    assert one.hold() and not two.hold()
    assert not two.hold(LEASE_SECONDS)
    assert two.hold() and two.lease.epoch == 2
    assert not one.hold() and one.lease.epoch is None


def test_who_was_killed_on_another_machine_waits_no_longer(pair: tuple[Process, Process]) -> None:
    one, two = pair
    assert one.hold() and not two.hold()
    for _ in range(int(LEASE_SECONDS)):
        assert one.hold() and one.lease.is_wanted
    assert one.hold(2 * RENEW_SECONDS) and not one.lease.is_wanted
    two.hold()
    assert one.hold() and one.lease.is_wanted


def test_who_gives_up_waiting_leaves_nothing(pair: tuple[Process, Process], tmp_path: Path) -> None:
    one, two = pair
    assert one.hold() and not two.hold()
    two.release()
    assert one.hold() and not one.lease.is_wanted
    one.release()
    names = sorted(path.name for path in (tmp_path / "store" / lease.FOLDER).iterdir())
    assert names == ["000001"]
    assert [path.name for path in (tmp_path / "store" / lease.FOLDER / "000001").iterdir()] == [
        "released"
    ]


def test_a_holder_that_was_killed_is_followed_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tlt_sglang.weights.lease import Lease\n"
        "assert Lease(Path(sys.argv[1])).hold(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    following = Lease(tmp_path)
    assert following.hold() and following.epoch == 2


def test_of_many_that_ask_at_once_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "owned", lambda name: f"{name}@{os.getpid()}@{os.uname().nodename}")
    for _ in range(20):
        leases = [Lease(tmp_path) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            held = [
                one for one, has in zip(leases, pool.map(Lease.hold, leases), strict=True) if has
            ]
        assert len(held) == 1
        held[0].release()


def test_what_is_published_without_the_lease_is_not_used(tmp_path: Path) -> None:
    """A publisher that was held up between its check and the store comes too late."""
    store = Store(tmp_path)
    tensors = {"fc.weight": torch.zeros(2, 2)}
    epochs = (0, 1, 1, 2, 1, 2, 3, 2)
    used = []
    for epoch in epochs:
        store.publish(tensors, "eagle", BASE, epoch=epoch)
        used.append(Store(tmp_path).latest())
    assert used == [1, 2, 3, 4, 4, 6, 7, 7]
    assert store.latest() == 7


def test_a_store_that_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "file" / "store"
    root.parent.touch()
    with pytest.raises(EnvironmentProblem):
        Lease(root).hold()
    held = Lease(tmp_path / "other")
    assert held.hold()
    shutil.rmtree(tmp_path / "other")
    held.release()
    assert not (tmp_path / "other").exists()


def test_it_is_taken_again_where_its_folder_was_removed(tmp_path: Path) -> None:
    held = Lease(tmp_path)
    assert held.hold()
    shutil.rmtree(tmp_path / lease.FOLDER)
    assert not held.hold(now=True) or held.epoch == 1
    assert held.hold(now=True)
