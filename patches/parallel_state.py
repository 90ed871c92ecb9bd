"""sglang.srt.distributed.parallel_state, in the scheduler process: gloo for CPU ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.distributed.parallel_state:init_model_parallel_group",
    why="if torch contains an NCCL library, upstream opens it for CPU ranks as well, and fails",
    remove_when="SGLang does not open NCCL for CPU ranks",
    process="scheduler",
    only_on="cpu",
)
def init_model_parallel_group(original: Upstream, *args: object, **kwargs: object) -> object:
    kwargs["use_pynccl"] = False
    return original(*args, **kwargs)


PATCHES = (init_model_parallel_group,)
