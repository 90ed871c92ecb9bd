"""The environment of `make stacks`, and the router in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tlt_sglang.launcher.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-stacks" / "bin" / "python"


def require() -> None:
    """Fail with a sentence if the environment was not made."""
    assert PYTHON.exists(), "run make stacks, which makes the environment of these tests"


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
