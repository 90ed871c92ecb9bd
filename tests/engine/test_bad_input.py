"""Bad input of any kind: one sentence, a non-zero status, no traceback, nothing left running."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import refused
from tests.support.tiny import make_drafter, make_target
from tlt_sglang.upstream import versions

AT_ONCE = 5.0
"""Seconds, on a busy machine, for what is refused before SGLang is imported."""
SOON = 60.0
"""Likewise, for what SGLang itself refuses before it loads a model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_target(folder / "target", "llama", vocab_size=64)
    make_target(folder / "other", "llama", vocab_size=96)
    make_drafter(folder / "drafter", folder / "target", "eagle")
    make_drafter(folder / "eagle3", folder / "target", "eagle3")
    make_drafter(folder / "narrow", folder / "target", "eagle", hidden_size=32)
    make_drafter(folder / "foreign", folder / "other", "eagle")
    variant(folder / "sliding", folder, layer_types=["full_attention", "sliding_attention"])
    variant(folder / "quantised", folder, quantization_config={"quant_method": "fp8"})
    variant(folder / "headless", folder, num_attention_heads=0)
    with variant(folder / "huge", folder).open("r+b") as weights:
        weights.truncate(2**41)  # 2 TiB that take no room on the disk
    variant(folder / "empty", folder).unlink()
    variant(folder / "corrupt", folder).write_bytes(b"no weights")
    (folder / "no-config").mkdir()
    (folder / "bad.toml").write_text("strategies = [")
    (folder / "unknown.toml").write_text("colour = 'red'")
    return folder


def variant(path: Path, folder: Path, **fields: Any) -> Path:
    """A model's folder with other fields in config.json; its weights' file."""
    path.mkdir()
    config = json.loads((folder / "target" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))
    weights = path / "model.safetensors"
    weights.write_bytes((folder / "target" / "model.safetensors").read_bytes())
    return weights


CASES = {
    "unknown strategy": (["--tlt-strategies", "eagle:fast"], "Unknown strategy 'eagle:fast'"),
    "impossible tree": (["--tlt-strategies", "eagle:1x2x9"], "such a tree has only 2 nodes"),
    "no drafter": (["--tlt-strategies", "eagle:3x1x4"], "needs a drafter"),
    "drafter is not there": (["--speculative-draft-model-path", "/no/such"], "does not exist"),
    "a target as a drafter": (["--speculative-draft-model-path", "{}/other"], "not a drafter"),
    "hidden size": (["--speculative-draft-model-path", "{}/narrow"], "hidden size is 32"),
    "vocabulary": (["--speculative-draft-model-path", "{}/foreign"], "vocabulary is 96"),
    "the other kind of drafter": (
        ["--speculative-draft-model-path", "{}/eagle3", "--tlt-strategies", "eagle:3x1x4"],
        "which is eagle3",
    ),
    "contradiction": (
        ["--tlt-strategies", "ngram:8", "--speculative-num-draft-tokens", "4"],
        "contradicts the strategy ngram:8",
    ),
    "contradicting algorithm": (
        ["--tlt-strategies", "off", "--speculative-algorithm", "NGRAM"],
        "contradicts the strategy off",
    ),
    "upstream's adaptive": (["--speculative-adaptive"], "contradicts --adaptive-spec"),
    "a strategy too large": (
        ["--tlt-strategies", "ngram:32", "--max-running-requests", "8", "--max-total-tokens", "99"],
        "takes 256 KV slots in a step of 8 requests",
    ),
    "no room for graphs": (
        [
            *("--speculative-draft-model-path", "{}/eagle3"),
            *("--tlt-strategies", "off,eagle3:3x1x4", "--tlt-graph-memory-gb", "0.001"),
        ],
        "--tlt-graph-memory-gb 0.001 is not possible",
    ),
    "no such folder for events": (["--tlt-events", ""], "write the path of a file"),
    "no memory": (["--max-total-tokens", "100000000000"], "GiB of memory are free"),
    "no tokens": (["--max-total-tokens", "0"], "is too small"),
    "no requests": (
        ["--max-running-requests", "0"],
        "--max-running-requests 0 is not valid; give at least 1.",
    ),
    "page size": (["--page-size", "16"], "--page-size 16 is not served on CPU"),
    "tensor parallelism": (["--tp", "4096"], "--tp-size 4096 needs a core for each rank"),
    "data parallelism": (["--dp", "2"], "--dp-size 2 is not served on CPU"),
    "pipeline parallelism": (["--pp", "2"], "--pp-size 2 is not served on CPU"),
    "dtype": (["--dtype", "bfloat16"], "--dtype bfloat16 is not served on CPU"),
    "KV cache's dtype": (["--kv-cache-dtype", "fp8_e4m3"], "--kv-cache-dtype fp8_e4m3 is not"),
    "quantization": (["--quantization", "fp8"], "--quantization fp8 is not served"),
    "attention backend": (["--attention-backend", "fa3"], "--attention-backend fa3 does not run"),
    "no config file": (["--tlt-config", "/no/such.toml"], "cannot be read"),
    "broken config file": (["--tlt-config", "{}/bad.toml"], "not valid TOML"),
    "unknown setting": (["--tlt-config", "{}/unknown.toml"], "unknown setting 'colour'"),
}


