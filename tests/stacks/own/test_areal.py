"""AReaL 1.0.4: its client and its trainer, with updates from disk and through a process group."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stacks.own.environment import PYTHON, free_router, require
from tests.support.servers import MODEL, Server, Servers, model_folder
from tlt_sglang.launcher.server_process import free_port

HERE = Path(__file__).parent
SECONDS = 400
POOL = "off,eagle3:3x1x4,ngram:8"
FLAGS = ("--tlt-policy", "random", "--tlt-client-timeout-s", "20")
STEPS = 2
COMPLAINT = re.compile(r".*(?:[Rr]etry|[Ee]rror 4\d\d|[Ee]rror 5\d\d|HTTP [45]\d\d).*")
"""A line of AReaL's log about an answer of the server."""


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


def areal(address: str, mode: str) -> subprocess.CompletedProcess[str]:
    """Run AReaL in its environment: its calls, then GRPO with weight updates of `mode`."""
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(HERE / "stubs"), str(HERE.parents[2]))),
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "2",
        "TLT_CONFIG": "",
    }
    command = [str(PYTHON), str(HERE / "areal_grpo.py"), address, str(model_folder(MODEL)), mode]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def shown(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what the program printed; no line of its log may blame the server."""
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"calls"')]
    assert lines, (done.stdout + done.stderr)[-6000:]
    complaints = re.findall(
        r".*(?:Retry|rror 4\d\d|rror 5\d\d|HTTP \d).*", done.stdout + done.stderr
    )
    assert complaints == []
    printed: dict[str, Any] = json.loads(lines[-1])
    assert printed["calls"] == {"repeats": True, "aligned": True, "stop_reason": "length"}
    return printed


@pytest.mark.parametrize("mode", ["disk", "xccl"])
def test_grpo(mode: str, server: Server, record_property: Callable[[str, object], None]) -> None:
    """The logprobs of rollouts are those of the trainer, before and after each update."""
    done = areal(f"127.0.0.1:{server.port}", mode)
    steps = shown(done)["steps"]
    assert done.returncode == 0
    assert [step["version"] for step in steps] == list(range(STEPS + 1))
    assert all(step["tokens"] > 100 for step in steps)
    gaps = [step["gap"] for step in steps]
    record_property("largest gap", max(gaps))
    assert max(gaps) < 1e-3
    assert server.healthy()


def test_killed_between_pause_and_continue(server: Server) -> None:
    """The server goes on by itself after its time limit, and the next client works."""
    killed = areal(f"127.0.0.1:{server.port}", "killed")
    assert killed.returncode == 1
    shown(killed)
    done = areal(f"127.0.0.1:{server.port}", "calls")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    shown(done)


def test_through_the_router(server: Server) -> None:
    """sglang-router stands in front: AReaL's calls of one client work through it."""
    with free_router(server.url) as router:
        done = areal(f"127.0.0.1:{router.port}", "generate")
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        shown(done)
