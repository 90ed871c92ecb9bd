"""sglang.srt.managers.scheduler_components.weight_updater, in the scheduler: new weights.

All ways of updating weights end in one of these, on every rank.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching import wraps_upstream

_CLASS = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_WHY = "features of one version of the target must not be trained on with those of another"
_REMOVE = "SGLang tells plugins when the weights have changed"


def _tell() -> None:
    from tlt_sglang import engine

    assert engine.current is not None
    if engine.current.live is not None:
        engine.current.live.target_updated()


@wraps_upstream(
    f"{_CLASS}.record_weight_version_after_update",
    why=_WHY,
    remove_when=_REMOVE,
    process="scheduler",
    digests={"0.5.23": "fc739d818f1c8fe8"},
)
def record_weight_version_after_update(
    original: Any, manager: Any, *args: Any, **kwargs: Any
) -> Any:
    _tell()
    return original(manager, *args, **kwargs)


@wraps_upstream(
    f"{_CLASS}.end_weight_update",
    why=_WHY,
    remove_when=_REMOVE,
    process="scheduler",
    digests={"0.5.23": "cf2f357c18b08375"},
)
def end_weight_update(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    _tell()
    return original(manager, *args, **kwargs)


PATCHES = (record_weight_version_after_update, end_weight_update)
