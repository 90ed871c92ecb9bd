"""The target's own answers, from a server that this starts, or one that is running.

Batched decoding in the engine is several times faster than transformers' `generate`. The server is
a process of its own, asked over HTTP: nothing of SGLang is imported here.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import requests

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.training.corpus import Prompt, Response

START_SECONDS = 900.0
ANSWER_SECONDS = 3600.0


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    prompt: Prompt
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Target:
    """A running server of the target."""

    url: str
    at_once: int

    def answer(self, request: Request) -> Response:
        """The target's answer; its end-of-sequence token is part of it."""
        body = {
            "input_ids": list(request.prompt.ids),
            "sampling_params": {
                "temperature": request.temperature,
                "max_new_tokens": request.max_new_tokens,
            },
        }
        try:
            response = requests.post(f"{self.url}/generate", json=body, timeout=ANSWER_SECONDS)
            response.raise_for_status()
        except requests.RequestException as error:
            raise EnvironmentProblem(
                f"The target's server does not answer ({_first_line(error)}); what was generated "
                "is kept, start again to go on."
            ) from error
        output = tuple(response.json()["output_ids"])
        return Response(request.prompt, output, request.temperature)

    def answers(self, wanted: Iterable[Request]) -> Iterator[Response]:
        """Answers as they come, `at_once` requests in flight."""
        queue = iter(wanted)
        threads = ThreadPoolExecutor(self.at_once)
        flying: set[Future[Response]] = set()
        try:
            while True:
                for request in queue:
                    flying.add(threads.submit(self.answer, request))
                    if len(flying) >= self.at_once:
                        break
                if not flying:
                    return
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            # What is left over after an interruption ends with the server, and is not waited for.
            threads.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def serve(
    model: str, at_once: int, say: Callable[[str], None], flags: Iterable[str] = ()
) -> Iterator[Target]:
    """A server of `model` without speculation, gone at the end.

    Raises EnvironmentProblem with the last line of its log if it does not start.
    """
    port = free_port()
    words = [sys.executable, "-m", "tlt_sglang.launch_server", "--model", model]
    words += ["--port", str(port), "--max-running-requests", str(at_once), *flags]
    words += ["--adaptive-spec", "--tlt-strategies", "off"]
    with tempfile.TemporaryDirectory(prefix="tlt-target-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k != "TLT_CONFIG"},
            )
        try:
            say("starting a server of the target")
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log)
            yield Target(url, at_once)
        finally:
            _stop(process)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise EnvironmentProblem(f"The target's server did not start: {lines[-1]}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=30).ok:
                return
        time.sleep(0.5)
    raise EnvironmentProblem(f"The target's server was not ready in {START_SECONDS:.0f} s.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the launcher as a user does, which ends its processes; by force if it hangs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A port nobody listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randint(21000, 31000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
