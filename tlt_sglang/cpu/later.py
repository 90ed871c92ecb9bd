"""Kernels by name, loaded at their first call.

Runs in every process of SGLang, because each imports `sgl_kernel`, and with it our stand-in. Only
the scheduler calls the kernels; the other processes are spared the second that loading them takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def kernel(name: str) -> Callable[..., Any]:
    """Return a function that calls `name` of `tlt_sglang.cpu.kernels`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        from tlt_sglang.cpu import kernels

        return getattr(kernels, name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


def unfiltered(probs: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Return `probs`: the sampling kernel applies all filters of a batch at once."""
    return probs


def verify(**arguments: Any) -> None:
    """Verify a tree against the target's probabilities, with the filters of the batch."""
    from tlt_sglang.cpu import sampling

    sampling.verify(**arguments)


def register_murmur_hash() -> None:
    """Define ``torch.ops.sgl_kernel.murmur_hash32_cpu``, which SGLang calls on CPU; idempotent."""
    import torch

    if hasattr(torch.ops.sgl_kernel, "murmur_hash32_cpu"):
        return
    _library().define(
        "murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor"
    )
    _library().impl("murmur_hash32_cpu", kernel("murmur_hash32_cpu"), "CPU")
    _library().impl("murmur_hash32_cpu", _shape_of_hash, "Meta")


def _shape_of_hash(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    import torch

    return seed.new_empty((seed.shape[0], col_indices.shape[0]), dtype=torch.uint32)


@functools.cache
def _library() -> Any:
    """Return the operator library; cached, because its operators vanish with it."""
    import torch

    return torch.library.Library("sgl_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
