"""sglang.srt.sampling.penaltylib.orchestrator, in the scheduler process: penalties in one order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import PenalizerOrchestrator
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.sampling.penaltylib.orchestrator:BatchedPenalizerOrchestrator.__init__",
    why="the order of penalties is that of a set of classes, which differs between two processes, "
    "and so do logits where penalties that add and penalties that scale come together; and after a "
    "retraction they begin to count anew",
    remove_when="SGLang applies penalties in one order, and counts what a retracted request has",
    process="scheduler",
)
def init(
    original: Upstream, orchestrator: PenalizerOrchestrator, *args: object, **kwargs: object
) -> None:
    from tlt_sglang.sampling import penalties

    original(orchestrator, *args, **kwargs)
    orchestrator.penalizers = penalties.in_order(orchestrator.penalizers)
    penalties.count_outputs(orchestrator)


PATCHES = (init,)
