"""sglang.srt.managers.tp_worker, in the scheduler process: a prefill of the target.

In this shape it has no function of its own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Batch, StepResult, Upstream


@wraps_upstream(
    "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
    why="hidden states of prompts are logged before the drafter moves its tokens by one; the "
    "target's last ones come behind the features",
    remove_when="SGLang hands the hidden states of prompts to plugins",
    process="scheduler",
)
def forward_batch_generation(
    original: Upstream,
    worker: Any,
    batch: Batch | None,
    *args: object,
    **kwargs: object,
) -> object:
    from tlt_sglang.engine import engine, hidden_states

    upstream = functools.partial(original, worker, batch, *args, **kwargs)
    step = engine.require().step
    if worker.is_draft_worker or batch is None or not _prefills(batch):
        return upstream()

    def prefill() -> StepResult:
        result: StepResult = upstream()
        if result.logits_output is not None:
            hidden_states.take_off_last(result.logits_output, worker.model_config.hidden_size)
        return result

    return step.prefill_target(prefill, batch)


def _prefills(batch: Batch) -> bool:
    return batch.forward_mode.is_extend() or batch.is_extend_in_batch


PATCHES = (forward_batch_generation,)
