"""Checks every request before it is scheduled, between SGLang's tokenizer manager and `admission`.

Whatever a request contains, it is answered with one sentence and status 400, or it is scheduled;
the rules are in `tlt_sglang.admission`. Runs in the HTTP (main) process, and in each tokenizer
worker. The scheduler has its own last line of defence, in `shield`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from tlt_sglang import upstream
from tlt_sglang.admission.limits import Limits
from tlt_sglang.admission.requests import call_problems, request_problems, tokens_problem
from tlt_sglang.errors import BadRequest

if TYPE_CHECKING:
    from tlt_sglang.upstream.requests import Call, Manager, Request

ERROR_EVENT = b'data: {"error":'
ABORT = b'"type":"abort"'
"""The beginnings of a refusal, and of the finish reason of an aborted request, in a stream."""

_MISREAD = (
    *(TypeError, AttributeError, LookupError, ArithmeticError),
    *(RecursionError, AssertionError),
)
"""SGLang raises them for values of types that it does not expect."""


def split(original: Callable[[Call], None], call: Call, *, generates: bool = True) -> None:
    """Let SGLang split a call into requests; raise BadRequest if its form does not allow that.

    The rules are those of calls that generate; for embeddings there are only SGLang's.
    """
    if generates:
        _refuse(call_problems(vars(call)))
    with _one_sentence():
        original(call)


def begin(original: Callable[..., object], manager: Manager, call: Call, *others: object) -> object:
    """Let SGLang begin a call, whose requests are read here for the first time; return what it
    returns."""
    with _one_sentence():
        return original(manager, call, *others)


def validated(
    original: Callable[..., None],
    manager: Manager,
    request: Request,
    token_ids: Collection[int] | None,
) -> None:
    """Raise BadRequest for a request, and its prompt, that cannot be served."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    generates = isinstance(request, GenerateReqInput)
    if generates:
        _check(manager, request, token_ids)
    with _one_sentence():
        original(manager, request, token_ids)
    # Only now: SGLang has refused it where the server does not allow the client's code.
    if generates and request.custom_logit_processor:
        load_processor(request.custom_logit_processor)


def _check(manager: Manager, request: Request, token_ids: Collection[int] | None) -> None:
    parameters = parameters_of(manager, request)
    ids = None if token_ids and _has_placeholders(manager, request) else token_ids
    with _one_sentence():
        _refuse(request_problems(vars(request), parameters, ids, limits_of(manager)))


def parameters_of(manager: Manager, request: Request) -> dict[str, object]:
    """Return the sampling parameters of a request over those that the server prefers."""
    return {**(manager.preferred_sampling_params or {}), **request.sampling_params}


def _has_placeholders(manager: Manager, request: Request) -> bool:
    """Return True if the token ids may lie outside the vocabulary: those of images and audio.

    A model without them ignores the images and audio of a request.
    """
    return manager.mm_processor is not None and request.contains_mm_input()


def decoding_problem(manager: Manager, tokens: Sequence[object]) -> str | None:
    """Return why `tokens`, ids or lists of ids, cannot be decoded; None if they can."""
    return tokens_problem(tokens, limits_of(manager))


