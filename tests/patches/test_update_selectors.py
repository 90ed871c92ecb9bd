"""Updates through IPC reach the target alone where the drafter has a checkpoint of its own.

Checkpoint-engine needs a GPU, so SGLang's own manager runs here on runners that write down what
they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patches import patches_for
from tlt_sglang.engine import engine
from tlt_sglang.engine.step import SpeculationStep
from tlt_sglang.engine.weight_sync import WeightSync
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.upstream import versions

pytestmark = pytest.mark.sglang


class Runner:
    """SGLang's `ModelRunner` as an update sees it."""

    def __init__(self, name: str, drafter: str) -> None:
        self.model = type(name, (), {})()
        self.server_args = SimpleNamespace(
            model_path="/target", speculative_draft_model_path=drafter
        )
        self.weight_updater = self
        self.requests: list[object] = []

    def update_weights_from_ipc(self, request: object) -> tuple[bool, str]:
        self.requests.append(request)
        return True, "IPC weight update completed successfully"


def worker(role: str, runner: Runner) -> Any:
    """A worker of SGLang's, as each of its versions names what an update reaches."""
    return SimpleNamespace(
        weight_update_runners=lambda: [(role, runner)],
        model_runner=runner,
        update_weights_from_ipc=runner.update_weights_from_ipc,
        _draft_worker=SimpleNamespace(draft_runner=runner),
    )


@pytest.fixture
def in_force(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.distributed, "barrier", lambda **_: None)
    current = SimpleNamespace(step=SpeculationStep(), weight_sync=WeightSync())
    monkeypatch.setattr(engine, "current", current)
    installed = patches_for(versions.installed())
    ours = [one for one in installed if one.file.endswith("/scheduler_weight_updater.py")]
    assert ours
    patcher = Patcher(ours, "cuda")
    patcher.apply()
    yield
    patcher.revert()


@pytest.mark.parametrize(
    ("name", "drafter", "reached"),
    [
        ("LlamaForCausalLMEagle3", "/drafter", 0),
        ("DeepseekV3ForCausalLMNextN", "/target", 1),
    ],
)
def test_an_update_through_ipc(in_force: None, name: str, drafter: str, reached: int) -> None:
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqInput
    from sglang.srt.managers.scheduler_components import weight_updater

    target, draft = Runner("LlamaForCausalLM", drafter), Runner(name, drafter)
    manager = object.__new__(weight_updater.SchedulerWeightUpdaterManager)
    manager.tp_worker, manager.draft_worker = worker("target", target), worker("draft", draft)
    manager.metrics_collector = manager.tp_cpu_group = None
    manager.scheduler = SimpleNamespace(record_weight_version_change=lambda new_version: None)
    request = UpdateWeightsFromIPCReqInput(zmq_handles={}, flush_cache=False)
    result = manager.update_weights_from_ipc(request)
    assert result.success, result.message
    assert (len(target.requests), len(draft.requests)) == (1, reached)
