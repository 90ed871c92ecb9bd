"""sglang.srt.distributed.parallel_state, in the scheduler process: ranks on CPU talk by gloo."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.distributed.parallel_state:init_model_parallel_group",
    why="where torch brings an NCCL library, upstream opens it for CPU ranks, too, and fails",
    remove_when="SGLang's CPU ranks leave NCCL alone",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "0b820327b54ccc33"},
)
def init_model_parallel_group(original: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs["use_pynccl"] = False
    return original(*args, **kwargs)


PATCHES = (init_model_parallel_group,)
