"""sglang.srt.layers.quantization.base_config, in the scheduler process: heads that have changed."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.layers.quantization.base_config:QuantizeMethodBase.process_weights_after_loading",
    why="embeddings have no hook of their own; a head tied to one must be packed afresh",
    remove_when="SGLang packs float32 weights for CPUs without AMX",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "b7378523671773d5"},
)
def process_weights_after_loading(original: Any, method: Any, layer: Any) -> None:
    from tlt_sglang.cpu import linear

    original(method, layer)
    weight = getattr(layer, "weight", None)
    if weight is not None:
        linear.forget(weight)


PATCHES = (process_weights_after_loading,)
