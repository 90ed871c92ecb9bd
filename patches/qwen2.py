"""sglang.srt.models.qwen2, in the scheduler process: the decoder loop of CPU targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.models.qwen2:Qwen2Model.forward",
    why="half of a decode step on CPU is Python code between the kernels of the layers",
    remove_when="SGLang's decode step on CPU takes no longer than its matrix products",
    process="scheduler",
    only_on="cpu",
)
def forward(original: Upstream, model: object, *args: object, **kwargs: object) -> object:
    from tlt_sglang.cpu import decoder

    loop: Upstream = decoder.forward
    return loop(original, model, *args, **kwargs)


PATCHES = (forward,)
