"""sglang.srt.model_executor.model_runner_components.weight_updater, in the scheduler process.

Packed weights, where an update is one call. One from disk packs them by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_CLASS = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"


def _repacked(source: str) -> Any:
    @wraps_upstream(
        f"{_CLASS}.update_weights_from_{source}",
        why="packed copies of weights must be packed again when the weights have changed",
        remove_when="SGLang packs float32 weights for CPUs without AMX",
        process="scheduler",
        only_on="cpu",
    )
    def update(original: Upstream, updater: Any, *args: object, **kwargs: object) -> object:
        from tlt_sglang.cpu import linear

        with linear.changing(updater.get_model().parameters()):
            return original(updater, *args, **kwargs)

    return update


PATCHES = (_repacked("tensor"), _repacked("distributed"))
