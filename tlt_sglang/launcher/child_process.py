"""Start a program as a child process, pause and resume it, and end it with all that it started.

Runs in the process that needs the program: `tlt train`, a benchmark or a test. Imports neither
SGLang nor torch. The child leads a session of its own, so that Ctrl-C reaches only the parent, and
so that its descendants can be found after it has died.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from tlt_sglang.config.settings import VARIABLE
from tlt_sglang.errors import EnvironmentProblem

STOP_SECONDS = 60.0
KILL_SECONDS = 10.0
LINE_CHARACTERS = 500


class ChildProcess:
    """A running program; a context manager that ends it.

    `environment` is added to this process's own, from which TLT's settings are taken out: a child
    gets its settings from its command line. `stdin` and `stdout` are as for `subprocess.Popen`; by
    default stdin is empty, and stdout goes to `log`, as stderr always does.
    """

    failure: type[Exception] = EnvironmentProblem
    """The class of the errors that are raised; a subclass may name another one."""
    error_lines = 40
    """Lines of the log that an error carries."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log_path = log
        self.started = time.perf_counter()
        inherited = {key: value for key, value in os.environ.items() if key != VARIABLE}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=cwd,
                env=inherited | dict(environment or {}),
                stdin=stdin,
                stdout=output if stdout is None else stdout,
                stderr=output,
                start_new_session=True,
            )
        self.root = psutil.Process(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # -- its log ---------------------------------------------------------------------------------

    def log(self) -> str:
        """Return everything it has printed."""
        return self.log_path.read_text(errors="replace")

    def tail(self) -> str:
        """Return the last lines of its log, very long ones cut off."""
        ends = self.log().strip().splitlines()[-self.error_lines :]
        return "\n".join(line[:LINE_CHARACTERS] for line in ends) or "(the log is empty)"

    def error(self, problem: str) -> Exception:
        """Return a `failure` that names it and carries the end of its log."""
        tail = self.tail()
        separator = "\n" if "\n" in tail else " "
        return self.failure(f"{self.name} {problem}:{separator}{tail}")

    # -- its life --------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """True until it has ended."""
        return self.process.poll() is None

    def check_alive(self) -> None:
        """Raise `failure` with the end of the log if it has ended."""
        status = self.process.poll()
        if status is not None:
            raise self.error(f"ended with status {status}")

    def wait_done(self, seconds: float) -> None:
        """Return when it has ended with status 0; raise `failure` if it does not in time."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise self.error(f"did not end within {seconds:.0f} s") from error
        if status != 0:
            self.check_alive()

    def processes(self) -> list[psutil.Process]:
        """Return the processes of its session and its descendants that exist, without zombies."""
        descendants: list[psutil.Process] = []
        if self.root.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                descendants = self.root.children(recursive=True)
        elif psutil.pid_exists(self.root.pid):
            return []  # The kernel reuses the id only once nothing of the session is left.
        others = [process for process in descendants if _exists(process)]
        return list({*session(self.root.pid), *others})

    def pids(self) -> list[int]:
        """Return the ids of `processes`."""
        return [process.pid for process in self.processes()]

    def pause(self) -> None:
        """Stop it and its descendants from computing until `resume`."""
        _send(self.processes(), signal.SIGSTOP)

    def resume(self) -> None:
        """Let it and its descendants compute again."""
        _send(self.processes(), signal.SIGCONT)

    # -- the end ---------------------------------------------------------------------------------

    def ask_to_stop(self) -> None:
        """Send SIGTERM, as a user does, and return at once."""
        if self.alive:
            self.process.terminate()
            self.resume()  # A paused process would not handle the signal.

    def stop(self, seconds: float = STOP_SECONDS) -> list[psutil.Process]:
        """End it and all that it started; return the processes that had to be killed.

        SIGTERM goes to the child, which has `seconds` to end with its descendants. SIGKILL goes to
        what exists then.
        """
        try:
            self.ask_to_stop()
            wait_for(self._ended, seconds)
        finally:
            killed = self.kill()
        return killed

    def kill(self) -> list[psutil.Process]:
        """End it and all that it started by SIGKILL; return the processes that existed."""
        killed = self.processes()
        _send(killed, signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(killed, timeout=KILL_SECONDS)
        pipes: tuple[IO[bytes] | None, ...] = (self.process.stdin, self.process.stdout)
        for pipe in pipes:
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return killed

    def _ended(self) -> bool:
        return not self.alive and not self.processes()


def wait_for(condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> bool:
    """Poll `condition`; return True as soon as it holds, False if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def session(leader: int) -> list[psutil.Process]:
    """Return the processes, without zombies, of the session that `leader` leads or led."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == leader and _exists(process):
                members.append(process)
    return members


def _exists(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
