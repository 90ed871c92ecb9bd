"""sglang.srt.layers.logits_processor, in the scheduler: last hidden states in the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import LogitsProcessor
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.layers.logits_processor:LogitsProcessor._get_hidden_states_to_store",
    why="training an EAGLE-3 drafter, and requests with return_hidden_states, need the target's "
    "last hidden states as well as the features, and outputs have no field for them",
    remove_when="this version of SGLang is not supported any more",
    process="scheduler",
)
def get_hidden_states_to_store(
    original: Upstream,
    processor: LogitsProcessor,
    hidden_states: torch.Tensor,
    hidden_states_before_norm: torch.Tensor | None,
    aux_hidden_states: object,
    *args: Any,
) -> torch.Tensor | None:
    from tlt_sglang.engine import hidden_states as product

    features: torch.Tensor | None = original(
        processor, hidden_states, hidden_states_before_norm, aux_hidden_states, *args
    )
    *_, metadata = args
    if features is None or aux_hidden_states is None or not metadata.capture_hidden_mode.is_full():
        return features
    return product.append_last(features, hidden_states, processor)


PATCHES = (get_hidden_states_to_store,)
