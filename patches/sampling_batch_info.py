"""sglang.srt.sampling.sampling_batch_info, in the scheduler process: parameters that raise."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.scheduled import ProcessedSampling, ScheduledBatch


@wraps_upstream(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.from_schedule_batch",
    why="a request whose parameters or logit processor raise ended the engine",
    remove_when="SGLang aborts a request whose parameters or logit processor raise",
    process="scheduler",
)
def from_schedule_batch(
    original: Upstream, cls: type, batch: ScheduledBatch, vocab_size: int
) -> ProcessedSampling:
    from tlt_sglang.engine import engine, shield

    info = shield.sampling_info(partial(original, cls), batch, vocab_size)
    coupled = engine.require().coupled
    if coupled is not None:
        coupled.set_seeds(info, batch.reqs, batch.device)
    return info


PATCHES = (from_schedule_batch,)
