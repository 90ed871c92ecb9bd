"""The SGLang versions that TLT runs on, and the shape of each: the only version literals.

A shape is how SGLang looks from here. Versions that look the same share one adapter (`v23.py`) and
one set of patches; each version has digests of its own. Runs in every process; imports no SGLang.
"""

from __future__ import annotations

from importlib import metadata

from tlt_sglang.errors import EnvironmentProblem

SHAPES = {
    "0.5.15.post1": "v15",
    "0.5.16": "v16",
    "0.5.17": "v17",
    "0.5.19": "v19",
    "0.5.22": "v22",
    "0.5.23": "v23",
}
"""The shape of each version, the oldest version first."""

NEWEST = list(SHAPES)[-1]
"""The version to install."""


def installed() -> str:
    """Return the version of the installed SGLang. Raises EnvironmentProblem if there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem(f"SGLang is not installed; install sglang=={NEWEST}.") from None


def shape_of(version: str) -> str:
    """Return the shape of a version. Raises EnvironmentProblem if TLT does not run on it."""
    if version not in SHAPES:
        raise EnvironmentProblem(
            f"SGLang {version} is installed, but TLT runs on {supported()}; install "
            f"sglang=={NEWEST}, or see docs/upgrading.md."
        )
    return SHAPES[version]


def supported() -> str:
    """Return the supported versions as a phrase."""
    *others, last = SHAPES
    return f"{', '.join(others)} or {last}" if others else last
