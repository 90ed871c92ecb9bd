"""MurmurHash3 over (seed, position, column), the source of seeded uniform samples.

Runs in the scheduler process. Knows nothing of SGLang.
"""

import numpy as np
import torch

from tlt_sglang.cpu.kernels.compile import Array, inline, kernel

_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_C1, _C2 = np.uint32(0xCC9E2D51), np.uint32(0x1B873593)
_FIVE, _ADD = np.uint32(5), np.uint32(0xE6546B64)
_F1, _F2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_13, _15, _16, _17, _19 = (np.uint32(s) for s in (13, 15, 16, 17, 19))


@inline()
def _mix(state: np.uint32, block: np.uint32) -> np.uint32:
    # 32 bits throughout, so that LLVM takes vectors of them.
    block = np.uint32(block * _C1)
    block = np.uint32((block << _15) | (block >> _17))
    state = np.uint32(state ^ np.uint32(block * _C2))
    state = np.uint32((state << _13) | (state >> _19))
    return np.uint32(np.uint32(state * _FIVE) + _ADD)


@inline()
def hash_row(seed: np.uint64, position: np.uint64) -> np.uint32:
    """Return the state of the hash after a row's seed and position."""
    state = _mix(np.uint32(0), np.uint32(seed & _LOW))
    state = _mix(state, np.uint32(seed >> _32))
    return np.uint32(_mix(state, np.uint32(position & _LOW)))


@inline()
def hash_column(row: np.uint32, column: np.uint32) -> np.uint32:
    """Return the hash of a row's state and a column."""
    h = np.uint32(_mix(row, column) ^ _16)
    h = np.uint32(np.uint32(h ^ (h >> _16)) * _F1)
    h = np.uint32(np.uint32(h ^ (h >> _13)) * _F2)
    return np.uint32(h ^ (h >> _16))


@kernel("void(uint64[::1], uint64[::1], uint32[::1], uint32[:, ::1])")
def _hash(seeds: Array, positions: Array, columns: Array, out: Array) -> None:
    for i in range(seeds.size):
        row = hash_row(seeds[i], positions[i])
        for j in range(columns.size):
            out[i, j] = hash_column(row, columns[j])


def _blocks(tensor: torch.Tensor) -> Array:
    return np.ascontiguousarray(tensor.numpy()).astype(np.uint64, copy=False)


def murmur_hash32_cpu(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """Hash every pair of a row's (seed, position) and a column, bit for bit as on CUDA.

    Args:
        seed: ``[n]``, taken as 64 bits.
        positions: ``[n]``, low 32 bits.
        col_indices: ``[m]``, low 32 bits.

    Returns:
        ``[n, m]`` uint32.
    """
    out = torch.empty((seed.shape[0], col_indices.shape[0]), dtype=torch.uint32)
    _hash(_blocks(seed), _blocks(positions), _blocks(col_indices).astype(np.uint32), out.numpy())
    return out