@pytest.mark.parametrize("case", CASES)
def test_flags(folder: Path, case: str) -> None:
    flags, says = CASES[case]
    model = ["--model", f"{folder}/target", "--adaptive-spec", "--device", "cpu"]
    assert refused(*model, *(flag.format(folder) for flag in flags), says=says) < AT_ONCE


MODELS = {
    "": "Say which model to serve",
    "/no/such/model": "does not exist",
    "{}/no-config": "has no readable config.json",
    "{}/target/config.json": "has no readable config.json",
    "{}/empty": "has no weights",
    "{}/sliding": "sliding-window attention are not served on CPU",
    "{}/quantised": "Quantised models are not served on CPU",
    "{}/headless": "num_attention_heads in the model's config.json is 0",
    "{}/huge": "The model's weights need 2048.0 GiB",
}


@pytest.mark.parametrize("model", MODELS)
def test_models(folder: Path, model: str) -> None:
    flags = ["--model", model.format(folder), "--adaptive-spec", "--device", "cpu"]
    assert refused(*flags, says=MODELS[model]) < AT_ONCE


ENVIRONMENTS = {
    "/no/such.toml": "The TLT configuration /no/such.toml cannot be read",
    "{}/bad.toml": "is not valid TOML",
    "{{": "TLT_CONFIG holds no valid JSON",
    '{{"colour": "red"}}': "unknown setting 'colour'",
    '{{"strategies": ["medusa"]}}': "Unknown strategy 'medusa'",
    '{{"strategies": ["eagle:3x1x4"]}}': "needs a drafter",
}


@pytest.mark.parametrize("value", ENVIRONMENTS)
def test_the_environment(folder: Path, value: str) -> None:
    environment = {"TLT_CONFIG": value.format(folder)}
    flags = ["--model", f"{folder}/target", "--device", "cpu"]
    assert refused(*flags, says=ENVIRONMENTS[value], environment=environment) < AT_ONCE


@pytest.mark.parametrize("port", ["99999", "http"])
def test_a_port_that_is_none(folder: Path, port: str) -> None:
    flags = ["--model", f"{folder}/target", "--adaptive-spec", "--port", port]
    assert refused(*flags, says=f"--port {port} is not a port", status=2) < AT_ONCE


def test_a_port_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--model", f"{folder}/target", "--adaptive-spec", "--port", port]
        assert refused(*flags, says=f"Port {port} on 127.0.0.1 cannot be used") < AT_ONCE


