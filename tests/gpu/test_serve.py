"""The server on a CUDA GPU: greedy output under speculation is that of plain decoding.

Skipped where there is no GPU; not yet run on one (docs/gpu.md). `TLT_GPU_MODEL` names the target
(default smollm2-135m, prepared on first use).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tlt_sglang.launch_server import has_accelerator

pytestmark = pytest.mark.skipif(not has_accelerator(), reason="this machine has no GPU")

PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 4, 5, 6,",
    "def fibonacci(n):",
    "Once upon a time there was",
]


@contextmanager
def server(strategy: str, log: Path) -> Iterator[str]:
    """A server that runs `strategy` on the GPU: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tlt_sglang.launch_server",
        "--device",
        "cuda",
        "--model",
        os.environ.get("TLT_GPU_MODEL", "smollm2-135m"),
        "--port",
        str(port),
        "--adaptive-spec",
        "--tlt-strategies",
        strategy,
        "--enable-deterministic-inference",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 600
            while True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                try:
                    if requests.get(f"{address}/health", timeout=5).status_code == 200:
                        break
                except requests.ConnectionError:
                    time.sleep(1)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def generate(address: str, prompt: str) -> Any:
    parameters = {"temperature": 0, "max_new_tokens": 128, "ignore_eos": True}
    body = {"text": prompt, "sampling_params": parameters}
    return requests.post(f"{address}/generate", json=body, timeout=300).json()["text"]


def test_greedy_identity_and_status(tmp_path: Path) -> None:
    with server("off", tmp_path / "off.log") as address:
        wanted = [generate(address, prompt) for prompt in PROMPTS]
    with server("ngram:8", tmp_path / "ngram.log") as address:
        assert [generate(address, prompt) for prompt in PROMPTS] == wanted
        status = requests.get(f"{address}/tlt/status", timeout=30).json()
    assert status["device"] == "cuda" and status["strategy"] == "ngram:8"
    states = {row["state"] for row in status["schedulers"][0]["patches"]}
    assert "lost" not in states and "in force" in states
