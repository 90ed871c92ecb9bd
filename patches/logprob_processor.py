"""sglang.srt.layers.logprob_processor, in the scheduler process: logprobs of verified tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Batch, Upstream


@wraps_upstream(
    "sglang.srt.layers.logprob_processor:compute_spec_logprobs",
    why="at a temperature, plain decoding reports the logarithm of rounded probabilities, and "
    "speculation that of exact ones: they differ for tokens whose probability rounds to 0",
    remove_when="SGLang computes both in the same way",
    process="scheduler",
)
def compute_spec_logprobs(
    original: Upstream, batch: Batch, logits_output: Any, *args: object, **kwargs: object
) -> None:
    from sglang.srt.environ import envs

    from tlt_sglang import upstream
    from tlt_sglang.sampling import logprobs

    info, logits = batch.sampling_info, logits_output.next_token_logits
    original_logprobs = envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get()
    exact = original_logprobs or upstream.current().is_deterministic()
    if info.is_all_greedy or exact:
        original(batch, logits_output, *args, **kwargs)
        return
    try:
        logits_output.next_token_logits = logprobs.of_probabilities(logits, info.temperatures)
        original(batch, logits_output, *args, **kwargs)
    finally:
        logits_output.next_token_logits = logits


PATCHES = (compute_spec_logprobs,)
