"""sglang.srt.layers.layernorm, in the scheduler process: RMSNorm in one CPU kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.layers.layernorm:RMSNorm.forward_native",
    why="one kernel replaces eight torch calls, a quarter of a decode step, on CPUs without AMX",
    remove_when="SGLang ships a fused RMSNorm for CPUs without AMX",
    process="scheduler",
    only_on="cpu",
)
def forward_native(original: Upstream, *args: object, **kwargs: object) -> object:
    from tlt_sglang.cpu import layers

    fused: Upstream = layers.rms_norm
    return fused(original, *args, **kwargs)


PATCHES = (forward_native,)