def test_a_machine_without_a_gpu(folder: Path) -> None:
    if any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        pytest.skip("there is a GPU")
    flags = ["--model", f"{folder}/target", "--adaptive-spec", "--device", "cuda"]
    assert refused(*flags, says="There is no GPU driver here") < AT_ONCE


# ---- another SGLang ------------------------------------------------------------------------------


def test_another_version(folder: Path, tmp_path: Path) -> None:
    """Its metadata is found first, as in an environment that has it installed."""
    info = tmp_path / "sglang-0.5.20.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.20\n")
    says = f"SGLang 0.5.20 is installed, but TLT runs on {versions.supported()}; install sglang=="
    flags = ["--model", f"{folder}/target", "--adaptive-spec"]
    assert refused(*flags, says=says, environment={"PYTHONPATH": str(tmp_path)}) < AT_ONCE


def test_a_changed_function(folder: Path, tmp_path: Path) -> None:
    """SGLang as it is installed but for one file, in which a patched function reads otherwise."""
    changed = copy_but(tmp_path, "srt/speculative/eagle_utils.py")
    text = changed.read_text()
    assert "return is_all_greedy or is_cpu" in text
    changed.write_text(text.replace("return is_all_greedy or is_cpu", "return is_cpu"))
    says = f"eagle_utils:_verify_uses_greedy in SGLang {versions.installed()} has changed (digest "
    flags = ["--model", f"{folder}/target", "--adaptive-spec"]
    assert refused(*flags, says=says, environment={"PYTHONPATH": str(tmp_path)}) < AT_ONCE


def test_a_function_that_is_gone(folder: Path, tmp_path: Path) -> None:
    changed = copy_but(tmp_path, "srt/layers/layernorm.py")
    text = changed.read_text()
    changed.write_text(text.replace("def forward_native(", "def forward_plain("))
    says = f"layernorm:RMSNorm.forward_native in SGLang {versions.installed()} is missing"
    flags = ["--model", f"{folder}/target", "--adaptive-spec"]
    assert refused(*flags, says=says, environment={"PYTHONPATH": str(tmp_path)}) < AT_ONCE


def copy_but(folder: Path, name: str) -> Path:
    """SGLang's package in `folder`, of links but for a copy of the file `name`: its path."""
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    installed, here = Path(spec.submodule_search_locations[0]), folder / "sglang"
    for part in Path(name).parts:
        here.mkdir()
        for entry in installed.iterdir():
            if entry.name != part:
                (here / entry.name).symlink_to(entry)
        installed, here = installed / part, here / part
    here.write_bytes(installed.read_bytes())
    return here


# ---- what only SGLang sees -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--no-such-flag", "1"], "Bad flags: unrecognized arguments: --no-such-flag 1; see"),
    ],
)
def test_flags_that_sglang_does_not_know(folder: Path, flags: list[str], says: str) -> None:
    """A sentence in the place of two hundred lines of usage."""
    model = ["--model", f"{folder}/target", "--adaptive-spec"]
    assert refused(*model, *flags, says=says, status=2) < SOON


def test_what_sglang_refuses(folder: Path) -> None:
    flags = ["--model", f"{folder}/target", "--adaptive-spec", "--skip-tokenizer-init"]
    says = "SGLang did not start: Warning: User-specified context_length (99999) is greater"
    assert refused(*flags, "--context-length", "99999", says=says) < SOON


def test_an_engine_process_that_fails(folder: Path) -> None:
    """Nobody foresaw it: SGLang's traceback, one sentence, and nothing is left all the same."""
    flags = ["--model", f"{folder}/corrupt", "--adaptive-spec", "--skip-tokenizer-init"]
    says = "SGLang did not start because an engine process failed; see its message above."
    refused(*flags, says=says, traceback=True)


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
    """A problem that only the built model shows is refused when its attention backend is made."""
    done = subprocess.run(
        [sys.executable, "-c", UNSERVED],
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    words = ["sliding", "MLA", "page", "bfloat16", "encoder"]
    assert done.stdout.splitlines() == [f"{word} True" for word in words], done.stderr
