"""sglang.srt.speculative.eagle_worker_v2, in the scheduler: the choice of a chain's drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.speculative.eagle_worker_v2:draft_topk1_postprocess",
    why="drafts are chosen with the target's noise",
    remove_when="SGLang drafts with the noise of a seed",
    process="scheduler",
    only_on="cuda",
)
def draft_topk1_postprocess(original: Upstream, logits: torch.Tensor, *args: object) -> object:
    from tlt_sglang.engine import engine

    noise = engine.require().step.noise
    return original(logits if noise is None else noise.scores(logits), *args)


PATCHES = (draft_topk1_postprocess,)
