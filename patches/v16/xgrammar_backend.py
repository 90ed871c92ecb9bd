"""sglang.srt.constrained.xgrammar_backend, in the scheduler process: grammars on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.constrained.xgrammar_backend:XGrammarGrammar.apply_vocab_mask",
    why="it raises on CPU, and so ends the engine at the first request with a grammar",
    remove_when="this shape of SGLang is not supported any more",
    process="scheduler",
    only_on="cpu",
)
def apply_vocab_mask(
    original: Upstream, grammar: object, logits: torch.Tensor, vocab_mask: torch.Tensor
) -> None:
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)


PATCHES = (apply_vocab_mask,)
