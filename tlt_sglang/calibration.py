"""What every strategy costs, learned before a server is ready.

A fresh engine knows no costs, and would learn them on its users' first requests, by trying. So
SGLang's custom warm-up, which runs before it listens, decodes a few batches of the smallest, a
middle and the largest size while all strategies take turns (`strategy.driver`). Nothing of it is
counted, logged, or left in a cache.

Runs in the HTTP (main) process. An engine that an RL stack embeds has no warm-ups, and learns as it
goes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from tlt_sglang import engine
from tlt_sglang.arguments import CALIBRATION
from tlt_sglang.strategy.driver import CALIBRATION_STEPS

MOST_REQUESTS = 64
PROMPT = 8
"""Tokens of a prompt."""
SECONDS = 10.0
"""After which the rest is left to be learned: the machine is busy with something else."""

logger = logging.getLogger(__name__)


def sizes(most: int | None) -> list[int]:
    """The batch sizes to decode, largest first, where at most so many requests run at once."""
    largest = min(most or MOST_REQUESTS, MOST_REQUESTS)
    return sorted({1, max(1, round(largest**0.5)), largest}, reverse=True)


def register() -> None:
    """Make the warm-up known to SGLang."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(CALIBRATION)(calibrate)


async def calibrate(disaggregation_mode: str, tokenizer_manager: Any) -> None:
    """The warm-up."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    from tlt_sglang.status import ORDER

    assert engine.current is not None
    if disaggregation_mode != "null":
        return

    async def order(on: bool) -> None:
        told = SetInternalStateReq(server_args={ORDER: {"calibrate": on}})
        await tokenizer_manager.set_internal_state(told)

    started = time.perf_counter()
    turns = CALIBRATION_STEPS * len(engine.current.config.pool)
    most = tokenizer_manager.server_args.max_running_requests
    try:
        async with asyncio.timeout(SECONDS):
            for size in sizes(most):
                await order(True)
                await _decode(tokenizer_manager, size, turns)
    except TimeoutError:
        logger.warning("The strategies were calibrated in part only: it took too long.")
        tokenizer_manager.abort_request(abort_all=True)
    await order(False)
    await tokenizer_manager.flush_cache(timeout_s=SECONDS)
    logger.info("Strategies calibrated in %.1f s.", time.perf_counter() - started)


async def _decode(tokenizer_manager: Any, size: int, steps: int) -> None:
    """A batch of `size` requests of about so many steps: who is accepted more ends earlier."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    vocab = tokenizer_manager.model_config.vocab_size
    batch = GenerateReqInput(
        input_ids=[[(97 * i + 7 * j) % vocab for j in range(PROMPT)] for i in range(size)],
        sampling_params={"max_new_tokens": 2 * steps, "temperature": 0.0, "ignore_eos": True},
    )
    async for _ in tokenizer_manager.generate_request(batch, None):
        pass
