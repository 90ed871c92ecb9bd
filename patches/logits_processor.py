"""sglang.srt.layers.logits_processor, in the scheduler process: the packed head on CPU.

They also keep the target's last hidden states where drafters are trained or requests want them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import LogitsProcessor
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head",
    why="the head, the largest matrix of a step, bypasses the method of linear layers",
    remove_when="SGLang routes an unquantized head through its quant_method on CPU",
    process="scheduler",
    only_on="cpu",
)
def compute_lm_head(
    original: Upstream,
    processor: LogitsProcessor,
    hidden_states: torch.Tensor,
    lm_head: object,
    embedding_bias: torch.Tensor | None = None,
    **kwargs: object,
) -> object:
    from tlt_sglang.cpu import head, linear
    from tlt_sglang.engine import engine

    weight = getattr(lm_head, "weight", None)
    if weight is None or hasattr(lm_head, "set_lora") or not linear.packable(weight):
        return original(processor, hidden_states, lm_head, embedding_bias, **kwargs)
    if not linear.packed(weight):
        linear.repack(weight)
    unscaled = processor.logit_scale is None and not processor.final_logit_softcapping
    greedy = unscaled and engine.require().step.telemetry is not None
    return head.logits(hidden_states, weight, greedy=greedy)


@wraps_upstream(
    "sglang.srt.layers.logits_processor:LogitsProcessor.__init__",
    why="training an EAGLE-3 drafter, and requests with return_hidden_states, need the target's "
    "last hidden states as well as the features",
    remove_when="SGLang has a switch for it that does not add an HTTP route",
    process="scheduler",
)
def init(original: Upstream, processor: LogitsProcessor, *args: object, **kwargs: object) -> None:
    from tlt_sglang import upstream
    from tlt_sglang.engine import hidden_states

    original(processor, *args, **kwargs)
    if hidden_states.last_are_kept():
        upstream.current().keep_last_hidden_states(processor)


PATCHES = (compute_lm_head, init)
