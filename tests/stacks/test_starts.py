"""One variable turns TLT on, however a stack starts SGLang; without it SGLang is stock.

The programs in `starts` make the calls of the stacks with real SGLang on CPU. None of them passes
an argument for speculation.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.lacking import lacks
from tests.support.launching import Done, run
from tests.support.tiny import greedily, make_drafter, make_target
from tlt_sglang.launcher.server_process import free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STARTUP = ROOT / "tlt_sglang" / "startup"
VOCAB = 64
PROMPT = [5, 9, 14, 3] * 4
STRATEGIES = ["off", "eagle:1x1x2", "ngram:6"]
RESOLVES_AGAIN = not lacks("cannot be resolved again")
"""True if this SGLang keeps what the operator asked for, so that it can be resolved once more."""
STARTS = ("spawned_server", "own_uvicorn", "subclasses", "own_scheduler_process")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("starts") / "target", "llama", VOCAB)


@pytest.fixture(scope="module")
def config(target: Path) -> str:
    """Several strategies and a drafter, which only TLT_CONFIG names."""
    drafter = make_drafter(target.with_name("drafter"), target, "eagle")
    return json.dumps({"strategies": STRATEGIES, "drafter": str(drafter)})


@pytest.fixture(scope="module")
def expected(target: Path) -> list[int]:
    """Generate greedily with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return greedily(model, torch.tensor([PROMPT]), 12)[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment in which Python reads our `.pth` file, as in a wheel's site-packages.

    Where the file is installed for real, reading it twice changes nothing.
    """
    program = f"import site\nsite.addsitedir({str(STARTUP)!r})\n"
    return customized(tmp_path_factory.mktemp("installed"), program)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment in which Python has not read it, as in an editable install."""
    program = (
        "import sys\n"
        "names = [type(finder).__module__ for finder in sys.meta_path]\n"
        "if 'tlt_sglang_startup' in names:\n"
        "    del sys.meta_path[names.index('tlt_sglang_startup')]\n"
    )
    return customized(tmp_path_factory.mktemp("bare"), program)


def customized(folder: Path, program: str) -> dict[str, str]:
    """Return an environment whose Pythons run `program` as they start."""
    (folder / "sitecustomize.py").write_text(program)
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1"}


def start(name: str, target: Path, environment: dict[str, str], *words: str) -> Done:
    """Run a program of `starts` to its end."""
    return run([*program_of(name, target), *words], environment)


def program_of(name: str, target: Path) -> list[str]:
    """Return the command line of a program of `starts`."""
    values = {
        "model_path": str(target),
        "port": free_port(),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "dtype": "float32",
        "mem_fraction_static": 0.9,
        "max_total_tokens": 4096,
        "log_level": "info",
    }
    file = str(HERE / "starts" / f"{name}.py")
    return [sys.executable, file, json.dumps(values), json.dumps(PROMPT)]


def result(done: Done) -> dict[str, Any]:
    assert done.status == 0, done.err[-6000:]
    printed: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return printed


def assert_on(printed: dict[str, Any], expected: list[int]) -> None:
    """Assert that the answer is right, and the scheduler has the strategies and every patch."""
    assert printed["ids"] == expected
    (scheduler,) = printed["status"]["schedulers"]
    assert list(scheduler["strategies"]) == STRATEGIES
    lost = [row for row in scheduler["patches"] if row["state"] in ("lost", "not applied")]
    assert lost == []


def assert_refused(done: Done) -> None:
    """Assert that it did not start, since its arguments had been resolved without the strategy."""
    assert done.status != 0
    assert "SGLang's arguments were resolved before TLT was loaded" in done.out + done.err


@pytest.mark.parametrize("name", STARTS)
def test_one_variable_turns_it_on(
    name: str, target: Path, expected: list[int], config: str, installed: dict[str, str]
) -> None:
    done = start(name, target, installed | {"TLT_CONFIG": config})
    assert_on(result(done), expected)
    assert "resolved SGLang's arguments again" not in done.out + done.err
    if name != "subclasses":  # an Engine without an HTTP server
        assert "Calibration took" in done.out + done.err


@pytest.mark.parametrize("name", ["own_uvicorn", "subclasses"])
def test_an_actor_that_sets_the_variable_late(
    name: str, target: Path, expected: list[int], config: str, installed: dict[str, str]
) -> None:
    """SGLang's modules have been imported by then, and its arguments are resolved twice."""
    done = start(name, target, installed, config)
    if name == "own_uvicorn" and not RESOLVES_AGAIN:
        assert_refused(done)
        return
    assert_on(result(done), expected)


def test_without_the_file_that_python_reads_at_its_start(
    target: Path, expected: list[int], config: str, bare: dict[str, str]
) -> None:
    """SGLang loads plugins in the main process alone; its arguments bring TLT into the others."""
    done = start("own_scheduler_process", target, bare | {"TLT_CONFIG": config})
    if not RESOLVES_AGAIN:
        assert_refused(done)
        return
    assert_on(result(done), expected)
    assert "resolved SGLang's arguments again" in done.out + done.err


def test_without_the_variable_sglang_is_stock(
    target: Path, expected: list[int], installed: dict[str, str]
) -> None:
    printed = result(start("spawned_server", target, installed))
    assert printed == {"ids": expected, "status": None}


# ---- what must not start ------------------------------------------------------------------------

BROKEN = "import sys\nsys.modules['tlt_sglang'] = None\n"
"""An environment in which the package is gone, while its entry point and `.pth` file stay."""


@pytest.mark.parametrize(
    ("program", "variables", "says"),
    [
        (BROKEN, {}, "TLT cannot be imported (ModuleNotFoundError("),
        ("", {"SGLANG_PLUGINS": "other"}, "SGLANG_PLUGINS excludes TLT; add tlt to it, or unset"),
        (
            BROKEN.replace("sglang'", "sglang.strategy'"),
            {},
            "TLT cannot be imported (No module named ",
        ),
    ],
)
def test_a_start_without_us_is_loud(
    tmp_path: Path, target: Path, program: str, variables: dict[str, str], says: str
) -> None:
    """SGLang logs the error of a plugin and goes on; nothing has been started by then."""
    text = f"import site\nsite.addsitedir({str(STARTUP)!r})\n{program}"
    environment = customized(tmp_path, text) | variables | {"TLT_CONFIG": "{}"}
    done = run([sys.executable, "-c", "import sglang\nprint('on it goes')"], environment)
    assert done.status == os.EX_CONFIG
    (line,) = [one for one in done.err.splitlines() if one.startswith("tlt-sglang: ")]
    assert line.startswith("tlt-sglang: TLT_CONFIG is set, but ")
    assert says in line
    assert "on it goes" not in done.out

    off = run([sys.executable, "-c", "import sglang"], environment | {"TLT_CONFIG": ""})
    assert (off.status, off.out) == (0, "")
