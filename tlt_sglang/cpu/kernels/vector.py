"""Row-wise kernels for CPU: RMSNorm, SiLU-and-multiply, rotary embedding.

Every result depends on its own row alone, never on how many rows share the call.

Shapes: T tokens, N hidden size, H query heads, K key/value heads, D head size, P positions,
S slots.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tlt_sglang.cpu.kernels import emit
from tlt_sglang.cpu.kernels.compile import Array, inline, kernel

_LOG2E = np.float32(1.4426950408889634)
# Minimax polynomial of 2**f on [-0.5, 0.5]; its relative error is below one fp32 ulp.
_C0, _C1, _C2 = np.float32(1.0), np.float32(0.6931471805599453), np.float32(0.2402265069591007)
_C3, _C4 = np.float32(0.05550410866482158), np.float32(0.009618129107628477)
_C5, _C6 = np.float32(0.0013333558146428443), np.float32(0.00015403530393381608)
_LEAST, _MOST = np.float32(-126.0), np.float32(127.0)


@kernel("void(float32[:, ::1], float32[::1], float32, float32[:, ::1])", fastmath=True)
def rms_norm(x: Array, weight: Array, eps: Any, out: Array) -> None:
    """out[t] = x[t] / rms(x[t]) * weight; x, out [T, N], weight [N]."""
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
def add_rms_norm(x: Array, residual: Array, weight: Array, eps: Any, out: Array) -> None:
    """residual += x, in place; out = its RMSNorm. All [T, N]; `out` may be `x`."""
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
    """out = silu(gate) * up, all [N]; ints [N] scratch.

    The exponential is a polynomial, which LLVM vectorises (numba would call libm's).
    """
    powers = ints.view(np.float32)
    for i in range(out.size):
        y = min(max(-gate[i] * _LOG2E, _LEAST), _MOST)
        whole = np.floor(y + np.float32(0.5))
        f = y - whole
        ints[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        out[i] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    for i in range(out.size):
        out[i] = gate[i] / (np.float32(1.0) + out[i] * powers[i]) * up[i]


@kernel("void(float32[:, ::1], float32[:, ::1], int32[::1])", fastmath=True)
def silu_and_mul(x: Array, out: Array, ints: Array) -> None:
    """out = silu(x[:, :N]) * x[:, N:]; x [T, 2N], out [T, N], ints [N] scratch."""
    size = out.shape[1]
    for t in range(x.shape[0]):
        silu_row(x[t, :size], x[t, size:], out[t], ints)


@inline(fastmath=True)
def _turn(
    x: Array, weight: Array, eps: Any, turn: Array, half: int, scratch: Array, out: Array
) -> None:
    """One head: x [D], normalised by `weight` [D] unless that is empty, turned, into out [D]."""
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
        out[i] = scratch[i] * turn[i] - scratch[half + i] * turn[half + i]
    for i in range(half):
        out[half + i] = scratch[half + i] * turn[i] + scratch[i] * turn[half + i]
    for i in range(2 * half, size):
        out[i] = scratch[i]


def _generate_line(b: Any, address: Any) -> None:
    emit.prefetch(b, address, emit.CACHE_LINE, writing=True)


_will_write = emit.function(_generate_line)


@inline()
def _will_write_row(row: Array) -> None:
    """Ask the memory for a row [K, D] that is about to be written."""
    for place in range(0, row.size * 4, emit.CACHE_LINE):
        _will_write((row.ctypes.data + place,))


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
    eps: Any,
    loc: Array,
    q: Array,
    keys: Array,
    values: Array,
) -> None:
    """From the fused projection to attention: turn queries and keys, write keys and values.

    Rotary embedding with paired halves (NeoX). qkv [T, (H + 2K) * D]; positions, loc [T];
    table [P, rotary], cosines in its first half and sines in its second; qnorm, knorm [D], or empty
    where the model does not normalise heads; q [T, H, D] and the slots loc of keys, values
    [S, K, D] are written. Those lie here and there in the pool, so the memory is asked for all of
    them before the queries are turned.
    """
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = keys.shape[1]
    half = table.shape[1] // 2
    scratch = np.empty(dim, np.float32)
    for slot in loc:
        _will_write_row(keys[slot])
        _will_write_row(values[slot])
    for t in range(qkv.shape[0]):
        turn, row = table[positions[t]], qkv[t]
        for h in range(heads):
            _turn(row[h * dim : (h + 1) * dim], qnorm, eps, turn, half, scratch, q[t, h])
    for t in range(qkv.shape[0]):
        turn, row, slot = table[positions[t]], qkv[t], loc[t]
        base = heads * dim
        for h in range(kv_heads):
            head = row[base + h * dim : base + (h + 1) * dim]
            _turn(head, knorm, eps, turn, half, scratch, keys[slot, h])
        base += kv_heads * dim
        for h in range(kv_heads):
            for i in range(dim):
                values[slot, h, i] = row[base + h * dim + i]


@kernel("void(float32[:, ::1], int64, int64[::1], float32[:, ::1], float32[:, ::1])", fastmath=True)
def rope(x: Array, dim: int, positions: Array, table: Array, out: Array) -> None:
    """Rotary embedding of every head of x [T, H * D] (`dim` = D), into out; table as above."""
    half = table.shape[1] // 2
    for t in range(positions.shape[0]):
        turn = table[positions[t]]
        for base in range(0, x.shape[1], dim):
            for i in range(half):
                out[t, base + i] = x[t, base + i] * turn[i] - x[t, base + half + i] * turn[half + i]
            for i in range(half):
                out[t, base + half + i] = (
                    x[t, base + half + i] * turn[i] + x[t, base + i] * turn[half + i]
                )
            for i in range(base + 2 * half, base + dim):
                out[t, i] = x[t, i]
