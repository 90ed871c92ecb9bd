"""Published weights on their way into a drafter: held in host memory, written one by one."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.config.settings import Config
from tlt_sglang.engine import drafter_weights, first_rank
from tlt_sglang.engine.engine import Engine


class Model(torch.nn.Module):
    """A drafter with SGLang's interface for loading."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lm_head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.get_parameter(name).copy_(tensor)


def worker(model: Model) -> Any:
    target = SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Linear(2, 2)))
    runner = SimpleNamespace(model=model, device="cpu")
    return SimpleNamespace(_draft_worker=SimpleNamespace(draft_runner=runner), target_worker=target)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that CUDA was asked to pin."""
    tensors: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return tensors


def test_versions_are_held_in_pinned_host_memory(pinned: list[torch.Tensor]) -> None:
    """A thread stages them; it has to leave the device alone, which may be capturing graphs."""
    weights = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    staged = drafter_weights.stager("cuda")(weights)
    assert staged == weights
    assert pinned == list(weights.values())
    assert drafter_weights.stager("cpu")(weights) is weights


def test_weights_are_written_in_place() -> None:
    model = Model()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    drafter_weights.copier(worker(model), "cuda")({"fc.weight": torch.full((2, 2), 7.0)})
    assert model.fc.weight.tolist() == [[7, 7], [7, 7]]
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_the_store_is_watched_once_the_engine_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then SGLang captures graphs, in which no other thread may allocate memory."""
    monkeypatch.setattr(first_rank, "is_first", lambda: False)
    calls: list[str] = []
    online: Any = SimpleNamespace(begin=calls.append)
    patcher: Any = SimpleNamespace(verify=lambda: None)
    scheduler: Any = SimpleNamespace(draft_worker=None, weight_updater="updater")
    one = Engine(Config(), "cuda", patcher)
    one.step.online_drafter = online
    assert calls == []
    one.attach(scheduler)
    assert calls == ["updater"]
