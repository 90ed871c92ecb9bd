"""The command line of apply_patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import apply_patches
from tests.support.fakelang import MATHS, VERSION, digest, plus_100, swap, wheel, wrap
from tlt_sglang.patching.patch import (
    Patch,
    table,
)
from tlt_sglang.patching.source import SourceTree
from tlt_sglang.upstream import versions


def two_patches() -> tuple[Patch, Patch]:
    one = wrap("double", plus_100)
    return replace(one, file="maths.py"), swap("LIMIT", 9, only_on="cuda")


@pytest.fixture
def command(
    upstream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    patches = two_patches()
    installed = SourceTree.from_installed("fakelang")
    monkeypatch.setattr(apply_patches, "all_patches", lambda: patches)
    monkeypatch.setattr(apply_patches, "patches_of", lambda shape: patches)
    monkeypatch.setattr(versions, "SHAPES", {VERSION: "v1"})
    monkeypatch.setattr(SourceTree, "from_installed", lambda package: installed)
    points = [SimpleNamespace(name="tlt", value=apply_patches.ENTRY_POINT)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)

    def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        code = apply_patches.main(arguments, environ)
        return (code, *capsys.readouterr())

    return run


def test_no_argument_explains(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = command()
    assert (code, err) == (0, "")
    assert "loads TLT's plugin" in out
    assert "TLT is off" in out
    assert "fakelang.maths:double fits." in out
    assert "TLT is on" in command(TLT_CONFIG="x.toml")[1]
    code, out, _ = command(SGLANG_PLUGINS="other")
    assert code == 1
    assert "SGLANG_PLUGINS excludes TLT" in out
    assert command(SGLANG_PLUGINS="other, tlt")[0] == 0


def test_no_plugin_no_patches(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    code, out, _ = command()
    assert code == 1
    assert "run `pip install -e .`" in out


def test_check(
    command: Callable[..., tuple[int, str, str]], upstream: Path, tmp_path: Path
) -> None:
    assert command("--check") == (0, "SGLang 1.2.3: nothing breaks (2 patches checked).\n", "")
    same = wheel(tmp_path / "same.whl", MATHS, VERSION)
    assert command("--check", str(same))[0] == 0
    other = wheel(tmp_path / "other.whl", MATHS.replace("LIMIT = 3", "MOST = 3"), VERSION)
    code, out, _ = command("--check", str(other))
    assert code == 1
    assert "fakelang.maths:LIMIT in SGLang 1.2.3 is missing" in out
    assert "1 problem with SGLang 1.2.3." in out
    newer = wheel(tmp_path / "newer.whl", MATHS.replace("value * 2", "value * 3"), "2.0")
    code, out, _ = command("--check", str(newer))
    assert code == 1
    assert "SGLang 2.0 is not supported; TLT runs on 1.2.3. The nearest shape is v1: of its" in out
    assert "2 targets 1 are the same, 1 differ, 0 are missing." in out
    (upstream / "maths.py").write_text("")
    assert command()[0] == command("--check")[0] == 1


def test_bad_requests_get_one_sentence(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "not.whl").write_text("no zip")
    for arguments in (
        ["--check", str(tmp_path / "absent.whl")],
        ["--check", str(tmp_path / "not.whl")],
        ["--frob"],
        ["--list", "--check"],
    ):
        code, out, err = command(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("apply_patches.py: ")


def test_writes_digests(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(apply_patches, "DIGESTS", tmp_path)
    assert command("--write-digests")[0] == 0
    expected = {
        target: digest(target) for target in ("fakelang.maths:double", "fakelang.maths:LIMIT")
    }
    assert json.loads((tmp_path / f"{VERSION}.json").read_text()) == expected

    # A wheel of an unknown version, and one that lacks a target: nothing is written.
    (tmp_path / f"{VERSION}.json").unlink()
    unknown = wheel(tmp_path / "unknown.whl", MATHS, "2.0")
    assert "SGLang 2.0 has no shape: add it to" in command("--write-digests", str(unknown))[2]
    lacking = wheel(tmp_path / "lacking.whl", MATHS.replace("LIMIT = 3", "MOST = 3"), VERSION)
    code, out, _ = command("--write-digests", str(lacking))
    assert code == 1 and "fakelang.maths:LIMIT in SGLang 1.2.3 is missing" in out
    assert list(tmp_path.glob("*.json")) == []


def test_lists_patches_and_writes_their_table(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (
        "fakelang.maths:LIMIT\n    replace, any process, on cuda only: a test"
        in command("--list")[1]
    )
    monkeypatch.setattr(apply_patches, "TABLE", tmp_path / "TABLE.md")
    assert command("--write-table")[0] == 0
    text = (tmp_path / "TABLE.md").read_text()
    assert text == table(two_patches(), [VERSION])
    assert "## maths.py" in text
    assert "| `fakelang.maths:LIMIT` | replace | any | cuda | a test | never |" in text
