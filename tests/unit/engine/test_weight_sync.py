"""Which models an update of the weights reaches, and the sessions that are opened for clients."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.config.settings import OlderClients
from tlt_sglang.engine.weight_sync import (
    SESSION_OPENED,
    WeightSync,
    has_separate_drafter,
    limited,
)

pytestmark = pytest.mark.sglang


def model(name: str) -> object:
    return type(name, (), {})()


class Updater:
    """The `WeightUpdater` of a drafter."""

    begun = 0

    def begin_weight_update(self) -> None:
        self.begun += 1


def drafter(name: str = "LlamaForCausalLMEagle3", path: str | None = "/drafter") -> Any:
    args = SimpleNamespace(model_path="/target", speculative_draft_model_path=path)
    return SimpleNamespace(model=model(name), server_args=args, weight_updater=Updater())


class Manager:
    """SGLang's manager as far as `WeightSync` looks at it; `calls` are what it was asked."""

    def __init__(self, *drafters: Any, worker: bool = True) -> None:
        self.drafters = [("draft", one) for one in drafters]
        self.tp_worker: Any = SimpleNamespace()
        self.offload_tags: Collection[str] = ()
        self.draft_worker: Any = (
            SimpleNamespace(weight_update_runners=lambda: self.drafters) if worker else None
        )
        self._session: Any = None
        self.sync = WeightSync()
        self.calls: list[str] = []

    def _select_runners(self, selector: str = "all") -> list[tuple[str, Any]]:
        assert selector == "draft"
        return self.drafters

    def begin_weight_update(self, request: Any) -> Any:
        return self.sync.begin(self._begin, self, request)

    def _begin(self, request: Any) -> Any:
        from sglang.srt.managers.scheduler_components.weight_updater import _WeightUpdateSession

        if self._session is not None:
            return SimpleNamespace(success=False, message="a session is already open")
        self.calls.append(f"begin {request.selector}")
        self._session = _WeightUpdateSession(selector=request.selector)
        return SimpleNamespace(success=True, message="Success")

    def end_weight_update(self, _: object) -> Any:
        self.calls.append(f"end {self._session.selector}")
        self._session = None
        return SimpleNamespace(success=True, message="Success")

    def load(self, request: Any) -> Any:
        if self._session is None:
            return SimpleNamespace(success=False, message="must run in a session")
        self.calls.append(f"load {request.selector}")
        return SimpleNamespace(success=True, message="Success")

    def update(self, selector: str = "all", older_clients: OlderClients = "auto") -> Any:
        request: Any = SimpleNamespace(selector=selector)
        return self.sync.update(self.load, self, request, older_clients)


@pytest.mark.parametrize(
    ("name", "path", "separate"),
    [
        ("LlamaForCausalLMEagle3", "/drafter", True),
        ("LlamaForCausalLM", "/small", True),
        ("DeepseekV3ForCausalLMNextN", "/target", False),
        ("DeepseekV3ForCausalLMNextN", "/target-nextn", False),
        ("MiMoMTP", None, False),
        ("Qwen3NextForCausalLMMTP", "/target", False),
    ],
)
def test_prediction_heads_are_part_of_the_target(
    name: str, path: str | None, separate: bool
) -> None:
    manager = Manager(drafter(name, path))
    assert has_separate_drafter(manager) is separate
    assert manager.sync.default_selector(manager) == ("target" if separate else "all")


def test_without_a_drafter_all_is_all() -> None:
    assert not has_separate_drafter(Manager(worker=False))
    assert not has_separate_drafter(Manager())  # n-grams


@pytest.mark.parametrize(("selector", "reached"), [("all", "target"), ("target", "target")])
def test_an_update_without_a_session_has_one_for_the_target(selector: str, reached: str) -> None:
    manager = Manager(drafter())
    result = manager.update(selector)
    assert result.success
    assert result.message == f"Success {SESSION_OPENED}"
    assert manager.calls == [f"begin {reached}", f"load {reached}", f"end {reached}"]
    assert manager.sync.opened_sessions == 1


def test_an_update_of_the_drafter_without_a_session() -> None:
    manager = Manager(drafter())
    assert manager.update("draft").success
    assert manager.calls == ["begin draft", "load draft", "end draft"]


def test_an_update_of_a_target_with_prediction_heads_reaches_both() -> None:
    manager = Manager(drafter("MiMoMTP", "/target"))
    assert manager.update().success
    assert manager.calls == ["begin all", "load all", "end all"]


def test_without_service_for_older_clients_a_session_is_needed() -> None:
    manager = Manager(drafter())
    assert not manager.update(older_clients="off").success
    manager.begin_weight_update(SimpleNamespace(selector="all"))
    assert manager.update(older_clients="off").success
    assert manager.calls == ["begin target", "load target"]
    assert manager.sync.opened_sessions == 0


def test_a_session_for_all_covers_the_drafter_once_it_is_named() -> None:
    one = drafter()
    manager = Manager(one)
    manager.begin_weight_update(SimpleNamespace(selector="all"))
    manager.update("all")
    assert one.weight_updater.begun == 0
    manager.update("draft")
    manager.update("draft")
    assert one.weight_updater.begun == 1
    manager.end_weight_update(None)
    assert manager.calls == ["begin target", "load target", "load draft", "load draft", "end all"]


def test_a_session_for_the_target_is_what_it_says() -> None:
    one = drafter()
    manager = Manager(one)
    manager.begin_weight_update(SimpleNamespace(selector="target"))
    manager.update("draft")
    assert one.weight_updater.begun == 0
    manager.end_weight_update(None)
    assert manager.calls[-1] == "end target"


def test_a_second_session_that_is_refused_changes_nothing() -> None:
    one = drafter()
    manager = Manager(one)
    manager.begin_weight_update(SimpleNamespace(selector="target"))
    assert not manager.begin_weight_update(SimpleNamespace(selector="all")).success
    manager.update("draft")
    assert one.weight_updater.begun == 0


def test_the_status_names_what_is_open() -> None:
    manager = Manager(drafter())
    groups = SimpleNamespace(_model_update_group={"trainer": object()})
    manager.tp_worker.model_runner = SimpleNamespace(weight_updater=groups)
    manager.begin_weight_update(SimpleNamespace(selector="all"))
    assert manager.sync.status(manager) == {
        "session": "target",
        "opened_sessions": 0,
        "process_groups": ["trainer"],
        "released": [],
        "separate_drafter": True,
    }


def test_the_time_limit_of_a_process_group() -> None:
    gloo, nccl = {"backend": "gloo", "rank": 1}, {"backend": "nccl"}
    assert limited(gloo, None) == gloo
    assert limited(gloo, 2.5) == gloo | {"timeout": timedelta(seconds=2.5)}
    assert limited(nccl, 2.5) == nccl  # its own limit would end the engine


def test_a_load_that_raises_leaves_no_session() -> None:
    manager = Manager(drafter())

    def fails(_: object) -> Any:
        raise NotImplementedError("load_format")

    request: Any = SimpleNamespace(selector="all")
    with pytest.raises(NotImplementedError):
        manager.sync.update(fails, manager, request, "auto")
    assert manager._session is None
