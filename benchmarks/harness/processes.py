"""Child processes of a benchmark: watched, paused, and ended together."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from benchmarks.harness.program import BenchmarkError
from benchmarks.harness.provenance import REPOSITORY
from tlt_sglang.launcher.child_process import ChildProcess

STOP_SECONDS = 10.0


class MeasuredProcess(ChildProcess):
    """A child process whose failure ends the benchmark, and whose use of the CPU can be read."""

    failure = BenchmarkError

    def tail(self) -> str:
        """Return the line of the log that gives the reason of a failure, and the log's path."""
        lines = self.log().strip().splitlines() or ["(empty)"]
        reasons = [line for line in lines if line.startswith("tlt-sglang:")] or lines
        return f"{reasons[-1]} (its log: {self.log_path})"

    def idle_share(self, seconds: float = 1.0) -> float:
        """Return the CPU time that it takes while it has no work, in cores."""
        processes = self.processes()
        before = _cpu_seconds(processes)
        time.sleep(seconds)
        return max(0.0, _cpu_seconds(processes) - before) / seconds

    def ask_to_stop(self) -> None:
        """Send SIGTERM to it, or to the processes that it left behind, and return at once."""
        super().ask_to_stop()
        if not self.alive:
            _terminate(self.processes())


class Process(MeasuredProcess):
    """A Python program with these arguments, on a number of threads."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        threads: int,
        logs: Path,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> None:
        super().__init__(
            name,
            [sys.executable, *arguments],
            log_file(logs, name),
            environment=environment(threads),
            cwd=REPOSITORY,
            stdin=stdin,
            stdout=stdout,
        )


def log_file(logs: Path, name: str) -> Path:
    """Return a new path for the log of the process called `name`."""
    return logs / f"{name.replace(':', '')}-{time.time_ns()}.log"


def environment(threads: int) -> dict[str, str]:
    """Return the environment variables that give a process this number of threads."""
    return {"OMP_NUM_THREADS": str(threads)}


def stop(processes: Iterable[ChildProcess]) -> None:
    """End these processes and all that they started, at the same time."""
    processes = list(processes)
    members = [member for process in processes for member in process.processes()]
    for process in processes:
        process.ask_to_stop()
    for process in processes:
        process.stop(STOP_SECONDS)
    # A descendant whose parent has died stays a zombie until init has read its status.
    psutil.wait_procs(members, timeout=STOP_SECONDS)


def stop_children() -> None:
    """End the children of this process that no object stands for, such as an interrupted start."""
    children = psutil.Process().children(recursive=True)
    _terminate(children)
    _, alive = psutil.wait_procs(children, timeout=STOP_SECONDS)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)


def _terminate(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            process.resume()  # A paused process would not handle the signal.


def _cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
