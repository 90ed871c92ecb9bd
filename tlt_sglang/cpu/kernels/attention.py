"""Paged attention for CPU: one query at a time, the same arithmetic in every mode.

Decode, extend, target-verify (chain and tree) and draft steps differ only in which KV slots a query
sees: the first `visible` slots of its request's table row, then a few more of its own (its
ancestors in a tree, its branch of a draft). A plan (`plan_*`) records this once per forward;
`attend` then lists each query's slots in position order and attends over that list. A token's
attention output is therefore bitwise the same whether it was decoded alone, verified inside a tree,
or prefilled, which makes greedy output with speculation identical to greedy output without it.

Shapes: T queries, S KV slots, H query heads, K key/value heads (H = K * G), D head size, R rows of
the request table, C its columns, E extra slots at most.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import carray, cfunc, types

from tlt_sglang.cpu.kernels.compile import Array, inline, kernel
from tlt_sglang.cpu.kernels.sums import (
    scores_64,
    scores_64_warm,
    scores_128,
    scores_128_warm,
    weighted_64,
    weighted_64_warm,
    weighted_128,
    weighted_128_warm,
)
from tlt_sglang.cpu.kernels.team import next_item, pointer_to, start

PARALLEL_SIZE = 8192
"""With fewer queries x slots x heads one thread computes alone, as waking others takes longer."""
TOGETHER = 16
"""Most queries of a request that read keys and values together."""
BLOCK = 64
"""Slots whose keys, or values, stay in the first cache while several queries read them."""

_LOG2E = np.float32(1.4426950408889634)
# Minimax polynomial of 2**f on [-0.5, 0.5]; its relative error is below one fp32 ulp.
_C0, _C1, _C2 = np.float32(1.0), np.float32(0.6931471805599453), np.float32(0.2402265069591007)
_C3, _C4 = np.float32(0.05550410866482158), np.float32(0.009618129107628477)
_C5, _C6 = np.float32(0.0013333558146428443), np.float32(0.00015403530393381608)
_MIN_EXPONENT, _MAX_EXPONENT = np.float32(-126.0), np.float32(127.0)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The KV slots that each of T queries of one forward sees."""

    rows: torch.Tensor  # [T] int64: the request's row of the table
    visible: torch.Tensor  # [T] int64: visible slots at the beginning of that row
    extra: torch.Tensor  # [T, E] int32: further slots, in position order
    counts: torch.Tensor  # [T] int64: number of further slots
    firsts: torch.Tensor  # [<= T + 1] int64: first query of each group, and T
    data: Array  # arguments of the task; `attend` fills in those of a layer


def _plan(
    rows: torch.Tensor,
    visible: torch.Tensor,
    table: torch.Tensor,
    extra: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> AttentionPlan:
    tokens = len(rows)
    if extra is None or counts is None:
        extra = torch.empty((tokens, 0), dtype=torch.int32)
        counts = torch.zeros(tokens, dtype=torch.int64)
    rows, visible = rows.to(torch.int64).contiguous(), visible.to(torch.int64).contiguous()
    longest = int((visible + counts).max()) if tokens else 0
    firsts = torch.empty(tokens + 1, dtype=torch.int64)
    groups, largest = _group(rows.numpy(), firsts.numpy())
    data = np.zeros(24, np.int64)
    data[1:13] = (
        rows.data_ptr(),
        visible.data_ptr(),
        extra.data_ptr(),
        counts.data_ptr(),
        table.data_ptr(),
        tokens,
        extra.shape[1],
        table.shape[0],
        table.shape[1],
        longest,
        0,
        0,
    )
    data[20:23] = firsts.data_ptr(), groups, largest
    return AttentionPlan(rows, visible, extra, counts, firsts, data)


def plan_decode(table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor) -> AttentionPlan:
    """Plan one query per request, which sees all `lens` [B] tokens. table [R, C], rows [B]."""
    return _plan(rows, lens, table)


def plan_extend(
    table: torch.Tensor, rows: torch.Tensor, prefix: torch.Tensor, extend: torch.Tensor
) -> AttentionPlan:
    """Plan causal queries: request i adds extend[i] of them after prefix[i] tokens; all [B]."""
    extend = extend.to(torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(rows)), extend)
    first = torch.cumsum(extend, 0) - extend
    offset = torch.arange(len(owner)) - first[owner]
    return _plan(rows[owner], prefix[owner] + offset + 1, table)


