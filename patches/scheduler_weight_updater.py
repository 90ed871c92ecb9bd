"""sglang.srt.managers.scheduler_components.weight_updater, in the scheduler: new weights.

All ways of updating weights select runners first, and end in one of two functions, on every rank.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_CLASS = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"


def _marked(name: str) -> Any:
    @wraps_upstream(
        f"{_CLASS}.{name}",
        why="features of one version of the target must not be trained on with those of another",
        remove_when="SGLang tells plugins when the weights have changed",
        process="scheduler",
    )
    def update(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
        from tlt_sglang.engine import engine

        assert engine.current is not None
        if engine.current.step.online_drafter is not None:
            engine.current.step.online_drafter.mark_target_updated()
        return original(manager, *args, **kwargs)

    return update


def _copies_finished(name: str) -> Any:
    @wraps_upstream(
        f"{_CLASS}.{name}",
        why="the target's embedding and head may still be on their way to the sidecar",
        remove_when="SGLang tells plugins that the weights are about to change or to be released",
        process="scheduler",
    )
    def before(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
        from tlt_sglang.engine import engine

        assert engine.current is not None
        if engine.current.step.online_drafter is not None:
            engine.current.step.online_drafter.finish_copies()
        return original(manager, *args, **kwargs)

    return before


PATCHES = (
    _copies_finished("_select_runners"),
    _copies_finished("release_memory_occupation"),
    _marked("record_weight_version_after_update"),
    _marked("end_weight_update"),
)
