"""What every strategy costs, learned before a server is ready.

A fresh engine knows no costs, and would learn them on its users' first requests, by trying. So
SGLang's custom warm-up, which runs before it listens, decodes a few batches of the smallest, a
middle and the largest size while all strategies take turns (`strategy.driver`). Nothing of it is
among the figures of strategies, in the harvest log, or left in a cache.

Runs in the HTTP (main) process. An engine that an RL stack embeds has no warm-ups, and learns as it
goes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from tlt_sglang.config.sglang_arguments import CALIBRATION
from tlt_sglang.engine import engine

STEPS = 3
"""Of every strategy, in a batch, if three of four tokens are drafts."""
MOST_REQUESTS = 64
PROMPT = 64
"""Tokens of a prompt."""
SECONDS = 10.0
"""After which the rest is left to be learned: the machine is busy with something else."""

logger = logging.getLogger(__name__)


def sizes(running: int | None, queued: int | None = None) -> list[int]:
    """The batch sizes to decode where so many requests may run, or be queued: small ones first,
    which take the least time and gain the most."""
    largest = max(1, min(running or MOST_REQUESTS, queued or MOST_REQUESTS, MOST_REQUESTS))
    return sorted({1, max(1, round(largest**0.5)), largest})


def register() -> None:
    """Make the warm-up known to SGLang."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(CALIBRATION)(calibrate)


async def calibrate(disaggregation_mode: str, tokenizer_manager: Any) -> None:
    """The warm-up. What goes wrong with it is logged, and costs what it would have told."""
    assert engine.current is not None
    if disaggregation_mode != "null":
        return
    started = time.perf_counter()
    longest = 4 * STEPS * len(engine.current.config.pool)
    limits = tokenizer_manager.server_args
    tokens = min(longest, tokenizer_manager.context_len // 2)
    try:
        async with asyncio.timeout(SECONDS):
            for size in sizes(limits.max_running_requests, limits.max_queued_requests):
                if not await _order(tokenizer_manager, True):
                    return
                await _decode(tokenizer_manager, size, tokens)
    except TimeoutError:
        logger.warning("The strategies are calibrated in part only: it took too long.")
    except Exception as error:
        logger.warning("The strategies are not calibrated: %s", error)
    finally:
        tokenizer_manager.abort_request(abort_all=True)
        await tokenizer_manager.flush_cache(timeout_s=SECONDS)
        await _order(tokenizer_manager, False)
    logger.info("Calibration took %.1f s.", time.perf_counter() - started)


async def _order(tokenizer_manager: Any, on: bool) -> bool:
    """Whether every scheduler has strategies to calibrate, and begins or ends it."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    from tlt_sglang.engine.admin import ORDER

    told = SetInternalStateReq(server_args={ORDER: {"calibrate": on}})
    return all(await tokenizer_manager.set_internal_state(told))


async def _decode(tokenizer_manager: Any, size: int, tokens: int) -> None:
    """A batch of `size` requests; those that are accepted more end earlier."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    vocab = tokenizer_manager.model_config.vocab_size
    batch = GenerateReqInput(
        input_ids=[[(97 * i + 7 * j) % vocab for j in range(PROMPT)] for i in range(size)],
        sampling_params={"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True},
    )
    async for _ in tokenizer_manager.generate_request(batch, None):
        pass
