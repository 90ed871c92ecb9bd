"""sglang.srt.models.llama_eagle3, in the scheduler process: the decoder of CPU drafters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.models.llama_eagle3:LlamaModel.forward",
    why="most of a draft step on CPU is Python code around the kernels of one layer",
    remove_when="SGLang's draft step on CPU takes no longer than its matrix products",
    process="scheduler",
    only_on="cpu",
)
def forward(original: Upstream, model: object, *args: object, **kwargs: object) -> object:
    from tlt_sglang.cpu import decoder

    loop: Upstream = decoder.draft_forward
    return loop(original, model, *args, **kwargs)


PATCHES = (forward,)
