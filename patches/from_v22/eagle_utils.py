"""sglang.srt.speculative.eagle_utils, in the scheduler process: sampling on CPU, and slots."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import DecodeBatch
    from tlt_sglang.upstream.protocols import SamplingInfo, Upstream

_MODULE = "sglang.srt.speculative.eagle_utils"
_REMOVE = "SGLang's CPU verification applies temperature, top-k, top-p and min-p"


@wraps_upstream(
    f"{_MODULE}:_verify_uses_greedy",
    why="upstream ignores the temperature in speculative decoding on CPU",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
)
def verify_uses_greedy(original: Upstream, *, is_cpu: bool, **flags: bool) -> object:
    return original(is_cpu=False, **flags)


@wraps_upstream(
    f"{_MODULE}:_verify_coins",
    why="the sampling kernel needs the filters of the batch, including min-p",
    remove_when=_REMOVE,
    process="scheduler",
    only_on="cpu",
)
def verify_coins(original: Upstream, *, sampling_info: SamplingInfo, **arguments: object) -> object:
    from tlt_sglang.cpu import sampling

    sampling.remember(sampling_info)
    return original(sampling_info=sampling_info, **arguments)


@wraps_upstream(
    f"{_MODULE}:eagle_prepare_for_decode",
    why="where the KV pool is short, the positions of drafts have no slot",
    remove_when="SGLang finishes with speculation every request that it finishes without",
    process="scheduler",
)
def eagle_prepare_for_decode(original: Upstream, batch: DecodeBatch) -> None:
    from tlt_sglang.engine import engine

    engine.require().step.slots.prepare(functools.partial(original, batch), batch)


PATCHES = (verify_uses_greedy, verify_coins, eagle_prepare_for_decode)
