"""MurmurHash3 over (seed, position, column), the source of seeded uniform samples.

Runs in the scheduler process. Knows nothing of SGLang.
"""

import numpy as np
import torch

from tlt_sglang.cpu.kernels.compile import Array, inline, kernel

_LOW = np.uint64(0xFFFFFFFF)
_C1, _C2 = np.uint64(0xCC9E2D51), np.uint64(0x1B873593)
_FIVE, _ADD = np.uint64(5), np.uint64(0xE6546B64)
_F1, _F2 = np.uint64(0x85EBCA6B), np.uint64(0xC2B2AE35)
_13, _15, _16, _17, _19, _32 = (np.uint64(s) for s in (13, 15, 16, 17, 19, 32))


@inline()
def _mix(state: np.uint64, block: np.uint64) -> np.uint64:
    block = (block * _C1) & _LOW
    block = ((block << _15) | (block >> _17)) & _LOW
    state ^= (block * _C2) & _LOW
    state = ((state << _13) | (state >> _19)) & _LOW
    return (state * _FIVE + _ADD) & _LOW


@kernel("void(uint64[::1], uint64[::1], uint64[::1], uint32[:, ::1])")
def _hash(seeds: Array, positions: Array, columns: Array, out: Array) -> None:
    for i in range(seeds.size):
        row = _mix(np.uint64(0), seeds[i] & _LOW)
        row = _mix(row, seeds[i] >> _32)
        row = _mix(row, positions[i] & _LOW)
        for j in range(columns.size):
            h = _mix(row, columns[j] & _LOW) ^ _16
            h ^= h >> _16
            h = (h * _F1) & _LOW
            h ^= h >> _13
            h = (h * _F2) & _LOW
            out[i, j] = h ^ (h >> _16)


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
    _hash(_blocks(seed), _blocks(positions), _blocks(col_indices), out.numpy())
    return out
