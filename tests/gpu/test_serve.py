"""The server on a CUDA GPU: greedy output under speculation is that of plain decoding.

Skipped where there is no GPU; not yet run on one (docs/gpu.md). `TLT_GPU_MODEL` names the target
(default smollm2-135m, prepared on first use).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.launcher.environment import has_accelerator
from tlt_sglang.launcher.server_process import ServerProcess

pytestmark = pytest.mark.skipif(not has_accelerator(), reason="this machine has no GPU")

PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 4, 5, 6,",
    "def fibonacci(n):",
    "Once upon a time there was",
]


def serve(strategy: str, log: Path) -> ServerProcess:
    """Start a server that runs `strategy` on the GPU, and return it once it is ready."""
    model = os.environ.get("TLT_GPU_MODEL", "smollm2-135m")
    arguments = ["--device", "cuda", "--model", model, "--enable-deterministic-inference"]
    arguments += ["--adaptive-spec", "--tlt-strategies", strategy]
    server = ServerProcess(arguments, log)
    try:
        server.wait_ready(600)
    except BaseException:
        server.kill()
        raise
    return server


def generate(server: ServerProcess, prompt: str) -> Any:
    """Return the text that greedily continues `prompt`."""
    parameters = {"temperature": 0, "max_new_tokens": 128, "ignore_eos": True}
    return server.post("/generate", {"text": prompt, "sampling_params": parameters})["text"]


def test_greedy_identity_and_status(tmp_path: Path) -> None:
    with serve("off", tmp_path / "off.log") as server:
        expected = [generate(server, prompt) for prompt in PROMPTS]
    with serve("ngram:8", tmp_path / "ngram.log") as server:
        assert [generate(server, prompt) for prompt in PROMPTS] == expected
        status = server.get("/tlt/status", timeout=30)
    assert status["device"] == "cuda" and status["strategy"] == "ngram:8"
    states = {row["state"] for row in status["schedulers"][0]["patches"]}
    assert "lost" not in states and "in force" in states
