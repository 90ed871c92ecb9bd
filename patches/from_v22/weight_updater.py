"""sglang.srt.model_executor.model_runner_components.weight_updater, in the scheduler process.

Packed weights in a session of updates.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_CLASS = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"
_REMOVE = "SGLang packs float32 weights for CPUs without AMX"


@wraps_upstream(
    f"{_CLASS}.begin_weight_update",
    why="packed copies of weights about to change must not be used until they are packed again",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
)
def begin_weight_update(original: Any, updater: Any) -> None:
    from tlt_sglang.cpu import linear

    for parameter in updater.get_model().parameters():
        linear.forget(parameter)
    original(updater)


@wraps_upstream(
    f"{_CLASS}.end_weight_update",
    why="what a drafter has beside SGLang's own layers has no hook that says it is complete",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
)
def end_weight_update(original: Any, updater: Any, **kwargs: Any) -> None:
    from tlt_sglang.cpu import linear

    original(updater, **kwargs)
    linear.renew()


PATCHES = (begin_weight_update, end_weight_update)
