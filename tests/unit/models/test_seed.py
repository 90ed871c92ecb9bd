"""A drafter's seed: made of the target's own last layer, once, and fit to be swapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tlt_sglang.config.settings import Config
from tlt_sglang.config.sglang_flags import Flags
from tlt_sglang.errors import ConfigError
from tlt_sglang.models import seed as seeds
from tlt_sglang.models.seed import grows, make
from tlt_sglang.training import seed
from tlt_sglang.training.models import DraftConfig, Drafter
from tlt_sglang.weights import describe

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "eos_token_id": 63,
    "bos_token_id": 0,
    "model_type": "llama",
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    torch.manual_seed(0)
    shapes = {
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
        "input_layernorm": (16,),
        "post_attention_layernorm": (16,),
    }
    weights = {
        f"model.layers.5.{name}.weight": torch.randn(shape) for name, shape in shapes.items()
    }
    weights |= {
        "model.embed_tokens.weight": torch.randn(64, 16),
        "model.norm.weight": torch.ones(16),
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def config(tmp_path: Path) -> Config:
    return Config(store=str(tmp_path / "store"))


def test_it_is_a_checkpoint_of_the_targets_last_layer(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seed, "SMALL_VOCAB", 32)
    folder = tmp_path / "seed"
    seed.write(folder, str(target))
    stored, theirs = (
        load_file(folder / "model.safetensors"),
        load_file(target / "model.safetensors"),
    )
    wide = stored["layers.0.self_attn.q_proj.weight"].float()
    torch.testing.assert_close(
        wide[:, 16:], theirs["model.layers.5.self_attn.q_proj.weight"], atol=0.05, rtol=0.01
    )
    ids = describe.draft_ids(folder, 64)
    assert ids.tolist() == [*range(31), 63]  # the end of a text is known, too
    assert torch.equal(
        stored["lm_head.weight"], theirs["model.embed_tokens.weight"][ids].bfloat16()
    )
    expected = describe.expected(folder, SHAPE, "F32")
    drafter = Drafter(DraftConfig.for_target(SHAPE, "eagle3", 32))
    assert {n: s.shape for n, s in expected.tensors.items()} == {
        name: tuple(weight.shape) for name, weight in drafter.state_dict().items()
    }
    assert (expected.base.draft_vocab_size, expected.base.layers) == (32, 6)


def test_it_is_made_once_and_belongs_to_its_target(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "_run", seed._seed)  # without a process of its own
    folder = make(str(target), config(tmp_path))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert make(str(target), config(tmp_path)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    other = tmp_path / "other"
    target.rename(other)
    with pytest.raises(ConfigError, match="choose another --tlt-store"):
        make(str(other), config(tmp_path))


def test_a_target_without_trainable_drafters(target: Path, tmp_path: Path) -> None:
    (target / "config.json").write_text(json.dumps(SHAPE | {"architectures": ["GptOss"]}))
    with pytest.raises(ConfigError, match=r"^Drafters are trained for"):
        make(str(target), config(tmp_path))
    with pytest.raises(ConfigError, match=r"hub id .*; download the model"):
        make("org/name", config(tmp_path))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"store": "s"}, {}, True),
        ({}, {}, False),
        ({"store": "s", "strategies": ("ngram:8",)}, {}, False),
        ({"store": "s", "strategies": ("off", "eagle3:3x1x4")}, {}, True),
        ({"store": "s"}, {"speculative_draft_model_path": "d"}, False),
        ({"store": "s"}, {"speculative_algorithm": "NGRAM"}, False),
    ],
)
def test_when_a_seed_is_made(ours: dict[str, Any], theirs: dict[str, Any], expected: bool) -> None:
    assert grows(Config(**ours), Flags(**theirs)) == expected
