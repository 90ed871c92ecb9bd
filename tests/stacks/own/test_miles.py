"""miles-rl 0.0.2: its engine actor, as with `--rollout-external`, and its rollouts by a router."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stacks.own.environment import free_router, printed, require, run_program
from tests.support.servers import MODEL, Servers, model_folder
from tlt_sglang.launcher.server_process import HOST

POOL = "off,eagle3:3x1x4,ngram:8"
TOKENS, SAMPLES = 32, 4


@pytest.fixture(scope="module")
def shown(servers: Servers) -> dict[str, Any]:
    """Return what miles' engine and samples show; its last update restores the weights.

    TLT is on in miles' process, too, since it reads `dataclasses.fields(ServerArgs)` of the SGLang
    beside it; with the SGLang that it was made for, it needs nothing of TLT.
    """
    require()
    server = servers.get(POOL, "--tlt-policy", "random")
    with free_router(server.url) as router:
        words = (HOST, str(server.port), str(router.port), str(model_folder(MODEL)))
        done = run_program("miles_calls.py", *words, TLT_CONFIG="{}")
    assert done.status == 0, (done.out + done.err)[-6000:]
    return printed(done)


@pytest.mark.parametrize("update", ["broadcast", "disk"])
def test_rollouts_have_the_logprobs_of_the_trainer(update: str, shown: dict[str, Any]) -> None:
    assert shown[update]
    after = shown[f"after {update}"]
    assert after["tokens"] == [TOKENS] * SAMPLES
    assert after["status"] == ["truncated"]
    assert after["gap"] < 1e-3


def test_the_version_is_the_one_that_was_sent(shown: dict[str, Any]) -> None:
    assert shown["health"]
    assert shown["version"] == "b"
    assert shown["after broadcast"]["versions"] == ["b"]
    assert shown["named version"] == "c"


def test_meters_count(shown: dict[str, Any]) -> None:
    """miles' rates are computed from keys that SGLang no longer has."""
    after = shown["after broadcast"]
    assert 0 <= after["accepted"] <= after["drafted"]
    assert after["drafted"] > 0
    assert after["verify_steps"] > 0


def test_memory_is_not_released_on_cpu(shown: dict[str, Any]) -> None:
    status, text = shown["release"]
    assert status == 400
    assert "release_memory_occupation needs a GPU" in text
