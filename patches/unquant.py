"""sglang.srt.layers.quantization.unquant, in the scheduler process: packed linears on CPU.

`process_weights_after_loading` is SGLang's own notice that a weight is complete, at start and at
the end of every weight update.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_MODULE = "sglang.srt.layers.quantization.unquant"
_REMOVE = "SGLang packs float32 weights for CPUs without AMX"


@wraps_upstream(
    f"{_MODULE}:UnquantizedLinearMethod.process_weights_after_loading",
    why="the moment to pack a linear layer's weight, at start and after each update",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "5694d2d9bd3f4d88"},
)
def linear_process(original: Any, method: Any, layer: Any) -> None:
    from tlt_sglang.cpu import linear

    original(method, layer)
    linear.repack(layer.weight)


@wraps_upstream(
    f"{_MODULE}:UnquantizedLinearMethod.apply",
    why="verify steps of 4 to 16 rows cost half with packed weights, and rows are exact",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "d1fd0753662f6a7e"},
)
def linear_apply(original: Any, method: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    from tlt_sglang.cpu import linear

    return linear.linear(x, layer.weight, bias)


PATCHES = (linear_process, linear_apply)
