"""A session on a GPU: servers that parts share, a limit of time, and a JSON line for each part."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.harness import provenance
from benchmarks.harness.processes import stop
from benchmarks.harness.prompts import INSTRUCTIONS, Prompt, in_chat
from benchmarks.harness.server import Server
from tests.gpu.settings import POOL, Settings
from tlt_sglang.launcher.child_process import ChildProcess
from tlt_sglang.models.named import resolve_model

Line = dict[str, object]
"""A part fills it as it goes on, so that a failure keeps what was measured before."""
RESULTS = "results.jsonl"
LEAST_SECONDS = 20.0
"""Time that has to be left for a part to begin."""


class OutOfTime(Exception):
    """The time of a part is over."""


@dataclass(frozen=True)
class Part:
    """A check with a time limit of its own."""

    key: str
    title: str
    seconds: float
    run: Callable[[Session, Line], None]


class Session:
    """Runs parts one after the other; a context manager that ends every server."""

    def __init__(
        self, folder: Path, settings: Settings, seconds: float, extra_flags: Sequence[str] = ()
    ) -> None:
        """Results and logs go into `folder`; `extra_flags` are given to every server, last."""
        self.folder, self.settings = folder, settings
        self.model = resolve_model(settings.model)
        self.logs: dict[str, Path] = {}
        """The logs of all servers so far, by name."""
        self.failures: list[str] = []
        self._extra = tuple(extra_flags)
        self._servers: dict[str, Server] = {}
        self._used: set[str] = set()
        self._end = time.monotonic() + seconds
        self._began = time.monotonic()
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stop(self._servers.values())

    # -- parts -----------------------------------------------------------------------------------

    def run(self, part: Part) -> None:
        """Run a part within its time and what is left of the session's, and write its line."""
        limit = min(self.settings.patience * part.seconds, self._end - time.monotonic())
        line: Line = {"part": part.key, "title": part.title, "ok": True}
        began = time.monotonic()
        self._used.clear()
        if limit < LEAST_SECONDS:
            line |= {"ok": False, "reason": "no time is left"}
        else:
            try:
                with _time_limit(limit):
                    part.run(self, line)
            except Exception as error:  # the next parts run whatever the reason
                reason = f"{type(error).__name__}: {error}"
                running = {name: self._servers[name] for name in self._used & self._servers.keys()}
                logs = {name: ChildProcess.tail(server) for name, server in running.items()}
                line |= {"ok": False, "reason": reason, "logs": logs}
                self.stop(self._used)
        if not line["ok"]:
            self.failures.append(part.key)
        self.say(line | {"seconds": round(time.monotonic() - began, 1)})

    def say(self, line: Line) -> None:
        """Write a line to the results and to standard output, without paths of this machine."""
        at = {"at_s": round(time.monotonic() - self._began, 1)}
        prefixes = {str(self.folder): "OUT"}
        content = provenance.portable(provenance.replace_prefixes(at | line, prefixes))
        text = json.dumps(content, ensure_ascii=False)
        print(text, flush=True)
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    # -- servers ---------------------------------------------------------------------------------

    def server(self, name: str, *flags: str, model: str | None = None) -> Server:
        """Return the server called `name`, which is started if it does not run."""
        self._launch({name: flags}, model)
        self._servers[name].wait_ready()
        return self._servers[name]

    def begin(self, servers: Mapping[str, Sequence[str]]) -> None:
        """Start servers at the same time, by name and flags; `server` waits for each of them.

        Where so many may not run at once, they start one after the other as they are asked for.
        """
        if len(servers) <= self.settings.kept:
            self._launch(servers, None)

    def _launch(self, servers: Mapping[str, Sequence[str]], model: str | None) -> None:
        for name in [name for name in self._servers if name not in servers]:
            if len(self._servers.keys() | servers.keys()) > self.settings.kept:
                self.stop({name})
        for name, flags in servers.items():
            if name not in self._servers:
                model_flags = ("--model", model or self.settings.model)
                words = [*model_flags, *self.settings.server_flags, *flags, *self._extra]
                self._servers[name] = Server(
                    name, words, self.settings.threads, self.folder / "logs"
                )
            self._servers[name] = self._servers.pop(name)  # the most recently used one is last
            self._used.add(name)
            self.logs[name] = self._servers[name].log_path

    def pool(self, *flags: str, name: str = "pool") -> Server:
        """Return the server of the default pool, with more flags where `name` is another one."""
        return self.server(name, *pool_flags(), *flags)

    def stop(self, names: set[str]) -> None:
        """Stop these servers."""
        stop([self._servers.pop(name) for name in list(self._servers) if name in names])

    def prompts(self, count: int) -> list[Prompt]:
        """Return `count` different instructions as chats, as token ids."""
        rounds = -(-count // len(INSTRUCTIONS))
        texts = [
            f"{text} ({turn})" if turn else text for turn in range(rounds) for text in INSTRUCTIONS
        ]
        return in_chat(self.model, texts[:count])


def pool_flags() -> tuple[str, ...]:
    """Return the flags of a server with the default pool."""
    return ("--adaptive-spec", "--tlt-strategies", ",".join(POOL))


def environment() -> Line:
    """Return what identifies the machine: GPU, driver, versions and commit."""
    query = "--query-gpu=name,memory.total,driver_version"
    return {
        "part": "machine",
        "gpu": nvidia_smi(query),
        "versions": provenance.versions(),
        "git": provenance.git(),
        "command": shlex.join(["python", "-m", "tests.gpu.run"]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def gpu_memory_mib() -> int | None:
    """Return the memory that is used on the first GPU, None without one."""
    text = nvidia_smi("--query-gpu=memory.used")
    return None if text is None else int(text.splitlines()[0])


def nvidia_smi(query: str) -> str | None:
    """Return the answer of nvidia-smi, None where there is none."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread once `seconds` are over."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime(f"the limit of {seconds:.0f} s is over")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
