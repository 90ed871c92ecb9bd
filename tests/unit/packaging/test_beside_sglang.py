"""Installing the wheel beside an SGLang changes no other package of its environment.

The environment of the tests is installed into for real; of the other versions of SGLang their locks
are compared, and `make test-versions` runs this file in their environments.
"""

from __future__ import annotations

import re
import shutil
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import wheels
from tests.support.wheels import ROOT
from tlt_sglang import __version__
from tlt_sglang.upstream import versions

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
LOCKS = sorted((ROOT / "requirements").glob("cpu*.txt"))
LOCKS.remove(ROOT / "requirements/cpu-overrides.txt")


@dataclass(frozen=True)
class Pin:
    """One package of a lock."""

    version: str
    wanted_by: tuple[str, ...]
    """The packages and files that require it."""


def pins(lock: Path) -> dict[str, Pin]:
    """Return the packages of a lock by name."""
    packages: dict[str, Pin] = {}
    for block in re.split(r"\n(?=[\w.-]+==)", lock.read_text(encoding="utf-8")):
        named = re.match(r"([\w.-]+)==(\S+)", block)
        if named:
            via = re.findall(r"^    # +(?:via )?(\S.*)$", block, re.MULTILINE)
            wanted_by = tuple(line for line in via if line != "via")
            packages[canonicalize_name(named[1])] = Pin(named[2], wanted_by)
    return packages


def test_nothing_requires_an_sglang() -> None:
    assert "sglang" not in {requirement.name for requirement in REQUIREMENTS}


def test_each_known_sglang_has_an_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    expected = {f"sglang-{version}": [f"sglang=={version}"] for version in versions.SHAPES}
    assert {name: extras[name] for name in extras if name.startswith("sglang-")} == expected
    assert extras["sglang"] == expected[f"sglang-{versions.NEWEST}"]


def test_each_known_sglang_has_a_lock() -> None:
    """Which the next test reads."""
    assert set(versions.SHAPES) <= {pins(lock)["sglang"].version for lock in LOCKS}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_sglang_brings_what_we_require(lock: Path) -> None:
    """In a version that we accept, so that there is nothing to install or to replace."""
    locked = pins(lock)
    assert len(locked) > 150 and "sglang" in locked
    for requirement in REQUIREMENTS:
        pin = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.version), requirement
        assert [by for by in pin.wanted_by if not by.startswith("-r ")], requirement


def copy_metadata(site_packages: Path) -> None:
    """Copy what installers know of the packages of this environment but ours; no code."""
    for info in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        if not info.name.startswith("tlt_sglang-"):
            (site_packages / info.name).mkdir(exist_ok=True)
            for name in ("METADATA", "WHEEL", "INSTALLER"):
                if (info / name).exists():
                    shutil.copy(info / name, site_packages / info.name)


def test_installing_changes_no_other_package(wheel: Path, tmp_path: Path) -> None:
    """With all its requirements, into an environment with the packages of this one."""
    folder, python = wheels.environment(tmp_path / "environment")
    (site_packages,) = folder.glob("lib/python*/site-packages")
    copy_metadata(site_packages)
    before = wheels.uv("pip", "list", "--format", "freeze", "--python", python).splitlines()
    assert len(before) > 150 and any(line.startswith("sglang==") for line in before)
    wheels.uv("pip", "install", "--python", python, str(wheel))
    after = wheels.uv("pip", "list", "--format", "freeze", "--python", python).splitlines()
    assert set(before) - set(after) == set()
    assert set(after) - set(before) == {f"tlt-sglang=={__version__}"}
