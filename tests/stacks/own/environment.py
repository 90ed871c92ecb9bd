"""The environment of `make stacks`, and the programs and the router in it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.launching import Done, run
from tlt_sglang.launcher.server_process import ServerProcess, free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PYTHON = ROOT / ".venv-stacks" / "bin" / "python"


def require() -> None:
    """Fail with a sentence if the environment was not made."""
    assert PYTHON.exists(), "run make stacks, which makes the environment of these tests"


def run_program(name: str, *words: str, seconds: float = 300, **variables: str) -> Done:
    """Run a program of this folder in the environment, to its end."""
    environment = {
        "PYTHONPATH": os.pathsep.join((str(HERE / "stubs"), str(ROOT))),
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "2",
    }
    command = [str(PYTHON), str(HERE / name), *words]
    return run(command, environment | variables, seconds)


COMPLAINT = re.compile(
    r".*(?:[Rr]etry|[Ee]rror 4\d\d|[Ee]rror 5\d\d|HTTP [45]\d\d|status[= ][45]\d\d"
    r"|RemoteInfEngine.*(?:WARNING|ERROR)).*"
)
"""A line of a client's log about an answer of the server."""


def printed(done: Done) -> dict[str, Any]:
    """Return the line of JSON that a program ended with; no line of its log blames the server."""
    assert COMPLAINT.findall(done.out + done.err) == []
    return last_line(done)


def last_line(done: Done) -> dict[str, Any]:
    """Return the line of JSON that a program ended with; its log may be a server's, too."""
    lines = [line for line in done.out.splitlines() if line.startswith('{"')]
    assert lines, (done.out + done.err)[-6000:]
    values: dict[str, Any] = json.loads(lines[-1])
    return values


@contextmanager
def free_router(url: str) -> Iterator[ServerProcess]:
    """Start sglang-router in front of a server, and end it afterwards."""
    program = [str(PYTHON), "-m", "sglang_router.launch_router"]
    flags = ["--host", "127.0.0.1", "--worker-urls", url, "--policy", "round_robin"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "router.log"
        with ServerProcess(flags, log, name="The router", program=program) as router:
            router.wait_ready(60)
            yield router
