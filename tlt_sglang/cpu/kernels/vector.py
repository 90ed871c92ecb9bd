"""Row-wise vector kernels for CPU: exp, RMSNorm, SiLU-and-multiply, rotary embedding.

Every result depends on its own row alone, never on how many rows share the call. The exponential is
a polynomial so that LLVM vectorises it (numba without SVML calls the scalar libm).

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_LOG2E = np.float32(1.4426950408889634)
# Minimax polynomial of 2**f on [-0.5, 0.5], relative error below 3e-8 (one fp32 ulp).
_C0 = np.float32(1.0)
_C1 = np.float32(0.6931471805599453)
_C2 = np.float32(0.2402265069591007)
_C3 = np.float32(0.05550410866482158)
_C4 = np.float32(0.009618129107628477)
_C5 = np.float32(0.0013333558146428443)
_C6 = np.float32(0.00015403530393381608)
_MIN_EXPONENT = np.float32(-126.0)
_MAX_EXPONENT = np.float32(127.0)


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def exp_block(x, n, shift, ints):
    """In place x[:n] = exp(x[:n] - shift) and the sum of it; `ints` [>= n] int32 is scratch.

    Arguments below -87 give the smallest normal number rather than zero.
    """
    powers = ints.view(np.float32)
    for j in range(n):
        y = (x[j] - shift) * _LOG2E
        y = min(max(y, _MIN_EXPONENT), _MAX_EXPONENT)
        whole = np.floor(y + np.float32(0.5))
        f = y - whole
        ints[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        x[j] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    total = np.float32(0.0)
    for j in range(n):
        x[j] *= powers[j]
        total += x[j]
    return total


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def rms_norm(x, weight, eps, out):
    """out[t] = x[t] / rms(x[t]) * weight; x, out [T, N], weight [N]."""
    size = x.shape[1]
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(size):
            total += x[t, i] * x[t, i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for i in range(size):
            out[t, i] = x[t, i] * scale * weight[i]


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def add_rms_norm(x, residual, weight, eps, out, residual_out):
    """residual_out = x + residual; out = its RMSNorm. All [T, N]; outputs may not alias inputs."""
    size = x.shape[1]
    for t in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(size):
            s = x[t, i] + residual[t, i]
            residual_out[t, i] = s
            total += s * s
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for i in range(size):
            out[t, i] = residual_out[t, i] * scale * weight[i]


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def silu_and_mul(x, out, ints):
    """out = silu(x[:, :N]) * x[:, N:]; x [T, 2N], out [T, N], ints [N] int32 scratch."""
    size = out.shape[1]
    powers = ints.view(np.float32)
    for t in range(x.shape[0]):
        for i in range(size):
            y = -x[t, i] * _LOG2E
            y = min(max(y, _MIN_EXPONENT), _MAX_EXPONENT)
            whole = np.floor(y + np.float32(0.5))
            f = y - whole
            ints[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
            out[t, i] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
        for i in range(size):
            out[t, i] = x[t, i] / (np.float32(1.0) + out[t, i] * powers[i]) * x[t, size + i]


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def rope_neox(q, k, positions, table):
    """Rotary embedding in place, halves paired (NeoX); q [T, H, D], k [T, K, D].

    table [P, rotary]: cosines in its first half, sines in its second; only the first `rotary`
    of the D elements turn.
    """
    half = table.shape[1] // 2
    for t in range(positions.shape[0]):
        turn = table[positions[t]]
        for h in range(q.shape[1]):
            for i in range(half):
                a = q[t, h, i]
                b = q[t, h, half + i]
                q[t, h, i] = a * turn[i] - b * turn[half + i]
                q[t, h, half + i] = b * turn[i] + a * turn[half + i]
        for h in range(k.shape[1]):
            for i in range(half):
                a = k[t, h, i]
                b = k[t, h, half + i]
                k[t, h, i] = a * turn[i] - b * turn[half + i]
                k[t, h, half + i] = b * turn[i] + a * turn[half + i]


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _turn(x, weight, eps, turn, half, scratch, out):
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


@njit(cache=True, nogil=True)
def rope_and_store(qkv, positions, table, qnorm, knorm, eps, loc, q, kbuf, vbuf):
    """From the fused projection to attention: turn queries and keys, write keys and values.

    qkv [T, (H + 2K) * D]; positions, loc [T]; table as in `rope_neox`; qnorm, knorm [D] or empty;
    q [T, H, D] and slots loc of kbuf, vbuf [S, K, D] are written.
    """
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = kbuf.shape[1]
    half = table.shape[1] // 2
    scratch = np.empty(dim, np.float32)
    for t in range(qkv.shape[0]):
        turn = table[positions[t]]
        row = qkv[t]
        slot = loc[t]
        for h in range(heads):
            _turn(row[h * dim : (h + 1) * dim], qnorm, eps, turn, half, scratch, q[t, h])
        base = heads * dim
        for h in range(kv_heads):
            head = row[base + h * dim : base + (h + 1) * dim]
            _turn(head, knorm, eps, turn, half, scratch, kbuf[slot, h])
        base += kv_heads * dim
        for h in range(kv_heads):
            for i in range(dim):
                vbuf[slot, h, i] = row[base + h * dim + i]
