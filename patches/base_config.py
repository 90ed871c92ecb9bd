"""sglang.srt.layers.quantization.base_config, in the scheduler process: updated heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.layers.quantization.base_config:QuantizeMethodBase.process_weights_after_loading",
    why="embeddings have no hook of their own, and a head that is tied to one must be repacked",
    remove_when="SGLang packs float32 weights for CPUs without AMX",
    process="scheduler",
    only_on="cpu",
)
def process_weights_after_loading(original: Upstream, method: object, layer: object) -> None:
    from tlt_sglang.cpu import linear

    original(method, layer)
    weight = getattr(layer, "weight", None)
    if weight is not None:
        linear.forget(weight)


PATCHES = (process_weights_after_loading,)
