"""sglang.srt.constrained.xgrammar_backend, in the scheduler process: masks of grammars on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.constrained.xgrammar_backend:_allocate_token_bitmask",
    why="it pins memory for a CUDA device, and so ends an engine on CPU at the first request with "
    "a grammar",
    remove_when="this shape of SGLang is not supported any more",
    process="scheduler",
    only_on="cpu",
)
def allocate_token_bitmask(original: Upstream, vocab_size: int, batch_size: int) -> torch.Tensor:
    from xgrammar import allocate_token_bitmask

    mask: torch.Tensor = allocate_token_bitmask(batch_size, vocab_size)
    return mask


PATCHES = (allocate_token_bitmask,)
