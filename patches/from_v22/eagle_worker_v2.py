"""sglang.srt.speculative.eagle_worker_v2, in the scheduler process: the target's prefill."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Batch, EagleWorker, Upstream


@wraps_upstream(
    "sglang.srt.speculative.eagle_worker_v2:EAGLEWorkerV2._forward_prefill_batch",
    why="hidden states of prompts are logged before the drafter moves its tokens by one",
    remove_when="SGLang hands the hidden states of prompts to plugins",
    process="scheduler",
)
def forward_prefill_batch(
    original: Upstream, worker: EagleWorker, batch: Batch, *args: object, **kwargs: object
) -> object:
    from tlt_sglang.engine import engine

    upstream = functools.partial(original, worker, batch, *args, **kwargs)
    return engine.require().step.prefill_target(upstream, batch)


PATCHES = (forward_prefill_batch,)
