"""The benchmarks are independent programs with a common harness, and can be listed."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scrub
from benchmarks.harness import provenance
from benchmarks.harness.provenance import REPOSITORY, RESULTS

FOLDER = REPOSITORY / "benchmarks"
BENCHES = sorted(path.stem for path in FOLDER.glob("bench_*.py"))
MODULES = sorted(path for path in FOLDER.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return the modules of `benchmarks` that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("benchmarks.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_module_imports_a_benchmark(path: Path) -> None:
    assert {name for name in imported(path) if name.split(".")[1] in BENCHES} == set()


@pytest.mark.parametrize("path", sorted((FOLDER / "harness").glob("*.py")), ids=lambda p: p.stem)
def test_the_harness_imports_nothing_else_of_the_benchmarks(path: Path) -> None:
    assert {name for name in imported(path) if name.split(".")[1] != "harness"} == set()


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_can_be_listed(name: str) -> None:
    """Its docstring begins with one line, which is a sentence, and README.md describes it."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    first, second, *_ = docstring.splitlines()
    assert first.endswith(".")
    assert second == ""
    assert f"python benchmarks/{name}.py" in docstring
    assert f"`{name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert end.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def test_a_benchmark_starts_as_a_file() -> None:
    """One process shows that it does; the lines that make it so are in all of them."""
    command = [sys.executable, "benchmarks/bench_policy.py", "--help"]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    for name in BENCHES:
        before, _, after = (FOLDER / f"{name}.py").read_text().partition("if __package__ in")
        assert after.splitlines()[1].strip().startswith("sys.path.insert(0, ")
        assert "from benchmarks" not in before
        assert 'if __name__ == "__main__":\n    sys.exit(main())\n' in after


# -- paths in results ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json*")), ids=lambda path: path.stem)
def test_a_result_has_no_path_of_a_machine(path: Path) -> None:
    for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
        assert list(scrub.absolute_paths(json.loads(line))) == []


def test_what_is_written_has_no_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr("tempfile.tempdir", "/scratch/tmp")
    content = {
        "command": f"python {REPOSITORY}/benchmarks/bench_a.py --json /scratch/tmp/a.json",
        "cwd": str(REPOSITORY),
        "model": ["/home/someone/.cache/model", "/home/someone"],
        "endpoint": "ipc:///scratch/tmp/x/coordinator",
        "ratio": 0.5,
        "other": "either/or, ~/x and /home/someone-else",
    }
    provenance.write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "command": "python benchmarks/bench_a.py --json $TMPDIR/a.json",
        "cwd": ".",
        "model": ["~/.cache/model", "~"],
        "endpoint": "ipc://$TMPDIR/x/coordinator",
        "ratio": 0.5,
        "other": "either/or, ~/x and /home/someone-else",
    }


def test_scrubbing_changes_prefixes_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench_a.json"
    path.write_text('{"seconds": 1.23456789012, "log": "/root/x /tmp/y", "prompts": ["/a/b"]}')
    assert scrub.main([str(path)]) == 0
    assert json.loads(path.read_text()) == {
        "seconds": 1.23456789012,
        "log": "~/x $TMPDIR/y",
        "prompts": ["/a/b"],
    }
    assert scrub.main([str(path)]) == 0
    path.write_text('{"log": "--json=/srv/data/x"}')
    capsys.readouterr()
    assert scrub.main([str(path)]) == 1
    assert "/srv/data/x is left" in capsys.readouterr().out
