"""sglang.srt.models.qwen2, in the scheduler process: the decoder loop of CPU targets."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.models.qwen2:Qwen2Model.forward",
    why="on CPU half of a decode step is Python between the layers' kernels",
    remove_when="SGLang's CPU decode step costs no more than its matrix products",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "d59230ec1f2cebbc"},
)
def forward(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    from tlt_sglang.cpu import decoder

    return decoder.forward(original, model, *args, **kwargs)


PATCHES = (forward,)
