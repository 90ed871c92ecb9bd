"""Training is deterministic, goes on exactly where it stopped, and learns; damage is reported."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.learning import drafter, frozen, sequences
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.training.checkpoints import KEPT, Checkpoints
from tlt_sglang.training.models import Drafter
from tlt_sglang.training.trainer import Trainer, TrainerSettings

SETTINGS = TrainerSettings(steps=2, epochs=3, batch_tokens=64, accumulate=2, learning_rate=1e-2)
LENGTHS = [12, 30, 7, 22, 41, 18, 9, 26, 33, 15]


def trainer(settings: TrainerSettings = SETTINGS, seed: int = 0) -> Trainer:
    texts = sequences(LENGTHS)
    return Trainer(drafter(seed=seed), frozen(), texts, LENGTHS, settings, torch.device("cpu"))


def weights(model: Drafter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_it_learns_and_is_deterministic() -> None:
    runs = []
    for _ in range(2):
        run = trainer(TrainerSettings(steps=2, epochs=15, batch_tokens=64, learning_rate=2e-2))
        reports = list(run.run())
        assert sum(r.loss for r in reports[-5:]) < 0.8 * sum(r.loss for r in reports[:5])
        assert reports[-1].done == 1.0
        assert reports[-1].progress.tokens == 15 * sum(LENGTHS)
        runs.append(weights(run.drafter))
    assert_same(*runs)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path, stop: int) -> None:
    whole = trainer()
    steps = len(list(whole.run()))
    assert steps > 5

    first = trainer()
    for report in first.run():
        if report.progress.step == stop:
            break
    saved = Checkpoints(tmp_path)
    saved.save(stop, first.state())
    for _ in first.run():  # it goes on, and changes what was just saved
        break
    saved.finish()

    second = trainer(seed=9)
    assert Checkpoints(tmp_path).load(second.state, second.restore)
    assert second.progress.step == stop
    assert stop + len(list(second.run())) == steps
    assert_same(weights(whole.drafter), weights(second.drafter))


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    run = trainer()
    next(run.run())
    trained = sum(p.numel() for p in run.drafter.parameters())
    numbers = _numbers(run.state())
    assert trained < numbers < 3.2 * trained  # weights and two moments


def _numbers(state: Any) -> int:
    if isinstance(state, dict):
        return sum(_numbers(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(_numbers(value) for value in state)
    return state.numel() if isinstance(state, Tensor) else 0


def test_the_learning_rate_rises_and_falls() -> None:
    run = trainer(TrainerSettings(epochs=100, warmup=0.1, floor=0.05, learning_rate=2.0))
    rates = []
    for epoch in range(100):
        run.progress.epoch = epoch
        rates.append(run.learning_rate())
    assert 0 < rates[0] < 0.1
    assert rates[10] == max(rates) == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert rates[99] == pytest.approx(0.1, rel=0.05)


def test_minutes_end_a_run() -> None:
    run = trainer(TrainerSettings(steps=1, minutes=0.001, batch_tokens=64))
    reports = list(run.run())
    assert reports[-1].done == 1.0
    assert run.progress.seconds >= 0.06


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = trainer()
    saved = Checkpoints(tmp_path)
    for report in run.run():
        saved.save(report.progress.step, run.state())
    saved.finish()
    last = run.progress.step
    assert [path.name for path in saved.all()] == [
        f"step-{step:08d}" for step in range(last - KEPT + 1, last + 1)
    ]
    assert len(list(tmp_path.iterdir())) == KEPT


def test_what_was_not_finished_does_not_count(tmp_path: Path) -> None:
    assert not Checkpoints(tmp_path).load(trainer().state, trainer().restore)
    (tmp_path / "step-00000009.tmp").mkdir()
    assert not Checkpoints(tmp_path).load(trainer().state, trainer().restore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "gone", "metadata", "other shape"])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, damage: str) -> None:
    run = trainer()
    next(run.run())
    saved = Checkpoints(tmp_path)
    saved.save(1, run.state())
    saved.finish()
    (path,) = saved.all()
    data = next(path.glob("*.distcp"))
    if damage == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif damage == "gone":
        data.unlink()
    elif damage == "metadata":
        (path / ".metadata").write_bytes(b"nothing")
    other = trainer()
    if damage == "other shape":
        texts = sequences(LENGTHS, "eagle")
        model, shared = drafter("eagle"), frozen("eagle")
        other = Trainer(model, shared, texts, LENGTHS, SETTINGS, torch.device("cpu"))
    with pytest.raises(EnvironmentProblem, match=r"step-00000001 is damaged .* delete it"):
        saved.load(other.state, other.restore)


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer()
    next(run.run())
    saved = Checkpoints(tmp_path)
    saved.save(1, run.state())
    saved.finish()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.state_dict_saver.async_save", full)
    with pytest.raises(EnvironmentProblem, match=r"No space left on device.*make room"):
        saved.save(2, run.state())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
