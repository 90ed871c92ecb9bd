"""Row-wise kernels for CPU: RMSNorm, SiLU-and-multiply, rotary embedding.

Every result depends on its own row alone, never on how many rows share the call.

Shapes: T tokens, N hidden size, H query heads, K key/value heads, D head size, P positions,
S slots.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

import numpy as np
from llvmlite.ir import IRBuilder, Value

from tlt_sglang.cpu.kernels import emit
from tlt_sglang.cpu.kernels.compile import Array, inline, kernel

_LOG2E = np.float32(1.4426950408889634)
# Minimax polynomial of 2**f on [-0.5, 0.5]; its relative error is below one fp32 ulp.
_C0, _C1, _C2 = np.float32(1.0), np.float32(0.6931471805599453), np.float32(0.2402265069591007)
_C3, _C4 = np.float32(0.05550410866482158), np.float32(0.009618129107628477)
_C5, _C6 = np.float32(0.0013333558146428443), np.float32(0.00015403530393381608)
_MIN_EXPONENT, _MAX_EXPONENT = np.float32(-126.0), np.float32(127.0)


@kernel("void(float32[:, ::1], float32[::1], float32, float32[:, ::1])", fastmath=True)
def rms_norm(x: Array, weight: Array, eps: np.float32, out: Array) -> None:
    """Compute out[t] = x[t] / rms(x[t]) * weight; x, out [T, N], weight [N]."""
    size = x.shape[1]
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(size):
            total += x[t, i] * x[t, i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for i in range(size):
            out[t, i] = x[t, i] * scale * weight[i]


@kernel(
    "void(float32[:, ::1], float32[:, ::1], float32[::1], float32, float32[:, ::1])", fastmath=True
)
def add_rms_norm(x: Array, residual: Array, weight: Array, eps: np.float32, out: Array) -> None:
    """Add x to residual in place and write its RMSNorm to out. All [T, N]; `out` may be `x`."""
    size = x.shape[1]
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(size):
            s = x[t, i] + residual[t, i]
            residual[t, i] = s
            total += s * s
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for i in range(size):
            out[t, i] = residual[t, i] * scale * weight[i]


@inline(fastmath=True)
def silu_row(gate: Array, up: Array, out: Array, ints: Array) -> None:
    """Compute out = silu(gate) * up, all [N]; ints [N] is scratch memory.

    The exponential is a polynomial, which LLVM vectorises (numba would call libm's).
    """
    powers = ints.view(np.float32)
    for i in range(out.size):
        y = min(max(-gate[i] * _LOG2E, _MIN_EXPONENT), _MAX_EXPONENT)
        whole = np.floor(y + np.float32(0.5))
        f = y - whole
        ints[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        out[i] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    for i in range(out.size):
        out[i] = gate[i] / (np.float32(1.0) + out[i] * powers[i]) * up[i]


@inline(fastmath={"contract"})
def exp_block(x: Array, out: Array, ints: Array) -> None:
    """Compute out = exp(x), all [N] and x at most 0; ints [N] is scratch memory.

    What is less than 2 ** -126 becomes that.
    """
    powers = ints.view(np.float32)
    for i in range(out.size):
        y = max(x[i] * _LOG2E, _MIN_EXPONENT)
        whole = np.floor(y + np.float32(0.5))
        f = y - whole
        ints[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        out[i] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    for i in range(out.size):
        out[i] *= powers[i]


@kernel("void(float32[:, ::1], float32[:, ::1], int32[::1])", fastmath=True)
def silu_and_mul(x: Array, out: Array, ints: Array) -> None:
    """Compute out = silu(x[:, :N]) * x[:, N:]; x [T, 2N], out [T, N], ints [N] scratch memory."""
    size = out.shape[1]
    for t in range(x.shape[0]):
        silu_row(x[t, :size], x[t, size:], out[t], ints)


@inline(fastmath=True)
def _rotate(
    x: Array, weight: Array, eps: np.float32, angles: Array, half: int, scratch: Array, out: Array
) -> None:
    """Rotate one head x [D] into out [D], normalised by `weight` [D] unless that is empty."""
    size = x.shape[0]
    if weight.shape[0]:
        total = np.float32(0.0)
        for i in range(size):
            total += x[i] * x[i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for i in range(size):
            scratch[i] = x[i] * scale * weight[i]
    else:
        for i in range(size):
            scratch[i] = x[i]
    for i in range(half):
        out[i] = scratch[i] * angles[i] - scratch[half + i] * angles[half + i]
    for i in range(half):
        out[half + i] = scratch[half + i] * angles[i] + scratch[i] * angles[half + i]
    for i in range(2 * half, size):
        out[i] = scratch[i]


def _generate_prefetch(b: IRBuilder, address: Value) -> None:
    emit.prefetch(b, address, emit.CACHE_LINE, writing=True)


_prefetch_line = emit.function(_generate_prefetch)


@inline()
def _prefetch_row(row: Array) -> None:
    """Prefetch a row [K, D] that is about to be written."""
    for offset in range(0, row.size * 4, emit.CACHE_LINE):
        _prefetch_line((row.ctypes.data + offset,))


@kernel(
    "void(float32[:, ::1], int64[::1], float32[:, ::1], float32[::1], float32[::1], float32,"
    " int64[::1], float32[:, :, ::1], float32[:, :, ::1], float32[:, :, ::1])"
)
def rope_and_store(
    qkv: Array,
    positions: Array,
    table: Array,
    qnorm: Array,
    knorm: Array,
    eps: np.float32,
    loc: Array,
    q: Array,
    keys: Array,
    values: Array,
) -> None:
    """Rotate queries and keys of the fused projection, and write keys and values to the pool.

    The rotary embedding pairs halves (NeoX). qkv [T, (H + 2K) * D]; positions, loc [T];
    table [P, rotary] has cosines in its first half and sines in its second; qnorm, knorm are [D],
    or empty for a model that does not normalise heads. q [T, H, D] and the slots `loc` of keys,
    values [S, K, D] are written. The slots are scattered over the pool, so all of them are
    prefetched before the queries are rotated.
    """
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = keys.shape[1]
    half = table.shape[1] // 2
    scratch = np.empty(dim, np.float32)
    for slot in loc:
        _prefetch_row(keys[slot])
        _prefetch_row(values[slot])
    for t in range(qkv.shape[0]):
        angles, row = table[positions[t]], qkv[t]
        for h in range(heads):
            _rotate(row[h * dim : (h + 1) * dim], qnorm, eps, angles, half, scratch, q[t, h])
    for t in range(qkv.shape[0]):
        angles, row, slot = table[positions[t]], qkv[t], loc[t]
        base = heads * dim
        for h in range(kv_heads):
            head = row[base + h * dim : base + (h + 1) * dim]
            _rotate(head, knorm, eps, angles, half, scratch, keys[slot, h])
        base += kv_heads * dim
        for h in range(kv_heads):
            for i in range(dim):
                values[slot, h, i] = row[base + h * dim + i]


@kernel("void(float32[:, ::1], int64, int64[::1], float32[:, ::1], float32[:, ::1])", fastmath=True)
def rope(x: Array, dim: int, positions: Array, table: Array, out: Array) -> None:
    """Rotate every head of x [T, H * D] into out; `dim` is D, the table as in `rope_and_store`."""
    half = table.shape[1] // 2
    for t in range(positions.shape[0]):
        angles = table[positions[t]]
        for base in range(0, x.shape[1], dim):
            for i in range(half):
                out[t, base + i] = (
                    x[t, base + i] * angles[i] - x[t, base + half + i] * angles[half + i]
                )
            for i in range(half):
                out[t, base + half + i] = (
                    x[t, base + half + i] * angles[i] + x[t, base + i] * angles[half + i]
                )
            for i in range(base + 2 * half, base + dim):
                out[t, i] = x[t, i]
