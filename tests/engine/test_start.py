"""How TLT comes in and stays out: nothing without its flag, everything in each process with it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.fitting import Tiny
from tests.support.launching import refused, run, run_file
from tests.support.servers import Servers
from tests.support.tiny import greedily, make_drafter, make_target
from tlt_sglang import __version__
from tlt_sglang.launcher.server_process import free_port
from tlt_sglang.patches import patches_for
from tlt_sglang.upstream import versions

VOCAB = 64
PROMPT = [5, 9, 14, 3] * 4
ON_CPU = {"SGLANG_USE_CPU_ENGINE": "1"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_target(tmp_path_factory.mktemp("start") / "target", "llama", VOCAB))


# ---- off means off -------------------------------------------------------------------------------

WALK = """
import json
import os
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


def walk():
    seen, foreign = 0, []
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "sglang" or not isinstance(module, ModuleType):
            continue
        named = list(vars(module).items())
        for key, value in list(named):
            if isinstance(value, type) and value.__module__.split(".")[0] == "sglang":
                named += [(f"{key}.{member}", inner) for member, inner in vars(value).items()]
            if isinstance(value, dict):
                named += [(f"{key}[{entry!r}]", inner) for entry, inner in list(value.items())]
        for key, value in named:
            for function in functions(value):
                seen += 1
                home = (function.__module__ or "") + function.__code__.co_filename
                if "tlt_sglang" in home and function not in stand_in:
                    foreign.append(f"{name}:{key}")
    print(json.dumps({
        "seen": seen,
        "foreign": foreign,
        "ours": sorted(name for name in sys.modules if name.split(".")[0] == "tlt_sglang"),
        "finders": [type(finder).__module__ for finder in sys.meta_path],
    }))


walk()
os.environ["TLT_CONFIG"] = "{}"
sys.modules["tlt_sglang.plugin"].load()
walk()
"""


def test_without_a_config_nothing_of_sglang_is_ours(tmp_path: Path) -> None:
    """Then, with a config, the same walk finds us: it can see what it looks for."""
    done = run_file(WALK, tmp_path, environment=ON_CPU)
    assert done.status == 0, done.err
    off, on = (json.loads(line) for line in done.out.splitlines()[-2:])
    assert off["seen"] > 10_000
    assert off["foreign"] == []
    # The plugin itself, and what it needs to see that TLT is off; no patches.
    assert "tlt_sglang.plugin" in off["ours"]
    for module in ("patching", "patcher", "upstream", "patches", "engine"):
        assert f"tlt_sglang.{module}" not in off["ours"]
    assert not any("tlt_sglang" in module for module in off["finders"])

    assert len(on["foreign"]) > 10
    assert "sglang.srt.managers.scheduler:Scheduler.__init__" in on["foreign"]
    assert "tlt_sglang.patches" in on["ours"]


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


def serve(arguments):
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**arguments))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    url = f"http://127.0.0.1:{arguments['port']}"
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(arguments,))
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


NGRAM_LEAVES = ("qwen2", "llama_eagle3", "eagle_worker_v2", "draft_utils")
"""Modules that a Llama with n-grams does not use."""
WITHOUT_TOKENIZER = ("xgrammar_backend",)
"""Modules that an engine with --skip-tokenizer-init does not use."""


def assert_in_force(state: dict[str, Any], *unused: str) -> None:
    """Assert that in a scheduler on CPU every patch for it is in force, except those of modules it
    does not use.

    These are the modules of the main process, and `unused`, modules of other models and drafters.
    """
    states = {row["target"]: row["state"] for row in state["patches"]}
    expected = {}
    for patch in patches_for(versions.installed()):
        module = patch.module.rpartition(".")[2]
        waits = "scheduler" not in patch.process or module in unused
        expected[patch.target] = ("in force", "waiting for import") if waits else ("in force",)
        if patch.only_on == "cuda":
            expected[patch.target] = ("not for this device",)
    assert set(states) == set(expected)
    assert [target for target in states if states[target] not in expected[target]] == []


def assert_none_lost(rows: list[dict[str, Any]]) -> None:
    """Assert that in a main process on CPU every patch is in force, or still can be."""
    patches = patches_for(versions.installed())
    for row in rows:
        for_gpus = next(one for one in patches if one.target == row["target"]).only_on == "cuda"
        possible = ("not for this device",) if for_gpus else ("in force", "waiting for import")
        assert row["state"] in possible, row


@pytest.fixture(scope="module")
def expected(target: str) -> list[int]:
    """Generate greedily with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return greedily(model, torch.tensor([PROMPT]), 12)[0]


def test_sglangs_engine(tmp_path: Path, target: str, expected: list[int]) -> None:
    """With a drafter and no strategies named it has the default ones."""
    (tmp_path / "tlt.toml").write_text('policy = "random"\n')
    drafter = make_drafter(tmp_path / "drafter", Path(target), "eagle")
    environment = ON_CPU | {"TLT_CONFIG": str(tmp_path / "tlt.toml")}
    arguments = (target, json.dumps(PROMPT), str(drafter))
    done = run_file(ENGINE, tmp_path, *arguments, environment=environment)
    assert done.status == 0, done.err[-4000:]
    result = json.loads(done.out.splitlines()[-1])
    assert result["ids"] == expected
    chosen = ["off", "eagle:1x1x2", "eagle:3x1x4", "eagle:3x4x8", "ngram:8"]
    assert list(result["state"]["strategies"]) == chosen
    unused = ("qwen2", "ngram_worker", "ngram_corpus", "llama_eagle3", *WITHOUT_TOKENIZER)
    assert_in_force(result["state"], *unused)


