"""KV-cache slots of a batch: copies between ``req_to_token`` rows and flat slot lists.

``req_to_token`` is ``[pool_size, pool_len]`` int32; row ``r`` holds the KV slots of the request at
pool index ``r``, by position. Runs in the scheduler process. Knows nothing of SGLang.
"""

import torch

from tlt_sglang.cpu.kernels.compile import Array, check, flat, indices, inline, kernel

_OUT_OF_RANGE = "its slots exceed req_to_token or the slot list"


@inline()
def _inside(row: int, first: int, last: int, width: int, table: Array) -> bool:
    return first >= 0 and last <= width and row >= 0 and row + width <= table.size


@kernel("int64(int64[::1], int32[::1], int64[::1], int64[::1], int64[::1], int64)")
def _scatter_rows(
    req: Array, table: Array, start: Array, end: Array, locs: Array, width: int
) -> int:
    cursor = 0
    for b in range(req.size):
        first, last = start[b], end[b]
        if last <= first:
            continue
        row = req[b] * width
        if not _inside(row, first, last, width, table) or cursor + last - first > locs.size:
            return b
        for position in range(first, last):
            table[row + position] = locs[cursor]
            cursor += 1
    return -1


@kernel("int64(int64[::1], int32[::1], int64[::1], int64[::1], int64[::1], int64)")
def _gather_rows(
    req: Array, table: Array, start: Array, end: Array, locs: Array, width: int
) -> int:
    cursor = 0
    for b in range(req.size):
        first, last = start[b], end[b]
        if last <= first:
            continue
        row = req[b] * width
        if not _inside(row, first, last, width, table) or cursor + last - first > locs.size:
            return b
        for position in range(first, last):
            locs[cursor] = table[row + position]
            cursor += 1
    return -1


@kernel("int64(int64[::1], int32[::1], int64[::1], int64[::1], int64, int64)")
def _gather_window(
    req: Array, table: Array, start: Array, locs: Array, width: int, size: int
) -> int:
    if req.size * size > locs.size:
        return 0
    for b in range(req.size):
        first, row = start[b], req[b] * width
        if not _inside(row, first, first + size, width, table):
            return b
        for j in range(size):
            locs[b * size + j] = table[row + first + j]
    return -1


@kernel("int64(int64[::1], int64[::1], int64[::1])")
def _compact(index: Array, source: Array, target: Array) -> int:
    cursor = 0
    for i in range(index.size):
        if index[i] < 0:
            continue
        if index[i] >= source.size or cursor >= target.size:
            return i
        target[cursor] = source[index[i]]
        cursor += 1
    return -1


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write the packed slots ``out_cache_loc`` into ``req_to_token[req, start:end]``, in place."""
    bad = _scatter_rows(
        indices(req_pool_indices),
        flat(req_to_token, torch.int32, "req_to_token"),
        indices(start_offset),
        indices(end_offset),
        indices(out_cache_loc),
        pool_len,
    )
    check(bad, _OUT_OF_RANGE)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Pack ``req_to_token[req, start:end]`` of all requests into int64 ``out_cache_loc``."""
    bad = _gather_rows(
        indices(req_pool_indices),
        flat(req_to_token, torch.int32, "req_to_token"),
        indices(start_offset),
        indices(end_offset),
        flat(out_cache_loc, torch.int64, "out_cache_loc"),
        pool_len,
    )
    check(bad, _OUT_OF_RANGE)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """Pack each request's ``topk * speculative_num_steps`` slots that start at ``seq_lens``."""
    bad = _gather_window(
        indices(req_pool_indices),
        flat(req_to_token, torch.int32, "req_to_token"),
        indices(seq_lens),
        flat(out_cache_loc, torch.int64, "out_cache_loc"),
        pool_len,
        topk * speculative_num_steps,
    )
    check(bad, _OUT_OF_RANGE)


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack ``out_cache_loc[accept_index]`` without the -1 entries into ``accept_out_cache_loc``."""
    bad = _compact(
        indices(accept_index),
        indices(out_cache_loc),
        flat(accept_out_cache_loc, torch.int64, "accept_out_cache_loc"),
    )
    if bad >= 0:
        raise IndexError(f"accept_index[{bad}] exceeds out_cache_loc")
