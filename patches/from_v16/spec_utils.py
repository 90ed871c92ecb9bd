"""sglang.srt.speculative.spec_utils, in the scheduler process: targets without recurrent states."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import ModelConfig, TargetWorker, Upstream


@functools.cache
def _keeps_states(model_config: ModelConfig) -> bool:
    """Return whether the target has recurrent states, which verification has to commit."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model_config) is not None


@wraps_upstream(
    "sglang.srt.speculative.spec_utils:commit_mamba_states_after_verify",
    why="it searches the model's config at every step to find that there is nothing to commit",
    remove_when="SGLang remembers whether a model keeps recurrent states",
    process="scheduler",
)
def commit_mamba_states_after_verify(
    original: Upstream, target_worker: TargetWorker, *args: object, **kwargs: object
) -> None:
    if _keeps_states(target_worker.model_runner.model_config):
        original(target_worker, *args, **kwargs)


PATCHES = (commit_mamba_states_after_verify,)
