"""sglang.srt.model_executor.model_runner, in the scheduler: determinism on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.model_executor.model_runner:ModelRunner.maybe_enable_batch_invariant_mode",
    why="it replaces matrix products with GPU kernels; our products are already batch-invariant",
    remove_when="SGLang's batch-invariant mode supports CPUs",
    process="scheduler",
    only_on="cpu",
)
def maybe_enable_batch_invariant_mode(original: Upstream, runner: object) -> None:
    return None


PATCHES = (maybe_enable_batch_invariant_mode,)
