"""Attention of verified rows as plain decoding computes it, for deterministic inference on CUDA.

With `--enable-deterministic-inference` SGLang's Triton backend gives a request the same bits in
every batch, but not with and without speculation: decode steps run its decode kernel, verify steps
its extend kernel, and in a tree the tokens of a path do not lie where a chain's do. Here each
verified row is a request of a decode step: its own list of KV slots, which are those of the prefix
and of the row's path. The decode kernel then sees what it would see without speculation, so the
tokens are those of plain decoding, whatever is drafted.

The lists are made once a forward pass, on the device and inside captured graphs, too. They take
8 bytes for each row and token of context, and the kernel's partial results `[rows, heads, context
/ 256, dim]` float32. Runs in the scheduler process.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

BLOCK = 1024
PARTS = 8
"""Programs that copy the slots of one row."""


class Layer(Protocol):
    """The attributes of SGLang's `RadixAttention` that are read."""

    layer_id: int
    sliding_window_size: int | None


class Batch(Protocol):
    """The attributes of SGLang's `ForwardBatch` that are read."""

    batch_size: int
    out_cache_loc: torch.Tensor


class VerifyAttention:
    """The attention of one backend's verify steps; it keeps the lists of the pass that runs."""

    def __init__(self) -> None:
        self._metadata: Any = None
        """Metadata of a decode step with a request for each row."""
        self._of: Any = None
        """The metadata of the verify step that it was made from."""
        self._layer_id = -1

    @classmethod
    def of(cls, backend: Any) -> VerifyAttention:
        """Return that of an attention backend of SGLang's."""
        return _OF.setdefault(backend, cls())

    def forward(
        self, backend: Any, q: torch.Tensor, layer: Layer, batch: Batch, **options: Any
    ) -> torch.Tensor:
        """Return the attention of verified rows, [R, heads * dim], whose keys are in the cache.

        Args:
            backend: SGLang's `TritonAttnBackend`, with the metadata of the verify step.
            q: ``[R, heads * dim]``.
            layer: The layer.
            batch: The batch in verification, with R / W requests of W rows each.
            options: Those of the backend's `forward_decode`.
        """
        verify = backend.forward_metadata
        # A pass begins with the first layer, and a capture runs the same one twice.
        if self._of is not verify or layer.layer_id <= self._layer_id:
            self._metadata, self._of = _rows(backend, verify, batch), verify
        self._layer_id = layer.layer_id
        backend.forward_metadata = self._metadata
        try:
            out: torch.Tensor = backend.forward_decode(
                q, None, None, layer, batch, save_kv_cache=False, **options
            )
        finally:
            backend.forward_metadata = verify
        return out


_OF: weakref.WeakKeyDictionary[Any, VerifyAttention] = weakref.WeakKeyDictionary()


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
    _lengths[(requests, width)](*tables, lengths, **shape)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=indptr[1:])
    _copy[(requests, width, PARTS)](
        *tables, prefix_slots, new_slots, indptr, slots, **shape, PARTS=PARTS, BLOCK=BLOCK
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
    tile = backend.split_tile_size
    return dataclasses.replace(
        verify,
        attn_logits=lengths.new_empty((*partial, backend.v_head_dim), dtype=torch.float32),
        attn_lse=lengths.new_empty(partial, dtype=torch.float32),
        num_kv_splits=(lengths + tile - 1) // tile,
        kv_indptr=indptr,
        kv_indices=slots,
    )


@triton.jit
def _visible(  # type: ignore[no-untyped-def]
    prefix_indptr,
    mask,
    mask_indptr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the prefix of a row's request, and which of its new tokens the row sees."""
    request, row = tl.program_id(0), tl.program_id(1)
    prefix = tl.load(prefix_indptr + request + 1) - tl.load(prefix_indptr + request)
    columns = tl.arange(0, COLUMNS)
    in_path = columns <= row
    if MASKED:
        first = tl.load(mask_indptr + request) + row * (prefix + WIDTH) + prefix
        in_path = tl.load(mask + first + columns, mask=columns < WIDTH, other=0) != 0
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
    prefix, in_path = _visible(prefix_indptr, mask, mask_indptr, WIDTH, COLUMNS, MASKED)
    number = tl.program_id(0) * WIDTH + tl.program_id(1)
    tl.store(lengths + number, (prefix + tl.sum(in_path.to(tl.int32), axis=0)).to(tl.int32))


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
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request, part = tl.program_id(0), tl.program_id(2)
    prefix, in_path = _visible(prefix_indptr, mask, mask_indptr, WIDTH, COLUMNS, MASKED)
    first = tl.load(prefix_indptr + request).to(tl.int64)
    to = slots + tl.load(indptr + request * WIDTH + tl.program_id(1)).to(tl.int64)
    for begin in range(part * BLOCK, prefix, PARTS * BLOCK):
        places = begin + tl.arange(0, BLOCK)
        inside = places < prefix
        found = tl.load(prefix_slots + first + places, mask=inside, other=0)
        tl.store(to + places, found.to(tl.int64), mask=inside)
    if part == 0:
        columns = tl.arange(0, COLUMNS)
        found = tl.load(new_slots + request * WIDTH + columns, mask=in_path, other=0)
        at = prefix + tl.cumsum(in_path.to(tl.int32), axis=0) - 1
        tl.store(to + at, found.to(tl.int64), mask=in_path)
