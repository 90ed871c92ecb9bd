"""sglang.srt.managers.tp_worker, in the scheduler process: the graphs of SGLang's own flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.managers.tp_worker:TpModelWorker.init_cuda_graphs",
    why="graphs as large as several strategies together are used by none of them",
    remove_when="SGLang captures graphs for whole strategies",
    process="scheduler",
    only_on="cuda",
)
def init_cuda_graphs(
    original: Upstream, worker: object, capture_decode_cuda_graph: bool = True
) -> None:
    from tlt_sglang.engine import build, engine

    one = engine.require()
    later = build.captures_later(one.config, one.device)
    original(worker, capture_decode_cuda_graph=capture_decode_cuda_graph and not later)


PATCHES = (init_cuda_graphs,)
