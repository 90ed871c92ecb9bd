"""Drafters that are shipped with the package: prepared once, for their own model only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tlt_sglang import launch_server
from tlt_sglang.config.settings import Config
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.models import shipped
from tlt_sglang.training import export, ship

VOCAB, SIZE, KNOWN = 20, 8, [1, 4, 5, 17]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared folder of an alias `small`, for which a drafter is shipped."""
    source, models = tmp_path / "shipped" / "small", tmp_path / "cache" / "models"
    folder = models / "small-0123"
    source.mkdir(parents=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    embedding = torch.randn(VOCAB, SIZE)
    save_file({"model.embed_tokens.weight": embedding}, folder / "model.safetensors")
    weights = {"fc.weight": torch.randn(SIZE, 3 * SIZE).bfloat16()}
    weights["draft_ids"] = torch.tensor(KNOWN, dtype=torch.int32)
    save_file(weights, source / "weights.safetensors")
    (source / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    (source / "training.json").write_text('{"made by": "hand"}')
    monkeypatch.setattr(shipped, "HERE", source.parent)
    monkeypatch.setattr(shipped, "ALIASES", {"small": None, "other": None})
    monkeypatch.setattr(shipped, "prepare", lambda alias: models / f"{alias}-0123")
    monkeypatch.setenv("TLT_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_head_is_the_targets(model: Path) -> None:
    folder = shipped.default_drafter("small")
    assert folder is not None
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == {"fc.weight", "lm_head.weight", "d2t", "t2d"}
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights["lm_head.weight"], embedding[KNOWN].bfloat16())
    assert (weights["d2t"] + torch.arange(len(KNOWN))).tolist() == KNOWN
    assert weights["t2d"].nonzero().flatten().tolist() == KNOWN
    assert json.loads((folder / "training.json").read_text()) == {"made by": "hand"}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert shipped.default_drafter(str(model)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_an_export_of_training_survives_shipping(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    head = load_file(model / "model.safetensors")["model.embed_tokens.weight"].bfloat16()
    weights = {"fc.weight": torch.randn(SIZE, 3 * SIZE).bfloat16(), "lm_head.weight": head[KNOWN]}
    weights |= export.vocabulary(torch.tensor(KNOWN), VOCAB)
    save_file(weights, run / "model.safetensors")
    (run / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    (run / "training.json").write_text("{}")
    ship.ship(run, shipped.HERE / "small")
    folder = shipped.default_drafter("small")
    assert folder is not None
    back = load_file(folder / "model.safetensors")
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_checkpoints_that_are_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "into"
    with pytest.raises(ConfigError, match="not the output of `tlt train`"):
        ship.ship(tmp_path, into)
    for name in ("config.json", "training.json"):
        (tmp_path / name).write_text("{}")
    weights = {"fc.weight": torch.zeros(2, 6)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="not an EAGLE-3 drafter"):
        ship.ship(tmp_path, into)
    weights |= {"lm_head.weight": torch.zeros(3, 2)} | export.vocabulary(torch.arange(3), 4)
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(ship, "MOST_BYTES", 10)
    with pytest.raises(ConfigError, match="60 bytes; 10 are the most"):
        ship.ship(tmp_path, into)
    assert not into.exists()


def test_other_models_have_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is prepared for them: the weights of an alias may not be installed."""
    monkeypatch.setattr(shipped, "prepare", lambda alias: pytest.fail(alias))
    assert shipped.default_drafter("other") is None
    assert shipped.default_drafter(str(model.parent)) is None
    assert shipped.default_drafter("some/hub-id") is None


def test_a_drafter_of_another_model(model: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(3, SIZE)}, model / "model.safetensors")
    with pytest.raises(EnvironmentProblem, match="does not fit the model"):
        shipped.default_drafter("small")
    assert list((model.parents[1] / "drafters").iterdir()) == []


@pytest.mark.parametrize(
    ("config", "argv", "taken"),
    [
        (Config(), [], True),
        (Config(("eagle3:3x4x8",)), [], True),
        (Config(("ngram:8",)), [], False),
        (Config(("off",)), [], False),
        (Config(), ["--speculative-draft-model-path", "mine"], False),
        (Config(), ["--speculative-algorithm=NGRAM"], False),
        (None, [], False),
    ],
)
def test_when_the_launcher_takes_it(
    model: Path, config: Config | None, argv: list[str], taken: bool
) -> None:
    flags = launch_server._drafter(config, str(model), argv)
    assert bool(flags) is taken
    assert not taken or flags[0] == "--speculative-draft-model-path"
