"""Child processes of a benchmark: watched, halted, and stopped by their own ids."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import psutil

from benchmarks.common import REPOSITORY, BenchmarkError

STOP_TIMEOUT = 10.0


class Process:
    """A child process in a session of its own, so that Ctrl-C reaches only the benchmark."""

    def __init__(self, name: str, words: Sequence[str], threads: int, logs: Path) -> None:
        self.name = name
        self.words = list(words)
        self.log = logs / f"{name.replace(':', '')}-{time.time_ns()}.log"
        environment = {k: v for k, v in os.environ.items() if k != "TLT_CONFIG"}
        self.started = time.perf_counter()
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, *words],
                cwd=REPOSITORY,
                env=environment | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=self._stdout(log),
                stderr=log,
                start_new_session=True,
            )
        self.root = psutil.Process(self._child.pid)

    def _stdout(self, log: IO[bytes]) -> IO[bytes] | int:
        return log

    def check_alive(self) -> None:
        """Raise BenchmarkError with the last line of the log if the process has ended."""
        status = self._child.poll()
        if status is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["(empty)"]
            reasons = [line for line in lines if line.startswith("tlt-sglang:")] or lines
            raise BenchmarkError(
                f"{self.name} ended with status {status}: {reasons[-1]} (its log: {self.log})"
            )

    def wait_done(self, seconds: float) -> None:
        """Return when it has ended well; raises BenchmarkError if it has not."""
        try:
            status = self._child.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"{self.name} took more than {seconds:.0f} s.") from error
        if status:
            self.check_alive()

    def close(self) -> None:
        """Let go of a process that has been stopped."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.wait()

    def halt(self) -> None:
        """Stop computing, until it may go on: a process that waits still wakes up now and then,
        and each time takes a core from the one that is measured."""
        _signal(self._tree(), signal.SIGSTOP)

    def go_on(self) -> None:
        """Compute again."""
        _signal(self._tree(), signal.SIGCONT)

    def idle_share(self, seconds: float = 1.0) -> float:
        """CPU time that the process and its descendants take while not asked, in cores."""
        tree = self._tree()
        before = _cpu_seconds(tree)
        time.sleep(seconds)
        return max(0.0, _cpu_seconds(tree) - before) / seconds

    def _tree(self) -> set[psutil.Process]:
        return {self.root, *_descendants(self.root)}


def _cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def stop(roots: Iterable[psutil.Process]) -> None:
    """Ask these processes to end, then end what is left of them and of what they started.

    Returns when all are gone, at the latest after twice the timeout.
    """
    asked: set[psutil.Process] = set()
    ending: set[psutil.Process] = set()
    for root in roots:
        started = _descendants(root)
        asked |= {root} if root.is_running() else started
        ending |= {root, *started}
    _signal(asked, signal.SIGTERM)
    _signal(ending, signal.SIGCONT)  # one that is halted would not hear of it
    _, left = psutil.wait_procs(ending, timeout=STOP_TIMEOUT)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=STOP_TIMEOUT)


def _descendants(root: psutil.Process) -> set[psutil.Process]:
    """What `root` has started; also where it has died and left them, by the session it led."""
    found: set[psutil.Process] = set()
    if not root.is_running() and psutil.pid_exists(root.pid):
        return found  # Somebody else has its number now, so nothing of its session is left.
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if process.pid != root.pid and os.getsid(process.pid) == root.pid:
                found.add(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        found.update(root.children(recursive=True))
    return found


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
