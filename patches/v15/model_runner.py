"""sglang.srt.model_executor.model_runner, in the scheduler process: updates of the weights."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_MODULE = "sglang.srt.model_executor.model_runner"


@wraps_upstream(
    f"{_MODULE}:ModelRunner.update_weights_from_disk",
    why="upstream captures anew the graphs of one strategy only",
    remove_when="SGLang's runtime states capture their graphs anew",
    process="scheduler",
)
def update_weights_from_disk(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    from tlt_sglang.engine import engine, served

    tlt = engine.require()
    problem = served.recapture_problem(tlt.device, tlt.step, **kwargs)
    if problem is not None:
        return False, problem
    return original(runner, *args, **kwargs)


@wraps_upstream(
    f"{_MODULE}:init_custom_process_group",
    why="a trainer that dies before its process group is formed blocks the scheduler for half an "
    "hour",
    remove_when="SGLang has a time limit for the process groups of trainers",
    process="scheduler",
)
def init_custom_process_group(original: Any, **options: Any) -> Any:
    from tlt_sglang.engine import engine, weight_sync

    return original(**weight_sync.limited(options, engine.require().config.client_timeout_s))


def _repacked(source: str) -> Any:
    @wraps_upstream(
        f"{_MODULE}:ModelRunner.update_weights_from_{source}",
        why="packed copies of weights must be packed again when the weights have changed",
        remove_when="SGLang packs float32 weights for CPUs without AMX",
        process="scheduler",
        only_on="cpu",
    )
    def update(original: Any, runner: Any, *args: object, **kwargs: object) -> object:
        from tlt_sglang.cpu import linear

        with linear.changing(runner.model.parameters()):
            return original(runner, *args, **kwargs)

    return update


PATCHES = (
    update_weights_from_disk,
    init_custom_process_group,
    _repacked("tensor"),
    _repacked("distributed"),
)
