"""What a drafter's checkpoint holds: what is trained of it, and what it was made for.

The engine and the sidecar both look at the same folder and come to the same description, so that a
published version fits or is refused. Reads config.json and the header of model.safetensors.
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
    """The name of a checkpoint's tensor as it is published; None for what is never trained."""
    name = name.removeprefix("model.")
    if name in ("lm_head.weight", "embed_tokens.weight", "d2t", "t2d"):
        return None
    return name.replace(_LEGACY, _LAYER)


def load(folder: Path) -> dict[str, Tensor]:
    """What is trained of a checkpoint, by published name. Raises ConfigError."""
    return _trained(_tensors(folder))


def draft_ids(folder: Path, vocab_size: int) -> Tensor:
    """[D] int64: the target's id of each of the drafter's tokens. Raises ConfigError."""
    return _draft_ids(_tensors(folder), vocab_size)


def _trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        published: tensor
        for name, tensor in tensors.items()
        if (published := trained(name)) is not None
    }


def _draft_ids(tensors: Mapping[str, Tensor], vocab_size: int) -> Tensor:
    import torch

    ahead = tensors.get("d2t")
    if ahead is None:
        return torch.arange(vocab_size)
    return ahead.long() + torch.arange(len(ahead))


def expected(folder: Path, target: Mapping[str, Any], dtype: str) -> Expected:
    """Of the drafter in `folder`, which runs in `dtype` (F32, BF16, F16), for a target's config.

    Raises ConfigError where the folder holds none that can be swapped.
    """
    config = checkpoint.read_config(str(folder), "drafter")
    if config is None:
        raise ConfigError(
            f"The drafter {folder} is no folder, so its weights cannot be swapped; give "
            "--speculative-draft-model-path a local checkpoint, or leave --tlt-store out."
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
            f"The drafter {folder} has no {WEIGHTS} that can be read, so its weights cannot be "
            "swapped; give a checkpoint with one, or leave --tlt-store out."
        ) from error


def target_config(path: str) -> dict[str, Any]:
    """The language model's part of a local target's config.json. Raises ConfigError."""
    config = checkpoint.read_config(path, "model")
    if config is None:
        raise ConfigError(
            f"The target {path} is no folder; download it and give --model the folder, or leave "
            "--tlt-store out."
        )
    return checkpoint.text_part(config)


def target_tensor(path: str, name: str) -> Tensor | None:
    """One tensor of a local checkpoint, in its own dtype; None where there is none of the name."""
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
        found: Tensor | None = stored.get_tensor(name) if name in stored.keys() else None  # noqa: SIM118
    return found


def layer(path: str, number: int) -> dict[str, Tensor]:
    """The tensors of one layer of a local checkpoint, named as within the layer."""
    from safetensors import safe_open

    folder, prefix = Path(path), f"model.layers.{number}."
    index = folder / "model.safetensors.index.json"
    names: set[str] = {WEIGHTS}
    if index.exists():
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = {file for name, file in where.items() if name.startswith(prefix)}
    found = {}
    for file in sorted(names):
        with safe_open(folder / file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = stored.get_tensor(name)
    return found


def embedding_and_head(path: str) -> tuple[Tensor, Tensor]:
    """Of a local target, each [V, N]; one tensor where they are tied. Raises ConfigError."""
    embedding = target_tensor(path, "model.embed_tokens.weight")
    if embedding is None:
        raise ConfigError(f"The target {path} has no embedding that a drafter could share.")
    head = target_tensor(path, "lm_head.weight")
    return embedding, embedding if head is None else head
