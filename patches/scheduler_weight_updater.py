"""sglang.srt.managers.scheduler_components.weight_updater, in the scheduler: new weights.

All ways of updating weights end in one of these, on every rank.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_CLASS = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"


def _marked(name: str, digest: str) -> Any:
    @wraps_upstream(
        f"{_CLASS}.{name}",
        why="features of one version of the target must not be trained on with those of another",
        remove_when="SGLang tells plugins when the weights have changed",
        process="scheduler",
        digests={"0.5.23": digest},
    )
    def update(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
        from tlt_sglang.engine import engine

        assert engine.current is not None
        if engine.current.step.online_drafter is not None:
            engine.current.step.online_drafter.mark_target_updated()
        return original(manager, *args, **kwargs)

    return update


PATCHES = (
    _marked("record_weight_version_after_update", "fc739d818f1c8fe8"),
    _marked("end_weight_update", "cf2f357c18b08375"),
)
