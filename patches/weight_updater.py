"""sglang.srt.model_executor.model_runner_components.weight_updater, in the scheduler process."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching import wraps_upstream


@wraps_upstream(
    "sglang.srt.model_executor.model_runner_components.weight_updater:"
    "WeightUpdater.begin_weight_update",
    why="packed copies of weights about to change must not be used until they are packed again",
    remove_when="SGLang packs float32 weights for CPUs without AMX",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "a34f3d39513eca55"},
)
def begin_weight_update(original: Any, updater: Any) -> None:
    from tlt_sglang.cpu import linear

    for parameter in updater.get_model().parameters():
        linear.forget(parameter)
    original(updater)


PATCHES = (begin_weight_update,)
