"""sglang.srt.model_executor.model_runner_components.weight_updater, in the scheduler process."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_CLASS = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"


@wraps_upstream(
    f"{_CLASS}.update_weights_from_disk",
    why="upstream captures anew the graphs of one strategy only",
    remove_when="SGLang's runtime states capture their graphs anew",
    process="scheduler",
)
def update_weights_from_disk(original: Any, updater: Any, *args: Any, **kwargs: Any) -> Any:
    from tlt_sglang.engine import engine, served

    tlt = engine.require()
    problem = served.recapture_problem(tlt.device, tlt.step, **kwargs)
    if problem is not None:
        return False, problem
    return original(updater, *args, **kwargs)


@wraps_upstream(
    "sglang.srt.model_executor.model_runner_components.weight_updater:init_custom_process_group",
    why="a trainer that dies before its process group is formed blocks the scheduler for half an "
    "hour",
    remove_when="SGLang has a time limit for the process groups of trainers",
    process="scheduler",
)
def init_custom_process_group(original: Any, **options: Any) -> Any:
    from tlt_sglang.engine import engine, weight_sync

    return original(**weight_sync.limited(options, engine.require().config.client_timeout_s))


PATCHES = (update_weights_from_disk, init_custom_process_group)