def test_sglangs_server_in_a_spawned_process(
    tmp_path: Path, target: str, expected: list[int]
) -> None:
    """Its arguments may spell out the strategy as well."""
    (tmp_path / "tlt.toml").write_text('strategies = ["ngram:6"]\n')
    arguments = server_arguments(target) | {
        "speculative_algorithm": "NGRAM",
        "speculative_num_draft_tokens": 6,
        "max_total_tokens": 4096,
        "mem_fraction_static": 0.9,
        "dtype": "float32",
        "disable_cuda_graph": True,
    }
    environment = ON_CPU | {"TLT_CONFIG": str(tmp_path / "tlt.toml")}
    words = (json.dumps(arguments), json.dumps(PROMPT))
    done = run_file(SPAWNED, tmp_path, *words, environment=environment)
    assert done.status == 0, done.err[-4000:]
    result = json.loads(done.out.splitlines()[-1])
    assert result["ids"] == expected
    status = result["status"]
    assert status["strategy"] == "ngram:6"
    assert_in_force(status["schedulers"][0], *NGRAM_LEAVES, *WITHOUT_TOKENIZER)
    assert_none_lost(status["patches"])


def server_arguments(target: str) -> dict[str, Any]:
    return {
        "model_path": target,
        "port": free_port(),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "log_level": "warning",
    }


# ---- another plugin in the way -------------------------------------------------------------------

UNDOER = """
import multiprocessing

TARGET = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"


def around(original, *args, **kwargs):
    return original(*args, **kwargs)


def hook():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, around, HookType.AROUND)


def hook_in_children():
    if multiprocessing.current_process().name != "MainProcess":
        hook()
"""
LOST = "The patch of sglang.srt.managers.scheduler:Scheduler.get_internal_state is not "
TAKEN = "Scheduler.get_internal_state is already patched by other code (the SGLang plugin "


@pytest.mark.parametrize(
    ("order", "function", "says"),
    [
        ("before", "hook", TAKEN + "undoer); disable one of the two."),
        ("after", "hook", LOST + "in force any more; find what replaced it, and disable that"),
        ("after", "hook_in_children", LOST + "in force any more; find what replaced it"),
    ],
)
def test_a_patch_that_another_plugin_undoes(
    tmp_path: Path, target: str, order: str, function: str, says: str
) -> None:
    """The other plugin loads before or after ours, in every process or only in the scheduler."""
    plugin = tmp_path / "plugin"
    info = plugin / "undoer-1.0.dist-info"
    info.mkdir(parents=True)
    (plugin / "undoer.py").write_text(UNDOER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: undoer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nundoer = undoer:{function}\n")
    path = plugin
    if order == "after":
        path = tmp_path / "customized"
        path.mkdir()
        (path / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(plugin)!r})\n")
    flags = ["--model", target, "--adaptive-spec", "--skip-tokenizer-init"]
    flags += ["--max-total-tokens", "4096", "--port", str(free_port())]
    refused(*flags, says=says, environment={"PYTHONPATH": str(path)})


# ---- what it tells of itself ---------------------------------------------------------------------


@pytest.mark.server("ngram:8")
def test_status(servers: Servers) -> None:
    server = servers.get("ngram:8")
    server.generate("one two three one two three one two", max_new_tokens=64)
    status = server.status()
    assert set(status) == {
        "versions",
        "device",
        "strategy",
        "drafter",
        "accept_length",
        "patches",
        "schedulers",
        "clients",
    }
    assert status["versions"]["tlt_sglang"] == __version__
    assert status["versions"]["sglang"] == versions.installed()
    assert set(status["versions"]) == {"tlt_sglang", "sglang", "torch", "transformers"}
    assert status["device"] == "cpu"
    assert (status["strategy"], status["drafter"]) == ("ngram:8", "ngram")
    assert status["accept_length"] > 1
    assert_none_lost(status["patches"])
    (scheduler,) = status["schedulers"]
    (title,) = [p.cmdline()[0] for p in server.processes() if p.pid == scheduler["pid"]]
    assert title.startswith("sglang::scheduler")  # as which SGLang lets it end by itself
    assert scheduler["verify_steps"] > 0
    assert scheduler["accept_length"] == status["accept_length"]
    assert_in_force(scheduler, *NGRAM_LEAVES)


def test_a_launcher_that_is_killed_leaves_no_process(servers: Servers, tiny: Tiny) -> None:
    server = servers.get("ngram:4", "--skip-tokenizer-init", model=tiny.path)
    processes = server.processes()
    assert len(processes) >= 4
    os.kill(server.root.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(processes, timeout=30)
    assert [process.cmdline() for process in left] == []
    servers.drop(server)


def test_check() -> None:
    sound = run([sys.executable, "-m", "tlt_sglang.cli", "check"])
    assert sound.status == 0, sound.out
    assert sound.err == ""
    assert sound.out.splitlines()[-1] == "Sound: an engine can start here."
    assert "MISSING" not in sound.out


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        ([], {"SGLANG_PLUGINS": "other"}, "SGLANG_PLUGINS excludes TLT; add tlt to it"),
        ([], {"PYTHONPATH": "OTHER"}, "SGLang 0.5.20 is installed, but TLT runs on "),
    ],
)
def test_check_of_what_is_not_sound(
    tmp_path: Path, flags: list[str], environment: dict[str, str], says: str
) -> None:
    info = tmp_path / "sglang-0.5.20.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.20\n")
    path = {name: str(tmp_path) for name in environment if name == "PYTHONPATH"}
    done = run([sys.executable, "-m", "tlt_sglang.cli", "check", *flags], environment | path)
    assert done.status == 1
    assert f"MISSING  {says}" in done.out
    assert done.out.splitlines()[-1].startswith("Not sound: ")
