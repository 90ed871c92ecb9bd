"""sglang.srt.layers.activation, in the scheduler process: SiLU-and-mul in one CPU kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.layers.activation:SiluAndMul.forward_native",
    why="one kernel replaces four torch calls on CPUs without AMX",
    remove_when="SGLang ships a fused SiluAndMul for CPUs without AMX",
    process="scheduler",
    only_on="cpu",
)
def forward_native(original: Upstream, *args: object, **kwargs: object) -> object:
    from tlt_sglang.cpu import layers

    fused: Upstream = layers.silu_and_mul
    return fused(original, *args, **kwargs)


PATCHES = (forward_native,)
