"""sglang.srt.models.llama_eagle3, in the scheduler process: the decoder loop of CPU drafters."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.models.llama_eagle3:LlamaModel.forward",
    why="on CPU most of a draft step is Python around one layer's kernels",
    remove_when="SGLang's CPU draft step costs no more than its matrix products",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "294395fdb4a95582"},
)
def forward(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    from tlt_sglang.cpu import decoder

    return decoder.draft_forward(original, model, *args, **kwargs)


PATCHES = (forward,)
