"""Compilation of the CPU kernels and the views that they work on. Runs in the scheduler process.

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
"""Decorate a helper that only kernels call; it is typed when the kernel is compiled."""


def kernel(*signatures: str, fastmath: bool = False) -> Callable[[F], F]:
    """Compile the decorated function for exactly these signatures, now, through the on-disk cache.

    `fastmath` allows sums to be reordered into vector lanes. Where no directory is writable the
    kernel is compiled in memory, at every start.
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
    """Return a flat int64 view of an integer input; a copy only where a view is impossible."""
    if tensor.dtype is not torch.int64:
        tensor = tensor.to(torch.int64)
    return tensor.contiguous().numpy().reshape(-1)


def flat(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> Array:
    """Return a flat view of a tensor that the kernel writes; never a copy.

    Raises:
        TypeError: the tensor is not a contiguous CPU tensor of ``dtype``, which could not be
            written in place.
    """
    if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise TypeError(
            f"{name} is written in place and must be a contiguous {dtype} tensor on cpu,"
            f" not a {layout} {tensor.dtype} tensor on {tensor.device}"
        )
    return tensor.numpy().reshape(-1)


def check(bad_row: int, message: str) -> None:
    """Raise IndexError for the first bad row of the batch that a kernel has returned, unless -1."""
    if bad_row >= 0:
        raise IndexError(f"request {bad_row} of the batch: {message}")


__all__ = ["Array", "check", "flat", "indices", "inline", "kernel", "np"]
