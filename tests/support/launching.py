"""Run programs until they end: the launcher where it must refuse to start, and others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlt_sglang.launcher.child_process import session, wait_for

LAUNCHER = (sys.executable, "-m", "tlt_sglang.launch_server")
SETTINGS = ("TLT_CONFIG", "TLT_DEBUG", "SGLANG_PLUGINS")
"""Variables that are taken out of the environment of the program."""
END_SECONDS = 10.0
"""Time for the processes that a program has started to end after it."""


@dataclass(frozen=True)
class Done:
    """The status, output and run time of a program that has ended."""

    status: int
    out: str
    err: str
    seconds: float


def run(
    command: Sequence[str], environment: dict[str, str] | None = None, seconds: float = 240
) -> Done:
    """Run `command` in a session of its own; assert that no process of it is left at the end.

    Its output goes into files: a process that is left would keep a pipe open.
    """
    started = time.monotonic()
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    with tempfile.TemporaryFile("w+") as out_file, tempfile.TemporaryFile("w+") as err_file:
        with subprocess.Popen(
            command,
            env=inherited | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            start_new_session=True,
        ) as process:
            try:
                process.wait(timeout=seconds)
            finally:
                elapsed = time.monotonic() - started
                wait_for(lambda: not session(process.pid), END_SECONDS)
                left = session(process.pid)
                for member in left:
                    member.kill()
        out_file.seek(0)
        err_file.seek(0)
        out, err = out_file.read(), err_file.read()
    assert left == [], err[-4000:]
    return Done(process.returncode, out, err, elapsed)


def run_file(
    program: str, folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> Done:
    """Write a Python program to a file, which processes that it spawns can import, and run it."""
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
    """Assert that the launcher refuses `flags` with one sentence that contains `says`.

    `traceback` states that SGLang prints one, because we do not recognise the error. Returns the
    seconds until the launcher ended.
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
