"""sglang.srt.speculative.ngram_worker, in the scheduler: n-grams without a drafter on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import replaces_upstream, wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.speculative.ngram_worker"
_REMOVE = "this shape of SGLang is not supported any more"


@wraps_upstream(
    f"{_MODULE}:NGRAMWorker.alloc_memory_pool",
    why="its tensors are made for a CUDA device, whatever the engine's is",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
)
def alloc_memory_pool(original: Upstream, worker: Any, **options: object) -> None:
    worker.device = worker.server_args.device
    original(worker, **options)


PATCHES = (
    alloc_memory_pool,
    replaces_upstream(
        f"{_MODULE}:USE_FULL_MASK",
        False,
        why="our attention on CPU reads the mask of the drafts alone",
        remove_when=_REMOVE,
        process="scheduler",
        only_on="cpu",
    ),
)
