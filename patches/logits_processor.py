"""sglang.srt.layers.logits_processor, in the scheduler process: the packed head on CPU."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head",
    why="the head bypasses the linear method, and is the largest matrix of a step",
    remove_when="SGLang routes an unquantized head through its quant_method on CPU",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "a20af75b22e50ac8"},
)
def compute_lm_head(
    original: Any,
    processor: Any,
    hidden_states: Any,
    lm_head: Any,
    embedding_bias: Any = None,
    **kwargs: Any,
) -> Any:
    from tlt_sglang.cpu import head, linear
    from tlt_sglang.engine import engine

    weight = getattr(lm_head, "weight", None)
    if weight is None or hasattr(lm_head, "set_lora") or not linear.packable(weight):
        return original(processor, hidden_states, lm_head, embedding_bias, **kwargs)
    if not linear.packed(weight):
        linear.repack(weight)
    assert engine.current is not None
    as_they_are = processor.logit_scale is None and not processor.final_logit_softcapping
    greedy = as_they_are and engine.current.step.telemetry is not None
    return head.logits(hidden_states, weight, greedy=greedy)


@wraps_upstream(
    "sglang.srt.layers.logits_processor:LogitsProcessor.__init__",
    why="training an EAGLE-3 drafter needs the target's last hidden states beside the features",
    remove_when="SGLang's own switch for it does not come with a route of its own",
    process="scheduler",
    digests={"0.5.23": "97d7c13496c498dc"},
)
def init(original: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
    from tlt_sglang.engine import engine

    assert engine.current is not None
    original(processor, *args, **kwargs)
    if engine.current.config.harvests:
        processor.keep_last_hidden_states = True


PATCHES = (compute_lm_head, init)
