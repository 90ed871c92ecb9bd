"""sglang.srt.managers.scheduler_components.weight_updater, in the scheduler: released weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_CLASS = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"


@wraps_upstream(
    f"{_CLASS}.release_memory_occupation",
    why="the target's embedding and head may still be on their way to the sidecar",
    remove_when="SGLang tells plugins that the weights are about to be released",
    process="scheduler",
)
def release_memory_occupation(
    original: Upstream, manager: object, *args: Any, **kwargs: Any
) -> object:
    from tlt_sglang.engine import engine

    engine.require().step.finish_copies()
    return original(manager, *args, **kwargs)


PATCHES = (release_memory_occupation,)
