"""Servers that a benchmark measures, and how they are asked.

Each is told to use the same number of threads and writes its output to a log file of its own. Only
one of them computes at a time.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.common import BenchmarkError, say
from benchmarks.processes import Process
from tlt_sglang.launcher.server_process import free_port

HOST = "127.0.0.1"
Prompt = str | list[int]
"""Text, or token ids."""
START_TIMEOUT = 600.0
ANSWER_TIMEOUT = 1800.0
FEW, WHOLE = 8, 1_000_000
"""Tokens in a piece of a stream: where it is told what a request has in between, and where not."""


@dataclass(frozen=True)
class Sample:
    """What one question to a process took, prompt processing excluded."""

    seconds: float
    """From the moment every request had its first token, until all were complete."""
    tokens: int
    """Tokens generated in these seconds, over all requests."""
    steps: int
    """Verify steps of a single request that speculates, else as `tokens`."""
    prompt_tokens: int
    output_ids: list[list[int]]


@dataclass(frozen=True)
class Step:
    """A decode step of one request."""

    start: int
    """Tokens generated before it."""
    tokens: int
    pins: int
    """Strategies that had been pinned since the beginning."""


class Server(Process):
    """An SGLang server, started by our launcher with these flags."""

    def __init__(self, name: str, flags: Sequence[str], threads: int, logs: Path) -> None:
        self.port = free_port()
        launcher = ["-m", "tlt_sglang.launch_server", "--port", str(self.port)]
        super().__init__(name, [*launcher, *flags], threads, logs)

    def wait_ready(self) -> None:
        """Return once the server answers; raises BenchmarkError if it does not come up."""
        told = 0.0
        while not self._healthy():
            self.check_alive()
            waited = time.perf_counter() - self.started
            if waited > START_TIMEOUT:
                raise BenchmarkError(f"{self.name} was not ready in {waited:.0f} s ({self.log})")
            if waited - told >= 10:
                told = waited
                say(f"{self.name}: starting, {waited:.0f} s so far")
            time.sleep(0.2)
        say(f"{self.name}: ready")

    def wait_first_token(self, prompt: str) -> float:
        """Seconds from spawning the process to the first token of a first request."""
        while True:
            try:
                first = next(iter(self._stream([prompt], 1)))[0]
            except (OSError, http.client.HTTPException, BenchmarkError):
                self.check_alive()
                if time.perf_counter() - self.started > START_TIMEOUT:
                    raise
                time.sleep(0.1)
            else:
                return first - self.started

    def generate(
        self, prompts: Sequence[Prompt], tokens: int, *, full_batch: bool = False
    ) -> Sample:
        """Greedy generation of exactly `tokens` tokens for each prompt, all at once.

        The stream is asked for two pieces a request, the first token and all others: the time
        between the two is the decoding, and no piece in between costs the engine anything.

        `full_batch`: seconds and tokens are only those while the batch has its whole size, from the
        second piece that every request has to the last but one of the first to have it. Then there
        is a piece every few tokens, and in between they are taken to come evenly. The first and the
        last piece do not count because SGLang's overlap scheduling, which plain decoding has and
        speculation on CPU has not, tells tokens a step late, but the last ones of requests at once
        (`enable_skip_finishing_decode`): from the first to the last it would have one step less.
        """
        self.flush()
        arrived: dict[int, list[tuple[float, int]]] = {}
        last: dict[int, dict[str, Any]] = {}
        interval = FEW if full_batch else WHOLE
        try:
            for at, piece in self._stream(prompts, tokens, interval):
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
        every = arrived.values()
        first, last_one = (1, -2) if full_batch else (0, -1)
        ends = [pieces[last_one][0] for pieces in every]
        start = max(pieces[first][0] for pieces in every)
        end = min(ends) if full_batch else max(ends)
        if full_batch:
            decoded = round(sum(_count(each, end) - _count(each, start) for each in every))
        else:
            decoded = sum(pieces[-1][1] - pieces[0][1] for pieces in every)
        steps = metas[0].get("spec_verify_ct") if len(prompts) == 1 else None
        return Sample(
            seconds=end - start,
            tokens=decoded,
            steps=steps or decoded,
            prompt_tokens=sum(m["prompt_tokens"] for m in metas),
            output_ids=[last[index]["output_ids"] for index in sorted(last)],
        )

    def answer(self, prompt: Prompt, tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        """SGLang's answer to one prompt, of at most `tokens` tokens: it may end before."""
        body = _question(prompt) | {
            "sampling_params": {
                "temperature": temperature,
                "max_new_tokens": tokens,
                "sampling_seed": seed,
            }
        }
        status, text = self._ask("POST", "/generate", ANSWER_TIMEOUT, body)
        if status != 200:
            raise BenchmarkError(f"{self.name} answered {status}: {text[:200]}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def trace(self, prompt: Prompt, tokens: int, pins: dict[int, str]) -> list[Step]:
        """Greedy generation of one answer, step by step; `pins` maps numbers of tokens to the
        strategies that are pinned when there are so many."""
        waiting = dict(sorted(pins.items()))
        steps: list[Step] = []
        before, pinned = 1, 0
        for at in [number for number in waiting if number == 0]:
            self.post("/tlt/strategy", {"strategy": waiting.pop(at)})
        for _, piece in self._stream([prompt], tokens, interval=1):
            count = piece["meta_info"]["completion_tokens"]
            if count > before:
                steps.append(Step(before, count - before, pinned))
                before = count
            for at in [number for number in waiting if number <= count]:
                self.post("/tlt/strategy", {"strategy": waiting.pop(at)})
                pinned += 1
        return steps

    def post(self, path: str, body: dict[str, Any], timeout: float = 60) -> None:
        """A POST of JSON of which only the status counts."""
        status, text = self._ask("POST", path, timeout, body)
        if status != 200:
            raise BenchmarkError(f"{self.name} answered {status} to {path}: {text[:200]}")

    def flush(self) -> None:
        """Forget prefixes and n-grams, so that a prompt that comes again is a new one."""
        status, body = self._ask("POST", "/flush_cache?timeout=30")
        if status != 200:
            raise BenchmarkError(f"{self.name} did not flush its cache: {body[:200]}")

    def get(self, path: str) -> dict[str, Any] | None:
        """The JSON at `path`, None where there is no such route."""
        status, body = self._ask("GET", path)
        if status == 404:
            return None
        if status != 200:
            raise BenchmarkError(f"{self.name} answered {status} to {path}: {body[:200]}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def _healthy(self) -> bool:
        try:
            return self._ask("GET", "/health", timeout=30)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _ask(
        self, method: str, path: str, timeout: float = 60, body: dict[str, Any] | None = None
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        content = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()

    def _stream(
        self, prompts: Sequence[Prompt], tokens: int, interval: int = WHOLE
    ) -> Iterable[tuple[float, Any]]:
        """(time of arrival, piece), as they arrive."""
        body = _questions(prompts) | {
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": tokens,
                "ignore_eos": True,
                "stream_interval": interval,
            },
        }
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_TIMEOUT)
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


def _count(pieces: Sequence[tuple[float, int]], at: float) -> float:
    """Tokens that a request has at a moment, of (arrival, tokens) of its pieces."""
    times, counts = zip(*pieces, strict=True)
    return float(np.interp(at, times, counts))


def _question(prompt: Prompt) -> dict[str, Any]:
    """The part of a request that holds one prompt."""
    return {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}


def _questions(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The part of a request that holds several, all of one kind."""
    return {next(iter(_question(prompts[0]))): list(prompts)}


class Transformers(Process):
    """A worker that generates with transformers; see `benchmarks.transformers_worker`."""

    def __init__(self, model: str, threads: int, logs: Path) -> None:
        words = ["-m", "benchmarks.transformers_worker", model, str(threads)]
        super().__init__("transformers", words, threads, logs)

    def _stdout(self, log: IO[bytes]) -> IO[bytes] | int:
        return subprocess.PIPE

    def wait_ready(self) -> None:
        """Return once the model is loaded."""
        assert self._child.stdout is not None
        while not select.select([self._child.stdout], [], [], 10)[0]:
            say(f"{self.name}: starting, {time.perf_counter() - self.started:.0f} s so far")
        self._answer()
        say(f"{self.name}: ready")

    def generate(self, prompts: Sequence[str], tokens: int) -> Sample:
        """As `Server.generate`, for a single prompt."""
        (prompt,) = prompts
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}).encode())
            self._child.stdin.write(b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # The process has ended; reading its answer says so.
        answer = self._answer()
        output = answer["output_ids"]
        if len(output) != tokens:
            raise BenchmarkError(f"{self.name} generated {len(output)} tokens, not {tokens}.")
        decoded = tokens - 1
        return Sample(answer["seconds"], decoded, decoded, answer["prompt_tokens"], [output])

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            self.check_alive()
        answer: dict[str, Any] = json.loads(line)
        return answer


def default_threads() -> int:
    """How many threads torch uses unless told otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    program = "import torch; print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchmarkError(f"torch cannot be imported: {done.stderr.strip()[-200:]}")
    return int(done.stdout)
