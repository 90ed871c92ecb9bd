"""UniRL 0.2.0: its own HTTP backend starts SGLang, and one variable turns TLT on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.stacks.own.environment import last_line, require, run_program
from tests.support.servers import MODEL, model_folder
from tests.support.tiny import make_drafter
from tlt_sglang.launcher.server_process import HOST, free_port

STRATEGIES = ["off", "eagle3:3x1x4", "ngram:8"]
TOKENS, PROMPTS = 32, 2


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what UniRL's backend makes of the answers of the engine that it has started."""
    require()
    folder = model_folder(MODEL)
    drafter = make_drafter(tmp_path_factory.mktemp("unirl") / "drafter", folder, "eagle3")
    config = {"strategies": STRATEGIES, "policy": "random", "drafter": str(drafter)}
    done = run_program(
        "unirl_calls.py",
        *(HOST, str(free_port()), str(folder)),
        TLT_CONFIG=json.dumps(config),
        SGLANG_USE_CPU_ENGINE="1",
    )
    assert done.status == 0, (done.out + done.err)[-6000:]
    return last_line(done)


def test_it_starts_an_engine_with_every_strategy(shown: dict[str, Any]) -> None:
    assert shown["ping"]
    assert shown["strategies"] == STRATEGIES


@pytest.mark.parametrize("time", ["before", "after tensors", "after a broadcast"])
def test_rollouts_have_the_logprobs_of_the_trainer(time: str, shown: dict[str, Any]) -> None:
    """Each update comes without a session, while generation is paused."""
    assert shown[time]["tokens"] == [TOKENS] * PROMPTS
    assert shown[time]["reasons"] == ["length"]
    assert shown[time]["gap"] < 1e-3


def test_memory_is_not_released_on_cpu(shown: dict[str, Any]) -> None:
    status, text = shown["release"]
    assert status == 400
    assert "release_memory_occupation needs a GPU" in text
