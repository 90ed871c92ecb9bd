"""Compilation of the CPU kernels and the views they work on.

Kernels take one-dimensional C-contiguous numpy arrays of fixed types, so each has one
explicit signature: it is compiled once, when first imported on a machine, and loaded from
numba's on-disk cache afterwards (beside the source, or in the user's cache directory where
the install is read-only). The cache follows changes of a kernel's own file only: after editing a
helper that kernels of other files use, touch those files.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

inline = functools.partial(numba.njit, nogil=True, error_model="numpy")
"""Decorator for helpers that only kernels call; typed at the kernel's compilation."""


def kernel(*signatures: str, fastmath: bool = False) -> Callable[[F], F]:
    """Decorator: compile for exactly these signatures, now, through the on-disk cache.

    `fastmath` lets sums be reordered into vector lanes. Where no directory is writable the kernel
    is compiled in memory, at every start.
    """

    def compile_(function: F) -> F:
        jit = functools.partial(inline, list(signatures), fastmath=fastmath)
        try:
            return cast(F, jit(cache=True)(function))
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return cast(F, jit()(function))

    return compile_


def indices(tensor: torch.Tensor) -> Array:
    """A flat int64 view of an input of any integer type; a copy only where it must be."""
    if tensor.dtype is not torch.int64:
        tensor = tensor.to(torch.int64)
    return tensor.contiguous().numpy().reshape(-1)


def flat(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> Array:
    """A flat view of a tensor that the kernel writes into; never a copy.

    Raises:
        TypeError: not a contiguous CPU tensor of ``dtype``, so writes would not arrive.
    """
    if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise TypeError(
            f"{name} is written in place and must be a contiguous {dtype} tensor on cpu,"
            f" not a {layout} {tensor.dtype} tensor on {tensor.device}"
        )
    return tensor.numpy().reshape(-1)


def check(bad_row: int, message: str) -> None:
    """Raise what a kernel found: it returns the first bad row of the batch, or -1."""
    if bad_row >= 0:
        raise IndexError(f"request {bad_row} of the batch: {message}")


__all__ = ["Array", "check", "flat", "indices", "inline", "kernel", "np"]
