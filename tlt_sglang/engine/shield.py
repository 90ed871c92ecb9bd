"""The last line of defence in the scheduler: a request that raises is ended, not the engine.

`admit` refuses what it knows before a request is scheduled. Should one still raise, while it is
received, while its sampling parameters become tensors, in its own logit processor, or when its
answer is examined for an end, it is aborted with a message, and the others go on. An exception that
is not one request's ends the process as before: the engine's own faults are not hidden.

Runs in the scheduler process. Every rank sees the same requests and decides alike. Nothing here
waits for a device.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream
from tlt_sglang.errors import BadRequest, TltError

if TYPE_CHECKING:
    from tlt_sglang.upstream.results import AnsweredRequest
    from tlt_sglang.upstream.scheduled import (
        ArrivedRequest,
        IntakeScheduler,
        ProcessedSampling,
        Processor,
        ScheduledBatch,
        ScheduledRequest,
    )

logger = logging.getLogger(__name__)

_OF_DEVICES = ("CUDA", "HIP", "NCCL", "cuBLAS", "out of memory")
"""RuntimeErrors of PyTorch with one of these words are the engine's."""


def is_of_request(error: Exception) -> bool:
    """Return True if an exception can come from the values of a request, not from the engine."""
    if isinstance(error, (MemoryError, OSError, SystemError)):
        return False
    if isinstance(error, TltError):
        return isinstance(error, BadRequest)
    if isinstance(error, RuntimeError):
        return not any(word in str(error) for word in _OF_DEVICES)
    return True


def sentence(error: Exception) -> str:
    """Return the message of a request that is ended because of `error`, on one line."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"The request was ended because its parameters cannot be processed ({text[:300]})."


# ---- receiving -----------------------------------------------------------------------------------


def process(
    original: Callable[[Sequence[object]], None],
    scheduler: IntakeScheduler,
    received: Sequence[object],
) -> None:
    """Process what has arrived, one after the other; requests that raise are answered by aborts."""
    for each in received:
        try:
            original([each])
        except Exception as error:
            requests = upstream.current().tokenized_requests(scheduler, each)
            if not requests or not is_of_request(error):
                raise
            for request in requests:
                _refuse(scheduler, request, error)
    if not received:
        original(received)


def receive(
    original: Callable[..., None],
    scheduler: IntakeScheduler,
    arrived: ArrivedRequest,
    **options: object,
) -> None:
    """Take a request into the queue, or answer it with an abort if that raises."""
    try:
        original(scheduler, arrived, **options)
    except Exception as error:
        if not is_of_request(error):
            raise
        _refuse(scheduler, arrived, error)


def _refuse(scheduler: IntakeScheduler, arrived: ArrivedRequest, error: Exception) -> None:
    _log(arrived.rid, error)
    _take_back(scheduler, arrived)
    upstream.current().send_abort(scheduler, _abort(arrived, sentence(error)), arrived)


def _take_back(scheduler: IntakeScheduler, arrived: ArrivedRequest) -> None:
    """Undo what a part of its reception did."""
    scheduler.waiting_queue[:] = [
        request for request in scheduler.waiting_queue if request.rid != arrived.rid
    ]
    grammars = scheduler.grammar_manager
    grammars.grammar_queue = [
        request for request in grammars.grammar_queue if request.rid != arrived.rid
    ]
    params = getattr(arrived, "session_params", None)  # embeddings have none
    session = scheduler.session_controller.get(params.id) if params and params.id else None
    if session is not None and session.streaming:
        session.abort_req()


def _abort(arrived: ArrivedRequest, message: str) -> object:
    from sglang.srt.managers.io_struct import AbortReq

    reason = {
        "type": "abort",
        "message": message,
        "status_code": HTTPStatus.BAD_REQUEST,
        "err_type": "BadRequestError",
    }
    return AbortReq(rid=arrived.rid, finished_reason=reason)


# ---- building a batch ----------------------------------------------------------------------------


def sampling_info(
    original: Callable[..., ProcessedSampling], batch: ScheduledBatch, vocab_size: int
) -> ProcessedSampling:
    """Return a batch's sampling parameters as tensors; requests whose own raise are aborted."""
    try:
        info = original(batch, vocab_size)
    except Exception as error:
        if not is_of_request(error) or not _abort_each(original, batch, vocab_size):
            raise
        info = original(batch, vocab_size)
    for key, processor, rows in upstream.current().processors(info):
        upstream.current().set_processor(info, key, ShieldedProcessor(processor))
        for row in rows:
            request = batch.reqs[row]
            info.custom_params[row] = Parameters(weakref.proxy(request), info.custom_params[row])
    return info


@dataclass
class _Alone:
    """A batch of one request, which penalties refer to weakly, as to SGLang's batches."""

    reqs: Sequence[ScheduledRequest]
    device: str = "cpu"
    """No device has to take part in the search for the request that raises."""


