"""Paged attention for CPU: one query at a time, the same arithmetic in every mode.

Decode, extend, target-verify (chain and tree) and draft steps differ only in which KV slots a
query sees. Each of them writes, for every query, the list of those slots in position order, and one
function attends over such a list. A token's attention output is therefore bitwise the same
whether it was decoded alone, verified inside a tree, or prefilled: what makes greedy output under
speculation identical to greedy output without it.

Shapes, here and in `reference.py`: T queries, S KV slots, H query heads, K key/value heads
(H = K * G), D head size, R rows of the request table, C its columns.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from tlt_sglang.cpu.kernels.vector import exp_block

LOG2E = np.float32(math.log2(math.e))


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _attend(q, kbuf, vbuf, slots, n, scale, out, scores, ints):
    """Attention of one query over `n` slots.

    q [H, D], kbuf and vbuf [S, K, D], slots [>= n], out [H, D] (written); scores [G, >= n] and
    ints [>= n] are scratch.
    """
    heads, dim = q.shape
    kv_heads = kbuf.shape[1]
    group = heads // kv_heads
    for kv in range(kv_heads):
        for j in range(n):
            slot = slots[j]
            for g in range(group):
                acc = np.float32(0.0)
                for d in range(dim):
                    acc += q[kv * group + g, d] * kbuf[slot, kv, d]
                scores[g, j] = acc * scale
        for g in range(group):
            top = scores[g, 0]
            for j in range(1, n):
                top = max(top, scores[g, j])
            total = exp_block(scores[g], n, top, ints)
            inverse = np.float32(1.0) / total
            for j in range(n):
                scores[g, j] *= inverse
            for d in range(dim):
                out[kv * group + g, d] = np.float32(0.0)
        for j in range(n):
            slot = slots[j]
            for g in range(group):
                p = scores[g, j]
                for d in range(dim):
                    out[kv * group + g, d] += p * vbuf[slot, kv, d]


@njit(cache=True, nogil=True)
def store_kv(k, v, loc, kbuf, vbuf):
    """Write new keys and values: k, v [T, K, D] to slots loc [T] of kbuf, vbuf [S, K, D]."""
    for t in range(loc.shape[0]):
        slot = loc[t]
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                kbuf[slot, h, d] = k[t, h, d]
            for d in range(v.shape[2]):
                vbuf[slot, h, d] = v[t, h, d]


@njit(cache=True, nogil=True)
def attend_decode(q, kbuf, vbuf, table, rows, lens, scale, out, lo, hi):
    """Query t of [lo, hi) sees the first lens[t] slots of its table row.

    q, out [T, H, D]; table [R, C] int32; rows, lens [T].
    """
    longest = 0
    for t in range(lo, hi):
        longest = max(longest, lens[t])
    scores = np.empty((q.shape[1] // kbuf.shape[1], longest), np.float32)
    ints = np.empty(longest, np.int32)
    for t in range(lo, hi):
        _attend(q[t], kbuf, vbuf, table[rows[t]], lens[t], scale, out[t], scores, ints)


@njit(cache=True, nogil=True)
def attend_extend(q, kbuf, vbuf, table, rows, prefix, extend, scale, out, lo, hi):
    """Causal extend: request i adds extend[i] queries after prefix[i] cached tokens.

    Queries lie packed in request order; only those with index in [lo, hi) are computed.
    """
    longest = 0
    for i in range(rows.shape[0]):
        longest = max(longest, prefix[i] + extend[i])
    scores = np.empty((q.shape[1] // kbuf.shape[1], longest), np.float32)
    ints = np.empty(longest, np.int32)
    t = 0
    for i in range(rows.shape[0]):
        slots = table[rows[i]]
        for j in range(extend[i]):
            if lo <= t < hi:
                n = prefix[i] + j + 1
                _attend(q[t], kbuf, vbuf, slots, n, scale, out[t], scores, ints)
            t += 1


@njit(cache=True, nogil=True)
def attend_tree(q, kbuf, vbuf, table, rows, prefix, mask, scale, out, lo, hi):
    """Tree verify: request i adds N queries; query j sees the prefix and mask[i, j] of the N.

    mask [B, N, N] bool, row = query, column = candidate; a candidate's slot stands at column
    prefix[i] + candidate of the request's table row.
    """
    width = mask.shape[1]
    longest = 0
    for i in range(rows.shape[0]):
        longest = max(longest, prefix[i] + width)
    scores = np.empty((q.shape[1] // kbuf.shape[1], longest), np.float32)
    ints = np.empty(longest, np.int32)
    slots = np.empty(longest, np.int32)
    t = 0
    for i in range(rows.shape[0]):
        row = table[rows[i]]
        filled = False
        for j in range(width):
            if lo <= t < hi:
                if not filled:
                    for p in range(prefix[i]):
                        slots[p] = row[p]
                    filled = True
                n = prefix[i]
                for c in range(width):
                    if mask[i, j, c]:
                        slots[n] = row[prefix[i] + c]
                        n += 1
                _attend(q[t], kbuf, vbuf, slots, n, scale, out[t], scores, ints)
            t += 1


@njit(cache=True, nogil=True)
def attend_branch(q, kbuf, vbuf, table, rows, prefix, topk, steps, step, scale, out, lo, hi):
    """Draft step `step`: T = B * topk queries, one a branch.

    Branch b of request i sees the prefix and its own slots of steps 0..step, which stand at
    columns prefix[i] + b * steps + s of the request's table row (`per_step_draft_out_cache_loc`
    of SGLang lays them out so).
    """
    longest = 0
    for i in range(rows.shape[0]):
        longest = max(longest, prefix[i] + step + 1)
    scores = np.empty((q.shape[1] // kbuf.shape[1], longest), np.float32)
    ints = np.empty(longest, np.int32)
    slots = np.empty(longest, np.int32)
    for t in range(lo, hi):
        i = t // topk
        b = t % topk
        row = table[rows[i]]
        n = prefix[i]
        for p in range(n):
            slots[p] = row[p]
        for s in range(step + 1):
            slots[n + s] = row[n + b * steps + s]
        _attend(q[t], kbuf, vbuf, slots, n + step + 1, scale, out[t], scores, ints)
