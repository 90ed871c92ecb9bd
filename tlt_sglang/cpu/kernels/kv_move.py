"""Copies of KV-cache rows between slots of the same pool, in every layer at once.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from tlt_sglang.cpu.kernels.compile import Array, flat, indices, inline, kernel


@intrinsic
def _pointer(_context: object, address: object) -> Any:
    def codegen(_context: object, builder: ir.IRBuilder, _signature: object, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@inline()
def _copy(source: int, target: int, width: int) -> None:
    """Copy `width` bytes from one address to another, by words where they are aligned."""
    if (source | target | width) & 7 == 0:
        words = carray(_pointer(source), width // 8, np.int64)
        to_words = carray(_pointer(target), width // 8, np.int64)
        for i in range(width // 8):
            to_words[i] = words[i]
        return
    octets = carray(_pointer(source), width, np.uint8)
    to_octets = carray(_pointer(target), width, np.uint8)
    for i in range(width):
        to_octets[i] = octets[i]


@kernel("void(int64[::1], int64[::1], int64[::1], int64[::1])")
def _move(addresses: Array, strides: Array, target: Array, source: Array) -> None:
    # Pairs of a source and a target that differ.
    moved, count = np.empty((2, target.size), np.int64), 0
    for i in range(target.size):
        if target[i] != source[i]:
            moved[0, count], moved[1, count] = source[i], target[i]
            count += 1
    widest = 0
    for layer in range(addresses.size):
        widest = max(widest, strides[layer])
    # All rows are read before any is written: a target may be another pair's source.
    staged = np.empty(count * widest, np.uint8)
    for layer in range(addresses.size):
        base, width = addresses[layer], strides[layer]
        for i in range(count):
            _copy(base + moved[0, i] * width, staged.ctypes.data + i * width, width)
        for i in range(count):
            _copy(staged.ctypes.data + i * width, base + moved[1, i] * width, width)


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy row ``src_loc[i]`` to row ``tgt_loc[i]`` in each buffer, as if all at once.

    Args:
        data_ptrs: ``[buffers]`` uint64, addresses of the buffers, which are written.
        strides: ``[buffers]``, bytes from one row to the next.
        tgt_loc: ``[count]``, rows to write.
        src_loc: ``[count]``, rows to read.
    """
    if tgt_loc.shape != src_loc.shape:
        raise ValueError(
            f"There are {tgt_loc.numel()} target slots and {src_loc.numel()} source slots."
        )
    _move(
        flat(data_ptrs, torch.uint64, "data_ptrs").view(np.int64),
        indices(strides),
        indices(tgt_loc),
        indices(src_loc),
    )
