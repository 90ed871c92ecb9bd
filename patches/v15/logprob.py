"""sglang.srt.layers.utils.logprob, in the scheduler process: logprobs of verified tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Batch, Upstream


@wraps_upstream(
    "sglang.srt.layers.utils.logprob:compute_spec_v2_logprobs",
    why="at a temperature, plain decoding reports the logarithm of rounded probabilities, and "
    "speculation that of exact ones: they differ for tokens whose probability rounds to 0",
    remove_when="SGLang computes both in the same way",
    process="scheduler",
)
def compute_spec_v2_logprobs(
    original: Upstream, batch: Batch, logits_output: Any, *args: object
) -> None:
    from tlt_sglang.sampling import logprobs

    logprobs.compute(original, batch, logits_output, *args)


PATCHES = (compute_spec_v2_logprobs,)
