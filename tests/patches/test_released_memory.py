"""An idle engine writes no drafter version while an RL stack has released its memory.

The manager of the weights is SGLang's own; what it releases are the graphs of an engine on CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patches import scheduler as patched
from tlt_sglang.engine import drafter_weights, engine
from tlt_sglang.engine.online_drafter import OnlineDrafter

pytestmark = pytest.mark.sglang


@dataclass
class Online(OnlineDrafter):
    """An online drafter without a store, which counts its swaps."""

    updater: Any
    harvester: Any = None
    swaps: int = 0
    _target_updated: bool = False

    def __post_init__(self) -> None:
        self._updater = self.updater
        self.swap: Any = SimpleNamespace(is_single_rank=True, swap_in=self._count)

    def _count(self) -> None:
        self.swaps += 1


@pytest.fixture
def online(updater: Any, monkeypatch: pytest.MonkeyPatch) -> Online:
    online = Online(updater)
    monkeypatch.setattr(
        engine, "current", SimpleNamespace(step=SimpleNamespace(online_drafter=online))
    )
    return online


@pytest.fixture
def updater() -> Any:
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )
    from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

    manager = SchedulerWeightUpdaterManager.__new__(SchedulerWeightUpdaterManager)
    manager.memory_saver_adapter = TorchMemorySaverAdapter.create(enable=False)
    manager.is_fully_idle = lambda **options: True
    manager.scheduler = None
    if hasattr(type(manager), "_session"):  # in shapes with sessions
        manager._session = None
    manager.offload_tags = set()
    return manager


def idle(updater: Any) -> None:
    wrapped: Any = patched.on_idle
    on_idle = wrapped.make(lambda scheduler: None)
    on_idle(SimpleNamespace(weight_updater=updater))


def test_nothing_is_swapped_in_between_release_and_resume(
    online: Online, updater: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.cpu)
    idle(updater)
    assert online.swaps == 1
    updater.release_memory_occupation(SimpleNamespace(tags=["cuda_graph"]))
    idle(updater)
    assert online.swaps == 1
    updater.resume_memory_occupation(SimpleNamespace(tags=["cuda_graph"]))
    idle(updater)
    assert online.swaps == 2


def test_nothing_is_swapped_in_within_an_update(updater: Any) -> None:
    if not hasattr(type(updater), "_session"):
        pytest.skip("an update of the weights is one call in this SGLang")
    assert drafter_weights.writable(updater)
    updater._session = object()
    assert not drafter_weights.writable(updater)
