"""Attention of verified rows as plain decoding computes it, on CUDA with the Triton backend.

SGLang's Triton backend verifies with its extend kernel, which is made for prompts: a program for
each request and head, whose tile has room for 128 rows, reads the whole prefix alone. A decode
step has a kernel of its own. On an H200 a verify step of one row for each of 64 requests took 13 ms
with the shape of an 8B Llama, a decode step 5.5 ms. The extend kernel also adds up in another
order, and in a tree the tokens of a path do not lie where a chain's do, so that deterministic
inference gives other tokens with speculation than without it.

Here each verified row is a request of a decode step: its own list of KV slots, which are those of
the prefix and of the row's path. The decode kernel then sees what it sees without speculation. Rows
of a request lie side by side, so that what one of them reads is in the cache for the others.

The lists are made once a forward pass, on the device and inside captured graphs, too. They take
8 bytes for each row and token of context. Runs in the scheduler process.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

BLOCK = 1024
MOST_PARTS = 8
"""Programs that copy the slots of one row, at most."""


class Layer(Protocol):
    """The attributes of SGLang's `RadixAttention` that are read."""

    layer_id: int
    sliding_window_size: int | None
    is_cross_attention: bool


class Batch(Protocol):
    """The attributes of SGLang's `ForwardBatch` that are read."""

    batch_size: int
    out_cache_loc: torch.Tensor
    forward_mode: Any


