"""AReaL 1.0.4: its client and its trainer, with updates from disk and through a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.stacks.own.environment import free_router, printed, require, run_program
from tests.support.launching import Done
from tests.support.servers import MODEL, Server, Servers, model_folder

SECONDS = 400
POOL = "off,eagle3:3x1x4,ngram:8"
FLAGS = ("--tlt-policy", "random", "--tlt-client-timeout-s", "20")
STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    require()


@pytest.fixture
def server(servers: Servers) -> Server:
    """Several strategies with the model's own drafter, which change at every step.

    The weights are those of the checkpoint, with which the trainer begins.
    """
    server = servers.get(POOL, *FLAGS)
    body = {"model_path": str(model_folder(MODEL))}
    assert server.post("/update_weights_from_disk", body)["success"]
    return server


def areal(address: str, mode: str) -> Done:
    """Run AReaL in its environment: its calls, then GRPO with weight updates of `mode`."""
    folder = str(model_folder(MODEL))
    return run_program("areal_grpo.py", address, folder, mode, seconds=SECONDS)


def shown(done: Done) -> dict[str, Any]:
    """Return what the program printed."""
    values = printed(done)
    assert values["calls"] == {"repeats": True, "aligned": True, "stop_reason": "length"}
    return values


@pytest.mark.parametrize("mode", ["disk", "xccl"])
def test_grpo(mode: str, server: Server, record_property: Callable[[str, object], None]) -> None:
    """The logprobs of rollouts are those of the trainer, before and after each update."""
    done = areal(f"127.0.0.1:{server.port}", mode)
    steps = shown(done)["steps"]
    assert done.status == 0
    assert [step["version"] for step in steps] == list(range(STEPS + 1))
    assert all(step["tokens"] > 100 for step in steps)
    gaps = [step["gap"] for step in steps]
    record_property("largest gap", max(gaps))
    assert max(gaps) < 1e-3
    assert server.healthy()


def test_killed_between_pause_and_continue(server: Server) -> None:
    """The server goes on by itself after its time limit, and the next client works."""
    killed = areal(f"127.0.0.1:{server.port}", "killed")
    assert killed.status == 1
    shown(killed)
    done = areal(f"127.0.0.1:{server.port}", "calls")
    assert done.status == 0, (done.out + done.err)[-6000:]
    shown(done)


def test_through_the_router(server: Server) -> None:
    """sglang-router stands in front: AReaL's calls of one client work through it."""
    with free_router(server.url) as router:
        done = areal(f"127.0.0.1:{router.port}", "generate")
        assert done.status == 0, (done.out + done.err)[-6000:]
        shown(done)