def plan_chain(
    table: torch.Tensor, rows: torch.Tensor, prefix: torch.Tensor, width: int
) -> AttentionPlan:
    """Plan causal queries: each request adds `width` after prefix[i] tokens. rows, prefix [B]."""
    if width == 1:
        return _plan(rows, prefix + 1, table)
    visible = prefix.unsqueeze(1) + torch.arange(1, width + 1)
    return _plan(rows.repeat_interleave(width), visible.view(-1), table)


def plan_tree(
    table: torch.Tensor, rows: torch.Tensor, prefix: torch.Tensor, mask: torch.Tensor
) -> AttentionPlan:
    """Plan a tree: request i adds N queries; query j sees prefix[i] tokens and mask[i, j].

    mask [B, N, N] bool: the row is the query, the column a candidate, whose slot is in column
    prefix[i] + candidate of the request's table row.
    """
    batch, width = mask.shape[:2]
    extra = torch.empty((batch * width, width), dtype=torch.int32)
    counts = torch.empty(batch * width, dtype=torch.int64)
    rows, prefix = rows.to(torch.int64).contiguous(), prefix.to(torch.int64).contiguous()
    _tree_slots(
        table.numpy(),
        rows.numpy(),
        prefix.numpy(),
        mask.contiguous().numpy(),
        extra.numpy(),
        counts.numpy(),
    )
    return _plan(
        rows.repeat_interleave(width), prefix.repeat_interleave(width), table, extra, counts
    )


def plan_branches(
    table: torch.Tensor,
    rows: torch.Tensor,
    prefix: torch.Tensor,
    topk: int,
    num_steps: int,
    step: int,
) -> AttentionPlan:
    """Plan draft step `step`: topk queries per request, which see the prefix and their own branch.

    Branch b's slots of steps 0..step are in columns prefix[i] + b * num_steps + s of the
    request's table row, as SGLang's `per_step_draft_out_cache_loc` lays them out.
    """
    if topk == 1:  # a single branch continues the prefix
        return _plan(rows, prefix + (step + 1), table)
    branch = torch.arange(topk)[:, None] * num_steps + torch.arange(step + 1)
    columns = prefix.to(torch.int64)[:, None] + branch.reshape(1, -1)
    extra = table[rows.to(torch.int64)[:, None], columns].reshape(-1, step + 1).contiguous()
    counts = torch.full((len(extra),), step + 1, dtype=torch.int64)
    return _plan(rows.repeat_interleave(topk), prefix.repeat_interleave(topk), table, extra, counts)


