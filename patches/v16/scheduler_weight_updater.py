"""sglang.srt.managers.scheduler_components.weight_updater, in the scheduler: new weights.

This shape has one function per way of updating weights, without sessions and selectors.
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


def _for_the_target(source: str) -> Any:
    @wraps_upstream(
        f"{_CLASS}.update_weights_from_{source}",
        why="SGLang loads the target's weights into a separate drafter, too; features of one "
        f"version must not be trained on with those of another; and {_COPIES}",
        remove_when="SGLang leaves separate drafters alone, and tells plugins when the weights "
        "have changed",
        process="scheduler",
    )
    def update(original: Upstream, manager: UpdateManager, recv_req: UpdateRequest) -> UpdateResult:
        from tlt_sglang.engine import engine

        tlt, load = engine.require(), functools.partial(original, manager)
        tlt.step.finish_copies()
        tlt.step.mark_target_updated()
        return tlt.weight_sync.update_target(load, manager, recv_req)

    return update


PATCHES = (*(_for_the_target(source) for source in ("disk", "distributed", "tensor", "ipc")),)
