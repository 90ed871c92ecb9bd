"""Collect the target's own answers from a server that runs while they are needed.

Batched decoding in the engine is several times faster than transformers' `generate`. The server is
a process of its own, reached over HTTP: nothing of SGLang is imported here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import requests

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.launcher.server_process import ServerProcess
from tlt_sglang.training.corpus import Prompt, Response

ANSWER_SECONDS = 3600.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt for the target, and how to sample its answer."""

    prompt: Prompt
    temperature: float
    max_new_tokens: int


class TargetServer(ServerProcess):
    """A server of the target without speculation, which answers `at_once` requests at a time."""

    error_lines = 1

    def __init__(self, model: str, at_once: int, log: Path, flags: Iterable[str] = ()) -> None:
        arguments = ["--model", model, "--max-running-requests", str(at_once), *flags]
        arguments += ["--adaptive-spec", "--tlt-strategies", "off"]
        super().__init__(arguments, log, name="The target's server")
        self.at_once = at_once

    def answer(self, request: AnswerRequest) -> Response:
        """Return the target's answer, which includes its end-of-sequence token."""
        body = {
            "input_ids": list(request.prompt.ids),
            "sampling_params": {
                "temperature": request.temperature,
                "max_new_tokens": request.max_new_tokens,
            },
        }
        try:
            output = self.post("/generate", body, timeout=ANSWER_SECONDS)["output_ids"]
        except (requests.RequestException, EnvironmentProblem) as error:
            raise EnvironmentProblem(
                f"The target's server does not answer ({_first_line(error)}); the answers so far "
                "are kept, run the same command again to continue."
            ) from error
        return Response(request.prompt, tuple(output), request.temperature)

    def answers(self, pending: Iterable[AnswerRequest]) -> Iterator[Response]:
        """Yield the answers as they arrive, with `at_once` requests in flight."""
        queue = iter(pending)
        threads = ThreadPoolExecutor(self.at_once)
        in_flight: set[Future[Response]] = set()
        try:
            while True:
                for request in queue:
                    in_flight.add(threads.submit(self.answer, request))
                    if len(in_flight) >= self.at_once:
                        break
                if not in_flight:
                    return
                done, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            # After an interruption, requests in flight end with the server; nobody waits for them.
            threads.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def serve(
    model: str, at_once: int, say: Callable[[str], None], flags: Iterable[str] = ()
) -> Iterator[TargetServer]:
    """Run a server of `model` within the context; yield it once it is ready.

    Raises EnvironmentProblem with the last line of its log if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="tlt-target-") as folder:
        server = TargetServer(model, at_once, Path(folder) / "log", flags)
        try:
            say("starting a server of the target")
            server.wait_ready()
            yield server
        finally:
            server.stop(STOP_SECONDS)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
