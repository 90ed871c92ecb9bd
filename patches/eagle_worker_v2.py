"""sglang.srt.speculative.eagle_worker_v2, in the scheduler process: a strategy for every step.

Where there is only one strategy, all that is ours here is the count of accepted drafts.
"""

from __future__ import annotations

import functools
from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_MODULE = "sglang.srt.speculative.eagle_worker_v2"
_WHY = "SGLang's adaptive speculation changes the number of steps of a chain, and nothing else"
_REMOVE = "SGLang's runtime states are of whole strategies, and plugins may choose them"


def _engine() -> Any:
    """Of this process. Its `rollout` is None where there is one strategy, its `live` where there is
    no store of drafter versions."""
    from tlt_sglang.engine import engine

    assert engine.current is not None
    return engine.current


@wraps_upstream(
    f"{_MODULE}:EAGLEWorkerV2.on_verify_complete_cpu",
    why="SGLang updates its own totals only when it prints a log line",
    remove_when="SGLang's accept-length totals are current at any time",
    process="scheduler",
    digests={"0.5.23": "05b092eba8277b22"},
)
def on_verify_complete_cpu(
    original: Any, worker: Any, num_correct_drafts_per_req: list[int], batch_size: int = 0
) -> None:
    _engine().observe(num_correct_drafts_per_req)
    original(worker, num_correct_drafts_per_req, batch_size)


def _wrapped(name: str, digest: str) -> Any:
    return wraps_upstream(
        f"{_MODULE}:{name}",
        why=_WHY,
        remove_when=_REMOVE,
        process="scheduler",
        digests={"0.5.23": digest},
    )


@_wrapped("EAGLEWorkerV2.init_cuda_graphs", "fe4035edbfc49f6c")
def init_cuda_graphs(original: Any, worker: Any) -> None:
    _engine().sample_drafts(worker)
    with _engine().capturing(worker.topk):
        original(worker)
    _engine().begin_rollout(worker)


@_wrapped("EAGLEWorkerV2.forward_batch_generation", "dffc98e342ebce80")
def forward_batch_generation(
    original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    rollout = _engine().rollout
    if rollout is None:
        return original(worker, batch, *args, **kwargs)
    rollout.batch = batch
    try:
        return original(worker, batch, *args, **kwargs)
    finally:
        rollout.batch = None


@_wrapped("EAGLEWorkerV2.activate_step_by_batch", "f99181ff37c810cd")
def activate_step_by_batch(original: Any, worker: Any, batch_size: int) -> None:
    rollout, live = _engine().rollout, _engine().live
    if live is not None:
        live.between_steps()
    if rollout is None:
        original(worker, batch_size)
    else:
        rollout.choose(batch_size)


@_wrapped("EagleDraftWorker.draft", "a3ab21439cec938c")
def draft(original: Any, worker: Any, batch: Any, *, with_topology: bool = False) -> Any:
    def upstream(batch: Any) -> Any:
        return original(worker, batch, with_topology=with_topology)

    rollout, sampled = _engine().rollout, _engine().sampled
    if rollout is not None:
        return rollout.draft(upstream, batch)
    return upstream(batch) if sampled is None else sampled.draft(upstream, batch, worker.topk)


def _extend(original: Any) -> Any:
    """SGLang's draft-extend, or on CPU ours."""
    if _engine().device != "cpu":
        return original
    from tlt_sglang.cpu import drafting

    return functools.partial(drafting.extend, original)


@wraps_upstream(
    f"{_MODULE}:EagleDraftWorker.draft_forward",
    why="on CPU the framework around a draft step takes longer than the drafter's layer",
    remove_when="SGLang's CPU draft step costs no more than its matrix products",
    process="scheduler",
    only_on="cpu",
    digests={"0.5.23": "0676db770337c56b"},
)
def draft_forward(original: Any, worker: Any, forward_batch: Any) -> Any:
    from tlt_sglang.cpu import drafting

    return drafting.draft(original, worker, forward_batch)


@_wrapped("EagleDraftWorker._draft_extend_for_decode", "8aba97613607578b")
def draft_extend_for_decode(
    original: Any, worker: Any, batch: Any, batch_result: Any, **kwargs: Any
) -> None:
    rollout, live, sampled = _engine().rollout, _engine().live, _engine().sampled

    def upstream() -> None:
        plain = functools.partial(_extend(original), worker, batch, batch_result, **kwargs)
        if sampled is None:
            plain()
        else:
            sampled.draft_extend(plain, batch, batch_result)

    if live is not None:
        live.decoded(batch, batch_result)
    if rollout is None:
        upstream()
    else:
        rollout.draft_extend(upstream, batch, batch_result)


@_wrapped("EagleDraftWorker._draft_extend_for_prefill", "12bf6e8a51caefea")
def draft_extend_for_prefill(
    original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    rollout, sampled = _engine().rollout, _engine().sampled

    def upstream() -> Any:
        plain = functools.partial(original, worker, batch, *args, **kwargs)
        return plain() if sampled is None else sampled.prefill(plain, batch)

    return upstream() if rollout is None else rollout.prefill(upstream, batch)


@wraps_upstream(
    f"{_MODULE}:sample_draft_proposal",
    why="verification wants the distribution of a drafter with a small vocabulary over the whole",
    remove_when="SGLang's rejection sampling serves drafters with a reduced vocabulary",
    process="scheduler",
    digests={"0.5.23": "bf522edc05e7bba9"},
)
def sample_draft_proposal(original: Any, *args: Any, **kwargs: Any) -> Any:
    probs, chance, token = original(*args, **kwargs)
    sampled = _engine().sampled
    return probs if sampled is None else sampled.spread(probs), chance, token


@wraps_upstream(
    f"{_MODULE}:EAGLEWorkerV2._forward_prefill_batch",
    why="what the target computes of a prompt is logged before the drafter moves its tokens",
    remove_when="SGLang hands the features of prompts to plugins",
    process="scheduler",
    digests={"0.5.23": "8ad343044b03119d"},
)
def forward_prefill_batch(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    live = _engine().live
    if live is not None:
        live.between_steps()  # on idle ranks, too: all of them count the same steps
    if live is None or batch.forward_mode.is_idle():
        return original(worker, batch, *args, **kwargs)
    # The drafter's own prefill moves the tokens by one.
    tokens, starts, counts = batch.input_ids, list(batch.prefix_lens), list(batch.extend_lens)
    result = original(worker, batch, *args, **kwargs)
    live.prefilled(batch, tokens, starts, counts, result.logits_output)
    return result


PATCHES = (
    on_verify_complete_cpu,
    init_cuda_graphs,
    forward_batch_generation,
    activate_step_by_batch,
    draft,
    draft_forward,
    draft_extend_for_decode,
    draft_extend_for_prefill,
    sample_draft_proposal,
    forward_prefill_batch,
)
