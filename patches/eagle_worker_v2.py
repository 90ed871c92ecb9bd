"""sglang.srt.speculative.eagle_worker_v2, in the scheduler process: a strategy for every step.

Each patch of a decode step is one call into `tlt_sglang.engine.step.SpeculationStep`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    import torch

    from tlt_sglang.engine.step import SpeculationStep
    from tlt_sglang.patching.patch import Patch
    from tlt_sglang.upstream.layers import DraftForwardBatch
    from tlt_sglang.upstream.protocols import (
        Batch,
        DraftWorker,
        EagleWorker,
        StepResult,
        Upstream,
        VerifyInput,
    )

_MODULE = "sglang.srt.speculative.eagle_worker_v2"


def _step() -> SpeculationStep:
    """Return the speculation step of this process."""
    from tlt_sglang.engine import engine

    return engine.require().step


def _wrapped(name: str) -> Callable[[Upstream], Patch]:
    return wraps_upstream(
        f"{_MODULE}:{name}",
        why="SGLang's adaptive speculation changes the number of steps of a chain and nothing else",
        remove_when="SGLang's runtime states hold whole strategies, and plugins may choose them",
        process="scheduler",
    )


# -- the start of a worker ---------------------------------------------------------------------


@_wrapped("EAGLEWorkerV2.init_cuda_graphs")
def init_cuda_graphs(original: Upstream, worker: EagleWorker) -> None:
    from tlt_sglang.engine import engine

    engine.require().begin_capture(worker)
    original(worker)
    engine.require().build_step(worker)


@wraps_upstream(
    f"{_MODULE}:EagleDraftWorker._capture_cuda_graphs",
    why="graphs as large as several strategies together are used by none of them",
    remove_when="SGLang captures graphs for whole strategies",
    process="scheduler",
    only_on="cuda",
)
def capture_cuda_graphs(original: Upstream, worker: DraftWorker) -> None:
    from tlt_sglang.engine import build, engine

    one = engine.require()
    with build.drafter_capture(one.config, one.device, one.step):
        original(worker)


# -- a decode step, in this order --------------------------------------------------------------


@_wrapped("EAGLEWorkerV2.forward_batch_generation")
def forward_batch_generation(
    original: Upstream, worker: EagleWorker, batch: Batch, *args: object, **kwargs: object
) -> object:
    if not (batch.forward_mode.is_extend() or batch.is_extend_in_batch):
        _step().choose(batch)
    result = original(worker, batch, *args, **kwargs)
    if batch.return_hidden_states:
        from tlt_sglang.engine import hidden_states

        hidden_states.put_last(result)
    return result


@_wrapped("EagleDraftWorker.draft")
def draft(
    original: Upstream,
    worker: DraftWorker,
    batch: Batch,
    **options: object,
) -> VerifyInput:
    upstream = functools.partial(original, worker, **options)
    return _step().draft(upstream, batch, worker.topk)


@wraps_upstream(
    f"{_MODULE}:EagleDraftWorker.draft_forward",
    why="drafts are chosen with the target's noise; and on CPU the framework around a draft step "
    "takes longer than the drafter's layer",
    remove_when="SGLang drafts with the noise of a seed, and its CPU draft step costs no more than "
    "its matrix products",
    process="scheduler",
)
def draft_forward(
    original: Upstream, worker: DraftWorker, forward_batch: DraftForwardBatch
) -> object:
    from tlt_sglang.cpu import drafting
    from tlt_sglang.engine import engine

    if engine.require().device != "cpu":
        noise = _step().noise
        with contextlib.nullcontext() if noise is None else noise.drafting(forward_batch):
            return original(worker, forward_batch)
    propose = engine.require().proposals(worker, forward_batch.sampling_info)
    return drafting.draft(original, worker, forward_batch, propose)


@_wrapped("EagleDraftWorker._draft_extend_for_decode")
def draft_extend_for_decode(
    original: Upstream,
    worker: DraftWorker,
    batch: Batch,
    batch_result: StepResult,
    **kwargs: object,
) -> None:
    upstream = functools.partial(_extend(original), worker, batch, batch_result, **kwargs)
    _step().draft_extend(upstream, batch, batch_result)


def _extend(original: Upstream) -> Upstream:
    """Return SGLang's draft-extend, or on CPU ours."""
    from tlt_sglang.engine import engine

    if engine.require().device != "cpu":
        return original
    from tlt_sglang.cpu import drafting

    def extend(worker: DraftWorker, batch: Batch, *args: Any, **kwargs: Any) -> None:
        propose = engine.require().proposals(worker, batch.sampling_info)
        drafting.extend(original, worker, batch, *args, propose=propose, **kwargs)

    return extend


@wraps_upstream(
    f"{_MODULE}:EAGLEWorkerV2.on_verify_complete_cpu",
    why="SGLang updates its own totals only when it prints a log line",
    remove_when="SGLang's accept-length totals are current at any time",
    process="scheduler",
)
def on_verify_complete_cpu(
    original: Upstream,
    worker: EagleWorker,
    num_correct_drafts_per_req: list[int],
    batch_size: int = 0,
) -> None:
    _step().verified(num_correct_drafts_per_req)
    original(worker, num_correct_drafts_per_req, batch_size)


# -- a prefill: the target's, and inside it the drafter's --------------------------------------


@_wrapped("EagleDraftWorker._draft_extend_for_prefill")
def draft_extend_for_prefill(
    original: Upstream, worker: DraftWorker, batch: Batch, *args: object, **kwargs: object
) -> object:
    return _step().prefill(functools.partial(original, worker, batch, *args, **kwargs), batch)


# -- coupled sampling --------------------------------------------------------------------------


@wraps_upstream(
    f"{_MODULE}:renorm_draft_probs",
    why="drafts are chosen with the target's noise",
    remove_when="SGLang drafts with the noise of a seed",
    process="scheduler",
    only_on="cuda",
)
def renorm_draft_probs(original: Upstream, logits: torch.Tensor, *args: object) -> object:
    noise = _step().noise
    return original(logits if noise is None else noise.scores(logits), *args)


PATCHES = (
    init_cuda_graphs,
    capture_cuda_graphs,
    forward_batch_generation,
    draft,
    draft_forward,
    draft_extend_for_decode,
    on_verify_complete_cpu,
    draft_extend_for_prefill,
    renorm_draft_probs,
)
