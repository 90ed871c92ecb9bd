"""A rollout as reasoning RL has it: lengths with a long tail, all requests submitted at once."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from benchmarks.harness import statistics
from benchmarks.harness.program import BenchmarkError
from benchmarks.harness.server import ANSWER_SECONDS, Json, Server
from tlt_sglang.launcher.server_process import HOST

TAIL = 4
"""Unfinished requests from which on a rollout is in its tail."""
SPREAD = 0.9
"""Standard deviation of the logarithm of a length."""
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Request:
    """One sample of a group."""

    prompt: int
    """Index of its prompt."""
    tokens: int
    """Its length, or the longest that it may have."""


class CurvePoint(TypedDict):
    """The state of a rollout at one moment."""

    seconds: float
    left: int
    """Unfinished requests."""
    strategy: str | None
    tokens_per_s: float | None
    """None if the server does not report it."""


@dataclass
class RolloutResult:
    """The rollout of one system."""

    system: str
    repetition: int
    seconds: float
    tail_seconds: float
    """Seconds with at most TAIL unfinished requests."""
    tokens: int
    verify_steps: int
    """Sum over all requests; 0 without speculation."""
    output: str
    """Digest of all tokens."""
    curve: list[CurvePoint] = field(default_factory=list)

    @property
    def accept_length(self) -> float:
        """Tokens per verify step, 1.0 without speculation."""
        return self.tokens / self.verify_steps if self.verify_steps else 1.0


def length(rng: random.Random, median: int, least: int, most: int) -> int:
    """Draw the length of a response from a lognormal distribution, cut off at both ends."""
    return max(least, min(most, round(median * rng.lognormvariate(0, SPREAD))))


class Rollout:
    """One rollout on a running server; `natural` responses end where the model ends them."""

    def __init__(
        self,
        server: Server,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        natural: bool,
        temperature: float = 0.0,
    ) -> None:
        self.server, self.requests, self.prompts = server, requests, prompts
        self.natural, self.temperature = natural, temperature
        self.left = len(requests)
        self.ended: list[float] = []
        self.answers: dict[int, Json] = {}
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def play(self, system: str, repetition: int) -> RolloutResult:
        """Submit all requests at once and wait for all of them."""
        self.server.flush()
        over = threading.Event()
        curve: list[CurvePoint] = []
        began = time.perf_counter()
        watcher = threading.Thread(target=self._watch, args=(began, curve, over))
        watcher.start()
        # One after the other: with another order the last requests would be others.
        threads = [
            threading.Thread(target=self._receive, args=(index, self._send(index, request)))
            for index, request in enumerate(self.requests)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        watcher.join()
        if self.problems:
            raise BenchmarkError(f"{system}: {self.problems[0]}")
        ended = sorted(self.ended)
        tail_began = ended[-TAIL - 1] if len(ended) > TAIL else began
        answers = [self.answers[index] for index in range(len(self.requests))]
        metas = [answer["meta_info"] for answer in answers]
        return RolloutResult(
            system,
            repetition,
            ended[-1] - began,
            ended[-1] - tail_began,
            sum(meta["completion_tokens"] for meta in metas),
            sum(meta.get("spec_verify_ct") or 0 for meta in metas),
            statistics.digest([answer["output_ids"] for answer in answers]),
            curve,
        )

    def _send(self, index: int, request: Request) -> http.client.HTTPConnection:
        """Send a request, and return the connection on which its answer will come."""
        body = {
            "input_ids": self.prompts[request.prompt],
            "sampling_params": {
                "temperature": self.temperature,
                "sampling_seed": index,
                "max_new_tokens": request.tokens,
                "ignore_eos": not self.natural,
            },
        }
        connection = http.client.HTTPConnection(HOST, self.server.port, timeout=ANSWER_SECONDS)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/generate", json.dumps(body), headers)
        except (OSError, http.client.HTTPException) as error:
            self.problems.append(f"a request could not be sent: {error}")
        return connection

    def _receive(self, index: int, connection: http.client.HTTPConnection) -> None:
        """Wait for one answer and record its time, in a thread of its own."""
        try:
            answer = json.loads(connection.getresponse().read())
            at = time.perf_counter()
            with self._lock:
                self.answers[index] = answer
                self.ended.append(at)
                self.left -= 1
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.problems.append(f"a request broke off: {error}")
        finally:
            connection.close()

    def _watch(self, began: float, curve: list[CurvePoint], over: threading.Event) -> None:
        """Append a point to `curve` every half second, in a thread of its own."""
        tokens_before, before = 0.0, began
        while not over.wait(SAMPLE_SECONDS):
            with self._lock:
                left = self.left
            tokens, strategy = progress(self.server)
            now = time.perf_counter()
            speed = round((tokens - tokens_before) / (now - before), 1) if tokens else None
            curve.append(
                CurvePoint(
                    seconds=round(now - began, 2),
                    left=left,
                    strategy=strategy,
                    tokens_per_s=speed,
                )
            )
            tokens_before, before = tokens, now


def progress(server: Server) -> tuple[float, str | None]:
    """Return (tokens since the start, strategy); (0.0, None) if the server does not report them."""
    try:
        status = server.scheduler()
    except (OSError, http.client.HTTPException, BenchmarkError):
        return 0.0, None
    if status is None:
        return 0.0, None
    each = (status.get("strategies") or {}).values()
    return float(sum(one["verify_steps"] + one["accepted"] for one in each)), status.get("strategy")
