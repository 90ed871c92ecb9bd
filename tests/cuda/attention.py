"""The two attention kernels of SGLang's Triton backend, in plain torch.

Triton's interpreter takes a second for what these take a millisecond for; `test_attention` compares
them. Shapes: q, k, v [rows, heads, dim]; the cache [slots, kv_heads, dim].
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
    starts = kv_indptr.tolist()
    for row in range(q.shape[0]):
        slots = kv_indices[starts[row] : starts[row + 1]].long()
        one = slice(row, row + 1)
        o[one] = _attend(q[one], k_buffer[slots], v_buffer[slots], scale, None).to(o.dtype)


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
