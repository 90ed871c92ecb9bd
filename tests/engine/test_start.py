"""How TLT comes in and stays out: nothing without its flag, everything in each process with it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import free_port, wait_for
from tiny import make_drafter, make_target

from tlt_sglang.patches import all_patches

VOCAB = 64
PROMPT = [5, 9, 14, 3] * 4
ON_CPU = {"SGLANG_USE_CPU_ENGINE": "1"}


def run(
    program: str, folder: Path, environment: dict[str, str], seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """A program of its own, as a file, which what it spawns can read; its session ends with it."""
    file = folder / "program.py"
    file.write_text(program)
    left_out = ("TLT_CONFIG", "SGLANG_PLUGINS")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    with subprocess.Popen(
        [sys.executable, str(file)],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            wait_for(lambda: not session(process.pid), 10)
            left = session(process.pid)
            for one in left:
                one.kill()
    assert left == [], err[-4000:]
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def session(leader: int) -> list[psutil.Process]:
    """Processes that still run in the session of `leader`."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_target(tmp_path_factory.mktemp("start") / "target", "llama", VOCAB))


# ---- off means off -------------------------------------------------------------------------------

WALK = """
import json
import sys
from types import FunctionType, ModuleType

from sglang.srt.plugins import load_plugins

load_plugins()
import sglang.srt.entrypoints.engine
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.llama
import sglang.srt.models.qwen2
import sglang.srt.speculative.eagle_worker_v2
import sglang.srt.speculative.ngram_worker


def functions(value):
    while True:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, FunctionType):
            yield value
            value = getattr(value, "__wrapped__", None)
        else:
            return


# SGLang imports functions of a compiled library, which the stand-in stands in for.
stand_in = {
    function
    for name, module in list(sys.modules.items())
    if name.split(".")[0] == "sgl_kernel"
    for value in vars(module).values()
    for function in functions(value)
}
seen, foreign = 0, []
for name, module in list(sys.modules.items()):
    if name.split(".")[0] != "sglang" or not isinstance(module, ModuleType):
        continue
    named = [(key, value) for key, value in list(vars(module).items())]
    for key, value in list(named):
        if isinstance(value, type) and value.__module__.split(".")[0] == "sglang":
            named += [(f"{key}.{member}", inner) for member, inner in list(vars(value).items())]
        if isinstance(value, dict):
            named += [(f"{key}[{entry!r}]", inner) for entry, inner in list(value.items())]
    for key, value in named:
        for function in functions(value):
            seen += 1
            if function in stand_in:
                continue
            if "tlt_sglang" in (function.__module__ or "") + function.__code__.co_filename:
                foreign.append(f"{name}:{key}")
print(json.dumps({
    "seen": seen,
    "foreign": foreign,
    "ours": sorted(name for name in sys.modules if name.split(".")[0] == "tlt_sglang"),
    "finders": [type(finder).__module__ for finder in sys.meta_path],
}))
"""