def tokenized(original: Callable[..., object], *arguments: object) -> object:
    """Return a request as it is sent to the scheduler; raise BadRequest if it cannot be."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    with _one_sentence():
        result = original(*arguments)
        if isinstance(result, TokenizedGenerateReqInput):
            _try_to_send(result)
    return result


async def batch(
    original: Callable[..., AsyncGenerator[object, None]],
    manager: Manager,
    call: Call,
    *others: object,
) -> AsyncGenerator[object, None]:
    """Yield the answers to a call with several requests, none of which is sent if one is bad."""
    await _check_all(manager, call)
    upstream.current().drop_unused(manager, call)
    async with aclosing(original(manager, call, *others)) as answers:
        async for answer in answers:
            yield answer


async def stream(response: Any, streams: bool) -> object:
    """Return SGLang's answer to POST /generate; a stream that begins with an error, as that error.

    SGLang sends status 200 before it looks at the request.
    """
    from fastapi.responses import JSONResponse

    if not streams:
        return response
    events = response.body_iterator
    first = await anext(events, None)
    refusal = refusal_in(first) if first is not None else None
    if refusal is not None:
        await events.aclose()
        status, message = refusal
        content = {"error": {"message": message}}
        return JSONResponse(content, status_code=status, background=response.background)
    response.body_iterator = _resumed(first, events)
    return response


def refusal_in(event: bytes) -> tuple[int, str] | None:
    """Return the status and the message of an error in the first event of a stream, if any.

    SGLang sends what the main process refuses as {"error": ...}, and what the scheduler refuses as
    an answer whose finish reason is an abort with a status.
    """
    if not event.startswith(ERROR_EVENT) and ABORT not in event:
        return None
    content = json.loads(event.removeprefix(b"data: "))
    if "error" in content:
        return int(content["error"]["code"]), str(content["error"]["message"])
    reason = content["meta_info"]["finish_reason"]
    if reason is None or not reason.get("status_code"):
        return None
    return int(reason["status_code"]), str(reason["message"])


async def _resumed(
    first: bytes | None, events: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        if first is not None:
            yield first
        async for event in events:
            yield event


def limits_of(manager: Manager) -> Limits:
    """Return what the model and the engine allow."""
    context = manager.context_len
    longest = context - 1 - manager.num_reserved_tokens
    if manager.max_req_input_len is not None:
        longest = min(longest, manager.max_req_input_len - 1)
    return Limits(
        vocabulary=manager.model_config.vocab_size,
        context=context,
        longest_prompt=longest,
        hidden_size=manager.model_config.hidden_size,
        truncates=upstream.current().truncates(manager),
    )


def load_processor(serialized: str) -> object:
    """Return a custom logit processor; raise BadRequest if it cannot be made."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    try:
        processor = CustomLogitProcessor.from_str(serialized)
    # Unpickling runs the client's own code, which may raise anything.
    except Exception as error:
        raise BadRequest(
            f"custom_logit_processor cannot be loaded ({type(error).__name__}: {error}), but must "
            "be a string from CustomLogitProcessor.to_str()."
        ) from error
    if not callable(processor):
        raise BadRequest("custom_logit_processor must be a class whose instances can be called.")
    return processor


async def _check_all(manager: Manager, call: Call) -> None:
    """Tokenize and check all of a call, where SGLang would send each request before the next."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(call, GenerateReqInput) or call.parallel_sample_num != 1:
        return
    count = call.batch_size
    requests: list[Any] = [call[index] for index in range(count)]
    if manager._should_use_batch_tokenization(count, call):
        return
    if manager.tokenizer is None and requests[0].text is not None:
        return
    # Images and embeddings are left to SGLang, which checks each before it sends it.
    if any(each.contains_mm_input() or each.input_embeds is not None for each in requests):
        return
    if requests[0].text is not None:
        prompts, _ = await manager._tokenize_texts([each.text for each in requests])
    else:
        prompts = [each.input_ids for each in requests]
    for request, token_ids in zip(requests, prompts, strict=True):
        manager._validate_one_request(request, token_ids)
        manager._create_tokenized_object(request, request.text, token_ids)
    # SGLang then takes the token ids and does not tokenize again.
    for request, token_ids in zip(requests, prompts, strict=True):
        request.input_ids = token_ids


def _try_to_send(request: Any) -> None:
    """Encode and decode a request without its prompt, as the scheduler does and must not fail."""
    import msgspec
    from sglang.srt.managers import io_struct

    bare = msgspec.structs.replace(
        request,
        input_ids=None,
        input_embeds=None,
        mm_inputs=None,
        positional_embed_overrides=None,
        time_stats=None,
    )
    io_struct._msgpack_decoder.decode(io_struct._msgpack_encoder.encode(bare))


def _refuse(problems: Iterator[str]) -> None:
    for problem in problems:
        raise BadRequest(problem)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn the errors that SGLang raises for unexpected values into BadRequest."""
    try:
        yield
    except _MISREAD as error:
        text = str(error) or type(error).__name__
        raise BadRequest(f"The request has a field of a wrong type or form: {text}.") from error
