"""sglang.srt.layers.attention.triton_backend, in the scheduler process: verify as decoding does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend",
    why="a verify step computes attention with a kernel for prompts: several times slower than "
    "that of decode steps, and in another order, so that deterministic inference gives other "
    "tokens",
    remove_when="SGLang verifies as fast as it decodes on CUDA, with the same bits",
    process="scheduler",
    only_on="cuda",
)
def forward_extend(
    original: Upstream,
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    *args: Any,
    **options: Any,
) -> object:
    from tlt_sglang.engine import verify_attention

    inputs = q, k, v, layer, forward_batch
    if not verify_attention.serves(backend, k, layer, forward_batch):
        return original(backend, *inputs, *args, **options)
    return verify_attention.of(backend).forward(backend, *inputs, *args, **options)


PATCHES = (forward_extend,)
