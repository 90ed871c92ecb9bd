"""Several sidecars that train one drafter: rounds, parts, and what is left out of an average."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.learning import drafter, frozen
from tests.unit.sidecar.test_online import SETTINGS, filled
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.sidecar import group as group_module
from tlt_sglang.sidecar.group import FOLDER, Group, Snapshot
from tlt_sglang.sidecar.learner import Learner
from tlt_sglang.weights import files

SECONDS = 10.0
EPOCH = 7


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "ROUND_STEPS", 6)
    monkeypatch.setattr(group_module, "PART_STEPS", 3)
    monkeypatch.setattr(group_module, "LOOK_SECONDS", 0.0)


Member = tuple[Learner, Group]


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[[str], Member]]:
    """Yield a function that makes a member, which draws from a stream of that name."""
    groups: list[Group] = []

    def joined(stream: str) -> Member:
        buffer = filled()
        buffer.stream = stream
        learner = Learner(drafter(), frozen(), buffer, SETTINGS, torch.device("cpu"))
        groups.append(Group(tmp_path, learner))
        return learner, groups[-1]

    yield joined
    for one in groups:
        one.close()
    left = {path.name for path in (tmp_path / FOLDER).glob("*")}
    assert left <= {"round", files.owned("part")}


def train(learner: Learner, steps: int) -> None:
    for _ in range(steps):
        assert learner.micro_step()


def copied(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def finish_round(holder: Member) -> None:
    """Have the holder average what there is and open the next round."""
    learner, group = holder
    number = group._number

    def is_over() -> bool:
        group.lead(EPOCH)
        return group._number > number

    assert wait_for(is_over, SECONDS)
    assert learner.step - group._began == 0


def test_a_helpers_work_is_averaged_by_steps(tmp_path: Path, join: Callable[[str], Member]) -> None:
    (first, leading), (second, helping) = join(""), join("other")
    train(first, 2)
    assert not helping.follow(), "there is no round yet"
    leading.lead(EPOCH)
    opened = copied(first)
    assert wait_for(helping.follow, SECONDS) and same(copied(second), opened)
    train(second, 3)
    helping.contribute()
    part = tmp_path / FOLDER / files.owned("part")
    assert wait_for(part.exists, SECONDS)
    train(second, 1)
    helping.contribute()  # too early for another part
    train(first, 6)
    own, other = copied(first), Snapshot.read(part)
    assert other is not None and other.steps == 3 and other.is_of(EPOCH, 1)
    assert not same(own, opened) and not same(dict(other.weights), own)
    finish_round((first, leading))
    for name, tensor in first.weights().items():
        torch.testing.assert_close(tensor, own[name] * 6 / 9 + other.weights[name] * 3 / 9)
    assert leading.helpers == 1
    averaged = copied(first)
    assert wait_for(lambda: helping.follow() and same(copied(second), averaged), SECONDS)


def test_a_helper_does_not_queue_parts_for_a_slow_store(
    join: Callable[[str], Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, leading), (second, helping) = join(""), join("other")
    train(first, 1)
    leading.lead(EPOCH)
    assert wait_for(helping.follow, SECONDS)
    writes, may_write = list[int](), threading.Event()

    def write(_: str, part: Snapshot) -> None:
        writes.append(part.steps)
        may_write.wait(SECONDS)

    monkeypatch.setattr(helping, "_write", write)
    for _ in range(60):
        train(second, 1)
        helping.contribute()
    may_write.set()
    assert wait_for(lambda: helping._written is not None and helping._written.done(), SECONDS)
    assert len(writes) == 1


def test_what_is_late_damaged_or_strange_is_left_out(
    tmp_path: Path, join: Callable[[str], Member]
) -> None:
    learner, group = join("")
    group.lead(EPOCH)
    train(learner, 6)
    weights = copied(learner)
    name = next(iter(weights))
    endless = weights | {name: torch.full_like(weights[name], float("nan"))}
    other_shape = weights | {name: torch.zeros(3)}
    folder = tmp_path / FOLDER
    assert wait_for((folder / "round").exists, SECONDS)
    for host, snapshot in {
        "late": Snapshot(EPOCH, 0, 3, weights),
        "before": Snapshot(EPOCH - 1, 1, 3, weights),
        "idle": Snapshot(EPOCH, 1, 0, weights),
        "endless": Snapshot(EPOCH, 1, 3, endless),
        "strange": Snapshot(EPOCH, 1, 3, other_shape),
    }.items():
        (folder / f"part@1@{host}").write_bytes(snapshot.to_bytes())
    (folder / "part@1@damaged").write_bytes(b"half of a f")
    orphan = folder / files.owned("part").replace("part@", "part@99999")
    orphan.write_bytes(b"")
    finish_round((learner, group))
    assert same(copied(learner), weights) and not orphan.exists()
    for path in folder.glob("part@*"):
        path.unlink()


def test_a_round_ends_where_training_begins_again(
    tmp_path: Path, join: Callable[[str], Member]
) -> None:
    """The holder does not use what helpers have made of rejected weights."""
    (first, leading), (second, helping) = join(""), join("other")
    before = copied(first)
    leading.lead(EPOCH)
    assert wait_for(helping.follow, SECONDS)
    train(first, 4)
    train(second, 3)
    helping.contribute()
    first.begin_again(before)
    leading.lead(EPOCH)
    train(first, 6)
    own = copied(first)
    finish_round((first, leading))
    assert same(copied(first), own)


def test_another_holder_begins_with_a_round_of_its_own(join: Callable[[str], Member]) -> None:
    (first, leading), (second, helping) = join(""), join("other")
    leading.lead(EPOCH)
    assert wait_for(helping.follow, SECONDS)
    train(second, 2)
    helping.lead(EPOCH + 1)
    assert wait_for(lambda: leading.follow() and same(copied(first), copied(second)), SECONDS)
