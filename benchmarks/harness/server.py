"""Servers that a benchmark measures: requests to them, timed, and what they report.

Each server uses the same number of threads and writes a log file of its own. Only one of them
computes at a time.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import requests

from benchmarks.harness.processes import MeasuredProcess, environment, log_file
from benchmarks.harness.program import BenchmarkError, say
from benchmarks.harness.prompts import Prompt
from benchmarks.harness.provenance import REPOSITORY
from tlt_sglang.launcher.server_process import HOST, ServerProcess

Json = dict[str, Any]
"""An object of a request or an answer."""
START_SECONDS = 600.0
ANSWER_SECONDS = 1800.0
FEW, WHOLE = 8, 1_000_000
"""Tokens in a piece of a stream: to see the progress of a request, or only its start and end."""


class StrategyCounts(TypedDict):
    """Counts of one strategy in `/tlt/status`."""

    verify_steps: int
    accepted: int


class Swaps(TypedDict):
    """The drafter versions that were swapped in, in `/tlt/status`."""

    swaps: list[tuple[int, float]]
    """Version and milliseconds of each."""


class SchedulerStatus(TypedDict, total=False):
    """The keys of a scheduler in `/tlt/status` that benchmarks read."""

    strategy: str
    strategies: dict[str, StrategyCounts]
    drafter_version: int
    swap: Swaps
    switches: int
    switch_seconds: float


NO_COUNTS = StrategyCounts(verify_steps=0, accepted=0)


@dataclass(frozen=True)
class Sample:
    """The time of one generation, prompt processing excluded."""

    seconds: float
    """From the moment every request had its first token, until all were complete."""
    tokens: int
    """Tokens generated in these seconds, over all requests."""
    steps: int
    """Verify steps of a single request that speculates, else as `tokens`."""
    prompt_tokens: int
    output_ids: list[list[int]]


@dataclass(frozen=True)
class TracedStep:
    """A decode step of one request."""

    start: int
    """Tokens generated before it."""
    tokens: int
    pins: int
    """Strategies that had been pinned since the beginning."""


class Server(MeasuredProcess, ServerProcess):
    """An SGLang server, started by our launcher with these flags."""

    def __init__(self, name: str, flags: Sequence[str], threads: int, logs: Path) -> None:
        ServerProcess.__init__(
            self,
            flags,
            log_file(logs, name),
            name=name,
            environment=environment(threads),
            cwd=REPOSITORY,
        )

    def wait_started(self) -> None:
        """Return once the server answers; raise BenchmarkError if it does not start."""
        self.wait_ready(
            START_SECONDS, lambda waited: say(f"{self.name}: starting, {waited:.0f} s so far")
        )
        say(f"{self.name}: ready")

    def wait_first_token(self, prompt: str) -> float:
        """Return the seconds from spawning the process to the first token of a first request."""
        while True:
            try:
                first = next(iter(self._stream([prompt], 1)))[0]
            except (OSError, http.client.HTTPException, BenchmarkError):
                self.check_alive()
                if time.perf_counter() - self.started > START_SECONDS:
                    raise
                time.sleep(0.1)
            else:
                return first - self.started

    # -- generation ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        tokens: int,
        *,
        full_batch: bool = False,
        temperature: float = 0.0,
    ) -> Sample:
        """Generate exactly `tokens` tokens for each prompt, all at once.

        At a `temperature` each prompt has its place among the prompts as its seed.

        The stream has two pieces a request, the first token and all others: the time between the
        two is the decoding, and no piece in between costs the engine anything.

        `full_batch`: seconds and tokens are only those while the batch has its whole size, from the
        second piece that every request has to the last but one of the first to have it. Then there
        is a piece every few tokens, and in between they are taken to come evenly. The first and the
        last piece do not count because SGLang's overlap scheduling, which plain decoding has and
        speculation on CPU has not, sends tokens a step late, but the last ones of requests at once
        (`enable_skip_finishing_decode`): from the first to the last it would have one step less.
        """
        self.flush()
        arrived: dict[int, list[tuple[float, int]]] = {}
        last: dict[int, Json] = {}
        interval = FEW if full_batch else WHOLE
        try:
            for at, piece in self._stream(prompts, tokens, interval, temperature):
                index = piece.get("index") or 0
                count = piece["meta_info"]["completion_tokens"]
                arrived.setdefault(index, []).append((at, count))
                last[index] = piece
        except (OSError, http.client.HTTPException) as error:
            self.check_alive()
            raise BenchmarkError(f"{self.name} broke off an answer: {error}") from error
        metas = [piece["meta_info"] for piece in last.values()]
        if len(last) < len(prompts) or any(m["completion_tokens"] != tokens for m in metas):
            raise BenchmarkError(f"{self.name} did not generate {tokens} tokens for each prompt.")
        seconds, decoded = _decoding(list(arrived.values()), full_batch)
        steps = metas[0].get("spec_verify_ct") if len(prompts) == 1 else None
        return Sample(
            seconds=seconds,
            tokens=decoded,
            steps=steps or decoded,
            prompt_tokens=sum(m["prompt_tokens"] for m in metas),
            output_ids=[last[index]["output_ids"] for index in sorted(last)],
        )

    def answer(self, prompt: Prompt, tokens: int, temperature: float, seed: int) -> Json:
        """Return SGLang's answer to one prompt, of at most `tokens` tokens: it may end before."""
        body = _prompt(prompt) | {
            "sampling_params": {
                "temperature": temperature,
                "max_new_tokens": tokens,
                "sampling_seed": seed,
            }
        }
        answer: Json = self.send("/generate", body, ANSWER_SECONDS)
        return answer

    def trace(
        self, prompt: Prompt, tokens: int, pins: dict[int, str], temperature: float = 0.0
    ) -> list[TracedStep]:
        """Generate one answer and return its steps.

        `pins` maps numbers of tokens to the strategies that are pinned at these numbers.
        """
        waiting = dict(sorted(pins.items()))
        steps: list[TracedStep] = []
        before, pinned = 1, 0
        for at in [number for number in waiting if number == 0]:
            self.pin(waiting.pop(at))
        for _, piece in self._stream([prompt], tokens, 1, temperature):
            count = piece["meta_info"]["completion_tokens"]
            if count > before:
                steps.append(TracedStep(before, count - before, pinned))
                before = count
            for at in [number for number in waiting if number <= count]:
                self.pin(waiting.pop(at))
                pinned += 1
        return steps

    # -- administration --------------------------------------------------------------------------

    def send(self, path: str, body: Json, seconds: float = 60) -> Any:
        """POST JSON and return the answer; raise BenchmarkError for a status that is not 2xx."""
        try:
            return self.post(path, body, timeout=seconds)
        except requests.RequestException as error:
            raise BenchmarkError(f"{self.name} answered {str(error)[:200]}") from error

    def pin(self, strategy: str | None) -> None:
        """Use one strategy from now on; with None the policy chooses."""
        self.send("/tlt/strategy", {"strategy": strategy})

    def flush(self) -> None:
        """Drop cached prefixes and n-grams, so that a repeated prompt is processed anew."""
        self.send("/flush_cache?timeout=30", {})

    def server_info(self) -> Json:
        """Return SGLang's own arguments of this server."""
        info: Json = self.get("/get_server_info")
        return info

    def scheduler(self) -> SchedulerStatus | None:
        """Return the part of the (first) scheduler in `/tlt/status`; None if TLT is off."""
        response = self.request("GET", "/tlt/status", timeout=60)
        if response.status_code == 404:
            return None
        if not response.ok:
            raise BenchmarkError(
                f"{self.name} answered {response.status_code} to /tlt/status: {response.text[:200]}"
            )
        status: SchedulerStatus = response.json()["schedulers"][0]
        return status

    def _stream(
        self,
        prompts: Sequence[Prompt],
        tokens: int,
        interval: int = WHOLE,
        temperature: float = 0.0,
    ) -> Iterable[tuple[float, Json]]:
        """Yield (time of arrival, piece) as the pieces arrive."""
        body = {next(iter(_prompt(prompts[0]))): list(prompts)} | {
            "stream": True,
            "sampling_params": [
                {
                    "temperature": temperature,
                    "sampling_seed": seed,
                    "max_new_tokens": tokens,
                    "ignore_eos": True,
                    "stream_interval": interval,
                }
                for seed in range(len(prompts))
            ],
        }
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_SECONDS)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/generate", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                text = response.read().decode(errors="replace")
                raise BenchmarkError(f"{self.name} answered {response.status}: {text[:200]}")
            for line in response:
                at = time.perf_counter()
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    if "meta_info" not in piece:
                        raise BenchmarkError(f"{self.name} answered {line.decode()[:200]}")
                    yield at, piece
        finally:
            connection.close()


