"""sglang.srt.managers.scheduler_components.weight_updater, in the scheduler: new weights.

All ways of updating weights select runners first, and end in one of two functions, on every rank.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.weight_updates import UpdateManager, UpdateRequest, UpdateResult

_CLASS = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_COPIES = "the target's embedding and head may still be on their way to the sidecar"
_OTHER_CHECKPOINT = "a selector of all, the default, loads the target into a separate drafter, too"


@wraps_upstream(
    f"{_CLASS}._select_runners",
    why=f"{_OTHER_CHECKPOINT}; and {_COPIES}",
    remove_when="SGLang leaves separate drafters alone, and tells plugins that the weights are "
    "about to change",
    process="scheduler",
)
def select_runners(original: Upstream, manager: UpdateManager, *selector: str) -> object:
    from tlt_sglang.engine import engine

    tlt = engine.require()
    tlt.step.finish_copies()
    # Updates from disk and through IPC name no selector.
    return original(manager, *selector or (tlt.weight_sync.default_selector(manager),))


def _marked(name: str) -> Any:
    @wraps_upstream(
        f"{_CLASS}.{name}",
        why="features of one version of the target must not be trained on with those of another",
        remove_when="SGLang tells plugins when the weights have changed",
        process="scheduler",
    )
    def update(original: Upstream, manager: UpdateManager, argument: object) -> object:
        from tlt_sglang.engine import engine

        engine.require().step.mark_target_updated()
        return original(manager, argument)

    return update


@wraps_upstream(
    f"{_CLASS}.begin_weight_update",
    why=_OTHER_CHECKPOINT,
    remove_when="SGLang leaves separate drafters alone",
    process="scheduler",
)
def begin_weight_update(
    original: Upstream, manager: UpdateManager, recv_req: UpdateRequest
) -> UpdateResult:
    from tlt_sglang.engine import engine

    begin = functools.partial(original, manager)
    return engine.require().weight_sync.begin(begin, manager, recv_req)


def _with_selector(name: str) -> Any:
    @wraps_upstream(
        f"{_CLASS}.{name}",
        why=f"{_OTHER_CHECKPOINT}; and clients of an older SGLang open no session",
        remove_when="SGLang leaves separate drafters alone, and no RL stack updates weights "
        "without a session",
        process="scheduler",
    )
    def update(original: Upstream, manager: UpdateManager, recv_req: UpdateRequest) -> UpdateResult:
        from tlt_sglang.engine import engine

        tlt, load = engine.require(), functools.partial(original, manager)
        return tlt.weight_sync.update(load, manager, recv_req, tlt.config.older_clients)

    return update


PATCHES = (
    select_runners,
    _marked("record_weight_version_after_update"),
    _marked("end_weight_update"),
    begin_weight_update,
    _with_selector("update_weights_from_distributed"),
    _with_selector("update_weights_from_tensor"),
)
