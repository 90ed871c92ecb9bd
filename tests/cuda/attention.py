"""The two attention kernels of SGLang's Triton backend, and our lists of slots, in plain torch.

Triton's interpreter takes a second for what these take a millisecond for; `test_attention` and
`test_verify_attention` compare them. Shapes: q, k, v [rows, heads, dim]; the cache [slots,
kv_heads, dim].
"""

from __future__ import annotations

import torch


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention of `q` over `k` and `v`, of which it sees where `visible` [q, k] is."""
    group = q.shape[1] // k.shape[1]
    k, v = (one.float().repeat_interleave(group, dim=1) for one in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def decode(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    o: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    *rest: object,
    **options: object,
) -> None:
    """Stand for `decode_attention_fwd`: one query for each request."""
    scale = rest[4]
    assert isinstance(scale, float) and not options.get("logit_cap") and not options.get("sinks")
    starts, lengths = kv_indptr[: len(q), None], kv_indptr.diff()[: len(q), None]
    places = torch.arange(int(lengths.max()))
    visible = places < lengths
    # Graphs keep the part of the table that the batch of the capture had; a kernel reads on.
    count = kv_indices.untyped_storage().nbytes() // kv_indices.itemsize
    table = kv_indices.as_strided((count - kv_indices.storage_offset(),), (1,))
    slots = table[(starts + places).where(visible, 0)].long()
    group = q.shape[1] // k_buffer.shape[1]
    k, v = (one[slots].float().repeat_interleave(group, dim=2) for one in (k_buffer, v_buffer))
    scores = torch.einsum("rhd,rlhd->rhl", q.float(), k) * scale
    scores = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    o[: len(q)] = torch.einsum("rhl,rlhd->rhd", scores, v).to(o.dtype)


def row_slots(
    prefix_indptr: torch.Tensor,
    prefix_slots: torch.Tensor,
    new_slots: torch.Tensor,
    mask: torch.Tensor | None,
    mask_indptr: torch.Tensor | None,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stand for `verify_attention.row_slots`."""
    starts = prefix_indptr.tolist()
    width = len(new_slots) // (len(starts) - 1)
    rows: list[torch.Tensor] = []
    for request in range(len(starts) - 1):
        prefix = prefix_slots[starts[request] : starts[request + 1]].long()
        new = new_slots[request * width : (request + 1) * width].long()
        paths = torch.ones(width, width, dtype=torch.bool).tril()
        if mask is not None and mask_indptr is not None:
            first, columns = int(mask_indptr[request]), len(prefix) + width
            paths = mask[first : first + width * columns].view(width, columns)[:, len(prefix) :]
        rows += [torch.cat([prefix, new[path != 0]]) for path in paths]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    indptr = torch.zeros(len(rows) + 1, dtype=torch.int32)
    indptr[1:] = lengths.cumsum(0)
    slots = torch.zeros(most, dtype=torch.int64)
    slots[: int(indptr[-1])] = torch.cat(rows)
    return lengths, indptr, slots


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    custom_mask: torch.Tensor | None,
    is_causal: bool,
    mask_indptr: torch.Tensor | None,
    *rest: object,
    sm_scale: float | None = None,
    skip_prefix_custom_mask: bool = True,
    **options: object,
) -> None:
    """Stand for `extend_attention_fwd`: new rows of requests, after what the cache has of them."""
    assert not options.get("logit_cap") and options.get("sinks") is None
    assert skip_prefix_custom_mask
    scale = sm_scale or q.shape[-1] ** -0.5
    rows, starts = qo_indptr.tolist(), kv_indptr.tolist()
    for request in range(len(rows) - 1):
        new = slice(rows[request], rows[request + 1])
        slots = kv_indices[starts[request] : starts[request + 1]].long()
        count, prefix = new.stop - new.start, len(slots)
        if not count:
            continue
        visible = torch.ones(count, prefix + count, dtype=torch.bool)
        if custom_mask is not None and mask_indptr is not None:
            first = int(mask_indptr[request])
            table = custom_mask[first : first + visible.numel()].view(visible.shape)
            visible[:, prefix:] = table[:, prefix:] != 0
        elif is_causal:
            visible[:, prefix:] = visible[:, prefix:].tril()
        keys = torch.cat([k_buffer[slots], k[new]])
        values = torch.cat([v_buffer[slots], v[new]])
        o[new] = _attend(q[new], keys, values, scale, visible).to(o.dtype)
