"""The wheel holds every package and data file, and works in an environment without SGLang."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import wheels
from tests.support.wheels import ROOT
from tlt_sglang import __version__
from tlt_sglang.upstream import versions

STAND_IN = Path("tlt_sglang/cpu/stand_in")
STARTUP = ROOT / "tlt_sglang/startup"
AT_THE_TOP = ("tlt_sglang.pth", "tlt_sglang_startup.py")
"""The files that the wheel puts at the top of site-packages, besides the package."""


@dataclass(frozen=True)
class Installed:
    """An empty environment into which only our wheel is installed."""

    files: frozenset[str]
    """Files of the wheel."""
    bin: Path

    @property
    def site(self) -> Path:
        """The folder site-packages."""
        (folder,) = self.bin.parent.glob("lib/python*/site-packages")
        return folder

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment outside the repository."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("TLT_", "PYTHON"))}
        program = str(self.bin / command[0])
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.bin,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel alone into an empty environment."""
    assert wheel.name == f"tlt_sglang-{__version__}-py3-none-any.whl"
    folder, python = wheels.environment(tmp_path_factory.mktemp("installed") / "environment")
    wheels.uv("pip", "install", "--no-deps", "--python", python, str(wheel))
    with zipfile.ZipFile(wheel) as archive:
        return Installed(frozenset(archive.namelist()), folder / "bin")


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = [
        *(ROOT / "tlt_sglang").rglob("__init__.py"),
        *(ROOT / "patches").rglob("__init__.py"),
    ]
    packages = set()
    for file in folders:
        parts = file.parent.relative_to(ROOT).parts
        if STAND_IN.parts != parts[: len(STAND_IN.parts)]:
            packages.add(".".join(("tlt_sglang", *parts) if parts[0] == "patches" else parts))
    listed = settings["tool"]["setuptools"]["packages"]
    assert sorted(packages) == listed


def test_every_module_and_data_file_is_in_the_wheel(installed: Installed) -> None:
    expected = set()
    for folder in ("tlt_sglang", "patches"):
        files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        expected |= {
            re.sub("^patches/", "tlt_sglang/patches/", str(path))
            for path in files
            if not {"__pycache__", "build"} & set(path.parts)
            and ".egg-info" not in str(path)
            and path.suffix != ".md"
        }
    assert len(expected) > 100
    assert {"tlt_sglang/py.typed", "tlt_sglang/models/smollm2-135m/weights.safetensors"} < expected
    assert f"{STAND_IN}/sgl_kernel/__init__.py" in expected
    assert expected - installed.files == set()
    strangers = {name for name in installed.files - expected if ".dist-info/" not in name}
    assert {Path(name).name for name in strangers} == set(AT_THE_TOP)
    for name in AT_THE_TOP:
        assert (installed.site / name).read_bytes() == (STARTUP / name).read_bytes()


def test_entry_points(installed: Installed) -> None:
    program = (
        "from importlib.metadata import entry_points, version; "
        "(point,) = entry_points(group='sglang.srt.plugins'); "
        "print(point.name, point.value, version('tlt-sglang'))"
    )
    done = installed.run("python", "-c", program)
    assert done.stdout.split() == ["tlt", "tlt_sglang.plugin:load", __version__], done.stderr
    done = installed.run("python", "-c", "import tlt_sglang.patches as p; print(p.__file__)")
    assert done.stdout.strip().endswith("site-packages/tlt_sglang/patches/__init__.py"), done.stderr
    assert installed.run("tlt", "--version").stdout == f"tlt-sglang {__version__}\n"


def test_python_starts_without_us_unless_the_variable_is_set(installed: Installed) -> None:
    program = "import sys; print(*(type(f).__name__ for f in sys.meta_path), *sys.modules)"
    off = installed.run("python", "-c", program).stdout.split()
    on = installed.run("python", "-c", program, TLT_CONFIG="{}").stdout.split()
    assert "tlt_sglang_startup" not in off
    assert "Hook" not in off
    assert on[0] == "Hook"
    assert set(on) - set(off) == {"Hook", "tlt_sglang_startup", "__future__"}


def test_check_says_what_is_missing(installed: Installed) -> None:
    done = installed.run("tlt", "check", "--device", "cpu")
    assert done.returncode == 1 and done.stderr == ""
    assert f"SGLang is not installed; install sglang=={versions.NEWEST}." in done.stdout
    assert "torch is not installed" in done.stdout
    assert "Not sound: " in done.stdout
