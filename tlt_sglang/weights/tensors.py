"""Conversion of weights to bytes and back, with all checks. Imports torch when it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tlt_sglang.weights.manifest import (
    BadManifest,
    Damaged,
    Expected,
    Manifest,
    NotFinite,
    Spec,
    Truncated,
)

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {f"torch.{name}": short for short, name in DTYPES.items()}


def specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Return the shape and dtype of each tensor."""
    return {n: Spec(_NAMES[str(t.dtype)], tuple(t.shape)) for n, t in tensors.items()}


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file; tensors may be on any device, transposed, and share memory."""
    from safetensors.torch import save

    return save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    )


def from_bytes(data: bytes, manifest: Manifest, expected: Expected) -> dict[str, Tensor]:
    """Return the tensors in the dtypes of `expected`, after every check. Raises a BadVersion."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest.check(expected)
    version = manifest.version
    if len(data) != manifest.size:
        raise Truncated(version, f"its weights have {len(data)} bytes, not {manifest.size}")
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise Damaged(version, "the checksum of its weights is not that of its manifest")
    try:
        loaded = load(data)
        actual = specs(loaded)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise Damaged(version, "its weights are not a safetensors file") from error
    for name in sorted(actual.keys() | manifest.tensors.keys()):
        if actual.get(name) != manifest.tensors.get(name):
            raise BadManifest(version, f"its manifest is wrong about {name}")
    for name, tensor in loaded.items():
        loaded[name] = tensor.to(getattr(torch, DTYPES[expected.tensors[name].dtype]))
        if not bool(torch.isfinite(loaded[name]).all()):
            raise NotFinite(version, f"{name} holds NaN or infinity", "train on from its parent")
    return loaded
