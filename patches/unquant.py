"""sglang.srt.layers.quantization.unquant, in the scheduler process: packed linears on CPU.

SGLang calls `process_weights_after_loading` when a weight is complete, at start and at the end of
every weight update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import Linear
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.layers.quantization.unquant"
_REMOVE = "SGLang packs float32 weights for CPUs without AMX"


@wraps_upstream(
    f"{_MODULE}:UnquantizedLinearMethod.process_weights_after_loading",
    why="the weight of a linear layer has to be packed at start and after each update",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
)
def linear_process(original: Upstream, method: object, layer: Linear) -> None:
    from tlt_sglang.cpu import linear

    original(method, layer)
    linear.repack(layer.weight)


@wraps_upstream(
    f"{_MODULE}:UnquantizedLinearMethod.apply",
    why="packed weights halve the time of verify steps of 4 to 16 rows and make rows independent",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
)
def linear_apply(
    original: Upstream,
    method: object,
    layer: Linear,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    from tlt_sglang.cpu import linear

    return linear.linear(x, layer.weight, bias)


PATCHES = (linear_process, linear_apply)
