"""sglang.srt.layers.layernorm, in the scheduler process: RMSNorm in one kernel on CPU."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.layers.layernorm:RMSNorm.forward_native",
    why="without AMX SGLang runs RMSNorm as eight torch calls, a quarter of a decode step",
    remove_when="SGLang ships a fused RMSNorm for CPUs without AMX",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "d3424bd311678c85"},
)
def forward_native(original: Any, *args: Any, **kwargs: Any) -> Any:
    from tlt_sglang.cpu import layers

    return layers.rms_norm(original, *args, **kwargs)


PATCHES = (forward_native,)