def walk(folder: Path, **environment: str) -> dict[str, Any]:
    done = run(WALK, folder, ON_CPU | environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_without_a_config_nothing_of_sglang_is_ours(tmp_path: Path) -> None:
    result = walk(tmp_path)
    assert result["seen"] > 10_000
    assert result["foreign"] == []
    # The plugin itself, and what it needs to see that TLT is off; no patches.
    assert "tlt_sglang.plugin" in result["ours"]
    for module in ("patching", "patcher", "upstream", "patches", "engine"):
        assert f"tlt_sglang.{module}" not in result["ours"]
    assert not any("tlt_sglang" in module for module in result["finders"])


def test_with_a_config_the_same_walk_finds_us(tmp_path: Path) -> None:
    """So the walk can see what it looks for."""
    result = walk(tmp_path, TLT_CONFIG="{}")
    assert len(result["foreign"]) > 10
    assert "sglang.srt.managers.scheduler:Scheduler.__init__" in result["foreign"]
    assert "tlt_sglang.patches" in result["ours"]


def test_the_files_of_sglang_are_the_wheels() -> None:
    checked = 0
    for file in metadata.files("sglang") or []:
        if file.hash is None or file.suffix != ".py":
            continue
        assert file.hash.mode == "sha256"
        digest = hashlib.sha256(Path(str(file.locate())).read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file
        checked += 1
    assert checked > 1000


# ---- as RL stacks start it -----------------------------------------------------------------------

ENGINE = """
import json
import sys

import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], skip_tokenizer_init=True, max_total_tokens=4096, device="cpu",
        mem_fraction_static=0.9, speculative_draft_model_path=sys.argv[3],
        log_level="warning",
    )
    answer = engine.generate(
        input_ids=json.loads(sys.argv[2]),
        sampling_params={"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    )
    state = engine.get_server_info()["internal_states"][0]["tlt"]
    print(json.dumps({"ids": answer["output_ids"], "state": state}))
    engine.shutdown()
"""

SPAWNED = """
import json
import multiprocessing
import sys
import time

import requests


def serve(arguments, ready):
    if ready:
        from sglang.srt.plugins import load_plugins

        load_plugins()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**arguments))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    url = f"http://127.0.0.1:{arguments['port']}"
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(arguments, sys.argv[3] == "plugins")
    )
    server.start()
    try:
        while server.is_alive():
            try:
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
        parameters = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        answer = requests.post(
            f"{url}/generate",
            json={"input_ids": json.loads(sys.argv[2]), "sampling_params": parameters},
            timeout=120,
        ).json()
        status = requests.get(f"{url}/tlt/status", timeout=60).json()
        print(json.dumps({"ids": answer["output_ids"], "status": status}))
    finally:
        server.terminate()
        server.join()
"""


def assert_in_force(state: dict[str, Any], *unused: str) -> None:
    """In a scheduler every patch is in force but those of modules it does not use.

    Which are those of the main process, and `unused`, modules of other models and drafters.
    """
    found = {row["target"]: row["state"] for row in state["patches"]}
    expected = {}
    for patch in all_patches():
        module = patch.module.rpartition(".")[2]
        waits = "scheduler" not in patch.process or module in unused
        expected[patch.target] = ("in force", "waiting for import") if waits else ("in force",)
    assert set(found) == set(expected)
    assert [target for target in found if found[target] not in expected[target]] == []


def with_arguments(program: str, *arguments: str) -> str:
    return f"import sys\nsys.argv[1:] = {list(arguments)!r}\n{program}"


@pytest.fixture(scope="module")
def expected(target: str) -> list[int]:
    """What transformers generates greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12,
        min_new_tokens=12, eos_token_id=None,
    )  # fmt: skip
    ids: list[int] = output[0, len(PROMPT) :].tolist()
    return ids


def test_sglangs_engine(tmp_path: Path, target: str, expected: list[int]) -> None:
    (tmp_path / "tlt.toml").write_text('strategies = ["eagle:2x2x5"]\n')
    drafter = make_drafter(tmp_path / "drafter", Path(target), "eagle")
    program = with_arguments(ENGINE, target, json.dumps(PROMPT), str(drafter))
    done = run(program, tmp_path, ON_CPU | {"TLT_CONFIG": str(tmp_path / "tlt.toml")})
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ids"] == expected
    assert result["state"]["strategy"] == "eagle:2x2x5"
    assert_in_force(result["state"], "qwen2", "ngram_worker")


@pytest.mark.parametrize("first", ["plugins", "server"])
def test_sglangs_server_in_a_spawned_process(
    tmp_path: Path, target: str, expected: list[int], first: str
) -> None:
    """With the plugins loaded first, or with arguments that SGLang resolves before."""
    (tmp_path / "tlt.toml").write_text('strategies = ["ngram:6"]\n')
    arguments: dict[str, Any] = {
        "model_path": target, "port": free_port(), "skip_tokenizer_init": True,
        "max_total_tokens": 4096, "device": "cpu", "mem_fraction_static": 0.9,
        "log_level": "warning",
    }  # fmt: skip
    if first == "server":
        arguments |= {
            "speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 6,
            "dtype": "float32", "attention_backend": "torch_native", "disable_cuda_graph": True,
        }  # fmt: skip
    program = with_arguments(SPAWNED, json.dumps(arguments), json.dumps(PROMPT), first)
    done = run(program, tmp_path, ON_CPU | {"TLT_CONFIG": str(tmp_path / "tlt.toml")})
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ids"] == expected
    status = result["status"]
    assert status["strategy"] == "ngram:6"
    unused = ("qwen2", "eagle_worker_v2", "draft_utils")
    assert_in_force(status["schedulers"][0], *unused)
    assert {row["state"] for row in status["patches"]} <= {"in force", "waiting for import"}


def test_arguments_that_miss_the_strategy_stop_the_start(tmp_path: Path, target: str) -> None:
    """SGLang resolved them before it loaded its plugins: nothing is silently stock."""
    arguments = {"model_path": target, "port": free_port(), "skip_tokenizer_init": True}
    program = with_arguments(SPAWNED, json.dumps(arguments), json.dumps(PROMPT), "server")
    done = run(program, tmp_path, ON_CPU | {"TLT_CONFIG": '{"strategies": ["ngram:6"]}'})
    assert done.returncode != 0
    assert "TLT_CONFIG asks for ngram:6, but SGLang's arguments were resolved before TLT was " in (
        done.stderr
    )
