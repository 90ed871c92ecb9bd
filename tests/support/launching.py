"""Programs that the tests start and wait for: the launcher where it must refuse, and others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.servers import wait_for

LAUNCHER = (sys.executable, "-m", "tlt_sglang.launch_server")
SETTINGS = ("TLT_CONFIG", "TLT_DEBUG", "SGLANG_PLUGINS")
"""Of the environment, not handed on."""


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    status: int
    out: str
    err: str
    seconds: float


def run(
    command: Sequence[str], environment: dict[str, str] | None = None, seconds: float = 240
) -> Done:
    """Run `command` in a session of its own, of which nothing may be left."""
    started = time.monotonic()
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    with subprocess.Popen(
        command,
        env=inherited | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            taken = time.monotonic() - started
            wait_for(lambda: not session(process.pid), 10)
            left = session(process.pid)
            for one in left:
                one.kill()
    assert left == [], err[-4000:]
    return Done(process.returncode, out, err, taken)


def run_file(
    program: str, folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> Done:
    """Run a Python program as a file in `folder`, so that processes it spawns can read it."""
    file = folder / "program.py"
    file.write_text(program)
    return run([sys.executable, str(file), *arguments], environment)


def refused(
    *flags: str,
    says: str,
    environment: dict[str, str] | None = None,
    status: int = 1,
    traceback: bool = False,
) -> float:
    """Assert that the launcher refuses `flags` with one sentence that holds `says`; the seconds.

    `traceback`: whether SGLang shows one, because the error is none that we know.
    """
    done = run([*LAUNCHER, *flags], environment)
    lines = done.err.splitlines()
    sentences = [line for line in lines if line.startswith("tlt-sglang:")]
    assert done.status == status, done.err
    assert len(sentences) == 1, done.err
    assert says in sentences[0], sentences[0]
    assert sentences[0].endswith((".", ").")), sentences[0]
    assert ("Traceback" in done.out + done.err) == traceback, done.err
    return done.seconds


def session(leader: int) -> list[psutil.Process]:
    """Processes that still run in the session of `leader`; zombies do not count."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
