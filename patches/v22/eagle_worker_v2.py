"""sglang.srt.speculative.eagle_worker_v2, in the scheduler: last hidden states of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Batch, EagleWorker, StepResult, Upstream


@wraps_upstream(
    "sglang.srt.speculative.eagle_worker_v2:EAGLEWorkerV2.verify",
    why="training an EAGLE-3 drafter, and requests with return_hidden_states, need the target's "
    "last hidden states as well as the features, and outputs have no field for them",
    remove_when="this version of SGLang is not supported any more",
    process="scheduler",
)
def verify(
    original: Upstream, worker: EagleWorker, batch: Batch, *args: object, **kwargs: object
) -> StepResult:
    from tlt_sglang.engine import hidden_states

    # SGLang has moved the rows of accepted tokens to the front by now.
    result: StepResult = original(worker, batch, *args, **kwargs)
    size = worker.target_worker.model_config.hidden_size
    hidden_states.take_off_last(result.logits_output, size)
    return result


PATCHES = (verify,)