def _decoding(
    requests_pieces: Sequence[Sequence[tuple[float, int]]], full_batch: bool
) -> tuple[float, int]:
    """Return (seconds, tokens) of the decoding, from the (arrival, tokens) of all pieces."""
    first, last = (1, -2) if full_batch else (0, -1)
    ends = [pieces[last][0] for pieces in requests_pieces]
    start = max(pieces[first][0] for pieces in requests_pieces)
    if not full_batch:
        tokens = sum(pieces[-1][1] - pieces[0][1] for pieces in requests_pieces)
        return max(ends) - start, tokens
    end = min(ends)
    counts = (_count(pieces, end) - _count(pieces, start) for pieces in requests_pieces)
    return end - start, round(sum(counts))


def _count(pieces: Sequence[tuple[float, int]], at: float) -> float:
    """Return the tokens that a request has at a moment, from (arrival, tokens) of its pieces."""
    times, counts = zip(*pieces, strict=True)
    return float(np.interp(at, times, counts))


def _prompt(prompt: Prompt) -> Json:
    """Return the part of a request that holds its prompt."""
    return {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}


def default_threads() -> int:
    """Return the number of threads that torch uses by default."""
    variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    program = "import torch; print(torch.get_num_threads())"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        raise BenchmarkError(f"torch cannot be imported: {process.stderr.strip()[-200:]}")
    return int(process.stdout)
