"""sglang.srt.model_executor.model_runner, in the scheduler: deterministic inference on CPU."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.model_executor.model_runner:ModelRunner.maybe_enable_batch_invariant_mode",
    why="it puts GPU kernels in the place of matrix products; ours treat every row alike already",
    remove_when="SGLang's batch-invariant mode knows CPUs",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "2dad8cb360db31b6"},
)
def maybe_enable_batch_invariant_mode(original: Any, runner: Any) -> None:
    return None


PATCHES = (maybe_enable_batch_invariant_mode,)
