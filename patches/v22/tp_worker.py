"""sglang.srt.managers.tp_worker, in the scheduler process: last hidden states of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
    why="training an EAGLE-3 drafter, and requests with return_hidden_states, need the target's "
    "last hidden states as well as the features, and outputs have no field for them",
    remove_when="this version of SGLang is not supported any more",
    process="scheduler",
)
def forward_batch_generation(
    original: Upstream,
    worker: Any,
    batch: object,
    *args: object,
    is_verify: bool = False,
    **kwargs: object,
) -> Any:
    result = original(worker, batch, *args, is_verify=is_verify, **kwargs)
    if not (is_verify or worker.is_draft_worker or result.logits_output is None):
        from tlt_sglang.engine import hidden_states

        hidden_states.take_off_last(result.logits_output, worker.model_config.hidden_size)
    return result


PATCHES = (forward_batch_generation,)
