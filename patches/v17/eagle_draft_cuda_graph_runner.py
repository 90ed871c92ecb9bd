"""sglang.srt.speculative.eagle_draft_cuda_graph_runner, in the scheduler: graphs of a strategy.

The drafter of this shape has its own copy of SGLang's arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import DraftWorker, Upstream


@wraps_upstream(
    "sglang.srt.speculative.eagle_draft_cuda_graph_runner:EAGLEDraftCudaGraphRunner.__init__",
    why="the drafter's copy of the arguments has the width of all strategies together, and the "
    "batch sizes of none of them",
    remove_when="this shape of SGLang is not supported any more",
    process="scheduler",
    only_on="cuda",
)
def init(original: Upstream, graphs: object, worker: DraftWorker, **options: object) -> None:
    from tlt_sglang.upstream import v17

    with v17.with_drafter(worker):
        original(graphs, worker, **options)


PATCHES = (init,)
