"""sglang.srt.batch_invariant_ops.batch_invariant_ops, in the scheduler: determinism on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.batch_invariant_ops.batch_invariant_ops:enable_batch_invariant_mode",
    why="it replaces matrix products with GPU kernels; our products are already batch-invariant",
    remove_when="SGLang's batch-invariant mode supports CPUs",
    process="scheduler",
    only_on="cpu",
)
def enable_batch_invariant_mode(original: Upstream, *args: object) -> None:
    return None


PATCHES = (enable_batch_invariant_mode,)
