"""A process that generates with transformers, used like a server; see `transformers_worker`."""

from __future__ import annotations

import json
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from benchmarks.harness.processes import Process
from benchmarks.harness.program import BenchmarkError, say
from benchmarks.harness.server import Sample


class Answer(TypedDict):
    """A line that the worker writes for each request."""

    seconds: float
    prompt_tokens: int
    output_ids: list[int]


class Transformers(Process):
    """A worker with this model on a number of threads."""

    def __init__(self, model: str, threads: int, logs: Path) -> None:
        arguments = ["-m", "benchmarks.harness.transformers_worker", model, str(threads)]
        pipe = subprocess.PIPE
        super().__init__("transformers", arguments, threads, logs, stdin=pipe, stdout=pipe)

    def wait_started(self) -> None:
        """Return once the model is loaded."""
        assert self.process.stdout is not None
        while not select.select([self.process.stdout], [], [], 10)[0]:
            say(f"{self.name}: starting, {time.perf_counter() - self.started:.0f} s so far")
        self._line()
        say(f"{self.name}: ready")

    def generate(self, prompts: Sequence[str], tokens: int) -> Sample:
        """Generate as `Server.generate` does, for a single prompt."""
        (prompt,) = prompts
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}).encode())
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # The process has ended; reading its answer raises the error.
        answer: Answer = json.loads(self._line())
        output = answer["output_ids"]
        if len(output) != tokens:
            raise BenchmarkError(f"{self.name} generated {len(output)} tokens, not {tokens}.")
        decoded = tokens - 1
        return Sample(answer["seconds"], decoded, decoded, answer["prompt_tokens"], [output])

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.check_alive()
        return line