class VerifyAttention:
    """The attention of one backend's verify steps; it keeps the lists of the pass that runs."""

    def __init__(self) -> None:
        self._metadata: Any = None
        """Metadata of a decode step with a request for each row."""
        self._of: Any = None
        """The metadata of the verify step that it was made from."""
        self._layer_id = -1

    def forward(
        self,
        backend: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Layer,
        batch: Batch,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        """Return the attention of verified rows, [R, heads * dim], and keep their keys and values.

        Args:
            backend: SGLang's `TritonAttnBackend`, with the metadata of the verify step.
            q: ``[R, heads * dim]``.
            k: ``[R, kv_heads, dim]`` or flat.
            v: As `k`.
            layer: The layer.
            batch: The batch in verification: R / W requests of W rows each.
            args: Further arguments of the backend's `forward_decode`.
            options: The same by name.
        """
        verify = backend.forward_metadata
        # A pass begins with the first layer, and a capture runs the same one twice.
        if self._of is not verify or layer.layer_id <= self._layer_id:
            self._metadata, self._of = _rows(backend, verify, batch), verify
        self._layer_id = layer.layer_id
        backend.forward_metadata = self._metadata
        try:
            out: torch.Tensor = backend.forward_decode(q, k, v, layer, batch, *args, **options)
        finally:
            backend.forward_metadata = verify
        return out


_OF: weakref.WeakKeyDictionary[Any, VerifyAttention] = weakref.WeakKeyDictionary()


def of(backend: Any) -> VerifyAttention:
    """Return that of an attention backend of SGLang's."""
    return _OF.setdefault(backend, VerifyAttention())


def serves(backend: Any, k: torch.Tensor | None, layer: Layer, batch: Batch) -> bool:
    """Return whether a pass verifies with this layer, and its rows can be requests.

    Not with a sliding window, which would need lists of its own, nor where SGLang has another way:
    latent attention, a context that is split between devices, and outputs into a given tensor.
    """
    if not batch.forward_mode.is_target_verify() or k is None:
        return False
    window = layer.sliding_window_size
    is_plain = (window is None or window < 0) and not layer.is_cross_attention
    elsewhere = backend.use_mla or backend.dcp_size > 1
    return is_plain and not elsewhere and getattr(batch, "_attn_output", None) is None


def row_slots(
    prefix_indptr: torch.Tensor,
    prefix_slots: torch.Tensor,
    new_slots: torch.Tensor,
    mask: torch.Tensor | None,
    mask_indptr: torch.Tensor | None,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the KV slots that each row sees, without waiting for the device.

    Args:
        prefix_indptr: ``[B + 1]``, where the slots of each request's prefix begin.
        prefix_slots: Slots of the prefixes, one after the other.
        new_slots: ``[B * W]``, slots of the rows, W for each request.
        mask: For each request ``[W, prefix + W]``, one after the other, not 0 where a row sees a
            token, ancestors before their descendants; None where each row sees those before it.
        mask_indptr: ``[B + 1]``, where the mask of each request begins.
        most: The largest number of slots of all rows together.

    Returns:
        Number of slots of each row ``[R]`` int32, where they begin ``[R + 1]`` int32, and the
        slots ``[most]`` int64.
    """
    requests = len(prefix_indptr) - 1
    rows = len(new_slots)
    width = rows // requests
    lengths = torch.empty(rows, dtype=torch.int32, device=new_slots.device)
    indptr = torch.zeros(rows + 1, dtype=torch.int32, device=new_slots.device)
    slots = torch.empty(most, dtype=torch.int64, device=new_slots.device)
    tables = (
        prefix_indptr,
        prefix_slots if mask is None else mask,
        prefix_indptr if mask_indptr is None else mask_indptr,
    )
    shape = {"WIDTH": width, "COLUMNS": triton.next_power_of_2(width), "MASKED": mask is not None}
    _lengths[(requests,)](*tables, lengths, **shape)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=indptr[1:])
    parts = max(1, min(MOST_PARTS, triton.cdiv(most // rows, BLOCK)))
    _copy[(requests, width, parts)](
        *tables, prefix_slots, new_slots, indptr, slots, **shape, BLOCK=BLOCK
    )
    return lengths, indptr, slots


def _rows(backend: Any, verify: Any, batch: Batch) -> Any:
    requests, rows = batch.batch_size, len(batch.out_cache_loc)
    # The list of prefixes is as long as that of the largest batch, where graphs are captured.
    longest = min(len(verify.kv_indices), requests * backend.max_context_len)
    lengths, indptr, slots = row_slots(
        verify.kv_indptr[: requests + 1],
        verify.kv_indices,
        batch.out_cache_loc,
        verify.custom_mask,
        verify.mask_indptr,
        longest * (rows // requests) + rows * (rows // requests),
    )
    partial = (rows, backend.num_head, backend.max_kv_splits)
    splits = torch.empty_like(lengths)
    backend.get_num_kv_splits(splits, lengths)
    return dataclasses.replace(
        verify,
        attn_logits=lengths.new_empty((*partial, backend.v_head_dim), dtype=torch.float32),
        attn_lse=lengths.new_empty(partial, dtype=torch.float32),
        num_kv_splits=splits,
        kv_indptr=indptr,
        kv_indices=slots,
    )


@triton.jit
def _path(  # type: ignore[no-untyped-def]
    prefix_indptr,
    mask,
    mask_indptr,
    row,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the prefix of a request, and which of its new tokens a row sees, or each of [N, 1]."""
    request = tl.program_id(0)
    prefix = tl.load(prefix_indptr + request + 1) - tl.load(prefix_indptr + request)
    columns = tl.arange(0, COLUMNS) + row * 0
    in_path = columns <= row
    if MASKED:
        first = tl.load(mask_indptr + request) + row * (prefix + WIDTH) + prefix
        inside = (columns < WIDTH) & (row < WIDTH)
        in_path = tl.load(mask + first + columns, mask=inside, other=0) != 0
    return prefix, in_path & (columns < WIDTH)


@triton.jit
def _lengths(  # type: ignore[no-untyped-def]
    prefix_indptr,
    mask,
    mask_indptr,
    lengths,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    rows = tl.arange(0, COLUMNS)
    prefix, in_path = _path(prefix_indptr, mask, mask_indptr, rows[:, None], WIDTH, COLUMNS, MASKED)
    length = prefix + tl.sum(in_path.to(tl.int32), axis=1)
    tl.store(lengths + tl.program_id(0) * WIDTH + rows, length.to(tl.int32), mask=rows < WIDTH)


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    prefix_indptr,
    mask,
    mask_indptr,
    prefix_slots,
    new_slots,
    indptr,
    slots,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prefix, in_path = _path(prefix_indptr, mask, mask_indptr, row, WIDTH, COLUMNS, MASKED)
    first = tl.load(prefix_indptr + request).to(tl.int64)
    to = slots + tl.load(indptr + request * WIDTH + row).to(tl.int64)
    for begin in range(part * BLOCK, prefix, tl.num_programs(2) * BLOCK):
        places = begin + tl.arange(0, BLOCK)
        inside = places < prefix
        prefix_part = tl.load(prefix_slots + first + places, mask=inside, other=0)
        tl.store(to + places, prefix_part.to(tl.int64), mask=inside)
    if part == 0:
        columns = tl.arange(0, COLUMNS)
        path = tl.load(new_slots + request * WIDTH + columns, mask=in_path, other=0)
        at = prefix + tl.cumsum(in_path.to(tl.int32), axis=0) - 1
        tl.store(to + at, path.to(tl.int64), mask=in_path)
