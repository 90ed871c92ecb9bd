"""Descriptions of a drafter's checkpoint: its trained weights, and the target it is made for.

The engine and the sidecar describe the same folder independently and come to the same result, so
that a published version fits or is refused. Reads config.json and the header of model.safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_sglang.errors import ConfigError
from tlt_sglang.models import drafter_checkpoint as checkpoint
from tlt_sglang.weights.manifest import Base, Expected, Spec

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
_LEGACY = "midlayer."
_LAYER = "layers.0."


def trained(name: str) -> str | None:
    """Return the published name of a checkpoint's tensor; None for one that is never trained."""
    name = name.removeprefix("model.")
    if name in ("lm_head.weight", "embed_tokens.weight", "d2t", "t2d"):
        return None
    return name.replace(_LEGACY, _LAYER)


def load(folder: Path) -> dict[str, Tensor]:
    """Load the trained weights of a checkpoint, by published name. Raises ConfigError."""
    return _trained(_tensors(folder))


def draft_ids(folder: Path, vocab_size: int) -> Tensor:
    """Return the target's id of each of the drafter's tokens, [D] int64. Raises ConfigError."""
    return _draft_ids(_tensors(folder), vocab_size)


def own_head(folder: Path) -> Tensor | None:
    """Return the head [D, N] that an EAGLE-3 drafter's checkpoint has, which no version replaces.

    None where SGLang gives it the target's: without a vocabulary of its own. Raises ConfigError.
    """
    config = checkpoint.read_config(str(folder), "drafter") or {}
    if config.get("draft_vocab_size") is None:
        return None
    return _tensors(folder).get("lm_head.weight")


def _trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        published: tensor
        for name, tensor in tensors.items()
        if (published := trained(name)) is not None
    }


def _draft_ids(tensors: Mapping[str, Tensor], vocab_size: int) -> Tensor:
    import torch

    offsets = tensors.get("d2t")
    if offsets is None:
        return torch.arange(vocab_size)
    return offsets.long() + torch.arange(len(offsets))


def expected(folder: Path, target: Mapping[str, Any], dtype: str) -> Expected:
    """Describe the drafter in `folder`, running in `dtype` (F32, BF16, F16), for a target's config.

    Raises ConfigError where the folder holds no drafter that can be swapped.
    """
    config = checkpoint.read_config(str(folder), "drafter")
    if config is None:
        raise ConfigError(
            f"The drafter {folder} is not a local folder, so its weights cannot be swapped; set "
            "--speculative-draft-model-path to a local checkpoint, or leave --tlt-store out."
        )
    tensors = _tensors(folder)
    ids = _draft_ids(tensors, target["vocab_size"])
    base = Base(
        target["hidden_size"],
        target["vocab_size"],
        len(ids),
        target["num_hidden_layers"],
        hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
    )
    kind = checkpoint.drafter_kind(config, str(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in _trained(tensors).items()}
    return Expected(kind, base, {name: Spec(dtype, shape) for name, shape in shapes.items()})


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"The drafter {folder} has no readable {WEIGHTS}, so its weights cannot be swapped; "
            "use a checkpoint with one, or leave --tlt-store out."
        ) from error


def target_config(path: str) -> dict[str, Any]:
    """Return the language model's part of a local target's config.json. Raises ConfigError."""
    config = checkpoint.read_config(path, "model")
    if config is None:
        raise ConfigError(
            f"The target {path} is not a local folder; download it and set --model to its folder, "
            "or leave --tlt-store out."
        )
    return checkpoint.text_part(config)


def target_tensor(path: str, name: str) -> Tensor | None:
    """Return a tensor of a local checkpoint in its own dtype; None where it has no such name."""
    from safetensors import safe_open

    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    file = folder / WEIGHTS
    if index.exists():
        where = json.loads(index.read_text())["weight_map"].get(name)
        if where is None:
            return None
        file = folder / where
    with safe_open(file, "pt") as stored:
        exists = name in stored.keys()  # noqa: SIM118
        tensor: Tensor | None = stored.get_tensor(name) if exists else None
    return tensor


def layer(path: str, number: int) -> dict[str, Tensor]:
    """Return the tensors of one layer of a local checkpoint, named as within the layer."""
    from safetensors import safe_open

    folder, prefix = Path(path), f"model.layers.{number}."
    index = folder / "model.safetensors.index.json"
    names: set[str] = {WEIGHTS}
    if index.exists():
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = {file for name, file in where.items() if name.startswith(prefix)}
    tensors = {}
    for file in sorted(names):
        with safe_open(folder / file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    tensors[name.removeprefix(prefix)] = stored.get_tensor(name)
    return tensors


def embedding_and_head(path: str) -> tuple[Tensor, Tensor]:
    """Return a local target's embedding and head, each [V, N]; one tensor where they are tied.

    Raises ConfigError.
    """
    embedding = target_tensor(path, "model.embed_tokens.weight")
    if embedding is None:
        raise ConfigError(
            f"The target {path} has no model.embed_tokens.weight, which a drafter shares; use a "
            "target with Llama's names."
        )
    head = target_tensor(path, "lm_head.weight")
    return embedding, embedding if head is None else head