def _abort_each(
    original: Callable[..., ProcessedSampling], batch: ScheduledBatch, vocab_size: int
) -> bool:
    """Abort the requests that raise by themselves; return whether there is one.

    They stay in the batch, which has their memory, with parameters that cannot raise.
    """
    aborted = False
    for request in batch.reqs:
        try:
            original(_Alone([request]), vocab_size)
        except Exception as error:
            if not is_of_request(error):
                raise
            abort(request, error)
            aborted = True
    return aborted


def abort(request: ScheduledRequest, error: Exception) -> None:
    """End a scheduled request with the next result of its batch, and drop its own parameters."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.sampling.sampling_params import SamplingParams

    if isinstance(request.to_finish, FINISH_ABORT):
        return
    _log(request.rid, error)
    plain = SamplingParams(max_new_tokens=1, temperature=0.0)
    plain.normalize(request.tokenizer)
    request.sampling_params = plain
    request.custom_logit_processor = None
    request.grammar = None
    request.to_finish = FINISH_ABORT(
        sentence(error), HTTPStatus.BAD_REQUEST, err_type="BadRequestError"
    )


NOTHING_TO_DRAW = (
    "the custom logit processor returned logits without a finite maximum, from which no token can "
    "be drawn"
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """A request's parameters for its logit processor, and the request, which may be freed."""

    request: ScheduledRequest
    value: Mapping[str, object] | None


class ShieldedProcessor:
    """A client's logit processor whose exceptions end its own requests only.

    Where it raises for several rows at once, it is called for each by itself. From rows without a
    finite maximum (NaN, or every token ruled out) no token can be drawn: zeros take their place.
    On the CPU such a request is ended, too; on a GPU that would take a wait for the device.
    """

    def __init__(self, processor: Processor) -> None:
        """Wrap `processor`, an instance of the client's class."""
        self.processor = processor

    def __call__(self, logits: torch.Tensor, parameters: Sequence[Parameters]) -> torch.Tensor:
        """Return the logits [rows, vocabulary] of the client's processor, or zeros if it raises."""
        try:
            # It may change them in place before it raises.
            result = self._call(logits.clone(), parameters)
        except Exception as error:
            if not is_of_request(error):
                raise
            rows = [self._one(logits[i : i + 1], each) for i, each in enumerate(parameters)]
            result = torch.cat(rows)
        drawable = torch.isfinite(result.amax(dim=-1, keepdim=True))
        if result.device.type == "cpu":
            for each, row in zip(parameters, drawable.flatten().tolist(), strict=True):
                if not row:
                    abort(each.request, ValueError(NOTHING_TO_DRAW))
        return torch.where(drawable, result, torch.zeros_like(result))

    def _one(self, logits: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        try:
            return self._call(logits.clone(), [parameters])
        except Exception as error:
            if not is_of_request(error):
                raise
            abort(parameters.request, error)
            return torch.zeros_like(logits)

    def _call(self, logits: torch.Tensor, parameters: Sequence[Parameters]) -> torch.Tensor:
        shape = logits.shape
        result = self.processor(logits, [each.value for each in parameters])
        if not isinstance(result, torch.Tensor) or result.shape != shape:
            raise ValueError(
                f"the custom logit processor returned {_describe(result)}, but must return a "
                f"tensor of shape {tuple(shape)}"
            )
        return result.to(logits.dtype)


def _describe(result: object) -> str:
    if isinstance(result, torch.Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    return f"an object of type {type(result).__name__}"


# ---- examining an answer -------------------------------------------------------------------------


class Examination:
    """Ends one request with a message if examining its answer raises, or its grammar has failed.

    A context for each request in each step, so it does little where nothing is wrong.
    """

    __slots__ = ("_request",)

    def __init__(self, request: AnsweredRequest) -> None:
        self._request = request

    def __enter__(self) -> None:
        ending = self._request.to_finish
        if ending is None:
            return
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        if isinstance(ending, FINISH_ABORT) and ending.message.startswith(GRAMMAR_FAILED):
            self._request.to_finish = FINISH_ABORT(
                grammar_sentence(self._request), HTTPStatus.BAD_REQUEST, err_type="BadRequestError"
            )

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or not is_of_request(error):
            return False
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        _log(self._request.rid, error)
        self._request.finished_reason = FINISH_ABORT(
            sentence(error), HTTPStatus.BAD_REQUEST, err_type="BadRequestError"
        )
        return True


GRAMMAR_FAILED = "Grammar accept_token failed"
"""SGLang's message begins so where a grammar refuses a token that was drawn."""


def grammar_sentence(request: AnsweredRequest) -> str:
    """Return why no token could be drawn that a request's grammar allows."""
    fewest = request.sampling_params.min_new_tokens
    accepted = len(getattr(request.grammar, "accepted_tokens", request.output_ids))
    if fewest > accepted:
        return (
            f"min_new_tokens is {fewest}, but the grammar of the request ends after {accepted} "
            "tokens; ask for fewer tokens or for a longer grammar."
        )
    return (
        f"The grammar of the request allows no token after {accepted} tokens of the answer; change "
        "the grammar, or what rules out its tokens (logit_bias, custom_logit_processor)."
    )


def _log(rid: str | None, error: Exception) -> None:
    logger.error("Request %s is ended: %s", rid, sentence(error), exc_info=error)
