"""What `bench_adaptive_drafter` measures with: an engine and a sidecar on a core each, and traffic.

The engine has the machine's first core and the sidecar its last one, so that on a machine with one
core for each nothing but memory is shared. Where there is one core only, they share it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import server
from benchmarks.common import BenchmarkError, say
from benchmarks.processes import Process, stop

AT_ONCE = 4
FLAGS = ("--device", "cpu", "--max-total-tokens", "12288", "--max-running-requests", str(AT_ONCE))
CHAIN, NGRAM = "eagle3:3x1x4", "ngram:4"
POOL = f"off,{NGRAM},eagle3:1x1x2,{CHAIN}"


@dataclass
class Bench:
    """One model, the folder for logs, and the processes that run."""

    path: str
    logs: Path
    running: list[Process] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)

    @property
    def cores(self) -> tuple[int, int]:
        """Of the engine, and of the sidecar."""
        there = sorted(os.sched_getaffinity(0))
        return there[0], there[-1]

    def engine(self, store: Path, *flags: str, core: int | None = None) -> Engine:
        """A server with this store, on one core; not ready yet."""
        words = ["--model", self.path, *FLAGS, "--adaptive-spec", "--tlt-strategies", POOL]
        words += ["--tlt-store", str(store), *flags]
        started = Engine("engine", words, 1, self.logs)
        self.keep(started, self.cores[0] if core is None else core)
        return started

    def sidecar(self, store: Path, *flags: str, core: int | None = None) -> Sidecar:
        """A sidecar for this store, on another core."""
        words = ["-m", "tlt_sglang.cli", "sidecar", "--tlt-store", str(store), *flags]
        started = Sidecar("sidecar", words, 1, self.logs)
        started.store = store
        self.keep(started, self.cores[1] if core is None else core)
        return started

    def other(self, name: str, *words: str) -> Process:
        """Another process of this benchmark's."""
        started = Process(name, words, 1, self.logs)
        self.keep(started, None)
        return started

    def keep(self, process: Process, core: int | None) -> None:
        """It runs from now on, on one core."""
        if core is not None:
            process.root.cpu_affinity([core])
        self.running.append(process)
        self.commands.setdefault(process.name, " ".join(process.words))

    def stop(self) -> None:
        """End everything that runs, whatever state it is in."""
        stop([process.root for process in self.running])
        for process in self.running:
            process.close()
        self.running.clear()


class Engine(server.Server):
    """A server whose drafter is swapped."""

    def status(self) -> dict[str, Any]:
        """What its scheduler reports."""
        found: dict[str, Any] = (self.get("/tlt/status") or {})["schedulers"][0]
        return found

    def pin(self, strategy: str | None) -> None:
        """Use one strategy, or let the policy choose."""
        self.post("/tlt/strategy", {"strategy": strategy})

    def accept_length(self, prompts: Sequence[server.Prompt], tokens: int, strategy: str) -> float:
        """Greedy, tokens a step of `strategy` over these prompts, which are not logged: nothing is
        to be learned from what only measures."""
        self.post("/tlt/harvest", {"rate": 0.0})
        self.pin(strategy)
        before = self.status()["strategies"].get(strategy, {"rounds": 0, "accepted": 0})
        for first in range(0, len(prompts), AT_ONCE):
            self.generate(prompts[first : first + AT_ONCE], tokens)
        after = self.status()["strategies"][strategy]
        self.pin(None)
        self.post("/tlt/harvest", {"rate": 1.0})
        rounds = after["rounds"] - before["rounds"]
        accepted: float = after["accepted"] - before["accepted"]
        return 1 + accepted / max(1.0, float(rounds))


class Sidecar(Process):
    """A sidecar, and what it says of itself."""

    store: Path

    def status(self) -> dict[str, Any]:
        """What it last wrote of itself."""
        try:
            found: dict[str, Any] = json.loads((self.store / "sidecar.json").read_text())
        except (OSError, ValueError):
            return {}
        return found


@dataclass
class Point:
    """What the traffic of some seconds showed."""

    seconds: float
    """Since it began."""
    tokens_per_s: float
    accept_length: float
    """Of all strategies together."""
    chain: float | None
    """Of the learned chain, where it ran."""
    ngram: float | None
    version: int
    strategy: str


class Traffic:
    """Prompts sampled at temperature 1, batch after batch, as an RL rollout does."""

    def __init__(
        self, engine: Engine, prompts: Sequence[server.Prompt], tokens: int, seed: int = 0
    ) -> None:
        self.engine, self.prompts, self.tokens = engine, list(prompts), tokens
        self.points: list[Point] = []
        self._next = seed
        self._began = time.monotonic()

    def batch(self) -> None:
        """One batch of answers."""
        rows = [self.prompts[(self._next + i) % len(self.prompts)] for i in range(AT_ONCE)]
        self._next += AT_ONCE
        body = {
            "input_ids": rows,
            "sampling_params": {
                "temperature": 1.0,
                "max_new_tokens": self.tokens,
                "ignore_eos": True,
            },
        }
        before, started = self.engine.status(), time.monotonic()
        self.engine.post("/generate", body, timeout=server.ANSWER_TIMEOUT)
        seconds = time.monotonic() - started
        self.points.append(_point(before, self.engine.status(), seconds, self.tokens, self._began))

    def run(self, seconds: float) -> None:
        """For so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.batch()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Go on for as long as what is within takes."""
        over = threading.Event()
        problems: list[BaseException] = []

        def work() -> None:
            try:
                while not over.is_set():
                    self.batch()
            except BaseException as error:  # told to who waits
                problems.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if problems:
            raise BenchmarkError(f"The traffic broke off: {problems[0]}")


def _point(
    before: dict[str, Any], after: dict[str, Any], seconds: float, tokens: int, began: float
) -> Point:
    def gained(name: str) -> tuple[int, int]:
        old = before["strategies"].get(name, {"rounds": 0, "accepted": 0})
        new = after["strategies"].get(name, {"rounds": 0, "accepted": 0})
        return new["rounds"] - old["rounds"], new["accepted"] - old["accepted"]

    each = {name: gained(name) for name in after["strategies"]}
    rounds = sum(count for count, _ in each.values())
    accepted = sum(count for _, count in each.values())

    def length(name: str) -> float | None:
        count, hits = each.get(name, (0, 0))
        return 1 + hits / count if count else None

    return Point(
        time.monotonic() - began,
        AT_ONCE * tokens / seconds,
        1 + accepted / max(1, rounds),
        length(CHAIN),
        length(NGRAM),
        after["drafter_version"],
        after["strategy"],
    )


def wait(what: str, condition: Any, seconds: float) -> None:
    """Raise BenchmarkError if `condition` does not come true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise BenchmarkError(f"{what} did not come about in {seconds:.0f} s.")
        time.sleep(0.2)


def told(points: Sequence[Point]) -> None:
    """A line of progress."""
    last = points[-1]
    say(
        f"{last.seconds:.0f} s: {last.tokens_per_s:.1f} tokens/s, accept length "
        f"{last.accept_length:.2f}, version {last.version}, {last.strategy}"
    )
