"""Show what the launcher sees of a machine: a GPU driver, and kernels of the CPU engine."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tlt_sglang import launch_server
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.launch_server import STAND_IN
from tlt_sglang.launcher import environment

ON_CPU = ["--device", "cpu"]
ON_CUDA = ["--device", "cuda"]


def install_kernels(folder: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a `sgl_kernel` in front of others that has one library, and fails to load it on CPU."""
    package = folder / "sgl_kernel"
    (package / library).parent.mkdir(parents=True)
    (package / library).touch()
    text = 'raise ImportError("Could not load any common_ops library")\n'
    (package / "__init__.py").write_text(text)
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)  # whose spec would be taken
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "")


def origin() -> Path:
    spec = find_spec("sgl_kernel")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def test_kernels_built_for_cuda_are_left_aside_on_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kernels(tmp_path, "sm90/common_ops.abi3.so", monkeypatch)
    assert origin() == tmp_path
    assert launch_server._use_cpu_engine_if_needed(ON_CPU)
    assert origin() == STAND_IN

    # Processes that do not inherit sys.path, such as the fork server, import it, too.
    done = subprocess.run(
        [sys.executable, "-c", "import sgl_kernel; print(sgl_kernel.__file__)"],
        env=os.environ | {"TLT_CONFIG": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parents[1] == STAND_IN


def test_compiled_kernels_for_the_cpu_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kernels(tmp_path, "common_ops.cpython-311-x86_64-linux-gnu.so", monkeypatch)
    assert launch_server._use_cpu_engine_if_needed(ON_CPU)
    assert origin() == tmp_path
    assert os.environ["PYTHONPATH"] == str(tmp_path)


def test_tlt_check_names_kernels_built_for_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kernels(tmp_path, "sm100/common_ops.abi3.so", monkeypatch)
    notes = [result.text for result in environment.check("cpu") if not result.passed]
    assert any(note.startswith("The module sgl_kernel is missing, or built for") for note in notes)


class Driver:
    """A libcuda that finds `count` GPUs, or does not initialise."""

    def __init__(self, count: int, status: int = 0) -> None:
        self.count, self.status = count, status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0


@pytest.mark.parametrize(
    ("driver", "expected"),
    [(Driver(1), True), (Driver(0), False), (Driver(1, status=100), False), (None, False)],
)
def test_a_driver_whose_nodes_are_not_in_dev(
    driver: Driver | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(environment, "DEVICE_NODES", ())
    monkeypatch.setattr(
        environment,
        "ctypes",
        SimpleNamespace(CDLL=load, c_int=ctypes.c_int, byref=ctypes.byref),
    )
    assert environment.has_accelerator() == expected
    if expected:
        assert not launch_server._use_cpu_engine_if_needed(ON_CUDA)
        return
    with pytest.raises(EnvironmentProblem, match=r"^There is no GPU driver here, so --device cuda"):
        launch_server._use_cpu_engine_if_needed(ON_CUDA)


def test_tlt_check_names_a_plugin_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang would log the error, and start without TLT."""
    (sound, *_) = environment._start("cpu")
    assert sound.passed
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tlt_sglang'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (broken, *_) = environment._start("cpu")
    assert broken.required and not broken.passed
    assert broken.text.startswith("TLT's plugin cannot be imported (ModuleNotFoundError: ")
    assert broken.text.endswith("; install tlt-sglang again.")
