"""verl 0.9.1: its own HTTP client, with which its workers talk to an engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stacks.own.environment import printed, require, run_program
from tests.support.servers import MODEL, Server, Servers, model_folder
from tlt_sglang.launcher.server_process import HOST

POOL = "off,eagle3:3x1x4,ngram:8"
TOKENS, PROMPT = 32, 16


@pytest.fixture(scope="module")
def shown(servers: Servers) -> dict[str, Any]:
    """Return what verl's client and its own functions make of a server's answers.

    TLT is on in the client's process, too, as it is where verl starts an engine: without it, the
    client cannot be made on this SGLang.
    """
    require()
    server = servers.get(POOL, "--tlt-policy", "random")
    try:
        folder = str(model_folder(MODEL))
        done = run_program("verl_calls.py", HOST, str(server.port), folder, TLT_CONFIG="{}")
    finally:
        restore(server)
    assert done.status == 0, (done.out + done.err)[-6000:]
    return printed(done)


def restore(server: Server) -> None:
    """Give the server the checkpoint's weights again."""
    answer = server.post("/update_weights_from_disk", {"model_path": str(model_folder(MODEL))})
    assert answer["success"]


def test_rollouts_have_the_logprobs_of_the_trainer(shown: dict[str, Any]) -> None:
    """Before and after an update through the client's `update_weights_from_tensor`."""
    assert shown["models"] == 1
    assert shown["update"]
    for time in ("before", "after", "again"):
        assert shown[time]["tokens"] == TOKENS
        assert shown[time]["prompt_rows"] == PROMPT
        assert shown[time]["gap"] < 1e-3


def test_meters_count(shown: dict[str, Any]) -> None:
    """verl's rates are computed from keys that SGLang no longer has, after the first update."""
    for time in ("after", "again"):
        assert shown[time]["drafted"] > 0
        assert 0 <= shown[time]["meters"]["rollout/spec_accept_rate"] <= 1
        assert shown[time]["meters"]["rollout/spec_accept_length"] >= 1


def test_memory_is_not_released_on_cpu(shown: dict[str, Any]) -> None:
    assert shown["release"] == 400


def test_sglangs_function_for_tensors_needs_a_gpu(shown: dict[str, Any]) -> None:
    """verl's trainer calls `sglang.srt.weight_sync.utils.update_weights`, which patches torch's
    reductions with a function that only CUDA tensors pass: `_reduce_tensor_modified`."""
    assert shown["helper"] == "IndexError"
