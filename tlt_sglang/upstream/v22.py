"""The shape of SGLang before drafters had a parallel layout, and before their samples had seeds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tlt_sglang.upstream import v23

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Upstream


class Adapter(v23.Adapter):
    """See `tlt_sglang.upstream.api.Sglang`, also for the docstrings."""

    def _draft_placement(self, draft: Any) -> AbstractContextManager[object]:
        from sglang.srt.speculative import eagle_worker_v2 as eagle

        context: AbstractContextManager[object] = eagle.draft_tp_context(draft.draft_owns_attention)
        return context

    def sample_proposal(
        self,
        sample: Upstream,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        top_ks: torch.Tensor,
        seeds: torch.Tensor | None,
        positions: torch.Tensor,
        step: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        proposal: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = sample(
            logits, temperatures, top_ks
        )
        return proposal
