"""Seeds and answers in the main process: each request has a seed, and its answer names it.

Where drafter and target choose by the same noise, an answer is a function of weights, prompt and
seed. So a request without a seed gets one here, before it is scheduled; each of several samples has
its own; and `meta_info` has it as `sampling_seed`. With --tlt-log-requests, answers are also added
to the event log.

Runs in the main process and in each tokenizer worker.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from tlt_sglang.engine import admit
from tlt_sglang.engine.request_log import RequestLog
from tlt_sglang.sampling.seeds import SEED_BITS, next_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tlt_sglang.upstream.requests import (
        Answer,
        Manager,
        Request,
        RequestState,
        TokenizedRequest,
    )

SEED = "sampling_seed"
"""The sampling parameter, and the key in `meta_info`."""


class Answers:
    """Adds seeds to requests, and both to their answers and to the log.

    `coupled` states that the engine chooses by the noise of a seed; `log` is the path of the event
    log, None where requests are not logged. Raises EnvironmentProblem if that cannot be written.
    """

    def __init__(self, coupled: bool, log: str | None) -> None:
        self._coupled = coupled
        self._log = None if log is None else RequestLog(log)
        self._generator: random.Random | None = None

    def tokenized(
        self, original: Callable[..., object], manager: Manager, request: Request, *others: object
    ) -> object:
        """Return a request as it is sent to the scheduler, with a seed.

        Raises BadRequest if it cannot be sent.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput

        if self._coupled and isinstance(request, GenerateReqInput):
            self._give_seed(manager, request)
        result = admit.tokenized(original, manager, request, *others)
        if self._log is not None and isinstance(result, TokenizedGenerateReqInput):
            _keep_prompt(request, result.input_ids)
        return result

    def _give_seed(self, manager: Manager, request: Request) -> None:
        if admit.parameters_of(manager, request).get(SEED) is not None:
            return
        if self._generator is None:
            args = manager.server_args
            worker = "" if args.tokenizer_worker_num == 1 else f"/{os.getpid()}"
            self._generator = random.Random(f"{args.random_seed}{worker}")
        _set_seed(request, self._generator.getrandbits(SEED_BITS))

    def sent(self, manager: Manager, tokenized: TokenizedRequest) -> None:
        """Give the next of several samples another seed; they share `tokenized`'s parameters."""
        parameters = getattr(tokenized, "sampling_params", None)
        if not self._coupled or parameters is None or parameters.n == 1:
            return
        # The request that fills the prefix cache before the samples has no token.
        if parameters.sampling_seed is not None and parameters.max_new_tokens != 0:
            _set_seed(manager.rid_to_state[tokenized.rid].obj, parameters.sampling_seed)
            parameters.sampling_seed = next_seed(parameters.sampling_seed)

    def stream(
        self,
        answers: AsyncGenerator[Answer, None],
        manager: Manager,
        request: Request,
        state: RequestState,
    ) -> AsyncGenerator[Answer, None]:
        """Return the answers to one request, of which the last is complete, with its seed."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        if not isinstance(request, GenerateReqInput) or not (self._coupled or self._log):
            return answers
        return self._finished(answers, manager, request, state)

    async def _finished(
        self,
        answers: AsyncGenerator[Answer, None],
        manager: Manager,
        request: Request,
        state: RequestState,
    ) -> AsyncGenerator[Answer, None]:
        async with aclosing(answers):
            async for answer in answers:
                self._finish(answer["meta_info"], manager, request, state)
                yield answer

    def _finish(
        self, meta_info: dict[str, object], manager: Manager, request: Request, state: RequestState
    ) -> None:
        parameters = admit.parameters_of(manager, request)
        if self._coupled:
            meta_info[SEED] = parameters.get(SEED)
        if self._log is not None and meta_info["finish_reason"] and request.log_metrics:
            self._log.add(request, parameters, state.output_ids, meta_info)


def _keep_prompt(request: Request, token_ids: Sequence[int] | None) -> None:
    """Name the token ids of a text in its request, which is logged with the answer."""
    if request.input_ids is None and token_ids is not None and not request.contains_mm_input():
        request.input_ids = list(token_ids)


def _set_seed(request: Request, seed: int) -> None:
    """Name a seed in a request; several may share their parameters."""
    request.sampling_params = {**request.sampling_params, SEED: seed}
