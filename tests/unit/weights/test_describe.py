"""A drafter's own head, and the sidecar's view of it and of the target's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.sidecar.target import TargetFollower
from tlt_sglang.weights import describe

IDS = torch.tensor([1, 3, 4])
VOCAB, SIZE = 6, 4


def save_drafter(folder: Path, head: torch.Tensor | None, draft_vocab_size: int | None) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": draft_vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"fc.weight": torch.zeros(2, 2)} | ({} if head is None else {"lm_head.weight": head})
    save_file(tensors, folder / describe.WEIGHTS)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    head = torch.arange(VOCAB * SIZE).view(VOCAB, SIZE).float()
    save_file({"model.embed_tokens.weight": head}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_head_of_its_own_stays(tmp_path: Path, target: Path, shift: float) -> None:
    """As in the engine: also where the target is not the one that the drafter was made for."""
    rows = torch.arange(VOCAB * SIZE).view(VOCAB, SIZE)[IDS].float()
    drafter = save_drafter(tmp_path / "drafter", rows.bfloat16() + shift, len(IDS))
    own = describe.own_head(drafter)
    follower = TargetFollower(IDS, own, VOCAB, torch.device("cpu"))
    frozen = follower.load(Announcement("log", "cpu", str(target), str(drafter), seed=False))
    assert torch.equal(frozen.target_head, rows) and torch.equal(frozen.head, rows + shift)
    assert (frozen.head is frozen.target_head) == (shift == 0)


@pytest.mark.parametrize(("has_head", "draft_vocab_size"), [(True, None), (False, 3)])
def test_without_one_it_has_the_targets(
    tmp_path: Path, has_head: bool, draft_vocab_size: int | None
) -> None:
    head = torch.ones(3, SIZE) if has_head else None
    assert describe.own_head(save_drafter(tmp_path / "drafter", head, draft_vocab_size)) is None
