"""The scripts in `launch` for RL stacks, run as their users do, on CPU with a small model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.stacks.test_starts import PROMPT, ROOT, STARTUP, VOCAB, customized, program_of, result
from tests.support.launching import run
from tests.support.tiny import make_drafter, make_target
from tlt_sglang.launcher.server_process import HOST, ServerProcess, free_port

TOKENS = 12
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
"""The scripts start the `python` of the environment."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("scripts") / "target", "llama", VOCAB)


@pytest.fixture(scope="module")
def drafter(target: Path) -> Path:
    return make_drafter(target.with_name("drafter"), target, "eagle")


def test_external_engine(target: Path, drafter: Path, tmp_path: Path) -> None:
    """The engine answers at the address that the variables name, with drafts of the drafter."""
    port = free_port()
    variables = {"MODEL": target, "DRAFTER": drafter, "HOST": HOST, "PORT": port, "PATH": PATH}
    flags = ["--skip-tokenizer-init", "--dtype", "float32", "--max-total-tokens", "4096"]
    with ServerProcess(
        flags,
        tmp_path / "engine.log",
        program=["bash", str(ROOT / "launch" / "external-engine.sh")],
        port=port,
        environment={name: str(value) for name, value in variables.items()},
    ) as engine:
        engine.wait_ready(300)
        sampling = {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
        answer = engine.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
        assert len(answer["output_ids"]) == TOKENS
        (scheduler,) = engine.get("/tlt/status")["schedulers"]
        assert any(name.startswith("eagle") for name in scheduler["strategies"])


def test_in_process(target: Path, drafter: Path, tmp_path: Path) -> None:
    """A stack's program starts an engine with the settings that the script has written."""
    config = tmp_path / "tlt.toml"
    program = f"import site\nsite.addsitedir({str(STARTUP)!r})\n"
    variables = {"TLT_CONFIG": str(config), "DRAFTER": str(drafter)}
    command = [
        "bash",
        str(ROOT / "launch" / "in-process.sh"),
        *program_of("spawned_server", target),
    ]
    done = run(command, customized(tmp_path, program) | variables)
    assert f"Wrote {config}" in done.err
    printed = result(done)
    assert len(printed["ids"]) == TOKENS
    (scheduler,) = printed["status"]["schedulers"]
    assert any(name.startswith("eagle") for name in scheduler["strategies"])
