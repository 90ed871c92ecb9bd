"""The calibration: it measures what every strategy costs before a server is ready.

A fresh engine knows no costs, and would learn them on its users' first requests, by trying. So
SGLang's custom warm-up, which runs before it listens, decodes a few batches of the smallest, a
middle and the largest size while all strategies take turns (`engine.driver`). None of it enters the
counts of strategies or the harvest log, or stays in a cache.

Runs in the HTTP (main) process. It does not run in an engine that an RL stack embeds, which has no
warm-ups and learns as it goes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from tlt_sglang.config.sglang_arguments import CALIBRATION
from tlt_sglang.engine import engine

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import TokenizerManager

STEPS = 3
"""Steps of every strategy in a batch, if three of four tokens are drafts."""
MAX_REQUESTS = 64
PROMPT = 64
"""Tokens of a prompt."""
SECONDS = 10.0
"""Time limit, beyond which the machine is busy with something else; the rest is learned later."""

logger = logging.getLogger(__name__)


def sizes(running: int | None, queued: int | None = None) -> list[int]:
    """Return the batch sizes to decode where so many requests may run, or be queued.

    Small ones come first: they take the least time and gain the most.
    """
    largest = max(1, min(running or MAX_REQUESTS, queued or MAX_REQUESTS, MAX_REQUESTS))
    return sorted({1, max(1, round(largest**0.5)), largest})


def register() -> None:
    """Register the calibration as a warm-up of SGLang."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(CALIBRATION)(calibrate)


def skip() -> None:
    """Register a warm-up that does nothing, in a process that shares the engine with others.

    Of several tokenizer workers, each would abort the requests that the others calibrate with.
    """
    from sglang.srt.entrypoints.warmup import warmup

    async def learn_later(disaggregation_mode: str, tokenizer_manager: TokenizerManager) -> None:
        pass

    warmup(CALIBRATION)(learn_later)


async def calibrate(disaggregation_mode: str, tokenizer_manager: TokenizerManager) -> None:
    """Run the warm-up; a failure is logged, and leaves the costs to be learned later."""
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
                if not await _switch(tokenizer_manager, True):
                    return
                await _decode(tokenizer_manager, size, tokens)
    except TimeoutError:
        logger.warning("The strategies are calibrated in part only: it took too long.")
    except Exception as error:
        logger.warning("The strategies are not calibrated: %s", error)
    finally:
        # The remaining requests end before the steps of users' requests count.
        tokenizer_manager.abort_request(abort_all=True)
        await tokenizer_manager.flush_cache(timeout_s=SECONDS)
        await _switch(tokenizer_manager, False)
    logger.info("Calibration took %.1f s.", time.perf_counter() - started)


async def _switch(tokenizer_manager: TokenizerManager, on: bool) -> bool:
    """Switch the calibration on or off; return whether every scheduler has several strategies."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    from tlt_sglang.engine.admin import COMMAND_KEY

    request = SetInternalStateReq(server_args={COMMAND_KEY: {"calibrate": on}})
    return all(await tokenizer_manager.set_internal_state(request))


async def _decode(tokenizer_manager: TokenizerManager, size: int, tokens: int) -> None:
    """Decode a batch of `size` requests; those with more accepted drafts end earlier."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    vocab = tokenizer_manager.model_config.vocab_size
    batch = GenerateReqInput(
        input_ids=[[(97 * i + 7 * j) % vocab for j in range(PROMPT)] for i in range(size)],
        sampling_params={"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True},
        log_metrics=False,
    )
    async for _ in tokenizer_manager.generate_request(batch, None):
        pass