def attend(
    plan: AttentionPlan,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend with every query of `plan`: q [T, H, D], keys and values [S, K, D] -> out [T, H, D].

    All are float32 and contiguous; `out` is written.
    """
    data = plan.data
    data[0] = 0
    data[11:18] = (
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        keys.shape[1],
        q.shape[1],
        q.shape[2],
    )
    data[18] = keys.shape[0]
    data[19:20].view(np.float64)[0] = scale
    parallel = int(data[6] * data[10]) * q.shape[1] >= PARALLEL_SIZE
    threads = torch.get_num_threads() if parallel else 1
    # Groups are divided where there are too few to keep all threads busy to the end.
    items = int(data[21]) * keys.shape[1]
    data[23] = 1 if threads == 1 else max(1, -(-2 * threads // max(1, items)))
    start(parallel)(_task.address, data.ctypes.data)


@kernel("UniTuple(int64, 2)(int64[::1], int64[::1])")
def _group(rows: Array, firsts: Array) -> tuple[int, int]:
    """Group queries in a row of the same request; return the number of groups and the largest."""
    count, largest = 0, 0
    for t in range(rows.shape[0]):
        if t == 0 or rows[t] != rows[t - 1] or t - firsts[count - 1] == TOGETHER:
            firsts[count] = t
            count += 1
        largest = max(largest, t - firsts[count - 1] + 1)
    firsts[count] = rows.shape[0]
    return count, largest


@kernel(
    "void(int32[:, ::1], int64[::1], int64[::1], boolean[:, :, ::1], int32[:, ::1], int64[::1])"
)
def _tree_slots(
    table: Array, rows: Array, prefix: Array, mask: Array, extra: Array, counts: Array
) -> None:
    width = mask.shape[1]
    for i in range(rows.shape[0]):
        for j in range(width):
            n = 0
            for c in range(width):
                if mask[i, j, c]:
                    extra[i * width + j, n] = table[rows[i], prefix[i] + c]
                    n += 1
            counts[i * width + j] = n


@inline(fastmath=True)
def _exp(x: Array, n: int, shift: np.float32, scale: np.float32, ints: Array) -> np.float32:
    """Set x[:n] to exp(scale * (x[:n] - shift)) and return the sum; the least value is 1e-38."""
    powers, factor = ints.view(np.float32), scale * _LOG2E
    for j in range(n):
        y = min(max((x[j] - shift) * factor, _MIN_EXPONENT), _MAX_EXPONENT)
        whole = np.floor(y + np.float32(0.5))
        f = y - whole
        ints[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        x[j] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    total = np.float32(0.0)
    for j in range(n):
        x[j] *= powers[j]
        total += x[j]
    return total


@inline(fastmath=True)
def _add_scores(
    q: Array,
    keys: Array,
    kv: int,
    slots: Array,
    n: int,
    last: int,
    warm: bool,
    scores: Array,
    begin: int,
) -> None:
    """Set scores[:, begin : begin + n] of query heads q [G, D] and the keys of head `kv`."""
    group, dim = q.shape
    size, row, slot_list = keys.shape[1] * dim * 4, scores.shape[1] * 4, slots.ctypes.data
    base, queries = keys.ctypes.data + kv * dim * 4, q.ctypes.data
    out = scores.ctypes.data + begin * 4
    if dim == 64 and warm:
        scores_64_warm((group, queries, base, slot_list, n, last, size, out, row))
    elif dim == 64:
        scores_64((group, queries, base, slot_list, n, last, size, out, row))
    elif dim == 128 and warm:
        scores_128_warm((group, queries, base, slot_list, n, last, size, out, row))
    elif dim == 128:
        scores_128((group, queries, base, slot_list, n, last, size, out, row))
    else:
        for g in range(group):
            for j in range(n):
                acc = np.float32(0.0)
                for d in range(dim):
                    acc += q[g, d] * keys[slots[j], kv, d]
                scores[g, begin + j] = acc


@inline(fastmath=True)
def _softmax(scores: Array, n: int, scale: np.float32, ints: Array) -> None:
    """Turn scores[:, :n] into weights."""
    for g in range(scores.shape[0]):
        top = scores[g, 0]
        for j in range(1, n):
            top = max(top, scores[g, j])
        inverse = np.float32(1.0) / _exp(scores[g], n, top, scale, ints)
        for j in range(n):
            scores[g, j] *= inverse


@inline(fastmath=True)
def _add_weighted(
    weights: Array,
    begin: int,
    values: Array,
    kv: int,
    slots: Array,
    n: int,
    last: int,
    warm: bool,
    out: Array,
) -> None:
    """Add the values of head `kv`, weighted by weights[:, begin : begin + n], to out [G, D]."""
    group, dim = out.shape
    size, row, slot_list = values.shape[1] * dim * 4, weights.shape[1] * 4, slots.ctypes.data
    base, sums = values.ctypes.data + kv * dim * 4, out.ctypes.data
    used = weights.ctypes.data + begin * 4
    if dim == 64 and warm:
        weighted_64_warm((group, used, base, slot_list, n, last, size, sums, row))
    elif dim == 64:
        weighted_64((group, used, base, slot_list, n, last, size, sums, row))
    elif dim == 128 and warm:
        weighted_128_warm((group, used, base, slot_list, n, last, size, sums, row))
    elif dim == 128:
        weighted_128((group, used, base, slot_list, n, last, size, sums, row))
    else:
        for g in range(group):
            for j in range(n):
                for d in range(dim):
                    out[g, d] += weights[g, begin + j] * values[slots[j], kv, d]


@inline()
def _own_slots(
    t: int,
    common: int,
    rows: Array,
    visible: Array,
    extra: Array,
    counts: Array,
    table: Array,
    own: Array,
) -> int:
    """List the slots that query t sees after the first `common` ones; return their number."""
    n: int = visible[t] - common
    for j in range(n):
        own[j] = table[rows[t], common + j]
    for j in range(counts[t]):
        own[n + j] = extra[t, j]
    return n + int(counts[t])


def _work(pointer: int) -> None:
    """Run on each thread of the team: take one group and key/value head after the other.

    All queries of a group read a block of the slots that they have in common before the next block,
    so these come from memory once; then each reads those that it sees besides.
    """
    # Views of the arguments, in the order of `_plan` and `attend`.
    data = carray(pointer, (24,), np.int64)
    tokens, width, rows_of_table, columns = data[6], data[7], data[8], data[9]
    kv_heads, heads, dim, pool = data[15], data[16], data[17], data[18]
    group = heads // kv_heads
    rows = carray(pointer_to(data[1]), (tokens,), np.int64)
    visible = carray(pointer_to(data[2]), (tokens,), np.int64)
    extra = carray(pointer_to(data[3]), (tokens, width), np.int32)
    counts = carray(pointer_to(data[4]), (tokens,), np.int64)
    table = carray(pointer_to(data[5]), (rows_of_table, columns), np.int32)
    q = carray(pointer_to(data[11]), (tokens, kv_heads, group, dim), np.float32)
    keys = carray(pointer_to(data[12]), (pool, kv_heads, dim), np.float32)
    values = carray(pointer_to(data[13]), (pool, kv_heads, dim), np.float32)
    out = carray(pointer_to(data[14]), (tokens, kv_heads, group, dim), np.float32)
    scale = np.float32(data[19:20].view(np.float64)[0])
    firsts = carray(pointer_to(data[20]), (data[21] + 1,), np.int64)
    parts = data[23]
    # Memory of this thread, as long as the longest list of slots.
    slots, own = np.empty(data[10], np.int32), np.empty(data[10], np.int32)
    scores = np.empty((data[22], group, data[10]), np.float32)
    ints = np.empty(data[10], np.int32)
    while True:
        item = next_item(data.ctypes.data)
        if item >= data[21] * kv_heads * parts:
            return
        which, part = item // parts, item % parts
        which, kv = which // kv_heads, which % kv_heads
        count = firsts[which + 1] - firsts[which]
        first = firsts[which] + count * part // parts
        end = firsts[which] + count * (part + 1) // parts
        if first == end:
            continue
        common = visible[first]
        for t in range(first, end):
            common = min(common, visible[t])
            out[t, kv] = np.float32(0.0)
        for j in range(common):
            slots[j] = table[rows[first], j]
        size = BLOCK if end - first > 1 else max(1, common)
        blocks = (common + size - 1) // size
        for block in range(blocks + 1):
            begin = min(block * size, common)
            for t in range(first, end):
                if block < blocks:
                    few, n, warm = slots[begin:], min(size, common - begin), t > first
                    last = common - begin - 1
                else:
                    n = _own_slots(t, common, rows, visible, extra, counts, table, own)
                    few, warm, last = own, True, n - 1
                _add_scores(q[t, kv], keys, kv, few, n, last, warm, scores[t - first], begin)
        for t in range(first, end):
            _softmax(scores[t - first], visible[t] + counts[t], scale, ints)
        for block in range(blocks + 1):
            begin = min(block * size, common)
            for t in range(first, end):
                if block < blocks:
                    few, n, warm = slots[begin:], min(size, common - begin), t > first
                    last = common - begin - 1
                else:
                    n = _own_slots(t, common, rows, visible, extra, counts, table, own)
                    few, warm, last = own, True, n - 1
                _add_weighted(scores[t - first], begin, values, kv, few, n, last, warm, out[t, kv])


_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_work)
