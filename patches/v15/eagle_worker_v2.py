"""sglang.srt.speculative.eagle_worker_v2, in the scheduler process: flushes, noise, and masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import replaces_upstream, wraps_upstream
from tlt_sglang.sampling.branch import CHOOSES_BY_PROBS

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.speculative.eagle_worker_v2"


@wraps_upstream(
    f"{_MODULE}:EAGLEWorkerV2.clear_cache_pool",
    why="after /flush_cache nothing of earlier requests remains, our n-grams included",
    remove_when="SGLang tells plugins when its caches are flushed",
    process="scheduler",
)
def clear_cache_pool(original: Upstream, worker: object) -> None:
    from tlt_sglang.engine import engine

    original(worker)
    if (pool := engine.require().step.pool) is not None:
        pool.flush()


@wraps_upstream(
    f"{_MODULE}:EagleDraftWorker.init_attention_backend",
    why="our attention on CPU reads the mask of the drafts alone",
    remove_when="this shape of SGLang is not supported any more",
    process="scheduler",
    only_on="cpu",
)
def init_attention_backend(original: Upstream, worker: Any) -> None:
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    original(worker)
    worker.tree_mask_mode = TreeMaskMode.QLEN_ONLY


PATCHES = (
    clear_cache_pool,
    init_attention_backend,
    replaces_upstream(
        f"{_MODULE}:_is_hip",
        CHOOSES_BY_PROBS,
        why="drafts are chosen with the target's noise, and for a chain SGLang takes an argmax "
        "that nothing can wrap; where this is true, it takes the largest probability instead",
        remove_when="this shape of SGLang is not supported any more",
        process="scheduler",
        only_on="cuda",
    ),
)
