"""sglang.srt.layers.attention.triton_backend, in the scheduler process: verify as decoding does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend._forward_extend_unified",
    why="deterministic inference gives other bits with speculation than without it, as a verify "
    "step computes attention in another order than a decode step",
    remove_when="SGLang's verify steps are bitwise equal to its decode steps",
    process="scheduler",
    only_on="cuda",
)
def forward_extend_unified(
    original: Upstream,
    backend: Any,
    q: torch.Tensor,
    o: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    causal: bool,
    logits_soft_cap: float,
    sinks: torch.Tensor | None,
    **options: Any,
) -> object:
    from tlt_sglang.engine.verify_attention import VerifyAttention

    window = layer.sliding_window_size
    is_windowed = window is not None and window > -1
    if not forward_batch.forward_mode.is_target_verify() or is_windowed:
        rest = (layer, forward_batch, causal, logits_soft_cap, sinks)
        return original(backend, q, o, *rest, **options)
    attention = VerifyAttention.of(backend)
    return attention.forward(backend, q, layer, forward_batch, sinks=sinks, **options)


PATCHES = (forward_extend_unified,)
