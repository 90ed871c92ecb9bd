"""Bad input of any kind: one sentence, a non-zero status, no traceback, nothing left running."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import make_drafter, make_target

SECONDS = 30.0
"""What is wrong in the flags is said before a model is loaded."""


def launch(*flags: str, environment: dict[str, str] | None = None) -> tuple[int, str, float]:
    """(status, everything it printed, seconds) of the launcher; nothing of it may be left."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "tlt_sglang.launch_server", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | (environment or {}),
    ) as process:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            left = [p for p in psutil.process_iter() if _session(p.pid) == process.pid]
            left = [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
            for one in left:
                one.kill()
    assert left == [], f"left running: {left}"
    return process.returncode, output, time.monotonic() - started


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def refused(*flags: str, says: str, environment: dict[str, str] | None = None) -> float:
    """Assert that the launcher refuses `flags` with one sentence that holds `says`."""
    status, output, seconds = launch(*flags, environment=environment)
    sentences = [line for line in output.splitlines() if line.startswith("tlt-sglang:")]
    assert status not in (0, None) and status > 0, output
    assert len(sentences) == 1, output
    assert says in sentences[0], sentences[0]
    assert "Traceback" not in output, output
    return seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_target(folder / "target", "llama", vocab_size=64)
    make_target(folder / "other", "llama", vocab_size=96)
    make_drafter(folder / "drafter", folder / "target", "eagle")
    make_drafter(folder / "eagle3", folder / "target", "eagle3")
    make_drafter(folder / "narrow", folder / "target", "eagle", hidden_size=32)
    make_drafter(folder / "foreign", folder / "other", "eagle")
    (folder / "bad.toml").write_text("strategies = [")
    (folder / "unknown.toml").write_text("colour = 'red'")
    return folder


CASES = {
    "unknown strategy": (["--tlt-strategies", "eagle:fast"], "Unknown strategy"),
    "impossible tree": (["--tlt-strategies", "eagle:1x2x9"], "not possible"),
    "no drafter": (["--tlt-strategies", "eagle:3x1x4"], "needs a drafter"),
    "drafter is not there": (["--speculative-draft-model-path", "/no/such"], "does not exist"),
    "a target as a drafter": (["--speculative-draft-model-path", "{}/other"], "not a drafter"),
    "hidden size": (["--speculative-draft-model-path", "{}/narrow"], "hidden size"),
    "vocabulary": (["--speculative-draft-model-path", "{}/foreign"], "vocabulary"),
    "the other kind of drafter": (
        ["--speculative-draft-model-path", "{}/eagle3", "--tlt-strategies", "eagle:3x1x4"],
        "eagle3",
    ),
    "contradiction": (
        ["--tlt-strategies", "ngram:8", "--speculative-num-draft-tokens", "4"],
        "contradicts",
    ),
    "upstream's adaptive": (["--speculative-adaptive"], "contradicts"),
    "no memory": (["--max-total-tokens", "100000000000"], "GiB"),
    "page size": (["--page-size", "16"], "--page-size 16"),
    "tensor parallelism": (["--tp-size", "2"], "--tp-size 2"),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "attention backend": (["--attention-backend", "fa3"], "fa3"),
    "no config file": (["--tlt-config", "/no/such.toml"], "cannot be read"),
    "broken config file": (["--tlt-config", "{}/bad.toml"], "not valid TOML"),
    "unknown setting": (["--tlt-config", "{}/unknown.toml"], "colour"),
    "no port": (["--port", "99999"], "port"),
}


@pytest.mark.parametrize("case", CASES)
def test_flags(folder: Path, case: str) -> None:
    flags, says = CASES[case]
    flags = [flag.format(folder) for flag in flags]
    seconds = refused(
        "--model", f"{folder}/target", "--adaptive-spec", "--device", "cpu", *flags, says=says
    )
    assert seconds < SECONDS


@pytest.mark.parametrize(("model", "says"), [("/no/such/model", "does not exist"), ("", "--model")])
def test_model(model: str, says: str) -> None:
    refused("--model", model, "--adaptive-spec", says=says)


def test_port_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused("--model", f"{folder}/target", "--adaptive-spec", "--port", port, says=port)


def test_wrong_version(folder: Path, tmp_path: Path) -> None:
    """Another SGLang's metadata found first: the version is refused by name."""
    info = tmp_path / "sglang-0.5.22.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.22\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    refused(
        "--model", f"{folder}/target", "--adaptive-spec", says="0.5.22", environment=environment
    )


def test_changed_upstream(folder: Path, tmp_path: Path) -> None:
    """A patched function that reads otherwise: named, and nothing is started."""
    (tmp_path / "sitecustomize.py").write_text(
        "import tlt_sglang.upstream as upstream\n"
        "read = upstream.SourceTree.read\n"
        "def changed(self, module):\n"
        "    text = read(self, module)\n"
        "    if module.endswith('eagle_utils'):\n"
        "        text = text.replace('return is_all_greedy or', 'return not is_all_greedy or')\n"
        "    return text\n"
        "upstream.SourceTree.read = changed\n"
    )
    refused(
        "--model", f"{folder}/target", "--adaptive-spec", says="_verify_uses_greedy",
        environment={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip


UNSERVED = """
from types import SimpleNamespace
import torch
from tlt_sglang.cpu.attention import CpuAttnBackend
from tlt_sglang.errors import ConfigError

changes = {
    "sliding": {"sliding_window_size": 128},
    "MLA": {"use_mla_backend": True},
    "page": {"page_size": 16},
    "bfloat16": {"token_to_kv_pool": SimpleNamespace(dtype=torch.bfloat16)},
    "encoder": {"model_config": SimpleNamespace(is_encoder_decoder=True, context_len=64)},
}
for word, change in changes.items():
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(2, 8, dtype=torch.int32)),
        token_to_kv_pool=SimpleNamespace(dtype=torch.float32),
        model_config=SimpleNamespace(is_encoder_decoder=False, context_len=64),
        use_mla_backend=False,
        sliding_window_size=None,
        page_size=1,
    )
    CpuAttnBackend(runner)
    vars(runner).update(change)
    try:
        CpuAttnBackend(runner)
    except ConfigError as error:
        print(word, word in str(error))
"""


def test_models_that_the_backend_does_not_serve() -> None:
    """What only the built model shows is refused when its attention backend is made."""
    done = subprocess.run(
        [sys.executable, "-c", UNSERVED],
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    words = ["sliding", "MLA", "page", "bfloat16", "encoder"]
    assert done.stdout.splitlines() == [f"{word} True" for word in words], done.stderr
