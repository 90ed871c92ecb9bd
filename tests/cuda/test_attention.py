"""The attention kernels of the simulated device against SGLang's own, in Triton's interpreter."""

from __future__ import annotations

from tests.cuda.apart import apart


@apart
def test_attention_is_that_of_sglangs_kernels() -> None:
    import torch

    from tests.cuda import attention, graphs

    graphs.install()
    from tests.cuda import kernels

    kernels.install(("decode_attention_fwd", "extend_attention_fwd"))
    decode_attention_fwd = kernels.attention_kernels("decode_attention").decode_attention_fwd
    extend_attention_fwd = kernels.attention_kernels("extend_attention").extend_attention_fwd

    torch.manual_seed(0)
    heads, kv_heads, dim, slots, lengths, new = 4, 2, 16, 12, [3, 5], 4
    with torch.device("cuda"):
        k_cache, v_cache = torch.randn(2, slots, kv_heads, dim)
        q, k, v = (torch.randn(2 * new, count, dim) for count in (heads, kv_heads, kv_heads))
        masks = [torch.rand(new, length + new) > 0.5 for length in lengths]
        for mask, length in zip(masks, lengths, strict=True):
            mask[:, length:] |= torch.eye(new, dtype=torch.bool)
        outputs = [torch.zeros_like(q) for _ in range(2)]
        indptr = torch.tensor([0, 3, 8], dtype=torch.int32)
        indices = torch.randperm(slots)[:8]
        starts = torch.tensor([0, masks[0].numel()])
        rows = torch.tensor([0, new, 2 * new])
        mask = torch.cat([mask.flatten() for mask in masks])
        for masked in (None, True, None), (mask, True, starts):
            for run, output in zip(
                (extend_attention_fwd, graphs.kernel(attention.extend)), outputs, strict=True
            ):
                cache = k_cache, v_cache, rows, indptr, indices
                run(q, k, v, output, *cache, *masked, new, 1.0, 1.0, sm_scale=0.25)
            torch.testing.assert_close(*outputs)
        logits = torch.zeros(2, heads, 2, dim)
        sums, splits = torch.zeros(2, heads, 2), torch.ones(2, dtype=torch.int32)
        for run, output in zip(
            (decode_attention_fwd, graphs.kernel(attention.decode)), outputs, strict=True
        ):
            tables = output[:2], indptr, indices, logits, sums, splits
            run(q[:2], k_cache, v_cache, *tables, 2, 0.25, 1.0, 1.0)
        torch.testing.assert_close(*outputs)
